//! A random script of puts, erasures, faults, reopenings and jumps of time, run once, with everything noted that a crash
//! test needs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use esker_prefix::{NamespaceId, ObjectId, ScopeTag, WriterId};

use super::oracle::Oracle;
use crate::index::memory::{self, Contents};
use crate::io::OpKind;
use crate::io::faulty::{Fault, Plan};
use crate::io::sim::{History, Image, Random, SimDisk};
use crate::tests::common::{ManualClock, id, object};
use crate::{Erase, LeaseId, PutObject, PutOutcome, Sabotage, Store, StoreSettings, TtlClass};

/// Threads that put at once on a disk that answers late.
const WRITERS: usize = 3;
/// What leases of these tests last. One length, so that a renewal never shortens one.
pub(super) const LEASE_S: u64 = 3600;
/// Jumps of time, in seconds.
const JUMPS_S: [u64; 7] = [1, 30, 400, 4000, 90_000, 400_000, 315_360_000];

/// See the module.
pub(super) struct Recording {
    pub(super) settings: StoreSettings,
    pub(super) history: History,
    /// What the index held when the history was this long.
    index: Vec<(usize, Contents)>,
    /// All that was put, acknowledged or not, and when it was first handed in.
    attempts: Vec<PutObject>,
    acked: Vec<Acked>,
    erasures: Vec<Erased>,
    /// Whether only what is leased must be there: the store evicts, or time passes.
    pub(super) lapses: bool,
    /// Whether of what is put together only the ends are leased, and hold what they hang on.
    chains: bool,
    /// The attempt that an object was stored by last.
    stored: HashMap<ObjectId, usize>,
    /// Whether time passes.
    pub(super) clocked: bool,
    clock: Arc<ManualClock>,
    /// Seconds that have truly passed, from this length of the history on.
    times: Vec<(usize, u64)>,
    /// What `DIR/clock` held when the history was this long.
    clock_files: Vec<(usize, String)>,
    /// Objects that may be missing, since the disk has lied once.
    pub(super) may_lose: usize,
    /// Erasures that were given up as meaning nothing any more.
    pub(super) lapsed: u64,
}

/// A put that was acknowledged.
struct Acked {
    /// Positions in `attempts`: of the end of the prefix whose lease holds it, of what that hangs on, and last its own.
    path: Vec<usize>,
    /// Length of the history when the acknowledgement had come.
    at: usize,
    /// True seconds until which it is promised.
    until_s: u64,
}

impl Acked {
    fn attempt(&self) -> usize {
        self.path[self.path.len() - 1]
    }

    fn end(&self) -> usize {
        self.path[0]
    }
}

/// An erasure: of what was handed in before it.
struct Erased {
    what: Erase,
    /// Length of `attempts` when it began.
    attempts: usize,
    /// Length of the history when it began, and when it was acknowledged.
    begun: usize,
    done: Option<usize>,
}

/// A folder for lock files; in memory where the system has such a place.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

