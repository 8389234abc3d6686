//! Dense products with weights that lie as the kernel reads them, packed once when they are loaded.
//!
//! Why results do not depend on company: an element is one chain of multiply-adds over the inner dimension in ascending
//! order, restarted every [`BLOCK`] steps, the parts added in order. Rows, columns, threads and vector widths only decide
//! in which register a chain runs. So a row alone, a row among others, and any division of the work give the same bits;
//! `tests` below hold every width to one written-out chain.
//!
//! A panel is [`PANEL`] columns side by side for every inner index: `[panel][input][PANEL]`, zero beyond the last column. The inner
//! loop takes up to [`TILE_ROWS`] rows against one panel: a block of the panel (32 KiB) stays in the first-level cache while
//! the rows pass by, the rows' block in the second.

use rayon::prelude::*;

use super::{Width, fma, width};

/// Steps of one chain before its sum joins the total.
const BLOCK: usize = 256;
/// Columns side by side.
const PANEL: usize = 32;
/// Rows that one pass over a block takes: with two registers of 16 columns each, 24 sums, which hide the latency of a fused
/// multiply-add and leave registers for the panel.
const TILE_ROWS: usize = 12;
/// Multiply-adds below which a product is not worth dividing among threads.
const PARALLEL_WORK: usize = 1 << 18;
/// Rows below which the columns are divided, not the rows.
const FEW_ROWS: usize = 4 * TILE_ROWS;

/// [`PANEL`] columns of one inner index, on a cache line's boundary.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; PANEL]);

/// One block of a row of the left matrix; beyond the last inner index anything.
type RowBlock = [f32; BLOCK];

/// The right matrix of products, `[inputs, outputs]`.
pub(crate) struct Packed {
    panels: Vec<Lanes>,
    inputs: usize,
    outputs: usize,
}

/// The left matrix: rows of as many numbers as the other has inputs, one every `stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    count: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// `count` rows, one every `stride` numbers.
    pub(crate) fn new(data: &'a [f32], count: usize, stride: usize) -> Self {
        Self { data, count, stride }
    }

    fn row(&self, row: usize, inputs: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..inputs]
    }

    fn slice(self, first: usize, count: usize) -> Self {
        Self { data: &self.data[first * self.stride..], count, ..self }
    }
}

impl Packed {
    /// From `[outputs, inputs]`, as published.
    pub(crate) fn from_outputs(rows: &[f32], outputs: usize, inputs: usize) -> Self {
        assert_eq!(rows.len(), outputs * inputs, "a matrix of {outputs} x {inputs}");
        Self::pack(outputs, inputs, |input, output| rows[output * inputs + input])
    }

    /// From `[inputs, outputs]`.
    pub(crate) fn from_inputs(rows: &[f32], inputs: usize, outputs: usize) -> Self {
        assert_eq!(rows.len(), outputs * inputs, "a matrix of {inputs} x {outputs}");
        Self::pack(outputs, inputs, |input, output| rows[input * outputs + output])
    }

    fn pack(outputs: usize, inputs: usize, number: impl Fn(usize, usize) -> f32) -> Self {
        let mut panels = vec![Lanes([0.0; PANEL]); outputs.div_ceil(PANEL) * inputs];
        for (index, panel) in panels.chunks_exact_mut(inputs.max(1)).enumerate() {
            let (first, count) = (index * PANEL, PANEL.min(outputs - index * PANEL));
            // Lane by lane, a cache line of the published order at a time.
            for (index, run) in panel.chunks_mut(16).enumerate() {
                for lane in 0..count {
                    for (input, lanes) in (index * 16..).zip(run.iter_mut()) {
                        lanes.0[lane] = number(input, first + lane);
                    }
                }
            }
        }
        Self { panels, inputs, outputs }
    }

    /// Numbers of an input row.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Numbers of an output row.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Numbers of the matrix.
    pub(crate) fn parameters(&self) -> usize {
        self.inputs * self.outputs
    }

    /// `out[i * stride + j] = sum_k x[i, k] * self[k, j]`, on the calling thread.
    pub(crate) fn multiply(&self, x: Rows<'_>, out: &mut [f32], stride: usize) {
        self.multiply_panels(0, x, out, stride, width());
    }

