//! `Local`: fetches and puts whose bytes pass through the caller's arena. See `local.rs` for the arena, `local.proto` for the rules.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use esker_prefix::{KvLayout, ObjectKind};
use esker_proto::v1::{self, fetch_local_reply, fetch_local_request, put_local_reply, put_local_request};
use esker_proto::{Assembled, object_kind};
use esker_store::Store;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::admission::Admission;
use super::cache::{FETCH_HOLDS_BYTES, PUT_REPLIES, blocking};
use super::deadline::deadline_of;
use super::fetch::{Delivery, Fetching, Replies};
use super::put::{Answers, Next, Put, Source, next_message};
use super::status::{from_ledger, from_wire};
use crate::budget::Use;
use crate::local::{Arena, Call, FetchSlot, SlotError, TakeError};
use crate::node::Node;
use crate::principal::principal_of;
use crate::tenants::exhausted;

/// Replies buffered for a client: as many as it can hold slots, and a few that name none.
const FETCH_REPLIES: usize = 32;
/// Slots that go out in one message at most: a quarter of an arena's.
const SLOTS_TOGETHER: usize = 4;
/// Objects that one message of a put names.
const MAX_ANNOUNCED: usize = 1024;

/// The service.
pub(crate) struct LocalService {
    node: Arc<Node>,
    admission: Admission,
}

impl LocalService {
    pub(crate) fn new(node: Arc<Node>, admission: Admission) -> Self {
        Self { node, admission }
    }
}

#[tonic::async_trait]
impl v1::local_server::Local for LocalService {
    type FetchLocalStream = ReceiverStream<Result<v1::FetchLocalReply, Status>>;

