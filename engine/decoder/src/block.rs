//! State out and in: the rows of one block of tokens as a [`BlockObject`], and what continues the sequence after it
//! as a [`StateObject`].
//!
//! A plane holds, for a run of a group's layers, layer after layer, the rows of the block; a row is its fields, packed,
//! little-endian (see `esker_prefix::KvLayout`). Which rows a group has is the cache's to say. Nothing is rounded
//! here: a row was rounded to its stored format before it was first used.

use bytes::Bytes;
use esker_prefix::{
    BlockHash, BlockObject, NamespaceId, ObjectKind, PlaneSpec, PrefixError, ScopeTag, StateObject,
};

use crate::panels::KeyPanels;
use crate::sequence::Cache;
use crate::{DecoderError, Model, Result, Sequence};

/// Whose block or state it is and which prefix it completes; the decoder knows rows only.
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

/// Where a layer keeps the rows of a history group.
pub(crate) enum Place<'a> {
    Rows(&'a mut Vec<f32>),
    Keys(&'a mut KeyPanels),
}

impl Sequence {
    /// The rows of block `index`, which must be complete. Costs one copy of the block's bytes.
    pub fn block(&self, model: &Model, index: usize, identity: BlockIdentity) -> Result<BlockObject> {
        self.check_model(model)?;
        self.check_arrived()?;
        let block_tokens = model.layout().block_tokens() as usize;
        let end = index.saturating_add(1).saturating_mul(block_tokens);
        if let Some(parked) = self.supply.parked.as_ref().filter(|parked| end <= parked.tokens()) {
            return Err(DecoderError::RowsMissing { layer: 0, tokens: parked.tokens() });
        }
        if end > self.tokens {
            return Err(DecoderError::BlockIncomplete { block: index, end, tokens: self.tokens });
        }
        let plane = |spec: &PlaneSpec| {
            let mut bytes = Vec::with_capacity(usize::try_from(spec.len_bytes).unwrap_or(0));
            let (group, layers) = layers_of(model, spec);
            // Where blocks cut runs of tokens, one may complete a row less than another.
            let (mut whole, layer_bytes) = (0, layer_bytes(spec));
            for layer in layers {
                let tokens = end - block_tokens..end;
                let rows = match &self.cache {
                    Cache::Mla(cache) => cache.rows(group, layer, tokens),
                    Cache::V4(cache) => cache.rows(group, layer, tokens),
                };
                model.formats.codec(spec.group).encode(&rows, &mut bytes);
                whole += layer_bytes;
                bytes.resize(whole, 0);
            }
            Bytes::from(bytes)
        };
        let planes = model.layout().planes(ObjectKind::Block).iter().map(plane).collect();
        let BlockIdentity { namespace, scope, parent, hash } = identity;
        Ok(BlockObject::new(model.layout(), namespace, scope, parent, hash, end as u64, planes)?)
    }

    /// The state that continues the sequence after block `index`. It is held for the last block boundary that the
    /// sequence has passed, and for the one it was restored at. A model without state groups gives an empty object.
    pub fn state(&self, model: &Model, index: usize, identity: BlockIdentity) -> Result<StateObject> {
        self.check_model(model)?;
        let end = index.saturating_add(1).saturating_mul(model.layout().block_tokens() as usize);
        let held = match &self.cache {
            Cache::Mla(_) => true,
            Cache::V4(cache) => cache.holds_state(end),
        };
        if end > self.tokens || !held {
            return Err(DecoderError::StateNotHeld { end, tokens: self.tokens });
        }
        let plane = |spec: &PlaneSpec| {
            let mut bytes = Vec::with_capacity(usize::try_from(spec.len_bytes).unwrap_or(0));
            let (group, layers) = layers_of(model, spec);
            if let Cache::V4(cache) = &self.cache {
                let codec = model.formats.codec(spec.group);
                let rows = model.layout().groups()[usize::from(spec.group)].rows as usize;
                layers.for_each(|layer| codec.encode(&cache.state(group, layer, end, rows), &mut bytes));
            }
            Bytes::from(bytes)
        };
        let planes = model.layout().planes(ObjectKind::State).iter().map(plane).collect();
        let BlockIdentity { namespace, scope, parent, hash } = identity;
        Ok(StateObject::new(model.layout(), namespace, scope, parent, hash, end as u64, planes)?)
    }

    /// Appends the rows of `block`, bit for bit. It must be the next block of this sequence, and the child of the
    /// block restored just before, if one was. Whether its bytes belong to its key is the store's to prove. If the
    /// model has state groups, the sequence then [needs the state](Sequence::needs_state) after its last block.
    pub fn restore(&mut self, model: &Model, block: &BlockObject) -> Result<()> {
        self.check_model(model)?;
        self.check_arrived()?;
        self.check_next(model, block)?;
        let block_tokens = model.layout().block_tokens() as usize;
        self.reserve(model, block_tokens);
        for (spec, plane) in model.layout().planes(ObjectKind::Block).iter().zip(block.planes()) {
            let (group, layers) = layers_of(model, spec);
            let tokens = self.tokens..self.tokens + block_tokens;
            let row_bytes =
                layer_bytes(spec) / model.layout().groups()[usize::from(spec.group)].rows as usize;
            for (bytes, layer) in plane.chunks_exact(layer_bytes(spec)).zip(layers) {
                let rows = model.rows_in(layer, tokens.clone()).len();
                let bytes = &bytes[..rows * row_bytes];
                let place = match &mut self.cache {
                    Cache::Mla(cache) => cache.place(group, layer),
                    Cache::V4(cache) => cache.place(group, layer),
                };
                match place {
                    Place::Rows(rows) => model.formats.codec(spec.group).decode(bytes, rows),
                    Place::Keys(keys) => {
                        let mut rows = Vec::new();
                        model.formats.codec(spec.group).decode(bytes, &mut rows);
                        keys.extend(&rows);
                    }
                }
            }
        }
        self.tokens += block_tokens;
        if let Cache::V4(cache) = &mut self.cache {
            cache.drop_state(self.tokens);
        }
        self.restored = Some(block.id().hash);
        self.keep_from_here();
        Ok(())
    }

    /// Puts the state back that continues this sequence, bit for bit. It must be that of the sequence's last token,
    /// and of the prefix of the block restored just before, if one was.
    pub fn restore_state(&mut self, model: &Model, state: &StateObject) -> Result<()> {
        self.check_model(model)?;
        let (expected, got) = (self.tokens as u64, state.tokens());
        if expected != got {
            return Err(DecoderError::StatePosition { expected, got });
        }
        let got = state.id().hash;
        if let Some(expected) = self.restored.filter(|hash| *hash != got) {
            return Err(DecoderError::StatePrefix { expected, got });
        }
        check_planes(model, ObjectKind::State, state.planes())?;
        let Cache::V4(cache) = &mut self.cache else { return Ok(()) };
        cache.drop_state(self.tokens);
        for (spec, plane) in model.layout().planes(ObjectKind::State).iter().zip(state.planes()) {
            let (group, layers) = layers_of(model, spec);
            for (bytes, layer) in plane.chunks_exact(layer_bytes(spec)).zip(layers) {
                let mut rows = Vec::new();
                model.formats.codec(spec.group).decode(bytes, &mut rows);
                cache.restore_state(group, layer, self.tokens, &rows);
            }
        }
        cache.resume(self.tokens);
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
        check_planes(model, ObjectKind::Block, block.planes())
    }
}

/// Refuses an object of another layout: the planes it was checked against are not ours.
fn check_planes(model: &Model, kind: ObjectKind, planes: &[Bytes]) -> Result<()> {
    let layout = model.layout();
    let specs = layout.planes(kind);
    let (expected, got) = (specs.len(), planes.len());
    if expected != got {
        return Err(PrefixError::PlaneCount { layout: layout.id(), expected, got }.into());
    }
    planes.iter().enumerate().try_for_each(|(plane, bytes)| check_plane(model, kind, plane, bytes).map(drop))
}

/// Refuses a plane that the layout does not have, or not of this length.
pub(crate) fn check_plane(model: &Model, kind: ObjectKind, plane: usize, bytes: &[u8]) -> Result<PlaneSpec> {
    let layout = model.layout();
    let specs = layout.planes(kind);
    let Some(spec) = specs.get(plane) else {
        return Err(
            PrefixError::PlaneCount { layout: layout.id(), expected: specs.len(), got: plane + 1 }.into()
        );
    };
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
    Ok(*spec)
}

/// Bytes of one layer in a plane.
pub(crate) fn layer_bytes(spec: &PlaneSpec) -> usize {
    usize::try_from(spec.len_bytes).unwrap_or(0) / usize::from(spec.layers)
}

/// The group of a plane and its layers of the model.
pub(crate) fn layers_of<'a>(
    model: &'a Model,
    spec: &PlaneSpec,
) -> (&'a str, impl ExactSizeIterator<Item = usize> + use<'a>) {
    let group = &model.layout().groups()[usize::from(spec.group)];
    let first = usize::from(spec.first_layer);
    let layers = &group.layers[first..first + usize::from(spec.layers)];
    (&group.name, layers.iter().map(|&layer| usize::from(layer)))
}
