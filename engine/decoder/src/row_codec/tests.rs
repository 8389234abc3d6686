use esker_prefix::{KvLayout, RowFormat};
use proptest::prelude::*;

use super::*;

const V4: &str = r#"{"model_type":"deepseek_v4","num_hidden_layers":2,"head_dim":512,"qk_rope_head_dim":64,
    "index_head_dim":128,"sliding_window":128,"compress_ratios":[4,128]}"#;
const V32: &str = r#"{"model_type":"deepseek_v32","num_hidden_layers":1,"kv_lora_rank":512,"qk_rope_head_dim":64,
    "index_head_dim":128}"#;

fn codec(config: &str, format: RowFormat, group: &str) -> RowCodec {
    let layout = KvLayout::from_config(config, format, 128).unwrap();
    RowCodec::of(layout.groups().iter().find(|other| other.name == group).unwrap()).unwrap()
}

fn encoded(codec: &RowCodec, row: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec.encode(row, &mut bytes);
    bytes
}

fn decoded(codec: &RowCodec, bytes: &[u8]) -> Vec<f32> {
    let mut row = Vec::new();
    codec.decode(bytes, &mut row);
    row
}

#[test]
fn a_v4_row_by_hand() {
    let codec = codec(V4, RowFormat::Deployed, "csa");
    let mut row = [0.0; 512];
    // Block 0: 448 is the largest e4m3, so the scale is 1. 17 lies between 16 and 18: ties to even.
    (row[0], row[1], row[2], row[63]) = (448.0, 1.0, 17.0, -0.0625);
    // Block 1: 1 / 448 is above 2^-9, so the scale is 2^-8: 1 is 256, 0.4 is 102.4 and becomes 104.
    (row[64], row[65]) = (1.0, 0.4);
    // Block 2: just beyond 448 takes the next scale: 2 * 224 and, of 1.0, 0.5.
    (row[128], row[129]) = (449.0, 1.0);
    // Block 6, the last: 1e-3 / 448 is between 2^-19 and 2^-18, so the scale is 2^-18: 262.144 becomes 256.
    row[447] = -1e-3;
    // The rotated channels: 1 + 2^-8 is a tie in bf16, to even.
    (row[448], row[511]) = (1.0 + 1.0 / 256.0, -3.0);
    let bytes = encoded(&codec, &row);
    assert_eq!(bytes.len(), 584);
    assert_eq!((bytes[0], bytes[1], bytes[2], bytes[63]), (0x7E, 0x38, 0x58, 0x98));
    assert_eq!((bytes[64], bytes[65]), (0x78, 0x6D));
    assert_eq!((bytes[128], bytes[129]), (0x76, 0x30));
    assert_eq!(bytes[447], 0xF8);
    assert_eq!((&bytes[448..450], &bytes[574..576]), (&[0x80, 0x3F][..], &[0x40, 0xC0][..]));
    // Blocks of zeros have the scale of the floor 1e-4: 2^-22.
    assert_eq!(bytes[576..], [127, 119, 128, 105, 105, 105, 109, 0]);
    let back = decoded(&codec, &bytes);
    assert_eq!((back[0], back[2], back[64], back[65], back[128]), (448.0, 16.0, 1.0, 0.406_25, 448.0));
    assert_eq!((back[447], back[448], back[511]), (-256.0 / 262_144.0, 1.0, -3.0));
    assert!(back[3..63].iter().chain(&back[449..511]).all(|&value| value == 0.0));
}

