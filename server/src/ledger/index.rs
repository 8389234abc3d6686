//! What the ledger's records add up to, and which requests have one: a RocksDB in `DIR/index`, derived from the records and made
//! again from them when it is gone. It says itself up to which record it has counted, in the same write as the counts, so it is
//! never ahead of itself.
//!
//! ```text
//! 'm'                                        -> position up to which it has counted, as a cursor
//! 'r' tenant 0 request id                    -> content 16 | segment u64 | offset u64 | time, unix ms, u64; little-endian
//! 'h' hour u64 BE, tenant 0 scope 0 namespace -> UsageSums, protobuf
//! 's' hour u64 BE, tenant 0 scope 0 namespace -> byte-seconds stored u64 | pinned u64: of hours that have no record yet
//! ```
//!
//! Names of requests are forgotten after [`DEDUPE_DAYS`].

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use esker_proto::v1;
use prost::Message;
use rocksdb::compaction_filter::Decision;
use rocksdb::{BlockBasedOptions, DB, Direction, IteratorMode, Options, WriteBatch};

use super::log::{Place, Position};
use super::sums::{self, Account};

/// How long a request's name is remembered at least; sinks ask for 35.
pub(crate) const DEDUPE_DAYS: u64 = 40;
const DAY_MS: u64 = 86_400_000;
const WATERMARK: &[u8] = b"m";
const NAME_VALUE_BYTES: usize = 40;
/// Accounts whose sums are kept in memory, a few hundred bytes each.
const CACHED_ACCOUNTS: usize = 4096;

/// See the module.
pub(crate) struct Index {
    db: DB,
    /// Time of the newest record, by which names grow old.
    now_ms: Arc<AtomicU64>,
    cache: HashMap<Account, v1::UsageSums>,
}

/// The record of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) content: [u8; 16],
    pub(crate) segment: u64,
    pub(crate) offset: u64,
}

/// Byte-seconds of an hour that has not ended, or has no record yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ByteSeconds {
    pub(crate) stored: u64,
    pub(crate) pinned: u64,
}

