//! `esker demo`: what Esker is for, in one run.
//!
//! Every node is a real `esker serve` process and every request goes over gRPC. The node is killed with SIGKILL
//! between the cold and the warm request, and a third node with an empty store says whether the warm answer is
//! the answer.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use esker_client::{Client, Event, Prompt, Request, v1};
use esker_prefix::{KvLayout, TokenId};
use esker_proto::check_namespace_id;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::client_runtime;
use crate::bundled;

/// Longest wait for the new blocks to be durable.
const DURABLE_WAIT: Duration = Duration::from_secs(60);

/// A small model that always takes the likeliest token soon repeats itself. Seeded, so runs still compare.
const TEMPERATURE: f32 = 0.7;
const TOP_P: f32 = 0.9;

/// Arguments of `esker demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder for the demo's data, on the drive to be shown; a new folder is made in it and removed afterwards
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Document instead of the bundled one
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
    /// Tokens to write for each question
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
}

/// Runs the demo; the last line on standard output is one JSON object.
pub fn run(args: Args) -> anyhow::Result<()> {
    client_runtime()?.block_on(demo(args))
}

async fn demo(args: Args) -> anyhow::Result<()> {
    let document = match &args.document {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
        }
        None => bundled::DEMO_DOCUMENT.to_owned(),
    };
    let mut questions = bundled::DEMO_QUESTIONS.lines();
    let first = questions.next().context("the bundled questions are missing")?;
    let second = questions.next().context("the second bundled question is missing")?;
    let folder = Folder::new(args.data)?;

    note!("1. A node with an empty store reads the document.");
    let node = Node::start(&folder.0.join("a")).await?;
    let about = node.client.describe().await?;
    note!("   model {} with {} parameters, data in {}", about.model, about.parameters, folder.0.display());
    let cold = node.ask(&document, first, args.max_new_tokens).await?;
    cold.tell(first);

    note!("2. The node is killed with SIGKILL once the blocks are durable, and started again.");
    let waited = node.wait_until_durable(&about, &cold.prompt).await?;
    note!("   durable {:.0} ms after the answer", ms(waited));
    node.kill()?;
    let restarted = Instant::now();
    let node = Node::start(&folder.0.join("a")).await?;
    note!("   back after {:.0} ms", ms(restarted.elapsed()));

    note!("3. The same document, another question.");
    let warm = node.ask(&document, second, args.max_new_tokens).await?;
    warm.tell(second);
    let store_bytes = node.client.describe().await?.store_bytes;
    node.kill()?;

    note!("4. The same request on a node with an empty store.");
    let node = Node::start(&folder.0.join("b")).await?;
    let reference = node.ask(&document, second, args.max_new_tokens).await?;
    node.kill()?;
    ensure!(reference.usage.prompt_cache_hit_tokens == 0, "the empty store was not empty");
    let identical = warm.tokens == reference.tokens && warm.logits == reference.logits;
    let verdict =
        if identical { "the same tokens and logits, bit for bit" } else { "DIFFERENT tokens or logits" };
    note!("   first token after {:.0} ms; {verdict}", ms(reference.ttft));

    let speedup = ms(cold.ttft) / ms(warm.ttft);
    say!(
        "{}",
        json!({
            "cold_ttft_ms": round(ms(cold.ttft)),
            "warm_ttft_ms": round(ms(warm.ttft)),
            "speedup": round(speedup),
            "prompt_tokens": warm.usage.prompt_tokens,
            "hit_tokens": warm.usage.prompt_cache_hit_tokens,
            "bytes_read": warm.usage.bytes_read,
            "identical": identical,
            "store_bytes": store_bytes,
            "model": about.model,
        })
    );
    ensure!(identical, "the warm answer differs from the answer of an empty node");
    Ok(())
}

/// A folder of this run alone, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(parent: Option<PathBuf>) -> anyhow::Result<Self> {
        // Not the system's temporary folder: that is often memory, and the demo is about a drive.
        let parent = match (parent, std::env::var_os("HOME")) {
            (Some(parent), _) => parent,
            (None, Some(home)) => Path::new(&home).join(".cache/esker"),
            (None, None) => std::env::temp_dir(),
        };
        let folder = parent.join(format!("demo-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            note!("could not remove {}: {error}", self.0.display());
        }
    }
}

/// A child process that serves; killed when dropped.
struct Node {
    process: Child,
    client: Client,
}

