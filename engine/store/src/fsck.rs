//! The offline check of a data folder: every page of every segment, every byte of every record, and the index against
//! them. Nothing is changed unless a repair is asked for, and a repair deletes nothing but what is dead.
//!
//! Takes the store's lock, so that nobody writes meanwhile. Memory: some 200 bytes for each record, and the index entries
//! of one segment. What a repair cannot mend is left as it is and told: a lease whose prefix is gone stays broken.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use esker_prefix::{ObjectId, ObjectKind};

use crate::clock::{self, SystemClock};
use crate::erasure::{Erase, Erasures};
use crate::index::{DAMAGED_MARK, Entry, Index, Phase, SegmentState};
use crate::io::{self, BufferPool, Disk, FileId, PAGE, read_exact};
use crate::record::{ContentDigest, PlacedHeader};
use crate::scan::{Met, Scan};
use crate::segment::{Ends, RECORDS_AT, SegmentId, Spot, last_page};
use crate::stats::Counter;
use crate::store::lock;
use crate::{MissCounts, MissKind, Result, Store, StoreError, StoreSettings, lease, verify};

/// What a check found. Counts of records unless their name says bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FsckReport {
    /// Segment files.
    pub segments: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Sound records that the index names.
    pub live: u64,
    /// Their bytes.
    pub live_bytes: u64,
    /// Bytes that segments do not take any more, though their length counts them.
    pub given_back_bytes: u64,
    /// Sound records that the next opening takes in, as after any crash.
    pub to_recover: u64,
    /// Bad records that the index does not name: found before, and left where they are.
    pub quarantined: u64,
    /// Records whose parent is not stored.
    pub orphans: u64,
    /// Leases that hold.
    pub leases: u64,

    /// Bad records that the index names, by kind.
    pub bad: MissCounts,
    /// Index entries with no such record at their place.
    pub dangling: u64,
    /// Sound records that the index does not name.
    pub missing: u64,
    /// Records that a later one of the same name replaces, and that the index names all the same.
    pub duplicates: u64,
    /// Those of them with other content.
    pub conflicting: u64,
    /// Erased records that the index names.
    pub erased_present: u64,
    /// Bytes of records that nothing needs and that were not given back.
    pub dead_bytes: u64,
    /// Leases that hold and of whose prefixes something is gone.
    pub broken_leases: u64,
    /// Segments without a sound header page, or that cannot be opened.
    pub bad_segments: Vec<String>,
    /// Why the index cannot be read.
    pub index_error: Option<String>,

    /// What a repair did.
    pub repair: Option<Repair>,
}

/// What a repair did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// Whether the index was built anew.
    pub rebuilt: bool,
    /// Bad records taken out of the index.
    pub quarantined: u64,
    /// Bytes of dead records given back.
    pub given_back_bytes: u64,
}

impl FsckReport {
    /// How many things are wrong.
    pub fn problems(&self) -> u64 {
        self.mendable() + self.broken_leases + self.bad_segments.len() as u64
    }

    /// Those that a repair mends.
    fn mendable(&self) -> u64 {
        self.bad.total() + self.index_problems() + u64::from(self.dead_bytes > 0)
    }

    fn index_problems(&self) -> u64 {
        let error = u64::from(self.index_error.is_some());
        self.dangling + self.missing + self.duplicates + self.erased_present + error
    }
}

/// Checks the store in `dir`, and mends it if `repair`. `told` hears how many bytes of how many are looked at.
pub fn fsck(dir: &Path, repair: bool, told: &dyn Fn(u64, u64)) -> Result<FsckReport> {
    let segments = dir.join("segments");
    fs::metadata(&segments).map_err(StoreError::io("looking for", &segments))?;
    let lock = lock(dir, Duration::ZERO)?;
    let (disk, _) = io::choose(&segments, &StoreSettings::default().io_engines)
        .map_err(StoreError::io("no I/O engine works in", &segments))?;
    let mut check = Check::new(dir, &*disk)?;
    check.segments(&segments, told)?;
    check.judge();
    check.leases()?;
    let Check { mut report, bad, dead, index, .. } = check;
    drop((index, disk, lock));
    if repair {
        report.repair = Some(mend(dir, &report, &bad, &dead)?);
    }
    Ok(report)
}

/// A check under way.
struct Check<'a> {
    dir: &'a Path,
    disk: &'a dyn Disk,
    pool: Arc<BufferPool>,
    read_bytes: Counter,
    index: Option<Index>,
    states: HashMap<SegmentId, SegmentState>,
    files: HashMap<SegmentId, FileId>,
    /// The newest sound record of each name.
    newest: HashMap<ObjectId, Held>,
    /// Sound records that an equally named later one replaces.
    replaced: Vec<Held>,
    erasures: Erasures,
    bad: Vec<(Spot, MissKind)>,
    dead: Vec<(Spot, u64)>,
    report: FsckReport,
}

/// A sound record.
#[derive(Clone, Copy)]
struct Held {
    entry: Entry,
    /// Whether the index names it.
    indexed: bool,
    /// Whether the index would have taken it in already.
    known: bool,
}

