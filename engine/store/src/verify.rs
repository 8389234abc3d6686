//! Nothing read from a disk is believed before it has passed here.
//!
//! The order: index entry, header against its checksum, header against the entry and the name asked for, stored
//! bytes of a plane against their checksum, decompression bounded by the authenticated length, content against its
//! digest.

use std::cell::RefCell;
use std::sync::Arc;

use esker_prefix::ObjectId;

use crate::MissKind;
use crate::codec;
use crate::index::Entry;
use crate::io::{AlignedBuf, BufferPool};
use crate::record::{Codec, PlacedHeader, Plane, RecordHeader};

/// The header at the start of `bytes`, if it is the one that `entry` points at for `id`.
pub(crate) fn header(bytes: &[u8], id: ObjectId, entry: &Entry) -> Result<RecordHeader, MissKind> {
    let found = PlacedHeader::decode(bytes).map_err(|_| MissKind::HeaderChecksum)?;
    // The entry holds every field of the header that is not a function of the plane table, and the checksum over all.
    if found.header.id != id || Entry::of(&found) != *entry {
        return Err(MissKind::WrongRecord);
    }
    Ok(found.header)
}

/// The content of a plane from its stored bytes: `None` if the stored bytes are the content.
pub(crate) fn plane(
    plane: &Plane,
    stored: &[u8],
    pool: &Arc<BufferPool>,
) -> Result<Option<AlignedBuf>, MissKind> {
    let decoded = match plane.codec {
        Codec::Raw => None,
        Codec::Zstd | Codec::Columns => {
            if xxhash_rust::xxh3::xxh3_64(stored) != plane.stored_checksum {
                return Err(MissKind::PlaneChecksum);
            }
            Some(decode(plane, stored, pool)?)
        }
    };
    let content = decoded.as_deref().map_or(stored, |buf| &buf[..plane.raw_bytes as usize]);
    if *blake3::hash(content).as_bytes() != plane.digest {
        return Err(MissKind::Digest);
    }
    Ok(decoded)
}

thread_local! {
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decompresses a plane. The buffer may be longer than the plane.
pub(crate) fn decode(plane: &Plane, stored: &[u8], pool: &Arc<BufferPool>) -> Result<AlignedBuf, MissKind> {
    let mut out = pool.take(plane.raw_bytes as usize);
    let room = &mut out[..plane.raw_bytes as usize];
    if plane.codec == Codec::Columns {
        return codec::decode(stored, room).map(|()| out).map_err(|_| MissKind::Decode);
    }
    let written = DECOMPRESSOR.with_borrow_mut(|decompressor| {
        if decompressor.is_none() {
            *decompressor = zstd::bulk::Decompressor::new().ok();
        }
        decompressor.as_mut()?.decompress_to_buffer(stored, room).ok()
    });
    if written == Some(plane.raw_bytes as usize) { Ok(out) } else { Err(MissKind::Decode) }
}
