//! Fail the n-th op, once or from then on, for every n until none is left to fail: while putting, while fetching, while
//! recovering. Then the power goes.
//!
//! Required: no panic, no hang, no wrong byte, nothing acknowledged lost; and the store opens.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::common::figures::{self, Watchdog};
use super::common::{all, chain, fetch, id, object, planes};
use crate::index::memory::{self, Contents};
use crate::io::faulty::{Fault, Plan};
use crate::io::sim::{Image, Random, SimDisk};
use crate::io::{Disk, OpKind};
use crate::{Erase, PutObject, Sabotage, Store, StoreSettings, TtlClass};

const OBJECTS: u64 = 24;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Putting,
    Fetching,
    Recovering,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failing {
    Op(OpKind, Fault),
    Create(i32),
}

/// One run of the scenario.
#[derive(Clone, Copy, Debug)]
struct Case {
    phase: Phase,
    failing: Failing,
    number: u64,
    sticky: bool,
    /// With 0 all planes, however short, are compressed.
    compressed_from_bytes: usize,
    sabotage: Sabotage,
}

#[test]
fn whichever_op_fails_nothing_acknowledged_is_lost_and_nothing_wrong_is_served() {
    let failing = [
        Failing::Op(OpKind::Read, Fault::Errno(libc::EIO)),
        Failing::Op(OpKind::Read, Fault::Short(512)),
        Failing::Op(OpKind::Read, Fault::FlipBit(40_001)),
        Failing::Op(OpKind::Write, Fault::Errno(libc::EIO)),
        Failing::Op(OpKind::Write, Fault::Errno(libc::ENOSPC)),
        Failing::Op(OpKind::Write, Fault::Short(512)),
        Failing::Op(OpKind::Sync, Fault::Errno(libc::EIO)),
        Failing::Create(libc::EIO),
        Failing::Create(libc::ENOSPC),
    ];
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let watchdog = Watchdog::start(PATIENCE);
    let (mut runs, mut met_in) = (0, [0; 3]);
    for failing in failing {
        for phase in [Phase::Putting, Phase::Fetching, Phase::Recovering] {
            for sticky in [false, true] {
                for number in 0.. {
                    let met =
                        [0, StoreSettings::default().compressed_from_bytes].map(|compressed_from_bytes| {
                            let sabotage = Sabotage::default();
                            let case =
                                Case { phase, failing, number, sticky, compressed_from_bytes, sabotage };
                            case.run(dir.path()).unwrap_or_else(|failure| panic!("{case:?}: {failure}"))
                        });
                    let met = met.contains(&true);
                    watchdog.progress();
                    runs += 2;
                    if !met {
                        break;
                    }
                    met_in[phase as usize] += 1;
                    assert!(number < 500, "no end: {phase:?} {failing:?}");
                }
            }
        }
    }
    figures::report(
        "nth_op",
        &[("runs", runs), ("putting", met_in[0]), ("fetching", met_in[1]), ("recovering", met_in[2])],
    );
    assert!(met_in.iter().all(|&met| met > 0), "{met_in:?}");
}

/// The control: without flushes the same scenario must lose something.
#[test]
fn without_the_flush_the_scenario_loses_acknowledged_blocks() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let case = |number| Case {
        phase: Phase::Putting,
        failing: Failing::Op(OpKind::Write, Fault::Errno(libc::EIO)),
        number,
        sticky: false,
        compressed_from_bytes: 0,
        sabotage: Sabotage { skip_flush: true, ..Sabotage::default() },
    };
    // The power cut of some of them spares everything.
    let failures: Vec<String> = (0..20).filter_map(|number| case(number).run(dir.path()).err()).collect();
    assert!(failures.iter().any(|failure| failure.contains("lost")), "the scenario is blind: {failures:?}");
}

/// A power cut may take the segment behind a sealed one that has room left. If the next opening cannot read that seal,
/// it must not append behind what the seal says.
#[test]
fn nothing_is_appended_to_a_segment_whose_seal_could_not_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::open(Image::default(), u64::MAX);
    let open = || {
        memory::expect(&Contents::new());
        let settings = StoreSettings { segment_bytes: 64 << 10, ..super::common::settings() };
        Store::open_on(dir.path(), settings, disk.clone()).unwrap()
    };
    let put = |store: &Store, number, len| {
        assert!(store.put(vec![object(number, number, &[len])])[0].is_ok());
    };
    let store = open();
    put(&store, 0, 900);
    // Does not fit behind it.
    put(&store, 1, 55_000);
    drop(store);
    disk.remove("00000002.seg").unwrap();
    // The header is read first, then the seal.
    disk.arm(&[Plan { kind: OpKind::Read, first: 1, count: 1, fault: Fault::Errno(libc::EIO) }]);
    put(&open(), 2, 900);
    disk.arm(&[]);
    assert_eq!(open().get(&[id(0), id(2)]).iter().flatten().count(), 2);
}

