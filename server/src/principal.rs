//! Who asks: a tenant, and what it may do. Made by `auth`, carried in the extensions of every request, and never taken from a
//! field of one.

use std::fmt;

use serde::{Deserialize, Serialize};
use tonic::{Request, Status};

/// Longest name of a tenant, a user or a service account, in bytes.
pub(crate) const MAX_NAME_BYTES: usize = 128;

/// Name of a tenant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TenantId(pub String);

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a principal may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Looks up, fetches, settles, decodes.
    Reader,
    /// Puts.
    Writer,
    /// Writes what every tenant reads.
    Publisher,
    /// Holds sessions: leases on what is stored.
    Pinner,
    /// Reads the usage of all tenants.
    BillingReader,
    /// Erases tenants, reads what they hold.
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Reader, Self::Writer, Self::Publisher, Self::Pinner, Self::BillingReader, Self::Admin];
}

/// A set of roles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// Every role.
    pub fn all() -> Self {
        Role::ALL.into_iter().collect()
    }

    /// Whether the role is in the set.
    pub fn has(self, role: Role) -> bool {
        self.0 & (1 << role as u8) != 0
    }

    /// Whether one of these is.
    pub fn has_any(self, roles: &[Role]) -> bool {
        roles.iter().any(|&role| self.has(role))
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        Self(roles.into_iter().fold(0, |set, role| set | 1 << role as u8))
    }
}

/// Someone whose identity was established.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The tenant it belongs to.
    pub tenant: TenantId,
    /// Which of the tenant's accounts, for the audit log.
    pub name: String,
    /// What it may do.
    pub roles: Roles,
}

impl Principal {
    /// Everyone on a node that asks nobody who they are, which is one that listens on loopback only.
    pub fn local() -> Self {
        Self { tenant: TenantId("default".into()), name: "local".into(), roles: Roles::all() }
    }

    /// An error that names the missing role.
    pub(crate) fn require(&self, role: Role) -> Result<(), Status> {
        if self.roles.has(role) {
            return Ok(());
        }
        let role = serde_json::to_value(role).ok().and_then(|name| Some(name.as_str()?.to_owned()));
        Err(Status::permission_denied(format!("this needs the role {}", role.unwrap_or_default())))
    }
}

/// The principal of a request. Its absence means that a service was mounted without the authorising layer: denied.
pub(crate) fn principal_of<T>(request: &Request<T>) -> Result<Principal, Status> {
    request
        .extensions()
        .get::<Principal>()
        .cloned()
        .ok_or_else(|| Status::unauthenticated("who asks was not established"))
}

/// Whether this may be the name of an account within a tenant: whoever issues tokens chooses it ("auth0|1234").
pub(crate) fn is_account(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// Whether a name given from outside may be one: printable, without separators, not too long.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ':'))
}
