//! Joining a job from several threads at once, and what is copied and averaged bit for bit.

use burn::module::{Module, Param};
use burn::prelude::*;
use burn::tensor::{DType, TensorData};
use regatta::comm::rendezvous::{Security, StoreServer};
use std::process::{Command, Stdio};

#[derive(Module, Debug)]
struct Mixed {
    half: Param<Tensor<1>>,
    double: Param<Tensor<1>>,
    whole: Param<Tensor<1, Int>>,
    flags: Param<Tensor<1, Bool>>,
}

fn mixed(seed: f64) -> Mixed {
    let device = Device::flex();
    let float = |dtype| {
        let data = TensorData::from([0.1 + seed, 1.0 / 3.0 + seed]).convert_dtype(dtype);
        Param::from_tensor(Tensor::from_data(data, (&device, dtype)))
    };
    Mixed {
        half: float(DType::F16),
        double: float(DType::F64),
        whole: Param::initialized(burn::module::ParamId::new(), Tensor::from_ints([seed as i32, 7], &device)),
        flags: Param::initialized(
            burn::module::ParamId::new(),
            Tensor::from_bool([seed > 0.5, true], &device),
        ),
    }
}

fn content(model: &Mixed) -> Vec<TensorData> {
    vec![
        model.half.val().into_data(),
        model.double.val().into_data(),
        model.whole.val().into_data(),
        model.flags.val().into_data(),
    ]
}

/// Not a test by itself: a rank, which the test below starts.
#[test]
fn child() {
    if std::env::var("REGATTA_TEST_FACE").is_err() {
        return;
    }
    let threads: Vec<_> =
        (0..8).map(|_| std::thread::spawn(|| regatta::init().map(|group| group.rank()))).collect();
    let ranks: Vec<usize> = threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
    assert_eq!(ranks, [regatta::rank(); 8]);
    // Every type comes over bit for bit.
    let model = regatta::broadcast_parameters(mixed(regatta::rank() as f64), 1).unwrap();
    assert_eq!(content(&model), content(&mixed(1.0)));
    // A mean keeps its type and precision.
    let device = Device::flex();
    let one = TensorData::from([1.0f64, 1.0 + 1e-12 * (1 + regatta::rank()) as f64]);
    let mean = regatta::all_reduce(Tensor::<1>::from_data(one, (&device, DType::F64))).unwrap();
    assert_eq!(mean.into_data().try_into_vec::<f64>().unwrap(), [1.0, (1.0 + 1e-12 + 1.0 + 2e-12) / 2.0]);
    let half = Tensor::<1>::from_data(
        TensorData::from([1.0f32 + regatta::rank() as f32]).convert_dtype(DType::BF16),
        (&device, DType::BF16),
    );
    let mean = regatta::all_reduce(half).unwrap();
    assert_eq!((mean.dtype(), mean.into_data().try_into_vec_as::<f32>().unwrap()), (DType::BF16, vec![1.5]));
    println!("joined once");
}

#[test]
fn threads_that_call_init_at_once_join_once() {
    let server = StoreServer::start("127.0.0.1:0", 2, &Security::default()).unwrap();
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env("REGATTA_TEST_FACE", "joins")
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("REGATTA_STORE", server.addr().to_string())
            .env("REGATTA_TRACE", "off")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let ranks: Vec<_> = (0..2).map(start).collect();
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("joined once"),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn an_error_that_main_returns_is_a_sentence() {
    // What Rust prints when `main` returns an error is its Debug.
    let error = regatta::Error::data("corpus.txt", "is empty; give a text");
    assert_eq!(format!("{error:?}"), "data corpus.txt: is empty; give a text");
    let error = regatta::Error::from(regatta::comm::Error::Rendezvous("rank 1 of 2 did not join".into()));
    assert_eq!(format!("Error: {error:?}"), "Error: rank 1 of 2 did not join");
}
