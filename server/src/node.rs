//! A node: one store, one table of namespaces, and the bundled decoder if there is one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use esker_prefix::{Namespace, NamespaceId};
use esker_store::{Observer, Sealer, Store, StoreSettings};

use crate::audit::{Audit, Event};
use crate::budget::{self, Budget};
use crate::control::Control;
use crate::events::Events;
use crate::generate::{Guessing, STATE_INTERVAL_BLOCKS};
use crate::grant::Grants;
use crate::history::History;
use crate::keys::Keys;
use crate::ledger::storage::Sampler;
use crate::ledger::{Ledger, LedgerSettings};
use crate::live::Live;
use crate::local::Arenas;
use crate::metrics::Metrics;
use crate::model_folder::LoadedModel;
use crate::namespaces::Namespaces;
use crate::policy::PolicyFile;
use crate::price::PriceFile;
use crate::replay::Replay;
use crate::secret::root_secret;
use crate::sessions::Sessions;
use crate::staging::Staging;
use crate::tenants::Tenants;
use crate::traces::Traces;
use crate::usage::sink::{Exporting, SinkSettings};
use crate::warmups::Warmups;
use crate::write_behind::WriteBehind;

/// Where a node lives and how its store is set up.
#[derive(Clone, Debug, Default)]
pub struct NodeSettings {
    /// The data folder; made if absent.
    pub data: PathBuf,
    /// Settings of the store.
    pub store: StoreSettings,
    /// Settings of the billing ledger.
    pub ledger: LedgerSettings,
    /// Name of the deployment in usage ids, the same on all its nodes; `None`: one made from the root secret.
    pub cluster: Option<String>,
    /// Where usage events go by themselves.
    pub usage_sink: Option<SinkSettings>,
    /// What tokens cost, for figures in money; see `price.rs`.
    pub prices: Option<PathBuf>,
    /// The operator's policy; without one everybody is one tenant without limits.
    pub policy: Option<PathBuf>,
    /// Part of the time, in percent, that warm-up jobs take while live requests run.
    pub warmup_share: u32,
    /// The file of the root key; with it what tenants store is encrypted.
    pub root_key: Option<PathBuf>,
    /// Memory for what is on its way; `None`: a half of what this process may use.
    pub in_flight_bytes: Option<u64>,
}

/// Everything one process serves. All methods may block on the disk.
pub struct Node {
    pub(crate) store: Arc<Store>,
    pub(crate) namespaces: Namespaces,
    pub(crate) grants: Grants,
    pub(crate) staging: Staging,
    pub(crate) budget: Arc<Budget>,
    pub(crate) policy: Arc<PolicyFile>,
    pub(crate) tenants: Tenants,
    pub(crate) replay: Replay,
    pub(crate) sessions: Sessions,
    pub(crate) warmups: Warmups,
    pub(crate) live: Arc<Live>,
    pub(crate) metrics: Metrics,
    pub(crate) events: Arc<Events>,
    pub(crate) audit: Arc<Audit>,
    pub(crate) ledger: Arc<Ledger>,
    /// Ends before the ledger does.
    _exporting: Option<Exporting>,
    pub(crate) sampler: Sampler,
    pub(crate) control: Arc<Control>,
    pub(crate) prices: Option<PriceFile>,
    pub(crate) history: History,
    /// The data folder.
    pub(crate) data: PathBuf,
    pub(crate) arenas: Arc<Arenas>,
    pub(crate) engine: Option<Engine>,
    /// Of a sequence's rows that indexers pick among, most bytes in memory; `None` for all.
    pub(crate) resident_bytes: Option<u64>,
    /// Blocks between two states that are kept of a prompt and its output, besides where they end.
    pub(crate) state_interval_blocks: usize,
    /// Whether a draft block guesses.
    pub(crate) guessing: Guessing,
    pub(crate) traces: Traces,
}

/// The decoder of a node and the queue behind it.
pub(crate) struct Engine {
    pub(crate) loaded: LoadedModel,
    pub(crate) namespace: NamespaceId,
    pub(crate) write_behind: WriteBehind,
    pub(crate) events: Arc<Events>,
}

