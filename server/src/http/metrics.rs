//! `GET /metrics`: what the node counts, for Prometheus.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tonic::Status;

use super::failure::Failure;
use crate::metrics::{CONTENT_TYPE, render};
use crate::node::Node;

pub(super) async fn metrics(State(node): State<Arc<Node>>) -> Result<Response, Failure> {
    let text = tokio::task::spawn_blocking(move || render(&node)).await;
    match text {
        Ok(Ok(text)) => Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()),
        _ => Err(Status::internal("the metrics cannot be written; the node's log says why").into()),
    }
}
