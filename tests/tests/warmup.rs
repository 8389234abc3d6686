//! Promise: a warm-up job does what was asked for once, whatever happens on the way, and what it stored is hit later.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use esker_client::v1;
use esker_prefix::TokenId;
use esker_tests::{Node, esker, output, question, scratch, text_of, tokens};
use tonic::Code;
use v1::WarmupState as State;
use v1::admin_client::AdminClient;

type Change = fn(&mut v1::SubmitWarmupRequest);

const BLOCK_TOKENS: u64 = 128;
/// What a crash may make to be computed again: the blocks of one group commit.
const MAX_REPEATED: u64 = 8 * BLOCK_TOKENS;
const PATIENCE: Duration = Duration::from_secs(240);

fn request(job: &str, prompts: &[Vec<TokenId>]) -> v1::SubmitWarmupRequest {
    let prompt = |tokens: &Vec<TokenId>| {
        let ids = tokens.iter().map(|token| token.0).collect();
        v1::WarmupPrompt { prompt: Some(v1::warmup_prompt::Prompt::Tokens(v1::WarmupTokens { ids })) }
    };
    v1::SubmitWarmupRequest {
        job: job.into(),
        prompts: prompts.iter().map(prompt).collect(),
        ..Default::default()
    }
}

async fn submit(node: &Node, request: &v1::SubmitWarmupRequest) -> Result<v1::WarmupJob> {
    Ok(node.client.submit_warmup(request.clone()).await?)
}

/// Watches a job until `enough`, or its end.
async fn until(node: &Node, job: &str, enough: impl Fn(&v1::WarmupJob) -> bool) -> Result<v1::WarmupJob> {
    let mut watched = node.client.watch_warmup(job).await?;
    let mut last = None;
    let started = Instant::now();
    while let Some(now) = watched.next().await? {
        check(&now)?;
        let is_enough = enough(&now);
        last = Some(now);
        if is_enough {
            break;
        }
        ensure!(started.elapsed() < PATIENCE, "too slow: {last:?}");
    }
    last.context("nothing came of the job")
}

async fn ended(node: &Node, job: &str) -> Result<v1::WarmupJob> {
    until(node, job, |_| false).await
}

/// What holds of a job at any time.
fn check(job: &v1::WarmupJob) -> Result<()> {
    let sum = job.tokens_cached + job.tokens_computed + job.tokens_left;
    ensure!(job.prompts_done <= job.prompts && sum == job.tokens, "the account does not add up: {job:?}");
    Ok(())
}

#[tokio::test]
async fn a_chain_is_kept_as_far_as_it_is_stored_and_not_computed() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let prompt = tokens(31, 6 * 128 + 1);
    let warmed = request("tokens", std::slice::from_ref(&prompt));
    submit(&node, &warmed).await?;
    ensure!(ended(&node, "tokens").await?.state() == State::Done);
    let lookup = v1::LookupRequest {
        namespace: node.client.describe().await?.namespace,
        tokens: prompt.iter().map(|token| token.0).collect(),
        no_grant: true,
        want_hashes: true,
        ..Default::default()
    };
    let hashes = node.cache.clone().lookup(lookup).await?.into_inner().hashes;
    ensure!(hashes.len() == 6, "{} hashes", hashes.len());
    let of = |job: &str, hashes: Vec<bytes::Bytes>| v1::SubmitWarmupRequest {
        prompts: vec![v1::WarmupPrompt {
            prompt: Some(v1::warmup_prompt::Prompt::Chain(v1::WarmupChain { hashes })),
        }],
        ..request(job, &[])
    };
    submit(&node, &of("chain", hashes.clone())).await?;
    let kept = ended(&node, "chain").await?;
    ensure!(kept.state() == State::Done, "{kept:?}");
    ensure!((kept.tokens, kept.tokens_cached, kept.tokens_computed) == (768, 768, 0), "{kept:?}");
    let mut longer = hashes;
    longer.push(vec![7; 32].into());
    let dry = v1::SubmitWarmupRequest { dry_run: true, ..of("longer", longer.clone()) };
    let planned = submit(&node, &dry).await?;
    ensure!((planned.tokens, planned.tokens_cached, planned.tokens_left) == (896, 768, 128), "{planned:?}");
    submit(&node, &of("longer", longer)).await?;
    let failed = ended(&node, "longer").await?;
    ensure!(failed.state() == State::Failed && failed.tokens_cached == 768, "{failed:?}");
    ensure!(failed.reason.contains("6 of 7 blocks"), "{}", failed.reason);
    let short = submit(&node, &of("short", vec![vec![7; 31].into()])).await;
    ensure!(short.is_err_and(|error| error.to_string().contains("hashes")), "a hash of 31 bytes");
    node.kill()
}

