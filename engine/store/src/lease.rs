//! Leases: promises to keep some prefixes until a deadline, whatever is evicted or expires around them.
//!
//! A lease names the ends of prefixes. Holding an end holds all that it hangs on, since nothing goes before what needs it.
//! It is a record of its own, durable before it is granted, and the newest record of a name holds: renewing a lease,
//! moving it to a newer prefix and giving it up are all the same write. Deadlines are in store time (clock.rs).
//!
//! ```text
//! Payload, one plane, little-endian: version u16 = 1 | ends u16 | zero u32 | deadline u64, store seconds
//!                                    then for each end: kind u8 | hash 32
//! ```
//!
//! A lease is told with the bytes of its whole paths, shared or not: what a holder pays for does not depend on who else shares
//! it. The budget is about room, and there every record counts once (leased.rs).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeTag, WriterId};

use crate::fetch::{Fetch, FetchEvent, FetchOrder, FetchRequest, PlaneSelection};
use crate::fields::{Reader, Writer};
use crate::index::Entry;
use crate::shared::Shared;
use crate::store::Found;
use crate::{PutObject, PutPlane, TtlClass};

/// Ends of one lease, at most.
pub(crate) const MAX_ENDS: usize = 256;
const VERSION: u16 = 1;
const FIXED_BYTES: usize = 16;
const END_BYTES: usize = 33;
/// Locks by name, so that two writes of one lease never overtake each other.
const SHARDS: usize = 32;

/// Name of a lease, chosen by its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub [u8; 32]);

/// A lease that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// Ends of the prefixes that it keeps.
    pub ends: Vec<ObjectId>,
    /// Store time at which it ends, in seconds; see [`Store::now_s`](crate::Store::now_s).
    pub deadline_s: u32,
    /// Bytes of the records of all its paths when it was granted.
    pub bytes: u64,
}

/// The leases that hold.
#[derive(Default)]
pub(crate) struct Leases {
    held: Mutex<HashMap<LeaseId, Lease>>,
    /// Records that could not be read when the store was opened.
    unread: Mutex<Vec<Entry>>,
    shards: [Mutex<()>; SHARDS],
}

impl Leases {
    pub(crate) fn held(&self) -> MutexGuard<'_, HashMap<LeaseId, Lease>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unread(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps other writes of a lease out.
    pub(crate) fn write(&self, id: LeaseId) -> MutexGuard<'_, ()> {
        self.shards[usize::from(id.0[0]) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.held().len() as u64
    }
}

impl Shared {
    /// Holds the path of an object for a lease. `false` if it is not there.
    pub(crate) fn hold(&self, end: ObjectId) -> bool {
        match self.settings.skips_pins() {
            true => self.table.get(end).is_some(),
            false => self.table.pin(end),
        }
    }

    /// Undoes [`Shared::hold`].
    pub(crate) fn let_go(&self, end: ObjectId) {
        if !self.settings.skips_pins() {
            self.table.unpin(end);
        }
    }

    /// A lease is another one from now on, or none; `held` are all of them. Returns what it was. Pins are the caller's.
    pub(crate) fn set_lease(
        &self,
        held: &mut HashMap<LeaseId, Lease>,
        id: LeaseId,
        lease: Option<Lease>,
    ) -> Option<Lease> {
        let after = lease.as_ref().map_or(Vec::new(), |lease| lease.ends.clone());
        let before = match lease {
            Some(lease) => held.insert(id, lease),
            None => held.remove(&id),
        };
        self.table.move_lease(before.as_ref().map_or(&[], |before| &before.ends), &after);
        before
    }

