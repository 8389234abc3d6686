//! Anthropic's API over the bundled decoder: `/v1/messages` and `/v1/messages/count_tokens`.
//!
//! A prefix is cached whether or not a request marks it with `cache_control`; what the marks say is for how long: the longest
//! `ttl` among them (Anthropic's `5m`, which stands for none, and `1h`; here also `24h` and `72h`). Without a mark it is the
//! node's default. Usage is additive, as there: `input_tokens + cache_read_input_tokens + cache_creation_input_tokens` is the
//! prompt.

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use esker_proto::v1;
use serde::Deserialize;
use serde_json::{Value, json};

use super::completion::{Ask, Completion, Ended, Step, engine_of, random};
use super::failure::{Failure, Shape};
use super::prompt::prompt;
use super::{Site, body, sse};
use crate::chat_template::conversation::{Conversation, Message, Role, ToolCall};
use crate::chat_template::tool_call;
use crate::principal::Principal;
use crate::replay::Owner;

#[derive(Deserialize)]
struct Asked {
    model: String,
    max_tokens: Option<u32>,
    messages: Vec<Said>,
    system: Option<Content>,
    #[serde(default)]
    tools: Vec<Tool>,
    tool_choice: Option<Value>,
    stream: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    #[serde(default)]
    stop_sequences: Vec<String>,
    cache_control: Option<CacheControl>,
    thinking: Option<Value>,
}

#[derive(Deserialize)]
struct Said {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Blocks(Vec<Block>),
}

#[derive(Deserialize)]
struct Block {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    id: Option<String>,
    name: Option<String>,
    input: Option<Value>,
    tool_use_id: Option<String>,
    content: Option<Box<Content>>,
    cache_control: Option<CacheControl>,
}

#[derive(Deserialize)]
struct Tool {
    name: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    input_schema: Value,
    cache_control: Option<CacheControl>,
}

#[derive(Deserialize)]
struct CacheControl {
    ttl: Option<String>,
}

impl Asked {
    fn check(&self) -> Result<(), Failure> {
        if self.messages.is_empty() {
            return Err(Failure::invalid("messages: at least one message is required"));
        }
        if self.top_k.is_some_and(|top_k| top_k > 0) {
            return Err(Failure::invalid("top_k: the decoder samples by temperature and top_p"));
        }
        let kind = |value: &Option<Value>| {
            value.as_ref().and_then(|value| value.get("type")?.as_str().map(str::to_owned))
        };
        if kind(&self.thinking).is_some_and(|kind| kind != "disabled") {
            return Err(Failure::invalid("thinking: the model does not think apart from what it says"));
        }
        if kind(&self.tool_choice).is_some_and(|kind| kind != "auto" && kind != "none") {
            return Err(Failure::invalid(
                "tool_choice: auto or none; the decoder cannot be made to call a tool",
            ));
        }
        Ok(())
    }

    /// The longest that a mark asks for.
    fn ttl(&self) -> Result<v1::TtlClass, Failure> {
        let mut marks: Vec<&CacheControl> = self.cache_control.iter().collect();
        self.system.iter().for_each(|content| content.marks(&mut marks));
        self.messages.iter().for_each(|said| said.content.marks(&mut marks));
        marks.extend(self.tools.iter().filter_map(|tool| tool.cache_control.as_ref()));
        let classes = marks.into_iter().map(|mark| match mark.ttl.as_deref() {
            None | Some("5m") => Ok(v1::TtlClass::TtlClass5m),
            Some("1h") => Ok(v1::TtlClass::TtlClass1h),
            Some("24h") => Ok(v1::TtlClass::TtlClass24h),
            Some("72h") => Ok(v1::TtlClass::TtlClass72h),
            Some(other) => Err(Failure::invalid(format!(
                "cache_control.ttl: \"5m\", \"1h\", \"24h\" or \"72h\", not {other:?}"
            ))),
        });
        classes.into_iter().try_fold(v1::TtlClass::Unspecified, |longest, class| Ok(longest.max(class?)))
    }

