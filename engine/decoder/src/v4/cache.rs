//! What a sequence of V4 keeps: compressed rows and indexer keys of every token, and of the last tokens what later
//! ones still need: window rows and the inputs of the compressors.
//!
//! Tails reach back to what the state at the last block boundary needs, so that it can be taken, and the sequence cut
//! back to it, until the next boundary is passed. Rows alone, as blocks bring them, cannot be continued: that takes
//! the state of the boundary they end at.

use std::borrow::Cow;
use std::ops::Range;

use crate::block::Place;
use crate::kernel::pages;
use crate::panels::KeyPanels;
use crate::v4::config::{Compression, V4Config};
use crate::v4::tail::Tail;
use crate::{ModelConfig, StateField};

/// The cache of one sequence.
pub(crate) struct Cache {
    pub(super) layers: Vec<LayerCache>,
    width: usize,
    key_width: usize,
    window: usize,
    block_tokens: usize,
    /// The shortest length that the sequence can be cut to and continued from; `None` if it cannot be continued.
    resumable_from: Option<usize>,
}

/// Rows of one layer.
pub(super) struct LayerCache {
    compression: Option<Compression>,
    pub(super) window: Tail,
    pub(super) rows: Option<RowCache>,
    pub(super) keys: Option<KeyCache>,
}

/// Compressed rows, and values and gates of the tokens that are not yet compressed or needed again.
pub(super) struct RowCache {
    pub(super) inputs: Tail,
    /// `[rows, head_dim]`, those behind the parked ones.
    pub(super) rows: Vec<f32>,
    /// Rows at the beginning that are not here.
    pub(super) parked: usize,
}

/// The same for the indexer.
pub(super) struct KeyCache {
    pub(super) inputs: Tail,
    pub(super) keys: KeyPanels,
}

impl Cache {
    pub(crate) fn new(config: &ModelConfig, v4: &V4Config, block_tokens: usize) -> Self {
        let (width, key_width) = (v4.head_dim, config.index_head_dim);
        let layer = |&compression: &Option<Compression>| LayerCache {
            compression,
            window: Tail::new(width),
            rows: compression.map(|compression| RowCache {
                inputs: Tail::new(2 * compression.channels(width)),
                rows: Vec::new(),
                parked: 0,
            }),
            keys: compression.filter(|compression| compression.sparse).map(|compression| KeyCache {
                inputs: Tail::new(2 * compression.channels(key_width)),
                keys: KeyPanels::new(key_width),
            }),
        };
        let layers = v4.compression.iter().map(layer).collect();
        Self { layers, width, key_width, window: v4.sliding_window, block_tokens, resumable_from: Some(0) }
    }

    /// Whether tokens can be appended.
    pub(crate) fn is_resumable(&self) -> bool {
        self.resumable_from.is_some()
    }

    /// Whether the state after `tokens` tokens is held.
    pub(crate) fn holds_state(&self, tokens: usize) -> bool {
        self.resumable_from.is_some_and(|first| first <= tokens)
    }

    /// Numbers held.
    pub(crate) fn len(&self) -> usize {
        let layer = |layer: &LayerCache| {
            let rows = layer.rows.as_ref().map_or(0, |cache| cache.inputs.len() + cache.rows.len());
            let keys = layer.keys.as_ref().map_or(0, |cache| cache.inputs.len() + cache.keys.len());
            layer.window.len() + rows + keys
        };
        self.layers.iter().map(layer).sum()
    }

    pub(crate) fn reserve(&mut self, tokens: usize) {
        for layer in &mut self.layers {
            let ratio = layer.ratio();
            if let Some(cache) = &mut layer.rows {
                pages::reserve(&mut cache.rows, (tokens / ratio + 1) * self.width);
            }
            if let Some(cache) = &mut layer.keys {
                cache.keys.reserve(tokens / ratio + 1);
            }
        }
    }

