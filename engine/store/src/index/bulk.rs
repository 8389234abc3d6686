//! Many entries at once, for a rebuild: written as one sorted file that RocksDB takes in whole, past its log and its
//! memory, so that each entry is written once.
//!
//! Nothing of it is in the index before [`Bulk::finish`], and all of it durably after. An entry that was there before is
//! replaced.

use std::fs;
use std::path::PathBuf;

use rocksdb::{IngestExternalFileOptions, SstFileWriter};

use super::entry::entry_key;
use super::{Entry, Index};
use crate::Result;

/// See the module.
pub(crate) struct Bulk<'a> {
    index: &'a Index,
    writer: SstFileWriter<'a>,
    path: PathBuf,
}

impl Index {
    /// Starts a bulk; one at a time.
    pub(crate) fn bulk(&self) -> Result<Bulk<'_>> {
        // Beside the folder of the index, in which RocksDB alone makes files.
        let path = self.dir.join("index.bulk");
        let writer = SstFileWriter::create(&self.options);
        // One that a crash left behind.
        let _ = fs::remove_file(&path);
        writer.open(&path)?;
        Ok(Bulk { index: self, writer, path })
    }
}

impl Bulk<'_> {
    /// Adds an entry. They come in the order of their places.
    pub(crate) fn put(&mut self, entry: &Entry) -> Result<()> {
        Ok(self.writer.put(entry_key(entry.spot), entry.encode())?)
    }

    /// Makes all of them findable, durably.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.writer.finish()?;
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        Ok(self.index.db.ingest_external_file_opts(&options, vec![&self.path])?)
    }
}

impl Drop for Bulk<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
