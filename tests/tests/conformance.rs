//! Promise: which prefix lengths can be resumed, case by case, as `docs/lookup.md` numbers them. What the cases of the restart,
//! of eviction and of damage need beyond a lookup is tested here too.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::{Object, v1};
use esker_prefix::{Dtype, Family, Field, Group, KvLayout, ObjectKind, TokenId};
use esker_proto::chunks;
use esker_tests::{Node, Prompt, change, records, scratch, staged_layout};
use tonic::Code;
use v1::put_request::Step;

const B: u64 = 128;

/// A group of small rows.
fn group(name: &str, family: Family) -> Group {
    Group {
        name: name.into(),
        family,
        layers: vec![0, 1],
        rows: if family == Family::History { 8 } else { 4 },
        fields: vec![Field { name: "values".into(), dtype: Dtype::U8, count: 48 }],
        restore_order: 0,
        plane_layers: 1,
        optional: false,
        grain_blocks: 1,
        run_tokens: 0,
    }
}

fn layout(name: &str, groups: Vec<Group>) -> Result<Arc<KvLayout>> {
    Ok(Arc::new(KvLayout::new(name, 128, groups)?))
}

/// Latents and indexer keys.
fn flat() -> Result<Arc<KvLayout>> {
    layout("flat", vec![group("indexer", Family::History), group("latent", Family::History)])
}

/// The same with windows.
fn windowed() -> Result<Arc<KvLayout>> {
    let groups = [("indexer", Family::History), ("latent", Family::History), ("window", Family::State)];
    layout("windowed", groups.map(|(name, family)| group(name, family)).to_vec())
}

/// A node, and a prompt of so many whole blocks and one token.
async fn ready(data: &Path, layout: &Arc<KvLayout>, blocks: u32) -> Result<(Node, Prompt)> {
    let node = Node::store_only(data).await?;
    let namespace = node.register(layout, 4).await?;
    Ok((node, Prompt::new(namespace, layout, 1, blocks)))
}

/// Puts the planes of one group alone, of the objects at these boundaries (in blocks).
async fn put_group(
    node: &Node,
    prompt: &Prompt,
    name: &str,
    blocks: impl IntoIterator<Item = u64>,
) -> Result<Vec<v1::PutReply>> {
    let index = prompt.layout.groups().iter().position(|group| group.name == name).context("a group")?;
    let kind = match prompt.layout.groups()[index].family {
        Family::History => ObjectKind::Block,
        Family::State => ObjectKind::State,
    };
    let planes = prompt.layout.planes(kind).iter().enumerate();
    let planes: Vec<usize> =
        planes.filter(|(_, spec)| usize::from(spec.group) == index).map(|(plane, _)| plane).collect();
    let mut steps = vec![Step::Prefix(v1::PutPrefix {
        namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
        tokens: prompt.tokens.iter().map(|token| token.0).collect(),
        in_parts: true,
        ..Default::default()
    })];
    for tokens in blocks.into_iter().map(|blocks| prompt.boundary(blocks)) {
        for &plane in &planes {
            let bytes = prompt.plane(kind, tokens, plane);
            steps.extend(chunks(kind, tokens, u32::try_from(plane)?, bytes).map(Step::Chunk));
        }
    }
    let mut replies = node.put_steps(steps).await?;
    let mut all = Vec::new();
    while let Some(reply) = replies.message().await? {
        all.push(reply);
    }
    Ok(all)
}

/// The answer in short: history, resume points, replay of the best.
fn short(found: &v1::LookupReply) -> (u64, Vec<u64>, u64) {
    let points = found.resume_points.iter().map(|point| point.tokens).collect();
    (found.history_tokens, points, found.best.map_or(0, |best| best.replay_tokens))
}

/// Boundaries in the bitmap, in blocks.
fn bitmap(found: &v1::LookupReply) -> BTreeSet<u64> {
    let bits = found.resumable.iter().zip(0_u64..);
    bits.flat_map(|(byte, at)| {
        (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| 8 * at + bit + 1)
    })
    .collect()
}

