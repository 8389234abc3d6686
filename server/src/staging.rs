//! Staging: what was put and cannot be stored yet, in memory, until what it needs arrives or its time is over.
//!
//! Two things wait here: objects that lack planes, because an engine sends each group of its state apart; and objects put before
//! what they continue, such as the state of a boundary whose block is still on its way. Nothing that waits is found by a lookup,
//! survives a crash, or was acknowledged as stored. Memory is bounded, for all and for each tenant, also where objects have many
//! planes of few bytes; so is the wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_prefix::ObjectId;
use esker_store::PutObject;

use crate::author::Author;
use crate::budget::{Budget, Share, Use};
use crate::node::Node;
use crate::principal::TenantId;

/// How long a part waits for the rest.
pub(crate) const WAIT: Duration = Duration::from_secs(60);
/// Bytes that wait at most, and of one tenant.
const MAX_BYTES: usize = 64 << 20;
const MAX_TENANT_BYTES: usize = MAX_BYTES / 2;
/// What an object that waits takes besides its bytes, and each of its planes, whether it is there or not.
const OBJECT_BYTES: usize = 512;
const PLANE_BYTES: usize = 128;

/// See the module.
pub(crate) struct Staging(Mutex<Table>);

struct Table {
    bytes: usize,
    /// Of the node's memory, as many bytes.
    share: Share,
    tenants: HashMap<TenantId, usize>,
    /// Objects that lack planes.
    parts: HashMap<Key, Parts>,
    /// Whole objects, by what they continue.
    orphans: HashMap<ObjectId, Vec<Orphan>>,
}

/// Whose object: in a scope of several tenants each has parts of its own, which no other tenant completes.
type Key = (TenantId, ObjectId);

struct Parts {
    planes: Vec<Option<Bytes>>,
    until: Instant,
}

/// What waits of one tenant's.
pub(crate) struct OfTenant<'s> {
    staging: &'s Staging,
    tenant: &'s TenantId,
}

struct Orphan {
    author: Arc<Author>,
    object: PutObject,
    until: Instant,
}

/// Nothing more may wait.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full {
    pub(crate) bound: Bound,
    pub(crate) limit_bytes: u64,
    pub(crate) used_bytes: u64,
}

/// What has no room for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    /// What may wait of one tenant.
    Tenant,
    /// What may wait.
    Staged,
    /// The node's memory for what is on its way.
    InFlight,
}

impl Staging {
    pub(crate) fn new(budget: &Arc<Budget>) -> Self {
        let share = budget.share(Use::Staged);
        let (tenants, parts, orphans) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self(Mutex::new(Table { bytes: 0, share, tenants, parts, orphans }))
    }

    /// Adds a plane of an object that has so many; all of them once none is missing. A plane that is there already stays as it
    /// is: first writer wins.
    pub(crate) fn add(
        &self,
        tenant: &TenantId,
        id: ObjectId,
        planes: usize,
        (plane, bytes): (usize, Bytes),
        now: Instant,
    ) -> Result<Option<Vec<Bytes>>, Full> {
        let mut table = self.table();
        let key = (tenant.clone(), id);
        let known = table.parts.get(&key).is_some_and(|parts| parts.planes[plane].is_some());
        if !known {
            let new_bytes = if table.parts.contains_key(&key) { 0 } else { object_bytes(planes) };
            table.take_room(tenant, bytes.len() + new_bytes)?;
            let bytes = alone(&bytes);
            let new = || Parts { planes: vec![None; planes], until: now + WAIT };
            table.parts.entry(key.clone()).or_insert_with(new).planes[plane] = Some(bytes);
        }
        if table.parts.get(&key).is_none_or(|parts| parts.planes.iter().any(Option::is_none)) {
            return Ok(None);
        }
        Ok(table.remove_parts(&key).map(|parts| parts.planes.into_iter().flatten().collect()))
    }

    /// Keeps a whole object until what it continues is stored.
    pub(crate) fn park(&self, author: &Arc<Author>, mut object: PutObject, now: Instant) -> Result<(), Full> {
        let Some(parent) = object.parent else { return Ok(()) };
        let tenant = &author.principal.tenant;
        let mut table = self.table();
        let same = |known: &Orphan| known.object.id == object.id && known.tenant() == tenant;
        let known = table.orphans.get(&parent).is_some_and(|known| known.iter().any(same));
        if !known {
            table.take_room(tenant, bytes_of(&object))?;
            object.planes.iter_mut().for_each(|plane| plane.bytes = alone(&plane.bytes));
            let orphan = Orphan { author: Arc::clone(author), object, until: now + WAIT };
            table.orphans.entry(parent).or_default().push(orphan);
        }
        Ok(())
    }