    /// Drops what neither a later token nor the state at the last block boundary needs, nor who takes the last token back:
    /// it may have been a guess. The sequence holds `tokens`, at least one.
    pub(super) fn trim(&mut self, tokens: usize) {
        let boundary = (tokens - 1) / self.block_tokens * self.block_tokens;
        if self.holds_state(boundary) && self.resumable_from != Some(boundary) {
            self.resumable_from = Some(boundary);
            self.drop_windows(boundary);
            for layer in &mut self.layers {
                let first = boundary - layer.kept(boundary);
                layer.inputs().for_each(|inputs| inputs.drop_before(first));
            }
        }
    }

    /// Drops window rows that neither a token from `tokens` on nor the state there needs.
    pub(super) fn drop_windows(&mut self, tokens: usize) {
        for layer in &mut self.layers {
            layer.window.drop_before(tokens.saturating_sub(self.window));
        }
    }

    /// Forgets the state of a sequence of `tokens`, which is to be rebuilt: each layer will be fed from the position on
    /// that [`V4Config::replay_plan`] gave.
    pub(crate) fn begin_replay(&mut self, plan: &[usize], tokens: usize) {
        self.drop_state(tokens);
        self.resumable_from = None;
        for (layer, &first) in self.layers.iter_mut().zip(plan) {
            layer.window.restart(first, &[]);
            let kept = layer.kept(tokens);
            layer.inputs().for_each(|inputs| inputs.restart(tokens - kept, &[]));
        }
    }

    /// Drops every token from `tokens` on and gives the length that is left: `tokens`, or, where the state to go on
    /// from there is not held, the block boundary before it, without a state unless that is 0.
    pub(crate) fn truncate(&mut self, tokens: usize) -> usize {
        let held = self.holds_state(tokens);
        let end = if held { tokens } else { tokens / self.block_tokens * self.block_tokens };
        for layer in &mut self.layers {
            let ratio = layer.ratio();
            if let Some(cache) = &mut layer.rows {
                cache.parked = cache.parked.min(end / ratio);
                cache.rows.truncate((end / ratio - cache.parked) * self.width);
            }
            if let Some(cache) = &mut layer.keys {
                cache.keys.truncate(end / ratio);
            }
            if held {
                layer.window.truncate(end);
                layer.inputs().for_each(|inputs| inputs.truncate(end));
            }
        }
        if !held {
            self.drop_state(end);
        }
        end
    }

    /// Forgets the state of a sequence that now holds rows of `tokens` tokens.
    pub(crate) fn drop_state(&mut self, tokens: usize) {
        self.resumable_from = (tokens == 0).then_some(0);
        for layer in &mut self.layers {
            layer.window.restart(tokens, &[]);
            layer.inputs().for_each(|inputs| inputs.restart(tokens, &[]));
        }
    }

    /// The rows that a layer completes in a run of tokens.
    pub(crate) fn rows_of(&self, layer: usize, tokens: Range<usize>) -> Range<usize> {
        let ratio = self.layers[layer].ratio();
        tokens.start / ratio..tokens.end / ratio
    }

    /// The rows that a layer completes in the first `tokens` tokens are elsewhere, to come or to stay.
    pub(crate) fn park(&mut self, layer: usize, tokens: usize) {
        let ratio = self.layers[layer].ratio();
        if let Some(cache) = &mut self.layers[layer].rows {
            cache.parked = tokens / ratio;
        }
    }

