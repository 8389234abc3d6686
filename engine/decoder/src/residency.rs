//! Rows that stay on SSD while a sequence decodes: a step reads those that its indexers pick, and no others.
//!
//! Sparse attention looks at `index_topk` rows a step, however long the sequence. So the rows that it picks among (latents of
//! V3.2, overlapping compressed rows of V4: the bulk of a sequence) can be left where they are stored, once the indexer's
//! keys, the rows that are always attended to, and the windows are in memory. A parked sequence keeps planes of picked rows
//! in a pool of bounded size; what a layer picks beyond that is asked of a [`PlaneSource`], all at once. Rows that are
//! appended stay in memory.
//!
//! Invariants: selection never depends on what is in the pool; picked rows are gathered in ascending order, so every sum
//! is the one that it is with all rows in memory, bit for bit. The pool holds encoded bytes, as they were stored.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use esker_prefix::{ObjectKind, PlaneSpec};

use crate::block::{check_block_plane, layer_bytes, layers_of};
use crate::config::Family;
use crate::{DecoderError, Model, Result};

/// Blocks asked of the source at once; bounds what a long prefill holds beyond the pool.
const FETCH_BLOCKS: usize = 512;

/// Gives planes of stored blocks.
pub trait PlaneSource: Send {
    /// One plane (its place in the layout) of each of these blocks, proven, in their order; `None` if one cannot be had.
    fn fetch(&mut self, plane: usize, blocks: &[usize]) -> Option<Vec<Bytes>>;

    /// The layer after this one may pick from this plane of these blocks: a hint, to be followed or not. What was read for
    /// it is given by the `fetch` that asks for it, and forgotten if the next one for this plane does not.
    fn hint(&mut self, plane: usize, blocks: &[usize]) {
        let _ = (plane, blocks);
    }
}

/// What parked rows have cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// Parked rows that queries picked, each once per layer and chunk.
    pub rows_picked: u64,
    /// Of these, rows whose plane was in the pool.
    pub pool_hits: u64,
    /// Planes that were fetched.
    pub planes_fetched: u64,
    /// Their bytes, decoded.
    pub bytes_fetched: u64,
}

impl Residency {
    /// Both together.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            rows_picked: self.rows_picked + other.rows_picked,
            pool_hits: self.pool_hits + other.pool_hits,
            planes_fetched: self.planes_fetched + other.planes_fetched,
            bytes_fetched: self.bytes_fetched + other.bytes_fetched,
        }
    }
}

/// The parked rows of one sequence. See the module.
pub struct Parked {
    /// Tokens whose rows are parked: whole blocks, and after a cut a part of one.
    tokens: usize,
    block_tokens: usize,
    layers: Vec<Option<Place>>,
    pool: Pool,
    source: Box<dyn PlaneSource>,
    figures: Residency,
    /// Scratch.
    rows: Vec<u32>,
}

/// Where a layer's parked rows are.
#[derive(Clone, Copy)]
struct Place {
    plane: usize,
    /// Of the layer's rows in the plane.
    first_byte: usize,
    row_bytes: usize,
    /// Tokens per row.
    ratio: usize,
    group: u16,
    /// The next layer with parked rows in another plane, for hints.
    next_plane: Option<usize>,
}

impl Parked {
    /// For the rows of `tokens` tokens, whole blocks, which `source` gives. The pool takes up to `pool_bytes`.
    pub fn new(model: &Model, tokens: usize, pool_bytes: usize, source: Box<dyn PlaneSource>) -> Self {
        let layout = model.layout();
        let mut layers = vec![None; model.config.num_hidden_layers];
        for (plane, spec) in layout.planes(ObjectKind::Block).iter().enumerate() {
            let group = &layout.groups()[usize::from(spec.group)];
            if !is_parkable(&group.name) {
                continue;
            }
            let row_bytes = layer_bytes(spec) / group.rows as usize;
            for (at, layer) in layers_of(model, spec).1.enumerate() {
                layers[layer] = Some(Place {
                    plane,
                    first_byte: at * layer_bytes(spec),
                    row_bytes,
                    ratio: model.ratio(layer),
                    group: spec.group,
                    next_plane: None,
                });
            }
        }
        let mut next: Option<usize> = None;
        for place in layers.iter_mut().rev().flatten() {
            place.next_plane = next.filter(|&plane| plane != place.plane);
            next = Some(place.plane);
        }
        let block_tokens = layout.block_tokens() as usize;
        let pool = Pool { capacity: pool_bytes, held: 0, planes: HashMap::new(), order: VecDeque::new() };
        Self { tokens, block_tokens, layers, pool, source, figures: Residency::default(), rows: Vec::new() }
    }

