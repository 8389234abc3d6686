//! The operator's policy: which tenants there are, who speaks for them, and how much each may use.
//!
//! A TOML file, read again when it changes, so that a tenant is added without a restart. What it does not name is denied.
//!
//! ```toml
//! trust_domain = "fleet.example"        # of the SPIFFE ids in client certificates
//!
//! [jwt]
//! jwks = "jwks.json"                    # public keys; beside this file unless absolute
//! audience = "esker"
//!
//! [tenants.acme]
//! org = "research"                      # tenants of one org share what they write to it; default: none
//! public = true                         # it finds what publishers write for all, and its own may write there; default: false
//! stored_bytes = 500_000_000_000        # of what its accounts have put, in any scope. Every limit may be left out: none
//! leased_byte_hours = 2_000_000_000_000 # bytes times hours that all sessions together may hold
//! bytes_in_flight = 268_435_456
//! puts_per_s = 2_000                    # objects that are not stored yet
//! hashes_per_s = 5_000_000              # blocks looked up
//! sessions = 10_000
//! warmups = 100
//!
//! [tenants.acme.service_accounts]       # spiffe://fleet.example/tenant/acme/sa/engine
//! engine = ["reader", "writer"]
//!
//! [tenants.acme.local_uids]             # who on this host speaks for an account, over the socket of `--local`
//! engine = [1001]
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::principal::{Role, TenantId, is_name};

/// How often a file is looked at, at most.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Policy {
    pub(crate) trust_domain: Option<String>,
    pub(crate) jwt: Option<JwtPolicy>,
    #[serde(default)]
    pub(crate) tenants: BTreeMap<TenantId, TenantPolicy>,
}

/// How bearer tokens are checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JwtPolicy {
    pub(crate) jwks: PathBuf,
    pub(crate) audience: String,
}

/// What one tenant may use. `None`: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TenantPolicy {
    pub(crate) org: Option<String>,
    #[serde(default)]
    pub(crate) public: bool,
    pub(crate) stored_bytes: Option<u64>,
    pub(crate) leased_byte_hours: Option<u64>,
    pub(crate) bytes_in_flight: Option<u64>,
    pub(crate) puts_per_s: Option<u32>,
    pub(crate) hashes_per_s: Option<u32>,
    pub(crate) sessions: Option<u64>,
    pub(crate) warmups: Option<u64>,
    #[serde(default)]
    pub(crate) service_accounts: BTreeMap<String, Vec<Role>>,
    #[serde(default)]
    pub(crate) local_uids: BTreeMap<String, Vec<u32>>,
}

impl Policy {
    /// A node that asks nobody who they are: one tenant without limits.
    pub(crate) fn open() -> Self {
        let default = TenantPolicy { public: true, ..TenantPolicy::default() };
        let default = (TenantId("default".into()), default);
        Self { tenants: BTreeMap::from([default]), ..Self::default() }
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the policy {}", path.display()))?;
        Self::parse(&text, path)
    }

    /// `path` is that of the file, beside which others are looked for.
    fn parse(text: &str, path: &Path) -> anyhow::Result<Self> {
        let mut policy: Self =
            toml::from_str(text).with_context(|| format!("the policy {} is not usable", path.display()))?;
        for (tenant, rules) in &policy.tenants {
            let names = std::iter::once(&tenant.0).chain(&rules.org).chain(rules.service_accounts.keys());
            let unknown = rules.local_uids.keys().find(|name| !rules.service_accounts.contains_key(*name));
            if let Some(account) = unknown {
                bail!(
                    "the policy {} gives local uids to {tenant}/{account}, which is not among its service_accounts",
                    path.display()
                );
            }
            if let Some(bad) = names.into_iter().find(|name| !is_name(name)) {
                bail!(
                    "the policy {} names {bad:?}: names are 1 to 128 ASCII letters, digits, '-', '_', '.', '@' or ':'",
                    path.display()
                );
            }
        }
        let mut uids = BTreeMap::new();
        for (tenant, rules) in &policy.tenants {
            for (account, uid) in
                rules.local_uids.iter().flat_map(|(account, uids)| uids.iter().map(move |uid| (account, uid)))
            {
                if let Some(other) = uids.insert(uid, (tenant, account)) {
                    bail!(
                        "the policy {} gives uid {uid} to {}/{} and to {tenant}/{account}: it can speak for one only",
                        path.display(),
                        other.0,
                        other.1
                    );
                }
            }
        }
        if let Some(jwt) = &mut policy.jwt
            && let Some(folder) = path.parent()
        {
            jwt.jwks = folder.join(&jwt.jwks);
        }
        Ok(policy)
    }
}

