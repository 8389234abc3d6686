//! Live requests, and the background work that gives way to them.
//!
//! A request that somebody waits for is counted while the node works on it. What runs in the background takes one short step
//! after another and asks before each: while nothing live runs it goes on at once, otherwise it rests until it has had no more
//! than its share of the time. A live request therefore waits for one step at most, and background work never starves.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest sleep without a look at whether the work is still wanted.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The live requests of a node.
#[derive(Default)]
pub(crate) struct Live {
    running: Mutex<usize>,
    changed: Condvar,
}

/// One of them, for as long as this lives.
pub(crate) struct Busy(Arc<Live>);

impl Live {
    /// Counts a request.
    pub(crate) fn enter(self: &Arc<Self>) -> Busy {
        *self.running() += 1;
        Busy(Arc::clone(self))
    }

    /// Requests that are being worked on.
    pub(crate) fn count(&self) -> usize {
        *self.running()
    }

    fn running(&self) -> MutexGuard<'_, usize> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut running = self.0.running();
        *running -= 1;
        if *running == 0 {
            self.0.changed.notify_all();
        }
    }
}

/// The pace of one piece of background work.
pub(crate) struct Pace<'a> {
    live: &'a Live,
    /// Of the time while live requests run, in percent.
    share: u32,
    /// When the step before this one began.
    began: Instant,
}

impl<'a> Pace<'a> {
    pub(crate) fn new(live: &'a Live, share: u32) -> Self {
        Self { live, share: share.min(100), began: Instant::now() }
    }

    /// Waits until the next step may be taken. `false` if `wanted` says meanwhile that there is to be none.
    pub(crate) fn wait(&mut self, wanted: &dyn Fn() -> bool) -> bool {
        let worked = self.began.elapsed();
        // No share: no end of the rest while anything live runs.
        let rest = match self.share {
            0 => None,
            share => Some(worked * (100 - share) / share),
        };
        let rested = Instant::now();
        let mut running = self.live.running();
        while *running > 0 && rest.is_none_or(|rest| rested.elapsed() < rest) {
            if !wanted() {
                return false;
            }
            let left = rest.map_or(LOOK_INTERVAL, |rest| rest.saturating_sub(rested.elapsed()));
            let waited = self.live.changed.wait_timeout(running, left.min(LOOK_INTERVAL));
            running = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(running);
        self.began = Instant::now();
        wanted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_node_makes_nobody_wait() {
        let live = Live::default();
        let mut pace = Pace::new(&live, 0);
        let started = Instant::now();
        for _ in 0..1000 {
            assert!(pace.wait(&|| true));
        }
        assert!(started.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn beside_a_live_request_work_has_its_share_and_no_more() {
        let live = Arc::new(Live::default());
        let _busy = live.enter();
        let (started, mut worked) = (Instant::now(), Duration::ZERO);
        let mut pace = Pace::new(&live, 25);
        for _ in 0..10 {
            let step = Instant::now();
            std::thread::sleep(Duration::from_millis(10));
            worked += step.elapsed();
            assert!(pace.wait(&|| true));
        }
        let part = worked.as_secs_f64() / started.elapsed().as_secs_f64();
        assert!((0.15..=0.26).contains(&part), "{part}");
    }

    #[test]
    fn without_a_share_work_waits_for_the_end_of_the_last_request_or_its_own() {
        let live = Arc::new(Live::default());
        let busy = live.enter();
        assert_eq!(live.count(), 1);
        let mut pace = Pace::new(&live, 0);
        let until = Instant::now() + Duration::from_millis(120);
        assert!(!pace.wait(&|| Instant::now() < until));
        let ended = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(60));
            drop(busy);
        });
        assert!(pace.wait(&|| true));
        assert_eq!(live.count(), 0);
        ended.join().unwrap();
    }
}
