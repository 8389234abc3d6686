//! One completion: asks the decoder's service, as a gRPC client would, and gathers what comes back.

use std::hash::{BuildHasher, RandomState};

use esker_prefix::TokenId;
use esker_proto::v1;
use esker_proto::v1::decoder_server::Decoder;
use esker_proto::v1::{generate_reply, generate_request};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::Site;
use super::failure::Failure;
use crate::node::Engine;
use crate::principal::Principal;
use crate::replay::Owner;

/// New tokens where the caller does not say.
pub(super) const DEFAULT_NEW_TOKENS: u32 = 256;
/// Stop sequences of one request.
const MAX_STOPS: usize = 16;
/// Longest of them, in bytes.
const MAX_STOP_BYTES: usize = 256;

/// What to complete. Fields that no API sets are as over gRPC.
#[derive(Clone, Debug, Default)]
pub(super) struct Ask {
    pub(super) prompt: Vec<TokenId>,
    pub(super) max_tokens: Option<u32>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) seed: Option<u64>,
    pub(super) stops: Vec<String>,
    /// Sub-scope of the tenant.
    pub(super) user: String,
    pub(super) ttl: v1::TtlClass,
}

/// A completion under way. Dropping it stops the decoder.
pub(super) struct Completion {
    site: Site,
    owner: Owner,
    replies: ReceiverStream<Result<v1::GenerateReply, Status>>,
    prompt: Vec<TokenId>,
    text: String,
    sampled: Vec<TokenId>,
    ended: bool,
}

/// What comes of it, in this order.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and the large one is the last")]
pub(super) enum Step {
    /// The prompt is computed: its tokens, and those of them that came from the cache.
    Prompt(v1::PromptDone),
    Text(String),
    End(Ended),
}

/// How it ended.
pub(super) struct Ended {
    pub(super) usage: v1::GenerateUsage,
    /// Text that had not been given out yet.
    pub(super) rest: String,
    /// All of it.
    pub(super) text: String,
}

impl Ask {
    pub(super) fn check(&self) -> Result<(), Failure> {
        let long = self.stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES);
        if long || self.stops.len() > MAX_STOPS {
            let rule = format!("at most {MAX_STOPS} stop sequences of 1 to {MAX_STOP_BYTES} bytes");
            return Err(Failure::invalid(rule).about("stop"));
        }
        Ok(())
    }
}

impl Completion {
    pub(super) async fn start(
        site: &Site,
        principal: Principal,
        owner: Owner,
        ask: Ask,
    ) -> Result<Self, Failure> {
        ask.check()?;
        let context = engine(site)?.loaded.model.config().max_position_embeddings;
        if ask.prompt.len() >= context {
            return Err(Failure::too_long(ask.prompt.len(), context));
        }
        // The wire has 0 for "not set", here it means what it says.
        let max_new_tokens = ask.max_tokens.unwrap_or(DEFAULT_NEW_TOKENS);
        if max_new_tokens == 0 {
            return Err(Failure::invalid("`max_tokens` must be at least 1").about("max_tokens"));
        }
        let message = v1::GenerateRequest {
            prompt: Some(generate_request::Prompt::Tokens(v1::Tokens {
                ids: ask.prompt.iter().map(|token| token.0).collect(),
            })),
            max_new_tokens,
            temperature: ask.temperature.unwrap_or(1.0),
            top_p: ask.top_p.unwrap_or(1.0).max(f32::MIN_POSITIVE),
            seed: ask.seed.unwrap_or_else(random),
            user: ask.user,
            ttl: ask.ttl.into(),
            stop: ask.stops,
            ..Default::default()
        };
        let mut request = Request::new(message);
        request.extensions_mut().insert(principal);
        let replies = site.decoder.generate(request).await?.into_inner();
        let (text, sampled) = (String::new(), Vec::new());
        Ok(Self { site: site.clone(), owner, replies, prompt: ask.prompt, text, sampled, ended: false })
    }

    /// `None` after the end: what breaks off before it is a failure, or part of an answer would pass for all of it.
    pub(super) async fn next(&mut self) -> Result<Option<Step>, Failure> {
        loop {
            let Some(reply) = self.replies.next().await else {
                let broke_off = || Failure::broken("the generation broke off; the node's log says why");
                return if self.ended { Ok(None) } else { Err(broke_off()) };
            };
            match reply?.event {
                Some(generate_reply::Event::Prompt(done)) => return Ok(Some(Step::Prompt(done))),
                Some(generate_reply::Event::Token(token)) => {
                    self.sampled.push(TokenId(token.id));
                    if !token.text.is_empty() {
                        self.text.push_str(&token.text);
                        return Ok(Some(Step::Text(token.text)));
                    }
                }
                Some(generate_reply::Event::Usage(mut usage)) => {
                    let rest = std::mem::take(&mut usage.rest_of_text);
                    self.text.push_str(&rest);
                    self.remember()?;
                    self.ended = true;
                    return Ok(Some(Step::End(Ended { usage, rest, text: std::mem::take(&mut self.text) })));
                }
                Some(generate_reply::Event::Progress(_)) | None => {}
            }
        }
    }

    /// Runs to the end.
    pub(super) async fn whole(mut self) -> Result<Ended, Failure> {
        loop {
            if let Some(Step::End(ended)) = self.next().await? {
                return Ok(ended);
            }
        }
    }

    fn remember(&self) -> Result<(), Failure> {
        let engine = engine(&self.site)?;
        let (replay, tokenizer) = (&self.site.node.replay, &engine.loaded.tokenizer);
        let remembered = replay.remember(&self.owner, tokenizer, &self.prompt, &self.text, &self.sampled);
        remembered.map_err(|error| Failure::broken(error.to_string()))
    }
}

/// The node's decoder.
pub(super) fn engine(site: &Site) -> Result<&Engine, Failure> {
    site.node.engine.as_ref().ok_or_else(|| Failure::unknown_model("", None))
}

/// The decoder, if it has the model that was asked for.
pub(super) fn engine_of<'a>(site: &'a Site, model: &str) -> Result<&'a Engine, Failure> {
    let served = site.node.engine.as_ref().map(|engine| engine.loaded.name.as_str());
    if served != Some(model) {
        return Err(Failure::unknown_model(model, served));
    }
    engine(site)
}

/// The sub-scope that a caller's key stands for: itself where it is a name, its digest otherwise.
pub(super) fn sub_scope(key: Option<String>) -> String {
    match key {
        None => String::new(),
        Some(key) if key.is_empty() || crate::principal::is_name(&key) => key,
        Some(key) => format!("key:{}", blake3::hash(key.as_bytes()).to_hex()),
    }
}

/// A number that nobody can foresee, for seeds and names.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(std::time::Instant::now())
}
