//! Text to tokens and back, through crate `tokenizers`.

use esker_prefix::TokenId;

use crate::{DecoderError, Result};

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    digest: [u8; 32],
}

impl Tokenizer {
    /// Reads the bytes of `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(error)?;
        Ok(Self { inner, digest: *blake3::hash(bytes).as_bytes() })
    }

    /// BLAKE3 of the file: two tokenizers with one digest give the same tokens.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Tokens of `text`. Special tokens are recognised where the text spells them; none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        let encoding = self.inner.encode(text, false).map_err(error)?;
        Ok(encoding.get_ids().iter().map(|&id| TokenId(id)).collect())
    }

    /// Text of `tokens`, without special tokens.
    pub fn decode(&self, tokens: &[TokenId]) -> Result<String> {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        self.inner.decode(&ids, true).map_err(error)
    }

    /// The id of a token as the vocabulary spells it, such as `<|endoftext|>`.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token).map(TokenId)
    }

    /// Text that arrives token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, tokens: Vec::new(), shown: String::new() }
    }
}

/// Decodes tokens one at a time and yields text once it is complete: a character whose bytes are spread over several
/// tokens comes out with the last of them.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens since the last point where text was complete, preceded by those of the piece before it, because how
    /// a token reads may depend on its neighbour.
    tokens: Vec<TokenId>,
    /// Text of `tokens` that has been yielded.
    shown: String,
}

impl TextStream<'_> {
    /// Adds a token; gives the text that it completes, possibly none.
    pub fn push(&mut self, token: TokenId) -> Result<String> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let piece = text.strip_prefix(&self.shown).unwrap_or_default().to_owned();
        if piece.is_empty() {
            return Ok(piece);
        }
        // Keep the newest complete token as context and forget what came before.
        self.tokens.drain(..self.tokens.len() - 1);
        self.shown = self.tokenizer.decode(&self.tokens)?;
        if self.shown.ends_with(char::REPLACEMENT_CHARACTER) {
            // The token ends a character that began before it: alone it is no text. Start afresh.
            self.tokens.clear();
            self.shown.clear();
        }
        Ok(piece)
    }

    /// What is left at the end, incomplete characters as replacement characters.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(text.strip_prefix(&self.shown).unwrap_or_default().to_owned())
    }
}

fn error(error: tokenizers::Error) -> DecoderError {
    DecoderError::Tokenizer(error.to_string())
}
