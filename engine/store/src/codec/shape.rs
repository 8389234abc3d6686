//! What a plane is made of, as far as the codec cares.

use std::sync::Arc;

use esker_prefix::{Dtype, Group, PlaneSpec};

use super::{COLUMN_BYTES, Damaged, FIXED_BYTES, VERSION, take, take_array};

/// Layers, rows and the fields of a row. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneShape {
    layers: u16,
    rows: u32,
    columns: Arc<[Column]>,
}

/// One field of a row: `count` numbers of one format. Each of them is a *channel*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Format of the numbers.
    pub dtype: Dtype,
    /// How many.
    pub count: u32,
}

impl PlaneShape {
    /// A plane of `layers` layers with `rows` rows each; the fields of a row in order, without gaps.
    pub fn new(layers: u16, rows: u32, columns: &[Column]) -> Self {
        Self { layers, rows, columns: columns.into() }
    }

    /// The shape of a plane of this group, which may have other rows than a whole block or state.
    pub fn of(group: &Group, plane: &PlaneSpec) -> Self {
        let columns = group.fields.iter().map(|field| Column { dtype: field.dtype, count: field.count });
        let row_of_layers = group.row_bytes() * u64::from(plane.layers);
        let rows = plane.len_bytes.checked_div(row_of_layers).unwrap_or(0);
        Self {
            layers: plane.layers,
            rows: u32::try_from(rows).unwrap_or(u32::MAX),
            columns: columns.collect(),
        }
    }

    pub(super) fn layers(&self) -> u16 {
        self.layers
    }

    /// Rows per layer.
    pub(super) fn rows(&self) -> u32 {
        self.rows
    }

    pub(super) fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// `None` if a field is not whole bytes, or the sum out of range.
    pub(super) fn row_bytes(&self) -> Option<usize> {
        self.columns.iter().try_fold(0_usize, |sum, column| sum.checked_add(column.row_bytes()?))
    }

    pub(super) fn raw_bytes(&self) -> Option<usize> {
        let rows = usize::from(self.layers).checked_mul(self.rows as usize)?;
        rows.checked_mul(self.row_bytes()?)
    }

    /// FP4 codes are within 6 % of random. Such planes hold the indexer keys, which are read first and whole;
    /// handing them on as they lie is worth more than the few percent that their scales would give.
    pub(super) fn is_mostly_fp4(&self) -> bool {
        let fp4 = self.columns.iter().filter(|column| column.dtype == Dtype::F4E2m1);
        let fp4_bytes = fp4.filter_map(Column::row_bytes).fold(0_usize, usize::saturating_add);
        self.row_bytes().is_none_or(|row_bytes| fp4_bytes > row_bytes / 2)
    }

    /// Reads the description at the start of an encoded plane. Returns it with the stored lengths of the columns and
    /// the bytes that follow. Nothing but the table is known to be present.
    pub(super) fn read(mut stored: &[u8]) -> Result<(Self, Vec<usize>, &[u8]), Damaged> {
        let &[version, columns, l0, l1, r0, r1, r2, r3] = take_array::<FIXED_BYTES>(&mut stored)?;
        if version != VERSION {
            return Err(Damaged("version"));
        }
        let table = take(&mut stored, usize::from(columns) * COLUMN_BYTES)?;
        let (entries, _) = table.as_chunks::<COLUMN_BYTES>();
        let mut lengths = Vec::with_capacity(entries.len());
        let mut columns = Vec::with_capacity(entries.len());
        for &[dtype, _, _, _, c0, c1, c2, c3, s0, s1, s2, s3] in entries {
            let dtype = dtype_from_u8(dtype).ok_or(Damaged("number format"))?;
            columns.push(Column { dtype, count: u32::from_le_bytes([c0, c1, c2, c3]) });
            lengths.push(u32::from_le_bytes([s0, s1, s2, s3]) as usize);
        }
        let (layers, rows) = (u16::from_le_bytes([l0, l1]), u32::from_le_bytes([r0, r1, r2, r3]));
        Ok((Self { layers, rows, columns: columns.into() }, lengths, stored))
    }
}

impl Column {
    /// `None` if that is not a whole number.
    pub(super) fn row_bytes(&self) -> Option<usize> {
        let count = self.count as usize;
        match self.dtype {
            Dtype::U8 | Dtype::F8E4m3 | Dtype::F8E8m0 => Some(count),
            Dtype::Bf16 => count.checked_mul(2),
            Dtype::F32 => count.checked_mul(4),
            Dtype::F4E2m1 => count.is_multiple_of(2).then_some(count / 2),
        }
    }
}

fn dtype_from_u8(byte: u8) -> Option<Dtype> {
    let all = [Dtype::U8, Dtype::F32, Dtype::Bf16, Dtype::F8E4m3, Dtype::F8E8m0, Dtype::F4E2m1];
    all.into_iter().find(|&dtype| dtype as u8 == byte)
}
