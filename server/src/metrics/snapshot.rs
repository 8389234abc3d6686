//! What a node knows of itself at this moment: the store's counts and latencies, queues, what is held and by how many.

use std::fmt::Error;
use std::sync::atomic::{AtomicU64, Ordering};

use esker_proto::v1;
use esker_store::{Latencies, MissKind, StoreStats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::node::Node;
use crate::warmups::Totals;

/// See the module.
#[derive(Debug)]
pub(super) struct Snapshot {
    store: StoreStats,
    warmups: Totals,
    live: u64,
    grants: u64,
    granted_objects: u64,
    sessions: u64,
    write_behind_bytes: u64,
    audit_left_out: u64,
    replay_shut_out: u64,
    in_flight: [Value; 4],
    in_flight_limit: u64,
    ledger: Ledger,
}

/// What the ledger counted since the start. Bills are made from its records and never from these.
#[derive(Debug)]
struct Ledger {
    records: [Value; 4],
    tokens: [Value; 2],
    served_bytes: u64,
    flushes: u64,
    gaps: u64,
    disk_bytes: u64,
}

impl Ledger {
    fn take(node: &Node) -> Self {
        let counters = node.ledger.counters();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let tenants = counters.tenants();
        let sum = |of: fn(&v1::UsageSums) -> u64| tenants.iter().map(|(_, sums)| of(sums)).sum::<u64>();
        Self {
            records: [
                ("written", get(&counters.records)),
                ("replayed", get(&counters.replays)),
                ("conflicting", get(&counters.conflicts)),
                ("refused", get(&counters.refused)),
            ],
            tokens: [("hit", sum(|sums| sums.hit_tokens)), ("miss", sum(|sums| sums.miss_tokens))],
            served_bytes: sum(|sums| sums.bytes_served),
            flushes: get(&counters.flushes),
            gaps: get(&counters.gaps),
            disk_bytes: get(&counters.disk_bytes),
        }
    }
}

impl Snapshot {
    pub(super) fn take(node: &Node) -> Self {
        let (grants, granted_objects) = node.grants.totals();
        // What cannot be read is logged where it is read.
        let names = node.tenants.names().into_iter();
        let sessions = names.map(|tenant| node.sessions.totals(node, &tenant).map_or(0, |(count, _)| count));
        Self {
            store: node.store.stats(),
            warmups: node.warmups.totals(),
            live: node.live.count() as u64,
            grants: grants as u64,
            granted_objects: granted_objects as u64,
            sessions: sessions.sum(),
            write_behind_bytes: node
                .engine
                .as_ref()
                .map_or(0, |engine| engine.write_behind.waiting_bytes() as u64),
            audit_left_out: node.audit.left_out(),
            replay_shut_out: node.replay.is_shut_out().into(),
            in_flight: node.budget.used_by(),
            in_flight_limit: node.budget.limit_bytes(),
            ledger: Ledger::take(node),
        }
    }
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut page = Page(encoder);
        let store = &self.store;
        page.info()?;

        page.gauges(
            "stored_bytes",
            "Bytes by tier: records on the drive that can be found, and the table of them in memory",
            "tier",
            &[("ssd", store.live_bytes), ("memory", store.table_bytes)],
        )?;
        page.gauge(
            "segment_bytes",
            "Bytes of all segment files, room for records to come included",
            store.segment_bytes,
        )?;
        if store.capacity_bytes < u64::MAX {
            page.gauge("capacity_bytes", "Bytes that all segments may take", store.capacity_bytes)?;
        }
        page.gauge("segments", "Segment files", store.segments)?;
        page.gauge("objects", "Blocks and states that lookups can find", store.objects)?;
        page.counter("fetched_bytes", "Bytes of planes given out, proven", store.fetched_bytes)?;
        page.counter("accepted_bytes", "Bytes of planes of the objects stored", store.stored_raw_bytes)?;

        page.counters(
            "puts",
            "Objects put, by outcome",
            "outcome",
            &[
                ("stored", store.stored),
                ("present", store.present),
                ("declined", store.declined),
                ("content_mismatch", store.content_mismatch),
                ("failed", store.put_errors),
            ],
        )?;
        page.counters(
            "looked_up_objects",
            "Objects that lookups asked the store for, by whether they were in the leading run that it has",
            "outcome",
            &[("found", store.found), ("not_found", store.looked_up.saturating_sub(store.found))],
        )?;
        page.counter("fetched_objects", "Objects fetched with all the planes asked for", store.fetched)?;
        page.counters(
            "fetch_misses",
            "Objects that were promised and not given out, by reason",
            "reason",
            &misses(store),
        )?;
        page.counters(
            "removed_objects",
            "Objects that went, by reason",
            "reason",
            &[
                ("evicted", store.evicted),
                ("expired", store.expired),
                ("erased", store.erased),
                ("quarantined", store.quarantined),
            ],
        )?;
        page.counter(
            "reinstated_objects",
            "Objects that were missing after a failed read and came back, as it was the drive that failed",
            store.reinstated,
        )?;
        page.gauge(
            "kept_erasures",
            "Erasures on record, as something older than they are may still be on the drive",
            store.erasures,
        )?;
        page.counter(
            "lapsed_erasures",
            "Erasures removed, as nothing was left that they could mean",
            store.erasures_lapsed,
        )?;
        page.counter("evicted_bytes", "Bytes of the records of evicted objects", store.evicted_bytes)?;
        page.gauge(
            "owners",
            "Tenants whose accounts have put something that is stored",
            store.shares.owners,
        )?;
        page.gauge(
            "largest_owner_bytes",
            "Bytes of records of the tenant that holds most, which gives first when room is needed",
            store.shares.largest_bytes,
        )?;
        page.gauge(
            "over_share_bytes",
            "Bytes of records that tenants hold beyond an equal share of the capacity",
            store.shares.over_bytes,
        )?;
        page.counter(
            "reclaimed_bytes",
            "Bytes given back to the file system out of segments that stay",
            store.punched_bytes,
        )?;

        page.counter("device_read_bytes", "Bytes read from the drive since the start", store.read_bytes)?;
        page.counter(
            "device_written_bytes",
            "Bytes written to the drive since the start",
            store.written_bytes,
        )?;
        page.gauge(
            "wear_written_bytes",
            "Bytes written to the drive since the store was made",
            store.wear.written_bytes,
        )?;
        page.gauge("wear_accepted_bytes", "Bytes of planes accepted since the store was made; the drive's write amplification is written over accepted", store.wear.accepted_bytes)?;
        page.counter("index_change_bytes", "Bytes of changes handed to the index", store.index_change_bytes)?;

        page.counter(
            "corrupt_objects",
            "Records found bad while they were read or scrubbed",
            corrupt(store) + store.scrub_bad,
        )?;
        page.counter(
            "scrubbed_bytes",
            "Bytes of records proven again in the background",
            store.scrubbed_bytes,
        )?;
        page.counter("scrub_rounds", "Times that scrubbing came round", store.scrub_rounds)?;
        page.gauge(
            "scrub_round_bytes",
            "Bytes proven in the round that is on, of the live bytes",
            store.scrub_round_bytes,
        )?;
        page.counter(
            "breaker_trips",
            "Times that nothing was read for a while since so many reads had failed",
            store.breaker_trips,
        )?;
        page.gauge(
            "suspect_segments",
            "Segments given up since a write or flush into them failed",
            store.suspect_segments,
        )?;
        page.counter("index_errors", "Index reads that failed", store.index_errors)?;
        page.counter("commits", "Group commits", store.commits)?;

        page.gauges("queue_bytes", "Bytes that wait, by queue: read ahead by fetches, in or before a commit, of new blocks of the decoder", "queue", &[
            ("read", store.reading_bytes),
            ("commit", store.putting_bytes),
            ("write_behind", self.write_behind_bytes),
        ])?;
        page.gauges(
            "in_flight_bytes",
            "Bytes of memory taken for what is on its way, by use: for fetches, puts, what was put and waits for the rest, bodies of requests",
            "use",
            &self.in_flight,
        )?;
        page.gauge("in_flight_limit_bytes", "Of all of these together", self.in_flight_limit)?;
        page.gauge("io_in_flight", "Operations that the drive has not answered yet", store.io_in_flight)?;
        page.counter(
            "unknown_io_completions",
            "Answers of the drive that belong to no operation; anything above zero is an error of the kernel or of Esker",
            store.unknown_completions,
        )?;
        page.gauge(
            "live_requests",
            "Generations, fetches and puts that are being worked on; warm-up jobs give way to them",
            self.live,
        )?;

        page.gauge("leases", "Leases that hold", store.leases)?;
        page.gauge(
            "leased_bytes",
            "Bytes of records that they hold together, each counted once",
            store.leased_bytes,
        )?;
        page.gauge("sessions", "Chat sessions that hold something", self.sessions)?;
        page.gauge("grants", "Grants that are neither settled, released nor over", self.grants)?;
        page.gauge("granted_objects", "Objects that they list", self.granted_objects)?;
        page.counter(
            "audit_left_out",
            "Refusals of which the audit log has only the number, as there were too many kinds in a minute",
            self.audit_left_out,
        )?;
        page.gauge(
            "replay_shut_out",
            "1 where the file of sampled answers cannot be used: they are remembered until the node ends",
            self.replay_shut_out,
        )?;

        let ledger = &self.ledger;
        page.counters(
            "ledger_records",
            "Accounts that were to be closed, by what became of them",
            "outcome",
            &ledger.records,
        )?;
        page.counters(
            "ledger_tokens",
            "Prompt tokens of closed accounts, by whether they were a hit",
            "kind",
            &ledger.tokens,
        )?;
        page.counter("ledger_served_bytes", "Bytes served of closed accounts", ledger.served_bytes)?;
        page.counter("ledger_flushes", "Flushes of the ledger", ledger.flushes)?;
        page.counter("ledger_gaps", "Damage found in the ledger; exports stop there", ledger.gaps)?;
        page.gauge("ledger_bytes", "Bytes of the ledger on the drive", ledger.disk_bytes)?;

        page.gauges(
            "warmup_jobs",
            "Warm-up jobs that have not ended, by state",
            "state",
            &[("queued", self.warmups.queued), ("running", self.warmups.running)],
        )?;
        page.gauge(
            "warmup_left_tokens",
            "Tokens of warm-up jobs that nobody has looked at yet",
            self.warmups.tokens_left,
        )?;

        page.times("store_lookup_seconds", "Lookups in the store", &store.lookup_us)?;
        page.times(
            "store_first_plane_seconds",
            "From the start of a fetch to its first proven plane",
            &store.first_plane_us,
        )?;
        page.times(
            "store_fetch_seconds",
            "Whole fetches, for as long as their caller took to take the planes",
            &store.fetch_us,
        )?;
        page.times("store_read_seconds", "Reads from the drive", &store.read_us)?;
        page.times("store_put_seconds", "Puts, from hashing to durable", &store.put_us)?;
        page.times(
            "store_commit_seconds",
            "Group commits, from the first write to findable",
            &store.commit_us,
        )?;
        page.times("store_flush_seconds", "Flushes of segments", &store.flush_us)
    }
}

