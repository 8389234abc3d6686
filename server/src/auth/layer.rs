//! The layer around every service: establishes who calls and whether the method is theirs, before anything of the message
//! is read.

use std::future::Ready;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::Either;
use http::{Request, Response};
use tonic::Status;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo};
use tower::{Layer, Service};

use super::Authenticator;
use crate::access;
use crate::audit::{Audit, Event};
use crate::principal::Principal;

/// See the module.
#[derive(Clone)]
pub(crate) struct AuthLayer {
    authenticator: Arc<Authenticator>,
    audit: Arc<Audit>,
}

/// A service behind it.
#[derive(Clone)]
pub(crate) struct Authorized<S> {
    inner: S,
    layer: AuthLayer,
}

impl AuthLayer {
    pub(crate) fn new(authenticator: Arc<Authenticator>, audit: Arc<Audit>) -> Self {
        Self { authenticator, audit }
    }

    fn check<B>(&self, request: &Request<B>) -> Result<Option<Principal>, Status> {
        let path = request.uri().path();
        let rule = access::rule(path);
        if matches!(rule, Some(access::Rule::Anyone)) {
            return Ok(None);
        }
        let tls = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        let certificates = tls.and_then(TlsConnectInfo::peer_certs);
        let principal = self.authenticator.principal_of_peer(
            request.headers(),
            certificates.as_ref().map(|certificates| certificates.as_slice()),
            request.extensions().get::<UdsConnectInfo>().map(|peer| peer_uid(peer.peer_cred)).transpose()?,
        )?;
        let allowed = match rule {
            Some(access::Rule::Anyone | access::Rule::Known) => true,
            Some(access::Rule::Roles(roles)) => principal.roles.has_any(roles),
            None => false,
        };
        if allowed {
            return Ok(Some(principal));
        }
        self.audit.record(&Event::denied(&principal, path));
        Err(Status::permission_denied(access::missing(path)))
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Authorized<S>;

    fn layer(&self, inner: S) -> Authorized<S> {
        Authorized { inner, layer: self.clone() }
    }
}

impl<S, B, R> Service<Request<B>> for Authorized<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<Response<R>, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.layer.check(&request) {
            Ok(principal) => {
                if let Some(principal) = principal {
                    request.extensions_mut().insert(principal);
                }
                Either::Left(self.inner.call(request))
            }
            Err(status) => Either::Right(std::future::ready(Ok(status.into_http()))),
        }
    }
}

/// Who connected to a Unix socket. One whom the kernel does not name is nobody.
fn peer_uid(peer: Option<tokio::net::unix::UCred>) -> Result<u32, Status> {
    peer.map(|peer| peer.uid()).ok_or_else(|| Status::unauthenticated("the peer's uid cannot be told"))
}
