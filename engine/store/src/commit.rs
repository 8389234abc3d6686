//! Group commit: one thread that gives records their place and their order.
//!
//! A batch is written, its completions are seen, its segments are flushed, the index is written, and then the putters
//! hear of it: never the other way round. While one batch is being flushed the next is being written; they are
//! published in the order in which they were formed, so a child is never durable before its parent, which stays until then
//! (commit/hold.rs). As this is the only thread that adds entries, races between writers of one id end here.
//!
//! After a failed write or flush the segment is suspect for good: the kernel may report the next flush as a success
//! and keep nothing. Everything that was under way is waited for, and what is not yet published is written again, from
//! memory, to other places. After `max_write_failures` of these the device is not trusted with further writes.

mod batch;
mod hold;
mod segments;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Instant;

use esker_prefix::ObjectId;

use crate::encoding::Encoded;
use crate::index::{Changes, Phase, SegmentState};
use crate::io::{Completion, Deliver, FileId, Op, OpKind, Permit};
use crate::segment::{Place, RECORDS_AT, SegmentId, last_page};
use crate::shared::{Shared, is_own};
use crate::{PutOutcome, Result, StoreError, TtlClass};
use batch::{Batch, Pending, Putter, Repeat, Run};
use hold::Hold;
use segments::{Kind, Made, Maker};

/// Records of one batch.
const MAX_BATCH_RECORDS: usize = 1024;
/// Batches being written or flushed; one that waits for its turn to be flushed does not keep the disk busy.
const MAX_BATCHES: usize = 8;
/// From this many bytes on a batch is written while another is. Less waits for company: each batch costs a flush.
const LARGE_BATCH_BYTES: usize = 2 << 20;
/// Declined objects that are remembered, so that what hangs on them is declined rather than refused as an orphan.
const MAX_DECLINED: usize = 64 * 1024;

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

/// A segment that is being appended to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    pub(crate) id: SegmentId,
    pub(crate) class: TtlClass,
    pub(crate) generation: u64,
    pub(crate) file: FileId,
    pub(crate) len_bytes: u64,
    /// Where the next record goes.
    pub(crate) append_at: u64,
    /// End of the last record that was published.
    pub(crate) published_at: u64,
    /// Store time at which it was begun, in seconds; later, if that is not known any more.
    pub(crate) begun_s: u32,
}

/// Where recovery says that writing goes on.
pub(crate) struct Position {
    /// At most one of each class.
    pub(crate) tails: Vec<Tail>,
    pub(crate) next_segment: SegmentId,
    pub(crate) next_sequence: u64,
}

/// Handle of the committer's thread.
pub(crate) struct Committer {
    events: Sender<Event>,
    thread: Option<JoinHandle<()>>,
}

/// What the committer waits for. Puts are bounded by `put_bytes_in_flight`, the others by what it has started itself.
enum Event {
    Put(Submission),
    Completed(Completion),
    /// A segment of this kind was made, or not.
    Made(Kind, Made),
    /// Time to keep house; who asked for it is told when it is done.
    House(Option<Sender<()>>),
    Close,
}

impl Committer {
    pub(crate) fn start(shared: Arc<Shared>, position: Position) -> io::Result<Self> {
        let (events, received) = mpsc::channel();
        shared.lapses.next_is(position.next_sequence);
        let maker = Maker::start(Arc::clone(&shared), position.next_segment, events.clone())?;
        let mut writer = Writer {
            shared,
            tails: position.tails.into_iter().map(|tail| (tail.class, tail)).collect(),
            next_sequence: position.next_sequence,
            next_batch: 0,
            admitted: 0,
            queue: VecDeque::new(),
            queued_bytes: 0,
            redo: VecDeque::new(),
            batches: VecDeque::new(),
            unpublished: HashMap::new(),
            declined: HashSet::new(),
            full: Vec::new(),
            maker,
            spares: HashMap::new(),
            ahead: HashSet::new(),
            failed: None,
            failures: 0,
            events: events.clone(),
        };
        let thread = std::thread::Builder::new().name("esker-commit".into());
        let thread = thread.spawn(move || writer.run(&received))?;
        Ok(Self { events, thread: Some(thread) })
    }

    /// Keeps house, and returns when it is done.
    pub(crate) fn keep_house(&self) {
        let (asked, done) = mpsc::channel();
        if self.events.send(Event::House(Some(asked))).is_ok() {
            let _ = done.recv();
        }
    }

