//! An index in memory, for tests that open thousands of stores: RocksDB as it is, on its own in-memory file system.
//!
//! A crash test decides what an opening finds. An index that lost the newest part of its log is one that holds what an
//! earlier one held, because a batch is in the log whole or not at all, so its content stands for its files.

use std::cell::RefCell;
use std::path::Path;

use rocksdb::{DB, Env, IteratorMode, Options, WriteBatch};

use super::Index;

/// Keys and values.
pub(crate) type Contents = Vec<(Box<[u8]>, Box<[u8]>)>;

thread_local! {
    static NEXT: RefCell<Option<Contents>> = const { RefCell::new(None) };
}

/// Makes the next opening of an index on this thread one in memory that holds `contents`.
pub(crate) fn expect(contents: &Contents) {
    NEXT.set(Some(contents.clone()));
}

/// The index that was asked for by [`expect`], if one was.
pub(super) fn open(options: &mut Options, path: &Path) -> Option<Result<DB, rocksdb::Error>> {
    let contents = NEXT.take()?;
    Some(Env::mem_env().and_then(|env| {
        options.set_env(&env);
        // Statistics have a thread, the log is long, and a memtable is touched in steps of an eighth of its size: together
        // they would take longer than the rest of an opening.
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options.set_log_level(rocksdb::LogLevel::Fatal);
        options.set_arena_block_size(32 << 10);
        let db = DB::open(options, path)?;
        let mut batch = WriteBatch::default();
        contents.iter().for_each(|(key, value)| batch.put(key, value));
        db.write(batch)?;
        Ok(db)
    }))
}

impl Index {
    /// Everything that it holds.
    pub(crate) fn contents(&self) -> Contents {
        self.db.iterator(IteratorMode::Start).map(|item| item.expect("memory can be read")).collect()
    }
}
