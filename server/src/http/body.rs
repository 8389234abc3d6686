//! Bodies of requests: JSON, bounded in size; the guard has bounded the time and the memory that they take.

use std::error::Error;

use axum::RequestExt;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::header;
use serde::de::DeserializeOwned;
use tonic::{Code, Status};

use super::failure::Failure;

/// Reads and understands a body. The error names the field that is wrong.
pub(super) async fn json<T: DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    // Anything else a browser sends to other origins without asking them first.
    let is_json = |kind: &str| kind.split(';').next().is_some_and(|kind| kind.trim() == "application/json");
    if !kind.is_some_and(is_json) {
        return Err(Failure::invalid("the body must be JSON, with `content-type: application/json`"));
    }
    let body = request.extract::<Bytes, _>().await;
    let body = body.map_err(|refused| match of_arrival(&refused) {
        Some(status) if status.code() == Code::DeadlineExceeded => Failure::late(status.message()),
        Some(status) => status.clone().into(),
        None => Failure::unread(refused.status(), refused.body_text()),
    })?;
    parse(&body)
}

/// Why the guard ended a body, if it did.
fn of_arrival<'a>(refused: &'a (dyn Error + 'static)) -> Option<&'a Status> {
    let mut causes = std::iter::successors(Some(refused), |&cause| cause.source());
    causes.find_map(|cause| cause.downcast_ref())
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
