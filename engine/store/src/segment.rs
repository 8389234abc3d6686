//! Segments: the files that records lie in.
//!
//! `DIR/segments/NNNNNNNN.seg` has its full length from the start and is only ever appended to:
//!
//! ```text
//! page 0         header page
//! pages 1 ..     records, one after another; zeros behind the last
//! last page      seal page, once the segment is closed for good; a copy of the header page before
//! ```
//!
//! The copy is there because records bind themselves to the generation that the header names: without it, damage to one page
//! of an open segment would cost all of them. Segments of earlier builds have zeros in its place.
//!
//! The seal says that every record before `end` was flushed, so that a rebuild need not read their payload to know
//! that they are whole. A segment without one is open, was open at a crash, or is suspect. Both pages have one
//! form; numbers are little-endian:
//!
//! ```text
//!   0   8  magic: "EskrSeg\0" header, "EskrEnd\0" seal
//!   8   2  version, 1                       } a later version keeps these three where they are, so that this
//!  10   1  TTL class                        } build can tell "newer" from "damaged"
//!  11   5  zero
//!  16   8  segment id
//!  24   8  generation: random, written into every record. Bytes that a client stored to look like a record cannot
//!          have it right
//!  32   8  header: length of the segment in bytes, 0 if that is not known any more. seal: end of the last record
//!  40   8  header: lowest sequence that a record in it may have, 0 if that is not known. seal: highest before `end`
//!  48  16  first 16 bytes of BLAKE3 over 0..48  }
//!  64      zero
//! ```

use std::collections::HashMap;
use std::fmt;
use std::hash::BuildHasher;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use crate::fields::{Reader, Writer};
use crate::io::{AlignedBuf, FileId, PAGE};
use crate::{Result, StoreError, TtlClass};

const HEADER_MAGIC: &[u8; 8] = b"EskrSeg\0";
const SEAL_MAGIC: &[u8; 8] = b"EskrEnd\0";
const VERSION: u16 = 1;
pub(crate) const CHECKED_BYTES: usize = 48;

/// Where the first record starts, in bytes.
pub(crate) const RECORDS_AT: u64 = PAGE as u64;

/// Number of a segment; never used twice in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SegmentId(pub(crate) u64);

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: SegmentId,
    pub(crate) generation: u64,
    /// In bytes.
    pub(crate) offset: u64,
}

/// Where a record is, while its segment is known to be the one meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Spot {
    pub(crate) segment: SegmentId,
    /// In bytes.
    pub(crate) offset: u64,
}

impl Place {
    pub(crate) fn spot(&self) -> Spot {
        Spot { segment: self.segment, offset: self.offset }
    }
}

impl Spot {
    pub(crate) fn in_generation(&self, generation: u64) -> Place {
        Place { segment: self.segment, generation, offset: self.offset }
    }
}

impl SegmentId {
    pub(crate) fn file_name(self) -> String {
        format!("{:08}.seg", self.0)
    }

    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".seg")?;
        // The resident table has room for 32 bits, which are an exbibyte of segments.
        let id = Self(digits.parse::<u32>().ok()?.into());
        (id.file_name() == name).then_some(id)
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}", self.0)
    }
}

/// Which of the two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Header,
    Seal,
}

/// Content of a header or seal page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentPage {
    pub(crate) id: SegmentId,
    pub(crate) class: TtlClass,
    pub(crate) generation: u64,
    /// Header: length of the segment. Seal: end of the last record. In bytes.
    pub(crate) extent_bytes: u64,
    /// Header: lowest sequence that a record may have, or 0. Seal: highest sequence.
    pub(crate) sequence: u64,
}

impl SegmentPage {
    /// Fills one page.
    pub(crate) fn encode(&self, kind: PageKind, page: &mut [u8]) {
        page.fill(0);
        let mut writer = Writer::new(page);
        writer.bytes(kind.magic()).u16(VERSION).u8(self.class.0).bytes(&[0; 5]);
        writer.u64(self.id.0).u64(self.generation).u64(self.extent_bytes).u64(self.sequence);
        let checksum = checksum(page);
        page[CHECKED_BYTES..CHECKED_BYTES + 16].copy_from_slice(&checksum);
    }

