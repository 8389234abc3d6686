//! The committing thread: takes accounts from the queue, gives each its id and time, and writes all that wait in one flush.
//!
//! While one batch is flushed the next gathers, so the rate of accounts is bounded by their size, not by the drive's flushes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use esker_proto::v1;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};

use super::frame::{self, Parsed};
use super::hooks::Hooks;
use super::index::Known;
use super::log::{Log, Position};
use super::time::LedgerTime;
use super::{Closed, LedgerError, RESERVE_BYTES, Shared, usage_id};

/// Accounts written together at most.
const BATCH: usize = 4096;

/// What is asked of the thread.
pub(crate) enum Ask {
    Close {
        record: Box<v1::UsageRecord>,
        reply: oneshot::Sender<Result<Closed, LedgerError>>,
    },
    Find {
        tenant: String,
        request_id: String,
        content: [u8; 16],
        reply: oneshot::Sender<Result<Option<Closed>, LedgerError>>,
    },
    Tick,
}

type Reply = oneshot::Sender<Result<Closed, LedgerError>>;

/// See the module.
pub(crate) struct Committer {
    log: Log,
    time: LedgerTime,
    cluster: String,
    hooks: Hooks,
    shared: Arc<Shared>,
    publish: watch::Sender<Position>,
    /// The index could not be written: what it counts is behind, so nothing more is taken.
    stuck: bool,
}

/// A new record and those who wait for it: its own caller, and callers of the same request.
struct New {
    record: v1::UsageRecord,
    replies: Vec<Reply>,
}

impl Committer {
    pub(crate) fn new(
        log: Log,
        time: LedgerTime,
        cluster: &str,
        hooks: Hooks,
        shared: Arc<Shared>,
        publish: watch::Sender<Position>,
    ) -> Self {
        let committer = Self { log, time, cluster: cluster.to_owned(), hooks, shared, publish, stuck: false };
        committer.tell_room();
        committer
    }

    /// Works until nobody can ask any more.
    pub(crate) fn run(mut self, mut asks: mpsc::Receiver<Ask>) {
        while let Some(first) = asks.blocking_recv() {
            let mut new = Vec::new();
            let mut names = HashMap::new();
            self.take(first, &mut new, &mut names);
            while new.len() < BATCH
                && let Ok(ask) = asks.try_recv()
            {
                self.take(ask, &mut new, &mut names);
            }
            self.commit(new);
        }
        self.log.sync_head();
        if let Err(error) = self.shared.index().flush() {
            tracing::warn!(%error, "the ledger's index was not flushed; it is caught up at the next start");
        }
    }

    /// Answers what needs no writing; puts the rest into the batch.
    fn take(&mut self, ask: Ask, new: &mut Vec<New>, names: &mut HashMap<(String, String), usize>) {
        match ask {
            Ask::Tick => {
                self.log.prepare();
                self.log.sync_head();
                self.tell_room();
            }
            Ask::Find { tenant, request_id, content, reply } => {
                let found = match names.get(&(tenant.clone(), request_id.clone())) {
                    // Not durable yet: it is asked again as if it came a moment later.
                    Some(&at) => same(&new[at].record, &content).map(|()| None),
                    None => self.known(&tenant, &request_id, &content),
                };
                self.count_conflict(found.as_ref().err());
                // Whoever asked may have left.
                let _ = reply.send(found);
            }
            Ask::Close { mut record, reply } => {
                if self.stuck {
                    let _ = reply.send(Err(LedgerError::Failed));
                    return;
                }
                let name = (record.tenant.clone(), record.request_id.clone());
                let content = record.content.get(..16).and_then(|content| content.try_into().ok());
                let content: [u8; 16] = content.unwrap_or_default();
                if self.hooks.dedupes() {
                    if let Some(&at) = names.get(&name) {
                        match same(&new[at].record, &content) {
                            Ok(()) => new[at].replies.push(reply),
                            Err(error) => self.refuse(reply, error),
                        }
                        return;
                    }
                    match self.known(&name.0, &name.1, &content) {
                        Ok(None) => {}
                        Ok(Some(closed)) => {
                            self.shared.counters.replays.fetch_add(1, Ordering::Relaxed);
                            let _ = reply.send(Ok(closed));
                            return;
                        }
                        Err(error) => return self.refuse(reply, error),
                    }
                }
                let stamp = self.time.now();
                record.usage_id = usage_id(&self.cluster, &record.tenant, &record.request_id, &record.op);
                record.sequence = 0;
                record.time_unix_ms = stamp.unix_ms;
                record.clock_skewed = stamp.skewed;
                if record.started_unix_ms == 0 {
                    record.started_unix_ms = stamp.unix_ms;
                }
                names.insert(name, new.len());
                new.push(New { record: *record, replies: vec![reply] });
            }
        }
    }

