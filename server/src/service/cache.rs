//! `PrefixCache`: namespaces, lookup, fetch, put.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_prefix::{
    BlockHash, BlockObject, Chain, KvLayout, NamespaceId, ObjectId, ObjectKind, ScopeTag, StateObject,
    TokenId,
};
use esker_proto::v1::{self, fetch_reply, put_request};
use esker_proto::{Assembled, PlaneAssembler, check_namespace_id, check_tokens, chunks, namespace_of};
use esker_store::{FetchEvent, FetchOrder, FetchRequest, Found, PlaneSelection, PutObject, PutOutcome};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::status::{from_join, from_register, from_store, from_wire};
use crate::grant::{GRANT_TTL, Granted};
use crate::node::Node;

/// Most resume points listed in a reply; the greatest is always among them.
const MAX_RESUME_POINTS: usize = 8;
/// Most fetches and most puts at a time. Each holds at most a few objects in memory.
const MAX_FETCHES: usize = 64;
const MAX_PUTS: usize = 16;
/// Chunks buffered between the disk and a client: 8 of at most 1 MiB.
const FETCH_BUFFER_CHUNKS: usize = 8;
/// A client that takes nothing, or sends nothing, for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);
/// Longest time the store may take for one fetch.
const FETCH_DEADLINE: Duration = Duration::from_secs(120);
/// Raw bytes gathered before a commit, 16 MiB, and the longest a whole object waits for company.
const PUT_BATCH_BYTES: usize = 16 << 20;
const PUT_LINGER: Duration = Duration::from_millis(2);

/// The service.
pub(crate) struct CacheService {
    node: Arc<Node>,
    fetches: Arc<Semaphore>,
    puts: Arc<Semaphore>,
}

impl CacheService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self {
            node,
            fetches: Arc::new(Semaphore::new(MAX_FETCHES)),
            puts: Arc::new(Semaphore::new(MAX_PUTS)),
        }
    }

    fn layout(&self, id: NamespaceId) -> Result<Arc<KvLayout>, Status> {
        self.node.namespaces.layout(id).ok_or_else(|| {
            Status::not_found(format!(
                "namespace {id} is not known to this node: call RegisterNamespace first"
            ))
        })
    }
}

