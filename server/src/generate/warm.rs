//! Warming: the whole blocks of a prefix are computed and stored, and nothing is generated. Steps are short, and before each
//! the caller says whether it may be taken. What is stored is the checkpoint: a prefix that is warmed again after a crash is
//! restored up to where it was and goes on from there.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use esker_decoder::{Logits, Sequence};
use esker_prefix::{BlockHash, KvLayout, ObjectId, ObjectKind, TokenId};
use esker_store::{FetchOrder, FetchRequest, Found, PlaneSelection, PutOutcome, TtlClass};

use super::resume::Resumption;
use super::trail::Trail;
use super::{GenerateError, RestoreMode, listen};
use crate::node::{Engine, Node};
use crate::writers::Place;

/// Tokens computed between two questions whether to go on; whole blocks. It is what a live request may have to wait for.
const STEP_TOKENS: usize = 128;
/// Blocks put together: one group commit, and as much as a crash can make to be computed again.
const PUT_BLOCKS: usize = 8;

/// What to warm. Tokens behind the last whole block are of no use and left out.
pub(crate) struct Prefix<'a> {
    pub(crate) tokens: &'a [TokenId],
    pub(crate) place: &'a Place,
    pub(crate) class: TtlClass,
}

/// What happens on the way.
pub(crate) enum Step {
    /// So many tokens are stored already.
    Found { tokens: usize },
    /// After the next step so many tokens, and so many bytes at most, wait to be stored.
    Next { tokens: usize, bytes: u64 },
    /// So many more tokens are computed and stored, durably.
    Stored { tokens: usize, bytes: u64, compute: Duration },
    /// The store is full, and what it has is worth more to it.
    Declined,
}

/// Tokens of the whole blocks of a prompt.
pub(crate) fn whole_tokens(layout: &KvLayout, tokens: usize) -> usize {
    let block_tokens = layout.block_tokens() as usize;
    tokens / block_tokens * block_tokens
}

/// Warms a prefix on the calling thread. `observe` says `Break` where it is to end early; what is stored by then stays.
pub(crate) fn warm(
    node: &Node,
    engine: &Engine,
    prefix: &Prefix<'_>,
    observe: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let model = &engine.loaded.model;
    let layout = model.layout();
    let whole = whole_tokens(layout, prefix.tokens.len());
    let tokens = &prefix.tokens[..whole];
    if whole == 0 {
        return Ok(());
    }
    let mut trail = Trail::new(engine, prefix.place, prefix.class);
    trail.extend(tokens);
    if is_stored(node, &trail, whole) {
        return listen(observe(Step::Found { tokens: whole }));
    }
    let object_bytes = |kind| layout.object_bytes_at(kind, u64::from(layout.block_tokens()));
    let (block_bytes, state_bytes) = (object_bytes(ObjectKind::Block), object_bytes(ObjectKind::State));
    listen(observe(Step::Next { tokens: 0, bytes: 0 }))?;
    let mut sequence = Sequence::new(model);
    // Nobody is charged for what a warm-up finds or loses.
    let (offer, counts) = (Arc::default(), Arc::default());
    std::thread::scope(|scope| {
        let (offer, counts) = (&offer, &counts);
        let resumption = Resumption { node, engine, prompt: tokens, offer, counts, resident_bytes: None };
        let quiet = &mut |_| ControlFlow::Continue(());
        resumption.resume(RestoreMode::Whole, &trail, scope, &mut sequence, quiet).map(drop)
    })?;
    sequence.reserve(model, whole - sequence.tokens());
    trail.stored = trail.hashes_to(sequence.tokens());
    listen(observe(Step::Found { tokens: sequence.tokens() }))?;

    let interval = node.state_interval_blocks * trail.block_tokens();
    let step = STEP_TOKENS.max(trail.block_tokens());
    let (mut waiting, mut compute) = (0, Duration::ZERO);
    while sequence.tokens() < whole {
        let start = sequence.tokens();
        let end = whole.min((start / step + 1) * step).min((start / interval + 1) * interval);
        let blocks = (waiting + end - start).div_ceil(trail.block_tokens()) as u64;
        let bytes = blocks * block_bytes + state_bytes;
        let next = Step::Next { tokens: waiting + end - start, bytes };
        if observe(next).is_break() {
            // What is computed is worth keeping.
            if waiting > 0
                && let Some(bytes) = put(node, &mut trail, &sequence)?
            {
                listen(observe(Step::Stored { tokens: waiting, bytes, compute }))?;
            }
            return Err(GenerateError::Cancelled);
        }
        let began = Instant::now();
        sequence.prefill(model, &tokens[start..end], Logits::None)?;
        compute += began.elapsed();
        waiting += end - start;
        let boundary = end == whole || end.is_multiple_of(interval);
        if boundary {
            trail.keep_state(&sequence)?;
        }
        if boundary || waiting >= PUT_BLOCKS * trail.block_tokens() {
            let Some(bytes) = put(node, &mut trail, &sequence)? else {
                return listen(observe(Step::Declined));
            };
            listen(observe(Step::Stored { tokens: waiting, bytes, compute }))?;
            (waiting, compute) = (0, Duration::ZERO);
        }
    }
    Ok(())
}

