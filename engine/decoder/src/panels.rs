//! Indexer keys of one layer, a panel at a time, so that a query is scored against all keys of a panel side by side
//! without packing: `[panel][index_head_dim][PANEL]`. Lanes beyond the last key hold anything.

use std::ops::Range;

use crate::kernel::pages;
use crate::kernel::sparse::PANEL;

/// Keys in the order of their tokens.
pub(crate) struct KeyPanels {
    width: usize,
    keys: usize,
    data: Vec<f32>,
}

impl KeyPanels {
    pub(crate) fn new(width: usize) -> Self {
        Self { width, keys: 0, data: Vec::new() }
    }

    /// Keys held.
    pub(crate) fn count(&self) -> usize {
        self.keys
    }

    /// Numbers held, without the lanes that hold no key.
    pub(crate) fn len(&self) -> usize {
        self.keys * self.width
    }

    pub(crate) fn reserve(&mut self, keys: usize) {
        pages::reserve(&mut self.data, (keys + PANEL) * self.width);
    }

    /// Appends `rows`, `[keys, width]`.
    pub(crate) fn extend(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.width) {
            let (panel, lane) = (self.keys / PANEL, self.keys % PANEL);
            self.data.resize((panel + 1) * self.width * PANEL, 0.0);
            let panel = self.data[panel * self.width * PANEL..].as_chunks_mut::<PANEL>().0;
            panel.iter_mut().zip(row).for_each(|(lanes, value)| lanes[lane] = *value);
            self.keys += 1;
        }
    }

    /// Copies keys out, `[keys, width]`.
    pub(crate) fn rows(&self, keys: Range<usize>) -> Vec<f32> {
        let mut rows = Vec::with_capacity(keys.len() * self.width);
        for key in keys {
            let panel = self.data[key / PANEL * self.width * PANEL..].as_chunks::<PANEL>().0;
            rows.extend(panel[..self.width].iter().map(|lanes| lanes[key % PANEL]));
        }
        rows
    }

    /// The panels that hold the first `keys` keys.
    pub(crate) fn panels(&self, keys: usize) -> &[f32] {
        &self.data[..keys.div_ceil(PANEL) * self.width * PANEL]
    }

    /// Forgets all but the first `keys` keys.
    pub(crate) fn truncate(&mut self, keys: usize) {
        self.keys = self.keys.min(keys);
        self.data.truncate(self.keys.div_ceil(PANEL) * self.width * PANEL);
    }
}
