//! `Sessions`: chat sessions over gRPC.

use std::sync::Arc;

use bytes::Bytes;
use esker_prefix::{NamespaceId, TokenId};
use esker_proto::v1;
use esker_proto::{check_name, check_namespace_id, check_tokens};
use tonic::{Request, Response, Status};

use super::cache::blocking;
use super::status::from_wire;
use crate::node::Node;
use crate::principal::principal_of;
use crate::sessions::{Kept, Session};

/// Sessions in one answer.
const MAX_LISTED: usize = 1000;

/// The service.
pub(crate) struct SessionsService {
    node: Arc<Node>,
}

impl SessionsService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl v1::sessions_server::Sessions for SessionsService {
    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::Session>, Status> {
        let principal = principal_of(&request)?;
        let mut request = request.into_inner();
        let (namespace, tokens) = opened(&mut request)?;
        let node = self.node.clone();
        blocking(move || {
            let kept = Kept { namespace, tokens, user: &request.user };
            node.sessions.hold(&node, &principal, &request.session, kept, request.keep_s)
        })
        .await
        .map(wire)
    }

    async fn extend_session(
        &self,
        request: Request<v1::ExtendSessionRequest>,
    ) -> Result<Response<v1::Session>, Status> {
        let principal = principal_of(&request)?;
        let mut request = request.into_inner();
        let tokens = extended(&mut request)?;
        let node = self.node.clone();
        blocking(move || {
            let (namespace, user) = node.sessions.about(&principal.tenant, &request.session)?;
            let kept = Kept { namespace, tokens, user: &user };
            node.sessions.hold(&node, &principal, &request.session, kept, request.keep_s)
        })
        .await
        .map(wire)
    }

    async fn renew_session(
        &self,
        request: Request<v1::RenewSessionRequest>,
    ) -> Result<Response<v1::Session>, Status> {
        let principal = principal_of(&request)?;
        let request = request.into_inner();
        check_name("session", &request.session).map_err(from_wire)?;
        let node = self.node.clone();
        blocking(move || node.sessions.renew(&node, &principal.tenant, &request.session, request.keep_s))
            .await
            .map(wire)
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionReply>, Status> {
        let principal = principal_of(&request)?;
        let session = request.into_inner().session;
        check_name("session", &session).map_err(from_wire)?;
        let node = self.node.clone();
        let closed = blocking(move || node.sessions.close(&node, &principal.tenant, &session)).await?;
        Ok(Response::new(v1::CloseSessionReply { closed }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsReply>, Status> {
        let principal = principal_of(&request)?;
        let v1::ListSessionsRequest { after, limit } = request.into_inner();
        let limit = if limit == 0 { MAX_LISTED } else { MAX_LISTED.min(limit as usize) };
        let node = self.node.clone();
        let sessions = blocking(move || node.sessions.list(&node, &principal.tenant, &after, limit)).await?;
        let sessions = sessions.into_iter().map(|session| wire(session).into_inner()).collect();
        Ok(Response::new(v1::ListSessionsReply { sessions }))
    }
}

/// The prefix that a session begins with.
fn opened(request: &mut v1::OpenSessionRequest) -> Result<(NamespaceId, Vec<TokenId>), Status> {
    check_name("session", &request.session).map_err(from_wire)?;
    let namespace = check_namespace_id(&request.namespace).map_err(from_wire)?;
    let tokens = check_tokens(std::mem::take(&mut request.tokens)).map_err(from_wire)?;
    if request.keep_s == 0 {
        return Err(Status::invalid_argument(
            "keep_s must say for how many seconds the session keeps its prefix",
        ));
    }
    Ok((namespace, tokens))
}

/// Its newest prefix.
fn extended(request: &mut v1::ExtendSessionRequest) -> Result<Vec<TokenId>, Status> {
    check_name("session", &request.session).map_err(from_wire)?;
    check_tokens(std::mem::take(&mut request.tokens)).map_err(from_wire)
}

/// For fuzzing: a request about a session, of any kind. Whether it opens, extends, renews or closes one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use prost::Message;
    let is_name = |name: &str| check_name("session", name).is_ok();
    let opens = v1::OpenSessionRequest::decode(bytes).is_ok_and(|mut request| opened(&mut request).is_ok());
    let extends =
        v1::ExtendSessionRequest::decode(bytes).is_ok_and(|mut request| extended(&mut request).is_ok());
    let renews = v1::RenewSessionRequest::decode(bytes).is_ok_and(|request| is_name(&request.session));
    let closes = v1::CloseSessionRequest::decode(bytes).is_ok_and(|request| is_name(&request.session));
    let _ = v1::ListSessionsRequest::decode(bytes);
    opens || extends || renews || closes
}

fn wire(session: Session) -> Response<v1::Session> {
    Response::new(v1::Session {
        session: session.name,
        namespace: Bytes::copy_from_slice(session.namespace.as_bytes()),
        tokens: session.tokens,
        resume_tokens: session.resume_tokens,
        bytes: session.bytes,
        remaining_s: session.remaining_s,
        user: session.user,
    })
}
