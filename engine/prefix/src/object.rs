//! Objects: what is stored.

use std::fmt;

use bytes::Bytes;

use crate::{BlockHash, KvLayout, NamespaceId, PlaneSpec, PrefixError, Result, ScopeTag};

/// What an object holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum ObjectKind {
    /// The rows of every history group for one block of tokens.
    Block = 1,
    /// The rows of every state group for one boundary.
    State = 2,
    /// A namespace's layout table, so that a store can be read without any other file.
    Layout = 3,
    /// A store's promise to keep some prefixes until a deadline.
    Lease = 4,
    /// A store's order that something must never come back.
    Erasure = 5,
}

impl ObjectKind {
    /// The kind with this byte on disk.
    pub fn from_u8(byte: u8) -> Option<Self> {
        [Self::Block, Self::State, Self::Layout, Self::Lease, Self::Erasure]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// The name of an object: its kind and the chain hash of the prefix that it completes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId {
    /// What it holds.
    pub kind: ObjectKind,
    /// Which prefix; for [`ObjectKind::Layout`] the namespace id.
    pub hash: BlockHash,
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:{}", self.kind, self.hash)
    }
}

/// The rows of every history group for one block of tokens. Immutable; shared by every prefix through it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockObject(Object);

/// The rows of every state group for one boundary; off the block grid also those of every history group for the tokens behind
/// the last block boundary, which no block holds yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateObject(Object);

/// What both kinds are made of: an identity and one byte string per plane, in restore order.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Object {
    namespace: NamespaceId,
    scope: ScopeTag,
    hash: BlockHash,
    parent: BlockHash,
    tokens: u64,
    planes: Vec<Bytes>,
}

macro_rules! object {
    ($name:ident, $kind:expr, $kind_name:literal, $has_boundary:expr) => {
        impl $name {
            /// Checks `planes` against the layout: one per plane of [`KvLayout::planes_at`], each of its exact length, or empty
            /// where its group is optional. `tokens` is the length of the prefix that ends with this object.
            pub fn new(
                layout: &KvLayout,
                namespace: NamespaceId,
                scope: ScopeTag,
                parent: BlockHash,
                hash: BlockHash,
                tokens: u64,
                planes: Vec<Bytes>,
            ) -> Result<Self> {
                if !$has_boundary(layout, tokens) {
                    let block_tokens = layout.block_tokens();
                    return Err(PrefixError::Boundary { kind: $kind_name, block_tokens, tokens });
                }
                check_planes(layout, &layout.planes_at($kind, tokens), &planes)?;
                Ok(Self(Object { namespace, scope, hash, parent, tokens, planes }))
            }

            /// Its name.
            pub fn id(&self) -> ObjectId {
                ObjectId { kind: $kind, hash: self.0.hash }
            }

            /// Namespace it belongs to.
            pub fn namespace(&self) -> NamespaceId {
                self.0.namespace
            }

            /// Scope it belongs to.
            pub fn scope(&self) -> ScopeTag {
                self.0.scope
            }

            /// Hash of the prefix of one whole block less, or of a part of one; the genesis hash where that is empty.
            pub fn parent(&self) -> BlockHash {
                self.0.parent
            }

            /// Length in tokens of the prefix that it completes.
            pub fn tokens(&self) -> u64 {
                self.0.tokens
            }

            /// Its planes, in restore order.
            pub fn planes(&self) -> &[Bytes] {
                &self.0.planes
            }

            /// Gives the planes away.
            pub fn into_planes(self) -> Vec<Bytes> {
                self.0.planes
            }

            /// Raw bytes of all planes.
            pub fn len_bytes(&self) -> u64 {
                self.0.planes.iter().map(|plane| plane.len() as u64).sum()
            }
        }
    };
}
object!(BlockObject, ObjectKind::Block, "block", |layout: &KvLayout, tokens: u64| {
    tokens > 0 && tokens.is_multiple_of(u64::from(layout.block_tokens()))
});
object!(StateObject, ObjectKind::State, "state", KvLayout::has_boundary);

fn check_planes(layout: &KvLayout, specs: &[PlaneSpec], planes: &[Bytes]) -> Result<()> {
    if specs.len() != planes.len() {
        return Err(PrefixError::PlaneCount {
            layout: layout.id(),
            expected: specs.len(),
            got: planes.len(),
        });
    }
    let mut lacks_optional = None;
    for (index, (spec, bytes)) in specs.iter().zip(planes).enumerate() {
        let group = &layout.groups()[usize::from(spec.group)];
        // A group that may be left out is left out as a whole.
        let is_out = group.optional && *lacks_optional.get_or_insert(bytes.is_empty());
        let expected = if is_out { 0 } else { spec.len_bytes };
        if expected != bytes.len() as u64 {
            return Err(PrefixError::PlaneSize {
                layout: layout.id(),
                plane: index,
                group: group.name.clone(),
                first_layer: spec.first_layer,
                end_layer: spec.first_layer + spec.layers,
                expected,
                got: bytes.len() as u64,
            });
        }
    }
    Ok(())
}