#[tokio::test]
async fn l1_plain_history() -> Result<()> {
    let folder = scratch();
    let (node, mut prompt) = ready(&folder.path().join("data"), &flat()?, 10).await?;
    node.store(&prompt, prompt.blocks(1..=10)).await?;
    prompt.tokens.extend(esker_tests::tokens(99, 19));
    assert_eq!(prompt.tokens.len(), 1300);
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (1280, vec![1280], 0));
    assert_eq!(bitmap(&found), (1..=10).collect());
    node.kill()
}

#[tokio::test]
async fn l2_a_window_with_a_hole_is_no_window() -> Result<()> {
    let folder = scratch();
    let two_windows = layout(
        "two windows",
        vec![group("latent", Family::History), group("near", Family::State), group("far", Family::State)],
    )?;
    let (node, prompt) = ready(&folder.path().join("data"), &two_windows, 16).await?;
    node.store(&prompt, [prompt.blocks(1..=16), vec![prompt.state(8)]].concat()).await?;
    // At 2,048 tokens the rows of one window never come.
    let replies = put_group(&node, &prompt, "near", [16]).await?;
    ensure!(replies.iter().all(|reply| reply.outcome() == v1::Outcome::Waiting), "{replies:?}");
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (2048, vec![1024], 1024));
    ensure!(
        found.misses.iter().any(|miss| miss.reason == "no_state" && miss.group == "far"),
        "{:?}",
        found.misses
    );
    // Now they do.
    put_group(&node, &prompt, "far", [16]).await?;
    assert_eq!(short(&node.lookup(&prompt).await?), (2048, vec![2048, 1024], 0));
    node.fetch_best(&prompt).await?;
    node.kill()
}

#[tokio::test]
async fn l3_only_the_indexer_is_missing() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = ready(&folder.path().join("data"), &flat()?, 16).await?;
    put_group(&node, &prompt, "latent", 1..=16).await?;
    assert_eq!(short(&node.lookup(&prompt).await?).0, 0, "half a block is no block");
    let replies = put_group(&node, &prompt, "indexer", 1..=5).await?;
    ensure!(
        replies.iter().filter(|reply| reply.outcome() == v1::Outcome::Stored).count() == 5,
        "{replies:?}"
    );
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (640, vec![640], 0));
    let misses: Vec<_> = found.misses.iter().map(|miss| (&*miss.group, miss.first_missing_token)).collect();
    assert_eq!(misses, [("indexer", 640)], "the latents are there, and are not offered");
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 5);
    put_group(&node, &prompt, "indexer", (6..=16).rev()).await?;
    assert_eq!(short(&node.lookup(&prompt).await?), (2048, vec![2048], 0), "whatever the order");
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 16);
    node.kill()
}

#[tokio::test]
async fn l4_a_state_newer_than_the_history_waits_for_it() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = ready(&folder.path().join("data"), &windowed()?, 16).await?;
    node.store(&prompt, [prompt.blocks(1..=12), vec![prompt.state(8)]].concat()).await?;
    let early = node.client.put(prompt.namespace, &prompt.tokens, vec![prompt.state(16)]).await?;
    assert_eq!(early[0].outcome(), v1::Outcome::Waiting, "{early:?}");
    assert_eq!(short(&node.lookup(&prompt).await?), (1536, vec![1024], 512));
    node.store(&prompt, prompt.blocks(13..=16)).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (2048, vec![2048, 1024], 0), "usable once the history is there");
    let fetched = node.fetch_best(&prompt).await?;
    assert_eq!(fetched.wrong_planes(&prompt), 0);
    node.kill()
}

#[tokio::test]
async fn l5_history_newer_than_the_state() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = ready(&folder.path().join("data"), &windowed()?, 32).await?;
    node.store(&prompt, [prompt.blocks(1..=32), vec![prompt.state(8)]].concat()).await?;
    assert_eq!(short(&node.lookup(&prompt).await?), (4096, vec![1024], 3072));
    node.kill()
}

#[tokio::test]
async fn l6_a_fork_between_two_states() -> Result<()> {
    let folder = scratch();
    let (node, a) = ready(&folder.path().join("data"), &windowed()?, 12).await?;
    node.store(&a, [a.blocks(1..=12), vec![a.state(8), a.state(12)]].concat()).await?;
    let mut b = a.clone();
    b.tokens[1300] = TokenId(1);
    assert_eq!(short(&node.lookup(&b).await?), (1280, vec![1024], 256));
    node.kill()
}

