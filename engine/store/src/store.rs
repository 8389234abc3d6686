//! The store: open, put, lookup, fetch, close.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_prefix::{BlockHash, KvLayout, NamespaceId, ObjectId, ObjectKind, ScopeTag};

use crate::commit::{Committer, Submission};
use crate::encoding::Hashed;
use crate::fetch::{Fetch, FetchEvent, FetchOrder, FetchRequest, PlaneSelection, Verifiers};
use crate::index::Index;
use crate::io::{self, BufferPool, ByteGate, Disk, IoEngine};
use crate::recovery;
use crate::segment::{RECORDS_AT, SegmentTable};
use crate::shared::Shared;
use crate::stats::Counters;
use crate::table::{Located, Table};
use crate::{OpenReport, PutObject, PutOutcome, Result, StoreError, StoreSettings, StoreStats};

/// Between two attempts at the folder's lock.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// A content-addressed store in a folder. See the crate.
pub struct Store {
    pub(crate) shared: Arc<Shared>,
    committer: Committer,
    report: OpenReport,
}

/// An object that the index knows, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub id: ObjectId,
    /// Length in tokens of the prefix that it completes.
    pub tokens: u64,
    /// Bytes of its planes.
    pub raw_bytes: u64,
    /// Bytes of its record on disk.
    pub stored_bytes: u64,
    /// Namespace it belongs to.
    pub namespace: NamespaceId,
    /// Scope it belongs to.
    pub scope: ScopeTag,
    pub(crate) located: Located,
}

impl Store {
    /// Opens or makes the store in `dir`: takes the lock, chooses an I/O engine by trying, brings the index to what
    /// the segments hold. Damaged data never prevents that; [`Store::open_report`] tells what was found.
    pub fn open(dir: &Path, settings: StoreSettings) -> Result<Self> {
        let engines = settings.io_engines.clone();
        Self::open_with(dir, settings, |segments| {
            let (disk, refused) =
                io::choose(segments, &engines).map_err(StoreError::io("no I/O engine works in", segments))?;
            Ok((disk, refused.into_iter().map(|(engine, error)| (engine, error.to_string())).collect()))
        })
    }

    /// As [`Store::open`], with a disk of the caller's for the segments. Lock and index stay in `dir`.
    pub fn open_on(dir: &Path, settings: StoreSettings, disk: Arc<dyn Disk>) -> Result<Self> {
        Self::open_with(dir, settings, |_| Ok((disk, Vec::new())))
    }

    fn open_with(
        dir: &Path,
        settings: StoreSettings,
        disk: impl FnOnce(&Path) -> Result<(Arc<dyn Disk>, Vec<(IoEngine, String)>)>,
    ) -> Result<Self> {
        settings.check()?;
        let segments = dir.join("segments");
        fs::create_dir_all(&segments).map_err(StoreError::io("making", &segments))?;
        let lock = lock(dir, settings.lock_wait)?;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(StoreError::io("flushing", dir))?;
        let (disk, refused_engines) = disk(&segments)?;
        let share = |index| -> Result<Arc<Shared>> {
            let lock = lock.try_clone().map_err(StoreError::io("keeping the lock of", dir))?;
            Ok(Arc::new(Shared {
                pool: BufferPool::new(settings.pool_bytes),
                verifiers: Verifiers::start(settings.verify_threads)
                    .map_err(StoreError::io("starting the verifying threads of", dir))?,
                reading: ByteGate::new(settings.read_bytes_in_flight),
                putting: ByteGate::new(settings.put_bytes_in_flight),
                settings: settings.clone(),
                disk: Arc::clone(&disk),
                index,
                table: Table::default(),
                segments: SegmentTable::default(),
                counters: Counters::default(),
                _lock: lock,
            }))
        };
        let (index, mut rebuilt) = Index::open(dir)?;
        let mut shared = share(index)?;
        let (mut position, mut recovery) = recovery::recover(&shared, &segments)?;
        if recovery.index_damaged {
            tracing::error!("the index cannot be read to its end and is built anew");
            drop(shared);
            let (index, _) = Index::open(dir)?;
            rebuilt = true;
            shared = share(index)?;
            (position, recovery) = recovery::recover(&shared, &segments)?;
        }
        let (segment_count, _) = shared.segments.totals();
        let report = OpenReport {
            engine: shared.disk.engine(),
            refused_engines,
            // An empty index of an empty store is nothing to speak of.
            rebuilt: rebuilt && segment_count > 0,
            segments: segment_count,
            records_indexed: recovery.records_indexed,
            records_dropped: recovery.records_dropped,
            entries_dropped: recovery.entries_dropped,
            unreadable_segments: recovery.unreadable_segments,
        };
        let committer = Committer::start(Arc::clone(&shared), position)
            .map_err(StoreError::io("starting the commit thread of", dir))?;
        Ok(Self { shared, committer, report })
    }

    /// What opening found and did.
    pub fn open_report(&self) -> &OpenReport {
        &self.report
    }

    /// Stores objects, parents before children. Returns when each is durable or refused, in the order given.
    pub fn put(&self, objects: Vec<PutObject>) -> Vec<Result<PutOutcome>> {
        let mut outcomes: Vec<Option<Result<PutOutcome>>> = vec![None; objects.len()];
        let (reply, replies) = mpsc::channel();
        for (position, object) in objects.into_iter().enumerate() {
            match self.prepare(object) {
                Ok(Prepared::Known(outcome)) => outcomes[position] = Some(Ok(outcome)),
                Ok(Prepared::New(hashed)) => {
                    let settings = &self.shared.settings;
                    let permit = self.shared.putting.acquire(hashed.max_record_bytes());
                    let encoded = hashed.encode(&self.shared.pool, settings.zstd_level);
                    self.committer.submit(Submission { encoded, position, reply: reply.clone(), permit });
                    continue;
                }
                Err(error) => outcomes[position] = Some(Err(error)),
            }
            if let Some(outcome) = &outcomes[position] {
                self.shared.count_put(outcome);
            }
        }
        drop(reply);
        for (position, outcome) in replies {
            outcomes[position] = Some(outcome);
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or(Err(StoreError::Closed))).collect()
    }

