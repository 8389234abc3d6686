//! Promises of retention on traces: the recorded ones where they are present, made-up ones always.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use esker_benches::replay::synthetic::Traffic;
use esker_benches::replay::{Policy, RealOptions, Run, Trace, TraceError, replay, replay_all, replay_real};

/// Shares of the distinct blocks that the promises are made for, percent.
const SHARES_PERCENT: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Points of token hit ratio that the retention may lose against LRU leaf-first on a recorded trace.
const LOSS_MAX_POINTS: f64 = 0.5;

/// The same on a made-up one. 1 % of those is some hundred blocks, one or two prompts of an agent: luck weighs more.
const LOSS_MAX_MADE_UP_POINTS: f64 = 1.5;

const ESKER: Policy = Policy::Esker;

/// A recorded trace, where it is.
fn recorded(name: &str) -> Option<Trace> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/traces");
    let path = std::env::var_os("ESKER_TRACES").map_or(beside, PathBuf::from).join(name);
    if !path.exists() {
        println!("SKIPPED: no trace {}; set ESKER_TRACES", path.display());
        return None;
    }
    Some(Trace::read(&path, |_| ()).unwrap())
}

fn runs(trace: &Trace, policies: &[Policy]) -> Vec<Run> {
    let capacities: Vec<u32> = SHARES_PERCENT.iter().map(|share| trace.share_blocks(*share)).collect();
    replay_all(trace, policies, &capacities, || ())
}

fn of(runs: &[Run], policy: Policy) -> Vec<&Run> {
    runs.iter().filter(|run| run.policy == policy).collect()
}

/// Points of token hit ratio that `esker` gains on LRU leaf-first at each share, and its share of LRU's writes.
fn gains(runs: &[Run]) -> Vec<(f64, f64)> {
    let pairs = of(runs, ESKER).into_iter().zip(of(runs, Policy::LruLeaf));
    pairs
        .map(|(ours, lru)| {
            let points = (ours.hit_ratio() - lru.hit_ratio()) * 100.0;
            (points, ours.written_blocks as f64 / lru.written_blocks as f64)
        })
        .collect()
}

fn assert_close_to_lru_or_better(name: &str, runs: &[Run], loss_max_points: f64) {
    for ((points, writes), share) in gains(runs).into_iter().zip(SHARES_PERCENT) {
        println!("{name} at {share} %: {points:+.2} points, {writes:.2} of the writes");
        assert!(
            points >= -loss_max_points,
            "{name} at {share} %: {points:+.2} points against LRU leaf-first"
        );
    }
}

/// No policy finds more than the bound, but for what last blocks that are not full weigh.
fn assert_bounded(name: &str, runs: &[Run]) {
    for bound in of(runs, Policy::Clairvoyant) {
        let alike = runs.iter().filter(|run| run.capacity_blocks == bound.capacity_blocks);
        for run in alike {
            let over = run.hit_ratio() - bound.hit_ratio();
            assert!(over < 1e-4, "{name}: {run:?} finds more than {bound:?}");
        }
    }
}

#[test]
fn the_conversation_trace() {
    let Some(trace) = recorded("mooncake_conversation.jsonl.zst") else { return };
    assert_eq!((trace.requests.len(), trace.blocks()), (12_031, 182_790));
    let runs = runs(&trace, &Policy::ALL);
    assert_eq!(format!("{:.4}", of(&runs, Policy::Infinite)[0].hit_ratio()), "0.3736");
    assert_close_to_lru_or_better("conversation", &runs, LOSS_MAX_POINTS);
    assert_bounded("conversation", &runs);
    let gains = gains(&runs);
    assert!(gains[0].0 > 2.0 && gains[1].0 > 2.0, "more hits where room is scarce: {gains:?}");
    assert!(gains[0].1 < 0.7 && gains[1].1 < 0.7, "and fewer writes: {gains:?}");
}

#[test]
fn the_agents_trace() {
    let Some(trace) = recorded("agentic_claudecode_A.jsonl.zst") else { return };
    assert_eq!((trace.requests.len(), trace.blocks()), (14_475, 1_031_580));
    let runs = runs(&trace, &[ESKER, Policy::LruLeaf, Policy::Clairvoyant, Policy::Infinite]);
    assert_eq!(format!("{:.4}", of(&runs, Policy::Infinite)[0].hit_ratio()), "0.9611");
    assert_close_to_lru_or_better("agents", &runs, LOSS_MAX_POINTS);
    assert_bounded("agents", &runs);
}

#[test]
fn made_up_traffic_of_every_kind() {
    let seed: u64 = 0x0e5c_3e41;
    println!("seed {seed:#x}");
    for traffic in Traffic::ALL {
        let trace = traffic.trace(seed);
        let runs = runs(&trace, &Policy::ALL);
        let name = format!("{traffic:?}");
        assert_close_to_lru_or_better(&name, &runs, LOSS_MAX_MADE_UP_POINTS);
        assert_bounded(&name, &runs);
        let gains = gains(&runs);
        match traffic {
            // Where a part of a loop fits, that part is found; LRU finds nothing.
            Traffic::Loop => assert!(gains[4].0 > 15.0, "{gains:?}"),
            // What is read once neither displaces what is read again, nor wears the drive.
            Traffic::Scan | Traffic::Documents => {
                assert!(gains[0].0 > 5.0 && gains[0].1 < 0.6, "{name}: {gains:?}");
            }
            _ => {}
        }
    }
}