/// Sealing fails, and what it wrote reaches the device all the same when the power fails, long after: what was appended
/// meanwhile must not lie behind what the seal says.
#[test]
fn a_seal_that_could_not_be_written_cuts_nothing_off_later() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::open(Image::default(), u64::MAX);
    let open = |disk: &Arc<SimDisk>| {
        memory::expect(&Contents::new());
        let settings = StoreSettings { segment_bytes: 64 << 10, ..super::common::settings() };
        Store::open_on(dir.path(), settings, disk.clone()).unwrap()
    };
    let put = |store: &Store, number, len| {
        assert!(store.put(vec![object(number, number, &[len])])[0].is_ok());
    };
    let store = open(&disk);
    put(&store, 0, 900);
    // Does not fit behind it. Its two headers are written, then itself, and then the seal of the first one.
    disk.arm(&[Plan { kind: OpKind::Write, first: 3, count: 1, fault: Fault::Errno(libc::EIO) }]);
    put(&store, 1, 55_000);
    drop(store);
    disk.arm(&[]);
    disk.remove("00000002.seg").unwrap();
    let store = open(&disk);
    put(&store, 2, 900);
    let found = store.get(&[id(2)]).remove(0).unwrap();
    assert_eq!(found.located.spot.segment.0, 1, "the seal was written");
    drop(store);
    let history = disk.history();
    let mut replay = history.replay();
    replay.advance_to(history.len());
    for seed in 0..64 {
        let disk = SimDisk::open(replay.crash(&mut Random::new(seed)), u64::MAX);
        assert_eq!(open(&disk).get(&[id(0), id(2)]).iter().flatten().count(), 2, "seed {seed}");
    }
}

/// No flush succeeds while a store is opened that has lost its index: nothing that was found is served, but what was erased stays
/// so, and what is put then is later than all of it.
#[test]
fn what_could_not_be_flushed_at_an_opening_undoes_nothing_that_is_put_then() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::open(Image::default(), u64::MAX);
    let open = |index: &Contents| {
        memory::expect(index);
        Store::open_on(dir.path(), super::common::settings(), disk.clone()).unwrap()
    };
    let put = object(1, 1, &[900]).with_class(TtlClass::PERMANENT);
    let store = open(&Contents::new());
    assert!(store.put(vec![put.clone()])[0].is_ok());
    assert_eq!(store.erase(Erase::Object(put.id)).unwrap(), 1);
    drop(store);
    disk.arm(&[Plan { kind: OpKind::Sync, first: 0, count: u64::MAX, fault: Fault::Errno(libc::EIO) }]);
    let store = open(&Contents::new());
    disk.arm(&[]);
    assert_eq!(store.get(&[put.id]), [None]);
    assert!(store.put(vec![put.clone()])[0].is_ok());
    let index = store.shared.index.contents();
    drop(store);
    for index in [index, Contents::new()] {
        serve(&open(&index), std::slice::from_ref(&put), 0).unwrap();
    }
}

