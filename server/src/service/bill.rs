//! `Generate` on the billing ledger: opened before anything is computed, closed before the last message.
//!
//! A request id that comes again with the same request is served again and counts once: it is answered with what was billed.

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use esker_proto::v1;
use esker_store::MissKind;
use tonic::Status;

use super::settle::{audit_conflict, check_request_id, miss_reason};
use super::status::from_ledger;
use crate::generate::{Account, Event, GenerateError};
use crate::ledger::{LedgerError, content_of};
use crate::node::{Engine, Node};
use crate::principal::Principal;

/// The account of a generation, open.
pub(super) struct Bill {
    record: v1::UsageRecord,
    ttl: v1::TtlClass,
    /// What was billed when this request came before.
    before: Option<v1::UsageRecord>,
}

/// What a generation has come to, for the case that it ends early.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    prompt_tokens: usize,
    /// Once the prompt is computed.
    hit_tokens: Option<usize>,
    lost: Option<MissKind>,
    completion_tokens: u64,
    raw_bytes: u64,
}

impl Served {
    pub(super) fn of(prompt_tokens: usize) -> Self {
        Self { prompt_tokens, ..Self::default() }
    }

    pub(super) fn and(self, event: &Event) -> Self {
        match event {
            Event::Prompt { hit_tokens, lost, .. } => {
                Self { hit_tokens: Some(*hit_tokens), lost: *lost, ..self }
            }
            Event::Token { raw_bytes, .. } => {
                Self { completion_tokens: self.completion_tokens + 1, raw_bytes: *raw_bytes, ..self }
            }
            _ => self,
        }
    }
}

impl Bill {
    /// Nothing is computed that could not be billed, nor twice under one name for different requests.
    pub(super) async fn open(
        node: &Arc<Node>,
        principal: &Principal,
        request: &v1::GenerateRequest,
    ) -> Result<Self, Status> {
        node.ledger.admit().map_err(|error| from_ledger(&error))?;
        let named = !request.request_id.is_empty();
        if named {
            check_request_id(&request.request_id)?;
        }
        let request_id = if named { request.request_id.clone() } else { own_request_id() };
        let content = content_of(request);
        let tenant = principal.tenant.0.clone();
        let before = if named {
            match node.ledger.find(&tenant, &request_id, content).await {
                Ok(closed) => closed.map(|closed| closed.record),
                Err(error) => {
                    if matches!(error, LedgerError::Conflict { .. }) {
                        audit_conflict(node, principal, &request_id).await;
                    }
                    return Err(from_ledger(&error));
                }
            }
        } else {
            None
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = v1::UsageRecord {
            tenant,
            request_id,
            op: "generate".into(),
            started_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            scope: "private".into(),
            content: Bytes::copy_from_slice(&content),
            ..Default::default()
        };
        Ok(Self { record, ttl: request.ttl(), before })
    }

    /// Closes it, durably, and gives what is billed. May wait for the disk.
    pub(super) fn close(
        &self,
        node: &Node,
        engine: &Engine,
        account: &Account,
    ) -> Result<v1::UsageRecord, Status> {
        if let Some(before) = &self.before {
            return Ok(before.clone());
        }
        let (prompt, hit) = (account.prompt_tokens as u64, account.hit_tokens as u64);
        let written = account.write_tokens.min(prompt - hit);
        self.write(
            node,
            engine,
            v1::UsageRecord {
                prompt_tokens: prompt,
                hit_tokens: hit,
                miss_tokens: prompt - hit,
                // A miss through this node's fault is a plain one: what is written again is not charged.
                write_tokens: account.lost.is_none().then(|| writes(self.ttl, written)),
                completion_tokens: account.completion_tokens as u64,
                bytes_served: account.raw_bytes,
                status: "ok".into(),
                complete: true,
                fault: account.lost.is_some(),
                miss_reason: account.lost.map_or("absent", miss_reason).into(),
                ..self.record.clone()
            },
        )
    }

    /// Closes one that ended early. If its client left when the prompt was computed, that is billed; all else is not.
    pub(super) fn give_up(&self, node: &Node, engine: &Engine, served: Served, why: &GenerateError) {
        if self.before.is_some() {
            return;
        }
        let prompt_tokens = served.prompt_tokens as u64;
        let cancelled = why.is_cancelled();
        let hit_tokens = served.hit_tokens.filter(|_| cancelled).map(|tokens| tokens as u64);
        let record = v1::UsageRecord {
            // The name stays free: the request may come again, and is billed by it then.
            request_id: own_request_id(),
            prompt_tokens,
            hit_tokens: hit_tokens.unwrap_or(0),
            miss_tokens: prompt_tokens - hit_tokens.unwrap_or(0),
            completion_tokens: hit_tokens.map_or(0, |_| served.completion_tokens),
            complete: hit_tokens.is_some(),
            status: if cancelled { "cancelled" } else { "failed" }.into(),
            reason: if hit_tokens.is_some() {
                ""
            } else {
                "it ended before its prompt was computed, or failed"
            }
            .into(),
            bytes_served: hit_tokens.map_or(0, |_| served.raw_bytes),
            fault: served.lost.is_some(),
            miss_reason: served.lost.map_or("absent", miss_reason).into(),
            ..self.record.clone()
        };
        if let Err(status) = self.write(node, engine, record) {
            tracing::warn!(%status, "a generation that ended early has no usage record");
        }
    }

    fn write(
        &self,
        node: &Node,
        engine: &Engine,
        record: v1::UsageRecord,
    ) -> Result<v1::UsageRecord, Status> {
        let record = v1::UsageRecord {
            model: engine.loaded.name.chars().take(128).collect(),
            namespace: Bytes::copy_from_slice(engine.namespace.as_bytes()),
            ..record
        };
        let closed = node.ledger.close_blocking(record).map_err(|error| from_ledger(&error))?;
        Ok(closed.record)
    }
}

fn writes(ttl: v1::TtlClass, tokens: u64) -> v1::WriteTokens {
    let mut writes = v1::WriteTokens::default();
    match ttl {
        v1::TtlClass::TtlClass5m => writes.ttl_5m = tokens,
        v1::TtlClass::TtlClass1h => writes.ttl_1h = tokens,
        v1::TtlClass::Unspecified | v1::TtlClass::TtlClass24h => writes.ttl_24h = tokens,
        v1::TtlClass::TtlClass72h => writes.ttl_72h = tokens,
    }
    writes
}

/// A name for a request that has none: another one each time, also after a restart.
fn own_request_id() -> String {
    static SEED: OnceLock<[u8; 32]> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let seed = SEED.get_or_init(|| {
        let mut seed = [0; 32];
        let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut seed));
        if read.is_err() {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            seed = *blake3::hash(format!("{} {since:?}", std::process::id()).as_bytes()).as_bytes();
        }
        seed
    });
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("esker-{}", &blake3::keyed_hash(seed, &count.to_le_bytes()).to_hex()[..32])
}
