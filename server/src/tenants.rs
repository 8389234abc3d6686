//! Tenants: their scope keys, and what each uses of what it may use.
//!
//! A scope key comes from the root secret, the authenticated tenant (and a user below it) and the tenant's epoch, never from
//! a field of a request. Erasing a tenant gives its epoch up first, durably: from then on nobody can name what it stored; then
//! its keys are destroyed, where there are any (keys.rs); then the records go.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use anyhow::Context;
use esker_prefix::{RootSecret, ScopeKey, ScopeKind, ScopeTag};
use esker_proto::v1;
use esker_store::{Erase, Store, StoreError};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::audit::{Audit, Event};
use crate::budget::{Budget, Share, Use};
use crate::candidates::{Peers, Sight};
use crate::control::{Control, Table};
use crate::gate::{Gate, Pass};
use crate::keys::Keys;
use crate::policy::{PolicyFile, TenantPolicy};
use crate::principal::{Principal, Role, TenantId, is_name};
use crate::replay::Owner;
use crate::users::{self, Busy, MAX_USERS, Users};
use crate::writers::{Place, Writers};

/// All tenants of a node.
pub(crate) struct Tenants {
    root: RootSecret,
    policy: Arc<PolicyFile>,
    control: Arc<Control>,
    keys: Option<Arc<Keys>>,
    store: Arc<Store>,
    budget: Arc<Budget>,
    audit: Arc<Audit>,
    writers: Writers,
    known: RwLock<HashMap<TenantId, Arc<Tenant>>>,
}

/// One of them.
pub(crate) struct Tenant {
    id: TenantId,
    state: Mutex<State>,
    /// What it stores goes through here.
    gate: Arc<Gate>,
    /// One erasure at a time: a second one must not open the gate that the first has closed.
    erasing: Mutex<()>,
    in_flight: AtomicU64,
    rates: Mutex<Rates>,
}

#[derive(Default)]
struct State {
    record: Record,
    /// Users that stored something in this epoch.
    users: Users,
}

/// What is written down of a tenant. Its users have rows of their own (users.rs).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record {
    epoch: u32,
    /// Where earlier builds had all users of this epoch.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    users: BTreeSet<String>,
    /// Epochs given up whose records may not all be gone, with the users that earlier builds had here.
    erasing: Vec<(u32, BTreeSet<String>)>,
}

/// Limiters, and the limits that they were made for.
#[derive(Default)]
struct Rates {
    puts: Option<(u32, DefaultDirectRateLimiter)>,
    hashes: Option<(u32, DefaultDirectRateLimiter)>,
}

/// A share of the node's bytes in flight that counts as a tenant's, given back when it is dropped.
pub(crate) struct InFlight {
    tenant: Arc<Tenant>,
    /// Of all that is the tenant's.
    limit_bytes: u64,
    share: Share,
    audit: Arc<Audit>,
}

impl Tenants {
    /// Erasures that a crash cut short are not over yet: [`Tenants::finish_erasures`].
    pub(crate) fn open(
        root: RootSecret,
        policy: Arc<PolicyFile>,
        control: Arc<Control>,
        keys: Option<Arc<Keys>>,
        store: &Arc<Store>,
        budget: &Arc<Budget>,
        audit: Arc<Audit>,
    ) -> anyhow::Result<Self> {
        let writers = Writers::open(Arc::clone(&control))?;
        store.set_owners(writers.owners());
        let (store, budget, known) = (Arc::clone(store), Arc::clone(budget), RwLock::default());
        let tenants = Self { root, policy, control, keys, store, budget, audit, writers, known };
        for (name, mut record) in tenants.control.scan::<Record>(Table::Tenants, "", "", usize::MAX)? {
            let id = TenantId(name);
            if !record.users.is_empty() {
                for user in &std::mem::take(&mut record.users) {
                    tenants.control.put(Table::Users, &users::row(&id, record.epoch, user), &())?;
                }
                tenants.control.put(Table::Tenants, &id.0, &record)?;
            }
            tenants.insert(id, record);
        }
        for (row, ()) in tenants.control.scan::<()>(Table::Users, "", "", usize::MAX)? {
            let Some((id, epoch, user)) = users::of_row(&row) else { continue };
            let tenant = tenants.get(&id);
            let mut state = tenant.state();
            if state.record.epoch == epoch {
                state.users.add(user, tenants.private_at(&id, user, epoch).tag());
            }
        }
        Ok(tenants)
    }

