//! bf16: exponents relative to a reference, two of them to a Huffman symbol; sign and mantissa as they are.
//!
//! In the activations of a model the mantissa is random, and the exponent is not: a channel keeps its range. With
//! the greatest exponent of the channel as reference the distance below it fits four bits, nearly always.
//!
//! A chunk of T rows of C numbers, in R runs of one layer each, with H = T / 2 rounded down:
//!
//! ```text
//!   0  4    length s of the symbols
//!   4  R*C  reference exponents, run by run      with one reference for each layer: R bytes
//!     2*H*C sign << 7 | mantissa, row by row
//!      2*C  the last row as it is, if T is odd
//!        s  zstd frame of H*C symbols: code of row t | code of row t + H, << 4
//!           escapes, in order of the rows: the rest
//! ```
//!
//! distance = reference - exponent, modulo 256; code = min(distance, 15); a distance of 15 or more is an escape and
//! is listed as a byte. So any reference serves any exponent, and only the length hangs on the choice.

use super::chunks::Chunk;
use super::rows::{Rows, RowsMut, at_least};
use super::{Damaged, Workspace, take, take_length};

/// A reference of its own costs a channel one byte; runs shorter than this do not earn it back.
pub(super) const ROWS_PER_CHANNEL_REFERENCE: usize = 64;
/// More escapes than this, in percent of the numbers, mean that the references do not fit.
const MAX_ESCAPES_PERCENT: usize = 3;
/// One row in so many is counted for the most common exponent. Counting is slow, and a near miss costs little.
const COUNTED_ROW_STEP: usize = 4;
const ESCAPE: u8 = 15;
/// Numbers up to which rows are put together as one.
const JOINED_NUMBERS: usize = 1024;

/// What one reference exponent is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum References {
    /// A channel in a layer: its greatest exponent.
    PerChannel,
    /// A whole layer: its most common exponent + 3. Outliers above that wrap around, and become escapes.
    PerLayer,
}

/// Encodes a chunk. `None` if it does not fit into `out`, or has too many escapes.
pub(super) fn encode(
    rows: Rows<'_>,
    chunk: Chunk,
    kind: References,
    workspace: &mut Workspace,
    out: &mut [u8],
) -> Option<usize> {
    let Workspace { entropy, bytes, references, escapes } = workspace;
    let channels = rows.width / 2;
    let half = chunk.rows / 2;
    let symbols = at_least(bytes, half * channels);
    let runs = chunk.rows / chunk.run;
    let references = at_least(references, runs * channels);
    choose_references(rows, chunk.run, kind, references);
    escapes.clear();

    let stored_references = references.len() / kind.repetitions(channels);
    let (length, rest) = out.split_first_chunk_mut::<4>()?;
    let (out_references, rest) = rest.split_at_mut_checked(stored_references)?;
    let (remainders, rest) = rest.split_at_mut_checked(2 * half * channels)?;
    let (tail, rest) = rest.split_at_mut_checked(chunk.rows % 2 * rows.width)?;
    for (out, reference) in
        out_references.iter_mut().zip(references.iter().step_by(kind.repetitions(channels)))
    {
        *out = *reference;
    }
    let max_escapes = 2 * symbols.len() * MAX_ESCAPES_PERCENT / 100;
    let part = |t: usize| t * channels..(t + 1) * channels;
    for (t, row) in rows.iter().enumerate() {
        if t == 2 * half {
            tail.copy_from_slice(row);
            break;
        }
        let (numbers, _) = row.as_chunks();
        let (references, remainders) = (&references[part(t / chunk.run)], &mut remainders[part(t)]);
        if t < half {
            split_row::<0>(numbers, references, &mut symbols[part(t)], remainders, escapes);
        } else {
            split_row::<4>(numbers, references, &mut symbols[part(t - half)], remainders, escapes);
        }
        if escapes.len() > max_escapes {
            return None;
        }
    }
    let symbols_bytes = if symbols.is_empty() { 0 } else { entropy.huffman(symbols, rest)? };
    rest.get_mut(symbols_bytes..)?.get_mut(..escapes.len())?.copy_from_slice(escapes);
    *length = u32::try_from(symbols_bytes).ok()?.to_le_bytes();
    Some(4 + stored_references + remainders.len() + tail.len() + symbols_bytes + escapes.len())
}

/// Decodes a chunk into its rows.
pub(super) fn decode(
    mut stored: &[u8],
    chunk: Chunk,
    kind: References,
    workspace: &mut Workspace,
    mut rows: RowsMut<'_>,
) -> Result<(), Damaged> {
    let Workspace { entropy, bytes, references, .. } = workspace;
    let channels = rows.width / 2;
    let half = chunk.rows / 2;
    let expanded = chunk.rows / chunk.run * channels;
    let symbols_bytes = take_length(&mut stored)?;
    let stored_references = take(&mut stored, expanded / kind.repetitions(channels))?;
    let remainders = take(&mut stored, 2 * half * channels)?;
    let tail = take(&mut stored, chunk.rows % 2 * rows.width)?;
    let stored_symbols = take(&mut stored, symbols_bytes)?;
    let mut escapes = stored;

    // Rows that lie one behind the other and share references are put together as one: a narrow one is not worth a loop.
    let joined = if rows.are_contiguous() { (JOINED_NUMBERS / channels).clamp(1, chunk.run) } else { 1 };
    let tile = joined * channels;
    let references = at_least(references, chunk.rows / chunk.run * tile);
    let stored_run = channels / kind.repetitions(channels);
    for (tile, stored) in references.chunks_exact_mut(tile).zip(stored_references.chunks_exact(stored_run)) {
        match kind {
            References::PerChannel => {
                tile.chunks_exact_mut(channels).for_each(|row| row.copy_from_slice(stored))
            }
            References::PerLayer => tile.fill(stored[0]),
        }
    }
    let symbols = at_least(bytes, half * channels);
    if !symbols.is_empty() {
        entropy.decompress(stored_symbols, symbols)?;
    }
    let mut t = 0;
    while t < 2 * half {
        let end = if t < half { half } else { 2 * half };
        let count = joined.min(chunk.run - t % chunk.run).min(end - t);
        let part = |t: usize| t * channels..(t + count) * channels;
        let (numbers, _) = rows.cut(count).as_chunks_mut();
        let references = &references[t / chunk.run * tile..][..count * channels];
        let remainders = &remainders[part(t)];
        if t < half {
            join_rows::<0>(&symbols[part(t)], references, remainders, &mut escapes, numbers)?;
        } else {
            join_rows::<4>(&symbols[part(t - half)], references, remainders, &mut escapes, numbers)?;
        }
        t += count;
    }
    if !tail.is_empty() {
        rows.cut(1).copy_from_slice(tail);
    }
    if escapes.is_empty() { Ok(()) } else { Err(Damaged("escapes left over")) }
}