    /// Queues a record. Its outcome comes through its `reply`, also if the committer has ended.
    pub(crate) fn submit(&self, submission: Submission) {
        if let Err(refused) = self.events.send(Event::Put(submission))
            && let Event::Put(submission) = refused.0
        {
            let _ = submission.reply.send((submission.position, Err(StoreError::Closed)));
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Close);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the commit thread panicked");
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    /// The segment that each class is appended to.
    tails: HashMap<TtlClass, Tail>,
    next_sequence: u64,
    next_batch: u64,
    /// Records admitted so far.
    admitted: u64,
    /// Records that were not looked at yet.
    queue: VecDeque<Submission>,
    queued_bytes: usize,
    /// Records that are to be written again, before anything of the queue.
    redo: VecDeque<Pending>,
    /// In the order in which they will be published.
    batches: VecDeque<Batch>,
    /// Objects of `batches`: number of the batch.
    unpublished: HashMap<ObjectId, u64>,
    /// Not stored, as not worth it; perhaps not all of them.
    declined: HashSet<ObjectId>,
    /// Segments that are full, each to be sealed when the batch with this number is published: it may hold their last
    /// records.
    full: Vec<(u64, Tail)>,
    maker: Maker,
    /// Segments made ahead, by their kind, or why there are none.
    spares: HashMap<Kind, Made>,
    /// Whether the spare of this kind was ordered before it was needed.
    ahead: HashSet<Kind>,
    /// Why what is under way will not be published.
    failed: Option<Failure>,
    failures: u64,
    events: Sender<Event>,
}

/// What went wrong with batches under way.
struct Failure {
    error: StoreError,
    /// Segments into which a write or flush failed, and how.
    suspect: Vec<(SegmentId, String)>,
    /// Whether writing the records elsewhere may help.
    again: bool,
}

/// What forming a batch came to.
enum Formed {
    Started,
    /// Nothing to write, or a segment is being made.
    Nothing,
}

impl Writer {
    fn run(&mut self, events: &Receiver<Event>) {
        let mut closing = false;
        loop {
            while let Ok(event) = events.try_recv() {
                closing |= self.take(event);
            }
            self.publish_finished();
            if self.failed.is_some() {
                if self.batches.iter().all(Batch::is_over) {
                    self.fail_over();
                    continue;
                }
            } else if self.may_start() && matches!(self.form(), Formed::Started) {
                continue;
            }
            let idle = self.batches.is_empty() && self.queue.is_empty() && self.redo.is_empty();
            if closing && idle {
                break;
            }
            match events.recv() {
                Ok(event) => closing |= self.take(event),
                Err(_) => break,
            }
        }
        self.maker.stop(std::mem::take(&mut self.spares));
    }