#[test]
fn a_v4_key_by_hand_in_fp4() {
    let codec = codec(V4, RowFormat::Deployed, "csa_indexer_key");
    let mut row = [0.0; 128];
    // Scale 1: each step, and ties to even: 0.25 to 0, 0.75 to 1, 2.5 to 2, 5 to 4.
    row[..12].copy_from_slice(&[6.0, 0.5, 1.5, 3.0, 0.25, 0.75, 2.5, 5.0, -6.0, -0.5, 1.25, 3.5]);
    // 7 takes the scale 2 and becomes 3.5, a tie: 4, that is 8.
    row[32] = 7.0;
    // 0.1 / 6 is above 2^-6, so the scale is 2^-5: 3.2 becomes 3.
    row[127] = 0.1;
    let bytes = encoded(&codec, &row);
    assert_eq!(bytes.len(), 68);
    assert_eq!(bytes[..6], [0x17, 0x53, 0x20, 0x64, 0x9F, 0x62]);
    assert_eq!((bytes[16], bytes[63]), (0x06, 0x50));
    assert_eq!(bytes[64..], [127, 128, 1, 122]);
    let back = decoded(&codec, &bytes);
    assert_eq!(back[..12], [6.0, 0.5, 1.5, 3.0, 0.0, 1.0, 2.0, 4.0, -6.0, -0.5, 1.0, 4.0]);
    assert_eq!((back[32], back[127]), (8.0, 3.0 / 32.0));
}

#[test]
fn rows_of_v32_and_keys_in_fp8_by_hand() {
    let codec_of = |format, group| codec(V32, format, group);
    let latent = codec_of(RowFormat::Deployed, "latent");
    let mut row = [0.0; 576];
    (row[0], row[128], row[575]) = (448.0, 1.0, -3.0);
    let bytes = encoded(&latent, &row);
    assert_eq!(bytes.len(), 656);
    assert_eq!((bytes[0], bytes[128]), (0x7E, 0x78));
    assert_eq!(bytes[512..516], 1.0_f32.to_le_bytes());
    assert_eq!(bytes[516..520], (1.0 / 256.0_f32).to_le_bytes());
    assert_eq!(bytes[654..], [0x40, 0xC0]);
    assert_eq!(decoded(&latent, &bytes), row);

    for key in [
        codec_of(RowFormat::Deployed, "indexer_key"),
        codec(V4, RowFormat::DeployedFp8Keys, "csa_indexer_key"),
    ] {
        let mut row = [0.0; 128];
        (row[0], row[127]) = (-2.0, 0.0625);
        let bytes = encoded(&key, &row);
        assert_eq!(bytes.len(), 132);
        // 2 / 448 is above 2^-8, so the scale is 2^-7: 256, and 0.0625 is 8.
        assert_eq!((bytes[0], bytes[127]), (0xF8, 0x50));
        assert_eq!(bytes[128..], (1.0 / 128.0_f32).to_le_bytes());
        assert_eq!(decoded(&key, &bytes), row);
    }
}

#[test]
fn the_rotation_keeps_products_and_is_its_own_inverse() {
    let mut row: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
    let original = row.clone();
    let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
    hadamard(&mut row);
    assert!((length(&row) / length(&original) - 1.0).abs() < 1e-5);
    assert!((row[0] - original.iter().sum::<f32>() / 128.0_f32.sqrt()).abs() < 1e-4);
    hadamard(&mut row);
    assert!(row.iter().zip(&original).all(|(a, b)| (a - b).abs() < 1e-5));
}

/// Numbers of all sizes but the very largest, which may become infinite, many of them at the edges between two scales.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        3 => -4.0_f32..4.0,
        1 => (-130_i32..125, 0_u32..1 << 23).prop_map(|(e, m)| (1.0 + m as f32 / 8_388_608.0) * 2.0_f32.powi(e)),
        1 => proptest::sample::select(vec![0.0, -0.0, 448.0, 449.0, 223.9, 224.1, 6.0, 6.01, 3.01, 1e-4, 1e-40]),
    ]
}

