//! Golden vectors: does this decoder reproduce a reference's logits, selections and state?
//!
//! A golden folder holds `config.json`, `model.safetensors` and `golden.safetensors`; its tensors are `input_ids [T]`,
//! `logits [T, vocab]`, `topk.N [T, index_topk]` (ascending, padded with -1) and `state.P.N.FIELD`, a field of layer
//! N's state after P tokens. The caller reads the files.

use std::collections::BTreeSet;

use bytes::Bytes;
use esker_prefix::{BlockHash, BlockObject, NamespaceId, ScopeTag, TokenId};
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;

use crate::{
    BlockIdentity, DecoderError, KvFormat, Logits, LogitsOut, Model, ModelBuilder, Result, Sequence,
    StateField,
};

/// Bound on the logits' largest difference, for F32 arithmetic in any order of summation.
pub const LOGIT_TOLERANCE: f32 = 1e-4;
/// Bounds on the state's largest difference: up to 1000 tokens, and beyond, where the reference's F32 angles count.
pub const STATE_TOLERANCE: [f32; 2] = [1e-4, 2e-4];

/// Boundaries that a restored run starts from, evenly spread, if the sequence has more blocks.
const MAX_BOUNDARIES: usize = 8;

/// How to run a check.
#[derive(Clone, Copy, Debug)]
pub struct GoldenSettings {
    /// Tokens per block of the restored run, a power of two; halved until two blocks fit the golden sequence.
    pub block_tokens: u32,
    /// Lengths of the prefill calls of the uninterrupted run, repeated until all tokens are in; empty for one call.
    pub schedule: &'static [usize],
}

impl Default for GoldenSettings {
    fn default() -> Self {
        Self { block_tokens: 64, schedule: &[] }
    }
}

/// What a check found: one line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GoldenReport {
    /// Name of the golden folder.
    pub name: String,
    /// Tokens compared.
    pub tokens: usize,
    /// Largest difference of a logit.
    pub max_abs_dlogit: f32,
    /// Whether every indexer selected the reference's rows for every query.
    pub topk_sets_equal: bool,
    /// Largest difference of a state's element.
    pub state_max_abs_diff: f32,
    /// Whether runs whose state was taken out and put back at a block boundary gave the same bits from there on. So it is where
    /// there is no such boundary.
    pub restored_equals_uninterrupted: bool,
}

impl GoldenReport {
    /// Whether everything is within tolerance.
    pub fn passed(&self) -> bool {
        let state_tolerance = STATE_TOLERANCE[usize::from(self.tokens > 1000)];
        // NaN fails both comparisons.
        self.max_abs_dlogit <= LOGIT_TOLERANCE
            && self.state_max_abs_diff <= state_tolerance
            && self.topk_sets_equal
            && self.restored_equals_uninterrupted
    }
}

/// Runs the model of `config_json` and `shards` on the golden tokens and compares.
pub fn check(
    name: &str,
    config_json: &str,
    shards: Vec<(String, Bytes)>,
    golden: &[u8],
    settings: GoldenSettings,
) -> Result<GoldenReport> {
    let golden = Golden::parse(golden)?;
    let mut block_tokens = settings.block_tokens;
    while block_tokens > 1 && 2 * block_tokens as usize > golden.tokens.len() {
        block_tokens /= 2;
    }
    let mut builder = ModelBuilder::new(config_json, KvFormat::F32, block_tokens)?;
    for (shard, bytes) in shards {
        builder.shard(&shard, bytes)?;
    }
    let model = builder.finish()?;

    let mut sequence = Sequence::new(&model);
    sequence.record_selections();
    let (mut logits, mut state_max_abs_diff) = (Vec::new(), 0.0);
    for end in golden.states(&model)? {
        let rest = &golden.tokens[sequence.tokens()..end];
        logits.extend(run(&model, &mut sequence, rest, settings.schedule)?);
        state_max_abs_diff = larger(state_max_abs_diff, golden.compare_state(&model, &sequence)?);
    }
    let rest = &golden.tokens[sequence.tokens()..];
    logits.extend(run(&model, &mut sequence, rest, settings.schedule)?);
    Ok(GoldenReport {
        name: name.to_owned(),
        tokens: golden.tokens.len(),
        max_abs_dlogit: golden.compare_logits(&model, &logits)?,
        topk_sets_equal: golden.compare_selections(&model, &sequence)?,
        state_max_abs_diff,
        restored_equals_uninterrupted: restored_equals(&model, &sequence, &golden.tokens, &logits)?,
    })
}

