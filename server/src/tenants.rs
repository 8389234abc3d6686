//! Tenants: their scope keys, and what each uses of what it may use.
//!
//! A scope key comes from the root secret, the authenticated tenant (and a user below it) and the tenant's epoch, never from
//! a field of a request. Erasing a tenant gives its epoch up first, durably: from then on nobody can name what it stored; then
//! its keys are destroyed, where there are any (keys.rs); then the records go.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use anyhow::Context;
use esker_prefix::{RootSecret, ScopeKey, ScopeKind, ScopeTag};
use esker_proto::v1;
use esker_store::{Erase, Store, StoreError};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::control::{Control, Table};
use crate::keys::Keys;
use crate::policy::{PolicyFile, TenantPolicy};
use crate::principal::{Principal, Role, TenantId, is_name};
use crate::replay::Owner;
use crate::writers::{Place, Sight, Writers};

/// Users of one tenant that are told apart; each is a scope to erase.
const MAX_USERS: usize = 100_000;

/// All tenants of a node.
pub(crate) struct Tenants {
    root: RootSecret,
    policy: Arc<PolicyFile>,
    control: Arc<Control>,
    keys: Option<Arc<Keys>>,
    writers: Writers,
    known: RwLock<HashMap<TenantId, Arc<Tenant>>>,
}

/// One of them.
pub(crate) struct Tenant {
    id: TenantId,
    record: Mutex<Record>,
    in_flight: AtomicU64,
    rates: Mutex<Rates>,
}

/// What is written down of a tenant.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record {
    epoch: u32,
    /// Users that stored something in this epoch.
    users: BTreeSet<String>,
    /// Epochs given up whose records may not all be gone.
    erasing: Vec<(u32, BTreeSet<String>)>,
}

/// Limiters, and the limits that they were made for.
#[derive(Default)]
struct Rates {
    puts: Option<(u32, DefaultDirectRateLimiter)>,
    hashes: Option<(u32, DefaultDirectRateLimiter)>,
}

/// A share of a tenant's bytes in flight, given back when it is dropped.
pub(crate) struct InFlight {
    tenant: Arc<Tenant>,
    bytes: u64,
}

impl Tenants {
    /// Finishes the erasures that a crash cut short.
    pub(crate) fn open(
        root: RootSecret,
        policy: Arc<PolicyFile>,
        control: Arc<Control>,
        keys: Option<Arc<Keys>>,
        store: &Store,
    ) -> anyhow::Result<Self> {
        let writers = Writers::open(Arc::clone(&control))?;
        let tenants = Self { root, policy, control, keys, writers, known: RwLock::default() };
        for (name, record) in tenants.control.scan::<Record>(Table::Tenants, "", "", usize::MAX)? {
            let unfinished = !record.erasing.is_empty();
            let tenant = tenants.insert(TenantId(name), record);
            if unfinished {
                tracing::warn!(tenant = %tenant.id, "an erasure that was cut short is finished");
                tenants.finish_erasing(&tenant, store)?;
            }
        }
        Ok(tenants)
    }

    /// The tenant of a principal.
    pub(crate) fn of(&self, principal: &Principal) -> Arc<Tenant> {
        self.get(&principal.tenant)
    }

