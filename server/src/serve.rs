//! The gRPC server, and the HTTP listener beside it: listening, limits, health, reflection, and an orderly end.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use esker_proto::MAX_MESSAGE_BYTES;
use esker_proto::v1::FILE_DESCRIPTOR_SET;
use esker_proto::v1::admin_server::AdminServer;
use esker_proto::v1::decoder_server::DecoderServer;
use esker_proto::v1::events_server::EventsServer;
use esker_proto::v1::local_server::LocalServer;
use esker_proto::v1::prefix_cache_server::PrefixCacheServer;
use esker_proto::v1::sessions_server::SessionsServer;
use esker_proto::v1::usage_server::UsageServer;
use esker_proto::v1::warmup_server::WarmupServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::arrival::ArrivalLayer;
use crate::auth::{AuthLayer, Authenticator};
use crate::events::publisher::{Publisher, PublisherSettings};
use crate::http::{self, Site};
use crate::local::{LocalSettings, LocalSockets};
use crate::metrics::MetricsLayer;
use crate::node::Node;
use crate::service::{
    AdminService, Admission, CacheService, DecoderService, EventsService, LocalService, SessionsService,
    UsageService, WarmupService, close_unsettled,
};
use crate::traces::TraceLayer;
use crate::warmups::Runner;

const MAX_STREAMS_PER_CONNECTION: u32 = 256;
/// Longest message of calls that name a service or a symbol.
const MAX_NAMING_BYTES: usize = 8 << 10;
const MAX_PENDING_RESETS: usize = 32;
/// Connections are closed in good order after this long, so that load balancers can move clients.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// Largest HTTP/2 frame that we take. Small ones cost a putter a system call every 16 KiB.
const FRAME_BYTES: u32 = 256 << 10;
/// What a client may send ahead of being read, in one call and in all of a connection: a put of two mebibytes must not wait for a
/// round trip in between.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// A client whose TLS handshake is not over by then is let go.
const HANDSHAKE: Duration = Duration::from_secs(10);
const KEEPALIVE: Duration = Duration::from_secs(20);
/// After a stop signal, streams get this long to end by themselves.
const DRAIN: Duration = Duration::from_secs(5);

const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// A server that is up.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    /// Where it listens for HTTP, if it does.
    pub http: Option<SocketAddr>,
    /// Where it publishes KV events, and where it is asked for those that were missed.
    pub events: Option<(SocketAddr, Option<SocketAddr>)>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Running {
    /// Waits until the server has ended after its stop signal.
    pub async fn wait(self) -> anyhow::Result<()> {
        self.serving.await.context("the server task ended badly")?.context("the server failed")
    }
}

/// Where and how to listen.
#[derive(Clone, Debug)]
pub struct ListenSettings {
    /// Address; port 0 takes a free one.
    pub address: SocketAddr,
    /// Address of the HTTP listener; none without one.
    pub http: Option<SocketAddr>,
    /// Listen beyond loopback although the network is trusted with the secrecy of what passes, or with who calls.
    pub insecure: bool,
    /// TLS, if any.
    pub tls: Option<TlsFiles>,
    /// Unix sockets beside it, for clients on this host.
    pub local: Option<LocalSettings>,
    /// Where KV events are published for followers of vLLM.
    pub events: Option<PublisherSettings>,
}

/// PEM files of TLS.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Certificate chain of the server.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities of client certificates; clients without one may still give a token.
    pub client_ca: Option<PathBuf>,
}

impl ListenSettings {
    /// Plain, on this address.
    pub fn plain(address: SocketAddr) -> Self {
        Self { address, http: None, insecure: false, tls: None, local: None, events: None }
    }

