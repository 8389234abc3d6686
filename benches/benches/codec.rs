//! The plane codec on one core: ratio, and GB of raw bytes a second, beside zstd-1 on the same bytes.
//!
//! ```text
//! cargo bench -p esker-server -p esker-benches --bench codec [-- FILE.bf16...]
//! ```
//!
//! Without files: synthetic latents, unit Gaussian with a gain and a mean for each channel, rounded to the format.
//! They behave like whitened activations, the hard case. A file holds real activations: bf16, little-endian, and its
//! name ends in `-LAYERSxTOKENSxCHANNELS.bf16`. Planes are one block of 256 tokens of one layer, or more layers where
//! that makes less than 64 KiB. Times are the best of many passes over all planes, on the calling thread.

#![allow(clippy::cast_possible_truncation)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use esker_prefix::Dtype;
use esker_store::codec::{self, Column, PlaneShape};

const BLOCK_TOKENS: usize = 256;
const PLANE_BYTES: usize = 64 << 10;
const SYNTHETIC_BYTES: usize = 4 << 20;
const TIME_PER_CASE: Duration = Duration::from_millis(800);

fn main() {
    let files: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    println!("{:<34} {:>9} {:>7} {:>9} {:>9}", "planes", "MiB", "ratio", "enc GB/s", "dec GB/s");
    if files.is_empty() {
        let mut random = Random(0x1234_5678_9ABC_DEF1);
        for (layers, rows, channels) in [(1, 256, 128), (1, 256, 512), (1, 64, 512), (2, 32, 512)] {
            let count = SYNTHETIC_BYTES / (layers * rows * channels * 2);
            let planes: Vec<Vec<u8>> =
                (0..count).map(|_| latents(&mut random, layers, rows, channels)).collect();
            compare(&format!("synthetic {layers} x {rows} x {channels}"), layers, rows, channels, &planes);
        }
        published(&mut random);
    }
    for file in &files {
        let bytes = std::fs::read(file).expect("a readable file");
        let (layers, tokens, channels) = dimensions(file).expect("FILE-LAYERSxTOKENSxCHANNELS.bf16");
        let rows = BLOCK_TOKENS.min(tokens);
        let layers_joined = PLANE_BYTES.div_ceil(rows * channels * 2).min(layers);
        let row_bytes = channels * 2;
        let mut planes = Vec::new();
        for first in (0..layers - layers_joined + 1).step_by(layers_joined) {
            for block in 0..tokens / rows {
                let layer = |l: usize| {
                    &bytes[((first + l) * tokens + block * rows) * row_bytes..][..rows * row_bytes]
                };
                planes.push((0..layers_joined).flat_map(|l| layer(l).to_vec()).collect());
            }
        }
        let name = file.rsplit('/').next().unwrap_or(file);
        compare(name, layers_joined, rows, channels, &planes);
    }
}

/// Prints the figures for bf16 planes as they are, and rounded to FP8 with a scale for each 128 channels.
fn compare(name: &str, layers: usize, rows: usize, channels: usize, planes: &[Vec<u8>]) {
    let shape = |columns: &[Column]| PlaneShape::new(layers as u16, rows as u32, columns);
    let column = |dtype, count: usize| Column { dtype, count: count as u32 };
    println!("{name}");
    measure("  bf16, zstd-1", &shape(&[column(Dtype::U8, channels * 2)]), planes);
    measure("  bf16, mode P", &shape(&[column(Dtype::Bf16, channels)]), planes);
    let planes: Vec<Vec<u8>> = planes.iter().map(|plane| fp8_rows(plane, channels)).collect();
    measure("  fp8, zstd-1", &shape(&[column(Dtype::U8, channels)]), &planes);
    measure("  fp8, mode F", &shape(&[column(Dtype::F8E4m3, channels)]), &planes);
}

/// Prints the figures for whole rows of published models, at blocks of 128 tokens.
fn published(random: &mut Random) {
    let bf16_row: [(Dtype, usize); 2] = [(Dtype::Bf16, 512), (Dtype::Bf16, 64)];
    let v32_row = [(Dtype::F8E4m3, 512), (Dtype::F32, 4), (Dtype::Bf16, 64)];
    let v4_row = [(Dtype::F8E4m3, 448), (Dtype::Bf16, 64), (Dtype::F8E8m0, 7), (Dtype::U8, 1)];
    let cases = [
        ("V3.2 row, bf16", 1, 128, &bf16_row[..]),
        ("V3.2 row, deployed", 1, 128, &v32_row),
        ("V4 row, deployed", 4, 32, &v4_row),
    ];
    for (name, layers, rows, fields) in cases {
        let columns: Vec<Column> =
            fields.iter().map(|&(dtype, count)| Column { dtype, count: count as u32 }).collect();
        let make = |random: &mut Random| {
            let parts: Vec<Vec<u8>> = fields
                .iter()
                .map(|&(dtype, count)| match dtype {
                    Dtype::Bf16 => latents(random, layers, rows, count),
                    Dtype::F8E4m3 => fp8_rows(&latents(random, layers, rows, count), count),
                    Dtype::F8E8m0 => {
                        (0..layers * rows * count).map(|_| 126 + (random.uniform() * 2.2) as u8).collect()
                    }
                    Dtype::F32 => (0..layers * rows * count)
                        .flat_map(|_| ((2.5 + 0.3 * random.normal()) as f32 / 448.0).to_le_bytes())
                        .collect(),
                    _ => vec![0; layers * rows * count],
                })
                .collect();
            let width = |part: &Vec<u8>| part.len() / (layers * rows);
            let row =
                |r: usize| parts.iter().flat_map(move |part| &part[r * width(part)..(r + 1) * width(part)]);
            (0..layers * rows).flat_map(row).copied().collect::<Vec<u8>>()
        };
        let mut planes = vec![make(random)];
        planes.resize_with(SYNTHETIC_BYTES / planes[0].len(), || make(random));
        let row_bytes = planes[0].len() / (layers * rows);
        let bytes = [Column { dtype: Dtype::U8, count: row_bytes as u32 }];
        println!("{name}");
        measure("  zstd-1", &PlaneShape::new(layers as u16, rows as u32, &bytes), &planes);
        measure("  by columns", &PlaneShape::new(layers as u16, rows as u32, &columns), &planes);
    }
}