    async fn fetch_local(
        &self,
        request: Request<Streaming<v1::FetchLocalRequest>>,
    ) -> Result<Response<Self::FetchLocalStream>, Status> {
        let principal = principal_of(&request)?;
        let deadline = deadline_of(&request);
        let mut steps = request.into_inner();
        let first = next_message(&mut steps, "fetch").await?.and_then(|message| message.step);
        let Some(fetch_local_request::Step::Start(v1::FetchLocalStart {
            arena,
            fetch: Some(fetch),
            together,
        })) = first
        else {
            return Err(Status::invalid_argument(
                "the first message of a fetch must be `start`, with `fetch`",
            ));
        };
        let arena = self.node.arenas.get(&arena, &principal.tenant)?;
        self.node.ledger.admit().map_err(|error| from_ledger(&error))?;
        let turn = self.admission.fetch(deadline).await?;
        let fetching = Fetching::plan(&self.node, &principal.tenant, &fetch, deadline)?;
        let tenant = self.node.tenants.of(&principal);
        let in_flight =
            self.node.tenants.fly(&tenant, Use::Fetch, fetching.bytes().min(FETCH_HOLDS_BYTES))?;
        let node = self.node.clone();
        let (sender, receiver) = mpsc::channel(FETCH_REPLIES);
        let caller =
            Arc::new(Caller { call: arena.call(), over: AtomicBool::new(false), broke: OnceLock::new() });
        let listening = tokio::spawn(take_releases(steps, Arc::clone(&caller)));
        let mut slots = Slots {
            replies: Replies::new(sender, turn),
            caller,
            deadline,
            slot: None,
            parts: Vec::new(),
            filled: Vec::new(),
            worth: 1,
            together,
            first: true,
            failed: false,
        };
        let busy = node.live.enter();
        tokio::task::spawn_blocking(move || {
            fetching.run(&node, &mut slots);
            drop((in_flight, busy));
            slots.end();
            listening.abort();
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type PutLocalStream = ReceiverStream<Result<v1::PutLocalReply, Status>>;

    async fn put_local(
        &self,
        request: Request<Streaming<v1::PutLocalRequest>>,
    ) -> Result<Response<Self::PutLocalStream>, Status> {
        let principal = principal_of(&request)?;
        let mut steps = request.into_inner();
        let first = next_message(&mut steps, "put").await?.and_then(|message| message.step);
        let Some(put_local_request::Step::Start(v1::PutLocalStart { arena, prefix: Some(prefix), together })) =
            first
        else {
            return Err(Status::invalid_argument(
                "the first message of a put must be `start`, with `prefix`",
            ));
        };
        let arena = self.node.arenas.get(&arena, &principal.tenant)?;
        let node = self.node.clone();
        let put = blocking(move || Put::open(&node, &principal, prefix)).await?;
        let (sender, receiver) = mpsc::channel(PUT_REPLIES);
        let replies = sender.downgrade();
        let objects = Objects {
            steps,
            store: Arc::clone(&self.node.store),
            arena,
            layout: put.layout().clone(),
            announced: VecDeque::new(),
            taken: 0,
            replies,
        };
        let busy = self.node.live.enter();
        tokio::spawn(async move {
            let _busy = busy;
            let wrap = if together { in_one } else { one_by_one };
            if let Err(status) = put.run(objects, &Answers { replies: &sender, wrap }).await {
                // Nobody listens any more if this fails; whole objects were stored or refused all the same.
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// What the two halves of a fetch have in common.
struct Caller {
    call: Call,
    /// It has closed its side, or is gone.
    over: AtomicBool,
    /// It broke a rule.
    broke: OnceLock<Status>,
}

impl Caller {
    fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.call.wake();
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// Listens to what a client releases. Silence is no fault here: leases end by themselves.
async fn take_releases(mut steps: Streaming<v1::FetchLocalRequest>, caller: Arc<Caller>) {
    while let Ok(Some(message)) = steps.message().await {
        let broke = match message.step {
            Some(fetch_local_request::Step::Release(v1::ReleaseSlots { slots })) => slots
                .into_iter()
                .find(|&slot| !caller.call.release(slot))
                .map(|slot| format!("slot {slot} is not one that this fetch holds: its lease may be over")),
            _ => Some("a fetch has one `start`; what follows is `release`".to_owned()),
        };
        if let Some(broke) = broke {
            let _ = caller.broke.set(Status::invalid_argument(broke));
            break;
        }
    }
    caller.end();
}

/// Planes in slots of the caller's arena. A slot is over when the next plane does not fit any more; it goes out then, or with some
/// others where the caller takes them together. The first one goes out with the first plane, so that the caller can begin.
struct Slots {
    replies: Replies<v1::FetchLocalReply>,
    caller: Arc<Caller>,
    deadline: Option<Instant>,
    slot: Option<FetchSlot>,
    parts: Vec<v1::LocalPart>,
    /// Slots that are over and did not go out yet.
    filled: Vec<v1::FilledSlot>,
    /// How many of them are worth a message: more and more, up to [`SLOTS_TOGETHER`].
    worth: usize,
    together: bool,
    first: bool,
    failed: bool,
}

impl Slots {
    fn send(&mut self, event: fetch_local_reply::Event) -> bool {
        self.replies.send(Ok(v1::FetchLocalReply { event: Some(event) }))
    }

    /// Sends out what was filled.
    fn flush(&mut self) -> bool {
        self.end_slot();
        self.send_filled()
    }

    fn end_slot(&mut self) {
        if let Some(FetchSlot { slot, stamp, .. }) = self.slot.take() {
            let parts = std::mem::take(&mut self.parts);
            self.filled.push(v1::FilledSlot { slot, stamp, parts });
        }
    }

    fn send_filled(&mut self) -> bool {
        let mut slots = std::mem::take(&mut self.filled);
        if self.together && slots.len() > 1 {
            return self.send(fetch_local_reply::Event::Several(v1::FilledSlots { slots }));
        }
        slots.drain(..).all(|slot| self.send(fetch_local_reply::Event::Filled(slot)))
    }

    /// Ends a slot that is full.
    fn turn_over(&mut self) -> bool {
        self.end_slot();
        if self.together && self.filled.len() < self.worth {
            return true;
        }
        self.worth = (2 * self.worth).min(SLOTS_TOGETHER);
        self.send_filled()
    }

    /// A slot to write into, `None` if nobody takes those that are filled.
    fn open_slot(&mut self) -> Result<Option<FetchSlot>, Status> {
        if let Some(slot) = self.slot {
            return Ok(Some(slot));
        }
        // Whoever waits for a slot must not keep some back.
        if !self.caller.call.has_free_slot() && !self.send_filled() {
            return Ok(None);
        }
        self.caller.call.slot(self.deadline, || self.caller.is_over()).map(Some).map_err(refused)
    }

    fn write(&mut self, kind: ObjectKind, tokens: u64, plane: u32, bytes: &[u8]) -> Result<bool, Status> {
        let mut offset = 0;
        loop {
            let rest = &bytes[offset..];
            // A plane that fits a slot is not cut.
            let room = self.slot.as_ref().map_or(0, FetchSlot::room);
            let crowded = room == 0 || rest.len() > room && rest.len() <= FetchSlot::capacity();
            if self.slot.is_some() && crowded && !self.turn_over() {
                return Ok(false);
            }
            let Some(mut slot) = self.open_slot()? else { return Ok(false) };
            let part = &rest[..rest.len().min(slot.room())];
            let at = slot.write(&self.caller.call, part).map_err(|error| {
                tracing::error!(%error, "an arena cannot be written");
                exhausted(format!("the arena cannot be written: {error}"), 1000)
            })?;
            self.slot = Some(slot);
            self.parts.push(v1::LocalPart {
                kind: v1::ObjectKind::from(kind).into(),
                tokens,
                plane,
                plane_bytes: bytes.len() as u64,
                offset: offset as u64,
                at,
                bytes: u32::try_from(part.len()).unwrap_or(u32::MAX),
            });
            offset += part.len();
            if offset == bytes.len() {
                break;
            }
        }
        if std::mem::take(&mut self.first) { Ok(self.flush()) } else { Ok(true) }
    }

    /// The caller keeps its last slots until it releases them, closes its side, or their lease is over.
    fn end(mut self) {
        self.replies.end_turn();
        if !self.failed
            && let Err(error) = self.caller.call.settled(None, || self.caller.is_over())
        {
            self.replies.send(Err(refused(error)));
        }
        if let Some(status) = self.caller.broke.get() {
            self.replies.send(Err(status.clone()));
        }
    }
}

impl Delivery for Slots {
    fn plane(&mut self, kind: ObjectKind, tokens: u64, plane: u32, bytes: Bytes) -> bool {
        match self.write(kind, tokens, plane, &bytes) {
            Ok(taken) => taken,
            Err(status) => {
                self.failed = true;
                // The client's own fault is told by `end`.
                if self.caller.broke.get().is_none() {
                    self.replies.send(Err(status));
                }
                false
            }
        }
    }

    fn missing(&mut self, missing: v1::Missing) -> bool {
        self.flush() && self.send(fetch_local_reply::Event::Missing(missing))
    }

    fn done(&mut self, done: v1::FetchDone) {
        if !self.failed && self.flush() {
            self.send(fetch_local_reply::Event::Done(done));
        }
    }
}

fn refused(error: SlotError) -> Status {
    match error {
        SlotError::Closed => Status::aborted("the arena's connection has ended"),
        SlotError::LeaseOver => Status::deadline_exceeded(
            "a slot was not released before its lease was over: the fetch is closed",
        ),
        SlotError::Deadline => Status::deadline_exceeded("the deadline came before a slot was free"),
        SlotError::CallOver => Status::cancelled("the caller has closed its side"),
    }
}

fn in_one(results: Vec<v1::PutReply>) -> Vec<v1::PutLocalReply> {
    let results = v1::PutReplies { results };
    vec![v1::PutLocalReply { event: Some(put_local_reply::Event::Results(results)) }]
}

fn one_by_one(results: Vec<v1::PutReply>) -> Vec<v1::PutLocalReply> {
    let wrap = |result| v1::PutLocalReply { event: Some(put_local_reply::Event::Result(result)) };
    results.into_iter().map(wrap).collect()
}

/// Objects that lie in the caller's arena.
struct Objects {
    steps: Streaming<v1::PutLocalRequest>,
    store: Arc<Store>,
    arena: Arc<Arena>,
    layout: Arc<KvLayout>,
    /// Those of the last message that were not looked at yet.
    announced: VecDeque<v1::LocalObject>,
    taken: u64,
    /// Weak, so that the stream of replies ends with the put.
    replies: mpsc::WeakSender<Result<v1::PutLocalReply, Status>>,
}

impl Objects {
    /// Copies an object out, and only then looks at it.
    fn take(&self, object: &v1::LocalObject) -> Result<Assembled, Status> {
        let kind = object_kind(object.kind()).map_err(from_wire)?;
        let specs = self.layout.planes_at(kind, object.tokens);
        let layout_bytes = self.layout.object_bytes_at(kind, object.tokens);
        if specs.is_empty() || object.bytes != layout_bytes {
            return Err(Status::invalid_argument(format!(
                "{kind:?} objects of layout {} have {layout_bytes} bytes at {} tokens, got {}",
                self.layout.id(),
                object.tokens,
                object.bytes
            )));
        }
        let into = |bytes| self.store.buffer(bytes);
        let mut rest = self.arena.take(object.at, object.bytes, into).map_err(|error| match error {
            TakeError::Outside => Status::invalid_argument(format!(
                "{} bytes at {} are not in the put area of the arena",
                object.bytes, object.at
            )),
            TakeError::Closed => refused(SlotError::Closed),
            TakeError::Unread(error) => {
                tracing::error!(%error, "an arena cannot be read");
                Status::internal("the arena cannot be read; the node's log says why")
            }
        })?;
        let len = |len_bytes: u64| usize::try_from(len_bytes).unwrap_or(usize::MAX);
        let planes = specs.iter().map(|spec| rest.split_to(len(spec.len_bytes))).collect();
        Ok(Assembled { kind, tokens: object.tokens, planes })
    }
}

impl Source for Objects {
    async fn next(&mut self) -> Result<Option<Next>, Status> {
        while self.announced.is_empty() {
            let Some(message) = next_message(&mut self.steps, "put").await? else { return Ok(None) };
            match message.step {
                Some(put_local_request::Step::Object(object)) => self.announced.push_back(object),
                Some(put_local_request::Step::Objects(v1::LocalObjects { objects }))
                    if objects.len() <= MAX_ANNOUNCED =>
                {
                    self.announced = objects.into();
                }
                _ => {
                    return Err(Status::invalid_argument(format!(
                        "a put has one `start`; what follows is `object`, or `objects` with at most {MAX_ANNOUNCED}"
                    )));
                }
            }
        }
        let Some(object) = self.announced.pop_front() else { return Ok(None) };
        // No await from here on: what was taken cannot be lost.
        let whole = tokio::task::block_in_place(|| self.take(&object))?;
        self.taken += 1;
        // Once for each message: more would tell the caller no sooner that it may go on.
        if self.announced.is_empty()
            && let Some(replies) = self.replies.upgrade()
        {
            let taken = v1::PutLocalReply { event: Some(put_local_reply::Event::Taken(self.taken)) };
            // Where there is no room, results are on their way that say the same.
            let _ = replies.try_send(Ok(taken));
        }
        Ok(Some(Next::Object(whole)))
    }
}
