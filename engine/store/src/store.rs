//! The store: open, put, lookup, fetch, close.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_prefix::{BlockHash, KvLayout, NamespaceId, ObjectId, ObjectKind, ScopeTag, WriterId};

use crate::clock::{Clock, StoreTime, SystemClock};
use crate::commit::{Committer, Outcome, Position, Submission};
use crate::encoding::{Hashed, content_digest};
use crate::erasure::{Erase, Lapses};
use crate::fetch::{Fetch, FetchEvent, FetchOrder, FetchRequest, PlaneSelection, Verifiers};
use crate::hits::HitCounts;
use crate::index::Index;
use crate::io::{self, AlignedBuf, BufferPool, ByteGate, Disk, IoEngine, Region};
use crate::lease::{self, Lease, LeaseId, Leases, MAX_ENDS};
use crate::observer::{Observed, Observer};
use crate::owner::{OwnerId, OwnerOf};
use crate::record::RecordHeader;
use crate::recovery::{self, Recovery};
use crate::scrub::Scrubber;
use crate::sealing::{self, Sealer};
use crate::segment::{RECORDS_AT, SegmentTable};
use crate::shared::Shared;
use crate::stats::Counters;
use crate::table::{Located, Table};
use crate::wear::WearFile;
use crate::{OpenReport, PutObject, PutOutcome, Result, StoreError, StoreSettings, StoreStats};

/// Between two attempts at the folder's lock.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// A content-addressed store in a folder. See the crate.
pub struct Store {
    pub(crate) shared: Arc<Shared>,
    committer: Committer,
    scrubber: Scrubber,
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
    /// The record's header once it was read, if it is to be remembered.
    pub(crate) header: Option<Arc<OnceLock<RecordHeader>>>,
}

/// Prefixes kept by [`Store::pin`] until this is dropped.
pub struct Pins {
    shared: Arc<Shared>,
    ends: Vec<ObjectId>,
}

impl Pins {
    /// The ends that are kept.
    pub fn ends(&self) -> &[ObjectId] {
        &self.ends
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.ends.iter().for_each(|&end| self.shared.table.unpin(end));
    }
}

/// Objects that [`Store::submit`] has sent on their way. They are stored or refused whether anybody waits for it or not.
#[must_use = "only `wait` tells what became of the objects"]
pub struct Submitted {
    shared: Arc<Shared>,
    started: Instant,
    /// Of those that need no writing.
    outcomes: Vec<Option<Result<PutOutcome>>>,
    replies: mpsc::Receiver<Outcome>,
}

impl Submitted {
    /// Returns when each is durable or refused, in the order given.
    pub fn wait(mut self) -> Vec<Result<PutOutcome>> {
        for (position, outcome) in self.replies {
            self.outcomes[position] = Some(outcome);
        }
        self.shared.counters.put_us.add(self.started.elapsed());
        self.outcomes.into_iter().map(|outcome| outcome.unwrap_or(Err(StoreError::Closed))).collect()
    }
}

impl Store {
    /// Opens or makes the store in `dir`: takes the lock, chooses an I/O engine by trying, brings the index to what
    /// the segments hold. Damaged data never prevents that; [`Store::open_report`] tells what was found.
    pub fn open(dir: &Path, settings: StoreSettings) -> Result<Self> {
        Self::open_sealed(dir, settings, None)
    }

    /// As [`Store::open`]; what is secret is encrypted by `sealer` from now on. Without one, what was encrypted is a miss.
    pub fn open_sealed(dir: &Path, settings: StoreSettings, sealer: Option<Arc<dyn Sealer>>) -> Result<Self> {
        let engines = settings.io_engines.clone();
        Self::open_with(dir, settings, None, sealer, |segments| {
            let (disk, refused) =
                io::choose(segments, &engines).map_err(StoreError::io("no I/O engine works in", segments))?;
            Ok((disk, refused.into_iter().map(|(engine, error)| (engine, error.to_string())).collect()))
        })
    }

    /// As [`Store::open`], with a disk of the caller's for the segments. Lock and index stay in `dir`.
    pub fn open_on(dir: &Path, settings: StoreSettings, disk: Arc<dyn Disk>) -> Result<Self> {
        Self::open_with(dir, settings, None, None, |_| Ok((disk, Vec::new())))
    }

