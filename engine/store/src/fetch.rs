//! Fetch: planes of many objects, verified, in the order asked for.
//!
//! A fetch plans its reads in the order of delivery, joins neighbours, keeps several in flight, has them verified by the
//! store's threads, and yields the planes in order. Whole objects take one read each or less, since header and planes
//! are contiguous, but for the start of the first, which is read alone; a selection of planes, or the order by plane,
//! reads the headers of all objects first. Small records in the order by plane are read once, give the planes that lead as they
//! come, and are kept till their last plane. The drive is asked for a few mebibytes at a time, so that the first come first.
//!
//! What is in flight counts as it is read or as it is decoded, whichever is more, so that what waits to be taken is bounded, however
//! well it was compressed.
//!
//! Invariants: a plane is yielded only after it passed `verify.rs`; an object that fails yields one miss and nothing
//! after it; a bad read is repeated once per object; dropping the fetch frees everything, what is in flight as it completes.

mod plan;
mod verifying;

use std::collections::VecDeque;
use std::iter::FusedIterator;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Instant;

use bytes::Bytes;
use esker_prefix::{ObjectId, PlaneSpec};

use crate::io::{Op, Permit};
use crate::record::Plane;
use crate::segment::SegmentId;
use crate::shared::Shared;
use crate::table::Located;
use crate::{Found, MissKind};
use plan::{Extent, Item, Kept, Part, Read};
pub(crate) use verifying::Verifiers;
use verifying::{Arrival, Context, Job, Route, Step, Taken, Target};

/// Records up to this length, on average, are read once and kept where planes come by rank.
const SMALL_RECORD_BYTES: usize = 64 << 10;
/// Bytes that the drive is asked for at a time: more of them come no faster, and all of them later.
pub(crate) const READ_BYTES_AT_ONCE: usize = 8 << 20;
/// Share of the bytes that all fetches may have in flight of which one may keep so much: the half.
const KEPT_SHARE: usize = 2;
/// The first plane is given along with the start of its record if it has no more than so many times that many bytes.
const HEAD_EXPANSION: usize = 2;

/// What to fetch.
#[derive(Clone, Debug)]
pub struct FetchRequest {
    /// Objects found by a lookup.
    pub objects: Vec<Found>,
    /// Which of their planes.
    pub planes: PlaneSelection,
    /// In which order.
    pub order: FetchOrder,
    /// When to give up: what has not been yielded by then is a miss.
    pub deadline: Option<Instant>,
}

/// Which planes of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaneSelection {
    /// All of them.
    All,
    /// Those that hold any of these layers of these groups. Layers are indices into the group's list of layers.
    Layers(Vec<(u16, Range<u16>)>),
}

/// Order of delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchOrder {
    /// All planes of the first object, then all of the second, and so on.
    ByObject,
    /// The first plane of all objects, then the second of all, and so on: the order of a restore.
    ByPlane,
    /// As by plane, but planes of the lowest rank first, whatever their place: a rank for each plane of an object, and
    /// the highest for those behind. Planes of one rank come object after object. The first plane may come before its rank.
    ByRank(Arc<[u16]>),
}

impl FetchOrder {
    /// Whether a plane is among the first of its object.
    fn leads(&self, plane: usize) -> bool {
        match self {
            Self::ByObject | Self::ByPlane => plane == 0,
            Self::ByRank(ranks) => ranks.get(plane) == ranks.iter().min(),
        }
    }

    /// Where a part of an object stands, lowest first.
    fn key(&self, item: &Item) -> (u16, Part, usize) {
        match (self, item.part) {
            // Together with the object's others of that rank.
            (Self::ByRank(ranks), Part::Plane(plane)) => {
                let rank = ranks.get(plane).copied().unwrap_or(u16::MAX);
                (rank, Part::Head, item.object)
            }
            _ => (0, item.part, item.object),
        }
    }
}

