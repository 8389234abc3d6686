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
