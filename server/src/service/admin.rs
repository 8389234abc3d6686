//! `Admin`: erasing tenants, and what they hold.

use std::sync::Arc;

use esker_proto::v1;
use tonic::{Request, Response, Status};

use super::cache::blocking;
use super::status::from_store;
use crate::audit::Event;
use crate::node::Node;
use crate::principal::{TenantId, is_account, is_name, principal_of};

/// The service.
pub(crate) struct AdminService {
    node: Arc<Node>,
}

impl AdminService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl v1::admin_server::Admin for AdminService {
    async fn erase_tenant(
        &self,
        request: Request<v1::EraseTenantRequest>,
    ) -> Result<Response<v1::EraseTenantReply>, Status> {
        let principal = principal_of(&request)?;
        let tenant = request.into_inner().tenant;
        if !is_name(&tenant) {
            return Err(Status::invalid_argument(format!("{tenant:?} is not the name of a tenant")));
        }
        let node = self.node.clone();
        blocking(move || {
            let tenant = TenantId(tenant);
            let mut scopes = node.tenants.scopes(&tenant);
            scopes.extend(node.tenants.sight(&tenant).tag());
            let epoch = node.tenants.get(&tenant).epoch();
            let erased = node.tenants.erase(&node.store, &tenant, || {
                node.staging.forget(&tenant);
                // Each whatever becomes of the other.
                let closed = node.sessions.close_all(&node, &tenant);
                node.warmups.erase(&tenant).and(closed)
            });
            if node.tenants.get(&tenant).epoch() != epoch {
                node.events.cleared(&scopes);
            }
            // Also where the records are not all gone yet: the keys are.
            let forgotten = node.replay.forget(&tenant, node.tenants.get(&tenant).epoch());
            let erased = erased.and_then(|erased| forgotten.then_some(erased).ok_or_else(unforgotten));
            let result = if erased.is_ok() { "ok" } else { "unfinished" };
            let objects = erased.as_ref().map_or(0, |(objects, _)| *objects);
            node.audit.record(&Event::new(&principal, "erase-tenant", tenant.0, result).count(objects));
            let (objects, epochs) = erased?;
            Ok(Response::new(v1::EraseTenantReply { objects, epochs }))
        })
        .await
    }

    async fn revoke_writer(
        &self,
        request: Request<v1::RevokeWriterRequest>,
    ) -> Result<Response<v1::RevokeWriterReply>, Status> {
        let principal = principal_of(&request)?;
        let v1::RevokeWriterRequest { tenant, account } = request.into_inner();
        for (what, name, is_one) in
            [("tenant", &tenant, is_name(&tenant)), ("account", &account, is_account(&account))]
        {
            if !is_one {
                return Err(Status::invalid_argument(format!("{name:?} is not the name of a {what}")));
            }
        }
        let node = self.node.clone();
        blocking(move || {
            let what = format!("{tenant}/{account}");
            let revoked = node.tenants.revoke(&node.store, &TenantId(tenant), &account);
            let result = match &revoked {
                Ok(Some(_)) => "ok",
                Ok(None) => "refused",
                Err(_) => "unfinished",
            };
            let objects = revoked.as_ref().ok().copied().flatten().unwrap_or(0);
            node.audit.record(&Event::new(&principal, "revoke-writer", &what, result).count(objects));
            let objects = revoked.map_err(|error| from_store(&error))?;
            let objects = objects
                .ok_or_else(|| Status::not_found(format!("{what} never put anything on this node")))?;
            Ok(Response::new(v1::RevokeWriterReply { objects }))
        })
        .await
    }

    async fn list_tenants(
        &self,
        _: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsReply>, Status> {
        let node = self.node.clone();
        blocking(move || {
            let about = |tenant: TenantId| {
                let (sessions, leased_bytes) = node.sessions.totals(&node, &tenant)?;
                Ok(v1::Tenant {
                    stored_bytes: node.tenants.stored_bytes(&node.store, &tenant),
                    held_bytes: node.tenants.held_bytes(&node.store, &tenant),
                    stored_bytes_limit: node.tenants.rules(&tenant).stored_bytes.unwrap_or(0),
                    leased_bytes,
                    sessions,
                    epoch: node.tenants.get(&tenant).epoch(),
                    tenant: tenant.0,
                })
            };
            let tenants = node.tenants.names().into_iter().map(about).collect::<Result<_, Status>>()?;
            Ok(Response::new(v1::ListTenantsReply { tenants }))
        })
        .await
    }
}

fn unforgotten() -> Status {
    Status::unavailable(
        "the records are gone; what was remembered of answers goes when the node starts again",
    )
}
