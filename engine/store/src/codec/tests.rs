use esker_prefix::{Dtype, Family, Field, Group, PlaneSpec};
use proptest::prelude::*;

use super::rows::{Rows, RowsMut};
use super::*;

const DTYPES: [Dtype; 6] = [Dtype::U8, Dtype::F32, Dtype::Bf16, Dtype::F8E4m3, Dtype::F8E8m0, Dtype::F4E2m1];

fn plane(layers: u16, rows: u32, columns: &[(Dtype, u32)]) -> PlaneShape {
    let columns: Vec<Column> = columns.iter().map(|&(dtype, count)| Column { dtype, count }).collect();
    PlaneShape::new(layers, rows, &columns)
}

/// Encodes, checks that the bytes return, and gives the encoded form.
fn round_trip(shape: &PlaneShape, raw: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0xA5; raw.len()];
    let encoded_bytes = encode(shape, raw, &mut out)?;
    assert!(encoded_bytes * 100 <= raw.len() * WORTH_ENCODING_PERCENT);
    out.truncate(encoded_bytes);
    let mut decoded = vec![0x5A; raw.len()];
    assert_eq!(decode(&out, &mut decoded), Ok(()));
    assert!(decoded == raw, "decoded bytes differ");
    Some(out)
}

/// Codes one column in one chunk, whether or not it shrinks. Gives the encoded length; `None` if the mode declined.
fn round_trip_in(mode: Mode, layers: usize, rows: usize, width: usize, raw: &[u8]) -> Option<usize> {
    let shape = plane(layers as u16, rows as u32, &[]);
    let cut: Vec<Chunk> = chunks::of(&shape, width).collect();
    let [chunk] = cut[..] else { panic!("{} chunks", cut.len()) };
    let dtype = if mode == Mode::Fp8 { Dtype::F8E4m3 } else { Dtype::Bf16 };
    let mut workspace = Workspace::default();
    let mut out = vec![0xA5; 3 * raw.len() + 1024];
    let stored = workspace.try_mode(mode, Rows::new(raw, width, 0, width), chunk, &mut out)?;
    let mut framed = vec![mode as u8];
    framed.extend((stored as u32).to_le_bytes());
    framed.extend(&out[..stored]);
    let mut decoded = vec![0x5A; raw.len()];
    let rows = RowsMut::new(&mut decoded, width, 0, width);
    let mut rest = &framed[..];
    workspace.decode_chunk(dtype, &mut rest, chunk, rows).expect("decodes");
    assert!(rest.is_empty() && decoded == raw, "decoded bytes differ");
    Some(stored)
}

/// The modes of the chunks of an encoded plane.
fn modes_of(stored: &[u8]) -> Vec<u8> {
    let (shape, lengths, mut rest) = PlaneShape::read(stored).unwrap();
    let mut modes = Vec::new();
    for (column, len) in shape.columns().iter().zip(lengths) {
        let mut column_rest = take(&mut rest, len).unwrap();
        for _ in chunks::of(&shape, column.row_bytes().unwrap()) {
            modes.push(take(&mut column_rest, 1).unwrap()[0]);
            let len = take_length(&mut column_rest).unwrap();
            take(&mut column_rest, len).unwrap();
        }
    }
    modes
}

fn bf16_bytes(numbers: impl IntoIterator<Item = u16>) -> Vec<u8> {
    numbers.into_iter().flat_map(u16::to_le_bytes).collect()
}

/// xorshift64.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Numbers whose exponents fall off from a maximum as those of activations do: one in 2^k is k below.
fn activation(state: &mut u64, greatest_exponent: u16) -> u16 {
    let bits = random(state);
    let below = (bits >> 16).trailing_zeros().min(10) as u16;
    (bits as u16 & 0x807F) | (greatest_exponent - below) << 7
}

fn activations(seed: u64, numbers: usize) -> Vec<u8> {
    let mut state = seed | 1;
    bf16_bytes((0..numbers).map(|_| activation(&mut state, 127)))
}

fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len).map(|_| (random(&mut state) >> 32) as u8).collect()
}

