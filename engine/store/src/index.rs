//! The block index: which record holds an object. Derived from the segments; deleting its folder costs a scan.
//!
//! RocksDB keys, all in the default column family:
//!
//! ```text
//! 0x01 | segment id u64 BE | page u32 BE           ->  Entry of the record there, see entry.rs
//! 0xF0 | segment id u64 BE                         ->  SegmentState, see entry.rs
//! 0xF1 | segment id u64 BE                         ->  store time of the last use of anything in it, u32 LE seconds
//! 0xF2                                             ->  where scrubbing goes on: segment id u64, offset u64, LE
//! 0xF3                                             ->  highest number that any segment ever had, u64 LE
//! 0xF4 | namespace 32 | scope 16 | class           ->  Hits, see hits.rs
//! 0xF5 | kind of an object | its hash 32           ->  nothing: more than one writer has put it
//! 0xFF                                             ->  format of this index, u32 LE; another one means: build anew
//! ```
//!
//! Keys are places, not names: records are appended, so keys come sorted and RocksDB never rewrites them to sort them;
//! what a segment holds lies together; and reading all of it in order gives the resident table (table.rs), which
//! answers by name, neighbours that were stored as neighbours.
//!
//! The write-ahead log is on and not synced: an entry and the watermark of its segment travel in one write batch, so
//! an index that lost its newest batches knows how far it reaches, and recovery scans the segments from there. What
//! a put waits for is the flush of the segment.

mod bulk;
mod entry;
#[cfg(test)]
pub(crate) mod memory;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use esker_prefix::{NamespaceId, ScopeTag};
use rocksdb::{
    BlockBasedOptions, Cache, DB, DBCompressionType, IteratorMode, Options, ReadOptions, WriteBatch,
    WriteOptions,
};

pub(crate) use bulk::Bulk;
use entry::{ENTRIES_END, entry_key, spot_of};
pub(crate) use entry::{Entry, Phase, SegmentState};

use crate::fields::{Reader, Writer};
use crate::hits::{self, Hits};
use crate::io::free_bytes;
use crate::segment::{SegmentId, Spot};
use crate::stats::Counter;
use crate::{Result, StoreError, TtlClass};

const SEGMENT_PREFIX: u8 = 0xF0;
const USE_PREFIX: u8 = 0xF1;
const SCRUB_KEY: [u8; 1] = [0xF2];
const HIGHEST_KEY: [u8; 1] = [0xF3];
const HITS_PREFIX: u8 = 0xF4;
const FORMAT_KEY: [u8; 1] = [0xFF];
const FORMAT: u32 = 5;
/// The resident table answers lookups; this serves duplicates and quarantine.
const BLOCK_CACHE_BYTES: usize = 8 << 20;
/// Read ahead when all entries are.
const READ_AHEAD_BYTES: usize = 2 << 20;
/// RocksDB reserves a little more than this on disk for its log, and as much again in memory. Its own default of 64 MiB
/// would take a small disk's whole free space before the first put.
const WRITE_BUFFER_BYTES: usize = 4 << 20;
/// With less than this free, an index that does not open is not taken for damaged: its log could not be written out.
const OPEN_BYTES: u64 = 4 * WRITE_BUFFER_BYTES as u64;
/// Reserved for the manifest, likewise.
const MANIFEST_BYTES: usize = 64 << 10;
/// Left in the store's folder when reads of the index fail, so that the next opening builds it anew.
pub(crate) const DAMAGED_MARK: &str = "index.damaged";

/// See the module.
pub(crate) struct Index {
    db: DB,
    options: Options,
    dir: PathBuf,
    /// Whether a read of it failed. It is built anew at the next opening, unless it was opened only to be read.
    damaged: AtomicBool,
    read_only: bool,
    /// Bytes of the changes written.
    pub(crate) change_bytes: Counter,
}