    /// Reads a page. `None` if it is no such page or a damaged one; an error if a later build wrote it.
    pub(crate) fn decode(kind: PageKind, page: &[u8], path: &Path) -> Result<Option<Self>> {
        if page.len() < CHECKED_BYTES + 16
            || !page.starts_with(kind.magic())
            || page[CHECKED_BYTES..CHECKED_BYTES + 16] != checksum(page)
        {
            return Ok(None);
        }
        let mut reader = Reader::new(page);
        reader.bytes::<8>();
        let found = reader.u16();
        if found > VERSION {
            return Err(StoreError::NewerFormat { path: path.to_owned(), found, supported: VERSION });
        }
        let class = TtlClass(reader.u8());
        reader.bytes::<5>();
        Ok(Some(Self {
            class,
            id: SegmentId(reader.u64()),
            generation: reader.u64(),
            extent_bytes: reader.u64(),
            sequence: reader.u64(),
        }))
    }
}

/// Where a segment's last page starts.
pub(crate) fn last_page(len_bytes: u64) -> u64 {
    len_bytes.saturating_sub(PAGE as u64) / PAGE as u64 * PAGE as u64
}

/// What a segment's first and last page say of it, each if it is sound and this segment's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) header: Option<SegmentPage>,
    /// Whether the header page itself is lost, and `header` is its copy.
    pub(crate) copied: bool,
    pub(crate) seal: Option<SegmentPage>,
    /// Whether there certainly is no seal: the copy is in its place, or zeros.
    pub(crate) open: bool,
}

impl Ends {
    /// `read` gives the page at an offset, if it can be read.
    pub(crate) fn read(
        id: SegmentId,
        len_bytes: u64,
        path: &Path,
        read: impl Fn(u64) -> Option<AlignedBuf>,
    ) -> Result<Self> {
        let decode = |kind, page: &Option<AlignedBuf>| -> Result<Option<SegmentPage>> {
            let Some(page) = page else { return Ok(None) };
            Ok(SegmentPage::decode(kind, page, path)?.filter(|page| page.id == id))
        };
        let header = decode(PageKind::Header, &read(0))?;
        let last = read(last_page(len_bytes));
        let copy = decode(PageKind::Header, &last)?;
        let seal = decode(PageKind::Seal, &last)?;
        let seal = seal.filter(|seal| header.is_none_or(|header| header.generation == seal.generation));
        let open = copy.is_some() || last.is_some_and(|page| page.iter().all(|&byte| byte == 0));
        Ok(Self { open, header: header.or(copy), copied: header.is_none() && copy.is_some(), seal })
    }
}

impl PageKind {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Header => HEADER_MAGIC,
            Self::Seal => SEAL_MAGIC,
        }
    }
}

/// A generation that nobody can foresee.
pub(crate) fn random_generation() -> u64 {
    std::hash::RandomState::new().hash_one("segment generation")
}

pub(crate) fn checksum(page: &[u8]) -> [u8; 16] {
    let mut checksum = [0; 16];
    checksum.copy_from_slice(&blake3::hash(&page[..CHECKED_BYTES]).as_bytes()[..16]);
    checksum
}

/// The segments that can be read.
#[derive(Debug, Default)]
pub(crate) struct SegmentTable(RwLock<HashMap<SegmentId, OpenSegment>>);

/// A segment's file and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenSegment {
    pub(crate) file: FileId,
    pub(crate) len_bytes: u64,
    pub(crate) generation: u64,
    pub(crate) class: TtlClass,
    /// Nothing will be added to it, be it that it has a seal, or that a write, a flush or its seal failed.
    pub(crate) sealed: bool,
    /// Nothing will be added to it, and the index names all that is to be kept of it.
    pub(crate) complete: bool,
    /// It could not be read or flushed when the store was opened, and may hold what the index does not name and somebody was promised:
    /// it stays until the next opening.
    pub(crate) unread: bool,
    /// No erasure with a lower sequence is needed for it; see `erasure/lapse.rs`.
    pub(crate) clear_below: u64,
    /// Bytes of the records that the table names.
    pub(crate) live_bytes: u64,
    /// Bytes given back to the file system.
    pub(crate) punched_bytes: u64,
    /// Store time of the last use of anything in it.
    pub(crate) used_s: u32,
    /// What the index says of that.
    pub(crate) written_use_s: u32,
}

