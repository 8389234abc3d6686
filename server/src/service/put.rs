//! `Put`: objects of one prefix, stored in batches.

mod names;

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use esker_prefix::{BlockObject, KvLayout, NamespaceId, ObjectId, ObjectKind, StateObject};
use esker_proto::v1::{self, put_request};
use esker_proto::{Assembled, PlaneAssembler, PlaneReader, WholePlane, check_namespace_id, check_prefix};
use esker_store::{PutObject, PutOutcome, StoreError, TtlClass};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};
use tonic::{Status, Streaming};

use super::cache::layout;
use super::status::{from_gate, from_join, from_store, from_wire};
use crate::audit::Event;
use crate::author::Author;
use crate::budget::Use;
use crate::gate::Refused;
use crate::namespaces::MAX_OBJECT_BYTES;
use crate::node::Node;
use crate::principal::Principal;
use crate::staging::{Bound, Full, WAIT};
use crate::tenants::{InFlight, Tenant, full};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use names::hear;
use names::{Name, Prefix};

/// A client that sends nothing, or takes no results, for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);
/// Raw bytes gathered before a commit, and the longest a whole object waits for company.
const PUT_BATCH_BYTES: usize = 2 << 20;
const PUT_LINGER: Duration = Duration::from_millis(2);
/// Raw bytes of one put that are on their way to the drive while the next are gathered: at least, and where the node has memory
/// left for more puts than there are.
const PUT_AHEAD_BYTES: u64 = 3 * PUT_BATCH_BYTES as u64;
const PUT_AMPLE_BYTES: u64 = 8 * PUT_BATCH_BYTES as u64;

/// An object, and its tokens as the caller counts them.
struct Numbered {
    tokens: u64,
    object: PutObject,
}

impl Numbered {
    /// Raw bytes of its planes.
    fn bytes(&self) -> usize {
        self.object.planes.iter().map(|plane| plane.bytes.len()).sum()
    }
}

/// What became of a batch: `None` for an object that waits in its turn.
type Stored = Result<Vec<Result<Option<PutOutcome>, StoreError>>, Refused>;

/// One put stream.
pub(super) struct Put {
    node: Arc<Node>,
    namespace: NamespaceId,
    author: Arc<Author>,
    layout: Arc<KvLayout>,
    prefix: Prefix,
    class: TtlClass,
    /// Answer as soon as an object is handed over.
    buffered: bool,
    /// Planes come in any order, and not all of them in this put.
    in_parts: bool,
    tenant: Arc<Tenant>,
    /// Raw bytes that may be on their way to the drive at a time; beside them the next batch is gathered.
    committing_bytes: usize,
    /// Raw bytes of the longest object on the block grid: what the put began with has room for such.
    object_bytes: u64,
    held: Arc<Held>,
    /// Of the object that was named last.
    last_name: Mutex<Option<(ObjectKind, u64, Name)>>,
}

/// What a put may use, until its last batch is stored: also if the client has left by then.
struct Held {
    _in_flight: InFlight,
    /// For states off the block grid, once one has come.
    more: OnceLock<InFlight>,
}