/// Logits of every token, computed in calls of the scheduled lengths.
fn run(
    model: &Model,
    sequence: &mut Sequence,
    tokens: &[TokenId],
    schedule: &[usize],
) -> Result<Vec<LogitsOut>> {
    let mut rest = tokens;
    let mut lengths = schedule.iter().copied().filter(|&length| length > 0).cycle();
    let mut logits = Vec::new();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(lengths.next().unwrap_or(rest.len()).min(rest.len()));
        logits.push(sequence.prefill(model, now, Logits::All)?);
        rest = later;
    }
    Ok(logits)
}

/// Takes the state out at block boundaries, puts it into a fresh sequence, and continues: half of the runs in one
/// call, half token by token at first. A model with state groups is also continued from blocks alone, by a replay.
/// Compares every later logit bit for bit.
fn restored_equals(
    model: &Model,
    sequence: &Sequence,
    tokens: &[TokenId],
    logits: &[LogitsOut],
) -> Result<bool> {
    let block_tokens = model.layout().block_tokens() as usize;
    let count = tokens.len().saturating_sub(1) / block_tokens;
    let hash = |index: usize| BlockHash(*blake3::hash(&(index as u64).to_le_bytes()).as_bytes());
    let identity = |index: usize| BlockIdentity {
        namespace: NamespaceId(model.fingerprint()),
        scope: ScopeTag([0; 16]),
        parent: hash(index),
        hash: hash(index + 1),
    };
    let blocks: Vec<BlockObject> =
        (0..count).map(|index| sequence.block(model, index, identity(index))).collect::<Result<_>>()?;
    let expected: Vec<&[f32]> = logits.iter().flat_map(LogitsOut::rows).collect();
    // One token alone has no boundary with something behind it: nothing differs.
    let mut same = true;
    let mut whole = Sequence::new(model);
    for (round, boundary) in (1..=count).step_by(count.div_ceil(MAX_BOUNDARIES).max(1)).enumerate() {
        let start = boundary * block_tokens;
        let mut restored = Sequence::new(model);
        for block in &blocks[..boundary] {
            restored.restore(model, block)?;
        }
        let schedule: &[usize] = if round % 2 == 1 { &[] } else { &[1, 1, 3, 64] };
        let mut compare = |restored: &mut Sequence| -> Result<()> {
            let later = run(model, restored, &tokens[start..], schedule)?;
            let mut rows = later.iter().flat_map(LogitsOut::rows).zip(&expected[start..]);
            same &= rows.all(|(a, b)| a.iter().zip(*b).all(|(a, b)| a.to_bits() == b.to_bits()));
            Ok(())
        };
        if restored.needs_state() {
            restored.replay(model, &tokens[..start])?;
            compare(&mut restored)?;
            restored.truncate(start);
            whole.prefill(model, &tokens[whole.tokens()..start], Logits::None)?;
            restored.restore_state(model, &whole.state(model, boundary - 1, identity(boundary - 1))?)?;
        }
        compare(&mut restored)?;
    }
    Ok(same)
}

struct Golden<'a> {
    file: SafeTensors<'a>,
    tokens: Vec<TokenId>,
}

