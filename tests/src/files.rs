//! The files of a data folder, read as `engine/store/src/record.rs` describes them.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use esker_prefix::ObjectKind;
use xxhash_rust::xxh3::xxh3_64;

const PAGE: usize = 4096;
const FIXED_BYTES: usize = 256;
const PLANE_BYTES: usize = 64;

/// A record of a segment.
#[derive(Debug)]
pub struct Record {
    /// The segment's file.
    pub file: PathBuf,
    /// What it holds.
    pub kind: ObjectKind,
    /// Prefix length that it completes.
    pub tokens: u64,
    /// Its header and plane table, in the file.
    pub header: Range<u64>,
    /// The stored bytes of its planes, in the file.
    pub planes: Vec<Range<u64>>,
}

/// Every record of every segment, in the order of their files.
pub fn records(data: &Path) -> Result<Vec<Record>> {
    let folder = data.join("store/segments");
    let listed = std::fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut files: Vec<PathBuf> = listed.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    let mut records = Vec::new();
    for file in files {
        let bytes = std::fs::read(&file)?;
        for at in (0..bytes.len()).step_by(PAGE).filter(|&at| bytes[at..].starts_with(b"EskrRec\0")) {
            records.extend(record(&file, &bytes[at..], at as u64));
        }
    }
    Ok(records)
}

fn record(file: &Path, bytes: &[u8], at: u64) -> Option<Record> {
    let u32_at = |offset: usize| Some(u64::from(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?)));
    let count = usize::from(u16::from_le_bytes(*bytes.get(14..)?.first_chunk()?));
    let plane = |index: usize| {
        let row = FIXED_BYTES + index * PLANE_BYTES;
        let start = at + u32_at(row + 8)?;
        Some(start..start + u32_at(row + 12)?)
    };
    Some(Record {
        file: file.to_owned(),
        kind: ObjectKind::from_u8(*bytes.get(10)?)?,
        tokens: u64::from_le_bytes(*bytes.get(56..)?.first_chunk()?),
        header: at..at + (FIXED_BYTES + count * PLANE_BYTES) as u64,
        planes: (0..count).map(plane).collect::<Option<_>>()?,
    })
}

/// Changes one byte of a file, durably: a reader of the drive sees it, not only a reader of the page cache.
pub fn change(file: &Path, at: u64, change: impl FnOnce(u8) -> u8) -> Result<()> {
    let file: File = OpenOptions::new().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[change(byte[0])], at)?;
    Ok(file.sync_all()?)
}

/// Makes a stopped store believe that it lived through this many seconds more.
pub fn pass(data: &Path, seconds: u64) -> Result<()> {
    let path = data.join("store/clock");
    let text = std::fs::read_to_string(&path)?;
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [magic, version, store_s, boot, since_s, _] = fields[..] else {
        anyhow::bail!("{} has another form: {text}", path.display())
    };
    let store_s = store_s.parse::<u64>()? + seconds;
    let said = format!("{magic} {version} {store_s} {boot} {since_s}");
    Ok(std::fs::write(&path, format!("{said} {:016x}\n", xxh3_64(said.as_bytes())))?)
}

/// Copies the files of a folder, which others may keep read-only.
pub fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("listing {}", from.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::write(to.join(entry.file_name()), std::fs::read(entry.path())?)?;
        }
    }
    Ok(())
}
