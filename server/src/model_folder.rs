//! Model folders: the files of a published checkpoint, read and handed to the decoder as bytes.

use std::path::Path;

use anyhow::{Context, bail};
use bytes::Bytes;
use esker_decoder::{KvFormat, Model, ModelBuilder, Tokenizer};

use crate::chat_template::ChatTemplate;

/// A model, its tokenizer and what to call it.
pub struct LoadedModel {
    /// Name: the folder's.
    pub name: String,
    /// The weights.
    pub model: Model,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub(crate) template: ChatTemplate,
}

/// Loads `config.json`, every `*.safetensors`, `tokenizer.json` and, where present, `generation_config.json`,
/// `tokenizer_config.json` and `chat_template.jinja`.
pub fn load_model(dir: &Path, format: KvFormat, block_tokens: u32) -> anyhow::Result<LoadedModel> {
    let name = dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    let unusable = || format!("cannot use the model folder {}", dir.display());
    let mut builder = ModelBuilder::new(&read_text(&dir.join("config.json"))?, format, block_tokens)
        .with_context(unusable)?;
    let generation = dir.join("generation_config.json");
    if generation.exists() {
        builder.generation_config(&read_text(&generation)?).with_context(unusable)?;
    }
    for (name, bytes) in read_shards(dir)? {
        builder.shard(&name, bytes).with_context(unusable)?;
    }
    builder.draft_if_present();
    let model = builder.finish().with_context(unusable)?;
    let tokenizer = Tokenizer::from_bytes(&read(&dir.join("tokenizer.json"))?).with_context(unusable)?;
    let template = chat_template(dir).with_context(unusable)?;
    Ok(LoadedModel { name, model, tokenizer, template })
}

fn chat_template(dir: &Path) -> anyhow::Result<ChatTemplate> {
    let text =
        |name| Some(dir.join(name)).filter(|path| path.exists()).map(|path| read_text(&path)).transpose();
    ChatTemplate::new(text("tokenizer_config.json")?.as_deref().unwrap_or("{}"), text("chat_template.jinja")?)
}

/// The weight files of a folder, in one order whatever the file system says.
pub(crate) fn read_shards(dir: &Path) -> anyhow::Result<Vec<(String, Bytes)>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let name = entry.with_context(|| format!("cannot list {}", dir.display()))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if name.ends_with(".safetensors") && name != "golden.safetensors" {
            names.push(name);
        }
    }
    names.sort();
    if names.is_empty() {
        bail!(
            "{} has no *.safetensors file: it is not a model folder, or a download is incomplete",
            dir.display()
        );
    }
    names.into_iter().map(|name| read(&dir.join(&name)).map(|bytes| (name, bytes.into()))).collect()
}

pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(read(path)?).ok().with_context(|| format!("{} is not UTF-8 text", path.display()))
}

pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
