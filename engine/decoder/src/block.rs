//! State out and in: the rows of one block of tokens as a [`BlockObject`].
//!
//! A plane holds, for a run of a group's layers, layer after layer, the rows of the block; a row is its fields, packed,
//! little-endian (see `esker_prefix::KvLayout`). Group `latent` has rows `[latent | rope key]`, group `indexer_key`
//! rows `[key]`. Nothing is rounded
//! here: a row was rounded to its stored format before it was first used.

use bytes::Bytes;
use esker_prefix::{BlockHash, BlockObject, NamespaceId, ObjectKind, PlaneSpec, PrefixError, ScopeTag};
use half::bf16;

use crate::{DecoderError, KvFormat, Model, Result, Sequence};

const INDEXER_GROUP: &str = "indexer_key";

/// Whose block it is and which prefix it completes; the decoder knows rows only.
#[derive(Clone, Copy, Debug)]
pub struct BlockIdentity {
    /// Namespace of the model.
    pub namespace: NamespaceId,
    /// Scope of the owner.
    pub scope: ScopeTag,
    /// Hash of the prefix one block shorter.
    pub parent: BlockHash,
    /// Hash of the prefix that the block completes.
    pub hash: BlockHash,
}

impl Sequence {
    /// The rows of block `index`, which must be complete. Costs one copy of the block's bytes.
    pub fn block(&self, model: &Model, index: usize, identity: BlockIdentity) -> Result<BlockObject> {
        self.check_model(model)?;
        let block_tokens = model.layout().block_tokens() as usize;
        let end = index.saturating_add(1).saturating_mul(block_tokens);
        if end > self.tokens {
            return Err(DecoderError::BlockIncomplete { block: index, end, tokens: self.tokens });
        }
        let plane = |spec: &PlaneSpec| {
            let mut bytes = Vec::with_capacity(usize::try_from(spec.len_bytes).unwrap_or(0));
            for (layer, indexer) in layers_of(model, spec) {
                let cache = &self.layers[layer];
                let rows = end - block_tokens..end;
                if indexer {
                    encode(&cache.keys.rows(rows), model.kv_format(), &mut bytes);
                } else {
                    let width = model.config().row_width();
                    encode(&cache.rows[rows.start * width..rows.end * width], model.kv_format(), &mut bytes);
                }
            }
            Bytes::from(bytes)
        };
        let planes = model.layout().planes(ObjectKind::Block).iter().map(plane).collect();
        let BlockIdentity { namespace, scope, parent, hash } = identity;
        Ok(BlockObject::new(model.layout(), namespace, scope, parent, hash, end as u64, planes)?)
    }

    /// Appends the rows of `block`, bit for bit. It must be the next block of this sequence, and the child of the
    /// block restored just before, if one was. Whether its bytes belong to its key is the store's to prove.
    pub fn restore(&mut self, model: &Model, block: &BlockObject) -> Result<()> {
        self.check_model(model)?;
        self.check_next(model, block)?;
        let specs = model.layout().planes(ObjectKind::Block);
        self.reserve(model, model.layout().block_tokens() as usize);
        for (spec, plane) in specs.iter().zip(block.planes()) {
            let layers = layers_of(model, spec);
            let layer_bytes = plane.len() / layers.len();
            for ((layer, indexer), bytes) in layers.zip(plane.chunks_exact(layer_bytes)) {
                let cache = &mut self.layers[layer];
                if indexer {
                    let mut keys = Vec::new();
                    decode(bytes, model.kv_format(), &mut keys);
                    cache.keys.extend(&keys);
                } else {
                    decode(bytes, model.kv_format(), &mut cache.rows);
                }
            }
        }
        self.tokens += model.layout().block_tokens() as usize;
        self.restored = Some(block.id().hash);
        Ok(())
    }

    fn check_next(&self, model: &Model, block: &BlockObject) -> Result<()> {
        let layout = model.layout();
        let block_tokens = u64::from(layout.block_tokens());
        let (tokens, limit) = (self.tokens as u64, model.config().max_position_embeddings);
        let expected = tokens + block_tokens;
        if tokens % block_tokens != 0 || block.tokens() != expected {
            return Err(DecoderError::BlockPosition { expected, got: block.tokens() });
        }
        if expected > limit as u64 {
            return Err(DecoderError::TooLong {
                tokens: self.tokens + layout.block_tokens() as usize,
                limit,
            });
        }
        if let Some(expected) = self.restored.filter(|hash| *hash != block.parent()) {
            return Err(DecoderError::BlockParent { expected, got: block.parent() });
        }
        // A block of another layout: the planes it was checked against are not ours.
        let specs = layout.planes(ObjectKind::Block);
        let (expected, got) = (specs.len(), block.planes().len());
        if expected != got {
            return Err(PrefixError::PlaneCount { layout: layout.id(), expected, got }.into());
        }
        for (plane, (spec, bytes)) in specs.iter().zip(block.planes()).enumerate() {
            if spec.len_bytes != bytes.len() as u64 {
                return Err(PrefixError::PlaneSize {
                    layout: layout.id(),
                    plane,
                    group: layout.groups()[usize::from(spec.group)].name.clone(),
                    first_layer: spec.first_layer,
                    end_layer: spec.first_layer + spec.layers,
                    expected: spec.len_bytes,
                    got: bytes.len() as u64,
                }
                .into());
            }
        }
        Ok(())
    }
}

/// Model layers of a plane, and whether it holds their indexer keys.
fn layers_of(model: &Model, spec: &PlaneSpec) -> impl ExactSizeIterator<Item = (usize, bool)> {
    let group = &model.layout().groups()[usize::from(spec.group)];
    let first = usize::from(spec.first_layer);
    let indexer = group.name == INDEXER_GROUP;
    let layers = &group.layers[first..first + usize::from(spec.layers)];
    layers.iter().map(move |&layer| (usize::from(layer), indexer))
}

fn encode(rows: &[f32], format: KvFormat, bytes: &mut Vec<u8>) {
    match format {
        KvFormat::F32 => bytes.extend(rows.iter().flat_map(|value| value.to_le_bytes())),
        KvFormat::Bf16 => bytes.extend(rows.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes())),
    }
}

fn decode(bytes: &[u8], format: KvFormat, rows: &mut Vec<f32>) {
    match format {
        KvFormat::F32 => rows.extend(bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x))),
        KvFormat::Bf16 => rows.extend(bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32())),
    }
}
