//! How much memory this process may use: the machine's, or less where it runs in a control group with a limit.

use std::path::{Path, PathBuf};

/// In bytes; `None` where nothing tells.
pub(crate) fn limit_bytes() -> Option<u64> {
    let text = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = text(Path::new("/proc/meminfo")).and_then(|text| total_bytes(&text));
    let groups = text(Path::new("/proc/self/cgroup")).map(|text| limit_files(&text)).unwrap_or_default();
    // A group without a limit says `max`, or in version 1 a number beyond all memory.
    let limits = groups.iter().filter_map(|path| text(path)?.trim().parse().ok());
    limits.chain(machine).min()
}

/// Of /proc/meminfo, which counts in KiB.
fn total_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Where the limits of the groups in /proc/self/cgroup stand, and of those above them. Lines are `number:controllers:path`; version 2
/// has number 0 and no controllers.
fn limit_files(text: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|one| one == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // In a container the path may be the host's, which is not there: the root is its own group then.
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        files.extend(groups.map(|group| Path::new(root).join(group).join(file)));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let meminfo = "MemTotal:       24542348 kB\nMemFree:        1 kB\n";
        assert_eq!(total_bytes(meminfo), Some(24_542_348 << 10));
        assert_eq!(total_bytes("MemTotal: many"), None);
        let names =
            |text| limit_files(text).iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        assert_eq!(
            names("0::/system.slice/esker.service\n"),
            [
                "/sys/fs/cgroup/system.slice/esker.service/memory.max",
                "/sys/fs/cgroup/system.slice/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            names("4:cpu,cpuacct:/a\n3:memory:/b\n"),
            ["/sys/fs/cgroup/memory/b/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert!(limit_bytes().is_some_and(|bytes| bytes > 0), "this machine has memory");
    }
}
