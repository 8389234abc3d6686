//! What is read from a model's folder, for fuzzers: bytes in, and whether they were accepted. A model comes from anywhere; a
//! file that ends the process is worse than one that is refused.
//!
//! The fuzz targets take this file as theirs, so it uses nothing but what the crate gives to everybody.

// The targets use one function each.
#![allow(dead_code, unreachable_pub)]

use esker_decoder::{KvFormat, Logits, ModelBuilder, Sequence, Tokenizer};
use esker_prefix::TokenId;

/// Parameters from which on an accepted model is not run: a fuzzer is to find errors, not time.
const MAX_PARAMETERS: usize = 1 << 16;

/// `config.json`.
pub fn config(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| ModelBuilder::new(text, KvFormat::F32, 16).is_ok())
}

/// A configuration and the safetensors file that goes with it: the length of the first (u32, little-endian), then both.
pub fn checkpoint(bytes: &[u8]) -> bool {
    let Some((length, rest)) = bytes.split_first_chunk() else { return false };
    let Some((config, shard)) = rest.split_at_checked(u32::from_le_bytes(*length) as usize) else {
        return false;
    };
    let Ok(config) = std::str::from_utf8(config) else { return false };
    let Ok(mut builder) = ModelBuilder::new(config, KvFormat::F32, 16) else { return false };
    builder.draft_if_present();
    if builder.shard("model.safetensors", shard.to_vec()).is_err() {
        return false;
    }
    let Ok(model) = builder.finish() else { return false };
    if model.parameters() <= MAX_PARAMETERS {
        let tokens: Vec<TokenId> = (0..20).map(|at| TokenId(at % 5)).collect();
        // Numbers that overflow on the way are an error too.
        let _ = Sequence::new(&model).prefill(&model, &tokens, Logits::Last);
    }
    true
}

/// `tokenizer.json`; what it makes of a text is turned back.
pub fn tokenizer(bytes: &[u8]) -> bool {
    // Where crate tokenizers panics that is caught, but a fuzzer ends with the panic.
    if bytes.windows(11).any(|word| word == b"Precompiled") {
        return false;
    }
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes) else { return false };
    if let Ok(tokens) = tokenizer.encode("A round trip: Grüße, 日本 🦀 <|end|>\n\t 12,345.") {
        let _ = tokenizer.decode(&tokens);
        let mut stream = tokenizer.stream();
        let _ = tokens.iter().try_for_each(|&token| stream.push(token).map(drop));
    }
    true
}
