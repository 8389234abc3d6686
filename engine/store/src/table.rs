//! The resident table: what is stored and where, in memory, so that a lookup asks no database.
//!
//! A slot has [`SLOT_BYTES`] bytes, and the hash table in front of it about 8 more a slot; both grow in steps, so that
//! a large table is never copied. Only half of a hash is kept: the other half is proven by the record itself, whose
//! authenticated header holds all of it and is compared with the name asked for.
//!
//! Beside each slot lies what [`Retention`] keeps of the block. A parent that is not there while others hang on it has a slot
//! as well, a *hole*: not found by any lookup, filled when the object comes, and gone with the last that hangs on it. It is what a
//! lost object leaves behind, and what stands for a parent that comes after its children, as places tell no order.
//!
//! Objects of one prefix are mostly stored one after another and so have neighbouring slots. A run of them is
//! found by looking at the next slot first, which costs a read of memory in order instead of a hash probe.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, ScopeTag, WriterId};
use hashbrown::HashTable;

use crate::TtlClass;
use crate::fields::narrow;
use crate::index::Entry;
use crate::io::PAGE;
use crate::leased::{Leased, Place};
use crate::owner::{OwnerId, OwnerOf, Shares};
use crate::record::header_bytes;
use crate::retention::{Candidate, Context, Retention, RetentionSettings};
use crate::segment::{SegmentId, Spot};
use crate::shared::is_own;
use crate::tails::{Behind, Tails};

/// Slots are allocated this many at a time.
const CHUNK_SLOTS: usize = 4096;
/// Bytes of a slot.
const SLOT_BYTES: usize = size_of::<Slot>();
const _: () = assert!(SLOT_BYTES == 56, "the memory that a block takes is stated in PERFORMANCE.md");

/// Bytes per token of an ordinary block, for [`Retention`]: those of V4-Flash.
const ORDINARY_BYTES_PER_TOKEN: u32 = 3514;

/// See the module.
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

struct Inner {
    chunks: Vec<Vec<Slot>>,
    free: Vec<u32>,
    by_hash: HashTable<u32>,
    realms: Realms,
    retention: Retention,
    erasures: u64,
    /// Slots that are holes.
    holes: usize,
    tails: Tails,
    leased: Leased,
    /// Whether children that come before their parent are linked to it.
    adopts: bool,
}

/// A record that is not needed any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Victim {
    pub(crate) spot: Spot,
    pub(crate) record_bytes: u64,
}

/// An object or a hole as [`Table::each`] tells of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) slot: u32,
    /// Slot of the parent.
    pub(crate) parent: Option<u32>,
    /// `None` for a hole.
    pub(crate) kind: Option<ObjectKind>,
    pub(crate) hash: [u8; 16],
    pub(crate) tokens: u64,
    pub(crate) bytes: u64,
    pub(crate) segment: u32,
    pub(crate) namespace: NamespaceId,
    pub(crate) scope: ScopeTag,
    pub(crate) last_s: u32,
    pub(crate) pinned: bool,
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
    /// 0 in a slot that is free; [`HOLE`] is added in a hole. One that no object was in yet has no pages.
    kind: u8,
}

const HOLE: u8 = 0x80;
/// Where nobody knows how many tokens a block has.
const ORDINARY_BLOCK_TOKENS: u64 = 128;

impl Table {
    /// `adopts`: whether children that come before their parent are linked to it. Only a test says no.
    pub(crate) fn new(adopts: bool) -> Self {
        Self(RwLock::new(Inner {
            chunks: Vec::new(),
            free: Vec::new(),
            by_hash: HashTable::new(),
            realms: Realms::new(),
            retention: Retention::new(RetentionSettings::new(ORDINARY_BYTES_PER_TOKEN)),
            erasures: 0,
            holes: 0,
            tails: Tails::default(),
            leased: Leased::default(),
            adopts,
        }))
    }

