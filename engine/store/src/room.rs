//! How much room a store has when nobody says how much it may take.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::io::free_bytes;
use crate::{Result, StoreError};

/// This part of what there is stays free: for the index, which cannot be refused a write, and for the file system.
const SPARED_PART: u64 = 20;
/// Stays free at least, though never more than half: no segment is made where fewer than 8 MiB would be left.
const SPARED_BYTES: u64 = 24 << 20;

/// Bytes that the segments of the store in `dir` may take: what they take now and what is free, less a twentieth and at least 24 MiB. The folder is
/// made if it is not there.
pub fn room(dir: &Path) -> Result<u64> {
    let segments = dir.join("segments");
    fs::create_dir_all(&segments).map_err(StoreError::io("making", &segments))?;
    let free = free_bytes(&segments).map_err(StoreError::io("asking for the free space of", &segments))?;
    let items = fs::read_dir(&segments).map_err(StoreError::io("listing", &segments))?;
    // Blocks of stat(2) have 512 bytes whatever the file system's have.
    let taken: u64 =
        items.flatten().filter_map(|item| item.metadata().ok()).map(|meta| meta.blocks() * 512).sum();
    let all = free.saturating_add(taken);
    Ok(all - (all / SPARED_PART).max(SPARED_BYTES).min(all / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_and_what_is_free_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let before = room(dir.path()).unwrap();
        fs::write(dir.path().join("segments/a"), vec![1; 64 << 20]).unwrap();
        let after = room(dir.path()).unwrap();
        // Others use this disk, too: only that it is of this size can be told.
        assert!(before > 0 && after > before / 2, "{before} {after}");
    }
}
