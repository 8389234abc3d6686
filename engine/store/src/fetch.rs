//! Fetch: planes of many objects, verified, in the order asked for.
//!
//! A fetch plans its reads in the order of delivery, joins neighbours, keeps several in flight and yields each plane
//! as soon as it is verified, on the thread that asks for it. Whole objects take one read each or less, since header
//! and planes are contiguous; a selection of planes, or the order by plane, reads the headers of all objects first.
//!
//! Invariants: a plane is yielded only after it passed `verify.rs`; an object that fails yields one miss and nothing
//! after it; a bad read is repeated once per object; dropping the fetch frees everything, what is in flight as it completes.

mod plan;

use std::collections::VecDeque;
use std::iter::FusedIterator;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use bytes::Bytes;
use esker_prefix::PlaneSpec;

use crate::io::{Completion, Op, Permit};
use crate::record::{Plane, RecordHeader};
use crate::segment::SegmentId;
use crate::shared::{Shared, miss_of};
use crate::{Found, MissKind, verify};
use plan::{Item, Part, Read};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchOrder {
    /// All planes of the first object, then all of the second, and so on.
    ByObject,
    /// The first plane of all objects, then the second of all, and so on: the order of a restore.
    ByPlane,
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
    targets: Vec<Target>,
    planes: PlaneSelection,
    order: FetchOrder,
    deadline: Option<Instant>,
    phase: Phase,
    /// Reads to be submitted.
    planned: VecDeque<Read>,
    /// Reads submitted, in the order of delivery.
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    /// Buffers being taken apart; a repeated read lies above the one that it repeats.
    open: Vec<OpenRead>,
    next_tag: u64,
    reply: Sender<Completion>,
    completions: Receiver<Completion>,
    /// Misses found without a read.
    misses: VecDeque<FetchEvent>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Reading whole records.
    Records,
    /// Reading headers, planes after that.
    Headers,
    Planes,
    Over,
}

/// An object and how far it is.
struct Target {
    found: Found,
    header: Option<RecordHeader>,
    planes_left: Option<usize>,
    retried: bool,
    missed: bool,
}

struct InFlight {
    tag: u64,
    read: Read,
    arrived: Option<OpenRead>,
}

/// A read that arrived, and what is still to be taken from it.
struct OpenRead {
    /// Its bytes, or why there are none.
    bytes: Result<Bytes, MissKind>,
    /// Where they start in the segment.
    start: u64,
    items: VecDeque<Item>,
    _permit: Option<Permit>,
}

impl Fetch {
    pub(crate) fn new(shared: Arc<Shared>, request: FetchRequest) -> Self {
        let FetchRequest { objects, planes, order, deadline } = request;
        let target = |found| Target { found, header: None, planes_left: None, retried: false, missed: false };
        let (reply, completions) = mpsc::channel();
        let whole = planes == PlaneSelection::All && (order == FetchOrder::ByObject || objects.len() < 2);
        let mut fetch = Self {
            shared,
            targets: objects.into_iter().map(target).collect(),
            planes,
            order,
            deadline,
            phase: if whole { Phase::Records } else { Phase::Headers },
            planned: VecDeque::new(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            open: Vec::new(),
            next_tag: 0,
            reply,
            completions,
            misses: VecDeque::new(),
        };
        let part = if whole { Part::Record } else { Part::Header };
        let items = (0..fetch.targets.len()).map(|object| Item { object, part }).collect();
        fetch.plan(items);
        fetch
    }

    /// Bytes being read ahead for this fetch.
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight_bytes
    }

    fn plan(&mut self, items: Vec<Item>) {
        let merge_bytes = self.shared.settings.read_merge_bytes;
        let targets = &self.targets;
        self.planned = plan::join(items, merge_bytes, |item| {
            let (segment, start, len) = targets[item.object].extent(item.part);
            (segment, start..start + len)
        });
    }

    /// Starts as many reads as the budgets allow; at least one if nothing else is going on.
    fn top_up(&mut self) {
        while let Some(read) = self.planned.front() {
            let bytes = read.len_bytes();
            let idle = self.in_flight.is_empty() && self.open.is_empty();
            let fits = self.in_flight_bytes + bytes <= self.shared.settings.fetch_window_bytes;
            let permit = match self.shared.reading.try_acquire(bytes) {
                Some(permit) if fits || idle => permit,
                _ if idle => self.shared.reading.force(bytes),
                _ => return,
            };
            let Some(read) = self.planned.pop_front() else { return };
            self.submit(read, permit);
        }
    }

