//! Promise: a lookup names the prefix lengths that can be resumed exactly, and a fetch brings what was asked for, in
//! restore order. The numbers are those of the conformance cases of models with state, on block boundaries.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use esker_client::v1;
use esker_prefix::{KvLayout, ObjectKind, TokenId};
use esker_tests::{Node, Prompt, flat_layout, scratch, staged_layout};
use tonic::Code;

const B: u64 = 128;

/// A node and a prompt of a model with state.
async fn staged(data: &std::path::Path, blocks: u32) -> Result<(Node, Prompt)> {
    let node = Node::store_only(data).await?;
    let layout = staged_layout();
    let namespace = node.register(&layout, 4).await?;
    Ok((node, Prompt::new(namespace, &layout, 1, blocks)))
}

fn points(found: &v1::LookupReply) -> Vec<u64> {
    found.resume_points.iter().map(|point| point.tokens).collect()
}

fn best(found: &v1::LookupReply) -> (u64, u64) {
    found.best.map(|best| (best.tokens, best.replay_tokens)).unwrap_or_default()
}

#[tokio::test]
async fn history_newer_than_state() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = staged(&folder.path().join("data"), 32).await?;
    node.store(&prompt, prompt.blocks(1..=32)).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!((found.history_tokens, points(&found), best(&found)), (4096, vec![], (0, 4096)), "no state");
    assert!(!found.grant.is_empty(), "its blocks are there for a replay");

    node.store(&prompt, vec![prompt.state(8)]).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!((found.history_tokens, points(&found), best(&found)), (4096, vec![1024], (1024, 3072)));
    node.kill()
}

#[tokio::test]
async fn state_newer_than_history() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = staged(&folder.path().join("data"), 16).await?;
    node.store(&prompt, [prompt.blocks(1..=12), vec![prompt.state(8)]].concat()).await?;
    let early = node.client.put(prompt.namespace, &prompt.tokens, vec![prompt.state(16)]).await?;
    assert_eq!(early[0].outcome(), v1::Outcome::Waiting, "nobody could resume there");
    assert!(early[0].reason.contains("not stored"), "{}", early[0].reason);
    let found = node.lookup(&prompt).await?;
    assert_eq!((found.history_tokens, points(&found), best(&found)), (1536, vec![1024], (1024, 512)));

    node.store(&prompt, [prompt.blocks(13..=16), vec![prompt.state(16)]].concat()).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!((found.history_tokens, points(&found), best(&found)), (2048, vec![2048, 1024], (2048, 0)));
    node.kill()
}

#[tokio::test]
async fn a_fork_never_gets_the_state_of_the_other_branch() -> Result<()> {
    let folder = scratch();
    let (node, ours) = staged(&folder.path().join("data"), 12).await?;
    node.store(&ours, [ours.blocks(1..=12), vec![ours.state(8), ours.state(12)]].concat()).await?;
    let mut theirs = ours.clone();
    theirs.tokens[1300] = TokenId(1);
    let found = node.lookup(&theirs).await?;
    assert_eq!((found.history_tokens, points(&found), best(&found)), (1280, vec![1024], (1024, 256)));
    node.kill()
}

#[tokio::test]
async fn the_whole_prompt_is_never_offered() -> Result<()> {
    let folder = scratch();
    let (node, longer) = staged(&folder.path().join("data"), 16).await?;
    node.store(&longer, [longer.blocks(1..=16), vec![longer.state(15), longer.state(16)]].concat()).await?;
    let mut exact = longer.clone();
    exact.tokens.truncate(2048);
    assert_eq!(points(&node.lookup(&exact).await?), [1920], "the last token must be computed");
    assert_eq!(points(&node.lookup(&longer).await?), [2048, 1920]);

    let layout = flat_layout();
    let namespace = node.register(&layout, 4).await?;
    let mut flat = Prompt::new(namespace, &layout, 2, 4);
    node.store(&flat, flat.blocks(1..=4)).await?;
    for (length, resume) in [(257, vec![256]), (256, vec![192]), (65, vec![64]), (64, vec![]), (1, vec![])] {
        flat.tokens.truncate(length);
        assert_eq!(points(&node.lookup(&flat).await?), resume, "a prompt of {length}");
    }
    node.kill()
}

#[tokio::test]
async fn at_most_eight_points_and_always_the_greatest() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = staged(&folder.path().join("data"), 12).await?;
    let states = (1..=12).map(|blocks| prompt.state(blocks)).collect();
    node.store(&prompt, [prompt.blocks(1..=12), states].concat()).await?;
    let expected: Vec<u64> = (5..=12).rev().map(|blocks| blocks * B).collect();
    assert_eq!(points(&node.lookup(&prompt).await?), expected);
    node.kill()
}

