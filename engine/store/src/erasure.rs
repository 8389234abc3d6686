//! Erasure: what is erased never comes back, whatever crashes and however the index is rebuilt.
//!
//! An erasure is a record without planes whose header says it all: an object as its parent, or else a writer, or else a scope,
//! or else a namespace. Everything of it with a lower sequence is gone; what is put later is new. The record is durable before
//! anything is removed, and every opening applies all of them again, until nothing is left that could come back (lapse.rs).

mod lapse;

use std::collections::HashMap;

use esker_prefix::{BlockHash, NamespaceId, ObjectId, ObjectKind, ScopeTag, WriterId};

use crate::index::Entry;
use crate::{PutObject, Result, StoreError, TtlClass};
pub(crate) use lapse::Lapses;

/// The scope of what the store writes about itself.
const NO_SCOPE: ScopeTag = ScopeTag([0; 16]);

/// What is to be erased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erase {
    /// One object.
    Object(ObjectId),
    /// Everything of a scope, in all namespaces.
    Scope(ScopeTag),
    /// Everything of a namespace, its layout too.
    Namespace(NamespaceId),
    /// Everything that one writer has put, layouts apart: its word counts for nothing any more.
    Writer(WriterId),
}

impl Erase {
    /// Refuses what stands for "none" in a record: written down, it would be the erasure of something else.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Writer(WriterId::UNNAMED) => Err(StoreError::EraseNobody { what: "writer" }),
            Self::Scope(scope) if scope == NO_SCOPE => Err(StoreError::EraseNobody { what: "scope" }),
            _ => Ok(()),
        }
    }

    /// The object that makes it durable.
    pub(crate) fn object(self) -> PutObject {
        let (mut parent, mut writer) = (None, WriterId::UNNAMED);
        let (mut scope, mut namespace) = (NO_SCOPE, NamespaceId([0; 32]));
        match self {
            Self::Object(id) => parent = Some(id),
            Self::Scope(erased) => scope = erased,
            Self::Namespace(erased) => namespace = erased,
            Self::Writer(erased) => writer = erased,
        }
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(&parent.map_or([0; 32], |id| id.hash.0))
            .update(&[parent.map_or(0, |id| id.kind as u8)]);
        hasher.update(&scope.0).update(&namespace.0);
        if writer != WriterId::UNNAMED {
            hasher.update(&writer.0.to_le_bytes());
        }
        PutObject {
            id: ObjectId { kind: ObjectKind::Erasure, hash: BlockHash(*hasher.finalize().as_bytes()) },
            parent,
            namespace,
            scope,
            writer,
            class: TtlClass::PERMANENT,
            tokens: 0,
            planes: Vec::new(),
        }
    }

    /// What the entry of an erasure erases.
    pub(crate) fn of(entry: &Entry) -> Option<Self> {
        (entry.id.kind == ObjectKind::Erasure).then_some(match entry.parent {
            Some(id) => Self::Object(id),
            None if entry.writer != WriterId::UNNAMED => Self::Writer(entry.writer),
            None if entry.scope != NO_SCOPE => Self::Scope(entry.scope),
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
    writers: HashMap<WriterId, u64>,
}

impl Erasures {
    pub(crate) fn add(&mut self, erase: Erase, sequence: u64) {
        let newest = match erase {
            Erase::Object(id) => self.objects.entry(id).or_default(),
            Erase::Scope(scope) => self.scopes.entry(scope).or_default(),
            Erase::Namespace(namespace) => self.namespaces.entry(namespace).or_default(),
            Erase::Writer(writer) => self.writers.entry(writer).or_default(),
        };
        *newest = sequence.max(*newest);
    }

    pub(crate) fn is_empty(&self) -> bool {
        let Self { objects, scopes, namespaces, writers } = self;
        objects.is_empty() && scopes.is_empty() && namespaces.is_empty() && writers.is_empty()
    }

    /// Whether one of them means the record of this entry.
    pub(crate) fn cover(&self, entry: &Entry) -> bool {
        if !matches!(entry.id.kind, ObjectKind::Block | ObjectKind::State | ObjectKind::Layout) {
            return false;
        }
        // A layout is nobody's word in particular.
        let layout = entry.id.kind == ObjectKind::Layout;
        let by_scope = self.scopes.get(&entry.scope).filter(|_| !layout);
        let by_writer = self.writers.get(&entry.writer).filter(|_| !layout);
        let others = [self.objects.get(&entry.id), self.namespaces.get(&entry.namespace)];
        others.into_iter().chain([by_scope, by_writer]).flatten().any(|&sequence| entry.sequence < sequence)
    }
}
