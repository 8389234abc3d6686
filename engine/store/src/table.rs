//! The resident table: what is stored and where, in memory, so that a lookup asks no database.
//!
//! A slot has [`SLOT_BYTES`] bytes, and the hash table in front of it about 8 more a slot; both grow in steps, so that
//! a large table is never copied. Only half of a hash is kept: the other half is proven by the record itself, whose
//! authenticated header holds all of it and is compared with the name asked for.
//!
//! Objects of one prefix are mostly stored one after another and so have neighbouring slots. A run of them is
//! found by looking at the next slot first, which costs a read of memory in order instead of a hash probe.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use esker_prefix::{NamespaceId, ObjectId, ObjectKind, ScopeTag};
use hashbrown::HashTable;

use crate::fields::narrow;
use crate::index::Entry;
use crate::io::PAGE;
use crate::record::header_bytes;
use crate::segment::{SegmentId, Spot};

/// Slots are allocated this many at a time.
const CHUNK_SLOTS: usize = 4096;
/// Bytes of a slot.
const SLOT_BYTES: usize = size_of::<Slot>();
const _: () = assert!(SLOT_BYTES == 56, "the memory that a block takes is stated in PERFORMANCE.md");

/// See the module.
#[derive(Default)]
pub(crate) struct Table(RwLock<Inner>);

/// Where an object is and what a lookup says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) spot: Spot,
    /// First half of the header's checksum: another record at this place is noticed, however sound it is.
    pub(crate) checksum: u64,
    pub(crate) header_bytes: u32,
    pub(crate) record_pages: u32,
    /// Bytes from the start of the record to the end of its first plane.
    pub(crate) head_bytes: u32,
    pub(crate) tokens: u64,
    pub(crate) raw_bytes: u64,
    pub(crate) namespace: NamespaceId,
    pub(crate) scope: ScopeTag,
}

#[derive(Default)]
struct Inner {
    chunks: Vec<Vec<Slot>>,
    free: Vec<u32>,
    by_hash: HashTable<u32>,
    realms: Realms,
}

#[derive(Clone, Copy)]
struct Slot {
    hash: [u8; 16],
    checksum: u64,
    tokens: u64,
    segment: u32,
    page: u32,
    record_pages: u32,
    raw_bytes: u32,
    realm: u32,
    planes: u16,
    head_pages: u8,
    /// 0 in a slot that is free.
    kind: u8,
}

impl Table {
    /// The longest leading run of `ids` that is present, in order.
    pub(crate) fn run(&self, ids: &[ObjectId]) -> Vec<Located> {
        let inner = self.read();
        let mut next = None;
        let mut run = Vec::new();
        for id in ids {
            let Some(slot) = inner.near(*id, next) else { break };
            run.push(inner.located(slot));
            next = Some(slot + 1);
        }
        run
    }

    /// Each of `ids`, whether the others are present or not.
    pub(crate) fn many(&self, ids: &[ObjectId]) -> Vec<Option<Located>> {
        let inner = self.read();
        let mut next = None;
        let find = |id: &ObjectId| {
            let slot = inner.near(*id, next)?;
            next = Some(slot + 1);
            Some(inner.located(slot))
        };
        ids.iter().map(find).collect()
    }

    pub(crate) fn get(&self, id: ObjectId) -> Option<Located> {
        let inner = self.read();
        inner.find(id).map(|slot| inner.located(slot))
    }

    /// Namespaces whose layout is stored.
    pub(crate) fn layouts(&self) -> Vec<NamespaceId> {
        let inner = self.read();
        let slots = inner.chunks.iter().flatten().filter(|slot| slot.kind == ObjectKind::Layout as u8);
        slots.map(|slot| inner.realms.get(slot.realm).0).collect()
    }

    /// Adds an object, or moves it to another place: the place it had before is returned.
    pub(crate) fn insert(&self, entry: &Entry) -> Option<Spot> {
        let mut inner = self.write();
        let slot = Slot {
            hash: short(entry.id),
            checksum: entry.checksum.half(),
            tokens: entry.tokens,
            segment: narrow_segment(entry.spot.segment),
            page: narrow(usize::try_from(entry.spot.offset / PAGE as u64).unwrap_or(usize::MAX)),
            record_pages: entry.record_pages,
            raw_bytes: u32::try_from(entry.raw_bytes).expect("bounded by the segment"),
            realm: inner.realms.id_of(entry.namespace, entry.scope),
            planes: entry.planes,
            head_pages: entry.head_pages,
            kind: entry.id.kind as u8,
        };
        if let Some(known) = inner.find(entry.id) {
            let before = inner.slot(known).spot();
            *inner.slot_mut(known) = slot;
            return Some(before);
        }
        let at = inner.allocate(slot);
        let Inner { by_hash, chunks, .. } = &mut *inner;
        by_hash.insert_unique(slot.bucket(), at, |&other| chunk_slot(chunks, other).bucket());
        None
    }

