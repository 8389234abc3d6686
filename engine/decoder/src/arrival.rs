//! Rows of stored blocks on their way into a sequence, layer by layer: the first layers compute while the rest is still
//! being read.
//!
//! [`Incoming`] is filled with planes by whatever thread receives them, apart from the sequence, and gives a layer's
//! rows away as soon as it has them all. The sequence, told by [`Sequence::expect`] what will come, asks for a layer's
//! rows when a prefill or replay first reaches that layer, and not before. If they do not come, nothing that was computed
//! meanwhile is kept. Where bytes come from, and how the two threads wait for each other, is the caller's affair.
//!
//! Invariant: a layer's rows are handed over whole, so that a sequence never computes on a part of them.

use std::ops::Range;

use esker_prefix::{BlockHash, ObjectKind};

use crate::block::{GroupRows, check_block_plane, layer_bytes, layers_of};
use crate::config::Family;
use crate::kernel::pages;
use crate::panels::KeyPanels;
use crate::residency::{Parked, Residency, is_parkable};
use crate::sequence::Cache;
use crate::{DecoderError, Model, Result, Sequence};

/// Gives the rows of a layer when they are there, and waits until they are; `None` if they will not come. Each layer is
/// asked for once, in ascending order.
pub type Arrivals = Box<dyn FnMut(usize) -> Option<LayerRows> + Send>;

/// All rows of one layer that blocks hold.
pub struct LayerRows {
    pub(crate) rows: Vec<f32>,
    /// Empty where the layer has no indexer.
    pub(crate) keys: KeyPanels,
}

/// See the module.
pub struct Incoming {
    tokens: usize,
    /// Block that each plane expects next.
    next: Vec<usize>,
    layers: Vec<Filling>,
    parked: bool,
}

struct Filling {
    rows: Option<LayerRows>,
    /// Planes, of all blocks, that are still to come.
    missing: usize,
}

impl Incoming {
    /// For the rows of `blocks` blocks, with room for the rows of `room` tokens in all, so that a sequence that grows by as
    /// many moves nothing.
    pub fn new(model: &Model, blocks: usize, room: usize) -> Self {
        Self::of(model, blocks, room, false)
    }

    /// As [`Incoming::new`], without the rows that stay parked: their planes are not to be put.
    pub fn without_parked(model: &Model, blocks: usize, room: usize) -> Self {
        Self::of(model, blocks, room, true)
    }

    fn of(model: &Model, blocks: usize, room: usize, parked: bool) -> Self {
        let layout = model.layout();
        let tokens = blocks * layout.block_tokens() as usize;
        let room = room.clamp(tokens, model.config.max_position_embeddings.max(tokens));
        let specs = layout.planes(ObjectKind::Block);
        let key_width = model.config.index_head_dim;
        let layer = |_| {
            let rows = LayerRows { rows: Vec::new(), keys: KeyPanels::new(key_width) };
            Filling { rows: Some(rows), missing: 0 }
        };
        let mut layers: Vec<Filling> = (0..model.config.num_hidden_layers).map(layer).collect();
        for spec in specs {
            let group = &layout.groups()[usize::from(spec.group)];
            if parked && is_parkable(&group.name) {
                continue;
            }
            let row_width = model.formats.codec(spec.group).width(group);
            for layer in layers_of(model, spec).1 {
                layers[layer].missing += blocks;
                let Some(LayerRows { rows, keys }) = &mut layers[layer].rows else { continue };
                let count = model.rows_in(layer, 0..room).len();
                match is_key(&group.name) {
                    true => keys.reserve(count),
                    false => pages::reserve(rows, count * row_width),
                }
            }
        }
        Self { tokens, next: vec![0; specs.len()], layers, parked }
    }

