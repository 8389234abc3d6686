//! `PrefixCache.Settle`: closes the account of one request. And its other end: grants that nobody settled.
//!
//! What a caller says is held against what its grant offered and delivered. Its tenant, the scope that answered, the time and the
//! id are the node's to say; no field of the request can.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use esker_prefix::NamespaceId;
use esker_proto::v1;
use esker_proto::{MAX_NAME_BYTES, MAX_PROMPT_TOKENS, check_name, check_namespace_id};
use esker_store::MissKind;
use tonic::Status;

use super::cache::{blocking, layout};
use super::fetch::granted;
use super::status::{from_ledger, from_wire};
use crate::audit::Event;
use crate::grant::{GrantId, Granted};
use crate::ledger::{Closed, LedgerError, content, content_of, is_reserved, sums};
use crate::node::Node;
use crate::principal::{Principal, TenantId};
use crate::usage::PromptAccount;

/// Expired grants that were never fetched from and get a record of their own in one round; more are counted together.
const OWN_RECORDS: usize = 100;

/// A request that adds up, and the grant that it is about.
struct Checked {
    record: v1::UsageRecord,
    grant: Option<(GrantId, Arc<Granted>)>,
}

/// A name that a caller may give a request.
pub(super) fn check_request_id(request_id: &str) -> Result<(), Status> {
    check_name("request_id", request_id).map_err(from_wire)?;
    if is_reserved(request_id) {
        return Err(Status::invalid_argument(format!(
            "request_id {request_id:?} begins as the node's own do: use another name"
        )));
    }
    Ok(())
}

/// Closes an account, once.
pub(super) async fn settle(
    node: &Arc<Node>,
    principal: &Principal,
    request: v1::SettleRequest,
) -> Result<v1::SettleReply, Status> {
    check_request_id(&request.request_id)?;
    let content = content_of(&request);
    let closed = match check(node, principal, &request, content) {
        Ok(checked) => close(node, checked).await,
        // A replay finds its grant gone; it is answered as the first time.
        Err(refused) => match node.ledger.find(&principal.tenant.0, &request.request_id, content).await {
            Ok(Some(closed)) => Ok(closed),
            Ok(None) => return Err(refused),
            Err(error) => Err(error),
        },
    };
    match closed {
        Ok(Closed { record, .. }) => Ok(reply(&record)),
        Err(error) => {
            if matches!(error, LedgerError::Conflict { .. }) {
                audit_conflict(node, principal, &request.request_id).await;
            }
            Err(from_ledger(&error))
        }
    }
}

/// Writes down that a used request id came with something else.
pub(crate) async fn audit_conflict(node: &Arc<Node>, principal: &Principal, request_id: &str) {
    let event = Event::new(principal, "settle", request_id, "conflict");
    let node = Arc::clone(node);
    // The log flushes; its failure is its own to report.
    let _ = blocking(move || {
        node.audit.record(&event);
        Ok(())
    })
    .await;
}

async fn close(node: &Node, checked: Checked) -> Result<Closed, LedgerError> {
    let Checked { record, grant } = checked;
    let tenant = TenantId(record.tenant.clone());
    let closed = node.ledger.close(record).await;
    if let Ok(Closed { record, replayed: false }) = &closed
        && record.complete
    {
        node.history.prompt(record.prompt_tokens, record.hit_tokens, None);
    }
    if let Some((id, granted)) = grant {
        match &closed {
            // Gone already if it has expired meanwhile, claimed as it is.
            Ok(_) => drop(node.grants.take(&id, &tenant, Instant::now())),
            Err(_) => granted.unclaim(),
        }
    }
    closed
}

fn check(
    node: &Node,
    principal: &Principal,
    request: &v1::SettleRequest,
    content: [u8; 16],
) -> Result<Checked, Status> {
    let mut record = account(&principal.tenant, request, content)?;
    let grant = if request.grant.is_empty() {
        let namespace = without_grant(&mut record, request)?;
        layout(node, namespace)?;
        None
    } else {
        let granted = granted(node, &principal.tenant, &request.grant)?;
        check_grant(&mut record, request, &granted)?;
        let id = request.grant.as_ref().try_into().map_err(|_| Status::internal("a grant has 16 bytes"))?;
        Some((id, granted))
    };
    check_sums(&record)?;
    // Last: whoever claims must go on to close.
    if let Some((_, granted)) = &grant {
        granted.claim(&request.request_id).map_err(|other| {
            Status::failed_precondition(format!("this grant is settled already, by request {other:?}"))
        })?;
    }
    Ok(Checked { record, grant })
}

