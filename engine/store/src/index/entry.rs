//! Keys and values of the index.
//!
//! Numbers are little-endian, except in keys, which must sort.
//!
//! ```text
//! Key of an entry, 13 bytes: 0x01 | segment id u64 BE | page of the segment u32 BE
//! Entry, 208 bytes
//!   0   1  kind of the object
//!   1   1  kind of the parent, 0 for a root
//!   2   2  number of planes
//!   4   4  record length in pages
//!   8   8  raw bytes
//!  16   8  sequence
//!  24   8  tokens
//!  32  16  header checksum: another record at this place is noticed, however sound it is
//!  48  32  hash of the object
//!  80  32  hash of the parent, zero for a root
//! 112  16  scope tag
//! 128  32  namespace
//! 160  32  content digest: tells a repeated put from a conflicting one without a read
//! 192   1  pages up to the end of the first plane, at most 255
//! 193   1  TTL class
//! 194   2  zero
//! 196   4  store time of the put, in seconds
//! 200   4  number of the writer, 0 if none was named
//! 204   4  zero
//!
//! SegmentState, 26 bytes
//!   0   1  1 open, 2 sealed, 3 suspect
//!   1   1  zero
//!   2   8  generation
//!  10   8  watermark: records before this offset are in the index
//!  18   8  highest sequence before the watermark
//! ```

use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, ScopeTag, WriterId};

use crate::TtlClass;
use crate::fields::{Reader, Writer, narrow};
use crate::io::PAGE;
use crate::record::{ContentDigest, HeaderChecksum, MAX_PLANES, PlacedHeader, RecordHeader, header_bytes};
use crate::segment::{SegmentId, Spot};

const ENTRY_PREFIX: u8 = 0x01;
const ENTRY_KEY_BYTES: usize = 13;
const ENTRY_BYTES: usize = 208;
const STATE_BYTES: usize = 26;

/// Where an object's record is, and all that can be said of it without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: ObjectId,
    pub(crate) parent: Option<ObjectId>,
    pub(crate) spot: Spot,
    pub(crate) planes: u16,
    pub(crate) record_pages: u32,
    pub(crate) sequence: u64,
    pub(crate) tokens: u64,
    pub(crate) raw_bytes: u64,
    pub(crate) checksum: HeaderChecksum,
    pub(crate) scope: ScopeTag,
    pub(crate) namespace: NamespaceId,
    pub(crate) digest: ContentDigest,
    /// Pages from the start of the record to the end of its first plane, at most 255: what is read first.
    pub(crate) head_pages: u8,
    pub(crate) class: TtlClass,
    /// Store time of the put.
    pub(crate) time_s: u32,
    pub(crate) writer: WriterId,
}

impl Entry {
    /// The entry of a record.
    pub(crate) fn of(found: &PlacedHeader) -> Self {
        let header = &found.header;
        Self {
            id: header.id,
            parent: header.parent,
            spot: found.place.spot(),
            planes: u16::try_from(header.planes.len()).expect("checked against MAX_PLANES"),
            record_pages: narrow(found.record_bytes / PAGE),
            sequence: found.sequence,
            tokens: header.tokens,
            raw_bytes: header.raw_bytes(),
            checksum: found.checksum,
            scope: header.scope,
            namespace: header.namespace,
            digest: header.content_digest(),
            head_pages: head_pages(header),
            class: header.class,
            time_s: found.time_s,
            writer: header.writer,
        }
    }

    /// End of the record in its segment.
    pub(crate) fn end(&self) -> u64 {
        self.spot.offset.saturating_add(u64::from(self.record_pages) * PAGE as u64)
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let mut writer = Writer::new(&mut bytes);
        writer.u8(self.id.kind as u8).u8(self.parent.map_or(0, |parent| parent.kind as u8));
        writer.u16(self.planes).u32(self.record_pages);
        writer.u64(self.raw_bytes).u64(self.sequence).u64(self.tokens).bytes(&self.checksum.0);
        writer.bytes(&self.id.hash.0).bytes(&self.parent.map_or([0; 32], |parent| parent.hash.0));
        writer.bytes(&self.scope.0).bytes(&self.namespace.0).bytes(&self.digest.0);
        writer.u8(self.head_pages).u8(self.class.0).u16(0).u32(self.time_s).u32(self.writer.0);
        bytes
    }

    pub(crate) fn decode(spot: Spot, bytes: &[u8]) -> Option<Self> {
        if bytes.len() != ENTRY_BYTES {
            return None;
        }
        let mut reader = Reader::new(bytes);
        let (kind, parent_kind) = (reader.u8(), reader.u8());
        let (planes, record_pages) = (reader.u16(), reader.u32());
        let (raw_bytes, sequence, tokens) = (reader.u64(), reader.u64(), reader.u64());
        let checksum = HeaderChecksum(reader.bytes());
        let (hash, parent_hash) = (BlockHash(reader.bytes()), BlockHash(reader.bytes()));
        let parent = match parent_kind {
            0 => None,
            kind => Some(ObjectId { kind: ObjectKind::from_u8(kind)?, hash: parent_hash }),
        };
        let entry = Self {
            id: ObjectId { kind: ObjectKind::from_u8(kind)?, hash },
            parent,
            spot,
            planes,
            record_pages,
            sequence,
            tokens,
            raw_bytes,
            checksum,
            scope: ScopeTag(reader.bytes()),
            namespace: NamespaceId(reader.bytes()),
            digest: ContentDigest(reader.bytes()),
            head_pages: reader.u8(),
            class: TtlClass(reader.u8()),
            time_s: {
                reader.u16();
                reader.u32()
            },
            writer: WriterId(reader.u32()),
        };
        // What a read is sized by is checked before it is believed.
        let record_bytes = u64::from(record_pages) * PAGE as u64;
        let sound = usize::from(planes) <= MAX_PLANES
            && header_bytes(usize::from(planes)) as u64 <= record_bytes
            && record_bytes <= crate::settings::MAX_SEGMENT_BYTES
            && raw_bytes <= crate::settings::MAX_SEGMENT_BYTES;
        sound.then_some(entry)
    }
}

