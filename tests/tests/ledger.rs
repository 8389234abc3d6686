//! The billing ledger, seen from outside: what is settled counts once, what is claimed is held against what was delivered, and
//! what is damaged is not passed on.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::{Request, v1};
use esker_prefix::{KvLayout, ObjectKind, PlaneSpec};
use esker_tests::{
    Node, Prompt, change, flat_layout, output, put_steps, question, records, scratch, staged_layout, text_of,
    tokens,
};
use tonic::{Code, Status};

/// A request that has looked its prompt up and fetched what was found.
struct Served {
    grant: Bytes,
    prompt_tokens: u64,
    hit_tokens: u64,
}

async fn serve(node: &Node, prompt: &Prompt) -> Result<Served> {
    let found = node.lookup(prompt).await?;
    let hit_tokens = found.best.unwrap_or_default().tokens;
    node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await?;
    Ok(Served { grant: found.grant, prompt_tokens: prompt.tokens.len() as u64, hit_tokens })
}

fn account(request_id: &str, served: &Served) -> v1::SettleRequest {
    v1::SettleRequest {
        grant: served.grant.clone(),
        request_id: request_id.into(),
        prompt_tokens: served.prompt_tokens,
        used_hit_tokens: served.hit_tokens,
        computed_tokens: served.prompt_tokens - served.hit_tokens,
        ..Default::default()
    }
}

async fn settle(node: &Node, request: v1::SettleRequest) -> Result<v1::SettleReply, Status> {
    Ok(node.cache.clone().settle(request).await?.into_inner())
}

async fn sums(node: &Node) -> Result<v1::UsageSums> {
    let reply = node.client.query_usage(v1::QueryUsageRequest::default()).await?;
    Ok(reply.rows.first().and_then(|row| row.sums).unwrap_or_default())
}

/// Records up to the end, or to an error.
async fn export(
    node: &Node,
    request: v1::ExportUsageRequest,
) -> Result<(Vec<v1::ExportUsageReply>, Option<Status>)> {
    let mut replies = node.client.export_usage(request).await?;
    let mut events = Vec::new();
    loop {
        match replies.message().await {
            Ok(Some(reply)) => events.push(reply),
            Ok(None) => return Ok((events, None)),
            Err(status) => return Ok((events, Some(status))),
        }
    }
}

fn record(reply: &v1::ExportUsageReply) -> Result<&v1::UsageRecord> {
    match &reply.event {
        Some(v1::export_usage_reply::Event::Record(record)) => Ok(record),
        other => anyhow::bail!("no record but {other:?}"),
    }
}

async fn stored(node: &Node, blocks: u32, seed: u64) -> Result<Prompt> {
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, seed, blocks);
    node.store(&prompt, prompt.blocks(1..=u64::from(blocks))).await?;
    Ok(prompt)
}

#[tokio::test]
async fn a_settled_request_counts_once_whatever_is_sent_again_and_whoever_is_killed() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::store_only(&data).await?;
    let prompt = stored(&node, 4, 1).await?;
    let served = serve(&node, &prompt).await?;
    ensure!(served.hit_tokens > 0, "nothing was found");
    let request = v1::SettleRequest {
        write_tokens: Some(v1::WriteTokens { ttl_1h: 1, ..Default::default() }),
        ..account("request-1", &served)
    };
    let first = settle(&node, request.clone()).await?;
    let usage = first.usage.context("a settled request has its usage")?;
    assert_eq!(usage.prompt_cache_hit_tokens, served.hit_tokens);
    assert_eq!(usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens, usage.prompt_tokens);
    assert_eq!((usage.cached_tokens, usage.cache_creation_tokens), (served.hit_tokens, 1));
    assert_eq!(
        usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens,
        served.prompt_tokens
    );
    assert_eq!(first.usage_id.len(), 32);

    for _ in 0..3 {
        assert_eq!(settle(&node, request.clone()).await?, first, "the same answer");
    }
    let other = v1::SettleRequest { model: "another".into(), ..request.clone() };
    assert_eq!(settle(&node, other.clone()).await.unwrap_err().code(), Code::AlreadyExists);
    let audit = std::fs::read_to_string(data.join("audit.jsonl"))?;
    assert!(audit.contains("request-1") && audit.contains("conflict"), "{audit}");
    node.kill()?;

    let node = Node::store_only(&data).await?;
    assert_eq!(settle(&node, request).await?, first, "the same answer from another process");
    assert_eq!(settle(&node, other).await.unwrap_err().code(), Code::AlreadyExists);
    let sums = sums(&node).await?;
    assert_eq!(
        (sums.requests, sums.prompt_tokens, sums.hit_tokens),
        (1, served.prompt_tokens, served.hit_tokens)
    );
    let (events, ended) = export(&node, v1::ExportUsageRequest::default()).await?;
    assert_eq!((events.len(), ended.map(|status| status.code())), (1, None));
    let record = record(&events[0])?;
    assert_eq!((&record.usage_id, record.sequence), (&first.usage_id, 1));
    assert!(record.complete && record.bytes_served > 0 && record.scope == "private");
    node.kill()?;
    let verified = output(["usage", "verify", &data.display().to_string()]);
    assert!(verified.status.success(), "{}", text_of(&verified.stdout));
    Ok(())
}

