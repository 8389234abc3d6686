//! What is counted.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Latencies;
use crate::Shares;
use crate::Wear;
use crate::io::IoEngine;
use crate::latency::LatencyCounter;

/// Why an object that was asked for is not returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum MissKind {
    /// It is not in the index, or its segment is gone.
    Absent = 0,
    /// The device failed to read it.
    ReadError = 1,
    /// Its segment ends before the record does.
    Truncated = 2,
    /// Its header does not match the header's checksum.
    HeaderChecksum = 3,
    /// Its header is sound but is another record's, or an older one's, than the index says.
    WrongRecord = 4,
    /// Stored bytes of a plane do not match their checksum.
    PlaneChecksum = 5,
    /// A plane does not decompress to its length.
    Decode = 6,
    /// The content of a plane does not match its digest.
    Digest = 7,
    /// The deadline came first.
    Deadline = 8,
    /// Its device failed so many reads that nothing is read from it for a while.
    Unavailable = 9,
    /// It is sealed by a key that was destroyed, or that this store was not given.
    NoKey = 10,
}

impl MissKind {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Absent,
        Self::ReadError,
        Self::Truncated,
        Self::HeaderChecksum,
        Self::WrongRecord,
        Self::PlaneChecksum,
        Self::Decode,
        Self::Digest,
        Self::Deadline,
        Self::Unavailable,
        Self::NoKey,
    ];

    /// Whether the record itself is at fault, so that it is worth a second read and then quarantine.
    pub fn is_damage(self) -> bool {
        !matches!(self, Self::Absent | Self::Deadline | Self::Unavailable | Self::NoKey)
    }

    /// Name for logs and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::ReadError => "read_error",
            Self::Truncated => "truncated",
            Self::HeaderChecksum => "header_checksum",
            Self::WrongRecord => "wrong_record",
            Self::PlaneChecksum => "plane_checksum",
            Self::Decode => "decode",
            Self::Digest => "digest",
            Self::Deadline => "deadline",
            Self::Unavailable => "unavailable",
            Self::NoKey => "no_key",
        }
    }
}