    fn submit(&mut self, read: Read, permit: Permit) {
        let tag = self.next_tag;
        self.next_tag += 1;
        let mut arrived = None;
        match self.shared.segments.get(read.segment) {
            Some(segment) => {
                let buf = self.shared.pool.take(read.len_bytes());
                let mut op = Op::read(segment.file, read.range.start, buf, tag, &self.reply);
                op.permit = Some(permit);
                self.in_flight_bytes += read.len_bytes();
                self.shared.disk.submit(op);
            }
            None => arrived = Some(read.open(Err(MissKind::Absent), None)),
        }
        self.in_flight.push_back(InFlight { tag, read, arrived });
    }

    /// Waits for the oldest read. `false` if the deadline came first.
    fn await_oldest(&mut self) -> bool {
        while let Some(oldest) = self.in_flight.front() {
            if oldest.arrived.is_some() {
                self.open.extend(self.in_flight.pop_front().and_then(|read| read.arrived));
                return true;
            }
            let completion = match self.deadline {
                None => self.completions.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => {
                    self.completions.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                }
            };
            match completion {
                Ok(completion) => self.arrive(completion),
                Err(_) => return false,
            }
        }
        true
    }

    fn arrive(&mut self, mut completion: Completion) {
        let permit = completion.permit.take();
        let Some(first) = self.in_flight.front() else { return };
        let Ok(position) = usize::try_from(completion.tag.wrapping_sub(first.tag)) else { return };
        let Some(in_flight) = self.in_flight.get_mut(position) else { return };
        self.in_flight_bytes -= in_flight.read.len_bytes();
        let bytes = match completion.full() {
            Ok(Some(buf)) => {
                self.shared.counters.read_bytes.add(buf.len() as u64);
                Ok(buf.into_bytes())
            }
            Ok(None) => Err(MissKind::ReadError),
            Err(error) => Err(miss_of(&error)),
        };
        in_flight.arrived = Some(in_flight.read.open(bytes, permit));
    }

    /// Takes one item from the open read.
    fn take(&mut self, item: Item) -> Option<FetchEvent> {
        if self.targets[item.object].missed {
            return None;
        }
        let outcome = match item.part {
            Part::Record | Part::Header => self.take_header(item).map(|()| None),
            Part::Plane(plane) => self.take_plane(item.object, plane).map(Some),
        };
        outcome.unwrap_or_else(|kind| self.repeat_or_miss(item, kind))
    }

    fn take_header(&mut self, item: Item) -> Result<(), MissKind> {
        let target = &mut self.targets[item.object];
        let Some(open) = self.open.last_mut() else { return Err(MissKind::ReadError) };
        let start = target.found.located.spot.offset;
        let bytes = open.slice(start, target.found.located.header_bytes as usize)?;
        let generation = self.shared.segments.get(target.found.located.spot.segment).map(|open| open.generation);
        let generation = generation.ok_or(MissKind::Absent)?;
        let header = verify::header(&bytes, target.found.id, &target.found.located, generation)?;
        let selected = (0..header.planes.len()).filter(|&plane| self.planes.has(&header.planes[plane]));
        let items: Vec<Item> =
            selected.map(|plane| Item { object: item.object, part: Part::Plane(plane) }).collect();
        target.planes_left = Some(items.len());
        target.header = Some(header);
        if item.part == Part::Record {
            items.into_iter().rev().for_each(|item| open.items.push_front(item));
        }
        Ok(())
    }

    fn take_plane(&mut self, object: usize, index: usize) -> Result<FetchEvent, MissKind> {
        let target = &mut self.targets[object];
        let plane = *target.plane(index).ok_or(MissKind::WrongRecord)?;
        let open = self.open.last().ok_or(MissKind::ReadError)?;
        let start = target.found.located.spot.offset + u64::from(plane.offset);
        let stored = open.slice(start, plane.stored_bytes as usize)?;
        let decoded = if self.shared.settings.skips_verification() {
            match plane.codec {
                crate::record::Codec::Raw => None,
                crate::record::Codec::Zstd | crate::record::Codec::Columns => {
                    Some(verify::decode(&plane, &stored, &self.shared.pool)?)
                }
            }
        } else {
            verify::plane(&plane, &stored, &self.shared.pool)?
        };
        let bytes = decoded.map_or(stored, |buf| buf.into_bytes().slice(..plane.raw_bytes as usize));
        target.planes_left = target.planes_left.map(|left| left - 1);
        if target.planes_left == Some(0) {
            self.shared.counters.fetched.add(1);
        }
        Ok(FetchEvent::Plane { object, plane: index, spec: plane.spec(), bytes })
    }