proptest! {
    #[test]
    fn rounding_twice_is_rounding_once_and_bytes_keep_it(values in proptest::collection::vec(number(), 576)) {
        for (config, format, group) in [
            (V4, RowFormat::Deployed, "window"),
            (V4, RowFormat::Deployed, "csa_indexer_key"),
            (V4, RowFormat::DeployedFp8Keys, "csa_indexer_key"),
            (V32, RowFormat::Deployed, "latent"),
            (V4, RowFormat::Bf16, "hca_128"),
        ] {
            let codec = codec(config, format, group);
            let width = match &codec { RowCodec::Mixed(mixed) => mixed.width, _ => 512 };
            let mut once = values[..width].to_vec();
            codec.round(&mut once);
            let mut twice = once.clone();
            codec.round(&mut twice);
            let back = decoded(&codec, &encoded(&codec, &once));
            for (channel, ((once, twice), back)) in once.iter().zip(&twice).zip(&back).enumerate() {
                let bits = [once, twice, back].map(|value| value.to_bits());
                prop_assert!(bits[1] == bits[0] && bits[2] == bits[0], "{group}, {channel}: {once}, {twice}, {back}");
            }
        }
    }
}

/// The quantisers as they are published, in F64: a row's bytes, field after field, and the numbers that they stand for.
#[derive(Default)]
struct Oracle {
    codes: Vec<u8>,
    scales: Vec<u8>,
    plain: Vec<u8>,
    numbers: Vec<f64>,
}

impl Oracle {
    /// `2^ceil(log2(max(|x|, floor) / largest))`, found by trying. Its exponent.
    fn scale(values: &[f32], floor: f64, largest: f64) -> i32 {
        let most = values.iter().fold(floor, |most, value| most.max(f64::from(value.abs())));
        (-200..200).find(|&exponent| 2.0_f64.powi(exponent) >= most / largest).unwrap()
    }

    /// The nearest of these non-negative numbers, in ascending order; of two equally near ones the even.
    fn nearest(steps: &[f64], size: f64) -> u8 {
        let distance = |code: usize| (steps[code] - size).abs();
        let better = |a: &usize, b: &usize| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2)));
        u8::try_from((0..steps.len()).min_by(better).unwrap()).unwrap()
    }

    /// The code of each number over the scale, clamped to the largest, with its sign in the bit `sign`.
    fn code(&mut self, values: &[f32], exponent: i32, steps: &[f64], sign: u8) -> Vec<u8> {
        let (scale, largest) = (2.0_f64.powi(exponent), steps[steps.len() - 1]);
        let code = |&value: &f32| {
            let size = Self::nearest(steps, (f64::from(value).abs() / scale).min(largest));
            let negative = value.is_sign_negative();
            self.numbers.push(steps[usize::from(size)] * if negative { -scale } else { scale });
            size | if negative { sign } else { 0 }
        };
        values.iter().map(code).collect()
    }

    /// Four bits of exponent, of bias 7, and three of mantissa; all ones is no number.
    fn e4m3(&mut self, values: &[f32]) -> i32 {
        let number = |code: i32| match (code / 8, f64::from(code % 8) / 8.0) {
            (0, mantissa) => mantissa * 2.0_f64.powi(-6),
            (exponent, mantissa) => (1.0 + mantissa) * 2.0_f64.powi(exponent - 7),
        };
        let steps: Vec<f64> = (0..127).map(number).collect();
        let exponent = Self::scale(values, 1e-4, 448.0);
        let codes = self.code(values, exponent, &steps, 0x80);
        self.codes.extend(codes);
        exponent
    }

    fn e2m1(&mut self, values: &[f32]) -> i32 {
        let exponent = Self::scale(values, 6.0 * 2.0_f64.powi(-126), 6.0);
        let codes = self.code(values, exponent, &[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], 8);
        self.codes.extend(codes.as_chunks::<2>().0.iter().map(|[even, odd]| even | odd << 4));
        exponent
    }

    fn bf16(&mut self, values: &[f32]) {
        for &value in values {
            // Eight bits of mantissa, of which one is not written; below the normal numbers the step stays.
            let value = f64::from(value);
            let exponent = (-126..128).rev().find(|&at| value.abs() >= 2.0_f64.powi(at)).unwrap_or(-126);
            let step = 2.0_f64.powi(exponent - 7);
            let rounded = (value / step).round_ties_even() * step;
            #[expect(clippy::cast_possible_truncation, reason = "eight bits of mantissa are left")]
            let exact = rounded as f32;
            self.plain.extend(&exact.to_le_bytes()[2..]);
            self.numbers.push(rounded);
        }
    }

    fn e8m0(&mut self, exponent: i32) {
        self.scales.push(u8::try_from(exponent + 127).unwrap());
    }

    fn f32_scale(&mut self, exponent: i32) {
        self.scales.extend(2.0_f32.powi(exponent).to_le_bytes());
    }
}

