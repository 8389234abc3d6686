//! State out and in: the rows of one block of tokens as a [`BlockObject`], and what continues the sequence after it
//! as a [`StateObject`].
//!
//! A plane holds, for a run of a group's layers, layer after layer, the rows of the block; a row is its fields, packed,
//! little-endian (see `esker_prefix::KvLayout`). Which rows a group has is the cache's to say. Nothing is rounded
//! here: a row was rounded to its stored format before it was first used.

use std::ops::Range;

use bytes::Bytes;
use esker_prefix::{
    BlockHash, BlockObject, Family, NamespaceId, ObjectKind, PlaneSpec, PrefixError, ScopeTag, StateObject,
};

use crate::arrival::{Part, part};
use crate::panels::KeyPanels;
use crate::residency::Parked;
use crate::row_codec::RowCodec;
use crate::sequence::Cache;
use crate::{DecoderError, Model, Result, Sequence};

/// Whose block or state it is and which prefix it completes; the decoder knows rows only.
#[derive(Clone, Copy, Debug)]
pub struct BlockIdentity {
    /// Namespace of the model.
    pub namespace: NamespaceId,
    /// Scope of the owner.
    pub scope: ScopeTag,
    /// Hash of the prefix up to the block boundary before it.
    pub parent: BlockHash,
    /// Hash of the prefix that it completes.
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
        let first = end.saturating_sub(block_tokens);
        self.check_resident(first)?;
        if end > self.tokens {
            return Err(DecoderError::BlockIncomplete { block: index, end, tokens: self.tokens });
        }
        let plane = |spec: &PlaneSpec| self.history_plane(model, spec, first..end);
        let planes = model.layout().planes(ObjectKind::Block).iter().map(plane).collect();
        let BlockIdentity { namespace, scope, parent, hash } = identity;
        Ok(BlockObject::new(model.layout(), namespace, scope, parent, hash, end as u64, planes)?)
    }

    /// The state that continues the sequence after block `index`: [`Sequence::state_at`] its end.
    pub fn state(&self, model: &Model, index: usize, identity: BlockIdentity) -> Result<StateObject> {
        let block_tokens = model.layout().block_tokens() as usize;
        self.state_at(model, index.saturating_add(1).saturating_mul(block_tokens), identity)
    }

    /// The state that continues the sequence after `tokens` tokens. It is held from the last block boundary on that the sequence
    /// has passed, or the end that it was restored at. Off the block grid the rows of the tokens behind the last boundary come
    /// with it, and `identity` has that boundary as its parent. On the grid, a model without state groups gives an empty object.
    pub fn state_at(&self, model: &Model, tokens: usize, identity: BlockIdentity) -> Result<StateObject> {
        self.check_model(model)?;
        if !self.holds_state(tokens) {
            return Err(DecoderError::StateNotHeld { end: tokens, tokens: self.tokens });
        }
        let layout = model.layout();
        let boundary = tokens - tokens % layout.block_tokens() as usize;
        if boundary < tokens {
            self.check_arrived()?;
            self.check_resident(boundary)?;
        }
        let plane = |spec: &PlaneSpec| match layout.groups()[usize::from(spec.group)].family {
            Family::History => self.history_plane(model, spec, boundary..tokens),
            Family::State => self.state_plane(model, spec, tokens),
        };
        let planes = layout.planes_at(ObjectKind::State, tokens as u64).iter().map(plane).collect();
        let BlockIdentity { namespace, scope, parent, hash } = identity;
        Ok(StateObject::new(layout, namespace, scope, parent, hash, tokens as u64, planes)?)
    }

    /// Refuses what needs rows of tokens from `first` on, if the first of them are parked.
    fn check_resident(&self, first: usize) -> Result<()> {
        match self.supply.parked.as_ref().map(Parked::tokens).filter(|&tokens| first < tokens) {
            Some(tokens) => Err(DecoderError::RowsMissing { layer: 0, tokens }),
            None => Ok(()),
        }
    }

    /// The rows that a run of tokens completes.
    fn history_plane(&self, model: &Model, spec: &PlaneSpec, tokens: Range<usize>) -> Bytes {
        let mut bytes = Vec::with_capacity(usize::try_from(spec.len_bytes).unwrap_or(0));
        let (group, layers) = layers_of(model, spec);
        // Where blocks cut runs of tokens, one may complete a row less than another.
        let (mut whole, layer_bytes) = (0, layer_bytes(spec));
        for layer in layers {
            let rows = match &self.cache {
                Cache::Mla(cache) => cache.rows(group, layer, tokens.clone()),
                Cache::V4(cache) => cache.rows(group, layer, tokens.clone()),
            };
            model.formats.codec(spec.group).encode(&rows, &mut bytes);
            whole += layer_bytes;
            bytes.resize(whole, 0);
        }
        bytes.into()
    }

    fn state_plane(&self, model: &Model, spec: &PlaneSpec, tokens: usize) -> Bytes {
        let mut bytes = Vec::with_capacity(usize::try_from(spec.len_bytes).unwrap_or(0));
        let (group, layers) = layers_of(model, spec);
        if let Cache::V4(cache) = &self.cache {
            let codec = model.formats.codec(spec.group);
            let rows = layer_bytes(spec) / row_bytes(model, spec);
            layers.for_each(|layer| codec.encode(&cache.state(group, layer, tokens, rows), &mut bytes));
        }
        bytes.into()
    }

    /// Appends the rows of `block`, bit for bit. It must be the next block of this sequence, of the namespace of what was
    /// restored before, and the child of the block restored just before, if one was. Whether its bytes belong to its key is the store's to prove. If the
    /// model has state groups, the sequence then [needs the state](Sequence::needs_state) after its last block.
    pub fn restore(&mut self, model: &Model, block: &BlockObject) -> Result<()> {
        self.check_model(model)?;
        self.check_arrived()?;
        self.check_namespace(block.namespace())?;
        self.check_next(model, block)?;
        let block_tokens = model.layout().block_tokens() as usize;
        self.reserve(model, block_tokens);
        for (spec, plane) in model.layout().planes(ObjectKind::Block).iter().zip(block.planes()) {
            let tokens = self.tokens..self.tokens + block_tokens;
            for (layer, rows) in history_rows(model, spec, tokens, plane) {
                self.append(layer, rows);
            }
        }
        self.tokens += block_tokens;
        if let Cache::V4(cache) = &mut self.cache {
            cache.drop_state(self.tokens);
        }
        self.restored = Some(block.id().hash);
        self.namespace = Some(block.namespace());
        self.keep_from_here();
        Ok(())
    }

    /// Puts the state back that continues this sequence, bit for bit. It must be that of the sequence's last token, of the
    /// namespace of what was restored before, and of the prefix of the block restored just before, if one was. Off the block grid it is of some tokens behind that block, whose
    /// rows it brings along.
    pub fn restore_state(&mut self, model: &Model, state: &StateObject) -> Result<()> {
        self.check_model(model)?;
        self.check_namespace(state.namespace())?;
        let layout = model.layout();
        let tail = state.tokens() % u64::from(layout.block_tokens());
        let (expected, got) = (self.tokens as u64, state.tokens());
        if expected != got - tail {
            return Err(DecoderError::StatePosition { expected, got });
        }
        let (tokens, limit) =
            (usize::try_from(got).unwrap_or(usize::MAX), model.config.max_position_embeddings);
        if tokens > limit {
            return Err(DecoderError::TooLong { tokens, limit });
        }
        let got = if tail > 0 { state.parent() } else { state.id().hash };
        if let Some(expected) = self.restored.filter(|hash| *hash != got) {
            return Err(DecoderError::StatePrefix { expected, got });
        }
        check_planes(model, ObjectKind::State, state.tokens(), state.planes())?;
        self.namespace = Some(state.namespace());
        let specs = layout.planes_at(ObjectKind::State, state.tokens());
        let (states, rows) = specs.split_at(layout.planes(ObjectKind::State).len());
        let (states_bytes, rows_bytes) = state.planes().split_at(states.len());
        for (spec, plane) in rows.iter().zip(rows_bytes) {
            for (layer, rows) in history_rows(model, spec, self.tokens..tokens, plane) {
                match self.supply.arriving.as_mut() {
                    // Keys that come first have still to come; rows know how many those are.
                    Some(arriving) if part(rows.group) == Part::Keys && arriving.awaits_keys(layer) => {
                        arriving.follow(layer, rows.decoded());
                    }
                    _ => self.append(layer, rows),
                }
            }
        }
        if tail > 0 {
            (self.tokens, self.restored) = (tokens, None);
            self.keep_from_here();
        }
        let Cache::V4(cache) = &mut self.cache else { return Ok(()) };
        cache.drop_state(tokens);
        for (spec, plane) in states.iter().zip(states_bytes).filter(|(spec, _)| spec.len_bytes > 0) {
            let (group, layers) = layers_of(model, spec);
            for (bytes, layer) in plane.chunks_exact(layer_bytes(spec)).zip(layers) {
                let mut rows = Vec::new();
                model.formats.codec(spec.group).decode(bytes, &mut rows);
                cache.restore_state(group, layer, tokens, &rows);
            }
        }
        cache.resume(tokens);
        Ok(())
    }

    /// Appends rows of one group to a layer's.
    fn append(&mut self, layer: usize, rows: GroupRows<'_>) {
        let place = match &mut self.cache {
            Cache::Mla(cache) => cache.place(rows.group, layer),
            Cache::V4(cache) => cache.place(rows.group, layer),
        };
        match place {
            Place::Rows(held) => rows.codec.decode(rows.bytes, held),
            Place::Keys(keys) => keys.extend(&rows.decoded()),
        }
    }

    fn check_namespace(&self, got: NamespaceId) -> Result<()> {
        match self.namespace.filter(|expected| *expected != got) {
            Some(expected) => Err(DecoderError::OtherNamespace { expected, got }),
            None => Ok(()),
        }
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
        check_planes(model, ObjectKind::Block, block.tokens(), block.planes())
    }
}

