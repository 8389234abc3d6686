//! Warm-up jobs: prefixes computed and stored before traffic asks for them.
//!
//! A job and its prompts are written down before it is accepted, and its progress after every group commit, so that a crash
//! costs at most the blocks of one. The same name with the same payload is the same job, with another it is refused. Jobs of
//! higher priority go first, at any step; among equals tenants take turns. One thread works ([`run`]), at the pace that live
//! requests leave it ([`live`](crate::live)).
//!
//! Prompts are forgotten as soon as a job has ended, whichever way; of ended jobs a tenant's newest [`MAX_JOBS`] are
//! remembered. A job is of the epoch in which it was submitted: when its tenant is erased it is over, and whatever a crash
//! left of it goes at the next start.

pub(crate) mod job;
mod plan;
mod prompts;
mod run;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use esker_proto::v1;
use esker_store::Sealer;
use tokio::sync::watch;
use tonic::Status;

use crate::audit::Event;
use crate::control::{Control, Table};
use crate::node::{Engine, Node};
use crate::principal::{Principal, TenantId};
use crate::service::from_gate;
use crate::tenants::Tenants;
pub(crate) use job::{Job, Record, Stage, Submission};
pub(crate) use prompts::Prompt;
use prompts::{Kept, Prompts};
pub(crate) use run::Runner;
use run::Turn;

/// Jobs remembered of one tenant.
const MAX_JOBS: usize = 1000;
/// Longest wait of an erasure for the step that a job is in.
const LEAVE_WAIT: Duration = Duration::from_secs(60);

type Key = (TenantId, String);

/// The jobs of a node.
pub(crate) struct Warmups {
    control: Arc<Control>,
    prompts: Prompts,
    /// Part of the time, in percent, that jobs take while live requests run.
    pub(crate) share: u32,
    table: Mutex<Jobs>,
    changed: Condvar,
}

#[derive(Default)]
struct Jobs {
    all: BTreeMap<Key, Arc<Job>>,
    /// The one that is worked on.
    running: Option<Arc<Job>>,
    /// When each tenant had its last turn, in turns.
    turns: HashMap<TenantId, u64>,
    turn: u64,
    number: u64,
    closing: bool,
    us_per_token: Option<f64>,
}

/// Jobs by what they are doing, for metrics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) queued: u64,
    pub(crate) running: u64,
    pub(crate) tokens_left: u64,
}

impl Warmups {
    /// Takes up the jobs that were written down, and drops those of tenants that were erased since.
    pub(crate) fn open(
        control: Arc<Control>,
        sealer: Option<Arc<dyn Sealer>>,
        tenants: &Tenants,
        share: u32,
    ) -> anyhow::Result<Self> {
        let prompts = Prompts::new(Arc::clone(&control), sealer);
        let mut jobs = Jobs::default();
        for (row, mut record) in control.scan::<Record>(Table::Warmups, "", "", usize::MAX)? {
            let Some(key) = key_of(&row) else { continue };
            jobs.number = jobs.number.max(record.number);
            let epoch = tenants.get(&key.0).epoch();
            if record.epoch.is_some_and(|known| known != epoch) {
                control.delete(Table::Warmups, &row)?;
                continue;
            }
            if record.epoch.replace(epoch).is_none() && !record.has_ended() {
                control.put(Table::Warmups, &row, &record)?;
            }
            let (tenant, name) = key.clone();
            jobs.all.insert(key, Arc::new(Job::new(tenant, name, record)));
        }
        // A crash came between the two writes of a beginning or an end, or into an erasure.
        for row in control.names(Table::WarmupPrompts, "")? {
            let job = key_of(&row).and_then(|key| jobs.all.get(&key));
            match job.filter(|job| !job.record.borrow().has_ended()).cloned() {
                None => control.delete(Table::WarmupPrompts, &row)?,
                // The erasure had destroyed the key and no more.
                Some(job) if prompts.are_shredded(&row)? => drop_rows(&control, &mut jobs, &job)?,
                Some(_) => {}
            }
        }
        let waiting = jobs.all.values().filter(|job| !job.record.borrow().has_ended()).count();
        if waiting > 0 {
            tracing::info!(jobs = waiting, "warm-up jobs go on");
        }
        Ok(Self { control, prompts, share, table: Mutex::new(jobs), changed: Condvar::new() })
    }