#[tokio::test]
async fn what_is_claimed_is_held_against_what_was_offered_and_delivered() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let prompt = stored(&node, 4, 1).await?;
    let found = node.lookup(&prompt).await?;
    let best = found.best.unwrap_or_default().tokens;
    let served =
        Served { grant: found.grant.clone(), prompt_tokens: prompt.tokens.len() as u64, hit_tokens: best };
    let refused = |request: v1::SettleRequest| {
        let node = &node;
        async move { settle(node, request).await.unwrap_err() }
    };
    let undelivered = refused(account("r", &served)).await;
    assert_eq!(undelivered.code(), Code::InvalidArgument);
    assert!(undelivered.message().contains("only 0 tokens were delivered"), "{undelivered}");

    node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await?;
    let good = account("r", &served);
    let prompt_tokens = served.prompt_tokens;
    for (wrong, named) in [
        (v1::SettleRequest { used_hit_tokens: best - 1, ..good.clone() }, "resume point"),
        (v1::SettleRequest { computed_tokens: 0, ..good.clone() }, "add up"),
        (
            v1::SettleRequest { request_id: "storage/1/private/00/r1".into(), ..good.clone() },
            "the node's own",
        ),
        (v1::SettleRequest { prompt_tokens: prompt_tokens + 1, ..good.clone() }, "looked up"),
        (v1::SettleRequest { used_hit_tokens: u64::MAX, ..good.clone() }, "resume point"),
        (
            v1::SettleRequest {
                write_tokens: Some(v1::WriteTokens { ttl_5m: prompt_tokens, ..Default::default() }),
                ..good.clone()
            },
            "write_tokens",
        ),
        (v1::SettleRequest { request_id: String::new(), ..good.clone() }, "request_id"),
        (v1::SettleRequest { request_id: "x".repeat(129), ..good.clone() }, "request_id"),
        (v1::SettleRequest { grant: Bytes::new(), ..good.clone() }, "grant"),
        (v1::SettleRequest { namespace: Bytes::from(vec![9; 32]), ..good.clone() }, "namespace"),
    ] {
        let status = refused(wrong).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(named), "{named}: {status}");
    }
    let unknown = refused(v1::SettleRequest { grant: Bytes::from(vec![1; 16]), ..good.clone() }).await;
    assert_eq!(unknown.code(), Code::NotFound);
    settle(&node, good.clone()).await?;
    // The grant is closed: another request has nothing of it.
    let second = refused(v1::SettleRequest { request_id: "r2".into(), ..good.clone() }).await;
    assert_eq!(second.code(), Code::NotFound);

    // A request that found nothing settles without a grant, and without a hit.
    let miss = v1::SettleRequest {
        request_id: "miss".into(),
        grant: Bytes::new(),
        namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
        prompt_tokens: 100,
        computed_tokens: 100,
        ..Default::default()
    };
    settle(&node, miss.clone()).await?;
    let hit =
        v1::SettleRequest { request_id: "hit".into(), used_hit_tokens: 50, computed_tokens: 50, ..miss };
    assert_eq!(refused(hit).await.code(), Code::InvalidArgument);
    // Failed requests are written down and not counted.
    let failed = v1::SettleRequest {
        request_id: "failed".into(),
        namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
        prompt_tokens: 100,
        computed_tokens: 100,
        status: v1::SettleStatus::Failed.into(),
        ..Default::default()
    };
    settle(&node, failed).await?;
    let sums = sums(&node).await?;
    assert_eq!((sums.requests, sums.incomplete_requests, sums.prompt_tokens), (2, 1, prompt_tokens + 100));
    node.kill()
}