#[test]
fn every_bf16_pattern_returns() {
    // One exponent to a channel, every sign and mantissa to each: no escapes.
    let sorted = bf16_bytes((0..=255_u16).flat_map(|remainder| {
        (0..256_u16).map(move |exponent| (remainder & 0x80) << 8 | exponent << 7 | remainder & 0x7F)
    }));
    let stored = round_trip(&plane(1, 256, &[(Dtype::Bf16, 256)]), &sorted).unwrap();
    assert_eq!(modes_of(&stored), [Mode::Bf16Channel as u8]);

    // Each among a hundred usual numbers: zeros, subnormals, infinities and NaNs as escapes.
    for rows in [32, 128] {
        let channels = 512;
        let mut state = 7;
        for base in (0..=u16::MAX).step_by(512) {
            let usual = 32 * 128 / rows * rows * channels;
            let mut numbers: Vec<u16> = (0..usual).map(|_| activation(&mut state, 127)).collect();
            for at in 0..512 {
                numbers[at * (usual / 512) + at % 64] = base + at as u16;
            }
            let raw = bf16_bytes(numbers);
            let shape = plane((raw.len() / (rows * channels * 2)) as u16, rows as u32, &[(Dtype::Bf16, 512)]);
            let stored = round_trip(&shape, &raw).unwrap();
            assert!(!modes_of(&stored).contains(&(Mode::Raw as u8)));
        }
    }
}

#[test]
fn every_fp8_byte_returns() {
    let raw: Vec<u8> = (0..=255).collect();
    for width in [1, 2, 4, 16, 64, 128, 256] {
        round_trip_in(Mode::Fp8, 1, 256 / width, width, &raw).unwrap();
    }
    // In a plane that shrinks.
    let mut state = 3;
    let mut raw: Vec<u8> = (0..128 * 448).map(|_| (activation(&mut state, 12) >> 4) as u8 & 0x7F).collect();
    for byte in 0..=255 {
        raw[usize::from(byte) * 200] = byte;
    }
    let stored = round_trip(&plane(4, 32, &[(Dtype::F8E4m3, 448)]), &raw).unwrap();
    assert_eq!(modes_of(&stored), [Mode::Fp8 as u8]);
}

#[test]
fn special_numbers_survive_in_place() {
    const SPECIAL: [u16; 12] =
        [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x7FFF, 0x0001, 0x807F, 0x0080, 0xFF7F];
    let (rows, channels) = (100, 512);
    for (layers, seed) in [(1, 1), (2, 9)] {
        let mut raw = activations(seed, layers * rows * channels);
        for (at, special) in SPECIAL.iter().enumerate() {
            raw[2 * (at * 701)..][..2].copy_from_slice(&special.to_le_bytes());
        }
        round_trip_in(Mode::Bf16Channel, layers, rows, channels * 2, &raw).unwrap();
        round_trip_in(Mode::Bf16Layer, layers, rows, channels * 2, &raw).unwrap();
        round_trip(&plane(layers as u16, rows as u32, &[(Dtype::Bf16, channels as u32)]), &raw).unwrap();
    }
}

#[test]
fn odd_shapes_round_trip_in_every_mode() {
    for (layers, rows, channels) in [
        (1, 1, 1),
        (1, 1, 64),
        (1, 2, 1),
        (1, 3, 1),
        (3, 1, 5),
        (3, 3, 3),
        (1, 129, 7),
        (5, 67, 65),
        (2, 64, 1),
    ] {
        let one_exponent = bf16_bytes((0..layers * rows * channels).map(|at| 0x3F80 | at as u16 & 0x807F));
        let width = channels * 2;
        for mode in [Mode::Bf16Channel, Mode::Bf16Layer, Mode::Zstd] {
            round_trip_in(mode, layers, rows, width, &one_exponent).unwrap();
        }
        round_trip_in(Mode::Fp8, layers, rows, width, &one_exponent).unwrap();
        round_trip_in(Mode::Fp8, layers, rows, width, &random_bytes(5, one_exponent.len())).unwrap();
    }
}

