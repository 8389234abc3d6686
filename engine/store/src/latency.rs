//! Latencies by powers of two of a microsecond: enough to see which of a thousand calls was slow and what the slowest took,
//! at the cost of three additions a call.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bounds, the last for what is beyond all others.
const BUCKETS: usize = 28;

/// Times that were counted. Bucket `n` holds those of at most 2^n microseconds that are in none before it; the last one,
/// all above 2^26, which are 67 seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    counts: [u64; BUCKETS],
    sum_us: u64,
}

impl Latencies {
    /// How many times were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them together, in microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_us
    }

    /// Bounds in microseconds, and how many times were at most that: ascending and cumulative, as metrics want them. What
    /// is beyond the last bound is only in [`count`](Self::count).
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> {
        let bounds = self.counts.into_iter().take(BUCKETS - 1).enumerate();
        bounds.scan(0, |below, (bucket, count)| {
            *below += count;
            Some((1 << bucket, *below))
        })
    }

    /// The bound below which at least this share of the times lie, in microseconds: at most twice the truth. 0 if there
    /// are none.
    pub fn quantile_us(&self, share: f64) -> u64 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a count")]
        let wanted = ((self.count() as f64 * share).ceil() as u64).max(1);
        let found = self.cumulative().find(|(_, below)| *below >= wanted);
        match found {
            _ if self.count() == 0 => 0,
            Some((bound_us, _)) => bound_us,
            None => u64::MAX,
        }
    }
}

/// Counts times. Any thread may.
#[derive(Debug)]
pub(crate) struct LatencyCounter {
    counts: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

impl Default for LatencyCounter {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)), sum_us: AtomicU64::new(0) }
    }
}

impl LatencyCounter {
    pub(crate) fn add(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        // The exponent of the next power of two.
        let bucket = (u64::BITS - us.saturating_sub(1).leading_zeros()) as usize;
        let bucket = if us == 0 { 0 } else { bucket.min(BUCKETS - 1) };
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Latencies {
        Latencies {
            counts: std::array::from_fn(|bucket| self.counts[bucket].load(Ordering::Relaxed)),
            sum_us: self.sum_us.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_at_the_bound_above_them() {
        let counter = LatencyCounter::default();
        for us in [0, 1, 2, 3, 4, 5, 1000, 1 << 26, (1 << 26) + 1] {
            counter.add(Duration::from_micros(us));
        }
        let seen = counter.get();
        assert_eq!((seen.count(), seen.sum_us()), (9, 1015 + (2 << 26) + 1));
        let at = |bound| seen.cumulative().find(|(us, _)| *us == bound).unwrap().1;
        assert_eq!([at(1), at(2), at(4), at(8), at(512), at(1024), at(1 << 26)], [2, 3, 5, 6, 6, 7, 8]);
        assert_eq!((seen.quantile_us(0.5), seen.quantile_us(0.7)), (4, 1024));
        assert_eq!(seen.quantile_us(1.0), u64::MAX, "beyond the last bound");
        assert_eq!(Latencies::default().quantile_us(0.99), 0);
    }
}
