//! A node: one store, one table of namespaces, and the bundled decoder if there is one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use esker_prefix::{Namespace, NamespaceId, ScopeKey, ScopeKind};
use esker_store::{Store, StoreSettings};

use crate::grant::Grants;
use crate::model_folder::LoadedModel;
use crate::namespaces::Namespaces;
use crate::secret::root_secret;
use crate::write_behind::WriteBehind;

/// Where a node lives and how its store is set up.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// The data folder; made if absent.
    pub data: PathBuf,
    /// Settings of the store.
    pub store: StoreSettings,
}

/// Everything one process serves. All methods may block on the disk.
pub struct Node {
    pub(crate) store: Arc<Store>,
    pub(crate) namespaces: Namespaces,
    pub(crate) grants: Grants,
    pub(crate) scope: ScopeKey,
    pub(crate) engine: Option<Engine>,
}

/// The decoder of a node and the queue behind it.
pub(crate) struct Engine {
    pub(crate) loaded: LoadedModel,
    pub(crate) namespace: NamespaceId,
    pub(crate) write_behind: WriteBehind,
}

impl Node {
    /// Opens the data folder, registers the model's namespace, starts the write-behind queue.
    pub fn open(settings: &NodeSettings, model: Option<LoadedModel>) -> anyhow::Result<Self> {
        let data = &settings.data;
        std::fs::create_dir_all(data)
            .with_context(|| format!("cannot make the data folder {}", data.display()))?;
        let store = Store::open(&data.join("store"), settings.store.clone())
            .with_context(|| format!("cannot open the data folder {}", data.display()))?;
        let secret = root_secret(data)?;
        let store = Arc::new(store);
        let namespaces = Namespaces::load(&store);
        // Who asks is not established yet on this port, so everyone is the same private tenant, and the service
        // listens on loopback only.
        let scope = ScopeKey::derive(&secret, ScopeKind::Private, "default", 0);
        let engine = model.map(|model| Engine::start(model, &store, &namespaces)).transpose()?;
        Ok(Self { grants: Grants::new(&grant_seed(data)), store, namespaces, scope, engine })
    }
}

impl Engine {
    fn start(loaded: LoadedModel, store: &Arc<Store>, namespaces: &Namespaces) -> anyhow::Result<Self> {
        let layout = loaded.model.layout().clone();
        let namespace = Namespace {
            weights: loaded.model.fingerprint(),
            tokenizer: loaded.tokenizer.digest(),
            layout: layout.id(),
            adapter: String::new(),
        };
        let namespace = namespace.id();
        // A node whose disk is full or read-only still decodes and serves what it has.
        if let Err(error) = namespaces.register(store, namespace, layout) {
            tracing::warn!(%error, "the model's namespace could not be stored; new blocks will be refused");
        }
        let write_behind =
            WriteBehind::start(store.clone()).context("cannot start the write-behind thread")?;
        Ok(Self { loaded, namespace, write_behind })
    }
}

/// Differs between processes and between starts, which is all that grant ids ask for.
fn grant_seed(data: &Path) -> Vec<u8> {
    let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{} {} {}", data.display(), std::process::id(), started.as_nanos()).into_bytes()
}
