//! Where a rank computes, and with which numbers: the one place that names backends.

use crate::error::{Error, Result};
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The host: where parameters, gradients and the optimizer's state of every rank live.
pub fn device() -> Device {
    Device::flex()
}

/// The same, recording operations for the backward pass.
pub fn train_device() -> Device {
    device().autodiff()
}

/// What `[train] device` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The host's processor.
    #[default]
    Cpu,
    /// GPUs through Vulkan.
    Vulkan,
    /// NVIDIA's GPUs through CUDA.
    Cuda,
    /// GPUs through whatever graphics interface the system has.
    Wgpu,
}

impl Backend {
    const ALL: [(Self, &str); 4] =
        [(Self::Cpu, "cpu"), (Self::Vulkan, "vulkan"), (Self::Cuda, "cuda"), (Self::Wgpu, "wgpu")];

    /// As in a configuration; the cargo feature that it takes has the same name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(backend, _)| *backend == self).map_or("cpu", |(_, name)| name)
    }

    /// The devices that it sees; none where this program was built without it.
    fn devices(self) -> Vec<Device> {
        #[cfg(any(feature = "vulkan", feature = "cuda", feature = "wgpu"))]
        use burn::tensor::DeviceType;
        match self {
            Self::Cpu => vec![device()],
            #[cfg(feature = "vulkan")]
            Self::Vulkan => {
                Device::enumerate(DeviceType::Vulkan).into_iter().filter(|one| !in_software(one)).collect()
            }
            #[cfg(feature = "cuda")]
            Self::Cuda => Device::enumerate(DeviceType::Cuda).into_iter().collect(),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Device::enumerate(DeviceType::Wgpu).into_iter().collect(),
            #[allow(unreachable_patterns)]
            _ => vec![],
        }
    }
}

/// Whether a Vulkan device is a driver that computes on the host's processor. CubeCL 0.11 makes SPIR-V for this backend that
/// takes Mesa's down with the process wherever a kernel shares memory; `wgpu` makes shaders that it does run.
#[cfg(feature = "vulkan")]
fn in_software(device: &Device) -> bool {
    // Its kind is shown, and not told otherwise.
    format!("{device:?}").contains("kind: Cpu")
}

/// `[train] device`: a backend, and after a colon which of its devices; left out, each local rank takes the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceChoice {
    /// The kind of device.
    pub backend: Backend,
    /// Which one.
    pub index: Option<usize>,
}

impl DeviceChoice {
    /// Checks that this program was built with the backend.
    ///
    /// # Errors
    /// It was not: says with what feature to build it.
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
            found.ok_or_else(|| format!("no device is called `{name}`; there are {}", known()))?;
        let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is no number of a device"));
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

/// `[train] precision`: the numbers of activations, their gradients and the copies of parameters that layers see.
/// Parameters themselves, the sums of gradients, the optimizer's state and losses are f32 always (Micikevicius et al.
/// 2018, "Mixed Precision Training").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// The upper half of the 32 bits: their range with 8 bits of precision.
    Bf16,
    /// IEEE half precision: 11 bits of precision, up to 65,504; gradients need a scaled loss.
    F16,
}

impl Precision {
    /// As in a configuration.
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

/// Where one rank computes, and with which numbers.
#[derive(Debug, Clone)]
pub struct Compute {
    device: Device,
    dtype: DType,
}

impl Compute {
    /// On the host in f32: layers see the engine's own memory.
    pub fn host() -> Self {
        Self { device: device(), dtype: DType::F32 }
    }

    /// On the device that `choice` means on the rank that is the `local`-th of its host.
    ///
    /// # Errors
    /// A backend that this program was built without, a device that is not there, numbers that it does not know.
    pub fn open(choice: DeviceChoice, precision: Precision, local: usize) -> Result<Self> {
        let name = choice.backend.name();
        choice.check()?;
        let usage = |problem: String| choice.usage(&problem);
        let devices = choice.backend.devices();
        if devices.is_empty() {
            let software = match choice.backend {
                Backend::Vulkan => " Software drivers run under wgpu alone.",
                _ => "",
            };
            return Err(usage(format!("{name} finds no device here; is its driver installed?{software}")));
        }
        let count = devices.len();
        let index = choice.index.unwrap_or(local % count);
        let device = devices.into_iter().nth(index);
        let device =
            device.ok_or_else(|| usage(format!("{name} finds {count} device(s), counted from 0")))?;
        let dtype = precision.dtype();
        if !device.supports_dtype(dtype) {
            return Err(usage(format!(
                "it knows no {} numbers; choose another train.precision",
                precision.name()
            )));
        }
        Ok(Self { device, dtype })
    }

    /// Whether layers see the engine's own memory, without a copy.
    pub fn is_host(&self) -> bool {
        self.dtype == DType::F32 && self.device == device()
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// The same, recording operations for the backward pass.
    pub fn train_device(&self) -> Device {
        self.device.clone().autodiff()
    }

    /// The type of layers' numbers.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A tensor there, recording nothing.
    pub(crate) fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        // Converted here: half as much goes to the device.
        let data = TensorData::new(values, shape).convert_dtype(self.dtype);
        Tensor::from_data(data, (&self.device, self.dtype))
    }
}

/// The same numbers in another type.
pub(crate) fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}

/// The same numbers in a type in which many of them can be summed.
pub(crate) fn at_least_f32<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if matches!(tensor.dtype(), DType::F16 | DType::BF16) { tensor.cast(DType::F32) } else { tensor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_name_and_perhaps_a_number() {
        for text in ["cpu", "vulkan:1", "cuda:0", "wgpu"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert!("gpu".parse::<DeviceChoice>().unwrap_err().contains("cpu, vulkan, cuda, wgpu"));
        assert!("cuda:x".parse::<DeviceChoice>().unwrap_err().contains("`x`"));
    }

    #[test]
    fn a_device_that_is_not_there_says_why() {
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