impl Case {
    /// `false` if there was no such op.
    fn run(&self, dir: &Path) -> Result<bool, String> {
        let settings = StoreSettings {
            segment_bytes: 64 << 10,
            pool_bytes: 256 << 10,
            compressed_from_bytes: self.compressed_from_bytes,
            lock_wait: Duration::from_secs(10),
            sabotage: self.sabotage,
            ..StoreSettings::default()
        };
        let disk = SimDisk::open(Image::default(), u64::MAX);
        let open = |disk: &Arc<SimDisk>, index: &Contents| {
            memory::expect(index);
            let store = Store::open_on(dir, settings.clone(), disk.clone());
            store.map_err(|error| format!("does not open: {error}"))
        };
        let mut acked: Vec<PutObject> = Vec::new();
        let mut put = |store: &Store, objects: Vec<PutObject>| {
            // For a file system that is full a store evicts what may go.
            let full = self.failing == Failing::Create(libc::ENOSPC);
            let kept = |put: PutObject| if full { put.with_class(TtlClass::PERMANENT) } else { put };
            let objects: Vec<PutObject> = objects.into_iter().map(kept).collect();
            let outcomes = store.put(objects.clone());
            acked.extend(
                objects.into_iter().zip(outcomes).filter(|(_, outcome)| outcome.is_ok()).map(|(put, _)| put),
            );
        };

        let store = open(&disk, &Contents::new())?;
        put(&store, chain(0, 6, &[900, 5000]));
        self.arm(&disk, Phase::Putting);
        for number in 6..OBJECTS {
            put(&store, vec![object(number, number, &[700, (number as usize * 977) % 9000])]);
        }
        // Parents that were refused, and a repeat of all.
        put(&store, (0..OBJECTS).map(|number| object(number, number, &[1])).collect());
        let mut met = self.disarm(&disk, Phase::Putting);
        let reads_failed = matches!(self.failing, Failing::Op(OpKind::Read, _));
        serve(&store, &acked, if reads_failed { acked.len() } else { 0 })?;

        self.arm(&disk, Phase::Fetching);
        serve(&store, &acked, if self.phase == Phase::Fetching { acked.len() } else { usize::MAX })?;
        met |= self.disarm(&disk, Phase::Fetching);
        let index = store.shared.index.contents();
        drop(store);

        let (stopped_at, acked_before) = (disk.position(), acked.len());

        self.arm(&disk, Phase::Recovering);
        // Which segments failed to be flushed only the index knows: it may go when the power has, not before.
        let gone = Contents::new();
        let recovering = open(&disk, if self.phase == Phase::Recovering { &gone } else { &index })?;
        serve(&recovering, &acked, acked.len())?;
        met |= self.disarm(&disk, Phase::Recovering);
        // Whatever recovery made of the faults, what is put now is as durable as ever.
        for number in OBJECTS..OBJECTS + 4 {
            let put = object(number, number, &[900]).with_class(TtlClass::PERMANENT);
            if recovering.put(vec![put.clone()])[0].is_ok() {
                acked.push(put);
            }
        }
        let index_after = recovering.shared.index.contents();
        drop(recovering);

        let history = disk.history();
        let mut replay = history.replay();
        let mut random = Random::new(self.number);
        let cuts = [(stopped_at, &acked[..acked_before], index), (history.len(), &acked[..], index_after)];
        for (position, acked, index) in cuts {
            replay.advance_to(position);
            let cut = SimDisk::open(replay.crash(&mut random), u64::MAX);
            let rebuilt = open(&cut, &Contents::new())?;
            let lost = serve(&rebuilt, acked, 0);
            lost.map_err(|failure| format!("power cut at {position}, index gone: {failure}"))?;
            drop(rebuilt);
            // What could not be read is in quarantine until the index is built anew.
            if !reads_failed {
                let kept = open(&cut, &index)?;
                let lost = serve(&kept, acked, 0);
                lost.map_err(|failure| format!("power cut at {position}: {failure}"))?;
            }
        }
        Ok(met)
    }

    fn arm(&self, disk: &SimDisk, phase: Phase) {
        if phase != self.phase {
            return;
        }
        let count = if self.sticky { u64::MAX } else { 1 };
        match self.failing {
            Failing::Op(kind, fault) => disk.arm(&[Plan { kind, first: self.number, count, fault }]),
            Failing::Create(errno) => {
                disk.arm(&[]);
                disk.fail_creates(self.number..self.number.saturating_add(count), errno);
            }
        }
    }

    /// Ends the faults of a phase. Whether there was one.
    fn disarm(&self, disk: &SimDisk, phase: Phase) -> bool {
        let met = phase == self.phase
            && match self.failing {
                Failing::Op(kind, _) => disk.seen(kind) > self.number,
                Failing::Create(_) => disk.creates() > self.number,
            };
        disk.arm(&[]);
        disk.fail_creates(0..0, 0);
        met
    }
}

/// Every acknowledged object is served, but for `may_miss`, and none with other bytes.
fn serve(store: &Store, acked: &[PutObject], may_miss: usize) -> Result<(), String> {
    let ids: Vec<_> = acked.iter().map(|put| put.id).collect();
    let expected: Vec<(_, Vec<Bytes>)> = acked.iter().map(|put| (put.id, planes(put))).collect();
    let found = store.get(&ids);
    let mut missed = found.iter().filter(|found| found.is_none()).count();
    let there =
        expected.iter().zip(&found).filter(|(_, found)| found.is_some()).map(|(expected, _)| expected);
    let got = fetch(store, all(found.iter().flatten().cloned().collect()));
    for ((id, expected), got) in there.zip(got) {
        match got {
            Ok(bytes) if bytes == *expected => {}
            Ok(_) => return Err(format!("wrong bytes for {id:?}")),
            Err(_) => missed += 1,
        }
    }
    assert_eq!(store.get(&[id(u64::MAX)]), [None]);
    if missed > may_miss { Err(format!("lost {missed} of {}", acked.len())) } else { Ok(()) }
}
