//! Narrow number formats: what weights are published in, and what cached rows are rounded to.
//!
//! Bytes to numbers is exact. Numbers to bytes rounds to nearest, ties to even, and saturates: what a format cannot hold
//! becomes its largest number, as the published quantisers clamp. NaN stays NaN where the format has one, else 0.

/// One number of e4m3 (OCP FP8, "fn": no infinities, NaN at all ones).
pub(crate) fn from_e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xF), f32::from(byte & 7));
    sign * match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * power_of_two(exponent - 7),
    }
}

/// One number of e8m0: a power of two, no sign, NaN at all ones.
pub(crate) fn from_e8m0(byte: u8) -> f32 {
    if byte == u8::MAX { f32::NAN } else { power_of_two(i32::from(byte) - 127) }
}

/// One number of e2m1 (OCP FP4), in the low four bits.
pub(crate) fn from_e2m1(bits: u8) -> f32 {
    const STEPS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = STEPS[usize::from(bits & 7)];
    if bits & 8 == 0 { value } else { -value }
}

/// The nearest e4m3.
pub(crate) fn to_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7F;
    }
    let size = value.abs().min(448.0);
    // Steps are 2^-9 up to the smallest normal number, then an eighth of the power of two below.
    let exponent = ((size.to_bits() >> 23).cast_signed() - 127).max(-6);
    let steps = (size * power_of_two(3 - exponent)).round_ties_even();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 16 and 126")]
    let code = ((exponent + 6) * 8) as u8 + steps as u8;
    sign | code
}

/// The nearest e2m1, in the low four bits.
pub(crate) fn to_e2m1(value: f32) -> u8 {
    let size = value.abs();
    // Halfway points; one on which the even code lies above belongs to it.
    let above = [0.25, 1.25, 2.5, 5.0].iter().filter(|&&point| size > point).count();
    let from = [0.75, 1.75, 3.5].iter().filter(|&&point| size >= point).count();
    let code = u8::try_from(above + from).unwrap_or(0);
    if value.is_sign_negative() { code | 8 } else { code }
}

/// `2^exponent`, for -127 to 127: the smallest is below the normal numbers.
pub(crate) fn power_of_two(exponent: i32) -> f32 {
    let normal = f32::from_bits(u32::try_from(exponent.clamp(-126, 127) + 127).unwrap_or(0) << 23);
    if exponent < -126 { normal / 2.0 } else { normal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_hand_vectors() {
        let cases = [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x40, 2.0),
            (0x7E, 448.0),
            (0xB8, -1.0),
            (0xFE, -448.0),
        ];
        for (byte, value) in cases {
            assert_eq!(from_e4m3(byte), value, "{byte:#x}");
        }
        assert!(from_e4m3(0x7F).is_nan() && from_e4m3(0xFF).is_nan());
        assert_eq!((to_e4m3(f32::NAN), to_e4m3(1e9), to_e4m3(f32::NEG_INFINITY)), (0x7F, 0x7E, 0xFE));
    }

    /// Every code, and every point between two of them, goes to the nearest, at equal distance to the even code.
    #[test]
    fn rounding_goes_to_the_nearest_and_ties_to_even() {
        let check = |codes: u8, from: fn(u8) -> f32, to: fn(f32) -> u8, sign: u8| {
            for code in 0..codes {
                let (low, high) = (from(code), from(code + 1));
                let middle = f32::midpoint(low, high);
                assert_eq!((to(low), to(-low), to(high)), (code, code | sign, code + 1));
                assert_eq!(to(middle), code + code % 2);
                assert_eq!((to(middle.next_down()), to(middle.next_up())), (code, code + 1));
            }
        };
        check(0x7E, from_e4m3, to_e4m3, 0x80);
        check(7, from_e2m1, to_e2m1, 8);
        assert_eq!((to_e2m1(1e9), to_e2m1(f32::NAN) & 7), (7, 0));
    }

    #[test]
    fn e8m0_and_e2m1_hand_vectors() {
        for (byte, value) in
            [(127, 1.0), (128, 2.0), (126, 0.5), (254, 2.0_f32.powi(127)), (1, f32::MIN_POSITIVE)]
        {
            assert_eq!(from_e8m0(byte), value, "{byte}");
        }
        assert_eq!(from_e8m0(0), f32::MIN_POSITIVE / 2.0);
        assert!(from_e8m0(255).is_nan());
        let steps: Vec<f32> = (0..16).map(from_e2m1).collect();
        assert_eq!(steps[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!(steps[8..], [-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]);
    }
}