impl Index {
    /// Opens or makes the index in `dir/index`; tells whether it holds nothing although it may have held something.
    pub(crate) fn open(dir: &Path) -> Result<(Self, bool)> {
        let mark = dir.join(DAMAGED_MARK);
        let path = dir.join("index");
        let marked = mark.exists();
        let existing = path.join("CURRENT").exists();
        if marked {
            set_aside(&path)?;
        }
        let before = Files::of(&path);
        let (db, options) = match open_db(&path) {
            Ok((db, _)) if before.has_lost_table(&db)? => {
                tracing::error!("the index has lost a part of its manifest and is built anew");
                drop(db);
                set_aside(&path)?;
                open_db(&path)?
            }
            Ok(opened) => opened,
            Err(error) if error.kind() == rocksdb::ErrorKind::IOError && existing => {
                if free_bytes(dir).is_ok_and(|free| free < OPEN_BYTES) {
                    let reason =
                        format!("the index needs {OPEN_BYTES} free bytes in {} to open", dir.display());
                    return Err(StoreError::Full { reason });
                }
                open_anew(&path, &error)?
            }
            Err(error) => open_anew(&path, &error)?,
        };
        let mut index = Self::of(db, options, dir, false);
        index.db.set_options(&[("disable_auto_compactions", "false")])?;
        let format = index.db.get(FORMAT_KEY);
        let mut rebuild = marked || !existing;
        let outdated = !matches!(&format, Ok(Some(found)) if found[..] == FORMAT.to_le_bytes());
        // Recovery starts from the segments' watermarks: an index that cannot give them is built anew at once.
        let unreadable = index.segments().is_err();
        if outdated || unreadable {
            if unreadable
                || !matches!(format, Ok(None))
                || index.db.iterator(IteratorMode::Start).next().is_some()
            {
                drop(index.db);
                set_aside(&path)?;
                (index.db, index.options) = open_db(&path)?;
                index.db.set_options(&[("disable_auto_compactions", "false")])?;
            }
            index.db.put(FORMAT_KEY, FORMAT.to_le_bytes())?;
            rebuild = true;
        }
        // What was found here is mended here.
        if mark.exists() {
            fs::remove_file(&mark).map_err(StoreError::io("removing", &mark))?;
        }
        index.damaged = AtomicBool::new(false);
        Ok((index, rebuild))
    }

    /// Opens the index in `dir/index` to be read only, as it stands: also while another process writes it.
    pub(crate) fn open_read_only(dir: &Path) -> Result<Self> {
        let db = DB::open_for_read_only(&options(), dir.join("index"), false)?;
        Ok(Self::of(db, options(), dir, true))
    }

    fn of(db: DB, options: Options, dir: &Path, read_only: bool) -> Self {
        let (dir, damaged) = (dir.to_owned(), AtomicBool::new(false));
        Self { db, options, dir, damaged, read_only, change_bytes: Counter::default() }
    }

    /// Whether a read has failed since it was opened.
    pub(crate) fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Reads all of it: an error if any part cannot be read.
    pub(crate) fn check(&self) -> Result<()> {
        let mut options = ReadOptions::default();
        options.set_readahead_size(READ_AHEAD_BYTES);
        options.fill_cache(false);
        let mut items = self.db.iterator_opt(IteratorMode::Start, options);
        items.try_for_each(|item| self.read(item).map(drop))
    }

    /// The entry of the record at `spot`. An index that cannot be read has no entries.
    pub(crate) fn get(&self, spot: Spot) -> Result<Option<Entry>> {
        let value = self.read(self.db.get_pinned(entry_key(spot)))?;
        Ok(value.and_then(|value| self.decode(spot, &value)))
    }

