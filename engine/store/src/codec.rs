//! The lossless codec of planes: columns inside, rows outside.
//!
//! A plane is layer after layer, row after row; a row is fields, packed. Its fields have different number formats,
//! and what shrinks one does nothing for another. So [`encode`] takes the rows apart into one column per field, cuts
//! each column into chunks, and writes every chunk in the mode that suits it; [`decode`] puts the bytes back into
//! rows. Every bit pattern returns as it was. A plane that does not shrink by 3 % is not encoded: the caller stores
//! it raw.
//!
//! What is random in activations (sign and mantissa) is kept as it is. What is not (exponents) goes through zstd's
//! Huffman coder, without match search. No entropy coder is made here.
//!
//! An encoded plane; all numbers are little-endian:
//!
//! ```text
//!   0  1  version, 1
//!   1  1  number of columns, n
//!   2  2  layers
//!   4  4  rows per layer
//!   8     columns, 12 bytes each:
//!   0  1    number format, as in `Dtype`
//!   1  3    zero
//!   4  4    numbers in a row
//!   8  4    stored length in bytes
//! 8+12n   chunks of the first column, of the second, and so on; each:
//!   0  1    mode
//!   1  4    stored length in bytes of what follows
//!   5       0 raw            the rows
//!           1 zstd           a zstd frame of the rows
//!           2 bf16, channel  bf16.rs, with a reference exponent for each channel
//!           3 bf16, layer    bf16.rs, with a reference exponent for each layer
//!           4 fp8            fp8.rs
//! ```
//!
//! Which rows a chunk holds follows from the shape (`chunks.rs`) and is not written. The description travels with
//! the bytes, so that a scan can decode a plane without its layout; it is believed only as far as it gives exactly
//! the raw length that the caller knows. zstd frames carry neither checksum nor content size: the length is known,
//! and the caller holds a digest of the content.

mod bf16;
mod chunks;
mod entropy;
mod fp8;
mod rows;
mod shape;

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;

use std::cell::RefCell;

use esker_prefix::Dtype;

use bf16::References;
use chunks::Chunk;
use entropy::Entropy;
use rows::{Rows, RowsMut};
pub use shape::{Column, PlaneShape};

/// Encoded planes and chunks larger than this share of the raw ones, in percent, are kept raw.
const WORTH_ENCODING_PERCENT: usize = 97;
/// The longest buffer that a chunk of the usual length needs; what an odd shape needed beyond is given back.
const KEPT_BYTES: usize = 256 << 10;
const VERSION: u8 = 1;
const FIXED_BYTES: usize = 8;
const COLUMN_BYTES: usize = 12;
const CHUNK_HEADER_BYTES: usize = 5;

