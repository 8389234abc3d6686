//! The sparse-attention decoder: DeepSeek V3.2 and GLM-5 (MLA with a sparse-attention indexer, mixture of experts),
//! and DeepSeek V4 (windows and compressed rows, a residual of several streams, experts chosen by score or table).
//!
//! Architecture invariant: tensors in, tensors out. No file, no network, no clock, no async, and no knowledge of
//! stores, tenants or leases. The caller reads the files of a checkpoint and hands over their bytes; state leaves
//! and enters as [`esker_prefix::BlockObject`] and [`esker_prefix::StateObject`] values.
//!
//! The contract that everything here serves: **a token's numbers do not depend on its company.** Logits, latents
//! and keys have the same bits whether a token was computed alone or in a chunk, by prefill or by decode, on one
//! thread or many. So there is one code path for all of them, every sum has one order, and a block that was taken
//! out and put back continues exactly as if it had never left.

mod arrival;
mod block;
mod checkpoint;
mod config;
mod error;
mod formats;
pub mod golden;
mod indexer;
mod kernel;
mod linear;
mod mla;
mod model;
mod moe;
mod norm;
mod panels;
pub mod products;
mod residency;
mod rope;
mod row_codec;
mod sampler;
mod sequence;
mod tokenizer;
mod topk;
mod v32;
mod v4;

pub use arrival::{Arrivals, Incoming, LayerRows, Part};
pub use block::BlockIdentity;
pub use config::{Family, KvFormat, MlaConfig, ModelConfig, MoeConfig};
pub use error::{DecoderError, ErrorKind, Result};
pub use model::{Model, ModelBuilder};
pub use residency::{Parked, PlaneSource, Residency};
pub use sampler::Sampler;
pub use sequence::{Logits, LogitsOut, Progress, Sequence, StateField};
pub use tokenizer::{TextStream, Tokenizer};
pub use v4::config::{Compression, Scoring, V4Config};
pub use v4::draft::{Draft, Residual};