/// Fetches these blocks of a grant, of these groups.
async fn fetch_blocks(node: &Node, grant: &Bytes, blocks: &[u32], groups: &[String]) -> Result<()> {
    let (blocks, groups) = (blocks.to_vec(), groups.to_vec());
    node.fetch(v1::FetchRequest { grant: grant.clone(), blocks, groups, ..Default::default() }).await?;
    Ok(())
}

/// An engine that has the first pages in its own memory fetches those behind them, and settles what it was given.
#[tokio::test]
async fn what_was_loaded_behind_skipped_pages_counts_and_no_more_than_that() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let prompt = stored(&node, 4, 1).await?;
    let block = prompt.boundary(1);
    let prompt_tokens = prompt.tokens.len() as u64;
    let claim = |grant: &Bytes, used: u64| v1::SettleRequest {
        grant: grant.clone(),
        request_id: format!("skipping-{used}"),
        prompt_tokens,
        used_hit_tokens: used,
        computed_tokens: prompt_tokens - used,
        ..Default::default()
    };
    let grant = node.lookup(&prompt).await?.grant;
    fetch_blocks(&node, &grant, &[2, 3], &[]).await?;
    // The same blocks again deliver nothing new.
    fetch_blocks(&node, &grant, &[3], &[]).await?;
    for used in [3 * block, 4 * block] {
        let refused = settle(&node, claim(&grant, used)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(
            refused.message().contains(&format!("only {} tokens were delivered", 2 * block)),
            "{refused}"
        );
    }
    let usage = settle(&node, claim(&grant, 2 * block)).await?.usage.unwrap_or_default();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (prompt_tokens, 2 * block));
    let sums = sums(&node).await?;
    assert_eq!((sums.prompt_tokens, sums.hit_tokens), (prompt_tokens, 2 * block));
    node.kill()
}

/// A part of a block's planes is not the block, however often it is fetched.
#[tokio::test]
async fn planes_that_come_twice_are_no_whole_block() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let layout = staged_layout();
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 1, 40);
    let mut objects = prompt.blocks(1..=40);
    objects.push(prompt.state(40));
    node.store(&prompt, objects).await?;
    let found = node.lookup(&prompt).await?;
    let grant = found.grant;
    let used = found.best.unwrap_or_default().tokens;
    let all: Vec<u32> = (0..40).collect();
    let groups: Vec<String> = layout.groups().iter().map(|group| group.name.clone()).collect();
    let of_blocks = layout.planes(ObjectKind::Block).iter().map(|plane| usize::from(plane.group));
    let of_blocks: std::collections::BTreeSet<usize> = of_blocks.collect();
    let (first, rest) = (&groups[*of_blocks.first().context("a group")?..][..1], &groups[1..]);
    ensure!(of_blocks.len() > 1, "blocks of this layout have several groups");
    let prompt_tokens = prompt.tokens.len() as u64;
    let request = v1::SettleRequest {
        grant: grant.clone(),
        request_id: "parts".into(),
        prompt_tokens,
        used_hit_tokens: used,
        computed_tokens: prompt_tokens - used,
        ..Default::default()
    };
    for _ in 0..of_blocks.len() * 8 {
        fetch_blocks(&node, &grant, &all, first).await?;
    }
    let refused = settle(&node, request.clone()).await.unwrap_err();
    assert!(refused.message().contains("only 0 tokens were delivered"), "{refused}");
    // The control: with the other planes the blocks are whole.
    fetch_blocks(&node, &grant, &all, rest).await?;
    settle(&node, request).await?;
    node.kill()
}

