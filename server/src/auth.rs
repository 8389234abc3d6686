//! Authentication: from a client's certificate or bearer token, or its uid on this host, to a [`Principal`].
//!
//! Each names a tenant of the policy; where two are given they must agree. Without any means of establishing identity
//! configured everyone is the local principal, which [`serve`](crate::serve) allows on loopback only.

pub(crate) mod jwt;
mod layer;
pub(crate) mod spiffe;

use std::sync::Arc;

use http::HeaderMap;
use tonic::Status;
use tonic::transport::CertificateDer;

use crate::policy::PolicyFile;
use crate::principal::Principal;
use jwt::Tokens;
pub(crate) use layer::AuthLayer;

/// Says who a caller is.
pub(crate) struct Authenticator {
    policy: Arc<PolicyFile>,
    /// `None` where no policy is configured: everyone is local.
    identities: Option<Tokens>,
}

impl Authenticator {
    /// With `asks`, every caller must prove who it is by the policy.
    pub(crate) fn new(policy: Arc<PolicyFile>, asks: bool) -> anyhow::Result<Self> {
        let identities = asks.then(|| Tokens::open(&policy.now())).transpose()?;
        Ok(Self { policy, identities })
    }

    /// Whether it asks at all.
    pub(crate) fn asks(&self) -> bool {
        self.identities.is_some()
    }

    /// The principal of a process of this user on this host: with a policy whom it names, without one the user that the node
    /// itself runs as, or root.
    pub(crate) fn local(&self, uid: u32) -> Result<Principal, Status> {
        if self.identities.is_none() {
            let own = rustix::process::geteuid().as_raw();
            return match uid {
                0 => Ok(Principal::local()),
                _ if uid == own => Ok(Principal::local()),
                _ => Err(Status::permission_denied(format!(
                    "uid {uid} is not the node's own, {own}: without --policy only that one is served here"
                ))),
            };
        }
        let policy = self.policy.now();
        let of_uid = policy.tenants.iter().find_map(|(tenant, rules)| {
            let (account, _) = rules.local_uids.iter().find(|(_, uids)| uids.contains(&uid))?;
            let roles = rules.service_accounts.get(account)?;
            let (tenant, name) = (tenant.clone(), account.clone());
            Some(Principal { tenant, name, roles: roles.iter().copied().collect() })
        });
        of_uid.ok_or_else(|| {
            Status::unauthenticated(format!("uid {uid} is in no tenant's local_uids of this node's policy"))
        })
    }

    /// The principal of a call with these headers, over a connection with these certificates.
    pub(crate) fn principal(
        &self,
        headers: &HeaderMap,
        certificates: Option<&[CertificateDer<'static>]>,
    ) -> Result<Principal, Status> {
        self.principal_of_peer(headers, certificates, None)
    }

    /// As [`Authenticator::principal`], of a call that may come from a process of this user.
    pub(crate) fn principal_of_peer(
        &self,
        headers: &HeaderMap,
        certificates: Option<&[CertificateDer<'static>]>,
        uid: Option<u32>,
    ) -> Result<Principal, Status> {
        let Some(tokens) = &self.identities else {
            return uid.map_or(Ok(Principal::local()), |uid| self.local(uid));
        };
        let policy = self.policy.now();
        let bearer = headers.get(http::header::AUTHORIZATION).map(|value| tokens.principal(value, &policy));
        let certified =
            certificates.and_then(<[_]>::first).map(|certificate| spiffe::principal(certificate, &policy));
        // A token speaks for a user that the policy does not know.
        let known = uid.map(|uid| self.local(uid)).filter(|known| known.is_ok() || bearer.is_none());
        let certified = certified.or(known);
        match (bearer.transpose()?, certified.transpose()?) {
            (Some(bearer), None) => Ok(bearer),
            (None, Some(certified)) => Ok(certified),
            (Some(bearer), Some(certified)) if bearer.tenant == certified.tenant => {
                // Only what both allow.
                let roles = crate::principal::Role::ALL
                    .into_iter()
                    .filter(|&role| bearer.roles.has(role) && certified.roles.has(role));
                Ok(Principal { roles: roles.collect(), ..bearer })
            }
            (Some(_), Some(_)) => {
                Err(Status::unauthenticated("the token and the certificate, or uid, name different tenants"))
            }
            (None, None) => Err(Status::unauthenticated(
                "this node asks who calls: give a client certificate, or `authorization: Bearer TOKEN`",
            )),
        }
    }
}
