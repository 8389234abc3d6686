//! `Fetch`: the planes of a granted prefix, in restore order.
//!
//! Flow is by credit from end to end: HTTP/2 windows of the client, then a short queue of chunks, then the store's own bound on
//! bytes read ahead. A client that stops taking stops the reading, and after a while its stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_prefix::{KvLayout, ObjectKind};
use esker_proto::chunks;
use esker_proto::v1::{self, fetch_reply};
use esker_store::{FetchEvent, FetchOrder, FetchRequest, Found, PlaneSelection};
use tokio::sync::mpsc;
use tonic::Status;

use super::admission::Turn;
use crate::grant::Granted;
use crate::node::Node;
use crate::principal::TenantId;

/// Longest time the store may take for one fetch; a caller's own deadline may be earlier.
const FETCH_DEADLINE: Duration = Duration::from_secs(120);
/// A client that makes a fetch wait for this long lets another have its turn.
const TURN_PATIENCE: Duration = Duration::from_millis(200);
/// A client that takes nothing for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);

/// A checked fetch.
pub(crate) struct Fetching {
    pub(crate) granted: Arc<Granted>,
    pub(crate) request: FetchRequest,
    /// Of each object of the request: kind, tokens as the caller counts them, position among the grant's blocks and states.
    pub(crate) labels: Vec<Label>,
}

/// See [`Fetching`].
#[derive(Clone, Copy)]
pub(crate) struct Label {
    pub(crate) kind: ObjectKind,
    pub(crate) tokens: u64,
    position: usize,
}

impl Fetching {
    /// What a request means under its grant.
    pub(crate) fn plan(
        node: &Node,
        tenant: &TenantId,
        request: &v1::FetchRequest,
        deadline: Option<Instant>,
    ) -> Result<Self, Status> {
        let granted = granted(node, tenant, &request.grant)?;
        let answer = &granted.answer;
        let tokens = if request.tokens == 0 { answer.best() } else { request.tokens };
        let block_tokens = u64::from(answer.layout.block_tokens());
        // Blocks that stand for themselves need no run before them.
        let run = answer.chained.then_some(tokens);
        if answer.chained && request.blocks.is_empty() && !answer.is_resumable(tokens) {
            return Err(Status::invalid_argument(format!(
                "{tokens} tokens is not a resume point of this grant; it lists {:?}",
                answer.resume_points()
            )));
        }
        let wanted = |position: usize| {
            let listed = request.blocks.is_empty()
                || u32::try_from(position).is_ok_and(|position| request.blocks.contains(&position));
            listed
                && run.is_none_or(|tokens| {
                    !request.blocks.is_empty() || (position as u64 + 1) * block_tokens <= tokens
                })
        };
        let mut objects: Vec<Found> = Vec::new();
        let mut labels = Vec::new();
        if request.blocks.is_empty() {
            let states = (answer.blocks.len()..).zip(&answer.states);
            for (position, state) in states.filter(|(_, state)| state.tokens == tokens) {
                labels.push(Label { kind: ObjectKind::State, tokens, position });
                objects.push(state.clone());
            }
        }
        for (index, (position, block)) in answer.blocks.iter().enumerate().filter(|(_, (at, _))| wanted(*at))
        {
            let tokens = (*position as u64 + 1) * block_tokens;
            labels.push(Label { kind: ObjectKind::Block, tokens, position: index });
            objects.push(block.clone());
        }
        let planes = plane_selection(&answer.layout, request)?;
        let order = match request.order() {
            v1::Order::ByPlane => FetchOrder::ByPlane,
            v1::Order::ByObject | v1::Order::Unspecified => FetchOrder::ByObject,
        };
        let latest = Instant::now() + FETCH_DEADLINE;
        let deadline = Some(deadline.map_or(latest, |deadline| deadline.min(latest)));
        Ok(Self { request: FetchRequest { objects, planes, order, deadline }, labels, granted })
    }

    /// Raw bytes of the objects.
    pub(crate) fn bytes(&self) -> u64 {
        self.request.objects.iter().map(|found| found.raw_bytes).sum()
    }

    /// Delivers on a blocking thread; ends when the caller has everything, leaves, or stops taking.
    pub(crate) fn run(self, node: &Node, delivery: &mut impl Delivery) {
        let Self { granted, request, labels } = self;
        let block_tokens = u64::from(granted.answer.layout.block_tokens());
        let needs_state = granted.answer.layout.has_states();
        let mut usable_tokens = labels.iter().map(|label| label.tokens).max().unwrap_or(0);
        let mut done = v1::FetchDone::default();
        let mut ticks = granted.ticks();
        for event in node.store.fetch(request) {
            let taken = match event {
                FetchEvent::Plane { object, plane, bytes, .. } => {
                    let Label { kind, tokens, position } = labels[object];
                    let len = bytes.len() as u64;
                    let taken = delivery.plane(kind, tokens, u32::try_from(plane).unwrap_or(u32::MAX), bytes);
                    if taken {
                        done.planes += 1;
                        done.bytes += len;
                        ticks.tick(position, plane);
                    }
                    taken
                }
                FetchEvent::Miss { object, kind: reason } => {
                    granted.miss(reason);
                    let Label { kind, tokens, .. } = labels[object];
                    let ends = match kind {
                        ObjectKind::State if needs_state => 0,
                        ObjectKind::State => tokens - tokens % block_tokens,
                        _ => tokens - block_tokens,
                    };
                    usable_tokens = usable_tokens.min(ends);
                    let kind = v1::ObjectKind::from(kind).into();
                    delivery.missing(v1::Missing { kind, tokens, reason: reason.to_string() })
                }
            };
            if !taken {
                break;
            }
        }
        granted.deliver(done.bytes, &ticks);
        done.usable_tokens = usable_tokens;
        delivery.done(done);
    }
}

