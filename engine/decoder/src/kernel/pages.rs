//! Memory for rows, which come in megabytes and are touched for the first time as they come.

/// Of a huge page.
const HUGE_BYTES: usize = 2 << 20;

/// Makes room for `count` more numbers, in huge pages where the system has them: to be given 4 KiB at a time costs about as
/// much as decoding what goes there.
pub(crate) fn reserve(rows: &mut Vec<f32>, count: usize) {
    let before = rows.capacity();
    rows.reserve(count);
    if rows.capacity() > before {
        advise(rows);
    }
}

#[cfg(target_os = "linux")]
fn advise(rows: &mut Vec<f32>) {
    let spare = rows.spare_capacity_mut();
    let bytes = spare.as_mut_ptr().cast::<u8>();
    let skipped = bytes.align_offset(HUGE_BYTES);
    let Some(left) = size_of_val(spare).checked_sub(skipped) else { return };
    let len = left / HUGE_BYTES * HUGE_BYTES;
    if len > 0 {
        // SAFETY: whole pages within the vector's own allocation, of which the advice changes no content. That it was not
        // taken costs time alone.
        #[allow(unsafe_code)]
        unsafe {
            libc::madvise(bytes.add(skipped).cast(), len, libc::MADV_HUGEPAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &mut Vec<f32>) {}