    /// Reads a bad item again, once per object; gives the object up after that.
    fn repeat_or_miss(&mut self, item: Item, kind: MissKind) -> Option<FetchEvent> {
        let target = &mut self.targets[item.object];
        if !kind.is_damage() || target.retried {
            return Some(self.miss(item.object, kind));
        }
        target.retried = true;
        let (segment, start, len) = target.extent(item.part);
        let range = plan::pages(start..start + len);
        let read = Read { segment, range, items: vec![item] };
        let skip = usize::try_from(read.range.start - target.found.located.spot.offset).unwrap_or(0);
        let bytes = self.shared.read(&target.found.located, skip, read.len_bytes());
        self.open.push(read.open(bytes.map(|buf| buf.into_bytes()), None));
        None
    }

    fn miss(&mut self, object: usize, kind: MissKind) -> FetchEvent {
        let target = &mut self.targets[object];
        target.missed = true;
        self.shared.counters.miss(kind);
        if kind.is_damage() {
            self.shared.quarantine(target.found.id, &target.found.located, kind);
        }
        FetchEvent::Miss { object, kind }
    }

    /// Ends the fetch: what is not complete is a miss.
    fn give_up(&mut self, kind: MissKind) {
        let open: Vec<usize> = (0..self.targets.len())
            .filter(|&object| !self.targets[object].missed && self.targets[object].planes_left != Some(0))
            .collect();
        for object in open {
            let miss = self.miss(object, kind);
            self.misses.push_back(miss);
        }
        self.planned.clear();
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.open.clear();
        self.phase = Phase::Over;
    }

    /// Plans the planes when all headers are there. `false` if there is nothing more.
    fn advance(&mut self) -> bool {
        if self.phase != Phase::Headers {
            self.phase = Phase::Over;
            return false;
        }
        self.phase = Phase::Planes;
        let mut items = Vec::new();
        for (object, target) in self.targets.iter().enumerate() {
            let planes = target.header.iter().flat_map(|header| header.planes.iter().enumerate());
            let planes = planes.filter(|(_, plane)| !target.missed && self.planes.has(plane));
            items.extend(planes.map(|(plane, _)| Item { object, part: Part::Plane(plane) }));
        }
        if self.order == FetchOrder::ByPlane {
            items.sort_by_key(|item| (item.part, item.object));
        }
        self.plan(items);
        true
    }
}

impl Iterator for Fetch {
    type Item = FetchEvent;

    fn next(&mut self) -> Option<FetchEvent> {
        loop {
            if let Some(miss) = self.misses.pop_front() {
                return Some(miss);
            }
            if self.phase == Phase::Over {
                return None;
            }
            self.top_up();
            while let Some(open) = self.open.last_mut() {
                let Some(item) = open.items.pop_front() else {
                    self.open.pop();
                    continue;
                };
                if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    self.give_up(MissKind::Deadline);
                    break;
                }
                if let Some(event) = self.take(item) {
                    return Some(event);
                }
            }
            if self.phase == Phase::Over {
                continue;
            }
            self.top_up();
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
    fn plane(&self, index: usize) -> Option<&Plane> {
        self.header.as_ref()?.planes.get(index)
    }

    /// Segment, start and length in bytes of a part of the object.
    fn extent(&self, part: Part) -> (SegmentId, u64, u64) {
        let located = &self.found.located;
        let (start, len) = match part {
            Part::Record => (0, located.record_bytes()),
            Part::Header => (0, located.header_bytes as usize),
            Part::Plane(plane) => {
                self.plane(plane).map_or((0, 0), |plane| (plane.offset as usize, plane.stored_bytes as usize))
            }
        };
        (located.spot.segment, located.spot.offset + start as u64, len as u64)
    }
}

impl Read {
    fn open(&self, bytes: Result<Bytes, MissKind>, permit: Option<Permit>) -> OpenRead {
        OpenRead {
            bytes,
            start: self.range.start,
            items: self.items.iter().copied().collect(),
            _permit: permit,
        }
    }
}

impl OpenRead {
    /// `len` bytes at `at` of the segment.
    fn slice(&self, at: u64, len: usize) -> Result<Bytes, MissKind> {
        let bytes = self.bytes.as_ref().map_err(|kind| *kind)?;
        let start = usize::try_from(at.wrapping_sub(self.start)).unwrap_or(usize::MAX);
        match start.checked_add(len) {
            Some(end) if end <= bytes.len() => Ok(bytes.slice(start..end)),
            _ => Err(MissKind::Truncated),
        }
    }
}
