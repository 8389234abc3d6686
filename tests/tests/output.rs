//! Promise: a command whose reader has seen enough, or whose disk is full, ends as what it is: never in a panic.

use std::fs::File;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use esker_tests::identity::{Claims, Issuer};
use esker_tests::{Node, esker, output, question, scratch, text_of, tokens};

/// How Rust ends a process that panics.
const PANICKED: i32 = 101;

/// Where standard output or error may go.
#[derive(Clone, Copy, Debug)]
enum Out {
    Kept,
    /// A pipe that nobody reads any more.
    Closed,
    /// A disk that is full.
    Full,
}

impl Out {
    fn stdio(self) -> Result<Stdio> {
        Ok(match self {
            Self::Kept => Stdio::piped(),
            Self::Closed => {
                let (reader, writer) = std::io::pipe()?;
                drop(reader);
                writer.into()
            }
            Self::Full => File::options().write(true).open("/dev/full")?.into(),
        })
    }
}

fn run(args: &[&str], out: Out, errors: Out) -> Result<(ExitStatus, String)> {
    let done = Command::new(esker())
        .args(args)
        .env("ESKER_LOG", "trace")
        .stdout(out.stdio()?)
        .stderr(errors.stdio()?)
        .spawn()?
        .wait_with_output()?;
    Ok((done.status, text_of(&done.stderr)))
}

#[tokio::test]
async fn nothing_panics_for_want_of_a_reader_or_of_room() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::start(&data, &["--http", "127.0.0.1:0"]).await?;
    let prompt = tokens(1, 300);
    node.ask(question(&prompt)).await?;
    node.parked(&prompt).await?;
    let prompts = folder.path().join("prompts.jsonl");
    std::fs::write(&prompts, "{\"text\": \"Who is there?\"}\n")?;
    let trace = folder.path().join("trace.jsonl");
    let line = "{\"timestamp\": 0, \"input_length\": 1024, \"output_length\": 1, \"hash_ids\": [1, 2]}\n";
    std::fs::write(&trace, line.repeat(3))?;
    let (data, prompts, trace) =
        (data.display().to_string(), prompts.display().to_string(), trace.display().to_string());
    let (address, http) = (node.address.clone(), node.http.clone().context("no HTTP")?);
    let mut commands: Vec<Vec<&str>> = vec![
        vec!["generate", "-n", "4", "--node", &address, "Who is there?"],
        vec!["generate", "-n", "4", "--json", "--node", &address, "Who is there?"],
        vec!["lookup", "--node", &address, "Who is there?"],
        vec!["tenants", "--node", &address],
        vec!["usage", "--node", &address],
        vec!["usage", "--json", "--node", &address],
        vec!["warmup", "--dry-run", "--node", &address, &prompts],
        vec!["warmup", "--json", "--node", &address, &prompts],
        vec!["warmup", "--list", "--node", &address],
        vec!["top", "--once", "--http", &http],
        vec!["stat", &data],
        vec!["stat", "--json", &data],
        vec!["bench", "replay", &trace],
        vec!["bench", "replay", "--json", &trace],
    ];
    check(&commands)?;
    node.stop().await?;
    commands = vec![vec!["fsck", &data], vec!["fsck", "--json", &data], vec!["usage", "verify", &data]];
    check(&commands)?;
    // One that fails has nobody to tell why.
    let (status, _) = run(&["lookup", "--node", "127.0.0.1:1", "text"], Out::Kept, Out::Full)?;
    assert_eq!(status.code(), Some(1));
    Ok(())
}

