//! RocksDB with blob files: values beside the tree, so that compactions do not rewrite them.

use std::path::{Path, PathBuf};

use anyhow::Context;
use rocksdb::{DB, DBCompressionType, Options, WriteBatch, WriteOptions};

use super::{Blob, CALLERS, Rival, TURN_BLOCKS};

/// See the module.
pub(super) struct BlobDb {
    dir: PathBuf,
    /// Whether puts go through a log that is flushed with each; else a round ends with a flush of the memtable.
    log: bool,
    /// `None` only while it is opened again.
    db: Option<DB>,
}

impl BlobDb {
    pub(super) fn open(dir: &Path, log: bool) -> anyhow::Result<Self> {
        let db = Some(DB::open(&options(), dir)?);
        Ok(Self { dir: dir.to_owned(), log, db })
    }

    fn db(&self) -> anyhow::Result<&DB> {
        self.db.as_ref().context("the database is closed")
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_compression_type(DBCompressionType::None);
    options.set_enable_blob_files(true);
    options.set_min_blob_size(4096);
    options.set_blob_file_size(256 << 20);
    options.set_blob_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(128 << 20);
    options.set_max_write_buffer_number(4);
    options.increase_parallelism(2);
    options.set_use_direct_reads(true);
    options.set_use_direct_io_for_flush_and_compaction(true);
    options
}

impl Rival for BlobDb {
    fn put(&self, callers: &[Vec<Blob>]) -> anyhow::Result<()> {
        let db = self.db()?;
        std::thread::scope(|scope| {
            let callers: Vec<_> = callers
                .iter()
                .map(|blobs| {
                    scope.spawn(move || {
                        let mut how = WriteOptions::default();
                        how.set_sync(self.log);
                        how.disable_wal(!self.log);
                        for turn in blobs.chunks(TURN_BLOCKS) {
                            let mut batch = WriteBatch::default();
                            turn.iter().for_each(|blob| batch.put(blob.key, &blob.bytes));
                            db.write_opt(batch, &how)?;
                        }
                        anyhow::Ok(())
                    })
                })
                .collect();
            callers.into_iter().try_for_each(|caller| caller.join().expect("a caller"))
        })?;
        if !self.log {
            db.flush()?;
        }
        Ok(())
    }

    fn get(&self, keys: &[[u8; 32]]) -> anyhow::Result<u64> {
        let db = self.db()?;
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..CALLERS)
                .map(|caller| {
                    scope.spawn(move || {
                        let mut bytes = 0;
                        for key in keys.iter().skip(caller).step_by(CALLERS) {
                            bytes += db.get_pinned(key)?.context("a block is missing")?.len() as u64;
                        }
                        anyhow::Ok(bytes)
                    })
                })
                .collect();
            callers.into_iter().map(|caller| caller.join().expect("a caller")).sum()
        })
    }

    fn reopen(&mut self) -> anyhow::Result<()> {
        // What is still in memory goes to its files, untimed.
        self.db()?.flush()?;
        self.db = None;
        self.db = Some(DB::open(&options(), &self.dir)?);
        Ok(())
    }
}
