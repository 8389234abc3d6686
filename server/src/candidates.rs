//! Candidates: what one tenant alone has put into the scope of its org.
//!
//! Several tenants write to the scope of an org. What one of them says may be wrong on purpose, and that it is there tells what that
//! tenant was asked. So it is stored in a scope of the tenant's own, under a name that is made of the org's name for it and of a
//! key that only this tenant has: nobody else finds it, it is in nobody's way, and it is encrypted, counted and erased with its
//! tenant. What a second tenant puts with the same bytes, or a publisher, is stored under the org's own name, for all of its
//! tenants; as everything it needs its parent there, so that a prefix is found by all as far as two have put it. A tenant finds
//! the org's run of blocks and, behind it, its own.

use std::collections::HashMap;

use esker_prefix::{NamespaceId, ObjectId, ScopeKey, ScopeTag, rekey};
use esker_store::{Found, PutObject, Store};

/// What a tenant finds under the names of a scope.
#[derive(Clone, Default)]
pub(crate) struct Sight(Option<Candidates>);

/// A tenant's own in the scope of its org.
#[derive(Clone)]
struct Candidates {
    org: ScopeTag,
    own: ScopeKey,
}

/// Who else may have said what is put.
#[derive(Clone, Default)]
pub(crate) struct Peers {
    /// Keys of their candidates.
    pub(crate) others: Vec<ScopeKey>,
    /// The word of who puts is enough for everyone.
    pub(crate) trusted: bool,
}

/// Where the objects of a put have gone, by their names in its scope: whether to the candidates.
pub(crate) type Gone = HashMap<ObjectId, bool>;

/// An object that has its place.
pub(crate) struct Placed {
    pub(crate) object: PutObject,
    /// It was there, as whoever puts it can tell, and is stored once more, for others.
    pub(crate) known: bool,
}

impl Sight {
    /// That of a tenant with these candidates in the scope of its org.
    pub(crate) fn of(org: ScopeTag, own: ScopeKey) -> Self {
        Self(Some(Candidates { org, own }))
    }

    /// The same for the names of one scope.
    pub(crate) fn within(&self, scope: ScopeTag) -> Self {
        Self(self.0.clone().filter(|candidates| candidates.org == scope))
    }

    /// Where the candidates are, if there are any.
    pub(crate) fn tag(&self) -> Option<ScopeTag> {
        self.0.as_ref().map(|candidates| candidates.own.tag())
    }

    /// Whether a scope is that of the org, or of the candidates for it.
    pub(crate) fn is_of(&self, scope: ScopeTag) -> bool {
        self.0.as_ref().is_some_and(|candidates| candidates.org == scope || candidates.own.tag() == scope)
    }

    /// What an object is called among the candidates, if there are any.
    pub(crate) fn candidate(&self, namespace: NamespaceId, id: ObjectId) -> Option<ObjectId> {
        self.0.as_ref().map(|candidates| named(&candidates.own, namespace, id))
    }

    /// The longest leading run that is stored.
    pub(crate) fn run(
        &self,
        store: &Store,
        namespace: NamespaceId,
        ids: &[ObjectId],
        takes: impl Fn(&Found) -> bool,
    ) -> Vec<Found> {
        let mut run = store.lookup_while(ids, &takes);
        if let Some(candidates) = &self.0 {
            let name = |&id: &ObjectId| named(&candidates.own, namespace, id);
            let own: Vec<ObjectId> = ids[run.len()..].iter().map(name).collect();
            run.extend(store.lookup_while(&own, takes));
        }
        run
    }

    /// Each of these, if it is stored.
    pub(crate) fn find(&self, store: &Store, namespace: NamespaceId, ids: &[ObjectId]) -> Vec<Option<Found>> {
        let mut found = store.get(ids);
        if let Some(candidates) = &self.0 {
            let missing: Vec<usize> = (0..ids.len()).filter(|&at| found[at].is_none()).collect();
            let own: Vec<ObjectId> =
                missing.iter().map(|&at| named(&candidates.own, namespace, ids[at])).collect();
            for (at, own) in missing.into_iter().zip(store.get(&own)) {
                found[at] = own;
            }
        }
        found
    }

    /// Gives objects of a scope, parents first, their places. `gone` knows those of the same put.
    pub(crate) fn place(
        &self,
        store: &Store,
        peers: &Peers,
        objects: Vec<PutObject>,
        gone: &mut Gone,
    ) -> Vec<Placed> {
        let Some(candidates) = &self.0 else {
            return objects.into_iter().map(|object| Placed { object, known: false }).collect();
        };
        objects.into_iter().map(|object| candidates.place(store, peers, object, gone)).collect()
    }
}

impl Candidates {
    fn place(&self, store: &Store, peers: &Peers, mut object: PutObject, gone: &mut Gone) -> Placed {
        let (id, namespace) = (object.id, object.namespace);
        let is_stored = |id: ObjectId| store.get(&[id]).iter().any(Option::is_some);
        // Its own before the org's: a parent that nobody has yet is on its way to the candidates.
        let parent_is_own = |parent: ObjectId, gone: &Gone| {
            let known = gone.get(&parent).copied();
            known.unwrap_or_else(|| is_stored(named(&self.own, namespace, parent)) || !is_stored(parent))
        };
        let parent_is_all = |parent: ObjectId, gone: &Gone| match gone.get(&parent) {
            Some(own) => !own,
            None => is_stored(parent),
        };
        let of_others: Vec<ObjectId> = peers.others.iter().map(|key| named(key, namespace, id)).collect();
        let said = store.holds(&object, &of_others);
        let own = named(&self.own, namespace, id);
        let is_own = is_stored(own);
        // Who has said something else before is refused, whoever else says this.
        let is_other = is_own && !store.holds(&object, &[own]);
        let continues = object.parent.is_none_or(|parent| parent_is_all(parent, gone));
        // Behind a hole of the org's not even what is stored there is found by who puts it.
        let for_all = continues && (is_stored(id) || peers.trusted || said && !is_other);
        gone.insert(id, !for_all);
        if !for_all {
            object.parent = object.parent.map(|parent| match parent_is_own(parent, gone) {
                true => named(&self.own, namespace, parent),
                false => parent,
            });
            object.id = own;
            object.scope = self.own.tag();
        }
        Placed { object, known: for_all && is_own }
    }
}

/// The name of an object of an org among the candidates of this key.
fn named(key: &ScopeKey, namespace: NamespaceId, id: ObjectId) -> ObjectId {
    ObjectId { kind: id.kind, hash: rekey(key, namespace, 0, id.hash.as_bytes()) }
}
