//! Dense products with weights that lie as the kernel reads them, packed once when they are loaded.
//!
//! Why results do not depend on company: an element is one chain of multiply-adds over the inner dimension in ascending
//! order, restarted every [`BLOCK`] steps, the parts added in order. Rows, columns, threads and vector widths only decide
//! in which register a chain runs. So a row alone, a row among others, and any division of the work give the same bits;
//! `tests` below hold every width to one written-out chain.
//!
//! A panel is [`PANEL`] columns side by side for every inner index: `[panel][input][PANEL]`, zero beyond the last column. Many
//! rows are copied once, and then tasks of some panels each take all of them: weights come from memory once, however many
//! threads there are. A task goes block by block. The rows' block (256 KiB) stays in the second-level cache while the
//! task's panels pass by; a panel's block (32 KiB) stays in the first while tiles of rows pass by, and meanwhile
//! the next one is asked for.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::{Width, fma, width};

/// Steps of one chain before its sum joins the total.
const BLOCK: usize = 256;
/// Columns side by side.
const PANEL: usize = 32;
/// Rows that one pass over a block takes: with two registers of 16 columns each, 24 sums, which hide the latency of a fused
/// multiply-add and leave registers for the panel.
const TILE_ROWS: usize = 12;
/// Rows that a task takes at most, and are copied at a time.
const TASK_ROWS: usize = 256;
/// Panels that a task takes at most.
const TASK_PANELS: usize = 8;
/// Panels that are not divided where there are rows to divide.
const NARROW_PANELS: usize = 2;
/// Tasks for each thread, so that none waits long for the last one of another.
const TASKS_OF_THREAD: usize = 4;
/// Rows below which there is one task for each thread: memory is all that they wait for.
const FEW_ROWS: usize = 4 * TILE_ROWS;
/// Tiles from which on the next block of a panel is asked for while one is used: with fewer, memory is busy anyway.
const PREFETCH_TILES: usize = 4;
/// Steps of a chain between two lines that are asked for. Many at once would take the buffers through which the tile's
/// own lines come.
const STEP: usize = 8;
/// Multiply-adds below which a product is not worth dividing among threads.
const PARALLEL_WORK: usize = 1 << 18;

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
        self.multiply_at(x, out, stride, width());
    }

    /// The same for a given vector width.
    fn multiply_at(&self, x: Rows<'_>, out: &mut [f32], stride: usize, width: Width) {
        if x.count == 1 && self.inputs > 0 {
            return multiply_row(x.row(0, self.inputs), &self.panels, &mut out[..self.outputs], width);
        }
        let mut buffers = Buffers::default();
        for first in (0..x.count).step_by(TASK_ROWS) {
            let x = x.slice(first, TASK_ROWS.min(x.count - first));
            let panels = Parts { count: self.panels(), part: TASK_PANELS };
            let copied = if panels.len() > 1 { self.copied(x, 0..self.blocks()) } else { Vec::new() };
            let job = Job { x, copied, out: Out::new(&mut out[first * stride..], stride), width };
            for index in 0..panels.len() {
                self.task(&job, 0..x.count, panels.get(index), &mut buffers);
            }
        }
    }

    /// All of `x` times this, `[rows, outputs]`, divided among the threads of the current pool.
    pub(crate) fn product(&self, x: Rows<'_>) -> Vec<f32> {
        let (threads, outputs) = (rayon::current_num_threads(), self.outputs);
        if threads == 1 && x.count == 1 || x.count * self.inputs * outputs < PARALLEL_WORK {
            let mut out = vec![0.0; x.count * outputs];
            self.multiply(x, &mut out, outputs);
            out
        } else if x.count == 1 {
            let mut out = vec![0.0; outputs];
            let (x, part) = (x.row(0, self.inputs), self.panels().div_ceil(threads));
            let panels = self.panels.par_chunks(part * self.inputs);
            out.par_chunks_mut(part * PANEL).zip(panels).for_each(|(out, panels)| {
                multiply_row(x, panels, out, width());
            });
            out
        } else {
            let mut out = Vec::with_capacity(x.count * outputs);
            for first in (0..x.count).step_by(TASK_ROWS) {
                let x = x.slice(first, TASK_ROWS.min(x.count - first));
                let room = &mut out.spare_capacity_mut()[first * outputs..];
                self.divide(x, Out::uninitialised(room, outputs), threads);
            }
            // SAFETY: as many numbers as there is room for; the tasks of `divide` wrote every column of every row.
            #[allow(unsafe_code)]
            unsafe {
                out.set_len(x.count * outputs);
            }
            out
        }
    }

    /// Up to [`TASK_ROWS`] rows in tasks of some panels each and, if there are few of those, of some of the rows.
    fn divide(&self, x: Rows<'_>, out: Out<'_>, threads: usize) {
        let few = x.count < FEW_ROWS;
        let wanted = if few { threads } else { TASKS_OF_THREAD * threads };
        let part = match self.panels() {
            panels if few => panels.div_ceil(threads),
            panels @ ..=NARROW_PANELS => panels,
            panels => (panels / wanted).clamp(1, TASK_PANELS),
        };
        let panels = Parts { count: self.panels(), part };
        let part = x.count.div_ceil(wanted.div_ceil(panels.len())).next_multiple_of(2 * TILE_ROWS);
        let rows = Parts { count: x.count, part };
        let copied = if few || panels.len() == 1 {
            Vec::new()
        } else {
            let blocks = Parts { count: self.blocks(), part: self.blocks().div_ceil(threads) };
            let parts = (0..blocks.len()).into_par_iter().with_max_len(1);
            parts.flat_map_iter(|index| self.copied(x, blocks.get(index))).collect()
        };
        let job = Job { x, copied, out, width: width() };
        let tasks = (0..rows.len() * panels.len()).into_par_iter().with_max_len(1);
        tasks.for_each_init(Buffers::default, |buffers, index| {
            let (rows, panels) = (rows.get(index / panels.len()), panels.get(index % panels.len()));
            self.task(&job, rows, panels, buffers);
        });
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    fn blocks(&self) -> usize {
        self.inputs.div_ceil(BLOCK)
    }

    /// Some blocks of all rows, `[block][row][BLOCK]`.
    fn copied(&self, x: Rows<'_>, blocks: Range<usize>) -> Vec<Vec<f32>> {
        let mut copied: Vec<_> = blocks.clone().map(|_| Vec::with_capacity(x.count * BLOCK)).collect();
        self.copy(x, 0..x.count, blocks, &mut copied);
        copied
    }

    /// Appends its part of some rows to each of some blocks: row by row, as they lie in memory.
    fn copy(&self, x: Rows<'_>, rows: Range<usize>, blocks: Range<usize>, to: &mut [Vec<f32>]) {
        let inputs = blocks.start * BLOCK..self.inputs.min(blocks.end * BLOCK);
        for row in rows {
            for (part, to) in x.row(row, self.inputs)[inputs.clone()].chunks(BLOCK).zip(&mut *to) {
                to.extend_from_slice(part);
                to.resize(to.len().next_multiple_of(BLOCK), 0.0);
            }
        }
    }

    /// Some of the rows times some panels.
    fn task(&self, job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, buffers: &mut Buffers) {
        let Buffers { block: own, totals } = buffers;
        totals.resize(panels.len() * rows.len(), Lanes([0.0; PANEL]));
        let of_panel = |panel: usize, block: usize| {
            let from = block * BLOCK;
            &self.panels[panel * self.inputs + from..][..BLOCK.min(self.inputs - from)]
        };
        for index in 0..self.blocks() {
            let block = match job.copied.get(index) {
                Some(block) => &block.as_chunks().0[rows.clone()],
                None => {
                    own.clear();
                    self.copy(job.x, rows.clone(), index..index + 1, std::slice::from_mut(own));
                    own.as_chunks().0
                }
            };
            for (panel, totals) in panels.clone().zip(totals.chunks_exact_mut(rows.len())) {
                let next = match (panel + 1 < panels.end, index + 1 < self.blocks()) {
                    (true, _) => of_panel(panel + 1, index),
                    (false, true) => of_panel(panels.start, index + 1),
                    (false, false) => of_panel(panel, index),
                };
                add(block, of_panel(panel, index), next, totals, index > 0, job.width);
            }
        }
        if self.blocks() == 0 {
            totals.fill(Lanes([0.0; PANEL]));
        }
        for (index, row) in rows.clone().enumerate() {
            for (panel, totals) in panels.clone().zip(totals.chunks_exact(rows.len())) {
                let column = panel * PANEL;
                let numbers = &totals[index].0[..PANEL.min(self.outputs - column)];
                // SAFETY: tasks that run at the same time have no panel of a row in common.
                #[allow(unsafe_code)]
                unsafe {
                    job.out.put(row, column, numbers);
                }
            }
        }
    }
}