impl fmt::Display for MissKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A count by [`MissKind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissCounts([u64; MissKind::ALL.len()]);

impl MissCounts {
    /// How many of this kind.
    pub fn get(&self, kind: MissKind) -> u64 {
        self.0[kind as usize]
    }

    /// How many of all kinds.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The kinds that were counted at all.
    pub fn iter(&self) -> impl Iterator<Item = (MissKind, u64)> {
        MissKind::ALL.into_iter().map(|kind| (kind, self.get(kind))).filter(|&(_, count)| count > 0)
    }

    pub(crate) fn add(&mut self, kind: MissKind) {
        self.0[kind as usize] += 1;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(count, more)| *count += more);
    }
}

/// What a store has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Objects stored.
    pub stored: u64,
    /// Puts of bytes that were stored before.
    pub present: u64,
    /// Puts of other bytes under a known id.
    pub content_mismatch: u64,
    /// Puts refused or failed for any other reason.
    pub put_errors: u64,
    /// Objects fetched with all the planes asked for.
    pub fetched: u64,
    /// Objects asked for and not returned.
    pub misses: MissCounts,
    /// Index entries removed because their record is bad.
    pub quarantined: u64,
    /// Records forgotten for a failed read that came back, as it was the device that failed.
    pub reinstated: u64,
    /// Times that so many reads failed that nothing was read for a while.
    pub breaker_trips: u64,
    /// Bytes of records verified again in the background.
    pub scrubbed_bytes: u64,
    /// Records that were found bad by that.
    pub scrub_bad: u64,
    /// Bytes read from the device.
    pub read_bytes: u64,
    /// Bytes written to the device.
    pub written_bytes: u64,
    /// Group commits.
    pub commits: u64,
    /// Index reads that failed; answered as misses.
    pub index_errors: u64,
    /// Segments now.
    pub segments: u64,
    /// Bytes of all segments on disk, room for records to come included.
    pub segment_bytes: u64,
    /// Bytes of all records, headers and padding included; 0 if the index cannot tell.
    pub record_bytes: u64,
    /// Objects declined by a full store as not worth their place.
    pub declined: u64,
    /// Objects evicted for others.
    pub evicted: u64,
    /// Bytes of their records.
    pub evicted_bytes: u64,
    /// Objects removed when the time to live of their segment was over.
    pub expired: u64,
    /// Objects erased.
    pub erased: u64,
    /// Erasures that are kept, as something older than they are may still be on the device.
    pub erasures: u64,
    /// Erasures that lapsed: nothing was left that they could mean.
    pub erasures_lapsed: u64,
    /// Bytes given back to the file system out of segments that stay.
    pub punched_bytes: u64,
    /// Leases that hold.
    pub leases: u64,
    /// Bytes of records that they hold, each counted once.
    pub leased_bytes: u64,
    /// Objects that lookups can find.
    pub objects: u64,
    /// Bytes of memory that their resident table takes.
    pub table_bytes: u64,
    /// What their owners hold of the capacity.
    pub shares: Shares,
    /// Segments given up since a write or flush into them failed.
    pub suspect_segments: u64,
    /// I/O completions that belonged to no operation.
    pub unknown_completions: u64,
    /// Objects that lookups asked for.
    pub looked_up: u64,
    /// Objects that they found, each in a leading run.
    pub found: u64,
    /// Bytes of planes that fetches gave out, proven.
    pub fetched_bytes: u64,
    /// Bytes of planes of the objects stored.
    pub stored_raw_bytes: u64,
    /// Bytes of changes that were handed to the index, which writes them to its log and, later, to its tables.
    pub index_change_bytes: u64,
    /// Times that scrubbing came round.
    pub scrub_rounds: u64,
    /// Bytes of records proven since it last did; of a round, this share of `live_bytes`.
    pub scrub_round_bytes: u64,
    /// Bytes of the records that can be found.
    pub live_bytes: u64,
    /// Bytes that all segments may take.
    pub capacity_bytes: u64,
    /// Written to the device and accepted for it since the store was made.
    pub wear: Wear,

    /// Ops that the device has not answered yet.
    pub io_in_flight: u64,
    /// Bytes being read ahead by fetches.
    pub reading_bytes: u64,
    /// Bytes of records that wait for their commit or are in it.
    pub putting_bytes: u64,

    /// Lookups.
    pub lookup_us: Latencies,
    /// From the start of a fetch to its first proven plane.
    pub first_plane_us: Latencies,
    /// Whole fetches, for as long as whoever asked took to take the planes.
    pub fetch_us: Latencies,
    /// Reads of fetches, each from its submission to its completion.
    pub read_us: Latencies,
    /// Calls of put, from hashing to durable.
    pub put_us: Latencies,
    /// Group commits, from the first write to findable.
    pub commit_us: Latencies,
    /// Flushes of segments.
    pub flush_us: Latencies,
}

/// What `open` found and did.
#[derive(Debug, Clone)]
pub struct OpenReport {
    /// The I/O engine in use.
    pub engine: IoEngine,
    /// Engines that did not pass the probe, and why.
    pub refused_engines: Vec<(IoEngine, String)>,
    /// Whether the index was missing, damaged or outdated, and was built anew.
    pub rebuilt: bool,
    /// Segments found.
    pub segments: u64,
    /// Records added to the index.
    pub records_indexed: u64,
    /// Records found bad while scanning, by kind.
    pub records_dropped: MissCounts,
    /// Index entries removed because their segment is gone or too short.
    pub entries_dropped: u64,
    /// Segment files whose content could not be told; left alone.
    pub unreadable_segments: Vec<String>,
}

/// The running counts behind [`StoreStats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) stored: Counter,
    pub(crate) present: Counter,
    pub(crate) content_mismatch: Counter,
    pub(crate) put_errors: Counter,
    pub(crate) fetched: Counter,
    pub(crate) misses: [Counter; MissKind::ALL.len()],
    pub(crate) quarantined: Counter,
    pub(crate) reinstated: Counter,
    pub(crate) scrubbed_bytes: Counter,
    pub(crate) scrub_bad: Counter,
    pub(crate) read_bytes: Counter,
    pub(crate) written_bytes: Counter,
    pub(crate) commits: Counter,
    pub(crate) index_errors: Counter,
    pub(crate) suspect_segments: Counter,
    pub(crate) declined: Counter,
    pub(crate) evicted: Counter,
    pub(crate) evicted_bytes: Counter,
    pub(crate) expired: Counter,
    pub(crate) erased: Counter,
    pub(crate) erasures_lapsed: Counter,
    pub(crate) punched_bytes: Counter,
    pub(crate) looked_up: Counter,
    pub(crate) found: Counter,
    pub(crate) fetched_bytes: Counter,
    pub(crate) stored_raw_bytes: Counter,
    pub(crate) scrub_rounds: Counter,
    /// Of `scrubbed_bytes`, what was counted when the last round ended.
    pub(crate) scrub_round_start: AtomicU64,
    pub(crate) lookup_us: LatencyCounter,
    pub(crate) first_plane_us: LatencyCounter,
    pub(crate) fetch_us: LatencyCounter,
    /// Shared with reads, which outlive the store.
    pub(crate) read_us: Arc<LatencyCounter>,
    pub(crate) put_us: LatencyCounter,
    pub(crate) commit_us: LatencyCounter,
    pub(crate) flush_us: LatencyCounter,
}

impl Counters {
    pub(crate) fn miss(&self, kind: MissKind) {
        self.misses[kind as usize].add(1);
    }

    pub(crate) fn miss_counts(&self) -> MissCounts {
        MissCounts(std::array::from_fn(|kind| self.misses[kind].get()))
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