    /// Removes an object if it still is at `spot`. Tells whether it was.
    pub(crate) fn remove_if(&self, id: ObjectId, spot: Spot) -> bool {
        let mut inner = self.write();
        let Some(slot) = inner.find(id).filter(|&slot| inner.slot(slot).spot() == spot) else { return false };
        let bucket = inner.slot(slot).bucket();
        if let Ok(found) = inner.by_hash.find_entry(bucket, |&other| other == slot) {
            found.remove();
        }
        inner.slot_mut(slot).kind = 0;
        inner.free.push(slot);
        true
    }

    /// Objects, and bytes of memory that they take.
    pub(crate) fn size(&self) -> (u64, u64) {
        let inner = self.read();
        let slots = inner.chunks.len() * CHUNK_SLOTS * SLOT_BYTES;
        let bytes = slots + inner.by_hash.allocation_size() + inner.free.capacity() * size_of::<u32>();
        (inner.by_hash.len() as u64, bytes as u64)
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn slot(&self, at: u32) -> &Slot {
        chunk_slot(&self.chunks, at)
    }

    fn slot_mut(&mut self, at: u32) -> &mut Slot {
        let at = at as usize;
        &mut self.chunks[at / CHUNK_SLOTS][at % CHUNK_SLOTS]
    }

    fn find(&self, id: ObjectId) -> Option<u32> {
        let hash = short(id);
        let same = |&at: &u32| self.slot(at).is(id.kind, &hash);
        self.by_hash.find(bucket(id.kind as u8, &hash), same).copied()
    }

    /// As `find`, looking at the slot `next` first.
    fn near(&self, id: ObjectId, next: Option<u32>) -> Option<u32> {
        let exists = |at: &u32| (*at as usize) / CHUNK_SLOTS < self.chunks.len();
        let guess = next.filter(exists).filter(|&at| {
            let chunk = &self.chunks[at as usize / CHUNK_SLOTS];
            chunk.get(at as usize % CHUNK_SLOTS).is_some_and(|slot| slot.is(id.kind, &short(id)))
        });
        guess.or_else(|| self.find(id))
    }

    fn located(&self, at: u32) -> Located {
        let slot = self.slot(at);
        let (namespace, scope) = self.realms.get(slot.realm);
        Located {
            spot: slot.spot(),
            checksum: slot.checksum,
            header_bytes: narrow(header_bytes(usize::from(slot.planes))),
            record_pages: slot.record_pages,
            head_bytes: u32::from(slot.head_pages) * narrow(PAGE),
            tokens: slot.tokens,
            raw_bytes: u64::from(slot.raw_bytes),
            namespace,
            scope,
        }
    }

    fn allocate(&mut self, slot: Slot) -> u32 {
        if let Some(at) = self.free.pop() {
            *self.slot_mut(at) = slot;
            return at;
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK_SLOTS) {
            self.chunks.push(Vec::with_capacity(CHUNK_SLOTS));
        }
        let full = self.chunks.len() - 1;
        let chunk = &mut self.chunks[full];
        chunk.push(slot);
        narrow(full * CHUNK_SLOTS + chunk.len() - 1)
    }
}

impl Slot {
    fn is(&self, kind: ObjectKind, hash: &[u8; 16]) -> bool {
        self.kind == kind as u8 && self.hash == *hash
    }

    fn bucket(&self) -> u64 {
        bucket(self.kind, &self.hash)
    }

    fn spot(&self) -> Spot {
        Spot {
            segment: SegmentId(u64::from(self.segment)),
            offset: u64::from(self.page) * PAGE as u64,
        }
    }
}

impl Located {
    pub(crate) fn record_bytes(&self) -> usize {
        self.record_pages as usize * PAGE
    }
}

/// Pairs of namespace and scope, each kept once: there are few, and 48 bytes for every block would be many.
#[derive(Default)]
struct Realms {
    all: Vec<(NamespaceId, ScopeTag)>,
    ids: HashMap<(NamespaceId, ScopeTag), u32>,
}

impl Realms {
    fn get(&self, id: u32) -> (NamespaceId, ScopeTag) {
        self.all[id as usize]
    }

    fn id_of(&mut self, namespace: NamespaceId, scope: ScopeTag) -> u32 {
        *self.ids.entry((namespace, scope)).or_insert_with(|| {
            self.all.push((namespace, scope));
            narrow(self.all.len() - 1)
        })
    }
}

fn chunk_slot(chunks: &[Vec<Slot>], at: u32) -> &Slot {
    &chunks[at as usize / CHUNK_SLOTS][at as usize % CHUNK_SLOTS]
}

fn short(id: ObjectId) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&id.hash.0[..16]);
    half
}

/// Hashes are uniform already; the kind tells a state from the block that ends where it does.
fn bucket(kind: u8, hash: &[u8; 16]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(word) ^ u64::from(kind).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn narrow_segment(id: SegmentId) -> u32 {
    u32::try_from(id.0).expect("segment numbers are bounded by their file names")
}
