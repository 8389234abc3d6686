//! Promise: `esker demo` shows the whole idea in one run and says the truth about it in its last line.

use anyhow::{Context, Result};
use esker_tests::{output, scratch, text_of};
use serde_json::Value;

#[test]
fn the_demo_ends_with_its_figures() -> Result<()> {
    let folder = scratch();
    let done = output([std::ffi::OsStr::new("demo"), "--data".as_ref(), folder.path().as_os_str()]);
    assert!(done.status.success(), "{}", text_of(&done.stderr));
    let text = text_of(&done.stdout);
    let figures: Value = serde_json::from_str(text.lines().last().context("no output")?)?;
    let number = |key: &str| figures[key].as_f64().with_context(|| format!("{key} in {figures}"));
    for key in ["cold_ttft_ms", "warm_ttft_ms", "speedup", "bytes_read", "store_bytes"] {
        assert!(number(key)? > 0.0, "{key} in {figures}");
    }
    assert_eq!(figures["identical"], true, "{figures}");
    assert!(number("hit_tokens")? >= 8000.0, "{figures}");
    assert!(number("prompt_tokens")? > number("hit_tokens")?, "{figures}");
    assert!(figures["model"].as_str().is_some_and(|model| !model.is_empty()), "{figures}");
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 0, "the demo leaves nothing behind");
    Ok(())
}