#[tokio::test]
async fn l7_a_prompt_shorter_than_a_block() -> Result<()> {
    let folder = scratch();
    // Windows and all; without state groups the rows are what a state off the grid is for.
    for (data, layout) in [("windowed", windowed()?), ("flat", flat()?)] {
        let (node, turn) = ready(&folder.path().join(data), &layout, 1).await?;
        let shorter = |tokens: usize| {
            let mut shorter = turn.clone();
            shorter.tokens.truncate(tokens);
            shorter
        };
        assert_eq!(short(&node.lookup(&shorter(100)).await?), (0, vec![], 0), "no error, no rounding");
        node.store(&shorter(90), vec![turn.object(ObjectKind::State, 90)]).await?;
        let found = node.lookup(&shorter(100)).await?;
        assert_eq!(short(&found), (0, vec![90], 0));
        // Its last token has to be computed, and all of them have to be the same.
        assert_eq!(short(&node.lookup(&shorter(90)).await?), (0, vec![], 0));
        assert_eq!(short(&node.lookup(&shorter(91)).await?), (0, vec![90], 0));
        let mut other = shorter(100);
        other.tokens[89] = TokenId(1);
        assert_eq!(short(&node.lookup(&other).await?), (0, vec![], 0));
        // What it brings is all that a prefix of 90 tokens has, and what may be settled.
        let fetched =
            node.fetch(v1::FetchRequest { grant: found.grant.clone(), ..Default::default() }).await?;
        assert_eq!((fetched.wrong_planes(&turn), fetched.done.usable_tokens), (0, 90));
        let raw: u64 = found.resume_points[0].bytes_by_group.iter().map(|group| group.bytes).sum();
        assert_eq!((fetched.done.bytes, raw), (raw, layout.object_bytes_at(ObjectKind::State, 90)));
        let account = v1::SettleRequest {
            grant: found.grant,
            request_id: format!("l7 {data}"),
            prompt_tokens: 100,
            used_hit_tokens: 90,
            computed_tokens: 10,
            ..Default::default()
        };
        let usage = node.cache.clone().settle(account).await?.into_inner().usage.context("usage")?;
        assert_eq!(usage.prompt_cache_hit_tokens, 90);
        node.kill()?;
    }
    Ok(())
}

#[tokio::test]
async fn l8_a_turn_that_ends_off_the_block_boundary() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let layout = windowed()?;
    let (node, prompt) = ready(&data, &layout, 15).await?;
    let ends = [prompt.state(8), prompt.state(14), prompt.object(ObjectKind::State, 1900)];
    node.store(&prompt, [prompt.blocks(1..=15), ends.to_vec()].concat()).await?;
    // The next turn goes on from where the output ended; or it has another token at 1,899.
    let mut next = prompt.clone();
    next.tokens.truncate(1901);
    assert_eq!(short(&node.lookup(&next).await?), (1792, vec![1900, 1792, 1024], 0));
    assert_eq!(short(&node.lookup(&prompt).await?), (1920, vec![1900, 1792, 1024], 20));
    let mut other = prompt.clone();
    other.tokens[1899] = TokenId(1);
    assert_eq!(short(&node.lookup(&other).await?), (1792, vec![1792, 1024], 0));

    // The bitmap is of whole blocks. Blocks and the state together are the whole prefix.
    let found = node.lookup(&next).await?;
    assert_eq!(bitmap(&found), BTreeSet::from([8, 14]));
    let fetched = node.fetch_best(&next).await?;
    assert_eq!((fetched.wrong_planes(&prompt), fetched.done.usable_tokens), (0, 1900));
    let blocks = (1..=14).map(|number| (ObjectKind::Block, prompt.boundary(number)));
    assert_eq!(fetched.whole_objects(&prompt), blocks.chain([(ObjectKind::State, 1900)]).collect());

    // By hashes it takes the tokens behind the last of them.
    let named = v1::LookupRequest {
        namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
        tokens: prompt.tokens.iter().map(|token| token.0).collect(),
        want_hashes: true,
        ..Default::default()
    };
    let hashes = node.cache.clone().lookup(named.clone()).await?.into_inner().hashes;
    let by_hashes = async |tail: &[TokenId]| -> Result<Vec<u64>> {
        let request = v1::LookupRequest {
            tokens: Vec::new(),
            hashes: hashes[..14].to_vec(),
            tail_tokens: tail.iter().map(|token| token.0).collect(),
            ..named.clone()
        };
        Ok(short(&node.cache.clone().lookup(request).await?.into_inner()).1)
    };
    assert_eq!(by_hashes(&[]).await?, [1792, 1024]);
    assert_eq!(by_hashes(&prompt.tokens[1792..1901]).await?, [1900, 1792, 1024]);
    assert_eq!(by_hashes(&prompt.tokens[1792..1900]).await?, [1792, 1024], "the last token is computed");
    assert_eq!(by_hashes(&other.tokens[1792..]).await?, [1792, 1024]);

    // It lasts, and where its history has a hole it is not offered.
    node.kill()?;
    let hole = records(&data)?
        .into_iter()
        .find(|record| record.kind == ObjectKind::Block && record.tokens == prompt.boundary(14))
        .context("block 14 was stored")?;
    change(&hole.file, hole.planes[0].start, |byte| byte ^ 1)?;
    let node = Node::store_only(&data).await?;
    node.register(&layout, 4).await?;
    assert_eq!(short(&node.lookup(&next).await?).1, [1900, 1792, 1024], "nobody has looked yet");
    let grant = node.lookup(&next).await?.grant;
    let fetched = node.fetch(v1::FetchRequest { grant, ..Default::default() }).await?;
    assert_eq!(fetched.done.usable_tokens, 13 * B);
    assert_eq!(short(&node.lookup(&next).await?), (13 * B, vec![1024], 640));
    node.kill()
}

