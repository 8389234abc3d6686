//! Resuming: the stored prefix from which least is left to compute is put back.
//!
//! A model without state groups resumes after any block. One with them needs the state at the boundary too; where it is
//! missing, it is rebuilt by an exact replay of the last tokens over the rows that are stored. Whichever leaves less to
//! compute is taken.

use std::ops::ControlFlow;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use esker_decoder::{Model, Sequence};
use esker_prefix::{BlockObject, ObjectId, ObjectKind, StateObject, TokenId};
use esker_store::{Fetch, FetchEvent, FetchOrder, FetchRequest, Found, PlaneSelection};

use super::trail::Trail;
use super::{Event, GenerateError, listen};
use crate::node::{Engine, Node};

/// Longest wait for the store during a restore. What has not arrived by then is computed instead.
const RESTORE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest search for further damage, on the way to the first token.
const DAMAGE_SEARCH: Duration = Duration::from_millis(250);
/// Blocks proven and not yet put back.
const RESTORE_AHEAD_BLOCKS: usize = 8;

/// What is put back.
struct Plan {
    blocks: Vec<Found>,
    /// At the end of the last block.
    state: Option<Found>,
}

/// A proven part of it.
enum Restored {
    Block(BlockObject),
    State(StateObject),
}

/// Puts back what is stored of the prompt, all but its last token at most, and returns the bytes read for it. A hole,
/// damage or a late disk shortens the prefix; it is not an error.
pub(super) fn resume(
    node: &Node,
    engine: &Engine,
    trail: &Trail<'_>,
    prompt: &[TokenId],
    sequence: &mut Sequence,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<u64, GenerateError> {
    let model = &engine.loaded.model;
    let plan = plan(node, model, trail, prompt.len());
    let total = plan.blocks.len() * trail.block_tokens();
    if plan.blocks.is_empty() {
        return Ok(0);
    }
    listen(emit(Event::Restoring { done: 0, total }))?;
    sequence.reserve(model, prompt.len());
    let mut bytes_read = 0;
    let (verified, parts) = sync_channel(RESTORE_AHEAD_BLOCKS);
    // Reading and proving one block while the one before it is put back: each costs about as much as the other.
    std::thread::scope(|scope| {
        scope.spawn(move || read(node, trail, plan, &verified));
        for (part, record_bytes) in parts {
            let restored = match part {
                Restored::Block(block) => sequence.restore(model, &block),
                Restored::State(state) => sequence.restore_state(model, &state),
            };
            // Proven bytes of the right key that do not fit: a store written by other code. Compute instead.
            if let Err(error) = restored {
                tracing::warn!(%error, "what is stored does not fit the model");
                break;
            }
            bytes_read += record_bytes;
            listen(emit(Event::Restoring { done: sequence.tokens(), total }))?;
        }
        Ok::<_, GenerateError>(())
    })?;
    // Does nothing where the state was restored, or none is needed.
    let replayed = sequence.replay_tokens(model);
    sequence.replay(model, &prompt[..sequence.tokens()])?;
    tracing::debug!(tokens = sequence.tokens(), replayed, "resumed");
    Ok(bytes_read)
}

/// Chooses what to put back: everything up to the newest state, or all blocks and a replay.
fn plan(node: &Node, model: &Model, trail: &Trail<'_>, prompt_tokens: usize) -> Plan {
    let hashes = trail.hashes_within(prompt_tokens - 1);
    let ids = |kind| hashes.iter().map(|&hash| ObjectId { kind, hash }).collect::<Vec<_>>();
    let mut blocks = node.store.lookup(&ids(ObjectKind::Block));
    if !trail.has_states() {
        return Plan { blocks, state: None };
    }
    let states = node.store.get(&ids(ObjectKind::State)[..blocks.len()]);
    let newest = states.iter().rposition(Option::is_some);
    let left = |blocks: usize| prompt_tokens - blocks * trail.block_tokens();
    // A replay goes through fewer layers with every window; it costs about half of a prefill of its length.
    let replay = model.replay_tokens(blocks.len() * trail.block_tokens()) / 2;
    match newest {
        Some(newest) if left(newest + 1) <= replay + left(blocks.len()) => {
            blocks.truncate(newest + 1);
            Plan { blocks, state: states.into_iter().nth(newest).flatten() }
        }
        _ => Plan { blocks, state: None },
    }
}

/// Fetches blocks and then the state, and sends each with the bytes of its record, until one is missing or nobody takes
/// them.
fn read(node: &Node, trail: &Trail<'_>, plan: Plan, verified: &SyncSender<(Restored, u64)>) {
    let blocks = plan.blocks.len();
    let objects: Vec<Found> = plan.blocks.into_iter().chain(plan.state).collect();
    let record_bytes: Vec<u64> = objects.iter().map(|found| found.stored_bytes).collect();
    let kinds = |object| if object < blocks { ObjectKind::Block } else { ObjectKind::State };
    let mut fetch = node.store.fetch(FetchRequest {
        objects,
        planes: PlaneSelection::All,
        order: FetchOrder::ByObject,
        deadline: Some(Instant::now() + RESTORE_DEADLINE),
    });
    let mut planes = Vec::new();
    while let Some(event) = fetch.next() {
        let FetchEvent::Plane { object, bytes, .. } = event else { return find_damage(fetch) };
        planes.push(bytes);
        if planes.len() < trail.planes(kinds(object)) {
            continue;
        }
        let whole = std::mem::take(&mut planes);
        let part = match kinds(object) {
            ObjectKind::Block => trail.block(object, whole).map(Restored::Block),
            _ => trail.state(blocks - 1, whole).map(Restored::State),
        };
        let part = match part {
            Ok(part) => part,
            Err(error) => return tracing::warn!(%error, "what is stored does not fit the layout"),
        };
        if verified.send((part, record_bytes[object])).is_err() {
            return;
        }
    }
}

/// Where one block is damaged others may be. What is found now is put again with the blocks computed next; what is
/// not would be taken for stored, and cost another miss later.
fn find_damage(mut rest: Fetch) {
    let until = Instant::now() + DAMAGE_SEARCH;
    while Instant::now() < until && rest.next().is_some() {}
}
