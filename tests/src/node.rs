//! A node: a child process that serves, and a client of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use esker_client::{Client, Event, Object, Request, v1};
use esker_prefix::{KvLayout, Namespace, NamespaceId, ObjectKind, TokenId};
use esker_proto::{MAX_MESSAGE_BYTES, check_namespace_id, chunks};
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use v1::prefix_cache_client::PrefixCacheClient;

use crate::{Cage, Prompt, esker};

/// A running node. Killed when dropped.
pub struct Node {
    /// Where it listens.
    pub address: String,
    /// Where it listens for HTTP, if it was asked to.
    pub http: Option<String>,
    /// IP address and port of its KV events, if it was asked for them.
    pub events: Option<String>,
    /// The same for those that were missed.
    pub replay: Option<String>,
    /// The ordinary client.
    pub client: Client,
    /// The bare one, for requests that the ordinary one would not make.
    pub cache: PrefixCacheClient<Channel>,
    /// The connection of `cache`.
    pub channel: Channel,
    process: Child,
    log: PathBuf,
}

impl Node {
    /// Starts `esker serve` on a free port; its log goes to a file beside `data`. Connections are made when first used: never,
    /// for a node that is reached over TLS.
    pub async fn start(data: &Path, options: &[&str]) -> Result<Self> {
        Self::start_by(Command::new(esker()), data, options)
    }

    /// The same, with the memory of a cage.
    pub async fn start_in(cage: &Cage, data: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(cage.door()).arg(esker());
        Self::start_by(command, data, options)
    }

