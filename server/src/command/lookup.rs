//! `esker lookup`.

use std::fmt::Write;

use esker_proto::check_namespace_id;
use serde_json::json;

use super::{NodeArgs, TextArgs, client_runtime, print};

/// Arguments of `esker lookup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    node: NodeArgs,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Prints how much of the text the node's decoder could resume.
pub fn run(args: Args) -> anyhow::Result<()> {
    client_runtime()?.block_on(lookup(args))
}

async fn lookup(args: Args) -> anyhow::Result<()> {
    let text = args.text.read()?;
    let client = args.node.connect().await?;
    let namespace = check_namespace_id(&client.describe().await?.namespace)?;
    let tokens = client.tokenize(&text).await?;
    let found = client.lookup(namespace, &tokens).await?;
    // Looking is all: nothing stays pinned, and no account stays open.
    if !found.grant.is_empty() {
        client.release(found.grant.clone()).await?;
    }
    let points = found.resume_points.iter().map(|point| {
        let groups: serde_json::Map<_, _> =
            point.bytes_by_group.iter().map(|group| (group.group.clone(), group.bytes.into())).collect();
        json!({"tokens": point.tokens, "bytes_by_group": groups})
    });
    let resume = found.best.unwrap_or_default();
    let mut text = String::new();
    // Writing to a string does not fail.
    if args.json {
        let points: Vec<_> = points.collect();
        let (history, prompt) = (found.history_tokens, tokens.len());
        let whole = json!({"prompt_tokens": prompt, "history_tokens": history, "resume_points": points,
                           "replay_tokens": resume.replay_tokens, "namespace": namespace.to_hex()});
        let _ = writeln!(text, "{whole}");
    } else {
        let (all, history) = (tokens.len(), found.history_tokens);
        let _ = writeln!(text, "{all} tokens, {history} of them stored; namespace {namespace}");
        for point in &found.resume_points {
            let bytes: u64 = point.bytes_by_group.iter().map(|group| group.bytes).sum();
            let _ = writeln!(text, "can resume at {} tokens, {bytes} bytes to restore:", point.tokens);
            for group in &point.bytes_by_group {
                let _ = writeln!(text, "  {:<20} {:>12} bytes", group.group, group.bytes);
            }
        }
    }
    print(&text)
}
