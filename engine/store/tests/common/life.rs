//! What a process does that is killed, or whose power is cut: it puts, leases and erases, and says what it does. And what must
//! hold afterwards of what it said.
//!
//! Every four numbers are a chain, of two classes by turns, so that parents often lie behind their children. Of a chain only the
//! end is leased, and all of it must be there.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::time::Duration;

use esker_prefix::ObjectId;
use esker_store::{Erase, LeaseId, PutObject, Result, Store, TtlClass};

use super::{all, fetch, id, object, planes};

/// Numbers of objects that one life may use, and how many of them each writer has.
pub const NUMBERS: u64 = 1_000_000;
const LEASE: Duration = Duration::from_secs(24 * 3600);
/// Numbers of one chain.
const CHAIN: u64 = 4;
/// Those of a chain by turns; neither is over before a test is.
const CLASSES: [TtlClass; 2] = [TtlClass(3), TtlClass(1)];

/// One writer's part of a life, until something fails or the process ends.
pub struct Writer<'a> {
    pub store: &'a Store,
    pub lens: &'a [usize],
    /// The first number of this life.
    pub first: u64,
    /// Which of how many.
    pub writer: u64,
    pub writers: u64,
    /// The control: says that things are done before they are.
    pub lies: bool,
}

impl Writer<'_> {
    pub fn live(&self) -> Result<()> {
        let mut number = (self.first + self.writer * NUMBERS / self.writers).next_multiple_of(CHAIN);
        for turn in 0.. {
            let count = 1 + (turn + self.writer) % CHAIN;
            let batch: Vec<u64> = (number..number + count).collect();
            self.tell("acked", &batch, || {
                let objects = batch.iter().map(|&number| link(number, self.lens)).collect();
                self.store.put(objects).into_iter().try_for_each(|outcome| outcome.map(drop))
            })?;
            let (first, last) = (batch[0], batch[batch.len() - 1]);
            match turn % 3 {
                // Always the same lease, which moves on.
                1 => {
                    say("leasing", &[last]);
                    self.tell("leased", &[last], || {
                        self.store.lease(lease(self.writer), &[id(last)], LEASE).map(drop)
                    })?;
                }
                2 => {
                    say("erasing", &[first]);
                    self.tell("erased", &[first], || self.store.erase(Erase::Object(id(first))).map(drop))?;
                }
                _ => {}
            }
            number += CHAIN;
        }
        Ok(())
    }

    fn tell(&self, what: &str, numbers: &[u64], done: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.lies {
            say(what, numbers);
            return done();
        }
        done()?;
        say(what, numbers);
        Ok(())
    }
}

