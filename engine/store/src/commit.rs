//! Group commit: one thread that gives records their place and their order.
//!
//! A batch is written, its completions are seen, the segment is flushed, the index is written, and then the putters
//! hear of it: never the other way round. As this is the only thread that adds entries, races between writers
//! of one id end here.
//!
//! After a failed write or flush the segment is suspect for good: the kernel may report the next flush as a success
//! and keep nothing. Its batch is written again, from memory, to another segment. After
//! `max_write_failures` of these the device is not trusted with further writes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, sync_channel};
use std::thread::JoinHandle;

use esker_prefix::ObjectId;

use crate::encoding::Encoded;
use crate::index::{Changes, Entry, Phase, SegmentState};
use crate::io::{AlignedBuf, FileId, Op, PAGE, Permit, wait};
use crate::record::{ContentDigest, HeaderChecksum, PlacedHeader, RecordHeader};
use crate::segment::{OpenSegment, PageKind, Place, RECORDS_AT, SegmentId, SegmentPage, random_generation};
use crate::shared::Shared;
use crate::{PutOutcome, Result, StoreError};

/// Records waiting for the committer; further putters wait. Their bytes are bounded by `put_bytes_in_flight`.
const QUEUE_RECORDS: usize = 1024;
/// Records of one batch.
const MAX_BATCH_RECORDS: usize = 1024;

/// A record on its way to the disk.
pub(crate) struct Submission {
    pub(crate) encoded: Encoded,
    /// Returned with the outcome.
    pub(crate) position: usize,
    pub(crate) reply: Sender<Outcome>,
    pub(crate) permit: Permit,
}

/// Position in the putter's list, and how it ended.
pub(crate) type Outcome = (usize, Result<PutOutcome>);

/// The segment that is being appended to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    pub(crate) id: SegmentId,
    pub(crate) generation: u64,
    pub(crate) file: FileId,
    pub(crate) len_bytes: u64,
    /// End of the last record that was flushed.
    pub(crate) append_at: u64,
}

/// Where recovery says that writing goes on.
pub(crate) struct Position {
    pub(crate) tail: Option<Tail>,
    pub(crate) next_segment: SegmentId,
    pub(crate) next_sequence: u64,
}

/// Handle of the committer's thread.
pub(crate) struct Committer {
    queue: Option<SyncSender<Submission>>,
    thread: Option<JoinHandle<()>>,
}

