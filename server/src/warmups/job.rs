//! A warm-up job: what was asked for, and how far it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use esker_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::prompts::Prompt;
use crate::node::Engine;
use crate::principal::{Principal, Role, TenantId};

/// A job that was asked for, checked. `Record` without its progress.
#[derive(Clone, Debug)]
pub(crate) struct Submission {
    pub(crate) name: String,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) scope: v1::Scope,
    pub(crate) ttl: v1::TtlClass,
    pub(crate) user: String,
    /// 0 for none, as for the other two.
    pub(crate) max_tokens: u64,
    pub(crate) max_bytes: u64,
    pub(crate) deadline_s: u64,
    pub(crate) priority: u32,
    pub(crate) resume: bool,
}

impl Submission {
    /// Tells one payload from another: everything that was asked for, the way it is asked apart.
    pub(crate) fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut number = |number: u64| {
            hasher.update(&number.to_le_bytes());
        };
        number(self.prompts.len() as u64);
        for prompt in &self.prompts {
            match prompt {
                Prompt::Tokens(tokens) => {
                    number(tokens.len() as u64);
                    tokens.iter().for_each(|token| number(token.0.into()));
                }
                Prompt::Chain(hashes) => {
                    number(u64::MAX);
                    number(hashes.len() as u64);
                    let words = hashes.iter().flat_map(|hash| hash.0.as_chunks().0);
                    words.for_each(|word| number(u64::from_le_bytes(*word)));
                }
            }
        }
        number(u64::from(self.scope as i32 as u32));
        number(u64::from(self.ttl as i32 as u32));
        for limit in [self.max_tokens, self.max_bytes, self.deadline_s, self.priority.into()] {
            number(limit);
        }
        hasher.update(self.user.as_bytes());
        hasher.finalize().to_hex().to_string()
    }
}

/// Where a job stands. One that is being worked on is queued as far as a restart is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    Queued,
    Done,
    /// A budget, a quota or the deadline was reached, or the store declines.
    Stopped,
    Cancelled,
    Failed,
}

/// What is written down of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Of its tenant: in another one the job is over. Earlier builds wrote none; there is one in memory.
    #[serde(default)]
    pub(crate) epoch: Option<u32>,
    /// Of the submission.
    pub(crate) digest: String,
    /// The account that submitted it.
    pub(crate) account: String,
    /// Whether that account might publish.
    #[serde(default)]
    pub(crate) publishes: bool,
    /// Order of submission on this node.
    pub(crate) number: u64,
    pub(crate) namespace: String,
    pub(crate) scope: i32,
    pub(crate) ttl: i32,
    pub(crate) user: String,
    pub(crate) priority: u32,
    pub(crate) max_tokens: u64,
    pub(crate) max_bytes: u64,
    /// In store time, which no jump of a wall clock reaches.
    pub(crate) deadline_s: Option<u32>,
    pub(crate) stage: Stage,
    pub(crate) reason: String,
    pub(crate) prompts: u64,
    pub(crate) prompts_done: u64,
    /// Of all prompts, whole blocks.
    pub(crate) tokens: u64,
    /// Of the prompts that are done.
    pub(crate) tokens_done: u64,
    /// Of the prompt after them, how much is stored.
    pub(crate) prompt_tokens: u64,
    pub(crate) tokens_cached: u64,
    pub(crate) tokens_computed: u64,
    pub(crate) bytes_written: u64,
    pub(crate) compute_us: u64,
    /// What was to be computed and stored when the job was submitted.
    pub(crate) new_tokens: u64,
    pub(crate) new_bytes: u64,
    /// Computed and written before the budgets began to count.
    pub(crate) free_tokens: u64,
    pub(crate) free_bytes: u64,
}