/// In one write, so that an end in between cuts no word short.
fn say(what: &str, numbers: &[u64]) {
    let words: String = numbers.iter().map(|number| format!("<{what} {number}>\n")).collect();
    let mut out = std::io::stdout().lock();
    out.write_all(words.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// A link of its chain.
fn link(number: u64, lens: &[usize]) -> PutObject {
    let depth = number % CHAIN;
    PutObject {
        parent: (depth > 0).then(|| id(number - 1)),
        tokens: 128 * (depth + 1),
        class: CLASSES[(depth % 2) as usize],
        ..object(number, number, lens)
    }
}

/// The chain up to a number.
fn path(end: u64) -> Vec<u64> {
    (end / CHAIN * CHAIN..=end).collect()
}

fn lease(writer: u64) -> LeaseId {
    LeaseId([1 + writer as u8; 32])
}

/// What all lives of one folder have said.
#[derive(Default)]
pub struct Journal {
    /// Acknowledged, in this order.
    pub acked: Vec<u64>,
    /// Its erasure was begun, and may have come to its end.
    erasing: BTreeSet<u64>,
    pub erased: BTreeSet<u64>,
    /// By writer: what it has leased, and what it was about to lease instead, in this life and in those that were cut short since.
    leases: BTreeMap<u64, (Option<u64>, Vec<u64>)>,
    pub leased: u64,
}

/// What does not hold.
#[derive(Debug, Default)]
pub struct Verdict {
    pub checked: u64,
    pub lost: BTreeSet<u64>,
    pub wrong: BTreeSet<u64>,
    /// Erased and there again.
    pub back: BTreeSet<u64>,
    /// Leases that are gone, and objects that they held.
    pub unleased: BTreeSet<u64>,
}

impl Verdict {
    pub fn add(&mut self, other: Self) {
        self.checked += other.checked;
        self.lost.extend(other.lost);
        self.wrong.extend(other.wrong);
        self.back.extend(other.back);
        self.unleased.extend(other.unleased);
    }

    pub fn holds(&self) -> bool {
        self.figures().iter().all(|(_, count)| *count == 0)
    }

    /// For a report.
    pub fn figures(&self) -> [(&'static str, u64); 4] {
        [("lost", &self.lost), ("wrong", &self.wrong), ("back", &self.back), ("unleased", &self.unleased)]
            .map(|(what, numbers)| (what, numbers.len() as u64))
    }
}

impl Journal {
    /// Notes what a life of so many writers said.
    pub fn hear(&mut self, text: &str, writers: u64) {
        for word in text.split('<').skip(1) {
            let Some((what, number)) = word.split_once('>').and_then(|(word, _)| word.split_once(' ')) else {
                continue;
            };
            let number: u64 = number.parse().unwrap();
            let lease = self.leases.entry(number % NUMBERS * writers / NUMBERS);
            match what {
                "acked" => self.acked.push(number),
                "erasing" => drop(self.erasing.insert(number)),
                "erased" => drop(self.erased.insert(number)),
                "leasing" => lease.or_default().1.push(number),
                "leased" => {
                    *lease.or_default() = (Some(number), Vec::new());
                    self.leased += 1;
                }
                _ => {}
            }
        }
    }

    /// Looks whether a store has some of what was acknowledged, all that was leased and nothing that was erased.
    pub fn audit(&self, store: &Store, acked: impl IntoIterator<Item = u64>, lens: &[usize]) -> Verdict {
        let mut verdict = Verdict::default();
        let expected: Vec<u64> = acked.into_iter().filter(|number| !self.erasing.contains(number)).collect();
        verdict.checked = expected.len() as u64;
        look(store, &expected, lens, &mut verdict);
        let erased: Vec<ObjectId> = self.erased.iter().map(|&number| id(number)).collect();
        let found = self.erased.iter().zip(store.get(&erased));
        verdict.back.extend(found.filter(|(_, found)| found.is_some()).map(|(&number, _)| number));
        let leases = store.leases();
        for (&writer, (leased, leasing)) in &self.leases {
            let Some(leased) = leased else { continue };
            let held = leases.iter().find(|held| held.id == lease(writer)).map(|held| &held.ends[..]);
            let end = leasing.iter().chain([leased]).find(|&&end| held == Some(&[id(end)]));
            let Some(&end) = end else {
                verdict.unleased.insert(*leased);
                continue;
            };
            let (mut kept, path) = (Verdict::default(), path(end));
            look(store, &path, lens, &mut kept);
            verdict.unleased.extend(kept.lost);
            verdict.wrong.extend(kept.wrong);
            // Found from its beginning on, and held as one path.
            let ids: Vec<ObjectId> = path.iter().map(|&number| id(number)).collect();
            let found = store.lookup(&ids);
            let bytes: u64 = found.iter().map(|found| found.stored_bytes).sum();
            if found.len() < path.len() || store.path_bytes(&[id(end)]) != bytes {
                verdict.unleased.insert(end);
            }
        }
        verdict
    }

    /// What is missing for good counts once.
    pub fn forget(&mut self, verdict: &Verdict) {
        self.acked.retain(|number| !verdict.lost.contains(number) && !verdict.wrong.contains(number));
        self.erased.retain(|number| !verdict.back.contains(number));
        self.leases.retain(|_, (leased, _)| leased.is_none_or(|leased| !verdict.unleased.contains(&leased)));
    }
}

/// Which of these objects are missing, and which have other bytes.
fn look(store: &Store, numbers: &[u64], lens: &[usize], verdict: &mut Verdict) {
    for some in numbers.chunks(200) {
        let found = store.get(&some.iter().map(|&number| id(number)).collect::<Vec<_>>());
        let (there, missing): (Vec<_>, Vec<_>) =
            some.iter().copied().zip(found).partition(|(_, found)| found.is_some());
        verdict.lost.extend(missing.into_iter().map(|(number, _)| number));
        let (there, found): (Vec<u64>, Vec<_>) = there.into_iter().unzip();
        for (got, number) in fetch(store, all(found.into_iter().flatten().collect())).into_iter().zip(there) {
            match got {
                Ok(bytes) if bytes == planes(&object(number, number, lens)) => {}
                Ok(_) => drop(verdict.wrong.insert(number)),
                Err(_) => drop(verdict.lost.insert(number)),
            }
        }
    }
}
