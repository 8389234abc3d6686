//! Element-wise loops and sums, written so that the compiler vectorises them at any width with the same bits.

use super::wide;

/// Partial sums that every reduction keeps: sum `i` takes elements `i`, `i + 16`, ...
const LANES: usize = 16;

wide! {
    /// Sum of squares.
    pub(crate) fn sum_squares(x: &[f32]) -> f32 {
        sum_by(x, |value| value * value)
    }

    /// Sum.
    pub(crate) fn sum(x: &[f32]) -> f32 {
        sum_by(x, |value| value)
    }

    /// `out = silu(gate) * up`.
    pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }

    /// `out = silu(min(gate, limit)) * clamp(up, -limit, limit)`.
    pub(crate) fn silu_mul_clamped(gate: &[f32], up: &[f32], limit: f32, out: &mut [f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let (gate, up) = (if *gate > limit { limit } else { *gate }, up.clamp(-limit, limit));
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }

    /// `x = sigmoid(x)`.
    pub(crate) fn sigmoid(x: &mut [f32]) {
        for value in x.iter_mut() {
            *value = 1.0 / (1.0 + exp(-*value));
        }
    }

    /// `out += x * factor`.
    pub(crate) fn add_scaled(out: &mut [f32], x: &[f32], factor: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out += x * factor;
        }
    }

    /// Numbers that order as scores do under the total order of the selection: -0 equals 0, NaN comes last.
    pub(crate) fn order_keys(scores: &[f32], keys: &mut [u32]) {
        for (key, score) in keys.iter_mut().zip(scores) {
            let bits = (score + 0.0).to_bits();
            let sign = bits >> 31;
            let ordered = bits ^ (sign.wrapping_neg() | 0x8000_0000);
            *key = if score.is_nan() { 0 } else { ordered };
        }
    }

    /// The largest of each eight keys.
    pub(crate) fn group_maxima(keys: &[u32], maxima: &mut [u32]) {
        for (max, group) in maxima.iter_mut().zip(keys.as_chunks::<8>().0) {
            *max = group.iter().fold(0, |a, b| a.max(*b));
        }
    }

    /// The k-th largest of at least `k` keys: the largest number that `k` keys reach, found bit by bit.
    pub(crate) fn kth_largest(keys: &[u32], k: usize) -> u32 {
        let mut found = 0;
        for bit in (0..u32::BITS).rev() {
            let higher = found | 1 << bit;
            let reaching: u32 = keys.iter().map(|&key| u32::from(key >= higher)).sum();
            if reaching as usize >= k {
                found = higher;
            }
        }
        found
    }
}

#[inline(always)]
fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += f(*value);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += f(*value);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// e^x to about 1e-7 relative, 0 below -87.3, saturating above 88.3. Ours rather than the system library's, which
/// does not vectorise and whose bits differ between versions. Polynomial: Cephes, `expf`.
#[inline(always)]
#[allow(clippy::excessive_precision)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    let clamped = x.clamp(-87.3, 88.3);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_375 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_15e-4;
    for coefficient in [1.398_199_95e-3, 8.333_451_9e-3, 4.166_579_6e-2, 1.666_666_55e-1, 5.000_000_1e-1] {
        p = p * r + coefficient;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let power = f32::from_bits(exponent);
    if x < -87.3 { 0.0 } else { (p * r * r + r + 1.0) * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_total() {
        for step in -8800..=8830 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            assert!(error <= 2e-7 * exact + 2e-38, "exp({x}) is off by {error}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1000.0).is_finite());
    }

    #[test]
    fn keys_order_as_the_selection_does() {
        let scores = [f32::NAN, f32::NEG_INFINITY, -1.0, -0.0, 0.0, 1e-40, 2.0, f32::INFINITY];
        let mut keys = [0; 8];
        order_keys(&scores, &mut keys);
        assert!(keys.is_sorted());
        assert_eq!(keys[3], keys[4]);
    }
}
