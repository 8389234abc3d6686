//! Replaying request traces against the store's retention, index only: which blocks would have been found, which
//! written, which evicted, at a given size. No bytes move; a run of a million blocks takes about a second.
//!
//! A trace (see [`Trace`] for its formats) is a stream of prompts, each a path of blocks from the empty prefix. A request
//! reads the *leading run* of its blocks that are stored, as [`Store::lookup`](esker_store::Store::lookup) does, and
//! puts the rest. The hit ratio is tokens found over tokens asked for. Sizes are counted in whole blocks: a last block
//! that is not full takes the place of a full one and saves only the tokens that it has.
//!
//! | policy | evicts | admits |
//! |---|---|---|
//! | `esker` | [`Retention`](esker_store::Retention) as the store runs it | by its filter |
//! | `lru-leaf` | the leaf whose last use is oldest | all |
//! | `lru` | the block whose last use is oldest, path by path from the root down | all |
//! | `fifo` | the block that was written first | all |
//! | `s3-fifo` | as in "FIFO queues are all you need" (SOSP '23): small queue 10 %, main queue, ghosts | all |
//! | `clairvoyant` | the block whose next use is furthest ([`clairvoyant`]) | what is used before that |
//! | `infinite` | nothing | all |

mod blind;
pub mod clairvoyant;
mod esker;
mod format;
mod policy;
mod real;
mod report;
mod run;
pub mod synthetic;
mod trace;

pub use policy::Policy;
pub use real::{RealOptions, RealRun, replay_real};
pub use report::{Table, human_bytes};
pub use run::{Run, replay, replay_all};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use trace::hear;
pub use trace::{Request, Trace, TraceError};