    fn commit(&mut self, mut new: Vec<New>) {
        if new.is_empty() {
            return;
        }
        let payloads: Vec<Vec<u8>> = new.iter().map(|new| new.record.encode_to_vec()).collect();
        let (places, error) = self.log.append(&payloads);
        self.shared.counters.flushes.fetch_add(1, Ordering::Relaxed);
        let refused = new.split_off(places.len());
        if !places.is_empty() {
            self.note(&mut new, &places);
        }
        for (at, new) in new.into_iter().enumerate() {
            let record = v1::UsageRecord { sequence: places[at].sequence, ..new.record };
            for (turn, reply) in new.replies.into_iter().enumerate() {
                let replayed = turn > 0;
                self.shared.counters.replays.fetch_add(u64::from(replayed), Ordering::Relaxed);
                // Whoever asked may have left; the record stands.
                let _ = reply.send(Ok(Closed { record: record.clone(), replayed }));
            }
        }
        if let Some(error) = error {
            for reply in refused.into_iter().flat_map(|new| new.replies) {
                self.refuse(reply, error.clone());
            }
        }
        self.tell_room();
    }

    /// After the flush: head, index, counters, and those who follow the end.
    fn note(&mut self, new: &mut [New], places: &[super::log::Place]) {
        self.log.note(self.time.now().unix_ms, self.time.since_boot());
        // Dying is all that a test does here: an error would have nobody to go to.
        let _ = self.hooks.at("ledger.noted");
        let end = self.log.position();
        let records = new.iter().map(|new| &new.record).zip(places.iter().copied());
        if let Err(error) = self.shared.index().apply(records, &end) {
            self.stuck = true;
            self.shared.failed.store(true, Ordering::Release);
            tracing::error!(
                %error,
                "the ledger's index could not be written: billable work stops until the node is started again"
            );
        }
        let _ = self.hooks.at("ledger.indexed");
        new.iter().for_each(|new| self.shared.counters.count(&new.record));
        self.publish.send_replace(end);
    }

    /// The record of a request, from the disk.
    fn known(
        &self,
        tenant: &str,
        request_id: &str,
        content: &[u8; 16],
    ) -> Result<Option<Closed>, LedgerError> {
        let found = self.shared.index().find(tenant, request_id);
        let Some(known) = found.map_err(|error| LedgerError::Index(error.to_string()))? else {
            return Ok(None);
        };
        let Known { content: before, segment, offset } = known;
        if before != *content {
            return Err(LedgerError::Conflict { request_id: request_id.to_owned() });
        }
        let damaged = |reason: &dyn std::fmt::Display| LedgerError::Damaged { reason: reason.to_string() };
        let bytes = self.log.read(segment, offset).map_err(|error| damaged(&error))?;
        let found = match frame::parse(&bytes) {
            Parsed::Frame(found) => found,
            Parsed::Blank => return Err(damaged(&"nothing where it was")),
            Parsed::Bad(reason) => return Err(damaged(&reason)),
        };
        let record = v1::UsageRecord::decode(found.payload).map_err(|error| damaged(&error))?;
        if record.tenant != tenant || record.request_id != request_id {
            return Err(damaged(&"another record stands in its place"));
        }
        let record = v1::UsageRecord { sequence: found.sequence, ..record };
        Ok(Some(Closed { record, replayed: true }))
    }

    fn refuse(&self, reply: Reply, error: LedgerError) {
        self.count_conflict(Some(&error));
        self.shared.counters.refused.fetch_add(1, Ordering::Relaxed);
        let _ = reply.send(Err(error));
    }

    fn count_conflict(&self, error: Option<&LedgerError>) {
        if matches!(error, Some(LedgerError::Conflict { .. })) {
            self.shared.counters.conflicts.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell_room(&self) {
        let reserve = RESERVE_BYTES.min(self.log.segment_bytes() / 4);
        self.shared.room.store(self.log.room_bytes() > reserve, Ordering::Release);
        self.shared.failed.store(self.stuck || self.log.has_failed(), Ordering::Release);
        self.shared.counters.disk_bytes.store(self.log.disk_bytes(), Ordering::Relaxed);
    }
}

/// Whether a request is the one that a record is of.
fn same(record: &v1::UsageRecord, content: &[u8; 16]) -> Result<(), LedgerError> {
    if record.content[..] == content[..] {
        Ok(())
    } else {
        Err(LedgerError::Conflict { request_id: record.request_id.clone() })
    }
}