/// Chunks that stand for themselves: any of them may be used, up to as many as came.
#[tokio::test]
async fn blocks_that_are_no_chain_are_credited_one_by_one() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 3);
    let block = prompt.boundary(1);
    let names =
        |names: &[u8]| -> Vec<Bytes> { names.iter().map(|&name| Bytes::from(vec![name; 32])).collect() };
    let prefix = v1::PutPrefix {
        namespace: Bytes::copy_from_slice(namespace.as_bytes()),
        engine_hashes: names(&[1, 2, 3]),
        unchained: true,
        ..Default::default()
    };
    let mut steps = put_steps(&prompt, prompt.blocks(1..=3));
    steps[0] = v1::put_request::Step::Prefix(prefix);
    let mut replies = node.put_steps(steps).await?;
    while let Some(reply) = replies.message().await? {
        ensure!(reply.outcome() == v1::Outcome::Stored, "{reply:?}");
    }
    let lookup = v1::LookupRequest {
        namespace: Bytes::copy_from_slice(namespace.as_bytes()),
        // The first is not there: no run from the start.
        engine_hashes: names(&[9, 1, 2, 3]),
        unchained: true,
        ..Default::default()
    };
    let grant = node.cache.clone().lookup(lookup).await?.into_inner().grant;
    fetch_blocks(&node, &grant, &[1, 3], &[]).await?;
    let claim = |used: u64, computed: u64| v1::SettleRequest {
        grant: grant.clone(),
        request_id: format!("loose-{used}"),
        prompt_tokens: used + computed,
        used_hit_tokens: used,
        computed_tokens: computed,
        ..Default::default()
    };
    for (used, why) in
        [(3 * block, "delivered whole"), (4 * block, "resume point"), (block + 1, "resume point")]
    {
        let refused = settle(&node, claim(used, 1)).await.unwrap_err();
        assert!(refused.code() == Code::InvalidArgument && refused.message().contains(why), "{refused}");
    }
    let usage = settle(&node, claim(2 * block, 1)).await?.usage.unwrap_or_default();
    assert_eq!(usage.cached_tokens, 2 * block);
    node.kill()
}

#[tokio::test]
async fn a_grant_that_nobody_settles_is_closed_as_unused_and_holds_nothing() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("data")).await?;
    let prompt = stored(&node, 4, 1).await?;
    let found = node.lookup(&prompt).await?;
    let expires = Duration::from_millis(found.grant_expires_in_ms);
    node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await?;
    tokio::time::sleep(expires + Duration::from_secs(3)).await;
    let late = node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await;
    assert_eq!(late.map(|_| ()).unwrap_err().code(), Code::NotFound);
    let (events, _) = export(&node, v1::ExportUsageRequest::default()).await?;
    assert_eq!(events.len(), 1);
    let record = record(&events[0])?;
    assert_eq!((record.complete, record.reason.as_str(), record.hit_tokens), (false, "unsettled", 0));
    assert!(record.bytes_served > 0 && record.grant == found.grant);
    let sums = sums(&node).await?;
    assert_eq!((sums.requests, sums.incomplete_requests, sums.prompt_tokens), (0, 1, 0), "nothing is billed");
    node.kill()
}

#[tokio::test]
async fn a_miss_through_our_own_fault_is_a_plain_miss_without_writes() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::store_only(&data).await?;
    let prompt = stored(&node, 4, 1).await?;
    node.stop().await?;
    let mut second =
        records(&data)?.into_iter().filter(|record| record.tokens == prompt.blocks(2..=2)[0].tokens);
    let second = second.next_back().context("the second block has a record")?;
    change(&second.file, second.planes[0].start + 5, |byte| byte ^ 1)?;

    let node = Node::store_only(&data).await?;
    let found = node.lookup(&prompt).await?;
    let fetched = node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await?;
    ensure!(!fetched.missing.is_empty(), "the damage was not noticed");
    let block = prompt.blocks(1..=1)[0].tokens;
    let prompt_tokens = prompt.tokens.len() as u64;
    let request = v1::SettleRequest {
        grant: found.grant,
        request_id: "r".into(),
        used_hit_tokens: block,
        computed_tokens: prompt_tokens - block,
        write_tokens: Some(v1::WriteTokens { ttl_24h: 2 * block, ..Default::default() }),
        ..Default::default()
    };
    let usage = settle(&node, request).await?.usage.unwrap_or_default();
    assert_eq!((usage.prompt_cache_hit_tokens, usage.cache_creation_tokens), (block, 0));
    let (events, _) = export(&node, v1::ExportUsageRequest::default()).await?;
    let record = record(&events[0])?;
    assert!(record.fault && record.complete && record.miss_reason == "corrupt", "{record:?}");
    assert_eq!(record.miss_tokens, prompt_tokens - block);
    node.kill()
}

/// The record of a request of that name.
async fn record_of(node: &Node, request_id: &str) -> Result<v1::UsageRecord> {
    let (events, _) = export(node, v1::ExportUsageRequest::default()).await?;
    let records = events.iter().filter_map(|event| record(event).ok());
    let mut of_name = records.filter(|record| record.request_id == request_id).cloned();
    of_name.next().with_context(|| format!("{request_id} has no record"))
}

