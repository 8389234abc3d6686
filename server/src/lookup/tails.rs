//! Names of states off the block grid. Such a state is named by one more link of the chain, over the tokens behind the last
//! whole block; at which lengths there may be one the store knows.

use esker_prefix::{BlockHash, Chain, NamespaceId, ObjectId, ObjectKind, ScopeKey, ScopeTag, TokenId};
use esker_store::{Found, Store};

use crate::candidates::Sight;

/// Most lengths that one search tries, the longest first, and most tokens that it hashes for them, but for one: who has many
/// states behind one prefix should not make its lookups slow.
const MAX_TRIED: usize = 1024;
const MAX_HASHED_TOKENS: usize = 1 << 16;

/// Tokens of a prompt in one scope, and where they are in it.
pub(crate) struct Tails<'a> {
    pub(crate) namespace: NamespaceId,
    pub(crate) scope: &'a ScopeKey,
    /// What is found by the names of this scope.
    pub(crate) sight: Sight,
    pub(crate) block_tokens: u32,
    /// The first of the tokens comes behind so many blocks.
    pub(crate) first_block: usize,
    /// States behind fewer blocks are not looked for, nor are those before the first of the tokens.
    pub(crate) from_block: usize,
    pub(crate) tokens: &'a [TokenId],
    /// Only shorter prefixes are worth finding.
    pub(crate) below: u64,
}

impl Tails<'_> {
    /// States of this prompt off the block grid that are stored and that `takes` takes, those of the longest prefixes first, at
    /// most `most`. `hashes` are its blocks that are stored.
    pub(crate) fn find(
        &self,
        store: &Store,
        hashes: &[BlockHash],
        most: usize,
        takes: impl Fn(&Found) -> bool,
    ) -> Vec<Found> {
        let names = self.names(store, hashes);
        let get = |name| self.sight.find(store, self.namespace, &[name]).pop().flatten();
        let found = names.filter_map(|name| get(name).filter(&takes));
        found.take(most).collect()
    }

    /// Whether what is found by these names may be in a scope.
    pub(crate) fn are_of(&self, scope: ScopeTag) -> bool {
        scope == self.scope.tag() || self.sight.is_of(scope)
    }

    /// Names that they may have.
    fn names<'a>(&'a self, store: &Store, hashes: &'a [BlockHash]) -> impl Iterator<Item = ObjectId> + 'a {
        let first = self.first_block * self.block_tokens as usize;
        let tails = |scope, hashes: &[BlockHash]| {
            let from_block = self.from_block.max(self.first_block);
            store.tails((self.namespace, scope), from_block, hashes, self.below, MAX_TRIED)
        };
        let mut tried = Vec::new();
        if !self.tokens.is_empty() {
            tried = tails(self.scope.tag(), hashes);
            if let Some(candidates) = self.sight.tag() {
                tried.extend(tails(candidates, &self.candidates(hashes)));
                // Where the state of an own one lies behind a block of the org's it is in both.
                tried.sort_unstable_by_key(|&(blocks, tokens)| std::cmp::Reverse((tokens, blocks)));
                tried.dedup();
            }
        }
        let tails = tried.into_iter().filter_map(move |(blocks, tokens)| {
            let begin = blocks * self.block_tokens as usize - first;
            let end = usize::try_from(tokens).ok()?.checked_sub(first)?;
            Some((blocks, self.tokens.get(begin..end)?))
        });
        let mut hashed = 0;
        let few = tails.take_while(move |(_, tail)| {
            let is_first = hashed == 0;
            hashed += tail.len();
            is_first || hashed <= MAX_HASHED_TOKENS
        });
        few.map(move |(blocks, tail)| {
            let mut chain = match blocks.checked_sub(1) {
                Some(last) => Chain::resume(self.scope, hashes[last]),
                None => Chain::genesis(self.scope, self.namespace, &[]),
            };
            ObjectId { kind: ObjectKind::State, hash: chain.push(tail) }
        })
    }

    /// What blocks are called among the candidates.
    fn candidates(&self, hashes: &[BlockHash]) -> Vec<BlockHash> {
        let ids = hashes.iter().map(|&hash| ObjectId { kind: ObjectKind::Block, hash });
        ids.filter_map(|id| Some(self.sight.candidate(self.namespace, id)?.hash)).collect()
    }
}
