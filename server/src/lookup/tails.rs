//! Names of states off the block grid. Such a state is named by one more link of the chain, over the tokens behind the last
//! whole block; at which lengths there may be one the store knows.

use esker_prefix::{BlockHash, Chain, NamespaceId, ObjectId, ObjectKind, ScopeKey, TokenId};
use esker_store::Store;

/// Most lengths that one search tries, the longest first: each costs a hash, and who has many states behind one prefix should
/// not make its lookups slow.
const MAX_TRIED: usize = 1024;

/// Tokens of a prompt in one scope, and where they are in it.
#[derive(Clone, Copy)]
pub(crate) struct Tails<'a> {
    pub(crate) namespace: NamespaceId,
    pub(crate) scope: &'a ScopeKey,
    pub(crate) block_tokens: u32,
    /// The first of the tokens comes behind so many blocks; states before it are not looked for.
    pub(crate) first_block: usize,
    pub(crate) tokens: &'a [TokenId],
    /// Only shorter prefixes are worth finding.
    pub(crate) below: u64,
}

impl Tails<'_> {
    /// Names that states of this prompt may have, those of the longest prefixes first. `hashes` are its blocks that are stored.
    pub(crate) fn names(&self, store: &Store, hashes: &[BlockHash]) -> Vec<ObjectId> {
        if self.tokens.is_empty() || hashes.len() < self.first_block {
            return Vec::new();
        }
        let root = (self.namespace, self.scope.tag());
        let first = self.first_block * self.block_tokens as usize;
        let tried = store.tails(root, self.first_block, hashes, self.below, MAX_TRIED);
        let names = tried.into_iter().filter_map(|(blocks, tokens)| {
            let begin = blocks * self.block_tokens as usize - first;
            let end = usize::try_from(tokens).ok()?.checked_sub(first)?;
            let tail = self.tokens.get(begin..end)?;
            let mut chain = match blocks.checked_sub(1) {
                Some(last) => Chain::resume(self.scope, hashes[last]),
                None => Chain::genesis(self.scope, self.namespace, &[]),
            };
            Some(ObjectId { kind: ObjectKind::State, hash: chain.push(tail) })
        });
        names.collect()
    }
}
