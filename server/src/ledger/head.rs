//! The head: where the acknowledged records end, kept apart from them.
//!
//! A chain proves that nothing within it was changed, but not that nothing was cut off its end. The head says how far it went:
//! `DIR/head`, two slots of 128 bytes written in turn after every flush, little-endian:
//!
//! ```text
//! magic "EsLgHead" | sequence u64 | segment u64 | end of its records u64 | chain 32 | time, unix ms, u64
//! | milliseconds since boot u64 | boot id 16 | zero 24 | CRC-32C of all that u32 | zero 4
//! ```
//!
//! The head is not flushed each time: after a crash of the machine it may be older than the records, never newer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::frame::{ChainHash, crc32c};

const SLOT_BYTES: usize = 128;
const MAGIC: [u8; 8] = *b"EsLgHead";
const CRC_AT: usize = 120;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) sequence: u64,
    pub(crate) segment: u64,
    pub(crate) end: u64,
    pub(crate) chain: ChainHash,
    pub(crate) unix_ms: u64,
    pub(crate) since_boot_ms: u64,
    pub(crate) boot: [u8; 16],
}

/// The file.
pub(crate) struct HeadFile {
    file: File,
    writes: u64,
}

impl HeadFile {
    /// Opens it; what it says, or `None` if it says nothing that can be believed.
    pub(crate) fn open(dir: &Path) -> io::Result<(Self, Option<Head>)> {
        let path = dir.join("head");
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let newest = read_slots(&file)?;
        // The slot that is not the newest is written first.
        let writes = newest.as_ref().map_or(0, |(slot, _)| slot + 1);
        Ok((Self { file, writes }, newest.map(|(_, head)| head)))
    }

    pub(crate) fn write(&mut self, head: &Head) -> io::Result<()> {
        let slot = (self.writes % 2) * SLOT_BYTES as u64;
        self.writes += 1;
        self.file.write_all_at(&head.encode(), slot)
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// What the head of a folder says, without changing anything.
pub(crate) fn peek(dir: &Path) -> io::Result<Option<Head>> {
    match File::open(dir.join("head")) {
        Ok(file) => Ok(read_slots(&file)?.map(|(_, head)| head)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_slots(file: &File) -> io::Result<Option<(u64, Head)>> {
    let mut bytes = [0; 2 * SLOT_BYTES];
    let mut len = 0;
    while len < bytes.len() {
        match file.read_at(&mut bytes[len..], len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(newest(&bytes[..len]))
}

/// The newest of the slots that can be believed, and which it is; of equals the second.
fn newest(bytes: &[u8]) -> Option<(u64, Head)> {
    let slots = (0..2).zip(bytes.as_chunks::<SLOT_BYTES>().0);
    slots.filter_map(|(slot, bytes)| Some((slot, Head::parse(bytes)?))).max_by_key(|(_, head)| head.sequence)
}

/// For fuzzing: two slots, as they are and with their checksums made right. Whether one is believed.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let mut mended = bytes.to_vec();
    for slot in mended.as_chunks_mut::<SLOT_BYTES>().0 {
        slot[..8].copy_from_slice(&MAGIC);
        slot[96..CRC_AT].fill(0);
        let checksum = crc32c(&slot[..CRC_AT]);
        slot[CRC_AT..CRC_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        slot[CRC_AT + 4..].fill(0);
    }
    let whole = bytes.len() / SLOT_BYTES;
    assert_eq!(newest(&mended).is_some(), whole > 0, "what a head is made of is a head");
    [bytes, &mended].map(newest).into_iter().flatten().fold(false, |_, (slot, head)| {
        assert!(slot < whole.min(2) as u64);
        assert_eq!(Head::parse(&head.encode()), Some(head));
        true
    })
}

impl Head {
    pub(crate) fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.segment.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.end.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.chain);
        bytes[64..72].copy_from_slice(&self.unix_ms.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.since_boot_ms.to_le_bytes());
        bytes[80..96].copy_from_slice(&self.boot);
        let checksum = crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8; SLOT_BYTES]) -> Option<Self> {
        let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes[at..].first_chunk()?));
        let head = Self {
            sequence: u64_at(8)?,
            segment: u64_at(16)?,
            end: u64_at(24)?,
            chain: *bytes[32..].first_chunk()?,
            unix_ms: u64_at(64)?,
            since_boot_ms: u64_at(72)?,
            boot: *bytes[80..].first_chunk()?,
        };
        (head.encode() == *bytes).then_some(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(sequence: u64) -> Head {
        Head {
            sequence,
            segment: 1,
            end: 500 + sequence,
            chain: [3; 32],
            unix_ms: 9,
            since_boot_ms: 8,
            boot: [1; 16],
        }
    }

    #[test]
    fn the_newest_sound_slot_counts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(HeadFile::open(dir.path()).unwrap().1, None);
        for sequence in 1..6 {
            // Reopened each time: the older slot must be the one that is overwritten.
            let (mut file, _) = HeadFile::open(dir.path()).unwrap();
            file.write(&head(sequence)).unwrap();
            assert_eq!(HeadFile::open(dir.path()).unwrap().1, Some(head(sequence)));
        }
        let sound = std::fs::read(dir.path().join("head")).unwrap();
        for bit in 0..sound.len() * 8 {
            let mut flipped = sound.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(dir.path().join("head"), flipped).unwrap();
            let found = peek(dir.path()).unwrap().unwrap();
            assert!(found == head(5) || found == head(4), "bit {bit}: {found:?}");
        }
    }
}
