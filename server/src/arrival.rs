//! Requests on their way in: the layer around every service that bounds how long the body of a call may take to arrive, and that charges
//! what it brings to the node's memory in flight. Over HTTP the same is asked of every body ([`Arrival::watch`]).
//!
//! A call that has sent its head and a part of its message costs memory until the rest comes, and a message keeps some until it is
//! answered. The first kibibytes are free, since a call costs as much in itself. A stream of the caller's is as long as it likes: what
//! reads it bounds its silence and what it holds, and here only one message of it counts.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use esker_proto::MAX_MESSAGE_BYTES;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;
use tower::{BoxError, Layer, Service};

use crate::budget::{Share, Use};
use crate::node::Node;
use crate::principal::{Principal, TenantId};
use crate::tenants::InFlight;

/// A request that takes longer than this to arrive is not waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the body of a call brings before it is charged, and by how much at a time then.
const FREE_BYTES: u64 = 16 << 10;
const STEP_BYTES: u64 = 64 << 10;
/// What a byte of a message can become when it is understood: a token, of four bytes.
const DECODED_FACTOR: u64 = 4;
/// Calls whose caller sends a stream.
const STREAMS: [&str; 4] = [
    "/esker.v1.PrefixCache/Put",
    "/esker.v1.Local/PutLocal",
    "/esker.v1.Local/FetchLocal",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
];

/// See the module.
#[derive(Clone)]
pub(crate) struct ArrivalLayer(pub(crate) Arc<Node>);

/// A service behind it.
#[derive(Clone)]
pub(crate) struct Watched<S> {
    inner: S,
    node: Arc<Node>,
}

impl<S> Layer<S> for ArrivalLayer {
    type Service = Watched<S>;

    fn layer(&self, inner: S) -> Watched<S> {
        Watched { inner, node: Arc::clone(&self.0) }
    }
}

impl<S, R> Service<Request<Body>> for Watched<S>
where
    S: Service<Request<Body>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let kind = if STREAMS.contains(&request.uri().path()) { Kind::Stream } else { Kind::Whole };
        let arrival = Arrival::new(&self.node, request.extensions().get(), kind);
        let answer = self.inner.call(request.map(|body| Body::new(arrival.watch(body))));
        Box::pin(async move {
            let answer = answer.await;
            drop(arrival);
            answer
        })
    }
}

/// What a request's body is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One message.
    Whole,
    /// As many as the caller likes.
    Stream,
}

/// A request whose body is watched. What it brought is charged until this and its body are gone.
pub(crate) struct Arrival(Arc<Account>);

/// What a request has brought, and at whose expense.
struct Account {
    node: Arc<Node>,
    kind: Kind,
    /// `None` where nobody was asked who calls.
    tenant: Option<TenantId>,
    held: Mutex<Held>,
}

enum Held {
    Nothing,
    OfTenant(InFlight),
    OfNode(Share),
}

impl Arrival {
    pub(crate) fn new(node: &Arc<Node>, principal: Option<&Principal>, kind: Kind) -> Self {
        let tenant = principal.map(|principal| principal.tenant.clone());
        Self(Arc::new(Account { node: Arc::clone(node), kind, tenant, held: Mutex::new(Held::Nothing) }))
    }

    /// The request's body, which fails with a [`Status`] where it comes too slowly, or where there is no room for it.
    pub(crate) fn watch<B>(&self, body: B) -> Arriving<B> {
        Arriving {
            body,
            account: Arc::clone(&self.0),
            arrived_bytes: 0,
            covered_bytes: FREE_BYTES,
            late: None,
        }
    }
}

impl Account {
    fn charge(&self, bytes: u64) -> Result<(), Status> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*held, Held::Nothing) {
            *held = match &self.tenant {
                // What streams hold they have taken of their tenant's share as they began: here only of the node's.
                Some(tenant) if self.kind == Kind::Whole => {
                    Held::OfTenant(self.node.tenants.fly(&self.node.tenants.get(tenant), Use::Body, 0)?)
                }
                _ => Held::OfNode(self.node.budget.share(Use::Body)),
            };
        }
        match &mut *held {
            Held::Nothing => Ok(()),
            Held::OfTenant(in_flight) => in_flight.grow(bytes),
            Held::OfNode(share) => share.grow(bytes),
        }
    }
}

/// A body on its way in.
pub(crate) struct Arriving<B> {
    body: B,
    account: Arc<Account>,
    arrived_bytes: u64,
    /// What may have arrived for all that is charged.
    covered_bytes: u64,
    /// From when it first had to be waited for.
    late: Option<Pin<Box<Sleep>>>,
}

impl<B> Arriving<B> {
    fn take(&mut self, bytes: u64) -> Result<(), Status> {
        self.arrived_bytes += bytes;
        let (most, factor) = match self.account.kind {
            Kind::Whole => (u64::MAX, DECODED_FACTOR),
            Kind::Stream => (MAX_MESSAGE_BYTES as u64, 1),
        };
        let lacks = self.arrived_bytes.min(most).saturating_sub(self.covered_bytes);
        if lacks > 0 {
            let step = lacks.next_multiple_of(STEP_BYTES);
            self.account.charge(step * factor)?;
            self.covered_bytes += step;
        }
        Ok(())
    }

    fn is_late(&mut self, context: &mut Context<'_>) -> bool {
        if self.account.kind == Kind::Stream {
            return false;
        }
        let late = self.late.get_or_insert_with(|| Box::pin(tokio::time::sleep(PATIENCE)));
        late.as_mut().poll(context).is_ready()
    }
}

impl<B> http_body::Body for Arriving<B>
where
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let frame = match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(frame) => frame,
            Poll::Pending if this.is_late(context) => return Poll::Ready(Some(Err(too_late().into()))),
            Poll::Pending => return Poll::Pending,
        };
        Poll::Ready(frame.map(|frame| {
            let frame: Frame<Bytes> = frame.map_err(Into::into)?;
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            this.take(bytes as u64)?;
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn too_late() -> Status {
    Status::deadline_exceeded(format!("the request did not arrive within {} s", PATIENCE.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use prost_types::FileDescriptorSet;

    #[test]
    fn the_calls_that_may_take_their_time_are_those_of_streams() {
        let sets = [esker_proto::v1::FILE_DESCRIPTOR_SET, tonic_health::pb::FILE_DESCRIPTOR_SET];
        let mut streams = vec!["/grpc.reflection.v1.ServerReflection/ServerReflectionInfo".to_owned()];
        for file in sets.iter().flat_map(|set| FileDescriptorSet::decode(*set).unwrap().file) {
            for service in &file.service {
                let name = format!("/{}.{}", file.package(), service.name());
                let methods = service.method.iter().filter(|method| method.client_streaming());
                streams.extend(methods.map(|method| format!("{name}/{}", method.name())));
            }
        }
        streams.sort();
        let mut known = STREAMS.to_vec();
        known.sort_unstable();
        assert_eq!(streams, known);
    }
}
