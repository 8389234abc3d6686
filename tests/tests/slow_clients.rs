//! Promise: a client that is slow, or that stops half-way, costs the node a bounded amount of time and memory, and others nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use esker_client::v1;
use esker_prefix::{Dtype, Family, Field, Group, KvLayout};
use esker_tests::{Cage, Node, Partial, Prompt, flat_layout, scrape, scratch, value};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;
use v1::prefix_cache_client::PrefixCacheClient;

/// How long a node waits for a request to arrive, and how much later it may notice.
const PATIENCE: Duration = Duration::from_secs(30);
const SLACK: Duration = Duration::from_secs(3);
const LOOKUP: &str = "/esker.v1.PrefixCache/Lookup";

const CAGE_BYTES: u64 = 512 << 20;
/// As much in flight as nobody has: the bound is off.
const UNBOUNDED: &str = "100GiB";

async fn connect(node: &Node) -> Result<Channel> {
    Ok(Channel::from_shared(format!("http://{}", node.address))?.connect().await?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_calls_that_stall_are_ended_and_hold_nobody_up() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 3);
    node.store(&prompt, prompt.blocks(1..=3)).await?;

    let started = Instant::now();
    let mut stalled = JoinSet::new();
    for _ in 0..4 {
        let channel = connect(&node).await?;
        for number in 0..50 {
            let channel = channel.clone();
            let method = format!("/esker.v1.PrefixCache/{}", ["Settle", "Lookup", "LookupMany"][number % 3]);
            stalled.spawn(async move {
                let partial = match number % 5 {
                    0 => Partial::nothing(),
                    // It does not help to send something now and then.
                    1 => Partial::message(100_000, 50_000).trickling(Duration::from_secs(1)),
                    _ => Partial::message(100_000, 50_000),
                };
                let call = partial.call(&channel, &method);
                let status = tokio::time::timeout(PATIENCE + 5 * SLACK, call).await;
                status.context("a call was not ended")?.map(|status| (status, started.elapsed()))
            });
        }
    }
    let (mut slowest, mut lookups) = (Duration::ZERO, 0_u64);
    let mut ended = 0;
    while ended < 200 {
        let asked = Instant::now();
        let found = node.lookup(&prompt).await?;
        ensure!(found.history_tokens == 192, "{} tokens were found", found.history_tokens);
        node.cache.clone().release(v1::ReleaseRequest { grant: found.grant }).await?;
        slowest = slowest.max(asked.elapsed());
        lookups += 1;
        while let Some(call) = stalled.try_join_next() {
            let (status, after) = call??;
            ensure!(status.code() == Code::DeadlineExceeded, "a call was ended with {status}");
            ensure!(after >= PATIENCE - SLACK && after < PATIENCE + SLACK, "after {after:?}");
            ended += 1;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!(
        "200 calls were ended within {:?}; the slowest of {lookups} others took {slowest:?}",
        started.elapsed()
    );
    ensure!(slowest < Duration::from_secs(1), "a call took {slowest:?} beside those that stall");
    node.kill()
}

/// Planes of a mebibyte, eight in a block.
fn large_planes() -> Result<Arc<KvLayout>> {
    let group = Group {
        name: "latent".into(),
        family: Family::History,
        layers: (0..8).collect(),
        rows: 64,
        fields: vec![Field { name: "values".into(), dtype: Dtype::Bf16, count: 8192 }],
        restore_order: 0,
        plane_layers: 1,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    };
    Ok(Arc::new(KvLayout::new("large planes", 64, vec![group])?))
}

/// What became of clients that hold on to what they have.
#[derive(Debug, Default)]
struct Crowd {
    held: usize,
    refused: usize,
    /// The node was gone by then.
    broken: usize,
}

/// Begins so many fetches of 64 MiB and reads nothing of them.
async fn unread_fetches(
    node: &Node,
    prompt: &Prompt,
    count: usize,
) -> Result<(Crowd, Vec<tonic::Streaming<v1::FetchReply>>)> {
    let channel = Channel::from_shared(format!("http://{}", node.address))?
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(64 << 10)
        .connect()
        .await?;
    let grant = node.lookup(prompt).await?.grant;
    let (mut crowd, mut held) = (Crowd::default(), Vec::new());
    // As many at a time as may run: each gives its turn up once nobody reads it.
    for _ in 0..count / 16 {
        let mut begun = JoinSet::new();
        for _ in 0..16 {
            let mut cache = PrefixCacheClient::new(channel.clone());
            let request = v1::FetchRequest { grant: grant.clone(), ..Default::default() };
            begun.spawn(async move { cache.fetch(request).await });
        }
        for fetch in begun.join_all().await {
            match fetch {
                Ok(replies) => held.push(replies.into_inner()),
                Err(status) if status.code() == Code::ResourceExhausted => {
                    ensure!(
                        status.metadata().contains_key("grpc-retry-pushback-ms"),
                        "no pushback: {status}"
                    );
                    crowd.refused += 1;
                }
                Err(_) => crowd.broken += 1,
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    crowd.held = held.len();
    Ok((crowd, held))
}

/// A node in a cage that holds a prompt of 64 MiB.
async fn caged(cage: &Cage, folder: &std::path::Path, options: &[&str]) -> Result<(Node, Prompt)> {
    let options = [&["--no-model", "--segment-mib", "64", "--http", "127.0.0.1:0"], options].concat();
    let node = Node::start_in(cage, &folder.join("data"), &options).await?;
    let layout = large_planes()?;
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 1, 8);
    for block in 1..=8 {
        node.store(&prompt, prompt.blocks([block])).await?;
    }
    Ok((node, prompt))
}

fn in_flight(node: &Node, of: &str) -> Result<f64> {
    let (_, samples) = scrape(node)?;
    Ok(value(&samples, "esker_in_flight_bytes", &[("use", of)]))
}

/// Waits until nothing is in flight any more.
async fn idle(node: &Node) -> Result<()> {
    let started = Instant::now();
    for of in ["fetch", "put", "staged", "body"] {
        while in_flight(node, of)? != 0.0 {
            ensure!(started.elapsed() < Duration::from_secs(10), "{of}: {} bytes", in_flight(node, of)?);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fetches_that_nobody_reads_stay_within_the_memory_there_is() -> Result<()> {
    let folder = scratch();
    let Some(cage) = Cage::new(CAGE_BYTES) else { return Ok(()) };
    let (node, prompt) = caged(&cage, folder.path(), &[]).await?;
    let (crowd, held) = unread_fetches(&node, &prompt, 240).await?;
    let (peak, kills) = cage.account();
    let bytes = in_flight(&node, "fetch")?;
    println!("{crowd:?}, {bytes} bytes in flight; peak {peak:?} of {CAGE_BYTES}, {kills} kills");
    ensure!(kills == 0 && crowd.broken == 0, "{kills} kills, {crowd:?}");
    ensure!(crowd.held > 0 && crowd.refused > 0, "{crowd:?}");
    ensure!(bytes > 0.0 && bytes <= (CAGE_BYTES / 2) as f64, "{bytes} bytes in flight");
    // What they held is there for others once they have gone.
    drop(held);
    idle(&node).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 8);
    node.kill()
}

/// The control: without the bound the same clients have the node killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_bound_fetches_that_nobody_reads_take_all_memory() -> Result<()> {
    let folder = scratch();
    let Some(cage) = Cage::new(CAGE_BYTES) else { return Ok(()) };
    let (node, prompt) = caged(&cage, folder.path(), &["--in-flight", UNBOUNDED]).await?;
    let (crowd, _held) = unread_fetches(&node, &prompt, 240).await?;
    let (peak, kills) = cage.account();
    println!("{crowd:?}; peak {peak:?} of {CAGE_BYTES}, {kills} kills");
    ensure!(kills > 0, "{crowd:?} within a cage of {CAGE_BYTES} bytes: this test shows nothing");
    Ok(())
}

/// Sends nearly all of a request by HTTP; what the node answers before it has the rest.
fn unended_post(address: &str, bytes: usize) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {bytes}\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let part = vec![b' '; 256 << 10];
    for _ in 1..bytes / part.len() {
        // It is refused half-way: then there is an answer to read.
        if stream.write_all(&part).is_err() {
            break;
        }
    }
    let mut answer = vec![0; 4096];
    let read = stream.read(&mut answer).unwrap_or(0);
    Ok(String::from_utf8_lossy(&answer[..read]).to_lowercase())
}

const BODIES: usize = 200;

/// So many messages of 4 MiB that lack their end, and as many bodies of 8 MiB by HTTP.
async fn unended_bodies(node: &Node) -> Result<(Crowd, Crowd)> {
    let mut calls = JoinSet::new();
    let channel = connect(node).await?;
    for _ in 0..BODIES {
        let channel = channel.clone();
        let partial = Partial::message(4 << 20, (4 << 20) - 1024);
        calls.spawn(async move {
            tokio::time::timeout(Duration::from_secs(10), partial.call(&channel, LOOKUP)).await
        });
    }
    let mut messages = Crowd::default();
    while let Some(call) = calls.join_next().await {
        match call? {
            Err(_) => messages.held += 1,
            Ok(Ok(status)) if status.code() == Code::ResourceExhausted => {
                ensure!(status.metadata().contains_key("grpc-retry-pushback-ms"), "no pushback: {status}");
                messages.refused += 1;
            }
            Ok(_) => messages.broken += 1,
        }
    }
    let address = node.http.clone().context("it serves HTTP")?;
    let mut posts = JoinSet::new();
    for _ in 0..BODIES {
        let address = address.clone();
        posts.spawn_blocking(move || unended_post(&address, 8 << 20));
    }
    let mut bodies = Crowd::default();
    while let Some(post) = posts.join_next().await {
        match post? {
            Ok(answer) if answer.is_empty() => bodies.held += 1,
            Ok(answer) if answer.starts_with("http/1.1 429") => {
                ensure!(answer.contains("retry-after:"), "{answer}");
                bodies.refused += 1;
            }
            Ok(answer) => anyhow::bail!("answered: {answer}"),
            Err(_) => bodies.broken += 1,
        }
    }
    Ok((messages, bodies))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_do_not_end_stay_within_the_memory_there_is() -> Result<()> {
    let folder = scratch();
    let Some(cage) = Cage::new(CAGE_BYTES) else { return Ok(()) };
    let (node, prompt) = caged(&cage, folder.path(), &[]).await?;
    let (messages, bodies) = unended_bodies(&node).await?;
    let (peak, kills) = cage.account();
    println!("gRPC {messages:?}, HTTP {bodies:?}; peak {peak:?} of {CAGE_BYTES}, {kills} kills");
    ensure!(kills == 0 && messages.broken == 0, "{kills} kills, {messages:?}");
    ensure!(messages.refused > 0 && bodies.refused > 0, "gRPC {messages:?}, HTTP {bodies:?}");
    idle(&node).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 8);
    node.kill()
}

/// The control.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_bound_requests_that_do_not_end_take_all_memory() -> Result<()> {
    let folder = scratch();
    let Some(cage) = Cage::new(CAGE_BYTES) else { return Ok(()) };
    let (node, _) = caged(&cage, folder.path(), &["--in-flight", UNBOUNDED]).await?;
    let crowds = unended_bodies(&node).await;
    let (peak, kills) = cage.account();
    println!("{crowds:?}; peak {peak:?} of {CAGE_BYTES}, {kills} kills");
    ensure!(kills > 0, "{crowds:?} within a cage of {CAGE_BYTES} bytes: this test shows nothing");
    Ok(())
}
