//! The layer around every service that counts calls: by method, by how they ended, and how long that took.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use tower::{Layer, Service};

use crate::access;
use crate::node::Node;

/// See the module.
#[derive(Clone)]
pub(crate) struct MetricsLayer(pub(crate) Arc<Node>);

/// A service behind it.
#[derive(Clone)]
pub(crate) struct Counted<S> {
    inner: S,
    node: Arc<Node>,
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, node: Arc::clone(&self.0) }
    }
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let began = Instant::now();
        let method = access::method(request.uri().path());
        let node = Arc::clone(&self.node);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            // A call that fails at once says so in the headers; one that goes well says so behind its body.
            let code = match &answer {
                Ok(response) => {
                    response.headers().get("grpc-status").map_or("ok", |code| name(code.as_bytes()))
                }
                Err(_) => "unknown",
            };
            node.metrics.rpc(method, code, began.elapsed());
            answer
        })
    }
}

/// Of a status code, as the gRPC documents spell it.
fn name(code: &[u8]) -> &'static str {
    match tonic::Code::from_bytes(code) {
        tonic::Code::Ok => "ok",
        tonic::Code::Cancelled => "cancelled",
        tonic::Code::Unknown => "unknown",
        tonic::Code::InvalidArgument => "invalid_argument",
        tonic::Code::DeadlineExceeded => "deadline_exceeded",
        tonic::Code::NotFound => "not_found",
        tonic::Code::AlreadyExists => "already_exists",
        tonic::Code::PermissionDenied => "permission_denied",
        tonic::Code::ResourceExhausted => "resource_exhausted",
        tonic::Code::FailedPrecondition => "failed_precondition",
        tonic::Code::Aborted => "aborted",
        tonic::Code::OutOfRange => "out_of_range",
        tonic::Code::Unimplemented => "unimplemented",
        tonic::Code::Internal => "internal",
        tonic::Code::Unavailable => "unavailable",
        tonic::Code::DataLoss => "data_loss",
        tonic::Code::Unauthenticated => "unauthenticated",
    }
}
