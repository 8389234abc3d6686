//! One generation: lookup, restore, prefill the rest, decode, and hand new blocks and states to the write-behind queue.

mod resume;
mod stop;
mod trail;
mod warm;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use esker_decoder::{DecoderError, Logits, LogitsOut, Sampler, Sequence};
use esker_prefix::{ScopeKey, TokenId};
use esker_store::{StoreError, TtlClass};

use crate::node::{Engine, Node};
use stop::StopText;
use trail::Trail;
pub(crate) use warm::{Prefix, Step, stored_tokens, warm, whole_tokens};

/// Besides where a prompt and an output end, states are kept every so many blocks: a prompt that leaves this one in between
/// resumes no further back than that.
const STATE_INTERVAL_BLOCKS: usize = 64;

/// What to generate, checked.
pub(crate) struct Job {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_new_tokens: usize,
    pub(crate) sampler: Sampler,
    pub(crate) logits_digest: bool,
    /// Texts at which it ends; none is empty.
    pub(crate) stop: Vec<String>,
    /// Where what is computed is looked for and stored, and for how long.
    pub(crate) scope: ScopeKey,
    pub(crate) class: TtlClass,
    /// Whether it may be stored at all.
    pub(crate) stores: bool,
}

/// What happens on the way.
pub(crate) enum Event {
    /// Tokens whose state was put back, of those found.
    Restoring { done: usize, total: usize },
    /// Tokens computed, of those to compute.
    Prefilling { done: usize, total: usize },
    /// The prompt is computed, so many tokens of it put back.
    Prompt { tokens: usize, hit_tokens: usize, stores: bool },
    /// One new token.
    Token { id: TokenId, text: String, logits_digest: Option<[u8; 32]> },
    /// The end.
    Done(Account),
}

/// What a generation used and computed.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) prompt_tokens: usize,
    pub(crate) hit_tokens: usize,
    /// Of the computed tokens of the prompt, those that were newly stored.
    pub(crate) write_tokens: u64,
    pub(crate) completion_tokens: usize,
    pub(crate) bytes_read: u64,
    pub(crate) restore: Duration,
    pub(crate) prefill: Duration,
    pub(crate) stopped: bool,
    /// The stop sequence that ended it.
    pub(crate) stop_sequence: Option<String>,
    /// Text of a character that the last token left incomplete.
    pub(crate) rest_of_text: String,
}

/// Why a generation ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerateError {
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The listener is gone; nobody is left to tell.
    #[error("cancelled by the client")]
    Cancelled,
}

/// Runs a job to its end on the calling thread. `emit` says `Break` when nobody listens any more.
pub(crate) fn generate(
    node: &Node,
    engine: &Engine,
    mut job: Job,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let model = &engine.loaded.model;
    let mut trail = Trail::new(engine, &job.scope, job.class);
    trail.extend(&job.prompt);
    trail.end_prompt();

    let started = Instant::now();
    let mut sequence = Sequence::new(model);
    let bytes_read = resume::resume(node, engine, &trail, &job.prompt, &mut sequence, emit)?;
    let restored = Instant::now();
    let hit_tokens = sequence.tokens();
    trail.stored = if job.stores { trail.hashes_to(hit_tokens) } else { usize::MAX };

    let mut logits = prefill(engine, &mut trail, &job.prompt, &mut sequence, emit)?;
    let prefilled = Instant::now();
    listen(emit(Event::Prompt { tokens: job.prompt.len(), hit_tokens, stores: job.stores }))?;

    let mut text = engine.loaded.tokenizer.stream();
    let mut shown = StopText::new(job.stop);
    let mut stop_sequence = None;
    let mut completion_tokens = 0;
    let mut stopped = false;
    while completion_tokens < job.max_new_tokens {
        let row = logits.last().ok_or(GenerateError::Cancelled)?;
        let id = job.sampler.next(row);
        if model.config().eos_token_ids.contains(&id) {
            stopped = true;
            break;
        }
        let logits_digest = job.logits_digest.then(|| digest(row));
        completion_tokens += 1;
        let (text, stopping) = shown.push(&text.push(id)?);
        listen(emit(Event::Token { id, text, logits_digest }))?;
        // One block at a time, after a token is out: copying a long prompt at once would delay the next one.
        trail.store_one(&sequence)?;
        if stopping.is_some() {
            (stopped, stop_sequence) = (true, stopping);
            break;
        }
        if completion_tokens < job.max_new_tokens {
            trail.extend(&[id]);
            logits = sequence.prefill(model, &[id], Logits::Last)?;
        }
    }
    trail.keep_state(&sequence)?;
    let rest_of_text =
        if stop_sequence.is_some() { String::new() } else { shown.finish() + &text.finish()? };
    // Every token is out; what is left to be stored belongs to the account that comes last.
    while trail.store_one(&sequence)? {}
    let account = Account {
        prompt_tokens: job.prompt.len(),
        hit_tokens,
        write_tokens: trail.written_tokens(),
        completion_tokens,
        bytes_read,
        restore: restored - started,
        prefill: prefilled - restored,
        stopped,
        stop_sequence,
        rest_of_text,
    };
    listen(emit(Event::Done(account)))
}

/// Computes what is not restored, and takes the states on the way that are worth keeping.
fn prefill(
    engine: &Engine,
    trail: &mut Trail<'_>,
    prompt: &[TokenId],
    sequence: &mut Sequence,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<LogitsOut, GenerateError> {
    let model = &engine.loaded.model;
    let first = sequence.tokens();
    let total = prompt.len() - first;
    let interval = STATE_INTERVAL_BLOCKS * model.layout().block_tokens() as usize;
    loop {
        let start = sequence.tokens();
        // Numbers do not depend on where a prefill is cut.
        let end = if trail.has_states() {
            prompt.len().min((start / interval + 1) * interval)
        } else {
            prompt.len()
        };
        let want = if end == prompt.len() { Logits::Last } else { Logits::None };
        let logits = sequence.prefill_observed(model, &prompt[start..end], want, &mut |progress| {
            emit(Event::Prefilling { done: start - first + progress.done, total })
        })?;
        trail.keep_state(sequence)?;
        if end == prompt.len() {
            return Ok(logits);
        }
    }
}

fn listen(told: ControlFlow<()>) -> Result<(), GenerateError> {
    match told {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(GenerateError::Cancelled),
    }
}

/// BLAKE3 of the logits as f32 LE.
fn digest(logits: &[f32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = Vec::with_capacity(logits.len() * 4);
    for logit in logits {
        bytes.extend_from_slice(&logit.to_le_bytes());
    }
    hasher.update(&bytes);
    *hasher.finalize().as_bytes()
}