    /// A layer's rows of one group of the layout, of those that it completes in a run of tokens.
    pub(crate) fn rows(&self, group: &str, layer: usize, tokens: Range<usize>) -> Cow<'_, [f32]> {
        let range = self.rows_of(layer, tokens);
        let LayerCache { rows, keys, .. } = &self.layers[layer];
        match (rows, keys, group) {
            (_, Some(cache), KEY_GROUP) => cache.keys.rows(range).into(),
            (Some(cache), ..) => {
                let held = |row: usize| (row - cache.parked) * self.width;
                cache.rows[held(range.start)..held(range.end)].into()
            }
            _ => unreachable!("the layout lists compressed rows only for layers that have a compressor"),
        }
    }

    /// Where rows of one group of the layout are appended.
    pub(crate) fn place(&mut self, group: &str, layer: usize) -> Place<'_> {
        let LayerCache { rows, keys, .. } = &mut self.layers[layer];
        match (rows, keys, group) {
            (_, Some(cache), KEY_GROUP) => Place::Keys(&mut cache.keys),
            (Some(cache), ..) => Place::Rows(&mut cache.rows),
            _ => unreachable!("the layout lists compressed rows only for layers that have a compressor"),
        }
    }

    /// A layer's state of one group after `tokens` tokens, which is held, of `rows` rows: the window, oldest first; the
    /// overlap, `[ratio, values | gates | indexer values | indexer gates]`; or what an open run of tokens has so far, in
    /// whole channels. Zero where there is nothing yet.
    pub(crate) fn state(&self, group: &str, layer: usize, tokens: usize, rows: usize) -> Vec<f32> {
        let cache = &self.layers[layer];
        let mut out = Vec::new();
        if group == WINDOW_GROUP {
            let first = tokens.saturating_sub(self.window);
            out.resize((self.window - (tokens - first)) * self.width, 0.0);
            out.extend_from_slice(cache.window.rows(first..tokens));
            return out;
        }
        let last = tokens - tokens % cache.ratio();
        if group == OVERLAP_GROUP {
            for position in last.saturating_sub(cache.overlap())..last {
                for inputs in cache.both_inputs() {
                    let (values, gates) = first_halves(inputs.row(position));
                    out.extend_from_slice(values);
                    out.extend_from_slice(gates);
                }
            }
            out.resize(rows * 2 * (self.width + self.key_width), 0.0);
        } else {
            for position in last..tokens {
                cache.both_inputs().for_each(|inputs| out.extend_from_slice(inputs.row(position)));
            }
            let width: usize = cache.both_inputs().map(Tail::width).sum();
            out.resize(rows * width, 0.0);
        }
        out
    }

    /// Puts back what [`Cache::state`] gave, in the order of the layout: the overlap before an open run.
    pub(crate) fn restore_state(&mut self, group: &str, layer: usize, tokens: usize, rows: &[f32]) {
        let (width, key_width) = (self.width, self.key_width);
        let cache = &mut self.layers[layer];
        if group == WINDOW_GROUP {
            let first = tokens.saturating_sub(self.window);
            cache.window.restart(first, &rows[rows.len() - (tokens - first) * width..]);
            return;
        }
        let (last, overlap) = (tokens - tokens % cache.ratio(), cache.overlap());
        if group == OVERLAP_GROUP {
            // A later row reads only the first halves of these tokens.
            let fill = |values: &[f32]| [values, &vec![0.0; values.len()]].concat();
            let (mut inputs, mut key_inputs) = (Vec::new(), Vec::new());
            let held = if last > 0 { overlap } else { 0 };
            for row in rows.chunks_exact(2 * (width + key_width)).take(held) {
                let (own, key) = row.split_at(2 * width);
                own.chunks_exact(width).for_each(|values| inputs.extend(fill(values)));
                key.chunks_exact(key_width).for_each(|values| key_inputs.extend(fill(values)));
            }
            for (tail, rows) in cache.inputs().zip([inputs, key_inputs]) {
                tail.restart(last - held, &rows);
            }
            return;
        }
        if overlap == 0 {
            cache.inputs().for_each(|inputs| inputs.restart(last, &[]));
        }
        let mut rest = rows;
        for _ in last..tokens {
            for inputs in cache.inputs() {
                let (row, later) = rest.split_at(inputs.width());
                inputs.extend(row);
                rest = later;
            }
        }
    }

    /// The state of every group was put back: tokens can be appended after `tokens`.
    pub(crate) fn resume(&mut self, tokens: usize) {
        self.resumable_from = Some(tokens);
    }

    /// A field of a layer's state at the end of a sequence of `tokens`, whose state is held. `ape` gives what is added
    /// to a gate, of the compressor (0) or the indexer's (1), at a position.
    pub(crate) fn field<'a>(
        &self,
        layer: usize,
        field: StateField,
        tokens: usize,
        ape: impl Fn(usize, usize) -> &'a [f32],
    ) -> Vec<f32> {
        let cache = &self.layers[layer];
        let overlap = |which: usize, gates: bool| {
            let last = tokens - tokens % cache.ratio();
            let Some(inputs) = cache.both_inputs().nth(which).filter(|_| cache.overlap() > 0 && last > 0)
            else {
                return Vec::new();
            };
            let half = |position: usize| {
                let (values, of_gates) = first_halves(inputs.row(position));
                if gates { of_gates } else { values }
            };
            (last - cache.overlap()..last).flat_map(half).copied().collect()
        };
        let tail = |which: usize, gates: bool| {
            let Some(inputs) = cache.both_inputs().nth(which) else { return Vec::new() };
            let mut out = Vec::new();
            for position in tokens - tokens % cache.ratio()..tokens {
                let (values, of_gates) = inputs.row(position).split_at(inputs.row(position).len() / 2);
                match gates {
                    false => out.extend_from_slice(values),
                    true => {
                        out.extend(of_gates.iter().zip(ape(which, position)).map(|(gate, ape)| gate - ape))
                    }
                }
            }
            out
        };
        match field {
            StateField::Window => cache.window.rows(tokens.saturating_sub(self.window)..tokens).to_vec(),
            StateField::Compressed => cache.rows.as_ref().map_or(Vec::new(), |cache| cache.rows.clone()),
            StateField::IndexKey => {
                let keys = cache.keys.as_ref().map(|cache| &cache.keys);
                keys.map_or(Vec::new(), |keys| keys.rows(0..keys.len() / self.key_width))
            }
            StateField::OverlapKv => overlap(0, false),
            StateField::OverlapGate => overlap(0, true),
            StateField::IndexOverlapKv => overlap(1, false),
            StateField::IndexOverlapGate => overlap(1, true),
            StateField::TailKv => tail(0, false),
            StateField::TailGate => tail(0, true),
            StateField::IndexTailKv => tail(1, false),
            StateField::IndexTailGate => tail(1, true),
            StateField::Latent | StateField::RopeKey => Vec::new(),
        }
    }
}

