//! Rows as numbers and as bytes: what a cached row is rounded to before its first use, and how it lies in a plane.
//!
//! A layout's fields say how (see `esker_prefix::Field`). Plain fields hold the numbers themselves. Narrow ones hold codes,
//! and the field `scales` behind them one power of two per block: the smallest with which the block's largest number does
//! not exceed the format's. As deployed:
//!
//! | row | bytes |
//! |---|---|
//! | V4, window or compressed | 448 e4m3, 64 bf16 (rotated channels), 7 e8m0 (per 64), 1 unused = 584 |
//! | V4, indexer key | 64 of two e2m1 each (even channel low), 4 e8m0 (per 32) = 68 |
//! | V3.2 and GLM-5, latent | 512 e4m3, 4 f32 (per 128), 64 bf16 (rope key) = 656 |
//! | indexer key in FP8 | 128 e4m3, 1 f32 = 132 |
//!
//! Invariants: rounding twice is rounding once, and decoding gives the very numbers that were rounded. So a row may be
//! kept as numbers and encoded when it leaves. A block that was rounded down to half of its range is then encoded with
//! half of its scale: other codes than at first, the same numbers.

use esker_prefix::{Dtype, Field, Group};
use half::bf16;

use crate::formats::{from_e2m1, from_e4m3, from_e8m0, power_of_two, to_e2m1, to_e4m3};

/// How the rows of one group are written.
pub(crate) enum RowCodec {
    /// All F32.
    F32,
    /// All bfloat16.
    Bf16,
    /// Several formats.
    Mixed(Mixed),
}

/// Fields of several formats.
pub(crate) struct Mixed {
    parts: Vec<Part>,
    /// Numbers of a row.
    width: usize,
    row_bytes: usize,
}

/// One field of a row.
struct Part {
    kind: Kind,
    /// Where its numbers are in a row of numbers; empty for scales and padding.
    first: usize,
    count: usize,
    /// Where its bytes are in a row of bytes.
    byte: usize,
}

enum Kind {
    F32,
    Bf16,
    /// Codes in blocks, whose scales are at `scales` of a row of bytes.
    Codes {
        code: Code,
        block: usize,
        scales: usize,
        scale: Scale,
    },
    /// Written with their codes, or left zero.
    Other,
}

#[derive(Clone, Copy)]
enum Code {
    E4m3,
    E2m1,
}

#[derive(Clone, Copy)]
enum Scale {
    F32,
    E8m0,
}

impl RowCodec {
    /// For the rows of a group; names what is wrong with its fields.
    pub(crate) fn of(group: &Group) -> Result<Self, String> {
        let all = |dtype: Dtype| group.fields.iter().all(|field| field.dtype == dtype);
        if all(Dtype::F32) {
            return Ok(Self::F32);
        }
        if all(Dtype::Bf16) {
            return Ok(Self::Bf16);
        }
        let (mut parts, mut width, mut byte) = (Vec::new(), 0, 0);
        for field in &group.fields {
            let count = field.count as usize;
            let (kind, bytes) = match (field.dtype, field.name.as_str()) {
                (Dtype::F32 | Dtype::F8E8m0, "scales") => {
                    (Kind::Other, count * scale_of(field.dtype).bytes())
                }
                (Dtype::F32, _) => (Kind::F32, count * 4),
                (Dtype::Bf16, _) => (Kind::Bf16, count * 2),
                (Dtype::F8E4m3 | Dtype::F4E2m1, _) => {
                    let code = if field.dtype == Dtype::F8E4m3 { Code::E4m3 } else { Code::E2m1 };
                    let (scales, offset) = scales_of(group)
                        .filter(|(scales, _)| scales.count > 0 && field.count % scales.count == 0)
                        .ok_or_else(|| format!("field {:?} of {:?} has no scales", field.name, group.name))?;
                    let block = count / scales.count as usize;
                    (
                        Kind::Codes { code, block, scales: offset, scale: scale_of(scales.dtype) },
                        code.bytes(count),
                    )
                }
                (Dtype::U8, _) => (Kind::Other, count),
                (dtype, name) => return Err(format!("field {name:?} of {:?} is {dtype:?}", group.name)),
            };
            let numbers = if matches!(kind, Kind::Other) { 0 } else { count };
            parts.push(Part { kind, first: width, count: numbers, byte });
            width += numbers;
            byte += bytes;
        }
        Ok(Self::Mixed(Mixed { parts, width, row_bytes: byte }))
    }