impl Record {
    /// A job that nobody has worked on, submitted at `now_s` of store time.
    pub(crate) fn new(engine: &Engine, submission: &Submission, principal: &Principal, now_s: u32) -> Self {
        let layout = engine.loaded.model.layout();
        let seconds = u32::try_from(submission.deadline_s).unwrap_or(u32::MAX);
        let whole = |prompt: &Prompt| prompt.whole_tokens(layout) as u64;
        Self {
            epoch: None,
            digest: String::new(),
            account: principal.name.clone(),
            publishes: principal.roles.has(Role::Publisher),
            number: 0,
            namespace: engine.namespace.to_hex(),
            scope: submission.scope.into(),
            ttl: submission.ttl.into(),
            user: submission.user.clone(),
            priority: submission.priority,
            max_tokens: submission.max_tokens,
            max_bytes: submission.max_bytes,
            deadline_s: (submission.deadline_s > 0).then(|| now_s.saturating_add(seconds)),
            stage: Stage::Queued,
            reason: String::new(),
            prompts: submission.prompts.len() as u64,
            prompts_done: 0,
            tokens: submission.prompts.iter().map(whole).sum(),
            tokens_done: 0,
            prompt_tokens: 0,
            tokens_cached: 0,
            tokens_computed: 0,
            bytes_written: 0,
            compute_us: 0,
            new_tokens: 0,
            new_bytes: 0,
            free_tokens: 0,
            free_bytes: 0,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.stage != Stage::Queued
    }

    /// Tokens that nobody has looked at yet.
    pub(crate) fn tokens_left(&self) -> u64 {
        self.tokens.saturating_sub(self.tokens_done.saturating_add(self.prompt_tokens))
    }

    /// So many tokens of the current prompt are stored.
    pub(crate) fn found(&mut self, tokens: u64) {
        add(&mut self.tokens_cached, tokens.saturating_sub(self.prompt_tokens));
        self.prompt_tokens = tokens;
    }

    /// So many more were computed and stored.
    pub(crate) fn stored(&mut self, tokens: u64, bytes: u64, compute: Duration) {
        add(&mut self.prompt_tokens, tokens);
        add(&mut self.tokens_computed, tokens);
        add(&mut self.bytes_written, bytes);
        add(&mut self.compute_us, u64::try_from(compute.as_micros()).unwrap_or(u64::MAX));
    }

    /// The current prompt, of this many tokens, is done.
    pub(crate) fn next_prompt(&mut self, tokens: u64) {
        add(&mut self.prompts_done, 1);
        add(&mut self.tokens_done, tokens);
        self.prompt_tokens = 0;
    }

    /// Why computing `tokens` more and writing at most `bytes` more is not within the budgets.
    pub(crate) fn exceeded(&self, tokens: u64, bytes: u64, now_s: u32) -> Option<String> {
        let spent = self.tokens_computed.saturating_sub(self.free_tokens);
        let written = self.bytes_written.saturating_sub(self.free_bytes);
        if self.deadline_s.is_some_and(|deadline_s| deadline_s <= now_s) {
            return Some("the deadline has passed".into());
        }
        if self.max_tokens > 0 && spent.saturating_add(tokens) > self.max_tokens {
            return Some(format!(
                "the budget of {} computed tokens is used up: {spent} were",
                self.max_tokens
            ));
        }
        if self.max_bytes > 0 && written.saturating_add(bytes) > self.max_bytes {
            return Some(format!("the budget of {} stored bytes is used up: {written} were", self.max_bytes));
        }
        None
    }

    /// The job as its owner sees it. `us_per_token`: what computing takes on this node, where the job has no figure of its own.
    pub(crate) fn wire(&self, name: &str, running: bool, us_per_token: Option<f64>) -> v1::WarmupJob {
        let state = match self.stage {
            Stage::Queued if running => v1::WarmupState::Running,
            Stage::Queued => v1::WarmupState::Queued,
            Stage::Done => v1::WarmupState::Done,
            Stage::Stopped => v1::WarmupState::Stopped,
            Stage::Cancelled => v1::WarmupState::Cancelled,
            Stage::Failed => v1::WarmupState::Failed,
        };
        // What is new was estimated when the job came; it is never more than what nobody has looked at yet.
        let left = match self.stage {
            Stage::Done => 0,
            _ => self.new_tokens.saturating_sub(self.tokens_computed).min(self.tokens_left()),
        };
        let measured = self.tokens_computed > 0;
        let bytes_per_token = match measured && self.bytes_written > 0 {
            true => ratio(self.bytes_written, self.tokens_computed),
            false => ratio(self.new_bytes, self.new_tokens),
        };
        let us_per_token = match measured {
            true => Some(ratio(self.compute_us, self.tokens_computed)),
            false => us_per_token,
        };
        v1::WarmupJob {
            job: name.to_owned(),
            state: state.into(),
            prompts: self.prompts,
            prompts_done: self.prompts_done,
            tokens: self.tokens,
            tokens_cached: self.tokens_cached,
            tokens_computed: self.tokens_computed,
            tokens_left: self.tokens_left(),
            bytes_written: self.bytes_written,
            bytes_left: times(left, bytes_per_token),
            compute_ms: self.compute_us / 1000,
            compute_ms_left: us_per_token.map_or(0, |us| times(left, us / 1000.0)),
            reason: self.reason.clone(),
            priority: self.priority,
        }
    }
}

/// A job in the node's memory.
pub(crate) struct Job {
    pub(crate) tenant: TenantId,
    pub(crate) name: String,
    /// The record, for everyone who watches it.
    pub(crate) record: watch::Sender<Record>,
    cancelled: AtomicBool,
    erased: AtomicBool,
}

impl Job {
    pub(crate) fn new(tenant: TenantId, name: String, record: Record) -> Self {
        let (cancelled, erased) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { tenant, name, record: watch::Sender::new(record), cancelled, erased }
    }

    pub(crate) fn now(&self) -> Record {
        self.record.borrow().clone()
    }

    /// Whoever works on it leaves it before the next step.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whoever works on it leaves it likewise, and writes nothing down of it any more.
    pub(crate) fn erase(&self) {
        self.erased.store(true, Ordering::Release);
        self.cancel();
    }

    pub(crate) fn is_erased(&self) -> bool {
        self.erased.load(Ordering::Acquire)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

/// A record that was read says any number.
fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}

/// For fuzzing: the record of a job, worked on. Whether it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let Ok(mut record) = serde_json::from_slice::<Record>(bytes) else { return false };
    let written = serde_json::to_vec(&record).expect("it was read");
    let again: Record = serde_json::from_slice(&written).expect("it was written");
    assert_eq!(serde_json::to_vec(&again).ok(), Some(written), "a record that does not come back");
    for most in [1, u64::MAX] {
        record.found(most);
        record.stored(most, most, Duration::from_micros(most));
        record.next_prompt(most);
        let _ = (record.exceeded(most, most, 1), record.wire("job", true, Some(1e300)));
        assert!(record.tokens_left() <= record.tokens);
    }
    true
}

#[allow(clippy::cast_precision_loss, reason = "an estimate")]
fn ratio(of: u64, to: u64) -> f64 {
    if to == 0 { 0.0 } else { of as f64 / to as f64 }
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate"
)]
fn times(count: u64, each: f64) -> u64 {
    (count as f64 * each) as u64
}
