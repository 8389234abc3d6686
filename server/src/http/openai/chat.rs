//! `POST /v1/chat/completions`: a conversation continued.

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Common, finish_reason, head, new_id, usage, with};
use crate::chat_template::conversation::{Conversation, Message, Role, ToolCall};
use crate::chat_template::tool_call;
use crate::http::completion::{Completion, Ended, Step, engine_of, random};
use crate::http::failure::Failure;
use crate::http::prompt::prompt;
use crate::http::{Site, body, sse};
use crate::principal::Principal;
use crate::replay::Owner;

#[derive(Deserialize)]
struct Asked {
    #[serde(flatten)]
    common: Common,
    messages: Vec<Said>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    /// What came before `tools`.
    functions: Option<Vec<Value>>,
    response_format: Option<Value>,
}

#[derive(Deserialize)]
struct Said {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<Called>>,
    tool_call_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
    refusal: Option<String>,
}

#[derive(Deserialize)]
struct Called {
    id: String,
    function: CalledFunction,
}

#[derive(Deserialize)]
struct CalledFunction {
    name: String,
    #[serde(default)]
    arguments: String,
}

impl Asked {
    fn conversation(&mut self) -> Result<Conversation, Failure> {
        if self.messages.is_empty() {
            return Err(Failure::invalid("`messages` must have at least one message").about("messages"));
        }
        let format =
            self.response_format.as_ref().and_then(|format| format.get("type")).and_then(Value::as_str);
        if format.is_some_and(|format| format != "text") {
            return Err(Failure::unsupported(
                "response_format",
                "the decoder writes text and follows no grammar",
            ));
        }
        if self.parallel_tool_calls == Some(false) {
            return Err(Failure::unsupported(
                "parallel_tool_calls",
                "the decoder cannot be kept from calling several tools; leave it out",
            ));
        }
        if self.functions.as_ref().is_some_and(|functions| !functions.is_empty()) {
            return Err(Failure::unsupported("functions", "name them in `tools`"));
        }
        let offered = match &self.tool_choice {
            None | Some(Value::Null) => true,
            Some(Value::String(choice)) if choice == "auto" => true,
            Some(Value::String(choice)) if choice == "none" => false,
            Some(_) => {
                return Err(Failure::unsupported(
                    "tool_choice",
                    "\"auto\" or \"none\"; the decoder cannot be made to call a tool",
                ));
            }
        };
        let messages = std::mem::take(&mut self.messages).into_iter().enumerate();
        let messages = messages.map(|(at, said)| said.message(at)).collect::<Result<_, _>>()?;
        Ok(Conversation { messages, tools: self.tools.take().filter(|_| offered).unwrap_or_default() })
    }
}

impl Said {
    fn message(self, at: usize) -> Result<Message, Failure> {
        let role = match self.role.as_str() {
            // Newer applications call the system so.
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" | "function" => Role::Tool,
            other => {
                let unknown = format!("a role is system, developer, user, assistant or tool, not {other:?}");
                return Err(Failure::invalid(unknown).about(format!("messages[{at}].role")));
            }
        };
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut text = String::new();
                for part in parts {
                    let Some(more) = part.text.or(part.refusal) else {
                        let about = format!("messages[{at}].content");
                        let unread = format!("the model reads text, and this part is {:?}", part.kind);
                        return Err(Failure::invalid(unread).about(about));
                    };
                    text.push_str(&more);
                }
                text
            }
        };
        let calls = self.tool_calls.unwrap_or_default().into_iter().map(|call| {
            // Arguments that are no JSON, which a model may have written, stay the text that they are.
            let CalledFunction { name, arguments } = call.function;
            let arguments = serde_json::from_str(&arguments).unwrap_or(Value::String(arguments));
            ToolCall::new(call.id, name, arguments)
        });
        Ok(Message {
            role,
            content,
            tool_calls: calls.collect(),
            tool_call_id: self.tool_call_id,
            name: self.name,
        })
    }
}

/// For fuzzing: everything that is checked of a request before the model is asked.
#[cfg(any(test, feature = "fuzzing"))]
pub(in crate::http) fn hear(body: &[u8]) -> Result<Conversation, Failure> {
    let mut asked: Asked = body::parse(body)?;
    asked.common.check()?;
    let conversation = asked.conversation()?;
    asked.common.ask()?.check()?;
    Ok(conversation)
}

