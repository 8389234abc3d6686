//! Owners: whom the bytes of blocks count for, and who gives when room is needed.
//!
//! Max-min fairness: whoever holds most gives, of those that have anything to give. So all that want more than their share
//! come to hold the same, and whoever wants less keeps all it has, however much the others write. With one owner there is
//! no choice, and nothing of this shows.
//!
//! Owners are dense numbers that the caller gives out. Cost per operation: O(log owners).

use std::collections::BTreeSet;

use super::queue::{Leaf, LeafQueues};

/// All owners.
#[derive(Debug, Default)]
pub(super) struct Owners {
    all: Vec<Owner>,
    /// Those that have leaves, by the pages that they hold.
    givers: BTreeSet<(u64, u32)>,
}

#[derive(Debug, Default)]
struct Owner {
    /// Of all its records, those that are pinned too.
    pages: u64,
    leaves: LeafQueues,
    /// Who learns from its uses.
    learner: Option<u8>,
}

impl Owners {
    /// Who gives next. `None` if nobody has a leaf that may go.
    pub(super) fn giver(&self) -> Option<u32> {
        self.givers.last().map(|&(_, owner)| owner)
    }

    /// Pages that an owner holds.
    pub(super) fn pages(&self, owner: u32) -> u64 {
        self.all.get(owner as usize).map_or(0, |owner| owner.pages)
    }

    /// What every owner holds, in pages.
    pub(super) fn all_pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.all.iter().map(|owner| owner.pages)
    }

    /// An owner holds so many pages from now on.
    pub(super) fn set_pages(&mut self, owner: u32, pages: u64) {
        self.change(owner, |owner| owner.pages = pages);
    }

    /// Leaves of all.
    pub(super) fn leaf_count(&self) -> usize {
        self.all.iter().map(|owner| owner.leaves.len()).sum()
    }

    pub(super) fn insert(&mut self, owner: u32, leaf: Leaf) {
        self.change(owner, |owner| owner.leaves.insert(leaf));
    }

    pub(super) fn remove(&mut self, owner: u32, leaf: Leaf) {
        self.change(owner, |owner| owner.leaves.remove(leaf));
    }

    /// The oldest and the newest leaf of every queue of an owner.
    pub(super) fn ends(&self, owner: u32) -> impl Iterator<Item = Leaf> + '_ {
        self.all.get(owner as usize).into_iter().flat_map(|owner| owner.leaves.ends())
    }

    /// Who learns from the uses of an owner's blocks; `new` says who, the first time.
    pub(super) fn learner(&mut self, owner: u32, new: impl FnOnce() -> u8) -> u8 {
        *self.owner(owner).learner.get_or_insert_with(new)
    }

    fn change(&mut self, number: u32, change: impl FnOnce(&mut Owner)) {
        let owner = self.owner(number);
        let before = owner.rank(number);
        change(owner);
        let after = owner.rank(number);
        if before != after {
            if let Some(rank) = before {
                self.givers.remove(&rank);
            }
            self.givers.extend(after);
        }
    }

    fn owner(&mut self, owner: u32) -> &mut Owner {
        let at = owner as usize;
        if self.all.len() <= at {
            self.all.resize_with(at + 1, Owner::default);
        }
        &mut self.all[at]
    }
}

impl Owner {
    fn rank(&self, number: u32) -> Option<(u64, u32)> {
        (!self.leaves.is_empty()).then_some((self.pages, number))
    }
}