    /// Takes note of one event. `true` if it is the last.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::Put(submission) => {
                self.queued_bytes += submission.encoded.record.len();
                self.queue.push_back(submission);
            }
            Event::Completed(completion) => self.completed(completion),
            Event::Made(kind, made) => {
                self.maker.delivered(kind);
                self.spares.insert(kind, made);
            }
            Event::House(asked) => {
                self.retire_old();
                self.maker.keep_house(asked);
            }
            Event::Close => return true,
        }
        false
    }

    /// Closes the tails whose time to live is over, so that their segments can go, and those that have been filled for half of it:
    /// what comes would keep what came first. One that nothing was written to would keep erasures.
    fn retire_old(&mut self) {
        let busy = |id| self.batches.iter().flat_map(|batch| &batch.runs).any(|run| run.tail.id == id);
        let old = |tail: &&Tail| {
            self.shared.is_expired(tail.id) || self.shared.is_half_over(tail.class, tail.begun_s)
        };
        let retired = |tail: &&Tail| old(tail) && !busy(tail.id);
        let tails: Vec<Tail> = self.tails.values().filter(retired).copied().collect();
        for tail in tails {
            self.tails.remove(&tail.class);
            self.maker.seal(tail, self.next_sequence - 1);
        }
    }

    /// Whether another batch should be formed now: while one is being written, only one that keeps the disk as busy.
    fn may_start(&self) -> bool {
        let waiting = !self.queue.is_empty() || !self.redo.is_empty();
        let large = self.queued_bytes >= self.shared.settings.commit_bytes.min(LARGE_BATCH_BYTES);
        let writing = self.batches.iter().any(Batch::is_writing);
        waiting && self.batches.len() < MAX_BATCHES && (!writing || large)
    }

    /// Forms a batch of what waits and starts writing it.
    fn form(&mut self) -> Formed {
        let number = self.next_batch;
        let mut batch = Batch::new(number);
        let mut bytes = 0;
        while batch.records() < MAX_BATCH_RECORDS && bytes < self.shared.settings.commit_bytes {
            if self.redo.is_empty() {
                let Some(submission) = self.queue.pop_front() else { break };
                self.queued_bytes -= submission.encoded.record.len();
                let admitted = self.admit(submission, &mut batch);
                self.redo.extend(admitted);
            }
            let Some(pending) = self.redo.front() else { continue };
            match self.room(pending.header.class, pending.len_bytes(), number) {
                Ok(Some(tail)) => {
                    let Some(pending) = self.redo.pop_front() else { break };
                    bytes += usize::try_from(pending.len_bytes()).unwrap_or(usize::MAX);
                    self.unpublished.insert(pending.header.id, number);
                    batch.add(&tail, pending);
                }
                Ok(None) => break,
                Err(error) => {
                    self.fail_waiting(&error);
                    break;
                }
            }
        }
        if batch.records() == 0 {
            return Formed::Nothing;
        }
        self.next_batch += 1;
        self.start(batch);
        Formed::Started
    }

    /// Answers a put that needs no writing, or passes it on.
    fn admit(&mut self, submission: Submission, forming: &mut Batch) -> Option<Pending> {
        let Submission { encoded: Encoded { header, digest, record }, position, reply, permit } = submission;
        let (id, putter) = (header.id, (position, reply));
        let own = is_own(id);
        if !own && let Some(first) = self.pending(id, forming) {
            let same_content = first.digest == digest;
            first.repeats.push(Repeat { putter, same_content });
            return None;
        }
        if let Some(known) = self.shared.stored_digest(id) {
            self.answer(putter, compare(id, known == digest));
            return None;
        }
        let (mut context, mut held) = (None, None);
        if !own && let Some(parent) = header.parent {
            held = Hold::stored(&self.shared, parent);
            if held.is_none() {
                let Some(unpublished) = self.pending(parent, forming) else {
                    match self.declined.contains(&parent) {
                        true => self.decline(id, putter),
                        false => self.answer(putter, Err(StoreError::MissingParent { id, parent })),
                    }
                    return None;
                };
                (context, held) = (Some(unpublished.context), Some(unpublished.hold.clone()));
            }
        }
        let (now_s, bytes) = (self.shared.time.now_s(), record.len() as u64);
        let (candidate, context, admits) = self.shared.table.judge(&header, bytes, context, now_s);
        let permanent = header.class == TtlClass::PERMANENT;
        if !admits && !permanent && self.shared.settings.admission && !self.shared.has_capacity(header.class)
        {
            self.decline(id, putter);
            return None;
        }
        self.admitted += 1;
        Some(Pending {
            number: self.admitted,
            header,
            digest,
            record: Some(record),
            putter,
            repeats: Vec::new(),
            candidate,
            context,
            hold: Hold::default(),
            _parent: held,
            _permit: permit,
        })
    }

    /// A record that has no entry yet.
    fn pending<'a>(&'a mut self, id: ObjectId, forming: &'a mut Batch) -> Option<&'a mut Pending> {
        let number = *self.unpublished.get(&id)?;
        let mut batches = self.batches.iter_mut().chain([forming]);
        batches.find(|batch| batch.number == number).and_then(|batch| batch.find(id))
    }

    /// Says that an object is not worth its place.
    fn decline(&mut self, id: ObjectId, putter: Putter) {
        if self.declined.len() >= MAX_DECLINED {
            self.declined.clear();
        }
        self.declined.insert(id);
        self.answer(putter, Ok(PutOutcome::Declined));
    }

    /// The tail of `class` with room for a record of `bytes`. `None` while a segment is being made.
    fn room(&mut self, class: TtlClass, bytes: u64, batch: u64) -> Result<Option<Tail>> {
        let settings = &self.shared.settings;
        if self.failures >= settings.max_write_failures {
            return Err(StoreError::WritesRefused { failures: self.failures });
        }
        let kind = Kind::of(class);
        let tail = self.tails.get(&class).copied();
        if let Some(mut tail) = tail.filter(|tail| tail.append_at + bytes <= tail.records_end()) {
            let before = tail;
            tail.append_at += bytes;
            self.tails.insert(class, tail);
            // Made ahead, so that nobody waits for it.
            if tail.append_at > tail.len_bytes / 2 && !self.spares.contains_key(&kind) {
                self.ahead.insert(kind);
                self.maker.order(kind);
            }
            return Ok(Some(before));
        }
        // What failed ahead of time may work now.
        let ahead = self.ahead.remove(&kind);
        let made = self.spares.remove(&kind).filter(|made| !(ahead && matches!(made, Made::Not(_))));
        match made {
            None => {
                self.maker.order(kind);
                Ok(None)
            }
            Some(Made::Not(error)) => {
                if is_full(&error) {
                    return Err(StoreError::Full {
                        reason: format!("no space for another segment: {error}"),
                    });
                }
                self.failures += 1;
                tracing::error!(%error, failures = self.failures, "a segment could not be made");
                Err(StoreError::WriteFailed { source: Arc::new(error) })
            }
            Some(Made::Segment(blank)) => {
                let next = blank.begin(&self.shared, class, self.next_sequence).map_err(|error| {
                    self.failures += 1;
                    tracing::error!(%error, failures = self.failures, "a segment could not be begun");
                    StoreError::WriteFailed { source: Arc::new(error) }
                })?;
                if let Some(full) = self.tails.insert(class, next) {
                    self.full.push((batch, full));
                }
                self.room(class, bytes, batch)
            }
        }
    }

    /// Gives the records of a batch their sequence and hands them to the disk.
    fn start(&mut self, mut batch: Batch) {
        let (number, time_s) = (batch.number, self.shared.time.now_s());
        let (reply, mut writes) = (self.reply(), Vec::with_capacity(batch.records()));
        for (run_number, run) in batch.runs.iter_mut().enumerate() {
            for (position, pending) in run.records.iter_mut().enumerate() {
                let Some(mut record) = pending.record.take() else { continue };
                let place = Place { segment: run.tail.id, generation: run.tail.generation, offset: run.end };
                let checksum = pending.header.encode(place, self.next_sequence, time_s, &mut record);
                run.entries.push(pending.entry(place, self.next_sequence, time_s, checksum, record.len()));
                run.sequence = self.next_sequence;
                self.next_sequence += 1;
                run.end += record.len() as u64;
                run.writing += 1;
                let tag = batch::tag(number, run_number, Some(position));
                writes.push(Op::write(run.tail.file, place.offset, record, tag, &reply));
            }
        }
        self.shared.disk.submit_all(writes);
        self.shared.lapses.next_is(self.next_sequence);
        self.batches.push_back(batch);
    }

    fn reply(&self) -> Reply {
        Reply(self.events.clone())
    }

    fn completed(&mut self, mut completion: Completion) {
        let (number, run, position) = batch::untag(completion.tag);
        let Some(batch) = self.batches.iter_mut().find(|batch| batch.number == number) else { return };
        let Some(run) = batch.runs.get_mut(run) else { return };
        let segment = run.tail.id;
        if let Some(position) = position {
            run.writing -= 1;
            if let Ok(moved) = completion.result {
                self.shared.counters.written_bytes.add(moved as u64);
            }
            run.records[position].record = completion.buf.take();
            if let Err(error) = completion.full() {
                run.failed = true;
                self.op_failed(segment, OpKind::Write, error);
            }
        } else {
            if let Some(since) = run.flushing {
                self.shared.counters.flush_us.add(since.elapsed());
            }
            let flushed = completion.full();
            // All that was written when it began, of whatever batch.
            let runs = self.batches.iter_mut().flat_map(|batch| &mut batch.runs);
            for run in runs.filter(|run| run.tail.id == segment && run.flushing.is_some()) {
                run.flushing = None;
                run.flushed = flushed.is_ok();
                run.failed |= flushed.is_err();
            }
            if let Err(error) = flushed {
                self.op_failed(segment, OpKind::Sync, error);
            }
        }
        self.flush_written();
    }

    /// Flushes what is written. Of one file one flush at a time, for all batches that are written by then: two could share out one
    /// error between them.
    fn flush_written(&mut self) {
        if self.failed.is_some() {
            return;
        }
        let (reply, now) = (self.reply(), Instant::now());
        // Files of which nothing that comes later may be flushed now, and those of which a flush begins.
        let (mut busy, mut begun): (Vec<FileId>, Vec<FileId>) = (Vec::new(), Vec::new());
        for batch in &mut self.batches {
            for (run_number, run) in batch.runs.iter_mut().enumerate().filter(|(_, run)| !run.flushed) {
                let file = run.tail.file;
                if busy.contains(&file) {
                    continue;
                }
                if run.writing > 0 || run.flushing.is_some() {
                    busy.push(file);
                    continue;
                }
                if self.shared.settings.skips_flush() {
                    run.flushed = true;
                    continue;
                }
                run.flushing = Some(now);
                if !begun.contains(&file) {
                    begun.push(file);
                    let tag = batch::tag(batch.number, run_number, None);
                    self.shared.disk.submit(Op::sync(file, tag, &reply));
                }
            }
        }
    }

    fn op_failed(&mut self, segment: SegmentId, what: OpKind, error: io::Error) {
        let reason = error.to_string();
        // A write that found no space is the one failure after which the segment is as good as before.
        let full = is_full(&error) && what == OpKind::Write;
        let error = match full {
            true => StoreError::Full { reason: format!("segment {segment}: {error}") },
            false => StoreError::WriteFailed { source: Arc::new(error) },
        };
        let failure = self.failed.get_or_insert(Failure { error, suspect: Vec::new(), again: true });
        if full {
            failure.again = false;
        } else if failure.suspect.iter().all(|(known, _)| *known != segment) {
            failure.suspect.push((segment, reason));
        }
    }

    /// Publishes and acknowledges, in order, what has been flushed.
    fn publish_finished(&mut self) {
        while self.batches.front().is_some_and(Batch::is_flushed) {
            let Some(batch) = self.batches.pop_front() else { return };
            if let Err(error) = self.publish(&batch) {
                // The records are on disk, unacknowledged, and will be passed over. What comes behind may be a child.
                self.failures += 1;
                self.batches.push_front(batch);
                self.failed.get_or_insert(Failure { error, suspect: Vec::new(), again: false });
                return;
            }
            let full = self.full.iter_mut().map(|(_, tail)| tail);
            for tail in self.tails.values_mut().chain(full) {
                for run in batch.runs.iter().filter(|run| run.tail.id == tail.id) {
                    tail.published_at = run.end;
                }
            }
            self.shared.counters.commits.add(1);
            self.shared.counters.commit_us.add(batch.started.elapsed());
            let number = batch.number;
            for record in batch.into_records() {
                self.forget(record.header.id, number);
                self.acknowledge(record);
            }
            self.seal_full();
        }
    }

    /// Makes flushed records findable.
    fn publish(&self, batch: &Batch) -> Result<()> {
        let mut changes = Changes::default();
        for run in &batch.runs {
            run.entries.iter().for_each(|entry| changes.put(entry));
            changes.put_segment(run.tail.id, &run.state(Phase::Open));
            changes.put_use(run.tail.id, run.entries.last().map_or(0, |entry| entry.time_s));
        }
        self.shared
            .index
            .write(changes)
            .inspect_err(|error| tracing::error!(%error, "the index refused a batch"))?;
        // Told first: whoever follows must not learn of an eviction before of what was evicted.
        self.shared.observed.came(batch.runs.iter().flat_map(|run| &run.entries));
        let (mut replaced, mut came_back) = (Vec::new(), false);
        for run in &batch.runs {
            // Counted before it can go.
            let live_bytes = run.end - run.tail.append_at;
            self.shared.segments.update(run.tail.id, |segment| {
                segment.live_bytes = segment.live_bytes.saturating_add(live_bytes);
                // The batch has written this down.
                segment.written_use_s = run.entries.last().map_or(0, |entry| entry.time_s);
                segment.used_s = segment.used_s.max(segment.written_use_s);
            });
            for (entry, record) in run.entries.iter().zip(&run.records) {
                let awaited = record.hold.is_awaited();
                let before = self.shared.table.store(entry, record.candidate, awaited);
                came_back |= before.is_some() && !is_own(entry.id);
                replaced.extend(before);
                if awaited {
                    record.hold.keep(&self.shared, entry.id);
                }
            }
        }
        // What a failed read had taken out of the table came back meanwhile, and an erasure may have chosen it.
        let _reclaiming = came_back.then(|| self.shared.reclaim());
        if came_back {
            replaced.retain(|record| self.shared.index.get(record.spot).is_ok_and(|kept| kept.is_some()));
        }
        // The batch is published, whatever becomes of these: of two with one name the newer one holds.
        if let Err(error) = self.shared.free(&replaced) {
            tracing::error!(%error, "records that were replaced stay");
        }
        Ok(())
    }

    /// Closes the full segments whose last batch is published.
    fn seal_full(&mut self) {
        let first = self.batches.front().map_or(self.next_batch, |batch| batch.number);
        let (done, waiting) =
            std::mem::take(&mut self.full).into_iter().partition(|(batch, _)| *batch < first);
        self.full = waiting;
        let sequence = self.next_sequence - 1;
        for (_, tail) in done {
            self.maker.seal(tail, sequence);
        }
    }

    /// Deals with a failure when nothing is under way any more.
    fn fail_over(&mut self) {
        let Some(Failure { error, suspect, again }) = self.failed.take() else { return };
        for (segment, reason) in suspect {
            self.give_up(segment, &reason);
        }
        // Nothing behind what was published was acknowledged; it is written over.
        self.tails.values_mut().for_each(|tail| tail.append_at = tail.published_at);
        let batches: Vec<Batch> = self.batches.drain(..).collect();
        self.unpublished.clear();
        self.seal_full();
        let records: VecDeque<Pending> = batches.into_iter().flat_map(Batch::into_records).collect();
        if again && records.iter().all(|record| record.record.is_some()) {
            let rest = std::mem::replace(&mut self.redo, records);
            self.redo.extend(rest);
        } else {
            self.fail(records, &error);
            self.fail_waiting(&error);
        }
    }

    /// Abandons a segment into which a write or flush failed. What was published of it stays readable.
    fn give_up(&mut self, segment: SegmentId, reason: &str) {
        self.failures += 1;
        self.shared.counters.suspect_segments.add(1);
        tracing::error!(%segment, reason, failures = self.failures, "a write failed; segment abandoned");
        let full = self.full.iter().map(|(_, tail)| tail);
        let tail = self.tails.values().chain(full).find(|tail| tail.id == segment).copied();
        let Some(tail) = tail else { return };
        self.tails.retain(|_, open| open.id != segment);
        self.full.retain(|(_, full)| full.id != segment);
        self.shared.segments.update(segment, |abandoned| abandoned.sealed = true);
        let mut changes = Changes::default();
        changes.put_segment(segment, &tail.state(Phase::Suspect, self.next_sequence - 1));
        if let Err(error) = self.shared.index.write_durably(changes) {
            tracing::error!(%segment, %error, "a suspect segment could not be marked");
        }
    }

    fn forget(&mut self, id: ObjectId, batch: u64) {
        if self.unpublished.get(&id) == Some(&batch) {
            self.unpublished.remove(&id);
        }
    }

    fn acknowledge(&self, record: Pending) {
        self.shared.counters.stored_raw_bytes.add(record.header.raw_bytes());
        self.answer(record.putter, Ok(PutOutcome::Stored));
        for repeat in record.repeats {
            self.answer(repeat.putter, compare(record.header.id, repeat.same_content));
        }
    }

    /// Refuses what waits and is not stored. What follows a failed record fails with it: it may be its child.
    fn fail_waiting(&mut self, error: &StoreError) {
        let records = std::mem::take(&mut self.redo);
        self.fail(records, error);
        self.queued_bytes = 0;
        for Submission { encoded, position, reply, .. } in std::mem::take(&mut self.queue) {
            let id = encoded.header.id;
            let known = self.shared.stored_digest(id);
            let refused = || Err(error.clone());
            self.answer(
                (position, reply),
                known.map_or_else(refused, |known| compare(id, known == encoded.digest)),
            );
        }
    }

    fn fail(&self, records: VecDeque<Pending>, error: &StoreError) {
        for record in records {
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

/// Completions go where the other events go.
#[derive(Clone)]
struct Reply(Sender<Event>);

impl Deliver for Reply {
    fn deliver(&self, completion: Completion) {
        // A committer that is gone has seen all of its completions.
        let _ = self.0.send(Event::Completed(completion));
    }
}

impl Tail {
    /// A segment that holds nothing yet.
    fn empty(
        id: SegmentId,
        class: TtlClass,
        generation: u64,
        file: FileId,
        len_bytes: u64,
        begun_s: u32,
    ) -> Self {
        let (append_at, published_at) = (RECORDS_AT, RECORDS_AT);
        Self { id, class, generation, file, len_bytes, append_at, published_at, begun_s }
    }

    /// Where the room for records ends: the last page is the seal's.
    pub(crate) fn records_end(&self) -> u64 {
        last_page(self.len_bytes)
    }

    pub(crate) fn state(&self, phase: Phase, sequence: u64) -> SegmentState {
        SegmentState { phase, generation: self.generation, watermark: self.published_at, sequence }
    }
}

impl Run {
    fn state(&self, phase: Phase) -> SegmentState {
        let (generation, sequence) = (self.tail.generation, self.sequence);
        SegmentState { phase, generation, watermark: self.end, sequence }
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
