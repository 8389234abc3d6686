//! Writers: whose word an object is.

/// Number of who wrote an object, given by the node that stores it and meaningful there only. 0: nobody that was named.
///
/// A key is an assertion: its writer says that these bytes are the KV of that prefix. The number is in the record, under its
/// checksum and under its seal, so that everything that one writer ever said can be taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WriterId(pub u32);

impl WriterId {
    /// Nobody that was named.
    pub const UNNAMED: Self = Self(0);
}
