//! The two loops that sparse attention spends its time in, on rows where they lie: nothing is gathered or packed.
//!
//! Sixteen sums run side by side, one per lane: keys in [`index_scores`], heads in [`attend`]. Each is one chain over
//! its inner dimension, so it depends on nothing that is computed beside it.

use super::vector::exp;
use super::{fma, wide};

/// Sums that run side by side; keys of a panel.
pub(crate) const LANES: usize = 16;

/// Buffers that one thread reuses from query to query.
#[derive(Default)]
pub(crate) struct Scratch {
    /// The query of up to 16 heads, `[width][head]`.
    query: Vec<[f32; LANES]>,
    /// Scores, then probabilities, `[selected][head]`.
    weights: Vec<[f32; LANES]>,
}

wide! {
    /// Attention of one query over its selected rows: `out[h] = sum_s softmax_s(scale * query[h] . rows[s]) rows[s][..latent]`.
    /// `query` is `[heads, width]`, `rows` holds rows of `width`, `out` is `[heads, latent]`. Sums over rows run in
    /// the order of `selected`.
    pub(crate) fn attend(
        query: &[f32],
        rows: &[f32],
        selected: &[u32],
        latent: usize,
        scale: f32,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) {
        let width = query.len() / (out.len() / latent);
        let Scratch { query: turned, weights } = scratch;
        turned.resize(width, [0.0; LANES]);
        weights.resize(selected.len(), [0.0; LANES]);
        for (query, out) in query.chunks(LANES * width).zip(out.chunks_mut(LANES * latent)) {
            for (c, lanes) in turned.iter_mut().enumerate() {
                *lanes = std::array::from_fn(|head| query.get(head * width + c).copied().unwrap_or(0.0));
            }
            let (eights, rest) = selected.as_chunks::<8>();
            let (first, last) = weights.split_at_mut(eights.len() * 8);
            for (selected, scores) in eights.iter().zip(first.as_chunks_mut::<8>().0) {
                *scores = score::<8, FUSED>(selected.map(|s| row(rows, s, width)), turned);
            }
            for (selected, scores) in rest.iter().zip(last) {
                [*scores] = score::<1, FUSED>([row(rows, *selected, width)], turned);
            }
            softmax(weights, scale);

            let mut column = 0;
            while column < latent {
                let step = match latent - column {
                    64.. => sum_rows::<64, FUSED>(rows, width, selected, weights, latent, column, out),
                    16.. => sum_rows::<16, FUSED>(rows, width, selected, weights, latent, column, out),
                    _ => sum_rows::<1, FUSED>(rows, width, selected, weights, latent, column, out),
                };
                column += step;
            }
        }
    }

    /// Scores of the indexer: `out[t][s] = sum_h weights[t, h] * relu(queries[t, h] . key[s])`, heads in ascending
    /// order. `queries` is `[tokens * heads, width]`, `panels` is `[panel][width][16 keys]`, `out` has one row of
    /// whole panels per token.
    pub(crate) fn index_scores(queries: &[f32], weights: &[f32], heads: usize, panels: &[f32], out: &mut [f32]) {
        let width = queries.len() / weights.len();
        let panel_len = width * LANES;
        let stride = panels.len() / width;
        let mut lane = 0;
        let (pairs, last) = panels.split_at(panels.len() / (2 * panel_len) * 2 * panel_len);
        for pair in pairs.chunks_exact(2 * panel_len) {
            let (a, b) = pair.split_at(panel_len);
            score_panels::<2, FUSED>(queries, weights, heads, [a, b], &mut out[lane..], stride);
            lane += 2 * LANES;
        }
        if !last.is_empty() {
            score_panels::<1, FUSED>(queries, weights, heads, [last], &mut out[lane..], stride);
        }
    }
}

#[inline(always)]
fn row(rows: &[f32], index: u32, width: usize) -> &[f32] {
    &rows[index as usize * width..][..width]
}

/// Products of `N` rows with 16 heads.
#[inline(always)]
fn score<const N: usize, const FUSED: bool>(rows: [&[f32]; N], query: &[[f32; LANES]]) -> [[f32; LANES]; N] {
    let mut sums = [[0.0; LANES]; N];
    let rows = rows.map(|row| &row[..query.len()]);
    for (c, query) in query.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, query) in sums.iter_mut().zip(query) {
                *sum = fma::<FUSED>(row[c], *query, *sum);
            }
        }
    }
    sums
}

