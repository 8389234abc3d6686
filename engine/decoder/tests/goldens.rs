//! The decoder reproduces the published reference: logits, selections, state, and an exact restore.

#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use esker_decoder::golden::{GoldenSettings, check};

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
