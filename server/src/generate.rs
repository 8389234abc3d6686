//! One generation: lookup, restore, prefill the rest, decode, and hand new blocks and states to the write-behind queue.

mod offer;
mod parked;
mod resume;
mod speculation;
mod stop;
#[cfg(test)]
mod tests;
mod trail;
mod warm;

use std::cell::Cell;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use esker_decoder::{DecoderError, Logits, LogitsOut, Residency, Sampler, Sequence};
use esker_prefix::TokenId;
use esker_store::{MissKind, StoreError, TtlClass};

use crate::gate::Refused;
use crate::node::{Engine, Node};
use crate::writers::Place;
pub(crate) use speculation::Guessing;

use offer::Offer;
use parked::Counts;
use resume::Resumption;
use speculation::Steps;
use stop::StopText;
use trail::Trail;
pub(crate) use warm::{Prefix, Step, chain_blocks, keep_chain, stored_blocks, warm, whole_tokens};

/// Besides where a prompt and an output end, states are kept every so many blocks, if the node is not told otherwise: a prompt
/// that leaves this one in between resumes no further back than that.
pub(crate) const STATE_INTERVAL_BLOCKS: usize = 64;

/// Tokens at the end of a prompt that a draft begins with.
const DRAFT_TOKENS: usize = 128;

/// How often parked rows may be lost before all rows are put back into memory: an answer is worth more than the budget.
const PARKED_TRIES: usize = 4;

/// What to generate, checked.
pub(crate) struct Job {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_new_tokens: usize,
    pub(crate) sampler: Sampler,
    pub(crate) logits_digest: bool,
    /// Texts at which it ends; none is empty.
    pub(crate) stop: Vec<String>,
    /// Where what is computed is looked for and stored, and for how long.
    pub(crate) place: Place,
    pub(crate) class: TtlClass,
    /// Whether it may be stored at all.
    pub(crate) stores: bool,
    pub(crate) restore: RestoreMode,
    /// Most bytes kept in memory of the rows that indexers pick among; what is stored of the others stays there, and is read
    /// as it is picked. `None` for all.
    pub(crate) resident_bytes: Option<u64>,
    pub(crate) guessing: Guessing,
}

/// How what is stored of a prompt is put back. The answer is the same, bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum RestoreMode {
    /// Layer after layer, while the first ones are computed with already. Small prefixes as a whole.
    #[default]
    Ordered,
    /// All of it before anything is computed.
    Whole,
    /// Nothing is put back: everything is computed.
    Nothing,
}

/// What happens on the way.
pub(crate) enum Event {
    /// Tokens whose state was put back, of those found.
    Restoring { done: usize, total: usize },
    /// Tokens computed, of those to compute.
    Prefilling { done: usize, total: usize },
    /// The prompt is computed, so many tokens of it put back. `lost` as in [`Account`].
    Prompt { tokens: usize, hit_tokens: usize, stores: bool, lost: Option<MissKind> },
    /// One new token; and the bytes that were read for it and all before it, as they were put.
    Token { id: TokenId, text: String, logits_digest: Option<[u8; 32]>, raw_bytes: u64 },
    /// The end.
    Done(Account),
}

/// What a generation used and computed.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) prompt_tokens: usize,
    pub(crate) hit_tokens: usize,
    /// Why the hit is shorter than what was offered, if that is this node's fault.
    pub(crate) lost: Option<MissKind>,
    /// Of the computed tokens of the prompt, those that were newly stored and had not been offered.
    pub(crate) write_tokens: u64,
    /// Of the computed tokens of the prompt, those whose rows are stored already.
    pub(crate) replayed_tokens: usize,
    pub(crate) completion_tokens: usize,
    /// Of what was put back, as it lies on the drive.
    pub(crate) bytes_read: u64,
    /// The same as it was put, with what was read later of the rows that stayed on SSD.
    pub(crate) raw_bytes: u64,
    pub(crate) restore: Duration,
    pub(crate) prefill: Duration,
    pub(crate) stopped: bool,
    /// The stop sequence that ended it.
    pub(crate) stop_sequence: Option<String>,
    /// Text of a character that the last token left incomplete.
    pub(crate) rest_of_text: String,
    /// Tokens that a draft block guessed, and those of them that were right.
    pub(crate) guessed_tokens: usize,
    pub(crate) accepted_tokens: usize,
    /// What rows cost that stayed on SSD, if any did.
    pub(crate) parked: Option<ParkedAccount>,
}

