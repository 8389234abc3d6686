//! The decoder reproduces the published reference: logits, selections, state, and an exact restore.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use esker_decoder::golden::{GoldenSettings, check};
use esker_decoder::{KvFormat, Logits, Model, Sequence};
use esker_prefix::TokenId;
use safetensors::Dtype;

/// The golden folders lie beside the workspace, or where `ESKER_GOLDEN` says; a checkout without them skips this file.
fn golden_folders() -> Vec<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    let root = std::env::var_os("ESKER_GOLDEN").map_or(beside, PathBuf::from);
    let Ok(entries) = fs::read_dir(&root) else {
        eprintln!("skipped: no golden vectors at {}", root.display());
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.join("golden.safetensors").is_file());
    folders.sort();
    assert!(!folders.is_empty(), "no golden vectors in {}", root.display());
    folders
}

fn check_all(settings: GoldenSettings) {
    for folder in golden_folders() {
        let name = folder.file_name().unwrap().to_string_lossy();
        let read = |file: &str| fs::read(folder.join(file)).unwrap();
        let config = String::from_utf8(read("config.json")).unwrap();
        let shards = vec![("model.safetensors".to_owned(), Bytes::from(read("model.safetensors")))];
        let report = check(&name, &config, shards, &read("golden.safetensors"), settings).unwrap();
        println!("{}", serde_json::to_string(&report).unwrap());
        assert!(report.passed(), "{report:?}");
    }
}

/// What a model says of itself, as a golden file: it must pass, whatever its length.
#[test]
fn a_golden_of_few_tokens_passes_down_to_one() {
    for config in [support::v32(), support::v4()] {
        let checkpoint = support::Checkpoint::random(config, 3);
        let model = checkpoint.load(KvFormat::F32, 16);
        for count in [1, 2, 3] {
            let tokens = support::Random(4).tokens(count, model.config().vocab_size);
            let golden = golden_of(&model, &tokens);
            let shards = vec![("model.safetensors".to_owned(), checkpoint.shard())];
            let settings = GoldenSettings::default();
            let report = check("few", &checkpoint.config_text(), shards, &golden, settings).unwrap();
            assert!(report.passed() && report.tokens == count, "{report:?}");
        }
    }
}

fn golden_of(model: &Model, tokens: &[TokenId]) -> Bytes {
    let mut sequence = Sequence::new(model);
    sequence.record_selections();
    let logits = sequence.prefill(model, tokens, Logits::All).unwrap();
    let (count, config) = (tokens.len(), model.config());
    let ids: Vec<u8> = tokens.iter().flat_map(|token| i64::from(token.0).to_le_bytes()).collect();
    let values: Vec<u8> = logits.rows().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let mut parts = vec![
        ("input_ids".to_owned(), vec![count], Dtype::I64, ids),
        ("logits".to_owned(), vec![count, config.vocab_size], Dtype::F32, values),
    ];
    for layer in (0..config.num_hidden_layers).filter(|&layer| config.has_indexer[layer]) {
        let padded = sequence.selections(layer).iter().flat_map(|rows| {
            let rows = rows.iter().map(|&row| i32::try_from(row).unwrap());
            rows.chain(std::iter::repeat(-1)).take(config.index_topk).collect::<Vec<i32>>()
        });
        let bytes: Vec<u8> = padded.flat_map(i32::to_le_bytes).collect();
        parts.push((format!("topk.{layer}"), vec![count, config.index_topk], Dtype::I32, bytes));
    }
    let parts: Vec<_> = parts
        .iter()
        .map(|(name, shape, dtype, bytes)| (&name[..], &shape[..], *dtype, bytes.clone()))
        .collect();
    support::serialise(&parts)
}

#[test]
fn in_one_call() {
    check_all(GoldenSettings::default());
}

#[test]
fn token_by_token_with_large_blocks() {
    check_all(GoldenSettings { block_tokens: 128, schedule: &[1] });
}

#[test]
fn in_odd_chunks_with_small_blocks() {
    check_all(GoldenSettings { block_tokens: 8, schedule: &[7, 1, 19, 5, 133] });
}