#[tokio::test]
async fn what_cannot_end_off_the_grid_is_refused_by_name() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = ready(&folder.path().join("data"), &windowed()?, 2).await?;
    let refused = async |object: Object| node.store(&prompt, vec![object]).await.unwrap_err().to_string();
    let block = Object { kind: ObjectKind::Block, ..prompt.object(ObjectKind::Block, 128) };
    let error = refused(Object { tokens: 90, ..block }).await;
    assert!(error.contains("a block at 90 tokens"), "{error}");
    let beyond = prompt.object(ObjectKind::State, 258);
    let error = refused(beyond).await;
    assert!(error.contains("a state at 258 tokens") && error.contains("257 tokens"), "{error}");
    // Of the tail rows one is missing.
    let mut lacking = prompt.object(ObjectKind::State, 90);
    lacking.planes.pop();
    let error = refused(lacking).await;
    assert!(error.contains("90 tokens"), "{error}");
    node.kill()
}

#[tokio::test]
async fn l9_the_whole_prompt_is_stored() -> Result<()> {
    let folder = scratch();
    let (node, longer) = ready(&folder.path().join("data"), &windowed()?, 16).await?;
    node.store(&longer, [longer.blocks(1..=16), vec![longer.state(15), longer.state(16)]].concat()).await?;
    let mut exact = longer.clone();
    exact.tokens.truncate(2048);
    assert_eq!(short(&node.lookup(&exact).await?).1, [1920]);
    node.kill()
}

#[tokio::test]
async fn l10_snapshots() -> Result<()> {
    let folder = scratch();
    let recurrent =
        layout("recurrent", vec![group("attention", Family::History), group("snapshot", Family::State)])?;
    let (node, prompt) = ready(&folder.path().join("data"), &recurrent, 128).await?;
    node.store(&prompt, [prompt.blocks(1..=128), vec![prompt.state(32), prompt.state(96)]].concat()).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (16_384, vec![12_288, 4096], 4096));
    let bytes = |group: &str| {
        let groups = &found.resume_points[0].bytes_by_group;
        groups.iter().find(|bytes| bytes.group == group).map(|bytes| bytes.bytes)
    };
    assert_eq!(bytes("snapshot"), Some(recurrent.object_bytes(ObjectKind::State)), "once");
    assert_eq!(bytes("attention"), Some(96 * recurrent.object_bytes(ObjectKind::Block)));
    node.kill()
}

/// Latents, windows, and a draft that nobody needs.
fn drafted() -> Result<Arc<KvLayout>> {
    let draft = Group { optional: true, restore_order: 9, ..group("draft", Family::State) };
    layout("drafted", vec![group("latent", Family::History), group("window", Family::State), draft])
}

