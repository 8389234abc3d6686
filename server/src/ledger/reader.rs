//! Reading the ledger in order, proving every record on the way.
//!
//! Each record must be what its chain says, follow the one before it in sequence, and each segment must begin where the one before
//! it ended. Whatever is not so is a gap. A gap is reported, once, with the place from which one could go on; whether to go on is
//! the caller's decision, never this file's.

use std::io;
use std::path::{Path, PathBuf};

use esker_proto::v1;
use prost::Message;

use super::frame::{self, Parsed};
use super::log::Position;
use super::segment::{self, RECORDS_START, SegmentHeader};

/// Reads on from a position.
pub(crate) struct Reader {
    dir: PathBuf,
    at: Position,
    /// The segment that `at` lies in.
    loaded: Option<Loaded>,
    /// The segment whose header was found wrong and reported.
    reported: u64,
}

struct Loaded {
    number: u64,
    bytes: Vec<u8>,
    header: Option<SegmentHeader>,
    /// Header of the segment that follows, once there is one.
    next: Option<(u64, Option<SegmentHeader>)>,
}

/// What is next.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Record(Box<v1::UsageRecord>),
    Gap(Gap),
    /// Nothing more up to where the reader was told to read.
    End,
}

/// Records that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The last sound record before.
    pub(crate) after_sequence: u64,
    /// The first sound record behind; 0 for none yet.
    pub(crate) next_sequence: u64,
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    pub(crate) reason: &'static str,
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { after_sequence, next_sequence, segment, offset, reason } = self;
        write!(
            f,
            "the ledger is damaged behind record {after_sequence}, in segment {segment} at byte {offset} ({reason}); "
        )?;
        match next_sequence {
            0 => write!(f, "no sound record follows"),
            next => write!(f, "the next sound record is {next}"),
        }
    }
}

impl Reader {
    pub(crate) fn new(dir: &Path, at: Position) -> Self {
        Self { dir: dir.to_owned(), at, loaded: None, reported: 0 }
    }

    /// Behind what was read last.
    pub(crate) fn position(&self) -> &Position {
        &self.at
    }

    /// The next record before `bound`, where the ledger is known to end.
    pub(crate) fn next(&mut self, bound: &Position) -> io::Result<Step> {
        loop {
            if self.at.sequence >= bound.sequence && self.at.segment >= bound.segment {
                return Ok(Step::End);
            }
            self.load(bound)?;
            let Some(loaded) = &self.loaded else { return Ok(self.lost(bound, "the segment is gone", None)) };
            if loaded.number != self.at.segment {
                // A segment that is not there.
                return Ok(self.lost(bound, "a segment is missing", None));
            }
            if let Some(reason) = self.wrong_start(loaded) {
                self.reported = self.at.segment;
                return Ok(self.lost(bound, reason, Some(RECORDS_START)));
            }
            let end = self.end_of(loaded, bound);
            let Ok(from) = usize::try_from(self.at.offset) else {
                return Ok(self.lost(bound, "a place beyond the segment", None));
            };
            if self.at.offset >= end {
                if self.at.segment >= bound.segment {
                    // The bound counts more records than there are.
                    return Ok(self.lost(bound, "records are missing at the end", None));
                }
                match &loaded.next {
                    Some((number, Some(header))) if header.previous == loaded.number => {
                        if header.previous_end != self.at.offset
                            || header.first_sequence != self.at.sequence + 1
                        {
                            return Ok(self.lost(bound, "the next segment does not follow", None));
                        }
                        let (segment, chain) = (*number, self.at.chain);
                        let known = chain.is_none_or(|chain| chain == header.chain);
                        if !known {
                            return Ok(self.lost(bound, "the next segment is of another chain", None));
                        }
                        self.at = Position { segment, offset: RECORDS_START, ..self.at.clone() };
                        continue;
                    }
                    _ => {
                        return Ok(self.lost(
                            bound,
                            "the next segment is missing or its header is damaged",
                            None,
                        ));
                    }
                }
            }
            let within =
                loaded.bytes.get(from..usize::try_from(end).unwrap_or(usize::MAX).min(loaded.bytes.len()));
            let (reason, len) = match frame::parse(within.unwrap_or_default()) {
                Parsed::Frame(found) if found.sequence != self.at.sequence + 1 => {
                    ("a record out of sequence", 0)
                }
                Parsed::Frame(found) if self.at.chain.is_some_and(|chain| !found.follows(&chain)) => {
                    ("a record of another chain", 0)
                }
                Parsed::Frame(found) => match v1::UsageRecord::decode(found.payload) {
                    Ok(record) => {
                        let offset = self.at.offset + found.len() as u64;
                        let (sequence, chain) = (found.sequence, Some(found.chain));
                        let record = v1::UsageRecord { sequence, ..record };
                        self.at = Position { segment: self.at.segment, offset, sequence, chain };
                        return Ok(Step::Record(Box::new(record)));
                    }
                    Err(_) => ("a record that cannot be understood", found.len()),
                },
                Parsed::Blank => ("nothing where a record was", 0),
                Parsed::Bad(reason) => (reason, 0),
            };
            return Ok(self.lost(bound, reason, Some(self.at.offset + len.max(1) as u64)));
        }
    }

    /// A gap here, and the reader behind it: at the next sound record of this segment from `from` on, or in a later one.
    fn lost(&mut self, bound: &Position, reason: &'static str, from: Option<u64>) -> Step {
        let before = self.at.clone();
        let in_segment = from.and_then(|from| self.sound_from(from, bound));
        self.at = in_segment.or_else(|| self.sound_segment(bound)).unwrap_or_else(|| bound.clone());
        let next_sequence = if self.at == *bound { 0 } else { self.at.sequence + 1 };
        Step::Gap(Gap {
            after_sequence: before.sequence,
            next_sequence,
            segment: before.segment,
            offset: before.offset,
            reason,
        })
    }

