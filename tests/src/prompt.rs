//! Prompts with made-up KV: every byte follows from a seed, so whoever knows the seed can tell right from wrong.

use std::sync::Arc;

use bytes::Bytes;
use esker_client::Object;
use esker_prefix::{Group, KvLayout, NamespaceId, ObjectKind, RowFormat, TokenId};

use crate::Random;

/// A prompt of a namespace, and the objects that belong to it.
#[derive(Clone)]
pub struct Prompt {
    /// Where its objects are stored.
    pub namespace: NamespaceId,
    /// Their layout.
    pub layout: Arc<KvLayout>,
    /// From which tokens and bytes follow.
    pub seed: u64,
    /// Its tokens.
    pub tokens: Vec<TokenId>,
}

impl Prompt {
    /// A prompt of so many blocks and one token more: the last token of a prompt is never offered from the cache.
    pub fn new(namespace: NamespaceId, layout: &Arc<KvLayout>, seed: u64, blocks: u32) -> Self {
        let tokens = tokens(seed, (blocks * layout.block_tokens() + 1) as usize);
        Self { namespace, layout: layout.clone(), seed, tokens }
    }

    /// Length of a prefix of so many blocks.
    pub fn boundary(&self, blocks: u64) -> u64 {
        blocks * u64::from(self.layout.block_tokens())
    }

    /// Block objects by number, from 1 on.
    pub fn blocks(&self, numbers: impl IntoIterator<Item = u64>) -> Vec<Object> {
        numbers.into_iter().map(|number| self.object(ObjectKind::Block, self.boundary(number))).collect()
    }

    /// The state object after so many blocks.
    pub fn state(&self, blocks: u64) -> Object {
        self.object(ObjectKind::State, self.boundary(blocks))
    }

    /// The object that completes a prefix.
    pub fn object(&self, kind: ObjectKind, tokens: u64) -> Object {
        let planes = 0..self.layout.planes_at(kind, tokens).len();
        Object { kind, tokens, planes: planes.map(|plane| self.plane(kind, tokens, plane)).collect() }
    }

    /// The bytes of one plane. Every other one can be compressed.
    pub fn plane(&self, kind: ObjectKind, tokens: u64, plane: usize) -> Bytes {
        let mut random = Random(self.seed ^ tokens << 20 ^ (plane as u64) << 40 ^ (kind as u64) << 56);
        let mask = if plane.is_multiple_of(2) { u64::MAX } else { 0x0303_0303_0303_0303 };
        let len = usize::try_from(self.layout.planes_at(kind, tokens)[plane].len_bytes)
            .expect("a plane fits in memory");
        let mut bytes: Vec<u8> =
            (0..len.div_ceil(8)).flat_map(|_| (random.number() & mask).to_le_bytes()).collect();
        bytes.truncate(len);
        bytes.into()
    }
}

/// Tokens from a seed, none of them special in any vocabulary of 4,096.
pub fn tokens(seed: u64, count: usize) -> Vec<TokenId> {
    let mut random = Random(seed);
    let token = |number| TokenId(u32::try_from(number).expect("below 4,000"));
    (0..count).map(|_| token(64 + random.below(3900))).collect()
}

/// History only, like V3.2: blocks of 64 tokens and about 100 KB.
pub fn flat_layout() -> Arc<KvLayout> {
    let config = r#"{"model_type":"deepseek_v32","num_hidden_layers":3,"kv_lora_rank":128,"qk_rope_head_dim":32,
        "index_head_dim":64}"#;
    Arc::new(KvLayout::from_config(config, RowFormat::Bf16, 64).expect("a published model"))
}

/// History and state, like V4: rows per 4 and per 128 tokens, windows, compressor overlap; one plane per layer.
pub fn staged_layout() -> Arc<KvLayout> {
    let config = r#"{"model_type":"deepseek_v4","num_hidden_layers":5,"head_dim":64,"qk_rope_head_dim":16,
        "index_head_dim":32,"sliding_window":128,"compress_ratios":[0,4,128,4,128]}"#;
    let published = KvLayout::from_config(config, RowFormat::Bf16, 128).expect("a published model");
    let one_layer = |group: &Group| Group { plane_layers: 1, ..group.clone() };
    let groups = published.groups().iter().map(one_layer).collect();
    Arc::new(KvLayout::new(published.name(), 128, groups).expect("only the cut into planes differs"))
}
