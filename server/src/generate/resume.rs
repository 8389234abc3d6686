//! Resuming: the stored prefix from which least is left to compute is put back.
//!
//! A model without state groups resumes after any block. One with them needs the state at the boundary too; where it is
//! missing, it is rebuilt by an exact replay of the last tokens over the rows that are stored. Between two block boundaries a
//! state brings the rows of the tokens behind the last block along. Whichever leaves least to compute is taken.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_decoder::{DecoderError, Incoming, LayerRows, Model, Parked, Sequence};
use esker_prefix::{ObjectId, ObjectKind, PlaneSpec, TokenId};
use esker_store::{Fetch, FetchEvent, FetchOrder, FetchRequest, Found, MissKind, PlaneSelection};

use super::offer::Offer;
use super::parked::{Counts, StoredPlanes};
use super::trail::Trail;
use super::{Event, GenerateError, RestoreMode, listen};
use crate::node::{Engine, Node};

/// Longest wait for the store during a restore. What has not arrived by then is computed instead.
const RESTORE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest search for further damage, on the way to the first token.
const DAMAGE_SEARCH: Duration = Duration::from_millis(250);
/// From so many bytes on a prefix is worth reading in the order of its layers, which takes a read per plane, not per block.
pub(super) const ORDERED_FROM_BYTES: u64 = 1 << 20;
/// Records below this length, on average, are taken as they are read, not in the order of the layers.
pub(super) const SMALL_RECORD_BYTES: u64 = 64 << 10;

/// What is put back.
struct Plan {
    blocks: Vec<Found>,
    /// At the end of the last block, or of some tokens behind it.
    state: Option<Found>,
}

impl Plan {
    /// Tokens of it.
    fn tokens(&self, block_tokens: usize) -> usize {
        let state = self.state.as_ref().map(|state| usize::try_from(state.tokens).unwrap_or(usize::MAX));
        state.unwrap_or(self.blocks.len() * block_tokens)
    }
}

/// What was found of a prompt and is in the sequence, or on its way there.
#[derive(Default)]
pub(super) struct Resumed<'scope> {
    /// Bytes of the records, as they lie on the drive.
    pub(super) bytes_read: u64,
    /// Bytes of their planes, as they were put.
    pub(super) raw_bytes: u64,
    /// Tokens that were computed although their rows are stored, because their state is not.
    pub(super) replayed_tokens: usize,
    /// Set when nobody waits for rows any more.
    over: Arc<AtomicBool>,
    /// Reads the rows that are still to come.
    reading: Option<ScopedJoinHandle<'scope, ()>>,
}

impl Drop for Resumed<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.reading.take().into_iter().for_each(join);
    }
}

/// Waits for a thread. Not left to its scope: glibc's pthread_detach looks at a thread that may have freed itself (its bug
/// 19951).
fn join(thread: ScopedJoinHandle<'_, ()>) {
    if let Err(panicked) = thread.join()
        && !std::thread::panicking()
    {
        std::panic::resume_unwind(panicked);
    }
}

/// What a resumption takes from its surroundings.
#[derive(Clone, Copy)]
pub(super) struct Resumption<'a> {
    pub(super) node: &'a Node,
    pub(super) engine: &'a Engine,
    pub(super) prompt: &'a [TokenId],
    /// Where it is noted what was offered and what was lost of it.
    pub(super) offer: &'a Arc<Offer>,
    /// What reading parked rows costs.
    pub(super) counts: &'a Arc<Counts>,
    /// Most bytes of the rows that indexers pick among to be kept in memory; the others stay parked. `None` for all.
    pub(super) resident_bytes: Option<u64>,
}

