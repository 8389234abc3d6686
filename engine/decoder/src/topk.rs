//! The selection: the k best of a row of scores under a total order, higher first, then the lower index.
//!
//! -0 equals 0, and NaN comes after everything else, so the answer is a function of the scores alone. Most of a row
//! is discarded by one comparison per group of eight: the k-th largest group maximum is a lower bound of the k-th
//! largest score, because k different elements reach it.

use crate::kernel::vector::{group_maxima, order_keys};

const GROUP: usize = 8;

/// Buffers that one thread reuses from row to row.
#[derive(Default)]
pub(crate) struct TopK {
    keys: Vec<u32>,
    maxima: Vec<u32>,
    candidates: Vec<u32>,
}

impl TopK {
    /// Writes the indices of the `k` best of `scores` to `out`, ascending; all of them if there are no more than `k`.
    pub(crate) fn select(&mut self, scores: &[f32], k: usize, out: &mut Vec<u32>) {
        out.clear();
        if k == 0 {
            return;
        }
        if scores.len() <= k {
            out.extend(0..index(scores.len()));
            return;
        }
        self.keys.resize(scores.len(), 0);
        order_keys(scores, &mut self.keys);
        self.maxima.resize(scores.len().div_ceil(GROUP), 0);
        group_maxima(&self.keys, &mut self.maxima);

        self.collect(k);
        let threshold = kth_largest(&mut self.maxima, k);
        let mut level = k - self.maxima.iter().filter(|&&key| key > threshold).count();
        for &candidate in &self.candidates {
            let key = self.keys[candidate as usize];
            let take = key > threshold || key == threshold && level > 0;
            level -= usize::from(take && key == threshold);
            if take {
                out.push(candidate);
            }
        }
    }

    /// Leaves in `candidates`, ascending, the indices of at least the `k` best, and in `maxima` their keys.
    fn collect(&mut self, k: usize) {
        let bound = if self.maxima.len() > k { kth_largest(&mut self.maxima, k) } else { 0 };
        // Written without a branch on the comparison, which no predictor could foresee.
        self.candidates.resize(self.keys.len(), 0);
        let mut count = 0;
        for (position, &key) in (0..).zip(&self.keys) {
            self.candidates[count] = position;
            count += usize::from(key >= bound);
        }
        self.candidates.truncate(count);
        self.maxima.clear();
        self.maxima.extend(self.candidates.iter().map(|&candidate| self.keys[candidate as usize]));
    }
}

fn kth_largest(keys: &mut [u32], k: usize) -> u32 {
    *keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1
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
