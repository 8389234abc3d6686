//! `PrefixCache`: namespaces, lookup, fetch, put.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use esker_prefix::{KvLayout, NamespaceId};
use esker_proto::v1::{self, put_request};
use esker_proto::{MAX_CHAIN_BLOCKS, MAX_LOOKUPS, check_namespace_id, check_prefix, namespace_of};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::admission::Admission;
use super::deadline::deadline_of;
use super::fetch::{Chunks, Fetching, Replies, unknown_grant};
use super::put::{Answers, Chunked, Put, next_step};
use super::settle::settle;
use super::status::{from_join, from_ledger, from_register, from_wire};
use crate::budget::Use;
use crate::grant::{GRANT_TTL, Granted};
use crate::lookup::Question;
use crate::node::Node;
use crate::principal::{Principal, principal_of};
use crate::tenants::exhausted;

/// Chunks buffered between the disk and a client: 8 of at most 1 MiB.
const FETCH_BUFFER_CHUNKS: usize = 8;
/// Results buffered for a client that puts.
pub(super) const PUT_REPLIES: usize = 64;
/// What a fetch of any length has in flight at most: chunks and the store's read-ahead.
pub(super) const FETCH_HOLDS_BYTES: u64 = 24 << 20;
/// Lookups of so many blocks, 260,000 tokens, are answered where they arrive: a few hundred microseconds at most, which a change of
/// threads costs as well. Longer ones have a thread of their own.
const SHORT_LOOKUP_BLOCKS: usize = 2048;

/// The service.
pub(crate) struct CacheService {
    node: Arc<Node>,
    admission: Admission,
}

impl CacheService {
    pub(crate) fn new(node: Arc<Node>, admission: Admission) -> Self {
        Self { node, admission }
    }

    fn question(&self, principal: &Principal, request: v1::LookupRequest) -> Result<Asked, Status> {
        let namespace = check_namespace_id(&request.namespace).map_err(from_wire)?;
        let v1::LookupRequest { tokens, hashes, tail_tokens, engine_hashes, unchained, .. } = request;
        let names =
            check_prefix(tokens, &hashes, tail_tokens, engine_hashes, unchained).map_err(from_wire)?;
        let scopes = self.node.tenants.readable(principal, &request.user)?;
        let layout = layout(&self.node, namespace)?;
        let (prompt_tokens, sight) = (request.prompt_tokens, self.node.tenants.sight(&principal.tenant));
        let question = Question { namespace, layout, names, prompt_tokens, scopes, sight };
        Ok(Asked { question, grant: !request.no_grant, want_hashes: request.want_hashes })
    }
}

/// A question and how it wants its answer.
struct Asked {
    question: Question,
    grant: bool,
    want_hashes: bool,
}

