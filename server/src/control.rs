//! What the service itself must not forget: tenants, sessions, warm-up jobs. Small values under short names in a RocksDB of
//! its own, `DIR/control`; every write is flushed before it returns. Unlike the store's index this is no derived data.

use std::path::Path;

use anyhow::Context;
use rocksdb::{DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a name belongs to; its byte comes first in every key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Table {
    Tenants = b't',
    Sessions = b's',
    Warmups = b'w',
    UsageCursors = b'u',
    UsageSinks = b'x',
    WarmupPrompts = b'p',
    Writers = b'a',
    Users = b'n',
    Namespaces = b'm',
}

/// See the module.
pub(crate) struct Control(DB);

impl Control {
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_paranoid_checks(true);
        options.set_write_buffer_size(4 << 20);
        options.set_keep_log_file_num(2);
        let db = DB::open(&options, dir).with_context(|| {
            format!(
                "cannot open {}: it holds tenants and sessions; restore it from a backup if it is damaged",
                dir.display()
            )
        })?;
        Ok(Self(db))
    }

    /// A value that is no JSON.
    pub(crate) fn get_bytes(&self, table: Table, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        self.0.get(key(table, name)).context("the control database cannot be read")
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, table: Table, name: &str) -> anyhow::Result<Option<T>> {
        let bytes = self.get_bytes(table, name)?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).with_context(|| unreadable(name))).transpose()
    }

    /// Durable when it returns.
    pub(crate) fn put<T: Serialize>(&self, table: Table, name: &str, value: &T) -> anyhow::Result<()> {
        self.put_bytes(table, name, &serde_json::to_vec(value).context("a value cannot be written as JSON")?)
    }

    /// Durable when it returns.
    pub(crate) fn put_bytes(&self, table: Table, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        self.0.put_opt(key(table, name), bytes, &durable()).context("the control database cannot be written")
    }

    /// Durable when it returns.
    pub(crate) fn delete(&self, table: Table, name: &str) -> anyhow::Result<()> {
        self.0.delete_opt(key(table, name), &durable()).context("the control database cannot be written")
    }

    /// All of them or none. Durable when it returns.
    pub(crate) fn delete_all(&self, table: Table, names: &[String]) -> anyhow::Result<()> {
        let mut batch = WriteBatch::default();
        names.iter().for_each(|name| batch.delete(key(table, name)));
        self.0.write_opt(batch, &durable()).context("the control database cannot be written")
    }

    /// Leaves nothing in the files of what was deleted: neither in the write-ahead log nor in older tables.
    pub(crate) fn expunge(&self) -> anyhow::Result<()> {
        self.0.flush().context("the control database cannot be written")?;
        self.0.compact_range::<&[u8], &[u8]>(None, None);
        Ok(())
    }

    /// Names that begin with `prefix`, in order.
    pub(crate) fn names(&self, table: Table, prefix: &str) -> anyhow::Result<Vec<String>> {
        let start = key(table, prefix);
        let mut names = Vec::new();
        for entry in self.0.iterator(IteratorMode::From(&start, Direction::Forward)) {
            let (key, _) = entry.context("the control database cannot be read")?;
            if !key.starts_with(&start) {
                break;
            }
            names.push(String::from_utf8_lossy(&key[1..]).into_owned());
        }
        Ok(names)
    }

    /// Names above `after` that begin with `prefix`, with their values, in order.
    pub(crate) fn scan<T: DeserializeOwned>(
        &self,
        table: Table,
        prefix: &str,
        after: &str,
        limit: usize,
    ) -> anyhow::Result<Vec<(String, T)>> {
        let start = key(table, if after > prefix { after } else { prefix });
        let mut found = Vec::new();
        for entry in self.0.iterator(IteratorMode::From(&start, Direction::Forward)) {
            let (key, value) = entry.context("the control database cannot be read")?;
            let name = String::from_utf8_lossy(&key[1..]).into_owned();
            if key[0] != table as u8 || !name.starts_with(prefix) || found.len() == limit {
                break;
            }
            if name.as_str() != after {
                let value = serde_json::from_slice(&value).with_context(|| unreadable(&name))?;
                found.push((name, value));
            }
        }
        Ok(found)
    }
}

fn key(table: Table, name: &str) -> Vec<u8> {
    [&[table as u8], name.as_bytes()].concat()
}

fn durable() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn unreadable(name: &str) -> String {
    format!("what the control database has under {name:?} cannot be understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_deleted_leaves_its_files_when_it_is_expunged() {
        let dir = tempfile::tempdir().unwrap();
        // In a table of its own by the second opening, and in the log.
        for name in ["older", "newer"] {
            let control = Control::open(dir.path()).unwrap();
            control.put(Table::Warmups, name, &"what nobody may read again").unwrap();
        }
        let control = Control::open(dir.path()).unwrap();
        control.put(Table::Warmups, "stays", &"what stays").unwrap();
        let files_with = |text: &str| {
            let files =
                std::fs::read_dir(dir.path()).unwrap().map(|entry| std::fs::read(entry.unwrap().path()));
            let holds = |bytes: &Vec<u8>| bytes.windows(text.len()).any(|window| window == text.as_bytes());
            files.filter(|bytes| bytes.as_ref().is_ok_and(holds)).count()
        };
        control.delete_all(Table::Warmups, &["older".to_owned(), "newer".to_owned()]).unwrap();
        assert!(files_with("what nobody may read again") > 0, "deleting alone is not enough");
        control.expunge().unwrap();
        assert_eq!(files_with("what nobody may read again"), 0);
        assert!(files_with("what stays") > 0);
    }

    #[test]
    fn values_stay_and_scans_keep_to_their_table() {
        let dir = tempfile::tempdir().unwrap();
        {
            let control = Control::open(dir.path()).unwrap();
            for name in ["a/1", "a/2", "a/3", "b/1"] {
                control.put(Table::Sessions, name, &name.len()).unwrap();
            }
            control.put(Table::Warmups, "a/9", &9).unwrap();
            control.delete(Table::Sessions, "a/3").unwrap();
        }
        let control = Control::open(dir.path()).unwrap();
        let names = |prefix, after, limit| {
            let found = control.scan::<usize>(Table::Sessions, prefix, after, limit).unwrap();
            found.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names("a/", "", 10), ["a/1", "a/2"]);
        assert_eq!(names("a/", "a/1", 10), ["a/2"]);
        assert_eq!(names("", "", 2), ["a/1", "a/2"]);
        assert_eq!(control.names(Table::Sessions, "a/").unwrap(), ["a/1", "a/2"]);
        assert_eq!(control.names(Table::Warmups, "").unwrap(), ["a/9"]);
        assert_eq!(control.get::<u32>(Table::Warmups, "a/9").unwrap(), Some(9));
        assert_eq!(control.get::<u32>(Table::Warmups, "a/1").unwrap(), None);
    }
}