    /// As [`Store::open`], with a clock of the caller's.
    pub fn open_at(dir: &Path, settings: StoreSettings, clock: Arc<dyn Clock>) -> Result<Self> {
        let engines = settings.io_engines.clone();
        Self::open_with(dir, settings, Some(clock), None, |segments| {
            let chosen =
                io::choose(segments, &engines).map_err(StoreError::io("no I/O engine works in", segments));
            chosen.map(|(disk, _)| (disk, Vec::new()))
        })
    }

    /// As [`Store::open_on`], with a clock of the caller's, too.
    pub fn open_on_at(
        dir: &Path,
        settings: StoreSettings,
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        Self::open_with(dir, settings, Some(clock), None, |_| Ok((disk, Vec::new())))
    }

    fn open_with(
        dir: &Path,
        settings: StoreSettings,
        clock: Option<Arc<dyn Clock>>,
        sealer: Option<Arc<dyn Sealer>>,
        disk: impl FnOnce(&Path) -> Result<(Arc<dyn Disk>, Vec<(IoEngine, String)>)>,
    ) -> Result<Self> {
        settings.check()?;
        let segments = dir.join("segments");
        fs::create_dir_all(&segments).map_err(StoreError::io("making", &segments))?;
        let lock = lock(dir, settings.lock_wait)?;
        // What a process that was killed has removed is gone from here on, too.
        for dir in [dir, &segments] {
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(StoreError::io("flushing", dir))?;
        }
        let (disk, refused_engines) = disk(&segments)?;
        let clock: Arc<dyn Clock> = match clock {
            Some(clock) => clock,
            None => Arc::new(SystemClock::new().map_err(StoreError::io("reading the clock for", dir))?),
        };
        let pool = BufferPool::new(settings.pool_bytes);
        register(&pool, &*disk, &settings);
        let share = |index| -> Result<Arc<Shared>> {
            let lock = lock.try_clone().map_err(StoreError::io("keeping the lock of", dir))?;
            Ok(Arc::new(Shared {
                pool: Arc::clone(&pool),
                verifiers: Verifiers::start(settings.verify_threads)
                    .map_err(StoreError::io("starting the verifying threads of", dir))?,
                sealer: sealer.clone(),
                reading: ByteGate::new(settings.read_bytes_in_flight),
                putting: ByteGate::new(settings.put_bytes_in_flight),
                settings: settings.clone(),
                disk: Arc::clone(&disk),
                index,
                table: Table::new(!settings.skips_adoption()),
                time: StoreTime::open(dir, Arc::clone(&clock))?,
                leases: Leases::default(),
                lapses: Lapses::default(),
                segments: SegmentTable::default(),
                counters: Counters::default(),
                hits: HitCounts::default(),
                wear: WearFile::open(dir),
                breaker: Arc::default(),
                observed: Observed::default(),
                reclaiming: Mutex::default(),
                holeless: AtomicBool::new(false),
                _lock: lock,
            }))
        };
        let (index, mut rebuilt) = Index::open(dir)?;
        let mut shared = share(index)?;
        let taken_up = match take_up(&shared, &segments) {
            // What a read of the index says is no word of the segments'.
            Err(_) if shared.index.is_damaged() => {
                tracing::error!("the index cannot be read to its end and is built anew");
                drop(shared);
                let (index, _) = Index::open(dir)?;
                rebuilt = true;
                shared = share(index)?;
                take_up(&shared, &segments)
            }
            other => other,
        };
        let (position, recovery) = taken_up?;
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
        shared.restore_leases(recovery.own);
        let committer = Committer::start(Arc::clone(&shared), position)
            .map_err(StoreError::io("starting the commit thread of", dir))?;
        let scrubber =
            Scrubber::start(&shared).map_err(StoreError::io("starting the scrubbing thread of", dir))?;
        Ok(Self { shared, committer, scrubber, report })
    }

    /// What opening found and did.
    pub fn open_report(&self) -> &OpenReport {
        &self.report
    }

    /// Stores objects, parents before children. Returns when each is durable or refused, in the order given.
    pub fn put(&self, objects: Vec<PutObject>) -> Vec<Result<PutOutcome>> {
        self.submit(objects).wait()
    }

