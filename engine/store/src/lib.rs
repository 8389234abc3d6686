//! The content-addressed store on SSD: open, put, lookup, fetch, close.
//!
//! Architecture invariant: knows no network, tenant, price or model; no async. It stores objects of named planes,
//! and every byte that it returns has been verified to be the one that was put under that name. What cannot be
//! verified is a miss, counted by kind.
//!
//! ```text
//! DIR/LOCK                  held while the store is open
//! DIR/segments/NNNNNNNN.seg records; the truth (segment.rs, record.rs)
//! DIR/index/                RocksDB, derived from the segments (index.rs)
//! ```

mod breaker;
mod census;
pub mod clock;
pub mod codec;
mod commit;
mod encoding;
mod erasure;
mod error;
mod fetch;
mod fields;
mod fsck;
#[cfg(any(test, feature = "testing"))]
pub mod fuzzing;
mod hits;
mod index;
pub mod io;
mod latency;
mod lease;
mod leased;
mod object;
mod observer;
mod owner;
mod reclaim;
mod record;
mod recovery;
mod retention;
mod room;
mod scan;
mod scrub;
mod sealing;
mod segment;
mod settings;
mod shared;
mod stat;
mod stats;
mod store;
mod table;
mod tails;
mod verify;
mod wear;

#[cfg(test)]
extern crate self as esker_store;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests;

pub use census::{Ages, Forest, Held, Run};
pub use erasure::Erase;
pub use error::{ErrorKind, Result, StoreError};
pub use fetch::{Fetch, FetchEvent, FetchOrder, FetchRequest, PlaneSelection};
pub use fsck::{FsckReport, Repair, fsck};
pub use hits::Hits;
pub use latency::Latencies;
pub use lease::{Lease, LeaseId};
pub use object::{PutObject, PutOutcome, PutPlane, TtlClass};
pub use observer::{Change, Observer, Removal};
pub use owner::{OwnerId, OwnerOf, Shares};
pub use recovery::SCANS as REBUILD_SCANS;
pub use retention::{Candidate, Context, Retention, RetentionSettings};
pub use room::room;
pub use sealing::{OpenError, SALT_BYTES, Seal, SealError, Sealer, TAG_BYTES};
#[cfg(any(test, feature = "testing"))]
pub use settings::Sabotage;
pub use settings::StoreSettings;
pub use stat::{AGE_BOUNDS_S, Amount, LeaseStat, SegmentStat, StoreStat, stat};
pub use stats::{MissCounts, MissKind, OpenReport, StoreStats};
pub use store::{Found, Pins, Store, Submitted};
pub use wear::Wear;