#[tokio::test]
async fn a_generation_whose_prefix_was_damaged_is_a_plain_miss_without_writes() -> Result<()> {
    // Put back as a whole; and layer after layer, with rows that stay on SSD.
    for (prompt_tokens, options) in [(700, None), (1_500, Some("0"))] {
        let folder = scratch();
        let data = folder.path().join("data");
        let residency: Vec<&str> = options.iter().flat_map(|bytes| ["--resident-bytes", *bytes]).collect();
        let node = Node::start(&data, &[&["--segment-mib", "16"][..], &residency].concat()).await?;
        let prompt = tokens(1, prompt_tokens);
        let ask = |name: &str| Request { request_id: name.into(), ..question(&prompt) };
        let whole = (prompt_tokens as u64 - 1) / 128 * 128;
        let cold = node.ask(ask("cold")).await?;
        ensure!(cold.usage.cache_write_tokens > 0, "nothing was written: {:?}", cold.usage);
        node.resumable(&prompt, whole).await?;
        let sound = node.ask(ask("sound")).await?;
        assert_eq!((&sound.tokens, sound.usage.prompt_cache_hit_tokens), (&cold.tokens, whole));

        let third = records(&data)?
            .into_iter()
            .find(|record| record.kind == ObjectKind::Block && record.tokens == 3 * 128);
        let third = third.context("the third block has a record")?;
        for plane in third.planes.iter().filter(|plane| !plane.is_empty()) {
            change(&third.file, plane.start, |byte| byte ^ 1)?;
        }
        let damaged = node.ask(ask("damaged")).await?;
        assert_eq!(damaged.tokens, cold.tokens, "{prompt_tokens}, {options:?}");
        node.resumable(&prompt, whole).await?;
        let healed = node.ask(ask("healed")).await?;
        assert_eq!((&healed.tokens, healed.usage.prompt_cache_hit_tokens), (&cold.tokens, whole));

        for (name, fault) in [("cold", false), ("sound", false), ("damaged", true), ("healed", false)] {
            let record = record_of(&node, name).await?;
            let reason = if fault { "corrupt" } else { "absent" };
            assert!(record.complete && record.status == "ok", "{record:?}");
            assert_eq!((record.fault, record.miss_reason.as_str()), (fault, reason), "{record:?}");
            assert_eq!(record.hit_tokens + record.miss_tokens, prompt_tokens as u64);
        }
        let damaged = record_of(&node, "damaged").await?;
        assert_eq!((damaged.hit_tokens, damaged.write_tokens), (2 * 128, None), "{damaged:?}");
        let sums = sums(&node).await?;
        assert_eq!(sums.faults, 1);
        // Each block of the prompt once, although the third and what follows it were stored again.
        let written = sums.write_tokens.unwrap_or_default().ttl_24h;
        assert_eq!(written, cold.usage.cache_write_tokens);
        node.kill()?;
    }
    Ok(())
}

