//! One client's shared memory: a memfd, its slots, and who holds them.
//!
//! Layout and rules for the client are in `proto/esker/v1/local.proto`. Here: a slot is free, or leased to a [`Call`] since a
//! moment; its stamp is written before its bytes, so that a reader who was too slow finds out. Which slots are whose is kept in the
//! node's memory and never read from the arena.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_proto::v1;
use esker_store::io::AlignedBuf;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};

const PAGE: u64 = 4096;
/// Slots hold what the store reads at a time.
const SLOT_BYTES: u64 = 1 << 20;
/// As much as one fetch of the store reads ahead.
const SLOTS: u64 = 16;
/// Where a client puts what it wants stored.
const PUT_BYTES: u64 = 32 << 20;
const SLOTS_AT: u64 = PAGE;
const PUT_AT: u64 = SLOTS_AT + SLOTS * SLOT_BYTES;
const ARENA_BYTES: u64 = PUT_AT + PUT_BYTES;
const _: () = assert!(SLOTS * 8 <= PAGE, "the stamps fill one page at most");

/// See the module.
pub(crate) struct Arena {
    file: File,
    /// How long a slot stays as it was filled.
    lease: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Free slots; the one that was in use last is taken first, as its pages are in the processor's caches.
    free: Vec<u32>,
    leased: Vec<Option<Lease>>,
    next_stamp: u64,
    next_call: u64,
    closed: bool,
}

#[derive(Clone, Copy)]
struct Lease {
    call: u64,
    since: Instant,
}

/// Why a slot cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotError {
    /// The connection that the arena lives with has ended.
    Closed,
    /// A slot was not released in time.
    LeaseOver,
    /// The caller's deadline came first.
    Deadline,
    /// The caller has closed its side.
    CallOver,
}

/// Why what a client says it has put is not taken.
#[derive(Debug)]
pub(crate) enum TakeError {
    /// It is not in the put area.
    Outside,
    /// The connection that the arena lives with has ended.
    Closed,
    /// The arena cannot be read.
    Unread(std::io::Error),
}

