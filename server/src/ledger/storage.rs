//! Byte-seconds: how much each tenant stores and pins, sampled, summed by UTC hour, and closed into one record for each hour.
//!
//! A record states the whole hour, so sending it again overwrites and never adds. A sample counts for the time since the one
//! before it, split where an hour ends; time in which the node did not run counts for nobody. Nor does time in which the machine
//! sleeps: `Instant` stands still meanwhile. Behind more than [`MAX_SKEW_S`] of sleep the wall clock is far off, and hours are those
//! of the machine's own count until the node starts again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use esker_prefix::ScopeTag;
use esker_proto::v1;

use super::index::ByteSeconds;
use super::sums::{Account, HOUR_S};
use super::{Ledger, LedgerError, content};
use crate::node::Node;

/// Between two samples.
const SAMPLE: Duration = Duration::from_secs(10);
/// A longer pause than this is one in which the node did not run.
const MAX_SAMPLE_S: u64 = 60;
/// How far the wall clock may stand off before it is not believed.
const MAX_SKEW_S: u64 = 5 * 60;
/// Records closed in one go.
const MAX_CLOSED: usize = 1000;

/// Who is sampled when.
#[derive(Default)]
pub(crate) struct Sampler(Mutex<Option<(Instant, u64)>>);

/// What someone holds at the moment of a sample.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Holder {
    pub(crate) tenant: String,
    pub(crate) namespace: Vec<u8>,
    pub(crate) scope: &'static str,
}

impl Sampler {
    /// Samples if it is time to, and closes the hours that have ended. May wait for the disk.
    pub(crate) fn tick(&self, node: &Node) {
        let now = Instant::now();
        let mut now_unix_s = unix_s();
        let mut counted_to = now;
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match *last {
            Some((at, _)) if now.duration_since(at) < SAMPLE => return,
            Some((at, since_unix_s)) => {
                let passed_s = now.duration_since(at).as_secs();
                // What is left of a second counts next time.
                counted_to = at + Duration::from_secs(passed_s);
                now_unix_s = follow(since_unix_s.saturating_add(passed_s), since_unix_s, now_unix_s);
                if passed_s <= MAX_SAMPLE_S {
                    let held = held(node);
                    node.ledger.add_byte_seconds(&spread(&held, since_unix_s, passed_s));
                }
            }
            None => {}
        }
        *last = Some((counted_to, now_unix_s));
        drop(last);
        close_hours(&node.ledger, now_unix_s);
    }
}

/// What time it is, when it should be `expected_s` by the machine's own count. A wall clock that is far off is not followed, and
/// time never runs backwards: an hour that was closed gets nothing more. As the records' own time does (time.rs).
fn follow(expected_s: u64, since_s: u64, wall_s: u64) -> u64 {
    if expected_s.abs_diff(wall_s) > MAX_SKEW_S { expected_s } else { wall_s.max(since_s) }
}

/// The byte-seconds of a span of time, by the hours that it lies in.
fn spread(
    held: &HashMap<Holder, (u64, u64)>,
    since_unix_s: u64,
    passed_s: u64,
) -> Vec<(Account, ByteSeconds)> {
    let end = since_unix_s.saturating_add(passed_s);
    let mut parts = Vec::new();
    let mut at = since_unix_s;
    while at < end {
        let hour_unix_s = at / HOUR_S * HOUR_S;
        let until = end.min(hour_unix_s + HOUR_S);
        parts.extend(held.iter().map(|(holder, (stored, pinned))| {
            let Holder { tenant, namespace, scope } = holder.clone();
            let account = Account { hour_unix_s, tenant, namespace, scope: scope.into() };
            let seconds = until - at;
            let (stored, pinned) = (stored.saturating_mul(seconds), pinned.saturating_mul(seconds));
            (account, ByteSeconds { stored, pinned })
        }));
        at = until;
    }
    parts
}

/// One record for each account of an hour that has ended. The name of the fact is in its request id: after a crash half-way it
/// is the same record again.
pub(crate) fn close_hours(ledger: &Ledger, now_unix_s: u64) {
    let this_hour = now_unix_s / HOUR_S * HOUR_S;
    for (account, held) in ledger.open_byte_seconds(this_hour).into_iter().take(MAX_CLOSED) {
        match ledger.close_blocking(hour_record(&account, held, 1)) {
            Ok(_) => {}
            // Of this account alone; the others' hours end all the same.
            Err(error @ LedgerError::Conflict { .. }) => {
                tracing::error!(%error, ?account, "the name of an hour of storage is taken");
            }
            Err(error) => {
                tracing::error!(%error, "an hour of storage could not be closed; it is tried again");
                return;
            }
        }
    }
}

