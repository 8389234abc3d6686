//! Verification on a few threads of the store's own, so that one fetch can use more than one core, and the next reads
//! are under way while the last ones are proven.
//!
//! A read's completion goes straight from the disk to these threads, and from them, as planes, to the fetch. Planes of
//! one read stay in order; reads are put in order by the fetch. Nothing here keeps the store alive, so that neither
//! these threads nor the disk's ever drop its last part and wait for themselves.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::plan::{Item, Kept, Part, Read};
use super::{FetchEvent, FetchOrder, PlaneSelection};
use crate::breaker::Breaker;
use crate::io::{BufferPool, Completion, Deliver, Permit};
use crate::latency::LatencyCounter;
use crate::record::{Codec, RecordHeader};
use crate::sealing::Sealer;
use crate::shared::miss_of;
use crate::{Found, MissKind, verify};

/// What a fetch and its reads have in common.
pub(super) struct Context {
    pub(super) targets: Vec<Target>,
    pub(super) planes: PlaneSelection,
    pub(super) order: FetchOrder,
    /// Whole records are read, and kept until all their planes have had their turn.
    pub(super) keeps: bool,
    pub(super) pool: Arc<BufferPool>,
    pub(super) skip_verification: bool,
    pub(super) breaker: Arc<Breaker>,
    pub(super) read_us: Arc<LatencyCounter>,
    pub(super) sealer: Option<Arc<dyn Sealer>>,
    /// Nobody waits for planes any more.
    pub(super) cancelled: AtomicBool,
}

/// An object that is fetched.
pub(super) struct Target {
    pub(super) found: Found,
    /// Of its segment; `None` if there is none.
    pub(super) generation: Option<u64>,
    /// Set when it is read and proven.
    pub(super) header: Arc<OnceLock<RecordHeader>>,
}

/// What came of a read, in order.
pub(super) struct Taken {
    pub(super) tag: u64,
    pub(super) steps: VecDeque<(Item, Result<Step, MissKind>)>,
    /// Bytes that were read.
    pub(super) read_bytes: usize,
    /// The read itself, where more is to be taken from it later.
    pub(super) kept: Option<Kept>,
    pub(super) _permit: Option<Permit>,
}

/// A part of an object that is proven.
pub(super) enum Step {
    /// Its header; so many planes of it will come.
    Header(usize),
    Plane(FetchEvent),
}

/// Where the completion of a read goes.
#[derive(Clone)]
pub(super) struct Route {
    pub(super) context: Arc<Context>,
    pub(super) read: Arc<Read>,
    /// `None`: verified by whoever receives it, which is quicker for a single read.
    pub(super) threads: Option<Sender<Job>>,
    pub(super) fetch: Sender<Arrival>,
    pub(super) submitted: Instant,
}

/// What a fetch receives.
pub(super) enum Arrival {
    /// So many bytes are here, and with those who verify them.
    Brought(usize),
    Read(Job),
    Taken(Taken),
}

/// A read to be verified.
pub(crate) struct Job {
    route: Route,
    source: Source,
}

/// Where the bytes of a read come from.
enum Source {
    Disk(Completion),
    /// An earlier read left them.
    Kept(u64, Permit),
}

/// The threads. They end when the store and all reads are gone.
pub(crate) struct Verifiers(Sender<Job>);

impl Verifiers {
    pub(crate) fn start(threads: usize) -> io::Result<Self> {
        let (jobs, received) = mpsc::channel();
        let received = Arc::new(Mutex::new(received));
        for number in 0..threads.max(1) {
            let received = Arc::clone(&received);
            let name = format!("esker-verify-{number}");
            std::thread::Builder::new().name(name).spawn(move || run(&received))?;
        }
        Ok(Self(jobs))
    }

    pub(super) fn jobs(&self) -> Sender<Job> {
        self.0.clone()
    }
}

fn run(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        let fetch = job.route.fetch.clone();
        // A fetch that went away needs nothing.
        let _ = fetch.send(Arrival::Taken(job.take()));
    }
}

impl Deliver for Route {
    fn deliver(&self, completion: Completion) {
        self.context.read_us.add(self.submitted.elapsed());
        let job = Job { route: self.clone(), source: Source::Disk(completion) };
        let _ = match &self.threads {
            Some(threads) => {
                let _ = self.fetch.send(Arrival::Brought(job.read_bytes()));
                threads.send(job).map_err(drop)
            }
            None => self.fetch.send(Arrival::Read(job)).map_err(drop),
        };
    }
}

impl Job {
    /// Of what an earlier read left.
    pub(super) fn of_kept(route: Route, tag: u64, permit: Permit) -> Self {
        Self { route, source: Source::Kept(tag, permit) }
    }

    /// Bytes that the drive was asked for.
    pub(super) fn read_bytes(&self) -> usize {
        self.route.read.len_bytes()
    }

    /// Proves and decodes what was read.
    pub(super) fn take(self) -> Taken {
        let Self { route: Route { context, read, .. }, source } = self;
        let mut completion = match source {
            Source::Disk(completion) => completion,
            Source::Kept(tag, permit) => {
                let bytes = read.kept.as_ref().map(|(bytes, _)| bytes.clone()).ok_or(MissKind::ReadError);
                let steps = context.take(&read, bytes);
                return Taken { tag, steps, read_bytes: 0, kept: None, _permit: Some(permit) };
            }
        };
        let (tag, mut permit) = (completion.tag, completion.permit.take());
        let bytes = match completion.full() {
            Ok(Some(buf)) => Ok(buf.into_bytes()),
            Ok(None) => Err(MissKind::ReadError),
            Err(error) => Err(miss_of(&error)),
        };
        match &bytes {
            Ok(_) => context.breaker.worked(),
            Err(MissKind::ReadError) => context.breaker.failed(),
            Err(_) => {}
        }
        let read_bytes = bytes.as_ref().map_or(0, Bytes::len);
        let kept = bytes.as_ref().ok().filter(|_| context.keeps).map(|bytes| Kept {
            segment: read.segment,
            start: read.range.start,
            bytes: bytes.clone(),
            _permit: permit.take(),
        });
        Taken { tag, steps: context.take(&read, bytes), read_bytes, kept, _permit: permit }
    }
}

