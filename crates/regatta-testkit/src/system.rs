//! Runs `ip` and `tc`, and manages the namespaces of this process and those that ended processes left behind.

use crate::Unavailable;
use std::path::Path;
use std::process::{Command, Stdio};

/// The prefix of the names of namespaces. The id of the process that made them follows.
pub(crate) const PREFIX: &str = "regatta-";
/// Where iproute2 keeps the names of namespaces.
pub(crate) const FOLDER: &str = "/run/netns";

/// Checks that this process can make hosts: on Linux, as root, with iproute2.
pub(crate) fn check() -> Result<(), Unavailable> {
    if !cfg!(target_os = "linux") {
        return Err(Unavailable("hosts need network namespaces, which only Linux has".into()));
    }
    #[cfg(unix)]
    if !rustix::process::geteuid().is_root() {
        return Err(Unavailable("only root may make network namespaces".into()));
    }
    run("ip", &["-V"]).and_then(|()| run("tc", &["-V"]))
}

/// Runs `ip` with `arguments`.
pub(crate) fn ip(arguments: &[&str]) -> Result<(), Unavailable> {
    run("ip", arguments)
}

/// Runs `tc` with `arguments`.
pub(crate) fn tc(arguments: &[&str]) -> Result<(), Unavailable> {
    run("tc", arguments)
}

fn run(program: &str, arguments: &[&str]) -> Result<(), Unavailable> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Unavailable(format!("cannot run `{program}` of iproute2: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(Unavailable(format!("`{program} {}` failed: {}", arguments.join(" "), reason.trim())))
}

/// Makes the namespace `name` and activates its loopback device. If the name exists, it is from an earlier process
/// with the same id, and is removed first.
pub(crate) fn add_namespace(name: &str) -> Result<(), Unavailable> {
    delete_namespace(name);
    ip(&["netns", "add", name])?;
    ip(&["-n", name, "link", "set", "lo", "up"])
}

/// Removes the namespace `name` if it exists.
pub(crate) fn delete_namespace(name: &str) {
    if Path::new(FOLDER).join(name).exists() {
        // This fails if another process removes the same namespace at the same time.
        let _ = ip(&["netns", "del", name]);
    }
}

/// Removes the namespaces of processes that have ended.
pub(crate) fn remove_leftovers() {
    // The folder does not exist before the first namespace is made.
    for entry in std::fs::read_dir(FOLDER).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            delete_namespace(&name);
        }
    }
}

/// Whether the kernel can delay and drop packets. This is tested in `namespace`.
pub(crate) fn has_netem(namespace: &str) -> bool {
    let tried = tc(&["-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]);
    tried.and_then(|()| tc(&["-n", namespace, "qdisc", "del", "dev", "lo", "root"])).is_ok()
}