/// Stored bytes that are not an encoded plane of the length asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("encoded plane is damaged: {0}")]
pub struct Damaged(pub &'static str);

/// Encodes a plane into the start of `out` and returns the encoded length: at most 97 % of the raw length, so an
/// `out` as long as `raw` is enough. `None` if the plane does not shrink that far, or is not of this shape; the
/// content of `out` is then without meaning.
///
/// Contexts and buffers, some 500 KiB, are kept per thread.
pub fn encode(shape: &PlaneShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    if raw.is_empty() || shape.raw_bytes() != Some(raw.len()) || shape.is_mostly_fp4() {
        return None;
    }
    let room = share(raw.len()).min(out.len());
    WORKSPACE.with_borrow_mut(|workspace| {
        let encoded_bytes = workspace.encode(shape, raw, &mut out[..room]);
        workspace.shrink();
        encoded_bytes
    })
}

/// Decodes a plane into `out`, which is exactly as long as the plane. Accepts any bytes: what is not an encoded plane
/// of that length is an error, and `out` then holds anything. Bytes that decode are not proven to be the right ones;
/// that takes the digest of the content.
pub fn decode(stored: &[u8], out: &mut [u8]) -> Result<(), Damaged> {
    WORKSPACE.with_borrow_mut(|workspace| {
        let outcome = workspace.decode(stored, out);
        workspace.shrink();
        outcome
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Mode {
    Raw = 0,
    Zstd = 1,
    Bf16Channel = 2,
    Bf16Layer = 3,
    Fp8 = 4,
}

/// What coding one chunk needs, kept per thread.
#[derive(Default)]
struct Workspace {
    entropy: Entropy,
    /// Pairs of exponents, one byte each; or the rows of a column, gathered.
    bytes: Vec<u8>,
    references: Vec<u8>,
    escapes: Vec<u8>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

impl Workspace {
    fn encode(&mut self, shape: &PlaneShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        let header_bytes = FIXED_BYTES + COLUMN_BYTES * shape.columns().len();
        let row_bytes = shape.row_bytes()?;
        let mut end = header_bytes;
        let mut offset = 0;
        let mut table = Vec::with_capacity(header_bytes);
        table.extend([VERSION, u8::try_from(shape.columns().len()).ok()?]);
        table.extend(shape.layers().to_le_bytes());
        table.extend(shape.rows().to_le_bytes());
        for column in shape.columns() {
            let width = column.row_bytes()?;
            let start = end;
            for chunk in chunks::of(shape, width) {
                let rows = Rows::new(&raw[chunk.bytes(row_bytes)], row_bytes, offset, width);
                end += self.encode_chunk(column.dtype, rows, chunk, out.get_mut(end..)?)?;
            }
            offset += width;
            table.extend([column.dtype as u8, 0, 0, 0]);
            table.extend(column.count.to_le_bytes());
            table.extend(u32::try_from(end - start).ok()?.to_le_bytes());
        }
        out.get_mut(..header_bytes)?.copy_from_slice(&table);
        Some(end)
    }

    /// Writes a chunk in the first of its modes that makes it smaller, or raw.
    fn encode_chunk(&mut self, dtype: Dtype, rows: Rows<'_>, chunk: Chunk, out: &mut [u8]) -> Option<usize> {
        let (header, body) = out.split_at_mut_checked(CHUNK_HEADER_BYTES)?;
        let worth_bytes = share(rows.bytes());
        let mut modes = modes(dtype, rows, chunk).iter();
        let (mode, stored_bytes) = loop {
            let Some(&mode) = modes.next() else {
                rows.gather(body.get_mut(..rows.bytes())?);
                break (Mode::Raw, rows.bytes());
            };
            match self.try_mode(mode, rows, chunk, body) {
                Some(stored_bytes) if stored_bytes <= worth_bytes => break (mode, stored_bytes),
                _ => {}
            }
        };
        header[0] = mode as u8;
        header[1..].copy_from_slice(&u32::try_from(stored_bytes).ok()?.to_le_bytes());
        Some(CHUNK_HEADER_BYTES + stored_bytes)
    }

    fn try_mode(&mut self, mode: Mode, rows: Rows<'_>, chunk: Chunk, out: &mut [u8]) -> Option<usize> {
        match mode {
            Mode::Raw => None,
            Mode::Zstd => {
                let bytes = rows.contiguous(&mut self.bytes);
                self.entropy.compress(bytes, out)
            }
            Mode::Bf16Channel => bf16::encode(rows, chunk, References::PerChannel, self, out),
            Mode::Bf16Layer => bf16::encode(rows, chunk, References::PerLayer, self, out),
            Mode::Fp8 => fp8::encode(rows, self, out),
        }
    }

    fn decode(&mut self, stored: &[u8], out: &mut [u8]) -> Result<(), Damaged> {
        let (shape, column_bytes, mut rest) = PlaneShape::read(stored)?;
        if shape.raw_bytes() != Some(out.len()) {
            return Err(Damaged("describes a plane of another length"));
        }
        let row_bytes = shape.row_bytes().ok_or(Damaged("row length"))?;
        let mut offset = 0;
        for (column, stored_bytes) in shape.columns().iter().zip(column_bytes) {
            let width = column.row_bytes().ok_or(Damaged("row length"))?;
            let mut column_rest = take(&mut rest, stored_bytes)?;
            for chunk in chunks::of(&shape, width) {
                let rows = RowsMut::new(&mut out[chunk.bytes(row_bytes)], row_bytes, offset, width);
                self.decode_chunk(column.dtype, &mut column_rest, chunk, rows)?;
            }
            if !column_rest.is_empty() {
                return Err(Damaged("bytes after the last chunk of a column"));
            }
            offset += width;
        }
        if rest.is_empty() { Ok(()) } else { Err(Damaged("bytes after the last column")) }
    }

    fn decode_chunk(
        &mut self,
        dtype: Dtype,
        stored: &mut &[u8],
        chunk: Chunk,
        rows: RowsMut<'_>,
    ) -> Result<(), Damaged> {
        let &[mode] = take_array(stored)?;
        let stored_bytes = take_length(stored)?;
        let stored = take(stored, stored_bytes)?;
        match (mode, dtype) {
            (0, _) if stored.len() == rows.bytes() => {
                rows.scatter(stored);
                Ok(())
            }
            (1, _) => {
                let Self { entropy, bytes, .. } = self;
                rows.fill_from(bytes, |room| entropy.decompress(stored, room))
            }
            (2, Dtype::Bf16) => bf16::decode(stored, chunk, References::PerChannel, self, rows),
            (3, Dtype::Bf16) => bf16::decode(stored, chunk, References::PerLayer, self, rows),
            (4, Dtype::F8E4m3) => fp8::decode(stored, self, rows),
            _ => Err(Damaged("mode of a chunk")),
        }
    }

    fn shrink(&mut self) {
        for buffer in [&mut self.bytes, &mut self.references, &mut self.escapes] {
            if buffer.capacity() > KEPT_BYTES {
                *buffer = Vec::new();
            }
        }
    }
}

/// The modes worth trying for a chunk, best first.
fn modes(dtype: Dtype, rows: Rows<'_>, chunk: Chunk) -> &'static [Mode] {
    use Mode::{Bf16Channel, Bf16Layer, Fp8, Zstd};
    match dtype {
        // The first layer of a model sees only the token: equal tokens give equal rows, and zstd finds them.
        Dtype::Bf16 | Dtype::F8E4m3 | Dtype::F4E2m1 if rows.repeat() => &[Zstd],
        Dtype::Bf16 if chunk.run >= bf16::ROWS_PER_CHANNEL_REFERENCE => &[Bf16Channel, Bf16Layer, Zstd],
        Dtype::Bf16 => &[Bf16Layer, Zstd],
        Dtype::F8E4m3 => &[Fp8, Zstd],
        Dtype::F4E2m1 => &[],
        Dtype::U8 | Dtype::F32 | Dtype::F8E8m0 => &[Zstd],
    }
}

/// The most that bytes may come to and still count as smaller.
fn share(raw_bytes: usize) -> usize {
    raw_bytes / 100 * WORTH_ENCODING_PERCENT + raw_bytes % 100 * WORTH_ENCODING_PERCENT / 100
}

/// Cuts the next `len` stored bytes off.
fn take<'a>(stored: &mut &'a [u8], len: usize) -> Result<&'a [u8], Damaged> {
    let (bytes, rest) = stored.split_at_checked(len).ok_or(Damaged("ends early"))?;
    *stored = rest;
    Ok(bytes)
}

fn take_array<'a, const N: usize>(stored: &mut &'a [u8]) -> Result<&'a [u8; N], Damaged> {
    let (bytes, rest) = stored.split_first_chunk().ok_or(Damaged("ends early"))?;
    *stored = rest;
    Ok(bytes)
}

fn take_length(stored: &mut &[u8]) -> Result<usize, Damaged> {
    Ok(u32::from_le_bytes(*take_array(stored)?) as usize)
}