impl Recording {
    /// On a disk that reports its errors; or, if it is a lying one, loses, misdirects or alters one write and says nothing. `chains`:
    /// whether a lease may hold more than its end; then one record that is damaged may cost more than one object.
    pub(super) fn make(
        dir: &Path,
        seed: u64,
        sabotage: Sabotage,
        lying: bool,
        chains: bool,
    ) -> Result<Self, String> {
        let mut random = Random::new(seed);
        // Numbers of their own, so that what else happens in a script of a known seed stays what it was.
        let mut life = Random::new(seed ^ 0x11fe);
        let (erases, clocked) = match super::PLAIN_REGRESSIONS.contains(&seed) {
            true => (false, false),
            false => (life.once_in(2) || sabotage.lapse_early || sabotage.skip_tombstone, life.once_in(3)),
        };
        // Erasures lapse where much comes and goes: often, and in short segments. Not in scripts of before they did.
        let mut tidy = Random::new(seed ^ 0x71d7);
        let tidies = erases && !super::REGRESSIONS.contains(&seed);
        let clocked = clocked || tidies && tidy.once_in(2);
        let known = super::REGRESSIONS.contains(&seed) || super::PLAIN_REGRESSIONS.contains(&seed);
        let settings = StoreSettings {
            segment_bytes: random.one_of(&[24 << 10, 64 << 10, 128 << 10]),
            zstd_level: random.one_of(&[None, Some(1)]),
            commit_bytes: random.one_of(&[8 << 10, 32 << 20]),
            capacity_bytes: random.one_of(&[1 << 20, u64::MAX, u64::MAX]),
            pool_bytes: 256 << 10,
            max_write_failures: u64::MAX,
            leased_bytes: Some(u64::MAX),
            lock_wait: Duration::from_secs(10),
            sabotage,
            bulk_entries: life.one_of(&[0, 0, 1, 6]),
            ..StoreSettings::default()
        };
        let segment_bytes = if tidies && tidy.once_in(2) { 24 << 10 } else { settings.segment_bytes };
        let settings = StoreSettings { segment_bytes, ..settings };
        let late = random.once_in(2);
        let disk = match late {
            true => SimDisk::late(Image::default(), u64::MAX, random.number()),
            false => SimDisk::open(Image::default(), u64::MAX),
        };
        let mut recording = Self {
            history: disk.history(),
            index: vec![(0, Contents::new())],
            attempts: Vec::new(),
            acked: Vec::new(),
            erasures: Vec::new(),
            lapses: settings.capacity_bytes < u64::MAX || clocked,
            chains: chains && !known,
            stored: HashMap::new(),
            clocked,
            clock: ManualClock::new(),
            times: vec![(0, 0)],
            clock_files: Vec::new(),
            may_lose: 0,
            lapsed: 0,
            settings,
        };
        // The script's before this one.
        let _ = fs::remove_file(dir.join("clock"));
        let mut store = recording.open(dir, &disk)?;
        let faults = !lying && random.once_in(2);
        let steps = 20 + random.below(40);
        let lie_at = random.below(steps);
        for step in 0..steps {
            if lying && step == lie_at {
                recording.may_lose = lie(&disk, &mut random);
            }
            match random.below(16) {
                0 => {
                    recording.note_index(&store, &disk);
                    recording.lapsed += store.stats().erasures_lapsed;
                    // Not closed: memory has no log to flush.
                    drop(store);
                    if clocked && life.once_in(2) {
                        recording.clock.reboot();
                    }
                    store = recording.open(dir, &disk)?;
                }
                1 | 2 if faults => arm(&disk, &mut random, recording.lapses),
                _ => recording.put(&store, &disk, &mut random, if late { WRITERS } else { 1 }),
            }
            if erases && life.once_in(5) {
                recording.erase(&store, &disk, &mut life);
            }
            if clocked && life.once_in(4) {
                recording.pass_time(&store, &disk, &mut life);
            }
            if tidies && tidy.once_in(3) {
                (0..1 + tidy.below(3)).for_each(|_| store.keep_house());
            }
            recording.note_index(&store, &disk);
            recording.note_clock(dir, &disk);
        }
        recording.lapsed += store.stats().erasures_lapsed;
        drop(store);
        recording.history = disk.history();
        Ok(recording)
    }

