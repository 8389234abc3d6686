//! A node that serves, over plain TCP, mTLS and shared memory, and prefixes on it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use esker_benches::v4_flash;
use esker_client::{Client, Object, tuned};
use esker_prefix::{KvLayout, Namespace, NamespaceId, ObjectKind, TokenId};
use esker_store::StoreSettings;
use tokio::runtime::Runtime;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::local::LocalSettings;
use crate::node::{Node, NodeSettings};
use crate::serve::{self, ListenSettings, Running, TlsFiles};

/// 100,096 tokens.
const BLOCKS: u32 = 782;
const PREFIXES: u32 = 2;
/// Blocks of one put while the prefixes are written.
const BLOCKS_PER_PUT: usize = 64;
const LEASE: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Bed {
    pub(super) node: Arc<Node>,
    /// Of the clients; the server has its own.
    pub(super) clients: Runtime,
    pub(super) address: SocketAddr,
    pub(super) local: PathBuf,
    tls_address: SocketAddr,
    certificates: Certificates,
    pub(super) namespace: NamespaceId,
    pub(super) prefixes: Vec<Vec<TokenId>>,
    server: Runtime,
    running: Vec<Running>,
    stop: tokio::sync::watch::Sender<bool>,
    _dir: tempfile::TempDir,
}

impl Bed {
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        Self::make(dir, PREFIXES, false)
    }

    /// With one prefix, which is encrypted.
    pub(super) fn encrypted(dir: &Path) -> anyhow::Result<Self> {
        Self::make(dir, 1, true)
    }

    fn make(dir: &Path, prefixes: u32, encrypted: bool) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("esker-bench-")
            .tempdir_in(dir)
            .with_context(|| format!("cannot make a folder in {}", dir.display()))?;
        let root_key = dir.path().join("root.key");
        std::fs::write(&root_key, [7; 32])?;
        let settings = NodeSettings {
            data: dir.path().join("data"),
            store: StoreSettings::default(),
            root_key: encrypted.then_some(root_key),
            ..NodeSettings::default()
        };
        let node = Arc::new(Node::open(&settings, None)?);
        let (server, clients) = (Runtime::new()?, Runtime::new()?);
        let certificates = Certificates::make(dir.path())?;
        let local = dir.path().join("local");
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let start = |listen: ListenSettings| {
            let mut stopped = stopped.clone();
            let stop = async move { drop(stopped.wait_for(|&stop| stop).await) };
            server.block_on(async { serve::start(Arc::clone(&node), &listen, stop).await })
        };
        let local_settings = LocalSettings { path: local.clone(), lease: LEASE };
        let plain = start(ListenSettings { local: Some(local_settings), ..ListenSettings::plain(loopback) })?;
        let tls = Some(certificates.files.clone());
        let secure = start(ListenSettings { tls, ..ListenSettings::plain(loopback) })?;
        let (address, tls_address) = (plain.address, secure.address);
        let layout = v4_flash();
        let namespace = clients.block_on(register(address, &layout))?;
        let prefixes = (0..prefixes).map(|seed| tokens(&layout, seed, BLOCKS)).collect();
        let bed = Self {
            node,
            clients,
            address,
            local,
            tls_address,
            certificates,
            namespace,
            prefixes,
            server,
            running: vec![plain, secure],
            stop,
            _dir: dir,
        };
        bed.clients.block_on(bed.fill(&layout))?;
        Ok(bed)
    }

    /// Stores the prefixes, with the state at the end of each.
    async fn fill(&self, layout: &KvLayout) -> anyhow::Result<()> {
        let client = Client::over(self.connect().await?);
        for (seed, tokens) in (0..).zip(&self.prefixes) {
            let mut objects = objects(layout, seed, BLOCKS);
            while !objects.is_empty() {
                let some = objects.drain(..objects.len().min(BLOCKS_PER_PUT)).collect();
                for result in client.put(self.namespace, tokens, some).await? {
                    anyhow::ensure!(result.outcome() == esker_client::v1::Outcome::Stored, "{result:?}");
                }
            }
        }
        Ok(())
    }

    /// A connection of its own, plain.
    pub(super) async fn connect(&self) -> anyhow::Result<Channel> {
        Ok(tuned(Endpoint::from_shared(format!("http://{}", self.address))?).connect().await?)
    }

    /// A connection of its own in which both sides prove who they are.
    pub(super) async fn connect_tls(&self) -> anyhow::Result<Channel> {
        let Certificates { authority, client, .. } = &self.certificates;
        let config = ClientTlsConfig::new()
            .domain_name("localhost")
            .ca_certificate(Certificate::from_pem(authority))
            .identity(Identity::from_pem(&client.0, &client.1));
        let endpoint = Endpoint::from_shared(format!("https://{}", self.tls_address))?.tls_config(config)?;
        Ok(tuned(endpoint).connect().await?)
    }

    pub(super) fn close(self) -> anyhow::Result<()> {
        let Self { clients, server, running, stop, .. } = self;
        clients.shutdown_timeout(Duration::from_secs(5));
        let _ = stop.send(true);
        running.into_iter().try_for_each(|running| server.block_on(running.wait()))?;
        server.shutdown_timeout(Duration::from_secs(5));
        Ok(())
    }
}