impl Put {
    /// Checks the first message and takes what the put may use: all that it can come to need, so that none waits for another
    /// half-way.
    pub(super) fn open(
        node: &Arc<Node>,
        principal: &Principal,
        prefix: v1::PutPrefix,
    ) -> Result<Self, Status> {
        let namespace = check_namespace_id(&prefix.namespace).map_err(from_wire)?;
        let (scope, ttl, durability) = (prefix.scope(), prefix.ttl(), prefix.durability());
        let names = check_prefix(prefix.tokens, &[], Vec::new(), prefix.engine_hashes, prefix.unchained)
            .map_err(from_wire)?;
        let layout = layout(node, namespace)?;
        let tenant = node.tenants.of(principal);
        node.tenants.admit_stored(&node.store, &tenant)?;
        let state = layout.object_bytes_at(ObjectKind::State, u64::from(layout.block_tokens()));
        let object = layout.object_bytes(ObjectKind::Block).max(state);
        let gathered = object.max(PUT_BATCH_BYTES as u64);
        let held = |ahead: u64| (gathered + ahead).max(2 * object);
        let (free, all) = node.budget.put_bytes();
        let ample = Some(held(PUT_AMPLE_BYTES)).filter(|held| free.saturating_sub(*held) >= all / 2);
        let ample = ample.and_then(|held| Some((held, node.tenants.try_fly(&tenant, Use::Put, held)?)));
        let fly = |held| node.tenants.fly(&tenant, Use::Put, held);
        let (held, in_flight) = match ample {
            Some(ample) => ample,
            None => (held(PUT_AHEAD_BYTES), fly(held(PUT_AHEAD_BYTES))?),
        };
        let committing_bytes = usize::try_from(held - gathered).unwrap_or(usize::MAX);
        let place = node.tenants.writable(principal, &prefix.user, scope)?;
        if scope != v1::Scope::Private && scope != v1::Scope::Unspecified {
            let what = format!("{scope:?} {namespace}");
            node.audit.record(&Event::new(principal, "publish", what, "ok"));
        }
        let named = Prefix::new(&place.key, namespace, Arc::clone(&layout), names)?;
        Ok(Self {
            node: node.clone(),
            namespace,
            author: Arc::new(Author::new(principal.clone(), place)),
            layout,
            prefix: named,
            class: ttl_class(ttl),
            buffered: durability == v1::Durability::Buffered,
            in_parts: prefix.in_parts,
            tenant,
            committing_bytes,
            object_bytes: object,
            held: Arc::new(Held { _in_flight: in_flight, more: OnceLock::new() }),
            last_name: Mutex::default(),
        })
    }

    pub(super) fn layout(&self) -> &Arc<KvLayout> {
        &self.layout
    }

    /// Gathers whole objects and commits them in batches: when enough has come, or when nothing more comes. While batches are
    /// on their way to the drive the next is gathered.
    pub(super) async fn run<R>(self, source: impl Source, answers: &Answers<'_, R>) -> Result<(), Status> {
        let mut commits = Commits::default();
        let gathered = self.take(source, &mut commits, answers).await;
        // What was handed over is answered, whatever became of the stream; unless that is what failed.
        if !commits.failed {
            self.answer_all(&mut commits, answers).await?;
        }
        gathered
    }

    async fn take<R>(
        &self,
        mut source: impl Source,
        commits: &mut Commits,
        answers: &Answers<'_, R>,
    ) -> Result<(), Status> {
        let layout = self.layout.clone();
        let mut gathering = match self.in_parts {
            true => Gathering::Parts(PlaneReader::new(&layout), BTreeSet::new()),
            false => Gathering::Whole(PlaneAssembler::new(&layout)),
        };
        let mut waiting: Vec<Numbered> = Vec::new();
        let mut waiting_bytes = 0;
        // A batch that is more than the tenant may put in a second could never be stored.
        let most = self.node.tenants.puts_at_once(&self.tenant);
        loop {
            let next = tokio::select! {
                biased;
                () = commits.front_is_over() => {
                    self.answer_next(commits, answers).await?;
                    continue;
                }
                next = source.next() => next?,
                () = tokio::time::sleep(PUT_LINGER), if !waiting.is_empty() => {
                    self.commit(std::mem::take(&mut waiting), commits, answers).await?;
                    waiting_bytes = 0;
                    continue;
                }
            };
            let object = match next {
                Some(Next::Chunk(chunk)) => {
                    self.make_room(chunk.kind(), chunk.tokens)?;
                    self.gather(&mut gathering, chunk)?
                }
                Some(Next::Object(whole)) => {
                    self.make_room(whole.kind.into(), whole.tokens)?;
                    Some(self.object(whole)?)
                }
                None => break,
            };
            if let Some(object) = object {
                waiting_bytes += object.bytes();
                waiting.push(object);
            }
            if waiting_bytes >= PUT_BATCH_BYTES || waiting.len() >= most {
                self.commit(std::mem::take(&mut waiting), commits, answers).await?;
                waiting_bytes = 0;
            }
        }
        // What is whole is kept even when the stream ends inside the next object.
        self.commit(waiting, commits, answers).await?;
        self.answer_all(commits, answers).await?;
        match gathering {
            Gathering::Whole(assembler) => assembler.finish().map_err(from_wire),
            Gathering::Parts(reader, open) => {
                let reason = format!("it lacks planes, for which it waits {} s", WAIT.as_secs());
                let waiting =
                    open.into_iter().map(|(kind, tokens)| waiting_reply(kind, tokens, reason.clone()));
                answers.send(waiting.collect()).await?;
                reader.finish().map_err(from_wire)
            }
        }
    }