#[test]
fn a_channel_is_judged_by_its_own_range() {
    // Channels 2^40 apart, and another order in each layer.
    let mut state = 11;
    let raw = bf16_bytes((0..4 * 64 * 64).map(|at| {
        let (layer, channel) = (at / (64 * 64), at % 64);
        activation(&mut state, 60 + ((channel * 7 + layer * 13) % 64) as u16)
    }));
    let stored = round_trip(&plane(4, 64, &[(Dtype::Bf16, 64)]), &raw).unwrap();
    assert_eq!(modes_of(&stored), [Mode::Bf16Channel as u8]);
    assert!(stored.len() * 14 < raw.len() * 10, "{} of {}", stored.len(), raw.len());
}

#[test]
fn outliers_in_every_channel_turn_to_a_reference_for_the_layer() {
    let (rows, channels) = (128, 256);
    let mut state = 13;
    let raw = bf16_bytes((0..rows * channels).map(|at| {
        let outlier = at / channels == at % channels % rows;
        activation(&mut state, if outlier { 190 } else { 127 })
    }));
    assert_eq!(round_trip_in(Mode::Bf16Channel, 1, rows, channels * 2, &raw), None);
    let stored = round_trip(&plane(1, rows as u32, &[(Dtype::Bf16, channels as u32)]), &raw).unwrap();
    assert_eq!(modes_of(&stored), [Mode::Bf16Layer as u8]);
    assert!(stored.len() * 14 < raw.len() * 10, "{} of {}", stored.len(), raw.len());
}

#[test]
fn exponents_that_no_reference_fits_are_left_to_zstd() {
    let mut state = 17;
    let raw = bf16_bytes((0..128 * 256).map(|_| {
        let bits = random(&mut state);
        // Every exponent, and few mantissas.
        (bits >> 20) as u16 & 0x7F80 | bits as u16 & 0x8003
    }));
    assert_eq!(round_trip_in(Mode::Bf16Channel, 1, 128, 512, &raw), None);
    assert_eq!(round_trip_in(Mode::Bf16Layer, 1, 128, 512, &raw), None);
    let stored = round_trip(&plane(1, 128, &[(Dtype::Bf16, 256)]), &raw).unwrap();
    assert_eq!(modes_of(&stored), [Mode::Zstd as u8]);
}

#[test]
fn equal_rows_are_left_to_zstd() {
    for dtype in [Dtype::Bf16, Dtype::F8E4m3] {
        let distinct = activations(19, 40 * 256);
        let raw: Vec<u8> =
            (0..128_usize).flat_map(|row| distinct[row * row % 40 * 512..][..512].to_vec()).collect();
        let stored =
            round_trip(&plane(1, 128, &[(dtype, 512 / if dtype == Dtype::Bf16 { 2 } else { 1 })]), &raw);
        assert_eq!(modes_of(&stored.unwrap()), [Mode::Zstd as u8]);
    }
    let zeros = vec![0; 64 << 10];
    for dtype in [Dtype::Bf16, Dtype::F8E4m3, Dtype::F32, Dtype::U8] {
        let width = 512;
        let count = width / plane(1, 1, &[(dtype, 1)]).row_bytes().unwrap();
        let stored = round_trip(&plane(2, 64, &[(dtype, count as u32)]), &zeros).unwrap();
        assert!(stored.len() < 100);
    }
}

#[test]
fn each_column_is_coded_in_its_own_mode() {
    // The V4 row: FP8 latent, bf16 rope, scales, padding.
    let shape = plane(4, 32, &[(Dtype::F8E4m3, 448), (Dtype::Bf16, 64), (Dtype::F8E8m0, 7), (Dtype::U8, 1)]);
    let mut state = 23;
    let mut raw = Vec::new();
    for _ in 0..4 * 32 {
        raw.extend(
            (0..448).map(|_| {
                ((activation(&mut state, 15) >> 4) as u8 & 0x7F) | (random(&mut state) as u8 & 0x80)
            }),
        );
        raw.extend(bf16_bytes((0..64).map(|_| activation(&mut state, 120))));
        raw.extend((0..7).map(|_| 120 + (random(&mut state) % 3) as u8));
        raw.push(0);
    }
    let stored = round_trip(&shape, &raw).unwrap();
    let expected = [Mode::Fp8, Mode::Bf16Layer, Mode::Zstd, Mode::Zstd].map(|mode| mode as u8);
    assert_eq!(modes_of(&stored), expected);
}

