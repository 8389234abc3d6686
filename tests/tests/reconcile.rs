//! Promise: what graphs show and what bills say is counted by the same requests, and where the two do not count the same it is
//! known why. The counters are kept by those who serve; the sums come from the ledger, out of what was settled.
//!
//! Equal, to the last token and byte, when every request was settled once:
//!
//! | metric | usage |
//! |---|---|
//! | `esker_query_tokens` of lookups, of generations | `prompt_tokens` of their namespaces |
//! | `esker_hit_tokens` | `hit_tokens` |
//! | `esker_miss_tokens` of all reasons, `esker_prefill_tokens` of generations | `miss_tokens` |
//! | `esker_completion_tokens` | `completion_tokens` |
//! | `esker_fetched_bytes` | `bytes_served`: both of planes as they were put |
//! | `esker_puts{outcome="stored"}` by engines, times the tokens of a block | `write_tokens` |
//! | `esker_ledger_tokens`, `esker_ledger_served_bytes`, `esker_ledger_records{outcome="written"}` | sums of all |
//!
//! Not equal, and why:
//! - a lookup whose grant nobody settles was counted when it was answered and is never billed: a router that only asks is not a
//!   customer, and a crashed engine is given the benefit of the doubt ([`what_bypasses_settle_shows`]);
//! - a generation that comes again under its request id is served twice and billed once;
//! - warm-up jobs are an operator's, not a request: `esker_warmup_tokens`, and no usage but what their blocks occupy;
//! - counters begin at 0 when a node starts, the ledger does not.

use anyhow::{Context, Result, ensure};
use esker_client::{Request, v1};
use esker_prefix::NamespaceId;
use esker_tests::{Node, Prompt, Random, Samples, flat_layout, question, scrape, scratch, tokens, value};
use std::time::{Duration, Instant};

/// Of `flat_layout`.
const BLOCK_TOKENS: u64 = 64;

/// What the test itself knows of its requests.
#[derive(Debug, Default, PartialEq, Eq)]
struct Account {
    prompt_tokens: u64,
    hit_tokens: u64,
    miss_tokens: u64,
    written_tokens: u64,
    bytes_served: u64,
}

impl Account {
    fn of(sums: &v1::UsageSums) -> Self {
        let writes = sums.write_tokens.unwrap_or_default();
        Self {
            prompt_tokens: sums.prompt_tokens,
            hit_tokens: sums.hit_tokens,
            miss_tokens: sums.miss_tokens,
            written_tokens: writes.ttl_5m + writes.ttl_1h + writes.ttl_24h + writes.ttl_72h + writes.lease,
            bytes_served: sums.bytes_served,
        }
    }
}

/// A counter, which is a whole number.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is checked")]
fn count(seen: &Samples, name: &str, labels: &[(&str, &str)]) -> u64 {
    let value = value(seen, name, labels);
    assert!(value >= 0.0 && value.fract() == 0.0, "{name} {labels:?} is {value}");
    value as u64
}

fn missed(seen: &Samples, path: &str) -> u64 {
    ["absent", "no_state", "tail"]
        .map(|reason| count(seen, "esker_miss_tokens_total", &[("path", path), ("reason", reason)]))
        .iter()
        .sum()
}

/// Objects stored. The layout of each namespace is one, too, so what counts is what comes after.
fn stored(seen: &Samples) -> u64 {
    count(seen, "esker_puts_total", &[("outcome", "stored")])
}

/// What the counters say of engines' requests, if there were no others since so many objects were stored.
fn engines(seen: &Samples, stored_before: u64) -> Account {
    let of_lookups = [("path", "lookup")];
    Account {
        prompt_tokens: count(seen, "esker_query_tokens_total", &of_lookups),
        hit_tokens: count(seen, "esker_hit_tokens_total", &of_lookups),
        miss_tokens: missed(seen, "lookup"),
        written_tokens: (stored(seen) - stored_before) * BLOCK_TOKENS,
        bytes_served: count(seen, "esker_fetched_bytes_total", &[]),
    }
}

/// Sums of one namespace, or of all.
async fn usage(node: &Node, namespace: Option<NamespaceId>) -> Result<v1::UsageSums> {
    let namespace = namespace.map(|namespace| namespace.to_hex()).unwrap_or_default();
    let request = v1::QueryUsageRequest { namespace, ..Default::default() };
    let rows = node.client.query_usage(request).await?.rows;
    ensure!(rows.len() <= 1, "not one row of everything: {rows:?}");
    Ok(rows.first().and_then(|row| row.sums).unwrap_or_default())
}

