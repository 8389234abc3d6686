//! What a request can get wrong.

/// A request that breaks a rule of the wire format. Nothing was done; the text says what to mend.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// A field of fixed length has another.
    #[error("{field} must be {expected} bytes, got {got}")]
    Length {
        /// Name of the field.
        field: &'static str,
        /// Bytes it must have.
        expected: usize,
        /// Bytes it has.
        got: usize,
    },
    /// Something larger than its bound.
    #[error("{field} is limited to {limit} {unit}, got {got}")]
    TooLarge {
        /// Name of the field.
        field: &'static str,
        /// What is counted.
        unit: &'static str,
        /// The bound.
        limit: usize,
        /// What was sent.
        got: usize,
    },
    /// Something that may not be empty.
    #[error("{0} must not be empty")]
    Empty(&'static str),
    /// A value that a message needs and does not have.
    #[error("{0} is missing or unspecified")]
    Missing(&'static str),
    /// Parts of a stream that do not fit together.
    #[error("{0}")]
    Sequence(String),
    /// A value refused by the vocabulary.
    #[error(transparent)]
    Prefix(#[from] esker_prefix::PrefixError),
}