/// For fuzzing: a policy. Whether it can be used.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let text = std::str::from_utf8(bytes).ok();
    let policy = text.and_then(|text| Policy::parse(text, Path::new("/etc/esker/policy.toml")).ok());
    let Some(policy) = policy else { return false };
    let mut uids: Vec<u32> = Vec::new();
    for (tenant, rules) in &policy.tenants {
        assert!(
            is_name(&tenant.0)
                && rules.org.iter().chain(rules.service_accounts.keys()).all(|name| is_name(name))
        );
        assert!(rules.local_uids.keys().all(|account| rules.service_accounts.contains_key(account)));
        uids.extend(rules.local_uids.values().flatten());
    }
    let all = uids.len();
    uids.sort_unstable();
    uids.dedup();
    assert_eq!(uids.len(), all, "a uid speaks for one account");
    true
}

/// A policy that follows its file.
pub(crate) struct PolicyFile(Watched<Policy>);

impl PolicyFile {
    /// Reads the file; `None` for the open policy.
    pub(crate) fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        Ok(Self(match path {
            Some(path) => Watched::open(path, Policy::read)?,
            None => Watched::fixed(Policy::open()),
        }))
    }

    pub(crate) fn now(&self) -> Arc<Policy> {
        self.0.now()
    }

    /// Whether there is one: then every caller must say who it is.
    pub(crate) fn is_file(&self) -> bool {
        self.0.path.is_some()
    }
}

/// What a file says, read again when it changes. A change that cannot be used is reported, and the last good one stays.
pub(crate) struct Watched<T> {
    path: Option<PathBuf>,
    read: fn(&Path) -> anyhow::Result<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: Arc<T>,
    stamp: Option<(SystemTime, u64)>,
    looked: Instant,
}

impl<T> Watched<T> {
    pub(crate) fn open(path: &Path, read: fn(&Path) -> anyhow::Result<T>) -> anyhow::Result<Self> {
        // The stamp first: a change between the two is then seen later.
        let stamp = stamp(path);
        let value = Arc::new(read(path)?);
        let state = Mutex::new(State { value, stamp, looked: Instant::now() });
        Ok(Self { path: Some(path.to_owned()), read, state })
    }

    pub(crate) fn fixed(value: T) -> Self {
        let state = Mutex::new(State { value: Arc::new(value), stamp: None, looked: Instant::now() });
        Self { path: None, read: |path| bail!("{} is not read", path.display()), state }
    }

    pub(crate) fn now(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &self.path
            && state.looked.elapsed() >= LOOK_INTERVAL
        {
            state.looked = Instant::now();
            let stamp = stamp(path);
            if stamp != state.stamp {
                state.stamp = stamp;
                match (self.read)(path) {
                    Ok(value) => {
                        tracing::info!(path = %path.display(), "read again");
                        state.value = Arc::new(value);
                    }
                    Err(error) => {
                        tracing::error!(error = format!("{error:#}"), "what was read before stays in force")
                    }
                }
            }
        }
        Arc::clone(&state.value)
    }
}

/// Tells one version of a file from the next.
fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let about = std::fs::metadata(path).ok()?;
    Some((about.modified().ok()?, about.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> anyhow::Result<Policy> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.toml");
        std::fs::write(&path, text).unwrap();
        Policy::read(&path)
    }

    #[test]
    fn the_example_above_is_one() {
        let text: String = include_str!("policy.rs")
            .lines()
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| format!("{}\n", line.trim_start_matches("//!")))
            .collect();
        let policy = policy(&text).unwrap();
        let acme = &policy.tenants[&TenantId("acme".into())];
        assert_eq!(acme.service_accounts["engine"], [Role::Reader, Role::Writer]);
        assert!(policy.jwt.unwrap().jwks.is_absolute());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, named) in [
            ("[tenants.a]\nstored_byte = 3", "stored_byte"),
            ("[tenants.\"a/b\"]", "a/b"),
            ("[tenants.a.service_accounts]\nx = [\"root\"]", "root"),
            ("[tenants.a.local_uids]\nx = [7]", "a/x"),
            (
                "[tenants.a]\nservice_accounts = { x = [] }\nlocal_uids = { x = [7] }\n\
                 [tenants.b]\nservice_accounts = { y = [] }\nlocal_uids = { y = [7] }",
                "uid 7",
            ),
        ] {
            let error = format!("{:#}", policy(text).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_change_is_taken_up_and_a_bad_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.toml");
        std::fs::write(&path, "[tenants.a]").unwrap();
        let file = PolicyFile::open(Some(&path)).unwrap();
        let look_now = || file.0.state.lock().unwrap().looked -= LOOK_INTERVAL;
        assert_eq!(file.now().tenants.len(), 1);
        std::fs::write(&path, "[tenants.a]\n[tenants.b]").unwrap();
        look_now();
        assert_eq!(file.now().tenants.len(), 2);
        std::fs::write(&path, "[tenants").unwrap();
        look_now();
        assert_eq!(file.now().tenants.len(), 2);
    }
}
