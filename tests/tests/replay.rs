//! Promise: `esker bench replay` says what a trace would find, and what is wrong with one that it cannot read.

use anyhow::{Context, Result};
use esker_tests::{output, scratch, text_of};
use serde_json::Value;

const TRACE: &str = r#"{"timestamp": 0, "input_length": 25, "hash_ids": [1, 2, 3], "block_tokens": 10}
{"timestamp": 1000, "input_length": 20, "hash_ids": [1, 2], "block_tokens": 10}
"#;

#[test]
fn a_trace_is_replayed() -> Result<()> {
    let folder = scratch();
    let trace = folder.path().join("trace.jsonl");
    std::fs::write(&trace, TRACE)?;
    let trace = trace.to_string_lossy().into_owned();
    let done = output(["bench", "replay", &trace, "--policy", "esker,infinite", "--share", "100", "--json"]);
    assert!(done.status.success(), "{}", text_of(&done.stderr));
    let lines = text_of(&done.stdout);
    let runs: Vec<Value> =
        lines.lines().map(serde_json::from_str).collect::<Result<_, _>>().context(lines.clone())?;
    assert_eq!(runs.len(), 2, "{lines}");
    for run in runs {
        assert_eq!((run["hit_tokens"].as_u64(), run["input_tokens"].as_u64()), (Some(20), Some(45)), "{run}");
        assert_eq!(run["written_blocks"].as_u64(), Some(3), "{run}");
    }
    let table = output(["bench", "replay", &trace]);
    let table = text_of(&table.stdout);
    for name in ["esker", "lru-leaf", "lru", "fifo", "s3-fifo", "clairvoyant", "infinite", "44.44"] {
        assert!(table.contains(name), "{name} in {table}");
    }
    Ok(())
}

#[test]
fn what_is_no_trace_is_refused_with_the_line_and_the_reason() -> Result<()> {
    let folder = scratch();
    let trace = folder.path().join("trace.jsonl");
    std::fs::write(&trace, format!("{TRACE}{{\"timestamp\": 2000}}\n"))?;
    let done = output(["bench", "replay", &trace.to_string_lossy()]);
    assert!(!done.status.success());
    let said = text_of(&done.stderr);
    assert!(said.contains("line 3") && said.contains("input_length"), "{said}");
    Ok(())
}
