//! The decoder reproduces the published reference: logits, selections, state, and an exact restore.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use esker_decoder::golden::{GoldenSettings, check};

/// The golden folders lie beside the workspace; a checkout without them skips this file.
fn golden_root() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    if !root.is_dir() {
        eprintln!("skipped: no golden vectors at {}", root.display());
        return None;
    }
    Some(root)
}

fn check_all(settings: GoldenSettings) {
    let Some(root) = golden_root() else { return };
    for name in ["v32-small", "glm5-small", "glm52-small", "v4-small", "v4-real-ratios"] {
        let read = |file: &str| fs::read(root.join(name).join(file)).unwrap();
        let config = String::from_utf8(read("config.json")).unwrap();
        let shards = vec![("model.safetensors".to_owned(), Bytes::from(read("model.safetensors")))];
        let report = check(name, &config, shards, &read("golden.safetensors"), settings).unwrap();
        println!("{}", serde_json::to_string(&report).unwrap());
        assert!(report.passed(), "{report:?}");
    }
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
