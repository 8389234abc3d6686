//! Hits: how often stored prefixes were read again, and of how many tokens, across restarts. Figures for people and no promise:
//! they are kept in the index, written every few seconds without a flush, and lost with it.
//!
//! Parts of one restore, asked for one after another within a second, are one hit; see [`Table::touch`](crate::table::Table).

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use esker_prefix::{NamespaceId, ScopeTag};

use crate::erasure::Erase;
use crate::fields::{Reader, Writer};
use crate::index::{Changes, Index};
use crate::{Result, TtlClass};

/// Whose hits: the namespace, scope and class of the last block that was read.
pub(crate) type Of = (NamespaceId, ScopeTag, TtlClass);

/// Prefixes that were read, and their tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Times.
    pub count: u64,
    /// Tokens of all those prefixes together.
    pub tokens: u64,
}

/// See the module. There are as many as namespaces with scopes and classes.
#[derive(Default)]
pub(crate) struct HitCounts(Mutex<BTreeMap<Of, Counted>>);

#[derive(Clone, Copy, Default)]
struct Counted {
    hits: Hits,
    /// Not written down yet.
    changed: bool,
}

impl Hits {
    /// Bytes of [`Hits::encode`].
    const BYTES: usize = 16;

    pub(crate) fn add(&mut self, other: Self) {
        // What an index says is not known to be small.
        self.count = self.count.saturating_add(other.count);
        self.tokens = self.tokens.saturating_add(other.tokens);
    }

    pub(crate) fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        Writer::new(&mut bytes).u64(self.count).u64(self.tokens);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes.get(..Self::BYTES)?);
        Some(Self { count: reader.u64(), tokens: reader.u64() })
    }
}

impl HitCounts {
    /// Takes up what the index has; what it has of a namespace and scope of which nothing is stored any more is forgotten.
    pub(crate) fn load(&self, index: &Index, realms: &[(NamespaceId, ScopeTag, u64)]) -> Result<()> {
        let stored: HashSet<(NamespaceId, ScopeTag)> =
            realms.iter().map(|&(namespace, scope, _)| (namespace, scope)).collect();
        let (kept, gone): (Vec<_>, Vec<_>) = index
            .hits()?
            .into_iter()
            .partition(|((namespace, scope, _), _)| stored.contains(&(*namespace, *scope)));
        self.all().extend(kept.into_iter().map(|(of, hits)| (of, Counted { hits, changed: false })));
        let mut changes = Changes::default();
        gone.iter().for_each(|(of, _)| changes.remove_hits(of));
        index.write(changes)
    }

    pub(crate) fn add(&self, of: Of, tokens: u64) {
        let mut all = self.all();
        let counted = all.entry(of).or_default();
        counted.hits.add(Hits { count: 1, tokens });
        counted.changed = true;
    }

    /// Puts what has changed among the changes.
    pub(crate) fn save(&self, changes: &mut Changes) {
        for (of, counted) in self.all().iter_mut().filter(|(_, counted)| counted.changed) {
            changes.put_hits(of, counted.hits);
            counted.changed = false;
        }
    }

    /// What is erased leaves no trace here, either.
    pub(crate) fn erase(&self, erase: Erase, changes: &mut Changes) {
        self.all().retain(|of, _| {
            let gone = match erase {
                Erase::Object(_) | Erase::Writer(_) => false,
                Erase::Scope(scope) => of.1 == scope,
                Erase::Namespace(namespace) => of.0 == namespace,
            };
            if gone {
                changes.remove_hits(of);
            }
            !gone
        });
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<Of, Counted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