impl SegmentTable {
    pub(crate) fn get(&self, id: SegmentId) -> Option<OpenSegment> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).copied()
    }

    pub(crate) fn all(&self) -> Vec<(SegmentId, OpenSegment)> {
        let segments = self.0.read().unwrap_or_else(PoisonError::into_inner);
        segments.iter().map(|(id, segment)| (*id, *segment)).collect()
    }

    pub(crate) fn insert(&self, id: SegmentId, segment: OpenSegment) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(id, segment);
    }

    /// Changes what is known of a segment, if there is one.
    pub(crate) fn update<T>(&self, id: SegmentId, change: impl FnOnce(&mut OpenSegment) -> T) -> Option<T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).get_mut(&id).map(change)
    }

    pub(crate) fn remove(&self, id: SegmentId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Bytes of the records that the table names.
    pub(crate) fn live_bytes(&self) -> u64 {
        let segments = self.0.read().unwrap_or_else(PoisonError::into_inner);
        segments.values().fold(0, |sum, segment| sum.saturating_add(segment.live_bytes))
    }

    /// How many there are and how many bytes they take.
    pub(crate) fn totals(&self) -> (u64, u64) {
        let segments = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let bytes = |segment: &OpenSegment| segment.len_bytes.saturating_sub(segment.punched_bytes);
        (segments.len() as u64, segments.values().map(bytes).sum())
    }
}

impl OpenSegment {
    /// `clear_below`: the lowest sequence that a record in it may have.
    pub(crate) fn new(
        file: FileId,
        len_bytes: u64,
        generation: u64,
        class: TtlClass,
        used_s: u32,
        clear_below: u64,
    ) -> Self {
        Self {
            file,
            len_bytes,
            generation,
            class,
            sealed: false,
            complete: false,
            unread: false,
            clear_below,
            live_bytes: 0,
            punched_bytes: 0,
            used_s,
            written_use_s: used_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> SegmentPage {
        SegmentPage {
            id: SegmentId(7),
            class: TtlClass(0),
            generation: 0x0102_0304_0506_0708,
            extent_bytes: 1 << 20,
            sequence: 0,
        }
    }

    #[test]
    fn golden_bytes_of_a_header_page() {
        let mut bytes = vec![0xff; PAGE];
        page().encode(PageKind::Header, &mut bytes);
        let mut expected = b"EskrSeg\0".to_vec();
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([7, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]);
        expected.extend([0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let digest = blake3::hash(&expected);
        expected.extend(&digest.as_bytes()[..16]);
        expected.resize(PAGE, 0);
        assert_eq!(bytes, expected);
        // The digest itself, so that this test does not only compare the code with its own hash.
        assert_eq!(digest.to_hex()[..32], *"4ea4e0a81913fea2210bdb3878b1b153");
    }

    #[test]
    fn pages_round_trip_and_damage_is_seen() {
        let mut bytes = vec![0; PAGE];
        page().encode(PageKind::Seal, &mut bytes);
        let path = Path::new("x.seg");
        assert_eq!(SegmentPage::decode(PageKind::Seal, &bytes, path).unwrap(), Some(page()));
        assert_eq!(SegmentPage::decode(PageKind::Header, &bytes, path).unwrap(), None);
        for byte in 0..64 {
            bytes[byte] ^= 1;
            assert_eq!(SegmentPage::decode(PageKind::Seal, &bytes, path).unwrap(), None, "byte {byte}");
            bytes[byte] ^= 1;
        }
    }

    #[test]
    fn a_later_version_is_named() {
        let mut bytes = vec![0; PAGE];
        page().encode(PageKind::Header, &mut bytes);
        bytes[8] = 2;
        let checksum = checksum(&bytes);
        bytes[48..64].copy_from_slice(&checksum);
        let error = SegmentPage::decode(PageKind::Header, &bytes, Path::new("x.seg")).unwrap_err();
        assert_eq!(error.to_string(), "x.seg has format version 2, this build knows up to 1");
    }

    #[test]
    fn only_names_made_here_are_segments() {
        assert_eq!(SegmentId::from_file_name(&SegmentId(12).file_name()), Some(SegmentId(12)));
        for name in ["12.seg", "00000012.seg.tmp", "+0000012.seg", ".probe-1", "../00000012.seg"] {
            assert_eq!(SegmentId::from_file_name(name), None, "{name}");
        }
    }
}