impl References {
    /// How many channels share a reference.
    fn repetitions(self, channels: usize) -> usize {
        match self {
            Self::PerChannel => 1,
            Self::PerLayer => channels,
        }
    }
}

/// One reference for each channel of each run.
fn choose_references(rows: Rows<'_>, run: usize, kind: References, references: &mut [u8]) {
    let channels = rows.width / 2;
    let mut rows = rows.iter();
    for references in references.chunks_exact_mut(channels) {
        let rows = rows.by_ref().take(run);
        match kind {
            References::PerChannel => {
                references.fill(0);
                for row in rows {
                    for (reference, &number) in references.iter_mut().zip(row.as_chunks().0) {
                        *reference = exponent(number).max(*reference);
                    }
                }
            }
            References::PerLayer => {
                let mut counts = [0_u32; 256];
                for row in rows.step_by(COUNTED_ROW_STEP) {
                    for &number in row.as_chunks().0 {
                        counts[usize::from(exponent(number))] += 1;
                    }
                }
                let most_common = (0..=u8::MAX).max_by_key(|&exponent| counts[usize::from(exponent)]);
                references.fill(most_common.unwrap_or(0).wrapping_add(3));
            }
        }
    }
}

/// Takes a row apart. Its codes go to the low (`SHIFT` 0, written first) or high (`SHIFT` 4) half of the symbols.
fn split_row<const SHIFT: u8>(
    numbers: &[[u8; 2]],
    references: &[u8],
    symbols: &mut [u8],
    remainders: &mut [u8],
    escapes: &mut Vec<u8>,
) {
    let codes = symbols.iter_mut().zip(numbers.iter().zip(references));
    for (symbol, (&number, &reference)) in codes {
        let code = reference.wrapping_sub(exponent(number)).min(ESCAPE);
        *symbol = if SHIFT == 0 { code } else { *symbol | code << SHIFT };
    }
    for (remainder, &number) in remainders.iter_mut().zip(numbers) {
        let number = u16::from_le_bytes(number);
        *remainder = ((number >> 8) & 0x80) as u8 | (number & 0x7F) as u8;
    }
    escapes.extend(escaped::<SHIFT>(symbols).map(|at| references[at].wrapping_sub(exponent(numbers[at]))));
}

/// Puts rows together again.
fn join_rows<const SHIFT: u8>(
    symbols: &[u8],
    references: &[u8],
    remainders: &[u8],
    escapes: &mut &[u8],
    numbers: &mut [[u8; 2]],
) -> Result<(), Damaged> {
    let parts = symbols.iter().zip(references.iter().zip(remainders));
    for (number, (&symbol, (&reference, &remainder))) in numbers.iter_mut().zip(parts) {
        *number = join(reference, (symbol >> SHIFT) & 0xF, remainder);
    }
    escaped::<SHIFT>(symbols).try_for_each(|at| {
        let (&distance, rest) = escapes.split_first().ok_or(Damaged("escapes run out"))?;
        *escapes = rest;
        numbers[at] = join(references[at], distance, remainders[at]);
        Ok(())
    })
}

/// Where the escapes are, in order. Eight codes are looked at together: one in fifty is an escape, too few to look at each code
/// and too many to pass over long groups without any.
fn escaped<const SHIFT: u8>(symbols: &[u8]) -> impl Iterator<Item = usize> {
    const LOW: u64 = 0x0F0F_0F0F_0F0F_0F0F;
    const ONE: u64 = 0x0101_0101_0101_0101;
    let (words, rest) = symbols.as_chunks();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let words = words.iter().copied().chain((!rest.is_empty()).then_some(last));
    words.enumerate().flat_map(|(word, symbols)| {
        // Of the codes only 15 carries into the upper half of its byte.
        let mut found = (((u64::from_le_bytes(symbols) >> SHIFT) & LOW) + ONE) & (ONE << 4);
        std::iter::from_fn(move || {
            let first = found.trailing_zeros() as usize / 8;
            let rest = found.checked_sub(1)?;
            found &= rest;
            Some(8 * word + first)
        })
    })
}

/// Biased exponent of a number.
fn exponent(number: [u8; 2]) -> u8 {
    ((u16::from_le_bytes(number) >> 7) & 0xFF) as u8
}

fn join(reference: u8, distance: u8, remainder: u8) -> [u8; 2] {
    let exponent = u16::from(reference.wrapping_sub(distance));
    let remainder = u16::from(remainder);
    ((remainder & 0x80) << 8 | exponent << 7 | remainder & 0x7F).to_le_bytes()
}