    /// The same with packed rows of `out`, divided among the threads of the current pool.
    pub(crate) fn multiply_parallel(&self, x: Rows<'_>, out: &mut [f32]) {
        let (threads, outputs) = (rayon::current_num_threads(), self.outputs);
        if threads == 1 || x.count * self.inputs * outputs < PARALLEL_WORK {
            self.multiply(x, out, outputs);
        } else if x.count == 1 {
            let part = outputs.div_ceil(PANEL).div_ceil(threads) * PANEL;
            out[..outputs].par_chunks_mut(part).enumerate().for_each(|(index, out)| {
                let columns = out.len();
                self.multiply_panels(index * part / PANEL, x, out, columns, width());
            });
        } else if x.count < FEW_ROWS {
            let panels = outputs.div_ceil(PANEL).div_ceil(threads);
            let parts: Vec<(usize, Vec<f32>)> = (0..outputs)
                .into_par_iter()
                .step_by(panels * PANEL)
                .map(|first| {
                    let columns = (outputs - first).min(panels * PANEL);
                    let mut part = vec![0.0; x.count * columns];
                    self.multiply_panels(first / PANEL, x, &mut part, columns, width());
                    (first, part)
                })
                .collect();
            for (first, part) in parts {
                let columns = part.len() / x.count;
                for (out, part) in out.chunks_exact_mut(outputs).zip(part.chunks_exact(columns)) {
                    out[first..first + columns].copy_from_slice(part);
                }
            }
        } else {
            let part = x.count.div_ceil(threads).next_multiple_of(TILE_ROWS);
            out[..x.count * outputs].par_chunks_mut(part * outputs).enumerate().for_each(|(index, out)| {
                self.multiply(x.slice(index * part, out.len() / outputs), out, outputs);
            });
        }
    }

    /// Columns from panel `first` on, as many as an output row has room for.
    fn multiply_panels(&self, first: usize, x: Rows<'_>, out: &mut [f32], stride: usize, width: Width) {
        if x.count == 0 || self.outputs == 0 {
            return;
        }
        let columns = (self.outputs - first * PANEL).min(stride);
        if self.inputs == 0 {
            return out.chunks_mut(stride).for_each(|row| row[..columns].fill(0.0));
        }
        let panels = &self.panels[first * self.inputs..][..columns.div_ceil(PANEL) * self.inputs];
        if x.count == 1 {
            return multiply_row(x.row(0, self.inputs), panels, &mut out[..columns], width);
        }
        let mut blocks: Vec<RowBlock> = vec![[0.0; BLOCK]; x.count];
        for from in (0..self.inputs).step_by(BLOCK) {
            let steps = BLOCK.min(self.inputs - from);
            for (row, block) in blocks.iter_mut().enumerate() {
                block[..steps].copy_from_slice(&x.row(row, self.inputs)[from..from + steps]);
            }
            for (index, panel) in panels.chunks_exact(self.inputs).enumerate() {
                let panel = &panel[from..from + steps];
                let column = index * PANEL;
                let mut sums = Sums {
                    out: &mut out[column..],
                    stride,
                    columns: PANEL.min(columns - column),
                    joins: from > 0,
                };
                sums.add(&blocks, panel, width);
            }
        }
    }
}

/// Where the sums of one block go.
struct Sums<'a> {
    out: &'a mut [f32],
    stride: usize,
    columns: usize,
    /// Whether they are added to what is there.
    joins: bool,
}

impl Sums<'_> {
    /// All rows against one block of a panel.
    fn add(&mut self, rows: &[RowBlock], panel: &[Lanes], width: Width) {
        let tile = match width {
            #[cfg(target_arch = "x86_64")]
            Width::Avx512 => TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Width::Avx2 => 6,
            Width::Baseline => 4,
        };
        let mut first = 0;
        for rows in rows.chunks(tile) {
            macro_rules! of_count {
                ($($count:literal)*) => {
                    match rows.len() {
                        $($count => self.tile::<$count>(rows.first_chunk().expect("as many"), panel, first, width),)*
                        _ => unreachable!("a tile has at most {TILE_ROWS} rows"),
                    }
                };
            }
            of_count!(1 2 3 4 5 6 7 8 9 10 11 12);
            first += rows.len();
        }
    }

    #[inline]
    fn tile<const M: usize>(&mut self, rows: &[RowBlock; M], panel: &[Lanes], first: usize, width: Width) {
        let mut sums = [[0.0; PANEL]; M];
        match width {
            // SAFETY: `width` found every feature that these are compiled for on this machine.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Width::Avx512 => unsafe { x86::wide_512::tile(rows, panel, &mut sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Width::Avx2 => unsafe { x86::wide_256::tile(rows, panel, &mut sums) },
            Width::Baseline => tile_plain::<M, { super::BASELINE_FUSED }>(rows, panel, &mut sums),
        }
        for (row, sums) in sums.iter().enumerate() {
            let out = &mut self.out[(first + row) * self.stride..][..self.columns];
            if !self.joins {
                out.copy_from_slice(&sums[..self.columns]);
            } else if let Ok(out) = <&mut [f32; PANEL]>::try_from(&mut *out) {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            } else {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
        }
    }
}

