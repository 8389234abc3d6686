//! The HTTP listener behind `esker serve --http`: what existing applications, scrapers and browsers speak.
//!
//! A translation, not a second server: whoever asks is established as over gRPC, and what is asked of the decoder goes through
//! the same service, so that limits, scopes and accounts are the same. Routes stand in three groups by who may use them
//! ([`router`]); a new one belongs into one of them.

mod anthropic;
mod api;
mod body;
mod completion;
mod device;
mod failure;
mod guard;
mod listen;
mod metrics;
mod openai;
mod page;
mod prompt;
mod sse;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, FromRef};
use axum::http::Uri;
use axum::middleware;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;

use crate::access::Rule;
use crate::auth::Authenticator;
#[cfg(any(test, feature = "fuzzing"))]
use crate::chat_template::conversation::Conversation;
use crate::node::Node;
use crate::principal::Role;
use crate::serve::TlsFiles;
use crate::service::DecoderService;
use api::Censuses;
use failure::Failure;
use guard::Guard;
pub(crate) use listen::Listening;

/// Longest body of a request: a context of tokens as text, several times over.
const MAX_BODY_BYTES: usize = 8 << 20;

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct Site {
    node: Arc<Node>,
    decoder: Arc<DecoderService>,
    censuses: Arc<Censuses>,
}

/// For fuzzing: the conversations that a body is, by the APIs that take it; and whether any takes it, one without conversation
/// included.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(body: &[u8]) -> (Vec<Conversation>, bool) {
    let heard = [openai::hear_chat(body), anthropic::hear(body)];
    let conversations: Vec<_> = heard.into_iter().filter_map(Result::ok).collect();
    let accepted = openai::hear_text(body).is_ok() || !conversations.is_empty();
    (conversations, accepted)
}

impl Site {
    /// `decoder` is the one that answers over gRPC, so that both share its queue.
    pub(crate) fn new(node: Arc<Node>, decoder: Arc<DecoderService>) -> Self {
        Self { node, decoder, censuses: Arc::default() }
    }
}

impl FromRef<Site> for Arc<Node> {
    fn from_ref(site: &Site) -> Self {
        Arc::clone(&site.node)
    }
}

/// Binds `address` and gives what then serves on it. TLS as for gRPC, where it is configured.
pub(crate) async fn bind(
    site: Site,
    authenticator: Arc<Authenticator>,
    address: SocketAddr,
    tls: Option<&TlsFiles>,
) -> anyhow::Result<Listening> {
    listen::bind(router(site, authenticator), address, tls).await
}

fn router(site: Site, authenticator: Arc<Authenticator>) -> Router {
    let node = Arc::clone(&site.node);
    let guarded = |routes: Router<Site>, rule: Rule| {
        let guard = Guard::new(Arc::clone(&authenticator), Arc::clone(&node), rule);
        routes.layer(middleware::from_fn_with_state(guard, guard::check))
    };
    // What load balancers probe, and the page without its figures.
    let anyone = Router::new()
        .route("/healthz", get(healthz))
        .route("/", get(page::html))
        .route("/page.js", get(page::script))
        .route("/page.css", get(page::style));
    // What applications call.
    let applications = Router::new()
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{model}", get(openai::one_model))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens));
    // What operators and their scrapers read.
    let operators = Router::new()
        .route("/metrics", get(metrics::metrics))
        .route("/api/overview", get(api::overview))
        .route("/api/history", get(api::history))
        .route("/api/prefixes", get(api::realms))
        .route("/api/prefixes/{realm}", get(api::prefixes));
    guarded(anyone, Rule::Anyone)
        .merge(guarded(applications, Rule::Roles(&[Role::Reader])))
        .merge(guarded(operators, Rule::Roles(&[Role::Admin])))
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(site)
}

/// Answers as long as the process serves.
async fn healthz() -> Json<serde_json::Value> {
    Json(json!({"status": "serving"}))
}

async fn unknown(uri: Uri) -> Failure {
    Failure::not_found(format!("there is nothing at {}", uri.path())).at(&uri)
}