    /// The longest leading run of `ids` that is present, in order.
    pub fn lookup(&self, ids: &[ObjectId]) -> Vec<Found> {
        let run = self.shared.table.run(ids);
        ids.iter().zip(run).map(|(&id, located)| Found::new(id, located)).collect()
    }

    /// Each of `ids`, whether the others are present or not.
    pub fn get(&self, ids: &[ObjectId]) -> Vec<Option<Found>> {
        let all = self.shared.table.many(ids);
        ids.iter().zip(all).map(|(&id, located)| Some(Found::new(id, located?))).collect()
    }

    /// Fetches planes. Nothing is read before the first call of `next`.
    pub fn fetch(&self, request: FetchRequest) -> Fetch {
        Fetch::new(Arc::clone(&self.shared), request)
    }

    /// All layouts stored, verified.
    pub fn layouts(&self) -> Vec<(NamespaceId, KvLayout)> {
        let layout = |namespace: &NamespaceId| ObjectId {
            kind: ObjectKind::Layout,
            hash: BlockHash(*namespace.as_bytes()),
        };
        let ids: Vec<ObjectId> = self.shared.table.layouts().iter().map(layout).collect();
        let objects: Vec<Found> = self.get(&ids).into_iter().flatten().collect();
        let namespaces: Vec<NamespaceId> = objects.iter().map(|found| found.namespace).collect();
        let request = FetchRequest {
            objects,
            planes: PlaneSelection::All,
            order: FetchOrder::ByObject,
            deadline: None,
        };
        let planes = self.fetch(request).filter_map(|event| match event {
            FetchEvent::Plane { object, bytes, .. } => Some((namespaces[object], bytes)),
            FetchEvent::Miss { .. } => None,
        });
        let parse = |bytes: Bytes| KvLayout::from_json(std::str::from_utf8(&bytes).ok()?).ok();
        planes.filter_map(|(namespace, bytes)| Some((namespace, parse(bytes)?))).collect()
    }

    /// What was counted since the store was opened.
    pub fn stats(&self) -> StoreStats {
        let counters = &self.shared.counters;
        let (segments, segment_bytes) = self.shared.segments.totals();
        let (objects, table_bytes) = self.shared.table.size();
        StoreStats {
            objects,
            table_bytes,
            stored: counters.stored.get(),
            present: counters.present.get(),
            content_mismatch: counters.content_mismatch.get(),
            put_errors: counters.put_errors.get(),
            fetched: counters.fetched.get(),
            misses: counters.miss_counts(),
            quarantined: counters.quarantined.get(),
            read_bytes: counters.read_bytes.get(),
            written_bytes: counters.written_bytes.get(),
            commits: counters.commits.get(),
            index_errors: counters.index_errors.get(),
            segments,
            segment_bytes,
            record_bytes: self.record_bytes(),
            suspect_segments: counters.suspect_segments.get(),
            unknown_completions: self.shared.disk.unknown_completions(),
        }
    }

    /// Ends the commit thread and flushes the index. The folder is free when the last fetch is dropped, too.
    pub fn close(self) -> Result<()> {
        let Self { shared, committer, .. } = self;
        drop(committer);
        shared.index.flush()
    }

    /// From the watermarks, which move with every commit.
    fn record_bytes(&self) -> u64 {
        let states =
            self.shared.index.segments().inspect_err(|error| self.index_error(error)).unwrap_or_default();
        states.iter().map(|(_, state)| state.watermark.saturating_sub(RECORDS_AT)).sum()
    }

    /// Hashes an object and skips it if these very bytes are known.
    fn prepare(&self, object: PutObject) -> Result<Prepared> {
        let hashed = Hashed::new(object, self.shared.settings.segment_bytes)?;
        let id = hashed.id();
        let known = self.shared.table.get(id).and_then(|located| self.shared.digest_of(id, &located));
        match known {
            None => Ok(Prepared::New(hashed)),
            Some(digest) if digest == hashed.digest() => Ok(Prepared::Known(PutOutcome::Present)),
            Some(_) => Err(StoreError::ContentMismatch { id }),
        }
    }

    fn index_error(&self, error: &StoreError) {
        self.shared.counters.index_errors.add(1);
        tracing::error!(%error, "the index cannot be read");
    }
}

enum Prepared {
    Known(PutOutcome),
    New(Hashed),
}

impl Found {
    fn new(id: ObjectId, located: Located) -> Self {
        Self {
            id,
            tokens: located.tokens,
            raw_bytes: located.raw_bytes,
            stored_bytes: located.record_bytes() as u64,
            namespace: located.namespace,
            scope: located.scope,
            located,
        }
    }
}

/// Takes the folder's lock, or names the folder.
fn lock(dir: &Path, patience: Duration) -> Result<File> {
    let path = dir.join("LOCK");
    let options = File::options().create(true).truncate(false).write(true).open(&path);
    let file = options.map_err(StoreError::io("opening", &path))?;
    let until = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(StoreError::io("locking", &path)(error)),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                return Err(StoreError::Locked { dir: dir.to_owned() });
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL),
        }
    }
}
