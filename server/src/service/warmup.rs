//! `Warmup`: warm-up jobs over gRPC.

use std::sync::Arc;
use std::time::Duration;

use esker_prefix::{NamespaceId, TokenId};
use esker_proto::v1::{self, warmup_prompt};
use esker_proto::{PrefixNames, WireError, check_name, check_namespace_id, check_prefix, check_tokens};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::cache::blocking;
use super::decoder::{engine, tokenize};
use super::status::from_wire;
use crate::node::{Engine, Node};
use crate::principal::principal_of;
use crate::warmups::{Prompt, Submission};

/// Prompts of one job.
const MAX_PROMPTS: usize = 10_000;
/// Jobs in one answer.
const MAX_LISTED: usize = 1000;
/// Between two messages to one who watches.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// A client that takes nothing for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);

/// The service.
pub(crate) struct WarmupService {
    node: Arc<Node>,
}

impl WarmupService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl v1::warmup_server::Warmup for WarmupService {
    async fn submit_warmup(
        &self,
        request: Request<v1::SubmitWarmupRequest>,
    ) -> Result<Response<v1::WarmupJob>, Status> {
        let principal = principal_of(&request)?;
        let request = request.into_inner();
        let node = self.node.clone();
        blocking(move || {
            let engine = engine(&node)?;
            let dry_run = request.dry_run;
            let submission = submission(&Takes::of(engine), request)?;
            if dry_run {
                node.warmups.dry_run(&node, engine, &principal, &submission)
            } else {
                node.warmups.submit(&node, engine, &principal, &submission)
            }
        })
        .await
        .map(Response::new)
    }

    async fn get_warmup(
        &self,
        request: Request<v1::GetWarmupRequest>,
    ) -> Result<Response<v1::WarmupJob>, Status> {
        let principal = principal_of(&request)?;
        let name = request.into_inner().job;
        let node = self.node.clone();
        blocking(move || node.warmups.get(&principal.tenant, &name)).await.map(Response::new)
    }

    type WatchWarmupStream = ReceiverStream<Result<v1::WarmupJob, Status>>;

