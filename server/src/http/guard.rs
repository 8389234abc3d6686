//! Who may use a route, asked before its handler runs.
//!
//! Besides credentials it looks at what only browsers do: a node that asks nobody who they are is protected by listening on
//! loopback, which keeps out other machines but not a page of another origin in a browser on this one. So such a node takes
//! only requests that name it by an address or as `localhost` (a foreign name resolved to this machine is one trick), and no
//! request that another origin's page sends.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tonic::Status;
use tonic::transport::CertificateDer;

use super::failure::Failure;
use crate::access::Rule;
use crate::arrival::{Arrival, Kind};
use crate::audit::Event;
use crate::auth::Authenticator;
use crate::node::Node;
use crate::principal::Principal;

/// The certificates that the peer of a connection showed.
#[derive(Clone)]
pub(super) struct PeerCertificates(pub(super) Arc<Vec<CertificateDer<'static>>>);

/// The address at the other end of a connection.
#[derive(Clone, Copy)]
pub(super) struct PeerAddress(pub(super) IpAddr);

/// See the module.
#[derive(Clone)]
pub(super) struct Guard {
    authenticator: Arc<Authenticator>,
    node: Arc<Node>,
    rule: Rule,
}

impl Guard {
    pub(super) fn new(authenticator: Arc<Authenticator>, node: Arc<Node>, rule: Rule) -> Self {
        Self { authenticator, node, rule }
    }

    fn principal(&self, request: &Request) -> Result<Principal, Status> {
        let certificates = request.extensions().get::<PeerCertificates>();
        let certificates = certificates.map(|PeerCertificates(certificates)| certificates.as_slice());
        let headers = request.headers();
        // Anthropic's library sends its key in a header of its own.
        let key = headers.get("x-api-key").filter(|_| !headers.contains_key(header::AUTHORIZATION));
        let Some(key) = key else { return self.authenticator.principal(headers, certificates) };
        let refused = || Status::unauthenticated("x-api-key is not a header value");
        let bearer = format!("Bearer {}", key.to_str().map_err(|_| refused())?);
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, bearer.parse().map_err(|_| refused())?);
        self.authenticator.principal(&headers, certificates)
    }
}

/// The middleware, which also bounds what the request's body takes.
pub(super) async fn check(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let refuse = |failure: Failure, uri: &Uri| failure.at(uri).into_response();
    if let Err(failure) = of_this_site(request.headers(), !guard.authenticator.asks()) {
        return refuse(failure, request.uri());
    }
    if guard.rule != Rule::Anyone {
        let principal = match guard.principal(&request) {
            Ok(principal) => principal,
            Err(status) => {
                if !is_page_asking(&request) {
                    let peer = request.extensions().get().map(|PeerAddress(peer)| peer.to_string());
                    let peer = peer.unwrap_or_else(|| "unknown".into());
                    guard.node.audit.record(&Event::unauthenticated(peer, request.uri().path()));
                }
                return refuse(status.into(), request.uri());
            }
        };
        if let Rule::Roles(roles) = guard.rule
            && !principal.roles.has_any(roles)
        {
            let path = request.uri().path();
            guard.node.audit.record(&Event::denied(&principal, path));
            let missing = crate::access::needs(path, roles);
            return refuse(Failure::forbidden(missing), request.uri());
        }
        request.extensions_mut().insert(principal);
    }
    let arrival = Arrival::new(&guard.node, request.extensions().get(), Kind::Whole);
    let answer = next.run(request.map(|body| Body::new(arrival.watch(body)))).await;
    drop(arrival);
    answer
}

/// Whether this is how the page finds out that it needs a token: it asks without one, whenever somebody opens it.
fn is_page_asking(request: &Request) -> bool {
    let gives = |name| request.headers().contains_key(name);
    let gives_any = gives(header::AUTHORIZATION) || gives(header::HeaderName::from_static("x-api-key"));
    request.uri().path().starts_with("/api/") && !gives_any
}

/// Refuses what a page of another origin sends, and, where nobody is asked who they are, what names this node by a name that
/// it does not have.
fn of_this_site(headers: &HeaderMap, open: bool) -> Result<(), Failure> {
    let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if open && !is_local_name(host) {
        return Err(Failure::forbidden(format!(
            "this node does not ask who calls, so it must be named by its address or as localhost, not as {host:?}"
        )));
    }
    if let Some(origin) = text(header::ORIGIN)
        && origin.split_once("://").is_none_or(|(_, of)| of != host)
    {
        return Err(Failure::forbidden(format!("pages of {origin:?} may not call this node")));
    }
    Ok(())
}

/// `host` or `host:port` of an address, or of `localhost`.
fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(host: &str, origin: Option<&str>, open: bool) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        of_this_site(&headers, open).is_ok()
    }

    #[test]
    fn a_page_of_another_origin_reaches_nothing() {
        for host in ["127.0.0.1:7411", "localhost:7411", "localhost", "[::1]:7411", "10.0.0.3"] {
            assert!(allowed(host, None, true), "{host}");
            assert!(allowed(host, Some(&format!("http://{host}")), true), "{host}");
            assert!(!allowed(host, Some("https://example.com"), true), "{host}");
            assert!(!allowed(host, Some("null"), true), "{host}");
        }
        for host in ["example.com:7411", "localhost.example.com", ""] {
            assert!(!allowed(host, None, true), "{host}");
        }
        assert!(allowed("esker.fleet.example", None, false));
        assert!(!allowed("esker.fleet.example", Some("https://example.com"), false));
    }
}