    /// Takes more memory before the first object that is longer than those on the block grid: few puts have one.
    fn make_room(&self, kind: v1::ObjectKind, tokens: u64) -> Result<(), Status> {
        if kind != v1::ObjectKind::State {
            return Ok(());
        }
        let got = self.layout.object_bytes_at(ObjectKind::State, tokens);
        if got > MAX_OBJECT_BYTES {
            return Err(Status::invalid_argument(format!(
                "the state at {tokens} tokens has {got} bytes, the limit is {MAX_OBJECT_BYTES}: keep it at a multiple of \
                 {} tokens",
                self.layout.block_tokens()
            )));
        }
        if got > self.object_bytes && self.held.more.get().is_none() {
            // One that is gathered, and one on its way to the drive.
            let most = self.layout.max_object_bytes().min(MAX_OBJECT_BYTES);
            let bytes = 2 * (most - self.object_bytes);
            let _ = self.held.more.set(self.node.tenants.fly(&self.tenant, Use::Put, bytes)?);
        }
        Ok(())
    }

    /// Takes a chunk; the object that it completes, if it does.
    fn gather(
        &self,
        gathering: &mut Gathering<'_>,
        chunk: v1::PlaneChunk,
    ) -> Result<Option<Numbered>, Status> {
        let (reader, open) = match gathering {
            Gathering::Whole(assembler) => {
                return assembler.push(chunk).map_err(from_wire)?.map(|whole| self.object(whole)).transpose();
            }
            Gathering::Parts(reader, open) => (reader, open),
        };
        let Some(WholePlane { kind, tokens, plane, bytes }) = reader.push(chunk).map_err(from_wire)? else {
            return Ok(None);
        };
        let id = ObjectId { kind, hash: self.name(kind, tokens)?.hash };
        let planes = self.layout.planes_count(kind, tokens);
        let tenant = self.tenant.id();
        let _inside = self.author.place.pass.enter().map_err(from_gate)?;
        let added = self.node.staging.add(tenant, id, planes, (plane, bytes), Instant::now());
        let added = added.map_err(|Full { bound, limit_bytes, used_bytes }| match bound {
            Bound::Tenant => self.node.tenants.over(tenant, "staged_bytes", limit_bytes, used_bytes, 1_000),
            Bound::Staged => full("staged bytes", limit_bytes, 1_000),
            Bound::InFlight => full("memory in flight", limit_bytes, 1_000),
        })?;
        match added {
            Some(planes) => {
                open.remove(&(kind, tokens));
                self.object(Assembled { kind, tokens, planes }).map(Some)
            }
            None => {
                open.insert((kind, tokens));
                Ok(None)
            }
        }
    }

    /// What the object of this kind that completes a prefix of so many tokens is called.
    fn name(&self, kind: ObjectKind, tokens: u64) -> Result<Name, Status> {
        let mut last = self.last_name.lock().unwrap_or_else(PoisonError::into_inner);
        match *last {
            // Of an object that comes in parts it is asked for each of them.
            Some((of, at, name)) if (of, at) == (kind, tokens) => Ok(name),
            _ => {
                let name = self.prefix.name(&self.author.place.key, kind, tokens)?;
                *last = Some((kind, tokens, name));
                Ok(name)
            }
        }
    }

    fn object(&self, whole: Assembled) -> Result<Numbered, Status> {
        let Assembled { kind, tokens, planes } = whole;
        let Name { parent, hash, tokens: stored_tokens } = self.name(kind, tokens)?;
        let place = &self.author.place;
        let (layout, namespace, scope) = (&*self.layout, self.namespace, place.key.tag());
        let object = match kind {
            ObjectKind::State => {
                StateObject::new(layout, namespace, scope, parent, hash, stored_tokens, planes)
                    .map(|object| PutObject::state(layout, object))
            }
            _ => {
                // What has a name ends a whole block.
                self.note(usize::try_from(tokens / u64::from(layout.block_tokens())).unwrap_or(1) - 1);
                BlockObject::new(layout, namespace, scope, parent, hash, stored_tokens, planes)
                    .map(|object| PutObject::block(layout, object))
            }
        };
        let object =
            object.map(|object| Numbered { tokens, object: object.with_class(self.class).by(place.writer) });
        object.map_err(|error| Status::invalid_argument(error.to_string()))
    }

