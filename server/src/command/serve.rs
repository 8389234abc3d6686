//! `esker serve`.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytesize::ByteSize;
use esker_decoder::KvFormat;
use esker_store::io::IoEngine;
use esker_store::{OpenReport, StoreSettings};

use crate::budget::LEAST_BYTES;
use crate::events::publisher::PublisherSettings;
use crate::generate::{Guessing, STATE_INTERVAL_BLOCKS};
use crate::ledger::LedgerSettings;
use crate::local::LocalSettings;
use crate::model_folder::load_model;
use crate::node::{Node, NodeSettings};
use crate::principal::{Principal, TenantId, is_name};
use crate::serve::{ListenSettings, TlsFiles};
use crate::traces::Traces;
use crate::usage::sink::SinkSettings;
use crate::{bundled, serve};

/// A process that was killed may hold its lock for a moment longer.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// What the ledger, the audit log and the records of tenants take beside the store, to begin with.
const OWN_FILES_BYTES: u64 = 64 << 20;

/// Arguments of `esker serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data folder; made if absent. One process at a time
    #[arg(long, short, value_name = "DIR", default_value = "esker-data")]
    data: PathBuf,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, short, value_name = "IP:PORT", default_value = "127.0.0.1:7410")]
    listen: SocketAddr,
    /// Also listen here for HTTP: endpoints that applications of OpenAI's and Anthropic's libraries call, and a page to look at
    /// [default: no HTTP]
    #[arg(long, value_name = "IP:PORT")]
    http: Option<SocketAddr>,
    /// Listen beyond loopback without TLS or without a policy: on a network that itself keeps others out
    #[arg(long)]
    insecure: bool,
    /// Tenants, roles and limits, as TOML; with it every caller must say who it is. Read again when it changes
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// What tokens cost, as TOML: the page and `esker top` then tell savings in money
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
    /// Root key, 32 bytes or 64 hexadecimal digits; with it what tenants store is encrypted, each by keys of its own
    #[arg(long, value_name = "FILE")]
    root_key: Option<PathBuf>,
    /// Certificate chain of this server, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Authorities whose client certificates are accepted, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Unix socket for clients on this host: gRPC, and payload through shared memory, which PATH.arena hands out
    #[arg(long, value_name = "PATH")]
    local: Option<PathBuf>,
    /// How long a local client may hold a piece of shared memory that was filled for it, in seconds
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    local_lease_s: u64,
    /// Publish here, such as on tcp://127.0.0.1:5557, what blocks come and go, by ZeroMQ as vLLM does. Nobody is asked who it is
    #[arg(long, value_name = "tcp://IP:PORT", value_parser = endpoint)]
    kv_events: Option<SocketAddr>,
    /// Answer here who missed some of these events
    #[arg(long, value_name = "tcp://IP:PORT", value_parser = endpoint, requires = "kv_events")]
    kv_events_replay: Option<SocketAddr>,
    /// Topic of these events, such as kv@NODE@MODEL; a router says what it asks for [default: empty, as vLLM's]
    #[arg(long, value_name = "TEXT", requires = "kv_events", default_value = "", hide_default_value = true)]
    kv_events_topic: String,
    /// Whose events these are; needed with --policy
    #[arg(long, value_name = "TENANT", requires = "kv_events")]
    kv_events_tenant: Option<String>,
    /// Space for stored blocks, such as 500GiB; beyond it what is worth least goes first [default: what it takes now and nineteen
    /// twentieths of what is free]
    #[arg(long, value_name = "SIZE")]
    capacity: Option<ByteSize>,
    /// Memory for what is on its way, such as 4GiB: fetches, puts and the bodies of requests; what does not fit is refused. At least
    /// 256MiB [default: a half of the memory of this machine, or of its control group]
    #[arg(long, value_name = "SIZE")]
    in_flight: Option<ByteSize>,
    /// Space that leases may hold together, such as 100GiB [default: four fifths of the capacity]
    #[arg(long, value_name = "SIZE")]
    leased: Option<ByteSize>,
    /// How long blocks of the four classes are kept after their last use, in seconds
    #[arg(
        long,
        value_name = "S,S,S,S",
        value_delimiter = ',',
        num_args = 1..=4,
        default_value = "300,3600,86400,259200"
    )]
    ttl_s: Vec<u64>,
    /// Part of the time that warm-up jobs take while live requests run; 0: they wait
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    warmup_share: u32,
    /// Stored bytes proven again each second in the background, in MB; 0 for none
    #[arg(long, value_name = "MB", default_value_t = 8)]
    scrub_mb_per_s: u64,
    /// Decode with the model of this folder (config.json, *.safetensors, tokenizer.json), not the bundled one
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Send traces of calls to this OpenTelemetry collector by OTLP over gRPC, such as http://127.0.0.1:4317; the variables OTEL_*
    /// say how [default: none are made]
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Name of the deployment in usage ids, the same on all of its nodes [default: made from the root secret]
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// Space for the billing ledger, in MiB; when it is full, billable work stops [default: what the disk has]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(32..))]
    ledger_mib: Option<u64>,
    /// Send usage records to this file, as JSON lines, or to this https:// or http:// address, as CloudEvents in batches
    #[arg(long, value_name = "FILE|URL")]
    usage_sink: Option<String>,
    /// File with the bearer token for --usage-sink; read each time it is used
    #[arg(long, value_name = "FILE", requires = "usage_sink")]
    usage_sink_token: Option<PathBuf>,
    /// Certificates, as PEM, that vouch for an https:// sink [default: the public authorities]
    #[arg(long, value_name = "FILE", requires = "usage_sink")]
    usage_sink_ca: Option<PathBuf>,
    /// Send again what may have reached the sink more than 23 hours ago; it may have forgotten it and count it twice
    #[arg(long, requires = "usage_sink")]
    usage_sink_resend: bool,
    /// Serve the prefix cache only
    #[arg(long, conflicts_with = "model")]
    no_model: bool,
    /// Number format of the decoder's KV cache
    #[arg(long, value_enum, default_value_t = Kv::Bf16)]
    kv: Kv,
    /// Of a stored conversation, most bytes kept in memory of the rows that sparse attention picks among; the others stay on
    /// SSD and are read as they are picked, with the same answer [default: all in memory]
    #[arg(long, value_name = "BYTES")]
    resident_bytes: Option<u64>,
    /// Tokens between two states that are kept of a prompt and its output, besides where they end: who shares only a part of a
    /// conversation resumes no further back. Whole blocks [default: 64 blocks]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    state_interval_tokens: Option<u32>,
    /// Whether the model's draft block, if it has one, guesses tokens ahead; the answer is the same. Measured: while it is
    /// faster
    #[arg(long, value_enum, default_value_t = Guessing::Measured)]
    speculate: Guessing,
    /// Tokens per block of the decoder's KV cache; a power of two
    #[arg(long, default_value_t = 128, value_parser = block_tokens)]
    block_tokens: u32,
    /// How planes are written
    #[arg(long, value_enum, default_value_t = PlaneCodec::Zstd)]
    codec: PlaneCodec,
    /// Size of a segment file in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(4..=2048), value_name = "MIB")]
    segment_mib: u64,
    /// How the disk is reached; auto probes for io_uring
    #[arg(long, value_enum, default_value_t = Io::Auto)]
    io: Io,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kv {
    F32,
    Bf16,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PlaneCodec {
    Raw,
    Zstd,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Io {
    Auto,
    Uring,
    Positional,
}

fn block_tokens(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(count) if count.is_power_of_two() && (16..=1024).contains(&count) => Ok(count),
        _ => Err("must be a power of two between 16 and 1024".into()),
    }
}

/// Whole blocks of these tokens.
fn state_interval_blocks(tokens: Option<u32>, block_tokens: u32) -> anyhow::Result<usize> {
    let Some(tokens) = tokens else { return Ok(STATE_INTERVAL_BLOCKS) };
    anyhow::ensure!(
        tokens > 0 && tokens.is_multiple_of(block_tokens),
        "--state-interval-tokens {tokens}: states are kept at the ends of blocks, so give a multiple of {block_tokens}"
    );
    Ok((tokens / block_tokens) as usize)
}

/// An address as ZeroMQ writes it; `*` is every one that this host has.
fn endpoint(text: &str) -> Result<SocketAddr, String> {
    let address = text.strip_prefix("tcp://").unwrap_or(text);
    let address = address.strip_prefix("*:").map_or(address.into(), |port| format!("0.0.0.0:{port}"));
    address.parse().map_err(|_| "must be tcp://IP:PORT".into())
}

/// Serves until SIGINT or SIGTERM.
pub fn run(args: Args) -> anyhow::Result<()> {
    let tls = args.tls_cert.clone().zip(args.tls_key.clone()).map(|(certificate, key)| TlsFiles {
        certificate,
        key,
        client_ca: args.tls_client_ca.clone(),
    });
    let listen = ListenSettings {
        address: args.listen,
        http: args.http,
        insecure: args.insecure,
        tls,
        local: args
            .local
            .clone()
            .map(|path| LocalSettings { path, lease: Duration::from_secs(args.local_lease_s) }),
        events: args.kv_events.map(|address| publisher(&args, address)).transpose()?,
    };
    anyhow::ensure!(args.ttl_s.len() == 4, "--ttl-s takes four numbers of seconds, got {}", args.ttl_s.len());
    let in_flight = args.in_flight.unwrap_or(ByteSize(LEAST_BYTES));
    anyhow::ensure!(
        in_flight.as_u64() >= LEAST_BYTES,
        "--in-flight {in_flight}: with less than {} the longest objects could not be put",
        ByteSize(LEAST_BYTES)
    );
    let interval_blocks = state_interval_blocks(args.state_interval_tokens, args.block_tokens)?;
    // Before anything is made or loaded.
    listen.check(args.policy.is_some())?;
    let format = match args.kv {
        Kv::F32 => KvFormat::F32,
        Kv::Bf16 => KvFormat::Bf16,
    };
    let model = match &args.model {
        _ if args.no_model => None,
        Some(dir) => Some(load_model(dir, format, args.block_tokens)?),
        None => Some(bundled::load(format, args.block_tokens)?),
    };
    let defaults = StoreSettings::default();
    let store = StoreSettings {
        segment_bytes: args.segment_mib << 20,
        zstd_level: match args.codec {
            PlaneCodec::Raw => None,
            PlaneCodec::Zstd => defaults.zstd_level,
        },
        io_engines: match args.io {
            Io::Auto => defaults.io_engines.clone(),
            Io::Uring => vec![IoEngine::UringDirect],
            Io::Positional => vec![IoEngine::PositionalDirect, IoEngine::PositionalBuffered],
        },
        capacity_bytes: match args.capacity {
            Some(size) => size.as_u64(),
            None => esker_store::room(&args.data.join("store"))?.saturating_sub(OWN_FILES_BYTES),
        },
        leased_bytes: args.leased.map(|size| size.as_u64()),
        ttl_classes: args.ttl_s.iter().map(|&seconds| Duration::from_secs(seconds)).collect(),
        scrub_bytes_per_s: args.scrub_mb_per_s * 1_000_000,
        lock_wait: LOCK_WAIT,
        ..defaults
    };
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    let traces = {
        let _runtime = runtime.enter();
        args.otlp.as_deref().map(Traces::to).transpose()?.unwrap_or_default()
    };
    let node = Node::open(
        &NodeSettings {
            data: args.data.clone(),
            store,
            ledger: LedgerSettings {
                max_bytes: args.ledger_mib.map_or(u64::MAX, |mib| mib << 20),
                ..LedgerSettings::default()
            },
            cluster: args.cluster.clone(),
            usage_sink: args.usage_sink.clone().map(|target| SinkSettings {
                target,
                token: args.usage_sink_token.clone(),
                ca: args.usage_sink_ca.clone(),
                resend: args.usage_sink_resend,
            }),
            prices: args.prices.clone(),
            policy: args.policy.clone(),
            warmup_share: args.warmup_share,
            root_key: args.root_key.clone(),
            in_flight_bytes: args.in_flight.map(|size| size.as_u64()),
        },
        model,
    )?;
    let node = Arc::new(
        node.with_resident_bytes(args.resident_bytes)
            .with_state_interval(interval_blocks)
            .with_guessing(args.speculate)
            .with_traces(traces),
    );
    tell(&args.data, node.store.open_report());
    runtime.block_on(async {
        let running = serve::start(node.clone(), &listen, stop_signal()?).await?;
        // All there is on standard output: scripts wait for it and read the ports from it.
        let mut addresses = format!("listening on {}\n", running.address);
        let more = running.http.map(|http| format!("http on {http}\n"));
        let (events, replay) = running.events.map_or((None, None), |(events, replay)| (Some(events), replay));
        let events = events.map(|events| format!("kv events on tcp://{events}\n"));
        let replay = replay.map(|replay| format!("kv events replay on tcp://{replay}\n"));
        addresses.extend([more, events, replay].into_iter().flatten());
        std::io::stdout().write_all(addresses.as_bytes()).context("cannot write to standard output")?;
        running.wait().await
    })?;
    node.traces.stop();
    runtime.shutdown_timeout(Duration::from_secs(5));
    tracing::info!("stopped");
    Ok(())
}

fn publisher(args: &Args, address: SocketAddr) -> anyhow::Result<PublisherSettings> {
    let tenant = match &args.kv_events_tenant {
        Some(name) if is_name(name) => TenantId(name.clone()),
        Some(name) => anyhow::bail!("--kv-events-tenant: {name:?} is not the name of a tenant"),
        None if args.policy.is_some() => anyhow::bail!(
            "--kv-events shows the events of one tenant to whoever connects: say whose, with --kv-events-tenant"
        ),
        None => Principal::local().tenant,
    };
    let topic = args.kv_events_topic.clone();
    Ok(PublisherSettings { address, replay: args.kv_events_replay, topic, tenant })
}

/// What opening found, at the level that it deserves.
fn tell(data: &Path, report: &OpenReport) {
    let (data, io, segments) = (data.display(), report.engine, report.segments);
    for (engine, reason) in &report.refused_engines {
        tracing::warn!(%engine, %reason, "an I/O engine does not work here");
    }
    for segment in &report.unreadable_segments {
        tracing::error!(?segment, "a segment cannot be read; its blocks are misses");
    }
    let dropped = report.records_dropped.total();
    if dropped > 0 || report.entries_dropped > 0 {
        tracing::warn!(
            records = dropped,
            entries = report.entries_dropped,
            "damage was found; what it hit are misses"
        );
    }
    let (rebuilt, indexed) = (report.rebuilt, report.records_indexed);
    tracing::info!(%data, %io, segments, rebuilt, indexed, "the store is open");
}

/// Resolves on the first SIGINT or SIGTERM.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()> + Send> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_kept_at_the_ends_of_blocks() {
        assert_eq!(state_interval_blocks(None, 16).unwrap(), STATE_INTERVAL_BLOCKS);
        assert_eq!(state_interval_blocks(Some(16), 16).unwrap(), 1);
        assert_eq!(state_interval_blocks(Some(8192), 128).unwrap(), 64);
        for tokens in [0, 15, 100] {
            let refused = state_interval_blocks(Some(tokens), 16).unwrap_err().to_string();
            assert!(refused.contains("multiple of 16"), "{refused}");
        }
    }
}