/// An authority and what it signed, made for this run.
struct Certificates {
    files: TlsFiles,
    authority: String,
    /// Certificate and key.
    client: (String, String),
}

impl Certificates {
    fn make(dir: &Path) -> anyhow::Result<Self> {
        use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let signed = |name: &str| -> anyhow::Result<(String, String)> {
            let key = KeyPair::generate()?;
            let certificate = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &authority)?;
            Ok((certificate.pem(), key.serialize_pem()))
        };
        let (server, client) = (signed("localhost")?, signed("client")?);
        let file = |name: &str, text: &str| -> anyhow::Result<PathBuf> {
            let path = dir.join(name);
            std::fs::write(&path, text)?;
            Ok(path)
        };
        let files = TlsFiles {
            certificate: file("server.pem", &server.0)?,
            key: file("server.key", &server.1)?,
            client_ca: Some(file("authority.pem", &authority.pem())?),
        };
        Ok(Self { files, authority: authority.pem(), client })
    }
}

pub(super) async fn register(address: SocketAddr, layout: &KvLayout) -> anyhow::Result<NamespaceId> {
    let namespace =
        Namespace { weights: [1; 32], tokenizer: [2; 32], layout: layout.id(), adapter: String::new() };
    let client = Client::connect(&address.to_string()).await?;
    Ok(client.register_namespace(&namespace, layout).await?)
}

/// A prompt of so many blocks and one token.
pub(super) fn tokens(layout: &KvLayout, seed: u32, blocks: u32) -> Vec<TokenId> {
    (0..=blocks * layout.block_tokens()).map(|number| TokenId(number ^ (seed << 20))).collect()
}

/// Its objects, the state of its end among them; of bytes that do not shrink.
pub(super) fn objects(layout: &KvLayout, seed: u32, blocks: u32) -> Vec<Object> {
    // Every plane is cut from this at a place of its own.
    let mut random = vec![0; 32 << 20];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut random);
    let random = Bytes::from(random);
    let mut at = 0;
    let mut cut = |len_bytes: u64| {
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        if at + len > random.len() {
            at %= 4093;
        }
        at += 64;
        let piece = random.slice(at..at + len);
        at += len;
        piece
    };
    let mut object = |kind, blocks: u32| {
        let tokens = u64::from(blocks) * u64::from(layout.block_tokens());
        let planes = layout.planes_at(kind, tokens).iter().map(|plane| cut(plane.len_bytes)).collect();
        Object { kind, tokens, planes }
    };
    let mut objects: Vec<Object> = (1..=blocks).map(|number| object(ObjectKind::Block, number)).collect();
    if layout.has_states() {
        objects.push(object(ObjectKind::State, blocks));
    }
    objects
}
