//! `Decoder`: describe, tokenize, generate.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use esker_decoder::Sampler;
use esker_proto::v1::{self, generate_reply, generate_request};
use esker_proto::{MAX_TEXT_BYTES, WireError, check_tokens};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::bill::{Bill, Served};
use super::cache::blocking;
use super::put::ttl_class;
use super::status::{from_generate, from_wire};
use crate::generate::{Account, Event, GenerateError, Job, RestoreMode, generate};
use crate::ledger::sums;
use crate::metrics::Watched;
use crate::node::{Engine, Node};
use crate::principal::{Principal, Role, principal_of};
use crate::tenants::exhausted;
use crate::traces::Call;
use crate::writers::Place;

/// Generations that compute at a time: each uses every core by itself.
const RUNNING: usize = 2;
/// Generations that wait for one of them; more are refused.
const MAX_WAITING: usize = 32;
const DEFAULT_NEW_TOKENS: u32 = 64;
/// Stop sequences of a request, and the longest of them.
const MAX_STOPS: usize = 32;
const MAX_STOP_BYTES: usize = 256;
/// Events buffered for a client.
const EVENT_BUFFER: usize = 64;
/// A client that takes nothing for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);
/// Between two reports of progress. Each is a message that the first token may have to wait behind.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// The service.
pub(crate) struct DecoderService {
    node: Arc<Node>,
    running: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

impl DecoderService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, running: Arc::new(Semaphore::new(RUNNING)), waiting: Arc::default() }
    }

    fn engine(&self) -> Result<&Engine, Status> {
        engine(&self.node)
    }

    fn job(&self, principal: &Principal, mut request: v1::GenerateRequest) -> Result<Job, Status> {
        let engine = self.engine()?;
        let class = ttl_class(request.ttl());
        let (place, stores) = self.place(principal, &request.user)?;
        let prompt = match request.prompt.take().ok_or(WireError::Missing("prompt")).map_err(from_wire)? {
            generate_request::Prompt::Tokens(tokens) => check_tokens(tokens.ids).map_err(from_wire)?,
            generate_request::Prompt::Text(text) => tokenize(engine, &text)?,
        };
        let context = engine.loaded.model.config().max_position_embeddings;
        if prompt.len() >= context {
            return Err(Status::invalid_argument(format!(
                "the prompt has {} tokens and the model's context {context}: at least one must be left to write",
                prompt.len()
            )));
        }
        let sampler = sampler(&request)?;
        let wanted = if request.max_new_tokens == 0 { DEFAULT_NEW_TOKENS } else { request.max_new_tokens };
        let max_new_tokens = (wanted as usize).min(context - prompt.len());
        Ok(Job {
            prompt,
            max_new_tokens,
            sampler,
            logits_digest: request.logits_digest,
            stop: request.stop,
            place,
            class,
            stores,
            restore: RestoreMode::default(),
            guessing: self.node.guessing,
            resident_bytes: match request.resident_bytes {
                0 => self.node.resident_bytes,
                bytes => Some(bytes),
            },
        })
    }

    /// Where a generation looks and stores, and whether it stores. For want of room for one more user, or of a drive that can be
    /// written, nobody goes without an answer.
    fn place(&self, principal: &Principal, user: &str) -> Result<(Place, bool), Status> {
        let tenants = &self.node.tenants;
        if principal.roles.has(Role::Writer) {
            // Who stores as much as it may is answered all the same.
            let admitted = tenants.admit_stored(&self.node.store, &tenants.of(principal));
            match admitted.and_then(|()| tenants.writable(principal, user, v1::Scope::Private)) {
                Ok(place) => return Ok((place, true)),
                Err(refused) if matches!(refused.code(), Code::ResourceExhausted | Code::Unavailable) => {
                    tracing::debug!(tenant = %principal.tenant, reason = refused.message(), "an answer is not stored");
                }
                Err(refused) => return Err(refused),
            }
        }
        Ok((tenants.own_place(principal, user)?, false))
    }
}

/// How tokens are picked, and that the stop sequences are some.
fn sampler(request: &v1::GenerateRequest) -> Result<Sampler, Status> {
    let unusable = |stop: &String| stop.is_empty() || stop.len() > MAX_STOP_BYTES;
    if request.stop.len() > MAX_STOPS || request.stop.iter().any(unusable) {
        return Err(Status::invalid_argument(format!(
            "`stop` may have {MAX_STOPS} sequences of 1 to {MAX_STOP_BYTES} bytes"
        )));
    }
    let top_p = if request.top_p == 0.0 { 1.0 } else { request.top_p };
    Sampler::seeded(request.temperature, top_p, request.seed)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}

/// For fuzzing: a request for a generation. Whether it has a prompt that may be one, and a way to pick tokens; then one is picked.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use prost::Message;
    let Ok(request) = v1::GenerateRequest::decode(bytes) else { return false };
    let _ = ttl_class(request.ttl());
    let Ok(mut sampler) = sampler(&request) else { return false };
    let logits = [0.5, -1.0e30, 3.0, 3.0, -0.0];
    assert!((sampler.next(&logits).0 as usize) < logits.len());
    match request.prompt {
        Some(generate_request::Prompt::Tokens(tokens)) => check_tokens(tokens.ids).is_ok(),
        Some(generate_request::Prompt::Text(text)) => text.len() <= MAX_TEXT_BYTES,
        None => false,
    }
}