    /// The first half of [`Store::put`]: returns when all objects are on their way, in order. What is submitted after this
    /// has returned may continue them, and is on its way to the drive while they are.
    pub fn submit(&self, objects: Vec<PutObject>) -> Submitted {
        let started = Instant::now();
        let mut outcomes: Vec<Option<Result<PutOutcome>>> = vec![None; objects.len()];
        let (reply, replies) = mpsc::channel();
        for (position, object) in objects.into_iter().enumerate() {
            match self.prepare(object) {
                Ok(Prepared::Known(outcome)) => outcomes[position] = Some(Ok(outcome)),
                Ok(Prepared::New(hashed)) => {
                    let settings = &self.shared.settings;
                    let permit = self.shared.putting.acquire(hashed.max_record_bytes());
                    let sealer = self.shared.sealer.as_deref();
                    match hashed.encode(&self.shared.pool, settings, sealer) {
                        Ok(encoded) => {
                            let reply = reply.clone();
                            self.committer.submit(Submission { encoded, position, reply, permit });
                            continue;
                        }
                        Err(error) => outcomes[position] = Some(Err(error)),
                    }
                }
                Err(error) => outcomes[position] = Some(Err(error)),
            }
            if let Some(outcome) = &outcomes[position] {
                self.shared.count_put(outcome);
            }
        }
        Submitted { shared: Arc::clone(&self.shared), started, outcomes, replies }
    }

    /// Memory for `bytes` that are to be put, of that which the store recycles. Its content is unspecified.
    pub fn buffer(&self, bytes: usize) -> AlignedBuf {
        self.shared.pool.take(bytes)
    }

    /// The longest leading run of `ids` that is present, in order.
    pub fn lookup(&self, ids: &[ObjectId]) -> Vec<Found> {
        self.lookup_while(ids, |_| true)
    }

    /// The same, up to the first that `takes` does not take. It costs as much as if that one, and all behind it, were not there.
    pub fn lookup_while(&self, ids: &[ObjectId], takes: impl Fn(&Found) -> bool) -> Vec<Found> {
        let started = Instant::now();
        let take = |id, located| Some(Found::new(id, located)).filter(&takes);
        let run = self.shared.table.run(ids, take);
        let counters = &self.shared.counters;
        counters.looked_up.add(ids.len() as u64);
        counters.found.add(run.len() as u64);
        counters.lookup_us.add(started.elapsed());
        run
    }

    /// Each of `ids`, whether the others are present or not.
    pub fn get(&self, ids: &[ObjectId]) -> Vec<Option<Found>> {
        let all = self.shared.table.many(ids);
        ids.iter().zip(all).map(|(&id, located)| Some(Found::new(id, located?))).collect()
    }

    /// Whether the bytes of an object are stored under any of these names. Hashes them in any case, so that how long it takes tells
    /// little.
    pub fn holds(&self, object: &PutObject, names: &[ObjectId]) -> bool {
        let digest = Some(content_digest(object));
        names.iter().any(|&name| self.shared.stored_digest(name) == digest)
    }

    /// States that may lie off the block grid behind `from` and more of `blocks`, which continue each other from the root of a
    /// namespace and scope on: behind how many blocks, and how many tokens the prefix has that the state completes. The longest
    /// first, at most `most`, of less than `below` tokens. Which of them are of some prompt is told by their names.
    pub fn tails(
        &self,
        root: (NamespaceId, ScopeTag),
        from: usize,
        blocks: &[BlockHash],
        below: u64,
        most: usize,
    ) -> Vec<(usize, u64)> {
        self.shared.table.tails(root, from, blocks, below, most)
    }

    /// Fetches planes. Nothing is read before the first call of `next`. The prefix that ends in the last object counts as
    /// used.
    pub fn fetch(&self, request: FetchRequest) -> Fetch {
        Fetch::new(Arc::clone(&self.shared), request)
    }

    /// From now on `observer` is told of every block and state that comes or goes. `false` if another one is already.
    pub fn observe(&self, observer: Arc<dyn Observer>) -> bool {
        self.shared.observed.set(observer)
    }

    /// Store time, in seconds: leases end by it, and objects expire. See `clock.rs`.
    pub fn now_s(&self) -> u32 {
        self.shared.time.now_s()
    }