fn check(commands: &[Vec<&str>]) -> Result<()> {
    for args in commands {
        for (out, errors) in [
            (Out::Kept, Out::Kept),
            (Out::Closed, Out::Kept),
            (Out::Full, Out::Kept),
            (Out::Kept, Out::Closed),
            (Out::Kept, Out::Full),
            (Out::Full, Out::Full),
        ] {
            let (status, said) = run(args, out, errors)?;
            let case = format!("{args:?} with {out:?} and {errors:?}: {status}, {said}");
            ensure!(status.code() != Some(PANICKED) && !said.contains("panicked"), "{case}");
            match out {
                // Whoever counts on the result is told that it is not there.
                Out::Full => ensure!(status.code() == Some(1), "{case}"),
                Out::Kept | Out::Closed => ensure!(status.success(), "{case}"),
            }
            if matches!((out, errors), (Out::Full, Out::Kept)) {
                ensure!(said.contains("cannot write to standard output"), "{case}");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_node_whose_log_cannot_be_written_serves_on() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let log = data.with_extension("log");
    // What the node of a test logs to is this file.
    std::os::unix::fs::symlink("/dev/full", &log)?;
    let node = Node::start(&data, &["--no-model"]).await?;
    // Something that is told.
    let refused = node.client.describe().await.unwrap_err();
    assert!(refused.to_string().contains("started without a model"), "{refused}");
    std::fs::remove_file(&log)?;
    std::fs::write(&log, "")?;
    let ended = node.stop().await?;
    assert!(ended.success(), "{ended}");

    let (status, said) = run(
        &["serve", "--no-model", "--listen", "127.0.0.1:0", "--data", &data.display().to_string()],
        Out::Full,
        Out::Kept,
    )?;
    assert!(status.code() == Some(1) && said.contains("cannot write to standard output"), "{status}: {said}");
    Ok(())
}

#[tokio::test]
async fn top_looks_at_a_node_with_tls_as_whoever_a_token_says() -> Result<()> {
    let folder = scratch();
    let issuer = Issuer::new(&folder.path().join("keys"))?;
    let policy = issuer.policy("[tenants.acme]\n[tenants.operators]\n")?;
    let (certificate, key) = issuer.server()?;
    let path = |path: &std::path::Path| path.display().to_string();
    let options = ["--no-model", "--http", "127.0.0.1:0", "--policy", &path(&policy)].map(str::to_owned);
    let tls = ["--tls-cert", &path(&certificate), "--tls-key", &path(&key)].map(str::to_owned);
    let options: Vec<&str> = options.iter().chain(&tls).map(String::as_str).collect();
    let node = Node::start(&folder.path().join("data"), &options).await?;
    let http = node.http.clone().context("no HTTP")?;
    let token = folder.path().join("token");
    let top = |more: &[&str]| {
        let done = output([&["top", "--once", "--http", &http], more].concat());
        (done.status.success(), text_of(&done.stdout), text_of(&done.stderr))
    };
    let (authority, token_file) = (path(&issuer.authority()), path(&token));
    std::fs::write(&token, issuer.sign(&Claims::new("operators", &["admin"]))?)?;
    let (good, shown, said) = top(&["--ca", &authority, "--token", &token_file]);
    assert!(good && shown.starts_with("Esker "), "{shown}{said}");
    let localhost = http.replace("127.0.0.1", "localhost");
    let done = output(["top", "--once", "--http", &localhost, "--ca", &authority, "--token", &token_file]);
    assert!(done.status.success(), "{}", text_of(&done.stderr));

    // Not without TLS, not without a token, not with another role, not where somebody else answers.
    let (good, _, said) = top(&["--token", &token_file]);
    assert!(!good, "{said}");
    let (good, _, said) = top(&["--ca", &authority]);
    assert!(!good && said.contains("this node asks who calls"), "{said}");
    std::fs::write(&token, issuer.sign(&Claims::new("acme", &["reader"]))?)?;
    let (good, _, said) = top(&["--ca", &authority, "--token", &token_file]);
    assert!(!good && said.contains("admin"), "{said}");
    let other = Issuer::new(&folder.path().join("other"))?;
    std::fs::write(&token, issuer.sign(&Claims::new("operators", &["admin"]))?)?;
    let (good, _, said) = top(&["--ca", &path(&other.authority()), "--token", &token_file]);
    assert!(!good && said.contains("certificate"), "{said}");
    node.kill()
}
