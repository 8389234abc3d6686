//! The audit log: what was refused, erased, published or administered. `DIR/audit.jsonl`, append-only, one JSON object per line,
//! each with the BLAKE3 of the line before it, so that a line changed or taken out shows. No token ids, no keys, no KV.
//!
//! Refusals that are repeated are summed ([`refusals`]): callers who do not say who they are, methods and objects that are not
//! the caller's, quotas that are used up. A crash loses the sums of its minute.

mod refusals;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::principal::{Principal, TenantId};
use refusals::{Refusals, Seen};

/// Longest line: the end of the file that is read to find the last one.
const MAX_LINE_BYTES: u64 = 16 << 10;
/// Longest of a line's texts: four of them, with every byte escaped as JSON escapes control characters, fit a line.
const MAX_FIELD_BYTES: usize = 640;
/// End of the file that is looked through for what happened lately.
const RECENT_BYTES: u64 = 256 << 10;

const UNAUTHENTICATED: &str = "unauthenticated";

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Event {
    /// `tenant/account`; a tenant; an address or uid where nobody knows who calls.
    pub(crate) who: String,
    /// Method or operation.
    pub(crate) operation: String,
    /// What it was about.
    pub(crate) object: String,
    /// `ok`, `alert`; or else a refusal: `denied`, `refused`, `unauthenticated`, `unfinished`.
    pub(crate) result: String,
    /// How many, where that says something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) count: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    number: u64,
    unix_ms: u64,
    #[serde(flatten)]
    event: Event,
    /// BLAKE3 of the line before, without its line feed; of nothing for the first.
    previous: String,
}

/// A log whose lines are chained.
pub(crate) struct Verified {
    pub(crate) lines: u64,
    /// BLAKE3 of the last line, without its line feed. Lines that were cut off the end show only to whoever has noted it.
    pub(crate) last: blake3::Hash,
}

/// Why a log was not verified to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unverified {
    /// Which says nothing of what is written there.
    #[error("cannot read {} behind its line {lines}", path.display())]
    Unreadable { path: PathBuf, lines: u64, source: std::io::Error },
    /// What is there is not what was written.
    #[error("line {line} of {} {what}", path.display())]
    Changed { path: PathBuf, line: u64, what: String },
}

/// See the module.
pub(crate) struct Audit {
    path: PathBuf,
    tail: Mutex<Tail>,
    left_out: AtomicU64,
}

struct Tail {
    file: File,
    number: u64,
    previous: blake3::Hash,
    refusals: Refusals,
}

impl Event {
    pub(crate) fn new(who: &Principal, operation: &str, object: impl Into<String>, result: &str) -> Self {
        let who = format!("{}/{}", who.tenant, who.name);
        Self { who, operation: operation.into(), object: object.into(), result: result.into(), count: None }
    }

    /// What the node itself found.
    pub(crate) fn system(operation: &str, object: impl Into<String>) -> Self {
        let (who, result) = ("esker".into(), "alert".into());
        Self { who, operation: operation.into(), object: object.into(), result, count: None }
    }

    /// A method that is not the caller's.
    pub(crate) fn denied(who: &Principal, path: &str) -> Self {
        Self::new(who, path, "", "denied")
    }

    /// Somebody called a method who did not prove to be anyone.
    pub(crate) fn unauthenticated(peer: impl Into<String>, method: &str) -> Self {
        let (who, operation, result) = (peer.into(), method.into(), UNAUTHENTICATED.into());
        Self { who, operation, object: String::new(), result, count: None }
    }

    /// A tenant has used a quota up.
    pub(crate) fn over_quota(tenant: &TenantId, quota: &str) -> Self {
        let (who, operation, result) = (tenant.0.clone(), "quota".into(), "refused".into());
        Self { who, operation, object: quota.into(), result, count: None }
    }

    /// Refusals that are not told apart.
    fn others(result: &str) -> Self {
        let (operation, object) = (String::new(), String::new());
        Self { who: "others".into(), operation, object, result: result.into(), count: None }
    }

    fn is_refusal(&self) -> bool {
        !["ok", "alert"].contains(&&*self.result)
    }

    fn is_strangers(&self) -> bool {
        self.result == UNAUTHENTICATED
    }

