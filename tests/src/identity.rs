//! Who calls: a made-up fleet's tokens and certificates, and the policy of a node that believes them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde::Serialize;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

const KEY_ID: &str = "fleet-1";
const AUDIENCE: &str = "esker";
const TRUST_DOMAIN: &str = "fleet.example";

/// Issues tokens and certificates, and writes what a node needs to check them.
pub struct Issuer {
    folder: PathBuf,
    key: EncodingKey,
    ca: CertifiedIssuer<'static, KeyPair>,
}

/// What a token says. Every field can be given wrongly.
#[derive(Clone, Debug, Serialize)]
pub struct Claims {
    /// Account.
    pub sub: String,
    /// For whom.
    pub aud: String,
    /// End, in seconds since 1970.
    pub exp: u64,
    /// Beginning, in seconds since 1970.
    pub iat: u64,
    /// Tenant.
    pub tenant: String,
    /// Roles.
    pub roles: Vec<String>,
}

impl Claims {
    /// A token of ten minutes.
    pub fn new(tenant: &str, roles: &[&str]) -> Self {
        let now = get_current_timestamp();
        Self {
            sub: "engine".into(),
            aud: AUDIENCE.into(),
            exp: now + 600,
            iat: now,
            tenant: tenant.into(),
            roles: roles.iter().map(|&role| role.to_owned()).collect(),
        }
    }
}

impl Issuer {
    /// Keys of its own, their public halves in `folder`.
    pub fn new(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let key = signing_key()?;
        std::fs::write(folder.join("jwks.json"), serde_json::to_string(&key_set(&key)?)?)?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        std::fs::write(folder.join("ca.pem"), ca.pem())?;
        Ok(Self { folder: folder.to_owned(), key, ca })
    }

    /// Writes a policy of these tenants (TOML tables) and gives its path.
    pub fn policy(&self, tenants: &str) -> Result<PathBuf> {
        let path = self.folder.join("policy.toml");
        let head = format!(
            "trust_domain = \"{TRUST_DOMAIN}\"\n[jwt]\njwks = \"jwks.json\"\naudience = \"{AUDIENCE}\"\n"
        );
        std::fs::write(&path, head + tenants)?;
        Ok(path)
    }

    /// A token of these claims, signed with the key that the node knows.
    pub fn sign(&self, claims: &Claims) -> Result<String> {
        let header = Header { kid: Some(KEY_ID.into()), ..Header::new(Algorithm::ES256) };
        Ok(encode(&header, claims, &self.key)?)
    }

    /// A token for an account of a tenant with these roles.
    pub fn token(&self, tenant: &str, roles: &[&str]) -> Result<Bearer> {
        Bearer::new(&self.sign(&Claims::new(tenant, roles))?)
    }

    /// A certificate for a server on this machine: paths of the chain and its key.
    pub fn server(&self) -> Result<(PathBuf, PathBuf)> {
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        let paths = (self.folder.join("server.pem"), self.folder.join("server.key"));
        std::fs::write(&paths.0, certificate.pem())?;
        std::fs::write(&paths.1, key.serialize_pem())?;
        Ok(paths)
    }

    /// A client's certificate and key, with this SPIFFE id.
    pub fn client(&self, spiffe: &str) -> Result<Identity> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names.push(SanType::URI(spiffe.try_into()?));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        Ok(Identity::from_pem(certificate.pem(), key.serialize_pem()))
    }

    /// Where the authority's certificate lies.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// A TLS connection to a node, with a client's certificate if there is one.
    pub async fn connect(&self, address: &str, identity: Option<Identity>) -> Result<Channel> {
        let port = address.rsplit_once(':').map_or("", |(_, port)| port);
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.ca.pem()))
            .domain_name("localhost");
        if let Some(identity) = identity {
            tls = tls.identity(identity);
        }
        let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{port}"))?.tls_config(tls)?;
        Ok(endpoint.connect().await?)
    }
}

/// The SPIFFE id of an account.
pub fn spiffe(tenant: &str, account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/tenant/{tenant}/sa/{account}")
}

/// Another key under the same id: what a forger has.
pub fn forged(claims: &Claims) -> Result<String> {
    let header = Header { kid: Some(KEY_ID.into()), ..Header::new(Algorithm::ES256) };
    Ok(encode(&header, claims, &signing_key()?)?)
}

fn signing_key() -> Result<EncodingKey> {
    Ok(EncodingKey::from_ec_der(&KeyPair::generate()?.serialize_der()))
}

fn key_set(key: &EncodingKey) -> Result<JwkSet> {
    let mut jwk = Jwk::from_encoding_key(key, Algorithm::ES256)?;
    jwk.common.key_id = Some(KEY_ID.into());
    jwk.common.public_key_use = Some(PublicKeyUse::Signature);
    Ok(JwkSet { keys: vec![jwk] })
}

/// Puts a token into every request.
#[derive(Clone)]
pub struct Bearer(MetadataValue<Ascii>);

impl Bearer {
    /// Of this token, whatever it is.
    pub fn new(token: &str) -> Result<Self> {
        Ok(Self(format!("Bearer {token}").parse()?))
    }
}

impl tonic::service::Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}
