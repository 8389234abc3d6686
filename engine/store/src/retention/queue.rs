//! The leaves that may be evicted: one queue for each class and grade, in order of last use.

use std::collections::BTreeSet;

use super::class::{CLASSES, Class};

/// Highest grade: 2^7 times the bytes per token of an ordinary block.
pub(super) const GRADE_MAX: u8 = 7;

/// Bits of the class in a line; the grade has those above.
const CLASS_BITS: u32 = 5;

const _: () = assert!(CLASSES <= 1 << CLASS_BITS, "a class fits its bits");

/// Queues.
const LINES: usize = (GRADE_MAX as usize + 1) << CLASS_BITS;

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

/// The queues.
#[derive(Debug)]
pub(super) struct LeafQueues {
    /// Per line: last use in the high half, slot in the low half.
    lines: Vec<BTreeSet<u64>>,
    /// A bit for each line that has leaves.
    occupied: [u64; LINES / 64],
}

impl LeafQueues {
    pub(super) fn new() -> Self {
        Self { lines: vec![BTreeSet::new(); LINES], occupied: [0; LINES / 64] }
    }

    pub(super) fn len(&self) -> usize {
        self.lines.iter().map(BTreeSet::len).sum()
    }

    pub(super) fn insert(&mut self, leaf: Leaf) {
        let fresh = self.lines[usize::from(leaf.line)].insert(leaf.key());
        debug_assert!(fresh, "{leaf:?} was queued already");
        self.occupied[usize::from(leaf.line / 64)] |= 1 << (leaf.line % 64);
    }

    pub(super) fn remove(&mut self, leaf: Leaf) {
        let queue = &mut self.lines[usize::from(leaf.line)];
        let found = queue.remove(&leaf.key());
        debug_assert!(found, "{leaf:?} was not queued");
        if queue.is_empty() {
            self.occupied[usize::from(leaf.line / 64)] &= !(1 << (leaf.line % 64));
        }
    }

    /// The oldest and the newest leaf of every queue.
    pub(super) fn ends(&self) -> impl Iterator<Item = Leaf> + '_ {
        self.occupied_lines().flat_map(|line| {
            let queue = &self.lines[usize::from(line)];
            let ends = [queue.first(), queue.last()].into_iter().flatten();
            ends.map(move |key| Leaf::of(line, *key))
        })
    }

    fn occupied_lines(&self) -> impl Iterator<Item = u8> + '_ {
        (0_u8..).step_by(64).zip(&self.occupied).flat_map(|(first, &word)| {
            std::iter::successors(Some(word), |left| Some(left & left.wrapping_sub(1)))
                .take_while(|left| *left != 0)
                .map(move |left| first + u8::try_from(left.trailing_zeros()).unwrap_or(0))
        })
    }
}
