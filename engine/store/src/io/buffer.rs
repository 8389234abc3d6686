//! Page-aligned buffers and the pool that recycles them.
//!
//! Invariants: address and capacity are multiples of [`PAGE`]; the memory is initialised (fresh buffers are zeroed,
//! recycled ones hold what they held before); a buffer has one owner, who is the operation while one is in flight.
//! Recycling is not only about the allocator: touching a fresh mebibyte costs the kernel as much as hashing it.
//!
//! Large buffers are cut out of a [`Region`] of huge pages: a transfer of a hundred scattered pages takes a virtual drive half as
//! long again as one of a single stretch. One region a disk may have registered with the kernel, so that its pages need not be
//! looked up and pinned for every transfer; what is cut from that is taken first.

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
/// From this size on buffers are cut out of huge pages, which are held for as long as any part of them is.
const HUGE_FROM_BYTES: usize = 256 << 10;

/// `len` rounded up to whole pages.
pub(crate) const fn page_ceil(len: usize) -> usize {
    len.next_multiple_of(PAGE)
}

/// Keeps free buffers, up to `retained_limit_bytes` of them; huge pages of which only a part is free count with that part.
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
    /// What a disk has registered, its parts, and their class.
    registered: Option<Arc<Region>>,
    parts: Vec<Memory>,
    parts_class: Option<usize>,
}

impl BufferPool {
    /// An empty pool.
    pub fn new(retained_limit_bytes: usize) -> Arc<Self> {
        Arc::new(Self { retained_limit_bytes, free: Mutex::default() })
    }

    /// Takes the memory of a registered region for its buffers of `slot_bytes`, a power of two of pages. One region a pool.
    pub fn add_region(&self, region: &Arc<Region>, slot_bytes: usize) {
        let (Some(class), size) = class(slot_bytes) else { return };
        assert_eq!(size, slot_bytes, "slots are powers of two of pages");
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.registered = Some(Arc::clone(region));
        free.parts = region.cut(slot_bytes);
        free.parts_class = Some(class);
    }

    /// A buffer of `len` bytes rounded up to whole pages. Its content is unspecified.
    pub fn take(self: &Arc<Self>, len: usize) -> AlignedBuf {
        let len = page_ceil(len.max(1));
        let (class, capacity) = class(len);
        let recycled = class.and_then(|class| {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.parts_class == Some(class)
                && let Some(part) = free.parts.pop()
            {
                return Some(part);
            }
            let memory = free.classes.get_mut(class)?.pop()?;
            free.retained_bytes -= memory.layout.size();
            Some(memory)
        });
        let memory =
            recycled.or_else(|| self.cut(class, capacity)).unwrap_or_else(|| Memory::zeroed(capacity));
        AlignedBuf { memory: Some(memory), len, pool: Arc::downgrade(self) }
    }

    /// A large buffer out of new huge pages, if there is room for what is left of these.
    fn cut(&self, class: Option<usize>, size: usize) -> Option<Memory> {
        class.filter(|_| size >= HUGE_FROM_BYTES)?;
        let rest_bytes = size.max(HUGE_PAGE) - size;
        let retained_bytes = self.free.lock().unwrap_or_else(PoisonError::into_inner).retained_bytes;
        if rest_bytes > 0 && retained_bytes + rest_bytes > self.retained_limit_bytes {
            return None;
        }
        let mut parts = Region::map(size.max(HUGE_PAGE))?.cut(size);
        let first = parts.pop();
        parts.into_iter().for_each(|part| self.give(part));
        first
    }

    fn give(&self, memory: Memory) {
        let size = memory.layout.size();
        let (Some(class), _) = class(size) else { return };
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // There anyway, and taken first.
        if let (Some(region), Some(registered)) = (&memory.region, &free.registered)
            && Arc::ptr_eq(region, registered)
        {
            free.parts.push(memory);
            return;
        }
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

/// One allocation, or a part of a region.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    /// Whose it is, if it is no allocation of its own.
    region: Option<Arc<Region>>,
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
        Self {
            start: NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout)),
            layout,
            region: None,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.region.is_none() {
            // SAFETY: allocated in `zeroed` with this very layout, and dropped once.
            unsafe { dealloc(self.start.as_ptr(), self.layout) }
        }
    }
}

/// Huge pages, where the system has them: fewer entries for the kernel and the device to walk.
const HUGE_PAGE: usize = 2 << 20;

/// A stretch of huge pages, for a disk to register or to cut buffers out of. Zeroed; unmapped when its last part is dropped.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    len: usize,
    mapped: (NonNull<u8>, usize),
    cut: std::sync::atomic::AtomicBool,
}