    /// Grants, renews or moves a lease: from when this returns until `duration` has passed the prefixes that end in `ends`
    /// stay, whatever crashes. What the lease held before is held no longer. Refused if anything of `ends` is not stored,
    /// or if leases would hold more than `leased_bytes`.
    pub fn lease(&self, id: LeaseId, ends: &[ObjectId], duration: Duration) -> Result<Lease> {
        if ends.len() > MAX_ENDS {
            return Err(StoreError::LeaseEnds { got: ends.len(), limit: MAX_ENDS });
        }
        let _writing = self.shared.leases.write(id);
        // Pinned first, so that nothing can go while the lease is written down.
        for (count, &end) in ends.iter().enumerate() {
            if !self.shared.hold(end) {
                ends[..count].iter().for_each(|&pinned| self.shared.let_go(pinned));
                return Err(StoreError::NotStored { id: end });
            }
        }
        let seconds = u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        let deadline_s = self.shared.time.now_s().saturating_add(seconds);
        let (let_go, lease) = match self.admit_lease(id, ends, deadline_s) {
            Err(error) => (ends.to_vec(), Err(error)),
            Ok((lease, before)) => match self.put(vec![lease::object(id, ends, deadline_s)]).remove(0) {
                Ok(_) => (before.map_or(Vec::new(), |before| before.ends), Ok(lease)),
                Err(error) => {
                    let mut held = self.shared.leases.held();
                    if held.get(&id) == Some(&lease) {
                        // What could not be written down holds what it held before.
                        self.shared.set_lease(&mut held, id, before);
                        (ends.to_vec(), Err(error))
                    } else {
                        // It has ended meanwhile, and let go of its ends.
                        (before.map_or(Vec::new(), |before| before.ends), Err(error))
                    }
                }
            },
        };
        let_go.into_iter().for_each(|end| self.shared.let_go(end));
        lease
    }

    /// Keeps prefixes for as long as the returned value lives: nothing that ends in `ends` is evicted or expires. Nothing is
    /// written down; a lease is what survives this process. Ends that are not stored are passed over.
    pub fn pin(&self, ends: &[ObjectId]) -> Pins {
        let ends = ends.iter().copied().filter(|&end| self.shared.table.pin(end)).collect();
        Pins { shared: Arc::clone(&self.shared), ends }
    }

    /// Bytes of the records of all prefixes that end in `ends`, shared ones counted with each: what whoever holds a lease of them
    /// pays for.
    pub fn path_bytes(&self, ends: &[ObjectId]) -> u64 {
        ends.iter().filter_map(|&end| self.shared.table.path_bytes(end)).sum()
    }

    /// Something newer took the place of an object: it goes first when space is needed, unless it is held.
    pub fn supersede(&self, id: ObjectId) {
        self.shared.table.demote(id);
    }

    /// From now on `owner_of` says whose each writer is, whom the bytes of its records count for: when room is needed, the owner that
    /// holds most gives. To be called once, before anything is put; until then all is nobody's, as if there were one owner. Costs
    /// one walk over what is stored.
    pub fn set_owners(&self, owner_of: OwnerOf) {
        self.shared.table.set_owners(owner_of);
    }

    /// Bytes of all records that count for an owner.
    pub fn owner_bytes(&self, owner: OwnerId) -> u64 {
        self.shared.table.owner_bytes(owner)
    }

    /// Bytes of all records by namespace and scope.
    pub fn realms(&self) -> Vec<(NamespaceId, ScopeTag, u64)> {
        self.shared.table.realms()
    }

    /// Bytes of all records that a writer has put, in whatever scope and whoever else has put the same. A sum that is kept.
    pub fn writer_bytes(&self, writer: WriterId) -> u64 {
        self.shared.table.writer_bytes(writer)
    }

    /// Bytes of all records of a scope.
    pub fn scope_bytes(&self, scope: ScopeTag) -> u64 {
        self.shared.table.scope_bytes(scope)
    }

    /// Gives a lease up. `false` if there is none of this name.
    pub fn release(&self, id: LeaseId) -> Result<bool> {
        let _writing = self.shared.leases.write(id);
        if !self.shared.leases.held().contains_key(&id) {
            return Ok(false);
        }
        // A lease of nothing that ended at the beginning of time: newer than what it replaces, and forgotten soon.
        self.put(vec![lease::object(id, &[], 0)]).remove(0)?;
        let over = Lease { id, ends: Vec::new(), deadline_s: 0, bytes: 0 };
        let before = self.shared.set_lease(&mut self.shared.leases.held(), id, Some(over));
        before.iter().flat_map(|lease| &lease.ends).for_each(|&end| self.shared.let_go(end));
        Ok(true)
    }