    /// Finishes the erasures that a crash cut short, once what jobs and sessions had written down of them is gone.
    pub(crate) fn finish_erasures(&self) -> anyhow::Result<()> {
        let known: Vec<Arc<Tenant>> = self.known().values().cloned().collect();
        for tenant in known.iter().filter(|tenant| !tenant.state().record.erasing.is_empty()) {
            tracing::warn!(tenant = %tenant.id, "an erasure that was cut short is finished");
            self.finish_erasing(tenant, &self.store)?;
        }
        Ok(())
    }

    /// The tenant of a principal.
    pub(crate) fn of(&self, principal: &Principal) -> Arc<Tenant> {
        self.get(&principal.tenant)
    }

    pub(crate) fn get(&self, id: &TenantId) -> Arc<Tenant> {
        let known = self.known().get(id).cloned();
        known.unwrap_or_else(|| self.insert(id.clone(), Record::default()))
    }

    fn insert(&self, id: TenantId, record: Record) -> Arc<Tenant> {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let state = Mutex::new(State { record, users: Users::default() });
            let (gate, erasing) = (Arc::default(), Mutex::default());
            let (in_flight, rates) = (AtomicU64::new(0), Mutex::default());
            Arc::new(Tenant { id: id.clone(), state, gate, erasing, in_flight, rates })
        };
        Arc::clone(known.entry(id.clone()).or_insert_with(new))
    }

    fn known(&self) -> RwLockReadGuard<'_, HashMap<TenantId, Arc<Tenant>>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every tenant of the policy and every one that stored something, by name.
    pub(crate) fn names(&self) -> BTreeSet<TenantId> {
        let known = self.known();
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
        scopes.extend(self.public_of(&principal.tenant).ok());
        Ok(scopes)
    }

    /// Lets in what is stored or written down for a tenant, until it is erased.
    pub(crate) fn pass(&self, tenant: &TenantId) -> Pass {
        let tenant = self.get(tenant);
        tenant.gate.pass(tenant.epoch())
    }

    /// What a tenant finds by the names of its org's scope, if it has one.
    pub(crate) fn sight(&self, tenant: &TenantId) -> Sight {
        let epoch = self.get(tenant).epoch();
        let rules = self.rules(tenant);
        let candidates = rules.org.map(|org| {
            let own = self.candidates_at(&org, tenant, epoch);
            Sight::of(self.org_key(&org).tag(), self.owned(own, || private_owner(tenant, epoch)))
        });
        candidates.unwrap_or_default()
    }

    /// Keys of the candidates that the other tenants of its org have.
    fn peers(&self, tenant: &TenantId) -> Vec<ScopeKey> {
        let policy = self.policy.now();
        let Some(org) = policy.tenants.get(tenant).and_then(|rules| rules.org.as_ref()) else {
            return Vec::new();
        };
        let others =
            policy.tenants.iter().filter(|(id, rules)| *id != tenant && rules.org.as_ref() == Some(org));
        let key = |id: &TenantId| self.candidates_at(org, id, self.get(id).epoch());
        let keys = others.map(|(id, _)| key(id));
        keys.filter(|key| self.store.scope_bytes(key.tag()) > 0).collect()
    }

    /// Where a principal finds its own, and stores nothing.
    pub(crate) fn own_place(&self, principal: &Principal, user: &str) -> Result<Place, Status> {
        Ok(Place::unshared(self.private(&principal.tenant, user)?))
    }

    /// Where a principal may write by this name of a scope. A scope or a writer that is new is written down first, so that it can be
    /// erased; RESOURCE_EXHAUSTED where there is no room for more of them.
    pub(crate) fn writable(
        &self,
        principal: &Principal,
        user: &str,
        scope: v1::Scope,
    ) -> Result<Place, Status> {
        // Before the scope is made: what an erasure comes between is of the epoch before.
        let pass = self.pass(&principal.tenant);
        let mut noted = None;
        let key = match scope {
            v1::Scope::Unspecified | v1::Scope::Private => {
                principal.require(Role::Writer)?;
                check_user(user)?;
                let (key, busy) = self.note(&principal.tenant, user)?;
                noted = busy;
                key
            }
            v1::Scope::Org => {
                principal.require(Role::Writer)?;
                self.org(&principal.tenant).ok_or_else(no_org)?
            }
            v1::Scope::Public => {
                principal.require(Role::Publisher)?;
                self.public_of(&principal.tenant)?
            }
        };
        let writer = self.writers.number(principal).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "a writer was not written down");
            unwritten()
        })?;
        let sight = self.sight(&principal.tenant).within(key.tag());
        let others = if sight.tag().is_some() { self.peers(&principal.tenant) } else { Vec::new() };
        let peers = Peers { others, trusted: principal.roles.has(Role::Publisher) };
        Ok(Place { key, writer, sight, peers, pass, _user: noted })
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
            // Its events tell a tenant whether another one has put what it puts.
            v1::Scope::Org => {
                principal.require(Role::Publisher)?;
                self.org(&principal.tenant).ok_or_else(no_org)
            }
            v1::Scope::Public => self.public_of(&principal.tenant),
        }
    }

    fn private(&self, tenant: &TenantId, user: &str) -> Result<ScopeKey, Status> {
        check_user(user)?;
        Ok(self.private_at(tenant, user, self.get(tenant).epoch()))
    }

    /// '/' is in no name, so a user's scope is never another tenant's.
    fn private_at(&self, tenant: &TenantId, user: &str, epoch: u32) -> ScopeKey {
        let id = if user.is_empty() { tenant.0.clone() } else { format!("{tenant}/{user}") };
        ScopeKey::derive(&self.root, ScopeKind::Private, &id, epoch)
    }

    fn org(&self, tenant: &TenantId) -> Option<ScopeKey> {
        let org = self.rules(tenant).org?;
        Some(self.owned(self.org_key(&org), || format!("org/{org}")))
    }

    /// In epoch 0 earlier builds kept what one tenant alone had put in the same scope.
    fn org_key(&self, org: &str) -> ScopeKey {
        ScopeKey::derive(&self.root, ScopeKind::Org, org, 1)
    }

    /// Of what a tenant alone has put to its org. '/' is in no name, so it is never the scope of another org.
    fn candidates_at(&self, org: &str, tenant: &TenantId, epoch: u32) -> ScopeKey {
        ScopeKey::derive(&self.root, ScopeKind::Org, &format!("{org}/{tenant}"), epoch)
    }

    /// The scope of all, for a tenant to which the policy opens it.
    fn public_of(&self, tenant: &TenantId) -> Result<ScopeKey, Status> {
        self.rules(tenant).public.then(|| self.public()).ok_or_else(|| {
            Status::permission_denied(
                "the operator's policy opens the public scope to this tenant by `public = true`",
            )
        })
    }

    fn public(&self) -> ScopeKey {
        self.owned(ScopeKey::derive(&self.root, ScopeKind::Public, "public", 0), || "public".into())
    }

    /// Tells the keeper of the keys whose scope this is. Of scopes that are only read it need not know.
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

    /// The scope of a user, who is written down before anything is stored for it.
    fn note(&self, tenant: &TenantId, user: &str) -> Result<(ScopeKey, Option<Busy>), Status> {
        let tenant = self.get(tenant);
        let mut state = tenant.state();
        let State { record, users } = &mut *state;
        let key = self.private_at(&tenant.id, user, record.epoch);
        let busy = if user.is_empty() {
            None
        } else if let Some(busy) = users.busy(user) {
            Some(busy)
        } else {
            if users.is_full() {
                self.make_room(&tenant.id, record.epoch, users)?;
            }
            let row = users::row(&tenant.id, record.epoch, user);
            self.control.put(Table::Users, &row, &()).map_err(|error| {
                tracing::error!(error = format!("{error:#}"), "a user was not written down");
                unwritten()
            })?;
            users.add(user, key.tag());
            users.busy(user)
        };
        let epoch = record.epoch;
        Ok((self.owned(key, || private_owner(&tenant.id, epoch)), busy))
    }

    /// Forgets the users of a tenant of whom nothing is stored any more.
    fn make_room(&self, tenant: &TenantId, epoch: u32, users: &mut Users) -> Result<(), Status> {
        let idle = users.idle(Instant::now(), |scope| self.store.scope_bytes(scope) > 0);
        if idle.is_empty() {
            return Err(self.over(
                tenant,
                "users",
                MAX_USERS as u64,
                MAX_USERS as u64,
                users::LOOK_INTERVAL_MS,
            ));
        }
        let rows: Vec<String> = idle.iter().map(|user| users::row(tenant, epoch, user)).collect();
        self.control.delete_all(Table::Users, &rows).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "users could not be forgotten");
            unwritten()
        })?;
        for scope in idle.iter().filter_map(|user| users.remove(user)) {
            self.keys.iter().for_each(|keys| keys.disown(scope));
        }
        Ok(())
    }

    fn save(&self, tenant: &TenantId, record: &Record) -> Result<(), Status> {
        self.control.put(Table::Tenants, &tenant.0, record).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "a tenant's record was not written");
            unwritten()
        })
    }

    /// The private scopes of a tenant.
    pub(crate) fn scopes(&self, tenant: &TenantId) -> Vec<ScopeTag> {
        let tenant = self.get(tenant);
        let state = tenant.state();
        let own = self.private_at(&tenant.id, "", state.record.epoch).tag();
        std::iter::once(own).chain(state.users.all().map(|(_, scope)| scope)).collect()
    }

    /// Whose each scope is, for people.
    pub(crate) fn owners(&self) -> HashMap<ScopeTag, String> {
        let mut owners = HashMap::from([(self.public().tag(), "public".to_owned())]);
        for id in self.names() {
            if let Some(org) = self.rules(&id).org {
                owners.insert(self.org_key(&org).tag(), format!("org {org}"));
            }
            if let Some(candidates) = self.sight(&id).tag() {
                owners.insert(candidates, format!("{id} alone, for its org"));
            }
            let tenant = self.get(&id);
            let state = tenant.state();
            owners.insert(self.private_at(&id, "", state.record.epoch).tag(), id.0.clone());
            owners.extend(state.users.all().map(|(user, scope)| (scope, format!("{id}/{user}"))));
        }
        owners
    }

    /// Bytes of the records that a tenant's accounts have put, in whatever scope. A few sums that are kept: cheap.
    pub(crate) fn stored_bytes(&self, store: &Store, tenant: &TenantId) -> u64 {
        self.writers.of(tenant).iter().map(|writer| store.writer_bytes(*writer)).sum()
    }

    /// Bytes of the records in a tenant's private scopes: what it may be told. Asks for each user. Of what it has put to its org
    /// nothing: whether that lies with its candidates says whether another tenant has put the same.
    pub(crate) fn private_bytes(&self, store: &Store, tenant: &TenantId) -> u64 {
        self.scopes(tenant).into_iter().map(|scope| store.scope_bytes(scope)).sum()
    }

    /// Bytes of the records that a tenant's accounts have put, in whatever scope: what it gives of when the store is full.
    pub(crate) fn held_bytes(&self, store: &Store, tenant: &TenantId) -> u64 {
        self.writers.owner(tenant).map_or(0, |owner| store.owner_bytes(owner))
    }

    /// Erases a tenant: its keys are given up, durably; `stop` ends what is under way and forgets what was written down of it; then
    /// its records go. Nothing is stored for it meanwhile, so that nothing is acknowledged and then erased. Returns objects and
    /// epochs. What fails is done at the next start, or when it is asked again; until then the tenant stores nothing.
    pub(crate) fn erase(
        &self,
        store: &Store,
        tenant: &TenantId,
        stop: impl FnOnce() -> Result<(), Status>,
    ) -> Result<(u64, Vec<u32>), Status> {
        let tenant = self.get(tenant);
        let _alone = tenant.erasing.lock().unwrap_or_else(PoisonError::into_inner);
        // Before anything that may fail: nothing that is encrypted can be read from here on.
        let epoch = tenant.epoch();
        self.destroy_key(&tenant, epoch).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "a key could not be destroyed");
            Status::unavailable("the key could not be destroyed: try again; the node's log says why")
        })?;
        tenant.gate.close();
        if let Err(error) = self.give_up(&tenant) {
            // Nothing was erased.
            tenant.gate.open_from(epoch);
            return Err(error);
        }
        let stopped = stop();
        let erased = self.finish_erasing(&tenant, store).map_err(|error| {
            tracing::error!(error = format!("{error:#}"), "an erasure could not be finished");
            Status::unavailable(
                "the keys are given up; the records go when the node can write again, and it stores nothing for this tenant \
                 until then: erase it again, or start the node again",
            )
        });
        if erased.is_ok() {
            tenant.gate.open_from(tenant.epoch());
        }
        stopped.and(erased)
    }

    /// The next epoch begins, durably.
    fn give_up(&self, tenant: &Tenant) -> Result<(), Status> {
        let mut state = tenant.state();
        let mut next = state.record.clone();
        next.erasing.push((next.epoch, BTreeSet::new()));
        next.epoch += 1;
        self.save(&tenant.id, &next)?;
        *state = State { record: next, users: Users::default() };
        Ok(())
    }

    fn destroy_key(&self, tenant: &Tenant, epoch: u32) -> anyhow::Result<()> {
        let owner = private_owner(&tenant.id, epoch);
        if let Some(keys) = &self.keys {
            keys.destroy(&owner).context("keys cannot be destroyed")?;
        }
        Ok(())
    }

    fn finish_erasing(&self, tenant: &Tenant, store: &Store) -> anyhow::Result<(u64, Vec<u32>)> {
        let erasing = tenant.state().record.erasing.clone();
        let (mut objects, mut epochs, mut rows) = (0, Vec::new(), Vec::new());
        for (epoch, users) in &erasing {
            // First the keys: from here on nothing of it can be read, whatever becomes of the rest.
            self.destroy_key(tenant, *epoch)?;
            let noted =
                self.control.scan::<()>(Table::Users, &users::row(&tenant.id, *epoch, ""), "", usize::MAX)?;
            rows.extend(noted.into_iter().map(|(row, ())| row));
            let noted = rows.iter().filter_map(|row| users::of_row(row)).filter(|(_, of, _)| of == epoch);
            let names = noted.map(|(_, _, user)| user).chain(users.iter().map(String::as_str));
            for user in std::iter::once("").chain(names) {
                let scope = self.private_at(&tenant.id, user, *epoch).tag();
                objects += store.erase(Erase::Scope(scope)).context("a scope cannot be erased")?;
            }
            epochs.push(*epoch);
        }
        // What its accounts put for its org: where it alone finds it, and where others do.
        for writer in self.writers.of(&tenant.id).iter() {
            objects += store.erase(Erase::Writer(*writer)).context("a writer cannot be erased")?;
        }
        self.control.delete_all(Table::Users, &rows)?;
        self.control.expunge()?;
        let mut state = tenant.state();
        state.record.erasing.retain(|(epoch, _)| !epochs.contains(epoch));
        self.control.put(Table::Tenants, &tenant.id.0, &state.record)?;
        Ok((objects, epochs))
    }

    /// Objects that a tenant may put in one second.
    pub(crate) fn puts_at_once(&self, tenant: &Tenant) -> usize {
        let limit = self.rules(&tenant.id).puts_per_s;
        limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX).max(1))
    }

    /// Takes `count` of the tenant's rate of puts; counted only where there is a limit.
    pub(crate) fn charge_puts(&self, tenant: &Tenant, count: impl FnOnce() -> usize) -> Result<(), Status> {
        let limit = self.rules(&tenant.id).puts_per_s;
        let count = limit.map_or(0, |_| count());
        let mut rates = tenant.rates.lock().unwrap_or_else(PoisonError::into_inner);
        self.charge(tenant, &mut rates.puts, "puts_per_s", limit, count)
    }

    /// Takes `count` of the tenant's rate of looked-up blocks.
    pub(crate) fn charge_hashes(&self, tenant: &Tenant, count: usize) -> Result<(), Status> {
        let limit = self.rules(&tenant.id).hashes_per_s;
        let mut rates = tenant.rates.lock().unwrap_or_else(PoisonError::into_inner);
        self.charge(tenant, &mut rates.hashes, "hashes_per_s", limit, count)
    }

    /// Takes a share of the node's bytes in flight, and of what of them this tenant may have. Where there are several tenants none
    /// gets all.
    pub(crate) fn fly(&self, tenant: &Arc<Tenant>, of: Use, bytes: u64) -> Result<InFlight, Status> {
        let mut in_flight = self.none_in_flight(tenant, of);
        in_flight.grow(bytes)?;
        Ok(in_flight)
    }

    /// The same for somebody who can do with less, and is not refused without it.
    pub(crate) fn try_fly(&self, tenant: &Arc<Tenant>, of: Use, bytes: u64) -> Option<InFlight> {
        let mut in_flight = self.none_in_flight(tenant, of);
        in_flight.charge(bytes).ok()?;
        in_flight.share.grow(bytes).inspect_err(|_| in_flight.give(bytes)).ok()?;
        Some(in_flight)
    }

    fn none_in_flight(&self, tenant: &Arc<Tenant>, of: Use) -> InFlight {
        let most = if self.policy.is_file() { self.budget.limit_bytes() / 4 * 3 } else { u64::MAX };
        let limit_bytes = self.rules(&tenant.id).bytes_in_flight.unwrap_or(most);
        let (tenant, audit) = (Arc::clone(tenant), Arc::clone(&self.audit));
        InFlight { tenant, limit_bytes, share: self.budget.share(of), audit }
    }

    /// Refuses a tenant that stores as much as it may.
    pub(crate) fn admit_stored(&self, store: &Store, tenant: &Tenant) -> Result<(), Status> {
        let Some(limit) = self.rules(&tenant.id).stored_bytes else { return Ok(()) };
        let used = self.stored_bytes(store, &tenant.id);
        // Not by how much: what others have put first does not count here, and is not this tenant's to know.
        if used < limit { Ok(()) } else { Err(self.over(&tenant.id, "stored_bytes", limit, limit, 60_000)) }
    }

    /// What a tenant is told that has used a quota up: which, and when to come again.
    pub(crate) fn over(
        &self,
        tenant: &TenantId,
        quota: &'static str,
        limit: u64,
        used: u64,
        retry_after_ms: u64,
    ) -> Status {
        self.audit.record(&Event::over_quota(tenant, quota));
        over(quota, limit, used, retry_after_ms)
    }

    fn charge(
        &self,
        tenant: &Tenant,
        limiter: &mut Option<(u32, DefaultDirectRateLimiter)>,
        quota: &'static str,
        limit: Option<u32>,
        count: usize,
    ) -> Result<(), Status> {
        let over = |limit: u32, retry_after_ms| {
            self.over(&tenant.id, quota, limit.into(), limit.into(), retry_after_ms)
        };
        let Some(limit) = limit else { return Ok(()) };
        let Some(limit) = NonZeroU32::new(limit) else { return Err(over(0, 60_000)) };
        let Some(count) = NonZeroU32::new(u32::try_from(count).unwrap_or(u32::MAX)) else { return Ok(()) };
        if limiter.as_ref().is_none_or(|(made_for, _)| *made_for != limit.get()) {
            *limiter = Some((limit.get(), RateLimiter::direct(Quota::per_second(limit))));
        }
        let (_, limiter) = limiter.as_ref().expect("made above");
        match limiter.check_n(count) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(over(limit.get(), 1000)),
            Err(_) => Err(Status::invalid_argument(format!(
                "{count} at once are more than this tenant's {quota} of {limit} allows in a whole second"
            ))),
        }
    }
}

