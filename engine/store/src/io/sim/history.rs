//! What happened to a disk, and what a power cut would have left of it at any point.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::image::File;
use super::random::mix;
use super::{Image, Random, SECTOR};

/// One step. Making and removing a file have two each, so that a crash may come in between.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Creating(String, usize),
    Created(String, usize),
    Wrote {
        name: String,
        offset: usize,
        data: Arc<[u8]>,
        /// The writer was told so; the medium may hold any part of it, for good.
        failed: bool,
        /// The space was given back; `data` is zero.
        hole: bool,
    },
    Synced(String, Covered),
    SyncFailed(String),
    Removing(String),
    Removed(String),
}

/// What a sync makes durable: the writes into the file whose completion was out when it was submitted.
#[derive(Clone, Debug)]
pub(super) struct Covered {
    /// Number of the first that came later.
    pub(super) before: u64,
    /// Earlier ones that were under way.
    pub(super) in_flight: Vec<u64>,
}

impl Covered {
    fn covers(&self, write: u64) -> bool {
        write < self.before && !self.in_flight.contains(&write)
    }
}

/// All steps since a disk was opened.
#[derive(Clone, Debug)]
pub struct History {
    base: Image,
    events: Vec<Event>,
    writes: u64,
}

impl History {
    pub(super) fn new(base: Image) -> Self {
        Self { base, events: Vec::new(), writes: 0 }
    }

    pub(super) fn push(&mut self, event: Event) {
        self.writes += u64::from(matches!(event, Event::Wrote { .. }));
        self.events.push(event);
    }

    /// Number of writes, and of the next one.
    pub(super) fn writes(&self) -> u64 {
        self.writes
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing has happened.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// From the start.
    pub fn replay(&self) -> Replay<'_> {
        Replay { history: self, at: 0, durable: self.base.clone(), unflushed: BTreeMap::new(), writes: 0 }
    }
}

/// A walk through a [`History`]: what is durable at one point of it, and what might be.
pub struct Replay<'a> {
    history: &'a History,
    at: usize,
    durable: Image,
    /// By file and sector: what was written since the sector was last made durable, oldest first.
    unflushed: BTreeMap<String, BTreeMap<usize, Vec<Version>>>,
    writes: u64,
}

/// One content of a sector that may or may not be on the medium.
struct Version {
    data: Arc<[u8]>,
    /// Start of the sector in `data`.
    start: usize,
    write: u64,
    /// No sync makes it durable any more.
    doubtful: bool,
    hole: bool,
}

/// Which of the unflushed sectors a power cut spares. A device that writes back at random is one way to lose data;
/// whole records that survive their neighbours, and a clean cut in the order of writing, find other errors.
enum Spared {
    /// Each sector by itself, this many of 256.
    Sectors(u64),
    /// Whole writes.
    Writes,
    /// All up to this write, and sectors of it.
    Until(u64),
}

