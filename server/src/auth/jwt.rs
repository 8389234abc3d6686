//! Bearer tokens: JWTs signed with a key of the policy's JWKS file.
//!
//! EdDSA or ES256 only, by the algorithm that the key is for and never by what the token says; `kid`, `aud`, `exp` and `iat`
//! are required; a token lives at most an hour, and clocks may differ by a minute. Claims of ours: `tenant`, and `roles`.

use std::path::Path;

use anyhow::Context;
use http::HeaderValue;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use tonic::Status;

use crate::policy::{Policy, Watched};
use crate::principal::{Principal, Role, TenantId, is_account};

const MAX_LIFE_S: u64 = 3600;
const SKEW_S: u64 = 60;
/// Longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 8 << 10;

/// Checks tokens.
pub(super) struct Tokens {
    keys: Option<Watched<Vec<Key>>>,
}

struct Key {
    id: String,
    algorithm: Algorithm,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    sub: String,
    exp: u64,
    iat: u64,
    tenant: String,
    #[serde(default)]
    roles: Vec<Role>,
}

impl Tokens {
    pub(super) fn open(policy: &Policy) -> anyhow::Result<Self> {
        let keys = policy.jwt.as_ref().map(|jwt| Watched::open(&jwt.jwks, read_keys)).transpose()?;
        Ok(Self { keys })
    }

    pub(super) fn principal(&self, header: &HeaderValue, policy: &Policy) -> Result<Principal, Status> {
        let refused =
            |reason: &str| Status::unauthenticated(format!("the bearer token is refused: {reason}"));
        let (Some(keys), Some(jwt)) = (&self.keys, &policy.jwt) else {
            return Err(refused("the policy of this node has no [jwt]"));
        };
        let text = header.to_str().ok().filter(|text| text.len() <= MAX_TOKEN_BYTES);
        let token = text
            .and_then(|text| text.strip_prefix("Bearer ").or_else(|| text.strip_prefix("bearer ")))
            .ok_or_else(|| refused("the header must be `Bearer TOKEN`, of at most 8 KiB"))?;
        let header = decode_header(token).map_err(|_| refused("it is not a JWT"))?;
        let id = header.kid.ok_or_else(|| refused("it does not name its key (kid)"))?;
        let keys = keys.now();
        let key = keys.iter().find(|key| key.id == id);
        let key = key.ok_or_else(|| refused("its key is not among this node's keys"))?;
        let mut rules = Validation::new(key.algorithm);
        rules.set_audience(&[&jwt.audience]);
        rules.set_required_spec_claims(&["exp", "aud"]);
        rules.validate_nbf = true;
        rules.leeway = SKEW_S;
        let claims =
            decode::<Claims>(token, &key.key, &rules).map_err(|error| refused(&error.to_string()))?.claims;
        established(claims, policy, jsonwebtoken::get_current_timestamp()).map_err(refused)
    }
}

/// Who a token whose signature, audience and end were right says that its bearer is.
fn established(claims: Claims, policy: &Policy, now_s: u64) -> Result<Principal, &'static str> {
    if claims.exp.saturating_sub(claims.iat) > MAX_LIFE_S {
        return Err("it lives longer than an hour");
    }
    if claims.iat > now_s.saturating_add(SKEW_S) {
        return Err("it was issued in the future");
    }
    let tenant = TenantId(claims.tenant);
    if !policy.tenants.contains_key(&tenant) {
        return Err("its tenant is not in this node's policy");
    }
    // What it puts can be taken back by this name.
    if !is_account(&claims.sub) {
        return Err("its `sub` is empty, too long, or has control characters");
    }
    Ok(Principal { tenant, name: claims.sub, roles: claims.roles.into_iter().collect() })
}

fn read_keys(path: &Path) -> anyhow::Result<Vec<Key>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the keys {}", path.display()))?;
    parse_keys(&text, path)
}

fn parse_keys(text: &str, path: &Path) -> anyhow::Result<Vec<Key>> {
    let set: JwkSet = serde_json::from_str(text)
        .with_context(|| format!("{} is not a JSON Web Key Set", path.display()))?;
    set.keys
        .iter()
        .map(|jwk| usable(jwk).with_context(|| format!("a key of {} cannot be used", path.display())))
        .collect()
}

fn usable(jwk: &Jwk) -> anyhow::Result<Key> {
    let id = jwk.common.key_id.clone().context("it has no `kid`")?;
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Algorithm::EdDSA,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Algorithm::ES256,
        _ => anyhow::bail!("key {id:?} is neither Ed25519 nor P-256; others are not accepted"),
    };
    let key = DecodingKey::from_jwk(jwk).with_context(|| format!("key {id:?} is malformed"))?;
    Ok(Key { id, algorithm, key })
}

/// For fuzzing: a file of keys. Whether all of it can be used.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let keys = std::str::from_utf8(bytes).ok().and_then(|text| parse_keys(text, Path::new("jwks.json")).ok());
    let keys = keys.unwrap_or_default();
    assert!(keys.iter().all(|key| matches!(key.algorithm, Algorithm::EdDSA | Algorithm::ES256)));
    !keys.is_empty()
}

/// For fuzzing: a bearer token as it came, or the claims of one whose signature was right. Whether its claims establish somebody, or it
/// names a key that is known: nobody can sign with that here.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear_token(bytes: &[u8]) -> bool {
    use std::sync::LazyLock;
    /// The public half of the key in RFC 8037, appendix A.
    const KEYS: &str = r#"{"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k",
        "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
    const NOW_S: u64 = 1_795_003_200;
    static KNOWN: LazyLock<(Tokens, Policy)> = LazyLock::new(|| {
        let keys = parse_keys(KEYS, Path::new("jwks.json")).unwrap_or_default();
        assert_eq!(keys.len(), 1);
        let jwt = crate::policy::JwtPolicy { jwks: "jwks.json".into(), audience: "esker".into() };
        let policy = Policy { jwt: Some(jwt), ..Policy::open() };
        (Tokens { keys: Some(Watched::fixed(keys)) }, policy)
    });
    let (tokens, policy) = &*KNOWN;
    let mut names_key = false;
    if let Ok(header) = HeaderValue::from_bytes(bytes) {
        assert!(tokens.principal(&header, policy).is_err(), "a signature without its key");
        let token = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        names_key = token.and_then(|token| decode_header(token).ok()?.kid).is_some_and(|kid| kid == "k");
    }
    let claims = serde_json::from_slice::<Claims>(bytes).ok();
    let known = claims.and_then(|claims| established(claims, policy, NOW_S).ok());
    if let Some(Principal { tenant, name, .. }) = &known {
        assert!(policy.tenants.contains_key(tenant) && is_account(name));
    }
    names_key || known.is_some()
}
