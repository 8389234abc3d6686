//! Promise: what a node counts can be scraped, says what happened, and says nothing of any tenant; the dashboard asks for
//! nothing that is not there.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use esker_client::v1;
use esker_tests::{Node, Samples, question, scrape, scratch, tokens, value};
use serde_json::Value;

async fn busy_node(data: &Path) -> Result<Node> {
    let node = Node::start(data, &["--http", "127.0.0.1:0"]).await?;
    let prompt = tokens(3, 700);
    node.ask(question(&prompt)).await?;
    node.parked(&prompt).await?;
    node.ask(question(&prompt)).await?;
    let ids = tokens(4, 300).iter().map(|token| token.0).collect();
    let prompt = v1::warmup_prompt::Prompt::Tokens(v1::WarmupTokens { ids });
    let prompts = vec![v1::WarmupPrompt { prompt: Some(prompt) }];
    let request = v1::SubmitWarmupRequest { job: "secret-job".into(), prompts, ..Default::default() };
    node.client.submit_warmup(request).await?;
    let mut watched = node.client.watch_warmup("secret-job").await?;
    while watched.next().await?.is_some() {}
    Ok(node)
}

#[tokio::test]
async fn the_counters_say_what_happened() -> Result<()> {
    let folder = scratch();
    let node = busy_node(&folder.path().join("data")).await?;
    let (text, seen) = scrape(&node)?;
    let generate = [("path", "generate")];
    assert_eq!(value(&seen, "esker_query_tokens_total", &generate), 1400.0);
    assert_eq!(value(&seen, "esker_hit_tokens_total", &generate), 640.0);
    // Hits and misses are all that was asked for, in both ways to ask.
    for path in ["generate", "lookup"] {
        let misses = ["absent", "no_state", "tail"]
            .map(|reason| value(&seen, "esker_miss_tokens_total", &[("path", path), ("reason", reason)]));
        let hits = value(&seen, "esker_hit_tokens_total", &[("path", path)]);
        let queries = value(&seen, "esker_query_tokens_total", &[("path", path)]);
        assert_eq!(hits + misses.iter().sum::<f64>(), queries, "{path}: {misses:?}");
        assert!(queries > 0.0, "{path}");
    }
    for cache in ["warm", "cold"] {
        assert_eq!(value(&seen, "esker_first_token_seconds_count", &[("cache", cache)]), 1.0, "{cache}");
    }
    assert_eq!(value(&seen, "esker_warmup_tokens_total", &[("source", "computed")]), 256.0);
    assert!(value(&seen, "esker_warmup_bytes_total", &[]) > 0.0);
    assert!(value(&seen, "esker_stored_bytes", &[("tier", "ssd")]) > 0.0);
    assert!(value(&seen, "esker_wear_written_bytes", &[]) > 0.0);
    assert_eq!(value(&seen, "esker_owners", &[]), 1.0);
    assert!(value(&seen, "esker_largest_owner_bytes", &[]) > 0.0);
    assert_eq!(value(&seen, "esker_over_share_bytes", &[]), 0.0, "one tenant has no share to be over");
    let generated = [("method", "/esker.v1.Decoder/Generate"), ("code", "ok")];
    assert_eq!(value(&seen, "esker_rpcs_total", &generated), 2.0);
    assert_eq!(value(&seen, "esker_decoder_running", &[]), 0.0);
    assert_eq!(value(&seen, "esker_warmup_jobs", &[("state", "running")]), 0.0);
    // A histogram's last bucket is its count.
    for name in ["esker_store_put_seconds", "esker_store_read_seconds", "esker_store_lookup_seconds"] {
        let all = value(&seen, &format!("{name}_bucket"), &[("le", "+Inf")]);
        assert!(all > 0.0 && all == value(&seen, &format!("{name}_count"), &[]), "{name}: {all}");
    }
    // Nothing of a tenant: not its name, not its jobs, and no label that is not written in the program.
    for secret in ["default", "secret-job", "local"] {
        assert!(!text.contains(secret), "{secret:?} is in the metrics");
    }
    let labels: BTreeSet<&str> =
        seen.keys().flat_map(|(_, labels)| labels.keys()).map(String::as_str).collect();
    let known = [
        "cache", "code", "kind", "le", "method", "outcome", "path", "queue", "quota", "reason", "source",
        "state", "tier", "use", "version",
    ];
    assert!(labels.iter().all(|label| known.contains(label)), "{labels:?}");
    node.kill()
}

