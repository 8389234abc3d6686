//! `esker warmup`.
//!
//! The job lives on the node: this command submits it and shows how it goes. Interrupted, it leaves the job running; given again
//! it finds the same job, and one that was cancelled or stopped by a budget goes on from where it was.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use esker_client::{Client, v1};
use esker_proto::{MAX_MESSAGE_BYTES, MAX_TEXT_BYTES};
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::json;
use v1::WarmupState as State;

use super::{NodeArgs, client_runtime};

/// Prompts of one job take at most this much of a message, so that the rest has room.
const MAX_JOB_BYTES: usize = MAX_MESSAGE_BYTES - (64 << 10);
/// Prompts of one job.
const MAX_JOB_PROMPTS: usize = 10_000;
/// How long a node that has gone is waited for, and how often it is asked.
const NODE_WAIT: Duration = Duration::from_secs(60);
const NODE_RETRY: Duration = Duration::from_secs(1);
/// Between two lines of progress where there is no terminal to draw on.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Arguments of `esker warmup`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["file", "list", "watch", "cancel"]))]
pub struct Args {
    /// Prompts, one JSON value a line: a string, or an object with "text", "prompt", "tokens" or "hashes" (a chain to be kept); "-" reads standard input
    #[arg(value_name = "FILE.jsonl")]
    file: Option<PathBuf>,
    #[command(flatten)]
    node: NodeArgs,
    /// Name of the job [default: made from the file's name, its content and the options]
    #[arg(long, value_name = "NAME", requires = "file")]
    job: Option<String>,
    /// Who will find what is stored
    #[arg(long, value_enum, default_value_t = Scope::Private)]
    scope: Scope,
    /// How long it is kept after its last use
    #[arg(long, value_enum, default_value_t = Ttl::OneDay)]
    ttl: Ttl,
    /// Store for this user of the tenant only
    #[arg(long, default_value = "")]
    user: String,
    /// Stop before more than this many tokens are computed; 0: no limit
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    max_tokens: u64,
    /// Stop before more than this many bytes are stored; 0: no limit
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    max_bytes: u64,
    /// Stop when this many seconds have passed; 0: no limit
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    deadline_s: u64,
    /// Jobs of higher priority go first
    #[arg(long, default_value_t = 0)]
    priority: u32,
    /// Only say what is cached already and what the rest would cost
    #[arg(long, requires = "file")]
    dry_run: bool,
    /// Submit the job and do not wait for it
    #[arg(long, requires = "file")]
    no_wait: bool,
    /// Show the jobs of the node
    #[arg(long)]
    list: bool,
    /// Show a job until it ends
    #[arg(long, value_name = "NAME")]
    watch: Option<String>,
    /// End a job; what it has stored stays
    #[arg(long, value_name = "NAME")]
    cancel: Option<String>,
    /// Print one JSON object for each job instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Scope {
    Private,
    Org,
    Public,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Ttl {
    #[value(name = "5m")]
    FiveMinutes,
    #[value(name = "1h")]
    OneHour,
    #[value(name = "24h")]
    OneDay,
    #[value(name = "72h")]
    ThreeDays,
}

/// Submits, shows, lists or cancels.
pub fn run(args: Args) -> anyhow::Result<()> {
    client_runtime()?.block_on(warmup(args))
}

async fn warmup(args: Args) -> anyhow::Result<()> {
    let client = args.node.connect().await?;
    if args.list {
        return list(&client, args.json).await;
    }
    if let Some(name) = &args.cancel {
        tell(&client.cancel_warmup(name).await?, args.json)?;
        return Ok(());
    }
    if let Some(name) = &args.watch {
        return watch(&args, client, name).await;
    }
    let file = args.file.as_deref().context("give a file of prompts")?;
    let jobs = jobs(&args, file)?;
    let mut names = Vec::new();
    for request in jobs {
        let job = client.submit_warmup(request).await?;
        if args.dry_run || args.no_wait {
            tell(&job, args.json)?;
        }
        names.push(job.job);
    }
    if args.dry_run || args.no_wait {
        return Ok(());
    }
    for name in names {
        watch(&args, client.clone(), &name).await?;
    }
    Ok(())
}

async fn list(client: &Client, json: bool) -> anyhow::Result<()> {
    let mut after = String::new();
    loop {
        let jobs = client.list_warmups(&after).await?;
        let Some(last) = jobs.last() else { return Ok(()) };
        after.clone_from(&last.job);
        jobs.iter().try_for_each(|job| tell(job, json))?;
    }
}

/// Shows a job until it ends. An error if it did not end well.
async fn watch(args: &Args, mut client: Client, name: &str) -> anyhow::Result<()> {
    let bar = ProgressBar::no_length();
    bar.set_style(
        ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3}%  {msg}")
            .context("the bar's template")?,
    );
    bar.set_prefix(name.to_owned());
    let mut show = Show { bar, rate: Rate::default(), told: Instant::now() };
    let (mut job, mut gone) = (None::<v1::WarmupJob>, None::<Instant>);
    'node: loop {
        let lost = match client.watch_warmup(name).await {
            Err(error) => error,
            Ok(mut watched) => loop {
                let next = tokio::select! {
                    next = watched.next() => next,
                    _ = tokio::signal::ctrl_c() => {
                        show.bar.abandon();
                        bail!(
                            "interrupted; the job goes on at the node. The same command shows it again, and \
                             esker warmup --cancel {name:?} ends it"
                        );
                    }
                };
                match next {
                    Ok(Some(now)) => {
                        gone = None;
                        show.progress(&now);
                        job = Some(now);
                    }
                    Ok(None) => break 'node,
                    Err(error) => break error,
                }
            },
        };
        // The node was stopped, or killed; the job is written down there.
        let unreachable = matches!(
            lost.code(),
            Some(
                tonic::Code::Unavailable
                    | tonic::Code::Unknown
                    | tonic::Code::Cancelled
                    | tonic::Code::Internal
            )
        );
        if !unreachable || gone.get_or_insert_with(Instant::now).elapsed() > NODE_WAIT {
            return Err(lost).context("the job is written down at the node: the same command shows it again");
        }
        show.bar.set_message("waiting for the node");
        tokio::time::sleep(NODE_RETRY).await;
        if let Ok(again) = args.node.connect().await {
            client = again;
        }
    }
    show.bar.finish_and_clear();
    let job = job.context("the node said nothing of the job")?;
    tell(&job, args.json)?;
    match job.state() {
        State::Done => Ok(()),
        State::Stopped => bail!("{name} was stopped: {}", job.reason),
        State::Cancelled => bail!("{name} was cancelled"),
        _ => bail!("{name} failed: {}", job.reason),
    }
}

