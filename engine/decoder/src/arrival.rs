//! Rows of stored blocks on their way into a sequence, layer by layer: the first layers compute while the rest is still
//! being read.
//!
//! [`Incoming`] is filled with planes by whatever thread receives them, apart from the sequence, and gives a layer's keys, and
//! its rows, away as soon as it has them all. The sequence, told by [`Sequence::expect`] what will come, asks for either when
//! a prefill or replay first needs them, and not before: an indexer scores while the rows that it chooses among still come.
//! If they do not come, nothing that was computed meanwhile is kept. Where bytes come from, and how the two threads wait for
//! each other, is the caller's affair.
//!
//! Invariant: a layer's keys and its rows are handed over whole, so that a sequence never computes on a part of them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use esker_prefix::{BlockHash, ObjectKind};

use crate::block::{check_block_plane, layer_bytes, layers_of};
use crate::config::Family;
use crate::kernel::pages;
use crate::panels::KeyPanels;
use crate::residency::{Parked, Residency, is_parkable};
use crate::sequence::Cache;
use crate::{DecoderError, Model, Result, Sequence};

/// Gives a part of a layer when it is there, and waits until it is; `None` if it will not come. Each is asked for once:
/// layers in ascending order, a layer's keys before its rows.
pub type Arrivals = Box<dyn FnMut(usize, Part) -> Option<LayerRows> + Send>;

/// What a layer holds of a prefix. Keys are needed first: they choose among the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The indexer's keys.
    Keys,
    /// The rows that are attended to.
    Rows,
}

/// All of one part of one layer that blocks hold.
pub struct LayerRows {
    layer: usize,
    data: Data,
}

enum Data {
    Keys(KeyPanels),
    Rows(Vec<f32>),
}

impl LayerRows {
    /// The layer.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Which part of it.
    pub fn part(&self) -> Part {
        match &self.data {
            Data::Keys(_) => Part::Keys,
            Data::Rows(_) => Part::Rows,
        }
    }
}

/// See the module.
pub struct Incoming {
    tokens: usize,
    /// Block that each plane expects next.
    next: Vec<usize>,
    fillings: BTreeMap<(usize, Part), Filling>,
    parked: bool,
}

