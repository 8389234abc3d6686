//! The trail of a sequence: its chain of hashes, and what of it is stored, on its way, or to be offered.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use esker_decoder::{BlockIdentity, Sequence};
use esker_prefix::{BlockHash, BlockObject, Chain, ObjectId, ObjectKind, StateObject, TokenId};
use esker_store::{Found, PutObject, Store, TtlClass};

use super::GenerateError;
use crate::candidates::Gone;
use crate::gate::{Inside, Refused};
use crate::lookup::Tails;
use crate::node::Engine;
use crate::write_behind::Receipt;
use crate::writers::Place;

/// Longest wait for what is on its way to the store, before an account is closed without it.
const WRITTEN_WAIT: Duration = Duration::from_secs(2);
/// States between a prompt's beginning and its end are left out while so many bytes of them wait.
const MAX_WAITING_BYTES: u64 = 64 << 20;

/// See the module.
pub(super) struct Trail<'a> {
    engine: &'a Engine,
    place: &'a Place,
    class: TtlClass,
    chain: Chain,
    genesis: BlockHash,
    block_tokens: usize,
    /// All of them.
    tokens: Vec<TokenId>,
    /// Those behind the last whole block.
    tail: Vec<TokenId>,
    hashes: Vec<BlockHash>,
    /// Blocks that are stored or were offered.
    pub(super) stored: usize,
    /// States to be offered behind their blocks: how many those are, and the state.
    states: VecDeque<(usize, StateObject)>,
    /// Lengths at which states were taken.
    kept: BTreeSet<usize>,
    /// Whole blocks of the prompt.
    prompt_blocks: usize,
    /// Tokens of it that a lookup offered. What of them is stored again was lost, or is in a block that they end in, and is
    /// nothing that its caller is charged for.
    pub(super) offered_tokens: usize,
    /// Counts the others that are newly stored.
    receipt: Arc<Receipt>,
}

impl<'a> Trail<'a> {
    pub(super) fn new(engine: &'a Engine, place: &'a Place, class: TtlClass) -> Self {
        let chain = Chain::genesis(&place.key, engine.namespace, &[]);
        Self {
            engine,
            place,
            class,
            genesis: chain.tip(),
            chain,
            block_tokens: engine.loaded.model.layout().block_tokens() as usize,
            tokens: Vec::new(),
            tail: Vec::new(),
            hashes: Vec::new(),
            stored: 0,
            states: VecDeque::new(),
            kept: BTreeSet::new(),
            prompt_blocks: 0,
            offered_tokens: 0,
            receipt: Arc::default(),
        }
    }

    pub(super) fn extend(&mut self, tokens: &[TokenId]) {
        self.tokens.extend_from_slice(tokens);
        self.tail.extend_from_slice(tokens);
        let whole = self.tail.len() / self.block_tokens * self.block_tokens;
        for block in self.tail[..whole].chunks_exact(self.block_tokens) {
            self.hashes.push(self.chain.push(block));
        }
        self.tail.drain(..whole);
    }

    /// The prompt ends here: what is stored of it is what its caller is charged for.
    pub(super) fn end_prompt(&mut self) {
        self.prompt_blocks = self.hashes.len();
    }

    /// Tokens of the prompt that were newly stored and not offered before. Waits a little for those that are on their way.
    pub(super) fn written_tokens(&self) -> u64 {
        self.receipt.stored_tokens(WRITTEN_WAIT)
    }

    pub(super) fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Tokens of the whole trail.
    pub(super) fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Number of whole blocks in a prefix.
    pub(super) fn hashes_to(&self, tokens: usize) -> usize {
        tokens / self.block_tokens
    }

    /// Hashes of the whole blocks in a prefix.
    pub(super) fn hashes_within(&self, tokens: usize) -> &[BlockHash] {
        &self.hashes[..self.hashes_to(tokens)]
    }

    /// Planes of the object of this kind at so many tokens.
    pub(super) fn planes(&self, kind: ObjectKind, tokens: u64) -> usize {
        self.engine.loaded.model.layout().planes_count(kind, tokens)
    }

