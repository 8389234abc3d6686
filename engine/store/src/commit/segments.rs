//! Making and sealing segments on a thread of their own, and keeping house at the start and every few seconds: all of it waits
//! for the file system's journal, and none of it should keep a commit waiting.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Event, Tail};
use crate::TtlClass;
use crate::index::Changes;
use crate::io::FileId;
use crate::segment::{OpenSegment, SegmentId, SegmentPage, random_generation};
use crate::shared::Shared;

/// Handle of the thread.
pub(super) struct Maker {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    events: Sender<Event>,
    ordered: HashSet<u64>,
}

enum Job {
    Make(u64),
    Seal(Tail, u64),
    House(Option<Sender<()>>),
}

/// What an order came to.
pub(super) enum Made {
    Segment(Blank),
    Not(io::Error),
}

/// A segment file of zeros that has no class yet.
pub(super) struct Blank {
    id: SegmentId,
    file: FileId,
    len_bytes: u64,
}

impl Maker {
    pub(super) fn start(shared: Arc<Shared>, next: SegmentId, events: Sender<Event>) -> io::Result<Self> {
        let (jobs, received) = mpsc::channel();
        let thread = std::thread::Builder::new().name("esker-segments".into()).spawn({
            let (shared, events) = (Arc::clone(&shared), events.clone());
            move || run(&shared, next, &received, &events)
        })?;
        Ok(Self { shared, jobs: Some(jobs), thread: Some(thread), events, ordered: HashSet::new() })
    }

    /// Orders a segment of this length, unless one is being made. It comes as an event.
    pub(super) fn order(&mut self, len_bytes: u64) {
        if self.ordered.insert(len_bytes) {
            self.send(Job::Make(len_bytes));
        }
    }

    /// Takes note that an order came.
    pub(super) fn delivered(&mut self, len_bytes: u64) {
        self.ordered.remove(&len_bytes);
    }

    /// Closes a segment for good. One that cannot be sealed is scanned at the next opening, nothing worse.
    pub(super) fn seal(&self, tail: Tail, sequence: u64) {
        self.send(Job::Seal(tail, sequence));
    }

    /// Keeps house when everything before is done.
    pub(super) fn keep_house(&self, asked: Option<Sender<()>>) {
        self.send(Job::House(asked));
    }

    /// Ends the thread when it has done everything, and removes segments that were made and never used.
    pub(super) fn stop(&mut self, spares: HashMap<u64, Made>) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the segment thread panicked");
        }
        for made in spares.into_values() {
            if let Made::Segment(blank) = made {
                blank.remove(&self.shared);
            }
        }
    }

    fn send(&self, job: Job) {
        let makes = if let Job::Make(len_bytes) = &job { Some(*len_bytes) } else { None };
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if let Some(len_bytes) = makes.filter(|_| !sent) {
            let error = io::Error::other("the segment thread is gone");
            let _ = self.events.send(Event::Made(len_bytes, Made::Not(error)));
        }
    }
}

/// Between two rounds of housekeeping, however much else there is to do.
const TICK: Duration = Duration::from_secs(5);

fn run(shared: &Arc<Shared>, mut next: SegmentId, jobs: &Receiver<Job>, events: &Sender<Event>) {
    // The first at once: what ran out while nobody kept house is not to be found for long.
    let mut due = Instant::now();
    loop {
        let now = Instant::now();
        if due <= now {
            due = now + TICK;
            // By way of the committer, which knows what is still being written.
            let _ = events.send(Event::House(None));
        }
        let job = match jobs.recv_timeout(due - now) {
            Ok(job) => job,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        match job {
            Job::Make(len_bytes) => {
                let made = make(shared, &mut next, len_bytes);
                if let Err(refused) = events.send(Event::Made(len_bytes, made))
                    && let Event::Made(_, Made::Segment(blank)) = refused.0
                {
                    blank.remove(shared);
                }
            }
            Job::House(asked) => {
                shared.keep_house();
                asked.map(|asked| asked.send(()));
            }
            Job::Seal(tail, sequence) => {
                if let Err(error) = shared.seal(&tail, sequence) {
                    tracing::warn!(segment = %tail.id, %error, "a segment could not be sealed");
                }
            }
        }
    }
}

fn make(shared: &Shared, next: &mut SegmentId, len_bytes: u64) -> Made {
    if let Err(error) = shared.make_room() {
        tracing::error!(%error, "room for another segment could not be made");
    }
    if !shared.has_capacity() {
        let (_, used_bytes) = shared.segments.totals();
        let reason = format!("{used_bytes} of {} bytes are in segments", shared.settings.capacity_bytes);
        return Made::Not(io::Error::new(io::ErrorKind::StorageFull, reason));
    }
    let id = *next;
    // Before the file is there: whatever of the index outlives a power cut knows of a segment only what it knows of its
    // number, too.
    let mut changes = Changes::default();
    changes.put_highest_segment(id);
    if let Err(error) = shared.index.write(changes) {
        return Made::Not(io::Error::other(error));
    }
    let created = shared.disk.create(&id.file_name(), len_bytes);
    // A number is used up only by a file that exists.
    if created.as_ref().err().is_none_or(|error| error.kind() == io::ErrorKind::AlreadyExists) {
        *next = SegmentId(id.0 + 1);
    }
    match created {
        Ok(file) => Made::Segment(Blank { id, file, len_bytes }),
        Err(error) => Made::Not(error),
    }
}

impl Blank {
    /// Gives the segment its class and its header, which is flushed with its first records. None of these has a sequence below
    /// `sequence`.
    pub(super) fn begin(self, shared: &Shared, class: TtlClass, sequence: u64) -> io::Result<Tail> {
        let Self { id, file, len_bytes } = self;
        let generation = random_generation();
        let used_s = shared.time.now_s();
        shared.segments.insert(id, OpenSegment::new(file, len_bytes, generation, class, used_s, sequence));
        let header = SegmentPage { id, class, generation, extent_bytes: len_bytes, sequence };
        shared.write_headers(file, &header)?;
        Ok(Tail::empty(id, class, generation, file, len_bytes, used_s))
    }

    fn remove(self, shared: &Shared) {
        if let Err(error) = shared.disk.remove(&self.id.file_name()) {
            tracing::warn!(segment = %self.id, %error, "an unused segment could not be removed");
        }
    }
}
