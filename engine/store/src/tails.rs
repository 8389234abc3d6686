//! Boundaries off the block grid: which lengths the prefixes have that states behind a block, or behind none, complete.
//!
//! The name of a block follows from the tokens of a prompt. Where inside the next block a state lies does not, and trying every
//! length would cost a hash each; so the lengths are kept, and only those few are tried. Whether one of them is of the tokens
//! asked about is told by its name. It takes memory for such states alone, some 100 bytes each.

use std::collections::{BTreeMap, HashMap};

use esker_prefix::{NamespaceId, ObjectKind, ScopeTag};

use crate::index::Entry;
use crate::table::short;

/// First half of a hash, as the table keeps it.
type Half = [u8; 16];

/// What states lie behind.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Behind {
    /// A block.
    Block(Half),
    /// The beginning of a prompt.
    Nothing(NamespaceId, ScopeTag),
}

/// See the module.
#[derive(Default)]
pub(crate) struct Tails {
    /// Lengths of whole prefixes, in tokens, and how many states have each.
    lengths: HashMap<Behind, BTreeMap<u64, u32>>,
    states: HashMap<Half, (Behind, u64)>,
}

impl Tails {
    /// Notes an object that is now stored under this half of its hash, if it is a state off the grid.
    pub(crate) fn add(&mut self, half: Half, entry: &Entry) {
        let behind = match entry.parent {
            _ if entry.id.kind != ObjectKind::State => return,
            Some(block) if block.hash == entry.id.hash => return,
            Some(block) => Behind::Block(short(block)),
            None => Behind::Nothing(entry.namespace, entry.scope),
        };
        if self.states.insert(half, (behind, entry.tokens)).is_none() {
            *self.lengths.entry(behind).or_default().entry(entry.tokens).or_default() += 1;
        }
    }

    /// Forgets the state of this name, if it was one.
    pub(crate) fn remove(&mut self, half: &Half) {
        let Some((behind, tokens)) = self.states.remove(half) else { return };
        let Some(lengths) = self.lengths.get_mut(&behind) else { return };
        if let Some(count) = lengths.get_mut(&tokens) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&tokens);
            }
        }
        if lengths.is_empty() {
            self.lengths.remove(&behind);
        }
    }

    /// Lengths behind one thing, descending.
    pub(crate) fn behind(&self, behind: Behind) -> impl Iterator<Item = u64> {
        self.lengths.get(&behind).into_iter().flat_map(|lengths| lengths.keys().rev().copied())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.states.is_empty()
    }
}
