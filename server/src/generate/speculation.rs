//! Speculative decoding: the draft block guesses the token after the next one, one step computes both, and a wrong guess is
//! cut off again.
//!
//! The answer is that of decoding token by token, bit for bit, whatever the sampler: a token's logits do not depend on
//! what was computed with it, and the sampler draws once per token, from the same logits, in the same order. So the only
//! question is whether it is faster, and that is measured on the way, in both ways by turns.

use std::time::{Duration, Instant};

use esker_decoder::{Draft, Logits, LogitsOut, Model, Residual, Sampler, Sequence};
use esker_prefix::TokenId;

use super::GenerateError;

/// Tokens that one way of decoding is tried for before the other is.
const TRIAL_TOKENS: usize = 16;
/// Tokens after which the slower way is tried again.
const RETRY_TOKENS: usize = 512;

/// Whether to guess.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Guessing {
    /// If the model has a draft block, and while it is faster.
    #[default]
    Measured,
    /// If the model has a draft block.
    Always,
    /// Not at all.
    Never,
}

/// Steps of one sequence. See the module.
pub(super) struct Steps<'a> {
    model: &'a Model,
    draft: Option<Draft>,
    guessing: Guessing,
    /// Of the tokens that the draft has not seen.
    residual: Option<Residual>,
    /// A guess that the sequence holds already, and the logits behind it.
    ahead: Option<(TokenId, Vec<f32>)>,
    guesses: bool,
    pace: [Pace; 2],
    pub(super) guessed_tokens: usize,
    pub(super) accepted_tokens: usize,
}

/// How fast one way was when it was last in use, and for how many tokens the other has been since.
#[derive(Clone, Copy, Default)]
struct Pace {
    tokens: usize,
    time: Duration,
    per_token: Option<Duration>,
    age_tokens: usize,
}

impl<'a> Steps<'a> {
    /// For a sequence whose prompt is computed.
    pub(super) fn new(model: &'a Model, guessing: Guessing, sequence: &mut Sequence) -> Self {
        let draft = if guessing == Guessing::Never { None } else { Draft::new(model).ok() };
        let guesses = draft.is_some();
        Self {
            model,
            residual: if guesses { sequence.take_residual() } else { None },
            draft,
            guessing,
            ahead: None,
            guesses,
            pace: [Pace::default(); 2],
            guessed_tokens: 0,
            accepted_tokens: 0,
        }
    }

    /// `next` was drawn. If it was guessed, gives the logits behind it; a wrong guess is cut off.
    pub(super) fn resolve(&mut self, next: TokenId, sequence: &mut Sequence) -> Option<Vec<f32>> {
        let (guess, logits) = self.ahead.take()?;
        if guess == next {
            self.accepted_tokens += 1;
            self.count(1, Duration::ZERO);
            return Some(logits);
        }
        self.cut(sequence);
        None
    }

    /// Cuts off a guess that nobody will look at.
    pub(super) fn end(&mut self, sequence: &mut Sequence) {
        if self.ahead.take().is_some() {
            self.cut(sequence);
        }
    }

    fn cut(&mut self, sequence: &mut Sequence) {
        if let Some(residual) = &mut self.residual {
            residual.pop(self.model);
        }
        sequence.truncate(sequence.tokens() - 1);
    }

    /// Computes the last of `tokens`, which the sequence lacks, and perhaps a guess behind it. Gives the logits of the
    /// last.
    pub(super) fn compute(
        &mut self,
        tokens: &[TokenId],
        sequence: &mut Sequence,
    ) -> Result<Vec<f32>, GenerateError> {
        let started = Instant::now();
        let last = tokens[tokens.len() - 1];
        let room = sequence.tokens() + 2 <= self.model.config().max_position_embeddings;
        let guess = if self.guesses && room { self.guess(tokens)? } else { None };
        let step: Vec<TokenId> = [last].into_iter().chain(guess).collect();
        let logits = match sequence.prefill(self.model, &step, Logits::All) {
            Ok(logits) => logits,
            Err(error) => {
                // The draft begins anew behind whatever is computed next.
                self.residual = None;
                return Err(error.into());
            }
        };
        self.residual = sequence.take_residual();
        let mut rows = logits.rows().map(<[f32]>::to_vec);
        let row = rows.next().ok_or(GenerateError::Cancelled)?;
        self.ahead = guess.zip(rows.next());
        self.guessed_tokens += usize::from(self.ahead.is_some());
        self.count(1, started.elapsed());
        Ok(row)
    }

    /// The likeliest token behind the last of `tokens`.
    fn guess(&mut self, tokens: &[TokenId]) -> Result<Option<TokenId>, GenerateError> {
        let (Some(draft), Some(residual)) = (&mut self.draft, self.residual.take()) else { return Ok(None) };
        let rows = residual.tokens(self.model);
        let first = residual.first() + 1;
        let Some(next) = tokens.get(first..first + rows).filter(|next| !next.is_empty()) else {
            return Ok(None);
        };
        let logits: LogitsOut = draft.guess(self.model, &residual, next, Logits::Last)?;
        Ok(logits.last().map(|row| Sampler::greedy().next(row)))
    }

    /// Notes what tokens took, and changes the way if the other is, or may be, faster.
    fn count(&mut self, tokens: usize, time: Duration) {
        if self.guessing != Guessing::Measured || self.draft.is_none() {
            return;
        }
        let (now, other) = (usize::from(self.guesses), usize::from(!self.guesses));
        self.pace[other].age_tokens += tokens;
        let pace = &mut self.pace[now];
        pace.tokens += tokens;
        pace.time += time;
        if pace.tokens < TRIAL_TOKENS {
            return;
        }
        let per_token = pace.time / u32::try_from(pace.tokens).unwrap_or(u32::MAX);
        *pace = Pace { per_token: Some(per_token), ..Pace::default() };
        let better = self.pace[other].per_token.is_none_or(|other| other < per_token);
        if better || self.pace[other].age_tokens >= RETRY_TOKENS {
            self.guesses = !self.guesses;
            self.pace[other].age_tokens = 0;
        }
    }
}