#[test]
fn a_column_that_does_not_shrink_is_raw_among_others() {
    let shape = plane(1, 128, &[(Dtype::U8, 100), (Dtype::Bf16, 256)]);
    let (noise, numbers) = (random_bytes(29, 12_800), activations(31, 128 * 256));
    let raw: Vec<u8> =
        noise.chunks(100).zip(numbers.chunks(512)).flat_map(|(a, b)| [a, b].concat()).collect();
    assert_eq!(modes_of(&round_trip(&shape, &raw).unwrap()), [Mode::Raw as u8, Mode::Bf16Channel as u8]);
}

#[test]
fn what_does_not_shrink_is_not_encoded() {
    let noise = random_bytes(37, 64 << 10);
    let mut out = vec![0; noise.len()];
    for dtype in DTYPES {
        let row_of_one = plane(1, 1, &[(dtype, 2)]).row_bytes().unwrap();
        let shape = plane(1, 128, &[(dtype, (2 * 512 / row_of_one) as u32)]);
        assert_eq!(encode(&shape, &noise, &mut out), None, "{dtype:?}");
    }
    assert_eq!(encode(&plane(1, 1, &[(Dtype::Bf16, 8)]), &activations(41, 8), &mut out), None);
    assert_eq!(encode(&plane(0, 0, &[]), &[], &mut out), None);
    // FP4 keys with scales: handed on as they lie.
    let keys = plane(1, 32, &[(Dtype::F4E2m1, 128), (Dtype::F8E8m0, 4)]);
    assert_eq!(encode(&keys, &vec![0; 32 * 68], &mut out), None);
}

#[test]
fn bytes_of_another_shape_are_not_encoded() {
    let raw = activations(43, 128 * 64);
    let mut out = vec![0; raw.len()];
    assert!(encode(&plane(1, 128, &[(Dtype::Bf16, 64)]), &raw, &mut out).is_some());
    assert_eq!(encode(&plane(1, 127, &[(Dtype::Bf16, 64)]), &raw, &mut out), None);
    assert_eq!(encode(&plane(u16::MAX, u32::MAX, &[(Dtype::F32, u32::MAX); 64]), &raw, &mut out), None);
    assert_eq!(encode(&plane(1, 128, &[(Dtype::F4E2m1, 255)]), &raw, &mut out), None);
}

#[test]
fn a_plane_longer_than_a_chunk_round_trips() {
    for (layers, rows, channels) in [(1, 1000, 576), (9, 128, 512), (3, 333, 512)] {
        let raw = activations(47, layers * rows * channels);
        let shape = plane(layers as u16, rows as u32, &[(Dtype::Bf16, channels as u32)]);
        let stored = round_trip(&shape, &raw).unwrap();
        assert!(modes_of(&stored).len() > 1);
        assert!(modes_of(&stored).iter().all(|&mode| mode == Mode::Bf16Channel as u8));
    }
}

#[test]
fn encode_stays_within_its_room() {
    let raw = activations(53, 128 * 64);
    let shape = plane(1, 128, &[(Dtype::Bf16, 64)]);
    let encoded_bytes = encode(&shape, &raw, &mut vec![0; raw.len()]).unwrap();
    for room in (0..encoded_bytes).step_by(97).chain([encoded_bytes - 1]) {
        // Another mode may fit where the best one, which zstd wants some slack for, does not.
        assert!(encode(&shape, &raw, &mut vec![0; room]).is_none_or(|encoded_bytes| encoded_bytes <= room));
    }
    assert_eq!(encode(&shape, &raw, &mut vec![0; raw.len() / 2]), None);
}

