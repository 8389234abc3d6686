//! One line of a trace.

use serde_json::Value;

/// Tokens of a block where the line does not say: Mooncake's `hash_ids` name 512, run-length coded ids 64.
const HASH_IDS_BLOCK_TOKENS: u32 = 512;
const RUNS_BLOCK_TOKENS: u32 = 64;

/// A request as its line says it.
pub(super) struct Line {
    pub(super) timestamp_ms: u64,
    pub(super) input_tokens: u32,
    pub(super) block_tokens: u32,
    /// Consecutive ids: the first, and how many.
    runs: Vec<(u64, u64)>,
}

impl Line {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
        let number = |name: &str| value.get(name).and_then(Value::as_u64);
        let need = |name: &str| number(name).ok_or_else(|| format!("no number {name:?}"));
        let timestamp_ms = match value.get("timestamp") {
            // Some traces give milliseconds with a fraction.
            Some(Value::Number(time)) => time.as_u64().or_else(|| time.as_f64().and_then(whole)),
            _ => None,
        };
        let timestamp_ms = timestamp_ms.ok_or("no time \"timestamp\" of at least 0 ms")?;
        let tokens = |tokens: u64| u32::try_from(tokens).map_err(|_| format!("{tokens} tokens are too many"));
        let input_tokens = tokens(need("input_length")?)?;
        let (runs, default) = match (value.get("hash_ids"), value.get("runs")) {
            (Some(Value::Array(ids)), _) => {
                (ids.iter().map(id).collect::<Result<_, _>>()?, HASH_IDS_BLOCK_TOKENS)
            }
            (None, Some(Value::Array(runs))) => {
                (runs.iter().map(run).collect::<Result<_, _>>()?, RUNS_BLOCK_TOKENS)
            }
            _ => return Err("no array \"hash_ids\" or \"runs\"".to_owned()),
        };
        let block_tokens = tokens(number("block_tokens").unwrap_or(u64::from(default)))?;
        if block_tokens == 0 {
            return Err("blocks of 0 tokens".to_owned());
        }
        Ok(Self { timestamp_ms, input_tokens, block_tokens, runs })
    }

    /// The ids of the blocks, from the first to the last.
    pub(super) fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().flat_map(|&(first, count)| (0..count).map(move |i| first.wrapping_add(i)))
    }
}

fn id(value: &Value) -> Result<(u64, u64), String> {
    // Ids may be signed or unsigned; only equality counts.
    let id = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    id.map(|id| (id, 1)).ok_or_else(|| format!("{value} is not an id"))
}

fn run(value: &Value) -> Result<(u64, u64), String> {
    match value.as_array().map(Vec::as_slice) {
        Some([first, count]) => match (first.as_u64(), count.as_u64()) {
            (Some(first), Some(count)) => Ok((first, count)),
            _ => Err(format!("{value} is not [first id, count]")),
        },
        _ => Err(format!("{value} is not [first id, count]")),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
fn whole(ms: f64) -> Option<u64> {
    (0.0..9.0e15).contains(&ms).then_some(ms as u64)
}
