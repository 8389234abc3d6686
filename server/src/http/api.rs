//! What the page and `esker top` ask: the node told as JSON. The shapes are those of `server/ui/src/api.ts`.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Path, Query, State};
use esker_prefix::{NamespaceId, ScopeTag};
use esker_proto::v1;
use esker_store::{AGE_BOUNDS_S, Ages, Run, StoreStats, TtlClass};
use serde::Deserialize;
use serde_json::{Value, json};

use super::failure::Failure;
use super::{Site, device};
use crate::history::{Step, Times, unix_ms};
use crate::ledger::sums::{self, HOUR_S};
use crate::node::Node;
use crate::price::{Amounts, decimal, rate};
use crate::principal::TenantId;

/// Sessions in one answer; those that end first.
const MAX_SESSIONS: usize = 200;
/// Warm-up jobs in one answer.
const MAX_WARMUPS: usize = 200;
/// Refusals and findings in one answer.
const MAX_RECENT: usize = 50;
/// Runs of one tree.
const MAX_RUNS: usize = 2000;
/// What takes a look at every object is told again only after this long.
const CENSUS_AGE: Duration = Duration::from_secs(10);
const DAY_S: u64 = 24 * 3600;
/// Usage and money are those of this long.
const USAGE_S: u64 = 30 * DAY_S;

/// The newest census.
#[derive(Default)]
pub(super) struct Censuses(Mutex<Option<Taken>>);

/// A census, and when it was taken.
type Taken = (Instant, Vec<(TtlClass, Ages)>);

#[derive(Deserialize)]
pub(super) struct Span {
    #[serde(default)]
    span: String,
}

/// `GET /api/overview`.
pub(super) async fn overview(State(site): State<Site>) -> Result<Json<Value>, Failure> {
    blocking(move || {
        let node = &site.node;
        let stats = node.store.stats();
        let (tenants, currency) = tenants(node)?;
        let (all, hour) = node.history.totals();
        Ok(json!({
            "now_ms": unix_ms(),
            "node": {
                "version": env!("CARGO_PKG_VERSION"),
                "model": node.engine.as_ref().map(|engine| engine.loaded.name.as_str()),
                "started_ms": node.history.started_ms(),
                "io": node.store.open_report().engine.to_string(),
            },
            "traffic": {"hour": traffic(3600, &hour), "all": traffic(uptime_s(node), &all)},
            "store": store(node, &stats),
            "kept": kept(&site),
            "sessions": sessions(node)?,
            "tenants": tenants,
            "currency": currency,
            "warmups": warmups(node),
            "drive": drive(node, &stats),
            "trouble": {
                "damaged": stats.quarantined + node.store.open_report().records_dropped.total(),
                "refused": node.audit.left_out(),
                "put_errors": stats.put_errors,
                "breaker_trips": stats.breaker_trips,
                "suspect_segments": stats.suspect_segments,
            },
            "recent": recent(node),
        }))
    })
    .await
}

/// `GET /api/history?span=hour` or `week`.
pub(super) async fn history(
    State(site): State<Site>,
    Query(asked): Query<Span>,
) -> Result<Json<Value>, Failure> {
    let week = match asked.span.as_str() {
        "" | "hour" => false,
        "week" => true,
        other => return Err(Failure::invalid(format!("`span` is hour or week, not {other:?}")).about("span")),
    };
    let (step_s, steps) = site.node.history.steps(week);
    let point = |(at_ms, step): (u64, Step)| {
        json!({
            "at_ms": at_ms,
            "requests": step.requests,
            "prompt_tokens": step.prompt_tokens,
            "hit_tokens": step.hit_tokens,
            "warm_ms": step.warm.quantile_ms(0.5),
            "cold_ms": step.cold.quantile_ms(0.5),
        })
    };
    let points: Vec<Value> = steps.into_iter().map(point).collect();
    Ok(Json(json!({"step_s": step_s, "points": points})))
}

/// `GET /api/prefixes`: whose trees there are.
pub(super) async fn realms(State(site): State<Site>) -> Result<Json<Value>, Failure> {
    blocking(move || {
        let node = &site.node;
        let owners = node.tenants.owners();
        let mut realms = node.store.realms();
        realms.retain(|(_, _, bytes)| *bytes > 0);
        realms.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
        let realm = |(namespace, scope, bytes): (NamespaceId, ScopeTag, u64)| {
            let own = node.engine.as_ref().filter(|engine| engine.namespace == namespace);
            let model = own.map_or_else(
                || format!("namespace {}", &namespace.to_hex()[..8]),
                |engine| engine.loaded.name.clone(),
            );
            // Layouts and leases are nobody's.
            let owner = owners.get(&scope)?;
            Some(json!({"id": realm_id(namespace, scope), "owner": owner, "model": model, "bytes": bytes}))
        };
        Ok(Value::Array(realms.into_iter().filter_map(realm).collect()))
    })
    .await
}

