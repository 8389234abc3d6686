//! The thread that works on warm-up jobs: one prompt of one job at a time, in short steps, giving way to live requests.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use esker_proto::v1;

use super::job::{Job, Stage};
use super::prompts::{Kept, Prompt};
use super::record_error;
use crate::generate::{GenerateError, Prefix, Step, keep_chain, warm};
use crate::live::Pace;
use crate::node::{Engine, Node};
use crate::principal::{Principal, Role};
use crate::service::ttl_class;
use crate::writers::Place;

/// The thread. Ends it when dropped, after the step that it is in.
pub(crate) struct Runner {
    node: Arc<Node>,
    thread: Option<JoinHandle<()>>,
}

impl Runner {
    pub(crate) fn start(node: &Arc<Node>) -> std::io::Result<Self> {
        let worker = Arc::clone(node);
        let thread = std::thread::Builder::new().name("warm-up".into()).spawn(move || run(&worker))?;
        Ok(Self { node: Arc::clone(node), thread: Some(thread) })
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.node.warmups.close();
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// How a turn at a job ended.
pub(super) enum Turn {
    /// For good.
    Ended(Stage, String),
    /// Something more urgent came, or the node stops; the job goes on later from where it is.
    Left,
    /// Its tenant was erased since it was submitted.
    Erased,
}

fn run(node: &Arc<Node>) {
    let Some(engine) = &node.engine else { return };
    while let Some(job) = node.warmups.next() {
        let turn = work(node, engine, &job);
        if let Turn::Ended(stage, reason) = &turn {
            tracing::info!(tenant = %job.tenant, job = %job.name, ?stage, %reason, "a warm-up has ended");
        }
        node.warmups.finish(&job, turn);
    }
}

fn work(node: &Node, engine: &Engine, job: &Job) -> Turn {
    let record = job.now();
    if record.namespace != engine.namespace.to_hex() {
        return failed("the node's model is another one than when the job was submitted");
    }
    let place = match place(node, job) {
        Ok(place) => place,
        Err(status) => return failed(status.message()),
    };
    if record.epoch != Some(place.pass.epoch()) {
        return Turn::Erased;
    }
    let prompts = match node.warmups.prompts(job) {
        Ok(Kept::All(prompts)) => prompts,
        Ok(Kept::Nothing) => return failed("its prompts are gone"),
        Ok(Kept::Shredded) => return Turn::Erased,
        Err(error) => return record_error(&error),
    };
    let class = ttl_class(v1::TtlClass::try_from(record.ttl).unwrap_or_default());
    let mut pace = Pace::new(&node.live, node.warmups.share);
    let done = usize::try_from(record.prompts_done).unwrap_or(usize::MAX);
    for (number, prompt) in (1..).zip(&prompts).skip(done) {
        let whole = prompt.whole_tokens(engine.loaded.model.layout()) as u64;
        let tokens = match prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Chain(hashes) => {
                if let Some(turn) = observe(node, job, &mut pace, Step::Next { tokens: 0, bytes: 0 }) {
                    return turn;
                }
                let kept = keep_chain(node, engine, &place, hashes);
                let block_tokens = engine.loaded.model.layout().block_tokens() as usize;
                if let Some(turn) = observe(node, job, &mut pace, Step::Found { tokens: kept * block_tokens })
                {
                    return turn;
                }
                if kept < hashes.len() {
                    return failed(format!(
                        "prompt {number} is a chain of which {kept} of {} blocks are stored: the rest can be computed of its tokens only",
                        hashes.len()
                    ));
                }
                if let Err(error) = node.warmups.update(job, |record| record.next_prompt(whole)) {
                    return record_error(&error);
                }
                continue;
            }
        };
        let mut left = None;
        let result = warm(node, engine, &Prefix { tokens, place: &place, class }, &mut |step| match observe(
            node, job, &mut pace, step,
        ) {
            None => ControlFlow::Continue(()),
            Some(turn) => {
                left = Some(turn);
                ControlFlow::Break(())
            }
        });
        match (left, result) {
            (Some(turn), _) => return turn,
            (None, Ok(())) => {}
            (None, Err(error)) => return after_error(&error),
        }
        if let Err(error) = node.warmups.update(job, |record| record.next_prompt(whole)) {
            return record_error(&error);
        }
    }
    Turn::Ended(Stage::Done, String::new())
}

/// Notes a step; gives how the turn ends if it is to end here.
fn observe(node: &Node, job: &Job, pace: &mut Pace<'_>, step: Step) -> Option<Turn> {
    let noted = match step {
        Step::Found { tokens } => {
            let before = job.now().prompt_tokens;
            node.metrics.warmed("cached", (tokens as u64).saturating_sub(before), 0);
            node.warmups.update(job, |record| record.found(tokens as u64))
        }
        Step::Stored { tokens, bytes, compute } => {
            node.warmups.measured(tokens, compute);
            node.metrics.warmed("computed", tokens as u64, bytes);
            node.warmups.update(job, |record| record.stored(tokens as u64, bytes, compute))
        }
        Step::Declined => {
            let reason = "the store is full, and expects more of what it holds than of this";
            return Some(Turn::Ended(Stage::Stopped, reason.into()));
        }
        Step::Next { tokens, bytes } => {
            if !pace.wait(&|| !leaves(node, job)) {
                return Some(match job.is_cancelled() {
                    true => Turn::Ended(Stage::Cancelled, String::new()),
                    false => Turn::Left,
                });
            }
            let tenant = node.tenants.get(&job.tenant);
            if job.record.borrow().epoch != Some(tenant.epoch()) {
                return Some(Turn::Erased);
            }
            if let Err(status) = node.tenants.admit_stored(&node.store, &tenant) {
                return Some(Turn::Ended(Stage::Stopped, status.message().to_owned()));
            }
            let exceeded = job.record.borrow().exceeded(tokens as u64, bytes, node.store.now_s());
            return exceeded.map(|reason| Turn::Ended(Stage::Stopped, reason));
        }
    };
    noted.err().map(|error| record_error(&error))
}

fn leaves(node: &Node, job: &Job) -> bool {
    job.is_cancelled() || node.warmups.leaves(job)
}

/// Where the job stores. Whether its submitter may was asked when it was submitted; whether the tenant still is one
/// is asked again.
fn place(node: &Node, job: &Job) -> Result<Place, tonic::Status> {
    let record = job.now();
    if !node.policy.now().tenants.contains_key(&job.tenant) {
        return Err(tonic::Status::permission_denied("the policy does not name this tenant any more"));
    }
    let scope = v1::Scope::try_from(record.scope).unwrap_or_default();
    let publishes = record.publishes || scope == v1::Scope::Public;
    let roles = [Role::Writer].into_iter().chain(publishes.then_some(Role::Publisher)).collect();
    let principal = Principal { tenant: job.tenant.clone(), name: record.account, roles };
    node.tenants.writable(&principal, &record.user, scope)
}

fn after_error(error: &GenerateError) -> Turn {
    match error {
        GenerateError::Store(store) if store.kind() == esker_store::ErrorKind::Full => {
            Turn::Ended(Stage::Stopped, error.to_string())
        }
        _ => failed(error.to_string()),
    }
}

fn failed(reason: impl Into<String>) -> Turn {
    Turn::Ended(Stage::Failed, reason.into())
}

/// What computing a token takes on this node: the newest steps weigh most.
pub(super) fn smooth(before: Option<f64>, tokens: usize, compute: Duration) -> Option<f64> {
    if tokens == 0 {
        return before;
    }
    #[allow(clippy::cast_precision_loss, reason = "an estimate")]
    let now = compute.as_secs_f64() * 1e6 / tokens as f64;
    Some(before.map_or(now, |before| before * 0.9 + now * 0.1))
}