    /// Tokens whose rows will have come in the end.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Takes in one plane of one block: the blocks of each plane in order, planes in any. Gives the layers that are
    /// complete with it. On an error nothing was taken in.
    pub fn put(
        &mut self,
        model: &Model,
        block: usize,
        plane: usize,
        bytes: &[u8],
    ) -> Result<Vec<(usize, LayerRows)>> {
        let spec = check_block_plane(model, plane, bytes)?;
        let block_tokens = model.layout().block_tokens() as usize;
        if self.next[plane] != block || (block + 1) * block_tokens > self.tokens {
            let prefix = |block: usize| ((block + 1) * block_tokens) as u64;
            return Err(DecoderError::BlockPosition {
                expected: prefix(self.next[plane]),
                got: prefix(block),
            });
        }
        self.next[plane] += 1;
        let group = &model.layout().groups()[usize::from(spec.group)];
        if self.parked && is_parkable(&group.name) {
            return Ok(Vec::new());
        }
        let codec = model.formats.codec(spec.group);
        let row_bytes = layer_bytes(&spec) / group.rows as usize;
        let (name, of_plane) = layers_of(model, &spec);
        let mut complete = Vec::new();
        let mut decoded = Vec::new();
        for (bytes, layer) in bytes.chunks_exact(layer_bytes(&spec)).zip(of_plane) {
            let filling = &mut self.layers[layer];
            let Some(LayerRows { rows, keys }) = &mut filling.rows else { continue };
            let count = model.rows_in(layer, block * block_tokens..(block + 1) * block_tokens).len();
            let bytes = &bytes[..count * row_bytes];
            if is_key(name) {
                decoded.clear();
                codec.decode(bytes, &mut decoded);
                keys.extend(&decoded);
            } else {
                codec.decode(bytes, rows);
            }
            filling.missing -= 1;
            if filling.missing == 0 {
                complete.extend(filling.rows.take().map(|rows| (layer, rows)));
            }
        }
        Ok(complete)
    }
}

impl Sequence {
    /// Announces the rows of an empty sequence's first `tokens` tokens, whole blocks of the prefix `last`; `arrivals` gives
    /// them when a prefill or a replay needs them. With state groups, the state is restored or replayed after this, as
    /// after [`Sequence::restore`]. If a layer's rows do not come, that prefill or replay fails with
    /// [`DecoderError::RowsMissing`], and the sequence is empty again.
    pub fn expect(
        &mut self,
        model: &Model,
        tokens: usize,
        last: BlockHash,
        arrivals: Arrivals,
    ) -> Result<()> {
        self.announce(model, tokens, last, arrivals, None)
    }

    /// As [`Sequence::expect`], but rows that indexers pick among are not announced: they stay where they are, and what is
    /// picked of them is asked of `parked`. If it cannot be had, the prefill or replay that picked it fails with
    /// [`DecoderError::RowsMissing`], and the sequence is empty.
    pub fn expect_parked(
        &mut self,
        model: &Model,
        parked: Parked,
        last: BlockHash,
        arrivals: Arrivals,
    ) -> Result<()> {
        self.announce(model, parked.tokens(), last, arrivals, Some(parked))
    }

    fn announce(
        &mut self,
        model: &Model,
        tokens: usize,
        last: BlockHash,
        arrivals: Arrivals,
        parked: Option<Parked>,
    ) -> Result<()> {
        self.check_model(model)?;
        let (block_tokens, limit) =
            (model.layout().block_tokens() as usize, model.config.max_position_embeddings);
        if self.tokens != 0 || tokens == 0 || !tokens.is_multiple_of(block_tokens) {
            let expected = (self.tokens + block_tokens) as u64;
            return Err(DecoderError::BlockPosition { expected, got: tokens as u64 });
        }
        if tokens > limit {
            return Err(DecoderError::TooLong { tokens, limit });
        }
        let mut awaited = vec![false; model.config.num_hidden_layers];
        for spec in model.layout().planes(ObjectKind::Block) {
            let group = &model.layout().groups()[usize::from(spec.group)];
            let (stays, of_plane) = (parked.is_some() && is_parkable(&group.name), layers_of(model, spec).1);
            for layer in of_plane {
                awaited[layer] |= !stays;
                if stays {
                    match &mut self.cache {
                        Cache::Mla(cache) => cache.park(layer, tokens),
                        Cache::V4(cache) => cache.park(layer, tokens),
                    }
                }
            }
        }
        let arriving = Arriving { arrivals, tokens, awaited, following: Vec::new() };
        self.supply = Supply { arriving: Some(arriving), parked };
        self.tokens = tokens;
        if let Cache::V4(cache) = &mut self.cache {
            cache.drop_state(tokens);
        }
        self.restored = Some(last);
        self.keep_from_here();
        Ok(())
    }