/// What a request says, before anything is held against it.
fn account(
    tenant: &TenantId,
    request: &v1::SettleRequest,
    content: [u8; 16],
) -> Result<v1::UsageRecord, Status> {
    if request.model.len() > MAX_NAME_BYTES {
        return Err(Status::invalid_argument(format!("model is limited to {MAX_NAME_BYTES} bytes")));
    }
    let writes = request.write_tokens.unwrap_or_default();
    let mut record = v1::UsageRecord {
        tenant: tenant.0.clone(),
        request_id: request.request_id.clone(),
        op: "fetch".into(),
        model: request.model.clone(),
        prompt_tokens: request.prompt_tokens,
        hit_tokens: request.used_hit_tokens,
        miss_tokens: request.computed_tokens,
        write_tokens: Some(writes),
        content: Bytes::copy_from_slice(&content),
        scope: "private".into(),
        complete: true,
        ..Default::default()
    };
    (record.status, record.complete) = match request.status() {
        v1::SettleStatus::Unspecified | v1::SettleStatus::Ok => ("ok".into(), true),
        v1::SettleStatus::Cancelled => ("cancelled".into(), true),
        v1::SettleStatus::Failed => ("failed".into(), false),
    };
    if !record.complete {
        record.reason = "the caller says that it failed".into();
    }
    Ok(record)
}

/// Completes the account of a request that had nothing granted; the namespace that it names.
fn without_grant(record: &mut v1::UsageRecord, request: &v1::SettleRequest) -> Result<NamespaceId, Status> {
    if request.used_hit_tokens != 0 {
        return Err(Status::invalid_argument("used_hit_tokens without a grant: nothing can have been used"));
    }
    let namespace = check_namespace_id(&request.namespace).map_err(from_wire)?;
    record.namespace = Bytes::copy_from_slice(namespace.as_bytes());
    record.miss_reason = "absent".into();
    Ok(namespace)
}

/// Holds a request against its grant.
fn check_grant(
    record: &mut v1::UsageRecord,
    request: &v1::SettleRequest,
    granted: &Granted,
) -> Result<(), Status> {
    let answer = &granted.answer;
    if !request.namespace.is_empty() && request.namespace != granted.namespace.as_bytes()[..] {
        return Err(Status::invalid_argument("namespace is not that of the grant"));
    }
    let offer = Offer {
        prompt_tokens: answer.prompt_tokens,
        prompt_given: answer.prompt_given,
        best: answer.best_credit(),
        is_resumable: &|tokens| answer.is_creditable(tokens),
        delivered: granted.delivered_tokens(),
        missed: granted.missed(),
    };
    record.grant = request.grant.clone();
    record.namespace = Bytes::copy_from_slice(granted.namespace.as_bytes());
    record.scope = granted.scope.into();
    record.started_unix_ms = granted.started_unix_ms;
    record.bytes_served = granted.delivered_bytes();
    hold(record, &offer)
}

/// What a grant offered, and what of it reached the caller.
struct Offer<'a> {
    prompt_tokens: u64,
    prompt_given: bool,
    best: u64,
    is_resumable: &'a dyn Fn(u64) -> bool,
    delivered: u64,
    missed: Option<MissKind>,
}

/// Whether what a record claims was offered and delivered. Pure.
fn hold(record: &mut v1::UsageRecord, offer: &Offer<'_>) -> Result<(), Status> {
    if record.prompt_tokens == 0 {
        record.prompt_tokens = offer.prompt_tokens;
    } else if offer.prompt_given && record.prompt_tokens != offer.prompt_tokens {
        return Err(Status::invalid_argument(format!(
            "prompt_tokens is {}, but the prompt that was looked up has {}",
            record.prompt_tokens, offer.prompt_tokens
        )));
    }
    let used = record.hit_tokens;
    if used != 0 && !(offer.is_resumable)(used) {
        return Err(Status::invalid_argument(format!(
            "used_hit_tokens is {used}, which is no resume point of this grant; its best is {}",
            offer.best
        )));
    }
    let delivered = offer.delivered;
    if used > delivered {
        return Err(Status::invalid_argument(format!(
            "used_hit_tokens is {used}, but only {delivered} tokens were delivered whole under this grant"
        )));
    }
    record.miss_reason = match offer.missed {
        Some(why) if used < offer.best && why != MissKind::Absent => {
            // Our fault: a plain miss, and what was lost and is written again is not charged.
            record.fault = true;
            record.write_tokens = None;
            miss_reason(why).into()
        }
        _ => "absent".into(),
    };
    Ok(())
}