/// The leading blocks of a prefix that are stored, and the names of all its whole blocks.
pub(crate) fn stored_blocks(
    node: &Node,
    engine: &Engine,
    prefix: &Prefix<'_>,
) -> (Vec<Found>, Vec<ObjectId>) {
    let layout = engine.loaded.model.layout();
    let mut trail = Trail::new(engine, prefix.place, prefix.class);
    trail.extend(&prefix.tokens[..whole_tokens(layout, prefix.tokens.len())]);
    let ids = ids(&trail, ObjectKind::Block, prefix.tokens.len());
    (trail.blocks(&node.store, &ids), ids)
}

/// The same for a chain of which only the hashes are known.
pub(crate) fn chain_blocks(
    node: &Node,
    engine: &Engine,
    place: &Place,
    hashes: &[BlockHash],
) -> (Vec<Found>, Vec<ObjectId>) {
    let ids: Vec<ObjectId> = hashes.iter().map(|&hash| ObjectId { kind: ObjectKind::Block, hash }).collect();
    // A hash does not say whose it is.
    let takes = |found: &Found| {
        found.namespace == engine.namespace
            && (found.scope == place.key.tag() || place.sight.is_of(found.scope))
    };
    (place.sight.run(&node.store, engine.namespace, &ids, takes), ids)
}

/// Counts what is stored of a chain as used, and the last state that it can be resumed from, once both have been read; how many
/// blocks are stored.
pub(crate) fn keep_chain(node: &Node, engine: &Engine, place: &Place, hashes: &[BlockHash]) -> usize {
    let (found, _) = chain_blocks(node, engine, place, hashes);
    let blocks = found.len();
    let states: Vec<ObjectId> =
        hashes[..blocks].iter().map(|&hash| ObjectId { kind: ObjectKind::State, hash }).collect();
    let states = place.sight.find(&node.store, engine.namespace, &states).into_iter().flatten();
    let last_state = states.last().map(|state| vec![state]);
    let read = last_state.is_none_or(|state| is_read(node, state)) && is_read(node, found);
    if read { blocks } else { 0 }
}

/// Whether a prefix can be resumed at its very end. If so, it counts as used from now on.
fn is_stored(node: &Node, trail: &Trail<'_>, whole: usize) -> bool {
    let blocks = ids(trail, ObjectKind::Block, whole);
    let mut found = trail.blocks(&node.store, &blocks);
    if found.len() < blocks.len() {
        return false;
    }
    if trail.has_states() {
        let state = ObjectId { kind: ObjectKind::State, hash: blocks[blocks.len() - 1].hash };
        let Some(state) = trail.find(&node.store, &[state]).pop().flatten() else { return false };
        found.push(state);
    }
    is_read(node, found)
}

/// Reading the first plane of the end proves it and counts as a use of all that leads there.
fn is_read(node: &Node, mut found: Vec<Found>) -> bool {
    let last = found.split_off(found.len().saturating_sub(1));
    let request = FetchRequest {
        objects: last,
        planes: PlaneSelection::All,
        order: FetchOrder::ByObject,
        deadline: None,
    };
    matches!(node.store.fetch(request).next(), Some(esker_store::FetchEvent::Plane { .. }))
}

fn ids(trail: &Trail<'_>, kind: ObjectKind, tokens: usize) -> Vec<ObjectId> {
    trail.hashes_within(tokens).iter().map(|&hash| ObjectId { kind, hash }).collect()
}

/// Stores what is new, durably. Returns the bytes of its records, `None` if the store declined something.
fn put(node: &Node, trail: &mut Trail<'_>, sequence: &Sequence) -> Result<Option<u64>, GenerateError> {
    let mut objects = Vec::new();
    while let Some(object) = trail.next_object(sequence)? {
        objects.push(object);
    }
    let objects = trail.place(&node.store, objects);
    let ids: Vec<ObjectId> = objects.iter().map(|object| object.id).collect();
    let _inside = trail.enter()?;
    let outcomes = node.store.put(objects).into_iter().collect::<Result<Vec<_>, _>>()?;
    if outcomes.contains(&PutOutcome::Declined) {
        return Ok(None);
    }
    let new = ids.into_iter().zip(outcomes).filter(|(_, outcome)| *outcome == PutOutcome::Stored);
    let new: Vec<ObjectId> = new.map(|(id, _)| id).collect();
    Ok(Some(node.store.get(&new).into_iter().flatten().map(|found| found.stored_bytes).sum()))
}