impl Replay<'_> {
    /// How many steps have been taken.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Takes steps until this many have been taken.
    pub fn advance_to(&mut self, position: usize) {
        while self.at < position {
            let Some(event) = self.history.events.get(self.at) else { return };
            self.apply(event);
            self.at += 1;
        }
    }

    /// One of the states in which a power cut now may leave the medium.
    pub fn crash(&self, random: &mut Random) -> Image {
        let mut image = self.durable.clone();
        match self.at.checked_sub(1).and_then(|last| self.history.events.get(last)) {
            // The name may be there before the length is.
            Some(Event::Creating(name, len)) => match random.below(3) {
                0 => {}
                1 => image.insert(name, Vec::new()),
                _ => image.insert(name, vec![0; *len]),
            },
            Some(Event::Removing(name)) if random.once_in(2) => {
                image.remove(name);
            }
            _ => {}
        }
        let spared = match random.below(8) {
            0 => Spared::Sectors(0),
            1 => Spared::Sectors(256),
            2 => Spared::Sectors(230),
            3 => Spared::Sectors(26),
            4 => Spared::Sectors(128),
            5 | 6 => Spared::Writes,
            _ => Spared::Until(self.writes.saturating_sub(random.below(6))),
        };
        let salt = random.number();
        for (name, sectors) in &self.unflushed {
            let Some(file) = image.get_mut(name) else { continue };
            for (&sector, versions) in sectors {
                let is_spared = |version: &&Version| {
                    let chance =
                        mix(salt ^ version.write.wrapping_mul(0x1_0000_01b3) ^ ((sector as u64) << 40)) % 256;
                    match spared {
                        Spared::Sectors(of_256) => chance < of_256,
                        Spared::Writes => mix(salt ^ version.write).is_multiple_of(2),
                        Spared::Until(write) => {
                            version.write < write || version.write == write && chance < 128
                        }
                    }
                };
                if let Some(version) = versions.iter().rfind(is_spared) {
                    version.write_to(file, sector);
                }
            }
        }
        image
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Creating(..) | Event::Removing(_) => {}
            Event::Created(name, len) => self.durable.insert(name, vec![0; *len]),
            Event::Removed(name) => {
                self.durable.remove(name);
                self.unflushed.remove(name);
            }
            Event::Wrote { name, offset, data, failed, hole } => {
                let sectors = self.unflushed.entry(name.clone()).or_default();
                for start in (0..data.len()).step_by(SECTOR) {
                    sectors.entry((offset + start) / SECTOR).or_default().push(Version {
                        data: Arc::clone(data),
                        start,
                        write: self.writes,
                        doubtful: *failed,
                        hole: *hole,
                    });
                }
                self.writes += 1;
            }
            Event::Synced(name, covered) => self.flush(name, covered),
            Event::SyncFailed(name) => {
                let sectors = self.unflushed.get_mut(name).into_iter().flat_map(BTreeMap::values_mut);
                sectors.flatten().for_each(|version| version.doubtful = true);
            }
        }
    }

    fn flush(&mut self, name: &str, covered: &Covered) {
        let (Some(file), Some(sectors)) = (self.durable.get_mut(name), self.unflushed.get_mut(name)) else {
            return;
        };
        sectors.retain(|&sector, versions| {
            let made_durable = |version: &Version| !version.doubtful && covered.covers(version.write);
            if let Some(last) = versions.iter().rposition(made_durable) {
                versions[last].write_to(file, sector);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }
}

impl Version {
    fn write_to(&self, file: &mut File, sector: usize) {
        let bytes = &self.data[self.start..self.data.len().min(self.start + SECTOR)];
        file.put(sector * SECTOR, bytes, self.hole);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::io::faulty::{Fault, Plan};
    use crate::io::sim::SimDisk;
    use crate::io::{BufferPool, Disk, FileId, Op, OpKind, PAGE, wait};

    fn write(disk: &SimDisk, file: FileId, page: u64, value: u8) {
        let mut buf = BufferPool::new(0).take(PAGE);
        buf.fill(value);
        wait(disk, |reply| Op::write(file, page * PAGE as u64, buf, 0, reply)).unwrap();
    }

    fn sync(disk: &SimDisk, file: FileId) -> bool {
        wait(disk, |reply| Op::sync(file, 0, reply)).is_ok()
    }

    /// The values that the first byte of each sector of two pages takes over many crashes at the end.
    fn outcomes(disk: &SimDisk) -> Vec<HashSet<u8>> {
        let history = disk.history();
        let mut replay = history.replay();
        replay.advance_to(history.len());
        let mut seen = vec![HashSet::new(); 2 * PAGE / SECTOR];
        for seed in 0..200 {
            let image = replay.crash(&mut Random::new(seed));
            let file = image.get("a").unwrap();
            assert!(file.chunks(SECTOR).all(|sector| sector.iter().all(|&byte| byte == sector[0])));
            for (seen, sector) in seen.iter_mut().zip(file.chunks(SECTOR)) {
                seen.insert(sector[0]);
            }
        }
        seen
    }

    #[test]
    fn what_is_flushed_stays_and_the_rest_may_tear() {
        let disk = SimDisk::open(Image::default(), 1 << 20);
        let file = disk.create("a", 2 * PAGE as u64).unwrap();
        write(&disk, file, 0, 1);
        assert!(sync(&disk, file));
        write(&disk, file, 0, 2);
        write(&disk, file, 1, 3);
        let seen = outcomes(&disk);
        assert!(seen[..8].iter().all(|seen| *seen == HashSet::from([1, 2])), "{seen:?}");
        assert!(seen[8..].iter().all(|seen| *seen == HashSet::from([0, 3])), "{seen:?}");
        assert!(sync(&disk, file));
        let seen = outcomes(&disk);
        assert!(seen[..8].iter().all(|seen| *seen == HashSet::from([2])), "{seen:?}");
        assert!(seen[8..].iter().all(|seen| *seen == HashSet::from([3])), "{seen:?}");
    }

    #[test]
    fn a_sync_after_a_failed_one_proves_nothing_of_what_came_before() {
        let disk = SimDisk::open(Image::default(), 1 << 20);
        let file = disk.create("a", 2 * PAGE as u64).unwrap();
        write(&disk, file, 0, 1);
        disk.arm(&[Plan { kind: OpKind::Sync, first: 0, count: 1, fault: Fault::Errno(libc::EIO) }]);
        assert!(!sync(&disk, file));
        write(&disk, file, 1, 2);
        assert!(sync(&disk, file));
        let seen = outcomes(&disk);
        assert!(seen[..8].iter().all(|seen| *seen == HashSet::from([0, 1])), "{seen:?}");
        assert!(seen[8..].iter().all(|seen| *seen == HashSet::from([2])), "{seen:?}");
        // Written again and flushed, it is durable.
        write(&disk, file, 0, 4);
        assert!(sync(&disk, file));
        assert!(outcomes(&disk)[..8].iter().all(|seen| *seen == HashSet::from([4])));
    }

    #[test]
    fn files_come_and_go_durably_and_a_crash_may_come_in_between() {
        let disk = SimDisk::open(Image::default(), 1 << 20);
        disk.create("a", PAGE as u64).unwrap();
        disk.remove("a").unwrap();
        let history = disk.history();
        let mut lengths = Vec::new();
        for position in 0..=history.len() {
            let mut replay = history.replay();
            replay.advance_to(position);
            let states = (0..100).map(|seed| replay.crash(&mut Random::new(seed)).get("a").map(<[u8]>::len));
            lengths.push(states.collect::<HashSet<_>>());
        }
        let expected: [&[Option<usize>]; 5] =
            [&[None], &[None, Some(0), Some(PAGE)], &[Some(PAGE)], &[None, Some(PAGE)], &[None]];
        assert_eq!(lengths, expected.map(|states| states.iter().copied().collect()));
    }
}