    /// Takes up the leases that were written down. One whose prefix is gone all the same holds what is left.
    pub(crate) fn restore_leases(self: &Arc<Self>, entries: Vec<Entry>) {
        let now_s = self.time.now_s();
        let found = |entry: &Entry| Some(Found::new(entry.id, self.table.get(entry.id)?));
        let (entries, objects): (Vec<Entry>, Vec<Found>) =
            entries.into_iter().filter_map(|entry| found(&entry).map(|found| (entry, found))).unzip();
        let request = FetchRequest {
            objects,
            planes: PlaneSelection::All,
            order: FetchOrder::ByObject,
            deadline: None,
        };
        for event in Fetch::new(Arc::clone(self), request) {
            let (object, bytes) = match event {
                FetchEvent::Plane { object, bytes, .. } => (object, bytes),
                FetchEvent::Miss { object, kind } => {
                    tracing::error!(lease = ?entries[object].id, %kind, "the record of a lease cannot be read");
                    self.leases.unread().push(entries[object]);
                    continue;
                }
            };
            let Some((ends, deadline_s)) = parse(&bytes) else {
                tracing::error!(lease = ?entries[object].id, "the record of a lease cannot be understood");
                continue;
            };
            let id = LeaseId(entries[object].id.hash.0);
            let mut held = self.leases.held();
            // Renewed since it could not be read.
            if held.contains_key(&id) {
                continue;
            }
            let holds = |end: &ObjectId| deadline_s > now_s && self.hold(*end);
            let ends: Vec<ObjectId> = ends.into_iter().filter(holds).collect();
            let bytes = ends.iter().filter_map(|&end| self.table.path_bytes(end)).sum();
            // What is over is kept for the housekeeping to remove.
            self.set_lease(&mut held, id, Some(Lease { id, ends, deadline_s, bytes }));
        }
    }

    /// Tries again what could not be read when the store was opened. What is damaged is in quarantine and found no more.
    pub(crate) fn restore_unread_leases(self: &Arc<Self>) {
        let unread = std::mem::take(&mut *self.leases.unread());
        if !unread.is_empty() {
            unread.iter().for_each(|entry| self.reinstate(entry));
            self.restore_leases(unread);
        }
    }
}

impl LeaseId {
    pub(crate) fn object(self) -> ObjectId {
        ObjectId { kind: ObjectKind::Lease, hash: BlockHash(self.0) }
    }
}

/// The object that makes a lease durable.
pub(crate) fn object(id: LeaseId, ends: &[ObjectId], deadline_s: u32) -> PutObject {
    let mut bytes = vec![0; FIXED_BYTES + ends.len() * END_BYTES];
    let mut writer = Writer::new(&mut bytes);
    let count = u16::try_from(ends.len()).expect("checked against MAX_ENDS");
    writer.u16(VERSION).u16(count).u32(0).u64(u64::from(deadline_s));
    for end in ends {
        writer.u8(end.kind as u8).bytes(&end.hash.0);
    }
    let spec = PlaneSpec { group: 0, first_layer: 0, layers: 0, len_bytes: bytes.len() as u64 };
    PutObject {
        id: id.object(),
        parent: None,
        namespace: NamespaceId([0; 32]),
        scope: ScopeTag([0; 16]),
        writer: WriterId::UNNAMED,
        class: TtlClass::PERMANENT,
        tokens: 0,
        planes: vec![PutPlane { spec, shape: None, bytes: Bytes::from(bytes) }],
    }
}

/// Ends and deadline of a lease's payload.
pub(crate) fn parse(bytes: &[u8]) -> Option<(Vec<ObjectId>, u32)> {
    if bytes.len() < FIXED_BYTES {
        return None;
    }
    let mut reader = Reader::new(bytes);
    let (version, count, _, deadline_s) =
        (reader.u16(), usize::from(reader.u16()), reader.u32(), reader.u64());
    if version != VERSION || bytes.len() != FIXED_BYTES + count * END_BYTES {
        return None;
    }
    let end = |_| Some(ObjectId { kind: ObjectKind::from_u8(reader.u8())?, hash: BlockHash(reader.bytes()) });
    let ends = (0..count).map(end).collect::<Option<Vec<_>>>()?;
    Some((ends, u32::try_from(deadline_s).ok()?))
}