/// The handler.
pub(in crate::http) async fn chat(
    State(site): State<Site>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Result<Response, Failure> {
    let mut asked: Asked = body::json(request).await?;
    asked.common.check()?;
    let conversation = asked.conversation()?;
    let engine = engine_of(&site, &asked.common.model)?;
    let tools = !conversation.tools.is_empty();
    let (stream, with_usage) = (asked.common.stream.unwrap_or(false), asked.common.wants_usage());
    let mut ask = asked.common.ask()?;
    let owner = site.node.tenants.reminded(&principal.tenant);
    ask.prompt = prompt(&site, &owner, conversation).await?;
    ask.stops.extend(engine.loaded.template.stops());
    let head =
        head(if stream { "chat.completion.chunk" } else { "chat.completion" }, &new_id("chatcmpl"), &site);
    let completion = Completion::start(&site, principal, owner.clone(), ask).await?;
    let calls = Calls { site, owner, offered: tools };
    if stream {
        return Ok(sse::response(|events| write(events, completion, head, with_usage, calls)));
    }
    let ended = completion.whole().await?;
    let (message, reason) = calls.message(&ended);
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": reason});
    let fields = json!({"choices": [choice], "usage": usage(&ended.usage)});
    Ok(Json(with(&head, fields)).into_response())
}

/// Finds the calls in what was written, where tools were offered.
struct Calls {
    site: Site,
    owner: Owner,
    offered: bool,
}

impl Calls {
    /// The text beside the calls, and the calls, whose text is remembered.
    fn found<'a>(&self, text: &'a str) -> (&'a str, Vec<Value>) {
        if !self.offered {
            return (text, Vec::new());
        }
        let (beside, functions) = tool_call::split(text);
        let mut calls = Vec::new();
        for function in functions {
            let id = format!("call_{:016x}", random());
            if calls.is_empty() {
                self.site.node.replay.remember_call(&self.owner, &id, text);
            }
            let function = json!({"name": function.name, "arguments": function.arguments.to_string()});
            calls.push(json!({"id": id, "type": "function", "function": function}));
        }
        (beside, calls)
    }

    fn message(&self, ended: &Ended) -> (Value, &'static str) {
        let (text, calls) = self.found(&ended.text);
        if calls.is_empty() {
            return (
                json!({"role": "assistant", "content": text, "refusal": null}),
                finish_reason(&ended.usage),
            );
        }
        let content = Some(text).filter(|text| !text.is_empty());
        let message = json!({"role": "assistant", "content": content, "refusal": null, "tool_calls": calls});
        (message, "tool_calls")
    }
}

async fn write(
    events: sse::Events,
    mut completion: Completion,
    head: Value,
    with_usage: bool,
    calls: Calls,
) -> Result<(), sse::Gone> {
    let no_usage = || if with_usage { json!({"usage": null}) } else { json!({}) };
    let chunk = |delta: Value, reason: Option<&str>| {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason});
        with(&with(&head, json!({"choices": [choice]})), no_usage())
    };
    // The connection shows life while a long prompt is computed.
    events.data(&chunk(json!({"role": "assistant", "content": ""}), None)).await?;
    loop {
        let step = tokio::select! {
            step = completion.next() => step,
            () = events.gone() => return Err(sse::Gone),
        };
        match step {
            Ok(Some(Step::Prompt(_))) => {}
            // What may be a call is shown when it is whole.
            Ok(Some(Step::Text(text))) if !calls.offered => {
                events.data(&chunk(json!({"content": text}), None)).await?;
            }
            Ok(Some(Step::Text(_))) => {}
            Ok(Some(Step::End(ended))) => {
                let (beside, found) = calls.found(&ended.text);
                let rest = if calls.offered { beside } else { ended.rest.as_str() };
                if !rest.is_empty() {
                    events.data(&chunk(json!({"content": rest}), None)).await?;
                }
                let reason = if found.is_empty() { finish_reason(&ended.usage) } else { "tool_calls" };
                for (at, call) in found.into_iter().enumerate() {
                    let call = with(&call, json!({"index": at}));
                    events.data(&chunk(json!({"tool_calls": [call]}), None)).await?;
                }
                events.data(&chunk(json!({}), Some(reason))).await?;
                if with_usage {
                    let fields = json!({"choices": [], "usage": usage(&ended.usage)});
                    events.data(&with(&head, fields)).await?;
                }
            }
            Ok(None) => return events.done().await,
            Err(failure) => return events.data(&failure.body()).await,
        }
    }
}
