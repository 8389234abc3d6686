//! The selection: the k best of a row of scores under a total order, higher first, then the lower index.
//!
//! -0 equals 0, and NaN comes after everything else, so the answer is a function of the scores alone. Most of a row
//! is discarded by one comparison per group of eight: the k-th largest group maximum is a lower bound of the k-th
//! largest score, because k different elements reach it. Loops are written without a branch on a comparison of
//! scores, which no predictor could foresee.

use crate::kernel::vector::{group_maxima, kth_largest, order_keys};

/// Keys per maximum.
const GROUP: usize = 8;

/// Buffers that one thread reuses from row to row.
#[derive(Default)]
pub(crate) struct TopK {
    keys: Vec<u32>,
    maxima: Vec<u32>,
    groups: Vec<u32>,
    /// Indices of everything that may be among the best, ascending, and their keys.
    candidates: Vec<u32>,
    candidate_keys: Vec<u32>,
}

impl TopK {
    /// Writes the indices of the `k` best of `scores` to `out`, ascending; all of them if there are no more than `k`.
    pub(crate) fn select(&mut self, scores: &[f32], k: usize, out: &mut Vec<u32>) {
        out.clear();
        if scores.len() <= k {
            out.extend(0..index(scores.len()));
            return;
        }
        self.collect(scores, k);
        let threshold = kth_largest(&self.candidate_keys, k);
        let above = self.candidate_keys.iter().filter(|&&key| key > threshold).count();
        // Those above the threshold, and of those on it the first.
        let mut level = k - above;
        out.resize(self.candidates.len(), 0);
        let mut count = 0;
        for (&candidate, &key) in self.candidates.iter().zip(&self.candidate_keys) {
            let on = key == threshold && level > 0;
            level -= usize::from(on);
            out[count] = candidate;
            count += usize::from(key > threshold || on);
        }
        out.truncate(count);
    }

    fn collect(&mut self, scores: &[f32], k: usize) {
        // The last group is filled up with the lowest key there is; what lies beyond the row is sorted out below.
        let padded = scores.len().next_multiple_of(GROUP);
        self.keys.resize(padded, 0);
        order_keys(scores, &mut self.keys);
        self.keys[scores.len()..].fill(0);
        self.maxima.resize(padded / GROUP, 0);
        group_maxima(&self.keys, &mut self.maxima);
        let bound = if self.maxima.len() > k { kth_largest(&self.maxima, k) } else { 0 };

        self.groups.resize(self.maxima.len(), 0);
        let mut groups = 0;
        for (group, &max) in (0..).zip(&self.maxima) {
            self.groups[groups] = group;
            groups += usize::from(max >= bound);
        }
        self.candidates.resize(groups * GROUP, 0);
        self.candidate_keys.resize(groups * GROUP, 0);
        let mut count = 0;
        for &group in &self.groups[..groups] {
            let first = group as usize * GROUP;
            for (position, &key) in (first..).zip(&self.keys[first..first + GROUP]) {
                self.candidates[count] = index(position);
                self.candidate_keys[count] = key;
                count += usize::from(key >= bound && position < scores.len());
            }
        }
        self.candidates.truncate(count);
        self.candidate_keys.truncate(count);
    }
}

fn index(value: usize) -> u32 {
    u32::try_from(value).expect("max_position_embeddings is below 2^30")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn oracle(scores: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        let rank = |i: usize| if scores[i].is_nan() { f32::NEG_INFINITY } else { scores[i] };
        order.sort_by(|&a, &b| {
            let nan = scores[a].is_nan().cmp(&scores[b].is_nan());
            nan.then(rank(b).partial_cmp(&rank(a)).unwrap()).then(a.cmp(&b))
        });
        let mut best: Vec<u32> = order[..k.min(scores.len())].iter().map(|&i| index(i)).collect();
        best.sort_unstable();
        best
    }

    fn score() -> impl Strategy<Value = f32> {
        let few = [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40, -1e-40];
        prop_oneof![3 => proptest::sample::select(few.to_vec()), 2 => -2.0_f32..2.0, 1 => (0..8).prop_map(|x| x as f32)]
    }

    proptest! {
        #[test]
        fn selects_what_a_stable_sort_selects(
            scores in proptest::collection::vec(score(), 1..400), k in 1_usize..60,
        ) {
            let mut out = vec![7];
            TopK::default().select(&scores, k, &mut out);
            prop_assert_eq!(out, oracle(&scores, k));
        }
    }

    #[test]
    fn ties_go_to_the_lower_index_whatever_the_sign_of_zero() {
        let mut out = Vec::new();
        TopK::default().select(&[-0.0, 0.0, -0.0, 5.0, 0.0], 3, &mut out);
        assert_eq!(out, [0, 1, 3]);
    }
}