/// What the tasks of up to [`TASK_ROWS`] rows share.
struct Job<'a> {
    x: Rows<'a>,
    /// The rows' blocks, if it pays to copy them once. Otherwise a task copies its own, one after the other.
    copied: Vec<Vec<f32>>,
    out: Out<'a>,
    width: Width,
}

/// What a task needs room for, to be used again by the next.
#[derive(Default)]
struct Buffers {
    /// A block of its rows, if it copies them itself.
    block: Vec<f32>,
    /// `[panel][row]`.
    totals: Vec<Lanes>,
}

/// `0..count`, `part` at a time.
#[derive(Clone, Copy)]
struct Parts {
    count: usize,
    part: usize,
}

impl Parts {
    fn len(self) -> usize {
        self.count.div_ceil(self.part)
    }

    fn get(self, index: usize) -> Range<usize> {
        index * self.part..self.count.min((index + 1) * self.part)
    }
}

/// Where results go: rows of numbers, one every `stride`, of which each task writes columns of its own.
struct Out<'a> {
    numbers: *mut f32,
    count: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [MaybeUninit<f32>]>,
}

// SAFETY: only `put` touches the numbers, and it is for its callers to see that no two of them meet.
#[allow(unsafe_code)]
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    fn new(numbers: &'a mut [f32], stride: usize) -> Self {
        Self { numbers: numbers.as_mut_ptr(), count: numbers.len(), stride, borrowed: PhantomData }
    }

    fn uninitialised(numbers: &'a mut [MaybeUninit<f32>], stride: usize) -> Self {
        Self { numbers: numbers.as_mut_ptr().cast(), count: numbers.len(), stride, borrowed: PhantomData }
    }

    /// Writes numbers of a row, from a column on.
    ///
    /// # Safety
    /// Nobody else writes the same ones at the same time.
    #[allow(unsafe_code)]
    #[inline(always)]
    unsafe fn put(&self, row: usize, column: usize, numbers: &[f32]) {
        let at = row * self.stride + column;
        assert!(at <= self.count && numbers.len() <= self.count - at, "a result has room for its rows");
        // SAFETY: within what is borrowed, as just checked, and by the caller's word no other writer is there.
        unsafe {
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.numbers.add(at), numbers.len());
        }
    }
}

