//! Tokens.

/// One token of a model's vocabulary. Little-endian `u32` wherever it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct TokenId(pub u32);

impl From<u32> for TokenId {
    fn from(id: u32) -> Self {
        Self(id)
    }
}
