//! Rotary positions, plain and YaRN.
//!
//! Frequencies and angles are formed in F32, as `position * inv_freq`, because that is what the published models
//! were trained and evaluated with; only the sine and cosine of that angle are taken in F64. All functions come from
//! crate `libm`, not from the system's library, whose bits differ between versions and machines.

use serde::Deserialize;

/// `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RopeConfig {
    rope_type: Option<String>,
    r#type: Option<String>,
    pub(crate) rope_theta: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    pub(crate) attention_factor: Option<f64>,
    pub(crate) partial_rotary_factor: Option<f64>,
    truncate: Option<bool>,
}

/// The frequencies of a model.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    inv_freq: Vec<f32>,
    /// Factor on cosines and sines; 1 for the released models.
    scaling: f32,
    /// Factor on the softmax scale, `mscale^2`.
    pub(crate) softmax_factor: f32,
}

impl Rope {
    /// For `dim` rotated channels.
    pub(crate) fn new(rope: &RopeConfig, dim: usize, max_position_embeddings: usize) -> Result<Self, String> {
        let theta = rope.rope_theta.unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(format!("rope_theta must be above 1, got {theta}"));
        }
        // Narrowing to F32 at each step is the published arithmetic.
        let power = |pair: usize| narrow(libm::pow(theta, f64::from(narrow(2.0 * pair as f64 / dim as f64))));
        match rope.rope_type.as_deref().or(rope.r#type.as_deref()).unwrap_or("default") {
            "default" => Ok(Self {
                inv_freq: (0..dim / 2).map(|pair| 1.0 / power(pair)).collect(),
                scaling: 1.0,
                softmax_factor: 1.0,
            }),
            "yarn" => {
                let yarn = Yarn::new(rope, max_position_embeddings)?;
                let ramp = yarn.ramp(dim, theta);
                let mix = |(pair, ramp): (usize, f32)| {
                    let extrapolated = 1.0 / power(pair);
                    let interpolated = 1.0 / (narrow(yarn.factor) * power(pair));
                    interpolated * ramp + extrapolated * (1.0 - ramp)
                };
                let softmax = yarn.mscale_all_dim.map_or(1.0, |all| mscale(yarn.factor, all));
                Ok(Self {
                    inv_freq: ramp.into_iter().enumerate().map(mix).collect(),
                    scaling: narrow(yarn.scaling),
                    softmax_factor: narrow(softmax * softmax),
                })
            }
            other => Err(format!("rope_type {other:?} is not supported, only \"default\" and \"yarn\"")),
        }
    }

    /// Cosines and sines of `count` positions from `first` on.
    pub(crate) fn angles(&self, first: usize, count: usize) -> Angles {
        let half = self.inv_freq.len();
        let mut angles = Angles { half, cos: Vec::new(), sin: Vec::new() };
        angles.cos.reserve_exact(count * half);
        angles.sin.reserve_exact(count * half);
        for position in first..first + count {
            for &frequency in &self.inv_freq {
                let angle = f64::from(position as f32 * frequency);
                angles.cos.push(narrow(libm::cos(angle)) * self.scaling);
                angles.sin.push(narrow(libm::sin(angle)) * self.scaling);
            }
        }
        angles
    }
}

/// Cosines and sines of a run of positions, `[tokens, rope_dim / 2]`.
#[derive(Clone)]
pub(crate) struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Rotates the first `2 * half` channels of `row` by the angles of the `token`-th position.
    pub(crate) fn rotate(&self, token: usize, interleave: bool, row: &mut [f32]) {
        let span = token * self.half..(token + 1) * self.half;
        let row = &mut row[..2 * self.half];
        for (pair, (cos, sin)) in self.cos[span.clone()].iter().zip(&self.sin[span]).enumerate() {
            let (i, j) = if interleave { (2 * pair, 2 * pair + 1) } else { (pair, pair + self.half) };
            let (a, b) = (row[i], row[j]);
            row[i] = a * cos - b * sin;
            row[j] = b * cos + a * sin;
        }
    }

    /// Undoes the interleaved rotation.
    pub(crate) fn rotate_back(&self, token: usize, row: &mut [f32]) {
        let span = token * self.half..(token + 1) * self.half;
        let pairs = row.as_chunks_mut::<2>().0.iter_mut();
        for ([a, b], (cos, sin)) in pairs.zip(self.cos[span.clone()].iter().zip(&self.sin[span])) {
            (*a, *b) = (*a * cos + *b * sin, *b * cos - *a * sin);
        }
    }
}

