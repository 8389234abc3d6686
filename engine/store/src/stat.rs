//! What a data folder holds, told from its index, its clock and the sizes of its files, all of which are only read: also
//! while a server has it open, and then as of a moment ago. Of the records only leases are read.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use esker_prefix::{NamespaceId, ObjectKind, ScopeTag};

use crate::clock::{self, SystemClock};
use crate::fsck::payload;
use crate::index::{Entry, Index, Phase};
use crate::io::BufferPool;
use crate::segment::SegmentId;
use crate::table::Table;
use crate::{Hits, LeaseId, Result, StoreError, TtlClass, Wear, wear};

/// Bounds of the classes of age, in seconds.
pub const AGE_BOUNDS_S: [u32; 5] = [3600, 6 * 3600, 24 * 3600, 72 * 3600, u32::MAX];

/// Objects of one kind or another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub objects: u64,
    /// Tokens that their blocks add to prefixes.
    pub tokens: u64,
    /// Bytes of their planes.
    pub raw_bytes: u64,
    /// Bytes of their records.
    pub stored_bytes: u64,
    /// How often prefixes that end in them were read again. Not told by age.
    pub hits: Hits,
}

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentStat {
    /// Its number.
    pub number: u64,
    /// Whether it is closed for good.
    pub sealed: bool,
    /// Length of its file.
    pub len_bytes: u64,
    /// Bytes of records that the index names.
    pub live_bytes: u64,
    /// Bytes that its file does not take.
    pub given_back_bytes: u64,
    /// Bytes where records were that are neither live nor given back.
    pub dead_bytes: u64,
}

/// A lease that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseStat {
    /// Its name.
    pub id: LeaseId,
    /// Prefixes that it keeps.
    pub ends: usize,
    /// Seconds until it ends; 0 if it is over.
    pub remaining_s: u32,
}

/// What a data folder holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStat {
    /// Whether a process has it open, so that what is told is of a moment ago.
    pub in_use: bool,
    /// All blocks and states.
    pub total: Amount,
    /// By namespace.
    pub namespaces: BTreeMap<NamespaceId, Amount>,
    /// By scope.
    pub scopes: BTreeMap<ScopeTag, Amount>,
    /// By TTL class.
    pub classes: BTreeMap<TtlClass, Amount>,
    /// By age, below each of [`AGE_BOUNDS_S`].
    pub ages: [Amount; AGE_BOUNDS_S.len()],
    /// Erasures that are kept: something older than they are may still be on the device.
    pub erasures: u64,
    /// Leases whose record is there.
    pub leases: Vec<LeaseStat>,
    /// Segments in order.
    pub segments: Vec<SegmentStat>,
    /// Bytes of the index on disk.
    pub index_bytes: u64,
    /// Bytes of memory that the resident table takes when the store is open.
    pub table_bytes: u64,
    /// Segments that were ever begun, gone ones included: what was written is this often a segment's length, at most.
    pub segments_begun: u64,
    /// What was ever written, and accepted for it.
    pub wear: Wear,
}

impl Amount {
    fn add(&mut self, entry: &Entry, tokens: u64) {
        self.objects += 1;
        self.tokens += tokens;
        self.raw_bytes += entry.raw_bytes;
        self.stored_bytes += entry.end() - entry.spot.offset;
    }
}