    pub(crate) fn count(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    /// The same with its texts cut to what a line has room for: a caller chooses some of them, such as the path of a request.
    fn bounded(&self) -> Self {
        let cut = |text: &String| match text.len() {
            ..=MAX_FIELD_BYTES => text.clone(),
            _ => format!("{}…", &text[..text.floor_char_boundary(MAX_FIELD_BYTES - '…'.len_utf8())]),
        };
        let Self { who, operation, object, result, count } = self;
        let (who, operation, object, result) = (cut(who), cut(operation), cut(object), cut(result));
        Self { who, operation, object, result, count: *count }
    }
}

impl Audit {
    /// Goes on after the last line. A line that a crash cut is taken off; it was never acknowledged.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let opened = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path);
        let mut file = opened.with_context(|| format!("cannot open the audit log {}", path.display()))?;
        let last = last_line(&mut file).with_context(|| format!("cannot read {}", path.display()))?;
        let (number, previous) = match last {
            None => (0, blake3::hash(b"")),
            Some(text) => {
                let line: Line = serde_json::from_str(&text).with_context(|| {
                    format!("the last line of {} is damaged: move the file away to go on", path.display())
                })?;
                (line.number + 1, blake3::hash(text.as_bytes()))
            }
        };
        let tail = Tail { file, number, previous, refusals: Refusals::default() };
        Ok(Self { path: path.to_owned(), tail: Mutex::new(tail), left_out: AtomicU64::new(0) })
    }

    /// Writes an event down, durably, or counts it. A log that cannot be written is reported; it stops nobody's work.
    pub(crate) fn record(&self, event: &Event) {
        self.record_at(event, Instant::now());
    }

    fn record_at(&self, event: &Event, now: Instant) {
        let event = event.bounded();
        let mut tail = self.tail();
        let over = tail.refusals.over(now);
        self.append(&mut tail, &over);
        let seen = if event.is_refusal() { tail.refusals.see(&event, now) } else { Seen::First };
        match seen {
            Seen::First => self.append(&mut tail, &[event]),
            Seen::Again => {}
            Seen::Beyond => {
                self.left_out.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes down what was counted in a minute that is over.
    pub(crate) fn settle(&self, now: Instant) {
        let mut tail = self.tail();
        let over = tail.refusals.over(now);
        self.append(&mut tail, &over);
    }

    fn append(&self, tail: &mut Tail, events: &[Event]) {
        if let Err(error) = events.iter().try_for_each(|event| tail.append(event)) {
            tracing::error!(%error, path = %self.path.display(), "the audit log cannot be written");
        }
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refusals that are only in the number of others.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    /// The newest of what was not allowed, refused or failed, each with its time, the newest first.
    pub(crate) fn refusals(&self, most: usize) -> Vec<(u64, Event)> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(RECENT_BYTES)))?;
            let mut end = Vec::new();
            file.take(RECENT_BYTES).read_to_end(&mut end)?;
            Ok(end)
        };
        let end = read().unwrap_or_else(|error| {
            tracing::warn!(%error, path = %self.path.display(), "the audit log cannot be read");
            Vec::new()
        });
        // The first line may be cut, and then it is none.
        let lines =
            end.split(|&byte| byte == b'\n').rev().filter_map(|line| serde_json::from_slice(line).ok());
        let refused = lines.filter(|line: &Line| line.event.result != "ok");
        refused.map(|line| (line.unix_ms, line.event)).take(most).collect()
    }

    /// Reads a log from its first line, checks the chain, and tells of each event with its time. Also while it is written: what is
    /// behind the last line feed is no line yet.
    pub(crate) fn verify(path: &Path, see: impl FnMut(u64, &Event)) -> Result<Verified, Unverified> {
        let unreadable = |source| Unverified::Unreadable { path: path.to_owned(), lines: 0, source };
        verify(BufReader::new(File::open(path).map_err(unreadable)?), path, see)
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let mut tail = self.tail();
        let counted = tail.refusals.all();
        self.append(&mut tail, &counted);
    }
}