/// What an engine does with a prompt: looks it up, fetches what is there, computes and puts the rest, and settles if it is told to.
async fn serve(node: &Node, prompt: &Prompt, request_id: Option<&str>, account: &mut Account) -> Result<()> {
    let blocks = prompt.tokens.len() as u64 / BLOCK_TOKENS;
    let found = node.lookup(prompt).await?;
    let hit_tokens = found.best.unwrap_or_default().tokens;
    if hit_tokens > 0 {
        let fetched =
            node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await?;
        ensure!(fetched.missing.is_empty() && fetched.wrong_planes(prompt) == 0, "{:?}", fetched.missing);
        account.bytes_served += fetched.planes.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
    }
    let rest = prompt.blocks(hit_tokens / BLOCK_TOKENS + 1..=blocks);
    let written_tokens = rest.len() as u64 * BLOCK_TOKENS;
    if !rest.is_empty() {
        node.store(prompt, rest).await?;
    }
    let prompt_tokens = prompt.tokens.len() as u64;
    account.prompt_tokens += prompt_tokens;
    account.hit_tokens += hit_tokens;
    account.miss_tokens += prompt_tokens - hit_tokens;
    account.written_tokens += written_tokens;
    let Some(request_id) = request_id else { return Ok(()) };
    let request = v1::SettleRequest {
        namespace: prompt.namespace.as_bytes().to_vec().into(),
        grant: found.grant,
        request_id: request_id.into(),
        prompt_tokens,
        used_hit_tokens: hit_tokens,
        computed_tokens: prompt_tokens - hit_tokens,
        write_tokens: Some(v1::WriteTokens { ttl_24h: written_tokens, ..Default::default() }),
        ..Default::default()
    };
    let first = node.client.settle(request.clone()).await?;
    // Its answer may have been lost: sent again, it counts once on both sides.
    ensure!(node.client.settle(request).await? == first, "a settle that was sent again had another answer");
    Ok(())
}

#[tokio::test]
async fn graphs_and_bills_agree_where_they_count_the_same() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--http", "127.0.0.1:0"]).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let before = stored(&scrape(&node)?.1);

    // Engines: prompts of few beginnings and many lengths, so that there are hits of every length.
    let mut random = Random::announced();
    let (mut engine, mut requests) = (Account::default(), 0_u64);
    let fetched = |seen: &Samples| count(seen, "esker_fetched_bytes_total", &[]);
    for number in 0..30 {
        let blocks = u32::try_from(1 + random.below(8))?;
        let prompt = Prompt::new(namespace, &layout, 1 + random.below(3), blocks);
        serve(&node, &prompt, Some(&format!("engine-{number}")), &mut engine).await?;
        requests += 1;
    }
    let (_, seen) = scrape(&node)?;
    assert_eq!(engines(&seen, before), engine, "the counters and the requests");
    assert_eq!(Account::of(&usage(&node, Some(namespace)).await?), engine, "the ledger and the requests");
    ensure!(engine.hit_tokens > 0 && engine.bytes_served > 0, "nothing was hit: {engine:?}");

    // Generations: until the write-behind has stored the prompt and it is a hit; each of them counts on both sides.
    let prompt = tokens(9, 700);
    let ask = |number: u64| Request { request_id: format!("ask-{number}"), ..question(&prompt) };
    let mut asked = 0;
    let mut hit = 0;
    while hit == 0 {
        ensure!(asked < 200, "never a hit");
        hit = node.ask(ask(asked)).await?.usage.prompt_cache_hit_tokens;
        asked += 1;
        requests += 1;
    }
    let about = node.client.describe().await?;
    let decoder = esker_proto::check_namespace_id(&about.namespace)?;
    let billed = usage(&node, Some(decoder)).await?;
    let (_, seen) = scrape(&node)?;
    let of_generations = [("path", "generate")];
    let agree = [
        ("prompt", count(&seen, "esker_query_tokens_total", &of_generations), billed.prompt_tokens),
        ("hit", count(&seen, "esker_hit_tokens_total", &of_generations), billed.hit_tokens),
        ("miss", missed(&seen, "generate"), billed.miss_tokens),
        ("computed", count(&seen, "esker_prefill_tokens_total", &[]), billed.miss_tokens),
        ("bytes", fetched(&seen) - engine.bytes_served, billed.bytes_served),
        ("completion", count(&seen, "esker_completion_tokens_total", &[]), billed.completion_tokens),
    ];
    ensure!(billed.bytes_served > 0, "a hit of no bytes: {billed:?}");
    assert!(agree.iter().all(|(_, counted, billed)| counted == billed), "{agree:?}");
    assert_eq!((billed.requests, billed.hit_tokens), (asked, hit));

    // The ledger's own counters are the sums of all its records.
    let all = usage(&node, None).await?;
    assert_eq!((all.requests, all.incomplete_requests), (requests, 0));
    for (kind, billed) in [("hit", all.hit_tokens), ("miss", all.miss_tokens)] {
        assert_eq!(count(&seen, "esker_ledger_tokens_total", &[("kind", kind)]), billed, "{kind}");
    }
    assert_eq!(count(&seen, "esker_ledger_served_bytes_total", &[]), all.bytes_served);
    assert_eq!(count(&seen, "esker_ledger_records_total", &[("outcome", "written")]), requests);

    // Served again, billed once.
    let again = node.ask(ask(0)).await?.usage;
    ensure!(again.completion_tokens > 0, "{again:?}");
    let (_, twice) = scrape(&node)?;
    let counted = count(&twice, "esker_query_tokens_total", &of_generations);
    assert_eq!(counted, count(&seen, "esker_query_tokens_total", &of_generations) + 700);
    assert_eq!(usage(&node, Some(decoder)).await?.prompt_tokens, billed.prompt_tokens);

    // A job is not a request.
    let ids = tokens(10, 300).iter().map(|token| token.0).collect();
    let prompt = v1::warmup_prompt::Prompt::Tokens(v1::WarmupTokens { ids });
    let prompts = vec![v1::WarmupPrompt { prompt: Some(prompt) }];
    let job = v1::SubmitWarmupRequest { job: "warm".into(), prompts, ..Default::default() };
    node.client.submit_warmup(job).await?;
    let mut watched = node.client.watch_warmup("warm").await?;
    while watched.next().await?.is_some() {}
    let (_, warmed) = scrape(&node)?;
    ensure!(count(&warmed, "esker_warmup_tokens_total", &[("source", "computed")]) > 0, "no work was done");
    assert_eq!(count(&warmed, "esker_query_tokens_total", &of_generations), counted);
    let after = usage(&node, None).await?;
    assert_eq!((after.requests, Account::of(&after)), (all.requests, Account::of(&all)));
    node.kill()
}

