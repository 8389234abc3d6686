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

    pub(crate) fn get<T: DeserializeOwned>(&self, table: Table, name: &str) -> anyhow::Result<Option<T>> {
        let bytes = self.0.get(key(table, name)).context("the control database cannot be read")?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).with_context(|| unreadable(name))).transpose()
    }

    /// Durable when it returns.
    pub(crate) fn put<T: Serialize>(&self, table: Table, name: &str, value: &T) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(value).context("a value cannot be written as JSON")?;
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
        assert_eq!(control.get::<u32>(Table::Warmups, "a/9").unwrap(), Some(9));
        assert_eq!(control.get::<u32>(Table::Warmups, "a/1").unwrap(), None);
    }
}