#[tokio::test]
async fn l11_an_optional_group_is_missing() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = ready(&folder.path().join("data"), &drafted()?, 16).await?;
    // The planes of the draft come last in the restore order; the state at 1,536 lacks them.
    let mut without = prompt.state(12);
    let window = prompt.layout.planes(ObjectKind::State).iter().filter(|spec| spec.group == 1).count();
    for plane in &mut without.planes[window..] {
        *plane = Bytes::new();
    }
    node.store(&prompt, [prompt.blocks(1..=16), vec![prompt.state(8), without]].concat()).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (2048, vec![1536, 1024], 512));
    let missing: Vec<_> = found.resume_points.iter().map(|point| point.missing_optional.clone()).collect();
    assert_eq!(missing, [vec!["draft".to_owned()], vec![]]);
    // What is there is fetched; what is not is an empty plane.
    let fetched = node.fetch_best(&prompt).await?;
    let empty = fetched.planes.iter().filter(|(_, bytes)| bytes.is_empty()).count();
    assert_eq!(empty, prompt.layout.planes(ObjectKind::State).len() - window);
    assert_eq!(fetched.wrong_planes(&prompt), empty);
    node.kill()
}

#[tokio::test]
async fn l12_a_damaged_state_leaves_the_next_point() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let layout = staged_layout();
    let (node, prompt) = ready(&data, &layout, 12).await?;
    node.store(&prompt, [prompt.blocks(1..=12), vec![prompt.state(8), prompt.state(12)]].concat()).await?;
    node.kill()?;
    let damaged = records(&data)?
        .into_iter()
        .find(|record| record.kind == ObjectKind::State && record.tokens == 12 * B)
        .context("the state was stored")?;
    change(&damaged.file, damaged.planes[0].start, |byte| byte ^ 1)?;
    let node = Node::store_only(&data).await?;
    node.register(&layout, 4).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found).1, [1536, 1024], "nobody has looked yet");
    let request = v1::FetchRequest { grant: found.grant, ..Default::default() };
    let first = node.fetch(request.clone()).await?;
    let states: Vec<_> = first.missing.iter().filter(|m| m.kind() == v1::ObjectKind::State).collect();
    ensure!(states.len() == 1 && states[0].tokens == 1536, "{:?}", first.missing);
    assert_eq!(first.wrong_planes(&prompt), 0);
    // The next listed point, under the same grant.
    let second = node.fetch(v1::FetchRequest { tokens: 1024, ..request }).await?;
    ensure!(second.missing.is_empty() && second.wrong_planes(&prompt) == 0, "{:?}", second.missing);
    assert_eq!(second.done.usable_tokens, 1024);
    assert_eq!(short(&node.lookup(&prompt).await?).1, [1024], "quarantined");
    node.kill()
}

#[tokio::test]
async fn l13_what_a_grant_lists_is_not_evicted() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let options = ["--no-model", "--segment-mib", "4", "--capacity", "32MiB"];
    let node = Node::start(&data, &options).await?;
    let layout = staged_layout();
    let namespace = node.register(&layout, 4).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 8);
    node.store(&prompt, [prompt.blocks(1..=8), vec![prompt.state(8)]].concat()).await?;
    let found = node.lookup(&prompt).await?;
    // Much more than the store holds.
    let object = layout.object_bytes(ObjectKind::Block);
    for seed in 0..2 * (32 << 20) / (16 * object) {
        let other = Prompt::new(namespace, &layout, 100 + seed, 16);
        node.client.put(namespace, &other.tokens, other.blocks(1..=16)).await?;
    }
    let request = v1::FetchRequest { grant: found.grant, ..Default::default() };
    let fetched = node.fetch(request.clone()).await?;
    ensure!(fetched.missing.is_empty() && fetched.wrong_planes(&prompt) == 0, "{:?}", fetched.missing);
    assert_eq!(fetched.done.usable_tokens, 1024);
    tokio::time::sleep(Duration::from_millis(found.grant_expires_in_ms)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let late = node.fetch(request).await.map(|_| ()).unwrap_err();
    assert_eq!(late.code(), Code::NotFound, "after its time: {late}");
    node.kill()
}

// L14, a crash inside a commit, is `crash_recovery.rs`, and the store's own simulation, which stops after every operation.

