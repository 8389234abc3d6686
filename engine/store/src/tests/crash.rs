//! Power cuts in process: the real store on a simulated disk, cut after every op of a random script, several states of
//! the medium each, with an index that is gone, older than the segments, or current. In a third of the scripts time jumps, by
//! a second or by ten years; in half of them things are erased, and erasures lapse; in a third the store is full and evicts, before
//! the cut and sometimes after it; and some of the disks that are left have no room for anything more. Where things go, only the ends of what was put together are leased, and hold their paths.
//!
//! `ESKER_CRASH_STATES` says how many states, `ESKER_CRASH_SEED` repeats one script. A seed fixes the script, the
//! faults and the states; which thread of the store comes first is the machine's, so a seed is repeated several times.
//!
//! RocksDB runs on its in-memory file system here (see `index/memory.rs`) and takes most of an opening all the same.

mod kept;
mod oracle;
mod script;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::common::figures::{self, Watchdog};
use super::common::{ManualClock, object};
use crate::index::memory::{self, Contents};
use crate::io::sim::{Image, Random, SimDisk};
use crate::{Sabotage, Store, StoreSettings};
use oracle::Oracle;
use script::{Recording, scratch};

const STATES: u64 = 50_000;
/// States of one script.
const STATES_OF_SCRIPT: u64 = 600;
/// Scripts that have failed once: a segment had the number of one that was gone, and an older index took it for that one; a
/// lease of what was erased and put again let go of itself. The third one fails by other ways, too: a seal that could not be
/// written showed up after a power cut, and cut off what was appended since; an erasure that could not be acknowledged was passed
/// over with the index and found without. The last one: a record that was half given back stood in the way of an older one that
/// had answered for it; a header that a failed flush had lost was not written again with what was found behind it.
const REGRESSIONS: &[u64] = &[829_415_642_273, 730_965_004_932_426, 900_247_531_705_698, 772_862_303_991_335];
/// Those from before scripts erased and time passed in them, which they are run without: a torn record was covered by a seal;
/// a flush after a failed one was believed.
const PLAIN_REGRESSIONS: &[u64] = &[72_349_272_834_064, 72_349_272_834_070, 43_181_037_390_186];
const PATIENCE: Duration = Duration::from_secs(120);
/// Numbers of objects that press.
const PRESSING: u64 = 700_000;

/// What became of the states.
#[derive(Default)]
struct Tally {
    scripts: AtomicU64,
    states: AtomicU64,
    /// Crashed again while recovering or shortly after.
    twice: AtomicU64,
    /// Blocks that had to be there, in all states together.
    expected: AtomicU64,
    damaged: AtomicU64,
    /// Erasures that lapsed in scripts.
    lapsed: AtomicU64,
    failures: Mutex<Vec<String>>,
}

/// How a state is made and looked at.
#[derive(Clone, Copy, Default)]
struct Mode {
    /// While the script is recorded.
    recording: Sabotage,
    /// When a state is opened.
    opening: Sabotage,
    /// One sector of the medium is damaged after the cut.
    damage: bool,
    /// The disk loses, misdirects or alters one write of the script.
    lying: bool,
}