#[tokio::test]
async fn what_is_warmed_is_hit_and_a_prefix_is_computed_once() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    // Two prompts that share four blocks and end inside one, and one that is too short for any.
    let mut first = tokens(1, 700);
    let mut second = first[..512].to_vec();
    second.extend(tokens(2, 300));
    let prompts = [first.clone(), second.clone(), tokens(3, 100)];

    let dry = v1::SubmitWarmupRequest { dry_run: true, ..request("a", &prompts) };
    let plan = submit(&node, &dry).await?;
    assert_eq!(
        (plan.state(), plan.tokens, plan.tokens_cached, plan.tokens_left),
        (State::Planned, 1408, 512, 896)
    );
    assert!(plan.bytes_left > 0);
    assert_eq!(
        node.client.get_warmup("a").await.unwrap_err().code(),
        Some(Code::NotFound),
        "it was only asked"
    );

    submit(&node, &request("a", &prompts)).await?;
    let done = ended(&node, "a").await?;
    assert_eq!((done.state(), done.prompts_done), (State::Done, 3), "{done:?}");
    assert_eq!((done.tokens_computed, done.tokens_cached), (896, 512), "{done:?}");
    assert!(done.bytes_written > 0 && done.compute_ms > 0);

    // Nothing is left to do.
    let plan = submit(&node, &v1::SubmitWarmupRequest { dry_run: true, ..request("b", &prompts) }).await?;
    assert_eq!((plan.tokens_cached, plan.tokens_left, plan.bytes_left), (1408, 0, 0));
    submit(&node, &request("b", &prompts)).await?;
    assert_eq!(ended(&node, "b").await?.tokens_computed, 0);

    first.extend(tokens(4, 20));
    second.extend(tokens(5, 20));
    assert_eq!(node.ask(question(&first)).await?.usage.prompt_cache_hit_tokens, 640);
    assert_eq!(node.ask(question(&second)).await?.usage.prompt_cache_hit_tokens, 768);
    let jobs = node.client.list_warmups("").await?;
    assert_eq!(jobs.iter().map(|job| job.job.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    node.kill()
}

#[tokio::test]
async fn a_hit_after_a_warm_up_equals_a_miss() -> Result<()> {
    let folder = scratch();
    let (warm, cold) = (folder.path().join("warm"), folder.path().join("cold"));
    let prompt = tokens(7, 900);
    let node = Node::start(&warm, &[]).await?;
    submit(&node, &request("a", std::slice::from_ref(&prompt))).await?;
    ended(&node, "a").await?;
    let hit = node.ask(question(&prompt)).await?;
    assert_eq!(hit.usage.prompt_cache_hit_tokens, 896);
    node.kill()?;
    let node = Node::start(&cold, &[]).await?;
    let miss = node.ask(question(&prompt)).await?;
    assert_eq!(miss.usage.prompt_cache_hit_tokens, 0);
    assert_eq!(hit.tokens, miss.tokens);
    node.kill()
}

#[tokio::test]
async fn a_job_survives_kills_and_goes_on_where_it_was() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let prompts = [tokens(11, 4096), tokens(12, 2048)];
    let mut node = Node::start(&data, &[]).await?;
    submit(&node, &request("a", &prompts)).await?;
    let mut computed = 0;
    for kill in 0..3_u64 {
        let before = until(&node, "a", |job| job.tokens_computed >= computed + 1024).await?;
        assert_eq!(before.state(), State::Running, "the job is too short for this test: {before:?}");
        node.kill()?;
        node = Node::start(&data, &[]).await?;
        let after = node.client.get_warmup("a").await?;
        check(&after)?;
        assert!(after.tokens_computed >= before.tokens_computed, "kill {kill}: {before:?}, then {after:?}");
        computed = after.tokens_computed;
        // The same job, whoever submits it again.
        assert_ne!(submit(&node, &request("a", &prompts)).await?.state(), State::Failed);
    }
    let done = ended(&node, "a").await?;
    assert_eq!((done.state(), done.tokens_left), (State::Done, 0), "{done:?}");
    // What was stored and not yet counted when the node was killed is found.
    assert!(done.tokens_cached <= 3 * MAX_REPEATED, "{done:?}");
    for (prompt, whole) in prompts.iter().zip([3968, 1920]) {
        assert_eq!(node.ask(question(prompt)).await?.usage.prompt_cache_hit_tokens, whole);
    }
    node.kill()
}