fn check_sums(record: &v1::UsageRecord) -> Result<(), Status> {
    let v1::UsageRecord { prompt_tokens: prompt, hit_tokens: used, miss_tokens: computed, .. } = *record;
    if prompt == 0 || prompt > MAX_PROMPT_TOKENS as u64 {
        return Err(Status::invalid_argument(format!(
            "prompt_tokens must be 1 to {MAX_PROMPT_TOKENS}, got {prompt}"
        )));
    }
    if used.checked_add(computed) != Some(prompt) {
        return Err(Status::invalid_argument(format!(
            "used_hit_tokens {used} and computed_tokens {computed} must add up to prompt_tokens {prompt}"
        )));
    }
    if used >= prompt {
        return Err(Status::invalid_argument(
            "a hit is shorter than its prompt: the last token is always computed",
        ));
    }
    if PromptAccount::of(record).is_none() {
        let written = sums::written(&record.write_tokens.unwrap_or_default());
        return Err(Status::invalid_argument(format!(
            "write_tokens are {written} together, more than the {computed} tokens that were computed"
        )));
    }
    Ok(())
}

/// The reason in a usage record: coarse, and the same for everything that is damaged.
pub(crate) fn miss_reason(why: MissKind) -> &'static str {
    match why {
        MissKind::Absent => "absent",
        MissKind::Deadline | MissKind::Unavailable => "overload",
        MissKind::ReadError => "io",
        _ => "corrupt",
    }
}

fn reply(record: &v1::UsageRecord) -> v1::SettleReply {
    let usage = PromptAccount::of(record).map(|account| account.wire());
    v1::SettleReply { usage_id: record.usage_id.clone(), usage }
}

/// Closes grants that expired without an account, as unused.
pub(crate) fn close_unsettled(node: &Node, expired: &[(GrantId, Arc<Granted>)]) {
    let mut together: HashMap<(TenantId, NamespaceId), u64> = HashMap::new();
    let mut own = 0;
    let mut unwritten = 0_u64;
    let mut close = |record| unwritten += u64::from(node.ledger.close_blocking(record).is_err());
    for (id, granted) in expired.iter().filter(|(_, granted)| !granted.is_claimed()) {
        if granted.delivered_bytes() == 0 {
            own += 1;
            if own > OWN_RECORDS {
                *together.entry((granted.tenant.clone(), granted.namespace)).or_default() += 1;
                continue;
            }
        }
        let prompt_tokens = granted.answer.prompt_tokens;
        close(v1::UsageRecord {
            request_id: format!("grant/{}", hex(id)),
            grant: Bytes::copy_from_slice(id),
            scope: granted.scope.into(),
            started_unix_ms: granted.started_unix_ms,
            prompt_tokens,
            miss_tokens: prompt_tokens,
            bytes_served: granted.delivered_bytes(),
            content: Bytes::copy_from_slice(&content(id)),
            ..unsettled(&granted.tenant, granted.namespace)
        });
    }
    for ((tenant, namespace), count) in together {
        // Named by one of them, so that the fact has one id.
        let first = expired.iter().rev().find(|(_, granted)| {
            granted.tenant == tenant && granted.namespace == namespace && granted.delivered_bytes() == 0
        });
        let Some((id, _)) = first else { continue };
        close(v1::UsageRecord {
            request_id: format!("grants/{}", hex(id)),
            scope: "private".into(),
            count,
            content: Bytes::copy_from_slice(&content(id)),
            ..unsettled(&tenant, namespace)
        });
    }
    if unwritten > 0 {
        tracing::warn!(grants = unwritten, "grants that nobody settled were closed without a record");
    }
}