    /// Whether rows that were announced have still to come.
    pub fn is_arriving(&self) -> bool {
        self.supply.arriving.is_some()
    }

    /// What parked rows have cost since they were announced; `None` if all rows are in memory.
    pub fn residency(&self) -> Option<Residency> {
        self.supply.parked.as_ref().map(Parked::figures)
    }

    /// Refuses what needs rows that have still to come.
    pub(crate) fn check_arrived(&self) -> Result<()> {
        match &self.supply.arriving {
            None => Ok(()),
            Some(arriving) => {
                let layer = arriving.awaited.iter().position(|&awaited| awaited).unwrap_or(0);
                Err(DecoderError::RowsMissing { layer, tokens: self.tokens })
            }
        }
    }

    /// Empties the sequence.
    pub(crate) fn clear(&mut self, model: &Model) {
        let fresh = Self::new(model);
        self.cache = fresh.cache;
        self.tokens = 0;
        self.restored = None;
        self.supply = Supply::default();
        self.recorded.iter_mut().flatten().for_each(Vec::clear);
        self.keep_from_here();
    }
}

/// Where rows come from that a sequence does not hold.
#[derive(Default)]
pub(crate) struct Supply {
    /// Rows that were announced and have still to come.
    pub(crate) arriving: Option<Arriving>,
    /// Rows that are read as they are picked.
    pub(crate) parked: Option<Parked>,
}

impl Supply {
    /// The rows of `layer` if the sequence waits for them.
    pub(crate) fn arrived(&mut self, layer: usize) -> Result<Option<LayerRows>> {
        self.arriving.as_mut().map_or(Ok(None), |arriving| arriving.take(layer))
    }
}

/// What a sequence waits for.
pub(crate) struct Arriving {
    arrivals: Arrivals,
    tokens: usize,
    /// Whether a layer's rows have yet to come.
    awaited: Vec<bool>,
    /// Rows of a layer that are here already and follow those that are to come; whether they are keys.
    following: Vec<(usize, bool, Vec<f32>)>,
}

impl Arriving {
    /// The rows of `layer` if it waits for them; whether they came, if so.
    pub(crate) fn take(&mut self, layer: usize) -> Result<Option<LayerRows>> {
        if !std::mem::take(&mut self.awaited[layer]) {
            return Ok(None);
        }
        let missing = DecoderError::RowsMissing { layer, tokens: self.tokens };
        let mut arrived = (self.arrivals)(layer).ok_or(missing)?;
        for (_, are_keys, rows) in self.following.extract_if(.., |(of, ..)| *of == layer) {
            if are_keys { arrived.keys.extend(&rows) } else { arrived.rows.extend(rows) }
        }
        Ok(Some(arrived))
    }

    /// Whether the rows of `layer` have yet to come.
    pub(crate) fn awaits(&self, layer: usize) -> bool {
        self.awaited[layer]
    }

    /// Keeps rows until those have come that they follow.
    pub(crate) fn follow(&mut self, layer: usize, rows: GroupRows<'_>) {
        self.following.push((layer, is_key(rows.group), rows.decoded()));
    }

    /// Whether nothing is waited for any more.
    pub(crate) fn is_over(&self) -> bool {
        !self.awaited.contains(&true)
    }
}

impl Model {
    /// The rows that a layer completes in a run of tokens.
    pub(crate) fn rows_in(&self, layer: usize, tokens: Range<usize>) -> Range<usize> {
        match &self.config.family {
            Family::Mla(_) => tokens,
            Family::V4(v4) => {
                let ratio = v4.compression[layer].map_or(1, |compression| compression.ratio);
                tokens.start / ratio..tokens.end / ratio
            }
        }
    }
}

/// Whether a history group holds the indexer's keys.
pub(crate) fn is_key(group: &str) -> bool {
    group.ends_with("indexer_key")
}
