//! Time as the store counts it: seconds that it lived through, not what a wall clock says.
//!
//! A wall clock may jump by years; leases and time to live must neither be cut short nor stretched by that. Store time
//! goes on with the machine's time since boot, across restarts of the process too; the time that the machine itself was
//! off does not count. It is kept in `DIR/clock`, which is written every few seconds and at a close: after a crash of the
//! machine store time is behind by that much at most, so a lease ends late rather than early. A file that is damaged counts
//! as none: time goes on from the newest record then.
//!
//! ```text
//! DIR/clock, one line of text: esker-clock 2 STORE_SECONDS BOOT_ID SECONDS_SINCE_BOOT CHECK
//!                              CHECK: XXH3-64 of what is before it and its space, in hexadecimal
//! ```

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::{Result, StoreError};

/// Where time comes from.
pub trait Clock: Send + Sync + 'static {
    /// Names the boot of the machine; another one after each.
    fn boot_id(&self) -> String;
    /// Time since that boot. Never runs backwards.
    fn since_boot(&self) -> Duration;
}

/// The machine's own clock.
#[derive(Debug)]
pub struct SystemClock {
    boot_id: String,
    since_boot: Duration,
    read_at: std::time::Instant,
}

impl SystemClock {
    /// Reads where the machine stands.
    pub fn new() -> io::Result<Self> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let uptime = fs::read_to_string("/proc/uptime")?;
        let seconds = uptime.split_whitespace().next().and_then(|text| text.parse().ok());
        let seconds: f64 = seconds.ok_or_else(|| io::Error::other("/proc/uptime cannot be understood"))?;
        let since_boot = Duration::from_secs_f64(seconds);
        Ok(Self { boot_id, since_boot, read_at: std::time::Instant::now() })
    }
}

impl Clock for SystemClock {
    fn boot_id(&self) -> String {
        self.boot_id.clone()
    }

    fn since_boot(&self) -> Duration {
        self.since_boot + self.read_at.elapsed()
    }
}

/// Store time, in whole seconds.
pub(crate) struct StoreTime {
    clock: Arc<dyn Clock>,
    path: PathBuf,
    /// Store time when the machine booted; before the store was made, negative.
    at_boot_s: AtomicI64,
}

impl StoreTime {
    /// Goes on from what `dir/clock` says.
    pub(crate) fn open(dir: &Path, clock: Arc<dyn Clock>) -> Result<Self> {
        let path = dir.join("clock");
        let now_s = seconds(clock.since_boot());
        let saved = match fs::read(&path) {
            Ok(text) => {
                let saved = parse(&text);
                if saved.is_none() {
                    tracing::warn!(path = %path.display(), "damaged, or of another version: time goes on from the newest record");
                }
                saved
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(StoreError::io("reading", &path)(error)),
        };
        let store_s = match &saved {
            Some((store_s, boot, since_s)) if *boot == clock.boot_id() => store_s + (now_s - since_s).max(0),
            Some((store_s, ..)) => *store_s,
            None => 0,
        };
        let time = Self { at_boot_s: AtomicI64::new(store_s - now_s), clock, path };
        time.save()?;
        Ok(time)
    }

    /// Goes on from `least_s`, if that is later: a record says that it was put then.
    pub(crate) fn advance_to(&self, least_s: u32) {
        let now_s = seconds(self.clock.since_boot());
        self.at_boot_s.fetch_max(i64::from(least_s) - now_s, Ordering::Relaxed);
    }

    pub(crate) fn now_s(&self) -> u32 {
        let now_s = self.at_boot_s.load(Ordering::Relaxed) + seconds(self.clock.since_boot());
        u32::try_from(now_s.max(0)).unwrap_or(u32::MAX)
    }

    /// Writes where time stands.
    pub(crate) fn save(&self) -> Result<()> {
        let new = self.path.with_extension("new");
        let since_s = seconds(self.clock.since_boot());
        let store_s = self.at_boot_s.load(Ordering::Relaxed) + since_s;
        let said = format!("esker-clock 2 {store_s} {} {since_s}", self.clock.boot_id());
        let text = format!("{said} {:016x}\n", xxh3_64(said.as_bytes()));
        let written = fs::File::create(&new)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &self.path));
        written.map_err(StoreError::io("writing", &self.path))
    }
}

/// Store time of `dir` by its file alone, which is not written; 0 if there is none.
pub(crate) fn peek(dir: &Path, clock: &dyn Clock) -> u32 {
    let saved = fs::read(dir.join("clock")).ok().and_then(|text| parse(&text));
    let store_s = saved.map_or(0, |(store_s, boot, since_s)| match boot == clock.boot_id() {
        true => store_s + (seconds(clock.since_boot()) - since_s).max(0),
        false => store_s,
    });
    u32::try_from(store_s.max(0)).unwrap_or(u32::MAX)
}

/// Store seconds, boot and seconds since that boot.
fn parse(text: &[u8]) -> Option<(i64, String, i64)> {
    let (said, check) = std::str::from_utf8(text).ok()?.trim_end().rsplit_once(' ')?;
    if check != format!("{:016x}", xxh3_64(said.as_bytes())) {
        return None;
    }
    let mut words = said.split_whitespace();
    if (words.next(), words.next()) != (Some("esker-clock"), Some("2")) {
        return None;
    }
    let store_s = words.next()?.parse().ok()?;
    Some((store_s, words.next()?.to_owned(), words.next()?.parse().ok()?))
}

fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::common::ManualClock;

    #[test]
    fn store_time_goes_on_across_restarts_and_not_while_the_machine_is_off() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::new();
        let open = || StoreTime::open(dir.path(), clock.clone()).unwrap();
        let time = open();
        assert_eq!(time.now_s(), 0);
        clock.pass(Duration::from_secs(100));
        assert_eq!(time.now_s(), 100);
        drop(time);
        // The process was down, the machine was not; nothing was saved since the start.
        clock.pass(Duration::from_secs(50));
        let time = open();
        assert_eq!(time.now_s(), 150);
        time.save().unwrap();
        clock.reboot();
        assert_eq!(open().now_s(), 150);
        clock.pass(Duration::from_secs(7));
        assert_eq!(open().now_s(), 157);
    }

    #[test]
    fn a_lost_or_damaged_clock_file_goes_on_from_the_newest_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clock");
        let clock = ManualClock::new();
        let open = || StoreTime::open(dir.path(), clock.clone()).unwrap();
        let time = open();
        time.advance_to(50);
        time.save().unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(peek(dir.path(), clock.as_ref()), 50);
        // Of each bit but those of the line's end.
        let flipped = (0..(whole.len() - 1) * 8).map(|bit| {
            let mut text = whole.clone();
            text[bit / 8] ^= 1 << (bit % 8);
            text
        });
        let foreign = [&b""[..], b"nonsense", b"esker-clock 1 5 b 6", b"\xff", b"esker-clock 2 9 b 6 0"];
        for text in foreign.into_iter().map(<[u8]>::to_vec).chain(flipped) {
            fs::write(&path, &text).unwrap();
            assert_eq!(peek(dir.path(), clock.as_ref()), 0, "{}", text.escape_ascii());
            let time = open();
            time.advance_to(77);
            assert_eq!(time.now_s(), 77, "{}", text.escape_ascii());
            time.advance_to(5);
            assert_eq!(time.now_s(), 77, "never backwards");
        }
    }
}
