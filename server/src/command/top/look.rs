//! One look at a node through its HTTP port, by TLS where an authority is named, as whoever certificate or token says.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use esker_client::Credentials;
use serde_json::Value;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto};

/// Longest wait for the node.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer that is read.
const MAX_REPLY_BYTES: u64 = 64 << 20;

/// Where to look, and as whom.
pub(super) struct Look {
    /// As it was given.
    http: String,
    address: SocketAddr,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    token: Option<String>,
}

impl Look {
    pub(super) fn new(http: &str, credentials: &Credentials) -> anyhow::Result<Self> {
        let address = http.to_socket_addrs().ok().and_then(|mut found| found.next());
        let address = address.with_context(|| format!("{http} is no HOST:PORT that can be found"))?;
        let token = credentials.token.as_deref().map(|token| token.trim().to_owned());
        // The end of a line would be the end of the header.
        ensure!(
            token.iter().all(|token| token.bytes().all(|byte| byte.is_ascii_graphic())),
            "the token is no text that a header can carry"
        );
        let Some(authority) = &credentials.authority else {
            ensure!(
                credentials.identity.is_none(),
                "a certificate is shown over TLS only: name the authority, --ca FILE"
            );
            ensure!(
                token.is_none() || address.ip().is_loopback(),
                "a token goes to another host over TLS only: name the authority of the node's certificate, --ca FILE"
            );
            return Ok(Self { http: http.into(), address, tls: None, token });
        };
        let host = http.rsplit_once(':').map_or(http, |(host, _)| host).trim_matches(['[', ']']);
        let name =
            ServerName::try_from(host.to_owned()).with_context(|| format!("{host} is no name of a host"))?;
        let config =
            config(authority, credentials.identity.as_ref()).context("the TLS files cannot be used")?;
        Ok(Self { http: http.into(), address, tls: Some((Arc::new(config), name)), token })
    }

    /// What the node says of itself.
    pub(super) fn overview(&self) -> anyhow::Result<Value> {
        let Self { http, address, tls, .. } = self;
        let stream = TcpStream::connect_timeout(address, TIMEOUT);
        let hint = || format!("cannot ask {http}: is a node running there with --http?");
        let stream = stream.with_context(hint)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let reply = match tls {
            None => self.ask(stream).with_context(hint)?,
            Some((config, name)) => {
                let session = ClientConnection::new(Arc::clone(config), name.clone())?;
                self.ask(StreamOwned::new(session, stream)).with_context(hint)?
            }
        };
        let (head, body) =
            reply.split_once("\r\n\r\n").with_context(|| format!("{http} does not speak HTTP"))?;
        let body: Value = serde_json::from_str(body)
            .with_context(|| format!("what {http} answers is no node's: {}", first(head)))?;
        if let Some(message) = body["error"]["message"].as_str() {
            bail!("{message}");
        }
        Ok(body)
    }

    fn ask(&self, mut stream: impl Read + Write) -> anyhow::Result<String> {
        let token = self.token.as_ref().map(|token| format!("authorization: Bearer {token}\r\n"));
        let (http, token) = (&self.http, token.unwrap_or_default());
        // HTTP/1.0: the answer comes whole, and its end is the connection's.
        write!(stream, "GET /api/overview HTTP/1.0\r\nhost: {http}\r\n{token}\r\n")?;
        stream.flush()?;
        let mut reply = Vec::new();
        match stream.take(MAX_REPLY_BYTES).read_to_end(&mut reply) {
            // A connection that ends without TLS's farewell; whether the answer is whole is seen from its JSON.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof && !reply.is_empty() => {}
            read => drop(read?),
        }
        Ok(String::from_utf8_lossy(&reply).into_owned())
    }
}

fn first(head: &str) -> &str {
    head.lines().next().unwrap_or_default()
}

fn config(authority: &[u8], identity: Option<&(Vec<u8>, Vec<u8>)>) -> anyhow::Result<ClientConfig> {
    let certificates = |pem: &[u8]| CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let mut roots = RootCertStore::empty();
    for authority in certificates(authority)? {
        roots.add(authority)?;
    }
    let provider = Arc::new(crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = config.with_root_certificates(roots);
    Ok(match identity {
        None => config.with_no_client_auth(),
        Some((chain, key)) => {
            config.with_client_auth_cert(certificates(chain)?, PrivateKeyDer::from_pem_slice(key)?)?
        }
    })
}
