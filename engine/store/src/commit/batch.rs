//! A batch: records that are written, flushed and published together.

use std::sync::mpsc::Sender;
use std::time::Instant;

use esker_prefix::ObjectId;

use super::hold::Hold;
use super::{MAX_BATCH_RECORDS, Outcome, Tail};
use crate::index::Entry;
use crate::io::{AlignedBuf, Permit};
use crate::record::{ContentDigest, HeaderChecksum, PlacedHeader, RecordHeader};
use crate::retention::{Candidate, Context};
use crate::segment::Place;

/// See the module.
pub(super) struct Batch {
    pub(super) number: u64,
    pub(super) started: Instant,
    /// One for each segment that it goes to.
    pub(super) runs: Vec<Run>,
}

/// The records of a batch that go to one segment, and how far they are.
pub(super) struct Run {
    /// The segment, as it was before the first of them.
    pub(super) tail: Tail,
    pub(super) records: Vec<Pending>,
    pub(super) entries: Vec<Entry>,
    /// End of the last of them, in bytes of the segment.
    pub(super) end: u64,
    /// Highest of them.
    pub(super) sequence: u64,
    /// Writes not completed.
    pub(super) writing: usize,
    /// Since when it is being flushed.
    pub(super) flushing: Option<Instant>,
    pub(super) flushed: bool,
    pub(super) failed: bool,
}

/// A record of a batch, and who else put the same object.
pub(super) struct Pending {
    /// In the order of admission.
    pub(super) number: u64,
    pub(super) header: RecordHeader,
    pub(super) digest: ContentDigest,
    /// `None` while the disk has the buffer.
    pub(super) record: Option<AlignedBuf>,
    pub(super) putter: Putter,
    pub(super) repeats: Vec<Repeat>,
    /// How it was judged.
    pub(super) candidate: Candidate,
    /// What its prefix is, which the objects behind it share.
    pub(super) context: Context,
    /// For those that hang on it.
    pub(super) hold: Hold,
    /// Of what it hangs on.
    pub(super) _parent: Option<Hold>,
    pub(super) _permit: Permit,
}

/// Who waits for an outcome: position in its list, and where to send it.
pub(super) type Putter = (usize, Sender<Outcome>);

/// A put of an object that is on its way already. Its answer waits for that one's.
pub(super) struct Repeat {
    pub(super) putter: Putter,
    pub(super) same_content: bool,
}

impl Batch {
    pub(super) fn new(number: u64) -> Self {
        Self { number, started: Instant::now(), runs: Vec::new() }
    }

    pub(super) fn records(&self) -> usize {
        self.runs.iter().map(|run| run.records.len()).sum()
    }

    /// Adds a record that goes to the place where `tail` ends.
    pub(super) fn add(&mut self, tail: &Tail, pending: Pending) {
        if let Some(run) = self.runs.iter_mut().find(|run| run.tail.id == tail.id) {
            run.records.push(pending);
            return;
        }
        self.runs.push(Run {
            tail: *tail,
            records: vec![pending],
            entries: Vec::new(),
            end: tail.append_at,
            sequence: 0,
            writing: 0,
            flushing: None,
            flushed: false,
            failed: false,
        });
    }

    pub(super) fn find(&mut self, id: ObjectId) -> Option<&mut Pending> {
        self.runs.iter_mut().flat_map(|run| &mut run.records).find(|record| record.header.id == id)
    }

    pub(super) fn is_writing(&self) -> bool {
        self.runs.iter().any(|run| run.writing > 0)
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.runs.iter().all(|run| run.flushed)
    }

    /// Whether the disk has nothing of it any more.
    pub(super) fn is_over(&self) -> bool {
        self.runs.iter().all(|run| run.writing == 0 && run.flushing.is_none())
    }

    /// Its records in the order in which they were admitted: written again, a child must not come before its parent.
    pub(super) fn into_records(self) -> Vec<Pending> {
        let mut records: Vec<Pending> = self.runs.into_iter().flat_map(|run| run.records).collect();
        records.sort_by_key(|record| record.number);
        records
    }
}

impl Pending {
    pub(super) fn len_bytes(&self) -> u64 {
        self.header.record_bytes() as u64
    }

    pub(super) fn entry(
        &self,
        place: Place,
        sequence: u64,
        time_s: u32,
        checksum: HeaderChecksum,
        record_bytes: usize,
    ) -> Entry {
        let header = self.header.clone();
        Entry::of(&PlacedHeader { header, place, sequence, time_s, record_bytes, checksum })
    }
}

/// What a completion belongs to: batch, run, and the record of a write; a flush has none.
pub(super) fn tag(batch: u64, run: usize, record: Option<usize>) -> u64 {
    let record = record.map_or(0, |record| record + 1);
    debug_assert!(record <= MAX_BATCH_RECORDS && run < 1 << 16);
    batch << 32 | (run as u64) << 16 | record as u64
}

/// The reverse of [`tag`].
pub(super) fn untag(tag: u64) -> (u64, usize, Option<usize>) {
    let (run, record) = ((tag >> 16 & 0xffff) as usize, (tag & 0xffff) as usize);
    (tag >> 32, run, record.checked_sub(1))
}