    /// All entries, in the order of their places.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Result<Entry>> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(ENTRIES_END);
        options.set_readahead_size(READ_AHEAD_BYTES);
        options.fill_cache(false);
        self.db.iterator_opt(IteratorMode::Start, options).filter_map(|item| match self.read(item) {
            Err(error) => Some(Err(error)),
            Ok((key, value)) => self.decode(spot_of(&key)?, &value).map(Ok),
        })
    }

    /// The entries of one segment, in the order of their places.
    pub(crate) fn entries_of(&self, id: SegmentId) -> impl Iterator<Item = Result<Entry>> {
        let first = entry_key(Spot { segment: id, offset: 0 });
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(entry_key(Spot { segment: SegmentId(id.0 + 1), offset: 0 }));
        let entries = self.db.iterator_opt(IteratorMode::From(&first, rocksdb::Direction::Forward), options);
        entries.filter_map(|item| match self.read(item) {
            Err(error) => Some(Err(error)),
            Ok((key, value)) => self.decode(spot_of(&key)?, &value).map(Ok),
        })
    }

    /// The entries at and behind a place, in the order of their places.
    pub(crate) fn entries_from(&self, from: Spot) -> impl Iterator<Item = Result<Entry>> {
        let first = entry_key(from);
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(ENTRIES_END);
        options.fill_cache(false);
        let entries = self.db.iterator_opt(IteratorMode::From(&first, rocksdb::Direction::Forward), options);
        entries.filter_map(|item| match self.read(item) {
            Err(error) => Some(Err(error)),
            Ok((key, value)) => self.decode(spot_of(&key)?, &value).map(Ok),
        })
    }

    /// Where scrubbing goes on.
    pub(crate) fn scrub_position(&self) -> Result<Option<Spot>> {
        let value = self.read(self.db.get(SCRUB_KEY))?;
        Ok(value.and_then(|value| {
            let (segment, offset) = value.split_first_chunk()?;
            let offset = u64::from_le_bytes(offset.try_into().ok()?);
            Some(Spot { segment: SegmentId(u64::from_le_bytes(*segment)), offset })
        }))
    }

    /// Store time of the last use of a segment; may lag behind.
    pub(crate) fn last_use(&self, id: SegmentId) -> Result<Option<u32>> {
        let value = self.read(self.db.get(segment_key(USE_PREFIX, id)))?;
        Ok(value.and_then(|value| Some(u32::from_le_bytes(value.try_into().ok()?))))
    }

    /// Highest number that any segment ever had, gone ones included, as far as this index goes back.
    pub(crate) fn highest_segment(&self) -> Result<SegmentId> {
        let value = self.read(self.db.get(HIGHEST_KEY))?;
        let number = value.and_then(|value| Some(u64::from_le_bytes(value.try_into().ok()?)));
        Ok(SegmentId(number.unwrap_or(0)))
    }

    /// What is known of each segment.
    pub(crate) fn segments(&self) -> Result<Vec<(SegmentId, SegmentState)>> {
        let mut segments = Vec::new();
        let mode = IteratorMode::From(&[SEGMENT_PREFIX], rocksdb::Direction::Forward);
        for item in self.db.iterator(mode) {
            let (key, value) = self.read(item)?;
            let Some((&SEGMENT_PREFIX, rest)) = key.split_first() else { break };
            let (Ok(id), Some(state)) = (rest.try_into(), SegmentState::decode(&value)) else { continue };
            segments.push((SegmentId(u64::from_be_bytes(id)), state));
        }
        Ok(segments)
    }

    /// How often what is stored was read again.
    pub(crate) fn hits(&self) -> Result<Vec<(hits::Of, Hits)>> {
        let mut all = Vec::new();
        for item in self.db.iterator(IteratorMode::From(&[HITS_PREFIX], rocksdb::Direction::Forward)) {
            let (key, value) = self.read(item)?;
            let Some((&HITS_PREFIX, rest)) = key.split_first() else { break };
            all.extend(hits_of(rest).zip(Hits::decode(&value)));
        }
        Ok(all)
    }

    /// Writes all changes or none.
    pub(crate) fn write(&self, changes: Changes) -> Result<()> {
        self.change_bytes.add(changes.0.size_in_bytes() as u64);
        Ok(self.db.write(changes.0)?)
    }

    /// Makes everything written so far survive a power cut.
    pub(crate) fn flush(&self) -> Result<()> {
        Ok(self.db.flush_wal(true)?)
    }

    /// As [`Index::write`], and durable at once: for what the segments themselves do not say.
    pub(crate) fn write_durably(&self, changes: Changes) -> Result<()> {
        self.change_bytes.add(changes.0.size_in_bytes() as u64);
        let mut options = WriteOptions::default();
        options.set_sync(true);
        Ok(self.db.write_opt(changes.0, &options)?)
    }

    fn decode(&self, spot: Spot, value: &[u8]) -> Option<Entry> {
        let entry = Entry::decode(spot, value);
        if entry.is_none() {
            tracing::warn!("an index entry does not decode");
        }
        entry
    }

    /// What was read. An error is remembered.
    fn read<T>(&self, read: std::result::Result<T, rocksdb::Error>) -> Result<T> {
        Ok(read.inspect_err(|_| self.mark_damaged())?)
    }

    fn mark_damaged(&self) {
        self.damaged.store(true, Ordering::Relaxed);
        if self.read_only {
            return;
        }
        let mark = self.dir.join(DAMAGED_MARK);
        if !mark.exists() {
            tracing::error!("the index cannot be read; the next opening builds it anew");
            let _ = fs::write(mark, []);
        }
    }
}

/// Changes to be written together.
#[derive(Default)]
pub(crate) struct Changes(WriteBatch);

impl Changes {
    pub(crate) fn put(&mut self, entry: &Entry) {
        self.0.put(entry_key(entry.spot), entry.encode());
    }

    pub(crate) fn remove(&mut self, spot: Spot) {
        self.0.delete(entry_key(spot));
    }

    pub(crate) fn put_segment(&mut self, id: SegmentId, state: &SegmentState) {
        self.0.put(segment_key(SEGMENT_PREFIX, id), state.encode());
    }

    pub(crate) fn put_use(&mut self, id: SegmentId, used_s: u32) {
        self.0.put(segment_key(USE_PREFIX, id), used_s.to_le_bytes());
    }

