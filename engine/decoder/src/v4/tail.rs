//! The last rows of something that has one row per token: window rows, and what the compressors still need.

use std::ops::Range;

/// Rows of consecutive positions, of which the oldest are dropped.
pub(crate) struct Tail {
    width: usize,
    /// Position of the first row held.
    first: usize,
    data: Vec<f32>,
}

impl Tail {
    pub(super) fn new(width: usize) -> Self {
        Self { width, first: 0, data: Vec::new() }
    }

    /// Numbers of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Numbers held.
    pub(super) fn len(&self) -> usize {
        self.data.len()
    }

    /// Position of the first row held.
    pub(super) fn first(&self) -> usize {
        self.first
    }

    /// One past the last position.
    pub(super) fn end(&self) -> usize {
        self.first + self.data.len() / self.width
    }

    /// Appends `rows`, `[positions, width]`.
    pub(super) fn extend(&mut self, rows: &[f32]) {
        self.data.extend_from_slice(rows);
    }

    /// The row of one position, which must be held.
    pub(super) fn row(&self, position: usize) -> &[f32] {
        &self.data[(position - self.first) * self.width..][..self.width]
    }

    /// Rows of several positions, which must be held.
    pub(super) fn rows(&self, positions: Range<usize>) -> &[f32] {
        &self.data[(positions.start - self.first) * self.width..(positions.end - self.first) * self.width]
    }

    /// Drops rows before `first`.
    pub(super) fn drop_before(&mut self, first: usize) {
        let first = first.clamp(self.first, self.end());
        self.data.drain(..(first - self.first) * self.width);
        self.first = first;
    }

    /// Drops rows from `end` on.
    pub(super) fn truncate(&mut self, end: usize) {
        self.data.truncate(end.saturating_sub(self.first) * self.width);
        self.first = self.first.min(end);
    }

    /// Forgets everything and goes on at position `first` with `rows`.
    pub(super) fn restart(&mut self, first: usize, rows: &[f32]) {
        self.first = first;
        self.data.clear();
        self.data.extend_from_slice(rows);
    }
}
