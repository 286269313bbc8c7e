//! The device that a rank computes on, and the type of its numbers. Only this file names backends.

use crate::error::{Error, Result};
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The host's device. Every rank keeps its parameters, gradients and optimizer state there.
pub fn device() -> Device {
    Device::flex()
}

/// The host's device with autodiff.
pub fn train_device() -> Device {
    device().autodiff()
}

/// A kind of device: the part of `train.device` before the colon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The host's processor.
    #[default]
    Cpu,
    /// GPUs through Vulkan.
    Vulkan,
    /// NVIDIA's GPUs through CUDA.
    Cuda,
    /// GPUs through the system's graphics interface: Vulkan, Metal or DirectX.
    Wgpu,
}

impl Backend {
    const ALL: [(Self, &str); 4] =
        [(Self::Cpu, "cpu"), (Self::Vulkan, "vulkan"), (Self::Cuda, "cuda"), (Self::Wgpu, "wgpu")];

    /// Its name in a configuration, which is also the name of its cargo feature.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(backend, _)| *backend == self).map_or("cpu", |(_, name)| name)
    }

    /// The devices that the backend finds; empty if this program was built without the backend.
    fn devices(self) -> Vec<Device> {
        #[cfg(any(feature = "vulkan", feature = "cuda", feature = "wgpu"))]
        use burn::tensor::DeviceType;
        match self {
            Self::Cpu => vec![device()],
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Device::enumerate(DeviceType::Vulkan)
                .into_iter()
                .filter(|device| !is_software(device))
                .collect(),
            #[cfg(feature = "cuda")]
            Self::Cuda => Device::enumerate(DeviceType::Cuda).into_iter().collect(),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Device::enumerate(DeviceType::Wgpu).into_iter().collect(),
            #[allow(unreachable_patterns)]
            _ => vec![],
        }
    }
}

/// Whether a Vulkan device is a software driver, which computes on the host's processor. Under Mesa's software driver, the
/// SPIR-V that CubeCL 0.11 generates crashes the process as soon as a kernel uses shared memory. The shaders of `wgpu` run.
#[cfg(feature = "vulkan")]
fn is_software(device: &Device) -> bool {
    // Burn shows the kind of a device only in its debug output.
    format!("{device:?}").contains("kind: Cpu")
}

/// The value of `train.device`: a backend, and after a colon the index of a device. Without an index, the ranks of a host
/// take its devices in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceChoice {
    /// The kind of device.
    pub backend: Backend,
    /// Which device of the backend, counted from 0.
    pub index: Option<usize>,
}

impl DeviceChoice {
    /// Checks that this program was built with the backend.
    ///
    /// # Errors
    /// The program was built without it. The error names the cargo feature to build with.
    pub fn check(self) -> Result<()> {
        let built = match self.backend {
            Backend::Cpu => true,
            Backend::Vulkan => cfg!(feature = "vulkan"),
            Backend::Cuda => cfg!(feature = "cuda"),
            Backend::Wgpu => cfg!(feature = "wgpu"),
        };
        let name = self.backend.name();
        let problem = || format!("this program was built without {name}; build it with `--features {name}`");
        if built { Ok(()) } else { Err(self.usage(&problem())) }
    }

    fn usage(self, problem: &str) -> Error {
        Error::Usage(format!("train.device = \"{self}\": {problem}"))
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.backend.name())?;
        self.index.map_or(Ok(()), |index| write!(f, ":{index}"))
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, index) = text.split_once(':').map_or((text, None), |(name, index)| (name, Some(index)));
        let known = || Backend::ALL.map(|(_, name)| name).join(", ");
        let found = Backend::ALL.iter().find(|(_, known)| *known == name);
        let (backend, _) =
            found.ok_or_else(|| format!("unknown device `{name}`; the devices are {}", known()))?;
        let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is not the index of a device"));
        Ok(Self { backend: *backend, index: index.map(number).transpose()? })
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// The value of `train.precision`: the type of activations, of their gradients and of the parameters' copies that layers
/// compute with. The parameters themselves, the sums of gradients, the optimizer's state and losses are always f32
/// (Micikevicius et al. 2018, "Mixed Precision Training").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision, 32 bits.
    #[default]
    F32,
    /// bfloat16: the range of f32 with 8 bits of precision.
    Bf16,
    /// IEEE half precision: 11 bits of precision, numbers up to 65,504. The loss must be scaled.
    F16,
}

impl Precision {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// The device that one rank computes on, and the type of its layers' numbers.
#[derive(Debug, Clone)]
pub struct Compute {
    device: Device,
    dtype: DType,
}

impl Compute {
    /// Opens the device of `choice` for the rank that is the `local`-th of its host, counted from 0.
    ///
    /// # Errors
    /// The program was built without the backend, the device does not exist, or it does not support `precision`.
    pub fn open(choice: DeviceChoice, precision: Precision, local: usize) -> Result<Self> {
        let name = choice.backend.name();
        choice.check()?;
        let usage = |problem: String| choice.usage(&problem);
        let devices = choice.backend.devices();
        if devices.is_empty() {
            let software = match choice.backend {
                Backend::Vulkan => " Software drivers run only under wgpu.",
                _ => "",
            };
            return Err(usage(format!("{name} finds no device; is its driver installed?{software}")));
        }
        let count = devices.len();
        let index = choice.index.unwrap_or(local % count);
        let device = devices.into_iter().nth(index);
        let device =
            device.ok_or_else(|| usage(format!("{name} finds {count} device(s), counted from 0")))?;
        let dtype = precision.dtype();
        if !device.supports_dtype(dtype) {
            return Err(usage(format!(
                "the device does not support {}; choose another train.precision",
                precision.name()
            )));
        }
        Ok(Self { device, dtype })
    }

    /// Whether layers compute on the engine's own memory, without a copy of the parameters.
    pub fn is_host(&self) -> bool {
        self.dtype == DType::F32 && self.device == device()
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// The device with autodiff.
    pub fn train_device(&self) -> Device {
        self.device.clone().autodiff()
    }

    /// The type of layers' numbers.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A tensor of `values` on the device, without autodiff.
    pub(crate) fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        // The host converts them, so that 16-bit numbers halve the transfer.
        let data = TensorData::new(values, shape).convert_dtype(self.dtype);
        Tensor::from_data(data, (&self.device, self.dtype))
    }
}

/// `tensor` with numbers of type `dtype`.
pub(crate) fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}

/// `tensor` as f32 if its numbers have 16 bits, because sums of many 16-bit numbers are imprecise.
pub(crate) fn at_least_f32<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if matches!(tensor.dtype(), DType::F16 | DType::BF16) { tensor.cast(DType::F32) } else { tensor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_name_and_an_optional_index() {
        for text in ["cpu", "vulkan:1", "cuda:0", "wgpu"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert!("gpu".parse::<DeviceChoice>().unwrap_err().contains("cpu, vulkan, cuda, wgpu"));
        assert!("cuda:x".parse::<DeviceChoice>().unwrap_err().contains("`x`"));
    }

    #[test]
    fn opening_a_missing_device_is_an_error_with_the_reason() {
        let open =
            |text: &str| Compute::open(text.parse().unwrap(), Precision::F32, 0).unwrap_err().to_string();
        assert!(open("cpu:3").contains("finds 1 device(s)"), "{}", open("cpu:3"));
        #[cfg(not(feature = "cuda"))]
        assert!(
            open("cuda").contains("built without cuda; build it with `--features cuda`"),
            "{}",
            open("cuda")
        );
    }
}
