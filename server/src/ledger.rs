//! The billing ledger: what was used of the cache, one record for each request, append-only and chained.
//!
//! Invariants:
//! - A record is durable before anyone is told that its account is closed. Many are flushed together.
//! - One tenant's request has one record. The same request again is answered with that record; another under its name is refused.
//! - Damage is found and named, and nothing behind it is given out as if nothing had happened.
//! - Tokens, bytes and byte-seconds are integers. What they cost is computed elsewhere (price.rs), from them alone.
//!
//! Files, under `DATA/ledger`: segments (ledger/segment.rs) of records (ledger/frame.rs), the head (ledger/head.rs), which says how
//! far they go, and the index (ledger/index.rs), which is derived from them. The exactly-once is the ledger's: sinks that it is
//! exported to see records at least once and tell repeats by `usage_id`.

mod commit;
pub(crate) mod frame;
pub(crate) mod head;
mod hooks;
mod id;
pub(crate) mod index;
pub(crate) mod log;
mod reader;
mod recovery;
pub(crate) mod segment;
pub(crate) mod storage;
pub(crate) mod sums;
mod time;
pub(crate) mod verify;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use esker_proto::v1;
use esker_store::clock::{Clock, SystemClock};
use tokio::sync::{mpsc, oneshot, watch};

use commit::{Ask, Committer};
use hooks::Hooks;
pub(crate) use id::{content, content_of, is_reserved, usage_id};
use index::{ByteSeconds, Index};
pub(crate) use log::Position;
pub(crate) use reader::{Gap, Reader, Step};
use sums::Account;
use time::{LedgerTime, SystemWallClock, WallClock};

/// Accounts waiting to be written at most. Beyond that callers are told to come again.
const QUEUE: usize = 16_384;
/// While less than this is free, nothing billable is begun: what is open already can still be closed.
const RESERVE_BYTES: u64 = 4 << 20;

/// How a ledger is set up.
#[derive(Clone, Copy, Debug)]
pub struct LedgerSettings {
    /// Size of a segment file.
    pub segment_bytes: u64,
    /// Most that all segments take on disk; beyond it billable work stops.
    pub max_bytes: u64,
}

impl Default for LedgerSettings {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, max_bytes: u64::MAX }
    }
}

/// Why an account could not be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LedgerError {
    #[error(
        "request {request_id:?} has a usage record already, and it was for something else: use another request_id"
    )]
    Conflict { request_id: String },
    #[error(
        "the billing ledger is full ({disk_bytes} bytes of at most {max_bytes}): nothing billable is done until it has \
         room. Free space on its disk or raise --ledger-mib"
    )]
    Full { disk_bytes: u64, max_bytes: u64 },
    #[error(
        "the billing ledger could not be written; nothing billable is done until this node is started again"
    )]
    Failed,
    #[error("the billing ledger has {QUEUE} accounts waiting: try again shortly")]
    Busy,
    #[error("a usage record of {len_bytes} bytes is too large for the ledger")]
    TooLarge { len_bytes: usize },
    #[error("the usage record of this request is damaged: {reason}")]
    Damaged { reason: String },
    #[error("the ledger's index cannot be used: {0}")]
    Index(String),
    #[error("this node is stopping")]
    Stopping,
}

/// A closed account.
#[derive(Clone, Debug)]
pub(crate) struct Closed {
    pub(crate) record: v1::UsageRecord,
    /// Whether it had been closed before.
    pub(crate) replayed: bool,
}

/// What is counted for graphs; never what is billed.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) records: AtomicU64,
    pub(crate) replays: AtomicU64,
    pub(crate) conflicts: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) gaps: AtomicU64,
    pub(crate) skewed: AtomicU64,
    pub(crate) disk_bytes: AtomicU64,
    /// By tenant, since this process started.
    tenants: Mutex<std::collections::BTreeMap<String, v1::UsageSums>>,
}

/// See the module.
pub(crate) struct Ledger {
    dir: PathBuf,
    cluster: String,
    queue: mpsc::Sender<Ask>,
    end: watch::Receiver<Position>,
    shared: Arc<Shared>,
    hooks: Hooks,
    committer: Option<JoinHandle<()>>,
}

/// What the committing thread shares with everyone.
pub(crate) struct Shared {
    index: Mutex<Index>,
    counters: Counters,
    room: AtomicBool,
    failed: AtomicBool,
    /// The newest gap that was found.
    gap: Mutex<Option<Gap>>,
}