/// Adds to each row's total, or puts in its place unless it `joins`, the sums of one block; asks for the `next` block of
/// a panel meanwhile.
fn add(rows: &[RowBlock], panel: &[Lanes], next: &[Lanes], totals: &mut [Lanes], joins: bool, width: Width) {
    let tile = match width {
        #[cfg(target_arch = "x86_64")]
        Width::Avx512 => TILE_ROWS,
        #[cfg(target_arch = "x86_64")]
        Width::Avx2 => 6,
        Width::Baseline => 4,
    };
    let (tiles, mut first) = (rows.len().div_ceil(tile), 0);
    for index in 0..tiles {
        let next = match tiles >= PREFETCH_TILES {
            true => &next[index * next.len() / tiles..],
            false => panel,
        };
        // Tiles of about one height: a low one would wait for its few sums.
        let count = (rows.len() - first).div_ceil(tiles - index);
        let (rows, totals) = (&rows[first..], &mut totals[first..]);
        macro_rules! of_count {
            ($($count:literal)*) => {
                match count {
                    $($count => {
                        let rows = rows.first_chunk().expect("as many");
                        let totals = totals.first_chunk_mut().expect("as many");
                        add_tile::<$count>(rows, panel, totals, joins, next, width);
                    })*
                    _ => unreachable!("a tile has at most {TILE_ROWS} rows"),
                }
            };
        }
        of_count!(1 2 3 4 5 6 7 8 9 10 11 12);
        first += count;
    }
}