impl Tenant {
    pub(crate) fn id(&self) -> &TenantId {
        &self.id
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.state().record.epoch
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InFlight {
    /// Takes more. One thing alone may be more than its tenant may have, but not more than there is.
    pub(crate) fn grow(&mut self, bytes: u64) -> Result<(), Status> {
        self.charge(bytes).map_err(|used| {
            self.audit.record(&Event::over_quota(&self.tenant.id, "bytes_in_flight"));
            over("bytes_in_flight", self.limit_bytes, used, 100)
        })?;
        self.share.grow(bytes).inspect_err(|_| self.give(bytes))
    }

    /// Of what the tenant may have. Without it: what is used.
    fn charge(&self, bytes: u64) -> Result<(), u64> {
        let room = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.limit_bytes || used == 0);
        self.tenant.in_flight.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).map(drop)
    }

    fn give(&self, bytes: u64) {
        self.tenant.in_flight.fetch_sub(bytes, Ordering::AcqRel);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.tenant.in_flight.fetch_sub(self.share.bytes(), Ordering::AcqRel);
    }
}

fn check_user(user: &str) -> Result<(), Status> {
    if user.is_empty() || is_name(user) {
        return Ok(());
    }
    Err(Status::invalid_argument("`user` must be 1 to 128 ASCII letters, digits, '-', '_', '.', '@' or ':'"))
}

