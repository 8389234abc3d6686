//! One generation: lookup, restore, prefill the rest, decode, and hand new blocks to the write-behind queue.

use std::ops::ControlFlow;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use esker_decoder::{BlockIdentity, DecoderError, Logits, Sampler, Sequence};
use esker_prefix::{BlockHash, BlockObject, Chain, ObjectId, ObjectKind, TokenId};
use esker_store::{
    Fetch, FetchEvent, FetchOrder, FetchRequest, Found, PlaneSelection, PutObject, StoreError,
};

use crate::node::{Engine, Node};

/// Longest wait for the store during a restore. What has not arrived by then is computed instead.
const RESTORE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest search for further damage, on the way to the first token.
const DAMAGE_SEARCH: Duration = Duration::from_millis(250);
/// Blocks proven and not yet put back.
const RESTORE_AHEAD_BLOCKS: usize = 8;

/// What to generate, checked.
pub(crate) struct Job {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_new_tokens: usize,
    pub(crate) sampler: Sampler,
    pub(crate) logits_digest: bool,
}

/// What happens on the way.
pub(crate) enum Event {
    /// Tokens whose state was put back, of those found.
    Restoring { done: usize, total: usize },
    /// Tokens computed, of those to compute.
    Prefilling { done: usize, total: usize },
    /// One new token.
    Token { id: TokenId, text: String, logits_digest: Option<[u8; 32]> },
    /// The end.
    Done(Account),
}

/// What a generation used and computed.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) prompt_tokens: usize,
    pub(crate) hit_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) bytes_read: u64,
    pub(crate) restore: Duration,
    pub(crate) prefill: Duration,
    pub(crate) stopped: bool,
    /// Text of a character that the last token left incomplete.
    pub(crate) rest_of_text: String,
}

/// Why a generation ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerateError {
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The listener is gone; nobody is left to tell.
    #[error("cancelled by the client")]
    Cancelled,
}

/// Runs a job to its end on the calling thread. `emit` says `Break` when nobody listens any more.
pub(crate) fn generate(
    node: &Node,
    engine: &Engine,
    mut job: Job,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let model = &engine.loaded.model;
    let mut trail = Trail::new(node, engine);
    trail.extend(&job.prompt);

    let started = Instant::now();
    let mut sequence = Sequence::new(model);
    let bytes_read = restore(node, engine, &trail, job.prompt.len(), &mut sequence, emit)?;
    let restored = Instant::now();
    let hit_tokens = sequence.tokens();
    trail.stored = trail.hashes_to(hit_tokens);

    let rest = &job.prompt[hit_tokens..];
    let mut logits = sequence.prefill_observed(model, rest, Logits::Last, &mut |progress| {
        emit(Event::Prefilling { done: progress.done, total: rest.len() })
    })?;
    let prefilled = Instant::now();

    let mut text = engine.loaded.tokenizer.stream();
    let mut completion_tokens = 0;
    let mut stopped = false;
    while completion_tokens < job.max_new_tokens {
        let row = logits.last().ok_or(GenerateError::Cancelled)?;
        let id = job.sampler.next(row);
        if model.config().eos_token_ids.contains(&id) {
            stopped = true;
            break;
        }
        let logits_digest = job.logits_digest.then(|| digest(row));
        completion_tokens += 1;
        listen(emit(Event::Token { id, text: text.push(id)?, logits_digest }))?;
        // One block at a time, after a token is out: copying a long prompt at once would delay the next one.
        trail.store_one(&sequence)?;
        if completion_tokens < job.max_new_tokens {
            trail.extend(&[id]);
            logits = sequence.prefill(model, &[id], Logits::Last)?;
        }
    }
    let rest_of_text = text.finish()?;
    let account = Account {
        prompt_tokens: job.prompt.len(),
        hit_tokens,
        completion_tokens,
        bytes_read,
        restore: restored - started,
        prefill: prefilled - restored,
        stopped,
        rest_of_text,
    };
    // The listener may leave after the last token; the new blocks are worth keeping all the same.
    let told = emit(Event::Done(account));
    while trail.store_one(&sequence)? {}
    listen(told)
}