/// By the reasons that other engines' dashboards know.
fn misses(store: &StoreStats) -> [Value; 4] {
    let sum = |kinds: &[MissKind]| kinds.iter().map(|&kind| store.misses.get(kind)).sum();
    [
        ("absent", sum(&[MissKind::Absent])),
        ("corrupt", corrupt(store)),
        ("io_error", sum(&[MissKind::ReadError, MissKind::Unavailable])),
        ("deadline", sum(&[MissKind::Deadline])),
    ]
}

fn corrupt(store: &StoreStats) -> u64 {
    let damage = MissKind::ALL.into_iter().filter(|kind| kind.is_damage() && *kind != MissKind::ReadError);
    damage.map(|kind| store.misses.get(kind)).sum()
}

/// A label value, and what is counted under it.
type Value = (&'static str, u64);

/// The text that grows.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn info(&mut self) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor("build", "This program", None, MetricType::Info)?;
        encoder.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        let encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(encoder)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: &[Value],
    ) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        values.iter().try_for_each(|(value, count)| {
            ConstCounter::new(*count).encode(encoder.encode_family(&[(label, *value)])?)
        })
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        let encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(encoder)
    }

    fn gauges(&mut self, name: &str, help: &str, label: &'static str, values: &[Value]) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values.iter().try_for_each(|(value, count)| {
            ConstGauge::new(*count).encode(encoder.encode_family(&[(label, *value)])?)
        })
    }

    #[allow(clippy::cast_precision_loss, reason = "a figure to look at")]
    fn times(&mut self, name: &str, help: &str, times: &Latencies) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        let mut before = 0;
        let mut buckets: Vec<(f64, u64)> = Vec::new();
        for (bound_us, below) in times.cumulative() {
            buckets.push((bound_us as f64 / 1e6, below - before));
            before = below;
        }
        // The counters behind it move while they are read: what is beyond the bounds is never less than nothing.
        buckets.push((f64::INFINITY, times.count().saturating_sub(before)));
        let sum_s = times.sum_us() as f64 / 1e6;
        encoder.encode_histogram::<NoLabelSet>(sum_s, times.count(), &buckets, None)
    }
}
