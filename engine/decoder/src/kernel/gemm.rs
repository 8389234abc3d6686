//! Dense products: crate `matrixmultiply` behind checked views.
//!
//! Why its results do not depend on company: an element of C is one chain of (fused) multiply-adds over k in
//! ascending order, restarted every 256 steps and the parts added in order (`gemm_loop` and the `sgemm_kernel`s
//! of 0.3.11). Rows and columns only decide in which register a chain runs; edge tiles run the same kernel into
//! a buffer. This needs alpha 1 and beta 0, and the crate's own threads are off: work is divided here, over rows
//! or columns, never over k. `tests` below hold that to the bit.

use rayon::prelude::*;

use super::gemv;

/// Multiply-adds below which a product is not worth dividing among threads.
const PARALLEL_WORK: usize = 1 << 18;

/// A matrix over borrowed numbers; element (i, j) is at `i * row_stride + j`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> View<'a> {
    /// `rows` rows of `cols` numbers, one row every `row_stride`.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_fits(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }

    /// Rows `first..first + count`.
    fn slice_rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows);
        Self { data: &self.data[first * self.row_stride..], rows: count, ..self }
    }

    /// Columns `first..first + count`.
    fn slice_cols(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.cols);
        Self { data: &self.data[first..], cols: count, ..self }
    }
}

/// `c[i * c_stride + j] = sum_k a[i, k] * b[k, j]`, on the calling thread.
pub(crate) fn gemm(a: View<'_>, b: View<'_>, c: &mut [f32], c_stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    assert!(c_stride >= b.cols, "rows of the result overlap");
    assert_fits(c.len(), a.rows, b.cols, c_stride);
    if a.rows == 1 && gemv::fused() {
        return gemv::gemv(&a.data[..a.cols], b.data, b.row_stride, &mut c[..b.cols]);
    }
    let stride = |stride: usize| isize::try_from(stride).expect("strides are below the length of a slice");
    // SAFETY: for each view, `assert_fits` (when it was made, or above for `c`) has checked that the element with
    // the largest offset, (rows-1, cols-1), lies within its slice; strides are not negative, so all elements do.
    // Elements of `c` are distinct because its rows do not overlap and its column stride is 1, and `c` is borrowed
    // mutably, so it overlaps neither `a` nor `b`.
    #[allow(unsafe_code)]
    unsafe {
        matrixmultiply::sgemm(
            a.rows,
            a.cols,
            b.cols,
            1.0,
            a.data.as_ptr(),
            stride(a.row_stride),
            1,
            b.data.as_ptr(),
            stride(b.row_stride),
            1,
            0.0,
            c.as_mut_ptr(),
            stride(c_stride),
            1,
        );
    }
}

/// `c = a b` with rows of `c` packed, divided among the threads of the current pool.
pub(crate) fn gemm_parallel(a: View<'_>, b: View<'_>, c: &mut [f32]) {
    let threads = rayon::current_num_threads();
    let cols = b.cols;
    if threads == 1 || cols == 0 || a.rows * a.cols * cols < PARALLEL_WORK {
        gemm(a, b, c, cols);
    } else if a.rows == 1 {
        let part = cols.div_ceil(threads).next_multiple_of(16);
        c[..cols]
            .par_chunks_mut(part)
            .enumerate()
            .for_each(|(index, c)| gemm(a, b.slice_cols(index * part, c.len()), c, c.len()));
    } else {
        let part = a.rows.div_ceil(threads).next_multiple_of(16).min(a.rows);
        c[..a.rows * cols].par_chunks_mut(part * cols).enumerate().for_each(|(index, c)| {
            gemm(a.slice_rows(index * part, c.len() / cols), b, c, cols);
        });
    }
}

fn assert_fits(len: usize, rows: usize, cols: usize, row_stride: usize) {
    if rows == 0 || cols == 0 {
        return;
    }
    let needed = (rows - 1).checked_mul(row_stride).and_then(|offset| offset.checked_add(cols));
    let needed = needed.expect("offset of the last element overflows");
    assert!(needed <= len, "{rows} x {cols} with row stride {row_stride} needs {needed} numbers, got {len}");
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

    /// The contract of the whole crate, at its root: one row alone, among others, in any division, by either
    /// kernel, gives the same bits.
    #[test]
    fn bits_do_not_depend_on_company() {
        for (rows, inner, cols) in [(1, 7, 3), (5, 80, 33), (33, 256, 40), (70, 257, 65), (40, 700, 130)] {
            let (a, b) = (numbers(rows * inner, 1), numbers(inner * cols, 2));
            let a_view = View::new(&a, rows, inner, inner);
            let b_view = View::new(&b, inner, cols, cols);
            let mut whole = vec![0.0; rows * cols];
            gemm(a_view, b_view, &mut whole, cols);
            for row in 0..rows {
                for part in [1, 3, cols] {
                    for first in (0..cols).step_by(part) {
                        let count = part.min(cols - first);
                        let expected: Vec<u32> =
                            whole[row * cols + first..][..count].iter().map(|x| x.to_bits()).collect();
                        let bits = |b: View<'_>| {
                            let mut c = vec![0.0; count];
                            gemm(a_view.slice_rows(row, 1), b.slice_cols(first, count), &mut c, count);
                            c.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
                        };
                        assert_eq!(bits(b_view), expected);
                    }
                }
            }
            for threads in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut parallel = vec![0.0; rows * cols];
                pool.install(|| gemm_parallel(a_view, b_view, &mut parallel));
                assert!(whole.iter().zip(&parallel).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
    }
}
