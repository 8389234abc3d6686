//! Namespaces that this node knows, each with its layout. The durable copy is a layout object in the store.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use esker_prefix::{KvLayout, NamespaceId, ObjectKind};
use esker_store::{PutObject, Store, StoreError};

/// Largest object of a namespace, 64 MiB: what one put may hold in memory before it can be committed.
pub(crate) const MAX_OBJECT_BYTES: u64 = 64 << 20;
/// Most namespaces of one node; each holds its layout in memory.
const MAX_NAMESPACES: usize = 10_000;

/// Why a namespace was not registered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    #[error(
        "one {kind:?} object of this layout has {got} bytes, the limit is {MAX_OBJECT_BYTES}: use smaller blocks"
    )]
    ObjectTooLarge { kind: ObjectKind, got: u64 },
    #[error("this node knows {MAX_NAMESPACES} namespaces, its limit")]
    TooMany,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The table.
pub(crate) struct Namespaces {
    known: RwLock<HashMap<NamespaceId, Arc<KvLayout>>>,
}

impl Namespaces {
    /// Everything registered earlier.
    pub(crate) fn load(store: &Store) -> Self {
        let known = store.layouts().into_iter().map(|(id, layout)| (id, Arc::new(layout))).collect();
        Self { known: RwLock::new(known) }
    }

    /// The layout of a namespace, if it is known.
    pub(crate) fn layout(&self, id: NamespaceId) -> Option<Arc<KvLayout>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Makes a namespace known, durably, before it returns. Blocks on the disk.
    pub(crate) fn register(
        &self,
        store: &Store,
        id: NamespaceId,
        layout: KvLayout,
    ) -> Result<(), RegisterError> {
        if self.layout(id).is_some() {
            return Ok(());
        }
        for kind in [ObjectKind::Block, ObjectKind::State] {
            let got = layout.object_bytes(kind);
            if got > MAX_OBJECT_BYTES {
                return Err(RegisterError::ObjectTooLarge { kind, got });
            }
        }
        if self.known.read().unwrap_or_else(PoisonError::into_inner).len() >= MAX_NAMESPACES {
            return Err(RegisterError::TooMany);
        }
        for result in store.put(vec![PutObject::layout(id, &layout)]) {
            result?;
        }
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(layout));
        Ok(())
    }
}