#[tokio::test]
async fn budgets_stop_a_job_and_it_can_be_resumed_or_cancelled() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let prompts = [tokens(21, 4096), tokens(22, 4096)];
    let small = v1::SubmitWarmupRequest { max_tokens: 1000, ..request("tokens", &prompts) };
    submit(&node, &small).await?;
    let stopped = ended(&node, "tokens").await?;
    assert_eq!((stopped.state(), stopped.tokens_computed), (State::Stopped, 896), "{stopped:?}");
    assert!(stopped.reason.contains("budget of 1000 computed tokens"), "{stopped:?}");
    // The same submission changes nothing; to go on is asked for, and the budget begins anew.
    assert_eq!(submit(&node, &small).await?.state(), State::Stopped);
    submit(&node, &v1::SubmitWarmupRequest { resume: true, ..small.clone() }).await?;
    let stopped = ended(&node, "tokens").await?;
    assert_eq!((stopped.state(), stopped.tokens_computed), (State::Stopped, 2 * 896), "{stopped:?}");
    let other = v1::SubmitWarmupRequest { max_tokens: 1001, ..small };
    let refused = node.client.submit_warmup(other).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::AlreadyExists));

    let per_token = stopped.bytes_written / stopped.tokens_computed;
    let max_bytes = 3000 * per_token;
    submit(&node, &v1::SubmitWarmupRequest { max_bytes, ..request("bytes", &[tokens(23, 4096)]) }).await?;
    let stopped = ended(&node, "bytes").await?;
    assert_eq!(stopped.state(), State::Stopped, "{stopped:?}");
    assert!(stopped.bytes_written > 0 && stopped.bytes_written <= max_bytes, "{stopped:?}");

    submit(
        &node,
        &v1::SubmitWarmupRequest {
            deadline_s: 1,
            ..request("late", &[tokens(24, 8192), tokens(25, 8192), tokens(26, 8192)])
        },
    )
    .await?;
    let stopped = ended(&node, "late").await?;
    assert_eq!(stopped.state(), State::Stopped, "{stopped:?}");
    assert!(stopped.reason.contains("deadline"), "{stopped:?}");

    submit(&node, &request("long", &[tokens(27, 8192), tokens(28, 8192)])).await?;
    until(&node, "long", |job| job.tokens_computed > 0).await?;
    let cancelled = node.client.cancel_warmup("long").await?;
    assert_eq!(cancelled.state(), State::Cancelled);
    check(&cancelled)?;
    assert!(cancelled.tokens_left > 0);
    assert_eq!(node.client.cancel_warmup("long").await?.state(), State::Cancelled, "again changes nothing");
    node.kill()
}

#[tokio::test]
async fn what_cannot_be_warmed_is_refused_with_its_reason() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let good = request("a", &[tokens(1, 300)]);
    let refusal = async |change: Change| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = node.client.submit_warmup(bad).await.unwrap_err();
        (error.code().unwrap(), error.to_string())
    };
    let cases: [(Change, Code, &str); 9] = [
        (|r| r.job.clear(), Code::InvalidArgument, "job"),
        (|r| r.prompts.clear(), Code::InvalidArgument, "prompts"),
        (|r| r.prompts.push(v1::WarmupPrompt::default()), Code::InvalidArgument, "prompt 2"),
        (|r| r.prompts = request("", &[vec![TokenId(9_999_999)]]).prompts, Code::InvalidArgument, "9999999"),
        (|r| r.prompts = request("", &[tokens(1, 40_000)]).prompts, Code::InvalidArgument, "context"),
        (|r| r.namespace = vec![7; 32].into(), Code::FailedPrecondition, "namespace"),
        (|r| r.namespace = vec![7; 31].into(), Code::InvalidArgument, "namespace"),
        (|r| r.scope = v1::Scope::Org.into(), Code::PermissionDenied, "org"),
        (|r| r.user = "a/b".into(), Code::InvalidArgument, "user"),
    ];
    for (change, code, named) in cases {
        let (got, text) = refusal(change).await;
        assert!(got == code && text.contains(named), "{got:?}: {text}, expected {code:?} and {named:?}");
    }
    assert!(node.client.list_warmups("").await?.is_empty());
    node.kill()?;
    let node = Node::store_only(&folder.path().join("other")).await?;
    assert_eq!(node.client.submit_warmup(good).await.unwrap_err().code(), Some(Code::Unimplemented));
    node.kill()
}

