//! OpenAI's API over the bundled decoder: `/v1/models`, `/v1/completions` and `/v1/chat/completions`.
//!
//! Usage is reported in both shapes that clients know: `prompt_tokens_details.cached_tokens`, and DeepSeek's
//! `prompt_cache_hit_tokens` and `prompt_cache_miss_tokens`. `prompt_cache_key` names a user below the tenant, whose blocks are
//! its own; `prompt_cache_retention` and `prompt_cache_options.ttl` say for how long they are kept, the longer of the two. What would change the answer and is not done here is
//! refused; what only asks for convenience or bookkeeping is ignored.

mod chat;
mod text;

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use esker_proto::v1;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Site;
use super::completion::{Ask, random, sub_scope};
use super::failure::Failure;
pub(super) use chat::chat;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) use chat::hear as hear_chat;
pub(super) use text::completions;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) use text::hear as hear_text;

/// `GET /v1/models`. Anthropic's library asks here as well: each finds its fields.
pub(super) async fn models(State(site): State<Site>) -> Json<Value> {
    let models: Vec<Value> = model(&site).into_iter().collect();
    let id = models.first().map(|model| model["id"].clone());
    Json(json!({"object": "list", "data": models, "has_more": false, "first_id": id, "last_id": id}))
}

/// `GET /v1/models/{model}`.
pub(super) async fn one_model(
    State(site): State<Site>,
    Path(asked): Path<String>,
) -> Result<Json<Value>, Failure> {
    super::completion::engine_of(&site, &asked)?;
    Ok(Json(model(&site).unwrap_or_default()))
}

fn model(site: &Site) -> Option<Value> {
    let engine = site.node.engine.as_ref()?;
    let name = &engine.loaded.name;
    Some(json!({
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "esker",
        "max_model_len": engine.loaded.model.config().max_position_embeddings,
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
    }))
}

/// Fields that both kinds of completion have.
#[derive(Debug, Deserialize)]
struct Common {
    model: String,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    stop: Option<Stop>,
    prompt_cache_key: Option<String>,
    prompt_cache_retention: Option<String>,
    prompt_cache_options: Option<CacheOptions>,
    n: Option<u32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<Value>,
    logprobs: Option<Value>,
    top_logprobs: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct CacheOptions {
    ttl: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Common {
    /// Refuses what would give another answer than the caller expects.
    fn check(&self) -> Result<(), Failure> {
        if self.n.is_some_and(|n| n != 1) {
            return Err(Failure::unsupported("n", "one choice for each request; send it n times"));
        }
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if value.is_some_and(|value| value != 0.0) {
                return Err(Failure::unsupported(
                    name,
                    "the decoder samples without penalties; leave it at 0",
                ));
            }
        }
        for (name, value) in [
            ("logit_bias", &self.logit_bias),
            ("logprobs", &self.logprobs),
            ("top_logprobs", &self.top_logprobs),
        ] {
            let asked = match value {
                None | Some(Value::Null | Value::Bool(false)) => false,
                Some(Value::Object(fields)) => !fields.is_empty(),
                Some(_) => true,
            };
            if asked {
                return Err(Failure::unsupported(name, "the decoder gives out tokens, not their odds"));
            }
        }
        Ok(())
    }

    fn wants_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// Everything but the prompt.
    fn ask(self) -> Result<Ask, Failure> {
        let at_least = self.prompt_cache_options.and_then(|options| options.ttl);
        let ttl = retention("prompt_cache_retention", self.prompt_cache_retention.as_deref())?
            .max(retention("prompt_cache_options.ttl", at_least.as_deref())?);
        Ok(Ask {
            prompt: Vec::new(),
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed.map(i64::cast_unsigned),
            stops: match self.stop {
                None => Vec::new(),
                Some(Stop::One(one)) => vec![one],
                Some(Stop::Many(many)) => many,
            },
            user: sub_scope(self.prompt_cache_key),
            ttl,
        })
    }
}

/// OpenAI's own, each in the class that keeps it as long, and this store's four.
fn retention(param: &str, asked: Option<&str>) -> Result<v1::TtlClass, Failure> {
    Ok(match asked {
        None => v1::TtlClass::Unspecified,
        Some("5m") => v1::TtlClass::TtlClass5m,
        Some("1h" | "30m" | "in_memory" | "in-memory") => v1::TtlClass::TtlClass1h,
        Some("24h") => v1::TtlClass::TtlClass24h,
        Some("72h") => v1::TtlClass::TtlClass72h,
        Some(other) => {
            return Err(Failure::invalid(format!(
                "`{param}` must be \"in_memory\" or \"30m\" (one hour), \"5m\", \"1h\", \"24h\" or \"72h\", not {other:?}"
            ))
            .about(param));
        }
    })
}

/// Fields that every object of one answer has.
fn head(kind: &str, id: &str, site: &Site) -> Value {
    let engine = site.node.engine.as_ref();
    json!({
        "id": id,
        "object": kind,
        "created": SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        "model": engine.map(|engine| engine.loaded.name.as_str()),
        // What decides the bytes of every answer.
        "system_fingerprint": engine.map(|engine| format!("esker-{}", &engine.namespace.to_hex()[..8])),
    })
}

/// `head` with more fields.
fn with(head: &Value, fields: Value) -> Value {
    let mut whole = head.clone();
    if let (Value::Object(whole), Value::Object(fields)) = (&mut whole, fields) {
        whole.extend(fields);
    }
    whole
}

fn new_id(prefix: &str) -> String {
    format!("{prefix}-{:016x}{:016x}", random(), random())
}

fn usage(usage: &v1::GenerateUsage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.prompt_cache_hit_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
        "prompt_cache_hit_tokens": usage.prompt_cache_hit_tokens,
        "prompt_cache_miss_tokens": usage.prompt_cache_miss_tokens,
        "usage_id": usage.usage_id,
    })
}

fn finish_reason(usage: &v1::GenerateUsage) -> &'static str {
    match usage.finish_reason() {
        v1::FinishReason::Length => "length",
        _ => "stop",
    }
}
