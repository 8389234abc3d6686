//! How a client shows who it is, and how it knows the node: what a node with TLS and a policy asks for.
//!
//! A token is a secret that works for whoever has it, so it goes over TLS, or not beyond this host.

use std::fmt;
use std::net::IpAddr;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

use crate::{ClientError, Result};

/// See the module. By default none: for a node that asks nobody.
#[derive(Clone, Default)]
pub struct Credentials {
    /// PEM of the authorities that may have signed the node's certificate; with it the connection is by TLS.
    pub authority: Option<Vec<u8>>,
    /// PEM of the certificate chain that says who calls, and of its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// Bearer token that says who calls.
    pub token: Option<String>,
}

impl fmt::Debug for Credentials {
    /// Says what there is and none of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("authority", &self.authority.is_some())
            .field("identity", &self.identity.is_some())
            .field("token", &self.token.is_some())
            .finish()
    }
}

impl Credentials {
    /// The scheme of an address without one.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.authority.is_some() || self.identity.is_some() { "https" } else { "http" }
    }

    /// The endpoint of this address: by TLS, if it is to be.
    pub(crate) fn endpoint(&self, url: &str) -> Result<Endpoint> {
        let fail = |source| ClientError::Connect { address: url.to_owned(), source };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(fail)?;
        // Of a socket the endpoint tells another address.
        let here = url.starts_with("unix:") || endpoint.uri().host().is_some_and(is_here);
        if endpoint.uri().scheme_str() != Some("https") {
            if self.identity.is_some() {
                return Err(ClientError::Credentials("a certificate is shown over TLS only: https://"));
            }
            if self.token.is_some() && !here {
                return Err(ClientError::Credentials(
                    "a token goes to another host over TLS only: name the authority of the node's certificate",
                ));
            }
            return Ok(endpoint);
        }
        let Some(authority) = &self.authority else {
            return Err(ClientError::Credentials(
                "TLS needs the authority that signed the node's certificate: without it nobody knows who answers",
            ));
        };
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority));
        if let Some((chain, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(chain, key));
        }
        endpoint.tls_config(tls).map_err(fail)
    }

    /// What puts the token into every request.
    pub(crate) fn bearer(&self) -> Result<Bearer> {
        let Some(token) = &self.token else { return Ok(Bearer(None)) };
        let value = format!("Bearer {}", token.trim()).parse::<MetadataValue<Ascii>>();
        let mut value =
            value.map_err(|_| ClientError::Credentials("the token is no text that a header can carry"))?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

/// Whether a host is this one, by its name alone.
fn is_here(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Puts a token into every request, if there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str, credentials: &Credentials) -> Result<Endpoint> {
        credentials.endpoint(url)
    }

    #[test]
    fn a_token_leaves_this_host_over_tls_only() {
        let token = Credentials { token: Some("secret".into()), ..Credentials::default() };
        for here in ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "unix:///run/esker.sock"] {
            assert!(endpoint(here, &token).is_ok(), "{here}");
        }
        for away in ["http://10.0.0.1:1", "http://node-3:1", "http://localhost.example:1"] {
            assert!(endpoint(away, &token).unwrap_err().to_string().contains("TLS"), "{away}");
        }
        assert!(!format!("{token:?} {:?}", token.bearer().unwrap()).contains("secret"));
    }

    #[test]
    fn what_is_missing_for_tls_is_named() {
        let identity = Credentials { identity: Some((vec![], vec![])), ..Credentials::default() };
        assert_eq!((Credentials::default().scheme(), identity.scheme()), ("http", "https"));
        assert!(endpoint("http://127.0.0.1:1", &identity).unwrap_err().to_string().contains("https://"));
        assert!(endpoint("https://127.0.0.1:1", &identity).unwrap_err().to_string().contains("authority"));
        let token = Credentials { token: Some("two\nlines".into()), ..Credentials::default() };
        assert!(token.bearer().unwrap_err().to_string().contains("header"));
    }
}
