//! What must hold of a store after a crash. It knows what was put, acknowledged and erased, and asks no store.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use esker_prefix::ObjectId;

use super::script::{keep, number_of};
use crate::io::sim::{Random, SimDisk};
use crate::tests::common::{all, fetch, object, planes};
use crate::{ErrorKind, PutObject, PutOutcome, Store};

/// Objects of which every state is looked at byte for byte; of older ones a sample is.
const NEWEST: usize = 12;
const SAMPLE: usize = 8;
/// Numbers of objects that are put after the crash.
const AFTERWARDS: u64 = 500_000;

/// See the module.
pub(super) struct Oracle<'a> {
    pub(super) attempts: &'a [PutObject],
    /// Positions of those that an acknowledged erasure covers.
    pub(super) erased: HashSet<usize>,
    /// Must be there, with these very bytes. Grows at its end, oldest first by number.
    pub(super) must: BTreeMap<u64, (ObjectId, Vec<Bytes>)>,
    /// What leases hold, each from its end on.
    paths: Vec<Vec<ObjectId>>,
    /// Whether only what is leased must be there: the store evicts, or time passes.
    lapses: bool,
}

impl<'a> Oracle<'a> {
    /// Of `attempts`, those that were acknowledged and those that were erased; and paths that are held by their ends.
    pub(super) fn new(
        attempts: &'a [PutObject],
        acked: impl Iterator<Item = usize>,
        erased: HashSet<usize>,
        paths: Vec<Vec<ObjectId>>,
        lapses: bool,
    ) -> Self {
        let mut oracle = Self { attempts, erased, must: BTreeMap::new(), paths, lapses };
        acked.for_each(|attempt| oracle.add(attempts[attempt].clone()));
        oracle
    }

    /// Takes note of an acknowledgement.
    pub(super) fn add(&mut self, put: PutObject) {
        let known = self.must.insert(number_of(&put), (put.id, planes(&put)));
        assert!(known.is_none_or(|(_, known)| known == planes(&put)), "{:?} was acknowledged twice", put.id);
    }

    pub(super) fn expected(&self) -> usize {
        self.must.len()
    }

    /// All that must be there is, but for `may_lose`; nothing wrong is, and nothing erased; nothing that is found cannot
    /// be fetched.
    pub(super) fn check(&self, store: &Store, may_lose: usize, random: &mut Random) -> Result<(), String> {
        let numbers: Vec<u64> = self.must.keys().copied().collect();
        let ids: Vec<ObjectId> = self.must.values().map(|(id, _)| *id).collect();
        let found = store.get(&ids);
        let mut lost: Vec<u64> = numbers
            .iter()
            .zip(&found)
            .filter(|(_, found)| found.is_none())
            .map(|(&number, _)| number)
            .collect();
        let recent = ids.len().saturating_sub(NEWEST);
        let mut looked_at: Vec<usize> = (recent..ids.len()).collect();
        // Damage may be anywhere.
        match may_lose {
            0 => looked_at.extend((0..SAMPLE.min(recent)).map(|_| random.index(recent))),
            _ => looked_at.extend(0..recent),
        }
        looked_at.retain(|&at| found[at].is_some());
        let request = all(looked_at.iter().filter_map(|&at| found[at].clone()).collect());
        for (&at, got) in looked_at.iter().zip(fetch(store, request)) {
            match got {
                Ok(bytes) if bytes == self.must[&numbers[at]].1 => {}
                // The record is destroyed, and an earlier one of the name, which a failed write left unacknowledged, is
                // found in its place: lost, but nothing that nobody put there.
                Ok(bytes) if may_lose > 0 && self.was_put(ids[at], &bytes) => lost.push(numbers[at]),
                Ok(_) => return Err(format!("wrong bytes for {}", numbers[at])),
                Err(_) => lost.push(numbers[at]),
            }
        }
        lost.sort_unstable();
        lost.dedup();
        if lost.len() > may_lose {
            return Err(format!("lost of {} acknowledged: {lost:?}; {:?}", ids.len(), store.open_report()));
        }
        self.check_paths(store)?;
        self.check_others(store, may_lose)
    }