fn unsettled(tenant: &TenantId, namespace: NamespaceId) -> v1::UsageRecord {
    v1::UsageRecord {
        tenant: tenant.0.clone(),
        op: "unsettled".into(),
        namespace: Bytes::copy_from_slice(namespace.as_bytes()),
        status: "ok".into(),
        complete: false,
        reason: "unsettled".into(),
        ..Default::default()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// For fuzzing: the account of a request. Whether it adds up, without a grant or under one of 7 blocks of 128 tokens, of which 5 were
/// delivered.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use prost::Message;
    let Ok(request) = v1::SettleRequest::decode(bytes) else { return false };
    let offer = Offer {
        prompt_tokens: 1000,
        prompt_given: request.model.is_empty(),
        best: 7 * 128,
        is_resumable: &|tokens| tokens <= 7 * 128 && tokens.is_multiple_of(128),
        delivered: 5 * 128,
        missed: Some(MissKind::ReadError).filter(|_| request.namespace.is_empty()),
    };
    let adds_up = || -> Result<v1::UsageRecord, Status> {
        check_request_id(&request.request_id)?;
        let mut record = account(&TenantId("acme".into()), &request, content_of(&request))?;
        match request.grant.is_empty() {
            true => without_grant(&mut record, &request).map(drop)?,
            false => hold(&mut record, &offer)?,
        }
        check_sums(&record).map(|()| record)
    };
    let Ok(record) = adds_up() else { return false };
    let (prompt, hit) = (record.prompt_tokens, record.hit_tokens);
    assert!(hit < prompt && hit + record.miss_tokens == prompt && prompt <= MAX_PROMPT_TOKENS as u64);
    assert!(hit == 0 || !request.grant.is_empty() && hit <= offer.delivered && hit.is_multiple_of(128));
    assert!(sums::written(&record.write_tokens.unwrap_or_default()) <= record.miss_tokens);
    assert!(!is_reserved(&record.request_id) && reply(&record).usage.is_some());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }
    }

    /// Every request that is taken keeps what a bill rests on, whatever callers claim; and honest ones are taken.
    #[test]
    fn a_million_claims_and_no_violation() {
        let seed = 0x5e77_1e00_0000_0001_u64;
        println!("SEED={seed:#x}");
        let mut random = Random(seed);
        let (mut taken, mut refused, mut honest_taken, mut honest) = (0_u64, 0_u64, 0_u64, 0_u64);
        for _ in 0..1_000_000 {
            let prompt_tokens = 1 + random.below(4000);
            // Off the block grid there is one point, the best.
            let end = random.below(prompt_tokens);
            let best = if random.below(2) == 0 { end } else { end / 128 * 128 };
            let delivered = if random.below(2) == 0 { best } else { random.below(best + 1) / 128 * 128 };
            let missed = (random.below(10) == 0).then_some(MissKind::PlaneChecksum);
            let is_resumable =
                |tokens: u64| tokens > 0 && tokens <= best && (tokens == best || tokens.is_multiple_of(128));
            let offer = Offer {
                prompt_tokens,
                prompt_given: random.below(2) == 0,
                best,
                is_resumable: &is_resumable,
                delivered,
                missed,
            };
            let is_honest = random.below(2) == 0;
            let lie = |random: &mut Random, truth: u64| match random.below(4) {
                0 => truth.wrapping_add(random.below(3)).wrapping_sub(1),
                1 => random.below(6000),
                2 => u64::MAX - random.below(2),
                _ => truth,
            };
            let truth = match random.below(2) == 0 && delivered == best {
                true => best,
                false => random.below(delivered + 1) / 128 * 128,
            };
            let (prompt, used, computed, written) = if is_honest {
                let computed = prompt_tokens - truth;
                (prompt_tokens, truth, computed, random.below(computed + 1))
            } else {
                let used = lie(&mut random, truth);
                let prompt = lie(&mut random, prompt_tokens);
                let computed = lie(&mut random, prompt.wrapping_sub(used));
                (prompt, used, computed, lie(&mut random, computed))
            };
            let mut record = v1::UsageRecord {
                prompt_tokens: prompt,
                hit_tokens: used,
                miss_tokens: computed,
                write_tokens: Some(v1::WriteTokens { ttl_1h: written, ..Default::default() }),
                ..Default::default()
            };
            let result = hold(&mut record, &offer).and_then(|()| check_sums(&record));
            honest += u64::from(is_honest);
            if result.is_err() {
                refused += 1;
                continue;
            }
            taken += 1;
            honest_taken += u64::from(is_honest);
            let v1::UsageRecord { prompt_tokens: prompt, hit_tokens: hit, miss_tokens: miss, .. } = record;
            assert_eq!(hit + miss, prompt);
            assert!(hit < prompt && hit <= delivered && (hit == 0 || is_resumable(hit)));
            assert!(!offer.prompt_given || prompt == prompt_tokens);
            let shortened = missed.is_some() && hit < best;
            assert_eq!(record.fault, shortened);
            assert!(!record.fault || record.write_tokens.is_none(), "our fault is not charged for writes");
            let wire = PromptAccount::of(&record).unwrap().wire();
            assert_eq!(
                wire.input_tokens + wire.cache_read_input_tokens + wire.cache_creation_input_tokens,
                prompt
            );
        }
        assert_eq!(honest_taken, honest, "an honest claim was refused");
        assert!(
            refused > 100_000 && taken > honest,
            "taken {taken}, refused {refused}: lies of both kinds are needed"
        );
    }
}