impl<'a> Golden<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let file =
            SafeTensors::deserialize(bytes).map_err(|error| DecoderError::Golden(error.to_string()))?;
        let mut golden = Self { file, tokens: Vec::new() };
        let ids: Vec<[u8; 8]> = golden.read("input_ids", Dtype::I64, None)?;
        let token = |bytes: [u8; 8]| {
            u32::try_from(i64::from_le_bytes(bytes)).map(TokenId).map_err(|error| {
                DecoderError::Golden(format!("input_ids holds a number that is no token: {error}"))
            })
        };
        golden.tokens = ids.into_iter().map(token).collect::<Result<_>>()?;
        if golden.tokens.is_empty() {
            return Err(DecoderError::Golden("input_ids is empty".into()));
        }
        Ok(golden)
    }

    fn compare_logits(&self, model: &Model, logits: &[LogitsOut]) -> Result<f32> {
        let expected = self.floats("logits", &[self.tokens.len(), model.config().vocab_size])?;
        Ok(max_difference(logits.iter().flat_map(LogitsOut::rows).flatten(), &expected))
    }

    fn compare_selections(&self, model: &Model, sequence: &Sequence) -> Result<bool> {
        let config = model.config();
        let mut equal = true;
        for layer in (0..config.num_hidden_layers).filter(|&layer| config.has_indexer[layer]) {
            let shape = [self.tokens.len(), config.index_topk];
            let rows: Vec<[u8; 4]> = self.read(&format!("topk.{layer}"), Dtype::I32, Some(&shape))?;
            let selections = sequence.selections(layer);
            equal &= selections.len() == self.tokens.len();
            for (expected, selected) in rows.chunks_exact(config.index_topk).zip(selections) {
                let mut expected: Vec<u32> =
                    expected.iter().filter_map(|&row| u32::try_from(i32::from_le_bytes(row)).ok()).collect();
                expected.sort_unstable();
                equal &= expected == *selected;
            }
        }
        Ok(equal)
    }

    /// The lengths after which the file has a state, ascending.
    fn states(&self, model: &Model) -> Result<BTreeSet<usize>> {
        let mut lengths = BTreeSet::new();
        for name in self.file.names().into_iter().filter(|name| name.starts_with("state.")) {
            let (tokens, layer, _) = parse_state(name)?;
            if tokens > self.tokens.len() || layer >= model.config().num_hidden_layers {
                return Err(unknown_state(name));
            }
            lengths.insert(tokens);
        }
        Ok(lengths)
    }

    /// Compares every field of the state after the sequence's tokens.
    fn compare_state(&self, model: &Model, sequence: &Sequence) -> Result<f32> {
        let mut worst = 0.0_f32;
        for name in self.file.names().into_iter().filter(|name| name.starts_with("state.")) {
            let (tokens, layer, field) = parse_state(name)?;
            if tokens != sequence.tokens() {
                continue;
            }
            let expected: Vec<[u8; 4]> = self.read(name, Dtype::F32, None)?;
            let expected: Vec<f32> = expected.into_iter().map(f32::from_le_bytes).collect();
            let got = sequence.state_rows(model, layer, field);
            let same_length = got.len() == expected.len();
            worst = larger(
                worst,
                if same_length { max_difference(got.iter(), &expected) } else { f32::INFINITY },
            );
        }
        Ok(worst)
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values: Vec<[u8; 4]> = self.read(name, Dtype::F32, Some(shape))?;
        Ok(values.into_iter().map(f32::from_le_bytes).collect())
    }

    /// The elements of one tensor, as they lie in the file.
    fn read<const SIZE: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        shape: Option<&[usize]>,
    ) -> Result<Vec<[u8; SIZE]>> {
        let view =
            self.file.tensor(name).map_err(|error| DecoderError::Golden(format!("{name}: {error}")))?;
        if view.dtype() != dtype || shape.is_some_and(|shape| view.shape() != shape) {
            let expected = shape.map_or(String::new(), |shape| format!(" {shape:?}"));
            let (got, got_shape) = (view.dtype(), view.shape());
            let reason = format!("{name} is {got:?} {got_shape:?}, expected {dtype:?}{expected}");
            return Err(DecoderError::Golden(reason));
        }
        Ok(view.data().as_chunks().0.to_vec())
    }
}

/// Length, layer and field of `state.P.N.FIELD`.
fn parse_state(name: &str) -> Result<(usize, usize, StateField)> {
    let mut parts = name.splitn(4, '.').skip(1);
    let mut number = || parts.next().and_then(|part| part.parse().ok()).ok_or_else(|| unknown_state(name));
    let (tokens, layer) = (number()?, number()?);
    let field = match parts.next() {
        Some("latent") => StateField::Latent,
        Some("k_pe") => StateField::RopeKey,
        Some("index_key") => StateField::IndexKey,
        Some("swa") => StateField::Window,
        Some("compressed") => StateField::Compressed,
        Some("overlap_kv") => StateField::OverlapKv,
        Some("overlap_gate") => StateField::OverlapGate,
        Some("index_overlap_kv") => StateField::IndexOverlapKv,
        Some("index_overlap_gate") => StateField::IndexOverlapGate,
        Some("tail_kv") => StateField::TailKv,
        Some("tail_gate") => StateField::TailGate,
        Some("index_tail_kv") => StateField::IndexTailKv,
        Some("index_tail_gate") => StateField::IndexTailGate,
        _ => return Err(unknown_state(name)),
    };
    Ok((tokens, layer, field))
}

fn unknown_state(name: &str) -> DecoderError {
    DecoderError::Golden(format!("{name} is not state.P.N.FIELD of this model"))
}

/// Largest difference; infinite where one side has more elements, NaN where one is.
fn max_difference<'a>(got: impl Iterator<Item = &'a f32>, expected: &[f32]) -> f32 {
    let (mut worst, mut count) = (0.0, 0);
    for (got, expected) in got.zip(expected) {
        worst = larger(worst, (got - expected).abs());
        count += 1;
    }
    if count == expected.len() { worst } else { f32::INFINITY }
}

/// The larger of two, NaN if either is.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}
