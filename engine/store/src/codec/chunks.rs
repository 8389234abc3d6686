//! How a column is cut into chunks: the rows that are coded together.
//!
//! A chunk is a run of whole layers, or part of one layer, of at most 256 KiB. Smaller ones pay for their Huffman
//! table and lose decoding speed (by half at 16 KiB); larger ones leave the cache. Within a layer, channels keep their
//! range; between layers they do not, so references are taken per layer of a chunk.

use std::ops::Range;

use super::PlaneShape;

const CHUNK_BYTES: usize = 256 << 10;

/// Consecutive rows of a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    first_row: usize,
    pub(super) rows: usize,
    /// Rows of one layer; the last run of a chunk is as long as the others. Divides `rows`.
    pub(super) run: usize,
}

impl Chunk {
    /// The bytes of the plane that its rows fill.
    pub(super) fn bytes(&self, row_bytes: usize) -> Range<usize> {
        self.first_row * row_bytes..(self.first_row + self.rows) * row_bytes
    }
}

/// The chunks of a column whose rows have `width` bytes. The shape has been checked against the length of a plane.
pub(super) fn of(shape: &PlaneShape, width: usize) -> impl Iterator<Item = Chunk> + use<> {
    let (layers, rows) = (usize::from(shape.layers()), shape.rows() as usize);
    // Without layers the other two are free to be anything.
    let layer_bytes = rows.saturating_mul(width);
    let layers = if layer_bytes == 0 { 0 } else { layers };
    let whole_layers = (CHUNK_BYTES / layer_bytes.max(1)).min(layers);
    // The chunks of a column are of about the same length, so that none is small.
    let (layer_step, row_step) = match whole_layers {
        0 => (1, rows.div_ceil(layer_bytes.div_ceil(CHUNK_BYTES).max(1)).next_multiple_of(2).max(2)),
        _ => (layers.div_ceil(layers.div_ceil(whole_layers)), rows),
    };
    (0..layers).step_by(layer_step).flat_map(move |layer| {
        (0..rows).step_by(row_step).map(move |row| {
            let run = row_step.min(rows - row);
            let layers = layer_step.min(layers - layer);
            Chunk { first_row: layer * rows + row, rows: layers * run, run }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(layers: u16, rows: u32, width: usize) -> Vec<(usize, usize, usize)> {
        let shape = PlaneShape::new(layers, rows, &[]);
        of(&shape, width).map(|chunk| (chunk.first_row, chunk.rows, chunk.run)).collect()
    }

    #[test]
    fn layers_are_joined_up_to_the_chunk_size() {
        assert_eq!(cuts(1, 128, 1024), [(0, 128, 128)]);
        assert_eq!(cuts(4, 32, 448), [(0, 128, 32)]);
        assert_eq!(cuts(5, 64, 1024), [(0, 192, 64), (192, 128, 64)]);
    }

    #[test]
    fn a_long_layer_is_cut_at_even_rows() {
        assert_eq!(cuts(1, 513, 1024), [(0, 172, 172), (172, 172, 172), (344, 169, 169)]);
        assert_eq!(cuts(2, 257, 1024), [(0, 130, 130), (130, 127, 127), (257, 130, 130), (387, 127, 127)]);
        assert_eq!(cuts(1, 3, 300_000), [(0, 2, 2), (2, 1, 1)]);
    }

    #[test]
    fn nothing_has_no_chunks() {
        assert_eq!(cuts(0, 5, 5), []);
        assert_eq!(cuts(5, 0, 5), []);
        assert_eq!(cuts(5, 5, 0), []);
        assert_eq!(cuts(0, 0, 0), []);
        assert_eq!(cuts(0, u32::MAX, usize::MAX), []);
    }
}
