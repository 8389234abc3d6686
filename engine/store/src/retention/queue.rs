//! The leaves that may be evicted: one queue for each class and grade, in order of last use.

use std::collections::{BTreeMap, BTreeSet};

use super::class::{CLASSES, Class};

/// Highest grade: 2^7 times the bytes per token of an ordinary block.
pub(super) const GRADE_MAX: u8 = 7;

/// Bits of the class in a line; the grade has those above.
const CLASS_BITS: u32 = 5;

const _: () = assert!(CLASSES <= 1 << CLASS_BITS, "a class fits its bits");

/// The queue of a class and a grade, in one byte.
pub(super) fn line(class: Class, grade: u8) -> u8 {
    grade << CLASS_BITS | class.0
}

/// The class of a line.
pub(super) fn class(line: u8) -> Class {
    Class(line & ((1 << CLASS_BITS) - 1))
}

/// The grade of a line.
pub(super) fn grade(line: u8) -> u8 {
    line >> CLASS_BITS
}

/// A leaf and what it is ranked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) line: u8,
    pub(super) last_s: u32,
    pub(super) slot: u32,
}

impl Leaf {
    pub(super) fn class(self) -> Class {
        class(self.line)
    }

    pub(super) fn grade(self) -> u8 {
        grade(self.line)
    }

    fn key(self) -> u64 {
        u64::from(self.last_s) << 32 | u64::from(self.slot)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a key")]
    fn of(line: u8, key: u64) -> Self {
        Self { line, last_s: (key >> 32) as u32, slot: key as u32 }
    }
}

/// The queues of one owner. Most of the lines that could be are not there, so owners of little cost little.
#[derive(Debug, Default)]
pub(super) struct LeafQueues {
    /// Of each line that has leaves: last use in the high half, slot in the low half.
    lines: BTreeMap<u8, BTreeSet<u64>>,
}

impl LeafQueues {
    pub(super) fn len(&self) -> usize {
        self.lines.values().map(BTreeSet::len).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    pub(super) fn insert(&mut self, leaf: Leaf) {
        let fresh = self.lines.entry(leaf.line).or_default().insert(leaf.key());
        debug_assert!(fresh, "{leaf:?} was queued already");
    }

    pub(super) fn remove(&mut self, leaf: Leaf) {
        let Some(queue) = self.lines.get_mut(&leaf.line) else {
            debug_assert!(false, "{leaf:?} was not queued");
            return;
        };
        let found = queue.remove(&leaf.key());
        debug_assert!(found, "{leaf:?} was not queued");
        if queue.is_empty() {
            self.lines.remove(&leaf.line);
        }
    }

    /// The oldest and the newest leaf of every queue.
    pub(super) fn ends(&self) -> impl Iterator<Item = Leaf> + '_ {
        self.lines.iter().flat_map(|(&line, queue)| {
            let ends = [queue.first(), queue.last()].into_iter().flatten();
            ends.map(move |key| Leaf::of(line, *key))
        })
    }
}