    /// Tells those who follow what they will want to know of a block.
    fn note(&self, index: usize) {
        let block_tokens = self.layout.block_tokens();
        let (events, hash) = (&self.node.events, self.prefix.hashes[index]);
        match self.prefix.engine_hashes.get(index) {
            Some(engine_hash) => events.note_engine(hash, block_tokens, engine_hash.clone()),
            None => {
                let tokens = self.prefix.tokens.chunks_exact(block_tokens as usize).nth(index);
                events.note(hash, tokens.unwrap_or_default().iter().map(|token| token.0).collect());
            }
        }
    }

    /// Sends a batch on its way, after those before it.
    async fn commit<R>(
        &self,
        objects: Vec<Numbered>,
        commits: &mut Commits,
        answers: &Answers<'_, R>,
    ) -> Result<(), Status> {
        if objects.is_empty() {
            return Ok(());
        }
        self.node.tenants.admit_stored(&self.node.store, &self.tenant)?;
        self.node.tenants.charge_puts(&self.tenant, || self.new_objects(&objects))?;
        let bytes = objects.iter().map(Numbered::bytes).sum::<usize>();
        while commits.is_full(bytes, self.committing_bytes) {
            self.answer_next(commits, answers).await?;
        }
        // What a batch continues must have been submitted before it.
        if let Some(submitted) = commits.submitting.take() {
            // An error is that of a panic, which is told with the batch's results.
            let _ = submitted.await;
        }
        let named = objects.iter().map(|object| (object.object.id.kind, object.tokens)).collect();
        let objects: Vec<PutObject> = objects.into_iter().map(|object| object.object).collect();
        let (node, author, in_parts) = (self.node.clone(), Arc::clone(&self.author), self.in_parts);
        let (submitted, submitting) = oneshot::channel();
        let held = Arc::clone(&self.held);
        let storing = tokio::task::spawn_blocking(move || {
            let _held = held;
            store(&node, &author, objects, in_parts, submitted)
        });
        commits.submitting = Some(submitting);
        let batch = UnderWay { named, bytes, storing, over: None };
        if self.buffered {
            let accepted = batch.named.iter().map(|&(kind, tokens)| {
                let (kind, outcome) = (v1::ObjectKind::from(kind).into(), v1::Outcome::Stored.into());
                let durability = v1::Durability::Buffered.into();
                v1::PutReply { kind, tokens, outcome, durability, reason: String::new() }
            });
            answers.send(accepted.collect()).await?;
        }
        commits.under_way.push_back(batch);
        Ok(())
    }

    /// How many of these are not stored yet, as whoever puts them can tell. What is costs no rate: a put that was refused half-way
    /// gets further when it is sent again.
    fn new_objects(&self, objects: &[Numbered]) -> usize {
        let ids: Vec<ObjectId> = objects.iter().map(|object| object.object.id).collect();
        let found = self.author.place.sight.find(&self.node.store, self.namespace, &ids);
        found.iter().filter(|found| found.is_none()).count()
    }

    async fn answer_all<R>(&self, commits: &mut Commits, answers: &Answers<'_, R>) -> Result<(), Status> {
        while !commits.under_way.is_empty() {
            self.answer_next(commits, answers).await?;
        }
        Ok(())
    }

    /// Waits for the oldest batch and answers for its objects.
    async fn answer_next<R>(&self, commits: &mut Commits, answers: &Answers<'_, R>) -> Result<(), Status> {
        let Some(batch) = commits.under_way.pop_front() else { return Ok(()) };
        let answered = self.answer(batch, answers).await;
        commits.failed |= answered.is_err();
        answered
    }

