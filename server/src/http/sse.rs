//! Server-sent events, and a body of them that a task writes.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Events that wait for a slow reader, after which the decoder waits too.
const BUFFER: usize = 64;

/// Where a task writes events. Errors say that the reader is gone: the task should end.
pub(super) struct Events(mpsc::Sender<Bytes>);

/// The reader is gone.
#[derive(Debug)]
pub(super) struct Gone;

impl Events {
    /// An event of OpenAI's kind, which has no name.
    pub(super) async fn data(&self, value: &Value) -> Result<(), Gone> {
        self.send(format!("data: {value}\n\n")).await
    }

    /// An event with its name.
    pub(super) async fn named(&self, name: &str, value: &Value) -> Result<(), Gone> {
        self.send(format!("event: {name}\ndata: {value}\n\n")).await
    }

    /// The end of a stream of OpenAI's.
    pub(super) async fn done(&self) -> Result<(), Gone> {
        self.send("data: [DONE]\n\n".into()).await
    }

    /// Resolves when the reader has gone.
    pub(super) async fn gone(&self) {
        self.0.closed().await;
    }

    async fn send(&self, text: String) -> Result<(), Gone> {
        self.0.send(text.into()).await.map_err(|_| Gone)
    }
}

/// A response whose events `write` makes.
pub(super) fn response<W>(write: impl FnOnce(Events) -> W) -> Response
where
    W: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(BUFFER);
    let writing = write(Events(sender));
    // It ends by itself when its reader has gone.
    tokio::spawn(async move {
        let _gone = writing.await;
    });
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        // Proxies that gather responses would hold back what is to be seen as it comes.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}
