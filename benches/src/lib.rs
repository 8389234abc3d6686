//! Benchmarks of Esker.
//!
//! `esker bench store` and its like call this crate; criterion benches of single hot paths lie beside it:
//!
//! ```text
//! cargo bench -p esker-server -p esker-benches --bench chain_hash
//! ```
//!
//! Selecting `esker-server` too keeps cargo's feature set, and with it the RocksDB that is already built.

#![allow(clippy::cast_possible_truncation)]

mod floor;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod measure;
mod page_cache;
pub mod replay;
pub mod store;

pub use page_cache::drop_page_cache;

use std::ops::Range;

use bytes::Bytes;
use esker_prefix::{
    KvLayout, Namespace, NamespaceId, ObjectKind, RootSecret, RowFormat, ScopeKey, ScopeKind,
};
use esker_store::PutObject;

/// Tokens of a block.
pub(crate) const BLOCK_TOKENS: u32 = 128;

/// The schedule of V4-Flash: the layout whose blocks have 449,824 bytes.
pub fn v4_flash() -> KvLayout {
    let mut ratios = vec![0, 0];
    ratios.extend([4, 128].repeat(20));
    ratios.push(4);
    let config = format!(
        r#"{{"model_type":"deepseek_v4","num_hidden_layers":43,"head_dim":512,"qk_rope_head_dim":64,
        "index_head_dim":128,"sliding_window":128,"compress_ratios":{ratios:?}}}"#
    );
    KvLayout::from_config(&config, RowFormat::Deployed, BLOCK_TOKENS)
        .expect("the published schedule is a layout")
}

/// A scope and a namespace of `layout`.
pub fn identity(layout: &KvLayout) -> (ScopeKey, NamespaceId) {
    let scope = ScopeKey::derive(&RootSecret::new([1; 32]), ScopeKind::Private, "bench", 0);
    let namespace =
        Namespace { weights: [2; 32], tokenizer: [3; 32], layout: layout.id(), adapter: String::new() };
    (scope, namespace.id())
}

/// Blocks of one prefix with incompressible bytes, all different, made from `seed`.
pub fn prefix(layout: &KvLayout, seed: u32, blocks: Range<u32>) -> Vec<PutObject> {
    let (scope, namespace) = identity(layout);
    let links = store::chain(layout, &scope, namespace, seed, blocks.end);
    let object = |link: &store::Link| {
        let planes = layout.planes(ObjectKind::Block).iter().zip(0_u64..).map(|(plane, index)| {
            let len = usize::try_from(plane.len_bytes).expect("planes fit in memory");
            let mut bytes = vec![0; len];
            let mut hasher = blake3::Hasher::new();
            hasher.update(link.hash.as_bytes()).update(&index.to_le_bytes());
            hasher.finalize_xof().fill(&mut bytes);
            Bytes::from(bytes)
        });
        link.object(layout, planes.collect())
    };
    links[blocks.start as usize..].iter().map(object).collect()
}
