//! What a node counts, for graphs and alerts, as OpenMetrics text at `/metrics`. Never the source of a bill: that is the ledger.
//!
//! Names begin with `esker_` and end in their base unit: seconds, bytes, tokens. Whatever has a hit ratio has both its parts as
//! counters. No label carries anything of a tenant: every label value is one of a few that are written in this program, so
//! neither secrets nor cardinality can come from outside.
//!
//! Events are counted as they happen ([`Metrics`]); what the node knows anyway is read when somebody asks ([`snapshot`]).

mod layer;
mod snapshot;

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::generate::{Account, Event};
use crate::lookup::Answer;
use crate::node::Node;
pub(crate) use layer::MetricsLayer;
use snapshot::Snapshot;

/// Of the text that [`render`] makes.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Label = (&'static str, &'static str);
type Counts<const LABELS: usize> = Family<[Label; LABELS], Counter>;
type Times = Family<[Label; 1], Histogram, fn() -> Histogram>;

/// Refusals by quota. They are made where nobody knows of a node, so all nodes of a process share these.
static REFUSED: LazyLock<Counts<1>> = LazyLock::new(Counts::default);

/// Counters of what happens.
pub(crate) struct Metrics {
    registry: Registry,
    query_tokens: Counts<1>,
    hit_tokens: Counts<1>,
    miss_tokens: Counts<2>,
    first_token: Times,
    prefill_tokens: Counter,
    prefill_time: Counter<f64, std::sync::atomic::AtomicU64>,
    restore_time: Counter<f64, std::sync::atomic::AtomicU64>,
    completion_tokens: Counter,
    rpcs: Counts<2>,
    rpc_time: Times,
    warmup_tokens: Counts<1>,
    warmup_bytes: Counter,
    /// Generations that wait for one of those that run, and those.
    pub(crate) decoder_waiting: Gauge,
    pub(crate) decoder_running: Gauge,
}

/// Counts a request that was refused because a quota is used up.
pub(crate) fn refused(quota: &'static str) {
    REFUSED.get_or_create(&[("quota", quota)]).inc();
}

impl Default for Metrics {
    fn default() -> Self {
        let long = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let short = || Histogram::new(exponential_buckets(0.000_05, 2.0, 20));
        let mut metrics = Self {
            registry: Registry::with_prefix("esker"),
            query_tokens: Family::default(),
            hit_tokens: Family::default(),
            miss_tokens: Family::default(),
            first_token: Family::new_with_constructor(long),
            prefill_tokens: Counter::default(),
            prefill_time: Counter::default(),
            restore_time: Counter::default(),
            completion_tokens: Counter::default(),
            rpcs: Family::default(),
            rpc_time: Family::new_with_constructor(short),
            warmup_tokens: Family::default(),
            warmup_bytes: Counter::default(),
            decoder_waiting: Gauge::default(),
            decoder_running: Gauge::default(),
        };
        metrics.announce();
        metrics.register();
        metrics
    }
}

impl Metrics {
    /// Makes what alerts divide by exist from the start: a rate over a counter that appears with its first event misses it.
    fn announce(&self) {
        for path in ["lookup", "generate"] {
            drop(self.query_tokens.get_or_create(&[("path", path)]));
            drop(self.hit_tokens.get_or_create(&[("path", path)]));
            for reason in ["absent", "no_state", "tail"] {
                drop(self.miss_tokens.get_or_create(&[("path", path), ("reason", reason)]));
            }
        }
        for cache in ["warm", "cold"] {
            drop(self.first_token.get_or_create(&[("cache", cache)]));
        }
        for source in ["cached", "computed"] {
            drop(self.warmup_tokens.get_or_create(&[("source", source)]));
        }
    }

    fn register(&mut self) {
        let tokens = || Unit::Other("tokens".into());
        let registry = &mut self.registry;
        registry.register_with_unit(
            "query",
            "Prompt tokens that were asked for, by lookups and by generations",
            tokens(),
            self.query_tokens.clone(),
        );
        registry.register_with_unit(
            "hit",
            "Prompt tokens that could be resumed, of esker_query_tokens",
            tokens(),
            self.hit_tokens.clone(),
        );
        registry.register_with_unit(
            "miss",
            "Prompt tokens that could not, by reason: absent (not stored, or not the caller's), no_state (history without a state to \
             resume from), tail (behind the last whole block, never offered)",
            tokens(),
            self.miss_tokens.clone(),
        );
        registry.register_with_unit("first_token", "From the arrival of a generation to its first token, by whether anything of its prompt was restored", Unit::Seconds, self.first_token.clone());
        registry.register_with_unit(
            "prefill",
            "Prompt tokens computed by generations",
            tokens(),
            self.prefill_tokens.clone(),
        );
        registry.register_with_unit(
            "prefill",
            "Time that computing prompt tokens took",
            Unit::Seconds,
            self.prefill_time.clone(),
        );
        registry.register_with_unit(
            "restore",
            "Time that looking up, reading, proving and putting back took",
            Unit::Seconds,
            self.restore_time.clone(),
        );
        registry.register_with_unit(
            "completion",
            "Tokens generated",
            tokens(),
            self.completion_tokens.clone(),
        );
        registry.register(
            "rpcs",
            "Calls by method and status code; a stream that fails later counts as it began",
            self.rpcs.clone(),
        );
        registry.register_with_unit(
            "rpc",
            "Time to a call's answer, or to the beginning of its stream",
            Unit::Seconds,
            self.rpc_time.clone(),
        );
        registry.register(
            "quota_refusals",
            "Requests refused because a quota or a bound of the node was used up",
            REFUSED.clone(),
        );
        registry.register_with_unit(
            "warmup",
            "Tokens of warm-up jobs, found stored or computed",
            tokens(),
            self.warmup_tokens.clone(),
        );
        registry.register_with_unit(
            "warmup",
            "Bytes of records that warm-up jobs stored",
            Unit::Bytes,
            self.warmup_bytes.clone(),
        );
        registry.register(
            "decoder_waiting",
            "Generations that wait for their turn",
            self.decoder_waiting.clone(),
        );
        registry.register("decoder_running", "Generations that compute", self.decoder_running.clone());
    }

