//! A row times a matrix: what decoding one token mostly is.
//!
//! `matrixmultiply` copies the whole matrix into panels even for one row. This kernel reads it once instead, and
//! repeats that crate's order of operations: fused multiply-adds over k in ascending order, restarted every
//! [`BLOCK`] steps, parts added in order. The tests of `gemm.rs` compare the two to the bit.

use super::{Width, fma, wide, width};

/// `matrixmultiply`'s blocking of k for F32.
const BLOCK: usize = 256;
/// Columns summed at once: four registers of 16.
const LANES: usize = 64;

/// Whether products are fused into sums on this machine; only then may this kernel stand in for `sgemm`.
pub(super) fn fused() -> bool {
    width() != Width::Baseline
}

wide! {
    /// `y[j] = sum_k x[k] * b[k * stride + j]`.
    pub(super) fn gemv(x: &[f32], b: &[f32], stride: usize, y: &mut [f32]) {
        let (tiles, rest) = y.as_chunks_mut::<LANES>();
        for (index, tile) in tiles.iter_mut().enumerate() {
            let mut total = [0.0; LANES];
            for (block, x) in x.chunks(BLOCK).enumerate() {
                let mut sums = [0.0_f32; LANES];
                for (k, x) in x.iter().enumerate() {
                    let row = &b[(block * BLOCK + k) * stride + index * LANES..][..LANES];
                    for (sum, b) in sums.iter_mut().zip(row) {
                        *sum = fma::<FUSED>(*x, *b, *sum);
                    }
                }
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total = if block == 0 { sum } else { *total + sum };
                }
            }
            *tile = total;
        }
        let first = tiles.len() * LANES;
        for (j, y) in rest.iter_mut().enumerate() {
            let mut total = 0.0;
            for (block, x) in x.chunks(BLOCK).enumerate() {
                let mut sum = 0.0_f32;
                for (k, x) in x.iter().enumerate() {
                    sum = fma::<FUSED>(*x, b[(block * BLOCK + k) * stride + first + j], sum);
                }
                total = if block == 0 { sum } else { total + sum };
            }
            *y = total;
        }
    }
}
