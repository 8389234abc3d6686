//! Nothing read from a disk is believed before it has passed here.
//!
//! The order: place in the table, header against its checksum, header against the table and the name asked for, decompression
//! bounded by the authenticated length, content against its digest. That proves the stored bytes too; their own checksum is
//! asked only where it fails, for whether they are what was written.

use std::cell::RefCell;
use std::sync::Arc;

use esker_prefix::ObjectId;

use crate::MissKind;
use crate::codec;
use crate::io::{AlignedBuf, BufferPool};
use crate::record::{Codec, PlacedHeader, Plane, RecordHeader};
use crate::sealing::{self, OpenError, Sealer, TAG_BYTES};
use crate::table::Located;

/// The header at the start of `bytes`, if it is the one that the table means by `located` for `id`, in a segment of
/// this generation.
pub(crate) fn header(
    bytes: &[u8],
    id: ObjectId,
    located: &Located,
    generation: u64,
) -> Result<RecordHeader, MissKind> {
    let found = PlacedHeader::decode(bytes).map_err(|_| MissKind::HeaderChecksum)?;
    // Half a checksum of BLAKE3 over all of the header stands for every field that is not compared.
    let same = found.header.id == id
        && found.place == located.spot.in_generation(generation)
        && found.checksum.half() == located.checksum
        && found.record_bytes == located.record_bytes()
        && found.header.header_bytes() == located.header_bytes as usize;
    if same { Ok(found.header) } else { Err(MissKind::WrongRecord) }
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
            Some(decode(plane, stored, pool).map_err(|kind| blame(plane, stored, kind))?)
        }
    };
    let content = decoded.as_deref().map_or(stored, |buf| &buf[..plane.raw_bytes as usize]);
    match *blake3::hash(content).as_bytes() == plane.digest {
        true => Ok(decoded),
        false if decoded.is_none() => Err(MissKind::Digest),
        false => Err(blame(plane, stored, MissKind::Digest)),
    }
}

/// Why a plane that was stored encoded failed in this way: mostly because its bytes are not those that were written.
fn blame(plane: &Plane, stored: &[u8], kind: MissKind) -> MissKind {
    if xxhash_rust::xxh3::xxh3_64(stored) == plane.stored_checksum { kind } else { MissKind::PlaneChecksum }
}

/// The content of a plane of a sealed record.
pub(crate) fn sealed_plane(
    header: &RecordHeader,
    index: usize,
    stored: &[u8],
    pool: &Arc<BufferPool>,
    sealer: Option<&dyn Sealer>,
) -> Result<AlignedBuf, MissKind> {
    let (plane, seal) = (&header.planes[index], header.seal.ok_or(MissKind::WrongRecord)?);
    let sealer = sealer.ok_or(MissKind::NoKey)?;
    let index = u32::try_from(index).map_err(|_| MissKind::WrongRecord)?;
    let mut buf = pool.take(stored.len());
    let bytes = &mut buf[..stored.len()];
    bytes.copy_from_slice(stored);
    // The tag proves more than the checksum does, which is for those who have no key.
    sealer.open(&seal, index, &sealing::about(&header.into(), index, plane), bytes).map_err(|error| {
        match error {
            OpenError::NoKey => MissKind::NoKey,
            OpenError::Forged => MissKind::PlaneChecksum,
        }
    })?;
    let content = match plane.codec {
        Codec::Raw => buf,
        Codec::Zstd | Codec::Columns => decode(plane, &buf[..stored.len() - TAG_BYTES], pool)?,
    };
    if *blake3::hash(&content[..plane.raw_bytes as usize]).as_bytes() != plane.digest {
        return Err(MissKind::Digest);
    }
    Ok(content)
}

/// Whether the stored bytes of a plane are those that were written. Needs no key: of a sealed plane the checksum is all that is
/// looked at.
pub(crate) fn stored(
    header: &RecordHeader,
    plane: &Plane,
    stored: &[u8],
    pool: &Arc<BufferPool>,
) -> Result<(), MissKind> {
    if header.seal.is_none() {
        return self::plane(plane, stored, pool).map(drop);
    }
    if xxhash_rust::xxh3::xxh3_64(stored) == plane.stored_checksum {
        Ok(())
    } else {
        Err(MissKind::PlaneChecksum)
    }
}

/// The same of all planes of a record.
pub(crate) fn stored_record(
    header: &RecordHeader,
    record: &[u8],
    pool: &Arc<BufferPool>,
) -> Result<(), MissKind> {
    header.planes.iter().try_for_each(|plane| stored(header, plane, &record[plane.range()], pool))
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
