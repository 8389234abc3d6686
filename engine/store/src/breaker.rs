//! A breaker for a device that fails to read: one bad sector is a record's fault, read after read failing is the device's.
//!
//! After [`FAILURES`] failed reads in a row within [`WITHIN`] nothing is read for a while and everything asked for is a
//! miss at once, without waiting for a device that may take seconds to fail. Then one read is let through; if it works,
//! all is well again, and if not the while doubles, up to [`LONGEST`]. A sick device must not empty the index record by
//! record: while the breaker is open nothing is forgotten for a failed read, and what was on the way here comes back.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::index::Entry;
use crate::stats::Counter;

/// Failed reads in a row that make it the device's fault.
const FAILURES: u32 = 8;
/// The time that they lie within.
const WITHIN: Duration = Duration::from_secs(1);
/// Time without reads, at first.
const SHORTEST: Duration = Duration::from_millis(100);
/// The same, at most.
const LONGEST: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Default)]
pub(crate) struct Breaker {
    state: Mutex<State>,
    /// Records forgotten for failed reads since the last one that worked. The index still has them.
    suspects: Mutex<Vec<Entry>>,
    pub(crate) trips: Counter,
}

#[derive(Default)]
struct State {
    failures: u32,
    first_at: Option<Instant>,
    open: Option<Open>,
}

struct Open {
    /// Then one read is let through.
    until: Instant,
    back_off: Duration,
    probing: bool,
}

impl Breaker {
    /// Whether a read may be tried now.
    pub(crate) fn admits(&self) -> bool {
        let mut state = self.state();
        let Some(open) = &mut state.open else { return true };
        let now = Instant::now();
        if now < open.until {
            return false;
        }
        // If nobody ever hears of this probe, there is another one after the same time.
        (open.until, open.probing) = (now + open.back_off, true);
        true
    }

    /// A read moved what it should.
    pub(crate) fn worked(&self) {
        let mut state = self.state();
        if state.failures == 0 && state.open.is_none() {
            return;
        }
        if state.open.is_some() {
            tracing::info!("the device reads again");
        }
        *state = State::default();
        drop(state);
        self.suspects().clear();
    }

    /// A read failed, and not because the file ends or is gone.
    pub(crate) fn failed(&self) {
        let now = Instant::now();
        let mut state = self.state();
        if let Some(open) = &mut state.open {
            if open.probing {
                open.back_off = (open.back_off * 2).min(LONGEST);
                (open.until, open.probing) = (now + open.back_off, false);
            }
            return;
        }
        if state.first_at.is_none_or(|first| now.duration_since(first) > WITHIN) {
            (state.first_at, state.failures) = (Some(now), 0);
        }
        state.failures += 1;
        if state.failures >= FAILURES {
            self.trips.add(1);
            state.open = Some(Open { until: now + SHORTEST, back_off: SHORTEST, probing: false });
            tracing::error!(
                failures = state.failures,
                "the device fails to read; nothing is read for a while"
            );
        }
    }

    /// Whether the device is held to be at fault.
    pub(crate) fn is_open(&self) -> bool {
        self.state().open.is_some()
    }

    /// Records that are taken back if the device turns out to be at fault. Whoever brings them back holds the
    /// list meanwhile.
    pub(crate) fn suspects(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
