//! Launchers' environments: a job where it can be, else an error, and never two runs by themselves into one folder.

mod common;

use common::{Place, fail, have, said, succeed};
use std::process::{Command, Stdio};

/// How many ranks have trained together.
fn ranks(place: &Place, out: &str) -> usize {
    place.summary(out)["peak_rss_bytes"].as_array().unwrap().len()
}

#[test]
fn hydra_starts_a_job() {
    let place = Place::new();
    if !have("mpiexec.hydra") {
        return;
    }
    // Beside each other, and with a script between the launcher and the ranks.
    for script in [false, true] {
        let out = format!("out-{script}");
        let own = place.train(&out, &["--steps", "3"]);
        let mut command = Command::new("mpiexec.hydra");
        command.args(["-n", "2"]);
        if script {
            command.args(["sh", "-c", "\"$0\" \"$@\"; exit $?"]);
        }
        command.arg(own.get_program()).args(own.get_args()).current_dir(own.get_current_dir().unwrap());
        for (name, value) in own.get_envs() {
            if value.is_none() {
                command.env_remove(name);
            }
        }
        succeed(command.stdin(Stdio::null()));
        assert_eq!(ranks(&place, &out), 2);
    }
}

#[test]
fn processes_that_cannot_be_a_job_are_refused_by_the_variable() {
    let place = Place::new();
    for variable in [
        "PMI_RANK",
        "PALS_RANKID",
        "FLUX_TASK_RANK",
        "MV2_COMM_WORLD_RANK",
        "JSM_NAMESPACE_RANK",
        "PMIX_RANK",
    ] {
        for rank in ["0", "1"] {
            let text = fail(place.train("out", &["--steps", "2"]).env(variable, rank));
            assert!(text.contains(variable) && text.contains("WORLD_SIZE"), "{text}");
        }
        assert!(!place.path("out").exists(), "{variable}");
    }
}

#[test]
fn ranks_on_several_hosts_are_told_how_to_pass_an_address() {
    let place = Place::new();
    let mut command = place.train("out", &["--steps", "2"]);
    command.envs([("PMI_RANK", "0"), ("PMI_SIZE", "4"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")]);
    let text = fail(&mut command);
    assert!(text.contains("MASTER_ADDR") && text.contains("-genv"), "{text}");
}

#[test]
fn a_shell_inside_slurm_runs_by_itself() {
    let place = Place::new();
    let shell = [
        ("SLURM_JOB_ID", "7"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_STEP_NUM_TASKS", "1"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_JOB_NODELIST", "node[1-2]"),
        ("SLURM_STEP_NODELIST", "node1"),
    ];
    for (out, step) in [("interactive", "4294967290"), ("batch", "4294967291"), ("one-task", "3")] {
        let mut command = place.train(out, &["--workers", "2", "--steps", "2"]);
        let output = succeed(command.envs(shell).env("SLURM_STEP_ID", step));
        assert_eq!(ranks(&place, out), 2, "{}", said(&output));
    }
}