    async fn watch_warmup(
        &self,
        request: Request<v1::GetWarmupRequest>,
    ) -> Result<Response<Self::WatchWarmupStream>, Status> {
        let principal = principal_of(&request)?;
        let name = request.into_inner().job;
        let node = self.node.clone();
        let mut changes = node.warmups.watch(&principal.tenant, &name)?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let ended = changes.borrow_and_update().has_ended();
                let (asked, tenant, job) = (node.clone(), principal.tenant.clone(), name.clone());
                let now = blocking(move || asked.warmups.get(&tenant, &job)).await;
                let is_last = ended || now.is_err();
                if sender.send_timeout(now, IDLE_PROGRESS).await.is_err() || is_last {
                    return;
                }
                tokio::time::sleep(WATCH_INTERVAL).await;
                tokio::select! {
                    () = sender.closed() => return,
                    // Another job took its place, or it was forgotten: the next look tells.
                    _ = changes.changed() => {}
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn list_warmups(
        &self,
        request: Request<v1::ListWarmupsRequest>,
    ) -> Result<Response<v1::ListWarmupsReply>, Status> {
        let principal = principal_of(&request)?;
        let v1::ListWarmupsRequest { after, limit } = request.into_inner();
        let limit = if limit == 0 { MAX_LISTED } else { MAX_LISTED.min(limit as usize) };
        let node = self.node.clone();
        let jobs = blocking(move || Ok(node.warmups.list(&principal.tenant, &after, limit))).await?;
        Ok(Response::new(v1::ListWarmupsReply { jobs }))
    }

    async fn cancel_warmup(
        &self,
        request: Request<v1::CancelWarmupRequest>,
    ) -> Result<Response<v1::WarmupJob>, Status> {
        let principal = principal_of(&request)?;
        let name = request.into_inner().job;
        let node = self.node.clone();
        blocking(move || node.warmups.cancel(&principal.tenant, &name)).await.map(Response::new)
    }
}

/// What a node's model takes.
struct Takes<'a> {
    namespace: NamespaceId,
    /// Tokens.
    context: usize,
    vocabulary: usize,
    tokenize: Box<Tokenize<'a>>,
}

type Tokenize<'a> = dyn Fn(&str) -> Result<Vec<TokenId>, Status> + 'a;

impl<'a> Takes<'a> {
    fn of(engine: &'a Engine) -> Self {
        let config = engine.loaded.model.config();
        Self {
            namespace: engine.namespace,
            context: config.max_position_embeddings,
            vocabulary: config.vocab_size,
            tokenize: Box::new(|text| tokenize(engine, text)),
        }
    }
}

fn submission(takes: &Takes<'_>, request: v1::SubmitWarmupRequest) -> Result<Submission, Status> {
    check_name("job", &request.job).map_err(from_wire)?;
    let (scope, ttl) = (request.scope(), request.ttl());
    if !request.namespace.is_empty() {
        let namespace = check_namespace_id(&request.namespace).map_err(from_wire)?;
        if namespace != takes.namespace {
            return Err(Status::failed_precondition(format!(
                "this node computes namespace {} only: send the job to a node with the model of {namespace}",
                takes.namespace
            )));
        }
    }
    let (limit, got) = (MAX_PROMPTS, request.prompts.len());
    match got {
        0 => return Err(from_wire(WireError::Empty("prompts"))),
        _ if got > limit => {
            return Err(from_wire(WireError::TooLarge { field: "prompts", unit: "prompts", limit, got }));
        }
        _ => {}
    }
    let prompts = (1..).zip(request.prompts).map(|(number, one)| {
        prompt(takes, one)
            .map_err(|status| Status::new(status.code(), format!("prompt {number}: {}", status.message())))
    });
    Ok(Submission {
        name: request.job,
        prompts: prompts.collect::<Result<_, _>>()?,
        scope,
        ttl,
        user: request.user,
        max_tokens: request.max_tokens,
        max_bytes: request.max_bytes,
        deadline_s: request.deadline_s,
        priority: request.priority,
        resume: request.resume,
    })
}

fn prompt(takes: &Takes<'_>, prompt: v1::WarmupPrompt) -> Result<Prompt, Status> {
    let Takes { context, vocabulary, .. } = *takes;
    let tokens = match prompt.prompt.ok_or(WireError::Missing("prompt")).map_err(from_wire)? {
        warmup_prompt::Prompt::Tokens(tokens) => check_tokens(tokens.ids).map_err(from_wire)?,
        warmup_prompt::Prompt::Text(text) => (takes.tokenize)(&text)?,
        warmup_prompt::Prompt::Chain(v1::WarmupChain { hashes }) => {
            let names = check_prefix(Vec::new(), &hashes, Vec::new(), Vec::new(), false);
            let PrefixNames::Hashes(hashes, _) = names.map_err(from_wire)? else {
                return Err(from_wire(WireError::Empty("hashes")));
            };
            return Ok(Prompt::Chain(hashes));
        }
    };
    if let Some(unknown) = tokens.iter().find(|token| token.0 as usize >= vocabulary) {
        return Err(Status::invalid_argument(format!(
            "token {} is not one of the model's {vocabulary}",
            unknown.0
        )));
    }
    if tokens.len() > context {
        return Err(Status::invalid_argument(format!(
            "it has {} tokens, and the model's context {context}",
            tokens.len()
        )));
    }
    Ok(Prompt::Tokens(tokens))
}

/// For fuzzing: a job that is submitted, or one that is asked for. Whether it may be one for a model of 4,096 tokens and as long a context.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use esker_proto::MAX_CHAIN_BLOCKS;
    use prost::Message;
    let tokenize = |text: &str| check_tokens(text.bytes().map(u32::from).collect()).map_err(from_wire);
    let takes = Takes {
        namespace: NamespaceId([0x11; 32]),
        context: 4096,
        vocabulary: 4096,
        tokenize: Box::new(tokenize),
    };
    let submitted =
        v1::SubmitWarmupRequest::decode(bytes).ok().and_then(|request| submission(&takes, request).ok());
    let _ = (v1::GetWarmupRequest::decode(bytes), v1::ListWarmupsRequest::decode(bytes));
    let Some(Submission { name, prompts, ttl, .. }) = submitted else { return false };
    let _ = super::ttl_class(ttl);
    assert!(!name.is_empty() && !prompts.is_empty() && prompts.len() <= MAX_PROMPTS);
    for prompt in &prompts {
        match prompt {
            Prompt::Tokens(tokens) => {
                assert!((1..=4096).contains(&tokens.len()) && tokens.iter().all(|token| token.0 < 4096));
            }
            Prompt::Chain(hashes) => assert!((1..=MAX_CHAIN_BLOCKS).contains(&hashes.len())),
        }
    }
    true
}