    async fn answer<R>(&self, batch: UnderWay, answers: &Answers<'_, R>) -> Result<(), Status> {
        let over = match batch.over {
            Some(over) => over,
            None => batch.storing.await,
        };
        let results = over.map_err(|e| from_join(&e))?.map_err(from_gate)?;
        if self.buffered {
            for error in results.into_iter().filter_map(Result::err) {
                tracing::warn!(%error, "an object that was accepted was not stored");
            }
            return Ok(());
        }
        let mut replies = Vec::with_capacity(results.len());
        let mut over = Ok(());
        for ((kind, tokens), result) in batch.named.into_iter().zip(results) {
            let wire_kind = v1::ObjectKind::from(kind).into();
            let reply = match result {
                Ok(None) => {
                    let reason = format!("what it continues is not stored; it waits {} s", WAIT.as_secs());
                    waiting_reply(kind, tokens, reason)
                }
                Ok(Some(outcome)) => {
                    let outcome = match outcome {
                        PutOutcome::Stored => v1::Outcome::Stored,
                        PutOutcome::Present => v1::Outcome::Present,
                        PutOutcome::Declined => v1::Outcome::Declined,
                    };
                    let kind = wire_kind;
                    let durability = v1::Durability::Durable.into();
                    v1::PutReply { kind, tokens, outcome: outcome.into(), durability, reason: String::new() }
                }
                Err(error) => {
                    // A refusal of one object is an answer about that object; a store that takes nothing more
                    // ends the stream.
                    let status = from_store(&error);
                    use tonic::Code::{Aborted, FailedPrecondition, InvalidArgument};
                    if !matches!(status.code(), InvalidArgument | FailedPrecondition | Aborted) {
                        over = Err(status);
                        break;
                    }
                    let (kind, outcome) = (wire_kind, v1::Outcome::Refused.into());
                    v1::PutReply { kind, tokens, outcome, durability: 0, reason: error.to_string() }
                }
            };
            replies.push(reply);
        }
        answers.send(replies).await?;
        over
    }
}

/// Batches of one put, in the order in which they were gathered: that of their submission and of their answers.
#[derive(Default)]
struct Commits {
    under_way: VecDeque<UnderWay>,
    /// Tells when the newest was submitted.
    submitting: Option<oneshot::Receiver<()>>,
    /// An answer could not be given: the put is over.
    failed: bool,
}

/// A batch that is being stored.
struct UnderWay {
    named: Vec<(ObjectKind, u64)>,
    bytes: usize,
    storing: JoinHandle<Stored>,
    /// What `storing` gave, once it was waited for.
    over: Option<Result<Stored, JoinError>>,
}

impl Commits {
    /// Whether another batch of this many bytes has to wait. One alone always goes.
    fn is_full(&self, bytes: usize, limit_bytes: usize) -> bool {
        let under_way = self.under_way.iter().map(|batch| batch.bytes).sum::<usize>();
        !self.under_way.is_empty() && under_way + bytes > limit_bytes
    }

    /// Returns when the oldest batch is stored; never without one. May be given up and called again.
    async fn front_is_over(&mut self) {
        match self.under_way.front_mut() {
            Some(batch) if batch.over.is_some() => {}
            Some(batch) => {
                let over = (&mut batch.storing).await;
                batch.over = Some(over);
            }
            None => std::future::pending().await,
        }
    }
}

/// What a put takes.
pub(super) enum Next {
    /// A chunk of an object.
    Chunk(v1::PlaneChunk),
    /// A whole object.
    Object(Assembled),
}

/// Where a put takes it from.
pub(super) trait Source {
    /// What comes next, `None` after the last. May be given up while it waits, and asked again: nothing is lost.
    fn next(&mut self) -> impl Future<Output = Result<Option<Next>, Status>> + Send;
}

/// Chunks of a gRPC stream.
pub(super) struct Chunked(pub(super) Streaming<v1::PutRequest>);

impl Source for Chunked {
    async fn next(&mut self) -> Result<Option<Next>, Status> {
        match next_step(&mut self.0).await? {
            Some(put_request::Step::Chunk(chunk)) => Ok(Some(Next::Chunk(chunk))),
            Some(put_request::Step::Prefix(_)) => {
                Err(Status::invalid_argument("a put has one `prefix`, its first message"))
            }
            None => Ok(None),
        }
    }
}