fn hour_record(account: &Account, held: ByteSeconds, revision: u64) -> v1::UsageRecord {
    let Account { hour_unix_s, tenant, namespace, scope } = account;
    let hex: String = namespace.iter().map(|byte| format!("{byte:02x}")).collect();
    let request_id = format!("storage/{hour_unix_s}/{scope}/{hex}/r{revision}");
    v1::UsageRecord {
        tenant: tenant.clone(),
        content: content(request_id.as_bytes()).to_vec().into(),
        request_id,
        op: "storage".into(),
        namespace: namespace.clone().into(),
        scope: scope.clone(),
        status: "ok".into(),
        complete: true,
        hour_unix_s: *hour_unix_s,
        stored_byte_seconds: held.stored,
        pinned_byte_seconds: held.pinned,
        revision,
        ..Default::default()
    }
}

/// Stored and pinned bytes of everyone. What is shared belongs to no tenant, whose name is then empty.
fn held(node: &Node) -> HashMap<Holder, (u64, u64)> {
    let mut owners: HashMap<ScopeTag, (String, &'static str)> = HashMap::new();
    for tenant in node.tenants.names() {
        let tags = node.tenants.scopes(&tenant);
        owners.extend(tags.into_iter().map(|tag| (tag, (tenant.0.clone(), "private"))));
        // Nor are a tenant's candidates billed apart: that would tell which of them others have put, too.
        let of_org = node.tenants.org_tag(&tenant).into_iter().chain(node.tenants.sight(&tenant).tag());
        owners.extend(of_org.map(|tag| (tag, (String::new(), "org"))));
    }
    owners.insert(node.tenants.public_tag(), (String::new(), "public"));
    let mut held: HashMap<Holder, (u64, u64)> = HashMap::new();
    for (namespace, tag, bytes) in node.store.realms() {
        // Layout tables and leases are of no scope that anyone pays for.
        let Some((tenant, scope)) = owners.get(&tag) else { continue };
        let holder = Holder { tenant: tenant.clone(), namespace: namespace.as_bytes().to_vec(), scope };
        held.entry(holder).or_default().0 += bytes;
    }
    for tenant in node.tenants.names() {
        match node.sessions.leased(node, &tenant) {
            Ok(leased) => {
                for (namespace, bytes) in leased {
                    let namespace = namespace.as_bytes().to_vec();
                    let holder = Holder { tenant: tenant.0.clone(), namespace, scope: "private" };
                    held.entry(holder).or_default().1 += bytes;
                }
            }
            Err(error) => tracing::error!(%error, "pinned bytes could not be counted"),
        }
    }
    held.retain(|_, (stored, pinned)| *stored > 0 || *pinned > 0);
    held
}

fn unix_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_split_where_the_hour_ends() {
        let holder = Holder { tenant: "t".into(), namespace: vec![1; 32], scope: "private" };
        let held = HashMap::from([(holder, (100, 10))]);
        let hour = 1_795_003_200;
        let parts = spread(&held, hour + HOUR_S - 4, 10);
        let of = |at: usize| (parts[at].0.hour_unix_s, parts[at].1.stored, parts[at].1.pinned);
        assert_eq!(parts.len(), 2);
        assert_eq!(of(0), (hour, 400, 40));
        assert_eq!(of(1), (hour + HOUR_S, 600, 60));
        assert!(spread(&held, hour, 0).is_empty());
    }

    #[test]
    fn time_goes_on_whatever_the_wall_clock_does() {
        let now = 1_795_003_200;
        // Corrections are followed, but not back into what was counted.
        assert_eq!(follow(now + 10, now, now + 12), now + 12);
        assert_eq!(follow(now + 10, now, now - 60), now);
        // Jumps are not.
        for jumped in [0, now - 3600, now + 3600, u64::MAX] {
            assert_eq!(follow(now + 10, now, jumped), now + 10, "{jumped}");
        }
    }
}
