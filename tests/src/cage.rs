//! A group of processes with a limit of memory: past it the kernel kills.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A memory cgroup of its own, version 1 or 2. Gone when dropped.
pub struct Cage(PathBuf);

impl Cage {
    /// A new one each time. `None`, with the reason on standard output, where this process may not make one.
    pub fn new(limit_bytes: u64) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("esker-test-{}-{number}", std::process::id());
        let hierarchies =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        for (root, limit) in hierarchies {
            let path = Path::new(root).join(&name);
            if std::fs::create_dir(&path).is_err() {
                continue;
            }
            let cage = Self(path);
            if std::fs::write(cage.0.join(limit), limit_bytes.to_string()).is_ok() {
                return Some(cage);
            }
        }
        println!("SKIPPED: a limit of memory needs root and a memory cgroup that can be written");
        None
    }

    /// The file to which a process writes its number to go in.
    pub fn door(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }

    /// Most memory that was used, and how often the kernel found the limit reached and killed; where it tells.
    pub fn account(&self) -> (Option<u64>, u64) {
        let number = |file: &str| std::fs::read_to_string(self.0.join(file)).ok()?.trim().parse().ok();
        let peak = number("memory.max_usage_in_bytes").or_else(|| number("memory.peak"));
        let kills = ["memory.oom_control", "memory.events"].into_iter().find_map(|file| {
            let text = std::fs::read_to_string(self.0.join(file)).ok()?;
            text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
        });
        (peak, kills.unwrap_or(0))
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        // Not until the last process in it has been waited for.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
