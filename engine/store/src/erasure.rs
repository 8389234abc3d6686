//! Erasure: what is erased never comes back, whatever crashes and however the index is rebuilt.
//!
//! An erasure is a record without planes whose header says it all: an object as its parent, or else a scope, or else a
//! namespace. Everything of it with a lower sequence is gone; what is put later is new. The record is durable before
//! anything is removed, and every opening applies all of them again.

use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, ScopeTag};

use crate::index::Entry;
use crate::{PutObject, TtlClass};

/// What is to be erased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erase {
    /// One object.
    Object(ObjectId),
    /// Everything of a scope, in all namespaces.
    Scope(ScopeTag),
    /// Everything of a namespace, its layout too.
    Namespace(NamespaceId),
}

impl Erase {
    /// The object that makes it durable.
    pub(crate) fn object(self) -> PutObject {
        let (parent, scope, namespace) = match self {
            Self::Object(id) => (Some(id), ScopeTag([0; 16]), NamespaceId([0; 32])),
            Self::Scope(scope) => (None, scope, NamespaceId([0; 32])),
            Self::Namespace(namespace) => (None, ScopeTag([0; 16]), namespace),
        };
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&parent.map_or([0; 32], |id| id.hash.0))
            .update(&[parent.map_or(0, |id| id.kind as u8)]);
        hasher.update(&scope.0).update(&namespace.0);
        PutObject {
            id: ObjectId { kind: ObjectKind::Erasure, hash: BlockHash(*hasher.finalize().as_bytes()) },
            parent,
            namespace,
            scope,
            class: TtlClass::PERMANENT,
            tokens: 0,
            planes: Vec::new(),
        }
    }

    /// What the entry of an erasure erases.
    pub(crate) fn of(entry: &Entry) -> Option<Self> {
        (entry.id.kind == ObjectKind::Erasure).then_some(match entry.parent {
            Some(id) => Self::Object(id),
            None if entry.scope.0 != [0; 16] => Self::Scope(entry.scope),
            None => Self::Namespace(entry.namespace),
        })
    }

    /// Whether it means the record of this entry, sequence apart.
    pub(crate) fn covers(self, entry: &Entry) -> bool {
        let content = matches!(entry.id.kind, ObjectKind::Block | ObjectKind::State | ObjectKind::Layout);
        content
            && match self {
                Self::Object(id) => entry.id == id,
                Self::Scope(scope) => entry.scope == scope && entry.id.kind != ObjectKind::Layout,
                Self::Namespace(namespace) => entry.namespace == namespace,
            }
    }
}
