//! What can be wrong with values given to this crate.

use crate::LayoutId;

/// Result of an operation of this crate.
pub type Result<T> = std::result::Result<T, PrefixError>;

/// A value that breaks a rule of the vocabulary. All of them are the caller's to mend; nothing was done.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrefixError {
    /// A layout that cannot describe any cache.
    #[error("layout {layout:?} is not usable: {reason}")]
    BadLayout {
        /// Name the layout was given.
        layout: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model configuration from which no layout can be built.
    #[error("no KV layout for this model config: {0}")]
    BadConfig(String),
    /// An object with more or fewer planes than its layout has.
    #[error("object has {got} planes, layout {layout} has {expected}")]
    PlaneCount {
        /// The layout the object was checked against.
        layout: LayoutId,
        /// Planes the layout lists.
        expected: usize,
        /// Planes the object holds.
        got: usize,
    },
    /// A plane whose length is not the one its layout gives.
    #[error(
        "plane {plane} (group {group:?}, layers {first_layer}..{end_layer}) has {got} bytes, \
         layout {layout} says {expected}"
    )]
    PlaneSize {
        /// The layout the object was checked against.
        layout: LayoutId,
        /// Position of the plane in restore order.
        plane: usize,
        /// Name of the plane's group.
        group: String,
        /// First of the group's layers in the plane.
        first_layer: u16,
        /// One past the last of the group's layers in the plane.
        end_layer: u16,
        /// Bytes the layout gives.
        expected: u64,
        /// Bytes the plane holds.
        got: u64,
    },
    /// A prefix length that no object of this kind can complete.
    #[error(
        "no {kind} object ends at {tokens} tokens: blocks end at positive multiples of {block_tokens}, and states anywhere \
         behind a block that ends every coarse group"
    )]
    Boundary {
        /// `"block"` or `"state"`.
        kind: &'static str,
        /// Tokens per block of the layout.
        block_tokens: u32,
        /// The length that was given.
        tokens: u64,
    },
    /// Text that is not 64 hexadecimal digits.
    #[error("expected 64 hexadecimal digits, got {0:?}")]
    BadHex(String),
}