    pub(crate) fn get(&self, id: &TenantId) -> Arc<Tenant> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        known.unwrap_or_else(|| self.insert(id.clone(), Record::default()))
    }

    fn insert(&self, id: TenantId, record: Record) -> Arc<Tenant> {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let record = Mutex::new(record);
            Arc::new(Tenant { id: id.clone(), record, in_flight: AtomicU64::new(0), rates: Mutex::default() })
        };
        Arc::clone(known.entry(id.clone()).or_insert_with(new))
    }

    /// Every tenant of the policy and every one that stored something, by name.
    pub(crate) fn names(&self) -> BTreeSet<TenantId> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.keys().cloned().chain(self.policy.now().tenants.keys().cloned()).collect()
    }

    /// The tenant's part of the policy; of one that is not in it, nothing is allowed beyond the default.
    pub(crate) fn rules(&self, tenant: &TenantId) -> TenantPolicy {
        self.policy.now().tenants.get(tenant).cloned().unwrap_or_default()
    }

    /// Who is reminded of what is sampled for a tenant from now on.
    pub(crate) fn reminded(&self, tenant: &TenantId) -> Owner {
        let epoch = self.get(tenant).epoch();
        let key = self.private_at(tenant, "", epoch);
        let scope = self.owned(key, || private_owner(tenant, epoch)).tag();
        Owner { tenant: tenant.clone(), epoch, scope }
    }

    /// The scopes that a principal may read, in the order in which they are asked.
    pub(crate) fn readable(&self, principal: &Principal, user: &str) -> Result<Vec<ScopeKey>, Status> {
        let mut scopes = vec![self.private(&principal.tenant, user)?];
        scopes.extend(self.org(&principal.tenant));
        scopes.push(self.public());
        Ok(scopes)
    }

    /// What a tenant finds of what is stored under names that it can make.
    pub(crate) fn sight(&self, tenant: &TenantId) -> Sight {
        self.writers.sight(tenant, self.org_tag(tenant))
    }

    /// Where a principal finds its own, and stores nothing.
    pub(crate) fn own_place(&self, principal: &Principal, user: &str) -> Result<Place, Status> {
        Ok(Place::unshared(self.private(&principal.tenant, user)?))
    }

    /// Where a principal may write by this name of a scope. A scope or a writer that is new is written down first, so that it can be
    /// erased.
    pub(crate) fn writable(
        &self,
        principal: &Principal,
        user: &str,
        scope: v1::Scope,
    ) -> Result<Place, Status> {
        let key = match scope {
            v1::Scope::Unspecified | v1::Scope::Private => {
                principal.require(Role::Writer)?;
                let key = self.private(&principal.tenant, user)?;
                self.note(&principal.tenant, user)?;
                key
            }
            v1::Scope::Org => {
                principal.require(Role::Writer)?;
                self.org(&principal.tenant).ok_or_else(no_org)?
            }
            v1::Scope::Public => {
                principal.require(Role::Publisher)?;
                self.public()
            }
        };
        let writer = self.writers.number(principal).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "a writer was not written down");
            Status::unavailable("the node cannot write what it must not forget; its log says why")
        })?;
        let (sight, trusted) = (self.sight(&principal.tenant), principal.roles.has(Role::Publisher));
        Ok(Place { key, writer, sight, trusted })
    }

    /// Takes back all that an account has put, in whatever scope. Returns how many objects went; `None` if it never put anything.
    pub(crate) fn revoke(
        &self,
        store: &Store,
        tenant: &TenantId,
        account: &str,
    ) -> Result<Option<u64>, StoreError> {
        let writer = self.writers.find(tenant, account);
        writer.map(|writer| store.erase(Erase::Writer(writer))).transpose()
    }

    /// The one scope of this name whose events a principal may follow.
    pub(crate) fn followed(
        &self,
        principal: &Principal,
        user: &str,
        scope: v1::Scope,
    ) -> Result<ScopeKey, Status> {
        match scope {
            v1::Scope::Unspecified | v1::Scope::Private => self.private(&principal.tenant, user),
            // Its events tell what a tenant stored before anybody else may find it.
            v1::Scope::Org => {
                principal.require(Role::Publisher)?;
                self.org(&principal.tenant).ok_or_else(no_org)
            }
            v1::Scope::Public => Ok(self.public()),
        }
    }

    fn private(&self, tenant: &TenantId, user: &str) -> Result<ScopeKey, Status> {
        if !user.is_empty() && !is_name(user) {
            return Err(Status::invalid_argument(
                "`user` must be 1 to 128 ASCII letters, digits, '-', '_', '.', '@' or ':'",
            ));
        }
        let tenant = self.get(tenant);
        let epoch = tenant.record().epoch;
        Ok(self.owned(self.private_at(&tenant.id, user, epoch), || private_owner(&tenant.id, epoch)))
    }

    /// '/' is in no name, so a user's scope is never another tenant's.
    fn private_at(&self, tenant: &TenantId, user: &str, epoch: u32) -> ScopeKey {
        let id = if user.is_empty() { tenant.0.clone() } else { format!("{tenant}/{user}") };
        ScopeKey::derive(&self.root, ScopeKind::Private, &id, epoch)
    }

    fn org(&self, tenant: &TenantId) -> Option<ScopeKey> {
        let org = self.rules(tenant).org?;
        let key = ScopeKey::derive(&self.root, ScopeKind::Org, &org, 0);
        Some(self.owned(key, || format!("org/{org}")))
    }

    fn public(&self) -> ScopeKey {
        self.owned(ScopeKey::derive(&self.root, ScopeKind::Public, "public", 0), || "public".into())
    }

    /// Tells the keeper of the keys whose scope this is.
    fn owned(&self, key: ScopeKey, owner: impl Fn() -> String) -> ScopeKey {
        if let Some(keys) = &self.keys {
            keys.own(key.tag(), &owner());
        }
        key
    }

    /// The public name of the scope that a tenant shares with its org, if it has one.
    pub(crate) fn org_tag(&self, tenant: &TenantId) -> Option<ScopeTag> {
        self.org(tenant).map(|scope| scope.tag())
    }

    /// The public name of the scope of all.
    pub(crate) fn public_tag(&self) -> ScopeTag {
        self.public().tag()
    }

    /// A name for the deployment that has this root secret: the same on all of its nodes, and no secret.
    pub(crate) fn deployment(&self) -> String {
        let tag = ScopeKey::derive(&self.root, ScopeKind::Public, "deployment", 0).tag();
        tag.0[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Writes a user down before anything is stored for it.
    fn note(&self, tenant: &TenantId, user: &str) -> Result<(), Status> {
        let tenant = self.get(tenant);
        let mut record = tenant.record();
        if user.is_empty() || record.users.contains(user) {
            return Ok(());
        }
        if record.users.len() >= MAX_USERS {
            return Err(Status::resource_exhausted(format!("this tenant has {MAX_USERS} users, the limit")));
        }
        let mut with = record.clone();
        with.users.insert(user.to_owned());
        self.save(&tenant.id, &with)?;
        *record = with;
        Ok(())
    }

    fn save(&self, tenant: &TenantId, record: &Record) -> Result<(), Status> {
        self.control.put(Table::Tenants, &tenant.0, record).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "a tenant's record was not written");
            Status::unavailable("the node cannot write what it must not forget; its log says why")
        })
    }

    /// The private scopes of a tenant.
    pub(crate) fn scopes(&self, tenant: &TenantId) -> Vec<ScopeTag> {
        let tenant = self.get(tenant);
        let record = tenant.record().clone();
        self.tags(&tenant.id, record.epoch, &record.users)
    }

    fn tags(&self, tenant: &TenantId, epoch: u32, users: &BTreeSet<String>) -> Vec<ScopeTag> {
        let names = std::iter::once("").chain(users.iter().map(String::as_str));
        names.map(|user| self.private_at(tenant, user, epoch).tag()).collect()
    }

    /// Whose each scope is, for people.
    pub(crate) fn owners(&self) -> HashMap<ScopeTag, String> {
        let mut owners = HashMap::from([(self.public().tag(), "public".to_owned())]);
        for id in self.names() {
            if let Some(org) = self.rules(&id).org {
                let key = ScopeKey::derive(&self.root, ScopeKind::Org, &org, 0);
                owners.insert(key.tag(), format!("org {org}"));
            }
            let record = self.get(&id).record().clone();
            owners.insert(self.private_at(&id, "", record.epoch).tag(), id.0.clone());
            for user in &record.users {
                owners.insert(self.private_at(&id, user, record.epoch).tag(), format!("{id}/{user}"));
            }
        }
        owners
    }

    /// Bytes of the records in a tenant's private scopes.
    pub(crate) fn stored_bytes(&self, store: &Store, tenant: &TenantId) -> u64 {
        self.scopes(tenant).into_iter().map(|scope| store.scope_bytes(scope)).sum()
    }

    /// Erases a tenant: its keys are given up, durably, then its records go. Returns objects and epochs.
    pub(crate) fn erase(&self, store: &Store, tenant: &TenantId) -> Result<(u64, Vec<u32>), Status> {
        let tenant = self.get(tenant);
        {
            let mut record = tenant.record();
            let mut next = record.clone();
            next.erasing.push((record.epoch, std::mem::take(&mut next.users)));
            next.epoch += 1;
            self.save(&tenant.id, &next)?;
            *record = next;
        }
        self.finish_erasing(&tenant, store).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "an erasure could not be finished");
            Status::unavailable("the keys are given up; the records go when the node can write again")
        })
    }

    fn finish_erasing(&self, tenant: &Tenant, store: &Store) -> anyhow::Result<(u64, Vec<u32>)> {
        let erasing = tenant.record().erasing.clone();
        let (mut objects, mut epochs) = (0, Vec::new());
        for (epoch, users) in &erasing {
            // First the keys: from here on nothing of it can be read, whatever becomes of the rest.
            if let Some(keys) = &self.keys {
                keys.destroy(&private_owner(&tenant.id, *epoch)).context("keys cannot be destroyed")?;
            }
            for tag in self.tags(&tenant.id, *epoch, users) {
                objects += store.erase(Erase::Scope(tag)).context("a scope cannot be erased")?;
            }
            epochs.push(*epoch);
        }
        // What its accounts put where others read it too.
        for writer in self.writers.of(&tenant.id).iter() {
            objects += store.erase(Erase::Writer(*writer)).context("a writer cannot be erased")?;
        }
        let mut record = tenant.record();
        record.erasing.retain(|(epoch, _)| !epochs.contains(epoch));
        self.control.put(Table::Tenants, &tenant.id.0, &*record)?;
        Ok((objects, epochs))
    }

    /// Takes `count` of the tenant's rate of puts.
    pub(crate) fn charge_puts(&self, tenant: &Tenant, count: usize) -> Result<(), Status> {
        let limit = self.rules(&tenant.id).puts_per_s;
        let mut rates = tenant.rates.lock().unwrap_or_else(PoisonError::into_inner);
        charge(&mut rates.puts, "puts_per_s", limit, count)
    }

    /// Takes `count` of the tenant's rate of looked-up blocks.
    pub(crate) fn charge_hashes(&self, tenant: &Tenant, count: usize) -> Result<(), Status> {
        let limit = self.rules(&tenant.id).hashes_per_s;
        let mut rates = tenant.rates.lock().unwrap_or_else(PoisonError::into_inner);
        charge(&mut rates.hashes, "hashes_per_s", limit, count)
    }

    /// Takes a share of the tenant's bytes in flight.
    pub(crate) fn fly(&self, tenant: &Arc<Tenant>, bytes: u64) -> Result<InFlight, Status> {
        let limit = self.rules(&tenant.id).bytes_in_flight.unwrap_or(u64::MAX);
        let room = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit || used == 0);
        match tenant.in_flight.fetch_update(Ordering::AcqRel, Ordering::Acquire, room) {
            Ok(_) => Ok(InFlight { tenant: Arc::clone(tenant), bytes }),
            Err(used) => Err(over("bytes_in_flight", limit, used, 100)),
        }
    }

    /// Refuses a tenant that stores as much as it may.
    pub(crate) fn admit_stored(&self, store: &Store, tenant: &Tenant) -> Result<(), Status> {
        let Some(limit) = self.rules(&tenant.id).stored_bytes else { return Ok(()) };
        let used = self.stored_bytes(store, &tenant.id);
        if used < limit { Ok(()) } else { Err(over("stored_bytes", limit, used, 60_000)) }
    }
}