const KEY_GROUP: &str = "csa_indexer_key";
const WINDOW_GROUP: &str = "window";
const OVERLAP_GROUP: &str = "csa_overlap";

impl LayerCache {
    /// Of a layer with only a window.
    pub(super) fn window_only(width: usize) -> Self {
        Self { compression: None, window: Tail::new(width), rows: None, keys: None }
    }

    /// Takes in the keys that come with a prefix.
    pub(super) fn admit_keys(&mut self, arrived: KeyPanels) {
        if let Some(cache) = &mut self.keys {
            cache.keys = arrived;
        }
    }

    /// Takes in the rows that come with a prefix, before those that are here.
    pub(super) fn admit_rows(&mut self, arrived: Vec<f32>) {
        if let Some(cache) = &mut self.rows {
            let own = std::mem::replace(&mut cache.rows, arrived);
            cache.rows.extend_from_slice(&own);
            cache.parked = 0;
        }
    }

    /// Tokens per compressed row; 1 where there are none.
    fn ratio(&self) -> usize {
        self.compression.map_or(1, |compression| compression.ratio)
    }

    fn overlap(&self) -> usize {
        self.compression.map_or(0, Compression::overlap)
    }

    fn kept(&self, tokens: usize) -> usize {
        self.compression.map_or(0, |compression| compression.kept(tokens))
    }

    fn inputs(&mut self) -> impl Iterator<Item = &mut Tail> {
        let keys = self.keys.iter_mut().map(|cache| &mut cache.inputs);
        self.rows.iter_mut().map(|cache| &mut cache.inputs).chain(keys)
    }

    fn both_inputs(&self) -> impl Iterator<Item = &Tail> {
        let keys = self.keys.iter().map(|cache| &cache.inputs);
        self.rows.iter().map(|cache| &cache.inputs).chain(keys)
    }
}

/// Of an input in a sparse layer, the channels for the next run: of its values and of its gates.
fn first_halves(input: &[f32]) -> (&[f32], &[f32]) {
    let quarter = input.len() / 4;
    (&input[..quarter], &input[2 * quarter..3 * quarter])
}