#[tokio::test]
async fn rows_that_stay_on_ssd_are_served_when_they_are_picked() -> Result<()> {
    const PROMPT_TOKENS: usize = 3_000;
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--segment-mib", "16"]).await?;
    let prompt = tokens(1, PROMPT_TOKENS);
    node.ask(question(&prompt)).await?;
    node.parked(&prompt).await?;
    let layout = KvLayout::from_json(&node.client.describe().await?.layout_json)?;
    // Of what indexers pick among, that is of latents and overlapping compressed rows, nothing is read at the start.
    let picked = |group: u16| ["latent", "csa"].contains(&layout.groups()[usize::from(group)].name.as_str());
    let planes = layout.planes(ObjectKind::Block).iter();
    let (stay, come): (Vec<_>, Vec<_>) = planes.partition(|plane| picked(plane.group));
    let bytes = |planes: &[&PlaneSpec]| planes.iter().map(|plane| plane.len_bytes).sum::<u64>();
    let blocks = (PROMPT_TOKENS as u64 - 1) / 128;
    let at_the_start = bytes(&come) * blocks + layout.object_bytes_at(ObjectKind::State, blocks * 128);
    ensure!(bytes(&stay) > 0, "no row can stay on SSD");

    let ids = v1::Tokens { ids: prompt.iter().map(|token| token.0).collect() };
    let request = |name: &str, max_new_tokens, resident_bytes| v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Tokens(ids.clone())),
        max_new_tokens,
        resident_bytes,
        request_id: name.into(),
        ..Default::default()
    };
    let mut decoder = v1::decoder_client::DecoderClient::new(node.channel.clone());
    let mut served = Vec::new();
    // A pool of one byte: every row that is picked is read.
    for (name, new_tokens, resident_bytes) in [("all", 4, u64::MAX), ("short", 1, 1), ("long", 12, 1)] {
        let mut replies = decoder.generate(request(name, new_tokens, resident_bytes)).await?.into_inner();
        let mut parked_bytes = None;
        while let Some(reply) = replies.message().await? {
            if let Some(v1::generate_reply::Event::Usage(usage)) = reply.event {
                parked_bytes = Some(usage.parked_bytes_read);
            }
        }
        let parked_bytes = parked_bytes.context("the generation ended without its usage")?;
        let record = record_of(&node, name).await?;
        assert_eq!(record.hit_tokens, blocks * 128, "{record:?}");
        let read = if resident_bytes == 1 { parked_bytes } else { bytes(&stay) * blocks };
        assert_eq!(record.bytes_served, at_the_start + read, "{name}: {parked_bytes} bytes were picked");
        served.push(parked_bytes);
    }
    ensure!(served[0] == 0 && served[1] > 0 && served[2] > served[1], "{served:?}");

    // Whoever leaves has been served up to there. The record is written when the node notices.
    let mut replies = decoder.generate(request("left", 1_000, 1)).await?.into_inner();
    let mut seen = 0;
    while seen < 12 {
        let reply = replies.message().await?.context("it ended too soon")?;
        seen += usize::from(matches!(reply.event, Some(v1::generate_reply::Event::Token(_))));
    }
    drop(replies);
    let started = Instant::now();
    let left = loop {
        let (events, _) = export(&node, v1::ExportUsageRequest::default()).await?;
        let mut records = events.iter().filter_map(|event| record(event).ok());
        if let Some(record) = records.find(|record| record.status == "cancelled") {
            break record.clone();
        }
        ensure!(started.elapsed() < Duration::from_secs(20), "who left has no record");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(left.complete && left.hit_tokens == blocks * 128 && left.completion_tokens >= 12, "{left:?}");
    assert!(left.bytes_served >= at_the_start + served[2], "{left:?}, {served:?}");
    node.kill()
}

#[tokio::test]
async fn an_export_halts_at_damage_and_goes_on_only_when_told_to() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::store_only(&data).await?;
    let namespace = node.register(&flat_layout(), 1).await?;
    let miss = |name: &str| v1::SettleRequest {
        request_id: name.into(),
        namespace: Bytes::copy_from_slice(namespace.as_bytes()),
        prompt_tokens: 100,
        computed_tokens: 100,
        ..Default::default()
    };
    for n in 0..10 {
        settle(&node, miss(&format!("r{n}"))).await?;
    }
    let (sound, _) = export(&node, v1::ExportUsageRequest::default()).await?;
    assert_eq!(sound.len(), 10);
    node.stop().await?;
    let segment = data.join("ledger/0000000001.seg");
    // Within the fifth record: where the fourth ends is in its cursor.
    let offset: u64 = sound[3].cursor.split('.').nth(1).context("segment.offset.sequence.chain")?.parse()?;
    change(&segment, offset + 100, |byte| byte ^ 8)?;

    let verified = output(["usage", "verify", &data.display().to_string()]);
    assert!(!verified.status.success());
    assert!(text_of(&verified.stdout).contains("DAMAGED"), "{}", text_of(&verified.stdout));
    let node = Node::store_only(&data).await?;
    settle(&node, miss("after")).await?;
    let (events, ended) = export(&node, v1::ExportUsageRequest::default()).await?;
    let ended = ended.context("the export went past the damage")?;
    assert_eq!((events.len(), ended.code()), (4, Code::DataLoss));
    assert!(std::fs::read_to_string(data.join("audit.jsonl"))?.contains("ledger-gap"));
    assert!(node.log()?.contains("ALERT"));

    let past = v1::ExportUsageRequest { past_damage: true, ..Default::default() };
    let (events, ended) = export(&node, past).await?;
    assert!(ended.is_none());
    let gaps = events.iter().filter_map(|reply| match &reply.event {
        Some(v1::export_usage_reply::Event::Gap(gap)) => Some(gap),
        _ => None,
    });
    let gaps: Vec<_> = gaps.collect();
    assert_eq!((gaps.len(), gaps[0].after_sequence), (1, 4));
    let names: Vec<String> =
        events.iter().filter_map(|reply| Some(record(reply).ok()?.request_id.clone())).collect();
    assert!(names.iter().any(|name| name == "after") && !names.iter().any(|name| name == "r4"), "{names:?}");
    node.kill()
}