impl Tenant {
    pub(crate) fn id(&self) -> &TenantId {
        &self.id
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.record().epoch
    }

    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.tenant.in_flight.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

fn charge(
    limiter: &mut Option<(u32, DefaultDirectRateLimiter)>,
    quota: &'static str,
    limit: Option<u32>,
    count: usize,
) -> Result<(), Status> {
    let Some(limit) = limit else { return Ok(()) };
    let Some(limit) = NonZeroU32::new(limit) else { return Err(over(quota, 0, 0, 60_000)) };
    let Some(count) = NonZeroU32::new(u32::try_from(count).unwrap_or(u32::MAX)) else { return Ok(()) };
    if limiter.as_ref().is_none_or(|(made_for, _)| *made_for != limit.get()) {
        *limiter = Some((limit.get(), RateLimiter::direct(Quota::per_second(limit))));
    }
    let (_, limiter) = limiter.as_ref().expect("made above");
    match limiter.check_n(count) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(over(quota, limit.get().into(), limit.get().into(), 1000)),
        Err(_) => Err(Status::invalid_argument(format!(
            "{count} at once are more than this tenant's {quota} of {limit} allows in a whole second"
        ))),
    }
}

fn no_org() -> Status {
    Status::permission_denied("the operator's policy joins this tenant to no org")
}

/// Whose keys encrypt what a tenant stores. '/' and '#' are in no name.
fn private_owner(tenant: &TenantId, epoch: u32) -> String {
    format!("private/{tenant}#{epoch}")
}

/// Over a quota: which, and when to come again. The pushback is in the metadata that gRPC clients honour.
pub(crate) fn over(quota: &'static str, limit: u64, used: u64, retry_after_ms: u64) -> Status {
    crate::metrics::refused(quota);
    let mut status = Status::resource_exhausted(format!(
        "quota {quota}: limit {limit}, used {used}; try again in {retry_after_ms} ms"
    ));
    status.metadata_mut().insert("grpc-retry-pushback-ms", retry_after_ms.into());
    status
}