/// The control: were settling not needed for a bill, or a request that is not settled not counted, this would be silent.
#[tokio::test]
async fn what_bypasses_settle_shows() -> Result<()> {
    let folder = scratch();
    let options = ["--no-model", "--segment-mib", "4", "--http", "127.0.0.1:0"];
    let node = Node::start(&folder.path().join("data"), &options).await?;
    let layout = flat_layout();
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 1, 6);
    let before = stored(&scrape(&node)?.1);
    let mut settled = Account::default();
    serve(&node, &prompt, Some("first"), &mut settled).await?;
    serve(&node, &prompt, Some("second"), &mut settled).await?;
    let mut bypassed = Account::default();
    serve(&node, &prompt, None, &mut bypassed).await?;
    ensure!(bypassed.hit_tokens == 6 * BLOCK_TOKENS && bypassed.bytes_served > 0, "{bypassed:?}");

    let (_, seen) = scrape(&node)?;
    let (counted, billed) = (engines(&seen, before), Account::of(&usage(&node, None).await?));
    assert_eq!(billed, settled);
    assert_eq!(counted.hit_tokens - billed.hit_tokens, bypassed.hit_tokens);
    assert_eq!(counted.prompt_tokens - billed.prompt_tokens, bypassed.prompt_tokens);
    assert_eq!(counted.bytes_served - billed.bytes_served, bypassed.bytes_served);
    assert_eq!(count(&seen, "esker_grants", &[]), 1, "the open account");

    // When the grant is over it is closed as unused: its bytes are known, its tokens never billed.
    let started = Instant::now();
    let closed = loop {
        let sums = usage(&node, None).await?;
        if sums.incomplete_requests > 0 {
            break sums;
        }
        ensure!(started.elapsed() < Duration::from_secs(60), "the grant was never closed: {sums:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let (_, seen) = scrape(&node)?;
    let (counted, billed) = (engines(&seen, before), Account::of(&closed));
    assert_eq!((closed.requests, closed.incomplete_requests), (2, 1));
    assert_eq!(counted.bytes_served, billed.bytes_served);
    assert_eq!(
        (billed.hit_tokens, counted.hit_tokens),
        (settled.hit_tokens, settled.hit_tokens + bypassed.hit_tokens)
    );
    assert_eq!(count(&seen, "esker_grants", &[]), 0);
    node.kill().context("stopping")
}
