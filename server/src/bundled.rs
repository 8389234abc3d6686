//! The bundled model: part of the binary, so that `esker` needs no other file.

use std::path::Path;

use anyhow::Context;
use esker_decoder::{KvFormat, ModelBuilder, Tokenizer};

use crate::chat_template::ChatTemplate;
use crate::model_folder::LoadedModel;

macro_rules! model_file {
    ($name:literal) => {
        concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/decoder/model/", $name)
    };
}

/// What the bundled model is called.
pub const NAME: &str = "esker-kjv-austen-8m";
/// The demo's document: text that the model was not trained on.
pub const DEMO_DOCUMENT: &str = include_str!(model_file!("demo/document.txt"));
/// The demo's two questions, one per line.
pub const DEMO_QUESTIONS: &str = include_str!(model_file!("demo/questions.txt"));

const CONFIG: &str = include_str!(model_file!("config.json"));
const WEIGHTS: &[u8] = include_bytes!(model_file!("model.safetensors"));
const TOKENIZER: &[u8] = include_bytes!(model_file!("tokenizer.json"));
const TOKENIZER_CONFIG: &str = include_str!(model_file!("tokenizer_config.json"));

/// Loads it.
pub fn load(format: KvFormat, block_tokens: u32) -> anyhow::Result<LoadedModel> {
    load_as(CONFIG, format, block_tokens)
}

/// Loads it with positions for `tokens` tokens, beyond what it was made for: to be measured, not to be read.
pub(crate) fn load_for(format: KvFormat, block_tokens: u32, tokens: usize) -> anyhow::Result<LoadedModel> {
    load_as(&config_for(tokens)?, format, block_tokens)
}

fn config_for(tokens: usize) -> anyhow::Result<String> {
    let mut config: serde_json::Value = serde_json::from_str(CONFIG).context("bundled config.json")?;
    config["max_position_embeddings"] = tokens.into();
    Ok(config.to_string())
}

/// Writes its files into a folder, with positions for `tokens` tokens.
pub(crate) fn write_to(dir: &Path, tokens: usize) -> anyhow::Result<()> {
    let config = config_for(tokens)?;
    for (name, bytes) in [
        ("config.json", config.as_bytes()),
        ("model.safetensors", WEIGHTS),
        ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", TOKENIZER_CONFIG.as_bytes()),
    ] {
        let path = dir.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn load_as(config: &str, format: KvFormat, block_tokens: u32) -> anyhow::Result<LoadedModel> {
    let mut builder = ModelBuilder::new(config, format, block_tokens).context("bundled config.json")?;
    builder.shard("model.safetensors", WEIGHTS).context("bundled model.safetensors")?;
    builder.draft_if_present();
    let tokenizer = Tokenizer::from_bytes(TOKENIZER).context("bundled tokenizer.json")?;
    let template = ChatTemplate::new(TOKENIZER_CONFIG, None).context("bundled tokenizer_config.json")?;
    let model = builder.finish().context("bundled weights")?;
    Ok(LoadedModel { name: NAME.to_owned(), model, tokenizer, template })
}
