//! The wire format of Esker: `.proto` files, the code generated from them, and every check of what comes from
//! outside.
//!
//! Architecture invariant: values of `esker-prefix` come out of this crate checked, wire messages go into it. No
//! connection, no store, no model. Sizes are bounded here before anything is allocated for them.

/// Generated messages, clients and servers of package `esker.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("esker.v1");

    /// Descriptors of the package, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("esker_descriptor");
}

mod assemble;
mod check;
mod error;
mod limits;

pub use assemble::{Assembled, PlaneAssembler, PlaneReader, WholePlane, chunks, object_kind};
pub use check::{PrefixNames, check_name, check_namespace_id, check_prefix, check_tokens, namespace_of};
pub use error::WireError;
pub use limits::{
    MAX_CHAIN_BLOCKS, MAX_CHUNK_BYTES, MAX_ENGINE_HASH_BYTES, MAX_LAYOUT_JSON_BYTES, MAX_LOOKUPS,
    MAX_MESSAGE_BYTES, MAX_NAME_BYTES, MAX_PROMPT_TOKENS, MAX_TAIL_TOKENS, MAX_TEXT_BYTES,
};