    /// Takes a job, durably, or gives the one of this name.
    pub(crate) fn submit(
        &self,
        node: &Node,
        engine: &Engine,
        principal: &Principal,
        submission: &Submission,
    ) -> Result<v1::WarmupJob, Status> {
        let tenant = &principal.tenant;
        let place = node.tenants.writable(principal, &submission.user, submission.scope)?;
        let plan = plan::plan(node, engine, submission, &place);
        let digest = submission.digest();
        let key = (tenant.clone(), submission.name.clone());
        // An erasure sees the job, or is seen by it.
        let _inside = place.pass.enter().map_err(from_gate)?;
        let mut jobs = self.jobs();
        if let Some(known) = jobs.all.get(&key) {
            let record = known.now();
            if record.digest != digest {
                node.audit.record(&Event::new(principal, "warmup", submission.name.clone(), "refused"));
                return Err(Status::already_exists(format!(
                    "a job {:?} was submitted with another payload: give this one another name",
                    submission.name
                )));
            }
            let goes_on = submission.resume
                && matches!(record.stage, Stage::Stopped | Stage::Cancelled | Stage::Failed);
            if !goes_on {
                return Ok(wire(known, &jobs));
            }
        }
        let unfinished = jobs.of(tenant).filter(|job| !job.record.borrow().has_ended()).count() as u64;
        if let Some(limit) = node.tenants.rules(tenant).warmups
            && unfinished >= limit
        {
            return Err(node.tenants.over(tenant, "warmups", limit, unfinished, 10_000));
        }
        self.forget_old(node, &mut jobs, tenant)?;
        let before = jobs.all.get(&key).map(|job| job.now());
        jobs.number += 1;
        let (free_tokens, free_bytes) =
            before.as_ref().map_or((0, 0), |before| (before.tokens_computed, before.bytes_written));
        let fresh = Record {
            number: jobs.number,
            digest,
            new_tokens: plan.new,
            new_bytes: plan.new_bytes,
            free_tokens,
            free_bytes,
            epoch: Some(place.pass.epoch()),
            ..Record::new(engine, submission, principal, node.store.now_s())
        };
        let record = match before {
            None => fresh,
            // Goes on at its checkpoint.
            Some(before) => Record {
                prompts_done: before.prompts_done,
                tokens_done: before.tokens_done,
                prompt_tokens: before.prompt_tokens,
                tokens_cached: before.tokens_cached,
                tokens_computed: before.tokens_computed,
                bytes_written: before.bytes_written,
                compute_us: before.compute_us,
                new_tokens: before.tokens_computed + plan.new,
                ..fresh
            },
        };
        let name = name_of(tenant, &submission.name);
        let scope = node.tenants.reminded(tenant).scope;
        // The prompts first: a job without them could not be done, prompts without a job are overwritten.
        self.prompts
            .keep(&name, scope, &submission.prompts)
            .and_then(|()| self.control.put(Table::Warmups, &name, &record))
            .map_err(|error| unwritten(&error))?;
        // Whoever watched the one before it has seen its end.
        let job = Arc::new(Job::new(tenant.clone(), submission.name.clone(), record));
        jobs.all.insert(key, Arc::clone(&job));
        if submission.scope != v1::Scope::Private && submission.scope != v1::Scope::Unspecified {
            let what = format!("{:?} {} by warm-up", submission.scope, engine.namespace);
            node.audit.record(&Event::new(principal, "publish", what, "ok"));
        }
        self.changed.notify_all();
        Ok(wire(&job, &jobs))
    }