    /// What waited for one of these and finds it there.
    fn adopt(
        &self,
        parents: impl IntoIterator<Item = ObjectId>,
        finds: impl Fn(&Orphan, ObjectId) -> bool,
    ) -> Vec<Orphan> {
        let mut table = self.table();
        let mut adopted = Vec::new();
        for parent in parents {
            let Some(waiting) = table.orphans.get_mut(&parent) else { continue };
            adopted.extend(waiting.extract_if(.., |orphan| finds(orphan, parent)));
            if waiting.is_empty() {
                table.orphans.remove(&parent);
            }
        }
        for orphan in &adopted {
            table.give_room(orphan.tenant(), bytes_of(&orphan.object));
        }
        adopted
    }

    /// Stores what waited for these, which are stored, and what waited for that, each on the word of who put it.
    pub(crate) fn follow(&self, node: &Node, stored: impl IntoIterator<Item = ObjectId>) {
        // What one tenant has put to its org is not there for another.
        let finds = |orphan: &Orphan, parent| {
            let sight = &orphan.author.place.sight;
            sight.find(&node.store, orphan.object.namespace, &[parent]).iter().any(Option::is_some)
        };
        let mut next = self.adopt(stored, finds);
        while !next.is_empty() {
            let mut stored = Vec::new();
            let mut rest = next.into_iter().peekable();
            while let Some(first) = rest.next() {
                let Orphan { author, object, .. } = first;
                let mut objects = vec![object];
                while let Some(more) = rest.next_if(|more| Arc::ptr_eq(&more.author, &author)) {
                    objects.push(more.object);
                }
                stored.extend(put(node, &author, objects));
            }
            next = self.adopt(stored, finds);
        }
    }

    /// Lets go all that waits of a tenant's.
    pub(crate) fn forget(&self, tenant: &TenantId) {
        self.remove(|of, _| of == tenant);
    }

    /// What waits of a tenant's.
    pub(crate) fn of<'s>(&'s self, tenant: &'s TenantId) -> OfTenant<'s> {
        OfTenant { staging: self, tenant }
    }

    fn planes_of(&self, tenant: &TenantId, id: ObjectId) -> Vec<bool> {
        let table = self.table();
        table
            .parts
            .get(&(tenant.clone(), id))
            .map(|parts| parts.planes.iter().map(Option::is_some).collect())
            .unwrap_or_default()
    }

    /// Lets go what has waited for too long.
    pub(crate) fn expire(&self, now: Instant) {
        let (parts, orphans) = self.remove(|_, until| until <= now);
        if parts + orphans > 0 {
            tracing::info!(parts, orphans, "what was put waited in vain for the rest");
        }
    }

    /// Lets go what waits of these tenants until then; how many objects that lack planes, and how many whole ones.
    fn remove(&self, is_over: impl Fn(&TenantId, Instant) -> bool) -> (usize, usize) {
        let mut table = self.table();
        let over = table.parts.iter().filter(|((tenant, _), parts)| is_over(tenant, parts.until));
        let over: Vec<Key> = over.map(|(key, _)| key.clone()).collect();
        for key in &over {
            table.remove_parts(key);
        }
        let mut gone = Vec::new();
        table.orphans.retain(|_, waiting| {
            gone.extend(waiting.extract_if(.., |orphan| is_over(orphan.tenant(), orphan.until)));
            !waiting.is_empty()
        });
        for orphan in &gone {
            table.give_room(orphan.tenant(), bytes_of(&orphan.object));
        }
        (over.len(), gone.len())
    }

    /// Bytes that wait.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.table().bytes
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OfTenant<'_> {
    /// Which planes of an object wait here.
    pub(crate) fn planes(&self, id: ObjectId) -> Vec<bool> {
        self.staging.planes_of(self.tenant, id)
    }
}

impl Table {
    fn take_room(&mut self, tenant: &TenantId, bytes: usize) -> Result<(), Full> {
        let of_tenant = self.tenants.get(tenant).copied().unwrap_or(0);
        let full = |bound, limit_bytes, used: usize| Full { bound, limit_bytes, used_bytes: used as u64 };
        for (bound, limit_bytes, used_bytes) in
            [(Bound::Tenant, MAX_TENANT_BYTES, of_tenant), (Bound::Staged, MAX_BYTES, self.bytes)]
        {
            if used_bytes + bytes > limit_bytes {
                return Err(full(bound, limit_bytes as u64, used_bytes));
            }
        }
        let taken = self.share.try_grow(bytes as u64);
        taken.map_err(|no_room| full(Bound::InFlight, no_room.limit_bytes, self.bytes))?;
        self.bytes += bytes;
        self.tenants.insert(tenant.clone(), of_tenant + bytes);
        Ok(())
    }

