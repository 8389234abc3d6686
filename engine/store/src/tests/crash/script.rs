//! A random script of puts, faults and reopenings, run once, with everything noted that a crash test needs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::oracle::Oracle;
use crate::index::memory::{self, Contents};
use crate::io::OpKind;
use crate::io::faulty::{Fault, Plan};
use crate::io::sim::{History, Image, Random, SimDisk};
use crate::tests::common::{id, object};
use crate::{LeaseId, PutObject, Sabotage, Store, StoreSettings, TtlClass};

/// Threads that put at once on a disk that answers late.
const WRITERS: usize = 3;

/// See the module.
pub(super) struct Recording {
    pub(super) settings: StoreSettings,
    pub(super) history: History,
    /// What the index held when the history was this long.
    index: Vec<(usize, Contents)>,
    /// All that was put, acknowledged or not, and when it was first handed in.
    attempts: Vec<PutObject>,
    /// Position in `attempts`, and the length of the history when the acknowledgement had come.
    acked: Vec<(usize, usize)>,
    /// Objects that may be missing, since the disk has lied once.
    pub(super) may_lose: usize,
}

/// A folder for lock files; in memory where the system has such a place.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

impl Recording {
    /// On a disk that reports its errors; or, if it is a lying one, loses, misdirects or alters one write and says nothing.
    pub(super) fn make(dir: &Path, seed: u64, sabotage: Sabotage, lying: bool) -> Result<Self, String> {
        let mut random = Random::new(seed);
        let settings = StoreSettings {
            segment_bytes: random.one_of(&[24 << 10, 64 << 10, 128 << 10]),
            zstd_level: random.one_of(&[None, Some(1)]),
            commit_bytes: random.one_of(&[8 << 10, 32 << 20]),
            capacity_bytes: random.one_of(&[1 << 20, u64::MAX, u64::MAX]),
            pool_bytes: 256 << 10,
            max_write_failures: u64::MAX,
            lock_wait: Duration::from_secs(10),
            sabotage,
            ..StoreSettings::default()
        };
        let late = random.once_in(2);
        let disk = match late {
            true => SimDisk::late(Image::default(), u64::MAX, random.number()),
            false => SimDisk::open(Image::default(), u64::MAX),
        };
        let mut recording = Self {
            settings,
            history: disk.history(),
            index: vec![(0, Contents::new())],
            attempts: Vec::new(),
            acked: Vec::new(),
            may_lose: 0,
        };
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
                    // Not closed: memory has no log to flush.
                    drop(store);
                    store = recording.open(dir, &disk)?;
                }
                1 | 2 if faults => arm(&disk, &mut random),
                _ => recording.put(&store, &disk, &mut random, if late { WRITERS } else { 1 }),
            }
            recording.note_index(&store, &disk);
        }
        drop(store);
        recording.history = disk.history();
        Ok(recording)
    }

    /// What must hold of a store opened after a crash at this point.
    pub(super) fn oracle_at(&self, position: usize) -> Oracle<'_> {
        let acked = self.acked.iter().filter(|(_, at)| *at <= position);
        Oracle::new(&self.attempts, acked.map(|&(attempt, _)| attempt))
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
        let store = Store::open_on(dir, self.settings.clone(), disk.clone());
        store.map_err(|error| format!("the script's store does not open: {error}"))
    }

    /// The position is taken after the content: the index is never newer than the history says.
    fn note_index(&mut self, store: &Store, disk: &SimDisk) {
        let contents = store.shared.index.contents();
        if self.index.last().is_none_or(|(_, last)| *last != contents) {
            self.index.push((disk.position(), contents));
        }
    }

    fn put(&mut self, store: &Store, disk: &SimDisk, random: &mut Random, writers: usize) {
        let first = self.attempts.len();
        for _ in 0..1 + random.index(5 * writers) {
            let put = self.next_object(random);
            self.attempts.push(put);
        }
        let all: Vec<(usize, PutObject)> = (first..).zip(self.attempts[first..].iter().cloned()).collect();
        let share = all.len().div_ceil(writers);
        let acked = std::thread::scope(|scope| {
            let put_some = |some: &[(usize, PutObject)]| {
                let outcomes = store.put(some.iter().map(|(_, put)| put.clone()).collect());
                let position = disk.position();
                let acked = some.iter().zip(outcomes).filter(|(_, outcome)| outcome.is_ok());
                let kept = |put: &PutObject| keep(store, put).then(|| disk.position());
                match store.shared.settings.capacity_bytes {
                    u64::MAX => acked.map(|(&(attempt, _), _)| (attempt, position)).collect::<Vec<_>>(),
                    _ => acked.filter_map(|((attempt, put), _)| Some((*attempt, kept(put)?))).collect(),
                }
            };
            let putting: Vec<_> = all.chunks(share).map(|some| scope.spawn(move || put_some(some))).collect();
            putting.into_iter().flat_map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
        });
        self.acked.extend(acked);
    }

    /// Mostly a new object; else one from before, with the same bytes or with others.
    fn next_object(&self, random: &mut Random) -> PutObject {
        if random.once_in(5) && !self.attempts.is_empty() {
            let again = self.attempts[random.index(self.attempts.len())].clone();
            let number = number_of(&again);
            // Where a record may be evicted, its name is free for other bytes, and nobody could tell which were meant.
            let evicts = self.settings.capacity_bytes < u64::MAX;
            return match random.once_in(2) || evicts {
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

/// Leases an object. In a store that evicts, only what is leased must be there.
pub(super) fn keep(store: &Store, put: &PutObject) -> bool {
    store.lease(LeaseId(put.id.hash.0), &[put.id], Duration::from_secs(3600)).is_ok()
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

/// One fault soon: what a device does that reports its errors.
fn arm(disk: &SimDisk, random: &mut Random) {
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
        disk.fail_creates(first..first + 1, random.one_of(&[libc::ENOSPC, libc::EIO]));
    }
}