    /// Rounds rows to what their bytes can hold.
    pub(crate) fn round(&self, rows: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::Bf16 => rows.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
            Self::Mixed(mixed) => {
                let mut bytes = vec![0; mixed.row_bytes];
                for row in rows.chunks_exact_mut(mixed.width) {
                    mixed.encode(row, &mut bytes);
                    mixed.decode(&bytes, row);
                }
            }
        }
    }

    /// Numbers of a row of `group`, whose codec this is.
    pub(crate) fn width(&self, group: &Group) -> usize {
        match self {
            Self::F32 | Self::Bf16 => group.fields.iter().map(|field| field.count as usize).sum(),
            Self::Mixed(mixed) => mixed.width,
        }
    }

    /// Appends the bytes of rows.
    pub(crate) fn encode(&self, rows: &[f32], bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend(rows.iter().flat_map(|value| value.to_le_bytes())),
            Self::Bf16 => {
                bytes.extend(rows.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
            }
            Self::Mixed(mixed) => {
                for row in rows.chunks_exact(mixed.width) {
                    let first = bytes.len();
                    bytes.resize(first + mixed.row_bytes, 0);
                    mixed.encode(row, &mut bytes[first..]);
                }
            }
        }
    }

    /// Appends the numbers of rows.
    pub(crate) fn decode(&self, bytes: &[u8], rows: &mut Vec<f32>) {
        match self {
            Self::F32 => rows.extend(bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x))),
            Self::Bf16 => {
                rows.extend(bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()));
            }
            Self::Mixed(mixed) => {
                for row in bytes.chunks_exact(mixed.row_bytes) {
                    let first = rows.len();
                    rows.resize(first + mixed.width, 0.0);
                    mixed.decode(row, &mut rows[first..]);
                }
            }
        }
    }
}

impl Mixed {
    fn encode(&self, row: &[f32], bytes: &mut [u8]) {
        for part in &self.parts {
            let row = &row[part.first..part.first + part.count];
            match part.kind {
                Kind::F32 => {
                    for (value, out) in row.iter().zip(bytes[part.byte..].as_chunks_mut().0) {
                        *out = value.to_le_bytes();
                    }
                }
                Kind::Bf16 => {
                    for (value, out) in row.iter().zip(bytes[part.byte..].as_chunks_mut().0) {
                        *out = bf16::from_f32(*value).to_le_bytes();
                    }
                }
                Kind::Codes { code, block, scales, scale } => {
                    for (index, values) in row.chunks_exact(block).enumerate() {
                        let exponent = code.scale_exponent(values);
                        scale.put(exponent, &mut bytes[scales + index * scale.bytes()..]);
                        code.encode(values, exponent, &mut bytes[part.byte + code.bytes(index * block)..]);
                    }
                }
                Kind::Other => {}
            }
        }
    }

    fn decode(&self, bytes: &[u8], row: &mut [f32]) {
        for part in &self.parts {
            let row = &mut row[part.first..part.first + part.count];
            match part.kind {
                Kind::F32 => {
                    for (value, &from) in row.iter_mut().zip(bytes[part.byte..].as_chunks().0) {
                        *value = f32::from_le_bytes(from);
                    }
                }
                Kind::Bf16 => {
                    for (value, &from) in row.iter_mut().zip(bytes[part.byte..].as_chunks().0) {
                        *value = bf16::from_le_bytes(from).to_f32();
                    }
                }
                Kind::Codes { code, block, scales, scale } => {
                    for (index, values) in row.chunks_exact_mut(block).enumerate() {
                        let factor = scale.get(&bytes[scales + index * scale.bytes()..]);
                        code.decode(&bytes[part.byte + code.bytes(index * block)..], factor, values);
                    }
                }
                Kind::Other => {}
            }
        }
    }
}

impl Code {
    /// Bytes of so many codes; an odd one is never alone, as layouts have whole bytes only.
    fn bytes(self, count: usize) -> usize {
        match self {
            Self::E4m3 => count,
            Self::E2m1 => count / 2,
        }
    }

    /// Exponent of a block's scale.
    fn scale_exponent(self, values: &[f32]) -> i32 {
        // The published quantisers' floors: a block of zeros has a scale, too.
        let (largest, floor) = match self {
            Self::E4m3 => (448.0, 1e-4),
            Self::E2m1 => (6.0, 6.0 * power_of_two(-126)),
        };
        let max = values.iter().fold(floor, |max: f32, value| max.max(value.abs()));
        ceil_log2(max / largest).clamp(-126, 126)
    }

    fn encode(self, values: &[f32], exponent: i32, bytes: &mut [u8]) {
        let inverse = power_of_two(-exponent);
        match self {
            Self::E4m3 => {
                for (value, byte) in values.iter().zip(bytes) {
                    *byte = to_e4m3(value * inverse);
                }
            }
            Self::E2m1 => {
                for (pair, byte) in values.as_chunks::<2>().0.iter().zip(bytes) {
                    *byte = to_e2m1(pair[0] * inverse) | to_e2m1(pair[1] * inverse) << 4;
                }
            }
        }
    }