#[tokio::test]
async fn a_fetch_brings_what_was_asked_for() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = staged(&folder.path().join("data"), 6).await?;
    let states = vec![prompt.state(4), prompt.state(6)];
    node.store(&prompt, [prompt.blocks(1..=6), states].concat()).await?;
    let found = node.lookup(&prompt).await?;
    let request = v1::FetchRequest { grant: found.grant.clone(), ..Default::default() };

    // Everything, by object: the state of the best point first, then its blocks.
    let fetched = node.fetch(request.clone()).await?;
    assert_eq!(fetched.wrong_planes(&prompt), 0);
    assert_eq!(fetched.names(), by_object(&prompt.layout, 6));
    let raw: u64 = found.resume_points[0].bytes_by_group.iter().map(|group| group.bytes).sum();
    assert_eq!((fetched.done.bytes, fetched.done.usable_tokens), (raw, 6 * B));
    assert_eq!(fetched.done.planes, fetched.planes.len() as u64);

    // An older point that the grant lists.
    let fetched = node.fetch(v1::FetchRequest { tokens: 4 * B, ..request.clone() }).await?;
    assert_eq!((fetched.names(), fetched.wrong_planes(&prompt)), (by_object(&prompt.layout, 4), 0));

    // Restore order across blocks.
    let by_plane = v1::FetchRequest { order: v1::Order::ByPlane.into(), ..request.clone() };
    let fetched = node.fetch(by_plane).await?;
    assert_eq!(fetched.wrong_planes(&prompt), 0);
    let order: Vec<usize> = fetched.names().iter().map(|name| name.2).collect();
    assert!(order.is_sorted(), "planes of a later layer came before those of an earlier one: {order:?}");
    assert_eq!(
        fetched.names().into_iter().collect::<BTreeSet<_>>(),
        by_object(&prompt.layout, 6).into_iter().collect()
    );

    // One group.
    let keys = v1::FetchRequest { groups: vec!["csa_indexer_key".into()], ..request.clone() };
    let fetched = node.fetch(keys).await?;
    assert_eq!(fetched.wrong_planes(&prompt), 0);
    let expected = by_object(&prompt.layout, 6);
    let keys_only = |group: &str, _: u16| group == "csa_indexer_key";
    assert_eq!(fetched.names(), chosen(&prompt.layout, &expected, keys_only));
    let listed = found.resume_points[0].bytes_by_group.iter().find(|group| group.group == "csa_indexer_key");
    assert_eq!(Some(fetched.done.bytes), listed.map(|group| group.bytes));

    // Layers 1 to 2: of every group the planes of the model's layers 1 and 2.
    let layers = v1::FetchRequest { first_layer: 1, end_layer: 3, ..request };
    let fetched = node.fetch(layers).await?;
    assert_eq!(fetched.wrong_planes(&prompt), 0);
    let two_layers = |_: &str, layer: u16| (1..3).contains(&layer);
    assert_eq!(fetched.names(), chosen(&prompt.layout, &expected, two_layers));
    node.kill()
}

/// Names of all planes up to a boundary: the state's, then block after block.
fn by_object(layout: &Arc<KvLayout>, blocks: u64) -> Vec<(ObjectKind, u64, usize)> {
    let planes =
        |kind, tokens| (0..layout.planes_at(kind, tokens).len()).map(move |plane| (kind, tokens, plane));
    let state = planes(ObjectKind::State, blocks * B);
    state.chain((1..=blocks).flat_map(|number| planes(ObjectKind::Block, number * B))).collect()
}

/// Those of `names` whose group and model layer are wanted.
fn chosen(
    layout: &KvLayout,
    names: &[(ObjectKind, u64, usize)],
    wanted: impl Fn(&str, u16) -> bool,
) -> Vec<(ObjectKind, u64, usize)> {
    let keep = |&&(kind, _, plane): &&(ObjectKind, u64, usize)| {
        let spec = layout.planes(kind)[plane];
        let group = &layout.groups()[usize::from(spec.group)];
        wanted(&group.name, group.layers[usize::from(spec.first_layer)])
    };
    names.iter().filter(keep).copied().collect()
}

#[tokio::test]
async fn what_no_grant_lists_is_refused() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let (node, prompt) = staged(&data, 6).await?;
    node.store(&prompt, [prompt.blocks(1..=6), vec![prompt.state(4)]].concat()).await?;
    let grant = node.lookup(&prompt).await?.grant;
    let refused = async |request| node.fetch(request).await.map(|_| ()).unwrap_err();
    let request = v1::FetchRequest { grant: grant.clone(), ..Default::default() };

    for tokens in [1, B, 6 * B, 7 * B, u64::MAX] {
        let status = refused(v1::FetchRequest { tokens, ..request.clone() }).await;
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("not a resume point of this grant; it lists [512]"), "{status}");
    }
    let status = refused(v1::FetchRequest { groups: vec!["latent".into()], ..request.clone() }).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("no group \"latent\""), "{status}");
    let status = refused(v1::FetchRequest { first_layer: 3, end_layer: 3, ..request.clone() }).await;
    assert_eq!(status.code(), Code::InvalidArgument);

    let mut forged = grant.to_vec();
    forged[0] ^= 1;
    for grant in [Bytes::from(forged), Bytes::new(), Bytes::from_static(b"short")] {
        let status = refused(v1::FetchRequest { grant, ..Default::default() }).await;
        assert_eq!(status.code(), Code::NotFound, "{status}");
        assert!(status.message().contains("look the prefix up again"), "{status}");
    }
    node.kill()?;
    let node = Node::store_only(&data).await?;
    let status = node.fetch(request).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "a grant of the process before: {status}");
    node.kill()
}

#[tokio::test]
async fn an_expired_grant_is_not_found() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = staged(&folder.path().join("data"), 2).await?;
    node.store(&prompt, [prompt.blocks(1..=2), vec![prompt.state(2)]].concat()).await?;
    let found = node.lookup(&prompt).await?;
    let request = v1::FetchRequest { grant: found.grant, ..Default::default() };
    node.fetch(request.clone()).await?;
    tokio::time::sleep(Duration::from_millis(found.grant_expires_in_ms + 100)).await;
    assert_eq!(node.fetch(request).await.map(|_| ()).unwrap_err().code(), Code::NotFound);
    node.kill()
}