/// A step of a fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchEvent {
    /// A verified plane.
    Plane {
        /// Position of the object in the request.
        object: usize,
        /// Position of the plane in the object.
        plane: usize,
        /// What the plane holds.
        spec: PlaneSpec,
        /// Its raw bytes.
        bytes: Bytes,
    },
    /// An object that cannot be had. Planes of it that came before are good.
    Miss {
        /// Position of the object in the request.
        object: usize,
        /// Why.
        kind: MissKind,
    },
}

/// A running fetch. See the module.
pub struct Fetch {
    shared: Arc<Shared>,
    context: Arc<Context>,
    deadline: Option<Instant>,
    phase: Phase,
    started: Instant,
    /// Bytes of planes given out.
    given_bytes: u64,
    /// End of the prefix that counts as used; told once the first plane is out, which should not wait for that.
    tip: Option<ObjectId>,
    /// How far each object is.
    fates: Vec<Fate>,
    /// Reads to be submitted.
    planned: VecDeque<Read>,
    /// Reads submitted, in the order of delivery.
    in_flight: VecDeque<InFlight>,
    /// Reads of whole records of which planes are still to be taken.
    kept: Vec<Kept>,
    /// What is being yielded; a repeated read lies above the one that it repeats.
    current: Vec<Taken>,
    /// Bytes of both.
    held_bytes: usize,
    /// Bytes that the drive has been asked for and has not brought.
    asked_bytes: usize,
    next_tag: u64,
    reply: Sender<Arrival>,
    arrivals: Receiver<Arrival>,
    /// Misses found without a read.
    misses: VecDeque<FetchEvent>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Reading the start of the first record, all records after that.
    Head,
    /// Reading whole records.
    Records,
    /// Reading headers, planes after that.
    Headers,
    Planes,
    Over,
}

#[derive(Clone, Copy, Default)]
struct Fate {
    planes_left: Option<usize>,
    retried: bool,
    missed: bool,
}

struct InFlight {
    tag: u64,
    held_bytes: usize,
    arrived: Option<Taken>,
}

impl Fetch {
    pub(crate) fn new(shared: Arc<Shared>, request: FetchRequest) -> Self {
        let FetchRequest { objects, planes, order, deadline } = request;
        let target = |found: Found| Target {
            generation: shared.segments.get(found.located.spot.segment).map(|segment| segment.generation),
            header: found.header.clone().unwrap_or_default(),
            found,
        };
        let all = planes == PlaneSelection::All;
        let whole = all && (order == FetchOrder::ByObject || objects.len() < 2);
        // Of small records a read for each rank would come by nearly all of their bytes every time.
        let record_bytes: usize = objects.iter().map(|found| found.located.record_bytes()).sum();
        let held_bytes: usize = objects.iter().map(|found| found.located.held_bytes()).sum();
        let keeps = all
            && !whole
            && record_bytes <= objects.len() * SMALL_RECORD_BYTES
            && held_bytes <= shared.settings.read_bytes_in_flight / KEPT_SHARE;
        let context = Arc::new(Context {
            targets: objects.into_iter().map(target).collect(),
            planes,
            order,
            keeps,
            pool: Arc::clone(&shared.pool),
            skip_verification: shared.settings.skips_verification(),
            breaker: Arc::clone(&shared.breaker),
            read_us: Arc::clone(&shared.counters.read_us),
            sealer: shared.sealer.clone(),
            cancelled: AtomicBool::new(false),
        });
        let (reply, arrivals) = mpsc::channel();
        let count = context.targets.len();
        let tip = context.targets.last().map(|target| target.found.id);
        // The first plane should not wait for a mebibyte.
        let large = context.targets.first().is_some_and(|first| {
            let Located { head_bytes, header_bytes, .. } = first.found.located;
            header_bytes <= head_bytes && first.found.located.record_bytes() > 2 * head_bytes as usize
        });
        let mut fetch = Self {
            shared,
            context,
            deadline,
            phase: match whole {
                true if large => Phase::Head,
                true => Phase::Records,
                false => Phase::Headers,
            },
            started: Instant::now(),
            given_bytes: 0,
            tip,
            fates: vec![Fate::default(); count],
            planned: VecDeque::new(),
            in_flight: VecDeque::new(),
            kept: Vec::new(),
            current: Vec::new(),
            held_bytes: 0,
            asked_bytes: 0,
            next_tag: 0,
            reply,
            arrivals,
            misses: VecDeque::new(),
        };
        let items = |objects: Range<usize>, part| -> Vec<Item> {
            objects.map(|object| Item { object, part }).collect()
        };
        let first = match fetch.phase {
            Phase::Head => items(0..1, Part::Head),
            Phase::Records => items(0..count, Part::Record),
            _ if fetch.reads_heads() => items(0..count, Part::Head),
            _ => {
                // Those that are known need no reading.
                let mut unknown = items(0..count, Part::Header);
                unknown.retain(|item| fetch.context.targets[item.object].header.get().is_none());
                for (object, fate) in fetch.fates.iter_mut().enumerate() {
                    let known = fetch.context.targets[object].header.get();
                    fate.planes_left = known.map(|_| fetch.context.selected(object).count());
                }
                unknown
            }
        };
        fetch.plan(first);
        fetch
    }

