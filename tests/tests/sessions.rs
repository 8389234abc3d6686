//! Promise: a chat session keeps its conversation's prefix for as long as it was granted, through crashes and whatever time
//! does; what no session keeps goes when its own time is over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::v1::{self, sessions_client::SessionsClient};
use esker_client::{Prompt as Text, Request};
use esker_prefix::TokenId;
use esker_proto::check_namespace_id;
use esker_tests::identity::Issuer;
use esker_tests::{Node, pass, question, scratch, tokens};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

const HOUR_S: u64 = 3600;
/// Two blocks and a half.
const TURN_TOKENS: usize = 320;

fn sessions(node: &Node) -> SessionsClient<Channel> {
    SessionsClient::new(node.channel.clone())
}

/// The node's namespace.
async fn namespace(node: &Node) -> Result<Bytes> {
    Ok(node.client.describe().await?.namespace)
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|token| token.0).collect()
}

/// Asks a question behind these tokens, keeping what is computed for five minutes, and gives the tokens hit.
async fn ask(node: &Node, conversation: &[TokenId]) -> Result<u64> {
    let request = Request { ttl: v1::TtlClass::TtlClass5m, ..question(conversation) };
    Ok(node.ask(request).await?.usage.prompt_cache_hit_tokens)
}

/// Waits until nothing of a conversation is found: two rounds of housekeeping, and some time for a busy machine.
async fn gone(node: &Node, conversation: &[TokenId]) -> Result<()> {
    let namespace = check_namespace_id(&namespace(node).await?)?;
    let started = Instant::now();
    loop {
        let found = node.client.lookup(namespace, conversation).await?;
        if found.history_tokens == 0 {
            return Ok(());
        }
        // Its grant would hold what was found.
        node.client.release(found.grant).await?;
        let late = started.elapsed() > Duration::from_secs(20);
        ensure!(!late, "{} tokens are still found", found.history_tokens);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn six_hours_through_three_crashes_and_then_a_full_hit() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let options = ["--segment-mib", "4"];
    let mut node = Node::start(&data, &options).await?;
    let (parked, unkept) = (tokens(1, TURN_TOKENS), tokens(2, TURN_TOKENS));
    for conversation in [&parked, &unkept] {
        assert_eq!(ask(&node, conversation).await?, 0);
        node.parked(conversation).await?;
    }
    let opened = sessions(&node)
        .open_session(v1::OpenSessionRequest {
            session: "chat-1".into(),
            namespace: namespace(&node).await?,
            tokens: ids(&parked),
            keep_s: 7 * HOUR_S,
            user: String::new(),
        })
        .await?
        .into_inner();
    ensure!(opened.tokens >= 256 && opened.bytes > 0 && opened.remaining_s > 6 * HOUR_S, "{opened:?}");
    let granted_s = opened.remaining_s;

    for crash in 1..=3 {
        node.kill()?;
        pass(&data, 2 * HOUR_S)?;
        node = Node::start(&data, &options).await?;
        let listed = sessions(&node).list_sessions(v1::ListSessionsRequest::default()).await?.into_inner();
        let [session] = &listed.sessions[..] else { anyhow::bail!("{listed:?} after crash {crash}") };
        ensure!(session.tokens == opened.tokens && session.bytes == opened.bytes, "{session:?}");
        let expected = granted_s - 2 * HOUR_S * crash;
        ensure!(session.remaining_s.abs_diff(expected) < 120, "{session:?}, not {expected} s");
        // The control: what lies beside it, stored by the same request for as long, is gone. A lookup does not count as a use.
        gone(&node, &unkept).await.with_context(|| format!("after crash {crash}"))?;
    }
    assert_eq!(ask(&node, &unkept).await?, 0, "nobody kept this one");
    let next_turn = [&parked[..], &tokens(7, 5)].concat();
    assert_eq!(opened.resume_tokens, parked.len() as u64, "up to its last token");
    assert_eq!(ask(&node, &next_turn).await?, opened.resume_tokens, "the parked conversation hits in full");

    // When the lease is over the session is, too.
    node.kill()?;
    pass(&data, 2 * HOUR_S)?;
    let node = Node::start(&data, &options).await?;
    let listed = sessions(&node).list_sessions(v1::ListSessionsRequest::default()).await?.into_inner();
    ensure!(listed.sessions.is_empty(), "{listed:?}");
    let renewed = sessions(&node)
        .renew_session(v1::RenewSessionRequest { session: "chat-1".into(), keep_s: 0 })
        .await
        .unwrap_err();
    assert_eq!(renewed.code(), Code::NotFound, "{renewed}");
    node.kill()
}

#[tokio::test]
async fn a_conversation_goes_on_and_forks() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--segment-mib", "4"]).await?;
    let namespace = namespace(&node).await?;
    let mut conversation = tokens(3, 8 * TURN_TOKENS);
    ask(&node, &conversation).await?;
    node.parked(&conversation).await?;
    let mut client = sessions(&node);
    let open = |session: &str, conversation: &[TokenId]| v1::OpenSessionRequest {
        session: session.into(),
        namespace: namespace.clone(),
        tokens: ids(conversation),
        keep_s: HOUR_S,
        user: String::new(),
    };
    let first = client.open_session(open("chat", &conversation)).await?.into_inner();
    // The next turn: longer, same session.
    let fork = [&conversation[..], &tokens(5, TURN_TOKENS)].concat();
    conversation.extend(tokens(4, TURN_TOKENS));
    ask(&node, &conversation).await?;
    node.parked(&conversation).await?;
    let extend = v1::ExtendSessionRequest { session: "chat".into(), tokens: ids(&conversation), keep_s: 0 };
    let second = client.extend_session(extend).await?.into_inner();
    ensure!(second.tokens > first.tokens && second.bytes > first.bytes, "{first:?}, then {second:?}");
    // A fork shares what it has in common: its session holds the same blocks again, and nothing is stored twice.
    let before = node.client.describe().await?.store_bytes;
    ask(&node, &fork).await?;
    node.parked(&fork).await?;
    let forked = client.open_session(open("fork", &fork)).await?.into_inner();
    ensure!(forked.tokens == second.tokens, "{forked:?}");
    let added = node.client.describe().await?.store_bytes - before;
    ensure!(added < second.bytes, "the fork stored {added} bytes, all of it {}", second.bytes);

    let closed = client.close_session(v1::CloseSessionRequest { session: "chat".into() }).await?.into_inner();
    ensure!(closed.closed, "it was open");
    let closed = client.close_session(v1::CloseSessionRequest { session: "chat".into() }).await?.into_inner();
    ensure!(!closed.closed, "it was closed");
    let listed = client.list_sessions(v1::ListSessionsRequest::default()).await?.into_inner().sessions;
    ensure!(listed.len() == 1 && listed[0].session == "fork", "{listed:?}");
    node.kill()
}