/// One row against panels: what decoding one token mostly is. Each panel is read once, from end to end.
fn multiply_row(x: &[f32], panels: &[Lanes], out: &mut [f32], width: Width) {
    match width {
        // SAFETY: `width` found every feature that these are compiled for on this machine.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Width::Avx512 => unsafe { x86::wide_512::row(x, panels, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Width::Avx2 => unsafe { x86::wide_256::row(x, panels, out) },
        Width::Baseline => row_plain::<{ super::BASELINE_FUSED }>(x, panels, out),
    }
}

#[inline(always)]
fn tile_plain<const M: usize, const FUSED: bool>(
    rows: &[RowBlock; M],
    panel: &[Lanes],
    sums: &mut [[f32; PANEL]; M],
) {
    for (k, lanes) in panel.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, lane) in sums.iter_mut().zip(&lanes.0) {
                *sum = fma::<FUSED>(row[k], *lane, *sum);
            }
        }
    }
}

fn row_plain<const FUSED: bool>(x: &[f32], panels: &[Lanes], out: &mut [f32]) {
    for (panel, out) in panels.chunks_exact(x.len()).zip(out.chunks_mut(PANEL)) {
        let mut total = [0.0; PANEL];
        for (block, (x, panel)) in x.chunks(BLOCK).zip(panel.chunks(BLOCK)).enumerate() {
            let mut sums = [0.0; PANEL];
            for (x, lanes) in x.iter().zip(panel) {
                for (sum, lane) in sums.iter_mut().zip(&lanes.0) {
                    *sum = fma::<FUSED>(*x, *lane, *sum);
                }
            }
            for (total, sum) in total.iter_mut().zip(sums) {
                *total = if block == 0 { sum } else { *total + sum };
            }
        }
        out.copy_from_slice(&total[..out.len()]);
    }
}

