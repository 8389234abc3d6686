//! Namespaces: which model, exactly.

use std::fmt;

use crate::chain::{digest_type, len_u32};
use crate::layout::LayoutId;

const NAMESPACE_CONTEXT: &str = "esker 2026-11 namespace v1";

digest_type! {
    /// Digest of a [`Namespace`]. A fleet that rolls new weights under an old model name gets another id, so it
    /// gets misses, never stale KV.
    NamespaceId
}

/// Everything that decides the bytes of a block besides its tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Fingerprint of weights, configuration and arithmetic (quantiser, tie-break rule, kernel class).
    pub weights: [u8; 32],
    /// Digest of the tokenizer's files.
    pub tokenizer: [u8; 32],
    /// The KV layout.
    pub layout: LayoutId,
    /// Adapter (LoRA) id; empty for the base model.
    pub adapter: String,
}

impl Namespace {
    /// `derive_key(context, weights || tokenizer || layout || adapter length u32 LE || adapter)`.
    pub fn id(&self) -> NamespaceId {
        let mut hasher = blake3::Hasher::new_derive_key(NAMESPACE_CONTEXT);
        hasher.update(&self.weights).update(&self.tokenizer).update(self.layout.as_bytes());
        hasher.update(&len_u32(self.adapter.len())).update(self.adapter.as_bytes());
        NamespaceId(*hasher.finalize().as_bytes())
    }
}