    /// What a submission would find and cost.
    pub(crate) fn dry_run(
        &self,
        node: &Node,
        engine: &Engine,
        principal: &Principal,
        submission: &Submission,
    ) -> Result<v1::WarmupJob, Status> {
        let place = node.tenants.writable(principal, &submission.user, submission.scope)?;
        let plan = plan::plan(node, engine, submission, &place);
        let us_per_token = self.jobs().us_per_token.unwrap_or(0.0);
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate"
        )]
        let compute_ms_left = (plan.new as f64 * us_per_token / 1000.0) as u64;
        Ok(v1::WarmupJob {
            job: submission.name.clone(),
            state: v1::WarmupState::Planned.into(),
            prompts: submission.prompts.len() as u64,
            tokens: plan.tokens,
            tokens_cached: plan.cached,
            tokens_left: plan.new,
            bytes_left: plan.new_bytes,
            compute_ms_left,
            priority: submission.priority,
            ..Default::default()
        })
    }

    pub(crate) fn get(&self, tenant: &TenantId, name: &str) -> Result<v1::WarmupJob, Status> {
        let jobs = self.jobs();
        let job = jobs.all.get(&(tenant.clone(), name.to_owned())).ok_or_else(|| unknown(name))?;
        Ok(wire(job, &jobs))
    }

    /// Changes whenever the job does.
    pub(crate) fn watch(&self, tenant: &TenantId, name: &str) -> Result<watch::Receiver<Record>, Status> {
        let jobs = self.jobs();
        let job = jobs.all.get(&(tenant.clone(), name.to_owned())).ok_or_else(|| unknown(name))?;
        Ok(job.record.subscribe())
    }

    /// A tenant's jobs above `after`, by name.
    pub(crate) fn list(&self, tenant: &TenantId, after: &str, limit: usize) -> Vec<v1::WarmupJob> {
        let jobs = self.jobs();
        let above = jobs.of(tenant).filter(|job| job.name.as_str() > after);
        above.take(limit).map(|job| wire(job, &jobs)).collect()
    }

    /// Ends a job. What it has stored stays. One that has ended is left as it is.
    pub(crate) fn cancel(&self, tenant: &TenantId, name: &str) -> Result<v1::WarmupJob, Status> {
        let jobs = self.jobs();
        let job = jobs.all.get(&(tenant.clone(), name.to_owned())).ok_or_else(|| unknown(name))?;
        let job = Arc::clone(job);
        if job.record.borrow().has_ended() {
            return Ok(wire(&job, &jobs));
        }
        job.cancel();
        if !jobs.is_running(&job) {
            self.end(&job, Stage::Cancelled, String::new()).map_err(|error| unwritten(&error))?;
        }
        // The one that is worked on is left before its next step.
        let (jobs, _) = self
            .changed
            .wait_timeout_while(jobs, LEAVE_WAIT, |jobs| jobs.is_running(&job))
            .unwrap_or_else(PoisonError::into_inner);
        Ok(wire(&job, &jobs))
    }

    /// Forgets everything of a tenant: when this returns nothing more is stored for it, and none of its prompts are kept.
    pub(crate) fn erase(&self, tenant: &TenantId) -> Result<(), Status> {
        let mut jobs = self.jobs();
        // From here on nobody is shown or given one of them.
        let theirs = jobs.take(tenant);
        theirs.iter().for_each(|job| job.erase());
        let is_running = |jobs: &mut Jobs| theirs.iter().any(|job| jobs.is_running(job));
        let left = self.changed.wait_timeout_while(jobs, LEAVE_WAIT, is_running);
        let (_jobs, _) = left.unwrap_or_else(PoisonError::into_inner);
        for table in [Table::WarmupPrompts, Table::Warmups] {
            let rows = self.control.names(table, &name_of(tenant, ""));
            rows.and_then(|rows| self.control.delete_all(table, &rows)).map_err(|error| unwritten(&error))?;
        }
        Ok(())
    }

    /// The thread that works ends before its next step.
    pub(crate) fn close(&self) {
        self.jobs().closing = true;
        self.changed.notify_all();
    }

    pub(crate) fn totals(&self) -> Totals {
        let jobs = self.jobs();
        let mut totals = Totals { running: u64::from(jobs.running.is_some()), ..Totals::default() };
        for job in jobs.all.values() {
            let record = job.record.borrow();
            if !record.has_ended() {
                totals.queued += u64::from(!jobs.is_running(job));
                totals.tokens_left = totals.tokens_left.saturating_add(record.tokens_left());
            }
        }
        totals
    }

    /// The job to work on next, when there is one; `None` when the node stops.
    fn next(&self) -> Option<Arc<Job>> {
        let jobs = self.jobs();
        let idle = |jobs: &mut Jobs| !jobs.closing && jobs.first().is_none();
        let mut jobs = self.changed.wait_while(jobs, idle).unwrap_or_else(PoisonError::into_inner);
        if jobs.closing {
            return None;
        }
        let job = jobs.first().cloned()?;
        jobs.turn += 1;
        let turn = jobs.turn;
        jobs.turns.insert(job.tenant.clone(), turn);
        jobs.running = Some(Arc::clone(&job));
        // Whoever watches learns that it runs.
        job.record.send_modify(|_| {});
        Some(job)
    }

    /// Whether whoever works on `job` has to leave it to something more urgent, or for good.
    fn leaves(&self, job: &Job) -> bool {
        let jobs = self.jobs();
        let priority = job.record.borrow().priority;
        jobs.closing || jobs.waiting().any(|other| other.record.borrow().priority > priority)
    }

    /// The thread is done with a job for now.
    fn finish(&self, job: &Arc<Job>, turn: Turn) {
        let mut jobs = self.jobs();
        jobs.running = None;
        match turn {
            // Its rows are gone, or go.
            _ if job.is_erased() => {}
            Turn::Ended(stage, reason) => {
                if let Err(error) = self.end(job, stage, reason) {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the end of a warm-up was not written down"
                    );
                }
            }
            Turn::Left => job.record.send_modify(|_| {}),
            Turn::Erased => {
                if let Err(error) = self.forget(&mut jobs, job) {
                    tracing::error!(%error, "a warm-up of an erased tenant goes at the next start");
                }
            }
        }
        self.changed.notify_all();
    }

    /// Durable before anyone sees it.
    fn end(&self, job: &Job, stage: Stage, reason: String) -> anyhow::Result<()> {
        let name = name_of(&job.tenant, &job.name);
        let written = self.update(job, |record| (record.stage, record.reason) = (stage, reason.clone()));
        if written.is_err() {
            // Not worked on again in this process all the same.
            job.record.send_modify(|record| (record.stage, record.reason) = (stage, reason));
            return written;
        }
        self.control.delete(Table::WarmupPrompts, &name)
    }

    /// Changes a record, durably. Of one that was erased nothing is written any more.
    fn update(&self, job: &Job, change: impl FnOnce(&mut Record)) -> anyhow::Result<()> {
        if job.is_erased() {
            return Ok(());
        }
        let mut record = job.now();
        change(&mut record);
        self.control.put(Table::Warmups, &name_of(&job.tenant, &job.name), &record)?;
        job.record.send_replace(record);
        Ok(())
    }

    fn prompts(&self, job: &Job) -> anyhow::Result<Kept> {
        self.prompts.read(&name_of(&job.tenant, &job.name))
    }

    fn measured(&self, tokens: usize, compute: Duration) {
        let mut jobs = self.jobs();
        jobs.us_per_token = run::smooth(jobs.us_per_token, tokens, compute);
    }

    /// Makes room for one more record.
    fn forget_old(&self, node: &Node, jobs: &mut Jobs, tenant: &TenantId) -> Result<(), Status> {
        while jobs.of(tenant).count() >= MAX_JOBS {
            let ended = jobs.of(tenant).filter(|job| job.record.borrow().has_ended());
            let Some(oldest) = ended.min_by_key(|job| job.record.borrow().number).cloned() else {
                let limit = MAX_JOBS as u64;
                return Err(node.tenants.over(tenant, "unfinished_warmups", limit, limit, 60_000));
            };
            self.forget(jobs, &oldest)?;
        }
        Ok(())
    }

    fn forget(&self, jobs: &mut Jobs, job: &Job) -> Result<(), Status> {
        drop_rows(&self.control, jobs, job).map_err(|error| unwritten(&error))
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    fn of<'a>(&'a self, tenant: &TenantId) -> impl Iterator<Item = &'a Arc<Job>> + use<'a> {
        let tenant = tenant.clone();
        let from = (tenant.clone(), String::new());
        self.all.range(from..).take_while(move |((owner, _), _)| *owner == tenant).map(|(_, job)| job)
    }

    /// All of a tenant, which are there no more.
    fn take(&mut self, tenant: &TenantId) -> Vec<Arc<Job>> {
        let theirs: Vec<Arc<Job>> = self.of(tenant).cloned().collect();
        for job in &theirs {
            self.all.remove(&(job.tenant.clone(), job.name.clone()));
        }
        theirs
    }

    fn waiting(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.all.values().filter(|job| !job.record.borrow().has_ended() && !job.is_cancelled())
    }

    /// The most urgent; among equals of the tenant that has waited longest, its oldest.
    fn first(&self) -> Option<&Arc<Job>> {
        self.waiting().min_by_key(|job| {
            let record = job.record.borrow();
            let turn = self.turns.get(&job.tenant).copied().unwrap_or(0);
            (std::cmp::Reverse(record.priority), turn, record.number)
        })
    }

    fn is_running(&self, job: &Arc<Job>) -> bool {
        self.running.as_ref().is_some_and(|running| Arc::ptr_eq(running, job))
    }
}

