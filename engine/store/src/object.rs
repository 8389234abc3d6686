//! What is put: an object with its planes.

use bytes::Bytes;
use esker_prefix::{
    BlockHash, BlockObject, KvLayout, NamespaceId, ObjectId, ObjectKind, PlaneSpec, ScopeTag, StateObject,
    WriterId,
};

use crate::codec::PlaneShape;

/// An object to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutObject {
    /// Its name.
    pub id: ObjectId,
    /// What must be stored before it; `None` for a root.
    pub parent: Option<ObjectId>,
    /// Namespace it belongs to.
    pub namespace: NamespaceId,
    /// Scope it belongs to.
    pub scope: ScopeTag,
    /// Whose word it is.
    pub writer: WriterId,
    /// How long it is kept.
    pub class: TtlClass,
    /// Length in tokens of the prefix that it completes.
    pub tokens: u64,
    /// Its planes, in restore order.
    pub planes: Vec<PutPlane>,
}

/// How long an object is kept after its last use: a position in [`StoreSettings::ttl_classes`]. Objects of a class
/// lie in segments of their own, so that what expires together is freed together.
///
/// [`StoreSettings::ttl_classes`]: crate::StoreSettings::ttl_classes
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TtlClass(pub u8);

impl TtlClass {
    /// Never expires and is never evicted: what the store needs to understand the rest.
    pub const PERMANENT: Self = Self(0xff);
}

impl Default for TtlClass {
    /// 24 hours, unless settings say otherwise.
    fn default() -> Self {
        Self(2)
    }
}

/// A plane to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutPlane {
    /// Which part of the object it is, and how long.
    pub spec: PlaneSpec,
    /// What its bytes are, which a codec may exploit; `None` if nothing is known.
    pub shape: Option<PlaneShape>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// How a put ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// Now stored, durably.
    Stored,
    /// These very bytes were stored before, durably.
    Present,
    /// Not stored: the store is full, and the object is not expected to be worth what would go for it.
    Declined,
}

impl PutObject {
    /// A block. Its parent is the block before it; the first block of a prefix is a root.
    pub fn block(layout: &KvLayout, object: BlockObject) -> Self {
        let root = object.tokens() == u64::from(layout.block_tokens());
        let parent = (!root).then(|| ObjectId { kind: ObjectKind::Block, hash: object.parent() });
        Self {
            id: object.id(),
            parent,
            namespace: object.namespace(),
            scope: object.scope(),
            writer: WriterId::UNNAMED,
            class: TtlClass::default(),
            tokens: object.tokens(),
            planes: pair(layout, ObjectKind::Block, object.tokens(), object.into_planes()),
        }
    }

    /// A state. Its parent is the block that ends at the same boundary, without which nobody could resume there; off the block
    /// grid the last block before it, if there is one.
    pub fn state(layout: &KvLayout, object: StateObject) -> Self {
        let block_tokens = u64::from(layout.block_tokens());
        let parent = match object.tokens() {
            tokens if tokens.is_multiple_of(block_tokens) => Some(object.id().hash),
            tokens => Some(object.parent()).filter(|_| tokens > block_tokens),
        };
        Self {
            id: object.id(),
            parent: parent.map(|hash| ObjectId { kind: ObjectKind::Block, hash }),
            namespace: object.namespace(),
            scope: object.scope(),
            writer: WriterId::UNNAMED,
            class: TtlClass::default(),
            tokens: object.tokens(),
            planes: pair(layout, ObjectKind::State, object.tokens(), object.into_planes()),
        }
    }

    /// The layout of a namespace, so that the segments can be read without any other file.
    pub fn layout(namespace: NamespaceId, layout: &KvLayout) -> Self {
        let bytes = Bytes::from(layout.to_json());
        let spec = PlaneSpec { group: 0, first_layer: 0, layers: 0, len_bytes: bytes.len() as u64 };
        Self {
            id: ObjectId { kind: ObjectKind::Layout, hash: BlockHash(*namespace.as_bytes()) },
            parent: None,
            namespace,
            scope: ScopeTag([0; 16]),
            writer: WriterId::UNNAMED,
            class: TtlClass::PERMANENT,
            tokens: 0,
            planes: vec![PutPlane { spec, shape: None, bytes }],
        }
    }

    /// The same object, kept for as long as `class` says.
    pub fn with_class(self, class: TtlClass) -> Self {
        Self { class, ..self }
    }

    /// The same object as the word of `writer`.
    pub fn by(self, writer: WriterId) -> Self {
        Self { writer, ..self }
    }

    /// Raw bytes of all planes.
    pub fn len_bytes(&self) -> u64 {
        self.planes.iter().map(|plane| plane.bytes.len() as u64).sum()
    }
}

fn pair(layout: &KvLayout, kind: ObjectKind, tokens: u64, planes: Vec<Bytes>) -> Vec<PutPlane> {
    let with_shape = |(&spec, bytes): (&PlaneSpec, Bytes)| {
        let group = &layout.groups()[usize::from(spec.group)];
        let shape = PlaneShape::of(group, &spec);
        // A plane that the object lacks has no bytes, and no shape.
        let spec = PlaneSpec { len_bytes: bytes.len() as u64, ..spec };
        PutPlane { spec, shape: (!bytes.is_empty()).then_some(shape), bytes }
    };
    layout.planes_at(kind, tokens).iter().zip(planes).map(with_shape).collect()
}