fn measure(name: &str, shape: &PlaneShape, planes: &[Vec<u8>]) {
    let raw_bytes: usize = planes.iter().map(Vec::len).sum();
    let longest = planes.iter().map(Vec::len).max().unwrap_or(0);
    let mut out = vec![0; longest];
    let stored: Vec<Vec<u8>> = planes
        .iter()
        .map(|plane| codec::encode(shape, plane, &mut out).map_or(Vec::new(), |len| out[..len].to_vec()))
        .collect();
    let mut stored_bytes = 0;
    for (plane, stored) in planes.iter().zip(&stored) {
        stored_bytes += if stored.is_empty() { plane.len() } else { stored.len() };
        if !stored.is_empty() {
            codec::decode(stored, &mut out[..plane.len()]).expect("what was encoded decodes");
            assert_eq!(&out[..plane.len()], plane);
        }
    }
    let encode = best(|| {
        for plane in planes {
            black_box(codec::encode(shape, black_box(plane), &mut out));
        }
    });
    let decode = best(|| {
        for (plane, stored) in planes.iter().zip(&stored) {
            let _ = black_box(codec::decode(black_box(stored), &mut out[..plane.len()]));
        }
    });
    let gb_per_s = |time: Duration| raw_bytes as f64 / time.as_nanos() as f64;
    println!(
        "{name:<34} {:>9.2} {:>7.3} {:>9.2} {:>9.2}",
        raw_bytes as f64 / f64::from(1 << 20),
        raw_bytes as f64 / stored_bytes as f64,
        gb_per_s(encode),
        gb_per_s(decode)
    );
}

fn best(mut pass: impl FnMut()) -> Duration {
    let start = Instant::now();
    let mut best = Duration::MAX;
    while start.elapsed() < TIME_PER_CASE {
        let pass_start = Instant::now();
        pass();
        best = best.min(pass_start.elapsed());
    }
    best
}

fn dimensions(file: &str) -> Option<(usize, usize, usize)> {
    let mut numbers =
        file.strip_suffix(".bf16")?.rsplit('-').next()?.split('x').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

/// One plane of bf16 rows.
fn latents(random: &mut Random, layers: usize, rows: usize, channels: usize) -> Vec<u8> {
    let mut plane = Vec::with_capacity(layers * rows * channels * 2);
    for _ in 0..layers {
        let gains: Vec<f64> = (0..channels).map(|_| (random.normal() * 0.5).exp()).collect();
        let means: Vec<f64> = (0..channels).map(|_| random.normal() * 0.3).collect();
        for _ in 0..rows {
            for (gain, mean) in gains.iter().zip(&means) {
                plane.extend(bf16((gain * (random.normal() + mean)) as f32).to_le_bytes());
            }
        }
    }
    plane
}

/// Rows of bf16 in FP8 e4m3, each run of 128 channels scaled to the range of the format by a power of two.
fn fp8_rows(plane: &[u8], channels: usize) -> Vec<u8> {
    let values: Vec<f32> = plane
        .chunks_exact(2)
        .map(|pair| f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16))
        .collect();
    let mut out = Vec::with_capacity(values.len());
    for row in values.chunks(channels) {
        for run in row.chunks(128) {
            let greatest = run.iter().fold(f32::MIN_POSITIVE, |greatest, value| value.abs().max(greatest));
            let scale = (448.0 / greatest).log2().floor().exp2();
            out.extend(run.iter().map(|value| e4m3(value * scale)));
        }
    }
    out
}

fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// Rounds to the nearest e4m3 (bias 7, no infinities), ties to even; the value is within range.
fn e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let value = value.abs();
    if value < 0.015_625 {
        // Subnormal: multiples of 2^-9. 8 of them are the least normal number, whose code follows.
        return sign | (value * 512.0).round_ties_even() as u8;
    }
    let bits = value.to_bits();
    let rounded = (bits + 0x7_FFFF + ((bits >> 20) & 1)) >> 20;
    sign | (rounded - (120 << 3)).min(0x7E) as u8
}

/// xorshift64*, so that the planes are the same everywhere.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller.
    fn normal(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        radius * angle.cos()
    }
}
