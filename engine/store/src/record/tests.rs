use super::*;

fn header() -> RecordHeader {
    let plane = |group, codec, offset, stored_bytes, raw_bytes, stored_checksum, digest| Plane {
        group,
        first_layer: 3,
        layers: 2,
        codec,
        offset,
        stored_bytes,
        raw_bytes,
        stored_checksum,
        digest: [digest; 32],
    };
    RecordHeader {
        id: ObjectId { kind: ObjectKind::Block, hash: BlockHash([0x11; 32]) },
        parent: Some(ObjectId { kind: ObjectKind::Block, hash: BlockHash([0x22; 32]) }),
        namespace: NamespaceId([0x33; 32]),
        class: crate::TtlClass(0),
        scope: ScopeTag([0x44; 16]),
        writer: WriterId::UNNAMED,
        tokens: 256,
        seal: None,
        planes: vec![
            plane(0, Codec::Raw, 384, 100, 100, 0, 0x55),
            plane(1, Codec::Zstd, 4096, 70_000, 90_000, 0x0102_0304_0506_0708, 0x66),
        ],
    }
}

const PLACE: Place = Place { segment: SegmentId(7), generation: 0x1122_3344_5566_7788, offset: 0x10_0000 };

/// Built by hand from the module's table; the two BLAKE3 digests by an independent implementation (Python's).
#[test]
fn golden_bytes_of_a_header() {
    let mut record = vec![0xff; header().record_bytes()];
    header().encode(PLACE, 0x0102, 0x0304, &mut record);
    let mut expected = b"EskrRec\0".to_vec();
    expected.extend([1, 0, 1, 1, 0, 0, 2, 0]);
    expected.extend([0x80, 1, 0, 0, 19, 0, 0, 0]);
    expected.extend([2, 1, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, 0x10, 0, 0, 0, 0, 0]);
    expected.extend([0, 1, 0, 0, 0, 0, 0, 0, 0xf4, 0x5f, 1, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0]);
    expected.extend([0x11; 32].iter().chain(&[0x22; 32]).chain(&[0x33; 32]).chain(&[0x44; 16]));
    expected.extend(hex("22cdbd397ca9b890f9201ac64df47f8603da1e0a3bb0c315cde85c9459241f9b"));
    expected.extend([0; 16]);
    expected.extend(hex("dc2ba47e3fe93cbbf5cc655340ed9cf9"));
    expected.extend([0, 0, 3, 0, 2, 0, 0, 0, 0x80, 1, 0, 0, 100, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0; 8].iter().chain(&[0x55; 32]));
    expected.extend([1, 0, 3, 0, 2, 0, 1, 0, 0, 0x10, 0, 0, 0x70, 0x11, 1, 0, 0x90, 0x5f, 1, 0, 0, 0, 0, 0]);
    expected.extend([8, 7, 6, 5, 4, 3, 2, 1].iter().chain(&[0x66; 32]));
    assert_eq!(record[..384], expected[..]);
    assert!(record[384..].iter().all(|&byte| byte == 0xff), "nothing behind the header is touched");
}

fn hex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn headers_round_trip() {
    let mut record = vec![0; header().record_bytes()];
    let checksum = header().encode(PLACE, 9, 10, &mut record);
    let decoded = PlacedHeader::decode(&record).unwrap();
    let expected = PlacedHeader {
        header: header(),
        place: PLACE,
        sequence: 9,
        time_s: 10,
        record_bytes: 19 * PAGE,
        checksum,
    };
    assert_eq!(decoded, expected);
    let mut root = header();
    root.parent = None;
    root.encode(PLACE, 9, 10, &mut record);
    assert_eq!(PlacedHeader::decode(&record).unwrap().header, root);
}

#[test]
fn every_flipped_bit_of_a_header_is_seen() {
    let mut record = vec![0; header().record_bytes()];
    header().encode(PLACE, 9, 10, &mut record);
    for bit in 0..header().header_bytes() * 8 {
        record[bit / 8] ^= 1 << (bit % 8);
        assert!(PlacedHeader::decode(&record).is_err(), "bit {bit}");
        record[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn a_header_asks_for_the_bytes_it_lacks_and_never_for_too_many() {
    let mut record = vec![0; header().record_bytes()];
    header().encode(PLACE, 9, 10, &mut record);
    assert_eq!(PlacedHeader::decode(&record[..20]), Err(NotAHeader::NeedsBytes(256)));
    assert_eq!(PlacedHeader::decode(&record[..300]), Err(NotAHeader::NeedsBytes(384)));
    record[14..16].copy_from_slice(&u16::MAX.to_le_bytes());
    record[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(PlacedHeader::decode(&record[..300]), Err(NotAHeader::Damaged));
}

/// A header may be sound by its checksum and still not describe a record.
#[test]
fn authenticated_nonsense_is_refused() {
    let nonsense: [fn(&mut RecordHeader); 5] = [
        |header| header.planes[0].offset = 300,
        |header| header.planes[0].stored_bytes = 99,
        |header| header.planes[1].offset = 256,
        |header| header.planes[0].offset = 5000,
        |header| header.planes.swap(0, 1),
    ];
    for change in nonsense {
        let mut header = header();
        change(&mut header);
        let mut record = vec![0; 1 << 20];
        header.encode(PLACE, 9, 10, &mut record);
        assert_eq!(PlacedHeader::decode(&record), Err(NotAHeader::Damaged), "{header:?}");
    }
}

#[test]
fn a_writer_is_under_the_checksum() {
    let named = RecordHeader { writer: WriterId(0x0a0b_0c0d), ..header() };
    let mut record = vec![0; named.record_bytes()];
    named.encode(PLACE, 9, 10, &mut record);
    assert_eq!(record[76..80], [0x0d, 0x0c, 0x0b, 0x0a]);
    assert_eq!(PlacedHeader::decode(&record).unwrap().header, named);
    record[76] ^= 1;
    assert_eq!(PlacedHeader::decode(&record), Err(NotAHeader::Damaged));
}

#[test]
fn a_sealed_header_is_of_its_own_version_and_says_by_what() {
    let plain = header();
    let seal = Some(Seal { key: 0x0a0b_0c0d, salt: [0x77; 12] });
    let mut planes = plain.planes.clone();
    planes[0].stored_bytes += 16;
    let sealed = RecordHeader { seal, planes, ..plain };
    let mut record = vec![0; sealed.record_bytes()];
    sealed.encode(PLACE, 9, 10, &mut record);
    assert_eq!(record[8..10], [2, 0]);
    assert_eq!(record[224..240], [[0x0d, 0x0c, 0x0b, 0x0a].as_slice(), &[0x77; 12]].concat());
    assert_eq!(PlacedHeader::decode(&record).unwrap().header, sealed);
    // A key of 0, or a raw plane without room for its tag, is no sealed record.
    for broken in [
        RecordHeader { seal: Some(Seal { key: 0, salt: [0; 12] }), ..sealed.clone() },
        RecordHeader { planes: header().planes, ..sealed },
    ] {
        broken.encode(PLACE, 9, 10, &mut record);
        assert_eq!(PlacedHeader::decode(&record), Err(NotAHeader::Damaged));
    }
}