/// The bar of a job, or lines where there is no terminal.
struct Show {
    bar: ProgressBar,
    rate: Rate,
    told: Instant,
}

impl Show {
    fn progress(&mut self, job: &v1::WarmupJob) {
        self.bar.set_length(job.tokens);
        self.bar.set_position(job.tokens - job.tokens_left.min(job.tokens));
        let rate = self.rate.of(job.tokens_computed);
        let left = match (rate, job.compute_ms_left) {
            (_, 0) => String::new(),
            (_, ms) => format!(", about {} left", HumanDuration(Duration::from_millis(ms))),
        };
        let text = format!(
            "{} of {} tokens, {} cached, {rate:.0} tokens/s{left}, {} written",
            job.tokens - job.tokens_left.min(job.tokens),
            job.tokens,
            job.tokens_cached,
            HumanBytes(job.bytes_written)
        );
        if self.bar.is_hidden() && self.told.elapsed() >= LINE_INTERVAL {
            self.told = Instant::now();
            note!("{}: {text}", job.job);
        }
        self.bar.set_message(text);
    }
}

/// Computed tokens a second, over the last moments.
#[derive(Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    smooth: f64,
}

impl Rate {
    #[allow(clippy::cast_precision_loss, reason = "a figure to look at")]
    fn of(&mut self, computed: u64) -> f64 {
        let now = Instant::now();
        let Some((then, before)) = self.last else {
            self.last = Some((now, computed));
            return 0.0;
        };
        let passed = now.duration_since(then).as_secs_f64();
        if computed > before && passed > 0.0 {
            let rate = (computed - before) as f64 / passed;
            self.smooth = if self.smooth == 0.0 { rate } else { self.smooth * 0.7 + rate * 0.3 };
            self.last = Some((now, computed));
        }
        self.smooth
    }
}