impl Ledger {
    /// Opens `dir`, made if absent, and counts what the index has not counted yet.
    pub(crate) fn open(dir: &Path, settings: LedgerSettings, cluster: &str) -> anyhow::Result<Self> {
        let clock = Arc::new(SystemClock::new().context("the machine's time since boot cannot be read")?);
        Self::open_with(dir, settings, cluster, Hooks::default(), Arc::new(SystemWallClock), clock)
    }

    fn open_with(
        dir: &Path,
        settings: LedgerSettings,
        cluster: &str,
        hooks: Hooks,
        wall: Arc<dyn WallClock>,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Self> {
        let unusable = || format!("cannot open the billing ledger {}", dir.display());
        std::fs::create_dir_all(dir).with_context(unusable)?;
        let mut index = Index::open(&dir.join("index"))?;
        let watermark = index.watermark().with_context(unusable)?;
        let recovered =
            recovery::recover(dir, &settings, cluster, watermark.as_ref()).with_context(unusable)?;
        if recovered.torn_bytes > 0 {
            tracing::info!(
                bytes = recovered.torn_bytes,
                "a write to the ledger that a crash cut short was taken off; it had not been acknowledged"
            );
        }
        let mut gap = recovered.gap;
        let from = watermark.unwrap_or_else(|| Position::start(cluster));
        let found = catch_up(dir, &mut index, from, &recovered.end).with_context(unusable)?;
        gap = gap.or(found);
        let counters = Counters::default();
        if let Some(gap) = &gap {
            tracing::error!("ALERT: {gap}. Exports stop there; `esker usage verify` tells all of it");
            counters.gaps.fetch_add(1, Ordering::Relaxed);
        }
        let time = LedgerTime::open(wall, clock, recovered.head.as_ref());
        let log = log::Log::resume(dir, settings, hooks.clone(), &recovered.end, recovered.head_file)
            .with_context(unusable)?;
        let shared = Arc::new(Shared {
            index: Mutex::new(index),
            counters,
            room: AtomicBool::new(true),
            failed: AtomicBool::new(false),
            gap: Mutex::new(gap),
        });
        let (queue, asks) = mpsc::channel(QUEUE);
        let (publish, end) = watch::channel(recovered.end);
        let committer = Committer::new(log, time, cluster, hooks.clone(), Arc::clone(&shared), publish);
        let committer = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || committer.run(asks))
            .context("cannot start the ledger's thread")?;
        let (dir, cluster) = (dir.to_owned(), cluster.to_owned());
        Ok(Self { dir, cluster, queue, end, shared, hooks, committer: Some(committer) })
    }

    /// Whether something billable may be begun now. What is open can be closed a while longer.
    pub(crate) fn admit(&self) -> Result<(), LedgerError> {
        if self.shared.failed.load(Ordering::Acquire) {
            return Err(LedgerError::Failed);
        }
        if !self.shared.room.load(Ordering::Acquire) {
            let disk_bytes = self.shared.counters.disk_bytes.load(Ordering::Relaxed);
            return Err(LedgerError::Full { disk_bytes, max_bytes: disk_bytes });
        }
        Ok(())
    }

    /// Closes an account: durable when this returns. Id, time and sequence are the ledger's to say.
    pub(crate) async fn close(&self, record: v1::UsageRecord) -> Result<Closed, LedgerError> {
        self.hooks.at("served").map_err(|_| LedgerError::Failed)?;
        let (reply, answer) = oneshot::channel();
        self.ask(Ask::Close { record: Box::new(record), reply })?;
        answer.await.map_err(|_| LedgerError::Stopping)?
    }