    /// Whether nothing can be resumed without a state.
    pub(super) fn has_states(&self) -> bool {
        self.engine.loaded.model.layout().has_states()
    }

    /// The block at `index` of these planes.
    pub(super) fn block(&self, index: usize, planes: Vec<Bytes>) -> esker_prefix::Result<BlockObject> {
        let BlockIdentity { namespace, scope, parent, hash } = self.identity(index);
        let tokens = ((index + 1) * self.block_tokens) as u64;
        BlockObject::new(self.engine.loaded.model.layout(), namespace, scope, parent, hash, tokens, planes)
    }

    /// The state after `tokens` tokens of these planes.
    pub(super) fn state(&self, tokens: u64, planes: Vec<Bytes>) -> esker_prefix::Result<StateObject> {
        let identity = self.identity_at(usize::try_from(tokens).unwrap_or(usize::MAX));
        let BlockIdentity { namespace, scope, parent, hash } = identity;
        StateObject::new(self.engine.loaded.model.layout(), namespace, scope, parent, hash, tokens, planes)
    }

    /// The longest state of this prompt off the block grid, behind some of its blocks that are stored.
    pub(super) fn tail(&self, store: &Store, prompt: &[TokenId], blocks: usize) -> Option<Found> {
        let tails = Tails {
            namespace: self.engine.namespace,
            scope: &self.place.key,
            sight: self.place.sight.clone(),
            block_tokens: self.engine.loaded.model.layout().block_tokens(),
            first_block: 0,
            from_block: if self.has_states() { 0 } else { blocks },
            tokens: prompt,
            below: prompt.len() as u64,
        };
        tails.find(store, &self.hashes[..blocks], 1, |_| true).pop()
    }

    /// Takes the state at the last block boundary that the sequence has passed, if the model has states; not where it was put
    /// back behind that boundary.
    pub(super) fn keep_state(&mut self, sequence: &Sequence) -> Result<(), GenerateError> {
        let boundary = self.hashes_to(sequence.tokens()) * self.block_tokens;
        if !self.has_states() || boundary == 0 {
            return Ok(());
        }
        self.keep(sequence, boundary)
    }

    /// The same on the way to the end, while not too many wait for their blocks to be stored.
    pub(super) fn keep_between(&mut self, sequence: &Sequence) -> Result<(), GenerateError> {
        let layout = self.engine.loaded.model.layout();
        let state_bytes = layout.object_bytes_at(ObjectKind::State, u64::from(layout.block_tokens()));
        if self.states.len() as u64 * state_bytes >= MAX_WAITING_BYTES {
            return Ok(());
        }
        self.keep_state(sequence)
    }

    /// What was taken in an attempt that has failed is taken again.
    pub(super) fn begin_again(&mut self) {
        self.stored = usize::MAX;
        self.states.clear();
        self.kept.clear();
    }

    /// Takes the state at the last block boundary where it is a multiple of so many blocks.
    pub(super) fn keep_passed(
        &mut self,
        sequence: &Sequence,
        interval_blocks: usize,
    ) -> Result<(), GenerateError> {
        match self.hashes_to(sequence.tokens()).is_multiple_of(interval_blocks) {
            true => self.keep_between(sequence),
            false => Ok(()),
        }
    }

    /// Takes the state at the very end too, where who goes on from there resumes; the other is for who has other last tokens.
    pub(super) fn keep_end(&mut self, sequence: &Sequence) -> Result<(), GenerateError> {
        self.keep_state(sequence)?;
        if sequence.tokens().is_multiple_of(self.block_tokens) {
            return Ok(());
        }
        self.keep(sequence, sequence.tokens())
    }

    fn keep(&mut self, sequence: &Sequence, tokens: usize) -> Result<(), GenerateError> {
        if self.stored == usize::MAX || !sequence.holds_state(tokens) || !self.kept.insert(tokens) {
            return Ok(());
        }
        let state = sequence.state_at(&self.engine.loaded.model, tokens, self.identity_at(tokens))?;
        self.states.push_back((self.hashes_to(tokens), state));
        Ok(())
    }

    /// Offers the state at the end, and all that is left.
    pub(super) fn store_rest(&mut self, sequence: &Sequence) -> Result<(), GenerateError> {
        self.keep_end(sequence)?;
        while self.store_one(sequence)? {}
        Ok(())
    }

