//! Namespaces that this node knows, each with its layout. The durable copy is a layout object in the store.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use esker_prefix::{KvLayout, NamespaceId, ObjectKind};
use esker_store::{PutObject, Store, StoreError};

use crate::control::{Control, Table};
use crate::principal::TenantId;

/// Largest object of a namespace, 64 MiB: what one put may hold in memory before it can be committed.
pub(crate) const MAX_OBJECT_BYTES: u64 = 64 << 20;
/// Most namespaces of one node; each holds its layout in memory.
const MAX_NAMESPACES: usize = 10_000;
/// Of them, those that one tenant has made known.
const MAX_OF_TENANT: usize = if cfg!(test) { 2 } else { 1_000 };

/// Why a namespace was not registered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    #[error(
        "one {kind:?} object of this layout has {got} bytes, the limit is {MAX_OBJECT_BYTES}: use smaller blocks"
    )]
    ObjectTooLarge { kind: ObjectKind, got: u64 },
    #[error("this node knows {MAX_NAMESPACES} namespaces, its limit")]
    TooMany,
    #[error(
        "this tenant has made {MAX_OF_TENANT} namespaces known to this node, its limit: use those, or ask for another node"
    )]
    TooManyOfTenant,
    #[error("the node cannot write down whose namespace this is; its log says why")]
    Unwritten,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The table.
pub(crate) struct Namespaces {
    known: RwLock<HashMap<NamespaceId, Arc<KvLayout>>>,
    registering: Mutex<()>,
}

impl Namespaces {
    /// Everything registered earlier.
    pub(crate) fn load(store: &Store) -> Self {
        let known = store.layouts().into_iter().map(|(id, layout)| (id, Arc::new(layout))).collect();
        Self { known: RwLock::new(known), registering: Mutex::default() }
    }

    /// The layout of a namespace, if it is known.
    pub(crate) fn layout(&self, id: NamespaceId) -> Option<Arc<KvLayout>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// [`register`](Self::register) for a tenant, which may do so for some only. One that is known already costs nothing.
    pub(crate) fn register_for(
        &self,
        tenant: &TenantId,
        control: &Control,
        store: &Store,
        id: NamespaceId,
        layout: KvLayout,
    ) -> Result<(), RegisterError> {
        if self.layout(id).is_some() {
            return Ok(());
        }
        // One after the other, so that none is counted late; it may be known by then.
        let _alone = self.registering.lock().unwrap_or_else(PoisonError::into_inner);
        if self.layout(id).is_some() {
            return Ok(());
        }
        let unwritten = |error: anyhow::Error| {
            tracing::error!(
                error = format!("{error:#}"),
                "whose namespaces there are cannot be read or written"
            );
            RegisterError::Unwritten
        };
        // '/' is in no name.
        let of_tenant = control.scan::<()>(Table::Namespaces, &format!("{tenant}/"), "", MAX_OF_TENANT);
        if of_tenant.map_err(unwritten)?.len() >= MAX_OF_TENANT {
            return Err(RegisterError::TooManyOfTenant);
        }
        self.register(store, id, layout)?;
        control.put(Table::Namespaces, &format!("{tenant}/{}", id.to_hex()), &()).map_err(unwritten)
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

#[cfg(test)]
mod tests {
    use esker_prefix::{Dtype, Family, Field, Group};
    use esker_store::StoreSettings;

    use super::*;

    #[test]
    fn one_tenant_leaves_namespaces_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let settings = StoreSettings { scrub_bytes_per_s: 0, ..StoreSettings::default() };
        let store = Store::open(&dir.path().join("store"), settings).unwrap();
        let control = Control::open(&dir.path().join("control")).unwrap();
        let group = Group {
            name: "latent".into(),
            family: Family::History,
            layers: vec![0],
            rows: 128,
            fields: vec![Field { name: "values".into(), dtype: Dtype::U8, count: 8 }],
            restore_order: 0,
            plane_layers: 1,
            optional: false,
            grain_blocks: 1,
            run_tokens: 0,
        };
        let layout = KvLayout::new("small", 128, vec![group]).unwrap();
        let namespaces = Namespaces::load(&store);
        let register = |tenant: &str, byte| {
            let (tenant, id) = (TenantId(tenant.into()), NamespaceId([byte; 32]));
            namespaces.register_for(&tenant, &control, &store, id, layout.clone())
        };
        assert!(register("a", 1).is_ok() && register("a", 2).is_ok());
        let refused = register("a", 3).unwrap_err();
        assert!(matches!(refused, RegisterError::TooManyOfTenant), "{refused}");
        assert!(register("a", 1).is_ok(), "it is known");
        assert!(register("b", 3).is_ok());
        assert!(register("a", 3).is_ok(), "another made it known");
        assert_eq!(Namespaces::load(&store).known.read().unwrap().len(), 3);
    }
}