    /// The longest leading run of `ids` that is present and that `take` takes, in order. It goes no further than that.
    pub(crate) fn run<T>(&self, ids: &[ObjectId], take: impl Fn(ObjectId, Located) -> Option<T>) -> Vec<T> {
        let inner = self.read();
        let mut next = None;
        let mut run = Vec::new();
        for &id in ids {
            let Some(slot) = inner.near(id, next) else { break };
            let Some(taken) = take(id, inner.located(slot)) else { break };
            run.push(taken);
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

    /// Where behind `from` and more blocks of a prefix, off the block grid, states may lie: behind how many of `blocks`, and how long
    /// the prefix is that the state completes. The longest first, at most `most`, of prefixes shorter than `below`.
    pub(crate) fn tails(
        &self,
        root: (NamespaceId, ScopeTag),
        from: usize,
        blocks: &[BlockHash],
        below: u64,
        most: usize,
    ) -> Vec<(usize, u64)> {
        let inner = self.read();
        if inner.tails.is_empty() {
            return Vec::new();
        }
        let behind = |count: usize| match count.checked_sub(1) {
            Some(last) => Behind::block(&blocks[last]),
            None => Behind::nothing(root.0, root.1),
        };
        let lengths = (from..=blocks.len())
            .rev()
            .flat_map(|count| inner.tails.behind(behind(count)).map(move |tokens| (count, tokens)));
        lengths.filter(|&(_, tokens)| tokens < below).take(most).collect()
    }

    /// Whether an object is at `spot`.
    pub(crate) fn is_at(&self, id: ObjectId, spot: Spot) -> bool {
        self.get(id).is_some_and(|located| located.spot == spot)
    }

    /// Namespaces whose layout is stored.
    pub(crate) fn layouts(&self) -> Vec<NamespaceId> {
        let inner = self.read();
        let slots = inner.chunks.iter().flatten().filter(|slot| slot.kind == ObjectKind::Layout as u8);
        slots.map(|slot| inner.realms.get(slot.realm).namespace).collect()
    }

    /// Adds an object, or moves it to another place: the record it had before is returned.
    pub(crate) fn insert(&self, entry: &Entry) -> Option<Victim> {
        self.write().insert(entry, None, true)
    }

    /// As [`Table::insert`], of what was just written. `pinned`: something that is to hang on it is on its way, and whoever asked
    /// for that takes the pin back.
    pub(crate) fn store(&self, entry: &Entry, candidate: Candidate, pinned: bool) -> Option<Victim> {
        let mut inner = self.write();
        let before = inner.insert(entry, Some(candidate), true);
        if pinned && let Some(at) = inner.find(entry.id) {
            // It cannot be held too often: nobody else could hold it before.
            let _ = inner.retention.pin(at);
        }
        before
    }

    /// As [`Table::insert`], of entries found on the drive, in any order. [`Table::loaded`] comes after the last of them.
    pub(crate) fn load(&self, entry: &Entry) -> Option<Victim> {
        self.write().insert(entry, None, false)
    }

    /// Sees to it that paths have an end, whatever the entries say of their parents.
    pub(crate) fn loaded(&self) {
        self.write().retention.cut_circles();
    }

    /// How a new object with this parent is judged, and whether it is worth its place in a full store. The deepest
    /// stored object of its prefix gives the context, which the objects behind it share.
    pub(crate) fn judge(
        &self,
        header: &crate::record::RecordHeader,
        record_bytes: u64,
        context: Option<Context>,
        now_s: u32,
    ) -> (Candidate, Context, bool) {
        let mut inner = self.write();
        let parent = header.parent.and_then(|parent| inner.find(parent));
        let context = context.filter(|_| parent.is_none()).unwrap_or_else(|| inner.retention.context(parent));
        if let Some(parent) = parent {
            // What is about to hang on it should not go before.
            inner.retention.renew(parent, now_s);
        }
        let tokens = added_tokens(header.id.kind, header.tokens, parent.map(|at| inner.slot(at).tokens));
        let bytes = clamp(record_bytes);
        let (owner, key) = (inner.realms.owner_of_writer(header.writer), key_of(header.id));
        if header.class == TtlClass::PERMANENT {
            // It never goes, so nothing is to be learned from it.
            return (inner.retention.recovered(owner, key, context, bytes, tokens), context, true);
        }
        let candidate = inner.retention.missed(owner, key, context, bytes, tokens, now_s);
        let admits = inner.retention.admits(&candidate, now_s);
        (candidate, context, admits)
    }

    /// The prefix that ends in `tip` was read. Returns the segments that it lies in; none for what is no part of a prefix.
    pub(crate) fn touch(&self, tip: ObjectId, now_s: u32) -> Vec<SegmentId> {
        if !matches!(tip.kind, ObjectKind::Block | ObjectKind::State) {
            return Vec::new();
        }
        let mut inner = self.write();
        let Some(tip) = inner.find(tip) else { return Vec::new() };
        // Parts of one restore, asked for one after another, are one use.
        if inner.retention.last_s(tip) == now_s {
            return Vec::new();
        }
        inner.retention.touch(tip, now_s);
        let mut segments = Vec::new();
        let mut at = Some(tip);
        while let Some(at_slot) = at {
            let slot = inner.slot(at_slot);
            if slot.kind & HOLE == 0 && segments.last() != Some(&slot.segment) {
                segments.push(slot.segment);
            }
            at = inner.retention.parent(at_slot);
        }
        segments.sort_unstable();
        segments.dedup();
        segments.into_iter().map(|segment| SegmentId(u64::from(segment))).collect()
    }

    /// Keeps an object and its prefix. `false` if it is not there, or held 65,535 times already.
    pub(crate) fn pin(&self, id: ObjectId) -> bool {
        let mut inner = self.write();
        let Some(slot) = inner.find(id) else { return false };
        inner.retention.pin(slot)
    }

    /// From now on `owner_of` says whom a writer's records count for; what is stored is gone through once.
    pub(crate) fn set_owners(&self, owner_of: OwnerOf) {
        let mut inner = self.write();
        let Inner { chunks, realms, retention, .. } = &mut *inner;
        let before: Vec<u32> = realms.owners.clone();
        realms.set_owners(owner_of);
        for (at, slot) in chunks.iter().flatten().enumerate().filter(|(_, slot)| slot.kind != 0) {
            let (before, after) = (before[slot.realm as usize], realms.owner(slot.realm));
            retention.set_pages(before, retention.pages(before) - slot.owned_pages());
            retention.set_pages(after, retention.pages(after) + slot.owned_pages());
            retention.set_owner(narrow(at), after);
        }
    }

    /// Bytes of the records that count for an owner.
    pub(crate) fn owner_bytes(&self, owner: OwnerId) -> u64 {
        let inner = self.read();
        let number = inner.realms.owner_ids.get(&owner);
        number.map_or(0, |&number| inner.retention.pages(number) * PAGE as u64)
    }

    /// What owners hold of so much.
    pub(crate) fn shares(&self, capacity_bytes: u64) -> Shares {
        let inner = self.read();
        let held: Vec<u64> = inner.retention.all_pages().map(|pages| pages * PAGE as u64).collect();
        Shares::of(held.into_iter(), capacity_bytes)
    }

    /// Lets an object go first when space is needed.
    pub(crate) fn demote(&self, id: ObjectId) {
        let mut inner = self.write();
        if let Some(slot) = inner.find(id) {
            inner.retention.demote(slot);
        }
    }

    /// Takes one pin back.
    pub(crate) fn unpin(&self, id: ObjectId) {
        let mut inner = self.write();
        if let Some(slot) = inner.find_any_id(id)
            && inner.retention.is_pinned(slot)
        {
            inner.retention.unpin(slot);
            if inner.is_needless(slot) {
                inner.release(slot);
            }
        }
    }

    /// Leases that ended in `before` end in `after` now, as far as there are any of these. Whoever holds them has them pinned.
    pub(crate) fn move_lease(&self, before: &[ObjectId], after: &[ObjectId]) {
        let mut inner = self.write();
        for &end in after {
            if let Some(at) = inner.find_any_id(end) {
                inner.add_leased(at);
            }
        }
        for &end in before {
            if let Some(at) = inner.find_any_id(end) {
                let Inner { leased, chunks, retention, .. } = &mut *inner;
                leased.take(at, |at| place_of(chunks, retention, at));
            }
        }
    }

    /// Bytes of the records that leases hold together.
    pub(crate) fn leased_bytes(&self) -> u64 {
        self.read().leased.bytes()
    }

    /// Bytes of the records of the prefix that ends in `tip`.
    pub(crate) fn path_bytes(&self, tip: ObjectId) -> Option<u64> {
        let inner = self.read();
        let mut at = Some(inner.find(tip)?);
        let mut bytes = 0;
        while let Some(at_slot) = at {
            let slot = inner.slot(at_slot);
            bytes += slot.held_bytes();
            at = inner.retention.parent(at_slot);
        }
        Some(bytes)
    }

    /// Removes what is worth least until its records have `bytes`; less if nothing more may go.
    pub(crate) fn evict(&self, bytes: u64, now_s: u32) -> Vec<Victim> {
        let mut inner = self.write();
        let (mut victims, mut freed) = (Vec::new(), 0);
        while freed < bytes
            && let Some(at) = inner.retention.victim(now_s)
        {
            let slot = *inner.slot(at);
            inner.release(at);
            freed += slot.record().record_bytes;
            victims.push(slot.record());
        }
        victims
    }

    /// Removes all that lies in a segment and what hangs on it, wherever that lies. `None`, and nothing done, if anything of it is
    /// pinned. Looks at everything once.
    pub(crate) fn evict_segment(&self, segment: SegmentId) -> Option<Vec<Victim>> {
        let mut inner = self.write();
        let number = narrow_segment(segment);
        // Of each slot whether it goes, once that is known: each path is walked as far as it is not.
        let mut known: Vec<Option<bool>> = vec![None; inner.chunks.len() * CHUNK_SLOTS];
        let (mut leaving, mut path) = (HashSet::new(), Vec::new());
        for slot in (0..narrow(known.len())).filter(|&slot| inner.exists(slot)) {
            let (mut at, mut goes) = (Some(slot), false);
            while let Some(next) = at {
                if let Some(known) = known[next as usize] {
                    goes = known;
                    break;
                }
                path.push(next);
                at = inner.retention.parent(next);
            }
            for next in path.drain(..).rev() {
                let here = inner.slot(next);
                let hole = here.kind & HOLE != 0;
                goes |= !hole && here.segment == number;
                known[next as usize] = Some(goes);
                if goes && inner.retention.is_pinned(next) {
                    return None;
                }
                if goes && !hole {
                    leaving.insert(next);
                }
            }
        }
        Some(inner.release_loose(&leaving))
    }

    /// Removes those of `entries` that are still at their places, if neither a pin nor anything outside holds any of
    /// them. Tells whether it did.
    pub(crate) fn remove_all(&self, entries: &[Entry]) -> bool {
        let mut inner = self.write();
        let leaving = inner.at_their_places(entries);
        if leaving.iter().any(|&at| inner.retention.is_pinned(at)) {
            return false;
        }
        let mut children: HashMap<u32, u32> = HashMap::new();
        for parent in leaving.iter().filter_map(|&at| inner.retention.parent(at)) {
            *children.entry(parent).or_default() += 1;
        }
        if leaving.iter().any(|at| inner.retention.children(*at) != children.get(at).copied().unwrap_or(0)) {
            return false;
        }
        inner.release_loose(&leaving);
        true
    }

    /// Removes those of `entries` that are still at their places and that neither a pin nor anything behind them holds.
    pub(crate) fn remove_loose(&self, entries: &[Entry]) -> Vec<Victim> {
        let mut inner = self.write();
        let leaving = inner.at_their_places(entries);
        inner.release_loose(&leaving)
    }

    /// Removes an object if it still is at `spot`. Tells whether it was. What is pinned leaves its slot behind, and the pins on
    /// it: they are the name's, and whoever let go of one later would otherwise let go of what was put since. What the store
    /// writes about itself has a pin that nobody lets go of.
    pub(crate) fn remove_if(&self, id: ObjectId, spot: Spot) -> bool {
        let mut inner = self.write();
        let Some(at) = inner.find(id).filter(|&at| inner.slot(at).spot() == spot) else { return false };
        let own = is_own(id);
        if inner.retention.is_leaf(at) && (own || !inner.retention.is_pinned(at)) {
            inner.release(at);
        } else {
            let slot = *inner.slot(at);
            inner.forget(&slot);
            inner.leased.resize(at, slot.held_bytes(), 0);
            inner.slot_mut(at).kind |= HOLE;
            inner.holes += 1;
        }
        true
    }

    /// Bytes of records by namespace and scope; of those that had any.
    pub(crate) fn realms(&self) -> Vec<(NamespaceId, ScopeTag, u64)> {
        let inner = self.read();
        let realms = inner.realms.all.iter().zip(&inner.realms.pages);
        let mut bytes: BTreeMap<(NamespaceId, ScopeTag), u64> = BTreeMap::new();
        for (&Realm { namespace, scope, .. }, &pages) in realms {
            *bytes.entry((namespace, scope)).or_default() += pages * PAGE as u64;
        }
        bytes.into_iter().map(|((namespace, scope), bytes)| (namespace, scope, bytes)).collect()
    }

    /// Bytes of the records that a writer has put, whoever else has put the same.
    pub(crate) fn writer_bytes(&self, writer: WriterId) -> u64 {
        let inner = self.read();
        inner.realms.writers.get(&writer).copied().unwrap_or(0) * PAGE as u64
    }

    /// Bytes of the records of a scope.
    pub(crate) fn scope_bytes(&self, scope: ScopeTag) -> u64 {
        let inner = self.read();
        inner.realms.scopes.get(&scope).copied().unwrap_or(0) * PAGE as u64
    }

    /// Tells of everything, a chunk at a time: others use the table in between.
    pub(crate) fn each(&self, mut see: impl FnMut(Seen)) {
        let chunks = self.read().chunks.len();
        for chunk in 0..chunks {
            let inner = self.read();
            for at in 0..inner.chunks[chunk].len() {
                let slot = u32::try_from(chunk * CHUNK_SLOTS + at).expect("slots are counted in u32");
                if inner.slot(slot).kind != 0 {
                    see(inner.seen(slot));
                }
            }
        }
    }

    /// Erasures that are kept.
    pub(crate) fn erasures(&self) -> u64 {
        self.read().erasures
    }

    /// Objects, and bytes of memory that they take.
    pub(crate) fn size(&self) -> (u64, u64) {
        let inner = self.read();
        let slots = inner.chunks.len() * CHUNK_SLOTS * SLOT_BYTES;
        let bytes = slots
            + inner.by_hash.allocation_size()
            + inner.free.capacity() * size_of::<u32>()
            + inner.retention.memory_bytes()
            + inner.tails.memory_bytes()
            + inner.leased.memory_bytes();
        ((inner.by_hash.len() - inner.holes) as u64, bytes as u64)
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

    /// Whether there is anything in a slot, if there is such a slot.
    fn exists(&self, at: u32) -> bool {
        let chunk = &self.chunks[at as usize / CHUNK_SLOTS];
        chunk.get(at as usize % CHUNK_SLOTS).is_some_and(|slot| slot.kind != 0)
    }

    fn find(&self, id: ObjectId) -> Option<u32> {
        let hash = short(id);
        let same = |&at: &u32| self.slot(at).is(id.kind, &hash);
        self.by_hash.find(bucket(id.kind as u8, &hash), same).copied()
    }

    /// The slot of an object or of the hole that it left.
    fn find_any_id(&self, id: ObjectId) -> Option<u32> {
        let hash = short(id);
        let same = |&at: &u32| self.slot(at).kind & !HOLE == id.kind as u8 && self.slot(at).hash == hash;
        self.by_hash.find(bucket(id.kind as u8, &hash), same).copied()
    }

    fn find_any(&self, like: &Slot) -> Option<u32> {
        let same = |&at: &u32| self.slot(at).kind & !HOLE == like.kind && self.slot(at).hash == like.hash;
        self.by_hash.find(like.bucket(), same).copied()
    }

    /// See [`Table::insert`]. `candidate`: as it was judged before it was stored; `None` if it was found on the drive. `checked`:
    /// a path never leads back to its beginning.
    fn insert(&mut self, entry: &Entry, candidate: Option<Candidate>, checked: bool) -> Option<Victim> {
        let slot = Slot {
            hash: short(entry.id),
            checksum: entry.checksum.half(),
            tokens: entry.tokens,
            segment: narrow_segment(entry.spot.segment),
            page: narrow(usize::try_from(entry.spot.offset / PAGE as u64).unwrap_or(usize::MAX)),
            record_pages: entry.record_pages,
            raw_bytes: u32::try_from(entry.raw_bytes).expect("bounded by the segment"),
            realm: self.realms.id_of(Realm::of(entry)),
            planes: entry.planes,
            head_pages: entry.head_pages,
            kind: entry.id.kind as u8,
        };
        self.add(&slot);
        self.tails.add(slot.hash, entry);
        let Some(known) = self.find_any(&slot) else {
            self.erasures += u64::from(entry.id.kind == ObjectKind::Erasure);
            let at = self.place(slot);
            let parent = self.parent_of(entry, slot.realm);
            let candidate = candidate.unwrap_or_else(|| self.candidate_of(entry, at, parent));
            if let Some(parent) = parent {
                self.retention.renew(parent, entry.time_s);
            }
            self.retention.insert(at, parent, &candidate, entry.time_s);
            self.pin_for_ever(entry, at);
            return None;
        };
        let before = std::mem::replace(self.slot_mut(known), slot);
        self.leased.resize(known, before.held_bytes(), slot.held_bytes());
        let owner = self.realms.owner(slot.realm);
        self.retention.set_owner(known, owner);
        if before.kind & HOLE == 0 {
            self.subtract(&before);
            return Some(before.record());
        }
        self.holes -= 1;
        if before.record_pages == 0 {
            let parent = self.parent_of(entry, slot.realm);
            let parent = parent.filter(|&parent| !checked || !self.retention.hangs_on(parent, known));
            let candidate = candidate.unwrap_or_else(|| self.candidate_of(entry, known, parent));
            self.retention.fill(known, parent, &candidate);
            if let Some(parent) = parent.filter(|_| self.leased.holds(known)) {
                self.add_leased(parent);
            }
            self.pin_for_ever(entry, known);
        }
        self.retention.renew(known, entry.time_s);
        None
    }

    /// Gives a slot its place in memory and in the hash table.
    fn place(&mut self, slot: Slot) -> u32 {
        let at = self.allocate(slot);
        let Inner { by_hash, chunks, .. } = self;
        by_hash.insert_unique(slot.bucket(), at, |&other| chunk_slot(chunks, other).bucket());
        at
    }

    /// The slot of the parent that an entry names: a hole, if that is not there.
    fn parent_of(&mut self, entry: &Entry, realm: u32) -> Option<u32> {
        // An erasure names what it erased, which would never go again if anything hung on it that stays.
        let parent = entry.parent.filter(|_| !is_own(entry.id))?;
        if let Some(known) = self.find_any_id(parent) {
            return Some(known);
        }
        if !self.adopts {
            return None;
        }
        // One block shorter, as far as anybody knows: what hangs on it is judged by that.
        let tokens = entry.tokens.saturating_sub(ORDINARY_BLOCK_TOKENS);
        let kind = parent.kind as u8 | HOLE;
        let hole = Slot { hash: short(parent), tokens, realm, kind, ..Slot::NOTHING };
        let at = self.place(hole);
        self.holes += 1;
        let owner = self.realms.owner(realm);
        let candidate = self.retention.recovered(owner, key_of(parent), self.retention.context(None), 0, 1);
        self.retention.insert(at, None, &candidate, entry.time_s);
        Some(at)
    }

    /// What an object found on the drive is taken for.
    fn candidate_of(&self, entry: &Entry, at: u32, parent: Option<u32>) -> Candidate {
        let context = self.retention.context(parent);
        let bytes = clamp(u64::from(entry.record_pages) * PAGE as u64);
        let tokens = added_tokens(entry.id.kind, entry.tokens, parent.map(|at| self.slot(at).tokens));
        let owner = self.realms.owner(self.slot(at).realm);
        self.retention.recovered(owner, key_of(entry.id), context, bytes, tokens)
    }

    fn add_leased(&mut self, at: u32) {
        let Self { leased, chunks, retention, .. } = self;
        leased.add(at, |at| place_of(chunks, retention, at));
    }

    fn pin_for_ever(&mut self, entry: &Entry, at: u32) {
        if entry.class == TtlClass::PERMANENT {
            // Its only pin: nobody else can know it yet.
            let _ = self.retention.pin(at);
        }
    }

    /// Whether a slot is a hole that nothing hangs on.
    fn is_needless(&self, at: u32) -> bool {
        self.slot(at).kind & HOLE != 0 && self.retention.is_leaf(at) && !self.retention.is_pinned(at)
    }

    /// The slots of those of `entries` that are still at their places.
    fn at_their_places(&self, entries: &[Entry]) -> HashSet<u32> {
        let here = |entry: &Entry| self.find(entry.id).filter(|&at| self.slot(at).spot() == entry.spot);
        entries.iter().filter_map(here).collect()
    }

    /// Frees those of `leaving` that nothing holds, each after what of them hangs on it: places tell no order, since a parent
    /// may have been put again behind its children.
    fn release_loose(&mut self, leaving: &HashSet<u32>) -> Vec<Victim> {
        let loose = |inner: &Self, at: u32| inner.retention.is_leaf(at) && !inner.retention.is_pinned(at);
        let mut ready: Vec<u32> = leaving.iter().copied().filter(|&at| loose(self, at)).collect();
        let mut victims = Vec::with_capacity(leaving.len());
        while let Some(at) = ready.pop() {
            victims.push(self.slot(at).record());
            let parent = self.release(at);
            ready.extend(parent.filter(|parent| leaving.contains(parent) && loose(self, *parent)));
        }
        victims
    }

    /// Frees the slot of a leaf, and the holes that were there for its sake. Returns what they all hung on.
    fn release(&mut self, mut at: u32) -> Option<u32> {
        loop {
            let parent = self.retention.parent(at);
            self.release_one(at);
            match parent.filter(|&parent| self.is_needless(parent)) {
                Some(hole) => at = hole,
                None => return parent,
            }
        }
    }

    fn release_one(&mut self, at: u32) {
        let slot = *self.slot(at);
        match slot.kind & HOLE {
            0 => self.forget(&slot),
            _ => self.holes -= 1,
        }
        self.erasures -= u64::from(slot.kind & !HOLE == ObjectKind::Erasure as u8);
        let bucket = slot.bucket();
        if let Ok(found) = self.by_hash.find_entry(bucket, |&other| other == at) {
            found.remove();
        }
        self.retention.remove(at);
        self.leased.forget(at, slot.held_bytes());
        self.slot_mut(at).kind = 0;
        self.free.push(at);
    }

    /// Counts the pages of an object, for its realm and for its owner.
    fn add(&mut self, slot: &Slot) {
        self.realms.add(slot);
        let owner = self.realms.owner(slot.realm);
        let pages = self.retention.pages(owner) + slot.owned_pages();
        self.retention.set_pages(owner, pages);
    }

    /// Takes them back.
    fn subtract(&mut self, slot: &Slot) {
        self.realms.subtract(slot);
        let owner = self.realms.owner(slot.realm);
        let pages = self.retention.pages(owner) - slot.owned_pages();
        self.retention.set_pages(owner, pages);
    }

    /// Takes what an object adds to the whole back.
    fn forget(&mut self, slot: &Slot) {
        self.subtract(slot);
        if slot.kind == ObjectKind::State as u8 {
            self.tails.remove(&slot.hash);
        }
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

    fn seen(&self, at: u32) -> Seen {
        let slot = self.slot(at);
        let Realm { namespace, scope, .. } = self.realms.get(slot.realm);
        Seen {
            slot: at,
            parent: self.retention.parent(at),
            kind: ObjectKind::from_u8(slot.kind),
            hash: slot.hash,
            tokens: slot.tokens,
            bytes: u64::from(slot.record_pages) * PAGE as u64,
            segment: slot.segment,
            namespace,
            scope,
            last_s: self.retention.last_s(at),
            pinned: self.retention.is_pinned(at),
        }
    }

    fn located(&self, at: u32) -> Located {
        let slot = self.slot(at);
        let realm = self.realms.get(slot.realm);
        Located {
            spot: slot.spot(),
            checksum: slot.checksum,
            header_bytes: narrow(header_bytes(usize::from(slot.planes))),
            record_pages: slot.record_pages,
            head_bytes: u32::from(slot.head_pages) * narrow(PAGE),
            tokens: slot.tokens,
            raw_bytes: u64::from(slot.raw_bytes),
            namespace: realm.namespace,
            scope: realm.scope,
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
    const NOTHING: Self = Self {
        hash: [0; 16],
        checksum: 0,
        tokens: 0,
        segment: 0,
        page: 0,
        record_pages: 0,
        raw_bytes: 0,
        realm: 0,
        planes: 0,
        head_pages: 0,
        kind: 0,
    };

    fn is(&self, kind: ObjectKind, hash: &[u8; 16]) -> bool {
        self.kind == kind as u8 && self.hash == *hash
    }

    fn bucket(&self) -> u64 {
        bucket(self.kind & !HOLE, &self.hash)
    }

    /// Pages that count for the owner: those of blocks and states, which may go when room is needed.
    fn owned_pages(&self) -> u64 {
        let owned = self.kind == ObjectKind::Block as u8 || self.kind == ObjectKind::State as u8;
        if owned { u64::from(self.record_pages) } else { 0 }
    }

    /// Bytes of its record; none of a hole.
    fn held_bytes(&self) -> u64 {
        if self.kind & HOLE == 0 { self.record().record_bytes } else { 0 }
    }

    fn record(&self) -> Victim {
        Victim { spot: self.spot(), record_bytes: u64::from(self.record_pages) * PAGE as u64 }
    }

    fn spot(&self) -> Spot {
        Spot { segment: SegmentId(u64::from(self.segment)), offset: u64::from(self.page) * PAGE as u64 }
    }
}

impl Located {
    pub(crate) fn record_bytes(&self) -> usize {
        self.record_pages as usize * PAGE
    }

    /// Bytes of its record or of its planes, whichever are more.
    pub(crate) fn held_bytes(&self) -> usize {
        self.record_bytes().max(usize::try_from(self.raw_bytes).unwrap_or(usize::MAX))
    }
}

/// What records have in common: where they belong, and whose word they are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Realm {
    namespace: NamespaceId,
    scope: ScopeTag,
    writer: WriterId,
    /// Whether the store writes it about itself, an erasure of what a writer has put among them: no bytes of the writer's.
    own: bool,
}

impl Realm {
    fn of(entry: &Entry) -> Self {
        let Entry { namespace, scope, writer, .. } = *entry;
        Self { namespace, scope, writer, own: is_own(entry.id) }
    }
}

/// Realms, each kept once: there are few, and 56 bytes for every block would be many.
struct Realms {
    all: Vec<Realm>,
    /// Pages of the records of each, of each scope, and of each writer.
    pages: Vec<u64>,
    scopes: HashMap<ScopeTag, u64>,
    writers: HashMap<WriterId, u64>,
    ids: HashMap<Realm, u32>,
    /// Whom each counts for: numbers of owners, given out in order.
    owners: Vec<u32>,
    owner_ids: HashMap<OwnerId, u32>,
    owner_of: OwnerOf,
}

impl Realms {
    /// None, and all that is to come is nobody's.
    fn new() -> Self {
        Self {
            all: Vec::new(),
            pages: Vec::new(),
            scopes: HashMap::new(),
            writers: HashMap::new(),
            ids: HashMap::new(),
            owners: Vec::new(),
            owner_ids: HashMap::new(),
            owner_of: Box::new(|_| OwnerId::NOBODY),
        }
    }

    fn get(&self, id: u32) -> Realm {
        self.all[id as usize]
    }

    fn id_of(&mut self, realm: Realm) -> u32 {
        if let Some(&id) = self.ids.get(&realm) {
            return id;
        }
        let id = narrow(self.all.len());
        let owner = self.owner_of_writer(realm.writer);
        self.all.push(realm);
        self.pages.push(0);
        self.owners.push(owner);
        self.ids.insert(realm, id);
        id
    }

    /// Number of the owner of a realm.
    fn owner(&self, id: u32) -> u32 {
        self.owners[id as usize]
    }

    /// Number of the owner of what a writer puts.
    fn owner_of_writer(&mut self, writer: WriterId) -> u32 {
        let next = narrow(self.owner_ids.len());
        *self.owner_ids.entry((self.owner_of)(writer)).or_insert(next)
    }

    fn set_owners(&mut self, owner_of: OwnerOf) {
        self.owner_of = owner_of;
        self.owner_ids.clear();
        self.owners = (0..self.all.len()).map(|id| self.owner_of_writer(self.all[id].writer)).collect();
    }

    fn add(&mut self, slot: &Slot) {
        let pages = u64::from(slot.record_pages);
        self.pages[slot.realm as usize] += pages;
        let Realm { scope, writer, own, .. } = self.get(slot.realm);
        *self.scopes.entry(scope).or_default() += pages;
        if !own {
            *self.writers.entry(writer).or_default() += pages;
        }
    }

    fn subtract(&mut self, slot: &Slot) {
        let pages = u64::from(slot.record_pages);
        self.pages[slot.realm as usize] -= pages;
        let Realm { scope, writer, own, .. } = self.get(slot.realm);
        take(&mut self.scopes, scope, pages);
        if !own {
            take(&mut self.writers, writer, pages);
        }
    }
}

fn take<K: Eq + std::hash::Hash>(sums: &mut HashMap<K, u64>, of: K, pages: u64) {
    if let Some(sum) = sums.get_mut(&of) {
        *sum -= pages;
        if *sum == 0 {
            sums.remove(&of);
        }
    }
}

fn chunk_slot(chunks: &[Vec<Slot>], at: u32) -> &Slot {
    &chunks[at as usize / CHUNK_SLOTS][at as usize % CHUNK_SLOTS]
}

fn place_of(chunks: &[Vec<Slot>], retention: &Retention, at: u32) -> Place {
    (retention.parent(at), chunk_slot(chunks, at).held_bytes())
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

/// What [`Retention`] knows an object by: a block and its state are two.
fn key_of(id: ObjectId) -> u64 {
    bucket(id.kind as u8, &short(id))
}

/// Tokens that an object adds to its prefix; a state adds as many as a block, for which it stands, wherever it lies.
fn added_tokens(kind: ObjectKind, tokens: u64, parent: Option<u64>) -> u32 {
    let parent = if kind == ObjectKind::State { Some(tokens) } else { parent };
    match parent.map_or(tokens, |parent| tokens.saturating_sub(parent)) {
        0 => u32::try_from(tokens.min(ORDINARY_BLOCK_TOKENS)).unwrap_or(1).max(1),
        added => u32::try_from(added).unwrap_or(u32::MAX),
    }
}

fn clamp(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
