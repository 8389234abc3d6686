//! From wire fields to checked values.

use esker_prefix::{KvLayout, Namespace, NamespaceId, TokenId};

use crate::limits::{MAX_LAYOUT_JSON_BYTES, MAX_PROMPT_TOKENS};
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
