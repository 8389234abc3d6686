//! Who learns what comes and goes: for those who tell others what a store holds.
//!
//! An observer is called on the threads that work for the store, after the change holds, and must not wait for anything. What is
//! removed is named by its entry of the index, which is read for it; a store without an observer reads nothing.

use std::sync::{Arc, OnceLock};

use esker_prefix::{NamespaceId, ObjectId, ObjectKind, ScopeTag};

use crate::index::Entry;

/// Why an object is not stored any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It made room for others.
    Evicted,
    /// Its time to live was over.
    Expired,
    /// It, its scope or its namespace was erased.
    Erased,
    /// Its record is bad.
    Damaged,
}

impl Removal {
    /// Name for events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Evicted => "evicted",
            Self::Expired => "expired",
            Self::Erased => "erased",
            Self::Damaged => "damaged",
        }
    }
}

/// A block or a state that came or went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its name.
    pub id: ObjectId,
    /// What it hangs on.
    pub parent: Option<ObjectId>,
    /// Namespace it belongs to.
    pub namespace: NamespaceId,
    /// Scope it belongs to.
    pub scope: ScopeTag,
    /// Length in tokens of the prefix that it completes.
    pub tokens: u64,
    /// `None` if it came.
    pub removal: Option<Removal>,
}

/// See the module.
pub trait Observer: Send + Sync {
    /// These changes hold, in this order.
    fn changed(&self, changes: Vec<Change>);
}

/// The observer of a store, once there is one.
#[derive(Default)]
pub(crate) struct Observed(OnceLock<Arc<dyn Observer>>);

impl Observed {
    /// `false` if there is one already.
    pub(crate) fn set(&self, observer: Arc<dyn Observer>) -> bool {
        self.0.set(observer).is_ok()
    }

    pub(crate) fn is_watched(&self) -> bool {
        self.0.get().is_some()
    }

    pub(crate) fn came<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) {
        self.tell(entries, None);
    }

    pub(crate) fn went<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>, why: Removal) {
        self.tell(entries, Some(why));
    }

    fn tell<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>, removal: Option<Removal>) {
        let Some(observer) = self.0.get() else { return };
        let content = |entry: &&Entry| matches!(entry.id.kind, ObjectKind::Block | ObjectKind::State);
        let change = |entry: &Entry| Change {
            id: entry.id,
            parent: entry.parent,
            namespace: entry.namespace,
            scope: entry.scope,
            tokens: entry.tokens,
            removal,
        };
        let changes: Vec<Change> = entries.into_iter().filter(content).map(change).collect();
        if !changes.is_empty() {
            observer.changed(changes);
        }
    }
}
