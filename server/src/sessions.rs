//! Chat sessions: durable holders of the lease on a conversation's newest prefix.
//!
//! A session is a small record (control.rs) and a lease of the store under a name derived from both tenant and session. The lease is
//! what keeps the bytes; it is written first, so that a crash between the two leaves bytes kept too long rather than a session
//! without them, and it alone says how long: a session whose lease is over is over.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, TokenId};
use esker_proto::PrefixNames;
use esker_store::{Lease, LeaseId, Store, StoreError};
use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::control::{Control, Table};
use crate::lookup::Question;
use crate::node::Node;
use crate::principal::{Principal, TenantId};
use crate::service::from_gate;
use crate::tenants::{Tenants, full};

/// Longest lease: 7 days.
const MAX_KEEP_S: u64 = 7 * 24 * 3600;
/// Shortest, so that a session outlives the call that made it.
const MIN_KEEP_S: u64 = 10;

/// The sessions of a node.
pub(crate) struct Sessions {
    control: Arc<Control>,
    /// One change of a tenant's sessions at a time: its budget is checked against all of them.
    changing: Mutex<HashMap<TenantId, Arc<Mutex<()>>>>,
}

/// What is written down of a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    /// Of its tenant: in another one it is over. Earlier builds wrote none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epoch: Option<u32>,
    namespace: String,
    user: String,
    tokens: u64,
    resume_tokens: u64,
    keep_s: u64,
    /// Of the states that the session holds, to be let go when newer ones take their place: the newest, and the one at the
    /// last block boundary, for who has other last tokens.
    state: Option<String>,
    #[serde(default)]
    boundary_state: Option<String>,
    end: String,
}

/// What a session is to keep.
pub(crate) struct Kept<'a> {
    pub(crate) namespace: NamespaceId,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) user: &'a str,
}

/// A session as its holder sees it.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) name: String,
    pub(crate) namespace: NamespaceId,
    pub(crate) user: String,
    pub(crate) tokens: u64,
    pub(crate) resume_tokens: u64,
    pub(crate) bytes: u64,
    pub(crate) remaining_s: u64,
}

impl Sessions {
    /// Ends those that an erasure has left which a crash cut short.
    pub(crate) fn open(control: Arc<Control>, tenants: &Tenants, store: &Store) -> anyhow::Result<Self> {
        for (key, record) in control.scan::<Record>(Table::Sessions, "", "", usize::MAX)? {
            let Some((tenant, name)) = key.split_once('/') else { continue };
            let tenant = TenantId(tenant.to_owned());
            if record.epoch.is_none_or(|epoch| epoch == tenants.get(&tenant).epoch()) {
                continue;
            }
            match store.release(lease_id(&tenant, name)) {
                Ok(_) => control.delete(Table::Sessions, &key)?,
                Err(error) => {
                    tracing::warn!(%error, "the lease of an erased tenant stays until the next start")
                }
            }
        }
        Ok(Self { control, changing: Mutex::default() })
    }