impl<'a> Resumption<'a> {
    /// Puts back what is stored of the prompt, all but its last token at most. A hole, damage or a late disk shortens the
    /// prefix; it is not an error. In order, rows may come after this returns, on a thread of `scope`; a prefill that they
    /// do not reach in time fails with [`DecoderError::RowsMissing`](esker_decoder::DecoderError).
    pub(super) fn resume<'scope>(
        self,
        mode: RestoreMode,
        trail: &Trail<'_>,
        scope: &'scope Scope<'scope, 'a>,
        sequence: &mut Sequence,
        emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Resumed<'scope>, GenerateError> {
        let Self { node, engine, prompt, .. } = self;
        let model = &engine.loaded.model;
        if mode == RestoreMode::Nothing {
            return Ok(Resumed::default());
        }
        let plan = plan(node, model, trail, prompt);
        let total = plan.tokens(trail.block_tokens());
        self.offer.found(total);
        if total == 0 {
            return Ok(Resumed::default());
        }
        listen(emit(Event::Restoring { done: 0, total }))?;
        let raw_bytes: u64 = plan.blocks.iter().map(|block| block.raw_bytes).sum();
        let parkable_bytes = plan.blocks.len() as u64 * model.parkable_block_bytes();
        let pool_bytes = self.resident_bytes.filter(|&bytes| bytes < parkable_bytes);
        let mut resumed = match mode {
            RestoreMode::Ordered if raw_bytes >= ORDERED_FROM_BYTES || pool_bytes.is_some() => {
                self.in_order(plan, pool_bytes, trail, scope, sequence)?
            }
            _ => self.whole(plan, trail, sequence, emit)?,
        };
        listen(emit(Event::Restoring { done: sequence.tokens(), total }))?;
        // Does nothing where the state was restored, or none is needed.
        resumed.replayed_tokens = sequence.replay_tokens(model);
        sequence.replay(model, &prompt[..sequence.tokens()])?;
        tracing::debug!(tokens = sequence.tokens(), replayed = resumed.replayed_tokens, ?mode, "resumed");
        Ok(resumed)
    }

    /// Reads for a while what would be put back. Of parked rows only those are read that are picked, so that a damaged one
    /// would cost the sequence each time that another is found.
    pub(super) fn find_damage(self, trail: &Trail<'_>) {
        let plan = plan(self.node, &self.engine.loaded.model, trail, self.prompt);
        let until = Instant::now() + DAMAGE_SEARCH;
        let fetch = self.node.store.fetch(FetchRequest {
            objects: plan.blocks,
            planes: PlaneSelection::All,
            order: FetchOrder::ByObject,
            // What there was no time for is not late.
            deadline: Some(Instant::now() + RESTORE_DEADLINE),
        });
        fetch.take_while(|_| Instant::now() < until).for_each(drop);
    }

    /// Block after block, and all of them before this returns: the store reads and proves the next ones meanwhile.
    fn whole<'scope>(
        self,
        plan: Plan,
        trail: &Trail<'_>,
        sequence: &mut Sequence,
        emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Resumed<'scope>, GenerateError> {
        let Self { node, engine, prompt, offer, .. } = self;
        let model = &engine.loaded.model;
        let (blocks, total) = (plan.blocks.len(), plan.tokens(trail.block_tokens()));
        sequence.reserve(model, prompt.len());
        let objects: Vec<Found> = plan.blocks.into_iter().chain(plan.state).collect();
        let size = |found: &Found| (found.stored_bytes, found.raw_bytes, found.tokens);
        let sizes: Vec<(u64, u64, u64)> = objects.iter().map(size).collect();
        let mut fetch = node.store.fetch(FetchRequest {
            objects,
            planes: PlaneSelection::All,
            order: FetchOrder::ByObject,
            deadline: Some(Instant::now() + RESTORE_DEADLINE),
        });
        let (mut resumed, mut planes, mut lost) = (Resumed::default(), Vec::new(), false);
        while let Some(event) = fetch.next() {
            let (object, bytes) = match event {
                FetchEvent::Plane { object, bytes, .. } => (object, bytes),
                FetchEvent::Miss { kind, .. } => {
                    find_damage(fetch, kind, offer);
                    lost = true;
                    break;
                }
            };
            planes.push(bytes);
            let is_block = object < blocks;
            let (stored_bytes, raw_bytes, tokens) = sizes[object];
            let kind = if is_block { ObjectKind::Block } else { ObjectKind::State };
            if planes.len() < trail.planes(kind, tokens) {
                continue;
            }
            let whole = std::mem::take(&mut planes);
            let restored = match is_block {
                true => trail
                    .block(object, whole)
                    .map_err(DecoderError::from)
                    .and_then(|block| sequence.restore(model, &block)),
                false => trail
                    .state(tokens, whole)
                    .map_err(DecoderError::from)
                    .and_then(|state| sequence.restore_state(model, &state)),
            };
            // Proven bytes of the right key that do not fit: a store written by other code. Compute instead.
            if let Err(error) = restored {
                offer.miss(MissKind::WrongRecord);
                tracing::warn!(%error, "what is stored does not fit the model");
                lost = true;
                break;
            }
            resumed.bytes_read += stored_bytes;
            resumed.raw_bytes += raw_bytes;
            listen(emit(Event::Restoring { done: sequence.tokens(), total }))?;
        }
        if lost && sequence.needs_state() {
            self.step_back(trail, sequence, &mut resumed);
        }
        Ok(resumed)
    }

    /// Something was lost behind what the sequence holds, or its state: puts back the state of a shorter prefix, if that leaves less
    /// to compute than a replay.
    fn step_back(self, trail: &Trail<'_>, sequence: &mut Sequence, resumed: &mut Resumed<'_>) {
        let Self { node, engine, prompt, offer, .. } = self;
        let model = &engine.loaded.model;
        let Some(found) = plan(node, model, trail, &prompt[..=sequence.tokens()]).state else { return };
        let (tokens, stored_bytes, raw_bytes) = (found.tokens, found.stored_bytes, found.raw_bytes);
        let planes = whole_object(node, found, trail.planes(ObjectKind::State, tokens), offer);
        let Some(state) = planes.and_then(|planes| trail.state(tokens, planes).ok()) else { return };
        let before = tokens - tokens % trail.block_tokens() as u64;
        sequence.truncate(usize::try_from(before).unwrap_or(usize::MAX));
        if sequence.restore_state(model, &state).is_ok() {
            resumed.bytes_read += stored_bytes;
            resumed.raw_bytes += raw_bytes;
        }
    }

    /// The state now, and the rows layer after layer while the first are computed with. With a pool, rows that indexers pick
    /// among do not come at all.
    fn in_order<'scope>(
        self,
        plan: Plan,
        pool_bytes: Option<u64>,
        trail: &Trail<'_>,
        scope: &'scope Scope<'scope, 'a>,
        sequence: &mut Sequence,
    ) -> Result<Resumed<'scope>, GenerateError> {
        let Self { node, engine, prompt, offer, counts, .. } = self;
        let model = &engine.loaded.model;
        let (count, tokens) = (plan.blocks.len(), plan.blocks.len() * trail.block_tokens());
        let (blocks, pool) = match pool_bytes {
            None => (plan.blocks, None),
            Some(bytes) => {
                let blocks: Vec<Found> = plan.blocks.into_iter().map(Found::remembering).collect();
                let planes = model.layout().planes(ObjectKind::Block);
                let source = StoredPlanes::new(&node.store, &blocks, planes, offer, counts);
                let source = source.map_err(GenerateError::Thread)?;
                let pool_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                (blocks, Some((source, pool_bytes)))
            }
        };
        let mut resumed = Resumed::default();
        let stays = |plane: &&PlaneSpec| pool.is_some() && model.is_parkable(plane);
        let planes = model.layout().planes(ObjectKind::Block).iter();
        let read_raw: u64 = planes.clone().filter(|plane| !stays(plane)).map(|plane| plane.len_bytes).sum();
        let all_raw = model.layout().object_bytes(ObjectKind::Block).max(1);
        // What a part of a record takes is told from its share of the whole.
        let of_blocks = blocks.iter().map(|found| found.stored_bytes * read_raw / all_raw).sum::<u64>();
        resumed.bytes_read = of_blocks + plan.state.as_ref().map_or(0, |state| state.stored_bytes);
        resumed.raw_bytes = read_raw * count as u64 + plan.state.as_ref().map_or(0, |state| state.raw_bytes);
        let wanted = planes.filter(|plane| !stays(plane));
        let wanted = wanted.map(|plane| (plane.group, plane.first_layer..plane.first_layer + plane.layers));
        let stored_bytes: u64 = blocks.iter().map(|found| found.stored_bytes).sum();
        let request = FetchRequest {
            order: match stored_bytes / (count as u64).max(1) {
                // The drive gives such records whole, so that no layer is there before all of them are read.
                0..SMALL_RECORD_BYTES => FetchOrder::ByObject,
                _ => FetchOrder::ByRank(model.layout().plane_ranks(ObjectKind::Block).into()),
            },
            objects: blocks,
            planes: if pool.is_some() {
                PlaneSelection::Layers(wanted.collect())
            } else {
                PlaneSelection::All
            },
            deadline: Some(Instant::now() + RESTORE_DEADLINE),
        };
        // Small, and needed first: behind the rows it would wait for most of them.
        let state = plan.state.map(|state| {
            let end = state.tokens;
            let planes = whole_object(node, state, trail.planes(ObjectKind::State, end), offer);
            planes.and_then(|planes| trail.state(end, planes).ok())
        });
        let (complete, layers) = channel();
        let (over, room) = (Arc::clone(&resumed.over), prompt.len());
        let is_parked = pool.is_some();
        resumed.reading = Some(scope.spawn(move || {
            let mut incoming = match is_parked {
                true => Incoming::without_parked(model, count, room),
                false => Incoming::new(model, count, room),
            };
            let mut fetch = node.store.fetch(request);
            while !over.load(Ordering::Relaxed)
                && let Some(event) = fetch.next()
            {
                let (object, plane, bytes) = match event {
                    FetchEvent::Plane { object, plane, bytes, .. } => (object, plane, bytes),
                    FetchEvent::Miss { kind, .. } => return find_damage(fetch, kind, offer),
                };
                match incoming.put(model, object, plane, &bytes) {
                    // Whoever does not take them has gone.
                    Ok(rows) => rows.into_iter().for_each(|rows| drop(complete.send(rows))),
                    Err(error) => {
                        offer.miss(MissKind::WrongRecord);
                        return tracing::warn!(%error, "what is stored does not fit the model");
                    }
                }
            }
        }));
        let mut early = BTreeMap::new();
        let arrivals = move |layer, part| loop {
            if let Some(rows) = early.remove(&(layer, part)) {
                return Some(rows);
            }
            let rows: LayerRows = layers.recv().ok()?;
            early.insert((rows.layer(), rows.part()), rows);
        };
        let last = trail.hashes_within(tokens)[count - 1];
        match pool {
            None => sequence.expect(model, tokens, last, Box::new(arrivals))?,
            Some((source, pool_bytes)) => {
                let parked = Parked::new(model, tokens, pool_bytes, Box::new(source));
                sequence.expect_parked(model, parked, last, Box::new(arrivals))?;
            }
        }
        if let Some(state) = state {
            let restored = state.map(|state| sequence.restore_state(model, &state));
            if !matches!(restored, Some(Ok(()))) {
                // Another state, or a replay, is chosen anew.
                sequence.truncate(0);
                return Err(DecoderError::RowsMissing { layer: 0, tokens }.into());
            }
        }
        Ok(resumed)
    }
}