    /// What must hold of a store that is looked at `later_s` after a crash at this point.
    pub(super) fn oracle_at(&self, position: usize, later_s: u64) -> Oracle<'_> {
        let now_s = self.times.iter().rfind(|(at, _)| *at <= position).map_or(0, |(_, s)| *s) + later_s;
        let covered = |attempt: usize, erased: &Erased| {
            attempt < erased.attempts && covers(erased.what, &self.attempts[attempt])
        };
        // From its beginning on nobody knows; from its end on everybody does.
        let doubtful = |attempt| self.erasures.iter().any(|e| e.begun <= position && covered(attempt, e));
        let gone = |e: &Erased| e.done.is_some_and(|done| done <= position);
        let erased = |&attempt: &usize| self.erasures.iter().any(|e| gone(e) && covered(attempt, e));
        let acked = self.acked.iter().filter(|acked| acked.at <= position && acked.until_s > now_s);
        // Behind what was erased nothing leads to it any more: it may go, lease or not.
        let acked = acked.filter(|acked| !acked.path.iter().any(|&attempt| doubtful(attempt)));
        let acked: Vec<&Acked> = acked.collect();
        let mut paths: BTreeMap<(usize, usize), Vec<ObjectId>> = BTreeMap::new();
        for acked in &acked {
            paths.entry((acked.end(), acked.at)).or_default().push(self.attempts[acked.attempt()].id);
        }
        // From their ends on, up to where what they hang on was erased.
        let linked = |path: &[ObjectId]| path.windows(2).all(|pair| self.parent_of(pair[0]) == Some(pair[1]));
        let paths = paths.into_values().filter(|path| self.chains && linked(path)).collect();
        let acked = acked.into_iter().map(Acked::attempt);
        let erased: HashSet<usize> = (0..self.attempts.len()).filter(erased).collect();
        Oracle::new(&self.attempts, acked, erased, paths, self.lapses)
    }

    /// What `DIR/clock` held at this point. It is flushed before it is renamed, so a cut takes none of it.
    pub(super) fn clock_at(&self, position: usize) -> Option<&str> {
        self.clock_files.iter().rfind(|(at, _)| *at <= position).map(|(_, text)| text.as_str())
    }

    /// An index that a crash at this point may leave: none, an older one, the newest.
    pub(super) fn index_at(&self, position: usize, random: &mut Random) -> (Contents, &'static str) {
        let reached = self.index.iter().take_while(|(at, _)| *at <= position).count();
        match random.below(3) {
            0 => (Contents::new(), "index gone"),
            1 => (self.index[random.index(reached)].1.clone(), "index of earlier"),
            _ => (self.index[reached - 1].1.clone(), "index current"),
        }
    }

    fn open(&self, dir: &Path, disk: &Arc<SimDisk>) -> Result<Store, String> {
        let (_, contents) = self.index.last().expect("starts with an empty one");
        memory::expect(contents);
        let store = Store::open_on_at(dir, self.settings.clone(), disk.clone(), self.clock.clone());
        store.map_err(|error| format!("the script's store does not open: {error}"))
    }

    /// The position is taken after the content: the index is never newer than the history says.
    fn note_index(&mut self, store: &Store, disk: &SimDisk) {
        let contents = store.shared.index.contents();
        if self.index.last().is_none_or(|(_, last)| *last != contents) {
            self.index.push((disk.position(), contents));
        }
    }

    fn note_clock(&mut self, dir: &Path, disk: &SimDisk) {
        let text = fs::read_to_string(dir.join("clock")).unwrap_or_default();
        if self.clock_files.last().is_none_or(|(_, last)| *last != text) {
            self.clock_files.push((disk.position(), text));
        }
    }

    /// Time that nobody has foreseen passes, and mostly the store takes note of what is over.
    fn pass_time(&mut self, store: &Store, disk: &SimDisk, random: &mut Random) {
        let jump_s = random.one_of(&JUMPS_S);
        let true_s = self.times.last().map_or(0, |(_, s)| *s) + jump_s;
        self.times.push((disk.position(), true_s));
        self.clock.pass(Duration::from_secs(jump_s));
        if !random.once_in(3) {
            store.keep_house();
        }
    }

    fn erase(&mut self, store: &Store, disk: &SimDisk, random: &mut Random) {
        if self.attempts.is_empty() {
            return;
        }
        let some = &self.attempts[random.index(self.attempts.len())];
        let what = match random.below(7) {
            0 => Erase::Namespace(some.namespace),
            1 => Erase::Scope(some.scope),
            2 => Erase::Writer(some.writer),
            _ => Erase::Object(some.id),
        };
        let (attempts, begun) = (self.attempts.len(), disk.position());
        let done = store.erase(what).is_ok().then(|| disk.position());
        self.erasures.push(Erased { what, attempts, begun, done });
    }

    fn put(&mut self, store: &Store, disk: &SimDisk, random: &mut Random, writers: usize) {
        let first = self.attempts.len();
        for _ in 0..1 + random.index(5 * writers) {
            let put = self.next_object(random);
            self.attempts.push(put);
        }
        let all: Vec<(usize, PutObject)> = (first..).zip(self.attempts[first..].iter().cloned()).collect();
        let share = all.len().div_ceil(writers);
        let now_s = self.times.last().map_or(0, |(_, s)| *s);
        let lapses = self.lapses;
        let chains = lapses && self.chains;
        let acked = std::thread::scope(|scope| {
            let put_some = |some: &[(usize, PutObject)]| {
                let outcomes = store.put(some.iter().map(|(_, put)| put.clone()).collect());
                let position = disk.position();
                let stored =
                    |outcome: &Result<_, _>| matches!(outcome, Ok(PutOutcome::Stored | PutOutcome::Present));
                let acked = some.iter().zip(outcomes).filter(|(_, outcome)| stored(outcome));
                let acked: Vec<&(usize, PutObject)> = acked.map(|(put, _)| put).collect();
                let is_end = |put: &PutObject| acked.iter().all(|(_, other)| other.parent != Some(put.id));
                // What is there when the lease has been written is what it holds: something that the object hangs on may be gone.
                let held = |put: &PutObject| {
                    let parents = std::iter::successors(put.parent, |&id| self.parent_of(id));
                    let there = parents.take_while(|&id| chains && store.get(&[id])[0].is_some());
                    [put.id].into_iter().chain(there).collect::<Vec<ObjectId>>()
                };
                let promise = |(attempt, put): &&(usize, PutObject)| match lapses {
                    false => Some((*attempt, vec![put.id], position, u64::MAX)),
                    true if chains && !is_end(put) || !keep(store, put, LEASE_S) => None,
                    true => {
                        let held = held(put);
                        Some((*attempt, held, disk.position(), now_s + LEASE_S))
                    }
                };
                let promised: Vec<_> = acked.iter().filter_map(promise).collect();
                let stored: Vec<(ObjectId, usize)> =
                    acked.iter().map(|(attempt, put)| (put.id, *attempt)).collect();
                (stored, promised)
            };
            let putting: Vec<_> = all.chunks(share).map(|some| scope.spawn(move || put_some(some))).collect();
            putting.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
        });
        let (stored, promised): (Vec<_>, Vec<_>) = acked.into_iter().unzip();
        self.stored.extend(stored.into_iter().flatten());
        for (end, held, at, until_s) in promised.into_iter().flatten() {
            let stored = held[1..].iter().map_while(|id| self.stored.get(id).copied());
            let held: Vec<usize> = [end].into_iter().chain(stored).collect();
            let parts = (1..=held.len()).map(|len| held[..len].to_vec());
            self.acked.extend(parts.map(|path| Acked { path, at, until_s }));
        }
    }

    /// What an object hangs on: the same in all attempts.
    fn parent_of(&self, id: ObjectId) -> Option<ObjectId> {
        self.attempts.iter().find(|attempt| attempt.id == id)?.parent
    }

    /// Mostly a new object; else one from before, with the same bytes or with others.
    fn next_object(&self, random: &mut Random) -> PutObject {
        if random.once_in(5) && !self.attempts.is_empty() {
            let again = self.attempts[random.index(self.attempts.len())].clone();
            let number = number_of(&again);
            // Where a record may go, its name is free for other bytes, and nobody could tell which were meant.
            return match random.once_in(2) || self.lapses {
                true => again,
                false => {
                    PutObject { planes: object(number, number + 1_000_000, &[300, 900]).planes, ..again }
                }
            };
        }
        let number = self.attempts.len() as u64;
        let lens: Vec<usize> =
            (0..random.below(4)).map(|_| random.one_of(&[0, 50, 700, 2500, 6000])).collect();
        let mut put = object(number, number, &lens);
        (put.namespace, put.scope) =
            (NamespaceId([7 + (number % 2) as u8; 32]), ScopeTag([9 + (number % 3) as u8; 16]));
        put.writer = WriterId(1 + (number % 4) as u32);
        put.class = random.one_of(&[TtlClass(0), TtlClass(2), TtlClass(2), TtlClass::PERMANENT]);
        if random.once_in(2) && number > 0 {
            // Often the one before, which may be of this very batch, or may have been refused.
            let back = 1 + random.below(number.min(3));
            put.parent = Some(id(number_of(&self.attempts[(number - back) as usize])));
            put.tokens = 256;
        }
        put
    }
}

