//! Scopes: who may share a prefix.
//!
//! A scope is not a field of a key but the *key of the hash*: without the scope key nobody can name, or collide
//! with, a block of that scope. Scope keys are derived on the server from the deployment's root secret and the
//! authenticated principal.

use std::fmt;

const SCOPE_KEY_CONTEXT: &str = "esker 2026-11 scope key v1";
const SCOPE_TAG_LABEL: &[u8] = b"scope-tag";

/// The deployment's 256-bit root secret. Never printed.
#[derive(Clone)]
pub struct RootSecret([u8; 32]);

impl RootSecret {
    /// Wraps 32 secret bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for RootSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RootSecret(..)")
    }
}

/// How far a scope reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ScopeKind {
    /// One tenant, optionally a user or chat session below it.
    Private = 0,
    /// An explicit list of tenants.
    Org = 1,
    /// Everyone reads, publishers write.
    Public = 2,
}

/// Key of the chain hash for one scope. Never printed, never leaves the server.
#[derive(Clone, PartialEq, Eq)]
pub struct ScopeKey([u8; 32]);

impl ScopeKey {
    /// `derive_key(context, root || kind u8 || id length u32 LE || id || epoch u32 LE)`.
    pub fn derive(root: &RootSecret, kind: ScopeKind, id: &str, epoch: u32) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(SCOPE_KEY_CONTEXT);
        hasher
            .update(&root.0)
            .update(&[kind as u8])
            .update(&crate::chain::len_u32(id.len()))
            .update(id.as_bytes());
        hasher.update(&epoch.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The public name of this scope: which records belong to it, without the power to make their keys.
    pub fn tag(&self) -> ScopeTag {
        let digest = blake3::keyed_hash(&self.0, SCOPE_TAG_LABEL);
        let mut tag = [0; 16];
        tag.copy_from_slice(&digest.as_bytes()[..16]);
        ScopeTag(tag)
    }

    pub(crate) fn hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.0)
    }
}

impl fmt::Debug for ScopeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ScopeKey({:?})", self.tag())
    }
}

/// 128-bit digest of a scope key, written into every record of the scope.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScopeTag(pub [u8; 16]);

impl fmt::Debug for ScopeTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}..", u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]))
    }
}