fn tell(job: &v1::WarmupJob, json: bool) -> anyhow::Result<()> {
    let state = job.state().as_str_name().trim_start_matches("WARMUP_STATE_").to_lowercase();
    if json {
        say!(
            "{}",
            json!({"job": job.job, "state": state, "prompts": job.prompts, "prompts_done": job.prompts_done,
                   "tokens": job.tokens, "tokens_cached": job.tokens_cached, "tokens_computed": job.tokens_computed,
                   "tokens_left": job.tokens_left, "bytes_written": job.bytes_written, "bytes_left": job.bytes_left,
                   "compute_ms": job.compute_ms, "compute_ms_left": job.compute_ms_left, "reason": job.reason,
                   "priority": job.priority})
        );
        return Ok(());
    }
    let mut text = format!("{}: {state}, {} prompts, {} tokens", job.job, job.prompts, job.tokens);
    if job.state() == State::Planned {
        text += &format!(
            ": {} cached, {} to compute and about {} to store",
            job.tokens_cached,
            job.tokens_left,
            HumanBytes(job.bytes_left)
        );
        if job.compute_ms_left > 0 {
            text += &format!(", about {}", HumanDuration(Duration::from_millis(job.compute_ms_left)));
        }
    } else {
        text += &format!(
            ": {} cached, {} computed in {:.1} s, {} left; {} written",
            job.tokens_cached,
            job.tokens_computed,
            Duration::from_millis(job.compute_ms).as_secs_f64(),
            job.tokens_left,
            HumanBytes(job.bytes_written)
        );
    }
    if !job.reason.is_empty() {
        text += &format!(" ({})", job.reason);
    }
    say!("{text}");
    Ok(())
}

/// A line of the file.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Line {
    Plain(String),
    Text { text: String },
    Prompt { prompt: String },
    Tokens { tokens: Vec<u32> },
    Chain { hashes: Vec<String> },
}

/// The jobs of a file: one, or several where it is too long for one.
fn jobs(args: &Args, file: &Path) -> anyhow::Result<Vec<v1::SubmitWarmupRequest>> {
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("cannot read standard input")?
    } else {
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?
    };
    let mut parts: Vec<Vec<v1::WarmupPrompt>> = vec![Vec::new()];
    let mut bytes = 0;
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let (prompt, size) = prompt(line).with_context(|| format!("line {number} of {}", file.display()))?;
        let part = parts.last().map_or(0, Vec::len);
        if part > 0 && (bytes + size > MAX_JOB_BYTES || part == MAX_JOB_PROMPTS) {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        parts.last_mut().context("there is always one")?.push(prompt);
    }
    if parts[0].is_empty() {
        bail!("{} has no prompts", file.display());
    }
    let name = args.job.clone().unwrap_or_else(|| name(args, file, &text));
    let several = parts.len() > 1;
    let request = |(number, prompts)| v1::SubmitWarmupRequest {
        job: if several { format!("{name}.{number}") } else { name.clone() },
        prompts,
        scope: match args.scope {
            Scope::Private => v1::Scope::Private,
            Scope::Org => v1::Scope::Org,
            Scope::Public => v1::Scope::Public,
        }
        .into(),
        ttl: match args.ttl {
            Ttl::FiveMinutes => v1::TtlClass::TtlClass5m,
            Ttl::OneHour => v1::TtlClass::TtlClass1h,
            Ttl::OneDay => v1::TtlClass::TtlClass24h,
            Ttl::ThreeDays => v1::TtlClass::TtlClass72h,
        }
        .into(),
        user: args.user.clone(),
        max_tokens: args.max_tokens,
        max_bytes: args.max_bytes,
        deadline_s: args.deadline_s,
        priority: args.priority,
        dry_run: args.dry_run,
        resume: true,
        ..Default::default()
    };
    Ok((1_u32..).zip(parts).map(request).collect())
}