impl Node {
    async fn start(data: &Path) -> anyhow::Result<Self> {
        let exe = std::env::current_exe().context("cannot find the esker binary")?;
        let mut process = Command::new(exe)
            .args(["serve", "--listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .env("ESKER_LOG", std::env::var("ESKER_LOG").unwrap_or_else(|_| "warn".into()))
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start `esker serve`")?;
        let mut line = String::new();
        let output = process.stdout.take().context("the node has no standard output")?;
        BufReader::new(output).read_line(&mut line).context("cannot read the node's first line")?;
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            // Reap it; why it ended stands on its standard error, which is ours.
            let _ = process.kill();
            let _ = process.wait();
            bail!("the node ended before it listened");
        };
        let client = Client::connect(address).await?;
        Ok(Self { process, client })
    }

    async fn ask(&self, document: &str, question: &str, max_new_tokens: u32) -> anyhow::Result<Answer> {
        let prompt = self.client.tokenize(&format!("{document}\n{question}")).await?;
        let bar = ProgressBar::new(prompt.len() as u64).with_style(
            ProgressStyle::with_template("   {msg:9} {wide_bar} {pos}/{len} tokens")
                .context("progress bar template")?,
        );
        let request = Request {
            max_new_tokens,
            temperature: TEMPERATURE,
            top_p: TOP_P,
            logits_digest: true,
            ..Request::new(Prompt::Tokens(prompt.clone()))
        };
        let started = Instant::now();
        let mut events = self.client.generate(request).await?;
        let mut answer = Answer { prompt, ..Answer::default() };
        while let Some(event) = events.next().await? {
            match event {
                Event::Progress(progress) => {
                    let phase =
                        if progress.phase() == v1::Phase::Restore { "restoring" } else { "computing" };
                    bar.set_message(phase);
                    bar.set_length(progress.total_tokens);
                    bar.set_position(progress.done_tokens);
                }
                Event::Prompt(_) => {}
                Event::Token(token) => {
                    if answer.tokens.is_empty() {
                        answer.ttft = started.elapsed();
                        bar.finish_and_clear();
                    }
                    answer.tokens.push(token.id);
                    answer.logits.push(token.logits_digest.to_vec());
                    answer.text.push_str(&token.text);
                }
                Event::Usage(usage) => {
                    answer.text.push_str(&usage.rest_of_text);
                    answer.usage = usage;
                }
            }
        }
        bar.finish_and_clear();
        ensure!(!answer.tokens.is_empty(), "the model wrote nothing");
        Ok(answer)
    }

    /// A block shows in a lookup only after it is flushed, so the lookup is the proof.
    async fn wait_until_durable(
        &self,
        about: &v1::DescribeReply,
        prompt: &[TokenId],
    ) -> anyhow::Result<Duration> {
        let namespace = check_namespace_id(&about.namespace)?;
        let block_tokens = u64::from(KvLayout::from_json(&about.layout_json)?.block_tokens());
        let whole = (prompt.len() as u64 - 1) / block_tokens * block_tokens;
        let started = Instant::now();
        loop {
            let found = self.client.lookup(namespace, prompt).await?.history_tokens;
            if found >= whole {
                return Ok(started.elapsed());
            }
            ensure!(started.elapsed() < DURABLE_WAIT, "only {found} of {whole} tokens were stored");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGKILL: no warning, no flush, no farewell.
    fn kill(mut self) -> anyhow::Result<()> {
        self.process.kill().context("cannot kill the node")?;
        self.process.wait().context("cannot reap the node")?;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail harmlessly on a process that is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Default)]
struct Answer {
    prompt: Vec<TokenId>,
    tokens: Vec<u32>,
    logits: Vec<Vec<u8>>,
    text: String,
    ttft: Duration,
    usage: v1::GenerateUsage,
}

impl Answer {
    fn tell(&self, question: &str) {
        let usage = &self.usage;
        note!("   {question}{}", self.text.replace('\n', "\n   "));
        note!(
            "   first token after {:.0} ms: {} of {} tokens from the cache in {:.0} ms, {} computed in {:.0} ms; \
             {:.1} MiB read from SSD",
            ms(self.ttft),
            usage.prompt_cache_hit_tokens,
            usage.prompt_tokens,
            usage.restore_us as f64 / 1e3,
            usage.prompt_cache_miss_tokens,
            usage.prefill_us as f64 / 1e3,
            usage.bytes_read as f64 / f64::from(1 << 20)
        );
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