    fn decode(self, bytes: &[u8], factor: f32, values: &mut [f32]) {
        match self {
            Self::E4m3 => {
                for (value, &byte) in values.iter_mut().zip(bytes) {
                    *value = from_e4m3(byte) * factor;
                }
            }
            Self::E2m1 => {
                for (pair, &byte) in values.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                    *pair = [from_e2m1(byte & 0xF) * factor, from_e2m1(byte >> 4) * factor];
                }
            }
        }
    }
}

impl Scale {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::E8m0 => 1,
        }
    }

    fn put(self, exponent: i32, bytes: &mut [u8]) {
        match self {
            Self::F32 => bytes[..4].copy_from_slice(&power_of_two(exponent).to_le_bytes()),
            Self::E8m0 => bytes[0] = u8::try_from(exponent + 127).unwrap_or(u8::MAX),
        }
    }

    fn get(self, bytes: &[u8]) -> f32 {
        match self {
            Self::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Self::E8m0 => from_e8m0(bytes[0]),
        }
    }
}

fn scale_of(dtype: Dtype) -> Scale {
    if dtype == Dtype::F32 { Scale::F32 } else { Scale::E8m0 }
}

/// The field of scales of a group, and where it begins in a row.
fn scales_of(group: &Group) -> Option<(&Field, usize)> {
    let index = group.fields.iter().position(|field| field.name == "scales")?;
    let before = Group { fields: group.fields[..index].to_vec(), ..group.clone() };
    Some((&group.fields[index], usize::try_from(before.row_bytes()).ok()?))
}

/// The smallest n with `2^n >= value`, for a positive number.
fn ceil_log2(value: f32) -> i32 {
    let bits = value.to_bits();
    let floor = (bits >> 23 & 0xFF).cast_signed() - 127;
    floor + i32::from(bits & 0x7F_FFFF != 0)
}

/// How a model's rows are written, and what they are rounded to before their first use.
pub(crate) struct RowFormats {
    /// Of each group of the layout.
    codecs: Vec<RowCodec>,
    /// The group that stands for all rows which attention reads: their fields are the same.
    row: Option<usize>,
    /// The group of the indexer's keys.
    key: Option<usize>,
    /// Whether the indexer turns keys and queries by a Hadamard matrix and rounds queries as well: as deployed, so that
    /// no channel alone decides the scale.
    rotated: bool,
}

impl RowFormats {
    /// From the groups of a layout; names what is wrong with them.
    pub(crate) fn of(groups: &[Group]) -> Result<Self, String> {
        let is_key = |group: &Group| group.name.ends_with("indexer_key");
        let key = groups.iter().position(is_key);
        let codecs: Vec<RowCodec> = groups.iter().map(RowCodec::of).collect::<Result<_, _>>()?;
        let rotated = match key.map(|key| &codecs[key]) {
            Some(RowCodec::Mixed(Mixed { width, .. })) if !width.is_power_of_two() => {
                return Err(format!("index_head_dim {width} must be a power of two in this row format"));
            }
            Some(RowCodec::Mixed(_)) => true,
            _ => false,
        };
        let is_input = |group: &Group| ["overlap", "pending"].iter().any(|end| group.name.ends_with(end));
        let row = groups.iter().position(|group| !is_key(group) && !is_input(group));
        Ok(Self { codecs, row, key, rotated })
    }

    /// How the rows of a group are written, by its index in the layout.
    pub(crate) fn codec(&self, group: u16) -> &RowCodec {
        &self.codecs[usize::from(group)]
    }

    /// Rounds rows.
    pub(crate) fn round_rows(&self, rows: &mut [f32]) {
        if let Some(row) = self.row {
            self.codecs[row].round(rows);
        }
    }

    /// Brings keys of the indexer, of `width`, into the form in which they are cached.
    pub(crate) fn round_keys(&self, keys: &mut [f32], width: usize) {
        if self.rotated {
            keys.chunks_exact_mut(width).for_each(hadamard);
        }
        if let Some(key) = self.key {
            self.codecs[key].round(keys);
        }
    }

    /// Brings queries of the indexer into the form that meets such keys.
    pub(crate) fn round_queries(&self, queries: &mut [f32], width: usize) {
        if self.rotated {
            self.round_keys(queries, width);
        }
    }
}

/// Multiplies a row, whose width is a power of two, by the Hadamard matrix over the root of its width: orthogonal, and its
/// own inverse.
fn hadamard(row: &mut [f32]) {
    let mut step = 1;
    while step < row.len() {
        for pairs in row.chunks_exact_mut(2 * step) {
            let (low, high) = pairs.split_at_mut(step);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        step *= 2;
    }
    let scale = 1.0 / (row.len() as f32).sqrt();
    row.iter_mut().for_each(|value| *value *= scale);
}

#[cfg(test)]
mod tests;