// SAFETY: the region itself gives nothing but its address and length; its bytes are reached through the parts that `cut`
// hands out once, each of which has one owner.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` bytes, rounded down to whole huge pages. `None` if there are none of these or the system has no memory.
    pub fn map(len: usize) -> Option<Arc<Self>> {
        let len = len / HUGE_PAGE * HUGE_PAGE;
        if len == 0 {
            return None;
        }
        let mapped_len = len + HUGE_PAGE;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), mapped_len, protection, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return None;
        }
        let mapped = NonNull::new(mapped.cast::<u8>())?;
        let skip = mapped.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: `skip` is below the huge page by which the mapping is longer.
        let start = unsafe { mapped.add(skip) };
        // SAFETY: the range lies within the mapping. It is advice; whether it is taken does not matter.
        unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        let cut = std::sync::atomic::AtomicBool::new(false);
        Some(Arc::new(Self { start, len, mapped: (mapped, mapped_len), cut }))
    }

    /// Where it starts, and its length in bytes.
    pub(crate) fn extent(&self) -> (*mut u8, usize) {
        (self.start.as_ptr(), self.len)
    }

    /// Whether all of these bytes are its.
    pub(crate) fn contains(&self, bytes: &[u8]) -> bool {
        let (at, start) = (bytes.as_ptr() as usize, self.start.as_ptr() as usize);
        at >= start && at + bytes.len() <= start + self.len
    }

    /// Its parts of `size` bytes. None the second time.
    fn cut(self: &Arc<Self>, size: usize) -> Vec<Memory> {
        let layout = Layout::from_size_align(size, PAGE).expect("a page-aligned size far below isize::MAX");
        if self.cut.swap(true, std::sync::atomic::Ordering::Relaxed) {
            return Vec::new();
        }
        let part = |index: usize| Memory {
            // SAFETY: the part lies within the region.
            start: unsafe { self.start.add(index * size) },
            layout,
            region: Some(Arc::clone(self)),
        };
        (0..self.len / size).map(part).collect()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody has a part of it any more: parts hold the region.
        unsafe { libc::munmap(self.mapped.0.as_ptr().cast(), self.mapped.1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_gives_its_parts_first_and_outlives_its_pool() {
        let region = Region::map(5 << 20).unwrap();
        assert_eq!(region.extent().1, 4 << 20, "whole huge pages");
        let pool = BufferPool::new(8 << 20);
        pool.add_region(&region, 1 << 20);
        let mut all: Vec<AlignedBuf> = (0..6).map(|_| pool.take(1 << 20)).collect();
        let mine = |buf: &AlignedBuf| region.contains(buf);
        assert_eq!(all.iter().filter(|buf| mine(buf)).count(), 4, "each part once");
        all.iter_mut().for_each(|buf| buf.fill(7));
        all.reverse();
        drop(all);
        let again: Vec<AlignedBuf> = (0..4).map(|_| pool.take(1 << 20)).collect();
        assert!(again.iter().all(mine), "before the others");
        assert!(!mine(&pool.take(4096)), "parts are for large buffers");
        drop((pool, region));
        assert!(again.iter().all(|buf| buf.iter().all(|&byte| byte == 7)));
        assert!(Region::map(4096).is_none());
    }

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
    fn large_buffers_share_huge_pages_and_come_back() {
        let pool = BufferPool::new(4 << 20);
        let mut all: Vec<AlignedBuf> = (0..4).map(|_| pool.take(500 << 10)).collect();
        let mut places: Vec<usize> = all.iter().map(|buf| buf.as_ptr() as usize).collect();
        places.sort_unstable();
        assert_eq!(places[0] % HUGE_PAGE, 0);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] == 512 << 10), "{places:x?}");
        all.iter_mut().for_each(|buf| buf.fill(7));
        drop(all);
        assert!((0..4).all(|_| places.contains(&(pool.take(300 << 10).as_ptr() as usize))));
        assert_eq!(pool.take(5 << 20).as_ptr() as usize % HUGE_PAGE, 0);
        // What outlives its pool keeps its memory.
        let kept = pool.take(1 << 20);
        drop(pool);
        assert!(kept.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_limit() {
        let pool = BufferPool::new(PAGE);
        drop((pool.take(PAGE), pool.take(PAGE), pool.take(1 << 25)));
        assert_eq!(pool.free.lock().unwrap().retained_bytes, PAGE);
    }
}