fn wire(job: &Arc<Job>, jobs: &Jobs) -> v1::WarmupJob {
    job.record.borrow().wire(&job.name, jobs.is_running(job), jobs.us_per_token)
}

/// '/' is in no tenant's name, so no job of one tenant is another's.
fn name_of(tenant: &TenantId, name: &str) -> String {
    format!("{tenant}/{name}")
}

/// The prompts first: they are not to stay without a job.
fn drop_rows(control: &Control, jobs: &mut Jobs, job: &Job) -> anyhow::Result<()> {
    let name = name_of(&job.tenant, &job.name);
    control.delete(Table::WarmupPrompts, &name)?;
    control.delete(Table::Warmups, &name)?;
    jobs.all.remove(&(job.tenant.clone(), job.name.clone()));
    Ok(())
}

fn key_of(row: &str) -> Option<Key> {
    let (tenant, name) = row.split_once('/')?;
    Some((TenantId(tenant.to_owned()), name.to_owned()))
}

fn unknown(name: &str) -> Status {
    Status::not_found(format!("there is no warm-up job {name:?}"))
}

fn unwritten(error: &anyhow::Error) -> Status {
    tracing::error!(error = format!("{error:#}"), "warm-up jobs cannot be read or written");
    Status::unavailable("the node cannot read or write its warm-up jobs; its log says why")
}

/// A job whose progress cannot be written down stands still.
fn record_error(error: &anyhow::Error) -> Turn {
    Turn::Ended(Stage::Failed, format!("{error:#}"))
}

#[cfg(test)]
mod tests;
