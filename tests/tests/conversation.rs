//! Promise: an application that resends a growing conversation hits up to the end of the last answer, also when the node was
//! killed or stopped in between.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use esker_tests::{Node, scratch, web};
use serde_json::{Value, json};

const BLOCK_TOKENS: u64 = 128;
const TURNS: u64 = 8;
/// Sampled wildly: what is said so is spelled as no tokenizer would spell it.
const TEMPERATURE: f64 = 1.5;

#[tokio::test]
async fn a_conversation_goes_on_behind_a_restart() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let start = || async { Node::start(&data, &["--http", "127.0.0.1:0"]).await };
    let mut node = start().await?;
    let mut messages =
        vec![json!({"role": "system", "content": "In the beginning was the house. ".repeat(40)})];
    let mut before = 0;
    for turn in 0..TURNS {
        messages.push(json!({"role": "user", "content": format!("And then, {turn}?")}));
        let reply = ask(&node, &messages, turn)?;
        let (prompt, said, cached) = (
            count(&reply, "prompt_tokens")?,
            count(&reply, "completion_tokens")?,
            count(&reply, "prompt_cache_hit_tokens")?,
        );
        assert!(
            cached >= before / BLOCK_TOKENS * BLOCK_TOKENS,
            "turn {turn}: {cached} of {before} tokens were there"
        );
        // All but the last went through the model.
        before = prompt + said - 1;
        messages.push(reply["choices"][0]["message"].clone());
        // What is new goes to the drive behind the answer.
        tokio::time::sleep(Duration::from_secs(1)).await;
        match turn {
            2 => node.kill()?,
            5 => ensure!(node.stop().await?.success(), "the node did not end well"),
            _ => continue,
        }
        node = start().await?;
    }
    assert!(before > TURNS * 90, "{before} tokens in all");
    ensure!(node.stop().await?.success(), "the node did not end well");
    // The control: without what was remembered the answers are spelled anew, and what is behind the first is not found.
    std::fs::remove_file(data.join("replay"))?;
    let node = start().await?;
    let reply = ask(&node, &messages[..messages.len() - 1], TURNS - 1)?;
    let cached = count(&reply, "prompt_cache_hit_tokens")?;
    assert!(
        cached < before / 2,
        "{cached} of {before} tokens were there: nothing was sampled in a way of its own"
    );
    ensure!(node.stop().await?.success(), "the node did not end well");
    Ok(())
}

#[tokio::test]
async fn what_is_remembered_of_answers_is_erased_with_their_tenant() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::start(&data, &["--http", "127.0.0.1:0"]).await?;
    let len = || std::fs::metadata(data.join("replay")).map(|meta| meta.len());
    let empty = len()?;
    // Some answers happen to be spelled as the tokenizer would; of several not all.
    for seed in 0..4 {
        ask(&node, &[json!({"role": "user", "content": "Who is there?"})], seed)?;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(len()? > empty, "nothing was remembered");
    node.client.erase_tenant("default").await?;
    assert_eq!(len()?, empty);
    ensure!(node.stop().await?.success(), "the node did not end well");
    Ok(())
}

fn ask(node: &Node, messages: &[Value], seed: u64) -> Result<Value> {
    let body = json!({
        "model": "esker-kjv-austen-8m", "messages": messages, "temperature": TEMPERATURE, "seed": seed, "max_tokens": 90,
    });
    let http = node.http.as_deref().context("the node has HTTP")?;
    let reply =
        web(http, "POST", "/v1/chat/completions", &["content-type: application/json"], &body.to_string())?;
    ensure!(reply.status == 200, "{}: {}", reply.status, reply.body);
    Ok(serde_json::from_str(&reply.body)?)
}

fn count(reply: &Value, field: &str) -> Result<u64> {
    reply["usage"][field].as_u64().with_context(|| format!("no {field} in {reply}"))
}