    /// Tokens whose rows are parked.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
    }

    pub(crate) fn figures(&self) -> Residency {
        self.figures
    }

    /// Memory that the pool takes.
    pub(crate) fn pool_bytes(&self) -> usize {
        self.pool.held
    }

    /// Gathers what the queries of a chunk picked of a layer whose first `parked` rows are parked and the others are `held`,
    /// rows of `width`. Gives the gathered rows, ascending, and the selection with their new numbers.
    pub(crate) fn gather(
        &mut self,
        model: &Model,
        layer: usize,
        (parked, held): (usize, &[f32]),
        width: usize,
        selection: &[Vec<u32>],
    ) -> Result<(Vec<f32>, Vec<Vec<u32>>)> {
        let mut picked = std::mem::take(&mut self.rows);
        picked.clear();
        picked.extend(selection.iter().flatten());
        picked.sort_unstable();
        picked.dedup();
        let of_pool = picked.partition_point(|&row| (row as usize) < parked);
        let mut rows = Vec::with_capacity(picked.len() * width);
        self.read(model, layer, &picked[..of_pool], &mut rows)?;
        for &row in &picked[of_pool..] {
            rows.extend_from_slice(&held[(row as usize - parked) * width..][..width]);
        }
        let renumber = |selected: &Vec<u32>| {
            let mut at = 0;
            let number = |&row: &u32| {
                at += picked[at..].partition_point(|&picked| picked < row);
                u32::try_from(at).unwrap_or(u32::MAX)
            };
            selected.iter().map(number).collect()
        };
        let renumbered = selection.iter().map(renumber).collect();
        self.rows = picked;
        Ok((rows, renumbered))
    }

    /// Appends parked rows of a layer, ascending.
    fn read(&mut self, model: &Model, layer: usize, picked: &[u32], out: &mut Vec<f32>) -> Result<()> {
        let missing = DecoderError::RowsMissing { layer, tokens: self.tokens };
        if picked.is_empty() {
            return Ok(());
        }
        let Some(place) = self.layers[layer] else { return Err(missing) };
        let codec = model.formats.codec(place.group);
        self.figures.rows_picked += picked.len() as u64;
        // A row belongs to the block in which its last token lies.
        let block_of = |row: u32| ((row as usize + 1) * place.ratio - 1) / self.block_tokens;
        let mut rest = picked;
        while !rest.is_empty() {
            let mut blocks: Vec<(usize, &[u32])> = Vec::new();
            while let Some(&row) = rest.first()
                && blocks.len() < FETCH_BLOCKS
            {
                let block = block_of(row);
                let (of_block, later) = rest.split_at(rest.partition_point(|&row| block_of(row) <= block));
                blocks.push((block, of_block));
                rest = later;
            }
            let mut planes: Vec<Option<Bytes>> =
                blocks.iter().map(|(block, _)| self.pool.get(*block, place.plane)).collect();
            let absent = |at: &usize| planes[*at].is_none();
            let absent: Vec<usize> = (0..blocks.len()).filter(absent).collect();
            let hits = blocks.iter().zip(&planes).filter(|(_, plane)| plane.is_some());
            self.figures.pool_hits += hits.map(|((_, rows), _)| rows.len() as u64).sum::<u64>();
            if !absent.is_empty() {
                let wanted: Vec<usize> = absent.iter().map(|&at| blocks[at].0).collect();
                let fetched = self.source.fetch(place.plane, &wanted).filter(|all| all.len() == wanted.len());
                let Some(fetched) = fetched else { return Err(missing) };
                for (&at, bytes) in absent.iter().zip(fetched) {
                    check_block_plane(model, place.plane, &bytes)?;
                    self.figures.planes_fetched += 1;
                    self.figures.bytes_fetched += bytes.len() as u64;
                    self.pool.put(blocks[at].0, place.plane, bytes.clone());
                    planes[at] = Some(bytes);
                }
            }
            if let Some(plane) = place.next_plane {
                let pool = &self.pool;
                let near = blocks.iter().map(|(block, _)| *block);
                let near: Vec<usize> = near.filter(|&block| !pool.has(block, plane)).collect();
                if !near.is_empty() {
                    self.source.hint(plane, &near);
                }
            }
            for ((block, rows), plane) in blocks.iter().zip(planes.iter().flatten()) {
                let first = block * self.block_tokens / place.ratio;
                for &row in *rows {
                    let at = place.first_byte + (row as usize - first) * place.row_bytes;
                    codec.decode(&plane[at..at + place.row_bytes], out);
                }
            }
        }
        Ok(())
    }
}

