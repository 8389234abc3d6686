//! Page-aligned buffers and the pool that recycles them.
//!
//! Invariants: address and capacity are multiples of [`PAGE`]; the memory is initialised (fresh buffers are zeroed,
//! recycled ones hold what they held before); a buffer has one owner, who is the operation while one is in flight.
//! Recycling is not only about the allocator: touching a fresh mebibyte costs the kernel as much as hashing it.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;

/// Unit of alignment for address, offset and length of every transfer, in bytes.
pub const PAGE: usize = 4096;

/// Size classes are powers of two from one page up to this; larger buffers are not kept.
const MAX_POOLED_BYTES: usize = 16 << 20;

/// `len` rounded up to whole pages.
pub(crate) const fn page_ceil(len: usize) -> usize {
    len.next_multiple_of(PAGE)
}

/// Keeps free buffers, up to `retained_limit_bytes` of them.
#[derive(Debug)]
pub struct BufferPool {
    retained_limit_bytes: usize,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// Position `n` holds buffers of `PAGE << n` bytes.
    classes: Vec<Vec<Memory>>,
    retained_bytes: usize,
}

impl BufferPool {
    /// An empty pool.
    pub fn new(retained_limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self { retained_limit_bytes, free: Mutex::default() })
    }

    /// A buffer of `len` bytes rounded up to whole pages. Its content is unspecified.
    pub fn take(self: &Arc<Self>, len: usize) -> AlignedBuf {
        let len = page_ceil(len.max(1));
        let (class, capacity) = class(len);
        let recycled = class.and_then(|class| {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let memory = free.classes.get_mut(class)?.pop()?;
            free.retained_bytes -= memory.layout.size();
            Some(memory)
        });
        let memory = recycled.unwrap_or_else(|| Memory::zeroed(capacity));
        AlignedBuf { memory: Some(memory), len, pool: Arc::downgrade(self) }
    }

    fn give(&self, memory: Memory) {
        let size = memory.layout.size();
        let (Some(class), _) = class(size) else { return };
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.retained_bytes + size > self.retained_limit_bytes {
            return;
        }
        if free.classes.len() <= class {
            free.classes.resize_with(class + 1, Vec::new);
        }
        free.retained_bytes += size;
        free.classes[class].push(memory);
    }
}

/// Class and capacity for `len` bytes, a positive multiple of the page size.
fn class(len: usize) -> (Option<usize>, usize) {
    if len > MAX_POOLED_BYTES {
        return (None, len);
    }
    let pages = (len / PAGE).next_power_of_two();
    (Some(pages.trailing_zeros() as usize), pages * PAGE)
}

/// An owned buffer, aligned to [`PAGE`]. Goes back to its pool when dropped.
pub struct AlignedBuf {
    /// `None` only while being dropped.
    memory: Option<Memory>,
    len: usize,
    pool: Weak<BufferPool>,
}

impl AlignedBuf {
    /// Shares the buffer without copying; the pool has it back when the last part of it is dropped.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Cuts the buffer to `len` bytes rounded up to whole pages.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(page_ceil(len));
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("present until drop")
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `memory` is a live allocation of at least `len` initialised bytes (zeroed when made), owned by
        // `self`, and `&self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.memory().start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.memory().start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if let (Some(memory), Some(pool)) = (self.memory.take(), self.pool.upgrade()) {
            pool.give(memory);
        }
    }
}

/// One allocation.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Memory` owns its allocation alone and has no interior mutability; which thread frees it does not matter.
unsafe impl Send for Memory {}
// SAFETY: a shared `Memory` gives nothing but its address and layout; access goes through the owner's borrow.
unsafe impl Sync for Memory {}

impl Memory {
    fn zeroed(size: usize) -> Self {
        let layout = Layout::from_size_align(size, PAGE).expect("a page-aligned size far below isize::MAX");
        // SAFETY: the layout's size is positive: callers round up to at least one page.
        let start = unsafe { alloc_zeroed(layout) };
        Self { start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, and dropped once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufferPool::new(1 << 20);
        let mut buf = pool.take(5000);
        assert_eq!(buf.len(), 2 * PAGE);
        let first = buf.as_mut_ptr();
        assert_eq!(first as usize % PAGE, 0);
        buf[0] = 7;
        let bytes = buf.into_bytes().slice(0..1);
        drop(bytes);
        assert_eq!(pool.take(8000).as_mut_ptr(), first, "recycled");
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_limit() {
        let pool = BufferPool::new(PAGE);
        drop((pool.take(PAGE), pool.take(PAGE), pool.take(1 << 25)));
        assert_eq!(pool.free.lock().unwrap().retained_bytes, PAGE);
    }
}