impl Context {
    /// Proves and decodes what was read, in order.
    pub(super) fn take(
        &self,
        read: &Read,
        bytes: Result<Bytes, MissKind>,
    ) -> VecDeque<(Item, Result<Step, MissKind>)> {
        let mut steps = VecDeque::new();
        if self.cancelled.load(Ordering::Relaxed) {
            return steps;
        }
        for &item in &read.items {
            let bytes =
                bytes.as_ref().map_err(|kind| *kind).map(|bytes| Piece { bytes, start: read.range.start });
            match (item.part, bytes) {
                (_, Err(kind)) => steps.push_back((item, Err(kind))),
                (Part::Plane(plane), Ok(piece)) => {
                    steps.push_back((item, self.plane(item.object, plane, piece)))
                }
                (Part::Header, Ok(piece)) => steps.push_back((item, self.header(item.object, piece))),
                (Part::Record | Part::Head, Ok(piece)) => self.record(item, piece, &mut steps),
            }
        }
        steps
    }

    /// Header and planes of a record, or those planes that a read of its start covers.
    fn record(&self, item: Item, piece: Piece<'_>, steps: &mut VecDeque<(Item, Result<Step, MissKind>)>) {
        let header = self.header(item.object, piece);
        let sound = header.is_ok();
        steps.push_back((item, header));
        if !sound {
            return;
        }
        let target = &self.targets[item.object];
        for plane in self.selected(item.object) {
            let in_head = target.header.get().is_some_and(|header| self.in_head(target, header, plane));
            if item.part == Part::Record || in_head {
                let part = Item { object: item.object, part: Part::Plane(plane) };
                steps.push_back((part, self.plane(item.object, plane, piece)));
            }
        }
    }

    /// Whether a plane is given from the start of its record: of a start that is read alone the first at most, where others that
    /// lie in it come in their turn; of a record that is kept those that lead.
    pub(super) fn in_head(&self, target: &Target, header: &RecordHeader, plane: usize) -> bool {
        if self.keeps {
            return self.order.leads(plane);
        }
        let (end, raw_bytes) = (header.planes[plane].range().end, header.planes[plane].raw_bytes as usize);
        end <= target.found.located.head_bytes as usize
            && raw_bytes <= target.head_decoded_bytes()
            && (self.order == FetchOrder::ByObject || plane == 0)
    }

    fn header(&self, object: usize, piece: Piece<'_>) -> Result<Step, MissKind> {
        let target = &self.targets[object];
        let located = &target.found.located;
        let bytes = piece.slice(located.spot.offset, located.header_bytes as usize)?;
        let generation = target.generation.ok_or(MissKind::Absent)?;
        let header = verify::header(&bytes, target.found.id, located, generation)?;
        // A header that was proven before is the same one.
        let _ = target.header.set(header);
        Ok(Step::Header(self.selected(object).count()))
    }

    fn plane(&self, object: usize, index: usize, piece: Piece<'_>) -> Result<Step, MissKind> {
        let target = &self.targets[object];
        let header = target.header.get().ok_or(MissKind::WrongRecord)?;
        let plane = header.planes.get(index).ok_or(MissKind::WrongRecord)?;
        let start = target.found.located.spot.offset + u64::from(plane.offset);
        let stored = piece.slice(start, plane.stored_bytes as usize)?;
        let decoded = match plane.codec {
            _ if header.seal.is_some() => {
                Some(verify::sealed_plane(header, index, &stored, &self.pool, self.sealer.as_deref())?)
            }
            Codec::Raw if self.skip_verification => None,
            Codec::Zstd | Codec::Columns if self.skip_verification => {
                Some(verify::decode(plane, &stored, &self.pool)?)
            }
            _ => verify::plane(plane, &stored, &self.pool)?,
        };
        let bytes = decoded.map_or(stored, |buf| buf.into_bytes().slice(..plane.raw_bytes as usize));
        Ok(Step::Plane(FetchEvent::Plane { object, plane: index, spec: plane.spec(), bytes }))
    }

    /// Planes of an object whose header is known that were asked for.
    pub(super) fn selected(&self, object: usize) -> impl Iterator<Item = usize> {
        let planes = self.targets[object].header.get().map_or(&[][..], |header| &header.planes);
        planes.iter().enumerate().filter(|(_, plane)| self.planes.has(plane)).map(|(index, _)| index)
    }
}

/// What was read, and where it starts in its segment.
#[derive(Clone, Copy)]
struct Piece<'a> {
    bytes: &'a Bytes,
    start: u64,
}

impl Piece<'_> {
    /// `len` bytes at `at` of the segment.
    fn slice(&self, at: u64, len: usize) -> Result<Bytes, MissKind> {
        let start = usize::try_from(at.wrapping_sub(self.start)).unwrap_or(usize::MAX);
        match start.checked_add(len) {
            Some(end) if end <= self.bytes.len() => Ok(self.bytes.slice(start..end)),
            _ => Err(MissKind::Truncated),
        }
    }
}
