//! Where tests make the ledger fail or die. Outside of tests there is nothing here.

use std::io;

#[cfg(not(test))]
#[derive(Clone, Debug, Default)]
pub(crate) struct Hooks(());

#[cfg(not(test))]
#[allow(clippy::unused_self)]
impl Hooks {
    pub(crate) fn at(&self, _point: &'static str) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn torn(&self, _point: &'static str, _len: usize) -> Option<usize> {
        None
    }

    pub(crate) fn die(&self) {}

    pub(crate) fn dedupes(&self) -> bool {
        true
    }
}

#[cfg(test)]
pub(crate) use tests::Hooks;

#[cfg(test)]
pub(crate) mod tests {
    use super::io;
    use std::sync::{Arc, Mutex};

    /// What is to go wrong.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Hooks(Arc<Mutex<Plan>>);

    #[derive(Debug, Default)]
    struct Plan {
        /// Point, passes left before it happens, and whether the process dies or the operation fails.
        next: Option<(String, u64, Wrong)>,
        dedupe_off: bool,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Wrong {
        Die,
        Fail,
    }

    /// Every point, in the order of a request.
    pub(crate) const POINTS: [&str; 12] = [
        "served",
        "log.torn",
        "log.write",
        "log.sync",
        "log.synced",
        "log.roll",
        "log.rolled",
        "ledger.noted",
        "ledger.indexed",
        "export.read",
        "export.sent",
        "export.acknowledged",
    ];

    impl Hooks {
        /// At the `nth` pass of a point, counted from 0.
        pub(crate) fn plan(&self, point: &str, nth: u64, wrong: Wrong) {
            self.0.lock().unwrap().next = Some((point.to_owned(), nth, wrong));
        }

        pub(crate) fn without_dedupe() -> Self {
            let hooks = Self::default();
            hooks.0.lock().unwrap().dedupe_off = true;
            hooks
        }

        fn due(&self, point: &'static str) -> Option<Wrong> {
            assert!(POINTS.contains(&point), "{point} is not listed");
            let mut plan = self.0.lock().unwrap();
            let (name, left, wrong) = plan.next.as_mut()?;
            if name != point {
                return None;
            }
            if *left > 0 {
                *left -= 1;
                return None;
            }
            let wrong = *wrong;
            plan.next = None;
            Some(wrong)
        }

        pub(crate) fn at(&self, point: &'static str) -> io::Result<()> {
            match self.due(point) {
                None => Ok(()),
                Some(Wrong::Fail) => Err(io::Error::other(format!("made to fail at {point}"))),
                Some(Wrong::Die) => self.die(),
            }
        }

        pub(crate) fn torn(&self, point: &'static str, len: usize) -> Option<usize> {
            self.due(point).map(|_| len / 2)
        }

        /// As SIGKILL would end it: nothing is flushed, nothing is dropped.
        #[allow(clippy::unused_self)]
        pub(crate) fn die(&self) -> ! {
            std::process::abort();
        }

        pub(crate) fn dedupes(&self) -> bool {
            !self.0.lock().unwrap().dedupe_off
        }
    }
}