impl Committer {
    pub(crate) fn start(shared: Arc<Shared>, position: Position) -> io::Result<Self> {
        let (queue, submissions) = sync_channel(QUEUE_RECORDS);
        let mut writer = Writer { shared, position, failures: 0 };
        let thread = std::thread::Builder::new().name("esker-commit".into());
        let thread = thread.spawn(move || writer.run(&submissions))?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Queues a record. Its outcome comes through its `reply`, also if the committer has ended.
    pub(crate) fn submit(&self, submission: Submission) {
        let queue = self.queue.as_ref().expect("present until drop");
        if let Err(refused) = queue.send(submission) {
            let _ = refused.0.reply.send((refused.0.position, Err(StoreError::Closed)));
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the commit thread panicked");
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    position: Position,
    failures: u64,
}

/// A record of the batch, and who else put the same object in it.
struct Pending {
    header: RecordHeader,
    digest: ContentDigest,
    /// Empty while the disk has the buffer.
    record: Option<AlignedBuf>,
    putter: Putter,
    repeats: Vec<Repeat>,
    _permit: Permit,
}

/// Who waits for an outcome: position in its list, and where to send it.
type Putter = (usize, Sender<Outcome>);

/// A put of an object that comes earlier in the same batch. Its answer waits for that one's.
struct Repeat {
    putter: Putter,
    same_content: bool,
}

impl Writer {
    fn run(&mut self, submissions: &Receiver<Submission>) {
        while let Ok(first) = submissions.recv() {
            let mut bytes = first.encoded.record.len();
            let mut batch = vec![first];
            while batch.len() < MAX_BATCH_RECORDS && bytes < self.shared.settings.commit_bytes {
                let Ok(next) = submissions.try_recv() else { break };
                bytes += next.encoded.record.len();
                batch.push(next);
            }
            let pending = self.skip_known(batch);
            self.store(pending);
        }
    }

    /// Answers what needs no writing; returns the rest, in order, each id once.
    fn skip_known(&self, batch: Vec<Submission>) -> VecDeque<Pending> {
        let ids: Vec<ObjectId> = batch.iter().map(|submission| submission.encoded.header.id).collect();
        let parents: Vec<ObjectId> = batch.iter().filter_map(|s| s.encoded.header.parent).collect();
        let known = self.shared.known(&ids);
        let known_parents = self.shared.known(&parents);
        let known_parents: HashMap<_, _> = parents.into_iter().zip(known_parents).collect();

        let mut pending: VecDeque<Pending> = VecDeque::with_capacity(batch.len());
        let mut accepted: HashMap<ObjectId, usize> = HashMap::new();
        for (submission, known) in batch.into_iter().zip(known) {
            let Submission { encoded: Encoded { header, digest, record }, position, reply, permit } =
                submission;
            let (id, putter) = (header.id, (position, reply));
            if let Some(&at) = accepted.get(&id) {
                let same_content = pending[at].digest == digest;
                pending[at].repeats.push(Repeat { putter, same_content });
                continue;
            }
            let has_parent = match header.parent {
                None => Ok(()),
                Some(parent) if accepted.contains_key(&parent) => Ok(()),
                Some(parent) => match known_parents.get(&parent) {
                    Some(Ok(Some(_))) => Ok(()),
                    Some(Err(error)) => Err(error.clone()),
                    _ => Err(StoreError::MissingParent { id, parent }),
                },
            };
            match known {
                Err(error) => self.answer(putter, Err(error)),
                Ok(Some(entry)) => self.answer(putter, compare(id, entry.digest == digest)),
                Ok(None) => match has_parent {
                    Err(error) => self.answer(putter, Err(error)),
                    Ok(()) => {
                        accepted.insert(id, pending.len());
                        let (record, repeats) = (Some(record), Vec::new());
                        pending.push_back(Pending {
                            header,
                            digest,
                            record,
                            putter,
                            repeats,
                            _permit: permit,
                        });
                    }
                },
            }
        }
        pending
    }

    /// Writes all of `pending`, as many to a segment as fit. What follows a failed record fails with it: it may
    /// be its child.
    fn store(&mut self, mut pending: VecDeque<Pending>) {
        while let Some(first) = pending.front() {
            if let Err(error) = self.make_room(first.len_bytes()) {
                return self.fail(pending, &error);
            }
            let Some(mut tail) = self.position.tail else { return };
            let mut end = tail.append_at;
            let mut run = Vec::new();
            while let Some(next) = pending.front() {
                end += next.len_bytes();
                if end > tail.records_end() {
                    break;
                }
                run.extend(pending.pop_front());
            }
            match self.write(&mut tail, &mut run) {
                Ok(entries) => match self.publish(&tail, &entries) {
                    Ok(()) => {
                        self.position.tail = Some(tail);
                        self.shared.counters.commits.add(1);
                        run.into_iter().for_each(|record| self.acknowledge(record));
                    }
                    Err(error) => {
                        // The records are on disk, unacknowledged, and will be passed over.
                        self.position.tail = Some(tail);
                        self.failures += 1;
                        run.into_iter().rev().for_each(|record| pending.push_front(record));
                        return self.fail(pending, &error);
                    }
                },
                Err(error) => {
                    let full = is_full(&error);
                    let lost = run.iter().any(|record| record.record.is_none());
                    run.into_iter().rev().for_each(|record| pending.push_front(record));
                    if full {
                        // Nothing behind `append_at` was acknowledged; the next batch overwrites it.
                        let reason = format!("segment {}: {error}", tail.id);
                        return self.fail(pending, &StoreError::Full { reason });
                    }
                    self.give_up(&tail, &error);
                    if lost {
                        return self.fail(pending, &StoreError::WriteFailed { source: Arc::new(error) });
                    }
                }
            }
        }
    }

    /// Sees to it that the tail has room for a record of `bytes`.
    fn make_room(&mut self, bytes: u64) -> Result<()> {
        let settings = &self.shared.settings;
        if self.failures >= settings.max_write_failures {
            return Err(StoreError::WritesRefused { failures: self.failures });
        }
        if self.position.tail.is_some_and(|tail| tail.append_at + bytes <= tail.records_end()) {
            return Ok(());
        }
        let (_, used_bytes) = self.shared.segments.totals();
        if used_bytes.saturating_add(settings.segment_bytes) > settings.capacity_bytes {
            let reason = format!("{used_bytes} of {} bytes are in segments", settings.capacity_bytes);
            return Err(StoreError::Full { reason });
        }
        let next = self.create_segment().map_err(|error| {
            if is_full(&error) {
                return StoreError::Full { reason: format!("no space for another segment: {error}") };
            }
            self.failures += 1;
            tracing::error!(%error, failures = self.failures, "a segment could not be made");
            StoreError::WriteFailed { source: Arc::new(error) }
        })?;
        if let Some(full) = self.position.tail.replace(next) {
            self.seal(&full);
        }
        Ok(())
    }

    fn create_segment(&mut self) -> io::Result<Tail> {
        let id = self.position.next_segment;
        let len_bytes = self.shared.settings.segment_bytes;
        self.position.next_segment = SegmentId(id.0 + 1);
        let file = self.shared.disk.create(&id.file_name(), len_bytes).inspect_err(|error| {
            // A number is used up only by a file that exists.
            if error.kind() != io::ErrorKind::AlreadyExists {
                self.position.next_segment = id;
            }
        })?;
        self.shared.segments.insert(id, OpenSegment { file, len_bytes });
        let generation = random_generation();
        let header = SegmentPage { id, generation, extent_bytes: len_bytes, sequence: 0 };
        self.shared.write_segment_page(file, 0, PageKind::Header, &header)?;
        Ok(Tail { id, generation, file, len_bytes, append_at: RECORDS_AT })
    }

    /// Closes a segment for good. One that cannot be sealed is scanned at the next opening, nothing worse.
    fn seal(&self, tail: &Tail) {
        let sequence = self.position.next_sequence - 1;
        if let Err(error) = self.shared.seal(tail, sequence) {
            tracing::warn!(segment = %tail.id, %error, "a segment could not be sealed");
        }
    }

    /// Writes the records of a run behind the tail and flushes. On success the tail has moved.
    fn write(&mut self, tail: &mut Tail, run: &mut [Pending]) -> io::Result<Vec<(ObjectId, Entry)>> {
        let (reply, completions) = mpsc::channel();
        let mut entries = Vec::with_capacity(run.len());
        let mut end = tail.append_at;
        for (position, pending) in run.iter_mut().enumerate() {
            let Some(mut record) = pending.record.take() else { continue };
            let place = Place { segment: tail.id, generation: tail.generation, offset: end };
            let checksum = pending.header.encode(place, self.position.next_sequence, &mut record);
            entries.push(pending.entry(place, self.position.next_sequence, checksum, record.len()));
            self.position.next_sequence += 1;
            end += record.len() as u64;
            self.shared.disk.submit(Op::write(tail.file, place.offset, record, position as u64, &reply));
        }
        drop(reply);
        let mut failed = None;
        let mut completed = 0;
        for mut completion in completions {
            completed += 1;
            let Ok(position) = usize::try_from(completion.tag) else { continue };
            if let Ok(moved) = completion.result {
                self.shared.counters.written_bytes.add(moved as u64);
            }
            run[position].record = completion.buf.take();
            failed = completion.full().err().or(failed);
        }
        if completed < run.len() {
            failed = failed.or_else(|| Some(io::Error::other("the disk dropped a write")));
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if !self.shared.settings.skips_flush() {
            wait(self.shared.disk.as_ref(), |reply| Op::sync(tail.file, 0, reply))?;
        }
        tail.append_at = end;
        Ok(entries)
    }

    /// Makes flushed records findable.
    fn publish(&self, tail: &Tail, entries: &[(ObjectId, Entry)]) -> Result<()> {
        let mut changes = Changes::default();
        for (id, entry) in entries {
            changes.put(*id, entry);
        }
        changes.put_segment(tail.id, &tail.state(Phase::Open, self.position.next_sequence - 1));
        let _writing = self.shared.index.lock();
        self.shared
            .index
            .write(changes)
            .inspect_err(|error| tracing::error!(%error, "the index refused a batch"))
    }

    /// Abandons a segment into which a write or flush failed. What was acknowledged before stays readable.
    fn give_up(&mut self, tail: &Tail, error: &io::Error) {
        self.failures += 1;
        self.shared.counters.suspect_segments.add(1);
        tracing::error!(segment = %tail.id, %error, failures = self.failures, "a write failed; segment abandoned");
        self.position.tail = None;
        let mut changes = Changes::default();
        changes.put_segment(tail.id, &tail.state(Phase::Suspect, self.position.next_sequence - 1));
        if let Err(error) = self.shared.index.write_durably(changes) {
            tracing::error!(segment = %tail.id, %error, "a suspect segment could not be marked");
        }
    }

    fn acknowledge(&self, record: Pending) {
        self.answer(record.putter, Ok(PutOutcome::Stored));
        for repeat in record.repeats {
            self.answer(repeat.putter, compare(record.header.id, repeat.same_content));
        }
    }

    fn fail(&self, pending: VecDeque<Pending>, error: &StoreError) {
        for record in pending {
            self.answer(record.putter, Err(error.clone()));
            for repeat in record.repeats {
                self.answer(repeat.putter, Err(error.clone()));
            }
        }
    }

    fn answer(&self, (position, reply): Putter, outcome: Result<PutOutcome>) {
        self.shared.count_put(&outcome);
        // A putter that went away does not need to know.
        let _ = reply.send((position, outcome));
    }
}

impl Pending {
    fn len_bytes(&self) -> u64 {
        self.header.record_bytes() as u64
    }

    fn entry(
        &self,
        place: Place,
        sequence: u64,
        checksum: HeaderChecksum,
        record_bytes: usize,
    ) -> (ObjectId, Entry) {
        let header = self.header.clone();
        let id = header.id;
        (id, Entry::of(&PlacedHeader { header, place, sequence, record_bytes, checksum }))
    }
}

impl Tail {
    /// Where the room for records ends: the last page is the seal's.
    fn records_end(&self) -> u64 {
        self.len_bytes - PAGE as u64
    }

    pub(crate) fn state(&self, phase: Phase, sequence: u64) -> SegmentState {
        SegmentState { phase, generation: self.generation, watermark: self.append_at, sequence }
    }
}

/// The outcome of a put of an object that is stored already.
fn compare(id: ObjectId, same_content: bool) -> Result<PutOutcome> {
    if same_content { Ok(PutOutcome::Present) } else { Err(StoreError::ContentMismatch { id }) }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
