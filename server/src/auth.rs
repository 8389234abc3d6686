//! Authentication: from a client's certificate or bearer token to a [`Principal`].
//!
//! Both name a tenant of the policy; where both are given they must agree. Without any means of establishing identity
//! configured everyone is the local principal, which [`serve`](crate::serve) allows on loopback only.

mod jwt;
mod layer;
mod spiffe;

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

    /// The principal of a call with these headers, over a connection with these certificates.
    pub(crate) fn principal(
        &self,
        headers: &HeaderMap,
        certificates: Option<&[CertificateDer<'static>]>,
    ) -> Result<Principal, Status> {
        let Some(tokens) = &self.identities else { return Ok(Principal::local()) };
        let policy = self.policy.now();
        let bearer = headers.get(http::header::AUTHORIZATION).map(|value| tokens.principal(value, &policy));
        let certified =
            certificates.and_then(<[_]>::first).map(|certificate| spiffe::principal(certificate, &policy));
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
                Err(Status::unauthenticated("the certificate and the token name different tenants"))
            }
            (None, None) => Err(Status::unauthenticated(
                "this node asks who calls: give a client certificate, or `authorization: Bearer TOKEN`",
            )),
        }
    }
}