/// [`Audit::verify`] of the lines of a file; `path` is its name in errors.
pub(crate) fn verify(
    mut reader: impl BufRead,
    path: &Path,
    mut see: impl FnMut(u64, &Event),
) -> Result<Verified, Unverified> {
    let mut verified = Verified { lines: 0, last: blake3::hash(b"") };
    let mut text = Vec::new();
    loop {
        text.clear();
        let lines = verified.lines;
        let changed = |what| Unverified::Changed { path: path.to_owned(), line: lines + 1, what };
        let read = (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut text);
        read.map_err(|source| Unverified::Unreadable { path: path.to_owned(), lines, source })?;
        let Some(text) = text.strip_suffix(b"\n") else {
            if text.len() as u64 == MAX_LINE_BYTES {
                return Err(changed("is longer than any of this log".into()));
            }
            return Ok(verified);
        };
        let line: Line = serde_json::from_slice(text)
            .map_err(|error| changed(format!("is no line of this log: {error}")))?;
        if line.number != lines || line.previous != verified.last.to_hex().as_str() {
            return Err(changed("does not follow the line before it".into()));
        }
        see(line.unix_ms, &line.event);
        verified = Verified { lines: lines + 1, last: blake3::hash(text) };
    }
}

impl Line {
    /// The line of an event, and what the next one says of it.
    fn write(&self) -> serde_json::Result<(String, blake3::Hash)> {
        let mut text = serde_json::to_string(self)?;
        let digest = blake3::hash(text.as_bytes());
        text.push('\n');
        Ok((text, digest))
    }
}

impl Tail {
    fn append(&mut self, event: &Event) -> std::io::Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = Line {
            number: self.number,
            unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            event: event.clone(),
            previous: self.previous.to_hex().to_string(),
        };
        let (text, digest) = line.write()?;
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()?;
        (self.number, self.previous) = (self.number + 1, digest);
        Ok(())
    }
}