/// A prompt, and the bytes that it takes in a message at most.
fn prompt(line: &str) -> anyhow::Result<(v1::WarmupPrompt, usize)> {
    use v1::warmup_prompt::Prompt;
    let line: Line = serde_json::from_str(line).context(
        "expected a JSON string, or an object with \"text\", \"prompt\", \"tokens\" or \"hashes\"",
    )?;
    let (prompt, bytes) = match line {
        Line::Plain(text) | Line::Text { text } | Line::Prompt { prompt: text } => {
            if text.len() > MAX_TEXT_BYTES {
                bail!("a text is limited to {MAX_TEXT_BYTES} bytes, this one has {}", text.len());
            }
            let bytes = text.len();
            (Prompt::Text(text), bytes)
        }
        Line::Chain { hashes } => {
            let hash = |hex: &String| {
                let hash = blake3::Hash::from_hex(hex);
                let hash = hash.with_context(|| format!("a hash has 64 hexadecimal digits, not {hex:?}"))?;
                Ok(Bytes::copy_from_slice(hash.as_bytes()))
            };
            let hashes = hashes.iter().map(hash).collect::<anyhow::Result<Vec<_>>>()?;
            let bytes = hashes.len() * 34;
            (Prompt::Chain(v1::WarmupChain { hashes }), bytes)
        }
        Line::Tokens { tokens: ids } => {
            let bytes = ids.len() * 5;
            (Prompt::Tokens(v1::WarmupTokens { ids }), bytes)
        }
    };
    Ok((v1::WarmupPrompt { prompt: Some(prompt) }, bytes + 16))
}

/// For fuzzing: a file of prompts. Whether a line of it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use prost::Message;
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let prompts = text.lines().filter_map(|line| prompt(line).ok());
    prompts.fold(false, |_, (prompt, most)| {
        let request = v1::SubmitWarmupRequest { prompts: vec![prompt], ..Default::default() };
        assert!(request.encoded_len() <= most, "{} bytes, and {most} at most", request.encoded_len());
        true
    })
}

/// The same for the same file and options, so that the same command means the same job.
fn name(args: &Args, file: &Path, text: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(text.as_bytes());
    let options = (
        args.scope as u8,
        args.ttl as u8,
        &args.user,
        args.max_tokens,
        args.max_bytes,
        args.deadline_s,
        args.priority,
    );
    hasher.update(format!("{options:?}").as_bytes());
    let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let stem: String = stem.chars().filter(|c| !c.is_control()).take(24).collect();
    format!(
        "{}-{}",
        if stem.is_empty() || stem == "-" { "warmup" } else { &stem },
        &hasher.finalize().to_hex()[..8]
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Cli::try_parse_from(std::iter::once("esker").chain(words.iter().copied())).unwrap().args
    }

    #[test]
    fn every_shape_of_a_line_is_a_prompt_and_others_are_named() {
        let chain = format!(r#"{{"hashes":["{}"]}}"#, "0a".repeat(32));
        let lines = [r#""abc""#, r#"{"text":"abc"}"#, r#"{"prompt":"abc"}"#, r#"{"tokens":[1,2]}"#, &chain];
        for line in lines {
            prompt(line).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.jsonl");
        std::fs::write(&file, "\"a\"\n\n{\"txt\":\"b\"}\n").unwrap();
        let error = format!("{:#}", jobs(&args(&["x"]), &file).unwrap_err());
        assert!(error.contains("line 3") && error.contains("\"text\""), "{error}");
        std::fs::write(&file, "\n").unwrap();
        assert!(jobs(&args(&["x"]), &file).is_err());
    }

    #[test]
    fn the_same_command_is_the_same_job_and_another_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.jsonl");
        std::fs::write(&file, "\"a\"\n").unwrap();
        let name = |words: &[&str]| jobs(&args(words), &file).unwrap()[0].job.clone();
        assert_eq!(name(&["x"]), name(&["x"]));
        assert!(name(&["x"]).starts_with("p-"));
        assert_ne!(name(&["x"]), name(&["x", "--max-tokens", "5"]));
        assert_eq!(name(&["x", "--job", "n"]), "n");
    }

    #[test]
    fn a_long_file_becomes_several_jobs_that_fit() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.jsonl");
        let line = format!("\"{}\"\n", "a".repeat(1 << 20));
        std::fs::write(&file, line.repeat(7)).unwrap();
        let jobs = jobs(&args(&["x", "--job", "n"]), &file).unwrap();
        assert_eq!(jobs.iter().map(|job| job.job.as_str()).collect::<Vec<_>>(), ["n.1", "n.2", "n.3"]);
        assert_eq!(jobs.iter().map(|job| job.prompts.len()).sum::<usize>(), 7);
    }
}
