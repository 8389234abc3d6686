//! Server-sent events, and a body of them that a task writes.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Events that wait for a slow reader, after which the decoder waits too.
const BUFFER: usize = 64;
/// After so much silence, such as that of a long prefill, a comment tells reader and proxies that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Where a task writes events. Errors say that the reader is gone: the task should end.
pub(super) struct Events(mpsc::Sender<Event>);

/// The reader is gone.
#[derive(Debug)]
pub(super) struct Gone;

impl Events {
    /// An event of OpenAI's kind, which has no name.
    pub(super) async fn data(&self, value: &Value) -> Result<(), Gone> {
        self.send(Event::default().data(value.to_string())).await
    }

    /// An event with its name.
    pub(super) async fn named(&self, name: &str, value: &Value) -> Result<(), Gone> {
        self.send(Event::default().event(name).data(value.to_string())).await
    }

    /// The end of a stream of OpenAI's.
    pub(super) async fn done(&self) -> Result<(), Gone> {
        self.send(Event::default().data("[DONE]")).await
    }

    /// Resolves when the reader has gone.
    pub(super) async fn gone(&self) {
        self.0.closed().await;
    }

    async fn send(&self, event: Event) -> Result<(), Gone> {
        self.0.send(event).await.map_err(|_| Gone)
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
    let events = Sse::new(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    let headers = [
        (header::CACHE_CONTROL, "no-store"),
        // Proxies that gather responses would hold back what is to be seen as it comes.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, events.keep_alive(KeepAlive::new().interval(KEEP_ALIVE))).into_response()
}
