//! Promise: a node says what it is, shows itself to nobody by accident, and goes in an orderly way.

use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::Result;
use esker_client::{Event, Request};
use esker_tests::{Node, Prompt, flat_layout, output, question, scratch, text_of, tokens};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServiceResponse};

const CACHE: &str = "esker.v1.PrefixCache";
const DECODER: &str = "esker.v1.Decoder";

async fn health(node: &Node, service: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: service.to_owned() };
    let reply = HealthClient::new(node.channel.clone()).check(request).await;
    reply.map(|reply| reply.into_inner().status()).map_err(|status| status.code())
}

#[tokio::test]
async fn health_and_reflection_name_both_services() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    for service in ["", CACHE, DECODER] {
        assert_eq!(health(&node, service).await, Ok(ServingStatus::Serving), "{service:?}");
    }
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(node.channel.clone());
    let mut replies = client.server_reflection_info(tokio_stream::iter([list])).await?.into_inner();
    let Some(MessageResponse::ListServicesResponse(listed)) =
        replies.message().await?.and_then(|reply| reply.message_response)
    else {
        anyhow::bail!("reflection does not list services");
    };
    let names: Vec<_> = listed.service.into_iter().map(|ServiceResponse { name }| name).collect();
    assert!(names.iter().any(|name| name == CACHE) && names.iter().any(|name| name == DECODER), "{names:?}");
    node.kill()
}

#[tokio::test]
async fn without_a_model_there_is_a_cache_and_no_decoder() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    assert_eq!(health(&node, CACHE).await, Ok(ServingStatus::Serving));
    assert_ne!(health(&node, DECODER).await, Ok(ServingStatus::Serving));
    let error = node.client.describe().await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unimplemented));
    assert!(error.to_string().contains("started without a model"), "{error}");
    node.kill()
}

/// A socket that gathers small frames until what it sent before is acknowledged waits for its peer, which takes 40 ms for that.
#[tokio::test]
async fn no_reply_waits_for_an_acknowledgement() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let layout = flat_layout();
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 1, 1);
    node.store(&prompt, prompt.blocks([1])).await?;
    let mut times = Vec::new();
    // A new connection's peer acknowledges at once; only later ones tell.
    for _ in 0..40 {
        let started = Instant::now();
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
        times.push(started.elapsed());
    }
    times.sort();
    assert!(times[10] < Duration::from_millis(35), "{times:?}");
    node.kill()
}

#[test]
fn nobody_listens_beyond_loopback_by_accident() {
    let folder = scratch();
    let data = folder.path().join("data");
    let args = ["serve", "--no-model", "--listen", "0.0.0.0:0", "--data"];
    let refused = output(args.iter().map(std::ffi::OsStr::new).chain([data.as_os_str()]));
    let text = text_of(&refused.stderr);
    assert!(!refused.status.success() && refused.stdout.is_empty());
    assert!(text.contains("refusing to listen on 0.0.0.0:0") && text.contains("--insecure"), "{text}");
}

#[tokio::test]
async fn a_taken_port_is_named() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("a")).await?;
    let data = folder.path().join("b");
    let args = ["serve", "--no-model", "--listen", &node.address, "--data"];
    let refused = output(args.iter().map(std::ffi::OsStr::new).chain([data.as_os_str()]));
    let text = text_of(&refused.stderr);
    assert!(!refused.status.success());
    assert!(text.contains(&format!("cannot listen on {}", node.address)), "{text}");
    node.kill()
}

#[tokio::test]
async fn an_orderly_stop_ends_well_and_lets_streams_end() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let request = Request { max_new_tokens: 48, ..question(&tokens(3, 300)) };
    let mut events = node.client.generate(request).await?;
    while !matches!(events.next().await?, Some(Event::Token(_)) | None) {}
    let asked = Instant::now();
    node.signal("TERM")?;
    let mut last = None;
    while let Some(event) = events.next().await? {
        last = Some(event);
    }
    assert!(matches!(last, Some(Event::Usage(_))), "the stream was cut: {last:?}");
    assert!(node.ended().await?.success());
    assert!(asked.elapsed() < Duration::from_secs(15), "it took {:?}", asked.elapsed());
    Ok(())
}

