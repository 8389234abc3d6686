//! From logits to the next token.

use std::cmp::Ordering;

use esker_prefix::TokenId;

use crate::{DecoderError, Result};

/// Chooses tokens: the best, or at random from the likeliest. Deterministic given its seed.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    state: u64,
}

impl Sampler {
    /// Always the highest logit, the lower id on a tie.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, state: 0 }
    }

    /// Draws from `softmax(logits / temperature)`, restricted to the likeliest tokens that together reach `top_p`.
    /// Temperature 0 is greedy.
    pub fn seeded(temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        if !(temperature.is_finite() && temperature >= 0.0 && top_p > 0.0 && top_p <= 1.0) {
            return Err(DecoderError::Sampling { temperature, top_p });
        }
        Ok(Self { temperature, top_p, state: seed })
    }

    /// The next token. `logits` is one row, not empty.
    pub fn next(&mut self, logits: &[f32]) -> TokenId {
        let mut order: Vec<u32> = (0_u32..).take(logits.len()).collect();
        let by_logit = |a: &u32, b: &u32| better(logits, *a, *b);
        if self.temperature == 0.0 {
            return TokenId(order.into_iter().min_by(by_logit).expect("a vocabulary is not empty"));
        }
        order.sort_unstable_by(by_logit);
        let scale = 1.0 / f64::from(self.temperature);
        let best = f64::from(logits[order[0] as usize]);
        let weights: Vec<f64> =
            order.iter().map(|&id| ((f64::from(logits[id as usize]) - best) * scale).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut count = 0;
        while count < weights.len() && kept < f64::from(self.top_p) * total {
            kept += weights[count];
            count += 1;
        }
        let mut point = self.uniform() * kept;
        for (&id, weight) in order[..count.max(1)].iter().zip(&weights) {
            point -= weight;
            if point < 0.0 {
                return TokenId(id);
            }
        }
        TokenId(order[count.max(1) - 1])
    }

    /// SplitMix64, the upper 53 bits as a number in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Higher logit first, then lower id; NaN last.
fn better(logits: &[f32], a: u32, b: u32) -> Ordering {
    let (x, y) = (logits[a as usize], logits[b as usize]);
    x.is_nan().cmp(&y.is_nan()).then(y.partial_cmp(&x).unwrap_or(Ordering::Equal)).then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_breaks_ties_to_the_lower_id() {
        assert_eq!(Sampler::greedy().next(&[f32::NAN, 1.0, 3.0, 3.0]), TokenId(2));
        assert_eq!(Sampler::greedy().next(&[-0.0, 0.0]), TokenId(0));
    }

    #[test]
    fn draws_repeat_with_the_seed_and_stay_within_top_p() {
        let logits = [2.0, 0.0, 1.9, -5.0];
        let draw = |seed| {
            let mut sampler = Sampler::seeded(1.0, 0.8, seed).unwrap();
            (0..100).map(|_| sampler.next(&logits).0).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(3).iter().all(|id| [0, 2].contains(id)) && draw(3).contains(&2));
        assert!(Sampler::seeded(f32::NAN, 1.0, 0).is_err() && Sampler::seeded(1.0, 0.0, 0).is_err());
    }
}