/// The last whole line; what is behind it is cut off.
fn last_line(file: &mut File) -> std::io::Result<Option<String>> {
    let length = file.metadata()?.len();
    let start = length.saturating_sub(2 * MAX_LINE_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::new();
    file.read_to_end(&mut end)?;
    let (whole, line) = last_of(&end);
    file.set_len(start + whole as u64)?;
    Ok(line.map(|line| String::from_utf8_lossy(line).into_owned()))
}

/// How many bytes are whole lines, and the last of these.
fn last_of(end: &[u8]) -> (usize, Option<&[u8]>) {
    let feed = |bytes: &[u8]| bytes.iter().rposition(|&byte| byte == b'\n');
    let Some(last) = feed(end) else { return (0, None) };
    let first = feed(&end[..last]).map_or(0, |before| before + 1);
    (last + 1, Some(&end[first..last]))
}

/// For fuzzing: a log as it is, and what of it are lines, chained anew. Whether it has a line as it is.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let path = Path::new("audit.jsonl");
    let (whole, last) = last_of(bytes);
    assert!(whole <= bytes.len() && last.is_none_or(|last| last.len() < whole && !last.contains(&b'\n')));
    let mut chained = String::new();
    let (mut number, mut previous) = (0, blake3::hash(b""));
    for text in bytes.split(|&byte| byte == b'\n') {
        let Ok(line) = serde_json::from_slice::<Line>(text) else { continue };
        let line =
            Line { number, previous: previous.to_hex().to_string(), event: line.event.bounded(), ..line };
        let (text, digest) = line.write().expect("it was read");
        assert!(text.len() as u64 <= MAX_LINE_BYTES, "a line of {} bytes", text.len());
        chained += &text;
        (number, previous) = (number + 1, digest);
    }
    let verified = verify(chained.as_bytes(), path, |_, _| {}).expect("every line follows the one before it");
    assert_eq!((verified.lines, verified.last), (number, previous));
    let mut seen = 0;
    verify(bytes, path, |_, _| seen += 1).is_ok_and(|verified| {
        assert_eq!(verified.lines, seen);
        seen > 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verify(path: &Path) -> Result<u64, Unverified> {
        let mut seen = 0;
        let verified = Audit::verify(path, |_, _| seen += 1)?;
        assert_eq!(verified.lines, seen);
        Ok(seen)
    }

    fn event(object: &str) -> Event {
        Event::new(&Principal::local(), "test", object, "ok")
    }

    #[test]
    fn the_chain_holds_across_restarts_and_shows_what_was_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        for round in 0..3 {
            let audit = Audit::open(&path).unwrap();
            audit.record(&event(&format!("a{round}")));
            audit.record(&event("b"));
        }
        assert_eq!(verify(&path).unwrap(), 6);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("a1", "a9", 1)).unwrap();
        assert!(verify(&path).is_err());
        let without: Vec<&str> =
            text.lines().enumerate().filter(|(at, _)| *at != 2).map(|(_, line)| line).collect();
        std::fs::write(&path, without.join("\n")).unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("line 3"));
    }

    #[test]
    fn a_cut_line_is_taken_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        Audit::open(&path).unwrap().record(&event("a"));
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            let mut torn = whole.clone();
            torn.extend_from_slice(&whole[..cut]);
            std::fs::write(&path, torn).unwrap();
            Audit::open(&path).unwrap().record(&event("b"));
            assert_eq!(verify(&path).unwrap(), 2, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_line_is_named_and_one_that_is_being_written_is_none_yet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        Audit::open(&path).unwrap().record(&event("a"));
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole.clone() + &whole[..10]).unwrap();
        assert_eq!(verify(&path).unwrap(), 1);
        std::fs::write(&path, whole.clone() + "x\n").unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("line 2"));
        std::fs::write(&path, whole + &"x".repeat(1 << 20)).unwrap();
        assert!(verify(&path).unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn what_a_caller_makes_long_stays_a_line_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        // Every byte of the worst is written as six.
        for long in ["/".to_owned() + &"x".repeat(1 << 20), "\u{1}".repeat(1 << 16), "ü".repeat(999)] {
            let audit = Audit::open(&path).unwrap();
            let event = Event { who: long.clone(), result: long.clone(), ..event(&long) };
            audit.record(&Event { operation: long, ..event });
        }
        assert_eq!(verify(&path).unwrap(), 3);
        assert_eq!(Audit::open(&path).unwrap().refusals(9).len(), 3);
    }

    #[test]
    fn a_flood_of_refusals_is_a_few_lines_that_say_how_many_there_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let audit = Audit::open(&path).unwrap();
        let start = Instant::now();
        let minute = std::time::Duration::from_secs(60);
        let quota = Event::over_quota(&TenantId("a".into()), "sessions");
        for number in 0..3000_u32 {
            let stranger = Event::unauthenticated(std::net::Ipv4Addr::from(number).to_string(), "/x");
            for event in [&Event::denied(&Principal::local(), "/x"), &quota, &stranger] {
                audit.record_at(event, start);
            }
            audit.record_at(&event("this is none"), start);
        }
        let mut counts = std::collections::BTreeMap::<_, (u64, u64)>::new();
        let mut read = || {
            counts.clear();
            Audit::verify(&path, |_, event| {
                let (lines, events) = counts.entry((event.who.clone(), event.result.clone())).or_default();
                *lines += 1;
                *events += event.count.unwrap_or(1);
            })
            .unwrap();
            counts.clone()
        };
        let of = |who: &str, result: &str| (who.to_owned(), result.to_owned());
        // At once, and only the first.
        assert_eq!(read()[&of("default/local", "denied")], (1, 1));
        audit.settle(start + minute);
        let counts = read();
        assert_eq!(counts[&of("default/local", "denied")], (2, 3000));
        assert_eq!(counts[&of("a", "refused")], (2, 3000));
        assert_eq!(counts[&of("default/local", "ok")], (3000, 3000), "what is no refusal is all there");
        let strangers = counts.iter().filter(|((_, result), _)| result == UNAUTHENTICATED);
        let (lines, calls) = strangers.fold((0, 0), |sum, (_, of)| (sum.0 + of.0, sum.1 + of.1));
        assert_eq!(calls, 3000);
        assert!(lines < 30, "{lines} lines of callers whom nobody knows");
        assert!(audit.left_out() > 2900);
        // What was counted is not lost when the node ends.
        for _ in 0..7 {
            audit.record_at(&quota, start + minute);
        }
        drop(audit);
        assert_eq!(read()[&of("a", "refused")], (4, 3007));
    }
}
