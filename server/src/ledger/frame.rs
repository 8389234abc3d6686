//! One record on disk.
//!
//! ```text
//! offset size  field, little-endian
//!      0    4  magic "EsLg"
//!      4    4  payload bytes, u32, at most MAX_PAYLOAD_BYTES
//!      8    8  sequence, u64: from 1, without gaps, through all segments
//!     16    8  flushed, u64: the highest sequence that was flushed when this was written
//!     24   32  chain: BLAKE3(chain of the record before || bytes 0..24 || payload)
//!     56    4  CRC-32C of bytes 0..56
//!     60    4  CRC-32C of the payload
//!     64    n  payload: a `UsageRecord` without its sequence, as protobuf
//! ```
//!
//! The chain makes a changed, missing or foreign record show. The two checksums say where the damage is: behind a sound header
//! the next record can be found even if this payload is lost. `flushed` tells what was acknowledged: a bad record before one
//! that says it was flushed is damage, and one that nothing vouches for is a write that a crash cut short.

/// Bytes of a record before its payload.
pub(crate) const HEADER_BYTES: usize = 64;
/// Longest payload; names and labels in a record are bounded far below.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 64 << 10;
const MAGIC: [u8; 4] = *b"EsLg";

/// The running hash of a ledger.
pub(crate) type ChainHash = [u8; 32];

/// A record that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) sequence: u64,
    pub(crate) flushed: u64,
    pub(crate) chain: ChainHash,
    pub(crate) payload: &'a [u8],
}

/// What stands at some place.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Parsed<'a> {
    Frame(Frame<'a>),
    /// Nothing was ever written here.
    Blank,
    Bad(&'static str),
}

impl Frame<'_> {
    /// Bytes on disk.
    pub(crate) fn len(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }

    /// Whether this is what follows a record with this chain.
    pub(crate) fn follows(&self, before: &ChainHash) -> bool {
        link(before, &head(self.sequence, self.flushed, self.payload.len()), self.payload) == self.chain
    }
}

/// Appends a record to `out`; returns its chain.
pub(crate) fn write(
    out: &mut Vec<u8>,
    sequence: u64,
    flushed: u64,
    before: &ChainHash,
    payload: &[u8],
) -> ChainHash {
    debug_assert!(payload.len() <= MAX_PAYLOAD_BYTES, "records are bounded where they are made");
    let start = out.len();
    let head = head(sequence, flushed, payload.len());
    let chain = link(before, &head, payload);
    out.extend_from_slice(&head);
    out.extend_from_slice(&chain);
    let checksum = crc32c(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
    out.extend_from_slice(&crc32c(payload).to_le_bytes());
    out.extend_from_slice(payload);
    chain
}

/// Reads what `bytes` begin with. Bounds are checked before anything is believed.
pub(crate) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return if bytes.iter().all(|&byte| byte == 0) { Parsed::Blank } else { Parsed::Bad("cut header") };
    };
    if header.iter().all(|&byte| byte == 0) {
        return Parsed::Blank;
    }
    if header[..4] != MAGIC {
        return Parsed::Bad("no magic");
    }
    if crc32c(&header[..56]).to_le_bytes() != header[56..60] {
        return Parsed::Bad("header checksum");
    }
    let u64_at = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if len > MAX_PAYLOAD_BYTES || len > rest.len() {
        return Parsed::Bad("length");
    }
    let payload = &rest[..len];
    if crc32c(payload).to_le_bytes() != header[60..64] {
        return Parsed::Bad("payload checksum");
    }
    let mut chain = ChainHash::default();
    chain.copy_from_slice(&header[24..56]);
    Parsed::Frame(Frame { sequence: u64_at(8), flushed: u64_at(16), chain, payload })
}

/// The next sound record in `bytes`, and where it begins; for going on behind damage, when asked to.
pub(crate) fn resync(bytes: &[u8]) -> Option<(usize, Frame<'_>)> {
    let starts =
        (0..bytes.len().saturating_sub(HEADER_BYTES - 1)).filter(|&at| bytes[at..].starts_with(&MAGIC));
    starts.into_iter().find_map(|at| match parse(&bytes[at..]) {
        Parsed::Frame(frame) => Some((at, frame)),
        _ => None,
    })
}

fn head(sequence: u64, flushed: u64, payload_bytes: usize) -> [u8; 24] {
    let mut head = [0; 24];
    head[..4].copy_from_slice(&MAGIC);
    head[4..8].copy_from_slice(&u32::try_from(payload_bytes).unwrap_or(u32::MAX).to_le_bytes());
    head[8..16].copy_from_slice(&sequence.to_le_bytes());
    head[16..].copy_from_slice(&flushed.to_le_bytes());
    head
}

fn link(before: &ChainHash, head: &[u8; 24], payload: &[u8]) -> ChainHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(before).update(head).update(payload);
    *hasher.finalize().as_bytes()
}

/// CRC-32C (Castagnoli, reflected), byte by byte: records are short.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| (crc >> 8) ^ CRC_TABLE[((crc ^ u32::from(byte)) & 0xff) as usize])
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        let mut crc = at as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[at as usize] = crc;
        at += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> (Vec<u8>, usize) {
        let mut bytes = Vec::new();
        let first = write(&mut bytes, 1, 0, &[7; 32], b"one");
        let end = bytes.len();
        write(&mut bytes, 2, 1, &first, b"the second");
        (bytes, end)
    }

    #[test]
    fn the_checksum_is_the_published_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn golden_bytes() {
        let (bytes, _) = two();
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "4caea22f8981ff42254144d87ff976bdae7b8fd718390aef81b2e05aa790471b",
            "the format of the ledger changed: what is written could not be read any more"
        );
    }

    #[test]
    fn records_come_back_and_every_changed_bit_shows() {
        let (bytes, end) = two();
        let Parsed::Frame(first) = parse(&bytes) else { panic!("sound") };
        assert!(first.follows(&[7; 32]) && !first.follows(&[8; 32]));
        assert_eq!((first.sequence, first.flushed, first.payload, first.len()), (1, 0, &b"one"[..], end));
        let Parsed::Frame(second) = parse(&bytes[end..]) else { panic!("sound") };
        assert!(second.follows(&first.chain));
        for bit in 0..end * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let sound = matches!(parse(&flipped), Parsed::Frame(frame) if frame.follows(&[7; 32]));
            assert!(!sound, "bit {bit}");
            assert_eq!(resync(&flipped[1..]).unwrap().1.sequence, 2);
        }
        for cut in 1..end {
            assert!(matches!(parse(&bytes[..cut]), Parsed::Bad(_)), "cut at {cut}");
        }
        assert!(matches!(parse(&[0; 100]), Parsed::Blank));
        assert!(matches!(parse(&[]), Parsed::Blank));
    }
}