#[tonic::async_trait]
impl v1::prefix_cache_server::PrefixCache for CacheService {
    async fn register_namespace(
        &self,
        request: Request<v1::RegisterNamespaceRequest>,
    ) -> Result<Response<v1::RegisterNamespaceReply>, Status> {
        let (namespace, layout) = namespace_of(request.get_ref()).map_err(from_wire)?;
        let (id, layout_id) = (namespace.id(), layout.id());
        let node = self.node.clone();
        blocking(move || {
            node.namespaces.register(&node.store, id, layout).map_err(|error| from_register(&error))
        })
        .await?;
        Ok(Response::new(v1::RegisterNamespaceReply {
            namespace: Bytes::copy_from_slice(id.as_bytes()),
            layout_id: Bytes::copy_from_slice(layout_id.as_bytes()),
        }))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Result<Response<v1::LookupReply>, Status> {
        let request = request.into_inner();
        let namespace = check_namespace_id(&request.namespace).map_err(from_wire)?;
        let tokens = check_tokens(request.tokens).map_err(from_wire)?;
        let layout = self.layout(namespace)?;
        let node = self.node.clone();
        blocking(move || lookup(&node, namespace, layout, &tokens)).await.map(Response::new)
    }

    type FetchStream = ReceiverStream<Result<v1::FetchReply, Status>>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let permit = self.fetches.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{MAX_FETCHES} fetches are running, the limit: try again shortly"
            ))
        })?;
        let (granted, fetch) = plan_fetch(&self.node, request.get_ref())?;
        let node = self.node.clone();
        let (sender, receiver) = mpsc::channel(FETCH_BUFFER_CHUNKS);
        tokio::task::spawn_blocking(move || {
            run_fetch(&node, &granted, fetch, &sender);
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type PutStream = ReceiverStream<Result<v1::PutReply, Status>>;

    async fn put(
        &self,
        request: Request<Streaming<v1::PutRequest>>,
    ) -> Result<Response<Self::PutStream>, Status> {
        let permit = self.puts.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("{MAX_PUTS} puts are running, the limit: try again shortly"))
        })?;
        let mut steps = request.into_inner();
        let prefix = match next_step(&mut steps).await? {
            Some(put_request::Step::Prefix(prefix)) => prefix,
            _ => return Err(Status::invalid_argument("the first message of a put must be `prefix`")),
        };
        let namespace = check_namespace_id(&prefix.namespace).map_err(from_wire)?;
        let tokens = check_tokens(prefix.tokens).map_err(from_wire)?;
        let layout = self.layout(namespace)?;
        let put = Put::new(self.node.clone(), namespace, layout, tokens);
        let (sender, receiver) = mpsc::channel(FETCH_BUFFER_CHUNKS);
        tokio::spawn(async move {
            if let Err(status) = put.run(steps, &sender).await {
                // Nobody listens any more if this fails; whole objects were stored or refused all the same.
                let _ = sender.send(Err(status)).await;
            }
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

// ---------------------------------------------------------------------------------------------- lookup

fn lookup(
    node: &Node,
    namespace: NamespaceId,
    layout: Arc<KvLayout>,
    tokens: &[TokenId],
) -> Result<v1::LookupReply, Status> {
    let block_tokens = u64::from(layout.block_tokens());
    // The last token is always computed: its logits are what the caller came for.
    let usable = (tokens.len() as u64 - 1) / block_tokens * block_tokens;
    let usable_tokens = usize::try_from(usable).unwrap_or(tokens.len());
    let (_, hashes) = Chain::hashes(&node.scope, namespace, layout.block_tokens(), &tokens[..usable_tokens]);
    let ids = |kind| hashes.iter().map(move |&hash| ObjectId { kind, hash }).collect::<Vec<_>>();
    let blocks = node.store.lookup(&ids(ObjectKind::Block));
    let history_tokens = blocks.len() as u64 * block_tokens;

    let needs_state = !layout.planes(ObjectKind::State).is_empty();
    let mut states = Vec::new();
    let resume_points: Vec<u64> = if needs_state {
        let ids = ids(ObjectKind::State);
        states = node.store.get(&ids[..blocks.len()]).into_iter().flatten().collect();
        // Newest first: the greatest boundary is the best.
        states.sort_by_key(|state| std::cmp::Reverse(state.tokens));
        states.truncate(MAX_RESUME_POINTS);
        states.iter().map(|state| state.tokens).collect()
    } else {
        // Without state every block boundary can be resumed; only the greatest is worth listing.
        (history_tokens > 0).then_some(history_tokens).into_iter().collect()
    };

    let best = resume_points.first().copied().unwrap_or(0);
    let reply = v1::LookupReply {
        history_tokens,
        resume_points: resume_points.iter().map(|&tokens| resume_point(&layout, tokens)).collect(),
        best: Some(v1::Best { tokens: best, replay_tokens: history_tokens - best }),
        ..Default::default()
    };
    if best == 0 {
        return Ok(reply);
    }
    let granted = Granted { layout, blocks, states, resume_points };
    let grant = node.grants.issue(granted, Instant::now()).ok_or_else(|| {
        Status::resource_exhausted("the table of grants is full: try again when older grants have expired")
    })?;
    let grant_expires_in_ms = u64::try_from(GRANT_TTL.as_millis()).unwrap_or(u64::MAX);
    Ok(v1::LookupReply { grant: Bytes::copy_from_slice(&grant), grant_expires_in_ms, ..reply })
}

fn resume_point(layout: &KvLayout, tokens: u64) -> v1::ResumePoint {
    let blocks = tokens / u64::from(layout.block_tokens());
    let bytes = |kind: ObjectKind, index: usize| -> u64 {
        layout
            .planes(kind)
            .iter()
            .filter(|plane| usize::from(plane.group) == index)
            .map(|plane| plane.len_bytes)
            .sum()
    };
    let groups = layout.groups().iter().enumerate().map(|(index, group)| v1::GroupBytes {
        group: group.name.clone(),
        bytes: bytes(ObjectKind::Block, index) * blocks + bytes(ObjectKind::State, index),
    });
    v1::ResumePoint { tokens, bytes_by_group: groups.collect() }
}

// ---------------------------------------------------------------------------------------------- fetch

fn plan_fetch(node: &Node, request: &v1::FetchRequest) -> Result<(Arc<Granted>, FetchRequest), Status> {
    let unknown = || Status::not_found("this grant is not known or has expired: look the prefix up again");
    let id = request.grant.as_ref().try_into().map_err(|_| unknown())?;
    let granted = node.grants.get(&id, Instant::now()).ok_or_else(unknown)?;
    let best = granted.resume_points.first().copied().unwrap_or(0);
    let tokens = if request.tokens == 0 { best } else { request.tokens };
    let block_tokens = u64::from(granted.layout.block_tokens());
    let listed = if granted.states.is_empty() {
        tokens <= best && tokens.is_multiple_of(block_tokens)
    } else {
        granted.resume_points.contains(&tokens)
    };
    if !listed {
        return Err(Status::invalid_argument(format!(
            "{tokens} tokens is not a resume point of this grant; it lists {:?}",
            granted.resume_points
        )));
    }
    let mut objects: Vec<Found> =
        granted.states.iter().filter(|state| state.tokens == tokens).cloned().collect();
    objects.extend(granted.blocks.iter().filter(|block| block.tokens <= tokens).cloned());
    let planes = plane_selection(&granted.layout, request)?;
    let order = match request.order() {
        v1::Order::ByPlane => FetchOrder::ByPlane,
        v1::Order::ByObject | v1::Order::Unspecified => FetchOrder::ByObject,
    };
    let deadline = Some(Instant::now() + FETCH_DEADLINE);
    Ok((granted, FetchRequest { objects, planes, order, deadline }))
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

/// Streams on a blocking thread; ends when the client has everything, leaves, or stops taking.
fn run_fetch(
    node: &Node,
    granted: &Granted,
    request: FetchRequest,
    replies: &mpsc::Sender<Result<v1::FetchReply, Status>>,
) {
    let runtime = tokio::runtime::Handle::current();
    let send = |event| {
        let reply = Ok(v1::FetchReply { event: Some(event) });
        runtime.block_on(replies.send_timeout(reply, IDLE_PROGRESS)).is_ok()
    };
    let objects: Vec<(ObjectKind, u64)> =
        request.objects.iter().map(|found| (found.id.kind, found.tokens)).collect();
    let block_tokens = u64::from(granted.layout.block_tokens());
    let mut usable_tokens = objects.iter().map(|object| object.1).max().unwrap_or(0);
    let mut done = v1::FetchDone::default();
    for event in node.store.fetch(request) {
        match event {
            FetchEvent::Plane { object, plane, bytes, .. } => {
                let (kind, tokens) = objects[object];
                done.planes += 1;
                done.bytes += bytes.len() as u64;
                for chunk in chunks(kind, tokens, u32::try_from(plane).unwrap_or(u32::MAX), bytes) {
                    if !send(fetch_reply::Event::Chunk(chunk)) {
                        return;
                    }
                }
            }
            FetchEvent::Miss { object, kind: reason } => {
                let (kind, tokens) = objects[object];
                let ends = if kind == ObjectKind::State { 0 } else { tokens - block_tokens };
                usable_tokens = usable_tokens.min(ends);
                let kind = v1::ObjectKind::from(kind).into();
                if !send(fetch_reply::Event::Missing(v1::Missing {
                    kind,
                    tokens,
                    reason: reason.to_string(),
                })) {
                    return;
                }
            }
        }
    }
    done.usable_tokens = usable_tokens;
    send(fetch_reply::Event::Done(done));
}

// ---------------------------------------------------------------------------------------------- put

/// One put stream.
struct Put {
    node: Arc<Node>,
    namespace: NamespaceId,
    scope: ScopeTag,
    layout: Arc<KvLayout>,
    genesis: BlockHash,
    hashes: Vec<BlockHash>,
}

impl Put {
    fn new(node: Arc<Node>, namespace: NamespaceId, layout: Arc<KvLayout>, tokens: Vec<TokenId>) -> Self {
        let (genesis, hashes) = Chain::hashes(&node.scope, namespace, layout.block_tokens(), &tokens);
        Self { scope: node.scope.tag(), node, namespace, layout, genesis, hashes }
    }

    /// Gathers whole objects and commits them in batches: when enough has come, or when nothing more comes.
    async fn run(
        self,
        mut steps: Streaming<v1::PutRequest>,
        replies: &mpsc::Sender<Result<v1::PutReply, Status>>,
    ) -> Result<(), Status> {
        let layout = self.layout.clone();
        let mut assembler = PlaneAssembler::new(&layout);
        let mut waiting: Vec<PutObject> = Vec::new();
        let mut waiting_bytes = 0;
        loop {
            let step = if waiting.is_empty() {
                next_step(&mut steps).await?
            } else {
                match tokio::time::timeout(PUT_LINGER, next_step(&mut steps)).await {
                    Ok(step) => step?,
                    Err(_) => {
                        self.commit(std::mem::take(&mut waiting), replies).await?;
                        waiting_bytes = 0;
                        continue;
                    }
                }
            };
            let chunk = match step {
                Some(put_request::Step::Chunk(chunk)) => chunk,
                Some(put_request::Step::Prefix(_)) => {
                    return Err(Status::invalid_argument("a put has one `prefix`, its first message"));
                }
                None => break,
            };
            if let Some(whole) = assembler.push(chunk).map_err(from_wire)? {
                let object = self.object(whole)?;
                waiting_bytes += object.planes.iter().map(|plane| plane.bytes.len()).sum::<usize>();
                waiting.push(object);
            }
            if waiting_bytes >= PUT_BATCH_BYTES {
                self.commit(std::mem::take(&mut waiting), replies).await?;
                waiting_bytes = 0;
            }
        }
        // What is whole is kept even when the stream ends inside the next object.
        self.commit(waiting, replies).await?;
        assembler.finish().map_err(from_wire)
    }

    fn object(&self, whole: Assembled) -> Result<PutObject, Status> {
        let Assembled { kind, tokens, planes } = whole;
        let block_tokens = u64::from(self.layout.block_tokens());
        let index = usize::try_from(tokens / block_tokens).unwrap_or(usize::MAX);
        if tokens % block_tokens != 0 || index == 0 || index > self.hashes.len() {
            return Err(Status::invalid_argument(format!(
                "an object at {tokens} tokens does not fit: the prefix of this put has {} whole blocks of \
                 {block_tokens} tokens",
                self.hashes.len()
            )));
        }
        let hash = self.hashes[index - 1];
        let parent = if index == 1 { self.genesis } else { self.hashes[index - 2] };
        let (layout, namespace, scope) = (&*self.layout, self.namespace, self.scope);
        let object = match kind {
            ObjectKind::State => StateObject::new(layout, namespace, scope, parent, hash, tokens, planes)
                .map(|object| PutObject::state(layout, object)),
            _ => BlockObject::new(layout, namespace, scope, parent, hash, tokens, planes)
                .map(|object| PutObject::block(layout, object)),
        };
        object.map_err(|error| Status::invalid_argument(error.to_string()))
    }

    async fn commit(
        &self,
        objects: Vec<PutObject>,
        replies: &mpsc::Sender<Result<v1::PutReply, Status>>,
    ) -> Result<(), Status> {
        if objects.is_empty() {
            return Ok(());
        }
        let named: Vec<(ObjectKind, u64)> =
            objects.iter().map(|object| (object.id.kind, object.tokens)).collect();
        let node = self.node.clone();
        let results =
            tokio::task::spawn_blocking(move || node.store.put(objects)).await.map_err(|e| from_join(&e))?;
        for ((kind, tokens), result) in named.into_iter().zip(results) {
            let kind = v1::ObjectKind::from(kind).into();
            let reply = match result {
                Ok(outcome) => {
                    let outcome = match outcome {
                        PutOutcome::Stored => v1::Outcome::Stored,
                        PutOutcome::Present => v1::Outcome::Present,
                        PutOutcome::Declined => v1::Outcome::Declined,
                    };
                    let durability = v1::Durability::Durable.into();
                    v1::PutReply { kind, tokens, outcome: outcome.into(), durability, reason: String::new() }
                }
                Err(error) => {
                    // A refusal of one object is an answer about that object; a store that takes nothing more
                    // ends the stream.
                    let status = from_store(&error);
                    use tonic::Code::{Aborted, FailedPrecondition, InvalidArgument};
                    if !matches!(status.code(), InvalidArgument | FailedPrecondition | Aborted) {
                        return Err(status);
                    }
                    let outcome = v1::Outcome::Refused.into();
                    v1::PutReply { kind, tokens, outcome, durability: 0, reason: error.to_string() }
                }
            };
            if replies.send_timeout(Ok(reply), IDLE_PROGRESS).await.is_err() {
                return Err(Status::cancelled("the client stopped taking results"));
            }
        }
        Ok(())
    }
}

/// The next message of a put, `None` at its end.
async fn next_step(steps: &mut Streaming<v1::PutRequest>) -> Result<Option<put_request::Step>, Status> {
    let message = tokio::time::timeout(IDLE_PROGRESS, steps.message()).await.map_err(|_| {
        Status::deadline_exceeded(format!(
            "nothing came for {} s: the put is closed",
            IDLE_PROGRESS.as_secs()
        ))
    })??;
    match message {
        None => Ok(None),
        Some(message) => message
            .step
            .map(Some)
            .ok_or_else(|| Status::invalid_argument("a put message needs `prefix` or `chunk`")),
    }
}

/// Runs what may wait for the disk away from the threads that serve the network.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| from_join(&error))?
}