#[tokio::test]
async fn every_query_of_the_dashboard_finds_something() -> Result<()> {
    let folder = scratch();
    let node = busy_node(&folder.path().join("data")).await?;
    // A refusal by quota, which is there only once one was made.
    let (_, seen) = scrape(&node)?;
    node.kill()?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards/esker.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let queries: Vec<&str> = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().into_iter().flatten())
        .filter_map(|target| target["expr"].as_str())
        .collect();
    assert!(queries.len() > 40, "{}", queries.len());
    for query in &queries {
        check(query, &seen).with_context(|| format!("in {query}"))?;
    }
    // The check would notice.
    for bad in [
        "rate(esker_hits_total{job=~\"$job\"}[5m])",
        "esker_stored_bytes{tier=\"tape\"}",
        "sum by (tenant) (rate(esker_hit_tokens_total{job=~\"$job\"}[5m]))",
        "sum(rate(esker_hit_tokens_total{job=~\"$job\"}[5m])",
        "rate(esker_objects{job=~\"$job\"}[5m])",
    ] {
        assert!(check(bad, &seen).is_err(), "{bad} passed");
    }
    Ok(())
}

/// Whether every selector of a query matches a sample, whether what it sums by are labels of it, and whether rates are taken of
/// what only grows.
fn check(query: &str, seen: &Samples) -> Result<()> {
    for (open, close) in ["()", "{}", "[]"].map(|pair| pair.split_at(1)) {
        ensure!(query.matches(open).count() == query.matches(close).count(), "{open} without {close}");
    }
    let mut labels = BTreeSet::new();
    let mut selectors = 0;
    let mut rest = query;
    while let Some(at) = rest.find("esker_") {
        let before = &rest[..at];
        rest = &rest[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let name = &rest[..end];
        let matchers = match rest[end..].strip_prefix('{') {
            Some(braced) => braced.split_once('}').context("no end of matchers")?.0,
            None => "",
        };
        let wanted: Vec<(&str, &str)> = matchers
            .split(',')
            .filter(|matcher| !matcher.contains("=~"))
            .filter_map(|matcher| matcher.split_once('='))
            .map(|(name, value)| (name, value.trim_matches('"')))
            .collect();
        let matching: Vec<_> = seen
            .keys()
            .filter(|(sample, of)| {
                sample == name
                    && wanted.iter().all(|(label, value)| of.get(*label).is_some_and(|is| is == value))
            })
            .collect();
        // Refusals appear with the first one.
        let may_be_absent = name == "esker_quota_refusals_total";
        ensure!(may_be_absent || !matching.is_empty(), "nothing is called {name} with {wanted:?}");
        let grows = ["_total", "_bucket", "_count", "_sum"].iter().any(|suffix| name.ends_with(suffix));
        let is_rate = before.ends_with("rate(") || before.ends_with("increase(");
        ensure!(grows == is_rate, "{name} grows: {grows}, its rate is taken: {is_rate}");
        labels.extend(matching.iter().flat_map(|(_, of)| of.keys().cloned()));
        if may_be_absent {
            labels.insert("quota".to_owned());
        }
        selectors += 1;
        rest = &rest[end..];
    }
    ensure!(selectors > 0, "it asks for nothing");
    for list in ["by (", "on (", "ignoring ("] {
        for part in query.split(list).skip(1) {
            for label in part.split(')').next().unwrap_or_default().split(',').map(str::trim) {
                ensure!(labels.contains(label), "there is no label {label:?}");
            }
        }
    }
    Ok(())
}
