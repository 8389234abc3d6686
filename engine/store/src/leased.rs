//! What leases hold together: every record once, however many of them hold it.
//!
//! A slot is counted for each lease of which it is an end, and once for each child that is counted. So a count goes up a path only
//! as far as nothing held before: a lease costs as many steps as it holds records that no other does. It takes memory for held
//! slots alone.

use std::collections::HashMap;

/// See the module.
#[derive(Default)]
pub(crate) struct Leased {
    counts: HashMap<u32, u32>,
    bytes: u64,
}

/// What a slot hangs on, and the bytes of its record.
pub(crate) type Place = (Option<u32>, u64);

impl Leased {
    /// Bytes of all records that are held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.counts.capacity() * (size_of::<(u32, u32)>() + 1)
    }

    pub(crate) fn holds(&self, at: u32) -> bool {
        self.counts.contains_key(&at)
    }

    /// One lease more ends in `at`.
    pub(crate) fn add(&mut self, mut at: u32, place: impl Fn(u32) -> Place) {
        loop {
            let count = self.counts.entry(at).or_default();
            *count += 1;
            if *count > 1 {
                return;
            }
            let (parent, bytes) = place(at);
            self.bytes += bytes;
            let Some(parent) = parent else { return };
            at = parent;
        }
    }

    /// One less does.
    pub(crate) fn take(&mut self, mut at: u32, place: impl Fn(u32) -> Place) {
        while let Some(count) = self.counts.get_mut(&at) {
            *count -= 1;
            if *count > 0 {
                return;
            }
            let (parent, bytes) = place(at);
            self.forget(at, bytes);
            let Some(parent) = parent else { return };
            at = parent;
        }
    }

    /// The record of a slot has another length from now on.
    pub(crate) fn resize(&mut self, at: u32, before: u64, after: u64) {
        if self.holds(at) {
            self.bytes = self.bytes.saturating_sub(before) + after;
        }
    }

    /// The slot is free.
    pub(crate) fn forget(&mut self, at: u32, bytes: u64) {
        if self.counts.remove(&at).is_some() {
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two branches of three slots each on a stem of two, of 1, 2, 4, ... bytes.
    fn place(at: u32) -> Place {
        let parent = match at {
            0 => None,
            5 => Some(1),
            _ => Some(at - 1),
        };
        (parent, 1 << at)
    }

    #[test]
    fn what_is_shared_counts_once_and_until_the_last_lets_go() {
        let mut leased = Leased::default();
        leased.add(4, place);
        assert_eq!(leased.bytes(), 0b1_1111);
        leased.add(7, place);
        leased.add(1, place);
        leased.add(4, place);
        assert_eq!(leased.bytes(), 0xff);
        leased.take(4, place);
        leased.take(4, place);
        assert_eq!(leased.bytes(), 0b1110_0011, "the stem and the other branch");
        leased.take(7, place);
        assert_eq!(leased.bytes(), 0b11, "the stem is leased itself");
        leased.resize(1, 2, 0);
        leased.resize(7, 128, 0);
        assert_eq!(leased.bytes(), 1);
        leased.take(1, |at| (place(at).0, at.into()));
        assert_eq!((leased.bytes(), leased.counts.len()), (0, 0));
        leased.take(1, place);
        assert_eq!(leased.bytes(), 0);
    }
}
