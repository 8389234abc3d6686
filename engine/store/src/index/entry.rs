//! Values of the index.
//!
//! Numbers are little-endian.
//!
//! ```text
//! Entry, 160 bytes
//!   0   4  zero
//!   4   4  header length in bytes
//!   8   4  record length in pages
//!  12   4  zero
//!  16   8  segment id
//!  24   8  offset in bytes
//!  32   8  sequence
//!  40   8  tokens
//!  48   8  raw bytes
//!  56   8  generation of the segment
//!  64  16  header checksum: another record at this place is noticed, however sound it is
//!  80  16  scope tag
//!  96  32  namespace
//! 128  32  content digest: tells a repeated put from a conflicting one without a read
//!
//! SegmentState, 26 bytes
//!   0   1  1 open, 2 sealed, 3 suspect
//!   1   1  zero
//!   2   8  generation
//!  10   8  watermark: records before this offset are in the index
//!  18   8  highest sequence before the watermark
//! ```

use esker_prefix::{NamespaceId, ScopeTag};

use crate::fields::{Reader, Writer, narrow};
use crate::io::PAGE;
use crate::record::{ContentDigest, HeaderChecksum, PlacedHeader};
use crate::segment::{Place, SegmentId};

const ENTRY_BYTES: usize = 160;
const STATE_BYTES: usize = 26;

/// Where an object's record is, and enough to know it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) place: Place,
    pub(crate) header_bytes: u32,
    pub(crate) record_pages: u32,
    pub(crate) sequence: u64,
    pub(crate) tokens: u64,
    pub(crate) raw_bytes: u64,
    pub(crate) checksum: HeaderChecksum,
    pub(crate) scope: ScopeTag,
    pub(crate) namespace: NamespaceId,
    pub(crate) digest: ContentDigest,
}

impl Entry {
    /// The entry of a record.
    pub(crate) fn of(found: &PlacedHeader) -> Self {
        let header = &found.header;
        Self {
            place: found.place,
            header_bytes: narrow(header.header_bytes()),
            record_pages: narrow(found.record_bytes / PAGE),
            sequence: found.sequence,
            tokens: header.tokens,
            raw_bytes: header.raw_bytes(),
            checksum: found.checksum,
            scope: header.scope,
            namespace: header.namespace,
            digest: header.content_digest(),
        }
    }

    pub(crate) fn record_bytes(&self) -> usize {
        self.record_pages as usize * PAGE
    }

    /// End of the record in its segment.
    pub(crate) fn end(&self) -> u64 {
        self.place.offset.saturating_add(self.record_bytes() as u64)
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let mut writer = Writer::new(&mut bytes);
        writer.u32(0).u32(self.header_bytes).u32(self.record_pages).u32(0);
        writer.u64(self.place.segment.0).u64(self.place.offset).u64(self.sequence);
        writer.u64(self.tokens).u64(self.raw_bytes).u64(self.place.generation);
        writer.bytes(&self.checksum.0).bytes(&self.scope.0).bytes(&self.namespace.0).bytes(&self.digest.0);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != ENTRY_BYTES {
            return None;
        }
        let mut reader = Reader::new(bytes);
        let (_, header_bytes, record_pages, _) = (reader.u32(), reader.u32(), reader.u32(), reader.u32());
        let (segment, offset, sequence) = (SegmentId(reader.u64()), reader.u64(), reader.u64());
        let (tokens, raw_bytes, generation) = (reader.u64(), reader.u64(), reader.u64());
        let entry = Self {
            place: Place { segment, generation, offset },
            header_bytes,
            record_pages,
            sequence,
            tokens,
            raw_bytes,
            checksum: HeaderChecksum(reader.bytes()),
            scope: ScopeTag(reader.bytes()),
            namespace: NamespaceId(reader.bytes()),
            digest: ContentDigest(reader.bytes()),
        };
        // What a read is sized by is checked before it is believed.
        let sound = offset.is_multiple_of(PAGE as u64)
            && header_bytes as usize <= entry.record_bytes()
            && header_bytes as usize <= crate::record::MAX_HEADER_BYTES
            && entry.record_bytes() as u64 <= crate::settings::MAX_SEGMENT_BYTES;
        sound.then_some(entry)
    }
}

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
        let entry = Entry {
            place: Place { segment: SegmentId(1), generation: 2, offset: 3 * PAGE as u64 },
            header_bytes: 384,
            record_pages: 5,
            sequence: 6,
            tokens: 7,
            raw_bytes: 8,
            checksum: HeaderChecksum([9; 16]),
            scope: ScopeTag([10; 16]),
            namespace: NamespaceId([11; 32]),
            digest: ContentDigest([12; 32]),
        };
        let bytes = entry.encode();
        assert_eq!(bytes[..16], [0, 0, 0, 0, 0x80, 1, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..32], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes[32], bytes[40], bytes[48], bytes[56]), (6, 7, 8, 2));
        assert_eq!((bytes[64], bytes[80], bytes[96], bytes[128]), (9, 10, 11, 12));
        assert_eq!(Entry::decode(&bytes), Some(entry));
        assert_eq!(Entry::decode(&bytes[1..]), None);
        // Lengths that would size a read are checked: header over record, record over segment, offset off a page.
        for (at, byte) in [(6, 1), (11, 0x80), (24, 1)] {
            let mut bytes = bytes;
            bytes[at] = byte;
            assert_eq!(Entry::decode(&bytes), None, "byte {at}");
        }
        let state = SegmentState { phase: Phase::Suspect, generation: 1, watermark: 2, sequence: 3 };
        let bytes = state.encode();
        assert_eq!((bytes[0], bytes[2], bytes[10], bytes[18]), (3, 1, 2, 3));
        assert_eq!(SegmentState::decode(&bytes), Some(state));
        assert_eq!(SegmentState::decode(&[0; 26]), None);
    }
}
