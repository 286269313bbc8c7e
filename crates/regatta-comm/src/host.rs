//! What this host is called, and how processes know that they share it.

/// This host's name.
pub fn hostname() -> String {
    let name =
        std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    name.map_or("localhost".into(), |name| name.trim().to_string())
}

/// The same for two processes exactly when they run on one host, under the same kernel: its name and the id of its
/// boot, or what `REGATTA_HOST` says.
pub fn host_identity() -> String {
    if let Ok(host) = std::env::var("REGATTA_HOST") {
        return host;
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    format!("{} {}", hostname(), boot.trim())
}
