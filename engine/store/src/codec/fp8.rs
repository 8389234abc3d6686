//! FP8 e4m3: two exponents to a Huffman symbol, two signs and mantissas to a byte.
//!
//! FP8 has already taken most of the slack out of activations; about a sixth is left, all of it in the exponents.
//!
//! A chunk of T rows of C numbers, with H = T / 2 rounded down; a byte holds row t in its low half and row t + H
//! in its high half:
//!
//! ```text
//!   0  H*C  sign << 3 | mantissa, in pairs
//!        C  the last row as it is, if T is odd
//!           zstd frame of H*C pairs of exponents: the rest
//! ```

use super::rows::{Rows, RowsMut, at_least};
use super::{Damaged, Workspace, take};

/// Encodes a chunk. `None` if it does not fit into `out`.
pub(super) fn encode(rows: Rows<'_>, workspace: &mut Workspace, out: &mut [u8]) -> Option<usize> {
    let Workspace { entropy, bytes, .. } = workspace;
    let width = rows.width;
    let half = rows.len() / 2;
    let symbols = at_least(bytes, half * width);
    let (remainders, rest) = out.split_at_mut_checked(half * width)?;
    let (tail, rest) = rest.split_at_mut_checked(rows.len() % 2 * width)?;
    let pairs = rows.iter().zip(rows.iter().skip(half));
    let parts = symbols.chunks_exact_mut(width).zip(remainders.chunks_exact_mut(width));
    for ((low, high), (symbols, remainders)) in pairs.zip(parts) {
        for (symbol, (&low, &high)) in symbols.iter_mut().zip(low.iter().zip(high)) {
            *symbol = (low >> 3) & 0xF | (high << 1) & 0xF0;
        }
        for (remainder, (&low, &high)) in remainders.iter_mut().zip(low.iter().zip(high)) {
            *remainder = (low >> 4) & 0x8 | low & 0x7 | high & 0x80 | (high & 0x7) << 4;
        }
    }
    if let Some(last) = rows.iter().nth(2 * half) {
        tail.copy_from_slice(last);
    }
    let symbols_bytes = if symbols.is_empty() { 0 } else { entropy.huffman(symbols, rest)? };
    Some(remainders.len() + tail.len() + symbols_bytes)
}

/// Decodes a chunk into its rows.
pub(super) fn decode(mut stored: &[u8], workspace: &mut Workspace, rows: RowsMut<'_>) -> Result<(), Damaged> {
    let Workspace { entropy, bytes, .. } = workspace;
    let width = rows.width;
    let half = rows.len() / 2;
    let remainders = take(&mut stored, half * width)?;
    let tail = take(&mut stored, rows.len() % 2 * width)?;
    let symbols = at_least(bytes, half * width);
    match symbols.is_empty() {
        false => entropy.decompress(stored, symbols)?,
        true if stored.is_empty() => {}
        true => return Err(Damaged("symbols of no rows")),
    }
    let part = |t: usize| t * width..(t + 1) * width;
    for (t, row) in rows.into_iter().enumerate() {
        if t == 2 * half {
            row.copy_from_slice(tail);
            break;
        }
        let pair = part(if t < half { t } else { t - half });
        let numbers = row.iter_mut().zip(symbols[pair.clone()].iter().zip(&remainders[pair]));
        if t < half {
            for (number, (&symbol, &remainder)) in numbers {
                *number = (remainder & 0x8) << 4 | (symbol & 0xF) << 3 | remainder & 0x7;
            }
        } else {
            for (number, (&symbol, &remainder)) in numbers {
                *number = remainder & 0x80 | (symbol & 0xF0) >> 1 | (remainder >> 4) & 0x7;
            }
        }
    }
    Ok(())
}
