//! Bodies of requests: JSON, bounded in size and in the time that they may take.

use std::time::Duration;

use axum::RequestExt;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::header;
use serde::de::DeserializeOwned;

use super::failure::Failure;

/// A body that takes longer than this to arrive is not waited for.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Reads and understands a body. The error names the field that is wrong.
pub(super) async fn json<T: DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    // Anything else a browser sends to other origins without asking them first.
    let is_json = |kind: &str| kind.split(';').next().is_some_and(|kind| kind.trim() == "application/json");
    if !kind.is_some_and(is_json) {
        return Err(Failure::invalid("the body must be JSON, with `content-type: application/json`"));
    }
    let body = tokio::time::timeout(TIMEOUT, request.extract::<Bytes, _>()).await;
    let body = body.map_err(|_| Failure::late("the body did not arrive in time"))?;
    let body = body.map_err(|refused| Failure::unread(refused.status(), refused.body_text()))?;
    parse(&body)
}

/// Understands a body.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let message = format!("the body is not usable: {}", error.inner());
        if path == "." { Failure::invalid(message) } else { Failure::invalid(message).about(path) }
    })
}
