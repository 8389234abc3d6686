//! The two loops that sparse attention spends its time in, on rows where they lie: nothing is gathered or packed.
//!
//! Sums run side by side, one per lane: keys in [`index_scores`], heads in [`attend`]. Each is one chain over its
//! inner dimension, so it depends on nothing that is computed beside it.

use super::vector::exp;
use super::{fma, wide};

/// Heads whose sums run side by side.
pub(super) const LANES: usize = 16;
/// Keys whose sums run side by side.
pub(crate) const PANEL: usize = 32;

/// Buffers that one thread reuses from query to query.
#[derive(Default)]
pub(crate) struct Scratch {
    /// The query of up to 16 heads, `[width][head]`.
    pub(super) query: Vec<[f32; LANES]>,
    /// Scores, then probabilities, `[selected][head]`.
    pub(super) weights: Vec<[f32; LANES]>,
}

wide! {
    /// Attention of one query over its selected rows:
    /// `out[h] = sum_s softmax_s(scale * query[h] . rows[s]) * rows[s][..latent]`. `query` is `[heads, width]`, `rows`
    /// holds rows of `width`, `out` is `[heads, latent]`. Sums over rows run in the order of `selected`.
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
                *scores = products::<8, LANES, FUSED>(selected.map(|s| row(rows, s, width)), turned);
            }
            for (selected, scores) in rest.iter().zip(last) {
                [*scores] = products::<1, LANES, FUSED>([row(rows, *selected, width)], turned);
            }
            let factors = softmax(weights, scale);

            for (index, out) in out.chunks_mut(4 * latent).enumerate() {
                let (head, mut column) = (index * 4, 0);
                while column < latent {
                    let (rows, to, factors) = (&rows[column..], &mut out[column..], &factors[head..]);
                    column += match latent - column {
                        64.. => put(sum_rows::<64, FUSED>(rows, width, selected, weights, head), factors, to, latent),
                        16.. => put(sum_rows::<16, FUSED>(rows, width, selected, weights, head), factors, to, latent),
                        _ => put(sum_rows::<1, FUSED>(rows, width, selected, weights, head), factors, to, latent),
                    };
                }
            }
        }
    }

    /// Scores of the indexer: `out[t][s] = sum_h weights[t, h] * relu(queries[t, h] . key[s])`, heads in ascending
    /// order. `queries` is `[tokens * heads, width]`, `panels` is `[panel][width][PANEL]`, `out` has one row of
    /// whole panels per token.
    pub(crate) fn index_scores(queries: &[f32], weights: &[f32], heads: usize, panels: &[f32], out: &mut [f32]) {
        let width = queries.len() / weights.len();
        let stride = panels.len() / width;
        for (index, panel) in panels.as_chunks::<PANEL>().0.chunks_exact(width).enumerate() {
            let mut at = Row { index: 0, head: 0, heads, out: &mut out[index * PANEL..], stride };
            while at.index < weights.len() {
                match weights.len() - at.index {
                    8.. => score_panel::<8, FUSED>(queries, weights, panel, &mut at),
                    4.. => score_panel::<4, FUSED>(queries, weights, panel, &mut at),
                    _ => score_panel::<1, FUSED>(queries, weights, panel, &mut at),
                }
            }
        }
    }
}

#[inline(always)]
fn row(rows: &[f32], index: u32, width: usize) -> &[f32] {
    &rows[index as usize * width..][..width]
}

/// `sums[n][lane] = sum_c rows[n][c] * columns[c][lane]`, in ascending order of c.
#[inline(always)]
pub(super) fn products<const N: usize, const W: usize, const FUSED: bool>(
    rows: [&[f32]; N],
    columns: &[[f32; W]],
) -> [[f32; W]; N] {
    /// Columns per bounds check.
    const STEP: usize = 8;
    let mut sums = [[0.0; W]; N];
    let (steps, rest) = columns.as_chunks::<STEP>();
    for (step, columns) in steps.iter().enumerate() {
        let values = rows.map(|row| &row.as_chunks::<STEP>().0[step]);
        for (c, column) in columns.iter().enumerate() {
            for (sums, values) in sums.iter_mut().zip(values) {
                for (sum, column) in sums.iter_mut().zip(column) {
                    *sum = fma::<FUSED>(values[c], *column, *sum);
                }
            }
        }
    }
    for (c, column) in (steps.len() * STEP..).zip(rest) {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, column) in sums.iter_mut().zip(column) {
                *sum = fma::<FUSED>(row[c], *column, *sum);
            }
        }
    }
    sums
}

/// Softmax over rows in each lane, up to the factors that it gives.
#[inline(always)]
fn softmax(weights: &mut [[f32; LANES]], scale: f32) -> [f32; LANES] {
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
    sums.map(|sum| 1.0 / sum)
}

/// `sum_s weights[s][h] * rows[s][..W]` of the four heads from `first` on.
#[inline(always)]
fn sum_rows<const W: usize, const FUSED: bool>(
    rows: &[f32],
    width: usize,
    selected: &[u32],
    weights: &[[f32; LANES]],
    first: usize,
) -> [[f32; W]; 4] {
    let mut sums = [[0.0; W]; 4];
    for (s, weights) in selected.iter().zip(weights) {
        let row = &rows[*s as usize * width..][..W];
        for (head, sums) in sums.iter_mut().enumerate() {
            let weight = weights[(first + head) % LANES];
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum = fma::<FUSED>(weight, *value, *sum);
            }
        }
    }
    sums
}

/// Stores the sums of up to four heads, `out` starting at the first one's, times their factors. Gives `W`.
#[inline(always)]
fn put<const W: usize>(sums: [[f32; W]; 4], factors: &[f32], out: &mut [f32], latent: usize) -> usize {
    for ((out, sums), factor) in out.chunks_mut(latent).zip(sums).zip(factors) {
        out[..W].copy_from_slice(&sums.map(|sum| sum * factor));
    }
    W
}

/// A row (a query's head), and where its query's scores are.
struct Row<'a> {
    index: usize,
    head: usize,
    heads: usize,
    /// The query's scores from this panel on.
    out: &'a mut [f32],
    /// From one query's scores to the next one's.
    stride: usize,
}

/// Adds what the next `R` rows contribute to their queries' scores.
#[inline(always)]
fn score_panel<const R: usize, const FUSED: bool>(
    queries: &[f32],
    weights: &[f32],
    panel: &[[f32; PANEL]],
    at: &mut Row<'_>,
) {
    let width = panel.len();
    let queries = &queries[at.index * width..];
    let mut scores =
        products::<R, PANEL, FUSED>(std::array::from_fn(|r| &queries[r * width..][..width]), panel);
    for (scores, weight) in scores.iter_mut().zip(&weights[at.index..]) {
        for score in scores.iter_mut() {
            *score = weight * if *score > 0.0 { *score } else { 0.0 };
        }
        let out = at.out.first_chunk_mut::<PANEL>().expect("`out` has a row of whole panels for each query");
        // Summed up in the scores, not where they go: only so the compiler takes all lanes at once.
        if at.head > 0 {
            for (score, sum) in scores.iter_mut().zip(*out) {
                *score += sum;
            }
        }
        *out = *scores;
        at.head += 1;
        if at.head == at.heads {
            at.head = 0;
            let from = at.stride.min(at.out.len());
            at.out = &mut std::mem::take(&mut at.out)[from..];
        }
    }
    at.index += R;
}