    /// Opens a session, or moves it to another prefix. `keep_s` 0: as long as it was kept before.
    pub(crate) fn hold(
        &self,
        node: &Node,
        principal: &Principal,
        name: &str,
        kept: Kept<'_>,
        keep_s: u64,
    ) -> Result<Session, Status> {
        let tenant = &principal.tenant;
        let changing = self.changing(tenant);
        let _alone = changing.lock().unwrap_or_else(PoisonError::into_inner);
        // An erasure sees the session, or is seen by it.
        let pass = node.tenants.pass(tenant);
        let _inside = pass.enter().map_err(from_gate)?;
        let before = self.record(tenant, name)?;
        let keep_s = match (keep_s, &before) {
            (0, Some(before)) => before.keep_s,
            (keep_s, _) => check_keep(keep_s)?,
        };
        if before.is_none()
            && let Some(limit) = node.tenants.rules(tenant).sessions
        {
            let (used, _) = self.totals(node, tenant)?;
            if used >= limit {
                return Err(node.tenants.over(tenant, "sessions", limit, used, 60_000));
            }
        }
        let user = kept.user;
        let question = question(node, principal, kept)?;
        // Pinned until the lease holds it.
        let (answer, pins) = question.answer(&node.store, true);
        let block_tokens = u64::from(answer.layout.block_tokens());
        let newest = answer.states.last().filter(|state| state.tokens == answer.best());
        let at_boundary = answer.states.iter().rfind(|state| state.tokens.is_multiple_of(block_tokens));
        let (state, boundary_state) = (newest.map(|state| state.id), at_boundary.map(|state| state.id));
        let end = answer.blocks.last().map(|(_, end)| end.id);
        let mut ends: Vec<ObjectId> = end.into_iter().chain(state).chain(boundary_state).collect();
        ends.dedup();
        let Some(end) = ends.first() else {
            return Err(Status::failed_precondition(
                "nothing of this prefix is stored: put its blocks before a session is to keep them",
            ));
        };
        let record = Record {
            epoch: Some(pass.epoch()),
            namespace: question.namespace.to_hex(),
            user: user.to_owned(),
            tokens: answer.history_tokens().max(answer.best()),
            resume_tokens: answer.best(),
            keep_s,
            state: state.map(|state| state.hash.to_hex()),
            boundary_state: boundary_state.map(|state| state.hash.to_hex()),
            end: end.hash.to_hex(),
        };
        let lease = self.lease(node, tenant, name, &ends, keep_s)?;
        self.write(tenant, name, &record)?;
        drop(pins);
        let now = [&record.state, &record.boundary_state];
        let old = before.into_iter().flat_map(|before| [before.state, before.boundary_state]);
        for old in old.filter(|old| !now.contains(&old)).flatten() {
            if let Ok(hash) = BlockHash::from_hex(&old) {
                node.store.supersede(ObjectId { kind: ObjectKind::State, hash });
            }
        }
        session(name.to_owned(), &record, Some(&lease), node)
    }

    /// Keeps what a session holds for longer.
    pub(crate) fn renew(
        &self,
        node: &Node,
        tenant: &TenantId,
        name: &str,
        keep_s: u64,
    ) -> Result<Session, Status> {
        let changing = self.changing(tenant);
        let _alone = changing.lock().unwrap_or_else(PoisonError::into_inner);
        let pass = node.tenants.pass(tenant);
        let _inside = pass.enter().map_err(from_gate)?;
        let mut record = self.record(tenant, name)?.ok_or_else(|| unknown(name))?;
        let held = self.held(node, tenant, name).ok_or_else(|| unknown(name))?;
        if keep_s != 0 {
            record.keep_s = check_keep(keep_s)?;
        }
        let lease = self.lease(node, tenant, name, &held.ends, record.keep_s)?;
        self.write(tenant, name, &record)?;
        session(name.to_owned(), &record, Some(&lease), node)
    }

    /// The prefix of a session as its namespace and user, for an extension.
    pub(crate) fn about(&self, tenant: &TenantId, name: &str) -> Result<(NamespaceId, String), Status> {
        let record = self.record(tenant, name)?.ok_or_else(|| unknown(name))?;
        Ok((namespace(&record)?, record.user))
    }

    /// Ends a session. `false` if there is none.
    pub(crate) fn close(&self, node: &Node, tenant: &TenantId, name: &str) -> Result<bool, Status> {
        let changing = self.changing(tenant);
        let _alone = changing.lock().unwrap_or_else(PoisonError::into_inner);
        let released = node.store.release(lease_id(tenant, name)).map_err(|error| from_store(&error))?;
        let known = self.record(tenant, name)?.is_some();
        if known {
            self.control.delete(Table::Sessions, &key(tenant, name)).map_err(|error| unwritten(&error))?;
        }
        Ok(known && released)
    }

    /// Ends every session of a tenant.
    pub(crate) fn close_all(&self, node: &Node, tenant: &TenantId) -> Result<(), Status> {
        loop {
            let some = self.records(tenant, "", 1000)?;
            if some.is_empty() {
                return Ok(());
            }
            for (name, _) in some {
                self.close(node, tenant, &name)?;
            }
        }
    }