/// Whether the rows of a history group are picked by an indexer, so that most of them can be left where they are.
pub(crate) fn is_parkable(group: &str) -> bool {
    matches!(group, "latent" | "csa")
}

impl Model {
    /// Bytes per block that can be left on SSD while a sequence decodes.
    pub fn parkable_block_bytes(&self) -> u64 {
        let planes = self.layout().planes(ObjectKind::Block).iter();
        planes.filter(|plane| self.is_parkable(plane)).map(|plane| plane.len_bytes).sum()
    }

    /// Whether the rows of a plane are among them.
    pub fn is_parkable(&self, plane: &PlaneSpec) -> bool {
        is_parkable(&self.layout().groups()[usize::from(plane.group)].name)
    }

    /// Tokens per row of a layer.
    fn ratio(&self, layer: usize) -> usize {
        match &self.config.family {
            Family::Mla(_) => 1,
            Family::V4(v4) => v4.compression[layer].map_or(1, |compression| compression.ratio),
        }
    }
}

/// Planes in memory; those not used since they last came to the front go first.
struct Pool {
    capacity: usize,
    held: usize,
    planes: HashMap<(usize, usize), Slot>,
    /// Every plane that is held, once.
    order: VecDeque<(usize, usize)>,
}

struct Slot {
    bytes: Bytes,
    used: bool,
}

impl Pool {
    fn has(&self, block: usize, plane: usize) -> bool {
        self.planes.contains_key(&(block, plane))
    }

    fn get(&mut self, block: usize, plane: usize) -> Option<Bytes> {
        let slot = self.planes.get_mut(&(block, plane))?;
        slot.used = true;
        Some(slot.bytes.clone())
    }

    fn put(&mut self, block: usize, plane: usize, bytes: Bytes) {
        if bytes.len() > self.capacity || self.has(block, plane) {
            return;
        }
        while self.held + bytes.len() > self.capacity
            && let Some(key) = self.order.pop_front()
        {
            let Some(slot) = self.planes.get_mut(&key) else { continue };
            if std::mem::take(&mut slot.used) {
                self.order.push_back(key);
            } else {
                self.held -= slot.bytes.len();
                self.planes.remove(&key);
            }
        }
        self.held += bytes.len();
        self.order.push_back((block, plane));
        self.planes.insert((block, plane), Slot { bytes, used: false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_stays_within_its_capacity_and_keeps_what_is_used() {
        let mut pool = Pool { capacity: 1000, held: 0, planes: HashMap::new(), order: VecDeque::new() };
        for block in 0..50 {
            pool.put(block, 0, Bytes::from(vec![0; 100]));
            // The first block is used all the time.
            assert!(pool.get(0, 0).is_some(), "after {block}");
            assert!(pool.held <= 1000 && pool.order.len() == pool.planes.len());
        }
        assert!(pool.has(49, 0) && !pool.has(1, 0));
        pool.put(60, 0, Bytes::from(vec![0; 1001]));
        assert!(!pool.has(60, 0), "what is larger than the pool passes through");
    }
}
