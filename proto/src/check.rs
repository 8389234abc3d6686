//! From wire fields to checked values.

use bytes::Bytes;
use esker_prefix::{BlockHash, KvLayout, Namespace, NamespaceId, TokenId};

use crate::limits::{
    MAX_CHAIN_BLOCKS, MAX_ENGINE_HASH_BYTES, MAX_LAYOUT_JSON_BYTES, MAX_NAME_BYTES, MAX_PROMPT_TOKENS,
    MAX_TAIL_TOKENS,
};
use crate::{WireError, v1};

/// A namespace id of exactly 32 bytes.
pub fn check_namespace_id(bytes: &[u8]) -> Result<NamespaceId, WireError> {
    digest("namespace", bytes).map(NamespaceId)
}

/// Tokens of a prompt: at least one, at most [`MAX_PROMPT_TOKENS`].
pub fn check_tokens(ids: Vec<u32>) -> Result<Vec<TokenId>, WireError> {
    if ids.is_empty() {
        return Err(WireError::Empty("tokens"));
    }
    if ids.len() > MAX_PROMPT_TOKENS {
        let (limit, got) = (MAX_PROMPT_TOKENS, ids.len());
        return Err(WireError::TooLarge { field: "tokens", unit: "tokens", limit, got });
    }
    Ok(ids.into_iter().map(TokenId).collect())
}

/// The ways in which a request may name a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrefixNames {
    /// By its tokens.
    Tokens(Vec<TokenId>),
    /// By this service's chain hashes, one for each block, and the tokens behind the last of them, where they are known.
    Hashes(Vec<BlockHash>, Vec<TokenId>),
    /// By an engine's hashes, one for each block; blocks that are not `chained` stand for themselves.
    Engine {
        /// At most [`MAX_ENGINE_HASH_BYTES`] each.
        hashes: Vec<Bytes>,
        /// Whether each block continues the one before it.
        chained: bool,
    },
}

/// The one way in which a request names a prefix. Bounds: [`MAX_PROMPT_TOKENS`], [`MAX_CHAIN_BLOCKS`], [`MAX_TAIL_TOKENS`].
pub fn check_prefix(
    tokens: Vec<u32>,
    hashes: &[Bytes],
    tail_tokens: Vec<u32>,
    engine_hashes: Vec<Bytes>,
    unchained: bool,
) -> Result<PrefixNames, WireError> {
    let (limit, got) = (MAX_TAIL_TOKENS, tail_tokens.len());
    if got > limit {
        return Err(WireError::TooLarge { field: "tail_tokens", unit: "tokens", limit, got });
    }
    if got > 0 && hashes.is_empty() {
        return Err(WireError::Sequence("`tail_tokens` go with `hashes`".into()));
    }
    let tail = tail_tokens.into_iter().map(TokenId).collect();
    let given = [!tokens.is_empty(), !hashes.is_empty(), !engine_hashes.is_empty()];
    match given {
        [false, false, false] => Err(WireError::Empty("tokens")),
        [true, false, false] => check_tokens(tokens).map(PrefixNames::Tokens),
        [false, true, false] => {
            bounded("hashes", hashes.len())?;
            let hashes = hashes.iter().map(|hash| digest("hashes[]", hash).map(BlockHash));
            Ok(PrefixNames::Hashes(hashes.collect::<Result<_, _>>()?, tail))
        }
        [false, false, true] => {
            bounded("engine_hashes", engine_hashes.len())?;
            for hash in &engine_hashes {
                bounded_text("engine_hashes[]", hash.len(), MAX_ENGINE_HASH_BYTES)?;
            }
            Ok(PrefixNames::Engine { hashes: engine_hashes, chained: !unchained })
        }
        _ => Err(WireError::Sequence(
            "a prefix is named in one way: give `tokens`, or `hashes`, or `engine_hashes`".into(),
        )),
    }
}

/// A name that the caller chose: 1 to [`MAX_NAME_BYTES`] bytes without control characters.
pub fn check_name(field: &'static str, name: &str) -> Result<(), WireError> {
    bounded_text(field, name.len(), MAX_NAME_BYTES)?;
    if name.chars().any(char::is_control) {
        return Err(WireError::Sequence(format!("{field} must not have control characters")));
    }
    Ok(())
}

fn bounded(field: &'static str, got: usize) -> Result<(), WireError> {
    if got > MAX_CHAIN_BLOCKS {
        return Err(WireError::TooLarge { field, unit: "blocks", limit: MAX_CHAIN_BLOCKS, got });
    }
    Ok(())
}

fn bounded_text(field: &'static str, got: usize, limit: usize) -> Result<(), WireError> {
    match got {
        0 => Err(WireError::Empty(field)),
        _ if got > limit => Err(WireError::TooLarge { field, unit: "bytes", limit, got }),
        _ => Ok(()),
    }
}

/// The namespace and layout that a registration describes.
pub fn namespace_of(request: &v1::RegisterNamespaceRequest) -> Result<(Namespace, KvLayout), WireError> {
    let (limit, got) = (MAX_LAYOUT_JSON_BYTES, request.layout_json.len());
    if got > limit {
        return Err(WireError::TooLarge { field: "layout_json", unit: "bytes", limit, got });
    }
    if request.adapter.len() > 256 {
        return Err(WireError::TooLarge {
            field: "adapter",
            unit: "bytes",
            limit: 256,
            got: request.adapter.len(),
        });
    }
    let layout = KvLayout::from_json(&request.layout_json)?;
    let namespace = Namespace {
        weights: digest("weights_fingerprint", &request.weights_fingerprint)?,
        tokenizer: digest("tokenizer_digest", &request.tokenizer_digest)?,
        layout: layout.id(),
        adapter: request.adapter.clone(),
    };
    Ok((namespace, layout))
}

fn digest(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| WireError::Length { field, expected: 32, got: bytes.len() })
}
