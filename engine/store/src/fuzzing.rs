//! The parsers of everything that comes from a disk, for fuzzers: bytes in, and whether they were accepted.
//!
//! Each asserts what must hold of bytes that are accepted. Checksums keep random bytes out, as they should, so each tries the
//! same bytes again with the checksum made right: what is behind it must stand by itself.

use std::path::Path;
use std::sync::Arc;

use crate::erasure::Erase;
use crate::fields::narrow;
use crate::hits::Hits;
use crate::index::{Entry, SegmentState};
use crate::io::{BufferPool, PAGE};
use crate::record::{self, CHECKSUM_AT, FIXED_BYTES, PlacedHeader};
use crate::segment::{self, CHECKED_BYTES, PageKind, SegmentId, SegmentPage, Spot};
use crate::{LeaseId, codec, lease, verify};

/// More than this is not decompressed: a fuzzer is to find errors, not memory.
const MAX_RAW_BYTES: u32 = 1 << 20;

/// A record: its header, and its planes if all of it is there.
pub fn record_header(bytes: &[u8]) -> bool {
    let mut mended = bytes.to_vec();
    let plain = accept_record(bytes);
    if mended.len() < FIXED_BYTES {
        return plain;
    }
    mended[..8].copy_from_slice(record::MAGIC);
    mended[8..10].copy_from_slice(&1_u16.to_le_bytes());
    let planes = u16::from_le_bytes([mended[14], mended[15]]) % 8;
    mended[14..16].copy_from_slice(&planes.to_le_bytes());
    let header_bytes = record::header_bytes(planes.into());
    if mended.len() < header_bytes {
        return plain;
    }
    mended[16..20].copy_from_slice(&narrow(header_bytes).to_le_bytes());
    let digests: Vec<[u8; 32]> = mended[FIXED_BYTES..header_bytes]
        .chunks_exact(64)
        .map(|row| row[32..].try_into().expect("half a row"))
        .collect();
    let raw: u64 = mended[FIXED_BYTES..header_bytes]
        .chunks_exact(64)
        .map(|row| u64::from(u32::from_le_bytes([row[16], row[17], row[18], row[19]])))
        .sum();
    mended[64..72].copy_from_slice(&raw.to_le_bytes());
    mended[192..224].copy_from_slice(&record::content_digest(digests.iter()).0);
    let checksum = record::checksum(&mended[..header_bytes]);
    mended[CHECKSUM_AT..FIXED_BYTES].copy_from_slice(&checksum.0);
    plain | accept_record(&mended)
}

fn accept_record(bytes: &[u8]) -> bool {
    let Ok(found) = PlacedHeader::decode(bytes) else { return false };
    assert!(found.record_bytes.is_multiple_of(PAGE) && found.record_bytes >= found.header.header_bytes());
    let mut again = vec![0; found.record_bytes];
    found.header.encode(found.place, found.sequence, found.time_s, &mut again);
    let decoded = PlacedHeader::decode(&again).expect("what was accepted can be written and read");
    assert_eq!((&decoded.header, decoded.place), (&found.header, found.place));
    let entry = Entry::of(&found);
    if let Some(decoded) = Entry::decode(entry.spot, &entry.encode()) {
        assert_eq!(decoded, entry);
    }
    let Some(record) = bytes.get(..found.record_bytes) else { return true };
    let pool = BufferPool::new(0);
    for plane in found.header.planes.iter().filter(|plane| plane.raw_bytes <= MAX_RAW_BYTES) {
        accept_plane(plane, &record[plane.range()], &pool);
    }
    true
}

fn accept_plane(plane: &record::Plane, stored: &[u8], pool: &Arc<BufferPool>) {
    if let Ok(Some(decoded)) = verify::plane(plane, stored, pool) {
        assert!(decoded.len() >= plane.raw_bytes as usize);
    }
    // Behind the checksum.
    if plane.codec != record::Codec::Raw {
        let _ = verify::decode(plane, stored, pool);
    }
}

/// A header or seal page.
pub fn segment_page(bytes: &[u8]) -> bool {
    let plain = accept_page(bytes);
    let mut mended = bytes.to_vec();
    if mended.len() < CHECKED_BYTES + 16 {
        return plain;
    }
    mended[8..10].copy_from_slice(&1_u16.to_le_bytes());
    let checksum = segment::checksum(&mended);
    mended[CHECKED_BYTES..CHECKED_BYTES + 16].copy_from_slice(&checksum);
    plain | accept_page(&mended)
}

fn accept_page(bytes: &[u8]) -> bool {
    let mut accepted = false;
    for kind in [PageKind::Header, PageKind::Seal] {
        // A later version is an error by design.
        let Ok(Some(page)) = SegmentPage::decode(kind, bytes, Path::new("fuzzed.seg")) else { continue };
        let mut again = vec![0; PAGE];
        page.encode(kind, &mut again);
        let decoded = SegmentPage::decode(kind, &again, Path::new("fuzzed.seg"));
        assert_eq!(decoded.expect("of this version"), Some(page));
        accepted = true;
    }
    accepted
}

/// A value of the index: an entry or a segment's state.
pub fn index_entry(bytes: &[u8]) -> bool {
    let spot = Spot { segment: SegmentId(1), offset: PAGE as u64 };
    let entry = Entry::decode(spot, bytes);
    if let Some(entry) = entry {
        assert_eq!(Entry::decode(spot, &entry.encode()), Some(entry));
        assert!(entry.end() > spot.offset || entry.record_pages == 0);
    }
    if let Some(erase) = entry.as_ref().and_then(Erase::of)
        && erase.check().is_ok()
    {
        let object = erase.object();
        let again =
            Entry { id: object.id, parent: object.parent, writer: object.writer, ..entry.expect("of it") };
        let again = Entry { scope: object.scope, namespace: object.namespace, ..again };
        assert_eq!(Erase::of(&again), Some(erase), "an erasure that does not come back");
    }
    if let Some(hits) = Hits::decode(bytes) {
        assert_eq!(Hits::decode(&hits.encode()), Some(hits));
        let mut twice = hits;
        twice.add(hits);
    }
    let state = SegmentState::decode(bytes);
    if let Some(state) = state {
        assert_eq!(SegmentState::decode(&state.encode()), Some(state));
    }
    entry.is_some() || state.is_some()
}

/// The payload of a lease.
pub fn lease(bytes: &[u8]) -> bool {
    let Some((ends, deadline_s)) = lease::parse(bytes) else { return false };
    let written = lease::object(LeaseId([7; 32]), &ends, deadline_s);
    assert_eq!(
        lease::parse(&written.planes[0].bytes),
        Some((ends, deadline_s)),
        "a lease that does not come back"
    );
    true
}

/// An encoded plane behind two bytes of the length that it is said to have.
pub fn plane_columns(bytes: &[u8]) -> bool {
    let Some((len, stored)) = bytes.split_first_chunk() else { return false };
    codec::decode(stored, &mut vec![0; usize::from(u16::from_le_bytes(*len))]).is_ok()
}