    /// Offers the next whole block or state that is not stored yet; whether there was one.
    pub(super) fn store_one(&mut self, sequence: &Sequence) -> Result<bool, GenerateError> {
        let blocks = self.stored;
        let Some(object) = self.next_object(sequence)? else { return Ok(false) };
        // A block of the prompt, not a state: what its caller is charged for once it is stored.
        let end = (blocks + 1) * self.block_tokens;
        let counts = self.stored > blocks && blocks < self.prompt_blocks && end > self.offered_tokens;
        let new_tokens = self.block_tokens.min(end.saturating_sub(self.offered_tokens)) as u64;
        let receipt = counts.then(|| (Arc::clone(&self.receipt), new_tokens));
        self.offer(object, receipt);
        Ok(self.stored != usize::MAX)
    }

    /// The next whole block or state that is not stored yet.
    pub(super) fn next_object(&mut self, sequence: &Sequence) -> Result<Option<PutObject>, GenerateError> {
        let model = &self.engine.loaded.model;
        if self.stored == usize::MAX {
            return Ok(None);
        }
        if let Some((_, state)) = self.states.pop_front_if(|(blocks, _)| *blocks <= self.stored) {
            return Ok(Some(self.own(PutObject::state(model.layout(), state))));
        }
        if self.stored >= self.hashes_to(sequence.tokens()) {
            return Ok(None);
        }
        let block = sequence.block(model, self.stored, self.identity(self.stored))?;
        let tokens = self.tokens.chunks_exact(self.block_tokens).nth(self.stored).unwrap_or_default();
        self.engine.events.note(self.hashes[self.stored], tokens.iter().map(|token| token.0).collect());
        self.stored += 1;
        Ok(Some(self.own(PutObject::block(model.layout(), block))))
    }

    fn own(&self, object: PutObject) -> PutObject {
        object.with_class(self.class).by(self.place.writer)
    }

    /// Blocks that are stored and found here: the longest leading run.
    pub(super) fn blocks(&self, store: &Store, ids: &[ObjectId]) -> Vec<Found> {
        self.place.sight.run(store, self.engine.namespace, ids, |_| true)
    }

    /// Each of these, if it is stored and found here.
    pub(super) fn find(&self, store: &Store, ids: &[ObjectId]) -> Vec<Option<Found>> {
        self.place.sight.find(store, self.engine.namespace, ids)
    }

    /// Held while something is stored here.
    pub(super) fn enter(&self) -> Result<Inside<'_>, Refused> {
        self.place.pass.enter()
    }

    /// Objects of this trail, with the places that they are to have.
    pub(super) fn place(&self, store: &Store, objects: Vec<PutObject>) -> Vec<PutObject> {
        let placed = self.place.sight.place(store, &self.place.peers, objects, &mut Gone::default());
        placed.into_iter().map(|placed| placed.object).collect()
    }

    /// A dropped block leaves its children without a parent, so the rest of this trail is not worth offering.
    fn offer(&mut self, object: PutObject, receipt: Option<(Arc<Receipt>, u64)>) {
        if !self.engine.write_behind.offer(object, self.place.pass.clone(), receipt) {
            self.stored = usize::MAX;
            self.states.clear();
        }
    }

    fn identity(&self, index: usize) -> BlockIdentity {
        self.identity_at((index + 1) * self.block_tokens)
    }

    /// Of what completes a prefix of `tokens` tokens.
    fn identity_at(&self, tokens: usize) -> BlockIdentity {
        let at = |blocks: usize| blocks.checked_sub(1).map_or(self.genesis, |last| self.hashes[last]);
        let blocks = self.hashes_to(tokens);
        let (parent, hash) = match &self.tokens[blocks * self.block_tokens..tokens] {
            [] => (at(blocks.saturating_sub(1)), at(blocks)),
            tail => (at(blocks), Chain::resume(&self.place.key, at(blocks)).push(tail)),
        };
        BlockIdentity { namespace: self.engine.namespace, scope: self.place.key.tag(), parent, hash }
    }
}
