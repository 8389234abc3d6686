//! Promise: what is offered over HTTP is offered to whom it is for, in the shapes that applications know.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use esker_tests::{Node, output, scratch, text_of, web};
use serde_json::{Value, json};

#[tokio::test]
async fn http_is_off_unless_asked_for_and_stays_on_loopback() -> Result<()> {
    let folder = scratch();
    let node = Node::store_only(&folder.path().join("a")).await?;
    assert_eq!(node.http, None);
    node.kill()?;
    let data = folder.path().join("b");
    let args = ["serve", "--no-model", "--http", "0.0.0.0:0", "--listen", "127.0.0.1:0", "--data"];
    let refused = output(args.iter().map(OsStr::new).chain([data.as_os_str()]));
    let text = text_of(&refused.stderr);
    assert!(!refused.status.success() && text.contains("refusing to listen on 0.0.0.0:0"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_node_answers_probes_and_no_page_of_another_origin() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--no-model", "--http", "127.0.0.1:0"]).await?;
    let http = node.http.clone().unwrap_or_default();
    let alive = web(&http, "GET", "/healthz", &[], "")?;
    assert_eq!((alive.status, alive.body.as_str()), (200, r#"{"status":"serving"}"#));
    for header in ["host: example.com", "origin: https://example.com"] {
        assert_eq!(web(&http, "GET", "/healthz", &[header], "")?.status, 403, "{header}");
    }
    let nothing = web(&http, "GET", "/nothing", &[], "")?;
    assert_eq!(nothing.status, 404);
    assert!(nothing.body.contains("\"message\":\"there is nothing at /nothing\""), "{}", nothing.body);
    assert!(node.stop().await?.success());
    Ok(())
}

#[tokio::test]
async fn the_page_and_its_figures_come_from_the_node_alone() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &["--http", "127.0.0.1:0"]).await?;
    let http = node.http.clone().unwrap_or_default();
    for path in ["/", "/page.js", "/page.css"] {
        let file = web(&http, "GET", path, &[], "")?;
        assert!(file.status == 200 && file.head.contains("default-src 'none'"), "{path}: {}", file.head);
    }
    let json = |path: &str| -> Result<serde_json::Value> {
        let reply = web(&http, "GET", path, &[], "")?;
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        Ok(serde_json::from_str(&reply.body)?)
    };
    assert_eq!(json("/api/overview")?["traffic"]["all"]["requests"], 0);
    assert_eq!(json("/api/prefixes")?.as_array().map(Vec::len), Some(0));
    // Two prompts that share two blocks, each with a block of its own.
    let shared = "In the beginning ".repeat(100);
    let ask = |end: &str| {
        let body = serde_json::json!({"model": "esker-kjv-austen-8m", "max_tokens": 1, "prompt": format!("{shared}{}", end.repeat(200))});
        web(&http, "POST", "/v1/completions", &["content-type: application/json"], &body.to_string())
    };
    assert_eq!(ask(" God")?.status, 200);
    let mut seen = serde_json::Value::Null;
    for _ in 0..100 {
        seen = json("/api/prefixes")?;
        if seen.as_array().is_some_and(|realms| !realms.is_empty()) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(ask(" man")?.status, 200);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let realm = seen[0]["id"].as_str().unwrap_or_default().to_owned();
    let tree = json(&format!("/api/prefixes/{realm}"))?;
    let root = &tree["roots"][0];
    assert_eq!(root["next"].as_array().map(Vec::len), Some(2), "{tree}");
    assert!(root["to"].as_u64() > Some(128), "{tree}");
    let overview = json("/api/overview")?;
    assert_eq!(overview["traffic"]["all"]["requests"], 2);
    assert_eq!(overview["traffic"]["hour"]["hit_tokens"], root["to"]);
    let points = json("/api/history?span=week")?;
    let last = points["points"].as_array().and_then(|points| points.last()).cloned().unwrap_or_default();
    assert_eq!(last["hit_tokens"], root["to"], "{points}");
    assert_eq!(web(&http, "GET", "/api/history?span=year", &[], "")?.status, 400);
    let top = text_of(&output(["top", "--once", "--http", &http]).stdout);
    assert!(top.contains("2 requests") && top.contains("Kept for"), "{top}");
    assert!(node.stop().await?.success());
    Ok(())
}

/// Objects of each class that a data folder holds.
fn classes(data: &Path) -> Result<BTreeMap<String, u64>> {
    let told = output([OsStr::new("stat"), OsStr::new("--json"), data.as_os_str()]);
    let told: Value = serde_json::from_str(&text_of(&told.stdout))?;
    let rows = told["classes"].as_object().context("no classes")?;
    Ok(rows.iter().map(|(name, row)| (name.clone(), row["objects"].as_u64().unwrap_or(0))).collect())
}

#[tokio::test]
async fn what_a_request_says_of_retention_is_the_class_in_which_it_is_kept() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::start(&data, &["--http", "127.0.0.1:0"]).await?;
    let http = node.http.clone().unwrap_or_default();
    let openai = |fields: Value| ("/v1/chat/completions", fields);
    let marked = |ttl: Value| json!({"type": "text", "text": "Be brief.", "cache_control": ttl});
    let anthropic = |system: Value, more: Value| {
        let mut fields = json!({"system": [system]});
        fields
            .as_object_mut()
            .into_iter()
            .for_each(|fields| fields.extend(more.as_object().cloned().unwrap_or_default()));
        ("/v1/messages", fields)
    };
    let ephemeral = |ttl: &str| json!({"type": "ephemeral", "ttl": ttl});
    let asked = [
        ("24h", openai(json!({}))),
        ("5m", openai(json!({"prompt_cache_retention": "5m"}))),
        ("1h", openai(json!({"prompt_cache_retention": "in_memory"}))),
        ("24h", openai(json!({"prompt_cache_retention": "24h"}))),
        ("72h", openai(json!({"prompt_cache_retention": "72h"}))),
        ("1h", openai(json!({"prompt_cache_options": {"ttl": "30m"}}))),
        ("24h", openai(json!({"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "1h"}}))),
        ("24h", anthropic(json!({"type": "text", "text": "Be brief."}), json!({}))),
        ("5m", anthropic(marked(json!({"type": "ephemeral"})), json!({}))),
        ("1h", anthropic(marked(ephemeral("1h")), json!({}))),
        ("72h", anthropic(marked(ephemeral("72h")), json!({}))),
        // The longest of the marks, wherever they stand.
        ("24h", anthropic(marked(ephemeral("5m")), json!({"cache_control": ephemeral("24h")}))),
    ];
    let mut before = classes(&data)?;
    for (number, (class, (path, fields))) in asked.into_iter().enumerate() {
        let text = format!("{number} is the number of the house. ").repeat(60);
        let mut body = json!({
            "model": "esker-kjv-austen-8m", "max_tokens": 1, "messages": [{"role": "user", "content": text}],
        });
        body.as_object_mut()
            .into_iter()
            .for_each(|body| body.extend(fields.as_object().cloned().unwrap_or_default()));
        let reply = web(&http, "POST", path, &["content-type: application/json"], &body.to_string())?;
        assert_eq!(reply.status, 200, "{fields}: {}", reply.body);
        // New blocks go to the drive behind the answer: until no more come.
        let mut now = before.clone();
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let later = classes(&data)?;
            if later == now && now != before {
                break;
            }
            now = later;
        }
        let grown: Vec<&String> = now
            .iter()
            .filter(|(name, objects)| before.get(*name) != Some(objects))
            .map(|(name, _)| name)
            .collect();
        assert_eq!(grown, [class], "{path} {fields}: {before:?}, then {now:?}");
        before = now;
    }
    assert!(node.stop().await?.success());
    Ok(())
}