fn head_pages(header: &RecordHeader) -> u8 {
    let end = header.planes.first().map_or(header.header_bytes(), |plane| plane.range().end);
    u8::try_from(end.div_ceil(PAGE)).unwrap_or(u8::MAX)
}

/// The key of the entry of the record at `spot`.
pub(super) fn entry_key(spot: Spot) -> [u8; ENTRY_KEY_BYTES] {
    let mut key = [ENTRY_PREFIX; ENTRY_KEY_BYTES];
    key[1..9].copy_from_slice(&spot.segment.0.to_be_bytes());
    key[9..].copy_from_slice(
        &narrow(usize::try_from(spot.offset / PAGE as u64).unwrap_or(usize::MAX)).to_be_bytes(),
    );
    key
}

/// The spot of a key, if it is an entry's.
pub(super) fn spot_of(key: &[u8]) -> Option<Spot> {
    let (&[ENTRY_PREFIX], rest) = key.split_first_chunk()? else { return None };
    let (segment, page) = rest.split_first_chunk()?;
    let page = u32::from_be_bytes(page.try_into().ok()?);
    Some(Spot { segment: SegmentId(u64::from_be_bytes(*segment)), offset: u64::from(page) * PAGE as u64 })
}

/// First key behind all entries.
pub(super) const ENTRIES_END: [u8; 1] = [ENTRY_PREFIX + 1];

/// How far the index knows a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentState {
    pub(crate) phase: Phase,
    pub(crate) generation: u64,
    pub(crate) watermark: u64,
    pub(crate) sequence: u64,
}

/// Where a segment is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    Open = 1,
    Sealed = 2,
    /// A write or flush failed: what lies behind the watermark may be in memory only, whatever a read says.
    Suspect = 3,
}
impl SegmentState {
    pub(crate) fn encode(&self) -> [u8; STATE_BYTES] {
        let mut bytes = [0; STATE_BYTES];
        Writer::new(&mut bytes)
            .u8(self.phase as u8)
            .u8(0)
            .u64(self.generation)
            .u64(self.watermark)
            .u64(self.sequence);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != STATE_BYTES {
            return None;
        }
        let mut reader = Reader::new(bytes);
        let phase = reader.u8();
        let phase = [Phase::Open, Phase::Sealed, Phase::Suspect].into_iter().find(|p| *p as u8 == phase)?;
        reader.u8();
        Some(Self { phase, generation: reader.u64(), watermark: reader.u64(), sequence: reader.u64() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_states_round_trip_and_nonsense_is_none() {
        let spot = Spot { segment: SegmentId(1), offset: 3 * PAGE as u64 };
        let entry = Entry {
            id: ObjectId { kind: ObjectKind::State, hash: BlockHash([13; 32]) },
            parent: Some(ObjectId { kind: ObjectKind::Block, hash: BlockHash([14; 32]) }),
            spot,
            planes: 2,
            record_pages: 5,
            sequence: 6,
            tokens: 7,
            raw_bytes: 8,
            checksum: HeaderChecksum([9; 16]),
            scope: ScopeTag([10; 16]),
            namespace: NamespaceId([11; 32]),
            digest: ContentDigest([12; 32]),
            head_pages: 15,
            class: TtlClass(16),
            time_s: 17,
            writer: WriterId(18),
        };
        let bytes = entry.encode();
        assert_eq!(bytes[..16], [2, 1, 2, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes[16], bytes[24], bytes[32], bytes[48]), (6, 7, 9, 13));
        assert_eq!((bytes[80], bytes[112], bytes[128], bytes[160]), (14, 10, 11, 12));
        assert_eq!(bytes[192..], [15, 16, 0, 0, 17, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Entry::decode(spot, &bytes), Some(entry));
        assert_eq!(Entry::decode(spot, &bytes[1..]), None);
        // Lengths that would size a read are checked: header over record, record and content over segment.
        for (at, byte) in [(3, 0xff), (7, 0x80), (12, 1)] {
            let mut bytes = bytes;
            bytes[at] = byte;
            assert_eq!(Entry::decode(spot, &bytes), None, "byte {at}");
        }
        assert_eq!(entry_key(spot), [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3]);
        assert_eq!(spot_of(&entry_key(spot)), Some(spot));
        assert_eq!(spot_of(&[0xff]), None);
        let state = SegmentState { phase: Phase::Suspect, generation: 1, watermark: 2, sequence: 3 };
        let bytes = state.encode();
        assert_eq!((bytes[0], bytes[2], bytes[10], bytes[18]), (3, 1, 2, 3));
        assert_eq!(SegmentState::decode(&bytes), Some(state));
        assert_eq!(SegmentState::decode(&[0; 26]), None);
    }
}
