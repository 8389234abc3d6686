//! The gRPC server: listening, limits, health, reflection, and an orderly end.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use esker_proto::MAX_MESSAGE_BYTES;
use esker_proto::v1::FILE_DESCRIPTOR_SET;
use esker_proto::v1::decoder_server::DecoderServer;
use esker_proto::v1::prefix_cache_server::PrefixCacheServer;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use crate::node::Node;
use crate::service::{CacheService, DecoderService};

const MAX_STREAMS_PER_CONNECTION: u32 = 256;
const MAX_PENDING_RESETS: usize = 32;
const KEEPALIVE: Duration = Duration::from_secs(20);
/// After a stop signal, streams get this long to end by themselves.
const DRAIN: Duration = Duration::from_secs(5);

/// A server that is up.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Running {
    /// Waits until the server has ended after its stop signal.
    pub async fn wait(self) -> anyhow::Result<()> {
        self.serving.await.context("the server task ended badly")?.context("the server failed")
    }
}

/// Beyond loopback only with `insecure`, since nobody is asked who they are.
pub(crate) fn check_listen(listen: SocketAddr, insecure: bool) -> anyhow::Result<()> {
    if !listen.ip().is_loopback() && !insecure {
        bail!(
            "refusing to listen on {listen}: anyone who reaches it could read and write this cache. \
             Listen on 127.0.0.1, or give --insecure if the network itself keeps others out"
        );
    }
    Ok(())
}

/// Starts to serve `node` on `listen` until `stop` resolves.
pub async fn start(
    node: Arc<Node>,
    listen: SocketAddr,
    insecure: bool,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<Running> {
    check_listen(listen, insecure)?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    let address = listener.local_addr().context("cannot tell the listening address")?;

    let cache =
        PrefixCacheServer::new(CacheService::new(node.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let decoder =
        DecoderServer::new(DecoderService::new(node.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<PrefixCacheServer<CacheService>>().await;
    if node.engine.is_some() {
        health.set_serving::<DecoderServer<DecoderService>>().await;
    }
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("the descriptors of esker.v1 are not usable")?;

    let router = Server::builder()
        .tcp_nodelay(true)
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(cache)
        .add_service(decoder);
    let serving = tokio::spawn(async move {
        let (draining, drained) = tokio::sync::oneshot::channel();
        let signal = async move {
            stop.await;
            // Nobody waits for the drain only if the server has already ended.
            let _ = draining.send(());
        };
        let incoming = TcpListenerStream::new(listener);
        tokio::select! {
            ended = router.serve_with_incoming_shutdown(incoming, signal) => ended,
            () = async { let _ = drained.await; tokio::time::sleep(DRAIN).await } => {
                tracing::warn!("streams were cut: they did not end within {DRAIN:?} of the stop signal");
                Ok(())
            }
        }
    });
    Ok(Running { address, serving })
}
