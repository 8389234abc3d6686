//! One field of consecutive rows, seen where it lies between the other fields.

use super::Damaged;

/// The field as it is read.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    plane: &'a [u8],
    row_bytes: usize,
    offset: usize,
    pub(super) width: usize,
}

/// The field as it is written.
pub(super) struct RowsMut<'a> {
    plane: &'a mut [u8],
    row_bytes: usize,
    offset: usize,
    pub(super) width: usize,
}

impl<'a> Rows<'a> {
    /// The `width` bytes from `offset` on in each row of `row_bytes` bytes; `plane` is whole rows.
    pub(super) fn new(plane: &'a [u8], row_bytes: usize, offset: usize, width: usize) -> Self {
        debug_assert!(offset + width <= row_bytes && plane.len().is_multiple_of(row_bytes));
        Self { plane, row_bytes, offset, width }
    }

    pub(super) fn len(&self) -> usize {
        self.plane.len() / self.row_bytes
    }

    pub(super) fn bytes(&self) -> usize {
        self.len() * self.width
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let field = self.offset..self.offset + self.width;
        self.plane.chunks_exact(self.row_bytes).map(move |row| &row[field.clone()])
    }

    /// Copies the field into `out`, row after row.
    pub(super) fn gather(&self, out: &mut [u8]) {
        for (row, out) in self.iter().zip(out.chunks_exact_mut(self.width)) {
            out.copy_from_slice(row);
        }
    }

    /// The field, row after row: where it lies if it is all there is, else in `scratch`.
    pub(super) fn contiguous<'b>(&self, scratch: &'b mut Vec<u8>) -> &'b [u8]
    where
        'a: 'b,
    {
        if self.width == self.row_bytes {
            return self.plane;
        }
        let scratch = at_least(scratch, self.bytes());
        self.gather(scratch);
        scratch
    }

    /// Whether two rows in five or more look like an earlier one. Judged by 24 bytes of up to 1,024 rows: only the
    /// choice of a mode hangs on it. Narrow rows do not count.
    pub(super) fn repeat(&self) -> bool {
        const SEEN_BITS: u32 = 13;
        const SAMPLED_ROWS: usize = 1024;
        if self.width < 16 {
            return false;
        }
        let mut seen = [0_u64; 1 << (SEEN_BITS - 6)];
        let (mut rows, mut repeated) = (0, 0);
        for row in self.iter().take(SAMPLED_ROWS) {
            let word = |at: usize| row[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let mixed =
                word(0) ^ word(row.len() / 2 - 4).rotate_left(21) ^ word(row.len() - 8).rotate_left(42);
            let bit = mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - SEEN_BITS);
            let (word, mask) = (&mut seen[(bit >> 6) as usize], 1 << (bit & 63));
            rows += 1;
            repeated += usize::from(*word & mask != 0);
            *word |= mask;
        }
        repeated * 5 >= rows * 2
    }
}

impl<'a> RowsMut<'a> {
    /// As [`Rows::new`].
    pub(super) fn new(plane: &'a mut [u8], row_bytes: usize, offset: usize, width: usize) -> Self {
        debug_assert!(offset + width <= row_bytes && plane.len().is_multiple_of(row_bytes));
        Self { plane, row_bytes, offset, width }
    }

    pub(super) fn len(&self) -> usize {
        self.plane.len() / self.row_bytes
    }

    pub(super) fn bytes(&self) -> usize {
        self.len() * self.width
    }

    /// Whether the field is all there is in a row.
    pub(super) fn are_contiguous(&self) -> bool {
        self.width == self.row_bytes
    }

    /// Cuts off the field of the first `count` rows; of more than one only where it is contiguous.
    pub(super) fn cut(&mut self, count: usize) -> &'a mut [u8] {
        debug_assert!(count == 1 || self.are_contiguous());
        let (rows, rest) = std::mem::take(&mut self.plane).split_at_mut(count * self.row_bytes);
        self.plane = rest;
        &mut rows[self.offset..][..count * self.width]
    }

    pub(super) fn into_iter(self) -> impl Iterator<Item = &'a mut [u8]> {
        let field = self.offset..self.offset + self.width;
        self.plane.chunks_exact_mut(self.row_bytes).map(move |row| &mut row[field.clone()])
    }

    /// Copies the rows in `column` to their places.
    pub(super) fn scatter(self, column: &[u8]) {
        let width = self.width;
        for (out, row) in self.into_iter().zip(column.chunks_exact(width)) {
            out.copy_from_slice(row);
        }
    }

    /// Lets `fill` write the field row after row: in place if it is all there is, else by way of `scratch`.
    pub(super) fn fill_from(
        self,
        scratch: &mut Vec<u8>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), Damaged>,
    ) -> Result<(), Damaged> {
        if self.width == self.row_bytes {
            return fill(self.plane);
        }
        let scratch = at_least(scratch, self.bytes());
        fill(scratch)?;
        self.scatter(scratch);
        Ok(())
    }
}

/// The first `len` bytes of a buffer that grows when it must. They hold anything.
pub(super) fn at_least(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}
