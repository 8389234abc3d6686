//! The users below a tenant: each a scope of its own, written down before anything is stored in it, so that it can be erased.
//!
//! One row of the control database for each, `TENANT/EPOCH/USER`: a request with a new user writes one row, whatever the others
//! are. Their number is bounded. A user of whom nothing is stored any more, and for whom nobody is about to store, can be
//! forgotten: the scope of one who comes again is the same. Should a record of it be hidden meanwhile, for a read failed, an erasure
//! of the tenant reaches it all the same: by the account that put it (writers.rs).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use esker_prefix::ScopeTag;

use crate::principal::TenantId;

/// Users of one tenant that are told apart.
pub(crate) const MAX_USERS: usize = if cfg!(test) { 20 } else { 100_000 };
/// At the limit users are looked through for those that can be forgotten this often at most.
pub(crate) const LOOK_INTERVAL_MS: u64 = 10_000;
/// What was on its way to the store when its request ended is there, or is lost, after so long.
const UNDER_WAY: Duration = Duration::from_secs(600);

/// Users of a tenant in one epoch.
#[derive(Default)]
pub(crate) struct Users {
    known: HashMap<String, Arc<User>>,
    looked: Option<Instant>,
}

struct User {
    scope: ScopeTag,
    /// When the last request that may have stored something for it ended; `None` if none has in this process.
    used: Mutex<Option<Instant>>,
}

/// Whoever has this may store something for a user.
#[derive(Clone)]
pub(crate) struct Busy(Arc<User>);

impl Users {
    pub(crate) fn add(&mut self, user: &str, scope: ScopeTag) {
        self.known.insert(user.to_owned(), Arc::new(User { scope, used: Mutex::new(None) }));
    }

    /// Its scope, if it was known.
    pub(crate) fn remove(&mut self, user: &str) -> Option<ScopeTag> {
        self.known.remove(user).map(|user| user.scope)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.known.len() >= MAX_USERS
    }

    /// A user that is known, to store something for it.
    pub(crate) fn busy(&self, user: &str) -> Option<Busy> {
        self.known.get(user).cloned().map(Busy)
    }

    /// Their names and scopes.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, ScopeTag)> {
        self.known.iter().map(|(name, user)| (name.as_str(), user.scope))
    }

    /// Users that can be forgotten. None if they were looked through just now.
    pub(crate) fn idle(&mut self, now: Instant, stores: impl Fn(ScopeTag) -> bool) -> Vec<String> {
        let interval = Duration::from_millis(LOOK_INTERVAL_MS);
        if self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < interval) {
            return Vec::new();
        }
        self.looked = Some(now);
        let idle = self.known.iter().filter(|(_, user)| user.is_idle(now) && !stores(user.scope));
        idle.map(|(name, _)| name.clone()).collect()
    }
}

impl User {
    fn is_idle(self: &Arc<Self>, now: Instant) -> bool {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::strong_count(self) == 1
            && used.is_none_or(|used| now.saturating_duration_since(used) >= UNDER_WAY)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

/// The row of a user, or what those of a tenant's epoch begin with. '/' is in no name.
pub(crate) fn row(tenant: &TenantId, epoch: u32, user: &str) -> String {
    format!("{tenant}/{epoch:08x}/{user}")
}

/// Whose row it is.
pub(crate) fn of_row(row: &str) -> Option<(TenantId, u32, &str)> {
    let (tenant, rest) = row.split_once('/')?;
    let (epoch, user) = rest.split_once('/')?;
    Some((TenantId(tenant.to_owned()), u32::from_str_radix(epoch, 16).ok()?, user))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_stores_or_may_still_store_is_not_forgotten() {
        let stores = |scope| scope == ScopeTag([6; 16]);
        let mut users = Users::default();
        users.add("stores", ScopeTag([6; 16]));
        ["writes", "wrote", "idle"].iter().for_each(|user| users.add(user, ScopeTag([1; 16])));
        let writing = users.busy("writes").unwrap();
        drop(users.busy("wrote"));
        let now = Instant::now();
        assert_eq!(users.idle(now, stores), ["idle"]);
        assert_eq!(users.idle(now, stores), [""; 0], "they were looked through just now");
        let mut later = users.idle(now + UNDER_WAY, stores);
        later.sort();
        assert_eq!(later, ["idle", "wrote"]);
        drop(writing);
        assert_eq!(users.idle(now + 3 * UNDER_WAY, stores).len(), 3);
        assert_eq!(users.remove("stores"), Some(ScopeTag([6; 16])));
        assert_eq!(users.remove("stores"), None);
    }

    #[test]
    fn a_row_tells_whose_it_is() {
        let tenant = TenantId("acme".into());
        assert_eq!(of_row(&row(&tenant, 258, "key:ab@c")), Some((tenant.clone(), 258, "key:ab@c")));
        assert!(row(&tenant, 258, "x").starts_with(&row(&tenant, 258, "")));
        assert_eq!(of_row("acme"), None);
        assert_eq!(of_row("acme/x/y"), None);
    }
}
