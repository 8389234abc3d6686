//! `esker usage`: what was used, what it costs, and what caching saved.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use esker_client::Client;
use esker_proto::v1;
use serde_json::{Value, json};
use v1::export_usage_reply::Event;

use super::{NodeArgs, client_runtime, print};
use crate::ledger::sums::{self, Account, HOUR_S};
use crate::ledger::verify;
use crate::price::{Amounts, PriceFile, decimal, rate};
use crate::usage::calendar::{self, DAY_S, utc};
use crate::usage::event::{cloud_event, hex};
use crate::usage::focus;
use crate::usage::rows::Grouping;

/// Events between two acknowledgements of an export.
const EXPORT_BATCH: usize = 1000;

/// Arguments of `esker usage`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    report: ReportArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write usage records as CloudEvents, one JSON object a line
    Export(ExportArgs),
    /// Read a whole ledger offline and tell whether every record is sound
    Verify(VerifyArgs),
}

#[derive(Debug, clap::Args)]
struct ReportArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// First hour, UTC: 2026-11-23, 2026-11-23T11, or so long ago: 24h, 7d [default: the first of this month]
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Up to this hour, not included [default: now]
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// What rows are told apart by
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tenant")]
    by: Vec<By>,
    /// Only this tenant
    #[arg(long, default_value = "", hide_default_value = true)]
    tenant: String,
    /// Prices, as TOML
    #[arg(long, value_name = "FILE")]
    prices: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long, conflicts_with = "focus")]
    json: bool,
    /// Print CSV in the columns of FOCUS 1.2 instead, one line for each charge and hour
    #[arg(long)]
    focus: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum By {
    Tenant,
    Namespace,
    Scope,
    Hour,
    Day,
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Keep the cursor on the node under this name, and move it when events are written
    #[arg(long, value_name = "NAME")]
    consumer: Option<String>,
    /// Go on behind this cursor
    #[arg(long, value_name = "CURSOR")]
    cursor: Option<String>,
    /// Append to this file, flushed before the cursor moves, instead of standard output
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Wait for new records instead of ending
    #[arg(long)]
    follow: bool,
    /// Go on behind damaged records, reporting each gap; needs the role admin
    #[arg(long)]
    past_damage: bool,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// Data folder of a node
    #[arg(value_name = "DIR")]
    data: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        None => client_runtime()?.block_on(report(args.report)).map(|()| ExitCode::SUCCESS),
        Some(Command::Export(args)) => client_runtime()?.block_on(export(args)).map(|()| ExitCode::SUCCESS),
        Some(Command::Verify(args)) => verify_folder(&args),
    }
}

/// A row of the report.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    sums: v1::UsageSums,
    amounts: Amounts,
}

async fn report(args: ReportArgs) -> anyhow::Result<()> {
    let prices = args.prices.as_deref().map(PriceFile::read).transpose()?;
    let now = now_s();
    let start = args.from.as_deref().map_or(Ok(calendar::month(now).0), |text| moment(text, now))?;
    let end = args.to.as_deref().map_or(Ok(now + HOUR_S), |text| moment(text, now))?;
    let (start, end) =
        (start / HOUR_S * HOUR_S, end.next_multiple_of(HOUR_S).min(now / HOUR_S * HOUR_S + HOUR_S));
    if start >= end {
        bail!("nothing lies between {} and {}", utc(start), utc(end));
    }
    let client = args.node.connect().await?;
    let (cluster, rows) = rows(&client, start, end, &args.tenant).await?;
    if args.focus {
        return print(&focus::csv(&cluster, &rows, prices.as_ref()));
    }
    let lines = lines(&rows, &args.by, prices.as_ref());
    if args.json {
        print(&format!("{}\n", to_json(&lines, start, end, prices.as_ref())))
    } else {
        print(&table(&lines, &args.by, start, end, prices.as_ref()))
    }
}