impl Node {
    /// Opens the data folder, registers the model's namespace, starts the write-behind queue.
    pub fn open(settings: &NodeSettings, model: Option<LoadedModel>) -> anyhow::Result<Self> {
        let data = &settings.data;
        std::fs::create_dir_all(data)
            .with_context(|| format!("cannot make the data folder {}", data.display()))?;
        let keys = keys(data, settings.root_key.as_deref())?;
        let sealer = keys.clone().map(|keys| keys as Arc<dyn Sealer>);
        let store = Store::open_sealed(&data.join("store"), settings.store.clone(), sealer.clone())
            .with_context(|| format!("cannot open the data folder {}", data.display()))?;
        let secret = root_secret(data)?;
        let store = Arc::new(store);
        let events = Arc::new(Events::default());
        store.observe(Arc::clone(&events) as Arc<dyn Observer>);
        let namespaces = Namespaces::load(&store);
        let policy = Arc::new(PolicyFile::open(settings.policy.as_deref())?);
        let control = Arc::new(Control::open(&data.join("control"))?);
        let audit = Arc::new(Audit::open(&data.join("audit.jsonl"))?);
        let budget = Budget::new(settings.in_flight_bytes.unwrap_or_else(budget::default_bytes));
        let tenants = Tenants::open(
            secret,
            Arc::clone(&policy),
            Arc::clone(&control),
            keys,
            &store,
            &budget,
            Arc::clone(&audit),
        )?;
        let replay = Replay::open(&data.join("replay"), sealer.clone(), |tenant| tenants.reminded(tenant));
        let cluster = settings.cluster.clone().unwrap_or_else(|| tenants.deployment());
        let ledger = Ledger::open(&data.join("ledger"), settings.ledger, &cluster)?;
        if let Some(gap) = ledger.gap() {
            audit.record(&Event::system("ledger-gap", gap.to_string()));
        }
        let ledger = Arc::new(ledger);
        let exporting = settings.usage_sink.as_ref().map(|sink| {
            Exporting::start(sink, Arc::clone(&ledger), Arc::clone(&control), Arc::clone(&audit))
        });
        let exporting = exporting.transpose()?;
        let sessions = Sessions::open(Arc::clone(&control), &tenants, &store)?;
        let engine = model.map(|model| Engine::start(model, &store, &namespaces, &events)).transpose()?;
        let warmups = Warmups::open(Arc::clone(&control), sealer, &tenants, settings.warmup_share)?;
        tenants.finish_erasures()?;
        let grants = Grants::new(&grant_seed(data));
        let arenas = Arc::new(Arenas::new(&random_seed().context("cannot read /dev/urandom")?));
        let sampler = Sampler::default();
        let prices = settings.prices.as_deref().map(PriceFile::read).transpose()?;
        Ok(Self {
            store,
            namespaces,
            grants,
            staging: Staging::new(&budget),
            budget,
            policy,
            tenants,
            replay,
            sessions,
            warmups,
            live: Arc::default(),
            metrics: Metrics::default(),
            events,
            audit,
            arenas,
            ledger,
            _exporting: exporting,
            sampler,
            control,
            prices,
            history: History::default(),
            data: data.clone(),
            engine,
            resident_bytes: None,
            state_interval_blocks: STATE_INTERVAL_BLOCKS,
            guessing: Guessing::Never,
            traces: Traces::default(),
        })
    }
}

impl Node {
    /// The same node, which sends traces there.
    #[must_use]
    pub fn with_traces(self, traces: Traces) -> Self {
        Self { traces, ..self }
    }

    /// The same node, which guesses so.
    #[must_use]
    pub(crate) fn with_guessing(self, guessing: Guessing) -> Self {
        Self { guessing, ..self }
    }

    /// The same node, which keeps a state every so many blocks; at least one.
    #[must_use]
    pub(crate) fn with_state_interval(self, blocks: usize) -> Self {
        Self { state_interval_blocks: blocks.max(1), ..self }
    }

    /// The same node, whose sequences keep at most so many bytes in memory of the rows that indexers pick among; what is
    /// stored of the others stays there and is read as it is picked.
    #[must_use]
    pub fn with_resident_bytes(self, bytes: Option<u64>) -> Self {
        Self { resident_bytes: bytes, ..self }
    }
}

impl Engine {
    fn start(
        loaded: LoadedModel,
        store: &Arc<Store>,
        namespaces: &Namespaces,
        events: &Arc<Events>,
    ) -> anyhow::Result<Self> {
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
        Ok(Self { loaded, namespace, write_behind, events: Arc::clone(events) })
    }
}

/// Differs between processes and between starts, which is all that grant ids ask for.
fn grant_seed(data: &Path) -> Vec<u8> {
    let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{} {} {}", data.display(), std::process::id(), started.as_nanos()).into_bytes()
}

/// The keys of a node that encrypts. One that has encrypted before needs its root key.
fn keys(data: &Path, root_key: Option<&Path>) -> anyhow::Result<Option<Arc<Keys>>> {
    match root_key {
        Some(root_key) => Ok(Some(Arc::new(Keys::open(data, root_key)?))),
        None if Keys::exist(data) => bail!(
            "what {} holds is encrypted: give its root key, --root-key FILE; without that nothing of it can be read",
            data.display()
        ),
        None => Ok(None),
    }
}

/// For names that nobody may guess.
fn random_seed() -> std::io::Result<[u8; 32]> {
    use std::io::Read;
    let mut seed = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(seed)
}
