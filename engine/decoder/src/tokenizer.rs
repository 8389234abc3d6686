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
        // The crate panics at some of what is no JSON, and at a few fields that are not what they should be.
        serde_json::from_slice::<serde_json::Value>(bytes).map_err(|broken| error(broken.into()))?;
        let read = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
        let mut inner =
            read.unwrap_or_else(|_| Err("crate tokenizers gave up on it".into())).map_err(error)?;
        // Left over from training in many published files: a prompt is neither cut nor filled up.
        inner.with_truncation(None).map_err(error)?;
        inner.with_padding(None);
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
        TextStream { tokenizer: self, tokens: Vec::new(), context: 0, shown: 0 }
    }
}

/// Tokens that may wait for the rest of a character, which has at most four bytes, before they are shown as they are.
const MAX_PENDING: usize = 8;

/// Decodes tokens one at a time and yields text once it is complete: a character whose bytes are spread over several
/// tokens comes out with the last of them.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the piece yielded last, because how a token reads may depend on its neighbour, then those not
    /// yet yielded.
    tokens: Vec<TokenId>,
    /// How many of `tokens` have been yielded, and the bytes of text that they read as.
    context: usize,
    shown: usize,
}

impl TextStream<'_> {
    /// Adds a token; gives the text that it completes, possibly none.
    pub fn push(&mut self, token: TokenId) -> Result<String> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        let waiting = self.tokens.len() - self.context <= MAX_PENDING;
        if text.len() <= self.shown || text.ends_with(char::REPLACEMENT_CHARACTER) && waiting {
            return Ok(String::new());
        }
        let piece = text.get(self.shown..).unwrap_or_default().to_owned();
        self.tokens.drain(..self.context);
        self.context = self.tokens.len();
        self.shown = self.tokenizer.decode(&self.tokens)?.len();
        Ok(piece)
    }

    /// What is left at the end; an incomplete character reads as a replacement character.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(text.get(self.shown..).unwrap_or_default().to_owned())
    }
}

fn error(error: tokenizers::Error) -> DecoderError {
    DecoderError::Tokenizer(error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn byte_level() -> Tokenizer {
        Tokenizer::from_bytes(byte_level_file().to_string().as_bytes()).unwrap()
    }

    /// A byte-level tokenizer without merges, one token per byte, and one special token.
    fn byte_level_file() -> serde_json::Value {
        // Bytes that do not print are spelled as characters from 256 on, as in GPT-2.
        let mut vocab = serde_json::Map::new();
        let mut unprintable = 256..;
        for byte in 0..=255_u32 {
            let prints = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
            let spelled = if prints { byte } else { unprintable.next().unwrap() };
            vocab.insert(char::from_u32(spelled).unwrap().into(), byte.into());
        }
        let special = json!({
            "id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        });
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        })
    }

    #[test]
    fn a_prompt_is_neither_cut_nor_filled_up_whatever_the_file_says() {
        let mut file = byte_level_file();
        file["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({
            "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "!",
        });
        let tokenizer = Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.encode("five5").unwrap().len(), 5);
    }

    #[test]
    fn text_makes_the_round_trip_and_special_tokens_stand_apart() {
        let tokenizer = byte_level();
        let tokens = tokenizer.encode("Grüße<|end|>").unwrap();
        assert_eq!(tokens.len(), 8);
        assert_eq!(tokens.last(), tokenizer.token_id("<|end|>").as_ref());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), "Grüße");
        assert_ne!(tokenizer.digest(), [0; 32]);
    }

    #[test]
    fn a_stream_yields_whole_characters() {
        let tokenizer = byte_level();
        let text = "a – Grüße, 日本 🦀!";
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> =
            tokenizer.encode(text).unwrap().into_iter().map(|token| stream.push(token).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| piece.chars().count() <= 1));
        assert_eq!(stream.finish().unwrap(), "");
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_in_the_end() {
        let tokenizer = byte_level();
        let mut stream = tokenizer.stream();
        assert_eq!(stream.push(TokenId(0xE6)).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
        let mut stream = tokenizer.stream();
        let shown: String = (0..20).map(|_| stream.push(TokenId(0x80)).unwrap()).collect();
        assert!(!shown.is_empty());
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_refused() {
        let mut precompiled = byte_level_file();
        precompiled["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": 5});
        let mut unended = byte_level_file().to_string();
        unended.truncate(unended.find("use_regex").unwrap());
        for bytes in ["{}".to_owned(), precompiled.to_string(), unended] {
            assert!(matches!(
                Tokenizer::from_bytes(bytes.as_bytes()).map(drop),
                Err(DecoderError::Tokenizer(_))
            ));
        }
    }
}