    /// Sessions that hold something, by name. Those whose lease is over are forgotten on the way.
    pub(crate) fn list(
        &self,
        node: &Node,
        tenant: &TenantId,
        after: &str,
        limit: usize,
    ) -> Result<Vec<Session>, Status> {
        let leases = leases(node);
        let mut sessions = Vec::new();
        let mut after = after.to_owned();
        while sessions.len() < limit {
            let records = self.records(tenant, &after, limit)?;
            let Some((last, _)) = records.last() else { break };
            after.clone_from(last);
            for (name, record) in records {
                match leases.get(&lease_id(tenant, &name)) {
                    Some(lease) if sessions.len() < limit => {
                        sessions.push(session(name, &record, Some(lease), node)?)
                    }
                    Some(_) => break,
                    None => {
                        self.control
                            .delete(Table::Sessions, &key(tenant, &name))
                            .map_err(|error| unwritten(&error))?;
                    }
                }
            }
        }
        Ok(sessions)
    }

    /// Sessions of a tenant that hold something, and the bytes that they hold together.
    pub(crate) fn totals(&self, node: &Node, tenant: &TenantId) -> Result<(u64, u64), Status> {
        let (mut count, mut bytes) = (0, 0);
        self.each_held(node, tenant, |lease, _| {
            count += 1;
            bytes += lease.bytes;
        })?;
        Ok((count, bytes))
    }

    /// Bytes that the sessions of a tenant hold, by namespace.
    pub(crate) fn leased(&self, node: &Node, tenant: &TenantId) -> Result<HashMap<NamespaceId, u64>, Status> {
        let leases = leases(node);
        let mut leased = HashMap::new();
        for (name, record) in self.records(tenant, "", usize::MAX)? {
            if let Some(lease) = leases.get(&lease_id(tenant, &name)) {
                *leased.entry(namespace(&record)?).or_default() += lease.bytes;
            }
        }
        Ok(leased)
    }

    /// Takes the lease if the tenant's budget allows it: bytes times the hours that they are to be kept, over all its sessions.
    fn lease(
        &self,
        node: &Node,
        tenant: &TenantId,
        name: &str,
        ends: &[ObjectId],
        keep_s: u64,
    ) -> Result<Lease, Status> {
        let id = lease_id(tenant, name);
        if let Some(limit) = node.tenants.rules(tenant).leased_byte_hours {
            let mut used = u128::from(node.store.path_bytes(ends)) * u128::from(keep_s);
            self.each_held(node, tenant, |lease, remaining_s| {
                if lease.id != id {
                    used += u128::from(lease.bytes) * u128::from(remaining_s);
                }
            })?;
            let used = u64::try_from(used / 3600).unwrap_or(u64::MAX);
            if used > limit {
                return Err(node.tenants.over(tenant, "leased_byte_hours", limit, used, 60_000));
            }
        }
        node.store.lease(id, ends, Duration::from_secs(keep_s)).map_err(|error| from_store(&error))
    }

    fn each_held(
        &self,
        node: &Node,
        tenant: &TenantId,
        mut see: impl FnMut(&Lease, u64),
    ) -> Result<(), Status> {
        let leases = leases(node);
        let now_s = node.store.now_s();
        for (name, _) in self.records(tenant, "", usize::MAX)? {
            if let Some(lease) = leases.get(&lease_id(tenant, &name)) {
                see(lease, u64::from(lease.deadline_s.saturating_sub(now_s)));
            }
        }
        Ok(())
    }

    fn held(&self, node: &Node, tenant: &TenantId, name: &str) -> Option<Lease> {
        leases(node).remove(&lease_id(tenant, name))
    }

    fn record(&self, tenant: &TenantId, name: &str) -> Result<Option<Record>, Status> {
        self.control.get(Table::Sessions, &key(tenant, name)).map_err(|error| unwritten(&error))
    }

