//! The whole program over an MPI library: the losses and texts of shared memory. Without the feature `mpi`, how to get it.

#![cfg(target_os = "linux")]

mod common;

use common::{Place, fail};
use std::process::Command;

/// What the launcher of the MPI library that the program was built with is called.
fn mpirun() -> String {
    std::env::var("REGATTA_MPIRUN").unwrap_or("mpirun".into())
}

/// A command that finds its `mpirun` and may start ranks as root, more than there are cores.
fn with_mpi(mut command: Command) -> Command {
    command.env("REGATTA_MPIRUN", mpirun());
    for name in
        ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"]
    {
        command.env(name, "1");
    }
    command
}

#[cfg(feature = "mpi")]
mod built {
    use super::common::{losses, said, succeed};
    use super::*;

    /// The same command, started by mpirun as `ranks` ranks.
    fn under_mpirun(ranks: &str, command: &Command) -> Command {
        let mut mpirun = Command::new(mpirun());
        mpirun.args(["-n", ranks]).arg(command.get_program()).args(command.get_args());
        mpirun.current_dir(command.get_current_dir().unwrap());
        with_mpi(mpirun)
    }

    fn there() -> bool {
        let there = Command::new(mpirun()).arg("--version").output().is_ok();
        if !there {
            eprintln!("skipped: {} is not installed", mpirun());
        }
        there
    }

    #[test]
    fn training_and_generating_give_the_bits_of_shared_memory() {
        if !there() {
            return;
        }
        let place = Place::new();
        succeed(&mut place.train("shm", &["--workers", "2", "--transport", "shm"]));
        let shm = place.summary("shm");
        succeed(&mut under_mpirun("2", &place.train("mpi", &["--transport", "mpi"])));
        // The program starts mpirun itself.
        succeed(&mut with_mpi(place.train("own", &["--workers", "2", "--transport", "mpi"])));
        for run in ["mpi", "own"] {
            let summary = place.summary(run);
            assert_eq!((&summary["transport"], &summary["world"]), (&"mpi".into(), &2.into()), "{run}");
            assert_eq!(losses(&summary), losses(&shm), "{run}");
        }
        // Tensor parallel, sharded: reductions, gathers and messages between stages.
        let plan = ["--mesh", "data=2,tensor=2", "--zero", "3", "--steps", "4"];
        succeed(&mut place.train("shm-plan", &[&plan[..], &["--transport", "shm"]].concat()));
        succeed(&mut under_mpirun(
            "4",
            &place.train("mpi-plan", &[&plan[..], &["--transport", "mpi"]].concat()),
        ));
        assert_eq!(losses(&place.summary("mpi-plan")), losses(&place.summary("shm-plan")));

        let generate = |transport: &str| {
            let mut command = place.regatta(&["generate", "shm", "--mesh", "tensor=2", "--tokens", "20"]);
            command.env("REGATTA_TRANSPORT", transport);
            command
        };
        let text = succeed(&mut generate("shm")).stdout;
        assert_eq!(succeed(&mut with_mpi(generate("mpi"))).stdout, text);
    }

    #[test]
    fn other_commands_start_their_ranks_by_mpirun() {
        if !there() {
            return;
        }
        let place = Place::new();
        let bench = "bench collective --op all_reduce --sizes 1K --transport mpi --json";
        let text = said(&succeed(&mut with_mpi(place.regatta(&bench.split(' ').collect::<Vec<_>>()))));
        assert!(text.contains("\"transport\":\"mpi\"") && text.contains("native"), "{text}");
        let program = env!("CARGO_BIN_EXE_regatta");
        let launch = [
            "launch",
            "-n",
            "2",
            "--transport",
            "mpi",
            "--",
            program,
            "bench",
            "collective",
            "--sizes",
            "1K",
        ];
        let text = said(&succeed(&mut with_mpi(place.regatta(&launch))));
        assert!(text.contains("# mpi, 2 ranks"), "{text}");
        // What fails is told by the rank, and the exit code says so.
        let text = fail(&mut with_mpi(
            place.train("bad", &["--workers", "2", "--transport", "mpi", "--steps", "0"]),
        ));
        assert!(text.contains("train.steps"), "{text}");
        let launch = ["launch", "-n", "2", "--transport", "mpi", "--", "sh", "-c", "exit 3"];
        let text = fail(&mut with_mpi(place.regatta(&launch)));
        assert!(text.contains("failed with exit code 3"), "{text}");
    }

    #[test]
    fn another_launcher_is_named() {
        let place = Place::new();
        let mut train = place.train("none", &["--workers", "2", "--transport", "mpi"]);
        let text = fail(train.env("REGATTA_MPIRUN", "no-such-mpirun"));
        assert!(text.contains("cannot start no-such-mpirun") && text.contains("REGATTA_MPIRUN"), "{text}");
    }
}

#[cfg(not(feature = "mpi"))]
#[test]
fn without_the_feature_the_error_says_how_to_build_it() {
    let place = Place::new();
    let commands = [
        place.train("none", &["--workers", "2", "--transport", "mpi"]),
        place.regatta(&["bench", "collective", "--transport", "mpi"]),
        // Ranks that somebody else has started.
        place.regatta(&[
            "launch",
            "-n",
            "2",
            "--transport",
            "shm",
            "--",
            env!("CARGO_BIN_EXE_regatta"),
            "bench",
            "collective",
            "--transport",
            "mpi",
        ]),
    ];
    for mut command in commands.into_iter().map(with_mpi) {
        let text = fail(&mut command);
        assert!(text.contains("cargo install") && text.contains("--features mpi"), "{text}");
    }
}
