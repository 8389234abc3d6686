//! Time of records: the wall clock, as long as it can be believed.
//!
//! Time goes on with the machine's time since boot. A wall clock that stands more than five minutes off that is not followed,
//! and records say so (`clock_skewed`); smaller corrections are. Time never runs backwards, so an hour that has ended gets no
//! more records, whatever clocks do. Across a restart of the process it goes on from the head of the ledger; across one of the
//! machine nothing but "not before the last record" is known.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use esker_store::clock::Clock;

use super::head::Head;

/// How far the wall clock may stand off before it is not believed.
const MAX_SKEW_MS: u64 = 5 * 60 * 1000;

/// Where wall time comes from.
pub(crate) trait WallClock: Send + Sync + 'static {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    fn unix_ms(&self) -> u64;
}

/// The machine's.
pub(crate) struct SystemWallClock;

impl WallClock for SystemWallClock {
    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// See the module.
pub(crate) struct LedgerTime {
    wall: Arc<dyn WallClock>,
    clock: Arc<dyn Clock>,
    boot: [u8; 16],
    /// What the time was when the machine was up for so long.
    anchor: (u64, Duration),
    last_ms: u64,
}

/// A moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) unix_ms: u64,
    pub(crate) skewed: bool,
}

impl LedgerTime {
    /// Goes on from `head`.
    pub(crate) fn open(wall: Arc<dyn WallClock>, clock: Arc<dyn Clock>, head: Option<&Head>) -> Self {
        let boot = super::id::content(clock.boot_id().as_bytes());
        let up = clock.since_boot();
        let (anchor_ms, last_ms) = match head {
            Some(head) if head.boot == boot => {
                let passed = millis(up).saturating_sub(head.since_boot_ms);
                (head.unix_ms.saturating_add(passed), head.unix_ms)
            }
            Some(head) => (wall.unix_ms().max(head.unix_ms), head.unix_ms),
            None => (wall.unix_ms(), 0),
        };
        Self { wall, clock, boot, anchor: (anchor_ms, up), last_ms }
    }

    pub(crate) fn now(&mut self) -> Stamp {
        let up = self.clock.since_boot();
        let expected = self.anchor.0.saturating_add(millis(up.saturating_sub(self.anchor.1)));
        let wall = self.wall.unix_ms();
        let skewed = wall.abs_diff(expected) > MAX_SKEW_MS;
        let now = if skewed { expected } else { wall };
        if !skewed {
            self.anchor = (wall, up);
        }
        self.last_ms = self.last_ms.max(now);
        Stamp { unix_ms: self.last_ms, skewed }
    }

    /// For the head: milliseconds since boot, and which boot.
    pub(crate) fn since_boot(&self) -> (u64, [u8; 16]) {
        (millis(self.clock.since_boot()), self.boot)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Both clocks of a machine, set by hand.
    pub(crate) struct ManualClocks(pub(crate) Mutex<(u64, Duration, String)>);

    impl ManualClocks {
        pub(crate) fn new(unix_ms: u64) -> Arc<Self> {
            Arc::new(Self(Mutex::new((unix_ms, Duration::from_secs(1000), "boot".into()))))
        }

        pub(crate) fn pass(&self, time: Duration) {
            let mut now = self.0.lock().unwrap();
            now.0 += millis(time);
            now.1 += time;
        }

        pub(crate) fn jump(&self, unix_ms: u64) {
            self.0.lock().unwrap().0 = unix_ms;
        }
    }

    impl WallClock for ManualClocks {
        fn unix_ms(&self) -> u64 {
            self.0.lock().unwrap().0
        }
    }

    impl Clock for ManualClocks {
        fn boot_id(&self) -> String {
            self.0.lock().unwrap().2.clone()
        }

        fn since_boot(&self) -> Duration {
            self.0.lock().unwrap().1
        }
    }

    const NOON: u64 = 1_795_003_200_000;

    #[test]
    fn small_corrections_are_followed_and_jumps_are_not() {
        let clocks = ManualClocks::new(NOON);
        let mut time = LedgerTime::open(clocks.clone(), clocks.clone(), None);
        assert_eq!(time.now(), Stamp { unix_ms: NOON, skewed: false });
        clocks.jump(NOON + 4 * 60_000);
        assert_eq!(time.now(), Stamp { unix_ms: NOON + 240_000, skewed: false });
        clocks.jump(NOON + 240_000 + 10 * 365 * 86_400_000);
        clocks.pass(Duration::from_secs(1));
        assert_eq!(time.now(), Stamp { unix_ms: NOON + 241_000, skewed: true });
        clocks.jump(NOON - 86_400_000);
        clocks.pass(Duration::from_secs(1));
        assert_eq!(time.now(), Stamp { unix_ms: NOON + 242_000, skewed: true });
        clocks.jump(NOON + 242_000 - 60_000);
        assert_eq!(time.now(), Stamp { unix_ms: NOON + 242_000, skewed: false }, "never backwards");
    }

    #[test]
    fn a_restart_is_no_way_around_it() {
        let clocks = ManualClocks::new(NOON);
        let mut time = LedgerTime::open(clocks.clone(), clocks.clone(), None);
        let (since_boot_ms, boot) = time.since_boot();
        let head = Head {
            sequence: 1,
            segment: 1,
            end: 1,
            chain: [0; 32],
            unix_ms: time.now().unix_ms,
            since_boot_ms,
            boot,
        };
        clocks.pass(Duration::from_secs(60));
        clocks.jump(NOON + 30 * 86_400_000);
        let mut time = LedgerTime::open(clocks.clone(), clocks.clone(), Some(&head));
        assert_eq!(time.now(), Stamp { unix_ms: NOON + 60_000, skewed: true });
        // After another boot the wall clock is all there is, but time does not run backwards.
        clocks.0.lock().unwrap().2 = "other".into();
        clocks.jump(NOON - 3_600_000);
        let mut time = LedgerTime::open(clocks.clone(), clocks.clone(), Some(&head));
        assert_eq!(time.now(), Stamp { unix_ms: NOON, skewed: true });
    }
}
