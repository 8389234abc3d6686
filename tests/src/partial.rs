//! Calls that are begun and not ended: what a client that stalls, or trickles, sends.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::time::{Interval, interval};
use tonic::Status;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::Channel;

/// A message that does not end: its first part, and then nothing, or a byte now and then.
pub struct Partial {
    part: Option<Bytes>,
    more: Option<Interval>,
}

impl Partial {
    /// The head of a message of so many bytes, and so many of these.
    pub fn message(bytes: usize, sent: usize) -> Self {
        let mut part = BytesMut::with_capacity(5 + sent);
        part.extend_from_slice(&[0]);
        part.extend_from_slice(&u32::try_from(bytes).expect("a message of less than 4 GiB").to_be_bytes());
        part.resize(5 + sent, 0);
        Self { part: Some(part.freeze()), more: None }
    }

    /// Not even that.
    pub fn nothing() -> Self {
        Self { part: None, more: None }
    }

    /// The same, and a byte more each time that so much time has passed.
    #[must_use]
    pub fn trickling(self, each: Duration) -> Self {
        Self { more: Some(interval(each)), ..self }
    }

    /// Sends it to a method, and waits for the status with which the node ends the call.
    pub async fn call(self, channel: &Channel, method: &str) -> Result<Status> {
        let mut channel = channel.clone();
        let request = http::Request::post(format!("http://node{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new(self))?;
        std::future::poll_fn(|context| GrpcService::poll_ready(&mut channel, context)).await?;
        let answer = GrpcService::call(&mut channel, request).await?;
        Status::from_header_map(answer.headers()).context("it was answered with something else than a status")
    }
}

impl http_body::Body for Partial {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(part) = self.part.take() {
            return Poll::Ready(Some(Ok(Frame::data(part))));
        }
        match &mut self.more {
            Some(more) => more.poll_tick(context).map(|_| Some(Ok(Frame::data(Bytes::from_static(&[0]))))),
            None => Poll::Pending,
        }
    }
}