/// The bytes and numbers of a row in each format that rounds.
fn oracle(values: &[f32], format: RowFormat, group: &str) -> (Vec<u8>, Vec<f64>) {
    let mut it = Oracle::default();
    match (format, group) {
        (RowFormat::Bf16, _) => it.bf16(values),
        (_, "window" | "csa" | "hca_128") => {
            for block in values[..448].chunks(64) {
                let exponent = it.e4m3(block);
                it.e8m0(exponent);
            }
            it.bf16(&values[448..]);
            return ([it.codes, it.plain, it.scales, vec![0]].concat(), it.numbers);
        }
        (_, "latent") => {
            for block in values[..512].chunks(128) {
                let exponent = it.e4m3(block);
                it.f32_scale(exponent);
            }
            it.bf16(&values[512..]);
            return ([it.codes, it.scales, it.plain].concat(), it.numbers);
        }
        (RowFormat::Deployed, "csa_indexer_key") => {
            for block in values.chunks(32) {
                let exponent = it.e2m1(block);
                it.e8m0(exponent);
            }
        }
        _ => {
            let exponent = it.e4m3(values);
            it.f32_scale(exponent);
        }
    }
    ([it.codes, it.scales, it.plain].concat(), it.numbers)
}

proptest! {
    #[test]
    fn every_format_gives_the_bytes_and_numbers_of_its_formula(
        values in proptest::collection::vec(number(), 576),
        exponents in proptest::collection::vec(-20_i32..20, 18),
    ) {
        // Blocks of all sizes: one that holds a very large number has zeros beside it.
        let sized = values.iter().enumerate().map(|(at, value)| value.clamp(-1e3, 1e3) * 2.0_f32.powi(exponents[at / 32]));
        let sized: Vec<f32> = sized.collect();
        for values in [values, sized] {
            for (config, format, group) in [
                (V4, RowFormat::Deployed, "window"),
                (V4, RowFormat::Deployed, "csa"),
                (V4, RowFormat::Deployed, "hca_128"),
                (V4, RowFormat::Deployed, "csa_indexer_key"),
                (V4, RowFormat::DeployedFp8Keys, "csa_indexer_key"),
                (V4, RowFormat::Bf16, "csa"),
                (V32, RowFormat::Deployed, "latent"),
                (V32, RowFormat::Deployed, "indexer_key"),
                (V32, RowFormat::Bf16, "latent"),
            ] {
                let layout = KvLayout::from_config(config, format, 128).unwrap();
                let group = layout.groups().iter().find(|other| other.name == group).unwrap();
                let codec = RowCodec::of(group).unwrap();
                let values = &values[..codec.width(group)];
                let (bytes, numbers) = oracle(values, format, &group.name);
                let got = encoded(&codec, values);
                prop_assert!(got == bytes, "{format:?}, {}: {values:?}", group.name);
                for (at, (got, number)) in decoded(&codec, &got).iter().zip(&numbers).enumerate() {
                    prop_assert!(
                        f64::from(*got) == *number && got.is_sign_negative() == number.is_sign_negative(),
                        "{format:?}, {}, {at}: {got} is not {number}", group.name
                    );
                }
                prop_assert_eq!(decoded(&codec, &got).len(), numbers.len());
            }
        }
    }
}
