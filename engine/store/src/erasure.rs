//! Erasure: what is erased never comes back, whatever crashes and however the index is rebuilt.
//!
//! An erasure is a record without planes whose header says it all: an object as its parent, or else a scope, or else a
//! namespace. Everything of it with a lower sequence is gone; what is put later is new. The record is durable before
//! anything is removed, and every opening applies all of them again.

use std::collections::HashMap;

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
}

/// Many erasures, each with its sequence: what is told of an entry costs the same however many there are.
#[derive(Default)]
pub(crate) struct Erasures {
    objects: HashMap<ObjectId, u64>,
    scopes: HashMap<ScopeTag, u64>,
    namespaces: HashMap<NamespaceId, u64>,
}

impl Erasures {
    pub(crate) fn add(&mut self, erase: Erase, sequence: u64) {
        let newest = match erase {
            Erase::Object(id) => self.objects.entry(id).or_default(),
            Erase::Scope(scope) => self.scopes.entry(scope).or_default(),
            Erase::Namespace(namespace) => self.namespaces.entry(namespace).or_default(),
        };
        *newest = sequence.max(*newest);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.scopes.is_empty() && self.namespaces.is_empty()
    }

    /// Whether one of them means the record of this entry.
    pub(crate) fn cover(&self, entry: &Entry) -> bool {
        if !matches!(entry.id.kind, ObjectKind::Block | ObjectKind::State | ObjectKind::Layout) {
            return false;
        }
        let by_scope = self.scopes.get(&entry.scope).filter(|_| entry.id.kind != ObjectKind::Layout);
        let newest = [self.objects.get(&entry.id), by_scope, self.namespaces.get(&entry.namespace)];
        newest.into_iter().flatten().any(|&sequence| entry.sequence < sequence)
    }
}
