//! `POST /v1/completions`: a text, or tokens, continued.

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use esker_prefix::TokenId;
use esker_proto::MAX_TEXT_BYTES;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Common, finish_reason, head, new_id, usage, with};
use crate::http::completion::{Completion, Step, engine, engine_of};
use crate::http::failure::Failure;
use crate::http::{Site, body, sse};
use crate::node::Engine;
use crate::principal::Principal;

/// What OpenAI's API generates where the caller does not say.
const DEFAULT_NEW_TOKENS: u32 = 16;

#[derive(Deserialize)]
struct Asked {
    #[serde(flatten)]
    common: Common,
    prompt: Prompt,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    Lists(Vec<Vec<u32>>),
}

impl Asked {
    fn check(&self) -> Result<(), Failure> {
        self.common.check()?;
        if self.echo.unwrap_or(false) {
            return Err(Failure::unsupported("echo", "put the prompt before the text yourself"));
        }
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(Failure::unsupported("suffix", "the decoder writes on, it does not fill in"));
        }
        if self.best_of.is_some_and(|best_of| best_of != 1) {
            return Err(Failure::unsupported("best_of", "one choice for each request"));
        }
        Ok(())
    }
}

/// For fuzzing: everything that is checked of a request before the model is asked.
#[cfg(any(test, feature = "fuzzing"))]
pub(in crate::http) fn hear(body: &[u8]) -> Result<(), Failure> {
    let asked: Asked = body::parse(body)?;
    asked.check()?;
    asked.common.ask()?.check()
}

impl Prompt {
    fn tokens(self, engine: &Engine) -> Result<Vec<TokenId>, Failure> {
        let one = || Failure::unsupported("prompt", "one prompt for each request; send each by itself");
        let text = match self {
            Self::Tokens(ids) => return Ok(ids.into_iter().map(TokenId).collect()),
            Self::Lists(mut lists) => {
                let ids = lists.pop().filter(|_| lists.is_empty()).ok_or_else(one)?;
                return Ok(ids.into_iter().map(TokenId).collect());
            }
            Self::Text(text) => text,
            Self::Texts(mut texts) => texts.pop().filter(|_| texts.is_empty()).ok_or_else(one)?,
        };
        if text.len() > MAX_TEXT_BYTES {
            let long = format!("`prompt` has {} bytes, the limit is {MAX_TEXT_BYTES}", text.len());
            return Err(Failure::invalid(long).about("prompt"));
        }
        engine
            .loaded
            .tokenizer
            .encode(&text)
            .map_err(|error| Failure::invalid(error.to_string()).about("prompt"))
    }
}

/// The handler.
pub(in crate::http) async fn completions(
    State(site): State<Site>,
    Extension(principal): Extension<Principal>,
    request: Request,
) -> Result<Response, Failure> {
    let asked: Asked = body::json(request).await?;
    asked.check()?;
    engine_of(&site, &asked.common.model)?;
    // On a thread of its own: a long text takes a while to tokenize.
    let tokenizing = {
        let (site, prompt) = (site.clone(), asked.prompt);
        tokio::task::spawn_blocking(move || prompt.tokens(engine(&site)?))
    };
    let prompt = tokenizing.await.map_err(|error| {
        tracing::error!(%error, "a prompt could not be tokenized");
        Failure::broken("the request failed inside the node; its log says why")
    })??;
    let stream = asked.common.stream.unwrap_or(false);
    let with_usage = asked.common.wants_usage();
    let mut ask = asked.common.ask()?;
    ask.prompt = prompt;
    ask.max_tokens = ask.max_tokens.or(Some(DEFAULT_NEW_TOKENS));
    let head = head("text_completion", &new_id("cmpl"), &site);
    let owner = site.node.tenants.reminded(&principal.tenant);
    let completion = Completion::start(&site, principal, owner, ask).await?;
    if stream {
        return Ok(sse::response(|events| write(events, completion, head, with_usage)));
    }
    let ended = completion.whole().await?;
    let choice = choice(&ended.text, Some(finish_reason(&ended.usage)));
    let fields = json!({"choices": [choice], "usage": usage(&ended.usage)});
    Ok(Json(with(&head, fields)).into_response())
}

async fn write(
    events: sse::Events,
    mut completion: Completion,
    head: Value,
    with_usage: bool,
) -> Result<(), sse::Gone> {
    let no_usage = || if with_usage { json!({"usage": null}) } else { json!({}) };
    let chunk = |choice: Value| with(&with(&head, json!({"choices": [choice]})), no_usage());
    loop {
        let step = tokio::select! {
            step = completion.next() => step,
            () = events.gone() => return Err(sse::Gone),
        };
        match step {
            Ok(Some(Step::Prompt(_))) => {}
            Ok(Some(Step::Text(text))) => events.data(&chunk(choice(&text, None))).await?,
            Ok(Some(Step::End(ended))) => {
                events.data(&chunk(choice(&ended.rest, Some(finish_reason(&ended.usage))))).await?;
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

fn choice(text: &str, finish_reason: Option<&str>) -> Value {
    json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish_reason})
}
