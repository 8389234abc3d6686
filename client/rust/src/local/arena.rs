//! The arena as this process has it mapped.
//!
//! The node writes to it at any time, so nothing here makes a reference to its memory: bytes are copied out, and used only if the
//! stamp of their slot is unchanged after that. The node sealed the file at its length, so no access faults.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use bytes::Bytes;
use esker_proto::{WireError, v1};
use memmap2::{MmapOptions, MmapRaw};
use prost::Message;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::{ClientError, Result};

/// A node that is there answers at once.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_FRAME_BYTES: usize = 4096;

/// See the module.
pub(super) struct Arena {
    attached: v1::Attached,
    file: File,
    map: MmapRaw,
    /// The arena lives as long as this.
    _connection: UnixStream,
}

impl Arena {
    /// Receives one from the socket beside `path`. Blocks.
    pub(super) fn attach(path: &Path) -> Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(".arena");
        let fail = |source| ClientError::Attach { path: path.display().to_string(), source };
        let mut connection = UnixStream::connect(&name).map_err(fail)?;
        connection.set_read_timeout(Some(ATTACH_TIMEOUT)).map_err(fail)?;
        let (frame, file) = receive(&mut connection).map_err(fail)?;
        let attached = v1::Attached::decode(&frame[..]).map_err(|error| fail(io::Error::other(error)))?;
        if !attached.refused.is_empty() {
            return Err(fail(io::Error::new(io::ErrorKind::PermissionDenied, attached.refused)));
        }
        let file = file.ok_or_else(|| fail(io::Error::other("no descriptor came with the arena")))?;
        if !fits(&attached, file.metadata().map_err(fail)?.len()) {
            return Err(fail(io::Error::other("the arena is not as its description says")));
        }
        let len = usize::try_from(attached.arena_bytes).map_err(|error| fail(io::Error::other(error)))?;
        let map = MmapOptions::new().len(len).map_raw(&file).map_err(fail)?;
        Ok(Self { attached, file, map, _connection: connection })
    }

    pub(super) fn id(&self) -> Bytes {
        self.attached.arena.clone()
    }

    /// Where this process may write.
    pub(super) fn put_area(&self) -> Range<u64> {
        self.attached.put_at..self.attached.arena_bytes
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(ClientError::Arena)
    }

    /// Whether a slot and its parts are within the arena.
    pub(super) fn check(&self, filled: &v1::FilledSlot) -> Result<()> {
        if holds(&self.attached, filled) {
            return Ok(());
        }
        Err(WireError::Sequence("a filled slot reaches beyond the arena".into()).into())
    }

    /// Copies from a slot that was checked.
    pub(super) fn copy(&self, slot: u32, at: usize, out: &mut [u8]) {
        assert!(at + out.len() <= self.attached.slot_bytes as usize, "within the slot");
        let from = self.as_ptr(slot, at);
        // SAFETY: `from` and the bytes behind it lie in the mapping: the slot and the length were compared with the arena's
        // description, which was compared with the file, which cannot shrink. `out` is memory of the caller's and cannot overlap
        // the mapping. The node may write meanwhile; then `out` holds some bytes or others, each of which is a `u8`, and the
        // stamp tells.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
    }

    pub(super) fn as_ptr(&self, slot: u32, at: usize) -> *const u8 {
        assert!(slot < self.attached.slots && at <= self.attached.slot_bytes as usize, "within the arena");
        let slots_at = usize::try_from(self.attached.slots_at).unwrap_or(usize::MAX);
        let offset = slots_at + slot as usize * self.attached.slot_bytes as usize + at;
        self.map.as_ptr().wrapping_add(offset)
    }

    /// The stamp of a slot as it is now, after everything that was read before.
    pub(super) fn stamp(&self, slot: u32) -> u64 {
        assert!(slot < self.attached.slots, "within the arena");
        fence(Ordering::Acquire);
        let stamp = self.map.as_ptr().cast::<[u8; 8]>().wrapping_add(slot as usize);
        // SAFETY: the stamps lie in the mapping, as was compared when it was made; `[u8; 8]` needs no alignment. Volatile, because
        // the node changes them.
        u64::from_le_bytes(unsafe { stamp.read_volatile() })
    }
}

/// Whether stamps, slots and the put area lie in this order within a file of so many bytes. Every address in the mapping is made of
/// these numbers, so none of them may run over here.
fn fits(attached: &v1::Attached, file_bytes: u64) -> bool {
    let slots_bytes = u64::from(attached.slots) * u64::from(attached.slot_bytes);
    let slots_end = attached.slots_at.checked_add(slots_bytes);
    u64::from(attached.slots) * 8 <= attached.slots_at
        && slots_end.is_some_and(|end| end <= attached.put_at)
        && attached.put_at <= attached.arena_bytes
        && attached.arena_bytes <= file_bytes
}

/// Whether what a slot is said to hold lies within it.
fn holds(attached: &v1::Attached, filled: &v1::FilledSlot) -> bool {
    let within =
        |part: &v1::LocalPart| u64::from(part.at) + u64::from(part.bytes) <= u64::from(attached.slot_bytes);
    filled.slot < attached.slots && filled.parts.iter().all(within)
}

/// For fuzzing: bytes of a file (u64, little-endian), the length of an arena's description (u8), it, and a filled slot. Whether the
/// arena is taken.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let Some((file_bytes, rest)) = bytes.split_first_chunk() else { return false };
    let file_bytes = u64::from_le_bytes(*file_bytes);
    let Some((&len, rest)) = rest.split_first() else { return false };
    let Some((attached, filled)) = rest.split_at_checked(len.into()) else { return false };
    let Ok(attached) = v1::Attached::decode(attached) else { return false };
    if !fits(&attached, file_bytes) {
        return false;
    }
    let slot_end =
        |slot: u32| u128::from(attached.slots_at) + (u128::from(slot) + 1) * u128::from(attached.slot_bytes);
    if let Some(last) = attached.slots.checked_sub(1) {
        assert!(slot_end(last) <= u128::from(attached.put_at) && attached.put_at <= file_bytes);
        assert!(u64::from(attached.slots) * 8 <= attached.slots_at, "a stamp in a slot");
    }
    let filled = v1::FilledSlot::decode(filled).ok().filter(|filled| holds(&attached, filled));
    for part in filled.iter().flat_map(|filled| &filled.parts) {
        assert!(part.at.checked_add(part.bytes).is_some_and(|end| end <= attached.slot_bytes));
    }
    true
}

/// One frame, and the descriptor that came with its first byte.
fn receive(connection: &mut UnixStream) -> io::Result<(Vec<u8>, Option<File>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut len = [0; 4];
    let received =
        recvmsg(&*connection, &mut [IoSliceMut::new(&mut len)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut file = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            file = descriptors.map(File::from).last();
        }
    }
    connection.read_exact(&mut len[received.bytes..])?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME_BYTES {
        return Err(io::Error::other(format!("a frame of {len} bytes: not an esker's arena socket")));
    }
    let mut frame = vec![0; len];
    connection.read_exact(&mut frame)?;
    Ok((frame, file))
}