    fn give_room(&mut self, tenant: &TenantId, bytes: usize) {
        self.bytes -= bytes;
        self.share.shrink(bytes as u64);
        if let Some(of_tenant) = self.tenants.get_mut(tenant) {
            *of_tenant -= bytes;
            if *of_tenant == 0 {
                self.tenants.remove(tenant);
            }
        }
    }

    fn remove_parts(&mut self, key: &Key) -> Option<Parts> {
        let parts = self.parts.remove(key)?;
        let bytes: usize = parts.planes.iter().flatten().map(Bytes::len).sum();
        self.give_room(&key.0, bytes + object_bytes(parts.planes.len()));
        Some(parts)
    }
}

impl Orphan {
    fn tenant(&self) -> &TenantId {
        &self.author.principal.tenant
    }
}

/// Stores what one author's had waited; what of it is stored now.
fn put(node: &Node, author: &Author, objects: Vec<PutObject>) -> Vec<ObjectId> {
    let Ok(_inside) = author.place.pass.enter() else { return Vec::new() };
    let ids: Vec<ObjectId> = objects.iter().map(|object| object.id).collect();
    let results = author.wait(node, author.submit(node, objects));
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        tracing::warn!(%error, "an object that had waited was not stored");
    }
    ids.into_iter().zip(results).filter(|(_, result)| result.is_ok()).map(|(id, _)| id).collect()
}