    /// A lookup was answered.
    pub(crate) fn lookup(&self, answer: &Answer) {
        let block_tokens = u64::from(answer.layout.block_tokens());
        let (asked, hit) = (
            answer.asked_tokens(),
            if answer.chained { answer.best() } else { answer.blocks.len() as u64 * block_tokens },
        );
        // What is found inside a block is more than its whole blocks.
        let asked = asked.max(hit);
        let no_state = if answer.chained { answer.history_tokens().saturating_sub(hit) } else { 0 };
        let tail = answer.prompt_tokens.saturating_sub(asked);
        self.hits(
            "lookup",
            hit,
            [("absent", asked.saturating_sub(hit + no_state)), ("no_state", no_state), ("tail", tail)],
        );
    }

    /// A generation came to its end.
    fn generated(&self, account: &Account, block_tokens: u64) {
        let (prompt, hit) = (account.prompt_tokens as u64, account.hit_tokens as u64);
        // At least one token of a prompt is always computed.
        let offered = (prompt.saturating_sub(1) / block_tokens * block_tokens).max(hit);
        self.hits("generate", hit, [("absent", offered - hit), ("no_state", 0), ("tail", prompt - offered)]);
        self.prefill_tokens.inc_by(prompt - hit);
        self.prefill_time.inc_by(account.prefill.as_secs_f64());
        self.restore_time.inc_by(account.restore.as_secs_f64());
        self.completion_tokens.inc_by(account.completion_tokens as u64);
    }

    /// The sum of hits and misses is what was asked for.
    fn hits(&self, path: &'static str, hit: u64, misses: [(&'static str, u64); 3]) {
        let missed: u64 = misses.iter().map(|(_, tokens)| tokens).sum();
        self.query_tokens.get_or_create(&[("path", path)]).inc_by(hit + missed);
        self.hit_tokens.get_or_create(&[("path", path)]).inc_by(hit);
        for (reason, tokens) in misses.into_iter().filter(|(_, tokens)| *tokens > 0) {
            self.miss_tokens.get_or_create(&[("path", path), ("reason", reason)]).inc_by(tokens);
        }
    }

    /// Warm-up jobs found or computed some tokens.
    pub(crate) fn warmed(&self, source: &'static str, tokens: u64, bytes: u64) {
        self.warmup_tokens.get_or_create(&[("source", source)]).inc_by(tokens);
        self.warmup_bytes.inc_by(bytes);
    }

    fn rpc(&self, method: &'static str, code: &'static str, time: Duration) {
        self.rpcs.get_or_create(&[("method", method), ("code", code)]).inc();
        self.rpc_time.get_or_create(&[("method", method)]).observe(time.as_secs_f64());
    }
}

/// What one generation shows of itself on its way. It runs for as long as this lives.
pub(crate) struct Watched<'a> {
    node: &'a Node,
    arrived: Instant,
    restored: bool,
    begun: bool,
}

impl<'a> Watched<'a> {
    pub(crate) fn new(arrived: Instant, node: &'a Node) -> Self {
        node.metrics.decoder_running.inc();
        Self { node, arrived, restored: false, begun: false }
    }

    pub(crate) fn see(&mut self, event: &Event) {
        let metrics = &self.node.metrics;
        match event {
            Event::Prompt { hit_tokens, .. } => self.restored = *hit_tokens > 0,
            Event::Token { .. } if !self.begun => {
                self.begun = true;
                let cache = if self.restored { "warm" } else { "cold" };
                let time_s = self.arrived.elapsed().as_secs_f64();
                metrics.first_token.get_or_create(&[("cache", cache)]).observe(time_s);
            }
            Event::Done(account) => {
                metrics.generated(account, self.block_tokens());
            }
            Event::Token { .. } | Event::Restoring { .. } | Event::Prefilling { .. } => {}
        }
    }

    fn block_tokens(&self) -> u64 {
        self.node.engine.as_ref().map_or(1, |engine| engine.loaded.model.layout().block_tokens().into())
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.node.metrics.decoder_running.dec();
    }
}

/// All of it as text. Asks the store and the control database: not for threads that serve the network.
pub(crate) fn render(node: &Node) -> Result<String, std::fmt::Error> {
    let mut now = Registry::with_prefix("esker");
    now.register_collector(Box::new(Snapshot::take(node)));
    let mut text = String::new();
    text::encode_registry(&mut text, &node.metrics.registry)?;
    text::encode_registry(&mut text, &now)?;
    text::encode_eof(&mut text)?;
    Ok(text)
}