/// Where the results of a put go, and how those that became known at one time look there.
pub(super) struct Answers<'a, R> {
    pub(super) replies: &'a mpsc::Sender<Result<R, Status>>,
    pub(super) wrap: fn(Vec<v1::PutReply>) -> Vec<R>,
}

impl<R> Answers<'_, R> {
    async fn send(&self, results: Vec<v1::PutReply>) -> Result<(), Status> {
        if results.is_empty() {
            return Ok(());
        }
        for reply in (self.wrap)(results) {
            let sent = self.replies.send_timeout(Ok(reply), IDLE_PROGRESS).await;
            sent.map_err(|_| Status::cancelled("the client stopped taking results"))?;
        }
        Ok(())
    }
}

/// How objects are put together.
enum Gathering<'l> {
    /// One after the other, each plane in its turn.
    Whole(PlaneAssembler<'l>),
    /// In any order; those that this put has begun and nobody completed.
    Parts(PlaneReader<'l>, BTreeSet<(ObjectKind, u64)>),
}

/// Stores objects, and what waited for them. `None` for one that waits in its turn: a state whose block is not there yet, or
/// anything that comes in parts and therefore in any order. Says when the next batch may be submitted.
fn store(
    node: &Node,
    author: &Arc<Author>,
    objects: Vec<PutObject>,
    in_parts: bool,
    submitted: oneshot::Sender<()>,
) -> Stored {
    let _inside = author.place.pass.enter()?;
    let may_wait = |object: &&PutObject| in_parts || object.id.kind == ObjectKind::State;
    let kept: Vec<Option<PutObject>> = objects.iter().map(|o| Some(o).filter(may_wait).cloned()).collect();
    let ids: Vec<ObjectId> = objects.iter().map(|object| object.id).collect();
    let under_way = author.submit(node, objects);
    // Nobody listens any more if this fails.
    let _ = submitted.send(());
    let results = author.wait(node, under_way);
    let stored = ids.iter().zip(&results).filter(|(_, result)| result.is_ok()).map(|(id, _)| *id);
    node.staging.follow(node, stored);
    let settle = |(result, kept): (Result<PutOutcome, StoreError>, Option<PutObject>)| match (result, kept) {
        (Err(error), Some(object)) if error.kind() == esker_store::ErrorKind::MissingParent => {
            let parent = object.parent;
            node.staging.park(author, object, Instant::now()).map_err(|_| error)?;
            // It may have come between the two.
            node.staging.follow(node, parent);
            Ok(None)
        }
        (result, _) => result.map(Some),
    };
    Ok(results.into_iter().zip(kept).map(settle).collect())
}

fn waiting_reply(kind: ObjectKind, tokens: u64, reason: String) -> v1::PutReply {
    let (kind, outcome) = (v1::ObjectKind::from(kind).into(), v1::Outcome::Waiting.into());
    v1::PutReply { kind, tokens, outcome, durability: 0, reason }
}

/// The next step of a put, `None` at its end.
pub(super) async fn next_step(
    steps: &mut Streaming<v1::PutRequest>,
) -> Result<Option<put_request::Step>, Status> {
    match next_message(steps, "put").await? {
        None => Ok(None),
        Some(message) => message
            .step
            .map(Some)
            .ok_or_else(|| Status::invalid_argument("a put message needs `prefix` or `chunk`")),
    }
}

/// The next message of a client that must not fall silent.
pub(super) async fn next_message<T>(steps: &mut Streaming<T>, what: &str) -> Result<Option<T>, Status> {
    tokio::time::timeout(IDLE_PROGRESS, steps.message()).await.map_err(|_| {
        Status::deadline_exceeded(format!(
            "nothing came for {} s: the {what} is closed",
            IDLE_PROGRESS.as_secs()
        ))
    })?
}

/// The store's class; they are in the order of [`StoreSettings::ttl_classes`](esker_store::StoreSettings).
pub(crate) fn ttl_class(class: v1::TtlClass) -> TtlClass {
    match class {
        v1::TtlClass::Unspecified => TtlClass::default(),
        v1::TtlClass::TtlClass5m => TtlClass(0),
        v1::TtlClass::TtlClass1h => TtlClass(1),
        v1::TtlClass::TtlClass24h => TtlClass(2),
        v1::TtlClass::TtlClass72h => TtlClass(3),
    }
}
