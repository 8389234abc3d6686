//! Owners: whom the bytes of a record count for when a full store makes room.
//!
//! A record names its writer; whose that writer is, the store is told ([`Store::set_owners`](crate::Store::set_owners)). So the
//! bytes of a record count for whoever put it first, whatever scope it lies in and whoever reads it: nobody can make somebody
//! else hold more. What names no writer is nobody's, and nobody is an owner like the others.

use esker_prefix::WriterId;

/// Number of an owner, given by whoever opens the store and meaningful while it is open. 0: nobody that was named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerId(pub u32);

impl OwnerId {
    /// Nobody that was named.
    pub const NOBODY: Self = Self(0);
}

/// Whose a writer is: the same answer every time, and at once. It is asked while the table is locked, and must not call the
/// store.
pub type OwnerOf = Box<dyn Fn(WriterId) -> OwnerId + Send + Sync>;

/// What owners hold of a store, and whether some hold more than their share of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// Owners that hold anything.
    pub owners: u64,
    /// The most that one holds, in bytes of records.
    pub largest_bytes: u64,
    /// What all hold beyond an equal share of the capacity, in bytes of records: what others may claim.
    pub over_bytes: u64,
}

impl Shares {
    /// Of what each owner holds, in bytes.
    pub(crate) fn of(held_bytes: impl Iterator<Item = u64> + Clone, capacity_bytes: u64) -> Self {
        let held_bytes = held_bytes.filter(|&bytes| bytes > 0);
        let owners = held_bytes.clone().count() as u64;
        let share_bytes = capacity_bytes / owners.max(1);
        Self {
            owners,
            largest_bytes: held_bytes.clone().max().unwrap_or(0),
            over_bytes: held_bytes.map(|bytes| bytes.saturating_sub(share_bytes)).sum(),
        }
    }
}
