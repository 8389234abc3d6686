//! Opening a ledger: where it ends, and whether that is where it ended.
//!
//! A crash may leave behind the last acknowledged record some of a write that was never acknowledged. That is cut off. Whether
//! the end that is found is the right one is known from three sides: the head, the index, and records behind that say what was
//! flushed before them. If any of them knows of a later record, records are lost: a gap. Then the segment is left as it is, for
//! whoever looks into it, and a new one begins with the next sequence, so that the loss stays visible for ever.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::LedgerSettings;
use super::frame::{self, Parsed};
use super::head::{Head, HeadFile};
use super::log::Position;
use super::reader::Gap;
use super::segment::{self, RECORDS_START, SegmentHeader};

/// What opening found.
pub(crate) struct Recovered {
    /// Where to go on.
    pub(crate) end: Position,
    pub(crate) head_file: HeadFile,
    pub(crate) head: Option<Head>,
    /// Acknowledged records that are lost at the end.
    pub(crate) gap: Option<Gap>,
    /// Bytes of an unacknowledged write that were cut off.
    pub(crate) torn_bytes: u64,
}

/// How a segment reads from its start.
pub(crate) struct Scan {
    /// Behind the last sound record.
    pub(crate) end: Position,
    /// Highest sequence that anything sound in the segment vouches for: it was written or flushed.
    pub(crate) known: u64,
    /// Bytes behind the end that are not blank.
    rest_bytes: u64,
    header: Option<SegmentHeader>,
    reason: &'static str,
}

/// Finds the end of the ledger in `dir`. `indexed` is how far the index has counted.
pub(crate) fn recover(
    dir: &Path,
    settings: &LedgerSettings,
    cluster: &str,
    indexed: Option<&Position>,
) -> io::Result<Recovered> {
    std::fs::create_dir_all(dir)?;
    let (head_file, head) = HeadFile::open(dir)?;
    let start = Position::start(cluster);
    let numbers = segment::numbers(dir)?;
    let known_by = |scan: u64| {
        let by_head = head.as_ref().map_or(0, |head| head.sequence);
        scan.max(by_head).max(indexed.map_or(0, |indexed| indexed.sequence))
    };
    let Some(&last) = numbers.last() else {
        let known = known_by(0);
        let gap = (known > 0).then(|| gap(&start, known, "every segment is gone"));
        let chain = start.chain;
        let header = SegmentHeader {
            number: head.as_ref().map_or(1, |head| head.segment + 1),
            first_sequence: known + 1,
            chain: chain_at(known, head.as_ref(), indexed).or(chain).unwrap_or_default(),
            previous: 0,
            previous_end: 0,
        };
        let end = begin(dir, settings, &header)?;
        return Ok(Recovered { end, head_file, head, gap, torn_bytes: 0 });
    };
    let scan = scan(dir, last)?;
    let known = known_by(scan.known);
    if scan.header.is_some() && scan.end.sequence >= known {
        blank(dir, settings, &scan)?;
        let torn_bytes = scan.rest_bytes;
        return Ok(Recovered { end: scan.end, head_file, head, gap: None, torn_bytes });
    }
    let reason = if scan.header.is_none() { "a damaged segment header" } else { scan.reason };
    let header = SegmentHeader {
        number: last + 1,
        first_sequence: known.max(scan.end.sequence) + 1,
        chain: chain_at(known, head.as_ref(), indexed).unwrap_or_default(),
        previous: last,
        previous_end: head
            .as_ref()
            .filter(|head| head.segment == last)
            .map_or(scan.end.offset, |head| head.end),
    };
    let end = begin(dir, settings, &header)?;
    let gap = gap(&scan.end, known, reason);
    Ok(Recovered { end, head_file, head, gap: Some(gap), torn_bytes: 0 })
}

fn gap(after: &Position, known: u64, reason: &'static str) -> Gap {
    Gap {
        after_sequence: after.sequence,
        next_sequence: known + 1,
        segment: after.segment,
        offset: after.offset,
        reason,
    }
}

fn chain_at(sequence: u64, head: Option<&Head>, indexed: Option<&Position>) -> Option<frame::ChainHash> {
    let by_head = head.filter(|head| head.sequence == sequence).map(|head| head.chain);
    by_head.or_else(|| indexed.filter(|indexed| indexed.sequence == sequence)?.chain)
}

fn begin(dir: &Path, settings: &LedgerSettings, header: &SegmentHeader) -> io::Result<Position> {
    let file = segment::prepare(dir, settings.segment_bytes)?;
    segment::begin(dir, &file, header)?;
    let (segment, sequence, chain) = (header.number, header.first_sequence - 1, Some(header.chain));
    Ok(Position { segment, offset: RECORDS_START, sequence, chain })
}

/// Reads a segment from its start to where it ends.
pub(crate) fn scan(dir: &Path, number: u64) -> io::Result<Scan> {
    let bytes = std::fs::read(segment::path(dir, number))?;
    let header = SegmentHeader::parse(&bytes).filter(|header| header.number == number);
    let mut end = Position { segment: number, offset: RECORDS_START, ..Position::default() };
    let mut known = 0;
    if let Some(header) = &header {
        end.sequence = header.first_sequence.saturating_sub(1);
        end.chain = Some(header.chain);
        known = end.sequence;
    }
    let mut reason = "records are missing at the end";
    let mut at = usize::try_from(RECORDS_START).unwrap_or(usize::MAX);
    while header.is_some() {
        match frame::parse(bytes.get(at..).unwrap_or_default()) {
            Parsed::Frame(found)
                if found.sequence == end.sequence + 1
                    && end.chain.is_some_and(|chain| found.follows(&chain)) =>
            {
                at += found.len();
                end = Position {
                    segment: number,
                    offset: at as u64,
                    sequence: found.sequence,
                    chain: Some(found.chain),
                };
            }
            Parsed::Frame(_) => {
                reason = "a record of another chain";
                break;
            }
            Parsed::Blank => break,
            Parsed::Bad(why) => {
                reason = why;
                break;
            }
        }
    }
    let rest = bytes.get(at..).unwrap_or_default();
    let rest_bytes = rest.iter().rposition(|&byte| byte != 0).map_or(0, |last| last as u64 + 1);
    // Records behind the end: each says what had been flushed when it was written.
    let mut from = 0;
    while rest_bytes > 0
        && let Some((skipped, found)) = frame::resync(&rest[from..])
    {
        known = known.max(found.flushed);
        from += skipped + found.len();
    }
    known = known.max(end.sequence);
    Ok(Scan { end, known, rest_bytes, header, reason })
}

/// Makes everything behind the end blank, and the segment its full size.
fn blank(dir: &Path, settings: &LedgerSettings, scan: &Scan) -> io::Result<()> {
    let path = segment::path(dir, scan.end.segment);
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let len = file.metadata()?.len();
    if scan.rest_bytes == 0 && len >= settings.segment_bytes {
        return Ok(());
    }
    let end = scan.end.offset;
    let zeros = vec![0; 64 << 10];
    let mut at = end;
    while at < settings.segment_bytes.max(len) {
        let some = (settings.segment_bytes.max(len) - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..usize::try_from(some).unwrap_or(zeros.len())], at)?;
        at += some;
    }
    file.sync_all()
}