    fn conversation(&mut self) -> Result<Conversation, Failure> {
        let mut messages = Vec::new();
        if let Some(system) = self.system.take() {
            messages.push(Message::new(Role::System, system.text("system")?));
        }
        for (at, said) in std::mem::take(&mut self.messages).into_iter().enumerate() {
            said.messages(at, &mut messages)?;
        }
        let none = self.tool_choice.as_ref().is_some_and(|choice| choice["type"] == "none");
        let tools = std::mem::take(&mut self.tools).into_iter().filter(|_| !none).map(|tool| {
            let Tool { name, description, input_schema, .. } = tool;
            let function = json!({"name": name, "description": description, "parameters": input_schema});
            json!({"type": "function", "function": function})
        });
        Ok(Conversation { messages, tools: tools.collect() })
    }
}

impl Content {
    fn marks<'a>(&'a self, marks: &mut Vec<&'a CacheControl>) {
        if let Self::Blocks(blocks) = self {
            for block in blocks {
                marks.extend(&block.cache_control);
                block.content.iter().for_each(|content| content.marks(marks));
            }
        }
    }

    /// Of text alone.
    fn text(self, at: &str) -> Result<String, Failure> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Blocks(blocks) => blocks.into_iter().map(|block| block.text(at)).collect(),
        }
    }
}

impl Block {
    fn text(self, at: &str) -> Result<String, Failure> {
        let unread =
            || Failure::invalid(format!("{at}: the model reads text, and this block is {:?}", self.kind));
        self.text.clone().ok_or_else(unread)
    }
}

impl Said {
    /// A message's blocks as messages: what tools answered stands for itself.
    fn messages(self, at: usize, messages: &mut Vec<Message>) -> Result<(), Failure> {
        let role = match self.role.as_str() {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => {
                return Err(Failure::invalid(format!(
                    "messages.{at}.role: user or assistant, not {other:?}"
                )));
            }
        };
        let at = format!("messages.{at}.content");
        let blocks = match self.content {
            Content::Text(text) => {
                messages.push(Message::new(role, text));
                return Ok(());
            }
            Content::Blocks(blocks) => blocks,
        };
        let mut message = Message::new(role, "");
        for block in blocks {
            match block.kind.as_str() {
                "tool_use" => {
                    let (Some(id), Some(name)) = (block.id, block.name) else {
                        return Err(Failure::invalid(format!("{at}: a tool_use has an id and a name")));
                    };
                    message.tool_calls.push(ToolCall::new(id, name, block.input.unwrap_or_default()));
                }
                "tool_result" => {
                    let text = block.content.map_or(Ok(String::new()), |content| content.text(&at))?;
                    let id = block.tool_use_id;
                    messages.push(Message { tool_call_id: id, ..Message::new(Role::Tool, text) });
                }
                // What an assistant thought is not given to it again.
                "thinking" | "redacted_thinking" => {}
                _ => message.content.push_str(&block.text(&at)?),
            }
        }
        if !message.content.is_empty() || !message.tool_calls.is_empty() {
            messages.push(message);
        }
        Ok(())
    }
}

/// For fuzzing: everything that is checked of a request before the model is asked.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn hear(body: &[u8]) -> Result<Conversation, Failure> {
    let mut asked: Asked = body::parse(body)?;
    asked.check()?;
    asked.ttl()?;
    asked.conversation()
}