    /// The leases that hold, in the order of their names.
    pub fn leases(&self) -> Vec<Lease> {
        let now_s = self.shared.time.now_s();
        let held = self.shared.leases.held();
        let mut leases: Vec<Lease> =
            held.values().filter(|lease| lease.deadline_s > now_s).cloned().collect();
        leases.sort_unstable_by_key(|lease| lease.id);
        leases
    }

    /// Erases for good: when this returns, nothing of it is found, none of it can come back after any crash, and its
    /// space is given back. Leases do not protect from it. Returns how many objects went. After an error of the drive they are gone
    /// as well, but may come back with a crash: erase again. A writer or scope that stands for none is refused.
    pub fn erase(&self, what: Erase) -> Result<u64> {
        what.check()?;
        if self.shared.settings.skips_tombstone() {
            return self.shared.erase(what, u64::MAX);
        }
        let begun = self.shared.lapses.begin();
        let object = what.object();
        let id = object.id;
        let written = self.put(vec![object]).remove(0);
        let sequence = match &written {
            Ok(_) => {
                let located = self.shared.table.get(id);
                let record = located.and_then(|located| self.shared.index.get(located.spot).transpose());
                let Some(entry) = record.transpose()? else { return Err(StoreError::Closed) };
                self.shared.lapses.note(entry.sequence);
                entry.sequence
            }
            // The record may be on the drive all the same, and would take with it, after the next crash, what is put again until
            // then and answered with what is there already.
            Err(_) => u64::MAX,
        };
        let gone = self.shared.erase(what, sequence)?;
        self.shared.lapses.done(begun);
        written.map(|_| gone)
    }

    /// Expires, ends leases and writes the clock down now rather than within seconds.
    pub fn keep_house(&self) {
        self.committer.keep_house();
    }

    /// Takes a share of the budget for a lease. Returns it and what it replaces.
    fn admit_lease(&self, id: LeaseId, ends: &[ObjectId], deadline_s: u32) -> Result<(Lease, Option<Lease>)> {
        let paths = ends
            .iter()
            .map(|&end| self.shared.table.path_bytes(end).ok_or(StoreError::NotStored { id: end }));
        let bytes = paths.sum::<Result<u64>>()?;
        let limit_bytes = self.shared.settings.leased_bytes();
        let mut held = self.shared.leases.held();
        let lease = Lease { id, ends: ends.to_vec(), deadline_s, bytes };
        let held_bytes = self.shared.table.leased_bytes();
        let before = self.shared.set_lease(&mut held, id, Some(lease.clone()));
        let all_bytes = self.shared.table.leased_bytes();
        // One that holds no more than it did is renewed, whatever the limit is by now.
        if all_bytes > limit_bytes && all_bytes > held_bytes {
            self.shared.set_lease(&mut held, id, None);
            let leased_bytes = self.shared.table.leased_bytes();
            self.shared.set_lease(&mut held, id, before);
            return Err(StoreError::LeaseBudget {
                // A gap in its path may have been filled in between.
                bytes: all_bytes.saturating_sub(leased_bytes),
                leased_bytes,
                limit_bytes,
            });
        }
        Ok((lease, before))
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
        let (leases, leased_bytes) = (self.shared.leases.count(), self.shared.table.leased_bytes());
        StoreStats {
            declined: counters.declined.get(),
            evicted: counters.evicted.get(),
            evicted_bytes: counters.evicted_bytes.get(),
            expired: counters.expired.get(),
            erased: counters.erased.get(),
            erasures: self.shared.table.erasures(),
            erasures_lapsed: counters.erasures_lapsed.get(),
            punched_bytes: counters.punched_bytes.get(),
            leases,
            leased_bytes,
            objects,
            table_bytes,
            shares: self.shared.table.shares(self.shared.settings.capacity_bytes),
            stored: counters.stored.get(),
            present: counters.present.get(),
            content_mismatch: counters.content_mismatch.get(),
            put_errors: counters.put_errors.get(),
            fetched: counters.fetched.get(),
            misses: counters.miss_counts(),
            quarantined: counters.quarantined.get(),
            reinstated: counters.reinstated.get(),
            scrubbed_bytes: counters.scrubbed_bytes.get(),
            scrub_bad: counters.scrub_bad.get(),
            breaker_trips: self.shared.breaker.trips.get(),
            read_bytes: counters.read_bytes.get(),
            written_bytes: counters.written_bytes.get(),
            commits: counters.commits.get(),
            index_errors: counters.index_errors.get(),
            segments,
            segment_bytes,
            record_bytes: self.record_bytes(),
            suspect_segments: counters.suspect_segments.get(),
            unknown_completions: self.shared.disk.unknown_completions(),
            looked_up: counters.looked_up.get(),
            found: counters.found.get(),
            fetched_bytes: counters.fetched_bytes.get(),
            stored_raw_bytes: counters.stored_raw_bytes.get(),
            index_change_bytes: self.shared.index.change_bytes.get(),
            scrub_rounds: counters.scrub_rounds.get(),
            scrub_round_bytes: counters
                .scrubbed_bytes
                .get()
                .saturating_sub(counters.scrub_round_start.load(Ordering::Relaxed)),
            live_bytes: self.shared.segments.live_bytes(),
            capacity_bytes: self.shared.settings.capacity_bytes,
            wear: self.shared.wear.total(counters),
            io_in_flight: self.shared.disk.in_flight(),
            reading_bytes: self.shared.reading.used_bytes() as u64,
            putting_bytes: self.shared.putting.used_bytes() as u64,
            lookup_us: counters.lookup_us.get(),
            first_plane_us: counters.first_plane_us.get(),
            fetch_us: counters.fetch_us.get(),
            read_us: counters.read_us.get(),
            put_us: counters.put_us.get(),
            commit_us: counters.commit_us.get(),
            flush_us: counters.flush_us.get(),
        }
    }

