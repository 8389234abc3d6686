//! What fuzz targets call, with the feature `fuzzing`, and what this crate's own test changes by chance: traces of requests.

/// A trace, as JSON lines, compressed or not.
pub fn replay_trace(bytes: &[u8]) -> bool {
    crate::replay::hear(bytes)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::replay_trace;

    const MUTATIONS: usize = 20_000;
    const IDS: &str = "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 9, \"hash_ids\": [1, 2, -3]}\n\
        {\"timestamp\": 1500.5, \"input_length\": 1000, \"hash_ids\": [1, 2]}\n";
    const RUNS: &str = "{\"timestamp\": 7, \"input_length\": 400, \"runs\": [[0, 4], [9, 2]]}\n\n\
        {\"timestamp\": 7, \"input_length\": 64, \"runs\": []}\n";
    const SIZED: &str =
        "{\"timestamp\": 0, \"input_length\": 25, \"hash_ids\": [1, 2, 3], \"block_tokens\": 10}\n";

    /// `ESKER_WRITE_CORPUS=1` writes the corpus, `ESKER_SEED` repeats a run.
    #[test]
    fn a_trace_can_be_damaged_at_will() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/replay_trace");
        if std::env::var_os("ESKER_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            for (name, text) in [("ids", IDS), ("runs", RUNS), ("sized", SIZED)] {
                std::fs::write(folder.join(name), text).unwrap();
            }
            std::fs::write(folder.join("compressed"), zstd::encode_all(IDS.as_bytes(), 3).unwrap()).unwrap();
        }
        let seed = std::env::var("ESKER_SEED").ok().and_then(|seed| seed.parse().ok());
        let mut state: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5eed);
        println!("ESKER_SEED={state}");
        let mut below = |bound: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % bound.max(1)
        };
        let mut kept = Vec::new();
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            assert!(replay_trace(&bytes), "{} is refused", path.display());
            kept.push(bytes);
        }
        assert!(!kept.is_empty());
        let mut accepted = 0;
        for _ in 0..MUTATIONS {
            let mut bytes = kept[below(kept.len())].clone();
            for _ in 0..=below(3) {
                let at = below(bytes.len());
                match below(5) {
                    _ if bytes.is_empty() => bytes.push(0),
                    0 => bytes[at] ^= 1 << below(8),
                    1 => bytes[at] = [0, 0x80, 0xff, b'9', b'-', b'[', b'\n'][below(7)],
                    2 => bytes.truncate(at),
                    3 => bytes.extend_from_within(at..),
                    _ => drop(bytes.splice(at..at, *b"4294967295")),
                }
            }
            accepted += usize::from(replay_trace(&bytes));
        }
        assert!(accepted > 0 && accepted < MUTATIONS, "{accepted} of {MUTATIONS} were accepted");
    }
}
