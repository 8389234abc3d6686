//! Reading a whole ledger offline, to tell whether it is sound.

use std::io;
use std::path::Path;

use super::log::Position;
use super::reader::{Gap, Reader, Step, header_of};
use super::segment::{self, RECORDS_START};
use super::{head, recovery};

/// What a ledger holds and lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) segments: u64,
    pub(crate) records: u64,
    pub(crate) last_sequence: u64,
    pub(crate) gaps: Vec<Gap>,
}

/// Reads every record of the ledger in `dir`, changing nothing. A node may be writing to it: what it adds meanwhile is not read.
pub(crate) fn verify(dir: &Path) -> io::Result<Report> {
    let numbers = segment::numbers(dir)?;
    let head = head::peek(dir)?;
    let (Some(&first), Some(&last)) = (numbers.first(), numbers.last()) else {
        let lost = head.as_ref().map_or(0, |head| head.sequence);
        let gap = Gap {
            after_sequence: 0,
            next_sequence: 0,
            segment: 0,
            offset: 0,
            reason: "every segment is gone",
        };
        let gaps = if lost > 0 { vec![gap] } else { Vec::new() };
        return Ok(Report { last_sequence: lost, gaps, ..Report::default() });
    };
    let scan = recovery::scan(dir, last)?;
    let known = scan.known.max(head.as_ref().map_or(0, |head| head.sequence));
    let bound = Position { sequence: known.max(scan.end.sequence), ..scan.end };
    // What a ledger begins with is not its own to prove: the first header says it.
    let header = header_of(dir, first)?;
    let (sequence, chain) =
        header.map_or((0, None), |header| (header.first_sequence - 1, Some(header.chain)));
    let start = Position { segment: first, offset: RECORDS_START, sequence, chain };
    let mut report =
        Report { segments: numbers.len() as u64, last_sequence: bound.sequence, ..Report::default() };
    if sequence > 0 {
        let (after_sequence, next_sequence, segment, offset) = (0, sequence + 1, first, RECORDS_START);
        let reason = "the first segments are gone";
        report.gaps.push(Gap { after_sequence, next_sequence, segment, offset, reason });
    }
    let mut reader = Reader::new(dir, start);
    loop {
        match reader.next(&bound)? {
            Step::Record(_) => report.records += 1,
            Step::Gap(gap) => report.gaps.push(gap),
            Step::End => return Ok(report),
        }
    }
}