#[tokio::test]
async fn a_lease_beyond_the_budget_is_refused() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("identity"))?;
    // A block of the bundled model with its header is some tens of kilobytes; 200 kB for an hour hold one conversation.
    let policy = issuer.policy(
        "[tenants.small]\nleased_byte_hours = 1_000_000\nsessions = 2\n[tenants.none]\nsessions = 0\n[tenants.other]\n",
    )?;
    let policy = policy.to_str().context("a path")?;
    let node = Node::start(&folder.path().join("data"), &["--segment-mib", "4", "--policy", policy]).await?;
    let bearer = |tenant| issuer.token(tenant, &["reader", "writer", "pinner"]);
    let conversation = tokens(6, TURN_TOKENS);
    for tenant in ["small", "none"] {
        let channel = InterceptedService::new(node.channel.clone(), bearer(tenant)?);
        let mut decoder = v1::decoder_client::DecoderClient::new(channel.clone());
        let namespace = decoder.describe(v1::DescribeRequest {}).await?.into_inner().namespace;
        let prompt = v1::generate_request::Prompt::Tokens(v1::Tokens { ids: ids(&conversation) });
        let request = v1::GenerateRequest { prompt: Some(prompt), max_new_tokens: 1, ..Default::default() };
        let mut events = decoder.generate(request).await?.into_inner();
        while events.message().await?.is_some() {}
        tokio::time::sleep(Duration::from_millis(500)).await;
        let open = |session: &str, keep_s| v1::OpenSessionRequest {
            session: session.into(),
            namespace: namespace.clone(),
            tokens: ids(&conversation),
            keep_s,
            user: String::new(),
        };
        let mut client = SessionsClient::new(channel);
        let opened = client.open_session(open("a", HOUR_S)).await;
        if tenant == "none" {
            let refused = opened.unwrap_err();
            assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
            ensure!(refused.message().contains("sessions"), "{refused}");
            continue;
        }
        let opened = opened?.into_inner();
        // As long as the budget does not allow: refused, and what was held before stays.
        let hours = 1_000_000 / opened.bytes + 2;
        let refused = client.open_session(open("b", hours * HOUR_S)).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        ensure!(refused.message().contains("leased_byte_hours"), "{refused}");
        let listed = client.list_sessions(v1::ListSessionsRequest::default()).await?.into_inner().sessions;
        ensure!(listed.len() == 1 && listed[0].bytes == opened.bytes, "{listed:?}");
        // Another tenant sees none of it.
        let other = InterceptedService::new(node.channel.clone(), bearer("other")?);
        let mut other = SessionsClient::new(other);
        let listed = other.list_sessions(v1::ListSessionsRequest::default()).await?.into_inner().sessions;
        ensure!(listed.is_empty(), "{listed:?}");
        let closed = other.close_session(v1::CloseSessionRequest { session: "a".into() }).await?.into_inner();
        ensure!(!closed.closed, "another tenant closed it");
    }
    node.kill()
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--segment-mib", "4"]).await?;
    let good = v1::OpenSessionRequest {
        session: "chat".into(),
        namespace: namespace(&node).await?,
        tokens: ids(&tokens(7, TURN_TOKENS)),
        keep_s: HOUR_S,
        user: String::new(),
    };
    for (request, code, named) in [
        (good.clone(), Code::FailedPrecondition, "put its blocks"),
        (v1::OpenSessionRequest { session: String::new(), ..good.clone() }, Code::InvalidArgument, "session"),
        (
            v1::OpenSessionRequest { session: "x".repeat(200), ..good.clone() },
            Code::InvalidArgument,
            "session",
        ),
        (v1::OpenSessionRequest { keep_s: 1, ..good.clone() }, Code::InvalidArgument, "keep_s"),
        (v1::OpenSessionRequest { keep_s: u64::MAX, ..good.clone() }, Code::InvalidArgument, "keep_s"),
        (v1::OpenSessionRequest { tokens: vec![], ..good.clone() }, Code::InvalidArgument, "tokens"),
        (
            v1::OpenSessionRequest { namespace: Bytes::new(), ..good.clone() },
            Code::InvalidArgument,
            "namespace",
        ),
        (v1::OpenSessionRequest { user: "a/b".into(), ..good.clone() }, Code::InvalidArgument, "user"),
    ] {
        let refused = sessions(&node).open_session(request.clone()).await.unwrap_err();
        ensure!(refused.code() == code && refused.message().contains(named), "{request:?}: {refused}");
    }
    let prompt = Text::Tokens(tokens(7, TURN_TOKENS));
    node.ask(Request::new(prompt)).await?;
    node.kill()
}