    /// Bytes being read ahead for this fetch.
    pub fn in_flight_bytes(&self) -> usize {
        self.held_bytes
    }

    #[cfg(test)]
    pub(crate) fn asked_bytes(&self) -> usize {
        self.asked_bytes
    }

    /// Waits for what was asked for, and tells how many bytes of planes wait to be taken.
    #[cfg(test)]
    pub(crate) fn waiting_bytes(&mut self) -> usize {
        let is_taken = |fetch: &Self, tag| fetch.current.iter().any(|taken| taken.tag == tag);
        while self.in_flight.iter().any(|read| read.arrived.is_none() && !is_taken(self, read.tag)) {
            if let Ok(arrival) = self.arrivals.recv() {
                self.note(arrival);
            }
        }
        let taken = self.in_flight.iter().filter_map(|read| read.arrived.as_ref()).chain(&self.current);
        let plane = |(_, step): &(Item, Result<Step, MissKind>)| match step {
            Ok(Step::Plane(FetchEvent::Plane { bytes, .. })) => bytes.len(),
            _ => 0,
        };
        taken.flat_map(|taken| taken.steps.iter().map(plane)).sum()
    }

    /// Whether the first plane of all objects comes first and is read along with the header.
    fn reads_heads(&self) -> bool {
        self.context.order != FetchOrder::ByObject && self.context.planes == PlaneSelection::All
    }

    fn plan(&mut self, items: Vec<Item>) {
        let merge_bytes = self.shared.settings.read_merge_bytes;
        let Context { targets, keeps, .. } = &*self.context;
        let extent = |item: &Item| {
            let part = if *keeps && item.part == Part::Head { Part::Record } else { item.part };
            let target = &targets[item.object];
            let (segment, start, len) = target.extent(part);
            Extent { segment, range: start..start + len, decoded_bytes: target.decoded_bytes(part) }
        };
        self.planned = match self.kept.is_empty() {
            true => plan::join(items, merge_bytes, extent),
            false => plan::from_kept(items, &self.kept, merge_bytes, extent),
        };
    }

    /// Starts as many reads as the budgets allow; at least one if nothing else is going on.
    fn top_up(&mut self) {
        while let Some(read) = self.planned.front() {
            let (bytes, held_bytes) = (read.len_bytes(), read.held_bytes());
            let idle = self.in_flight.is_empty() && self.current.is_empty();
            // One that is longer is asked for alone.
            let has_asked = read.kept.is_none() && self.asked_bytes > 0;
            let waits = has_asked && self.asked_bytes + bytes > READ_BYTES_AT_ONCE;
            let fits = self.held_bytes + held_bytes <= self.shared.settings.fetch_window_bytes;
            if (waits || !fits) && !idle {
                return;
            }
            let permit = match self.shared.reading.try_acquire(held_bytes) {
                Some(permit) => permit,
                None if idle => self.shared.reading.force(held_bytes),
                None => return,
            };
            let Some(read) = self.planned.pop_front() else { return };
            self.submit(read, permit);
        }
    }