/// Every account of every hour, a day at a time: a reply holds so many rows and no more.
async fn rows(
    client: &Client,
    start: u64,
    end: u64,
    tenant: &str,
) -> anyhow::Result<(String, Vec<v1::UsageRow>)> {
    use v1::UsageGroup::{Hour, Namespace, Scope, Tenant};
    let (mut cluster, mut rows) = (String::new(), Vec::new());
    let mut at = start;
    let mut step = DAY_S;
    while at < end {
        let until = end.min(at + step);
        let request = v1::QueryUsageRequest {
            start_unix_s: at,
            end_unix_s: until,
            group_by: [Hour, Tenant, Namespace, Scope].into_iter().map(i32::from).collect(),
            tenant: tenant.to_owned(),
            namespace: String::new(),
        };
        match client.query_usage(request).await {
            Ok(reply) => {
                rows.extend(reply.rows);
                cluster = reply.cluster;
                at = until;
            }
            Err(error) if error.code() == Some(tonic::Code::ResourceExhausted) && step > HOUR_S => {
                step = HOUR_S
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((cluster, rows))
}

/// Rated by account and hour, then added up by what rows are told apart by.
fn lines(rows: &[v1::UsageRow], by: &[By], prices: Option<&PriceFile>) -> BTreeMap<Account, Line> {
    let has = |what| by.contains(&what);
    let period_s = if has(By::Hour) { Some(HOUR_S) } else { has(By::Day).then_some(DAY_S) };
    let grouping =
        Grouping { tenant: has(By::Tenant), namespace: has(By::Namespace), scope: has(By::Scope), period_s };
    let mut lines: BTreeMap<Account, Line> = BTreeMap::new();
    for row in rows {
        let account = Account {
            hour_unix_s: row.start_unix_s,
            tenant: row.tenant.clone(),
            namespace: bytes(&row.namespace),
            scope: row.scope.clone(),
        };
        let more = row.sums.unwrap_or_default();
        let line = lines.entry(grouping.key(&account)).or_default();
        sums::add(&mut line.sums, &more);
        if let Some(prices) = prices {
            line.amounts.add(&rate(&more, &prices.of(&row.tenant)));
        }
    }
    lines
}

fn total(lines: &BTreeMap<Account, Line>) -> Line {
    lines.values().fold(Line::default(), |mut total, line| {
        sums::add(&mut total.sums, &line.sums);
        total.amounts.add(&line.amounts);
        total
    })
}

fn table(
    lines: &BTreeMap<Account, Line>,
    by: &[By],
    start: u64,
    end: u64,
    prices: Option<&PriceFile>,
) -> String {
    let mut head: Vec<String> = by.iter().map(|by| format!("{by:?}").to_lowercase()).collect();
    head.extend(
        ["requests", "prompt tokens", "from cache", "hit rate", "computed", "written", "stored GiB-h"]
            .map(String::from),
    );
    if let Some(prices) = prices {
        let currency = &prices.currency;
        head.extend([
            format!("amount {currency}"),
            format!("without cache {currency}"),
            format!("saved {currency}"),
        ]);
    }
    let cells = |names: Vec<String>, line: &Line| {
        let Line { sums, amounts } = line;
        let mut cells = names;
        cells.extend([
            grouped(sums.requests.into()),
            grouped(sums.prompt_tokens.into()),
            grouped(sums.hit_tokens.into()),
            percent(sums.hit_tokens, sums.prompt_tokens),
            grouped(sums.miss_tokens.into()),
            grouped(sums::written(&sums.write_tokens.unwrap_or_default()).into()),
            gib_hours(sums.stored_byte_seconds),
        ]);
        if prices.is_some() {
            cells.extend([
                money(amounts.total().into()),
                money(amounts.without_cache.into()),
                money(amounts.saved()),
            ]);
        }
        cells
    };
    let mut rows = vec![head];
    rows.extend(
        lines.iter().map(|(account, line)| cells(by.iter().map(|by| name(account, *by)).collect(), line)),
    );
    let total = total(lines);
    let mut names = vec![String::new(); by.len()];
    names[0] = "total".into();
    let total_row = cells(names, &total);
    let widths: Vec<usize> = (0..total_row.len())
        .map(|column| {
            rows.iter().chain([&total_row]).map(|row| row[column].chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = format!("Usage from {} to {}, UTC\n\n", utc(start), utc(end));
    let rule: String = widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("  ");
    for (at, row) in rows.iter().enumerate() {
        text += &aligned(row, &widths, by.len());
        if at == 0 {
            text += &format!("{rule}\n");
        }
    }
    text += &format!("{rule}\n{}\n", aligned(&total_row, &widths, by.len()));
    text + &saved(&total, prices)
}

/// What caching did, in one sentence.
fn saved(total: &Line, prices: Option<&PriceFile>) -> String {
    let Line { sums, amounts } = total;
    let mut text = format!(
        "Of {} prompt tokens, {} ({}) came from the cache and were not computed again.\n",
        grouped(sums.prompt_tokens.into()),
        grouped(sums.hit_tokens.into()),
        percent(sums.hit_tokens, sums.prompt_tokens)
    );
    if let Some(prices) = prices {
        let (without, saved) = (amounts.without_cache, amounts.saved());
        let share = percent(u64::try_from(saved.max(0)).unwrap_or(u64::MAX), without);
        text += &format!(
            "Without the cache these prompts would have cost {} {currency}; caching saved {} {currency} ({share}), its storage \
             and writes taken off.\n",
            money(without.into()),
            money(saved),
            currency = prices.currency
        );
    }
    if sums.incomplete_requests > 0 {
        text += &format!(
            "{} requests were never settled or failed; they are not charged.\n",
            grouped(sums.incomplete_requests.into())
        );
    }
    if sums.faults > 0 {
        text += &format!(
            "{} requests missed through the cache's own fault; they were not charged for writes.\n",
            grouped(sums.faults.into())
        );
    }
    text
}

fn name(account: &Account, by: By) -> String {
    match by {
        By::Tenant if account.tenant.is_empty() => "(shared)".into(),
        By::Tenant => account.tenant.clone(),
        By::Namespace if account.namespace.is_empty() => "(all)".into(),
        By::Namespace => hex(&account.namespace)[..8].to_owned(),
        By::Scope => account.scope.clone(),
        By::Hour => utc(account.hour_unix_s)[..13].replace('T', " "),
        By::Day => utc(account.hour_unix_s)[..10].to_owned(),
    }
}

fn aligned(row: &[String], widths: &[usize], names: usize) -> String {
    let cells: Vec<String> = row
        .iter()
        .zip(widths)
        .enumerate()
        .map(
            |(at, (cell, width))| {
                if at < names { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            },
        )
        .collect();
    format!("{}\n", cells.join("  ").trim_end())
}

/// `1,234,567`.
fn grouped(number: i128) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if number < 0 { format!("-{text}") } else { text }
}

/// Micro-units as an amount with four decimals, rounded down; exact ones are in the JSON.
fn money(micro_units: i128) -> String {
    let text = decimal(micro_units.abs() / 100 * 100);
    let (whole, part) = text.split_once('.').unwrap_or((&text, "0000"));
    let sign = if micro_units < 0 { "-" } else { "" };
    format!("{sign}{}.{}", grouped(whole.parse().unwrap_or(0)), part.get(..4).unwrap_or("0000"))
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    let permille = u128::from(part) * 1000 / u128::from(whole);
    format!("{}.{} %", permille / 10, permille % 10)
}

fn gib_hours(byte_seconds: u64) -> String {
    let hundredths = u128::from(byte_seconds) * 100 / ((1 << 30) * 3600);
    format!("{}.{:02}", grouped((hundredths / 100).try_into().unwrap_or(i128::MAX)), hundredths % 100)
}

fn to_json(lines: &BTreeMap<Account, Line>, start: u64, end: u64, prices: Option<&PriceFile>) -> Value {
    let line = |line: &Line| {
        let Line { sums, amounts } = line;
        let writes = sums.write_tokens.unwrap_or_default();
        let mut row = json!({
            "requests": sums.requests, "incomplete_requests": sums.incomplete_requests,
            "prompt_tokens": sums.prompt_tokens, "hit_tokens": sums.hit_tokens, "miss_tokens": sums.miss_tokens,
            "write_tokens": {"ttl_5m": writes.ttl_5m, "ttl_1h": writes.ttl_1h, "ttl_24h": writes.ttl_24h,
                             "ttl_72h": writes.ttl_72h, "lease": writes.lease},
            "completion_tokens": sums.completion_tokens, "bytes_served": sums.bytes_served,
            "stored_byte_seconds": sums.stored_byte_seconds, "pinned_byte_seconds": sums.pinned_byte_seconds,
            "faults": sums.faults,
        });
        if prices.is_some() {
            row["micro_units"] = json!({
                "hit": amounts.hit, "miss": amounts.miss, "write": amounts.write, "completion": amounts.completion,
                "stored": amounts.stored, "pinned": amounts.pinned, "total": amounts.total(),
                "without_cache": amounts.without_cache,
                "saved": i64::try_from(amounts.saved()).unwrap_or(i64::MAX),
            });
        }
        row
    };
    let rows = lines.iter().map(|(account, of)| {
        let mut row = line(of);
        row["tenant"] = account.tenant.as_str().into();
        row["namespace"] = hex(&account.namespace).into();
        row["scope"] = account.scope.as_str().into();
        if account.hour_unix_s > 0 {
            row["start"] = utc(account.hour_unix_s).into();
        }
        row
    });
    json!({
        "start": utc(start), "end": utc(end), "currency": prices.map(|prices| &prices.currency),
        "rows": rows.collect::<Vec<_>>(), "total": line(&total(lines)),
    })
}

async fn export(args: ExportArgs) -> anyhow::Result<()> {
    let client = args.node.connect().await?;
    let mut out: Box<dyn Write> = match &args.to {
        Some(path) => Box::new(FlushedFile::open(path)?),
        None => Box::new(std::io::stdout().lock()),
    };
    let mut cursor = args.cursor.unwrap_or_default();
    loop {
        // Naming a cursor acknowledges what is before it, which is written by now.
        let mut replies = client
            .export_usage(v1::ExportUsageRequest {
                cursor: cursor.clone(),
                consumer: args.consumer.clone().unwrap_or_default(),
                follow: args.follow,
                limit: u32::try_from(EXPORT_BATCH).unwrap_or(u32::MAX),
                past_damage: args.past_damage,
                ..Default::default()
            })
            .await?;
        let mut written = 0;
        let ended = loop {
            let reply = match replies.message().await {
                Ok(Some(reply)) => reply,
                Ok(None) => break None,
                Err(status) => break Some(status),
            };
            match reply.event {
                Some(Event::Record(record)) => {
                    writeln!(out, "{}", cloud_event(&reply.cluster, &record))
                        .context("cannot write events")?;
                    written += 1;
                }
                Some(Event::Gap(gap)) => {
                    let lost = match gap.next_sequence {
                        0 => format!("records behind {}", gap.after_sequence),
                        next => format!("records {} to {}", gap.after_sequence + 1, next - 1),
                    };
                    note!("esker: {lost} are lost: {}", gap.reason);
                    written += 1;
                }
                // Written now rather than with the next batch, whenever that comes.
                Some(Event::Idle(_)) if written > 0 => break None,
                _ => continue,
            }
            cursor = reply.cursor;
        };
        out.flush().context("cannot write events")?;
        if let Some(status) = ended {
            bail!("{}: {}", status.code(), status.message());
        }
        if written == 0 {
            return Ok(());
        }
    }
}

/// A file whose `flush` reaches the drive.
struct FlushedFile(std::io::BufWriter<std::fs::File>);

impl FlushedFile {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        Ok(Self(std::io::BufWriter::new(file.with_context(|| format!("cannot open {}", path.display()))?)))
    }
}

impl Write for FlushedFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()?;
        self.0.get_ref().sync_data()
    }
}

fn verify_folder(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let dir = args.data.join("ledger");
    if !dir.is_dir() {
        bail!("{} has no ledger: is it the data folder of a node?", args.data.display());
    }
    let found = verify::verify(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    if args.json {
        let gaps: Vec<Value> = found
            .gaps
            .iter()
            .map(|gap| {
                json!({"after_sequence": gap.after_sequence, "next_sequence": gap.next_sequence,
                       "segment": gap.segment, "offset": gap.offset, "reason": gap.reason})
            })
            .collect();
        say!(
            "{}",
            json!({"segments": found.segments, "records": found.records, "last_sequence": found.last_sequence,
                   "gaps": gaps})
        );
    } else {
        say!("{} records in {} segments", grouped(found.records.into()), found.segments);
        for gap in &found.gaps {
            say!("DAMAGED: {gap}");
        }
        if found.gaps.is_empty() {
            say!("every record is sound, in sequence, and chained to the one before it");
        }
    }
    Ok(if found.gaps.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A moment, or so long ago.
fn moment(text: &str, now: u64) -> anyhow::Result<u64> {
    let ago = |unit: char, seconds: u64| {
        let count = text.strip_suffix(unit)?.parse::<u64>().ok()?;
        now.checked_sub(count.checked_mul(seconds)?)
    };
    ago('h', HOUR_S).or_else(|| ago('d', DAY_S)).or_else(|| calendar::parse(text)).with_context(|| {
        format!("{text:?} is no time: write 2026-11-23, 2026-11-23T11, or how long ago, such as 24h or 7d")
    })
}

fn bytes(hex: &str) -> Vec<u8> {
    let pairs = hex.as_bytes().chunks_exact(2);
    pairs.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tenant: &str, hour: u64, prompt_tokens: u64, hit_tokens: u64) -> v1::UsageRow {
        v1::UsageRow {
            tenant: tenant.into(),
            namespace: "12".repeat(32),
            scope: "private".into(),
            start_unix_s: hour * HOUR_S,
            sums: Some(v1::UsageSums {
                requests: 1,
                prompt_tokens,
                hit_tokens,
                miss_tokens: prompt_tokens - hit_tokens,
                stored_byte_seconds: (1 << 30) * 3600,
                ..Default::default()
            }),
        }
    }

    #[test]
    fn golden_table() {
        let prices =
            PriceFile::parse("currency = \"USD\"\nhit = 28000\nmiss = 280000\nstored_gib_hour = 150")
                .unwrap();
        let rows = [
            row("acme", 498_731, 40_000_000, 30_000_000),
            row("acme", 498_732, 10_000_000, 10_000_000 - 1),
            row("globex", 498_732, 1_000_000, 0),
        ];
        let lines = lines(&rows, &[By::Tenant], Some(&prices));
        let text = table(&lines, &[By::Tenant], 498_731 * HOUR_S, 498_733 * HOUR_S, Some(&prices));
        assert_eq!(text, include_str!("usage/golden.txt"), "\n{text}");
    }

    #[test]
    fn however_a_bill_is_cut_it_comes_to_the_same() {
        let prices =
            PriceFile::parse("currency = \"USD\"\nhit = 28001\nmiss = 280003\nstored_gib_hour = 151")
                .unwrap();
        let rows: Vec<_> = (0..500)
            .zip(["a", "b", "c"].iter().cycle())
            .map(|(n, tenant)| row(tenant, n, 100 + n * 7919 % 10_007, n % 90))
            .collect();
        let all = total(&lines(&rows, &[By::Tenant], Some(&prices)));
        for by in [vec![By::Hour], vec![By::Day, By::Scope], vec![By::Namespace, By::Tenant, By::Hour]] {
            let cut = total(&lines(&rows, &by, Some(&prices)));
            assert_eq!((cut.amounts, cut.sums), (all.amounts, all.sums), "{by:?}");
        }
    }

    #[test]
    fn moments() {
        let now = 1_795_434_000;
        assert_eq!(moment("24h", now).unwrap(), now - 86_400);
        assert_eq!(moment("2d", now).unwrap(), now - 172_800);
        assert_eq!(moment("2026-11-23T11:40", now).unwrap(), now);
        assert!(moment("soon", now).unwrap_err().to_string().contains("soon"));
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(-999), "-999");
        assert_eq!(money(1_234_567_890), "1,234.5678");
        assert_eq!(money(-150), "-0.0001");
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(percent(0, 0), "-");
        assert_eq!(gib_hours((1 << 30) * 3600 * 5 / 4), "1.25");
    }
}
