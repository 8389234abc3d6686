//! Making and sealing segments on a thread of their own, and keeping house at the start and every few seconds: all of it waits
//! for the file system's journal, and none of it should keep a commit waiting.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Event, Tail, is_full};
use crate::TtlClass;
use crate::index::Changes;
use crate::io::{FileId, headroom_bytes};
use crate::segment::{OpenSegment, SegmentId, SegmentPage, random_generation};
use crate::shared::Shared;

/// Handle of the thread.
pub(super) struct Maker {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    events: Sender<Event>,
    ordered: HashSet<Kind>,
}

/// What a segment is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// What expires.
    Passing,
    /// What is kept for ever, and what the store writes about itself.
    Permanent,
}

impl Kind {
    pub(super) fn of(class: TtlClass) -> Self {
        if class == TtlClass::PERMANENT { Self::Permanent } else { Self::Passing }
    }

    /// A class of this kind: they are all alike here.
    fn class(self) -> TtlClass {
        match self {
            Self::Passing => TtlClass::default(),
            Self::Permanent => TtlClass::PERMANENT,
        }
    }
}

enum Job {
    Make(Kind),
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

    /// Orders a segment of this kind, unless one is being made. It comes as an event.
    pub(super) fn order(&mut self, kind: Kind) {
        if self.ordered.insert(kind) {
            self.send(Job::Make(kind));
        }
    }

    /// Takes note that an order came.
    pub(super) fn delivered(&mut self, kind: Kind) {
        self.ordered.remove(&kind);
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
    pub(super) fn stop(&mut self, spares: HashMap<Kind, Made>) {
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
        let makes = if let Job::Make(kind) = &job { Some(*kind) } else { None };
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if let Some(kind) = makes.filter(|_| !sent) {
            let error = io::Error::other("the segment thread is gone");
            let _ = self.events.send(Event::Made(kind, Made::Not(error)));
        }
    }
}

/// Between two rounds of housekeeping, however much else there is to do.
const TICK: Duration = Duration::from_secs(5);
/// Between two evictions that make no room, since others take what is given back.
const FUTILE: Duration = Duration::from_secs(60);

fn run(shared: &Arc<Shared>, next: SegmentId, jobs: &Receiver<Job>, events: &Sender<Event>) {
    // The first at once: what ran out while nobody kept house is not to be found for long.
    let mut due = Instant::now();
    let mut making = Making { shared, next, futile_until: None };
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
            Job::Make(kind) => {
                let made = making.make(kind);
                if let Err(refused) = events.send(Event::Made(kind, made))
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

/// Making segments, one after another.
struct Making<'a> {
    shared: &'a Shared,
    next: SegmentId,
    /// Something was evicted for a full file system, and there was no room all the same: nothing more goes for that until then.
    futile_until: Option<Instant>,
}

impl Making<'_> {
    fn make(&mut self, kind: Kind) -> Made {
        let (shared, class) = (self.shared, kind.class());
        if let Err(error) = shared.make_room(class) {
            tracing::error!(%error, "room for another segment could not be made");
        }
        if !shared.has_capacity(class) {
            let (_, used_bytes) = shared.segments.totals();
            let reason = format!("{used_bytes} of {} bytes are in segments", shared.settings.capacity_bytes);
            return Made::Not(io::Error::new(io::ErrorKind::StorageFull, reason));
        }
        let len_bytes = shared.settings.segment_bytes_of(class);
        match self.create(len_bytes) {
            // Others have filled the file system: what is worth least is worth less than what comes.
            Err(error)
                if is_full(&error) && self.futile_until.is_none_or(|until| until <= Instant::now()) =>
            {
                if let Err(error) = shared.free_space(len_bytes + headroom_bytes(len_bytes)) {
                    tracing::error!(%error, "space for another segment could not be given back");
                }
                let made = self.create(len_bytes);
                self.futile_until = made.is_err().then(|| Instant::now() + FUTILE);
                made
            }
            made => made,
        }
        .map_or_else(Made::Not, Made::Segment)
    }

    fn create(&mut self, len_bytes: u64) -> io::Result<Blank> {
        let (shared, id) = (self.shared, self.next);
        // Before the file is there: whatever of the index outlives a power cut knows of a segment only what it knows of its
        // number, too.
        let mut changes = Changes::default();
        changes.put_highest_segment(id);
        shared.index.write(changes).map_err(io::Error::other)?;
        let created = shared.disk.create(&id.file_name(), len_bytes);
        // A number is used up only by a file that exists.
        if created.as_ref().err().is_none_or(|error| error.kind() == io::ErrorKind::AlreadyExists) {
            self.next = SegmentId(id.0 + 1);
        }
        created.map(|file| Blank { id, file, len_bytes })
    }
}

impl Blank {
    /// Gives the segment its class and its header, which is flushed with its first records. None of these has a sequence below
    /// `sequence`.
    pub(super) fn begin(&self, shared: &Shared, class: TtlClass, sequence: u64) -> io::Result<Tail> {
        let &Self { id, file, len_bytes } = self;
        let generation = random_generation();
        let used_s = shared.time.now_s();
        let header = SegmentPage { id, class, generation, extent_bytes: len_bytes, sequence };
        // Without a header it would take space for nothing until the next opening.
        shared.write_headers(file, &header).inspect_err(|_| self.remove(shared))?;
        shared.segments.insert(id, OpenSegment::new(file, len_bytes, generation, class, used_s, sequence));
        Ok(Tail::empty(id, class, generation, file, len_bytes, used_s))
    }

    fn remove(&self, shared: &Shared) {
        if let Err(error) = shared.disk.remove(&self.id.file_name()) {
            tracing::warn!(segment = %self.id, %error, "an unused segment could not be removed");
        }
    }
}