pub(super) fn engine(node: &Node) -> Result<&Engine, Status> {
    node.engine.as_ref().ok_or_else(|| Status::unimplemented("this node was started without a model"))
}

pub(super) fn tokenize(engine: &Engine, text: &str) -> Result<Vec<esker_prefix::TokenId>, Status> {
    if text.len() > MAX_TEXT_BYTES {
        let (limit, got) = (MAX_TEXT_BYTES, text.len());
        return Err(from_wire(WireError::TooLarge { field: "text", unit: "bytes", limit, got }));
    }
    let tokens =
        engine.loaded.tokenizer.encode(text).map_err(|error| Status::invalid_argument(error.to_string()))?;
    if tokens.is_empty() {
        return Err(from_wire(WireError::Empty("text")));
    }
    Ok(tokens)
}

#[tonic::async_trait]
impl v1::decoder_server::Decoder for DecoderService {
    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeReply>, Status> {
        let principal = principal_of(&request)?;
        let engine = self.engine()?;
        let model = &engine.loaded.model;
        // Not what others store: it would tell whether a put of another tenant's text found it there.
        let node = Arc::clone(&self.node);
        let store_bytes =
            blocking(move || Ok(node.tenants.private_bytes(&node.store, &principal.tenant))).await?;
        Ok(Response::new(v1::DescribeReply {
            store_bytes,
            model: engine.loaded.name.clone(),
            namespace: Bytes::copy_from_slice(engine.namespace.as_bytes()),
            layout_json: model.layout().to_json(),
            parameters: model.parameters() as u64,
            max_tokens: model.config().max_position_embeddings as u64,
        }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeReply>, Status> {
        let tokens = tokenize(self.engine()?, &request.get_ref().text)?;
        Ok(Response::new(v1::TokenizeReply { tokens: tokens.into_iter().map(|token| token.0).collect() }))
    }

    type GenerateStream = ReceiverStream<Result<v1::GenerateReply, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let principal = principal_of(&request)?;
        let call = request.extensions().get::<Call>().cloned();
        let request = request.into_inner();
        let bill = Bill::open(&self.node, &principal, &request).await?;
        let job = self.job(&principal, request)?;
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= MAX_WAITING {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(exhausted(format!("{MAX_WAITING} generations are waiting, the limit"), 1000));
        }
        let arrived = Arrived { at: Instant::now(), wall: SystemTime::now(), call };
        let (node, running, waiting) = (self.node.clone(), self.running.clone(), self.waiting.clone());
        let (sender, receiver) = mpsc::channel(EVENT_BUFFER);
        tokio::spawn(async move {
            node.metrics.decoder_waiting.inc();
            let permit = running.acquire_owned().await;
            waiting.fetch_sub(1, Ordering::AcqRel);
            node.metrics.decoder_waiting.dec();
            if permit.is_ok() && !sender.is_closed() {
                let _busy = node.live.enter();
                let work = tokio::task::spawn_blocking(move || run(&node, job, &bill, arrived, &sender));
                // A panic in the task has been reported by the panic hook; the client sees its stream end.
                let _ = work.await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// When a request came.
struct Arrived {
    at: Instant,
    wall: SystemTime,
    call: Option<Call>,
}

/// Runs a job on a blocking thread, sending its events to the client.
fn run(
    node: &Node,
    job: Job,
    bill: &Bill,
    arrived: Arrived,
    replies: &mpsc::Sender<Result<v1::GenerateReply, Status>>,
) {
    let runtime = tokio::runtime::Handle::current();
    let mut reported = Instant::now();
    let waited = arrived.at.elapsed();
    let mut watched = Watched::new(arrived.at, node);
    let closed = Cell::new(false);
    let served = Cell::new(Served::of(job.prompt.len()));
    let mut emit = |event| {
        watched.see(&event);
        if let Event::Prompt { tokens, hit_tokens, .. } = &event {
            node.history.prompt(*tokens as u64, *hit_tokens as u64, Some(arrived.at.elapsed()));
        }
        if let Event::Done(account) = &event {
            node.traces.generation(arrived.call.as_ref(), waited, arrived.wall, account);
        }
        served.set(served.get().and(&event));
        // The account is closed before the caller hears that it has everything.
        let event = wire(event, |account| {
            closed.set(true);
            bill.close(node, engine(node)?, account)
        });
        let reply = event.map(|event| v1::GenerateReply { event: Some(event) });
        if let Ok(v1::GenerateReply { event: Some(generate_reply::Event::Progress(_)) }) = &reply {
            if reported.elapsed() < PROGRESS_INTERVAL && !replies.is_closed() {
                return ControlFlow::Continue(());
            }
            reported = Instant::now();
            // Progress is worth nothing late: a full buffer drops it.
            return match replies.try_send(reply) {
                Err(mpsc::error::TrySendError::Closed(_)) => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
        }
        match runtime.block_on(replies.send_timeout(reply, IDLE_PROGRESS)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    };
    let result = engine(node).and_then(|engine| {
        generate(node, engine, job, &mut emit).map_err(|error| {
            if !closed.get() {
                bill.give_up(node, engine, served.get(), &error);
            }
            report(&error)
        })
    });
    if let Err(status) = result {
        // The client may be gone, which is the commonest reason to be here.
        let _ = replies.try_send(Err(status));
    }
}

fn report(error: &GenerateError) -> Status {
    if !error.is_cancelled() {
        tracing::warn!(%error, "a generation failed");
    }
    from_generate(error)
}

fn wire(
    event: Event,
    close: impl FnOnce(&Account) -> Result<v1::UsageRecord, Status>,
) -> Result<generate_reply::Event, Status> {
    let progress = |phase: v1::Phase, done: usize, total: usize| {
        let (done_tokens, total_tokens) = (done as u64, total as u64);
        generate_reply::Event::Progress(v1::Progress { phase: phase.into(), done_tokens, total_tokens })
    };
    Ok(match event {
        Event::Restoring { done, total } => progress(v1::Phase::Restore, done, total),
        Event::Prefilling { done, total } => progress(v1::Phase::Prefill, done, total),
        Event::Prompt { tokens, hit_tokens, stores, .. } => generate_reply::Event::Prompt(v1::PromptDone {
            prompt_tokens: tokens as u64,
            prompt_cache_hit_tokens: hit_tokens as u64,
            stores,
        }),
        Event::Token { id, text, logits_digest, .. } => generate_reply::Event::Token(v1::Token {
            id: id.0,
            text,
            logits_digest: logits_digest.map(|digest| Bytes::copy_from_slice(&digest)).unwrap_or_default(),
        }),
        Event::Done(account) => generate_reply::Event::Usage(usage(&account, &close(&account)?)),
    })
}

/// What is billed, and what it took this time.
fn usage(account: &Account, record: &v1::UsageRecord) -> v1::GenerateUsage {
    let parked = account.parked.unwrap_or_default().total;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    v1::GenerateUsage {
        usage_id: record.usage_id.clone(),
        prompt_tokens: record.prompt_tokens,
        prompt_cache_hit_tokens: record.hit_tokens,
        prompt_cache_miss_tokens: record.miss_tokens,
        cache_write_tokens: sums::written(&record.write_tokens.unwrap_or_default()),
        completion_tokens: account.completion_tokens as u64,
        replay_tokens: account.replayed_tokens as u64,
        bytes_read: account.bytes_read,
        guessed_tokens: account.guessed_tokens as u64,
        accepted_tokens: account.accepted_tokens as u64,
        parked_rows_picked: parked.rows_picked,
        parked_rows_in_pool: parked.pool_hits,
        parked_bytes_read: parked.bytes_fetched,
        restore_us: micros(account.restore),
        prefill_us: micros(account.prefill),
        rest_of_text: account.rest_of_text.clone(),
        stop_sequence: account.stop_sequence.clone().unwrap_or_default(),
        finish_reason: if account.stopped { v1::FinishReason::Stop } else { v1::FinishReason::Length }.into(),
    }
}

#[cfg(test)]
mod tests {
    use esker_decoder::KvFormat;
    use esker_store::StoreSettings;
    use tokio_stream::StreamExt;
    use v1::decoder_server::Decoder;

    use super::*;
    use crate::bundled;
    use crate::node::NodeSettings;
    use crate::users::MAX_USERS;

    #[tokio::test(flavor = "multi_thread")]
    async fn who_finds_no_room_is_answered_and_nothing_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() };
        let settings = NodeSettings { data: dir.path().to_owned(), store, ..NodeSettings::default() };
        let node = Node::open(&settings, Some(bundled::load(KvFormat::Bf16, 128).unwrap())).unwrap();
        let service = DecoderService::new(Arc::new(node));
        let stores = async |user: &str| {
            let prompt = Some(generate_request::Prompt::Text("In the beginning ".repeat(60)));
            let message =
                v1::GenerateRequest { prompt, max_new_tokens: 1, user: user.into(), ..Default::default() };
            let mut request = Request::new(message);
            request.extensions_mut().insert(Principal::local());
            let mut replies = service.generate(request).await.unwrap().into_inner();
            let (mut stores, mut ended) = (None, false);
            while let Some(reply) = replies.next().await {
                match reply.unwrap().event {
                    Some(generate_reply::Event::Prompt(done)) => stores = Some(done.stores),
                    Some(generate_reply::Event::Usage(_)) => ended = true,
                    _ => {}
                }
            }
            assert!(ended, "{user:?} had no answer");
            stores.unwrap()
        };
        assert!(stores("first").await);
        for number in 1..MAX_USERS {
            let tenants = &service.node.tenants;
            tenants.writable(&Principal::local(), &format!("user{number}"), v1::Scope::Private).unwrap();
        }
        assert!(!stores("too-many").await);
        assert!(stores("first").await && stores("").await);
    }
}