#[tokio::test]
async fn l15_ranks_intersect() -> Result<()> {
    let folder = scratch();
    let (node, rank0) = ready(&folder.path().join("data"), &windowed()?, 12).await?;
    // Another rank's rows are another namespace's.
    let namespace = node.register(&*windowed()?, 5).await?;
    let rank1 = Prompt { namespace, ..rank0.clone() };
    let states =
        |prompt: &Prompt, at: &[u64]| at.iter().map(|&blocks| prompt.state(blocks)).collect::<Vec<_>>();
    node.store(&rank0, [rank0.blocks(1..=12), states(&rank0, &[4, 8, 12])].concat()).await?;
    node.store(&rank1, [rank1.blocks(1..=12), states(&rank1, &[4, 12])].concat()).await?;
    let all = [node.lookup(&rank0).await?, node.lookup(&rank1).await?].map(|found| bitmap(&found));
    let common: Vec<u64> = all[0].intersection(&all[1]).map(|blocks| blocks * B).collect();
    assert_eq!(common, [512, 1536], "each rank tells all, not its greatest");
    node.kill()
}

#[tokio::test]
async fn l16_other_weights_find_nothing() -> Result<()> {
    let folder = scratch();
    let (node, old) = ready(&folder.path().join("data"), &windowed()?, 8).await?;
    node.store(&old, [old.blocks(1..=8), vec![old.state(8)]].concat()).await?;
    let namespace = node.register(&*windowed()?, 5).await?;
    let new = Prompt { namespace, ..old.clone() };
    let found = node.lookup(&new).await?;
    assert_eq!(short(&found), (0, vec![], 0));
    ensure!(found.misses.iter().all(|miss| miss.reason == "absent"), "{:?}", found.misses);
    // The same answer as for tokens that were never seen.
    let mut fresh = Prompt::new(namespace, &new.layout, 9, 8);
    fresh.tokens.truncate(new.tokens.len());
    assert_eq!(node.lookup(&fresh).await?, found);
    node.kill()
}

#[tokio::test]
async fn l17_a_coarse_group_rounds_by_itself() -> Result<()> {
    let folder = scratch();
    let coarse = Group { grain_blocks: 4, ..group("coarse", Family::History) };
    let layout = layout("coarse", vec![group("latent", Family::History), coarse])?;
    let (node, prompt) = ready(&folder.path().join("data"), &layout, 16).await?;
    // Rows of the coarse group come with every fourth block.
    let blocks = (1..=15).map(|number| {
        let mut object = prompt.blocks([number]).remove(0);
        if number % 4 != 0 {
            for (plane, spec) in object.planes.iter_mut().zip(prompt.layout.planes(ObjectKind::Block)) {
                if spec.group == 1 {
                    *plane = Bytes::new();
                }
            }
        }
        object
    });
    node.store(&prompt, blocks.collect()).await?;
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (1536, vec![1536], 0));
    let closed: Vec<_> = found.misses.iter().map(|miss| (&*miss.group, miss.first_missing_token)).collect();
    assert_eq!(closed, [("latent", 1920), ("coarse", 1536)], "each rounds by itself");
    assert_eq!(bitmap(&found), [4, 8, 12].into());
    let fetched = node.fetch_best(&prompt).await?;
    assert_eq!((fetched.done.usable_tokens, fetched.missing.len()), (1536, 0));
    // A block that has rows where none belong, or lacks them where they do, is refused.
    let mut sixteenth = prompt.blocks([16]);
    sixteenth[0].planes.iter_mut().for_each(|plane| *plane = Bytes::new());
    let refused = node.client.put(prompt.namespace, &prompt.tokens, sixteenth).await;
    ensure!(refused.is_err(), "{refused:?}");
    node.kill()
}

#[tokio::test]
async fn l18_an_optional_group_alone_is_nothing() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = ready(&folder.path().join("data"), &drafted()?, 8).await?;
    let replies = put_group(&node, &prompt, "draft", [8]).await?;
    ensure!(replies.iter().all(|reply| reply.outcome() == v1::Outcome::Waiting), "{replies:?}");
    let found = node.lookup(&prompt).await?;
    assert_eq!(short(&found), (0, vec![], 0));
    ensure!(found.grant.is_empty(), "nothing to fetch");
    node.kill()
}
