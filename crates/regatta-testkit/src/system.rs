//! `ip` and `tc`, and the namespaces of this kit and of dead ones.

use crate::Unavailable;
use std::path::Path;
use std::process::{Command, Stdio};

/// What the names of namespaces begin with; the process id of their kit follows.
pub(crate) const PREFIX: &str = "regatta-";
/// Where iproute2 keeps the names.
pub(crate) const FOLDER: &str = "/run/netns";

/// Whether this process may and can make hosts at all.
pub(crate) fn check() -> Result<(), Unavailable> {
    if !cfg!(target_os = "linux") {
        return Err(Unavailable("hosts are network namespaces, which only Linux has".into()));
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

/// Makes the namespace `name`, with its loopback device up. One that is there is of an earlier process with our id.
pub(crate) fn add_namespace(name: &str) -> Result<(), Unavailable> {
    delete_namespace(name);
    ip(&["netns", "add", name])?;
    ip(&["-n", name, "link", "set", "lo", "up"])
}

/// Removes the namespace `name`, if it is there.
pub(crate) fn delete_namespace(name: &str) {
    if Path::new(FOLDER).join(name).exists() {
        // Another kit may be removing the same leftover.
        let _ = ip(&["netns", "del", name]);
    }
}

/// Removes the namespaces of kits whose process is gone.
pub(crate) fn remove_leftovers() {
    // Nobody has made a namespace yet where there is no such folder.
    for entry in std::fs::read_dir(FOLDER).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')?.0.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            delete_namespace(&name);
        }
    }
}

/// Whether the kernel can hold up and lose packets; tried out in `namespace`.
pub(crate) fn has_netem(namespace: &str) -> bool {
    let tried = tc(&["-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]);
    tried.and_then(|()| tc(&["-n", namespace, "qdisc", "del", "dev", "lo", "root"])).is_ok()
}