/// Reads what the store in `dir` holds. Changes nothing.
pub fn stat(dir: &Path) -> Result<StoreStat> {
    let segments = dir.join("segments");
    fs::metadata(&segments).map_err(StoreError::io("looking for", &segments))?;
    // Files may go while a writer has the folder open; the next try sees the newer state.
    let index = Index::open_read_only(dir).or_else(|_| Index::open_read_only(dir))?;
    let clock = SystemClock::new().map_err(StoreError::io("reading the clock for", dir))?;
    let now_s = clock::peek(dir, &clock);
    let mut found =
        StoreStat { in_use: in_use(dir), index_bytes: bytes_below(&dir.join("index")), ..Default::default() };
    let states: BTreeMap<SegmentId, _> = index.segments()?.into_iter().collect();
    let table = Table::new(true);
    let mut live: BTreeMap<SegmentId, u64> = BTreeMap::new();
    let pool = BufferPool::new(0);
    for entry in index.entries_from(crate::segment::Spot { segment: SegmentId(0), offset: 0 }) {
        let entry = entry?;
        *live.entry(entry.spot.segment).or_default() += entry.end() - entry.spot.offset;
        table.load(&entry);
        match entry.id.kind {
            ObjectKind::Block | ObjectKind::State => found.object(&entry, &table, now_s),
            ObjectKind::Lease => found.lease(&entry, &segments, &pool, now_s),
            ObjectKind::Erasure => found.erasures += 1,
            ObjectKind::Layout => {}
        }
    }
    for ((namespace, scope, class), hits) in index.hits()? {
        found.total.hits.add(hits);
        found.namespaces.entry(namespace).or_default().hits.add(hits);
        found.scopes.entry(scope).or_default().hits.add(hits);
        found.classes.entry(class).or_default().hits.add(hits);
    }
    found.wear = wear::peek(dir);
    found.table_bytes = table.size().1;
    for item in fs::read_dir(&segments).map_err(StoreError::io("listing", &segments))?.flatten() {
        let Some(id) = item.file_name().to_str().and_then(SegmentId::from_file_name) else { continue };
        let Ok(meta) = item.metadata() else { continue };
        let state = states.get(&id);
        let live_bytes = live.get(&id).copied().unwrap_or(0);
        // Blocks of stat(2) have 512 bytes whatever the file system's have.
        let given_back_bytes = meta.len().saturating_sub(meta.blocks() * 512);
        let records_bytes =
            state.map_or(0, |state| state.watermark.saturating_sub(crate::segment::RECORDS_AT));
        found.segments.push(SegmentStat {
            number: id.0,
            sealed: state.is_some_and(|state| state.phase == Phase::Sealed),
            len_bytes: meta.len(),
            live_bytes,
            given_back_bytes,
            dead_bytes: records_bytes.saturating_sub(live_bytes).saturating_sub(given_back_bytes),
        });
    }
    found.segments.sort_by_key(|segment| segment.number);
    found.segments_begun = found.segments.last().map_or(0, |segment| segment.number);
    found.leases.sort_by_key(|lease| (lease.remaining_s, lease.id));
    Ok(found)
}

impl StoreStat {
    fn object(&mut self, entry: &Entry, table: &Table, now_s: u32) {
        let parent = entry.parent.and_then(|parent| table.get(parent)).map_or(0, |parent| parent.tokens);
        // A state adds nothing to the tokens of the block that it stands behind.
        let tokens = if entry.id.kind == ObjectKind::Block { entry.tokens.saturating_sub(parent) } else { 0 };
        let age_s = now_s.saturating_sub(entry.time_s);
        let age = AGE_BOUNDS_S.iter().position(|bound| age_s < *bound).unwrap_or(AGE_BOUNDS_S.len() - 1);
        self.total.add(entry, tokens);
        self.namespaces.entry(entry.namespace).or_default().add(entry, tokens);
        self.scopes.entry(entry.scope).or_default().add(entry, tokens);
        self.classes.entry(entry.class).or_default().add(entry, tokens);
        self.ages[age].add(entry, tokens);
    }

    /// A lease whose record cannot be read is the business of a check.
    fn lease(&mut self, entry: &Entry, segments: &Path, pool: &std::sync::Arc<BufferPool>, now_s: u32) {
        let mut record = vec![0; usize::try_from(entry.end() - entry.spot.offset).unwrap_or(0)];
        let file = File::open(segments.join(entry.spot.segment.file_name()));
        let read = file.and_then(|file| file.read_exact_at(&mut record, entry.spot.offset));
        let Some((ends, deadline_s)) = read.ok().and_then(|()| payload(&record, pool)) else { return };
        let (id, remaining_s) = (LeaseId(entry.id.hash.0), deadline_s.saturating_sub(now_s));
        if !ends.is_empty() {
            self.leases.push(LeaseStat { id, ends: ends.len(), remaining_s });
        }
    }
}

/// Whether a process holds the folder's lock.
fn in_use(dir: &Path) -> bool {
    let lock = File::open(dir.join("LOCK")).map(|file| file.try_lock_shared());
    matches!(lock, Ok(Err(TryLockError::WouldBlock)))
}

fn bytes_below(dir: &Path) -> u64 {
    let items = fs::read_dir(dir).into_iter().flatten().flatten();
    items.filter_map(|item| item.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}
