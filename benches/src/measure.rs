//! Bytes, time and CPU, and what is made of them.

use std::time::{Duration, Instant};

/// Bytes, and the time and CPU they took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    /// Bytes moved.
    pub bytes: u64,
    /// Time it took, in seconds.
    pub wall_s: f64,
    /// User and system time of all threads, in seconds.
    pub cpu_s: f64,
}

impl Rate {
    /// Adds a piece of work that tells how many bytes it moved.
    ///
    /// # Errors
    /// That of the work; what it moved does not count then.
    pub fn measure<E>(&mut self, work: impl FnOnce() -> Result<u64, E>) -> Result<(), E> {
        let (started, cpu) = (Instant::now(), cpu_s());
        self.bytes += work()?;
        self.wall_s += started.elapsed().as_secs_f64();
        self.cpu_s += cpu_s() - cpu;
        Ok(())
    }

    /// Megabytes a second.
    pub fn mb_s(&self) -> f64 {
        self.bytes as f64 / self.wall_s / 1e6
    }

    /// Core-seconds for each GiB.
    pub fn cpu_s_per_gib(&self) -> f64 {
        self.cpu_s / (self.bytes as f64 / f64::from(1 << 30))
    }
}

/// The value below which `share` of the times lie, in microseconds.
pub fn percentile_us(times: &mut [Duration], share: f64) -> f64 {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    let at = (share * last as f64).round();
    times.get(at as usize).map_or(0.0, |time| time.as_secs_f64() * 1e6)
}

/// The time of each of `rounds` calls.
///
/// # Errors
/// That of the first call that fails.
pub fn times<E>(rounds: usize, mut call: impl FnMut() -> Result<(), E>) -> Result<Vec<Duration>, E> {
    (0..rounds)
        .map(|_| {
            let started = Instant::now();
            call()?;
            Ok(started.elapsed())
        })
        .collect()
}

/// User and system time of this process, all threads; in Linux's ticks of 10 ms.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