#[test]
fn every_command_explains_its_options() {
    let commands: [(&str, &[&str]); 6] = [
        ("", &["serve", "generate", "lookup", "demo", "golden", "--version"]),
        (
            "serve",
            &[
                "--data",
                "--listen",
                "--insecure",
                "--model",
                "--no-model",
                "--kv",
                "--block-tokens",
                "--codec",
                "--segment-mib",
                "--io",
            ],
        ),
        (
            "generate",
            &[
                "--file",
                "--node",
                "--max-new-tokens",
                "--temperature",
                "--top-p",
                "--seed",
                "--json",
                "ESKER_NODE",
            ],
        ),
        ("lookup", &["--file", "--node", "--json", "ESKER_NODE"]),
        ("demo", &["--data", "--document", "--max-new-tokens"]),
        ("golden", &["<DIR>", "--block-tokens"]),
    ];
    for (command, names) in commands {
        let Output { status, stdout, .. } =
            output([command, "--help"].into_iter().filter(|word| !word.is_empty()));
        let text = text_of(&stdout);
        assert!(status.success(), "esker {command} --help");
        for name in names {
            assert!(text.contains(name), "esker {command} --help does not name {name}:\n{text}");
        }
    }
    assert!(text_of(&output(["--version"]).stdout).starts_with("esker 0."));
}

#[tokio::test]
async fn the_commands_of_a_client() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--block-tokens", "16"]).await?;
    let text = "And it came to pass in those days, that there went out a decree. ".repeat(6);
    let run = |args: &[&str]| {
        let done = output([args, &["--node", &node.address, "--json", &text]].concat());
        assert!(done.status.success(), "{}", text_of(&done.stderr));
        serde_json::from_slice::<serde_json::Value>(&done.stdout)
    };
    let before = run(&["lookup"])?;
    assert_eq!((&before["history_tokens"], &before["resume_points"]), (&0.into(), &serde_json::json!([])));
    let cold = run(&["generate", "-n", "4"])?;
    node.parked(&node.client.tokenize(&text).await?).await?;
    let warm = run(&["generate", "-n", "4"])?;
    assert_eq!(cold["text"], warm["text"]);
    let found = run(&["lookup"])?;
    assert_eq!(found["resume_points"][0]["tokens"], warm["usage"]["prompt_cache_hit_tokens"]);
    assert!(warm["usage"]["prompt_cache_hit_tokens"].as_u64() > Some(0), "{warm}");
    assert_eq!(found["prompt_tokens"], warm["usage"]["prompt_tokens"]);
    node.kill()
}

#[test]
fn a_client_without_a_node_says_so() {
    for command in ["generate", "lookup"] {
        let failed = output([command, "--node", "127.0.0.1:1", "text"]);
        let text = text_of(&failed.stderr);
        assert!(!failed.status.success());
        assert!(text.contains("cannot connect to 127.0.0.1:1: is `esker serve` running there?"), "{text}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_nothing_with_it() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 40);
    node.store(&prompt, prompt.blocks(1..=40)).await?;

    // More than may run at a time of each kind, every one abandoned half-way.
    for turn in 0..80 {
        let found = node.lookup(&prompt).await?;
        let request = esker_client::v1::FetchRequest { grant: found.grant, ..Default::default() };
        let mut replies = node.cache.clone().fetch(request).await?.into_inner();
        assert!(replies.message().await?.is_some());
        drop(replies);
        if turn < 24 {
            let other = Prompt::new(namespace, &layout, 100 + turn, 2);
            abandon_put(&node, &other).await?;
            let fetched = node.fetch_best(&other).await?;
            assert_eq!(fetched.wrong_planes(&other), 0);
            assert!(fetched.whole_objects(&other).len() <= 1, "half an object was kept");
        }
        if turn < 40 {
            let long = Request { max_new_tokens: 500, ..question(&tokens(turn, 400)) };
            let mut events = node.client.generate(long).await?;
            events.next().await?;
        }
    }

    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 40);
    let other = Prompt::new(namespace, &layout, 100, 2);
    node.store(&other, other.blocks(1..=2)).await?;
    node.fetch_best(&other).await?.expect_blocks(&other, 2);
    let asked = tokio::time::timeout(Duration::from_secs(20), node.ask(question(&tokens(1, 20)))).await;
    assert!(asked?.is_ok());
    node.kill()
}

/// Sends one block and half of another, on a connection of its own, and hangs up.
async fn abandon_put(node: &Node, prompt: &Prompt) -> Result<()> {
    let mut steps = esker_tests::put_steps(prompt, prompt.blocks(1..=2));
    steps.truncate(steps.len() - 1);
    let (sender, receiver) = tokio::sync::mpsc::channel(steps.len());
    for step in steps {
        sender.send(esker_client::v1::PutRequest { step: Some(step) }).await?;
    }
    let channel =
        tonic::transport::Channel::from_shared(format!("http://{}", node.address))?.connect().await?;
    let mut cache = esker_client::v1::prefix_cache_client::PrefixCacheClient::new(channel);
    let replies = cache.put(tokio_stream::wrappers::ReceiverStream::new(receiver)).await?;
    tokio::time::sleep(Duration::from_millis(3)).await;
    drop((replies, cache, sender));
    Ok(())
}