#[test]
fn no_power_cut_loses_an_acknowledged_block() {
    let (tally, elapsed) =
        run(figures::number("ESKER_CRASH_STATES", STATES), Mode::default(), "ESKER_CRASH_SEED");
    let [scripts, states, twice, expected, lapsed] =
        [&tally.scripts, &tally.states, &tally.twice, &tally.expected, &tally.lapsed]
            .map(|count| count.load(Ordering::Relaxed));
    let failures = tally.failures.into_inner().unwrap();
    figures::report(
        "crash_states",
        &[
            ("states", states),
            ("scripts", scripts),
            ("crashed_twice", twice),
            ("blocks_expected", expected),
            ("erasures_lapsed", lapsed),
            ("violations", failures.len() as u64),
            ("states_per_second", states * 1000 / elapsed.as_millis().max(1) as u64),
            ("seconds", elapsed.as_secs()),
        ],
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(expected > states, "too little was acknowledged to prove anything");
}

/// The control: without the flush the oracle must object.
#[test]
fn without_the_flush_a_power_cut_loses_acknowledged_blocks() {
    let recording = Sabotage { skip_flush: true, ..Sabotage::default() };
    let (tally, _) = run(300, Mode { recording, ..Mode::default() }, "");
    let failures = tally.failures.into_inner().unwrap();
    figures::report("crash_control", &[("states", 300), ("violations_found", failures.len() as u64)]);
    assert!(failures.iter().any(|failure| failure.contains("lost")), "the oracle is blind: {failures:?}");
}

#[test]
fn one_damaged_sector_costs_one_object_and_never_gives_wrong_bytes() {
    let states = figures::number("ESKER_CRASH_STATES", STATES) / 10;
    let (tally, elapsed) = run(states, Mode { damage: true, ..Mode::default() }, "ESKER_DAMAGE_SEED");
    let failures = tally.failures.into_inner().unwrap();
    figures::report(
        "damaged_states",
        &[
            ("states", tally.states.into_inner()),
            ("damaged", tally.damaged.into_inner()),
            ("violations", failures.len() as u64),
            ("seconds", elapsed.as_secs()),
        ],
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_disk_that_lies_once_costs_what_it_lied_about_and_never_gives_wrong_bytes() {
    let states = figures::number("ESKER_CRASH_STATES", STATES) / 10;
    let (tally, elapsed) = run(states, Mode { lying: true, ..Mode::default() }, "ESKER_LIE_SEED");
    let failures = tally.failures.into_inner().unwrap();
    figures::report(
        "lied_to_states",
        &[
            ("states", tally.states.into_inner()),
            ("scripts", tally.scripts.into_inner()),
            ("violations", failures.len() as u64),
            ("seconds", elapsed.as_secs()),
        ],
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The control: an erasure that is not written down does not outlive a power cut.
#[test]
fn without_tombstones_a_power_cut_brings_back_what_was_erased() {
    let recording = Sabotage { skip_tombstone: true, ..Sabotage::default() };
    let (tally, _) = run(4000, Mode { recording, ..Mode::default() }, "");
    let failures = tally.failures.into_inner().unwrap();
    figures::report("erasure_control", &[("states", 4000), ("violations_found", failures.len() as u64)]);
    assert!(failures.iter().any(|failure| failure.contains("is back")), "the oracle is blind: {failures:?}");
}

/// The control: erasures that do not wait until nothing older can come back let a power cut bring it back.
#[test]
fn erasures_that_lapse_too_early_let_a_power_cut_bring_back_what_was_erased() {
    let recording = Sabotage { lapse_early: true, ..Sabotage::default() };
    let (tally, _) = run(10_000, Mode { recording, ..Mode::default() }, "");
    let failures = tally.failures.into_inner().unwrap();
    figures::report("lapse_control", &[("states", 10_000), ("violations_found", failures.len() as u64)]);
    assert!(failures.iter().any(|failure| failure.contains("is back")), "the oracle is blind: {failures:?}");
}

/// The control: of leases that hold nothing what they should have held is lost.
#[test]
fn leases_that_hold_nothing_lose_what_was_leased() {
    let hollow = Sabotage { skip_pins: true, ..Sabotage::default() };
    let mode = Mode { recording: hollow, opening: hollow, ..Mode::default() };
    let (tally, _) = run(10_000, mode, "");
    let failures = tally.failures.into_inner().unwrap();
    figures::report("lease_control", &[("states", 10_000), ("violations_found", failures.len() as u64)]);
    assert!(failures.iter().any(|failure| failure.contains("lost")), "the oracle is blind: {failures:?}");
}

/// The control: where children that are read before their parent stay without it, a lease of the end loses the rest.
#[test]
fn paths_that_are_cut_at_an_opening_lose_what_was_leased() {
    let cut = Sabotage { skip_adoption: true, ..Sabotage::default() };
    let (tally, _) = run(10_000, Mode { opening: cut, ..Mode::default() }, "");
    let failures = tally.failures.into_inner().unwrap();
    figures::report("path_control", &[("states", 10_000), ("violations_found", failures.len() as u64)]);
    assert!(failures.iter().any(|failure| failure.contains("lost")), "the oracle is blind: {failures:?}");
}

/// The control: without verification damaged bytes are served, and the oracle sees it.
#[test]
fn without_verification_damaged_sectors_are_served() {
    let opening = Sabotage { skip_verification: true, ..Sabotage::default() };
    let (tally, _) = run(1000, Mode { opening, damage: true, ..Mode::default() }, "");
    let failures = tally.failures.into_inner().unwrap();
    figures::report("damage_control", &[("states", 1000), ("violations_found", failures.len() as u64)]);
    assert!(failures.iter().any(|failure| failure.contains("wrong")), "the oracle is blind: {failures:?}");
}

/// Runs scripts on all cores until there are enough states.
fn run(states: u64, mode: Mode, seed_variable: &str) -> (Tally, Duration) {
    let start = Instant::now();
    let tally = Tally::default();
    let watchdog = Watchdog::start(PATIENCE);
    let repeated = std::env::var(seed_variable).ok().map(|seed| seed.parse::<u64>().unwrap());
    let first = if repeated.is_some() { 0 } else { figures::seed() };
    let next = AtomicU64::new(0);
    let work = || {
        let dir = scratch();
        while tally.states.load(Ordering::Relaxed) < states {
            let number = next.fetch_add(1, Ordering::Relaxed);
            // In the older scripts nothing lapses.
            let kept = PLAIN_REGRESSIONS.iter().chain(REGRESSIONS).filter(|_| !mode.recording.lapse_early);
            let kept = kept.copied().nth(number as usize);
            let seed = repeated.or(kept).unwrap_or_else(|| first.wrapping_add(number));
            let failed = script_states(dir.path(), seed, mode, &tally, &watchdog);
            if let Err(failure) = failed {
                let mut failures = tally.failures.lock().unwrap();
                failures.push(format!("{seed_variable}={seed}: {failure}"));
                // Enough to work with.
                if failures.len() >= 10 {
                    return;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        (0..workers).for_each(|_| drop(scope.spawn(work)));
    });
    (tally, start.elapsed())
}

/// Records a script and opens states of it, from its first op to its last.
fn script_states(
    dir: &std::path::Path,
    seed: u64,
    mode: Mode,
    tally: &Tally,
    watchdog: &Watchdog,
) -> Result<(), String> {
    let recording = Recording::make(dir, seed, mode.recording, mode.lying, !mode.lying && !mode.damage)?;
    tally.scripts.fetch_add(1, Ordering::Relaxed);
    tally.lapsed.fetch_add(recording.lapsed, Ordering::Relaxed);
    watchdog.progress();
    let (mut random, mut pressing) = (Random::new(seed ^ 0xc4a5), Random::new(seed ^ 0x93e5));
    let mut filling = Random::new(seed ^ 0xf011);
    let mut replay = recording.history.replay();
    let each = (STATES_OF_SCRIPT / (recording.history.len() as u64 + 1)).max(1);
    for position in 0..=recording.history.len() {
        replay.advance_to(position);
        for _ in 0..each {
            let mut image = replay.crash(&mut random);
            let damage = if mode.damage { image.damage(&mut random) } else { None };
            let (index, what) = recording.index_at(position, &mut random);
            // Often at once, sometimes when much has expired.
            let later_s = match recording.clocked {
                true => random.one_of(&[0, 0, 10, 2000, 5000, 100_000_000]),
                false => 0,
            };
            let oracle = recording.oracle_at(position, later_s);
            let clock = recording.clock_at(position).map(str::to_owned);
            let may_lose = recording.may_lose + usize::from(damage.is_some());
            let bounded = recording.settings.capacity_bytes < u64::MAX;
            let pressed = may_lose == 0 && bounded && pressing.once_in(4);
            let full = filling.once_in(8);
            let room_bytes = full.then(|| filling.one_of(&[0, 0, 4 << 10, 100 << 10]));
            // Only what is admitted presses.
            let settings =
                StoreSettings { sabotage: mode.opening, admission: !pressed, ..recording.settings.clone() };
            let state =
                State { dir, settings, image, index, oracle, may_lose, clock, later_s, pressed, room_bytes };
            tally.states.fetch_add(1, Ordering::Relaxed);
            tally.damaged.fetch_add(u64::from(damage.is_some()), Ordering::Relaxed);
            state.examine(&mut random, tally).map_err(|failed| {
                let (failure, state) = *failed;
                // What a control breaks on purpose is no failure.
                let kept = match mode.recording == Sabotage::default() && mode.opening == Sabotage::default()
                {
                    true => kept::keep(&state, &format!("{seed}-{position}"), &failure),
                    false => String::new(),
                };
                format!("after op {position}, {what}, {damage:?}, later {later_s} s: {failure}; {kept}")
            })?;
            watchdog.progress();
        }
    }
    Ok(())
}

/// A medium after a power cut, an index to go with it, and what must be found.
struct State<'a> {
    dir: &'a std::path::Path,
    settings: StoreSettings,
    image: Image,
    index: Contents,
    oracle: Oracle<'a>,
    /// Objects that may be missing.
    may_lose: usize,
    /// What is in `dir/clock`, if it is there.
    clock: Option<String>,
    /// Seconds between the opening and the look at it.
    later_s: u64,
    /// Whether more is put after the opening than there is room for.
    pressed: bool,
    /// What has room on the disk; `None` for anything.
    room_bytes: Option<u64>,
}

impl State<'_> {
    fn examine(mut self, random: &mut Random, tally: &Tally) -> Result<(), Box<(String, Self)>> {
        match self.look(random, tally) {
            Ok(()) => Ok(()),
            Err(failure) => Err(Box::new((failure, self))),
        }
    }

    fn look(&mut self, random: &mut Random, tally: &Tally) -> Result<(), String> {
        let (store, disk, clock) = self.open()?;
        tally.expected.fetch_add(self.oracle.expected() as u64, Ordering::Relaxed);
        if self.later_s > 0 {
            clock.pass(Duration::from_secs(self.later_s));
        }
        if self.later_s > 0 || random.once_in(3) {
            (0..1 + random.below(3)).for_each(|_| store.keep_house());
        }
        if self.pressed {
            press(&store);
        }
        let twice = self.may_lose == 0 && random.once_in(5) && self.room_bytes.is_none();
        // Not always looked at before: a look puts damage out of the way, and then it answers for nothing that is put.
        if !(twice && random.once_in(2)) {
            self.oracle.check(&store, self.may_lose, random)?;
        }
        if !twice {
            return Ok(());
        }
        // Life goes on, and the power fails again: in recovery, or behind it.
        // The position after the content: an index from which erasures have lapsed is never older than what they waited for.
        let before = store.shared.index.contents();
        let noted_at = disk.position();
        let acked = self.oracle.put_more(&store, &disk, random)?;
        let after = store.shared.index.contents();
        let history = disk.history();
        drop(store);
        let mut replay = history.replay();
        let position = random.index(history.len() + 1);
        replay.advance_to(position);
        self.image = replay.crash(random);
        self.index = match random.below(4) {
            0 => Contents::new(),
            1 if position >= noted_at => before,
            2 if position >= history.len() => after,
            _ => std::mem::take(&mut self.index),
        };
        acked.into_iter().filter(|(at, ..)| *at <= position).for_each(|(_, put)| self.oracle.add(put));
        tally.states.fetch_add(1, Ordering::Relaxed);
        tally.twice.fetch_add(1, Ordering::Relaxed);
        self.later_s = 0;
        let (store, _disk, _clock) = self.open()?;
        let again = self.oracle.check(&store, 0, random);
        again.map_err(|failure| format!("and again after op {position} of {}: {failure}", history.len()))
    }

    fn open(&self) -> Result<(Store, Arc<SimDisk>, Arc<ManualClock>), String> {
        memory::expect(&self.index);
        let file = self.dir.join("clock");
        match &self.clock {
            Some(text) => std::fs::write(&file, text).unwrap(),
            None => drop(std::fs::remove_file(&file)),
        }
        let room_bytes = self.room_bytes.map(|room_bytes| self.image.len_bytes() + room_bytes);
        let disk = SimDisk::open(self.image.clone(), room_bytes.unwrap_or(u64::MAX));
        // The machine was off.
        let clock = ManualClock::after_power_cut();
        let store = Store::open_on_at(self.dir, self.settings.clone(), disk.clone(), clock.clone());
        Ok((store.map_err(|error| format!("does not open: {error}"))?, disk, clock))
    }
}

/// Puts so much that everything goes that may go.
fn press(store: &Store) {
    const BYTES: usize = 16_000;
    let capacity = usize::try_from(store.stats().capacity_bytes).unwrap();
    for number in 0..capacity as u64 / BYTES as u64 * 5 / 4 {
        let _ = store.put(vec![object(PRESSING + number, number, &[BYTES])]);
    }
}
