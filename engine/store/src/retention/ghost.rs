//! Ghosts: what is remembered of blocks that are not stored.
//!
//! A table of fixed size without collision handling: a newer ghost replaces an older one in its place. Blocks are told
//! apart by 32 bits; a wrong match costs a misjudged block, nothing else.

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
    shift: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    print: u32,
    last_s: u32,
    uses: u8,
}

impl Ghosts {
    /// Places for `places` ghosts, rounded up to a power of two.
    pub(super) fn new(places: usize) -> Self {
        Self { places: Vec::new(), shift: 64 - places.next_power_of_two().max(2).ilog2() }
    }

    /// What is remembered of the block with `print`.
    pub(super) fn get(&self, print: u32) -> Option<Ghost> {
        let &Place { print: found, last_s, uses } = self.places.get(self.place(print))?;
        (uses > 0 && found == print).then_some(Ghost { last_s, uses })
    }

    /// Remembers the block with `print`.
    pub(super) fn put(&mut self, print: u32, ghost: Ghost) {
        if self.places.is_empty() {
            self.places = vec![Place::default(); 1 << (64 - self.shift)];
        }
        let place = self.place(print);
        self.places[place] = Place { print, last_s: ghost.last_s, uses: ghost.uses };
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the top bits of a hash are below the table's length"
    )]
    fn place(&self, print: u32) -> usize {
        (u64::from(print).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }
}
