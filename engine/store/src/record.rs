//! Records: one object on disk.
//!
//! A record starts on a page boundary of its segment and fills whole pages: header, plane table, planes. All
//! numbers are little-endian; offsets count from the start of the record.
//!
//! ```text
//!   0   8  magic "EskrRec\0"            first, so that a scan can pass over other pages at once
//!   8   2  version, 1; 2 if it is sealed (sealing.rs)
//!  10   1  kind of the object
//!  11   1  kind of the parent, 0 for a root
//!  12   1  TTL class
//!  13   1  zero
//!  14   2  number of planes, n
//!  16   4  header length in bytes, 256 + 64 n
//!  20   4  record length in pages
//!  24   8  sequence: position in the order of all commits of the store; of two records with one id the higher holds
//!  32   8  segment id                   these three bind the record to its place, so that neither a misdirected
//!  40   8  segment generation           write nor bytes made to look like a record pass for one
//!  48   8  offset in the segment, in bytes
//!  56   8  tokens
//!  64   8  raw bytes of all planes
//!  72   4  store time of the put, in seconds (clock.rs)
//!  76   4  number of the writer, 0 if none was named
//!  80  32  hash of the object
//! 112  32  hash of the parent, zero for a root
//! 144  32  namespace
//! 176  16  scope tag
//! 192  32  content digest: BLAKE3 of the plane digests in order
//! 224   4  number of the key by which the planes are sealed, 0 if they are not
//! 228  12  salt of the seal, zero if there is none
//! 240  16  header checksum: first 16 bytes of BLAKE3 over 0..240 and the plane table
//! 256      plane table, 64 bytes a plane:
//!   0   2  group
//!   2   2  first layer
//!   4   2  layers
//!   6   1  codec: 0 raw, 1 zstd, 2 columns (codec.rs)
//!   7   1  zero
//!   8   4  offset
//!  12   4  stored length in bytes
//!  16   4  raw length in bytes
//!  20   4  zero
//!  24   8  XXH3-64 of the stored bytes; zero if raw and not sealed, where the digest covers the very same bytes
//!  32  32  BLAKE3 of the raw bytes
//! ```
//!
//! Planes follow in table order, each at the next multiple of 64 bytes. A plane that is read alone costs a page more
//! than if it started on one; planes on pages would cost every write and every whole read half a page for each, which was 3 %
//! of a V4-Flash block. Records of earlier builds have planes of 64 KiB and more on pages; the table says where, and both
//! are read. Padding is zero and covered by nothing.

use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeTag, WriterId};

use crate::TtlClass;
use crate::fields::{Reader, Writer, narrow};
use crate::io::{PAGE, page_ceil};
use crate::sealing::{Seal, TAG_BYTES};
use crate::segment::{Place, SegmentId};

pub(crate) const MAGIC: &[u8; 8] = b"EskrRec\0";
const VERSION: u16 = 1;
const SEALED_VERSION: u16 = 2;
pub(crate) const FIXED_BYTES: usize = 256;
pub(crate) const CHECKSUM_AT: usize = 240;
const PLANE_BYTES: usize = 64;
/// Planes start at multiples of this, so that vectors over them are aligned.
const PLANE_ALIGNMENT: usize = 64;
/// Caps the header at 256 KiB, before any length in it is trusted.
pub(crate) const MAX_PLANES: usize = 4092;
pub(crate) const MAX_HEADER_BYTES: usize = FIXED_BYTES + MAX_PLANES * PLANE_BYTES;

/// First half of a BLAKE3 digest over a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeaderChecksum(pub(crate) [u8; 16]);

/// BLAKE3 over the digests of an object's planes: equal for equal content, whatever the codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContentDigest(pub(crate) [u8; 32]);

/// How a plane's bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Codec {
    Raw = 0,
    Zstd = 1,
    /// By columns of known shape, see `codec.rs`.
    Columns = 2,
}

/// What a record says about itself, apart from its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) id: ObjectId,
    pub(crate) parent: Option<ObjectId>,
    pub(crate) namespace: NamespaceId,
    pub(crate) scope: ScopeTag,
    pub(crate) writer: WriterId,
    pub(crate) class: TtlClass,
    pub(crate) tokens: u64,
    /// By what its planes are sealed.
    pub(crate) seal: Option<Seal>,
    pub(crate) planes: Vec<Plane>,
}

/// One row of the plane table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plane {
    pub(crate) group: u16,
    pub(crate) first_layer: u16,
    pub(crate) layers: u16,
    pub(crate) codec: Codec,
    pub(crate) offset: u32,
    pub(crate) stored_bytes: u32,
    pub(crate) raw_bytes: u32,
    pub(crate) stored_checksum: u64,
    pub(crate) digest: [u8; 32],
}