impl<'a> Check<'a> {
    fn new(dir: &'a Path, disk: &'a dyn Disk) -> Result<Self> {
        let mut report = FsckReport::default();
        let opened = Index::open_read_only(dir).and_then(|index| Ok((index.segments()?, index)));
        let (states, index) = match opened {
            Ok((states, index)) => {
                // Of what no segment has, too.
                report.index_error = index.check().err().map(|error| error.to_string());
                (states.into_iter().collect(), Some(index))
            }
            Err(error) => {
                report.index_error = Some(error.to_string());
                (HashMap::new(), None)
            }
        };
        Ok(Self {
            dir,
            disk,
            pool: BufferPool::new(64 << 20),
            read_bytes: Counter::default(),
            index,
            states,
            files: HashMap::new(),
            newest: HashMap::new(),
            replaced: Vec::new(),
            erasures: Erasures::default(),
            bad: Vec::new(),
            dead: Vec::new(),
            report,
        })
    }

    fn segments(&mut self, segments: &Path, told: &dyn Fn(u64, u64)) -> Result<()> {
        let names = self.disk.list().map_err(StoreError::io("listing", segments))?;
        let mut ids: Vec<SegmentId> =
            names.iter().filter_map(|name| SegmentId::from_file_name(name)).collect();
        ids.sort_unstable();
        let mut open = Vec::new();
        for id in ids {
            self.report.segments += 1;
            match self.disk.open(&id.file_name()) {
                Ok((file, len_bytes)) => open.push((id, file, len_bytes)),
                Err(_) => self.report.bad_segments.push(id.file_name()),
            }
        }
        let total = open.iter().map(|(_, _, len_bytes)| len_bytes).sum();
        let mut before = 0;
        for (id, file, len_bytes) in open {
            self.files.insert(id, file);
            self.segment(id, file, len_bytes, &|at| told(before + at, total))?;
            before += len_bytes;
            told(before, total);
        }
        // Entries of segments that are not there.
        if let Some(index) = &self.index {
            for (id, _) in self.states.iter().filter(|(id, _)| !self.files.contains_key(id)) {
                self.report.dangling += index.entries_of(*id).count() as u64;
            }
        }
        self.report.read_bytes = self.read_bytes.get();
        Ok(())
    }

    fn segment(&mut self, id: SegmentId, file: FileId, len_bytes: u64, told: &dyn Fn(u64)) -> Result<()> {
        let taken = self.disk.allocated_bytes(file).unwrap_or(len_bytes);
        self.report.given_back_bytes += len_bytes.saturating_sub(taken);
        let path = self.dir.join("segments").join(id.file_name());
        let read = |at| {
            let read = || read_exact(self.disk, &self.pool, file, at, PAGE).ok();
            read().or_else(read)
        };
        let Ends { header, copied, seal, .. } = Ends::read(id, len_bytes, &path, read)?;
        let state = self.states.get(&id).copied();
        let sealed = state.is_some_and(|state| state.phase == Phase::Sealed);
        if ((copied || header.is_none()) && state.is_some()) || (sealed && seal.is_none()) {
            self.report.bad_segments.push(id.file_name());
        }
        let generation = header.or(seal).map(|page| page.generation).or(state.map(|state| state.generation));
        let to = seal.map_or(if header.is_some() { last_page(len_bytes) } else { len_bytes }, |seal| {
            seal.extent_bytes.min(last_page(len_bytes))
        });
        let mut entries = HashMap::new();
        if let Some(index) = &self.index {
            for entry in index.entries_of(id) {
                match entry {
                    Ok(entry) => drop(entries.insert(entry.spot.offset, entry)),
                    Err(error) => self.report.index_error = Some(error.to_string()),
                }
            }
        }
        let (disk, pool) = (self.disk, Arc::clone(&self.pool));
        let read_bytes = std::mem::take(&mut self.read_bytes);
        let scan = Scan {
            disk,
            pool: &pool,
            read_bytes: &read_bytes,
            file,
            id,
            generation,
            verify_payload: true,
            write_again: false,
        };
        scan.run(RECORDS_AT, to, &mut |met| match met {
            Met::Record(entry) => {
                told(entry.end());
                let named = entries.remove(&entry.spot.offset);
                self.report.dangling += u64::from(named.is_some_and(|named| named != entry));
                let known = seal.is_some() || state.is_none_or(|state| entry.spot.offset < state.watermark);
                self.sound(Held { entry, indexed: named == Some(entry), known });
            }
            Met::Bad(offset, kind) => match entries.remove(&offset) {
                Some(entry) => {
                    self.report.bad.add(kind);
                    self.bad.push((entry.spot, kind));
                }
                None => self.report.quarantined += 1,
            },
        });
        self.read_bytes = read_bytes;
        self.report.dangling += entries.len() as u64;
        Ok(())
    }