    fn submit(&mut self, read: Read, permit: Permit) {
        let (tag, len_bytes, held_bytes) = (self.next_tag, read.len_bytes(), read.held_bytes());
        self.next_tag += 1;
        self.held_bytes += held_bytes;
        let arrived = match self.shared.segments.get(read.segment) {
            _ if read.kept.is_some() => {
                let job = Job::of_kept(self.route(read, None), tag, permit);
                self.shared.verifiers.jobs().send(job).err().map(|unsent| unsent.0.take())
            }
            Some(_) if !self.shared.admits_read() => {
                Some(self.unread(&read, tag, permit, MissKind::Unavailable))
            }
            Some(segment) => {
                let buf = self.shared.pool.take(len_bytes);
                let threads = (self.phase != Phase::Head).then(|| self.shared.verifiers.jobs());
                let start = read.range.start;
                let mut op = Op::read(segment.file, start, buf, tag, &self.route(read, threads));
                op.permit = Some(permit);
                self.asked_bytes += len_bytes;
                self.shared.disk.submit(op);
                None
            }
            None => Some(self.unread(&read, tag, permit, MissKind::Absent)),
        };
        self.in_flight.push_back(InFlight { tag, held_bytes, arrived });
    }

    fn route(&self, read: Read, threads: Option<Sender<Job>>) -> Route {
        let (context, fetch) = (Arc::clone(&self.context), self.reply.clone());
        Route { context, read: Arc::new(read), threads, fetch, submitted: Instant::now() }
    }

    /// What comes of a read that is not made.
    fn unread(&self, read: &Read, tag: u64, permit: Permit, kind: MissKind) -> Taken {
        let steps = self.context.take(read, Err(kind));
        Taken { tag, steps, read_bytes: 0, kept: None, _permit: Some(permit) }
    }

    /// Notes a read that is there, or will be once it is verified.
    fn note(&mut self, arrival: Arrival) {
        let mut taken = match arrival {
            Arrival::Brought(bytes) => {
                self.asked_bytes -= bytes;
                return;
            }
            Arrival::Taken(taken) => taken,
            Arrival::Read(job) => {
                self.asked_bytes -= job.read_bytes();
                job.take()
            }
        };
        self.shared.counters.read_bytes.add(taken.read_bytes as u64);
        self.kept.extend(taken.kept.take());
        let position = self.in_flight.iter().position(|read| read.tag == taken.tag);
        if let Some(position) = position {
            self.in_flight[position].arrived = Some(taken);
        }
    }

    /// Notes what has come meanwhile, and has the drive go on.
    fn keep_up(&mut self) {
        let mut noted = false;
        while let Ok(arrival) = self.arrivals.try_recv() {
            self.note(arrival);
            noted = true;
        }
        if noted {
            self.top_up();
        }
    }

    /// Waits for the oldest read. `false` if the deadline came first.
    fn await_oldest(&mut self) -> bool {
        while let Some(oldest) = self.in_flight.front_mut() {
            if let Some(taken) = oldest.arrived.take() {
                self.current.push(taken);
                return true;
            }
            let arrival = match self.deadline {
                None => self.arrivals.recv().ok(),
                Some(deadline) => {
                    self.arrivals.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
                }
            };
            let Some(arrival) = arrival else { return false };
            self.note(arrival);
            self.top_up();
        }
        true
    }

    /// Lets go of a read of which everything was yielded.
    fn let_go(&mut self) {
        let Some(taken) = self.current.pop() else { return };
        if self.in_flight.front().is_some_and(|read| read.tag == taken.tag)
            && let Some(read) = self.in_flight.pop_front()
        {
            self.held_bytes -= read.held_bytes;
        }
    }