/// With intrinsics: what the compiler makes of plain loops here changes by a factor of thirty with the number of rows.
#[cfg(target_arch = "x86_64")]
mod x86 {
    /// The kernels of one vector width: `$lanes` numbers in a vector, and a row takes `$abreast` panels side by side, so that
    /// enough chains run at a time.
    macro_rules! kernels {
        ($module:ident, $features:literal, $vector:ident, $lanes:literal, $abreast:literal,
         $zero:ident, $broadcast:ident, $load:ident, $store:ident, $fma:ident, $add:ident) => {
            pub(super) mod $module {
                use std::arch::x86_64::{$add, $broadcast, $fma, $load, $store, $vector, $zero};

                use super::super::{BLOCK, Lanes, PANEL, RowBlock};

                /// Vectors of a panel.
                const VECTORS: usize = PANEL / $lanes;

                /// Sums of `M` rows over one block of a panel.
                #[target_feature(enable = $features)]
                pub(in super::super) fn tile<const M: usize>(
                    rows: &[RowBlock; M],
                    panel: &[Lanes],
                    out: &mut [[f32; PANEL]; M],
                ) {
                    columns::<M, 0>(rows, panel, out);
                    if 2 * $lanes < PANEL {
                        columns::<M, { PANEL - 2 * $lanes }>(rows, panel, out);
                    }
                }

                /// Those of two vectors from column `FIRST` on.
                #[target_feature(enable = $features)]
                fn columns<const M: usize, const FIRST: usize>(
                    rows: &[RowBlock; M],
                    panel: &[Lanes],
                    out: &mut [[f32; PANEL]; M],
                ) {
                    assert!(panel.len() <= BLOCK);
                    let mut sums = [[$zero(); 2]; M];
                    for (k, lanes) in panel.iter().enumerate() {
                        let first = load(&lanes.0[FIRST..FIRST + $lanes]);
                        let second = load(&lanes.0[FIRST + $lanes..FIRST + 2 * $lanes]);
                        for (sums, row) in sums.iter_mut().zip(rows) {
                            let x = $broadcast(row[k]);
                            sums[0] = $fma(x, first, sums[0]);
                            sums[1] = $fma(x, second, sums[1]);
                        }
                    }
                    for (out, sums) in out.iter_mut().zip(sums) {
                        store(sums[0], &mut out[FIRST..FIRST + $lanes]);
                        store(sums[1], &mut out[FIRST + $lanes..FIRST + 2 * $lanes]);
                    }
                }

                /// One row against whole panels.
                #[target_feature(enable = $features)]
                pub(in super::super) fn row(x: &[f32], panels: &[Lanes], out: &mut [f32]) {
                    let groups = panels.chunks($abreast * x.len()).zip(out.chunks_mut($abreast * PANEL));
                    for (panels, out) in groups {
                        match panels.len() / x.len() {
                            $abreast => abreast::<$abreast>(x, panels, out),
                            count => {
                                for (panel, out) in
                                    panels.chunks_exact(x.len()).zip(out.chunks_mut(PANEL)).take(count)
                                {
                                    abreast::<1>(x, panel, out);
                                }
                            }
                        }
                    }
                }

                /// One row against `N` panels.
                #[target_feature(enable = $features)]
                fn abreast<const N: usize>(x: &[f32], panels: &[Lanes], out: &mut [f32]) {
                    let mut total = [[$zero(); VECTORS]; N];
                    let mut from = [panels; N];
                    for (panel, from) in from.iter_mut().enumerate() {
                        *from = &panels[panel * x.len()..][..x.len()];
                    }
                    for (block, x) in x.chunks(BLOCK).enumerate() {
                        let mut sums = [[$zero(); VECTORS]; N];
                        let mut here = from;
                        for from in &mut here {
                            *from = &from[block * BLOCK..][..x.len()];
                        }
                        for (k, x) in x.iter().enumerate() {
                            let x = $broadcast(*x);
                            for (sums, from) in sums.iter_mut().zip(&here) {
                                for (at, sum) in sums.iter_mut().enumerate() {
                                    *sum = $fma(x, load(&from[k].0[at * $lanes..(at + 1) * $lanes]), *sum);
                                }
                            }
                        }
                        for (total, sums) in total.iter_mut().zip(sums) {
                            for (total, sum) in total.iter_mut().zip(sums) {
                                *total = if block == 0 { sum } else { $add(*total, sum) };
                            }
                        }
                    }
                    for (total, out) in total.into_iter().zip(out.chunks_mut(PANEL)) {
                        let mut lanes = [0.0; PANEL];
                        for (at, total) in total.into_iter().enumerate() {
                            store(total, &mut lanes[at * $lanes..(at + 1) * $lanes]);
                        }
                        out.copy_from_slice(&lanes[..out.len()]);
                    }
                }

                #[target_feature(enable = $features)]
                #[inline]
                fn load(from: &[f32]) -> $vector {
                    assert!(from.len() == $lanes);
                    // SAFETY: as many numbers as the vector takes, just counted.
                    #[allow(unsafe_code)]
                    unsafe {
                        $load(from.as_ptr())
                    }
                }

                #[target_feature(enable = $features)]
                #[inline]
                fn store(vector: $vector, to: &mut [f32]) {
                    assert!(to.len() == $lanes);
                    // SAFETY: as many numbers as the vector has, just counted.
                    #[allow(unsafe_code)]
                    unsafe {
                        $store(to.as_mut_ptr(), vector);
                    }
                }
            }
        };
    }

    kernels!(
        wide_512,
        "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma",
        __m512,
        16,
        4,
        _mm512_setzero_ps,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps
    );
    kernels!(
        wide_256,
        "avx2,fma",
        __m256,
        8,
        2,
        _mm256_setzero_ps,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// One element, written out.
    fn chain(x: &[f32], column: impl Fn(usize) -> f32, fused: bool) -> f32 {
        let mut total = 0.0;
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let mut sum = 0.0_f32;
            for (k, x) in x.iter().enumerate() {
                let b = column(block * BLOCK + k);
                sum = if fused { x.mul_add(b, sum) } else { x * b + sum };
            }
            total = if block == 0 { sum } else { total + sum };
        }
        total
    }

