//! What must hold of a store after a crash. It knows what was put and what was acknowledged, and asks no store.

use std::collections::{BTreeMap, HashMap};

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
    attempts: &'a [PutObject],
    /// Must be there, with these very bytes. Grows at its end, oldest first by number.
    must: BTreeMap<u64, (ObjectId, Vec<Bytes>)>,
}

impl<'a> Oracle<'a> {
    /// Of `attempts`, those that were acknowledged.
    pub(super) fn new(attempts: &'a [PutObject], acked: impl Iterator<Item = usize>) -> Self {
        let mut oracle = Self { attempts, must: BTreeMap::new() };
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

    /// All that must be there is, but for `may_lose`; nothing wrong is; nothing that is found cannot be fetched.
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
        self.check_unacknowledged(store, may_lose)
    }

    fn was_put(&self, id: ObjectId, bytes: &[Bytes]) -> bool {
        self.attempts.iter().any(|attempt| attempt.id == id && planes(attempt) == bytes)
    }

    /// What was put and not acknowledged may be there or not; if it is, it is what somebody put.
    fn check_unacknowledged(&self, store: &Store, may_lose: usize) -> Result<(), String> {
        let mut put: HashMap<ObjectId, Vec<Vec<Bytes>>> = HashMap::new();
        for attempt in self.attempts.iter().filter(|attempt| !self.must.contains_key(&number_of(attempt))) {
            put.entry(attempt.id).or_default().push(planes(attempt));
        }
        let ids: Vec<ObjectId> = put.keys().copied().collect();
        let found: Vec<_> = store.get(&ids).into_iter().flatten().collect();
        for (got, found) in fetch(store, all(found.clone())).into_iter().zip(found) {
            match got {
                Ok(bytes) if put[&found.id].contains(&bytes) => {}
                Ok(_) => return Err(format!("wrong bytes for {:?}, which nobody was promised", found.id)),
                Err(_) if may_lose > 0 => {}
                // Evicted, by an index that a power cut put back to before that.
                Err(_) if store.shared.settings.capacity_bytes < u64::MAX => {}
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
        &self,
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
            match store.put(vec![put.clone()]).remove(0) {
                Ok(PutOutcome::Declined) => {}
                // Where others may push it out, only the lease counts.
                Ok(_) if store.shared.settings.capacity_bytes < u64::MAX && !keep(store, &put) => {}
                Ok(PutOutcome::Stored | PutOutcome::Present) => acked.push((disk.position(), put)),
                Err(error) if error.kind() != ErrorKind::Unavailable => {}
                Err(error) => return Err(format!("a sound disk refuses {:?}: {error}", put.id)),
            }
        }
        Ok(acked)
    }
}