impl Arena {
    /// Takes no memory until it is written to.
    pub(crate) fn new(lease: Duration) -> std::io::Result<Self> {
        let file = File::from(memfd_create("esker-arena", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.set_len(ARENA_BYTES)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let slots = u32::try_from(SLOTS).expect("few");
        let state = State {
            free: (0..slots).rev().collect(),
            leased: vec![None; slots as usize],
            next_stamp: 1,
            next_call: 0,
            closed: false,
        };
        Ok(Self { file, lease, state: Mutex::new(state), changed: Condvar::new() })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What a client must know of it.
    pub(crate) fn describe(&self, arena: Bytes) -> v1::Attached {
        v1::Attached {
            arena,
            arena_bytes: ARENA_BYTES,
            slots: u32::try_from(SLOTS).expect("few"),
            slot_bytes: u32::try_from(SLOT_BYTES).expect("a mebibyte"),
            slots_at: SLOTS_AT,
            put_at: PUT_AT,
            lease_ms: u32::try_from(self.lease.as_millis()).unwrap_or(u32::MAX),
            refused: String::new(),
            together: true,
        }
    }

    /// A call that may hold slots.
    pub(crate) fn call(self: &Arc<Self>) -> Call {
        let mut state = self.state();
        state.next_call += 1;
        Call { arena: Arc::clone(self), number: state.next_call }
    }

    /// Copies out what a client says it has put: a range of the put area. `into` gives memory for so many bytes, whole pages: what
    /// was in use before costs the kernel less than what is new.
    pub(crate) fn take(
        &self,
        at: u64,
        bytes: u64,
        into: impl FnOnce(usize) -> AlignedBuf,
    ) -> Result<Bytes, TakeError> {
        let end = at.checked_add(bytes).filter(|&end| at >= PUT_AT && end <= ARENA_BYTES);
        let bytes = end.and_then(|_| usize::try_from(bytes).ok()).ok_or(TakeError::Outside)?;
        let mut copy = into(bytes);
        self.file.read_exact_at(&mut copy[..bytes], at).map_err(TakeError::Unread)?;
        // Asked behind the copy: once the memory was given back it is zeros that were copied.
        if self.state().closed { Err(TakeError::Closed) } else { Ok(copy.into_bytes().slice(..bytes)) }
    }

    /// The client is gone: calls end, and the memory goes back although the client may still have it mapped.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
        self.give_back();
    }

    fn give_back(&self) {
        // The stamps first: who still reads finds that it comes too late.
        for (from, len) in [(0, PAGE), (PAGE, ARENA_BYTES - PAGE)] {
            let punched =
                fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, len);
            if let Err(error) = punched {
                tracing::warn!(%error, "the memory of an arena stays until its client unmaps it");
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One `FetchLocal`; its slots come back when it is dropped.
pub(crate) struct Call {
    arena: Arc<Arena>,
    number: u64,
}

impl Call {
    /// Waits for a free slot, and stamps it.
    pub(crate) fn slot(
        &self,
        deadline: Option<Instant>,
        over: impl Fn() -> bool,
    ) -> Result<FetchSlot, SlotError> {
        let mut state = self.arena.state();
        let (slot, stamp) = loop {
            if state.closed {
                return Err(SlotError::Closed);
            }
            if over() {
                return Err(SlotError::CallOver);
            }
            if let Some(slot) = state.free.pop() {
                state.leased[slot as usize] = Some(Lease { call: self.number, since: Instant::now() });
                let stamp = state.next_stamp;
                state.next_stamp += 1;
                break (slot, stamp);
            }
            state = self.wait(state, deadline)?;
        };
        drop(state);
        let slot = FetchSlot { slot, stamp, filled_bytes: 0 };
        let written = self.arena.file.write_all_at(&stamp.to_le_bytes(), u64::from(slot.slot) * 8);
        written.map_err(|error| {
            tracing::error!(%error, "an arena cannot be written");
            SlotError::Closed
        })?;
        Ok(slot)
    }

    /// Whether [`slot`](Self::slot) would not wait, unless another call comes first.
    pub(crate) fn has_free_slot(&self) -> bool {
        !self.arena.state().free.is_empty()
    }

    /// Takes a slot back that this call has filled. `false` if it holds no such slot.
    pub(crate) fn release(&self, slot: u32) -> bool {
        let mut state = self.arena.state();
        let held = state.leased.get(slot as usize).copied().flatten();
        let ours = held.is_some_and(|lease| lease.call == self.number);
        if ours {
            state.leased[slot as usize] = None;
            state.free.push(slot);
            drop(state);
            self.arena.changed.notify_all();
        }
        ours
    }

    /// Waits until every slot of this call was released.
    pub(crate) fn settled(
        &self,
        deadline: Option<Instant>,
        over: impl Fn() -> bool,
    ) -> Result<(), SlotError> {
        let mut state = self.arena.state();
        while state.leased.iter().flatten().any(|lease| lease.call == self.number) {
            if state.closed {
                return Err(SlotError::Closed);
            }
            if over() {
                return Ok(());
            }
            state = self.wait(state, deadline)?;
        }
        Ok(())
    }

    /// Something that others wait for has changed.
    pub(crate) fn wake(&self) {
        // Taken and let go, so that nobody is between its look and its sleep.
        drop(self.arena.state());
        self.arena.changed.notify_all();
    }

    /// Waits for a change, at most until the first lease of this call or the deadline is over.
    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, State>,
        deadline: Option<Instant>,
    ) -> Result<std::sync::MutexGuard<'a, State>, SlotError> {
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(SlotError::Deadline);
        }
        let own = state.leased.iter().flatten().filter(|lease| lease.call == self.number);
        let lease_end = own.map(|lease| lease.since + self.arena.lease).min();
        if lease_end.is_some_and(|end| end <= now) {
            return Err(SlotError::LeaseOver);
        }
        let until = [deadline, lease_end].into_iter().flatten().min().unwrap_or(now + self.arena.lease);
        let waited = self.arena.changed.wait_timeout(state, until.saturating_duration_since(now));
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut state = self.arena.state();
        for slot in 0..state.leased.len() {
            if state.leased[slot].is_some_and(|lease| lease.call == self.number) {
                state.leased[slot] = None;
                state.free.push(u32::try_from(slot).expect("few"));
            }
        }
        let closed = state.closed;
        drop(state);
        self.arena.changed.notify_all();
        if closed {
            // What was written after the client had gone.
            self.arena.give_back();
        }
    }
}

/// A slot that is being filled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FetchSlot {
    pub(crate) slot: u32,
    pub(crate) stamp: u64,
    filled_bytes: u64,
}

impl FetchSlot {
    /// Where parts of planes start.
    const ALIGNMENT: u64 = 64;

    /// Room that is left.
    pub(crate) fn room(&self) -> usize {
        usize::try_from(SLOT_BYTES - self.filled_bytes).expect("a mebibyte")
    }

