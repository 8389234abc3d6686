//! Client certificates: the SPIFFE id in the URI SAN of a certificate that the TLS layer has verified already.
//!
//! `spiffe://TRUST_DOMAIN/tenant/TENANT/sa/ACCOUNT`; the account's roles are the policy's.

use tonic::Status;
use tonic::transport::CertificateDer;
use x509_parser::extensions::GeneralName;

use crate::policy::Policy;
use crate::principal::{Principal, TenantId};

pub(super) fn principal(certificate: &CertificateDer<'_>, policy: &Policy) -> Result<Principal, Status> {
    let refused =
        |reason: String| Status::unauthenticated(format!("the client certificate is refused: {reason}"));
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| refused("it cannot be read".into()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|_| refused("its names cannot be read".into()))?
        .map_or(&[][..], |names| &names.value.general_names);
    let mut ids = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some(*uri),
        _ => None,
    });
    let (Some(id), None) = (ids.next(), ids.next()) else {
        return Err(refused("it must have exactly one SPIFFE id as URI SAN".into()));
    };
    let domain =
        policy.trust_domain.as_deref().ok_or_else(|| refused("the policy has no trust_domain".into()))?;
    let account = id
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.strip_prefix(domain)?.strip_prefix("/tenant/")?.split_once("/sa/"));
    let Some((tenant, account)) = account else {
        return Err(refused(format!("{id} is not spiffe://{domain}/tenant/TENANT/sa/ACCOUNT")));
    };
    let tenant = TenantId(tenant.to_owned());
    let roles = policy.tenants.get(&tenant).and_then(|tenant| tenant.service_accounts.get(account));
    let roles = roles.ok_or_else(|| refused(format!("{id} is not in this node's policy")))?;
    Ok(Principal { tenant, name: account.to_owned(), roles: roles.iter().copied().collect() })
}

/// For fuzzing: a certificate, behind the TLS layer. Whether it speaks for somebody.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use crate::policy::TenantPolicy;
    let accounts = [("engine".to_owned(), vec![crate::principal::Role::Reader])].into();
    let acme = TenantPolicy { service_accounts: accounts, ..TenantPolicy::default() };
    let policy = Policy {
        trust_domain: Some("fleet.example".into()),
        tenants: [(TenantId("acme".into()), acme)].into(),
        ..Policy::default()
    };
    let principal = principal(&CertificateDer::from(bytes), &policy);
    principal.is_ok_and(|principal| {
        assert_eq!((principal.tenant.0.as_str(), principal.name.as_str()), ("acme", "engine"));
        true
    })
}