    /// Ends the commit thread and flushes the index. The folder is free when the last fetch is dropped, too.
    pub fn close(self) -> Result<()> {
        let Self { shared, committer, scrubber, .. } = self;
        drop(scrubber);
        drop(committer);
        shared.time.save()?;
        shared.wear.save(&shared.counters);
        let _ =
            shared.save_hits().inspect_err(|error| tracing::debug!(%error, "hits could not be written down"));
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
        let id = object.id;
        let sealer = self.shared.sealer.as_ref().filter(|_| sealing::is_secret(id.kind));
        let seal = sealer.map(|sealer| sealer.begin(object.scope)).transpose();
        let seal = seal.map_err(|error| StoreError::Sealing { id, error })?.flatten();
        let hashed = Hashed::new(object, &self.shared.settings, seal)?;
        match self.shared.stored_digest(id) {
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
    pub(crate) fn new(id: ObjectId, located: Located) -> Self {
        Self {
            id,
            tokens: located.tokens,
            raw_bytes: located.raw_bytes,
            stored_bytes: located.record_bytes() as u64,
            namespace: located.namespace,
            scope: located.scope,
            located,
            header: None,
        }
    }

    /// The same, for planes that will be fetched again and again: this value and its clones read the record's header once.
    #[must_use]
    pub fn remembering(self) -> Self {
        Self { header: Some(self.header.unwrap_or_default()), ..self }
    }
}

/// Gives the pool buffers that the disk has registered, of the length of merged reads. Where that cannot be, without.
fn register(pool: &BufferPool, disk: &dyn Disk, settings: &StoreSettings) {
    let slot_bytes = settings.read_merge_bytes.max(io::PAGE).next_power_of_two();
    // Others know no such thing, and memory would be mapped for nothing.
    if disk.engine() != IoEngine::UringDirect || settings.registered_bytes < slot_bytes {
        return;
    }
    let Some(region) = Region::map(settings.registered_bytes) else { return };
    match disk.register(&region) {
        Ok(()) => pool.add_region(&region, slot_bytes),
        Err(error) => {
            tracing::debug!(%error, "buffers could not be registered; reads and writes map their own")
        }
    }
}

/// Takes up what the segments hold and what the index says of it.
fn take_up(shared: &Shared, segments: &Path) -> Result<(Position, Recovery)> {
    let recovered = recovery::recover(shared, segments)?;
    shared.hits.load(&shared.index, &shared.table.realms())?;
    Ok(recovered)
}

/// Takes the folder's lock, or names the folder.
pub(crate) fn lock(dir: &Path, patience: Duration) -> Result<File> {
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