/// The handler of `/v1/messages`.
pub(super) async fn messages(
    State(site): State<Site>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Result<Response, Failure> {
    answer(site, principal, request).await.map_err(|failure| failure.shaped(Shape::Anthropic))
}

/// The handler of `/v1/messages/count_tokens`.
pub(super) async fn count_tokens(
    State(site): State<Site>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Result<Json<Value>, Failure> {
    let count = async {
        let mut asked: Asked = body::json(request).await?;
        asked.check()?;
        engine_of(&site, &asked.model)?;
        let owner = site.node.tenants.reminded(&principal.tenant);
        Ok(prompt(&site, &owner, asked.conversation()?).await?.len())
    };
    let count = count.await.map_err(|failure: Failure| failure.shaped(Shape::Anthropic))?;
    Ok(Json(json!({"input_tokens": count})))
}

async fn answer(site: Site, principal: Principal, request: Request) -> Result<Response, Failure> {
    let mut asked: Asked = body::json(request).await?;
    asked.check()?;
    let ttl = asked.ttl()?;
    let max_tokens = asked.max_tokens.ok_or_else(|| Failure::invalid("max_tokens: field required"))?;
    let engine = engine_of(&site, &asked.model)?;
    let conversation = asked.conversation()?;
    let offered = !conversation.tools.is_empty();
    let mut stops = asked.stop_sequences.clone();
    stops.extend(engine.loaded.template.stops());
    let owner = site.node.tenants.reminded(&principal.tenant);
    let ask = Ask {
        prompt: prompt(&site, &owner, conversation).await?,
        max_tokens: Some(max_tokens),
        temperature: asked.temperature,
        top_p: asked.top_p,
        stops,
        ttl,
        ..Ask::default()
    };
    let block_tokens = u64::from(engine.loaded.model.layout().block_tokens());
    let reply = Reply {
        id: format!("msg_{:016x}{:016x}", random(), random()),
        model: asked.model,
        asked_stops: asked.stop_sequences,
        ttl,
        block_tokens,
        offered,
        owner: owner.clone(),
        site: site.clone(),
    };
    let completion = Completion::start(&site, principal, owner, ask).await?;
    if asked.stream.unwrap_or(false) {
        return Ok(sse::response(|events| write(events, completion, reply)));
    }
    let ended = completion.whole().await?;
    let (content, reason, stop) = reply.ended(&ended);
    let usage = reply.usage(&ended.usage);
    Ok(Json(reply.message(content, Some(reason), stop, usage)).into_response())
}

/// What an answer is made of besides what was generated.
struct Reply {
    id: String,
    model: String,
    /// Those that the caller named, and not the template's own.
    asked_stops: Vec<String>,
    ttl: v1::TtlClass,
    block_tokens: u64,
    offered: bool,
    owner: Owner,
    site: Site,
}

impl Reply {
    fn message(&self, content: Vec<Value>, reason: Option<&str>, stop: Option<&str>, usage: Value) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        })
    }

    /// Content, reason and stop sequence of an answer.
    fn ended<'a>(&self, ended: &'a Ended) -> (Vec<Value>, &'static str, Option<&'a str>) {
        let (text, calls) =
            if self.offered { tool_call::split(&ended.text) } else { (ended.text.as_str(), vec![]) };
        let mut content = Vec::new();
        if !text.is_empty() || calls.is_empty() {
            content.push(json!({"type": "text", "text": text}));
        }
        let called = !calls.is_empty();
        for (at, call) in calls.into_iter().enumerate() {
            let id = format!("toolu_{:016x}", random());
            if at == 0 {
                self.site.node.replay.remember_call(&self.owner, &id, &ended.text);
            }
            content.push(json!({"type": "tool_use", "id": id, "name": call.name, "input": call.arguments}));
        }
        let (reason, stop) = self.reason(&ended.usage);
        (content, if called { "tool_use" } else { reason }, stop)
    }

    fn reason<'a>(&self, usage: &'a v1::GenerateUsage) -> (&'static str, Option<&'a str>) {
        let stop =
            Some(usage.stop_sequence.as_str()).filter(|stop| self.asked_stops.iter().any(|one| one == stop));
        match (usage.finish_reason(), stop) {
            (v1::FinishReason::Length, _) => ("max_tokens", None),
            (_, Some(stop)) => ("stop_sequence", Some(stop)),
            _ => ("end_turn", None),
        }
    }

    fn usage(&self, usage: &v1::GenerateUsage) -> Value {
        let (prompt, hit) = (usage.prompt_tokens, usage.prompt_cache_hit_tokens);
        // Of what was written, the part that is this prompt's.
        let written = usage.cache_write_tokens.min(self.whole_blocks(prompt).saturating_sub(hit));
        self.additive(prompt, hit, written, usage.completion_tokens)
    }

    /// Before anything is generated: whole blocks that are computed are going to be written.
    fn first_usage(&self, done: &v1::PromptDone) -> Value {
        let (prompt, hit) = (done.prompt_tokens, done.prompt_cache_hit_tokens);
        let writes = if done.stores { self.whole_blocks(prompt).saturating_sub(hit) } else { 0 };
        self.additive(prompt, hit, writes, 0)
    }

    fn whole_blocks(&self, tokens: u64) -> u64 {
        tokens / self.block_tokens * self.block_tokens
    }

    fn additive(&self, prompt: u64, hit: u64, written: u64, output: u64) -> Value {
        let mut by_class = json!({"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0});
        let class = match self.ttl {
            v1::TtlClass::TtlClass5m => "ephemeral_5m_input_tokens",
            v1::TtlClass::TtlClass1h => "ephemeral_1h_input_tokens",
            // The node's default is a day.
            v1::TtlClass::TtlClass24h | v1::TtlClass::Unspecified => "ephemeral_24h_input_tokens",
            v1::TtlClass::TtlClass72h => "ephemeral_72h_input_tokens",
        };
        by_class[class] = written.into();
        json!({
            "input_tokens": prompt - hit - written,
            "cache_read_input_tokens": hit,
            "cache_creation_input_tokens": written,
            "cache_creation": by_class,
            "output_tokens": output,
        })
    }
}

/// Events as Anthropic's library expects them: a message begins, its blocks begin, grow and end, the message ends.
async fn write(events: sse::Events, mut completion: Completion, reply: Reply) -> Result<(), sse::Gone> {
    loop {
        let step = tokio::select! {
            step = completion.next() => step,
            () = events.gone() => return Err(sse::Gone),
        };
        match step {
            Ok(Some(Step::Prompt(done))) => {
                let message = reply.message(Vec::new(), None, None, reply.first_usage(&done));
                events.named("message_start", &json!({"type": "message_start", "message": message})).await?;
                if !reply.offered {
                    start_block(&events, 0, &json!({"type": "text", "text": ""})).await?;
                }
            }
            Ok(Some(Step::Text(text))) if !reply.offered => text_delta(&events, 0, &text).await?,
            // What may be a call is shown when it is whole.
            Ok(Some(Step::Text(_))) => {}
            Ok(Some(Step::End(ended))) => {
                let (content, reason, stop) = reply.ended(&ended);
                if reply.offered {
                    for (at, block) in content.iter().enumerate() {
                        whole_block(&events, at, block).await?;
                    }
                } else {
                    text_delta(&events, 0, &ended.rest).await?;
                    stop_block(&events, 0).await?;
                }
                let delta = json!({
                    "type": "message_delta",
                    "delta": {"stop_reason": reason, "stop_sequence": stop},
                    "usage": reply.usage(&ended.usage),
                });
                events.named("message_delta", &delta).await?;
                events.named("message_stop", &json!({"type": "message_stop"})).await?;
            }
            Ok(None) => return Ok(()),
            Err(failure) => return events.named("error", &failure.shaped(Shape::Anthropic).body()).await,
        }
    }
}

async fn whole_block(events: &sse::Events, at: usize, block: &Value) -> Result<(), sse::Gone> {
    if block["type"] == "text" {
        start_block(events, at, &json!({"type": "text", "text": ""})).await?;
        text_delta(events, at, block["text"].as_str().unwrap_or_default()).await?;
    } else {
        let mut empty = block.clone();
        empty["input"] = json!({});
        start_block(events, at, &empty).await?;
        let delta = json!({"type": "input_json_delta", "partial_json": block["input"].to_string()});
        block_delta(events, at, &delta).await?;
    }
    stop_block(events, at).await
}

async fn start_block(events: &sse::Events, at: usize, block: &Value) -> Result<(), sse::Gone> {
    let start = json!({"type": "content_block_start", "index": at, "content_block": block});
    events.named("content_block_start", &start).await
}

async fn text_delta(events: &sse::Events, at: usize, text: &str) -> Result<(), sse::Gone> {
    if text.is_empty() {
        return Ok(());
    }
    block_delta(events, at, &json!({"type": "text_delta", "text": text})).await
}

async fn block_delta(events: &sse::Events, at: usize, delta: &Value) -> Result<(), sse::Gone> {
    let delta = json!({"type": "content_block_delta", "index": at, "delta": delta});
    events.named("content_block_delta", &delta).await
}

async fn stop_block(events: &sse::Events, at: usize) -> Result<(), sse::Gone> {
    events.named("content_block_stop", &json!({"type": "content_block_stop", "index": at})).await
}