/// How planes reach the caller.
pub(crate) trait Delivery {
    /// A proven plane; those of a fetch come in restore order. `false`: nobody takes any more.
    fn plane(&mut self, kind: ObjectKind, tokens: u64, plane: u32, bytes: Bytes) -> bool;
    /// An object that cannot be had. `false` as above.
    fn missing(&mut self, missing: v1::Missing) -> bool;
    /// The closing account.
    fn done(&mut self, done: v1::FetchDone);
}

/// Planes as chunks in a gRPC stream.
pub(super) struct Chunks(pub(super) Replies<v1::FetchReply>);

impl Chunks {
    fn send(&mut self, event: fetch_reply::Event) -> bool {
        self.0.send(Ok(v1::FetchReply { event: Some(event) }))
    }
}

impl Delivery for Chunks {
    fn plane(&mut self, kind: ObjectKind, tokens: u64, plane: u32, bytes: Bytes) -> bool {
        chunks(kind, tokens, plane, bytes).all(|chunk| self.send(fetch_reply::Event::Chunk(chunk)))
    }

    fn missing(&mut self, missing: v1::Missing) -> bool {
        self.send(fetch_reply::Event::Missing(missing))
    }

    fn done(&mut self, done: v1::FetchDone) {
        self.send(fetch_reply::Event::Done(done));
    }
}

/// The bounded queue between a blocking thread and a stream of replies.
pub(super) struct Replies<T> {
    queue: mpsc::Sender<Result<T, Status>>,
    runtime: tokio::runtime::Handle,
    turn: Option<Turn>,
}

impl<T> Replies<T> {
    /// From within the runtime.
    pub(super) fn new(queue: mpsc::Sender<Result<T, Status>>, turn: Turn) -> Self {
        Self { queue, runtime: tokio::runtime::Handle::current(), turn: Some(turn) }
    }

    /// Everything was read: what is left is the client's time.
    pub(super) fn end_turn(&mut self) {
        self.turn = None;
    }

    /// Waits for room on this thread. `false`: the client has left, or takes nothing for too long.
    pub(super) fn send(&mut self, reply: Result<T, Status>) -> bool {
        use mpsc::error::{SendTimeoutError, TrySendError};
        let reply = match self.queue.try_send(reply) {
            Ok(()) => return true,
            Err(TrySendError::Full(reply)) => reply,
            Err(TrySendError::Closed(_)) => return false,
        };
        match self.runtime.block_on(self.queue.send_timeout(reply, TURN_PATIENCE)) {
            Ok(()) => true,
            Err(SendTimeoutError::Timeout(reply)) => {
                self.turn.iter_mut().for_each(Turn::yield_now);
                self.runtime.block_on(self.queue.send_timeout(reply, IDLE_PROGRESS)).is_ok()
            }
            Err(SendTimeoutError::Closed(_)) => false,
        }
    }
}

/// The live grant of this tenant that a request names.
pub(crate) fn granted(node: &Node, tenant: &TenantId, id: &[u8]) -> Result<Arc<Granted>, Status> {
    let id = id.try_into().ok();
    id.and_then(|id| node.grants.get(&id, tenant, Instant::now())).ok_or_else(unknown_grant)
}

/// Not another tenant's, not expired and not invented are told apart.
pub(crate) fn unknown_grant() -> Status {
    Status::not_found("this grant is not known or has expired: look the prefix up again")
}

fn plane_selection(layout: &KvLayout, request: &v1::FetchRequest) -> Result<PlaneSelection, Status> {
    let mut groups = Vec::new();
    for name in &request.groups {
        let index = layout.groups().iter().position(|group| group.name == *name).ok_or_else(|| {
            let names: Vec<_> = layout.groups().iter().map(|group| group.name.as_str()).collect();
            Status::invalid_argument(format!(
                "layout {} has no group {name:?}; it has {names:?}",
                layout.id()
            ))
        })?;
        groups.push(index);
    }
    let end_layer = if request.end_layer == 0 { u32::MAX } else { request.end_layer };
    if request.first_layer >= end_layer {
        return Err(Status::invalid_argument("first_layer must be below end_layer"));
    }
    if groups.is_empty() && request.first_layer == 0 && end_layer == u32::MAX {
        return Ok(PlaneSelection::All);
    }
    let wanted =
        layout.groups().iter().enumerate().filter(|(index, _)| groups.is_empty() || groups.contains(index));
    let layers = wanted.filter_map(|(index, group)| {
        // A run of the group's own layer list, which ascends.
        let first = group.layers.partition_point(|&layer| u32::from(layer) < request.first_layer);
        let end = group.layers.partition_point(|&layer| u32::from(layer) < end_layer);
        let narrow = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        (first < end).then(|| (narrow(index), narrow(first)..narrow(end)))
    });
    Ok(PlaneSelection::Layers(layers.collect()))
}

/// For fuzzing: a request to fetch. Whether it selects something of the layout; then only what is in it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(layout: &KvLayout, bytes: &[u8]) -> bool {
    use prost::Message;
    let Ok(request) = v1::FetchRequest::decode(bytes) else { return false };
    let _ = request.order();
    match plane_selection(layout, &request) {
        Ok(PlaneSelection::All) => true,
        Ok(PlaneSelection::Layers(layers)) => {
            for (group, layers) in &layers {
                let group = &layout.groups()[usize::from(*group)];
                assert!(!layers.is_empty() && usize::from(layers.end) <= group.layers.len());
            }
            !layers.is_empty()
        }
        Err(_) => false,
    }
}