/// A header as found on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlacedHeader {
    pub(crate) header: RecordHeader,
    pub(crate) place: Place,
    pub(crate) sequence: u64,
    pub(crate) time_s: u32,
    pub(crate) record_bytes: usize,
    pub(crate) checksum: HeaderChecksum,
}

/// Why bytes are not a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotAHeader {
    /// They do not start like one.
    Magic,
    /// They start like one of this many bytes, more than were given.
    NeedsBytes(usize),
    /// They start like one and are damaged.
    Damaged,
}

impl HeaderChecksum {
    /// What the resident table keeps of it.
    pub(crate) fn half(&self) -> u64 {
        let mut half = [0; 8];
        half.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(half)
    }
}

impl RecordHeader {
    pub(crate) fn header_bytes(&self) -> usize {
        header_bytes(self.planes.len())
    }

    pub(crate) fn raw_bytes(&self) -> u64 {
        self.planes.iter().map(|plane| u64::from(plane.raw_bytes)).sum()
    }

    pub(crate) fn content_digest(&self) -> ContentDigest {
        content_digest(self.planes.iter().map(|plane| &plane.digest))
    }

    /// Bytes of the whole record.
    pub(crate) fn record_bytes(&self) -> usize {
        page_ceil(self.planes.last().map_or(self.header_bytes(), |plane| plane.range().end))
    }

    /// Writes the header to the start of `record`.
    pub(crate) fn encode(
        &self,
        place: Place,
        sequence: u64,
        time_s: u32,
        record: &mut [u8],
    ) -> HeaderChecksum {
        let out = &mut record[..self.header_bytes()];
        let record_pages = narrow(self.record_bytes() / PAGE);
        let planes = u16::try_from(self.planes.len()).expect("checked against MAX_PLANES");
        let mut writer = Writer::new(out);
        let version = if self.seal.is_some() { SEALED_VERSION } else { VERSION };
        let Seal { key, salt } = self.seal.unwrap_or(Seal { key: 0, salt: [0; 12] });
        writer.bytes(MAGIC).u16(version).u8(self.id.kind as u8);
        writer.u8(self.parent.map_or(0, |parent| parent.kind as u8)).u8(self.class.0).u8(0);
        writer.u16(planes).u32(narrow(self.header_bytes())).u32(record_pages);
        writer.u64(sequence).u64(place.segment.0).u64(place.generation).u64(place.offset);
        writer.u64(self.tokens).u64(self.raw_bytes()).u32(time_s).u32(self.writer.0);
        writer.bytes(&self.id.hash.0).bytes(&self.parent.map_or([0; 32], |parent| parent.hash.0));
        writer.bytes(&self.namespace.0).bytes(&self.scope.0).bytes(&self.content_digest().0);
        writer.u32(key).bytes(&salt).bytes(&[0; 16]);
        for plane in &self.planes {
            writer.u16(plane.group).u16(plane.first_layer).u16(plane.layers).u8(plane.codec as u8).u8(0);
            writer.u32(plane.offset).u32(plane.stored_bytes).u32(plane.raw_bytes).u32(0);
            writer.u64(plane.stored_checksum).bytes(&plane.digest);
        }
        let checksum = checksum(out);
        out[CHECKSUM_AT..FIXED_BYTES].copy_from_slice(&checksum.0);
        checksum
    }
}