/// What parked rows cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ParkedAccount {
    /// Up to the first token.
    pub(crate) prefill: Residency,
    /// In all.
    pub(crate) total: Residency,
    /// Time that was waited for them, up to the first token and in all.
    pub(crate) waited: [Duration; 2],
}

/// Why a generation ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GenerateError {
    #[error(transparent)]
    Decoder(#[from] DecoderError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The machine refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The listener is gone; nobody is left to tell.
    #[error("cancelled by the client")]
    Cancelled,
    /// Nothing is stored for a tenant that is erased.
    #[error(transparent)]
    Erased(#[from] Refused),
}

impl GenerateError {
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled | Self::Decoder(DecoderError::Cancelled { .. }))
    }
}

/// Runs a job to its end on the calling thread. `emit` says `Break` when nobody listens any more.
pub(crate) fn generate(
    node: &Node,
    engine: &Engine,
    job: Job,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let place = job.place.clone();
    let mut trail = Trail::new(engine, &place, job.class);
    trail.extend(&job.prompt);
    trail.end_prompt();
    let mut sequence = Sequence::new(&engine.loaded.model);
    let mut billed = false;
    let ended = answer(node, engine, job, &mut trail, &mut sequence, &mut |event| {
        billed |= matches!(event, Event::Prompt { .. });
        emit(event)
    });
    if billed && ended.as_ref().is_err_and(GenerateError::is_cancelled) {
        // Who hangs up often asks again, for the same and a little more. A guess that was not drawn is no part of it, and a prompt that
        // was not computed to its end is nobody's bill, so it is not stored to be hit.
        sequence.truncate(trail.tokens());
        if let Err(error) = trail.store_rest(&sequence) {
            tracing::warn!(%error, "what was computed for who has gone is not stored");
        }
    }
    ended
}

