//! Segment files: `DIR/NNNNNNNNNN.seg`, of one size, written from front to back, zero where nothing was written yet.
//!
//! ```text
//! offset size  header field, little-endian
//!      0    8  magic "EskrLedg"
//!      8    4  version, u32 = 1
//!     12    4  zero
//!     16    8  number of the segment, u64, from 1
//!     24    8  sequence of its first record, u64
//!     32   32  chain before that record
//!     64    8  number of the segment before, u64; 0 for none
//!     72    8  where the records of that segment end, u64
//!     80   12  zero
//!     92    4  CRC-32C of bytes 0..92
//!     96   32  zero
//!    128       records
//! ```
//!
//! The header says how the segment before ended: one that was cut off shows. Space is taken and written when a segment is
//! made, so that a record needs neither new space nor new metadata of the file system, and a full disk shows early.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::frame::{ChainHash, crc32c};

/// Where records begin.
pub(crate) const RECORDS_START: u64 = HEADER_BYTES as u64;
/// Bytes of a segment before its records.
pub(crate) const HEADER_BYTES: usize = 128;
const MAGIC: [u8; 8] = *b"EskrLedg";
const VERSION: u32 = 1;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a segment says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) number: u64,
    pub(crate) first_sequence: u64,
    pub(crate) chain: ChainHash,
    pub(crate) previous: u64,
    pub(crate) previous_end: u64,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.first_sequence.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.chain);
        bytes[64..72].copy_from_slice(&self.previous.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.previous_end.to_le_bytes());
        let checksum = crc32c(&bytes[..92]);
        bytes[92..96].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None` for anything but a sound header.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes[at..].first_chunk()?));
        let header = Self {
            number: u64_at(16)?,
            first_sequence: u64_at(24)?,
            chain: *bytes[32..].first_chunk()?,
            previous: u64_at(64)?,
            previous_end: u64_at(72)?,
        };
        (header.encode() == *bytes).then_some(header)
    }
}

/// For fuzzing: a header as it is, and with its checksum made right. Whether it is sound as it is.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let accept = |bytes: &[u8]| {
        let header = SegmentHeader::parse(bytes);
        header.iter().for_each(|header| assert_eq!(header.encode(), bytes[..HEADER_BYTES]));
        header.is_some()
    };
    if let Some(mut mended) = bytes.first_chunk::<HEADER_BYTES>().copied() {
        mended[..8].copy_from_slice(&MAGIC);
        mended[8..12].copy_from_slice(&VERSION.to_le_bytes());
        mended[12..16].fill(0);
        mended[80..].fill(0);
        let checksum = crc32c(&mended[..92]);
        mended[92..96].copy_from_slice(&checksum.to_le_bytes());
        assert!(accept(&mended), "what a header is made of is a header");
    }
    accept(bytes)
}

/// The file of a segment.
pub(crate) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:010}.seg"))
}

/// Numbers of the segments in a folder, ascending.
pub(crate) fn numbers(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.strip_suffix(".seg")?.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Takes the space of a segment that is to be used later, under another name. All of it is written: the first record of a
/// segment costs no more than any other, and a disk without room shows now.
pub(crate) fn prepare(dir: &Path, bytes: u64) -> io::Result<File> {
    let path = spare(dir);
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    let filled = fill(&file, bytes);
    if filled.is_err() {
        // What little it got is better used by others.
        let _ = std::fs::remove_file(&path);
    }
    filled.map(|()| file)
}

fn fill(mut file: &File, bytes: u64) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let some = left.min(ZEROS.len() as u64);
        file.write_all(&ZEROS[..usize::try_from(some).unwrap_or(ZEROS.len())])?;
        left -= some;
    }
    file.sync_all()
}

/// Gives a prepared segment its header, its name and its place in the chain.
pub(crate) fn begin(dir: &Path, file: &File, header: &SegmentHeader) -> io::Result<()> {
    file.write_all_at(&header.encode(), 0)?;
    file.sync_data()?;
    std::fs::rename(spare(dir), path(dir, header.number))?;
    File::open(dir)?.sync_all()
}

/// Where the next segment is made ready.
pub(crate) fn spare(dir: &Path) -> PathBuf {
    dir.join("spare")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_and_every_changed_bit_shows() {
        let header =
            SegmentHeader { number: 3, first_sequence: 77, chain: [5; 32], previous: 2, previous_end: 4096 };
        let bytes = header.encode();
        assert_eq!(SegmentHeader::parse(&bytes), Some(header));
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "da13c5c5ce9786734d70cfb3c060473a550e5a184cdce3de2f685dcf92d905e3"
        );
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::parse(&flipped), None, "bit {bit}");
        }
        assert_eq!(SegmentHeader::parse(&bytes[..127]), None);
    }
}