    /// Before the next sound record of the loaded segment.
    fn sound_from(&self, from: u64, bound: &Position) -> Option<Position> {
        let loaded = self.loaded.as_ref().filter(|loaded| loaded.number == self.at.segment)?;
        let end = usize::try_from(self.end_of(loaded, bound)).ok()?.min(loaded.bytes.len());
        let mut from = usize::try_from(from).ok()?;
        loop {
            let (at, found) = frame::resync(loaded.bytes.get(from..end)?)?;
            if found.sequence > self.at.sequence {
                let (segment, offset) = (loaded.number, (from + at) as u64);
                return Some(Position { segment, offset, sequence: found.sequence - 1, chain: None });
            }
            from += at + found.len();
        }
    }

    /// The start of the next segment whose header is sound.
    fn sound_segment(&self, bound: &Position) -> Option<Position> {
        let later = segment::numbers(&self.dir).ok()?.into_iter();
        let mut later = later.filter(|&number| number > self.at.segment && number <= bound.segment);
        later.find_map(|number| {
            let header = header_of(&self.dir, number).ok()??;
            let ahead = header.number == number && header.first_sequence > self.at.sequence;
            let (sequence, chain) = (header.first_sequence.checked_sub(1)?, Some(header.chain));
            ahead.then_some(Position { segment: number, offset: RECORDS_START, sequence, chain })
        })
    }

    fn load(&mut self, bound: &Position) -> io::Result<()> {
        let number = self.at.segment;
        let is_last = number >= bound.segment;
        let is_current = |loaded: &Loaded| {
            // The segment that is written to grows; the others do not.
            let whole =
                if is_last { loaded.bytes.len() as u64 >= bound.offset } else { loaded.next.is_some() };
            loaded.number == number && whole
        };
        if self.loaded.as_ref().is_some_and(is_current) {
            return Ok(());
        }
        let bytes = match std::fs::read(segment::path(&self.dir, number)) {
            Ok(mut bytes) => {
                if is_last {
                    bytes.truncate(usize::try_from(bound.offset).unwrap_or(usize::MAX));
                }
                bytes
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.loaded = None;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let next = if is_last {
            None
        } else {
            let after = segment::numbers(&self.dir)?.into_iter().find(|&other| other > number);
            after.map(|other| Ok::<_, io::Error>((other, header_of(&self.dir, other)?))).transpose()?
        };
        let header = SegmentHeader::parse(&bytes).filter(|header| header.number == number);
        self.loaded = Some(Loaded { number, bytes, header, next });
        Ok(())
    }

    fn wrong_start(&self, loaded: &Loaded) -> Option<&'static str> {
        if self.reported == loaded.number {
            return None;
        }
        let Some(header) = &loaded.header else { return Some("a damaged segment header") };
        if self.at.offset != RECORDS_START {
            return None;
        }
        let follows = header.first_sequence == self.at.sequence + 1
            && self.at.chain.is_none_or(|chain| chain == header.chain);
        (!follows).then_some("a segment that does not follow")
    }

    /// Where the records of the segment end, as far as others say.
    fn end_of(&self, loaded: &Loaded, bound: &Position) -> u64 {
        if loaded.number >= bound.segment {
            return bound.offset;
        }
        match &loaded.next {
            Some((_, Some(header))) if header.previous == loaded.number => header.previous_end,
            _ => loaded.bytes.len() as u64,
        }
    }
}

/// The header of a segment, `None` if it is damaged.
pub(crate) fn header_of(dir: &Path, number: u64) -> io::Result<Option<SegmentHeader>> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(segment::path(dir, number))?;
    let mut bytes = [0; segment::HEADER_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(SegmentHeader::parse(&bytes).filter(|header| header.number == number)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

impl Position {
    /// Before the first record of a ledger.
    pub(crate) fn start(cluster: &str) -> Self {
        let chain = blake3::derive_key("esker 2026-11 ledger chain v1", cluster.as_bytes());
        Self { segment: 1, offset: RECORDS_START, sequence: 0, chain: Some(chain) }
    }

    /// As text, for those who keep it: segment, offset, sequence, chain.
    pub(crate) fn to_cursor(&self) -> String {
        let chain =
            self.chain.map_or_else(|| "-".into(), |chain| blake3::Hash::from(chain).to_hex().to_string());
        format!("{}.{}.{}.{chain}", self.segment, self.offset, self.sequence)
    }

    pub(crate) fn from_cursor(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let mut number = || parts.next()?.parse::<u64>().ok();
        let (segment, offset, sequence) = (number()?, number()?, number()?);
        let chain = match parts.next()? {
            "-" => None,
            hex => Some(*blake3::Hash::from_hex(hex).ok()?.as_bytes()),
        };
        parts.next().is_none().then_some(Self { segment, offset, sequence, chain })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_come_back() {
        let start = Position::start("fleet");
        assert_eq!(Position::from_cursor(&start.to_cursor()), Some(start));
        let unknown = Position { segment: 3, offset: 7, sequence: 9, chain: None };
        assert_eq!(unknown.to_cursor(), "3.7.9.-");
        assert_eq!(Position::from_cursor("3.7.9.-"), Some(unknown));
        for bad in ["", "1", "1.2.3", "1.2.3.xyz", "1.2.3.-.4", "-1.2.3.-"] {
            assert_eq!(Position::from_cursor(bad), None, "{bad:?}");
        }
    }
}