#[tokio::test]
async fn a_consumers_cursor_stays_on_the_node() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::store_only(&data).await?;
    let namespace = node.register(&flat_layout(), 1).await?;
    let settle_some = |node: Node, from: u32, to: u32| async move {
        for n in from..to {
            let request = v1::SettleRequest {
                request_id: format!("r{n}"),
                namespace: Bytes::copy_from_slice(namespace.as_bytes()),
                prompt_tokens: 100,
                computed_tokens: 100,
                ..Default::default()
            };
            settle(&node, request).await?;
        }
        Ok::<_, Status>(node)
    };
    let node = settle_some(node, 0, 5).await?;
    let ask = |cursor: &str, limit| v1::ExportUsageRequest {
        consumer: "billing".into(),
        cursor: cursor.into(),
        limit,
        ..Default::default()
    };
    let (events, _) = export(&node, ask("", 3)).await?;
    assert_eq!(events.len(), 3);
    // Not acknowledged: it comes again.
    assert_eq!(record(&export(&node, ask("", 1)).await?.0[0])?.request_id, "r0");
    let (rest, _) = export(&node, ask(&events[2].cursor, 1)).await?;
    assert_eq!(record(&rest[0])?.request_id, "r3");
    node.kill()?;
    let node = Node::store_only(&data).await?;
    assert_eq!(record(&export(&node, ask("", 1)).await?.0[0])?.request_id, "r3", "the cursor survived");
    let nonsense = node.client.export_usage(ask("1.2.x", 1)).await;
    assert_eq!(nonsense.err().and_then(|error| error.code()), Some(Code::InvalidArgument));

    // Someone who follows gets new records as they come.
    let follow =
        v1::ExportUsageRequest { follow: true, cursor: events[2].cursor.clone(), ..Default::default() };
    let mut replies = node.client.export_usage(follow).await?;
    let node = settle_some(node, 5, 7).await?;
    let mut names = Vec::new();
    while names.len() < 4 {
        let reply = tokio::time::timeout(Duration::from_secs(20), replies.message()).await??;
        let reply = reply.context("the export ended though it was to follow")?;
        names.extend(record(&reply).ok().map(|record| record.request_id.clone()));
    }
    assert_eq!(names, ["r3", "r4", "r5", "r6"]);
    node.kill()
}

/// What an HTTP sink was sent; it answers the first request with 503.
fn sink(requests: usize) -> Result<(String, std::thread::JoinHandle<Vec<String>>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://{}/events", listener.local_addr()?);
    let thread = std::thread::spawn(move || {
        let mut bodies = Vec::new();
        while bodies.len() < requests {
            let Ok((mut stream, _)) = listener.accept() else { break };
            let mut text = String::new();
            let mut buffer = [0; 4096];
            loop {
                let read = stream.read(&mut buffer).unwrap_or(0);
                text += &String::from_utf8_lossy(&buffer[..read]);
                let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                    let head = head.to_ascii_lowercase();
                    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                    length
                        .and_then(|length| length.parse::<usize>().ok())
                        .is_some_and(|length| body.len() >= length)
                });
                if whole || read == 0 {
                    break;
                }
            }
            let status = if bodies.is_empty() { "503 Later" } else { "204 No Content" };
            bodies.push(text);
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
        }
        bodies
    });
    Ok((address, thread))
}

#[tokio::test]
async fn usage_goes_to_a_file_and_to_an_http_sink_by_itself() -> Result<()> {
    let folder = scratch();
    let lines = folder.path().join("usage.jsonl");
    let token = folder.path().join("token");
    std::fs::write(&token, "secret\n")?;
    let (address, thread) = sink(2)?;
    for target in [lines.display().to_string(), address] {
        let data = folder.path().join(format!("data{}", target.len()));
        let options = ["--no-model", "--segment-mib", "4", "--cluster", "fleet", "--usage-sink", &target];
        let options = [&options[..], &["--usage-sink-token", token.to_str().context("a path")?]].concat();
        let node = Node::start(&data, &options).await?;
        let prompt = stored(&node, 4, 1).await?;
        let served = serve(&node, &prompt).await?;
        settle(&node, account("request-1", &served)).await?;
        if target.starts_with("http") {
            let bodies = tokio::task::spawn_blocking(|| thread.join()).await?.expect("the sink ended well");
            assert!(
                bodies.iter().all(|body| body.contains("authorization: Bearer secret\r\n")),
                "{bodies:?}"
            );
            let events = |body: &str| {
                serde_json::from_str::<serde_json::Value>(body.split("\r\n\r\n").last().unwrap())
            };
            assert_eq!(events(&bodies[0])?, events(&bodies[1])?, "what was refused is sent again as it was");
            let event = &events(&bodies[1])?[0];
            assert_eq!((&event["type"], &event["subject"]), (&"esker.usage.v1".into(), &"default".into()));
            assert_eq!(event["source"], "//esker/fleet");
            node.kill()?;
            break;
        }
        let event = wait_for_line(Path::new(&target)).await?;
        assert_eq!(event["data"]["hit_tokens"], served.hit_tokens);
        assert_eq!(event["specversion"], "1.0");
        node.kill()?;
    }
    Ok(())
}