    fn widths() -> Vec<Width> {
        let mut all = vec![Width::Baseline];
        #[cfg(target_arch = "x86_64")]
        match width() {
            Width::Avx512 => all.extend([Width::Avx2, Width::Avx512]),
            Width::Avx2 => all.push(Width::Avx2),
            Width::Baseline => {}
        }
        all
    }

    /// The contract of the whole crate, at its root: one row alone, among others, in any division, at any vector width,
    /// gives the bits of the written-out chain.
    #[test]
    fn bits_do_not_depend_on_company() {
        for (rows, inner, cols) in
            [(1, 7, 3), (5, 80, 33), (33, 256, 40), (13, 257, 65), (70, 257, 65), (40, 700, 130)]
        {
            let (a, b) = (numbers(rows * inner, 1), numbers(inner * cols, 2));
            let packed = Packed::from_inputs(&b, inner, cols);
            for width in widths() {
                let fused = width != Width::Baseline || crate::kernel::BASELINE_FUSED;
                let expected: Vec<u32> = (0..rows * cols)
                    .map(|i| {
                        chain(&a[i / cols * inner..][..inner], |k| b[k * cols + i % cols], fused).to_bits()
                    })
                    .collect();
                for part in [1, 2, 7, rows] {
                    let mut out = vec![0.0; rows * cols];
                    for first in (0..rows).step_by(part) {
                        let count = part.min(rows - first);
                        let x = Rows::new(&a, rows, inner).slice(first, count);
                        packed.multiply_panels(0, x, &mut out[first * cols..], cols, width);
                    }
                    assert!(
                        out.iter().map(|x| x.to_bits()).eq(expected.iter().copied()),
                        "{rows} {inner} {cols} by {part}"
                    );
                }
            }
            let mut whole = vec![0.0; rows * cols];
            packed.multiply(Rows::new(&a, rows, inner), &mut whole, cols);
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for count in [1, 2, rows] {
                    let count = count.min(rows);
                    let mut parallel = vec![0.0; count * cols];
                    pool.install(|| packed.multiply_parallel(Rows::new(&a, count, inner), &mut parallel));
                    assert!(whole.iter().zip(&parallel).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }

    /// Large enough that the work is divided, by rows and by columns.
    #[test]
    fn division_among_threads_changes_no_bit() {
        let (rows, inner, cols) = (130, 300, 200);
        let (a, b) = (numbers(rows * inner, 3), numbers(inner * cols, 4));
        let packed = Packed::from_inputs(&b, inner, cols);
        let mut whole = vec![0.0; rows * cols];
        packed.multiply(Rows::new(&a, rows, inner), &mut whole, cols);
        for threads in [2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for count in [1, 5, 47, rows] {
                let mut parallel = vec![0.0; count * cols];
                pool.install(|| packed.multiply_parallel(Rows::new(&a, count, inner), &mut parallel));
                assert!(whole.iter().zip(&parallel).all(|(a, b)| a.to_bits() == b.to_bits()), "{count} rows");
            }
        }
    }

    #[test]
    fn both_orders_of_a_matrix_pack_alike_and_strides_hold() {
        let b = numbers(5 * 7, 5);
        let turned: Vec<f32> = (0..35).map(|i| b[i % 5 * 7 + i / 5]).collect();
        let (by_inputs, by_outputs) = (Packed::from_inputs(&b, 5, 7), Packed::from_outputs(&turned, 7, 5));
        let a = numbers(3 * 9, 6);
        let run = |packed: &Packed| {
            let mut out = vec![-1.0; 2 * 11 + 7];
            packed.multiply(Rows::new(&a, 3, 9), &mut out, 11);
            out
        };
        assert_eq!(run(&by_inputs), run(&by_outputs));
        let out = run(&by_inputs);
        assert!(out[7..11].iter().chain(&out[18..22]).all(|&x| x == -1.0), "gaps are left alone");
        assert_eq!(out[11].to_bits(), chain(&a[9..14], |k| b[k * 7], width() != Width::Baseline).to_bits());
    }
}