/// `GET /api/prefixes/{realm}`: one tree.
pub(super) async fn prefixes(
    State(site): State<Site>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Failure> {
    blocking(move || {
        let store = &site.node.store;
        let realms = store.realms().into_iter();
        let found =
            realms.map(|(namespace, scope, _)| (namespace, scope)).find(|&(n, s)| realm_id(n, s) == id);
        let (namespace, scope) =
            found.ok_or_else(|| Failure::not_found("nothing is stored there any more"))?;
        let forest = store.forest(namespace, scope, MAX_RUNS);
        let now_s = store.now_s();
        let roots: Vec<Value> = forest.roots.iter().map(|root| run(root, now_s)).collect();
        Ok(json!({"tokens": forest.tokens, "truncated": forest.truncated, "roots": roots}))
    })
    .await
}

/// Bounded by [`MAX_RUNS`], and so is its depth.
fn run(run_: &Run, now_s: u32) -> Value {
    let next: Vec<Value> = run_.next.iter().map(|next| run(next, now_s)).collect();
    json!({
        "name": hex(&run_.hash[..4]),
        "from": run_.from_tokens,
        "to": run_.to_tokens,
        "bytes": run_.bytes,
        "idle_s": now_s.saturating_sub(run_.last_s),
        "held": run_.held,
        "states": run_.states,
        "hidden": run_.hidden,
        "next": next,
    })
}

fn uptime_s(node: &Node) -> u64 {
    unix_ms().saturating_sub(node.history.started_ms()) / 1000
}

fn traffic(seconds: u64, step: &Step) -> Value {
    let waiting = |times: &Times| json!({"count": times.count(), "p50_ms": times.quantile_ms(0.5), "p95_ms": times.quantile_ms(0.95)});
    json!({
        "seconds": seconds,
        "requests": step.requests,
        "prompt_tokens": step.prompt_tokens,
        "hit_tokens": step.hit_tokens,
        "warm": waiting(&step.warm),
        "cold": waiting(&step.cold),
    })
}

fn store(node: &Node, stats: &StoreStats) -> Value {
    let limit = Some(stats.capacity_bytes).filter(|&limit| limit < u64::MAX);
    json!({
        "objects": stats.objects,
        "bytes": stats.live_bytes,
        "disk_bytes": stats.segment_bytes,
        "limit_bytes": limit,
        "free_bytes": esker_store::io::free_bytes(&node.data).ok(),
        "leased_bytes": stats.leased_bytes,
        "evicted": stats.evicted,
        "expired": stats.expired,
    })
}

fn kept(site: &Site) -> Vec<Value> {
    let mut taken = site.censuses.0.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.as_ref().is_none_or(|(at, _)| at.elapsed() > CENSUS_AGE) {
        *taken = Some((Instant::now(), site.node.store.census()));
    }
    let Some((_, census)) = taken.as_ref() else { return Vec::new() };
    let class = |at: u8, ttl: &Duration| {
        let ages = census
            .iter()
            .find(|(class, _)| *class == TtlClass(at))
            .map_or_else(Ages::default, |(_, ages)| *ages);
        let told = ages.iter().zip(AGE_BOUNDS_S).map(|(held, bound)| {
            let up_to_s = Some(bound).filter(|&bound| bound < u32::MAX);
            json!({"up_to_s": up_to_s, "objects": held.objects, "bytes": held.bytes})
        });
        json!({
            "class": length(ttl.as_secs()),
            "objects": ages.iter().map(|held| held.objects).sum::<u64>(),
            "bytes": ages.iter().map(|held| held.bytes).sum::<u64>(),
            "ages": told.collect::<Vec<_>>(),
        })
    };
    (0..).zip(site.node.store.ttl_classes()).map(|(at, ttl)| class(at, ttl)).collect()
}

/// As people say it.
fn length(seconds: u64) -> String {
    match seconds {
        s if s >= 48 * 3600 && s.is_multiple_of(DAY_S) => format!("{} days", s / DAY_S),
        s if s >= 3600 && s.is_multiple_of(3600) => format!("{} h", s / 3600),
        s if s >= 60 && s.is_multiple_of(60) => format!("{} min", s / 60),
        s => format!("{s} s"),
    }
}

fn sessions(node: &Node) -> Result<Vec<Value>, Failure> {
    let mut found = Vec::new();
    for tenant in node.tenants.names() {
        for session in node.sessions.list(node, &tenant, "", MAX_SESSIONS)? {
            found.push((tenant.clone(), session));
        }
    }
    found.sort_by_key(|(_, session)| session.remaining_s);
    found.truncate(MAX_SESSIONS);
    let told = found.into_iter().map(|(TenantId(tenant), session)| {
        json!({
            "tenant": tenant,
            "name": session.name,
            "user": session.user,
            "tokens": session.tokens,
            "resume_tokens": session.resume_tokens,
            "bytes": session.bytes,
            "remaining_s": session.remaining_s,
        })
    });
    Ok(told.collect())
}

/// Usage and money of the last [`USAGE_S`], and the currency.
fn tenants(node: &Node) -> Result<(Vec<Value>, Option<&str>), Failure> {
    let now_s = unix_ms() / 1000;
    let (accounts, _) = node
        .ledger
        .query(now_s.saturating_sub(USAGE_S) / HOUR_S * HOUR_S, now_s + HOUR_S)
        .map_err(|error| Failure::broken(error.to_string()))?;
    let mut by_tenant: BTreeMap<&str, (v1::UsageSums, Amounts)> = BTreeMap::new();
    for (account, sums) in &accounts {
        let (usage, amounts) = by_tenant.entry(&account.tenant).or_default();
        sums::add(usage, sums);
        if let Some(prices) = &node.prices {
            amounts.add(&rate(sums, &prices.of(&account.tenant)));
        }
    }
    let mut found = Vec::new();
    for tenant in node.tenants.names() {
        let (sessions, leased_bytes) = node.sessions.totals(node, &tenant)?;
        let (usage, amounts) = by_tenant.get(tenant.0.as_str()).cloned().unwrap_or_default();
        let money = |micro_units: i128| node.prices.as_ref().map(|_| decimal(micro_units));
        found.push(json!({
            "stored_bytes": node.tenants.stored_bytes(&node.store, &tenant),
            "stored_bytes_limit": node.tenants.rules(&tenant).stored_bytes,
            "leased_bytes": leased_bytes,
            "sessions": sessions,
            "requests": usage.requests,
            "prompt_tokens": usage.prompt_tokens,
            "hit_tokens": usage.hit_tokens,
            "cost": money(amounts.total().into()),
            "saved": money(amounts.saved()),
            "tenant": tenant.0,
        }));
    }
    Ok((found, node.prices.as_ref().map(|prices| prices.currency.as_str())))
}

/// Jobs of all tenants; those that run or wait first.
fn warmups(node: &Node) -> Vec<Value> {
    let mut found = Vec::new();
    for tenant in node.tenants.names() {
        for job in node.warmups.list(&tenant, "", MAX_WARMUPS) {
            found.push((tenant.clone(), job));
        }
    }
    found.sort_by_key(|(_, job)| {
        (job.state() != v1::WarmupState::Running, job.state() != v1::WarmupState::Queued)
    });
    found.truncate(MAX_WARMUPS);
    let told = found.into_iter().map(|(TenantId(tenant), job)| {
        let state = job.state().as_str_name().trim_start_matches("WARMUP_STATE_").to_lowercase();
        json!({
            "tenant": tenant,
            "state": state,
            "prompts": job.prompts,
            "prompts_done": job.prompts_done,
            "tokens": job.tokens,
            "tokens_done": job.tokens.saturating_sub(job.tokens_left),
            "reason": job.reason,
            "job": job.job,
        })
    });
    told.collect()
}

fn drive(node: &Node, stats: &StoreStats) -> Value {
    let up_s = uptime_s(node);
    // A rate over minutes says nothing about days.
    let per_day = (up_s >= 600).then(|| stats.written_bytes / up_s.max(1) * DAY_S);
    let device = device::of(&node.data);
    json!({
        "read_bytes": stats.read_bytes,
        "written_bytes": stats.written_bytes,
        "ever_written_bytes": stats.wear.written_bytes,
        "ever_accepted_bytes": stats.wear.accepted_bytes,
        "per_day_bytes": per_day,
        "device": device.as_ref().map(|device| device.name.as_str()),
        "device_written_bytes": device.as_ref().map(|device| device.written_bytes),
    })
}

/// The newest first.
fn recent(node: &Node) -> Vec<Value> {
    let refusals = node.audit.refusals(MAX_RECENT).into_iter().map(|(at_ms, event)| {
        let object = if event.object.is_empty() { String::new() } else { format!(": {}", event.object) };
        let what = format!("{} {}{object}", event.operation, event.result);
        (at_ms, json!({"at_ms": at_ms, "kind": "refusal", "who": event.who, "what": what}))
    });
    let findings = node.history.findings().into_iter().map(|finding| {
        let at_ms = finding.at_ms;
        (at_ms, json!({"at_ms": at_ms, "kind": "damage", "who": "", "what": finding.text}))
    });
    let mut all: Vec<(u64, Value)> = refusals.chain(findings).collect();
    all.sort_by_key(|(at_ms, _)| std::cmp::Reverse(*at_ms));
    all.into_iter().take(MAX_RECENT).map(|(_, told)| told).collect()
}

fn realm_id(namespace: NamespaceId, scope: ScopeTag) -> String {
    format!("{}-{}", hex(&namespace.as_bytes()[..8]), hex(&scope.0))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Work that may wait for the disk or take a while.
async fn blocking(
    work: impl FnOnce() -> Result<Value, Failure> + Send + 'static,
) -> Result<Json<Value>, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| {
        tracing::error!(%error, "a request's task did not finish");
        Failure::broken("the request failed inside the node; its log says why")
    })?
    .map(Json)
}