/// All planes of one object, or nothing.
fn whole_object(node: &Node, object: Found, planes: usize, offer: &Offer) -> Option<Vec<Bytes>> {
    let fetch = node.store.fetch(FetchRequest {
        objects: vec![object],
        planes: PlaneSelection::All,
        order: FetchOrder::ByObject,
        deadline: Some(Instant::now() + RESTORE_DEADLINE),
    });
    let bytes = fetch.map_while(|event| match event {
        FetchEvent::Plane { bytes, .. } => Some(bytes),
        FetchEvent::Miss { kind, .. } => {
            offer.miss(kind);
            None
        }
    });
    Some(bytes.collect::<Vec<_>>()).filter(|all| all.len() == planes)
}

/// Chooses what to put back: everything up to the newest state, or all blocks and a replay.
fn plan(node: &Node, model: &Model, trail: &Trail<'_>, prompt: &[TokenId]) -> Plan {
    let hashes = trail.hashes_within(prompt.len() - 1);
    let ids = |kind| hashes.iter().map(|&hash| ObjectId { kind, hash }).collect::<Vec<_>>();
    let mut blocks = trail.blocks(&node.store, &ids(ObjectKind::Block));
    let on_grid = match trail.has_states() {
        true => {
            trail.find(&node.store, &ids(ObjectKind::State)[..blocks.len()]).into_iter().flatten().next_back()
        }
        false => None,
    };
    let tail = trail.tail(&node.store, prompt, blocks.len());
    let state = on_grid.into_iter().chain(tail).max_by_key(|state| state.tokens);
    let all = blocks.len() * trail.block_tokens();
    let replay = model.replay_cost(all);
    let left = |tokens: usize| prompt.len() - tokens;
    match state {
        Some(state) => {
            let tokens = usize::try_from(state.tokens).unwrap_or(usize::MAX).min(prompt.len());
            if left(tokens) > replay + left(all) {
                return Plan { blocks, state: None };
            }
            blocks.truncate(trail.hashes_to(tokens));
            Plan { blocks, state: Some(state) }
        }
        None => Plan { blocks, state: None },
    }
}

/// Where one block is damaged others may be. What is found now is put again with the blocks computed next; what is
/// not would be taken for stored, and cost another miss later.
fn find_damage(mut rest: Fetch, first: MissKind, offer: &Offer) {
    offer.miss(first);
    let until = Instant::now() + DAMAGE_SEARCH;
    while Instant::now() < until && rest.next().is_some() {}
}