/// The steps of a job. What it leaves in the sequence is as far as it came.
fn answer(
    node: &Node,
    engine: &Engine,
    mut job: Job,
    trail: &mut Trail<'_>,
    sequence: &mut Sequence,
    emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<(), GenerateError> {
    let model = &engine.loaded.model;
    let started = Instant::now();
    let mut tokens = std::mem::take(&mut job.prompt);
    let prompt_tokens = tokens.len();
    let drafts = model.has_draft() && job.guessing != Guessing::Never;
    let (stores, resident_bytes) = (job.stores, job.resident_bytes);
    let offer = Arc::new(Offer::default());
    let counts = Arc::new(Counts::default());
    let losses = Cell::new(0);
    let run =
        Run { node, engine, offer: &offer, counts: &counts, losses: &losses, stores, resident_bytes, drafts };
    let first = run.first_logits(&tokens, job.restore, trail, sequence, emit)?;
    let First { logits, hit_tokens, replayed_tokens, bytes_read, raw_bytes, restored } = first;
    let prefilled = Instant::now();
    let lost = offer.shortfall(hit_tokens);
    listen(emit(Event::Prompt { tokens: prompt_tokens, hit_tokens, stores: job.stores, lost }))?;
    let parked = |sequence: &Sequence| (sequence.residency().unwrap_or_default(), counts.waited());
    let parked_before = parked(sequence);
    let served_bytes = || raw_bytes + counts.raw_bytes();

    let mut row = logits.last().map(<[f32]>::to_vec).ok_or(GenerateError::Cancelled)?;
    let mut steps = Steps::new(model, job.guessing, sequence);
    let mut text = engine.loaded.tokenizer.stream();
    let mut shown = StopText::new(job.stop);
    let mut stop_sequence = None;
    let mut completion_tokens = 0;
    let mut stopped = false;
    while completion_tokens < job.max_new_tokens {
        let id = job.sampler.next(&row);
        if model.config().eos_token_ids.contains(&id) {
            stopped = true;
            break;
        }
        let logits_digest = job.logits_digest.then(|| digest(&row));
        completion_tokens += 1;
        let (text, stopping) = shown.push(&text.push(id)?);
        listen(emit(Event::Token { id, text, logits_digest, raw_bytes: served_bytes() }))?;
        trail.extend(&[id]);
        tokens.push(id);
        let guessed = steps.resolve(id, sequence);
        // What is in the sequence now was drawn, not guessed.
        trail.keep_passed(sequence, node.state_interval_blocks)?;
        // One block at a time, after a token is out: copying a long prompt at once would delay the next one.
        trail.store_one(sequence)?;
        if stopping.is_some() {
            (stopped, stop_sequence) = (true, stopping);
            break;
        }
        if completion_tokens == job.max_new_tokens {
            break;
        }
        row = match guessed {
            Some(row) => row,
            None => match steps.compute(&tokens, sequence) {
                // A parked row was lost on the way: everything is put back or computed again, and goes on with the same bits.
                Err(GenerateError::Decoder(DecoderError::RowsMissing { layer, tokens: held })) => {
                    tracing::warn!(layer, held, "a parked row cannot be had; the sequence is made anew");
                    losses.set(losses.get() + 1);
                    let (quiet, served) = (&mut |_| ControlFlow::Continue(()), counts.raw_bytes());
                    let first = run.first_logits(&tokens, RestoreMode::Ordered, trail, sequence, quiet)?;
                    // What is put back a second time because it was lost is not served twice.
                    counts.forget_bytes_since(served);
                    first.logits.last().map(<[f32]>::to_vec).ok_or(GenerateError::Cancelled)?
                }
                result => result?,
            },
        };
    }
    steps.end(sequence);
    let rest_of_text =
        if stop_sequence.is_some() { String::new() } else { shown.finish() + &text.finish()? };
    // Every token is out; what is left to be stored belongs to the account that comes last.
    trail.store_rest(sequence)?;
    let account = Account {
        prompt_tokens,
        hit_tokens,
        lost,
        write_tokens: trail.written_tokens(),
        replayed_tokens,
        completion_tokens,
        guessed_tokens: steps.guessed_tokens,
        accepted_tokens: steps.accepted_tokens,
        bytes_read,
        raw_bytes: served_bytes(),
        restore: restored - started,
        prefill: prefilled - restored,
        stopped,
        stop_sequence,
        rest_of_text,
        parked: sequence.residency().is_some().then(|| {
            let after = parked(sequence);
            ParkedAccount { prefill: parked_before.0, total: after.0, waited: [parked_before.1, after.1] }
        }),
    };
    listen(emit(Event::Done(account)))
}

/// The logits of a prompt's last token, and what it took.
struct First {
    logits: LogitsOut,
    hit_tokens: usize,
    replayed_tokens: usize,
    bytes_read: u64,
    raw_bytes: u64,
    restored: Instant,
}

/// What stays the same for all of a generation.
#[derive(Clone, Copy)]
struct Run<'a> {
    node: &'a Node,
    engine: &'a Engine,
    offer: &'a Arc<Offer>,
    counts: &'a Arc<Counts>,
    /// How often rows were lost so far.
    losses: &'a Cell<usize>,
    stores: bool,
    resident_bytes: Option<u64>,
    /// Whether a draft block will guess.
    drafts: bool,
}