    /// Takes one step of a read.
    fn step(&mut self, item: Item, outcome: Result<Step, MissKind>) -> Option<FetchEvent> {
        let fate = &mut self.fates[item.object];
        if fate.missed {
            return None;
        }
        match outcome {
            Ok(Step::Header(planes)) => {
                fate.planes_left = Some(planes);
                None
            }
            Ok(Step::Plane(event)) => {
                fate.planes_left = fate.planes_left.map(|left| left.saturating_sub(1));
                if let FetchEvent::Plane { bytes, .. } = &event {
                    if self.given_bytes == 0 {
                        self.shared.counters.first_plane_us.add(self.started.elapsed());
                    }
                    self.given_bytes += bytes.len() as u64;
                }
                if fate.planes_left == Some(0) {
                    self.shared.counters.fetched.add(1);
                }
                Some(event)
            }
            Err(kind) => self.repeat_or_miss(item, kind),
        }
    }

    /// Reads a bad item again, once per object; gives the object up after that.
    fn repeat_or_miss(&mut self, item: Item, kind: MissKind) -> Option<FetchEvent> {
        let fate = &mut self.fates[item.object];
        if !kind.is_damage() || fate.retried {
            return Some(self.miss(item.object, kind));
        }
        fate.retried = true;
        let target = &self.context.targets[item.object];
        let (segment, start, len) = target.extent(item.part);
        let range = plan::pages(start..start + len);
        let read = Read { segment, range, items: vec![item], kept: None, decoded_bytes: 0 };
        let skip = usize::try_from(read.range.start - target.found.located.spot.offset).unwrap_or(0);
        let bytes = self.shared.read_until(&target.found.located, skip, read.len_bytes(), self.deadline);
        let steps = self.context.take(&read, bytes.map(|buf| buf.into_bytes()));
        self.current.push(Taken { tag: u64::MAX, steps, read_bytes: 0, kept: None, _permit: None });
        None
    }

    fn miss(&mut self, object: usize, kind: MissKind) -> FetchEvent {
        self.fates[object].missed = true;
        let found = &self.context.targets[object].found;
        // What was evicted or erased meanwhile reads as zeros, and is no damage.
        let gone = kind.is_damage() && !self.shared.table.is_at(found.id, found.located.spot);
        let kind = if gone { MissKind::Absent } else { kind };
        self.shared.counters.miss(kind);
        if kind.is_damage() {
            self.shared.quarantine(found.id, &found.located, kind);
        }
        FetchEvent::Miss { object, kind }
    }

    /// Ends the fetch: what is not complete is a miss.
    fn give_up(&mut self, kind: MissKind) {
        let open: Vec<usize> = (0..self.fates.len())
            .filter(|&object| !self.fates[object].missed && self.fates[object].planes_left != Some(0))
            .collect();
        for object in open {
            let miss = self.miss(object, kind);
            self.misses.push_back(miss);
        }
        self.context.cancelled.store(true, Ordering::Relaxed);
        self.planned.clear();
        self.in_flight.clear();
        self.kept.clear();
        self.held_bytes = 0;
        self.current.clear();
        self.phase = Phase::Over;
    }

    /// Plans what follows when all that was planned is done. `false` if nothing does.
    fn advance(&mut self) -> bool {
        let planes_of = |object: usize| {
            let planes = self.context.selected(object).map(Part::Plane);
            planes.map(move |part| Item { object, part })
        };
        let behind_head = |item: &Item| {
            let target = &self.context.targets[item.object];
            match (item.part, target.header.get()) {
                (Part::Plane(plane), Some(header)) => !self.context.in_head(target, header, plane),
                _ => false,
            }
        };
        let mut items: Vec<Item> = Vec::new();
        match self.phase {
            Phase::Head => {
                self.phase = Phase::Records;
                if !self.fates[0].missed {
                    items.extend(planes_of(0).filter(behind_head));
                }
                items.extend((1..self.fates.len()).map(|object| Item { object, part: Part::Record }));
            }
            Phase::Headers => {
                self.phase = Phase::Planes;
                let open = (0..self.fates.len()).filter(|&object| !self.fates[object].missed);
                items.extend(open.flat_map(planes_of));
                if self.reads_heads() {
                    items.retain(behind_head);
                }
                if self.context.order != FetchOrder::ByObject {
                    // Stable: planes of one rank and object stay as they lie in the record.
                    items.sort_by_key(|item| self.context.order.key(item));
                }
            }
            Phase::Records | Phase::Planes | Phase::Over => {
                self.phase = Phase::Over;
                self.kept.clear();
                return false;
            }
        }
        self.plan(items);
        true
    }
}