/// A copy: the bytes themselves would keep the whole message that they came in.
fn alone(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn bytes_of(object: &PutObject) -> usize {
    let bytes: usize = object.planes.iter().map(|plane| plane.bytes.len()).sum();
    bytes + object_bytes(object.planes.len())
}

/// Besides the bytes of its planes.
fn object_bytes(planes: usize) -> usize {
    OBJECT_BYTES + planes * PLANE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::principal::{Principal, Roles};
    use crate::writers::Place;
    use esker_prefix::{BlockHash, ObjectKind, RootSecret, ScopeKey, ScopeKind};

    fn id(byte: u8) -> ObjectId {
        ObjectId { kind: ObjectKind::Block, hash: BlockHash([byte; 32]) }
    }

    fn tenant(name: &str) -> TenantId {
        TenantId(name.into())
    }

    fn author(name: &str) -> Arc<Author> {
        let principal = Principal { tenant: tenant(name), name: "writer".into(), roles: Roles::default() };
        let key = ScopeKey::derive(&RootSecret::new([7; 32]), ScopeKind::Private, name, 0);
        Arc::new(Author::new(principal, Place::unshared(key)))
    }

    /// An object of one plane that continues another.
    fn whole(writer: u32, plane: Bytes) -> PutObject {
        let len_bytes = plane.len() as u64;
        let spec = esker_prefix::PlaneSpec { group: 0, first_layer: 0, layers: 1, len_bytes };
        PutObject {
            id: id(3),
            parent: Some(id(2)),
            namespace: esker_prefix::NamespaceId([0; 32]),
            scope: esker_prefix::ScopeTag([0; 16]),
            writer: esker_prefix::WriterId(writer),
            class: esker_store::TtlClass::default(),
            tokens: 1,
            planes: vec![esker_store::PutPlane { spec, shape: None, bytes: plane }],
        }
    }

    #[test]
    fn planes_come_in_any_order_and_the_first_writer_wins() {
        let staging = Staging::new(&Budget::new(1 << 30));
        let now = Instant::now();
        let add =
            |plane, byte: u8| staging.add(&tenant("a"), id(1), 3, (plane, Bytes::from(vec![byte; 10])), now);
        assert_eq!(add(2, 7), Ok(None));
        assert_eq!(add(0, 8), Ok(None));
        assert_eq!(add(2, 9), Ok(None));
        assert_eq!(staging.of(&tenant("a")).planes(id(1)), [true, false, true]);
        assert_eq!(staging.bytes(), 20 + object_bytes(3));
        let whole = add(1, 6).unwrap().unwrap();
        assert_eq!(whole.iter().map(|plane| plane[0]).collect::<Vec<_>>(), [8, 6, 7]);
        assert_eq!((staging.bytes(), staging.of(&tenant("a")).planes(id(1)).len()), (0, 0));
    }

    #[test]
    fn nobody_completes_what_another_tenant_has_begun() {
        let staging = Staging::new(&Budget::new(1 << 30));
        let now = Instant::now();
        let add = |name: &str, plane, byte: u8| {
            staging.add(&tenant(name), id(1), 2, (plane, Bytes::from(vec![byte])), now).unwrap()
        };
        assert_eq!(add("b", 0, 66), None);
        assert_eq!(add("a", 1, 1), None);
        assert_eq!(staging.of(&tenant("a")).planes(id(1)), [false, true]);
        assert_eq!(add("a", 0, 0), Some(vec![Bytes::from(vec![0]), Bytes::from(vec![1])]));
        assert_eq!(staging.of(&tenant("b")).planes(id(1)), [true, false]);
        // What waits whole waits for each of them, too.
        for (name, byte) in [("b", 66), ("a", 1), ("a", 1)] {
            let plane = Bytes::copy_from_slice(&u32::to_le_bytes(byte));
            staging.park(&author(name), whole(byte, plane), now).unwrap();
        }
        let writers: Vec<u32> =
            staging.adopt([id(2)], |_, _| true).iter().map(|orphan| orphan.object.writer.0).collect();
        assert_eq!(writers, [66, 1]);
    }

    #[test]
    fn memory_and_time_are_bounded() {
        let staging = Staging::new(&Budget::new(1 << 30));
        let now = Instant::now();
        let some = Bytes::from(vec![0; (16 << 20) - object_bytes(2)]);
        let add = |name: &str, byte| staging.add(&tenant(name), id(byte), 2, (0, some.clone()), now);
        assert_eq!((add("a", 1), add("a", 2)), (Ok(None), Ok(None)));
        assert_eq!(
            add("a", 3),
            Err(Full {
                bound: Bound::Tenant,
                limit_bytes: MAX_TENANT_BYTES as u64,
                used_bytes: MAX_TENANT_BYTES as u64
            })
        );
        assert_eq!((add("b", 4), add("b", 5)), (Ok(None), Ok(None)));
        assert_eq!(
            add("c", 6),
            Err(Full { bound: Bound::Staged, limit_bytes: MAX_BYTES as u64, used_bytes: MAX_BYTES as u64 })
        );
        staging.expire(now + WAIT / 2);
        assert_eq!(staging.bytes(), MAX_BYTES);
        staging.expire(now + WAIT);
        assert_eq!(staging.bytes(), 0);
        assert_eq!(add("c", 6), Ok(None));
    }

    #[test]
    fn what_waits_is_charged_to_what_is_in_flight() {
        let budget = Budget::new(40 << 20);
        let (staging, now) = (Staging::new(&budget), Instant::now());
        let some = Bytes::from(vec![0; 8 << 20]);
        let add = |byte| staging.add(&tenant("a"), id(byte), 2, (0, some.clone()), now);
        assert_eq!(add(1), Ok(None));
        let mut fetch = budget.share(Use::Fetch);
        fetch.grow(28 << 20).unwrap();
        assert_eq!(add(2).unwrap_err().bound, Bound::InFlight);
        let staged = staging.bytes() as u64;
        assert_eq!(budget.used_by()[Use::Staged as usize], ("staged", staged));
        staging.expire(now + WAIT);
        assert_eq!(budget.used_by()[Use::Staged as usize], ("staged", 0));
        assert_eq!(add(2), Ok(None));
    }

    #[test]
    fn what_waits_keeps_no_message_whatever_its_length() {
        let staging = Staging::new(&Budget::new(1 << 30));
        let now = Instant::now();
        let message = Bytes::from(vec![7; 1 << 20]);
        let of_message = |plane: &Bytes| message.as_ptr_range().contains(&plane.as_ptr());
        assert_eq!(staging.add(&tenant("a"), id(1), 2, (0, message.slice(..64 << 10)), now), Ok(None));
        staging.park(&author("a"), whole(1, message.slice(..64 << 10)), now).unwrap();
        assert!(
            !staging.table().parts.values().flat_map(|parts| parts.planes.iter().flatten()).any(of_message)
        );
        let parked = staging.adopt([id(2)], |_, _| true);
        assert_eq!(parked.len(), 1);
        assert!(!parked[0].object.planes.iter().any(|plane| of_message(&plane.bytes)));
    }

    #[test]
    fn what_tiny_planes_take_counts_and_no_plane_keeps_its_message() {
        let staging = Staging::new(&Budget::new(1 << 30));
        let now = Instant::now();
        let message = Bytes::from(vec![7; 1 << 20]);
        let add = |number: u32| {
            let mut hash = [0; 32];
            hash[..4].copy_from_slice(&number.to_le_bytes());
            let id = ObjectId { kind: ObjectKind::Block, hash: BlockHash(hash) };
            staging.add(&tenant("a"), id, 4096, (0, message.slice(..1)), now)
        };
        let refused = (0..1000).find(|&number| add(number).is_err()).expect("4096 planes each, without end");
        assert!(refused as usize * 4096 * size_of::<Option<Bytes>>() <= MAX_TENANT_BYTES, "{refused} fit");
        let table = staging.table();
        let kept = table.parts.values().flat_map(|parts| parts.planes.iter().flatten());
        assert!(kept.clone().all(|plane| !message.as_ptr_range().contains(&plane.as_ptr())));
        drop(table);
        staging.forget(&tenant("b"));
        assert!(staging.bytes() > 0);
        staging.forget(&tenant("a"));
        assert_eq!(staging.bytes(), 0);
    }
}