    pub(crate) fn put_highest_segment(&mut self, id: SegmentId) {
        self.0.put(HIGHEST_KEY, id.0.to_le_bytes());
    }

    pub(crate) fn put_scrub_position(&mut self, spot: Spot) {
        let mut value = [0; 16];
        value[..8].copy_from_slice(&spot.segment.0.to_le_bytes());
        value[8..].copy_from_slice(&spot.offset.to_le_bytes());
        self.0.put(SCRUB_KEY, value);
    }

    pub(crate) fn put_hits(&mut self, of: &hits::Of, hits: Hits) {
        self.0.put(hits_key(of), hits.encode());
    }

    pub(crate) fn remove_hits(&mut self, of: &hits::Of) {
        self.0.delete(hits_key(of));
    }

    pub(crate) fn remove_segment(&mut self, id: SegmentId) {
        self.0.delete(segment_key(SEGMENT_PREFIX, id));
        self.0.delete(segment_key(USE_PREFIX, id));
    }
}

fn segment_key(prefix: u8, id: SegmentId) -> [u8; 9] {
    let mut key = [prefix; 9];
    key[1..].copy_from_slice(&id.0.to_be_bytes());
    key
}

fn hits_key((namespace, scope, class): &hits::Of) -> [u8; 50] {
    let mut key = [HITS_PREFIX; 50];
    Writer::new(&mut key[1..]).bytes(&namespace.0).bytes(&scope.0).u8(class.0);
    key
}

fn hits_of(key: &[u8]) -> Option<hits::Of> {
    let mut reader = Reader::new(<&[u8; 49]>::try_from(key).ok()?);
    Some((NamespaceId(reader.bytes()), ScopeTag(reader.bytes()), TtlClass(reader.u8())))
}

fn open_db(path: &Path) -> std::result::Result<(DB, Options), rocksdb::Error> {
    #[cfg_attr(not(test), allow(unused_mut))]
    let mut options = options();
    #[cfg(test)]
    if let Some(opened) = memory::open(&mut options, path) {
        return Ok((opened?, options));
    }
    // Until it was looked at: a compaction would take away what tells of a loss.
    options.set_disable_auto_compactions(true);
    Ok((DB::open(&options, path)?, options))
}

/// Numbers of RocksDB's tables and logs as they lie in its folder before it is opened, which removes what it does not know.
struct Files {
    tables: Vec<u64>,
    logs: Vec<u64>,
}

impl Files {
    fn of(path: &Path) -> Self {
        let mut files = Self { tables: Vec::new(), logs: Vec::new() };
        for name in fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name()) {
            let name = name.to_string_lossy();
            match name.split_once('.').map(|(number, kind)| (number.parse(), kind)) {
                Some((Ok(number), "sst")) => files.tables.push(number),
                Some((Ok(number), "log")) => files.logs.push(number),
                _ => {}
            }
        }
        files
    }

    /// Whether RocksDB has forgotten a table. A damaged entry of its manifest may look like the end of it, behind which nothing
    /// was written; it then opens what the index was before, and whole tables of entries are missing though nothing cannot be
    /// read. Such a table is newer than all that it knows, as one is whose writing was cut short; but that one's log is still
    /// there, which is older than the table.
    fn has_lost_table(&self, db: &DB) -> Result<bool> {
        let number = |name: &str| name.trim_start_matches('/').split('.').next()?.parse::<u64>().ok();
        let live: Vec<u64> = db.live_files()?.iter().filter_map(|file| number(&file.name)).collect();
        let known = self.tables.iter().filter(|table| live.contains(table)).max().copied().unwrap_or(0);
        let oldest_log = self.logs.iter().min().copied().unwrap_or(u64::MAX);
        Ok(self.tables.iter().any(|&table| table > known && table < oldest_log && !live.contains(&table)))
    }
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_paranoid_checks(true);
    options.set_compression_type(DBCompressionType::None);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_manifest_preallocation_size(MANIFEST_BYTES);
    options.set_keep_log_file_num(2);
    options.set_max_open_files(256);
    options
}

/// An empty index in place of one that cannot be opened.
fn open_anew(path: &Path, error: &rocksdb::Error) -> Result<(DB, Options)> {
    tracing::warn!(%error, "the index cannot be opened and is built anew");
    set_aside(path)?;
    Ok(open_db(path)?)
}

/// Moves a damaged index out of the way, over the one before it: for whoever wants to know what happened.
fn set_aside(path: &Path) -> Result<()> {
    let aside = path.with_extension("aside");
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(StoreError::io("removing", &aside))?;
    }
    if path.exists() {
        fs::rename(path, &aside).map_err(StoreError::io("moving aside", path))?;
    }
    Ok(())
}