async fn wait_for_line(path: &Path) -> Result<serde_json::Value> {
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if let Some(line) = text.lines().next() {
            return Ok(serde_json::from_str(line)?);
        }
        ensure!(started.elapsed() < Duration::from_secs(20), "nothing came to {}", path.display());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn generations_are_billed_and_the_bill_can_be_read() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::start(&data, &["--block-tokens", "16"]).await?;
    let prompt = tokens(1, 100);
    let first = node.ask(question(&prompt)).await?;
    assert_eq!(first.usage.usage_id.len(), 32);
    assert_eq!(first.usage.cache_write_tokens, 96, "six whole blocks of the prompt were put");
    let second = node.ask(question(&prompt)).await?;
    assert_ne!(second.usage.usage_id, first.usage.usage_id);
    assert_eq!((second.usage.prompt_cache_hit_tokens, second.usage.cache_write_tokens), (96, 0));
    let billed = sums(&node).await?;
    assert_eq!((billed.requests, billed.prompt_tokens, billed.hit_tokens), (2, 200, 96));
    assert_eq!(billed.write_tokens.unwrap_or_default().ttl_24h, 96);
    assert_eq!(billed.completion_tokens, first.usage.completion_tokens + second.usage.completion_tokens);

    // A named request counts once, whatever it hits the second time; another prompt under its name is refused.
    let mut decoder = v1::decoder_client::DecoderClient::new(node.channel.clone());
    let ids = |seed| v1::Tokens { ids: tokens(seed, 50).into_iter().map(|token| token.0).collect() };
    let named = |seed| v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Tokens(ids(seed))),
        max_new_tokens: 2,
        request_id: "named".into(),
        ..Default::default()
    };
    let mut usages = Vec::new();
    for _ in 0..3 {
        let mut replies = decoder.generate(named(2)).await?.into_inner();
        while let Some(reply) = replies.message().await? {
            if let Some(v1::generate_reply::Event::Usage(usage)) = reply.event {
                usages.push((usage.usage_id, usage.prompt_cache_hit_tokens, usage.cache_write_tokens));
            }
        }
    }
    assert_eq!(usages.len(), 3);
    assert!(usages.iter().all(|usage| *usage == usages[0]), "{usages:?}");
    let refused = decoder.generate(named(3)).await.map(|_| ()).unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert_eq!(sums(&node).await?.requests, 3);

    let prices = folder.path().join("prices.toml");
    std::fs::write(
        &prices,
        "currency = \"EUR\"\nhit = 28000\nmiss = 280000\n[tenants.default]\nhit = 14000\n",
    )?;
    let run = |more: &[&str]| {
        let prices = prices.display().to_string();
        let done =
            output([&["usage", "--node", &node.address, "--from", "2h", "--prices", &prices], more].concat());
        assert!(done.status.success(), "{}", text_of(&done.stderr));
        text_of(&done.stdout)
    };
    let table = run(&[]);
    assert!(table.contains("default") && table.contains("caching saved"), "{table}");
    let json: serde_json::Value = serde_json::from_str(&run(&["--json", "--by", "tenant,hour"]))?;
    assert_eq!(json["total"]["requests"], 3);
    assert_eq!(json["total"]["micro_units"]["hit"], 96 * 14_000 / 1_000_000);
    let focus = run(&["--focus"]);
    assert!(focus.starts_with("BilledCost,") && focus.contains("Prompt tokens from the cache"), "{focus}");
    let events = output(["usage", "export", "--node", &node.address]);
    let lines = text_of(&events.stdout);
    assert!(events.status.success() && lines.lines().count() >= 3, "{lines}");
    node.kill()
}