impl Index {
    /// Opens it. One that is damaged is made again, empty.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        use anyhow::Context;
        let now_ms = Arc::new(AtomicU64::new(0));
        let db = match DB::open(&options(&now_ms), dir) {
            Ok(db) => db,
            Err(error) if dir.exists() && error.kind() == rocksdb::ErrorKind::Corruption => {
                tracing::warn!(%error, "the ledger's index is damaged and made again from the ledger");
                std::fs::remove_dir_all(dir)
                    .with_context(|| format!("cannot remove the damaged index {}", dir.display()))?;
                DB::open(&options(&now_ms), dir)
                    .with_context(|| format!("cannot make the index {}", dir.display()))?
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open the index {}", dir.display()));
            }
        };
        Ok(Self { db, now_ms, cache: HashMap::new() })
    }

    /// How far it has counted.
    pub(crate) fn watermark(&self) -> Result<Option<Position>, rocksdb::Error> {
        let text = self.db.get(WATERMARK)?;
        Ok(text.and_then(|text| Position::from_cursor(std::str::from_utf8(&text).ok()?)))
    }

    /// The record of a request, if it has one.
    pub(crate) fn find(&self, tenant: &str, request_id: &str) -> Result<Option<Known>, rocksdb::Error> {
        let value = self.db.get_pinned(name_key(tenant, request_id))?;
        Ok(value.and_then(|value| known(&value)))
    }

    /// Counts records that are durable, and notes how far that is.
    pub(crate) fn apply<'a>(
        &mut self,
        records: impl Iterator<Item = (&'a v1::UsageRecord, Place)>,
        through: &Position,
    ) -> Result<(), rocksdb::Error> {
        let mut batch = WriteBatch::default();
        if self.cache.len() > CACHED_ACCOUNTS {
            self.cache.clear();
        }
        let mut touched: HashMap<Account, v1::UsageSums> = HashMap::new();
        for (record, place) in records {
            self.now_ms.fetch_max(record.time_unix_ms, Ordering::Relaxed);
            batch.put(name_key(&record.tenant, &record.request_id), name_value(record, place));
            let account = sums::account(record);
            if sums::is_storage(record) {
                batch.delete(account_key(b's', &account));
            }
            let sums = match touched.remove(&account) {
                Some(sums) => sums,
                None => self.sums(&account)?,
            };
            let sums = touched.entry(account).or_insert(sums);
            sums::count(sums, record);
        }
        for (account, sums) in &touched {
            batch.put(account_key(b'h', account), sums.encode_to_vec());
        }
        batch.put(WATERMARK, through.to_cursor());
        self.db.write(batch)?;
        self.cache.extend(touched);
        Ok(())
    }

    fn sums(&self, account: &Account) -> Result<v1::UsageSums, rocksdb::Error> {
        if let Some(sums) = self.cache.get(account) {
            return Ok(*sums);
        }
        let bytes = self.db.get_pinned(account_key(b'h', account))?;
        Ok(bytes.and_then(|bytes| v1::UsageSums::decode(&*bytes).ok()).unwrap_or_default())
    }

    /// Sums of all accounts in the hours from `start` to before `end`; hours that are not closed with what they have so far.
    pub(crate) fn query(
        &self,
        start_unix_s: u64,
        end_unix_s: u64,
    ) -> Result<Vec<(Account, v1::UsageSums)>, rocksdb::Error> {
        let mut rows: Vec<(Account, v1::UsageSums)> = Vec::new();
        self.scan(b'h', start_unix_s, end_unix_s, |account, value| {
            rows.push((account, v1::UsageSums::decode(value).unwrap_or_default()));
        })?;
        self.scan(b's', start_unix_s, end_unix_s, |account, value| {
            let ByteSeconds { stored, pinned } = byte_seconds(value);
            let sums = v1::UsageSums {
                stored_byte_seconds: stored,
                pinned_byte_seconds: pinned,
                ..Default::default()
            };
            match rows.iter_mut().find(|(other, _)| *other == account) {
                Some((_, row)) => sums::add(row, &sums),
                None => rows.push((account, sums)),
            }
        })?;
        Ok(rows)
    }

    /// Adds to the byte-seconds of an hour. Not flushed: a crash of the machine costs the tenant nothing and us a little.
    pub(crate) fn add_byte_seconds(&self, more: &[(Account, ByteSeconds)]) -> Result<(), rocksdb::Error> {
        let mut batch = WriteBatch::default();
        for (account, more) in more {
            let key = account_key(b's', account);
            let sum = self.db.get_pinned(&key)?.map(|value| byte_seconds(&value)).unwrap_or_default();
            let (stored, pinned) =
                (sum.stored.saturating_add(more.stored), sum.pinned.saturating_add(more.pinned));
            batch.put(key, [stored.to_le_bytes(), pinned.to_le_bytes()].concat());
        }
        self.db.write(batch)
    }

    /// What the hours before `hour` have that has no record yet.
    pub(crate) fn open_byte_seconds(
        &self,
        before_unix_s: u64,
    ) -> Result<Vec<(Account, ByteSeconds)>, rocksdb::Error> {
        let mut open = Vec::new();
        self.scan(b's', 0, before_unix_s, |account, value| open.push((account, byte_seconds(value))))?;
        Ok(open)
    }

    fn scan(
        &self,
        kind: u8,
        start_unix_s: u64,
        end_unix_s: u64,
        mut see: impl FnMut(Account, &[u8]),
    ) -> Result<(), rocksdb::Error> {
        let start = [&[kind][..], &start_unix_s.to_be_bytes()].concat();
        for entry in self.db.iterator(IteratorMode::From(&start, Direction::Forward)) {
            let (key, value) = entry?;
            match account_of(&key).filter(|account| key[0] == kind && account.hour_unix_s < end_unix_s) {
                Some(account) => see(account, &value),
                None => break,
            }
        }
        Ok(())
    }

    pub(crate) fn flush(&self) -> Result<(), rocksdb::Error> {
        self.db.flush_wal(true)
    }
}

fn options(now_ms: &Arc<AtomicU64>) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_paranoid_checks(true);
    options.set_write_buffer_size(16 << 20);
    options.set_keep_log_file_num(2);
    let mut blocks = BlockBasedOptions::default();
    // Nearly every request is new: a filter says so without reading.
    blocks.set_bloom_filter(10.0, false);
    options.set_block_based_table_factory(&blocks);
    let now_ms = Arc::clone(now_ms);
    options.set_compaction_filter("forgotten requests", move |_, key, value| {
        let old = |value: &[u8]| {
            let written = value.get(32..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))?;
            Some(written.saturating_add(DEDUPE_DAYS * DAY_MS) < now_ms.load(Ordering::Relaxed))
        };
        let name = key.first() == Some(&b'r') && value.len() == NAME_VALUE_BYTES;
        if name && old(value) == Some(true) { Decision::Remove } else { Decision::Keep }
    });
    options
}