fn unwritten() -> Status {
    Status::unavailable("the node cannot write what it must not forget; its log says why")
}

fn no_org() -> Status {
    Status::permission_denied("the operator's policy joins this tenant to no org")
}

/// Whose keys encrypt what a tenant stores. '/' and '#' are in no name.
fn private_owner(tenant: &TenantId, epoch: u32) -> String {
    format!("private/{tenant}#{epoch}")
}

/// The pushback is in the metadata that gRPC clients honour.
pub(crate) fn over(quota: &'static str, limit: u64, used: u64, retry_after_ms: u64) -> Status {
    crate::metrics::refused(quota);
    let text = format!("quota {quota}: limit {limit}, used {used}; try again in {retry_after_ms} ms");
    exhausted(text, retry_after_ms)
}

/// What a caller is told when something of the whole node is used up: not how much others use.
pub(crate) fn full(what: &'static str, limit: u64, retry_after_ms: u64) -> Status {
    crate::metrics::refused(what);
    let text = format!("{what} of this node: the limit is {limit}; try again in {retry_after_ms} ms");
    exhausted(text, retry_after_ms)
}

/// RESOURCE_EXHAUSTED, with the time after which it makes sense to ask again.
pub(crate) fn exhausted(text: impl Into<String>, retry_after_ms: u64) -> Status {
    let mut status = Status::resource_exhausted(text);
    status.metadata_mut().insert("grpc-retry-pushback-ms", retry_after_ms.into());
    status
}

#[cfg(test)]
mod tests;