struct Filling {
    data: Data,
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
        let mut fillings = BTreeMap::new();
        for spec in specs {
            let group = &layout.groups()[usize::from(spec.group)];
            if parked && is_parkable(&group.name) {
                continue;
            }
            let (part, width) = (part(&group.name), model.formats.codec(spec.group).width(group));
            for layer in layers_of(model, spec).1 {
                let count = model.rows_in(layer, 0..room).len();
                let data = match part {
                    Part::Keys => {
                        let mut keys = KeyPanels::new(width);
                        keys.reserve(count);
                        Data::Keys(keys)
                    }
                    Part::Rows => {
                        let mut rows = Vec::new();
                        pages::reserve(&mut rows, count * width);
                        Data::Rows(rows)
                    }
                };
                fillings.insert((layer, part), Filling { data, missing: blocks });
            }
        }
        Self { tokens, next: vec![0; specs.len()], fillings, parked }
    }

    /// Tokens whose rows will have come in the end.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Takes in one plane of one block: the blocks of each plane in order, planes in any. Gives the parts of layers that are
    /// complete with it. On an error nothing was taken in.
    pub fn put(&mut self, model: &Model, block: usize, plane: usize, bytes: &[u8]) -> Result<Vec<LayerRows>> {
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
            let Entry::Occupied(mut entry) = self.fillings.entry((layer, part(name))) else { continue };
            let Filling { data, missing } = entry.get_mut();
            let count = model.rows_in(layer, block * block_tokens..(block + 1) * block_tokens).len();
            let bytes = &bytes[..count * row_bytes];
            match data {
                Data::Keys(keys) => {
                    decoded.clear();
                    codec.decode(bytes, &mut decoded);
                    keys.extend(&decoded);
                }
                Data::Rows(rows) => codec.decode(bytes, rows),
            }
            *missing -= 1;
            if *missing == 0 {
                complete.push(LayerRows { layer, data: entry.remove().data });
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
        let mut awaited = BTreeSet::new();
        for spec in model.layout().planes(ObjectKind::Block) {
            let group = &model.layout().groups()[usize::from(spec.group)];
            let (part, stays) = (part(&group.name), parked.is_some() && is_parkable(&group.name));
            for layer in layers_of(model, spec).1 {
                if !stays {
                    awaited.insert((layer, part));
                }
                match &mut self.cache {
                    _ if part == Part::Keys => {}
                    Cache::Mla(cache) => cache.park(layer, tokens),
                    Cache::V4(cache) => cache.park(layer, tokens),
                }
            }
        }
        let arriving = Arriving { arrivals, tokens, awaited, following: Vec::new() };
        self.take_supply(Supply { arriving: Some(arriving), parked });
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

    /// What parked rows have cost, those also that the sequence lost; `None` if it never had any.
    pub fn residency(&self) -> Option<Residency> {
        let now = self.supply.parked.as_ref().map(Parked::figures);
        self.spent.zip(now).map(|(spent, now)| spent.and(now)).or(self.spent).or(now)
    }

    /// Another supply takes the place of this one, whose figures stay.
    fn take_supply(&mut self, supply: Supply) {
        self.spent = self.residency();
        self.supply = supply;
    }

    /// Refuses what needs rows that have still to come.
    pub(crate) fn check_arrived(&self) -> Result<()> {
        match &self.supply.arriving {
            None => Ok(()),
            Some(arriving) => {
                let layer = arriving.awaited.first().map_or(0, |&(layer, _)| layer);
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
        self.namespace = None;
        self.take_supply(Supply::default());
        self.recorded.iter_mut().flatten().for_each(Vec::clear);
        self.residual = None;
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
    /// The keys of `layer` if the sequence waits for them.
    pub(crate) fn keys(&mut self, layer: usize) -> Result<Option<KeyPanels>> {
        let Some(arriving) = &mut self.arriving else { return Ok(None) };
        match arriving.take(layer, Part::Keys)? {
            Some(Data::Keys(mut keys)) => {
                arriving
                    .following
                    .extract_if(.., |(of, _)| *of == layer)
                    .for_each(|(_, rows)| keys.extend(&rows));
                Ok(Some(keys))
            }
            _ => Ok(None),
        }
    }

    /// The rows of `layer` if the sequence waits for them.
    pub(crate) fn rows(&mut self, layer: usize) -> Result<Option<Vec<f32>>> {
        let Some(arriving) = &mut self.arriving else { return Ok(None) };
        match arriving.take(layer, Part::Rows)? {
            Some(Data::Rows(rows)) => Ok(Some(rows)),
            _ => Ok(None),
        }
    }
}

/// What a sequence waits for.
pub(crate) struct Arriving {
    arrivals: Arrivals,
    tokens: usize,
    /// What has yet to come.
    awaited: BTreeSet<(usize, Part)>,
    /// Keys of a layer that are here already and follow those that are to come.
    following: Vec<(usize, Vec<f32>)>,
}

impl Arriving {
    /// A part of `layer` if it waits for it.
    fn take(&mut self, layer: usize, part: Part) -> Result<Option<Data>> {
        if !self.awaited.remove(&(layer, part)) {
            return Ok(None);
        }
        let arrived = (self.arrivals)(layer, part).filter(|rows| (rows.layer, rows.part()) == (layer, part));
        let missing = DecoderError::RowsMissing { layer, tokens: self.tokens };
        Ok(Some(arrived.ok_or(missing)?.data))
    }

    /// Whether the keys of `layer` have yet to come.
    pub(crate) fn awaits_keys(&self, layer: usize) -> bool {
        self.awaited.contains(&(layer, Part::Keys))
    }

    /// Keeps keys until those have come that they follow.
    pub(crate) fn follow(&mut self, layer: usize, keys: Vec<f32>) {
        self.following.push((layer, keys));
    }

    /// Whether nothing is waited for any more.
    pub(crate) fn is_over(&self) -> bool {
        self.awaited.is_empty()
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

/// Which part of its layers a history group holds.
pub(crate) fn part(group: &str) -> Part {
    if group.ends_with("indexer_key") { Part::Keys } else { Part::Rows }
}