    /// Room of an empty one.
    pub(crate) fn capacity() -> usize {
        usize::try_from(SLOT_BYTES).expect("a mebibyte")
    }

    /// Writes verified bytes behind what is there, and says where.
    pub(crate) fn write(&mut self, call: &Call, bytes: &[u8]) -> std::io::Result<u32> {
        assert!(bytes.len() <= self.room(), "a slot is filled up to its end at most");
        let at = self.filled_bytes;
        call.arena.file.write_all_at(bytes, SLOTS_AT + u64::from(self.slot) * SLOT_BYTES + at)?;
        self.filled_bytes = (at + bytes.len() as u64).next_multiple_of(Self::ALIGNMENT).min(SLOT_BYTES);
        Ok(u32::try_from(at).expect("a mebibyte"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never() -> bool {
        false
    }

    fn arena() -> Arc<Arena> {
        Arc::new(Arena::new(Duration::from_millis(20)).unwrap())
    }

    #[test]
    fn slots_run_out_come_back_and_are_stamped_anew() {
        let arena = arena();
        let (first, second) = (arena.call(), arena.call());
        let soon = Some(Instant::now() + Duration::from_millis(5));
        let slots: Vec<_> = (0..SLOTS).map(|_| first.slot(None, never).unwrap()).collect();
        assert_eq!(second.slot(soon, never).unwrap_err(), SlotError::Deadline);
        assert!(!second.release(slots[3].slot), "another call's");
        assert!(first.release(slots[3].slot) && !first.release(slots[3].slot) && !first.release(u32::MAX));
        let again = second.slot(soon, never).unwrap();
        assert_eq!(again.slot, slots[3].slot);
        assert!(again.stamp > slots[15].stamp);
        let mut stamp = [0; 8];
        arena.file.read_exact_at(&mut stamp, u64::from(again.slot) * 8).unwrap();
        assert_eq!(u64::from_le_bytes(stamp), again.stamp);
        drop(first);
        assert!(
            (1..SLOTS).all(|_| second.slot(soon, never).is_ok()),
            "a call that ends gives its slots back"
        );
    }

    #[test]
    fn a_lease_ends_a_call_that_releases_nothing() {
        let arena = arena();
        let call = arena.call();
        assert!((0..SLOTS).all(|_| call.slot(None, never).is_ok()));
        assert_eq!(call.slot(None, never).unwrap_err(), SlotError::LeaseOver);
        assert_eq!(call.settled(None, never), Err(SlotError::LeaseOver));
        assert_eq!(call.settled(None, || true), Ok(()));
    }

    #[test]
    fn a_closed_arena_ends_its_calls_and_keeps_no_memory() {
        let arena = arena();
        let call = arena.call();
        let mut slot = call.slot(None, never).unwrap();
        slot.write(&call, &[7; 5000]).unwrap();
        assert_eq!((slot.room(), FetchSlot::capacity()), ((1 << 20) - 5056, 1 << 20));
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&arena.file.metadata().unwrap());
        assert!(blocks() > 0);
        arena.close();
        assert_eq!(blocks(), 0);
        assert_eq!(call.slot(None, never).unwrap_err(), SlotError::Closed);
        slot.write(&call, &[7; 5000]).unwrap();
        drop(call);
        assert_eq!(blocks(), 0, "what was written late");
    }

    #[test]
    fn only_the_put_area_is_taken_from_and_the_length_is_sealed() {
        let arena = arena();
        arena.file.write_all_at(b"abc", PUT_AT).unwrap();
        let pool = esker_store::io::BufferPool::new(0);
        let take = |at, bytes| arena.take(at, bytes, |bytes| pool.take(bytes));
        assert_eq!(take(PUT_AT, 3).unwrap(), Bytes::from_static(b"abc"));
        for (at, bytes) in [(0, 8), (PUT_AT - 1, 2), (ARENA_BYTES, 1), (PUT_AT, PUT_BYTES + 1), (u64::MAX, 2)]
        {
            assert!(matches!(take(at, bytes), Err(TakeError::Outside)), "{at} {bytes}");
        }
        // Its memory goes back with its client: what is read then is nothing that anybody put.
        arena.close();
        assert!(matches!(take(PUT_AT, 3), Err(TakeError::Closed)));
        assert!(arena.file.set_len(0).is_err() && arena.file.set_len(ARENA_BYTES * 2).is_err());
    }
}
