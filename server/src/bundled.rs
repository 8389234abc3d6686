//! The bundled model: part of the binary, so that `esker` needs no other file.

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
pub const NAME: &str = "esker-kjv-austen-7m";
/// The demo's document: text that the model was not trained on.
pub const DEMO_DOCUMENT: &str = include_str!(model_file!("demo/document.txt"));
/// The demo's two questions, one per line.
pub const DEMO_QUESTIONS: &str = include_str!(model_file!("demo/questions.txt"));

/// Loads it.
pub fn load(format: KvFormat, block_tokens: u32) -> anyhow::Result<LoadedModel> {
    let config = include_str!(model_file!("config.json"));
    let mut builder = ModelBuilder::new(config, format, block_tokens).context("bundled config.json")?;
    let weights: &'static [u8] = include_bytes!(model_file!("model.safetensors"));
    builder.shard("model.safetensors", weights).context("bundled model.safetensors")?;
    let tokenizer = Tokenizer::from_bytes(include_bytes!(model_file!("tokenizer.json")))
        .context("bundled tokenizer.json")?;
    let template = ChatTemplate::new(include_str!(model_file!("tokenizer_config.json")), None)
        .context("bundled tokenizer_config.json")?;
    let model = builder.finish().context("bundled weights")?;
    Ok(LoadedModel { name: NAME.to_owned(), model, tokenizer, template })
}
