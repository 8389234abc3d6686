//! Classes: what is known of a block at its last use that may tell when it is used next.
//!
//! A block seen once is classed by where it hangs; a block seen more often by how often and by the time between its last
//! two uses. Which classes are worth keeping is never assumed: [`Reuse`](super::reuse::Reuse) measures it.

/// Number of classes.
pub(super) const CLASSES: usize = (FIRST_USE + USES * GAPS) as usize;

/// Classes of blocks seen once: see [`Context`].
const FIRST_USE: u8 = 5;

/// Steps of the number of uses: 2, 3, 4 to 5, 6 to 10, more.
const USES: u8 = 5;

/// Steps of the time between the last two uses: an agent's tool call, a quick answer, a thought, a pause.
const GAPS: u8 = 4;

/// A class of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Class(pub(super) u8);

/// Where a block seen for the first time hangs. See [`Retention::context`](super::Retention::context).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context(Class);

impl Context {
    /// Behind nothing.
    pub(super) const ROOT: Self = Self(Class(0));
    /// Beside others behind a block that others share.
    pub(super) const BRANCH: Self = Self(Class(1));
    /// Behind a block whose second use this is: the second turn of something.
    pub(super) const SECOND: Self = Self(Class(2));
    /// Behind a block used more often: a later turn.
    pub(super) const LATER: Self = Self(Class(3));
    /// For a block that is not full, the ragged end of a prompt: the next prompt has another one there.
    pub const SHORT: Self = Self(Class(4));

    /// Behind a block that was itself new: the same again.
    pub(super) fn of_new(class: Class) -> Self {
        Self(class)
    }
}

impl Class {
    /// A block seen for the first time.
    pub(super) fn first(context: Context) -> Self {
        context.0
    }

    /// Whether a block of this class was seen once.
    pub(super) fn is_first(self) -> bool {
        self.0 < FIRST_USE
    }

    /// A block in use for the `uses`th time, at least the second, `gap_s` after the time before.
    pub(super) fn again(uses: u8, gap_s: u32) -> Self {
        let step = match uses {
            0..=2 => 0,
            3 => 1,
            4..=5 => 2,
            6..=10 => 3,
            _ => 4,
        };
        let gap = match gap_s {
            0..8 => 0,
            8..64 => 1,
            64..512 => 2,
            _ => 3,
        };
        Self(FIRST_USE + step * GAPS + gap)
    }
}
