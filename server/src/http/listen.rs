//! Connections: accepted within a bound, TLS if configured, HTTP/1.1, and an orderly end.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use tower::ServiceExt;

use super::guard::{PeerAddress, PeerCertificates};
use crate::serve::TlsFiles;

/// Connections at a time; more wait in the system's queue.
const MAX_CONNECTIONS: usize = 1024;
/// A peer that has not finished its handshake, or the head of its request, by then is let go.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// What a connection reads ahead at most, and the longest head of a request.
const BUFFER_BYTES: usize = 64 << 10;
/// After a failed accept, such as one for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound address and what serves there.
pub(crate) struct Listening {
    /// Where.
    pub(crate) address: SocketAddr,
    listener: TcpListener,
    router: Router,
    tls: Option<TlsAcceptor>,
}

pub(super) async fn bind(
    router: Router,
    address: SocketAddr,
    tls: Option<&TlsFiles>,
) -> anyhow::Result<Listening> {
    let tls = tls.map(acceptor).transpose().context("the TLS files cannot be used")?;
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr().context("cannot tell the listening address")?;
    Ok(Listening { address, listener, router, tls })
}

impl Listening {
    /// Serves until `stop` resolves, then lets requests that are under way end.
    pub(crate) async fn serve(self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (ending, ended) = watch::channel(());
        let mut connections = JoinSet::new();
        loop {
            let next = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            let (slot, accepted) = tokio::select! {
                () = &mut stop => break,
                accepted = next => accepted,
                Some(_) = connections.join_next() => continue,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let (router, tls, ended) = (self.router.clone(), self.tls.clone(), ended.clone());
                    connections.spawn(async move {
                        let _slot = slot;
                        // Errors of a connection are its peer's: gone, late, or no HTTP.
                        if let Err(error) =
                            connection(stream, PeerAddress(peer.ip()), router, tls, ended).await
                        {
                            tracing::debug!(%error, "an HTTP connection ended early");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop((self.listener, ended));
        // Nobody listens only if no connection is left.
        let _ = ending.send(());
        while connections.join_next().await.is_some() {}
    }
}

async fn connection(
    stream: TcpStream,
    peer: PeerAddress,
    router: Router,
    tls: Option<TlsAcceptor>,
    ended: watch::Receiver<()>,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return requests(stream, peer, router, None, ended).await };
    let handshake = tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await;
    let stream = handshake.map_err(io::Error::from)??;
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().map(|shown| PeerCertificates(Arc::new(shown.to_vec())));
    requests(stream, peer, router, shown, ended).await
}

async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: PeerAddress,
    router: Router,
    certificates: Option<PeerCertificates>,
    mut ended: watch::Receiver<()>,
) -> anyhow::Result<()> {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        if let Some(certificates) = certificates.clone() {
            request.extensions_mut().insert(certificates);
        }
        let router = router.clone();
        async move { Ok::<_, Infallible>(router.oneshot(request.map(Body::new)).await.into_response()) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(BUFFER_BYTES)
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        done = connection.as_mut() => return Ok(done?),
        _ = ended.changed() => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}

fn acceptor(files: &TlsFiles) -> anyhow::Result<TlsAcceptor> {
    let read = |path: &std::path::Path| {
        CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("cannot read {}", path.display()))
    };
    let chain = read(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .with_context(|| format!("cannot read {}", files.key.display()))?;
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let config = match &files.client_ca {
        None => config.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in read(path)? {
                roots.add(authority)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            config.with_client_cert_verifier(verifier.allow_unauthenticated().build()?)
        }
    };
    let mut config = config.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