    /// Beyond loopback only with TLS and a policy, or with `insecure`.
    pub(crate) fn check(&self, asks: bool) -> anyhow::Result<()> {
        [Some(self.address), self.http]
            .into_iter()
            .flatten()
            .try_for_each(|address| self.check_one(address, asks))?;
        // These sockets know neither TLS nor callers.
        let open = self.events.iter().flat_map(|events| [Some(events.address), events.replay]).flatten();
        let mut reached = open.filter(|address| !address.ip().is_loopback());
        match reached.next() {
            Some(address) if !self.insecure => bail!(
                "refusing to publish KV events on {address}: anyone who reaches it could read the tokens of what is stored. \
                 Publish on 127.0.0.1; --insecure is for a network that itself keeps others out"
            ),
            Some(address) => {
                tracing::warn!(%address, "publishing KV events beyond loopback with --insecure");
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn check_one(&self, address: SocketAddr, asks: bool) -> anyhow::Result<()> {
        if address.ip().is_loopback() || (self.tls.is_some() && asks) {
            return Ok(());
        }
        if self.insecure {
            tracing::warn!(%address, tls = self.tls.is_some(), asks_who_calls = asks, "listening beyond loopback with --insecure");
            return Ok(());
        }
        bail!(
            "refusing to listen on {address}: anyone who reaches it could read and write this cache. \
             Give --tls-cert, --tls-key and --policy, or listen on 127.0.0.1; \
             --insecure is for a network that itself keeps others out"
        );
    }
}

impl TlsFiles {
    fn config(&self) -> anyhow::Result<ServerTlsConfig> {
        let read =
            |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let identity = Identity::from_pem(read(&self.certificate)?, read(&self.key)?);
        let config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE);
        Ok(match &self.client_ca {
            Some(path) => {
                config.client_ca_root(Certificate::from_pem(read(path)?)).client_auth_optional(true)
            }
            None => config,
        })
    }
}

/// Starts to serve `node` until `stop` resolves.
pub async fn start(
    node: Arc<Node>,
    listen: &ListenSettings,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<Running> {
    let authenticator = Arc::new(Authenticator::new(Arc::clone(&node.policy), node.policy.is_file())?);
    listen.check(authenticator.asks())?;
    let auth = AuthLayer::new(Arc::clone(&authenticator), Arc::clone(&node.audit));
    let listener = TcpListener::bind(listen.address)
        .await
        .with_context(|| format!("cannot listen on {}", listen.address))?;
    let address = listener.local_addr().context("cannot tell the listening address")?;
    let decoding = Arc::new(DecoderService::new(node.clone()));
    let http = match listen.http {
        Some(address) => {
            let site = Site::new(node.clone(), Arc::clone(&decoding));
            Some(http::bind(site, Arc::clone(&authenticator), address, listen.tls.as_ref()).await?)
        }
        None => None,
    };
    let http_address = http.as_ref().map(|http| http.address);

    let publisher = match &listen.events {
        Some(settings) => Some(Publisher::bind(settings, &node).await?),
        None => None,
    };
    let events_at = publisher.as_ref().map(|publisher| (publisher.address, publisher.replay));

    let asks = authenticator.asks();
    let local = listen.local.as_ref().map(|local| LocalSockets::bind(local, asks)).transpose()?;

    let admission = Admission::new();
    let cache = PrefixCacheServer::new(CacheService::new(node.clone(), admission.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let arenas = LocalServer::new(LocalService::new(node.clone(), admission));
    let decoder = DecoderServer::from_arc(Arc::clone(&decoding)).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let (health, health_service) = tonic_health::server::health_reporter();
    // These name a service: nobody who calls without being asked who it is brings more.
    let health_service = health_service.max_decoding_message_size(MAX_NAMING_BYTES);
    health.set_serving::<PrefixCacheServer<CacheService>>().await;
    if node.engine.is_some() {
        health.set_serving::<DecoderServer<DecoderService>>().await;
    }
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("the descriptors of esker.v1 are not usable")?
        .max_decoding_message_size(MAX_NAMING_BYTES);

    let sessions =
        SessionsServer::new(SessionsService::new(node.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let admin = AdminServer::new(AdminService::new(node.clone()));
    let usage =
        UsageServer::new(UsageService::new(node.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let warmup =
        WarmupServer::new(WarmupService::new(node.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let events = EventsServer::new(EventsService::new(node.clone()));
    let warming = Runner::start(&node).context("cannot start the thread of warm-up jobs")?;
    let housekeeping = tokio::spawn(keep_house(Arc::clone(&node)));
    let publishing = publisher.map(|publisher| AbortOnDrop(tokio::spawn(publisher.serve()).abort_handle()));
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_connection_age(MAX_CONNECTION_AGE);
    let routes = Routes::new(health_service)
        .add_service(reflection)
        .add_service(cache)
        .add_service(decoder)
        .add_service(sessions)
        .add_service(usage)
        .add_service(warmup)
        .add_service(events)
        .add_service(arenas)
        .add_service(admin);
    let traces = TraceLayer(node.traces.clone());
    let arrival = ArrivalLayer(node.clone());
    let local = local.map(|sockets| {
        let (calls, handing_out) = sockets.serve(Arc::clone(&node.arenas), authenticator);
        let router = server
            .clone()
            .layer(traces.clone())
            .layer(MetricsLayer(node.clone()))
            .layer(auth.clone())
            .layer(arrival.clone())
            .add_routes(routes.clone());
        let calls = tokio::spawn(router.serve_with_incoming(UnixListenerStream::new(calls)));
        [AbortOnDrop(handing_out.abort_handle()), AbortOnDrop(calls.abort_handle())]
    });
    let server = match &listen.tls {
        Some(tls) => server.tls_config(tls.config()?).context("the TLS files cannot be used")?,
        None => server,
    };
    let router =
        server.layer(traces).layer(MetricsLayer(node.clone())).layer(auth).layer(arrival).add_routes(routes);
    let serving = tokio::spawn(async move {
        let _housekeeping = AbortOnDrop(housekeeping.abort_handle());
        let _local = local;
        let _publishing = publishing;
        let (draining, drained) = watch::channel(false);
        let signal = async move {
            stop.await;
            // Nobody waits for the drain only if the server has already ended.
            let _ = draining.send(true);
        };
        // An error says that the sender is gone, with the server.
        let stopped = |mut drained: watch::Receiver<bool>| async move {
            let _ = drained.wait_for(|&drained| drained).await;
        };
        let web = async {
            if let Some(http) = http {
                http.serve(stopped(drained.clone())).await;
            }
        };
        // The builder's setting is for sockets that it binds itself. Without it a reply of several frames waits for the
        // acknowledgement that its reader delays: 40 ms on Linux.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let both = async { tokio::join!(router.serve_with_incoming_shutdown(incoming, signal), web).0 };
        let ended = tokio::select! {
            ended = both => ended,
            () = async { stopped(drained.clone()).await; tokio::time::sleep(DRAIN).await } => {
                tracing::warn!("streams were cut: they did not end within {DRAIN:?} of the stop signal");
                Ok(())
            }
        };
        // Waits for the step that a job is in: what it computed is stored, and the node is free to close.
        let _ = tokio::task::spawn_blocking(move || drop(warming)).await;
        ended
    });
    Ok(Running { address, http: http_address, events: events_at, serving })
}

/// Ends what nobody ends: grants whose time is over.
async fn keep_house(node: Arc<Node>) {
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tick.tick().await;
        let node = Arc::clone(&node);
        let round = tokio::task::spawn_blocking(move || {
            close_unsettled(&node, &node.grants.expire(Instant::now()));
            node.staging.expire(Instant::now());
            node.sampler.tick(&node);
            node.history.look(node.store.stats());
            node.ledger.tick();
            node.audit.settle(Instant::now());
        });
        // A panic in it has been reported by the panic hook; the next round comes.
        let _ = round.await;
    }
}

/// A task that lives no longer than this.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