/// Puts back the longest stored prefix that leaves at least the last prompt token to compute, and returns the
/// bytes read for it. A hole, damage or a late disk shortens the prefix; it is not an error.
fn restore(
    node: &Node,
    engine: &Engine,
    trail: &Trail<'_>,
    prompt_tokens: usize,
    sequence: &mut Sequence,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<u64, GenerateError> {
    let usable = trail.hashes_to(prompt_tokens - 1);
    let ids: Vec<ObjectId> =
        trail.hashes[..usable].iter().map(|&hash| ObjectId { kind: ObjectKind::Block, hash }).collect();
    let found: Vec<Found> = node.store.lookup(&ids);
    let total = found.len() * trail.block_tokens;
    if found.is_empty() {
        return Ok(0);
    }
    listen(emit(Event::Restoring { done: 0, total }))?;
    sequence.reserve(&engine.loaded.model, prompt_tokens);
    let mut bytes_read = 0;
    let (verified, blocks) = sync_channel(RESTORE_AHEAD_BLOCKS);
    // Reading and proving one block while the one before it is put back: each costs about as much as the other.
    std::thread::scope(|scope| {
        scope.spawn(move || read_blocks(node, trail, found, &verified));
        for (block, record_bytes) in blocks {
            // Proven bytes of the right key that do not fit: a store written by other code. Compute instead.
            if let Err(error) = sequence.restore(&engine.loaded.model, &block) {
                tracing::warn!(%error, "a stored block does not fit the model");
                break;
            }
            bytes_read += record_bytes;
            listen(emit(Event::Restoring { done: sequence.tokens(), total }))?;
        }
        Ok(bytes_read)
    })
}

/// Fetches blocks in order and sends each with the bytes of its record, until one is missing or nobody takes them.
fn read_blocks(node: &Node, trail: &Trail<'_>, found: Vec<Found>, verified: &SyncSender<(BlockObject, u64)>) {
    let record_bytes: Vec<u64> = found.iter().map(|found| found.stored_bytes).collect();
    let planes_per_block = trail.engine.loaded.model.layout().planes(ObjectKind::Block).len();
    let mut fetch = node.store.fetch(FetchRequest {
        objects: found,
        planes: PlaneSelection::All,
        order: FetchOrder::ByObject,
        deadline: Some(Instant::now() + RESTORE_DEADLINE),
    });
    let mut planes = Vec::with_capacity(planes_per_block);
    while let Some(event) = fetch.next() {
        let FetchEvent::Plane { object, bytes, .. } = event else { return find_damage(fetch) };
        planes.push(bytes);
        if planes.len() < planes_per_block {
            continue;
        }
        let whole = std::mem::replace(&mut planes, Vec::with_capacity(planes_per_block));
        let block = match trail.object(object, whole) {
            Ok(block) => block,
            Err(error) => return tracing::warn!(%error, "a stored block does not fit the layout"),
        };
        if verified.send((block, record_bytes[object])).is_err() {
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

/// The chain of hashes along a sequence, and how much of it is stored or on its way.
struct Trail<'a> {
    engine: &'a Engine,
    scope: esker_prefix::ScopeTag,
    chain: Chain,
    genesis: BlockHash,
    block_tokens: usize,
    tail: Vec<TokenId>,
    hashes: Vec<BlockHash>,
    stored: usize,
}

impl<'a> Trail<'a> {
    fn new(node: &Node, engine: &'a Engine) -> Self {
        let chain = Chain::genesis(&node.scope, engine.namespace, &[]);
        Self {
            engine,
            scope: node.scope.tag(),
            genesis: chain.tip(),
            chain,
            block_tokens: engine.loaded.model.layout().block_tokens() as usize,
            tail: Vec::new(),
            hashes: Vec::new(),
            stored: 0,
        }
    }

    fn extend(&mut self, tokens: &[TokenId]) {
        self.tail.extend_from_slice(tokens);
        let whole = self.tail.len() / self.block_tokens * self.block_tokens;
        for block in self.tail[..whole].chunks_exact(self.block_tokens) {
            self.hashes.push(self.chain.push(block));
        }
        self.tail.drain(..whole);
    }

    /// Number of whole blocks in a prefix.
    fn hashes_to(&self, tokens: usize) -> usize {
        tokens / self.block_tokens
    }

    fn identity(&self, index: usize) -> BlockIdentity {
        let parent = if index == 0 { self.genesis } else { self.hashes[index - 1] };
        BlockIdentity {
            namespace: self.engine.namespace,
            scope: self.scope,
            parent,
            hash: self.hashes[index],
        }
    }

    fn object(&self, index: usize, planes: Vec<bytes::Bytes>) -> esker_prefix::Result<BlockObject> {
        let BlockIdentity { namespace, scope, parent, hash } = self.identity(index);
        let tokens = ((index + 1) * self.block_tokens) as u64;
        BlockObject::new(self.engine.loaded.model.layout(), namespace, scope, parent, hash, tokens, planes)
    }

    /// Offers the next whole block that is not stored yet; whether there was one.
    fn store_one(&mut self, sequence: &Sequence) -> Result<bool, GenerateError> {
        if self.stored >= self.hashes_to(sequence.tokens()) {
            return Ok(false);
        }
        let block = sequence.block(&self.engine.loaded.model, self.stored, self.identity(self.stored))?;
        let object = PutObject::block(self.engine.loaded.model.layout(), block);
        // A dropped block leaves its children without a parent, so the rest of this trail is not worth offering.
        self.stored = if self.engine.write_behind.offer(object) { self.stored + 1 } else { usize::MAX };
        Ok(self.stored != usize::MAX)
    }
}

fn listen(told: ControlFlow<()>) -> Result<(), GenerateError> {
    match told {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(GenerateError::Cancelled),
    }
}

/// BLAKE3 of the logits as f32 LE.
fn digest(logits: &[f32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(logits.len() * 4);
    for logit in logits {
        bytes.extend_from_slice(&logit.to_le_bytes());
    }
    hasher.update(&bytes);
    *hasher.finalize().as_bytes()
}
