//! Attention over rows that are key and value of all heads at once, with sinks; and the gated sum that makes one row of
//! several. Every sum is one chain over its inner dimension, as in `sparse.rs`.

use super::sparse::{LANES, Scratch, products};
use super::vector::exp;
use super::{fma, wide};

wide! {
    /// Attention of one query over `rows`, with a sink per head in the denominator:
    /// `out[h] = sum_s exp(l[h, s]) rows[s] / (sum_s exp(l[h, s]) + exp(sinks[h]))`, `l[h, s] = scale * query[h] . rows[s]`.
    /// `query` and `out` are `[heads, width]`. Sums over rows run in the order of `rows`.
    pub(crate) fn attend_shared(
        query: &[f32],
        rows: &[&[f32]],
        sinks: &[f32],
        scale: f32,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) {
        let width = query.len() / sinks.len();
        let Scratch { query: turned, weights } = scratch;
        turned.resize(width, [0.0; LANES]);
        weights.resize(rows.len(), [0.0; LANES]);
        let heads = query.chunks(LANES * width).zip(out.chunks_mut(LANES * width)).zip(sinks.chunks(LANES));
        for ((query, out), sinks) in heads {
            for (c, lanes) in turned.iter_mut().enumerate() {
                *lanes = std::array::from_fn(|head| query.get(head * width + c).copied().unwrap_or(0.0));
            }
            let (eights, rest) = rows.as_chunks::<8>();
            let (first, last) = weights.split_at_mut(eights.len() * 8);
            for (rows, scores) in eights.iter().zip(first.as_chunks_mut::<8>().0) {
                *scores = products::<8, LANES, FUSED>(*rows, turned);
            }
            for (row, scores) in rest.iter().zip(last) {
                [*scores] = products::<1, LANES, FUSED>([*row], turned);
            }
            let factors = softmax_with_sinks(weights, scale, sinks);

            for (head, (out, factor)) in out.chunks_mut(width).zip(factors).enumerate() {
                let mut column = 0;
                while column < width {
                    let to = &mut out[column..];
                    column += match width - column {
                        64.. => put(sum_column::<64, FUSED>(rows, column, weights, head), factor, to),
                        16.. => put(sum_column::<16, FUSED>(rows, column, weights, head), factor, to),
                        _ => put(sum_column::<1, FUSED>(rows, column, weights, head), factor, to),
                    };
                }
            }
        }
    }

    /// Per channel, the softmax of `gates` over slots times `values`, summed: `[slots, width]` both, `out` is `[width]`.
    pub(crate) fn gated_sum(values: &[f32], gates: &[f32], out: &mut [f32]) {
        let width = out.len();
        for (index, out) in out.chunks_mut(LANES).enumerate() {
            let first = index * LANES;
            let slot = |rows: &[f32], slot: usize| -> [f32; LANES] {
                let row = &rows[slot * width + first..];
                std::array::from_fn(|lane| if lane < out.len() { row[lane] } else { 0.0 })
            };
            let slots = values.len() / width;
            let mut max = [f32::NEG_INFINITY; LANES];
            for s in 0..slots {
                for (max, gate) in max.iter_mut().zip(slot(gates, s)) {
                    *max = if gate > *max { gate } else { *max };
                }
            }
            let (mut total, mut sums) = ([0.0; LANES], [0.0; LANES]);
            for s in 0..slots {
                let (gates, values) = (slot(gates, s), slot(values, s));
                for lane in 0..LANES {
                    let weight = exp(gates[lane] - max[lane]);
                    total[lane] += weight;
                    sums[lane] = fma::<FUSED>(weight, values[lane], sums[lane]);
                }
            }
            for (out, (sum, total)) in out.iter_mut().zip(sums.into_iter().zip(total)) {
                *out = sum / total;
            }
        }
    }
}

/// Softmax over rows and the sink in each lane, up to the factors that it gives.
#[inline(always)]
fn softmax_with_sinks(weights: &mut [[f32; LANES]], scale: f32, sinks: &[f32]) -> [f32; LANES] {
    let sinks: [f32; LANES] = std::array::from_fn(|head| sinks.get(head).copied().unwrap_or(0.0));
    let mut max = sinks;
    for scores in weights.iter_mut() {
        for (max, score) in max.iter_mut().zip(scores) {
            *score *= scale;
            *max = if *score > *max { *score } else { *max };
        }
    }
    let mut sums = [0.0; LANES];
    for scores in weights.iter_mut() {
        for ((score, max), sum) in scores.iter_mut().zip(&max).zip(&mut sums) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    std::array::from_fn(|lane| 1.0 / (sums[lane] + exp(sinks[lane] - max[lane])))
}

/// `sum_s weights[s][head] * rows[s][column..column + W]`.
#[inline(always)]
fn sum_column<const W: usize, const FUSED: bool>(
    rows: &[&[f32]],
    column: usize,
    weights: &[[f32; LANES]],
    head: usize,
) -> [f32; W] {
    let mut sums = [0.0; W];
    for (row, weights) in rows.iter().zip(weights) {
        let weight = weights[head];
        for (sum, value) in sums.iter_mut().zip(&row[column..][..W]) {
            *sum = fma::<FUSED>(weight, *value, *sum);
        }
    }
    sums
}

/// Stores sums times their factor. Gives `W`.
#[inline(always)]
fn put<const W: usize>(sums: [f32; W], factor: f32, out: &mut [f32]) -> usize {
    out[..W].copy_from_slice(&sums.map(|sum| sum * factor));
    W
}