#[inline]
fn add_tile<const M: usize>(
    rows: &[RowBlock; M],
    panel: &[Lanes],
    totals: &mut [Lanes; M],
    joins: bool,
    next: &[Lanes],
    width: Width,
) {
    match width {
        // SAFETY: `width` found every feature that these are compiled for on this machine.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Width::Avx512 => unsafe { x86::wide_512::add_tile(rows, panel, totals, joins, next) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Width::Avx2 => unsafe { x86::wide_256::add_tile(rows, panel, totals, joins, next) },
        Width::Baseline => add_tile_plain::<M, { super::BASELINE_FUSED }>(rows, panel, totals, joins),
    }
}

/// Asks for line `index` of lanes to be brought to the second-level cache, without waiting.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(lanes: &[Lanes], index: usize) {
    let line = lanes.as_ptr().cast::<[f32; 16]>().wrapping_add(index);
    // SAFETY: every x86-64 has the instruction, and it cannot fault.
    #[allow(unsafe_code)]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
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
fn add_tile_plain<const M: usize, const FUSED: bool>(
    rows: &[RowBlock; M],
    panel: &[Lanes],
    totals: &mut [Lanes; M],
    joins: bool,
) {
    let mut sums = [[0.0; PANEL]; M];
    for (k, lanes) in panel.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, lane) in sums.iter_mut().zip(&lanes.0) {
                *sum = fma::<FUSED>(row[k], *lane, *sum);
            }
        }
    }
    for (total, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in total.0.iter_mut().zip(sums) {
            *total = if joins { *total + sum } else { sum };
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

                use super::super::{BLOCK, Lanes, PANEL, RowBlock, STEP, prefetch};

                /// Vectors of a panel.
                const VECTORS: usize = PANEL / $lanes;

                /// Sums of `M` rows over one block of a panel, put in place of their totals or added.
                #[target_feature(enable = $features)]
                pub(in super::super) fn add_tile<const M: usize>(
                    rows: &[RowBlock; M],
                    panel: &[Lanes],
                    totals: &mut [Lanes; M],
                    joins: bool,
                    next: &[Lanes],
                ) {
                    add_columns::<M, 0>(rows, panel, totals, joins, next);
                    if 2 * $lanes < PANEL {
                        add_columns::<M, { PANEL - 2 * $lanes }>(rows, panel, totals, joins, next);
                    }
                }

                /// Those of two vectors from column `FIRST` on.
                #[target_feature(enable = $features)]
                fn add_columns<const M: usize, const FIRST: usize>(
                    rows: &[RowBlock; M],
                    panel: &[Lanes],
                    totals: &mut [Lanes; M],
                    joins: bool,
                    next: &[Lanes],
                ) {
                    assert!(panel.len() <= BLOCK);
                    let mut sums = [[$zero(); 2]; M];
                    let (steps, rest) = panel.as_chunks::<STEP>();
                    for (step, lanes) in steps.iter().enumerate() {
                        prefetch(next, step);
                        for (k, lanes) in lanes.iter().enumerate() {
                            let first = load(&lanes.0[FIRST..FIRST + $lanes]);
                            let second = load(&lanes.0[FIRST + $lanes..FIRST + 2 * $lanes]);
                            for (sums, row) in sums.iter_mut().zip(rows) {
                                let x = $broadcast(row[step * STEP + k]);
                                sums[0] = $fma(x, first, sums[0]);
                                sums[1] = $fma(x, second, sums[1]);
                            }
                        }
                    }
                    for (k, lanes) in (steps.len() * STEP..).zip(rest) {
                        let first = load(&lanes.0[FIRST..FIRST + $lanes]);
                        let second = load(&lanes.0[FIRST + $lanes..FIRST + 2 * $lanes]);
                        for (sums, row) in sums.iter_mut().zip(rows) {
                            let x = $broadcast(row[k]);
                            sums[0] = $fma(x, first, sums[0]);
                            sums[1] = $fma(x, second, sums[1]);
                        }
                    }
                    for (total, sums) in totals.iter_mut().zip(sums) {
                        for (at, sum) in sums.into_iter().enumerate() {
                            let total = &mut total.0[FIRST + at * $lanes..FIRST + (at + 1) * $lanes];
                            store(if joins { $add(load(total), sum) } else { sum }, total);
                        }
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

                /// Of [`Lanes`]. An unaligned load would be a checked copy through the stack wherever debug assertions are on, as
                /// they are in our releases.
                #[target_feature(enable = $features)]
                #[inline]
                fn load(from: &[f32]) -> $vector {
                    assert!(from.len() == $lanes);
                    // SAFETY: as many numbers as the vector takes, just counted; lanes are aligned, and in whole vectors.
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
        _mm512_load_ps,
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
        _mm256_load_ps,
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
        for (rows, inner, cols) in [
            (1, 7, 3),
            (5, 80, 33),
            (33, 256, 40),
            (13, 257, 65),
            (70, 257, 65),
            (40, 700, 300),
            (300, 263, 9),
        ] {
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
                        packed.multiply_at(x, &mut out[first * cols..], cols, width);
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
                    let parallel = pool.install(|| packed.product(Rows::new(&a, count, inner)));
                    assert_eq!(parallel.len(), count * cols);
                    assert!(whole.iter().zip(&parallel).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }

    /// Large enough that the work is divided: by columns, and where these are few, by rows.
    #[test]
    fn division_among_threads_changes_no_bit() {
        for (rows, inner, cols) in [(300, 300, 200), (300, 1500, 7), (130, 800, 50)] {
            let (a, b) = (numbers(rows * inner, 3), numbers(inner * cols, 4));
            let packed = Packed::from_inputs(&b, inner, cols);
            let mut whole = vec![0.0; rows * cols];
            packed.multiply(Rows::new(&a, rows, inner), &mut whole, cols);
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for count in [1, 5, 47, rows] {
                    let parallel = pool.install(|| packed.product(Rows::new(&a, count, inner)));
                    assert_eq!(parallel.len(), count * cols);
                    assert!(
                        whole.iter().zip(&parallel).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{count} of {rows} {inner} {cols}, {threads} threads"
                    );
                }
            }
        }
    }

    #[test]
    fn products_of_nothing_are_zero_or_empty() {
        let no_inputs = Packed::from_inputs(&[], 0, 40);
        for count in [1, 3] {
            let mut out = vec![-1.0; count * 40];
            no_inputs.multiply(Rows::new(&[], count, 0), &mut out, 40);
            assert!(out.iter().all(|&x| x == 0.0));
            assert_eq!(no_inputs.product(Rows::new(&[], count, 0)), out);
        }
        assert!(Packed::from_inputs(&numbers(35, 7), 5, 7).product(Rows::new(&[], 0, 5)).is_empty());
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