    /// What is held by its end is one path, and counts as such.
    fn check_paths(&self, store: &Store) -> Result<(), String> {
        for path in &self.paths {
            let bytes: u64 = store.get(path).iter().flatten().map(|found| found.stored_bytes).sum();
            let held_bytes = store.path_bytes(&path[..1]);
            if held_bytes < bytes {
                return Err(format!("lost its path: {:?} holds {held_bytes} of {bytes} bytes", path[0]));
            }
        }
        Ok(())
    }

    fn was_put(&self, id: ObjectId, bytes: &[Bytes]) -> bool {
        self.attempts.iter().any(|attempt| attempt.id == id && planes(attempt) == bytes)
    }

    /// What was put and not acknowledged may be there or not; if it is, it is what somebody put and nobody erased since.
    fn check_others(&self, store: &Store, may_lose: usize) -> Result<(), String> {
        let mut put: HashMap<ObjectId, Vec<Vec<Bytes>>> = HashMap::new();
        for (position, attempt) in self.attempts.iter().enumerate() {
            if self.must.contains_key(&number_of(attempt)) {
                continue;
            }
            let allowed = put.entry(attempt.id).or_default();
            if !self.erased.contains(&position) {
                allowed.push(planes(attempt));
            }
        }
        let ids: Vec<ObjectId> = put.keys().copied().collect();
        let found: Vec<_> = store.get(&ids).into_iter().flatten().collect();
        for (got, found) in fetch(store, all(found.clone())).into_iter().zip(found) {
            match got {
                Ok(bytes) if put[&found.id].contains(&bytes) => {}
                Ok(bytes) if self.was_put(found.id, &bytes) => {
                    // What was destroyed, or lied about, may have been the erasure.
                    if may_lose == 0 {
                        return Err(format!("{:?} was erased and is back", found.id));
                    }
                }
                Ok(_) => return Err(format!("wrong bytes for {:?}, which was never acknowledged", found.id)),
                Err(_) if may_lose > 0 => {}
                // Evicted between the two looks.
                Err(_) if self.lapses => {}
                Err(kind) => {
                    let (id, spot) = (found.id, found.located.spot);
                    return Err(format!("{id:?} at {spot:?} is found and cannot be fetched: {kind}"));
                }
            }
        }
        Ok(())
    }

    /// Puts what was not acknowledged once more, and something new. What was acknowledged now, and when.
    pub(super) fn put_more(
        &mut self,
        store: &Store,
        disk: &SimDisk,
        random: &mut Random,
    ) -> Result<Vec<(usize, PutObject)>, String> {
        let mut puts: Vec<PutObject> = Vec::new();
        let open = self.attempts.iter().filter(|attempt| !self.must.contains_key(&number_of(attempt)));
        puts.extend(open.take(6).cloned());
        puts.extend((0..3).map(|number| object(AFTERWARDS + number, random.number() >> 8, &[600, 3000])));
        let mut acked: Vec<(usize, PutObject)> = Vec::new();
        for put in puts {
            // What is put again is not erased any more, acknowledged or not.
            let again = |&position: &usize| {
                let attempt = &self.attempts[position];
                attempt.id == put.id && planes(attempt) == planes(&put)
            };
            self.erased.retain(|position| !again(position));
            match store.put(vec![put.clone()]).remove(0) {
                Ok(PutOutcome::Declined) => {}
                // Where others may push it out, only the lease counts.
                Ok(_) if self.lapses && !keep(store, &put, super::script::LEASE_S) => {}
                Ok(PutOutcome::Stored | PutOutcome::Present) => acked.push((disk.position(), put)),
                Err(error) if error.kind() != ErrorKind::Unavailable => {}
                Err(error) => return Err(format!("a sound disk refuses {:?}: {error}", put.id)),
            }
        }
        Ok(acked)
    }
}