    fn records(&self, tenant: &TenantId, after: &str, limit: usize) -> Result<Vec<(String, Record)>, Status> {
        let prefix = key(tenant, "");
        let after = if after.is_empty() { String::new() } else { key(tenant, after) };
        let found =
            self.control.scan(Table::Sessions, &prefix, &after, limit).map_err(|error| unwritten(&error))?;
        let short = |name: String| name[prefix.len()..].to_owned();
        Ok(found.into_iter().map(|(name, record)| (short(name), record)).collect())
    }

    fn write(&self, tenant: &TenantId, name: &str, record: &Record) -> Result<(), Status> {
        self.control.put(Table::Sessions, &key(tenant, name), record).map_err(|error| unwritten(&error))
    }

    fn changing(&self, tenant: &TenantId) -> Arc<Mutex<()>> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(changing.entry(tenant.clone()).or_default())
    }
}

fn session(name: String, record: &Record, lease: Option<&Lease>, node: &Node) -> Result<Session, Status> {
    let now_s = node.store.now_s();
    Ok(Session {
        name,
        namespace: namespace(record)?,
        user: record.user.clone(),
        tokens: record.tokens,
        resume_tokens: record.resume_tokens,
        bytes: lease.map_or(0, |lease| lease.bytes),
        remaining_s: lease.map_or(0, |lease| u64::from(lease.deadline_s.saturating_sub(now_s))),
    })
}

fn leases(node: &Node) -> HashMap<LeaseId, Lease> {
    node.store.leases().into_iter().map(|lease| (lease.id, lease)).collect()
}

fn namespace(record: &Record) -> Result<NamespaceId, Status> {
    NamespaceId::from_hex(&record.namespace).map_err(|_| Status::internal("a session's record is damaged"))
}

/// '/' is in no tenant's name, so no session of one tenant is another's.
fn key(tenant: &TenantId, name: &str) -> String {
    format!("{tenant}/{name}")
}

fn lease_id(tenant: &TenantId, name: &str) -> LeaseId {
    LeaseId(blake3::derive_key("esker 2026-11 session lease v1", key(tenant, name).as_bytes()))
}

fn check_keep(keep_s: u64) -> Result<u64, Status> {
    if (MIN_KEEP_S..=MAX_KEEP_S).contains(&keep_s) {
        return Ok(keep_s);
    }
    Err(Status::invalid_argument(format!(
        "keep_s must be {MIN_KEEP_S} to {MAX_KEEP_S} seconds, got {keep_s}"
    )))
}

fn unknown(name: &str) -> Status {
    Status::not_found(format!("there is no session {name:?}, or its time is over: open it again"))
}

fn unwritten(error: &anyhow::Error) -> Status {
    tracing::error!(error = format!("{error:#}"), "sessions cannot be read or written");
    Status::unavailable("the node cannot read or write its sessions; its log says why")
}

fn from_store(error: &StoreError) -> Status {
    match error {
        StoreError::LeaseBudget { limit_bytes, .. } => full("leased bytes", *limit_bytes, 60_000),
        StoreError::NotStored { .. } => {
            Status::aborted("what the session was to keep has just gone: put it again and try again")
        }
        other => {
            tracing::error!(error = %other, "a lease could not be written");
            Status::unavailable("the lease could not be written; the node's log says why")
        }
    }
}

/// The question for the prefix that a session is to keep: all of it that is stored.
fn question(node: &Node, principal: &Principal, kept: Kept<'_>) -> Result<Question, Status> {
    let Kept { namespace, mut tokens, user } = kept;
    let layout = node.namespaces.layout(namespace).ok_or_else(|| {
        Status::not_found(format!(
            "namespace {namespace} is not known to this node: call RegisterNamespace first"
        ))
    })?;
    // Only what is the tenant's own: what others published is theirs to keep.
    let scopes = node.tenants.readable(principal, user)?.into_iter().take(1).collect();
    // A session keeps the end as well, though a prompt that ends there could not use it.
    tokens.push(TokenId(0));
    let (names, sight) = (PrefixNames::Tokens(tokens), node.tenants.sight(&principal.tenant));
    Ok(Question { namespace, layout, names, prompt_tokens: 0, scopes, sight })
}