/// Softmax over rows, in each lane.
#[inline(always)]
fn softmax(weights: &mut [[f32; LANES]], scale: f32) {
    let mut max = [f32::NEG_INFINITY; LANES];
    for scores in weights.iter() {
        for (max, score) in max.iter_mut().zip(scores) {
            *max = if *score > *max { *score } else { *max };
        }
    }
    let mut sums = [0.0; LANES];
    for scores in weights.iter_mut() {
        for ((score, max), sum) in scores.iter_mut().zip(&max).zip(&mut sums) {
            *score = exp((*score - max) * scale);
            *sum += *score;
        }
    }
    let inverse = sums.map(|sum| 1.0 / sum);
    for scores in weights.iter_mut() {
        for (score, inverse) in scores.iter_mut().zip(&inverse) {
            *score *= inverse;
        }
    }
}

/// `out[h][column..column + W] = sum_s weights[s][h] * rows[s][column..column + W]`, four heads at a time. Gives `W`.
#[inline(always)]
fn sum_rows<const W: usize, const FUSED: bool>(
    rows: &[f32],
    width: usize,
    selected: &[u32],
    weights: &[[f32; LANES]],
    latent: usize,
    column: usize,
    out: &mut [f32],
) -> usize {
    for (four, out) in out.chunks_mut(4 * latent).enumerate() {
        let mut sums = [[0.0_f32; W]; 4];
        for (s, weights) in selected.iter().zip(weights) {
            let row = &rows[*s as usize * width + column..][..W];
            for (head, sums) in sums.iter_mut().enumerate() {
                let weight = weights[(four * 4 + head) % LANES];
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum = fma::<FUSED>(weight, *value, *sum);
                }
            }
        }
        for (out, sums) in out.chunks_exact_mut(latent).zip(&sums) {
            out[column..column + W].copy_from_slice(sums);
        }
    }
    W
}

#[inline(always)]
fn score_panels<const P: usize, const FUSED: bool>(
    queries: &[f32],
    weights: &[f32],
    heads: usize,
    panels: [&[f32]; P],
    out: &mut [f32],
    stride: usize,
) {
    let width = queries.len() / weights.len();
    let mut first = 0;
    while first < weights.len() {
        let queries = &queries[first * width..];
        first += match weights.len() - first {
            8.. => score_rows::<8, P, FUSED>(queries, weights, first, heads, panels, out, stride),
            4.. => score_rows::<4, P, FUSED>(queries, weights, first, heads, panels, out, stride),
            _ => score_rows::<1, P, FUSED>(queries, weights, first, heads, panels, out, stride),
        };
    }
}

/// Adds what `R` rows (queries times heads) from `first` on contribute to their queries' scores. Gives `R`.
#[inline(always)]
fn score_rows<const R: usize, const P: usize, const FUSED: bool>(
    queries: &[f32],
    weights: &[f32],
    first: usize,
    heads: usize,
    panels: [&[f32]; P],
    out: &mut [f32],
    stride: usize,
) -> usize {
    let width = panels[0].len() / LANES;
    let panels: [&[[f32; LANES]]; P] = panels.map(|panel| &panel.as_chunks().0[..width]);
    let queries: [&[f32]; R] = std::array::from_fn(|r| &queries[r * width..][..width]);
    let mut sums = [[[0.0; LANES]; P]; R];
    for c in 0..width {
        for (sums, query) in sums.iter_mut().zip(queries) {
            for (sums, panel) in sums.iter_mut().zip(panels) {
                for (sum, key) in sums.iter_mut().zip(&panel[c]) {
                    *sum = fma::<FUSED>(query[c], *key, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let (token, head) = ((first + r) / heads, (first + r) % heads);
        let weight = weights[first + r];
        let out = &mut out[token * stride..][..P * LANES];
        for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
            let score = weight * if *sum > 0.0 { *sum } else { 0.0 };
            *out = if head == 0 { score } else { *out + score };
        }
    }
    R
}