/// A trace small enough to work out by hand: blocks of 10 tokens, room for two.
#[test]
fn a_run_is_what_it_is_by_hand() {
    let lines = [
        r#"{"timestamp": 0, "input_length": 25, "output_length": 1, "hash_ids": [1, 2, 3], "block_tokens": 10}"#,
        r#"{"timestamp": 1000, "input_length": 20, "output_length": 1, "hash_ids": [1, 2], "block_tokens": 10}"#,
        r#"{"timestamp": 2000, "input_length": 20, "output_length": 1, "hash_ids": [7, 2], "block_tokens": 10}"#,
    ];
    let trace = read(&lines.join("\n")).unwrap();
    assert_eq!(trace.blocks(), 5, "id 2 behind 7 is another block than behind 1");
    let hits = |policy, room| {
        let runs = replay_all(&trace, &[policy], &[room], || ());
        (runs[0].hit_tokens, runs[0].written_blocks, runs[0].evicted_blocks)
    };
    assert_eq!(hits(Policy::Infinite, 1), (20, 5, 0));
    // The third block waits for room that its own prefix holds; the second prompt finds both its blocks.
    assert_eq!(hits(Policy::LruLeaf, 2), (20, 4, 2));
    // Blind to the tree, block 1 goes for block 3, and the second prompt finds nothing at its start.
    assert_eq!(hits(Policy::Fifo, 2).0, 0);
    assert_eq!(hits(Policy::Clairvoyant, 2), (20, 2, 0));
}

#[test]
fn a_line_that_is_no_request_is_named_with_the_reason() {
    let good = r#"{"timestamp": 5000, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}"#;
    for (line, reason) in [
        ("nonsense", "not JSON"),
        (r#"{"timestamp": 6000, "hash_ids": [1]}"#, "input_length"),
        (r#"{"timestamp": 6000, "input_length": 9}"#, "hash_ids"),
        (r#"{"input_length": 9, "hash_ids": [1]}"#, "timestamp"),
        (r#"{"timestamp": 6000, "input_length": 512, "hash_ids": [1, 2]}"#, "more blocks"),
        (r#"{"timestamp": 10, "input_length": 512, "hash_ids": [1]}"#, "earlier"),
        (r#"{"timestamp": 6000, "input_length": 64, "runs": [[1, 1]]}"#, "another size"),
        (r#"{"timestamp": 6000, "input_length": 640, "runs": [[1]], "block_tokens": 512}"#, "first id"),
        (
            r#"{"timestamp": 6000, "input_length": 640, "runs": [[1, 9999999999]], "block_tokens": 512}"#,
            "more blocks",
        ),
    ] {
        match read(&format!("{good}\n\n{line}\n")).unwrap_err() {
            TraceError::Line { line: 3, reason: found, .. } => {
                assert!(found.contains(reason), "{line}: {found}");
            }
            other => panic!("{line}: {other}"),
        }
    }
    assert!(matches!(read("\n").unwrap_err(), TraceError::Empty(_)));
    assert!(matches!(Trace::read(Path::new("/nowhere"), |_| ()).unwrap_err(), TraceError::Io(..)));
}

#[test]
fn compressed_or_not_a_trace_is_the_same() {
    let line = r#"{"timestamp": 5000, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}"#;
    let mut compressed = tempfile::NamedTempFile::new().unwrap();
    compressed.write_all(&zstd::encode_all(line.as_bytes(), 1).unwrap()).unwrap();
    let compressed = Trace::read(compressed.path(), |_| ()).unwrap();
    let plain = read(line).unwrap();
    assert_eq!(format!("{compressed:?}"), format!("{plain:?}"));
}

fn read(text: &str) -> Result<Trace, TraceError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    Trace::read(file.path(), |_| ())
}

/// Against a store on a drive: the same prefixes are found as without one, what is found has the bytes that were put, and
/// what is full evicts and what is old expires without writing more than was accepted.
#[test]
fn a_real_store_finds_what_the_index_only_replay_finds_and_writes_little_more_than_it_accepts() {
    let trace = Traffic::Chats.trace(7).first(1500);
    let bytes_per_token = 1024;
    let run = |capacity_bytes: u64, ttl_s: u64| {
        let ttl = Duration::from_secs(ttl_s);
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let options = RealOptions { dir, capacity_bytes, bytes_per_token, ttl };
        let run = replay_real(&trace, &options, || ()).unwrap();
        let written = run.write_amplification();
        assert!((1.0..1.15).contains(&written), "{written} bytes written for each that was accepted");
        assert!(run.read_blocks > 0);
        run
    };
    let full = run(96 << 20, 1 << 30);
    assert!(full.stats.evicted > 0 && full.stats.expired == 0, "{:?}", full.stats);
    // Room is counted in segments there and in blocks here, so the two are near each other and not equal.
    let blocks = u32::try_from((96 << 20) / (64 * u64::from(bytes_per_token))).unwrap();
    let alike = replay(&trace, Policy::Esker, blocks, || ());
    let apart = full.hit_ratio() - alike.hit_ratio();
    assert!(apart.abs() < 0.06, "{} against {}", full.hit_ratio(), alike.hit_ratio());

    let short = run(96 << 20, 60);
    assert!(short.stats.evicted > 0 && short.stats.expired > 0, "{:?}", short.stats);
    assert!(short.hit_ratio() < full.hit_ratio(), "what has expired is not found");
}
