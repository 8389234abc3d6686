//! The decoder: describe, tokenize, generate.

use esker_prefix::TokenId;
use esker_proto::{WireError, v1};

use crate::{Client, Result};

/// What to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text, for the node's tokenizer.
    Text(String),
    /// Tokens.
    Tokens(Vec<TokenId>),
}

/// What to generate. [`Request::new`] asks for greedy decoding of the server's default length.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Longest continuation, in tokens; 0 for the server's default.
    pub max_new_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus sampling; 0 for all tokens.
    pub top_p: f32,
    /// Seed of the sampler.
    pub seed: u64,
    /// Whether to send a digest of the logits with every token.
    pub logits_digest: bool,
    /// The user of the tenant for whom this is; empty for none.
    pub user: String,
    /// How long what is computed is kept.
    pub ttl: v1::TtlClass,
    /// Name of the request in the usage ledger; empty for one of the server's own.
    pub request_id: String,
}

impl Request {
    /// Greedy decoding of `prompt`.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            max_new_tokens: 0,
            temperature: 0.0,
            top_p: 0.0,
            seed: 0,
            logits_digest: false,
            user: String::new(),
            ttl: v1::TtlClass::Unspecified,
            request_id: String::new(),
        }
    }
}

/// One event of a generation.
pub type Event = v1::generate_reply::Event;

/// The events of a generation, in order; the last is `Usage`. Dropping it cancels the generation.
pub struct Events(tonic::Streaming<v1::GenerateReply>);

impl Events {
    /// The next event, `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        match self.0.message().await? {
            None => Ok(None),
            Some(reply) => Ok(Some(reply.event.ok_or(WireError::Missing("event"))?)),
        }
    }
}

impl Client {
    /// What the node decodes with.
    pub async fn describe(&self) -> Result<v1::DescribeReply> {
        Ok(self.decoder.clone().describe(v1::DescribeRequest {}).await?.into_inner())
    }

    /// Text to tokens, with the node's tokenizer.
    pub async fn tokenize(&self, text: &str) -> Result<Vec<TokenId>> {
        let reply = self.decoder.clone().tokenize(v1::TokenizeRequest { text: text.to_owned() }).await?;
        Ok(reply.into_inner().tokens.into_iter().map(TokenId).collect())
    }

    /// Continues a prompt.
    pub async fn generate(&self, request: Request) -> Result<Events> {
        use v1::generate_request::Prompt as Wire;
        let prompt = match request.prompt {
            Prompt::Text(text) => Wire::Text(text),
            Prompt::Tokens(tokens) => {
                Wire::Tokens(v1::Tokens { ids: tokens.into_iter().map(|token| token.0).collect() })
            }
        };
        let message = v1::GenerateRequest {
            prompt: Some(prompt),
            max_new_tokens: request.max_new_tokens,
            temperature: request.temperature,
            top_p: request.top_p,
            seed: request.seed,
            logits_digest: request.logits_digest,
            user: request.user,
            ttl: request.ttl.into(),
            request_id: request.request_id,
            ..Default::default()
        };
        Ok(Events(self.decoder.clone().generate(message).await?.into_inner()))
    }
}