impl Iterator for Fetch {
    type Item = FetchEvent;

    fn next(&mut self) -> Option<FetchEvent> {
        self.keep_up();
        loop {
            if let Some(miss) = self.misses.pop_front() {
                return Some(miss);
            }
            if self.phase == Phase::Over {
                return None;
            }
            while let Some(taken) = self.current.last_mut() {
                let Some((item, outcome)) = taken.steps.pop_front() else {
                    self.let_go();
                    continue;
                };
                if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    self.give_up(MissKind::Deadline);
                    break;
                }
                if let Some(event) = self.step(item, outcome) {
                    return Some(event);
                }
            }
            if self.phase == Phase::Over {
                continue;
            }
            self.top_up();
            if self.phase != Phase::Head
                && let Some(tip) = self.tip.take()
            {
                self.shared.used(tip);
            }
            if self.in_flight.is_empty() {
                if self.planned.is_empty() && !self.advance() {
                    return None;
                }
            } else if !self.await_oldest() {
                self.give_up(MissKind::Deadline);
            }
        }
    }
}

impl FusedIterator for Fetch {}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.context.cancelled.store(true, Ordering::Relaxed);
        if self.given_bytes > 0 {
            self.shared.counters.fetched_bytes.add(self.given_bytes);
            self.shared.counters.fetch_us.add(self.started.elapsed());
        }
        if let Some(tip) = self.tip.take() {
            self.shared.used(tip);
        }
    }
}

impl PlaneSelection {
    fn has(&self, plane: &Plane) -> bool {
        let layers = plane.first_layer..plane.first_layer.saturating_add(plane.layers);
        match self {
            Self::All => true,
            Self::Layers(wanted) => wanted.iter().any(|(group, wanted)| {
                *group == plane.group && wanted.start < layers.end && layers.start < wanted.end
            }),
        }
    }
}

impl Target {
    /// Segment, start and length in bytes of a part of the object.
    fn extent(&self, part: Part) -> (SegmentId, u64, u64) {
        let located = &self.found.located;
        let (start, len) = match part {
            Part::Head => (0, located.record_bytes().min(located.head_bytes as usize)),
            Part::Record => (0, located.record_bytes()),
            Part::Header => (0, located.header_bytes as usize),
            Part::Plane(plane) => {
                let plane = self.header.get().and_then(|header| header.planes.get(plane));
                plane.map_or((0, 0), |plane| (plane.offset as usize, plane.stored_bytes as usize))
            }
        };
        (located.spot.segment, located.spot.offset + start as u64, len as u64)
    }

    /// Bytes of planes that come of a part of the object, at most.
    fn decoded_bytes(&self, part: Part) -> usize {
        let raw_bytes = usize::try_from(self.found.located.raw_bytes).unwrap_or(usize::MAX);
        match part {
            Part::Head => raw_bytes.min(self.head_decoded_bytes()),
            Part::Record => raw_bytes,
            Part::Header => 0,
            Part::Plane(plane) => {
                let plane = self.header.get().and_then(|header| header.planes.get(plane));
                plane.map_or(0, |plane| plane.raw_bytes as usize)
            }
        }
    }

    /// Bytes that the first plane may have to be given along with the start of its record: how many it has is not known before.
    fn head_decoded_bytes(&self) -> usize {
        self.found.located.head_bytes as usize * HEAD_EXPANSION
    }
}