#[tonic::async_trait]
impl v1::prefix_cache_server::PrefixCache for CacheService {
    async fn register_namespace(
        &self,
        request: Request<v1::RegisterNamespaceRequest>,
    ) -> Result<Response<v1::RegisterNamespaceReply>, Status> {
        let tenant = principal_of(&request)?.tenant;
        let (namespace, layout) = namespace_of(request.get_ref()).map_err(from_wire)?;
        let (id, layout_id) = (namespace.id(), layout.id());
        let node = self.node.clone();
        blocking(move || {
            let registered = node.namespaces.register_for(&tenant, &node.control, &node.store, id, layout);
            registered.map_err(|error| from_register(&error))
        })
        .await?;
        Ok(Response::new(v1::RegisterNamespaceReply {
            namespace: Bytes::copy_from_slice(id.as_bytes()),
            layout_id: Bytes::copy_from_slice(layout_id.as_bytes()),
        }))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Result<Response<v1::LookupReply>, Status> {
        let principal = principal_of(&request)?;
        let asked = self.question(&principal, request.into_inner())?;
        let blocks = asked.question.blocks();
        self.node.tenants.charge_hashes(&self.node.tenants.of(&principal), blocks)?;
        if blocks <= SHORT_LOOKUP_BLOCKS {
            return lookup(&self.node, &principal, &asked).map(Response::new);
        }
        let node = self.node.clone();
        blocking(move || lookup(&node, &principal, &asked)).await.map(Response::new)
    }

    async fn lookup_many(
        &self,
        request: Request<v1::LookupManyRequest>,
    ) -> Result<Response<v1::LookupManyReply>, Status> {
        let principal = principal_of(&request)?;
        let lookups = request.into_inner().lookups;
        if lookups.len() > MAX_LOOKUPS {
            return Err(Status::invalid_argument(format!(
                "lookups are limited to {MAX_LOOKUPS} in one call, got {}",
                lookups.len()
            )));
        }
        let asked = lookups.into_iter().map(|request| self.question(&principal, request));
        let asked = asked.collect::<Result<Vec<_>, _>>()?;
        let blocks = asked.iter().map(|asked| asked.question.blocks()).sum();
        if blocks > MAX_CHAIN_BLOCKS {
            return Err(Status::invalid_argument(format!(
                "the lookups of one call are limited to {MAX_CHAIN_BLOCKS} blocks together, got {blocks}"
            )));
        }
        self.node.tenants.charge_hashes(&self.node.tenants.of(&principal), blocks)?;
        let node = self.node.clone();
        blocking(move || {
            let replies = asked.iter().map(|asked| lookup(&node, &principal, asked));
            Ok(v1::LookupManyReply { replies: replies.collect::<Result<_, _>>()? })
        })
        .await
        .map(Response::new)
    }

    type FetchStream = ReceiverStream<Result<v1::FetchReply, Status>>;

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let principal = principal_of(&request)?;
        let deadline = deadline_of(&request);
        self.node.ledger.admit().map_err(|error| from_ledger(&error))?;
        let turn = self.admission.fetch(deadline).await?;
        let fetching = Fetching::plan(&self.node, &principal.tenant, request.get_ref(), deadline)?;
        let tenant = self.node.tenants.of(&principal);
        let in_flight =
            self.node.tenants.fly(&tenant, Use::Fetch, fetching.bytes().min(FETCH_HOLDS_BYTES))?;
        let node = self.node.clone();
        let (sender, receiver) = mpsc::channel(FETCH_BUFFER_CHUNKS);
        let busy = node.live.enter();
        let mut delivery = Chunks(Replies::new(sender, turn));
        tokio::task::spawn_blocking(move || {
            fetching.run(&node, &mut delivery);
            drop((in_flight, busy));
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type PutStream = ReceiverStream<Result<v1::PutReply, Status>>;

    async fn put(
        &self,
        request: Request<Streaming<v1::PutRequest>>,
    ) -> Result<Response<Self::PutStream>, Status> {
        let principal = principal_of(&request)?;
        let mut steps = request.into_inner();
        let prefix = match next_step(&mut steps).await? {
            Some(put_request::Step::Prefix(prefix)) => prefix,
            _ => return Err(Status::invalid_argument("the first message of a put must be `prefix`")),
        };
        let node = self.node.clone();
        let put = blocking(move || Put::open(&node, &principal, prefix)).await?;
        let (sender, receiver) = mpsc::channel(PUT_REPLIES);
        let busy = self.node.live.enter();
        tokio::spawn(async move {
            let _busy = busy;
            let answers = Answers { replies: &sender, wrap: |replies| replies };
            if let Err(status) = put.run(Chunked(steps), &answers).await {
                // Nobody listens any more if this fails; whole objects were stored or refused all the same.
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn settle(&self, request: Request<v1::SettleRequest>) -> Result<Response<v1::SettleReply>, Status> {
        let principal = principal_of(&request)?;
        settle(&self.node, &principal, request.into_inner()).await.map(Response::new)
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseReply>, Status> {
        let principal = principal_of(&request)?;
        let id = request.get_ref().grant.as_ref().try_into().ok();
        id.and_then(|id| self.node.grants.take(&id, &principal.tenant, Instant::now()))
            .ok_or_else(unknown_grant)?;
        Ok(Response::new(v1::ReleaseReply {}))
    }
}

fn lookup(node: &Node, principal: &Principal, asked: &Asked) -> Result<v1::LookupReply, Status> {
    let (answer, pins) = asked.question.answer(&node.store, asked.grant);
    node.metrics.lookup(&answer);
    let reply = answer.reply(&node.staging.of(&principal.tenant), asked.want_hashes);
    if pins.is_none() {
        return Ok(reply);
    }
    let scope = asked.question.scope_of(&answer);
    let granted = Granted::new(principal.tenant.clone(), asked.question.namespace, answer, pins, scope);
    let grant = node.grants.issue(granted, Instant::now()).ok_or_else(|| {
        exhausted("the table of grants is full: try again when older grants have expired", 1000)
    })?;
    let grant_expires_in_ms = milliseconds(GRANT_TTL);
    Ok(v1::LookupReply { grant: Bytes::copy_from_slice(&grant), grant_expires_in_ms, ..reply })
}

pub(super) fn layout(node: &Node, id: NamespaceId) -> Result<Arc<KvLayout>, Status> {
    node.namespaces.layout(id).ok_or_else(|| {
        Status::not_found(format!("namespace {id} is not known to this node: call RegisterNamespace first"))
    })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Runs what may wait for the disk away from the threads that serve the network.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| from_join(&error))?
}
