//! The layer around every service: establishes who calls and whether the method is theirs, before anything of the message
//! is read. What it refuses, and what a service behind it does not let a caller have, is in the audit log.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Extensions, HeaderMap, Request, Response};
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo};
use tonic::{Code, Status};
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
        let uid = request.extensions().get::<UdsConnectInfo>().map(|peer| peer_uid(peer.peer_cred));
        let principal = uid.transpose().and_then(|uid| {
            let certificates = certificates.as_ref().map(|certificates| certificates.as_slice());
            self.authenticator.principal_of_peer(request.headers(), certificates, uid)
        });
        let principal = principal.inspect_err(|_| {
            self.audit.record(&Event::unauthenticated(peer(request.extensions()), access::method(path)));
        })?;
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

/// Notes that a service did not let its caller have what it asked for. What fails at once says so in the headers; later nothing
/// is denied.
fn note_denial(audit: &Audit, principal: &Principal, method: &str, headers: &HeaderMap) {
    if let Some(status) =
        Status::from_header_map(headers).filter(|status| status.code() == Code::PermissionDenied)
    {
        audit.record(&Event::new(principal, method, status.message(), "denied"));
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
    S::Future: Send + 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<R>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.layer.check(&request) {
            Ok(None) => Box::pin(self.inner.call(request)),
            Ok(Some(principal)) => {
                let (audit, method) = (Arc::clone(&self.layer.audit), access::method(request.uri().path()));
                request.extensions_mut().insert(principal.clone());
                let answer = self.inner.call(request);
                Box::pin(async move {
                    let answer = answer.await?;
                    note_denial(&audit, &principal, method, answer.headers());
                    Ok(answer)
                })
            }
            Err(status) => Box::pin(async move { Ok(status.into_http()) }),
        }
    }
}

/// Where a call comes from, of which nothing else is known.
fn peer(extensions: &Extensions) -> String {
    let tcp = extensions.get::<TlsConnectInfo<TcpConnectInfo>>().map(TlsConnectInfo::get_ref);
    let tcp = tcp.or_else(|| extensions.get::<TcpConnectInfo>()).and_then(TcpConnectInfo::remote_addr);
    let uid = extensions.get::<UdsConnectInfo>().and_then(|peer| peer.peer_cred).map(|peer| peer.uid());
    match (tcp, uid) {
        (Some(address), _) => address.ip().to_string(),
        (None, Some(uid)) => format!("uid {uid}"),
        (None, None) => "unknown".into(),
    }
}

/// Who connected to a Unix socket. One whom the kernel does not name is nobody.
fn peer_uid(peer: Option<tokio::net::unix::UCred>) -> Result<u32, Status> {
    peer.map(|peer| peer.uid()).ok_or_else(|| Status::unauthenticated("the peer's uid cannot be told"))
}