impl PlacedHeader {
    /// Reads the header at the start of `bytes`. Everything in it is authenticated and within bounds afterwards.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, NotAHeader> {
        if !bytes.starts_with(MAGIC) {
            return Err(NotAHeader::Magic);
        }
        if bytes.len() < FIXED_BYTES {
            return Err(NotAHeader::NeedsBytes(FIXED_BYTES));
        }
        let mut reader = Reader::new(bytes);
        reader.bytes::<8>();
        let version = reader.u16();
        let [kind, parent_kind, class, _] = reader.bytes();
        let planes = usize::from(reader.u16());
        let (header_len, record_pages) = (reader.u32() as usize, reader.u32());
        let sealed = version == SEALED_VERSION;
        if !(sealed || version == VERSION) || planes > MAX_PLANES || header_len != header_bytes(planes) {
            return Err(NotAHeader::Damaged);
        }
        if bytes.len() < header_len {
            return Err(NotAHeader::NeedsBytes(header_len));
        }
        let bytes = &bytes[..header_len];
        let found = checksum(bytes);
        if bytes[CHECKSUM_AT..FIXED_BYTES] != found.0 {
            return Err(NotAHeader::Damaged);
        }
        let sequence = reader.u64();
        let place =
            Place { segment: SegmentId(reader.u64()), generation: reader.u64(), offset: reader.u64() };
        let (tokens, raw_bytes, time_s) = (reader.u64(), reader.u64(), reader.u32());
        let writer = WriterId(reader.u32());
        let (hash, parent_hash) = (BlockHash(reader.bytes()), BlockHash(reader.bytes()));
        let (namespace, scope) = (NamespaceId(reader.bytes()), ScopeTag(reader.bytes()));
        let digest = ContentDigest(reader.bytes());
        let seal = Seal { key: reader.u32(), salt: reader.bytes() };
        reader.bytes::<16>();
        let seal = sealed.then_some(seal);
        if seal.is_some_and(|seal| seal.key == 0) {
            return Err(NotAHeader::Damaged);
        }
        let record_bytes = record_pages as usize * PAGE;
        let planes = (0..planes)
            .map(|_| decode_plane(&mut reader))
            .collect::<Option<Vec<Plane>>>()
            .ok_or(NotAHeader::Damaged)?;
        let mut end = header_len;
        for plane in &planes {
            let range = plane.range();
            let tag_bytes = if sealed { TAG_BYTES as u64 } else { 0 };
            let content_bytes = u64::from(plane.stored_bytes).checked_sub(tag_bytes);
            let raw = plane.codec == Codec::Raw && content_bytes != Some(u64::from(plane.raw_bytes));
            if range.start < end || range.end > record_bytes || raw || content_bytes.is_none() {
                return Err(NotAHeader::Damaged);
            }
            end = range.end;
        }
        let kind = ObjectKind::from_u8(kind).ok_or(NotAHeader::Damaged)?;
        let parent = match parent_kind {
            0 => None,
            byte => {
                let kind = ObjectKind::from_u8(byte).ok_or(NotAHeader::Damaged)?;
                Some(ObjectId { kind, hash: parent_hash })
            }
        };
        let (id, class) = (ObjectId { kind, hash }, TtlClass(class));
        let header = RecordHeader { id, parent, namespace, scope, writer, class, tokens, seal, planes };
        if header.raw_bytes() != raw_bytes
            || header.content_digest() != digest
            || header.record_bytes() != record_bytes
        {
            return Err(NotAHeader::Damaged);
        }
        Ok(Self { header, place, sequence, time_s, record_bytes, checksum: found })
    }
}

impl Plane {
    /// Where its stored bytes lie in the record.
    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        let start = self.offset as usize;
        start..start + self.stored_bytes as usize
    }

    /// What it holds.
    pub(crate) fn spec(&self) -> PlaneSpec {
        PlaneSpec {
            group: self.group,
            first_layer: self.first_layer,
            layers: self.layers,
            len_bytes: u64::from(self.raw_bytes),
        }
    }
}

/// Length of a header with this many planes.
pub(crate) fn header_bytes(planes: usize) -> usize {
    FIXED_BYTES + planes * PLANE_BYTES
}

/// Where the next plane goes when the record is filled up to `end`.
pub(crate) fn plane_offset(end: usize) -> usize {
    end.next_multiple_of(PLANE_ALIGNMENT)
}

pub(crate) fn content_digest<'a>(planes: impl Iterator<Item = &'a [u8; 32]>) -> ContentDigest {
    let mut hasher = blake3::Hasher::new();
    for digest in planes {
        hasher.update(digest);
    }
    ContentDigest(*hasher.finalize().as_bytes())
}

pub(crate) fn checksum(header: &[u8]) -> HeaderChecksum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..CHECKSUM_AT]).update(&header[FIXED_BYTES..]);
    let mut checksum = [0; 16];
    checksum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    HeaderChecksum(checksum)
}

fn decode_plane(reader: &mut Reader<'_>) -> Option<Plane> {
    let (group, first_layer, layers) = (reader.u16(), reader.u16(), reader.u16());
    let codec = match reader.u8() {
        0 => Codec::Raw,
        1 => Codec::Zstd,
        2 => Codec::Columns,
        _ => return None,
    };
    reader.u8();
    let (offset, stored_bytes, raw_bytes) = (reader.u32(), reader.u32(), reader.u32());
    reader.u32();
    let (stored_checksum, digest) = (reader.u64(), reader.bytes());
    Some(Plane {
        group,
        first_layer,
        layers,
        codec,
        offset,
        stored_bytes,
        raw_bytes,
        stored_checksum,
        digest,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests;
