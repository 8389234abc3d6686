//! Promise: what is offered over HTTP is offered to whom it is for, in the shapes that applications know.

use std::ffi::OsStr;

use anyhow::Result;
use esker_tests::{Node, output, scratch, text_of, web};

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
