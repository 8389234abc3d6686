//! Writers: a number for every account that ever put something, so that each record says whose word it is.
//!
//! Numbers are given in order, written down before the first record that has one, and never given again. Two things hang on them.
//! They tell the store for which tenant the bytes of a record count when it is full ([`Writers::owners`]). And what an account has
//! put can be taken back as a whole, whatever scope it lies in (`Admin.RevokeWriter`).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, ensure};
use esker_prefix::{ScopeKey, WriterId};
use esker_store::{OwnerId, OwnerOf};

use crate::candidates::{Peers, Sight};
use crate::control::{Control, Table};
use crate::gate::Pass;
use crate::principal::{Principal, TenantId};
use crate::users::Busy;

/// Accounts that are told apart.
const MAX_WRITERS: usize = 1_000_000;

/// All writers of a node.
pub(crate) struct Writers {
    control: Arc<Control>,
    known: Arc<RwLock<Known>>,
}

#[derive(Default)]
struct Known {
    /// By `tenant/account`; '/' is in no name.
    numbers: HashMap<String, WriterId>,
    tenants: HashMap<TenantId, OfTenant>,
    owners: HashMap<WriterId, OwnerId>,
    newest: u32,
}

struct OfTenant {
    /// What the store knows it by, in this process.
    owner: OwnerId,
    writers: Arc<HashSet<WriterId>>,
}

/// Where something is stored, and on whose word.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) key: ScopeKey,
    pub(crate) writer: WriterId,
    /// What is found by the names of this scope.
    pub(crate) sight: Sight,
    pub(crate) peers: Peers,
    /// Lets in what is stored here, until the tenant is erased.
    pub(crate) pass: Pass,
    /// The user whose scope it is, who is not forgotten meanwhile.
    pub(crate) _user: Option<Busy>,
}

impl Writers {
    pub(crate) fn open(control: Arc<Control>) -> anyhow::Result<Self> {
        let mut known = Known::default();
        for (name, number) in control.scan::<u32>(Table::Writers, "", "", usize::MAX)? {
            known.add(name, WriterId(number));
        }
        Ok(Self { control, known: Arc::new(RwLock::new(known)) })
    }

    /// The number of an account. The first time it is written down before this returns.
    pub(crate) fn number(&self, principal: &Principal) -> anyhow::Result<WriterId> {
        let name = name(&principal.tenant, &principal.name);
        if let Some(&number) = self.read().numbers.get(&name) {
            return Ok(number);
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(&number) = known.numbers.get(&name) {
            return Ok(number);
        }
        ensure!(known.numbers.len() < MAX_WRITERS, "{MAX_WRITERS} accounts have put something, the limit");
        // The one after the last would be that of nobody.
        let number =
            known.newest.checked_add(1).map(WriterId).context("the numbers of writers are used up")?;
        self.control.put(Table::Writers, &name, &number.0)?;
        known.add(name, number);
        Ok(number)
    }

    /// The number of an account that has put something.
    pub(crate) fn find(&self, tenant: &TenantId, account: &str) -> Option<WriterId> {
        self.read().numbers.get(&name(tenant, account)).copied()
    }

    /// The numbers of a tenant's accounts.
    pub(crate) fn of(&self, tenant: &TenantId) -> Arc<HashSet<WriterId>> {
        self.read().tenants.get(tenant).map(|of| Arc::clone(&of.writers)).unwrap_or_default()
    }

    /// What the store knows a tenant by that has put something.
    pub(crate) fn owner(&self, tenant: &TenantId) -> Option<OwnerId> {
        self.read().tenants.get(tenant).map(|of| of.owner)
    }

    /// Whose each writer is, for the store: a tenant is one owner, whatever accounts and users it has.
    pub(crate) fn owners(&self) -> OwnerOf {
        let known = Arc::clone(&self.known);
        Box::new(move |writer| {
            let known = known.read().unwrap_or_else(PoisonError::into_inner);
            known.owners.get(&writer).copied().unwrap_or(OwnerId::NOBODY)
        })
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn add(&mut self, name: String, number: WriterId) {
        if let Some((tenant, _)) = name.split_once('/') {
            // 0 is nobody's. Bounded by MAX_WRITERS.
            let owner = OwnerId(u32::try_from(self.tenants.len()).map_or(u32::MAX, |tenants| tenants + 1));
            let new = || OfTenant { owner, writers: Arc::default() };
            let of = self.tenants.entry(TenantId(tenant.into())).or_insert_with(new);
            Arc::make_mut(&mut of.writers).insert(number);
            self.owners.insert(number, of.owner);
        }
        self.newest = self.newest.max(number.0);
        self.numbers.insert(name, number);
    }
}

impl Place {
    /// A scope of one tenant, and nobody who was named.
    pub(crate) fn unshared(key: ScopeKey) -> Self {
        let (sight, peers) = (Sight::default(), Peers::default());
        Self { key, writer: WriterId::UNNAMED, sight, peers, pass: Pass::default(), _user: None }
    }
}

fn name(tenant: &TenantId, account: &str) -> String {
    format!("{tenant}/{account}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::principal::Roles;

    #[test]
    fn numbers_are_an_accounts_own_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Writers::open(Arc::new(Control::open(dir.path()).unwrap())).unwrap();
        let account = |tenant: &str, name: &str| Principal {
            tenant: TenantId(tenant.into()),
            name: name.into(),
            roles: Roles::default(),
        };
        let writers = open();
        let numbers = [("a", "x"), ("a", "y"), ("b", "x"), ("a", "x")]
            .map(|(tenant, name)| writers.number(&account(tenant, name)).unwrap().0);
        assert_eq!(numbers, [1, 2, 3, 1]);
        drop(writers);
        let writers = open();
        assert_eq!(writers.find(&TenantId("b".into()), "x"), Some(WriterId(3)));
        assert_eq!(writers.find(&TenantId("b".into()), "y"), None);
        assert_eq!(*writers.of(&TenantId("a".into())), HashSet::from([WriterId(1), WriterId(2)]));
        let owner_of = writers.owners();
        let owner = |writer| owner_of(WriterId(writer));
        assert_eq!(owner(1), owner(2), "two accounts of one tenant");
        assert_ne!(owner(1), owner(3));
        assert_eq!(Some(owner(3)), writers.owner(&TenantId("b".into())));
        assert_eq!((owner(0), owner(4)), (OwnerId::NOBODY, OwnerId::NOBODY));
        assert_eq!(writers.number(&account("b", "y")).unwrap(), WriterId(4));
        assert_eq!(owner(4), owner(3), "one that came later");
    }
}