/// YaRN (arXiv 2309.00071), as the published models use it: frequencies that turn fast are kept, slow ones are
/// divided by `factor`, with a ramp between.
struct Yarn {
    factor: f64,
    original: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
    mscale_all_dim: Option<f64>,
    scaling: f64,
}

impl Yarn {
    fn new(rope: &RopeConfig, max_position_embeddings: usize) -> Result<Self, String> {
        let original = rope
            .original_max_position_embeddings
            .ok_or("rope_type \"yarn\" needs original_max_position_embeddings")?;
        let factor = rope.factor.unwrap_or(max_position_embeddings as f64 / original);
        // Zero stands for "not given", as it does in the published implementation.
        let given = |value: Option<f64>| value.filter(|&value| value != 0.0);
        let mscale_all_dim = given(rope.mscale_all_dim);
        let scaling = match (rope.attention_factor, given(rope.mscale), mscale_all_dim) {
            (Some(factor), _, _) => factor,
            (None, Some(one), Some(all)) => mscale(factor, one) / mscale(factor, all),
            (None, _, _) => mscale(factor, 1.0),
        };
        let yarn = Self {
            factor,
            original,
            beta_fast: given(rope.beta_fast).unwrap_or(32.0),
            beta_slow: given(rope.beta_slow).unwrap_or(1.0),
            truncate: rope.truncate.unwrap_or(true),
            mscale_all_dim,
            scaling,
        };
        let positive = [yarn.factor, yarn.original, yarn.beta_fast, yarn.beta_slow, yarn.scaling];
        if positive.iter().any(|value| !(value.is_finite() && *value > 0.0)) {
            return Err("the YaRN parameters must be positive numbers".into());
        }
        Ok(yarn)
    }

    /// Share of the interpolated frequency, per pair.
    fn ramp(&self, dim: usize, theta: f64) -> Vec<f32> {
        let pair_of = |turns: f64| {
            dim as f64 * libm::log(self.original / (turns * 2.0 * std::f64::consts::PI))
                / (2.0 * libm::log(theta))
        };
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let ramp = |pair: usize| ((pair as f32 - narrow(low)) / narrow(high - low)).clamp(0.0, 1.0);
        (0..dim / 2).map(ramp).collect()
    }
}

fn mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 }
}

/// Rounds to F32 on purpose.
#[allow(clippy::cast_possible_truncation)]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_rotations_keep_lengths_and_undo_position_differences() {
        let rope = Rope { inv_freq: vec![1.0, 0.25], scaling: 1.0, softmax_factor: 1.0 };
        for interleave in [true, false] {
            let (mut a, mut b) = ([1.0, 2.0, 3.0, 4.0, 9.0], [0.5, -1.0, 2.0, 0.25, 9.0]);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
            let (mut c, mut d) = (a, b);
            rope.angles(3, 1).rotate(0, interleave, &mut a);
            rope.angles(5, 1).rotate(0, interleave, &mut b);
            rope.angles(0, 12).rotate(8, interleave, &mut c);
            rope.angles(10, 1).rotate(0, interleave, &mut d);
            assert_eq!((a[4], b[4]), (9.0, 9.0), "channels beyond the rotated ones are left alone");
            assert!((dot(&a, &b) - dot(&c, &d)).abs() < 1e-4);
        }
    }
}
