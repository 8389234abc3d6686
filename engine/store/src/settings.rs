//! Settings: plain data.

use std::time::Duration;

use crate::io::{IoEngine, PAGE};
use crate::{Result, StoreError, TtlClass};

/// Largest segment: what the 32-bit offsets of a plane table reach, with room.
pub(crate) const MAX_SEGMENT_BYTES: u64 = 2 << 30;
/// Smallest segment: header, seal and one page of records.
const MIN_SEGMENT_BYTES: u64 = 3 * PAGE as u64;

const BULK_ENTRIES: usize = 4096;

/// Length of segments of the permanent class, unless others are smaller.
const OWN_SEGMENT_BYTES: u64 = 8 << 20;

/// How a store works. All of it may differ from one opening to the next.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// Length of new segments, in bytes; whole pages. Bounds the size of one object.
    pub segment_bytes: u64,
    /// Bytes that all segments together may take; puts beyond are refused as full.
    pub capacity_bytes: u64,
    /// Whether a full store may decline objects that are not worth their place.
    pub admission: bool,
    /// Bytes of records that all leases together may hold, each counted once; `None` for four fifths of the capacity, so that
    /// something may always go.
    pub leased_bytes: Option<u64>,
    /// How long objects of each class are kept after their last use.
    pub ttl_classes: Vec<Duration>,
    /// zstd level for planes that shrink by at least 3 %; `None` stores every plane raw.
    pub zstd_level: Option<i32>,
    /// Shorter planes are stored raw: to build the tables that decode one takes longer than to read what they save.
    pub compressed_from_bytes: usize,
    /// Bytes being read ahead by all fetches together, as they lie on the drive or decoded, whichever are more. A fetch that gets no
    /// share still has one read in flight.
    pub read_bytes_in_flight: usize,
    /// Bytes being read ahead by one fetch, likewise.
    pub fetch_window_bytes: usize,
    /// Neighbouring planes and records are joined into reads up to this many bytes.
    pub read_merge_bytes: usize,
    /// Threads that verify and decode what is read.
    pub verify_threads: usize,
    /// Bytes of sealed records verified again each second, in the background; 0 for none.
    pub scrub_bytes_per_s: u64,
    /// Bytes of encoded records waiting for their commit; putters of more wait.
    pub put_bytes_in_flight: usize,
    /// Bytes of one group commit.
    pub commit_bytes: usize,
    /// Bytes of free buffers kept for reuse.
    pub pool_bytes: usize,
    /// Bytes of buffers that are registered with the kernel, where its limit on locked memory allows; 0 for none.
    pub registered_bytes: usize,
    /// After this many segments given up because of failed writes or flushes, writes are refused.
    pub max_write_failures: u64,
    /// I/O engines to try, in this order; the first that passes the probe is used.
    pub io_engines: Vec<IoEngine>,
    /// How long `open` waits for the folder's lock. A process that was killed may take a moment to be gone.
    pub lock_wait: Duration,
    /// Ways to break the store, so that tests can show that they would notice.
    #[cfg(any(test, feature = "testing"))]
    pub sabotage: Sabotage,
    /// Entries of one segment from which on a rebuild hands them to the index in bulk; as usual if 0.
    #[cfg(any(test, feature = "testing"))]
    pub bulk_entries: usize,
}

/// Negative controls: each disables one guard.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sabotage {
    /// Serve bytes without looking at checksums and digests.
    pub skip_verification: bool,
    /// Acknowledge puts without a flush.
    pub skip_flush: bool,
    /// Take every failed read for the record's fault.
    pub skip_breaker: bool,
    /// Erase without writing down that something was erased.
    pub skip_tombstone: bool,
    /// Let erasures lapse while what they mean may come back.
    pub lapse_early: bool,
    /// Grant leases that hold nothing.
    pub skip_pins: bool,
    /// Leave children that were read before their parent without it.
    pub skip_adoption: bool,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            segment_bytes: 256 << 20,
            capacity_bytes: u64::MAX,
            admission: true,
            leased_bytes: None,
            ttl_classes: [5 * 60, 3600, 24 * 3600, 72 * 3600].map(Duration::from_secs).to_vec(),
            zstd_level: Some(1),
            compressed_from_bytes: 8 << 10,
            read_bytes_in_flight: 64 << 20,
            fetch_window_bytes: 24 << 20,
            read_merge_bytes: 1 << 20,
            verify_threads: std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(1, 8)),
            scrub_bytes_per_s: 8_000_000,
            put_bytes_in_flight: 64 << 20,
            commit_bytes: 32 << 20,
            pool_bytes: 96 << 20,
            registered_bytes: 32 << 20,
            max_write_failures: 3,
            io_engines: vec![IoEngine::UringDirect, IoEngine::PositionalDirect, IoEngine::PositionalBuffered],
            lock_wait: Duration::ZERO,
            #[cfg(any(test, feature = "testing"))]
            sabotage: Sabotage::default(),
            #[cfg(any(test, feature = "testing"))]
            bulk_entries: 0,
        }
    }
}

impl StoreSettings {
    /// Bytes that all leases together may hold.
    pub(crate) fn leased_bytes(&self) -> u64 {
        self.leased_bytes.unwrap_or(self.capacity_bytes / 5 * 4)
    }

    /// Bytes of the capacity that segments of a class leave free. In a store that is full of what may not go there is room for one
    /// more segment of what the store writes about itself: renewals, and erasures, which make room.
    pub(crate) fn reserve_bytes(&self, class: TtlClass) -> u64 {
        let own_bytes = self.segment_bytes_of(TtlClass::PERMANENT);
        // Where that is much, there is none: a quarter of the capacity at most.
        let spares = own_bytes <= self.capacity_bytes / 4;
        if class == TtlClass::PERMANENT || !spares { 0 } else { own_bytes }
    }

    /// Length of new segments of a class: what the store writes about itself is little.
    pub(crate) fn segment_bytes_of(&self, class: TtlClass) -> u64 {
        match class {
            TtlClass::PERMANENT => self.segment_bytes.min(OWN_SEGMENT_BYTES),
            _ => self.segment_bytes,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bad =
            |reason| Err(StoreError::BadSetting { name: "segment_bytes", value: self.segment_bytes, reason });
        if !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&self.segment_bytes) {
            return bad("segments have 12 KiB to 2 GiB");
        }
        if !self.segment_bytes.is_multiple_of(PAGE as u64) {
            return bad("segments are whole pages of 4096 bytes");
        }
        Ok(())
    }

    pub(crate) fn skips_verification(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.skip_verification;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }

    pub(crate) fn skips_breaker(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.skip_breaker;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }

    pub(crate) fn skips_tombstone(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.skip_tombstone;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }

    pub(crate) fn skips_pins(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.skip_pins;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }

    pub(crate) fn skips_adoption(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.skip_adoption;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }

    pub(crate) fn lapses_early(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.lapse_early;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }

    /// Entries of one segment from which on they go past the index's log. Below, the flushes of a file cost more.
    pub(crate) fn bulk_entries(&self) -> usize {
        #[cfg(any(test, feature = "testing"))]
        if self.bulk_entries > 0 {
            return self.bulk_entries;
        }
        BULK_ENTRIES
    }

    pub(crate) fn skips_flush(&self) -> bool {
        #[cfg(any(test, feature = "testing"))]
        return self.sabotage.skip_flush;
        #[cfg(not(any(test, feature = "testing")))]
        return false;
    }
}