    /// Takes a sound record in: of one name the later holds.
    fn sound(&mut self, held: Held) {
        if let Some(erase) = Erase::of(&held.entry) {
            self.erasures.add(erase, held.entry.sequence);
        }
        let loser = match self.newest.entry(held.entry.id) {
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(held);
                return;
            }
            std::collections::hash_map::Entry::Occupied(mut known) => {
                if known.get().entry.sequence < held.entry.sequence { known.insert(held) } else { held }
            }
        };
        self.replaced.push(loser);
    }

    /// Says what each sound record is.
    fn judge(&mut self) {
        let bytes = |entry: &Entry| entry.end() - entry.spot.offset;
        for loser in &self.replaced {
            if loser.indexed {
                self.report.duplicates += 1;
                let digest = |held: &Held| -> ContentDigest { held.entry.digest };
                let other = self.newest.get(&loser.entry.id).map(digest) != Some(loser.entry.digest);
                let own = matches!(loser.entry.id.kind, ObjectKind::Lease | ObjectKind::Erasure);
                self.report.conflicting += u64::from(other && !own);
            }
            self.report.dead_bytes += bytes(&loser.entry);
            self.dead.push((loser.entry.spot, bytes(&loser.entry)));
        }
        let mut erased = Vec::new();
        for Held { entry, indexed, known } in self.newest.values() {
            let gone = self.erasures.cover(entry);
            match (gone, indexed) {
                (true, true) => self.report.erased_present += 1,
                (true, false) => {
                    self.report.dead_bytes += bytes(entry);
                    self.dead.push((entry.spot, bytes(entry)));
                }
                (false, true) => {
                    self.report.live += 1;
                    self.report.live_bytes += bytes(entry);
                }
                (false, false) if *known => self.report.missing += 1,
                (false, false) => self.report.to_recover += 1,
            }
            if gone {
                erased.push(entry.id);
            }
        }
        for id in &erased {
            self.newest.remove(id);
        }
        let parents = self.newest.values().filter(|held| held.entry.id.kind != ObjectKind::Erasure);
        let parents = parents.filter_map(|held| held.entry.parent);
        self.report.orphans = parents.filter(|parent| !self.newest.contains_key(parent)).count() as u64;
    }

    /// Looks whether what is promised is there.
    fn leases(&mut self) -> Result<()> {
        let clock = SystemClock::new().map_err(StoreError::io("reading the clock for", self.dir))?;
        let now_s = clock::peek(self.dir, &clock);
        for held in self.newest.values().filter(|held| held.entry.id.kind == ObjectKind::Lease) {
            let Some((ends, deadline_s)) = self.lease(&held.entry) else { continue };
            if deadline_s <= now_s {
                continue;
            }
            self.report.leases += 1;
            self.report.broken_leases += u64::from(!ends.iter().all(|end| self.has_path(*end)));
        }
        Ok(())
    }

    fn lease(&self, entry: &Entry) -> Option<(Vec<ObjectId>, u32)> {
        let file = *self.files.get(&entry.spot.segment)?;
        let len = usize::try_from(entry.end() - entry.spot.offset).ok()?;
        let record = read_exact(self.disk, &self.pool, file, entry.spot.offset, len).ok()?;
        payload(&record, &self.pool)
    }

    fn has_path(&self, end: ObjectId) -> bool {
        let mut at = Some(end);
        while let Some(id) = at {
            let Some(held) = self.newest.get(&id) else { return false };
            at = held.entry.parent;
        }
        true
    }
}

/// Ends and deadline of the lease that a record holds.
pub(crate) fn payload(record: &[u8], pool: &Arc<BufferPool>) -> Option<(Vec<ObjectId>, u32)> {
    let header = PlacedHeader::decode(record).ok()?.header;
    let plane = header.planes.first()?;
    let stored = record.get(plane.range())?;
    let decoded = verify::plane(plane, stored, pool).ok()?;
    lease::parse(decoded.as_deref().map_or(stored, |content| &content[..plane.raw_bytes as usize]))
}

/// Mends what can be mended.
fn mend(dir: &Path, report: &FsckReport, bad: &[(Spot, MissKind)], dead: &[(Spot, u64)]) -> Result<Repair> {
    let mut repair = Repair { rebuilt: report.index_problems() > 0, ..Repair::default() };
    if report.mendable() == 0 {
        return Ok(repair);
    }
    if repair.rebuilt {
        let mark = dir.join(DAMAGED_MARK);
        fs::write(&mark, []).map_err(StoreError::io("writing", &mark))?;
    }
    let store = Store::open(dir, StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() })?;
    let shared = &store.shared;
    for (spot, kind) in bad {
        // A rebuild that looks at headers only takes up what has a bad payload.
        let Some(entry) = shared.index.get(*spot)? else { continue };
        let Some(located) = shared.table.get(entry.id).filter(|located| located.spot == *spot) else {
            continue;
        };
        shared.quarantine(entry.id, &located, *kind);
        repair.quarantined += 1;
    }
    for &(spot, bytes) in dead {
        let Some(segment) = shared.segments.get(spot.segment) else { continue };
        // Past the accounts of the store, which have not counted it as live.
        if shared.index.get(spot)?.is_none() && shared.disk.punch(segment.file, spot.offset, bytes).is_ok() {
            repair.given_back_bytes += bytes;
        }
    }
    store.close()?;
    Ok(repair)
}
