//! Boundaries off the block grid: which lengths the prefixes have that states behind a block, or behind none, complete.
//!
//! The name of a block follows from the tokens of a prompt. Where inside the next block a state lies does not, and trying every
//! length would cost a hash each; so the lengths are kept, and only those few are tried. Whether one of them is of the tokens
//! asked about is told by its name, so what is kept here need not tell every two blocks apart. It takes memory for such states
//! alone, some 200 bytes each.

use std::collections::HashMap;

use esker_prefix::{BlockHash, NamespaceId, ObjectKind, ScopeTag};
use hashbrown::HashTable;

use crate::index::Entry;

/// First half of a hash, as the table keeps it.
type Half = [u8; 16];

/// What states lie behind, as a part of its hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Behind(u64);

/// See the module.
#[derive(Default)]
pub(crate) struct Tails {
    lengths: HashTable<Lengths>,
    states: HashMap<Half, (Behind, u64)>,
}

/// Of whole prefixes, in tokens, ascending, and how many states have each.
struct Lengths {
    behind: Behind,
    counts: Vec<(u64, u32)>,
}

impl Behind {
    pub(crate) fn block(hash: &BlockHash) -> Self {
        Self(word(&hash.0))
    }

    /// The beginning of a prompt.
    pub(crate) fn nothing(namespace: NamespaceId, scope: ScopeTag) -> Self {
        Self(word(namespace.as_bytes()) ^ word(&scope.0).rotate_left(32))
    }
}

impl Tails {
    /// Notes an object that is now stored under this half of its hash, if it is a state off the grid.
    pub(crate) fn add(&mut self, half: Half, entry: &Entry) {
        let behind = match entry.parent {
            _ if entry.id.kind != ObjectKind::State => return,
            Some(block) if block.hash == entry.id.hash => return,
            Some(block) => Behind::block(&block.hash),
            None => Behind::nothing(entry.namespace, entry.scope),
        };
        if self.states.insert(half, (behind, entry.tokens)).is_some() {
            return;
        }
        let same = |lengths: &Lengths| lengths.behind == behind;
        let mut lengths = self
            .lengths
            .entry(behind.0, same, |lengths| lengths.behind.0)
            .or_insert_with(|| Lengths { behind, counts: Vec::new() });
        let counts = &mut lengths.get_mut().counts;
        match counts.binary_search_by_key(&entry.tokens, |(tokens, _)| *tokens) {
            Ok(at) => counts[at].1 += 1,
            Err(at) => counts.insert(at, (entry.tokens, 1)),
        }
    }

    /// Forgets the state of this name, if it was one.
    pub(crate) fn remove(&mut self, half: &Half) {
        let Some((behind, tokens)) = self.states.remove(half) else { return };
        let Ok(mut found) = self.lengths.find_entry(behind.0, |lengths| lengths.behind == behind) else {
            return;
        };
        let counts = &mut found.get_mut().counts;
        if let Ok(at) = counts.binary_search_by_key(&tokens, |(tokens, _)| *tokens) {
            counts[at].1 -= 1;
            if counts[at].1 == 0 {
                counts.remove(at);
            }
        }
        if counts.is_empty() {
            found.remove();
        }
    }

    /// Lengths behind one thing, descending.
    pub(crate) fn behind(&self, behind: Behind) -> impl Iterator<Item = u64> {
        let lengths = self.lengths.find(behind.0, |lengths| lengths.behind == behind);
        lengths.into_iter().flat_map(|lengths| lengths.counts.iter().rev().map(|(tokens, _)| *tokens))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.states.is_empty()
    }

    /// Bytes of memory, about: what a state takes at the usual load of a hash table.
    pub(crate) fn memory_bytes(&self) -> usize {
        let entry = size_of::<(Half, (Behind, u64))>() + size_of::<(u64, u32)>();
        self.lengths.allocation_size() + self.states.capacity() * entry
    }
}

/// Hashes are uniform: a part of one is as good as another hash of it.
fn word(hash: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(word)
}