    fn start_by(mut command: Command, data: &Path, options: &[&str]) -> Result<Self> {
        let log = data.with_extension("log");
        let mut process = command
            .args(["serve", "--listen", "127.0.0.1:0", "--data"])
            .arg(data)
            .args(options)
            .env("ESKER_LOG", "info")
            .stdout(Stdio::piped())
            .stderr(File::options().create(true).append(true).open(&log)?)
            .spawn()?;
        let mut line = String::new();
        let output = process.stdout.take().context("standard output was asked for")?;
        let mut output = BufReader::new(output);
        output.read_line(&mut line)?;
        let Some(address) = line.trim().strip_prefix("listening on ").map(str::to_owned) else {
            let status = process.wait()?;
            let log = std::fs::read_to_string(&log)?;
            bail!("the node ended before it listened, {status}: {}", log.lines().last().unwrap_or_default());
        };
        let mut more = |option: &str, before: &str| -> Result<Option<String>> {
            if !options.contains(&option) {
                return Ok(None);
            }
            line.clear();
            output.read_line(&mut line)?;
            Ok(line.trim().strip_prefix(before).map(str::to_owned))
        };
        let http = more("--http", "http on ")?;
        let events = more("--kv-events", "kv events on tcp://")?;
        let replay = more("--kv-events-replay", "kv events replay on tcp://")?;
        let channel = Channel::from_shared(format!("http://{address}"))?.connect_lazy();
        let cache = PrefixCacheClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self {
            client: Client::over(channel.clone()),
            cache,
            channel,
            address,
            http,
            events,
            replay,
            process,
            log,
        })
    }

    /// A node without a model, with small segments.
    pub async fn store_only(data: &Path) -> Result<Self> {
        Self::start(data, &["--no-model", "--segment-mib", "4"]).await
    }

    /// SIGKILL: no warning, no flush, no farewell.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.check_log()
    }

    /// SIGTERM, and how the node ended.
    pub async fn stop(self) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.ended().await
    }

    /// Waits until the node has ended; meanwhile the client answers its farewell.
    pub async fn ended(mut self) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.process.try_wait()? {
                self.check_log()?;
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends a signal, such as `TERM`, without waiting for what comes of it.
    pub fn signal(&self, name: &str) -> Result<()> {
        let sent = Command::new("kill").args(["-s", name, &self.process.id().to_string()]).status()?;
        ensure!(sent.success(), "the node is gone");
        Ok(())
    }

    /// What it logged, earlier nodes of the same folder included.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log)?)
    }

    fn check_log(&self) -> Result<()> {
        let log = self.log()?;
        ensure!(!log.contains("panicked"), "the node panicked: {log}");
        Ok(())
    }

    /// Makes a namespace of made-up weights known.
    pub async fn register(&self, layout: &KvLayout, weights: u8) -> Result<NamespaceId> {
        let namespace = Namespace {
            weights: [weights; 32],
            tokenizer: [2; 32],
            layout: layout.id(),
            adapter: String::new(),
        };
        Ok(self.client.register_namespace(&namespace, layout).await?)
    }

    /// Stores objects, all of which must be taken.
    pub async fn store(&self, prompt: &Prompt, objects: Vec<Object>) -> Result<()> {
        let count = objects.len();
        let results = self.client.put(prompt.namespace, &prompt.tokens, objects).await?;
        ensure!(results.len() == count, "{} results for {count} objects", results.len());
        let durable = |result: &v1::PutReply| result.durability() == v1::Durability::Durable;
        ensure!(results.iter().all(durable), "not everything was stored: {results:?}");
        Ok(())
    }

    /// Starts a put and gives its replies as they come.
    pub async fn put_stream(
        &self,
        prompt: &Prompt,
        objects: Vec<Object>,
    ) -> Result<Streaming<v1::PutReply>, Status> {
        self.put_steps(put_steps(prompt, objects)).await
    }

    /// A put of these very messages.
    pub async fn put_steps(
        &self,
        steps: Vec<v1::put_request::Step>,
    ) -> Result<Streaming<v1::PutReply>, Status> {
        let messages = steps.into_iter().map(|step| v1::PutRequest { step: Some(step) });
        let messages = tokio_stream::iter(messages.collect::<Vec<_>>());
        Ok(self.cache.clone().put(messages).await?.into_inner())
    }

    /// What can be resumed.
    pub async fn lookup(&self, prompt: &Prompt) -> Result<v1::LookupReply> {
        Ok(self.client.lookup(prompt.namespace, &prompt.tokens).await?)
    }

    /// Lookup, and everything up to the best resume point; nothing if there is none.
    pub async fn fetch_best(&self, prompt: &Prompt) -> Result<Fetched> {
        let found = self.lookup(prompt).await?;
        if found.grant.is_empty() {
            return Ok(Fetched::default());
        }
        Ok(self.fetch(v1::FetchRequest { grant: found.grant, ..Default::default() }).await?)
    }

    /// The planes that a request names, put together from their chunks.
    pub async fn fetch(&self, request: v1::FetchRequest) -> Result<Fetched, Status> {
        let mut replies = self.cache.clone().fetch(request).await?.into_inner();
        let mut fetched = Fetched::default();
        let mut ended = false;
        while let Some(reply) = replies.message().await? {
            match reply.event.ok_or_else(|| Status::internal("a reply without an event"))? {
                v1::fetch_reply::Event::Chunk(chunk) => fetched.add(&chunk)?,
                v1::fetch_reply::Event::Missing(missing) => fetched.missing.push(missing),
                v1::fetch_reply::Event::Done(done) => {
                    fetched.done = done;
                    ended = true;
                }
            }
        }
        if ended { Ok(fetched) } else { Err(Status::internal("the fetch ended without its account")) }
    }

    /// Asks the decoder.
    pub async fn ask(&self, request: Request) -> Result<Answer> {
        let mut events = self.client.generate(request).await?;
        let mut answer = Answer::default();
        let mut usage = None;
        while let Some(event) = events.next().await? {
            ensure!(usage.is_none(), "something came after the usage");
            match event {
                Event::Progress(_) | Event::Prompt(_) => {}
                Event::Token(token) => answer.tokens.push((token.id, token.logits_digest)),
                Event::Usage(last) => usage = Some(last),
            }
        }
        answer.usage = usage.context("the generation ended without its usage")?;
        Ok(answer)
    }

    /// Waits until every block that a lookup of `tokens` can offer is durable, which is when it is found.
    pub async fn settled(&self, tokens: &[TokenId]) -> Result<()> {
        let about = self.client.describe().await?;
        let namespace = check_namespace_id(&about.namespace)?;
        let block_tokens = u64::from(KvLayout::from_json(&about.layout_json)?.block_tokens());
        let whole = (tokens.len() as u64 - 1) / block_tokens * block_tokens;
        let started = Instant::now();
        loop {
            let found = self.client.lookup(namespace, tokens).await?.history_tokens;
            if found >= whole {
                return Ok(());
            }
            let late = started.elapsed() > Duration::from_secs(20);
            ensure!(!late, "only {found} of {whole} tokens were stored: {}", self.log()?);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until a conversation that goes on from here is resumed at its very end: what is stored last of a turn.
    pub async fn parked(&self, tokens: &[TokenId]) -> Result<()> {
        self.resumable(&[tokens, &tokens[..1]].concat(), tokens.len() as u64).await
    }

    /// Waits until a prompt of this length can be resumed there: the state behind its last block comes after that block.
    pub async fn resumable(&self, tokens: &[TokenId], at: u64) -> Result<()> {
        let namespace = check_namespace_id(&self.client.describe().await?.namespace)?;
        let started = Instant::now();
        loop {
            let best = self.client.lookup(namespace, tokens).await?.best.unwrap_or_default().tokens;
            if best >= at {
                return Ok(());
            }
            let late = started.elapsed() > Duration::from_secs(20);
            ensure!(!late, "resumed at {best} at best, not at {at}: {}", self.log()?);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail harmlessly on a process that is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The messages of a put.
pub fn put_steps(prompt: &Prompt, objects: Vec<Object>) -> Vec<v1::put_request::Step> {
    use v1::put_request::Step;
    let mut steps = vec![Step::Prefix(v1::PutPrefix {
        namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
        tokens: prompt.tokens.iter().map(|token| token.0).collect(),
        ..Default::default()
    })];
    for Object { kind, tokens, planes } in objects {
        for (plane, index) in planes.into_iter().zip(0..) {
            steps.extend(chunks(kind, tokens, index, plane).map(Step::Chunk));
        }
    }
    steps
}

/// Which plane of which object: kind, prefix length, position in the restore order.
type PlaneName = (ObjectKind, u64, usize);

/// What a fetch gave.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Planes, in the order in which they came.
    pub planes: Vec<(PlaneName, Vec<u8>)>,
    /// Objects that could not be had.
    pub missing: Vec<v1::Missing>,
    /// The closing account.
    pub done: v1::FetchDone,
}

impl Fetched {
    /// Takes the next chunk of a fetch.
    pub fn add(&mut self, chunk: &v1::PlaneChunk) -> Result<(), Status> {
        let kind = match chunk.kind() {
            v1::ObjectKind::State => ObjectKind::State,
            _ => ObjectKind::Block,
        };
        let name = (kind, chunk.tokens, chunk.plane as usize);
        if chunk.offset == 0 {
            self.planes.push((name, Vec::new()));
        }
        match self.planes.last_mut() {
            Some((last, bytes)) if *last == name && bytes.len() as u64 == chunk.offset => {
                bytes.extend_from_slice(&chunk.data);
                Ok(())
            }
            _ => Err(Status::internal("the parts of a plane are not in order")),
        }
    }

    /// The names of the planes that came, in order.
    pub fn names(&self) -> Vec<PlaneName> {
        self.planes.iter().map(|(name, _)| *name).collect()
    }

    /// Planes that are not, byte for byte, what the prompt's writer put.
    pub fn wrong_planes(&self, prompt: &Prompt) -> usize {
        let right =
            |(kind, tokens, plane): PlaneName, bytes: &[u8]| prompt.plane(kind, tokens, plane) == bytes;
        self.planes.iter().filter(|(name, bytes)| !right(*name, bytes)).count()
    }

    /// Objects of which every plane came.
    pub fn whole_objects(&self, prompt: &Prompt) -> BTreeSet<(ObjectKind, u64)> {
        let mut counts = BTreeMap::new();
        for (kind, tokens, _) in self.names() {
            *counts.entry((kind, tokens)).or_insert(0) += 1;
        }
        counts
            .into_iter()
            .filter(|((kind, tokens), count)| *count == prompt.layout.planes_at(*kind, *tokens).len())
            .map(|c| c.0)
            .collect()
    }

    /// Exactly the first blocks of the prompt came, whole and right.
    pub fn expect_blocks(&self, prompt: &Prompt, blocks: u64) {
        let expected = (1..=blocks).map(|number| (ObjectKind::Block, prompt.boundary(number))).collect();
        assert_eq!(self.whole_objects(prompt), expected);
        assert_eq!(self.wrong_planes(prompt), 0);
    }
}

/// What the decoder answered.
#[derive(Debug, Default)]
pub struct Answer {
    /// Tokens, each with the digest of the logits that it was chosen from.
    pub tokens: Vec<(u32, Bytes)>,
    /// The account.
    pub usage: v1::GenerateUsage,
}

/// A question about tokens: greedy, eight tokens long, with digests of the logits.
pub fn question(tokens: &[TokenId]) -> Request {
    let prompt = esker_client::Prompt::Tokens(tokens.to_vec());
    Request { max_new_tokens: 8, logits_digest: true, ..Request::new(prompt) }
}
