//! `Put`: objects of one prefix, stored in batches.

use std::sync::Arc;
use std::time::Duration;

use esker_prefix::{
    BlockHash, BlockObject, Chain, KvLayout, NamespaceId, ObjectKind, ScopeTag, StateObject, rekey,
};
use esker_proto::v1::{self, put_request};
use esker_proto::{Assembled, PlaneAssembler, PrefixNames, check_namespace_id, check_prefix};
use esker_store::{PutObject, PutOutcome, TtlClass};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Status, Streaming};

use super::cache::layout;
use super::status::{from_join, from_store, from_wire};
use crate::audit::Event;
use crate::node::Node;
use crate::principal::Principal;
use crate::tenants::{InFlight, Tenant, over};

/// A client that sends nothing, or takes no results, for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);
/// Raw bytes gathered before a commit, and the longest a whole object waits for company.
const PUT_BATCH_BYTES: usize = 4 << 20;
const PUT_LINGER: Duration = Duration::from_millis(2);
/// Memory of all puts together. Each takes what it can come to need when it begins, so that none waits for another half-way.
pub(super) const PUT_MEMORY_BYTES: u64 = 160 << 20;

/// An object, and its tokens as the caller counts them.
struct Numbered {
    tokens: u64,
    object: PutObject,
}

/// One put stream.
pub(super) struct Put {
    node: Arc<Node>,
    namespace: NamespaceId,
    scope: ScopeTag,
    layout: Arc<KvLayout>,
    class: TtlClass,
    /// Answer as soon as an object is handed over.
    buffered: bool,
    /// Whether each block continues the one before it; if so, what comes before the first.
    genesis: Option<BlockHash>,
    hashes: Vec<BlockHash>,
    tenant: Arc<Tenant>,
    _permit: OwnedSemaphorePermit,
    _in_flight: InFlight,
}

impl Put {
    /// Checks the first message and takes what the put may use.
    pub(super) fn open(
        node: &Arc<Node>,
        memory: &Arc<Semaphore>,
        principal: &Principal,
        prefix: v1::PutPrefix,
    ) -> Result<Self, Status> {
        let namespace = check_namespace_id(&prefix.namespace).map_err(from_wire)?;
        let (scope, ttl, durability) = (prefix.scope(), prefix.ttl(), prefix.durability());
        let names =
            check_prefix(prefix.tokens, &[], prefix.engine_hashes, prefix.unchained).map_err(from_wire)?;
        let layout = layout(node, namespace)?;
        let tenant = node.tenants.of(principal);
        node.tenants.admit_stored(&node.store, &tenant)?;
        let held = 2 * layout.object_bytes(ObjectKind::Block).max(layout.object_bytes(ObjectKind::State));
        let held = held.max(2 * PUT_BATCH_BYTES as u64);
        let in_flight = node.tenants.fly(&tenant, held)?;
        let kib = u32::try_from(held >> 10).unwrap_or(u32::MAX);
        let permit = memory
            .clone()
            .try_acquire_many_owned(kib)
            .map_err(|_| over("put memory of this node", PUT_MEMORY_BYTES, PUT_MEMORY_BYTES, 200))?;
        let key = node.tenants.writable(principal, &prefix.user, scope)?;
        if scope != v1::Scope::Private && scope != v1::Scope::Unspecified {
            let what = format!("{scope:?} {namespace}");
            node.audit.record(&Event::new(principal, "publish", what, "ok"));
        }
        let (genesis, hashes) = match names {
            PrefixNames::Tokens(tokens) => {
                let (genesis, hashes) = Chain::hashes(&key, namespace, layout.block_tokens(), &tokens);
                (Some(genesis), hashes)
            }
            PrefixNames::Engine { hashes, chained } => {
                let genesis = chained.then(|| Chain::genesis(&key, namespace, &[]).tip());
                (genesis, hashes.iter().map(|hash| rekey(&key, namespace, 0, hash)).collect())
            }
            PrefixNames::Hashes(_) => {
                return Err(Status::invalid_argument("a put names its prefix by tokens or engine_hashes"));
            }
        };
        Ok(Self {
            node: node.clone(),
            namespace,
            scope: key.tag(),
            layout,
            class: ttl_class(ttl),
            buffered: durability == v1::Durability::Buffered,
            genesis,
            hashes,
            tenant,
            _permit: permit,
            _in_flight: in_flight,
        })
    }

    /// Gathers whole objects and commits them in batches: when enough has come, or when nothing more comes.
    pub(super) async fn run(
        self,
        mut steps: Streaming<v1::PutRequest>,
        replies: &mpsc::Sender<Result<v1::PutReply, Status>>,
    ) -> Result<(), Status> {
        let layout = self.layout.clone();
        let mut assembler = PlaneAssembler::new(&layout);
        let mut waiting: Vec<Numbered> = Vec::new();
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
                waiting_bytes += object.object.planes.iter().map(|plane| plane.bytes.len()).sum::<usize>();
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

    fn object(&self, whole: Assembled) -> Result<Numbered, Status> {
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
        let (layout, namespace, scope) = (&*self.layout, self.namespace, self.scope);
        // A block that stands for itself is the same in whatever company it is put: as long as one block.
        let (parent, stored_tokens) = match (self.genesis, index) {
            (None, _) => (hash, block_tokens),
            (Some(genesis), 1) => (genesis, tokens),
            (Some(_), _) => (self.hashes[index - 2], tokens),
        };
        let object = match kind {
            ObjectKind::State => {
                StateObject::new(layout, namespace, scope, parent, hash, stored_tokens, planes)
                    .map(|object| PutObject::state(layout, object))
            }
            _ => BlockObject::new(layout, namespace, scope, parent, hash, stored_tokens, planes)
                .map(|object| PutObject::block(layout, object)),
        };
        let object = object.map(|object| Numbered { tokens, object: object.with_class(self.class) });
        object.map_err(|error| Status::invalid_argument(error.to_string()))
    }

    async fn commit(
        &self,
        objects: Vec<Numbered>,
        replies: &mpsc::Sender<Result<v1::PutReply, Status>>,
    ) -> Result<(), Status> {
        if objects.is_empty() {
            return Ok(());
        }
        self.node.tenants.charge_puts(&self.tenant, objects.len())?;
        let named: Vec<(ObjectKind, u64)> =
            objects.iter().map(|object| (object.object.id.kind, object.tokens)).collect();
        let objects: Vec<PutObject> = objects.into_iter().map(|object| object.object).collect();
        let node = self.node.clone();
        let storing = tokio::task::spawn_blocking(move || node.store.put(objects));
        if self.buffered {
            for (kind, tokens) in named {
                let (kind, outcome) = (v1::ObjectKind::from(kind).into(), v1::Outcome::Stored.into());
                let durability = v1::Durability::Buffered.into();
                let reply = v1::PutReply { kind, tokens, outcome, durability, reason: String::new() };
                if replies.send_timeout(Ok(reply), IDLE_PROGRESS).await.is_err() {
                    return Err(Status::cancelled("the client stopped taking results"));
                }
            }
            // What is accepted is stored before more is taken: memory stays bounded.
            let results = storing.await.map_err(|e| from_join(&e))?;
            for error in results.into_iter().filter_map(Result::err) {
                tracing::warn!(%error, "an object that was accepted was not stored");
            }
            return Ok(());
        }
        let results = storing.await.map_err(|e| from_join(&e))?;
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
pub(super) async fn next_step(
    steps: &mut Streaming<v1::PutRequest>,
) -> Result<Option<put_request::Step>, Status> {
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