/// Rows of one group and layer, as they lie in a plane.
pub(crate) struct GroupRows<'a> {
    pub(crate) group: &'a str,
    codec: &'a RowCodec,
    bytes: &'a [u8],
}

impl GroupRows<'_> {
    pub(crate) fn decoded(&self) -> Vec<f32> {
        let mut rows = Vec::new();
        self.codec.decode(self.bytes, &mut rows);
        rows
    }
}

/// The rows that layers complete in a run of tokens, of a plane that is as long as the layout says.
fn history_rows<'a>(
    model: &'a Model,
    spec: &PlaneSpec,
    tokens: Range<usize>,
    plane: &'a [u8],
) -> impl Iterator<Item = (usize, GroupRows<'a>)> + use<'a> {
    let (group, layers) = layers_of(model, spec);
    let (codec, row_bytes) = (model.formats.codec(spec.group), row_bytes(model, spec));
    // A plane without rows is none.
    plane.chunks_exact(layer_bytes(spec).max(1)).zip(layers).map(move |(bytes, layer)| {
        let rows = model.rows_in(layer, tokens.clone()).len();
        (layer, GroupRows { group, codec, bytes: &bytes[..rows * row_bytes] })
    })
}

/// Refuses an object of another layout: the planes it was checked against are not ours.
fn check_planes(model: &Model, kind: ObjectKind, tokens: u64, planes: &[Bytes]) -> Result<()> {
    let layout = model.layout();
    let specs = layout.planes_at(kind, tokens);
    let (expected, got) = (specs.len(), planes.len());
    if expected != got {
        return Err(PrefixError::PlaneCount { layout: layout.id(), expected, got }.into());
    }
    let mut planes = specs.iter().zip(planes).enumerate();
    planes.try_for_each(|(plane, (spec, bytes))| check_length(model, plane, spec, bytes))
}

/// Refuses a plane that blocks do not have, or not of this length.
pub(crate) fn check_block_plane(model: &Model, plane: usize, bytes: &[u8]) -> Result<PlaneSpec> {
    let layout = model.layout();
    let specs = layout.planes(ObjectKind::Block);
    let Some(spec) = specs.get(plane) else {
        return Err(
            PrefixError::PlaneCount { layout: layout.id(), expected: specs.len(), got: plane + 1 }.into()
        );
    };
    check_length(model, plane, spec, bytes)?;
    Ok(*spec)
}

fn check_length(model: &Model, plane: usize, spec: &PlaneSpec, bytes: &[u8]) -> Result<()> {
    let layout = model.layout();
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
    Ok(())
}

/// Bytes of one row of a plane.
fn row_bytes(model: &Model, spec: &PlaneSpec) -> usize {
    let bytes = model.layout().groups()[usize::from(spec.group)].row_bytes();
    usize::try_from(bytes).unwrap_or(usize::MAX)
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
