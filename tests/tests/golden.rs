//! Promise: the decoder reproduces the reference's logits; and the check that says so would notice if it did not.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use esker_tests::{change, copy_folder, output, scratch, text_of};
use serde_json::Value;

/// The golden vectors, where they are.
fn golden() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let folder = std::env::var_os("ESKER_GOLDEN").map_or(beside, PathBuf::from);
    if !folder.join("v32-small/golden.safetensors").exists() {
        println!("SKIPPED: no golden vectors in {}; set ESKER_GOLDEN", folder.display());
        return None;
    }
    Some(folder)
}

/// Runs `esker golden`: whether it passed, and its report.
fn check(folder: &Path) -> Result<(bool, Value)> {
    let done = output([std::ffi::OsStr::new("golden"), folder.as_os_str()]);
    let report = serde_json::from_slice(&done.stdout).with_context(|| text_of(&done.stderr))?;
    Ok((done.status.success(), report))
}

#[test]
fn published_models_are_reproduced() -> Result<()> {
    let Some(golden) = golden() else { return Ok(()) };
    for name in ["v32-small", "glm5-small", "glm52-small", "v4-small", "v4-real-ratios"] {
        let (passed, report) = check(&golden.join(name))?;
        assert!(passed, "{report}");
        assert_eq!(report["name"], name);
        assert!(report["max_abs_dlogit"].as_f64().is_some_and(|difference| difference <= 1e-4), "{report}");
        assert_eq!(report["restored_equals_uninterrupted"], true);
        assert_eq!(report["topk_sets_equal"], true);
    }
    Ok(())
}

#[test]
fn one_changed_number_is_noticed() -> Result<()> {
    let Some(golden) = golden() else { return Ok(()) };
    let folder = scratch();
    for (file, tensor) in [("golden.safetensors", "logits"), ("model.safetensors", "model.norm.weight")] {
        let copy = folder.path().join(file);
        copy_folder(&golden.join("v32-small"), &copy)?;
        // The highest byte but one of some number in the middle: its exponent.
        let (start, end) = extent(&copy.join(file), tensor)?;
        change(&copy.join(file), start.midpoint(end) / 4 * 4 + 2, |byte| byte ^ 0x80)?;
        let (passed, report) = check(&copy)?;
        assert!(!passed, "{tensor} was changed: {report}");
        assert!(report["max_abs_dlogit"].as_f64() > Some(1e-4), "{report}");
    }
    Ok(())
}

#[test]
fn a_folder_that_is_none_is_named() -> Result<()> {
    let folder = scratch();
    for (path, reason) in [("absent", "is not a folder"), (".", "config.json")] {
        let done = output([std::ffi::OsStr::new("golden"), folder.path().join(path).as_os_str()]);
        let text = text_of(&done.stderr);
        assert!(!done.status.success() && text.contains(reason), "{text}");
    }
    Ok(())
}

/// Where a tensor of four-byte numbers lies in a safetensors file.
fn extent(file: &Path, tensor: &str) -> Result<(u64, u64)> {
    let bytes = std::fs::read(file)?;
    let length = u64::from_le_bytes(*bytes.first_chunk().context("a safetensors file")?);
    let header: Value = serde_json::from_slice(&bytes[8..8 + usize::try_from(length)?])?;
    let offsets = &header[tensor]["data_offsets"];
    let offset = |index: usize| offsets[index].as_u64().with_context(|| format!("no {tensor} in {header}"));
    // Offsets count from the end of the header; a number starts where they are multiples of four.
    let (start, end) = (offset(0)? + 8 + length, offset(1)? + 8 + length);
    Ok((start, end))
}