    /// The same from a thread that may wait.
    pub(crate) fn close_blocking(&self, record: v1::UsageRecord) -> Result<Closed, LedgerError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Ask::Close { record: Box::new(record), reply })?;
        answer.blocking_recv().map_err(|_| LedgerError::Stopping)?
    }

    /// What is known of a request: its record, a conflict if that is for something else, or nothing.
    pub(crate) async fn find(
        &self,
        tenant: &str,
        request_id: &str,
        content: [u8; 16],
    ) -> Result<Option<Closed>, LedgerError> {
        let (tenant, request_id) = (tenant.to_owned(), request_id.to_owned());
        let (reply, answer) = oneshot::channel();
        self.ask(Ask::Find { tenant, request_id, content, reply })?;
        answer.await.map_err(|_| LedgerError::Stopping)?
    }

    /// Sums of all accounts in the hours from `start` to before `end`, and the sequence up to which they count.
    pub(crate) fn query(
        &self,
        start_unix_s: u64,
        end_unix_s: u64,
    ) -> Result<(Vec<(Account, v1::UsageSums)>, u64), LedgerError> {
        let index = self.shared.index();
        let rows =
            index.query(start_unix_s, end_unix_s).map_err(|error| LedgerError::Index(error.to_string()))?;
        let through = index.watermark().map_err(|error| LedgerError::Index(error.to_string()))?;
        Ok((rows, through.map_or(0, |through| through.sequence)))
    }

    /// Where the ledger ends now, and a way to learn that it has grown.
    pub(crate) fn end(&self) -> watch::Receiver<Position> {
        self.end.clone()
    }

    /// Reads on from a position; from the first record if there is none.
    pub(crate) fn read(&self, from: Option<Position>) -> Reader {
        Reader::new(&self.dir, from.unwrap_or_else(|| Position::start(&self.cluster)))
    }

    /// Takes note of a gap that a reader found. Whether it was not known yet.
    pub(crate) fn alert(&self, gap: &Gap) -> bool {
        let mut known = self.shared.gap.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref() == Some(gap) {
            return false;
        }
        tracing::error!("ALERT: {gap}");
        self.shared.counters.gaps.fetch_add(1, Ordering::Relaxed);
        *known = Some(gap.clone());
        true
    }

    /// The newest gap that was found, by opening or by a reader.
    pub(crate) fn gap(&self) -> Option<Gap> {
        self.shared.gap.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps house: spare space, the head, hours that have ended.
    pub(crate) fn tick(&self) {
        // A queue that is full is being worked on; the next tick comes soon.
        let _ = self.queue.try_send(Ask::Tick);
    }

    /// Adds to the byte-seconds of open hours.
    pub(crate) fn add_byte_seconds(&self, more: &[(Account, ByteSeconds)]) {
        if let Err(error) = self.shared.index().add_byte_seconds(more) {
            tracing::error!(%error, "stored byte-seconds could not be noted: they are not billed");
        }
    }

    /// Byte-seconds of hours before this one that have no record yet.
    pub(crate) fn open_byte_seconds(&self, before_unix_s: u64) -> Vec<(Account, ByteSeconds)> {
        self.shared.index().open_byte_seconds(before_unix_s).unwrap_or_else(|error| {
            tracing::error!(%error, "stored byte-seconds cannot be read");
            Vec::new()
        })
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Name of the deployment, in ids and exports.
    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    pub(crate) fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    fn ask(&self, ask: Ask) -> Result<(), LedgerError> {
        self.queue.try_send(ask).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LedgerError::Busy,
            mpsc::error::TrySendError::Closed(_) => LedgerError::Stopping,
        })
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // The thread ends when nobody can ask any more.
        self.queue = mpsc::channel(1).0;
        if let Some(committer) = self.committer.take() {
            // A panic in it has been reported by the panic hook.
            let _ = committer.join();
        }
    }
}

impl Counters {
    pub(crate) fn count(&self, record: &v1::UsageRecord) {
        self.records.fetch_add(1, Ordering::Relaxed);
        self.skewed.fetch_add(u64::from(record.clock_skewed), Ordering::Relaxed);
        // Byte-seconds are values of an hour, not events to add up.
        if !sums::is_storage(record) {
            let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
            match tenants.get_mut(&record.tenant) {
                Some(sums) => sums::count(sums, record),
                None => sums::count(tenants.entry(record.tenant.clone()).or_default(), record),
            }
        }
    }

    /// Sums by tenant since this process started, for graphs.
    pub(crate) fn tenants(&self) -> Vec<(String, v1::UsageSums)> {
        let tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        tenants.iter().map(|(tenant, sums)| (tenant.clone(), *sums)).collect()
    }
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts what the index has not. What is damaged cannot be counted; it is returned.
fn catch_up(dir: &Path, index: &mut Index, from: Position, end: &Position) -> anyhow::Result<Option<Gap>> {
    const BATCH: usize = 4096;
    let mut reader = Reader::new(dir, from);
    let mut first_gap = None;
    let mut batch: Vec<(v1::UsageRecord, log::Place)> = Vec::new();
    loop {
        let before = reader.position().clone();
        let step = reader.next(end)?;
        let ended = matches!(step, Step::End);
        match step {
            Step::Record(record) => {
                // The reader may have gone to the next segment first; then the record is its first.
                let at = reader.position();
                let offset =
                    if at.segment == before.segment { before.offset } else { segment::RECORDS_START };
                batch.push((*record, log::Place { sequence: at.sequence, segment: at.segment, offset }));
            }
            Step::Gap(gap) => first_gap = first_gap.or(Some(gap)),
            Step::End => {}
        }
        if ended || batch.len() == BATCH {
            let records = batch.iter().map(|(record, place)| (record, *place));
            index.apply(records, reader.position())?;
            batch.clear();
        }
        if ended {
            return Ok(first_gap);
        }
    }
}