/// Leases an object. In a store that evicts or lives through time, only what is leased must be there.
pub(super) fn keep(store: &Store, put: &PutObject, lease_s: u64) -> bool {
    store.lease(LeaseId(put.id.hash.0), &[put.id], Duration::from_secs(lease_s)).is_ok()
}

/// Whether an erasure means an object.
fn covers(what: Erase, put: &PutObject) -> bool {
    match what {
        Erase::Object(id) => put.id == id,
        Erase::Scope(scope) => put.scope == scope,
        Erase::Namespace(namespace) => put.namespace == namespace,
        Erase::Writer(writer) => put.writer == writer,
    }
}

/// The number that a test object was named by.
pub(super) fn number_of(put: &PutObject) -> u64 {
    u64::from_le_bytes(put.id.hash.0[..8].try_into().unwrap())
}

/// One fault soon that nobody hears of. How many objects it may cost: a write that lands elsewhere overwrites others.
fn lie(disk: &SimDisk, random: &mut Random) -> usize {
    let (fault, may_lose) = match random.below(3) {
        0 => (Fault::Lost, 1),
        1 => (Fault::Misdirected(4096 * (1 + random.below(8))), 8),
        _ => (Fault::FlipBit(random.index(1 << 16)), 1),
    };
    disk.arm(&[Plan { kind: OpKind::Write, first: random.below(4), count: 1, fault }]);
    may_lose
}

/// One fault soon: what a device does that reports its errors. For a full one a store evicts, where it may: `lapses`.
fn arm(disk: &SimDisk, random: &mut Random, lapses: bool) {
    let (kind, fault) = random.one_of(&[
        (OpKind::Sync, Fault::Errno(libc::EIO)),
        (OpKind::Write, Fault::Errno(libc::EIO)),
        (OpKind::Write, Fault::Errno(libc::ENOSPC)),
        (OpKind::Write, Fault::Short(512)),
        (OpKind::Write, Fault::Short(4096)),
    ]);
    disk.arm(&[Plan { kind, first: random.below(6), count: 1, fault }]);
    if random.once_in(3) {
        let first = random.below(2);
        let errno = random.one_of(&[libc::ENOSPC, libc::EIO]);
        disk.fail_creates(first..first + 1, if lapses { errno } else { libc::EIO });
    }
}