#[test]
fn the_shape_of_a_plane_follows_from_its_group() {
    let field = |name: &str, dtype, count| Field { name: name.into(), dtype, count };
    let group = Group {
        name: "latent".into(),
        family: Family::History,
        layers: (0..61).collect(),
        rows: 128,
        fields: vec![field("latent", Dtype::Bf16, 512), field("rope_key", Dtype::Bf16, 64)],
        restore_order: 1,
        plane_layers: 2,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    };
    let spec = PlaneSpec { group: 0, first_layer: 60, layers: 1, len_bytes: 128 * 1152 };
    let shape = PlaneShape::of(&group, &spec);
    assert_eq!(shape, plane(1, 128, &[(Dtype::Bf16, 512), (Dtype::Bf16, 64)]));
    assert_eq!(shape.raw_bytes(), Some(128 * 1152));
}

#[test]
fn a_truncated_or_prolonged_plane_is_damaged() {
    let shape = plane(2, 33, &[(Dtype::Bf16, 24), (Dtype::F8E4m3, 24), (Dtype::F32, 2)]);
    let raw: Vec<u8> = activations(59, 66 * 40).chunks_exact(80).flat_map(|row| row.to_vec()).collect();
    let stored = round_trip(&shape, &raw).unwrap();
    let mut out = vec![0; raw.len()];
    for len in 0..stored.len() {
        assert!(decode(&stored[..len], &mut out).is_err(), "{len}");
    }
    assert!(decode(&[&stored[..], &[0]].concat(), &mut out).is_err());
    for len in [0, 1, raw.len() - 1, raw.len() + 1, 2 * raw.len()] {
        assert!(decode(&stored, &mut vec![0; len]).is_err());
    }
}

#[test]
fn a_description_cannot_ask_for_more_than_the_plane() {
    let hostile = |layers: u16, rows: u32, count: u32, dtype: u8, columns: u8| {
        let mut stored = vec![VERSION, columns];
        stored.extend(layers.to_le_bytes());
        stored.extend(rows.to_le_bytes());
        for _ in 0..columns {
            stored.extend([dtype, 0, 0, 0]);
            stored.extend(count.to_le_bytes());
            stored.extend(0_u32.to_le_bytes());
        }
        stored
    };
    for dtype in 0..=6 {
        for layers in [0, 1, u16::MAX] {
            for rows in [0, 1, 2, u32::MAX] {
                for count in [0, 1, 2, u32::MAX] {
                    for columns in [0, 1, 255] {
                        let stored = hostile(layers, rows, count, dtype, columns);
                        assert!(decode(&stored, &mut [0; 64]).is_err());
                        let _ = decode(&stored, &mut []);
                    }
                }
            }
        }
    }
}

/// Fixes the format. That the decoder reads these bytes must never change; that the encoder writes them may, with
/// another zstd.
#[test]
fn golden_bytes() {
    let shape = plane(2, 8, &[(Dtype::Bf16, 8), (Dtype::F8E4m3, 8), (Dtype::F8E8m0, 1)]);
    let mut raw = Vec::new();
    for row in 0..16_u16 {
        for channel in 0..8 {
            // Exponents 120 to 127, one number far below, sign and mantissa from the position.
            let exponent = if (row, channel) == (3, 5) { 90 } else { 127 - (row * 5 + channel * 3) % 8 % 4 };
            raw.extend((exponent << 7 | ((row * 8 + channel) * 37) & 0x807F).to_le_bytes());
        }
        raw.extend(
            (0..8_u16)
                .map(|channel| (((row + channel) % 2 * 8 + 0x30) | (((row * 8 + channel) * 3) & 0x87)) as u8),
        );
        raw.push(127);
    }
    let golden: Vec<u8> = GOLDEN
        .split_whitespace()
        .flat_map(|line| {
            (0..line.len()).step_by(2).map(|at| u8::from_str_radix(&line[at..at + 2], 16).unwrap())
        })
        .collect();
    let stored = round_trip(&shape, &raw).unwrap();
    let hex: Vec<String> =
        stored.chunks(48).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
    assert_eq!(stored, golden, "now:\n{}", hex.join("\n"));
    assert_eq!(modes_of(&golden), [Mode::Bf16Layer, Mode::Fp8, Mode::Raw].map(|mode| mode as u8));
}