impl<'a> Run<'a> {
    /// Puts back what is stored of a prompt and computes the rest of it.
    fn first_logits(
        &self,
        prompt: &[TokenId],
        mode: RestoreMode,
        trail: &mut Trail<'_>,
        sequence: &mut Sequence,
        emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<First, GenerateError> {
        let served = self.counts.raw_bytes();
        while self.losses.get() < PARKED_TRIES {
            match self.attempt(prompt, mode, trail, sequence, emit) {
                // What is damaged has been found out, or is looked for: a shorter prefix is chosen.
                Err(GenerateError::Decoder(DecoderError::RowsMissing { layer, tokens }))
                    if mode == RestoreMode::Ordered =>
                {
                    tracing::info!(layer, tokens, "rows did not come; the prefix is chosen anew");
                    self.counts.forget_bytes_since(served);
                    self.losses.set(self.losses.get() + 1);
                    if sequence.residency().is_none() {
                        break;
                    }
                    self.resumption(prompt).find_damage(trail);
                }
                result => return result,
            }
        }
        if sequence.residency().is_some() {
            tracing::warn!("rows that stay on SSD were lost again and again; all come into memory");
        }
        self.attempt(prompt, RestoreMode::Whole, trail, sequence, emit)
    }

    fn resumption<'p>(&self, prompt: &'p [TokenId]) -> Resumption<'p>
    where
        'a: 'p,
    {
        let Self { node, engine, offer, counts, resident_bytes, .. } = *self;
        Resumption { node, engine, prompt, offer, counts, resident_bytes }
    }

    fn attempt(
        &self,
        prompt: &[TokenId],
        mode: RestoreMode,
        trail: &mut Trail<'_>,
        sequence: &mut Sequence,
        emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<First, GenerateError> {
        let Self { offer, stores, .. } = *self;
        std::thread::scope(|scope| {
            // Nothing is offered before it is known what is stored.
            trail.begin_again();
            let resumed = self.resumption(prompt).resume(mode, trail, scope, sequence, emit)?;
            let (restored, hit_tokens) = (Instant::now(), sequence.tokens());
            trail.stored = if stores { trail.hashes_to(hit_tokens) } else { usize::MAX };
            trail.offered_tokens = offer.tokens();
            let logits = self.prefill(trail, prompt, sequence, emit)?;
            let (bytes_read, raw_bytes) = (resumed.bytes_read, resumed.raw_bytes);
            let replayed_tokens = resumed.replayed_tokens;
            Ok(First { logits, hit_tokens, replayed_tokens, bytes_read, raw_bytes, restored })
        })
    }

    /// Computes what is not restored, and takes the states on the way that are worth keeping.
    fn prefill(
        &self,
        trail: &mut Trail<'_>,
        prompt: &[TokenId],
        sequence: &mut Sequence,
        emit: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<LogitsOut, GenerateError> {
        let Self { node, engine, drafts, .. } = *self;
        let model = &engine.loaded.model;
        let first = sequence.tokens();
        let total = prompt.len() - first;
        let interval = node.state_interval_blocks * trail.block_tokens();
        loop {
            let start = sequence.tokens();
            // Numbers do not depend on where a prefill is cut.
            let mut end = if trail.has_states() {
                prompt.len().min((start / interval + 1) * interval)
            } else {
                prompt.len()
            };
            if drafts && end == prompt.len() {
                // A draft starts from what the model knew after the last tokens of the prompt.
                if prompt.len() - start > 2 * DRAFT_TOKENS {
                    end = prompt.len() - DRAFT_TOKENS;
                } else {
                    sequence.keep_residual();
                }
            }
            let want = if end == prompt.len() { Logits::Last } else { Logits::None };
            let mut told = ControlFlow::Continue(());
            let logits = sequence.prefill_observed(model, &prompt[start..end], want, &mut |progress| {
                told = emit(Event::Prefilling { done: start - first + progress.done, total });
                told
            })?;
            if end == prompt.len() {
                trail.keep_end(sequence)?;
                return Ok(logits);
            }
            // The last part of each of these calls is computed to its end.
            listen(told)?;
            trail.keep_between(sequence)?;
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