fn name_key(tenant: &str, request_id: &str) -> Vec<u8> {
    [b"r", tenant.as_bytes(), &[0], request_id.as_bytes()].concat()
}

pub(crate) fn name_value(record: &v1::UsageRecord, place: Place) -> [u8; NAME_VALUE_BYTES] {
    let mut value = [0; NAME_VALUE_BYTES];
    let content = record.content.get(..16).unwrap_or(&[0; 16]);
    value[..16].copy_from_slice(content);
    value[16..24].copy_from_slice(&place.segment.to_le_bytes());
    value[24..32].copy_from_slice(&place.offset.to_le_bytes());
    value[32..].copy_from_slice(&record.time_unix_ms.to_le_bytes());
    value
}

fn known(value: &[u8]) -> Option<Known> {
    let u64_at = |at: usize| Some(u64::from_le_bytes(*value.get(at..)?.first_chunk()?));
    Some(Known { content: *value.first_chunk()?, segment: u64_at(16)?, offset: u64_at(24)? })
}

/// Neither tenants nor scopes have a zero byte in their names.
pub(crate) fn account_key(kind: u8, account: &Account) -> Vec<u8> {
    let Account { hour_unix_s, tenant, namespace, scope } = account;
    [&[kind][..], &hour_unix_s.to_be_bytes(), tenant.as_bytes(), &[0], scope.as_bytes(), &[0], namespace]
        .concat()
}

fn account_of(key: &[u8]) -> Option<Account> {
    let (hour, rest) = key.get(1..)?.split_first_chunk::<8>()?;
    let mut parts = rest.splitn(3, |&byte| byte == 0);
    let mut text = || String::from_utf8(parts.next()?.to_vec()).ok();
    let (tenant, scope) = (text()?, text()?);
    let namespace = parts.next()?.to_vec();
    Some(Account { hour_unix_s: u64::from_be_bytes(*hour), tenant, namespace, scope })
}

fn byte_seconds(value: &[u8]) -> ByteSeconds {
    let u64_at = |at: usize| value.get(at..).and_then(|rest| Some(u64::from_le_bytes(*rest.first_chunk()?)));
    ByteSeconds { stored: u64_at(0).unwrap_or(0), pinned: u64_at(8).unwrap_or(0) }
}

/// For fuzzing: each kind of key and value. Whether the bytes are one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let position = std::str::from_utf8(bytes).ok().and_then(Position::from_cursor);
    if let Some(position) = &position {
        assert_eq!(Position::from_cursor(&position.to_cursor()).as_ref(), Some(position));
    }
    let account = account_of(bytes);
    if let Some(account) = &account {
        assert_eq!(account_key(bytes[0], account), bytes);
    }
    let sums = v1::UsageSums::decode(bytes);
    if let Ok(sums) = &sums {
        let mut twice = *sums;
        sums::add(&mut twice, sums);
    }
    let _ = byte_seconds(bytes);
    position.is_some() || account.is_some() || sums.is_ok() || known(bytes).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back() {
        for (tenant, scope, namespace) in
            [("acme", "private", vec![0; 32]), ("", "public", vec![]), ("a", "", vec![0, 1, 0])]
        {
            let account =
                Account { hour_unix_s: 1_795_003_200, tenant: tenant.into(), namespace, scope: scope.into() };
            assert_eq!(account_of(&account_key(b'h', &account)), Some(account));
        }
    }

    #[test]
    fn names_are_forgotten_after_their_time_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::open(dir.path()).unwrap();
        let mut put = |number: u64, day: u64| {
            let record = v1::UsageRecord {
                tenant: "t".into(),
                request_id: format!("r{number}"),
                time_unix_ms: day * DAY_MS,
                ..Default::default()
            };
            let place = Place { sequence: number, segment: 1, offset: number };
            index.apply(std::iter::once((&record, place)), &Position::start("c")).unwrap();
        };
        put(1, 1000);
        put(2, 1010);
        put(3, 1000 + DEDUPE_DAYS + 5);
        index.db.compact_range(None::<&[u8]>, None::<&[u8]>);
        let known = |number: u64| index.find("t", &format!("r{number}")).unwrap().is_some();
        assert_eq!([known(1), known(2), known(3)], [false, true, true]);
        const { assert!(DEDUPE_DAYS >= 35) };
    }
}
