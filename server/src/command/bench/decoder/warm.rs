//! Time to first token with 16k tokens in the store, over that of an empty store.
//!
//! Every request goes to an `esker serve` process over gRPC on loopback. Before each warm one the node is killed, the page cache
//! of its data folder dropped, and the node started again; starting is not counted.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use esker_client::{Client, Event, Prompt, Request, v1};
use esker_prefix::TokenId;
use esker_proto::check_namespace_id;
use serde_json::{Map, Value, json};

use super::{Bed, CONTEXT, median};
use crate::bundled;
use crate::command::client_runtime;

const CACHED_TOKENS: usize = 16 << 10;
/// Of a new turn.
const TURN_TOKENS: usize = 64;
const COLD_ROUNDS: usize = 2;
const WARM_ROUNDS: usize = 5;
/// Longest wait for what was computed to be durable.
const DURABLE_WAIT: Duration = Duration::from_secs(60);

pub(super) fn run(bed: &Bed, dir: &Path, figures: &mut Map<String, Value>) -> anyhow::Result<()> {
    let model = dir.join("bundled");
    std::fs::create_dir(&model).with_context(|| format!("cannot make {}", model.display()))?;
    bundled::write_to(&model, CONTEXT)?;
    client_runtime()?.block_on(measure(bed, dir, &model, figures))
}

async fn measure(
    bed: &Bed,
    dir: &Path,
    model: &Path,
    figures: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    let prefix = bed.tokens(CACHED_TOKENS);
    let prompt = |turn: usize| -> Vec<TokenId> {
        let first = turn * TURN_TOKENS % (bed.document.len() - TURN_TOKENS);
        prefix.iter().chain(&bed.document[first..first + TURN_TOKENS]).copied().collect()
    };
    let data = |round: usize| -> PathBuf { dir.join(format!("cold-{round}")) };
    let mut cold_s = Vec::new();
    for round in 0..COLD_ROUNDS {
        let node = Node::start(&data(round), model)?;
        let client = node.connect().await?;
        let (first, usage) = ask(&client, prompt(1)).await?;
        ensure!(
            usage.prompt_cache_hit_tokens == 0,
            "an empty store had {} tokens",
            usage.prompt_cache_hit_tokens
        );
        cold_s.push(first.as_secs_f64());
        wait_until_durable(&client, &prompt(1)).await?;
    }
    let (mut warm_s, mut bytes) = (Vec::new(), 0);
    for round in 0..WARM_ROUNDS {
        let data = data(0);
        esker_benches::drop_page_cache(&data)
            .with_context(|| format!("cannot drop the page cache of {}", data.display()))?;
        let node = Node::start(&data, model)?;
        let client = node.connect().await?;
        let (first, usage) = ask(&client, prompt(2 + round)).await?;
        let hit = usage.prompt_cache_hit_tokens;
        ensure!(hit == CACHED_TOKENS as u64, "{hit} of {CACHED_TOKENS} tokens were found");
        warm_s.push(first.as_secs_f64());
        bytes = usage.bytes_read;
    }
    let (cold_s, warm_s) = (median(&mut cold_s), median(&mut warm_s));
    figures.insert("cold_ttft_16k_ms".into(), json!(cold_s * 1e3));
    figures.insert("warm_ttft_16k_ms".into(), json!(warm_s * 1e3));
    figures.insert("warm_bytes_read_16k".into(), json!(bytes));
    figures.insert("warm_ttft_speedup_16k".into(), json!(cold_s / warm_s));
    Ok(())
}

/// Time to the first token of one request, and what it used.
async fn ask(client: &Client, prompt: Vec<TokenId>) -> anyhow::Result<(Duration, v1::GenerateUsage)> {
    // Seeded like the demo's: the likeliest token may be the end of the text, and then there is none to wait for.
    let request =
        Request { max_new_tokens: 1, temperature: 0.7, top_p: 0.9, ..Request::new(Prompt::Tokens(prompt)) };
    let (started, mut first, mut used) = (Instant::now(), None, None);
    let mut events = client.generate(request).await?;
    while let Some(event) = events.next().await? {
        match event {
            Event::Token(_) => drop(first.get_or_insert_with(|| started.elapsed())),
            Event::Usage(usage) => used = Some(usage),
            _ => {}
        }
    }
    Ok((first.context("the model wrote nothing")?, used.context("the generation did not end")?))
}

/// A block shows in a lookup only after it is flushed, so the lookup is the proof. It is one of a whole prompt: what ends with a
/// block is found up to the block before, since a token must be left to compute.
async fn wait_until_durable(client: &Client, prompt: &[TokenId]) -> anyhow::Result<()> {
    let namespace = check_namespace_id(&client.describe().await?.namespace)?;
    let started = Instant::now();
    loop {
        let found = client.lookup(namespace, prompt).await?.history_tokens;
        if found >= CACHED_TOKENS as u64 {
            return Ok(());
        }
        ensure!(started.elapsed() < DURABLE_WAIT, "only {found} of {CACHED_TOKENS} tokens were stored");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A child process that serves; killed when dropped.
struct Node {
    process: Child,
    address: String,
}

impl Node {
    fn start(data: &Path, model: &Path) -> anyhow::Result<Self> {
        let exe = std::env::current_exe().context("cannot find the esker binary")?;
        let mut process = Command::new(exe)
            .args(["serve", "--listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .arg("--model")
            .arg(model)
            .env("ESKER_LOG", std::env::var("ESKER_LOG").unwrap_or_else(|_| "warn".into()))
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start `esker serve`")?;
        let mut line = String::new();
        let output = process.stdout.take().context("the node has no standard output")?;
        let mut node = Self { process, address: String::new() };
        BufReader::new(output).read_line(&mut line).context("cannot read the node's first line")?;
        // Why it ended stands on its standard error, which is ours.
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            bail!("the node ended before it listened")
        };
        address.clone_into(&mut node.address);
        Ok(node)
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(&self.address).await?)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail harmlessly on a process that is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
