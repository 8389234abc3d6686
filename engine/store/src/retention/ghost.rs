//! Ghosts: what is remembered of blocks that are not stored.
//!
//! A table of fixed size without collision handling: a newer ghost replaces an older one in its place. Blocks are told
//! apart by 32 bits; a wrong match costs a misjudged block, nothing else. Each learner has a part of the table, and all
//! parts are alike, so that nobody's ghosts replace another's.

use super::learner::LEARNERS_MAX;

/// What is remembered of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ghost {
    /// Its last use, seconds.
    pub(super) last_s: u32,
    /// Uses so far.
    pub(super) uses: u8,
}

/// The ghosts: 12 bytes each.
#[derive(Debug)]
pub(super) struct Ghosts {
    /// Uses of 0 mark an empty place. No places at all before the first ghost: a store that is not full has none.
    places: Vec<Place>,
    /// Places, and parts of them: logarithms of base 2.
    place_bits: u32,
    part_bits: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    print: u32,
    last_s: u32,
    uses: u8,
    learner: u8,
}

impl Ghosts {
    /// Places for `places` ghosts, rounded up to a power of two, at least one for each learner.
    pub(super) fn new(places: usize) -> Self {
        let places = places.max(usize::from(LEARNERS_MAX)).next_power_of_two();
        Self { places: Vec::new(), place_bits: places.ilog2(), part_bits: 0 }
    }

    /// There are so many learners now. What is remembered moves with its part, as far as there is room.
    pub(super) fn share_out(&mut self, learners: usize) {
        let part_bits = learners.next_power_of_two().ilog2();
        if part_bits <= self.part_bits {
            return;
        }
        self.part_bits = part_bits;
        let before = std::mem::take(&mut self.places);
        for Place { print, last_s, uses, learner } in before.into_iter().filter(|place| place.uses > 0) {
            self.put(learner, print, Ghost { last_s, uses });
        }
    }

    /// What is remembered of the block with `print`.
    pub(super) fn get(&self, learner: u8, print: u32) -> Option<Ghost> {
        let &Place { print: found, last_s, uses, .. } = self.places.get(self.place(learner, print))?;
        (uses > 0 && found == print).then_some(Ghost { last_s, uses })
    }

    /// Remembers the block with `print`.
    pub(super) fn put(&mut self, learner: u8, print: u32, ghost: Ghost) {
        if self.places.is_empty() {
            self.places = vec![Place::default(); 1 << self.place_bits];
        }
        let place = self.place(learner, print);
        self.places[place] = Place { print, last_s: ghost.last_s, uses: ghost.uses, learner };
    }

    /// The top bits of a hash, behind those of the part.
    fn place(&self, learner: u8, print: u32) -> usize {
        let bits = self.place_bits - self.part_bits;
        let hash = u64::from(print).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // In two steps: a part of one place leaves none of the hash.
        let within = (hash >> (63 - bits) >> 1) as usize;
        usize::from(learner) << bits | within
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_learner_remembers_replaces_nothing_of_anothers() {
        let mut ghosts = Ghosts::new(1 << 10);
        let ghost = Ghost { last_s: 5, uses: 3 };
        ghosts.put(0, 77, ghost);
        ghosts.share_out(2);
        assert_eq!((ghosts.get(0, 77), ghosts.get(1, 77)), (Some(ghost), None), "it moved with its part");
        (0..100_000).for_each(|print| ghosts.put(1, print, Ghost { last_s: 9, uses: 1 }));
        assert_eq!(ghosts.get(0, 77), Some(ghost));
        ghosts.share_out(usize::from(LEARNERS_MAX));
        assert_eq!(ghosts.get(0, 77), Some(ghost));
        ghosts.put(LEARNERS_MAX - 1, 78, ghost);
        assert_eq!(ghosts.get(LEARNERS_MAX - 1, 78), Some(ghost));
    }

    #[test]
    fn a_ghost_takes_12_bytes() {
        assert_eq!(size_of::<Place>(), 12);
    }
}
