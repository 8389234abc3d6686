//! `/metrics` of a node, read as strictly as it is written.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

use crate::{Node, web};

/// Samples: name and labels, and value.
pub type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// Asks a node that listens for HTTP: the text, and what is in it.
pub fn scrape(node: &Node) -> Result<(String, Samples)> {
    let address = node.http.as_deref().context("it was asked to listen for HTTP")?;
    let reply = web(address, "GET", "/metrics", &[], "")?;
    ensure!(reply.status == 200, "{reply:?}");
    ensure!(reply.head.contains("content-type: application/openmetrics-text"), "{}", reply.head);
    let samples = samples(&reply.body)?;
    Ok((reply.body, samples))
}

/// Reads OpenMetrics text as strictly as this program writes it.
fn samples(text: &str) -> Result<Samples> {
    ensure!(text.ends_with("# EOF\n"), "the text is cut");
    let mut samples = Samples::new();
    let mut announced = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let name = rest.split(' ').next().context("no name")?.to_owned();
            ensure!(announced.insert(name.clone()), "{name} is announced twice");
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').with_context(|| format!("no value: {line}"))?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').context("no end of labels")?),
            None => (series, ""),
        };
        let of_family = announced.iter().any(|family| name.starts_with(family.as_str()));
        ensure!(of_family, "{name} was not announced");
        let known = samples.insert((name.to_owned(), labels_of(labels)?), value.parse()?);
        ensure!(known.is_none(), "{series} is there twice");
    }
    Ok(samples)
}

fn labels_of(text: &str) -> Result<BTreeMap<String, String>> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').with_context(|| format!("no value: {pair}"))?;
        Ok((name.to_owned(), value.trim_matches('"').to_owned()))
    });
    pairs.collect()
}

/// The value of one series; not a number if there is none.
pub fn value(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> f64 {
    let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    samples.get(&(name.to_owned(), labels)).copied().unwrap_or(f64::NAN)
}