const GOLDEN: &str = "
01030200080000000200000008000000b400000003000000080000006100000004000000010000001500000003af0000
0028000000828200254a6f14395e03284d72173c61062b50751a3f64092e53781d42670c31567b20456a0f34597e2348
6d12375c01264b70153a5f04294e73183d62072c51761b40650a2f54791e43680d32577c21466b10355a7f24496e1338
5d02274c71163b60052a4f74193e63082d52771c41660b30557a1f44690e33587d22476c11365b28b52ffd0000fd0000
02c40607f039440849b2ba89139f388113a7387199139f388113a73871010028045c00000080b3e691c4f7a2d580b3e6
91c4f7a2d580b3e691c4f7225500336611447722550033661144772255003366194c7f2a5d083b6e194c7f2a5d083b6e
194c7f2a5d28b52ffd00009d000002c40305e00f27b80faa55aa55aa55aa55010000100000007f7f7f7f7f7f7f7f7f7f
7f7f7f7f7f7f
";

/// A plane of any shape, with content between constant and random.
fn any_plane() -> impl Strategy<Value = (PlaneShape, Vec<u8>)> {
    let column = (prop::sample::select(&DTYPES[..]), 1..48_u32).prop_map(|(dtype, count)| Column {
        dtype,
        count: if dtype == Dtype::F4E2m1 { count * 2 } else { count },
    });
    let shape = (1..5_u16, 1..150_u32, prop::collection::vec(column, 1..5));
    (shape, any::<u64>(), 0..5_u8).prop_map(|((layers, rows, columns), seed, kind)| {
        let shape = PlaneShape::new(layers, rows, &columns);
        let len = shape.raw_bytes().unwrap();
        let mut raw = match kind {
            0 => random_bytes(seed, len),
            1 => vec![seed as u8; len],
            2 => random_bytes(seed, len).iter().map(|byte| byte & 0x38 | 0x07).collect(),
            _ => activations(seed, len.div_ceil(2)),
        };
        raw.truncate(len);
        if kind == 4 {
            let noise = random_bytes(!seed, len);
            for (byte, noise) in raw.iter_mut().zip(noise).step_by(61) {
                *byte = noise;
            }
        }
        (shape, raw)
    })
}

proptest! {
    #[test]
    fn any_plane_returns((shape, raw) in any_plane()) {
        round_trip(&shape, &raw);
    }

    #[test]
    fn any_numbers_return_in_every_mode(
        layers in 1..4_usize, rows in 1..80_usize, channels in 1..40_usize, seed: u64, escapes in 0..3_usize
    ) {
        let mut raw = activations(seed, layers * rows * channels);
        let numbers = raw.len() / 2;
        for (at, bytes) in raw.chunks_exact_mut(2).enumerate() {
            if escapes * numbers / 100 > 0 && at % (100 / escapes) == seed as usize % 40 {
                bytes.copy_from_slice(&random_bytes(seed ^ at as u64, 2));
            }
        }
        for mode in [Mode::Bf16Channel, Mode::Bf16Layer, Mode::Fp8, Mode::Zstd] {
            round_trip_in(mode, layers, rows, channels * 2, &raw);
        }
    }

    #[test]
    fn random_bytes_do_not_decode_or_do_no_harm(
        stored in prop::collection::vec(any::<u8>(), 0..400), len in 0..4096_usize
    ) {
        let _ = decode(&stored, &mut vec![0; len]);
    }

    #[test]
    fn damaged_planes_do_no_harm(
        (shape, raw) in any_plane(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        near_start: bool
    ) {
        let mut out = vec![0; raw.len()];
        if let Some(encoded_bytes) = encode(&shape, &raw, &mut out) {
            let mut stored = out[..encoded_bytes].to_vec();
            let reach = if near_start { stored.len().min(100) } else { stored.len() };
            for (at, byte) in changes {
                stored[at.index(reach)] = byte;
            }
            if let Some(cut) = cut {
                stored.truncate(cut.index(encoded_bytes));
            }
            let _ = decode(&stored, &mut out);
        }
    }
}