#[tokio::test]
async fn the_command_can_be_interrupted_and_taken_up_again() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let file = folder.path().join("prompts.jsonl");
    let lines: Vec<String> = (31..34)
        .map(|seed| serde_json::json!({"tokens": tokens(seed, 4096).iter().map(|t| t.0).collect::<Vec<_>>()}))
        .map(|line| line.to_string())
        .collect();
    std::fs::write(&file, lines.join("\n"))?;
    let node = Node::start(&data, &[]).await?;
    let command = |more: &[&str]| {
        let words = ["warmup", "--node", &node.address].into_iter().chain(more.iter().copied());
        words.map(str::to_owned).collect::<Vec<String>>()
    };
    let file = path(&file);
    let plan = output(command(&[file, "--dry-run", "--json"]));
    assert!(plan.status.success(), "{}", text_of(&plan.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout)?;
    assert_eq!((&plan["state"], &plan["tokens_left"]), (&"planned".into(), &(3 * 4096).into()));
    let job = plan["job"].as_str().context("a name")?.to_owned();

    let mut shown =
        Command::new(esker()).args(command(&[file])).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    loop {
        match node.client.get_warmup(&job).await {
            Ok(now) if now.tokens_computed > 0 => break,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    let sent = Command::new("kill").args(["-s", "INT", &shown.id().to_string()]).status()?;
    assert!(sent.success() && !shown.wait()?.success());
    assert_eq!(node.client.get_warmup(&job).await?.state(), State::Running, "the job goes on");

    let listed = output(command(&["--list"]));
    assert!(text_of(&listed.stdout).contains(&job), "{}", text_of(&listed.stdout));
    let cancelled = output(command(&["--cancel", &job]));
    assert!(text_of(&cancelled.stdout).contains("cancelled"), "{}", text_of(&cancelled.stdout));
    let before = node.client.get_warmup(&job).await?;

    let done = output(command(&[file, "--json"]));
    assert!(done.status.success(), "{}", text_of(&done.stderr));
    let done: serde_json::Value = serde_json::from_slice(&done.stdout)?;
    assert_eq!((&done["state"], &done["tokens_left"]), (&"done".into(), &0.into()));
    assert!(before.tokens_computed > 0 && before.tokens_computed < 3 * 4096);
    assert_eq!(done["tokens_computed"], 3 * 4096, "nothing is computed twice");
    node.kill()
}

/// Whether the prompt lies readable in one of the files below a folder, as it is written down.
fn is_readable(folder: &Path, prompt: &[TokenId]) -> Result<bool> {
    let text: Vec<String> = prompt[..20].iter().map(|token| token.0.to_string()).collect();
    let text = text.join(",");
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let found = match path.is_dir() {
            true => is_readable(&path, prompt)?,
            false => std::fs::read(&path)?.windows(text.len()).any(|part| part == text.as_bytes()),
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}

#[tokio::test]
async fn a_job_that_runs_while_its_tenant_is_erased_is_over_and_its_prompts_are_gone() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut node = Node::start(&data, &[]).await?;
    let prompts = [tokens(41, 8192), tokens(42, 8192)];
    submit(&node, &request("runs", &prompts)).await?;
    submit(&node, &request("waits", &prompts[1..])).await?;
    until(&node, "runs", |job| job.tokens_computed > 0).await?;
    ensure!(is_readable(&data, &prompts[0])?, "the control: they lie there as long as the job is not over");
    let mut admin = AdminClient::new(node.channel.clone());
    admin.erase_tenant(v1::EraseTenantRequest { tenant: "default".into() }).await?;
    for start in 0..2 {
        assert!(node.client.list_warmups("").await?.is_empty(), "start {start}");
        assert_eq!(node.client.get_warmup("runs").await.unwrap_err().code(), Some(Code::NotFound));
        for prompt in &prompts {
            ensure!(!is_readable(&data, prompt)?, "a prompt is on the drive, start {start}");
        }
        // Nothing more of it is stored, under whatever name.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut admin = AdminClient::new(node.channel.clone());
        let tenants = admin.list_tenants(v1::ListTenantsRequest {}).await?.into_inner().tenants;
        assert!(tenants.iter().all(|tenant| tenant.stored_bytes == 0), "{tenants:?}");
        node.kill()?;
        node = Node::start(&data, &[]).await?;
    }
    // The tenant goes on.
    submit(&node, &request("runs", &[tokens(43, 300)])).await?;
    assert_eq!(ended(&node, "runs").await?.state(), State::Done);
    node.kill()
}

#[tokio::test]
async fn a_kill_amid_an_erasure_leaves_every_job_of_the_tenant_or_none() -> Result<()> {
    let folder = scratch();
    let prompts = [tokens(61, 4096), tokens(62, 4096)];
    let mut erased = 0;
    for delay_ms in [0, 1, 2, 4, 8, 12, 16, 24, 48] {
        let data = folder.path().join(delay_ms.to_string());
        let node = Node::start(&data, &[]).await?;
        for job in ["a", "b"] {
            submit(&node, &request(job, &prompts)).await?;
        }
        let mut admin = AdminClient::new(node.channel.clone());
        let request = v1::EraseTenantRequest { tenant: "default".into() };
        let erasing = tokio::spawn(async move { admin.erase_tenant(request).await });
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        node.kill()?;
        // How it ended is for the node that starts next to say.
        let _ = erasing.await?;
        let node = Node::start(&data, &[]).await?;
        let mut admin = AdminClient::new(node.channel.clone());
        let tenants = admin.list_tenants(v1::ListTenantsRequest {}).await?.into_inner().tenants;
        let epoch = tenants.iter().find(|tenant| tenant.tenant == "default").map_or(0, |tenant| tenant.epoch);
        let jobs = node.client.list_warmups("").await?.len();
        if epoch == 0 {
            assert_eq!(jobs, 2, "killed after {delay_ms} ms, before anything was erased");
        } else {
            erased += 1;
            assert_eq!(jobs, 0, "killed after {delay_ms} ms, when the epoch was given up");
            for prompt in &prompts {
                ensure!(!is_readable(&data, prompt)?, "killed after {delay_ms} ms: a prompt is on the drive");
            }
        }
        node.kill()?;
    }
    println!("{erased} of 9 kills came behind the end of the epoch");
    ensure!(erased > 0, "every kill came too early");
    Ok(())
}

#[tokio::test]
async fn with_a_root_key_prompts_are_sealed_and_the_job_goes_on_after_a_crash() -> Result<()> {
    let folder = scratch();
    let key = folder.path().join("root.key");
    std::fs::write(&key, [9; 32])?;
    let options = ["--root-key", path(&key)];
    let text = "What is said in confidence is for nobody who finds the drive. ".repeat(60);
    for options in [&options[..], &[]] {
        let is_sealed = !options.is_empty();
        let data = folder.path().join(if is_sealed { "sealed" } else { "plain" });
        let node = Node::start(&data, options).await?;
        let prompt = node.client.tokenize(&text).await?;
        let said = v1::WarmupPrompt { prompt: Some(v1::warmup_prompt::Prompt::Text(text.clone())) };
        // The other one is before it, and long.
        let mut request = request("a", &[tokens(51, 2048)]);
        request.prompts.push(said);
        submit(&node, &request).await?;
        node.kill()?;
        // The control: without a root key it lies there.
        assert_eq!(is_readable(&data, &prompt)?, !is_sealed, "sealed: {is_sealed}");
        let node = Node::start(&data, options).await?;
        let done = ended(&node, "a").await?;
        assert_eq!((done.state(), done.prompts_done), (State::Done, 2), "{done:?}");
        let whole = prompt.len() as u64 / BLOCK_TOKENS * BLOCK_TOKENS;
        let question = question(&[&prompt[..], &tokens(52, 3)].concat());
        assert_eq!(node.ask(question).await?.usage.prompt_cache_hit_tokens, whole);
        node.kill()?;
        ensure!(!is_sealed || !is_readable(&data, &prompt)?, "it lies there once the job is done");
    }
    Ok(())
}

fn path(path: &Path) -> &str {
    path.to_str().expect("the test's own folder")
}
