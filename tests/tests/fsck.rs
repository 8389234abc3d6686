//! Promise: `esker fsck` tells damage from health by its exit code, mends what it can, and never beside a server;
//! `esker stat` tells what is there, also beside one.

use anyhow::{Context, Result};
use esker_prefix::ObjectKind;
use esker_tests::{Node, Prompt, Random, change, flat_layout, output, records, scratch, text_of};
use serde_json::Value;

const BLOCKS: u32 = 12;

fn json(args: &[&str]) -> Result<(bool, Value)> {
    let done = output(args);
    let text = text_of(&done.stdout);
    Ok((done.status.success(), serde_json::from_str(&text).with_context(|| text_of(&done.stderr))?))
}

#[tokio::test]
async fn damage_is_told_mended_and_costs_only_what_it_hit() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let path = data.to_str().context("a path of this test")?;
    let mut random = Random::announced();
    let node = Node::store_only(&data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, 1, BLOCKS);
    node.store(&prompt, prompt.blocks(1..=u64::from(BLOCKS))).await?;

    let busy = output(["fsck", path]);
    assert!(!busy.status.success());
    assert!(text_of(&busy.stderr).contains("in use"), "{}", text_of(&busy.stderr));
    let (_, beside) = json(&["stat", path, "--json"])?;
    assert_eq!((&beside["in_use"], &beside["total"]["tokens"]), (&true.into(), &prompt.boundary(12).into()));
    node.stop().await?;

    let (clean, report) = json(&["fsck", path, "--json"])?;
    assert!(clean && report["problems"] == 0, "{report}");
    let (_, told) = json(&["stat", path, "--json"])?;
    assert_eq!((&told["in_use"], &told["total"]["objects"]), (&false.into(), &BLOCKS.into()));

    // Any byte of any plane.
    let number = 1 + random.below(u64::from(BLOCKS));
    let boundary = prompt.boundary(number);
    let all = records(&data)?;
    let hit = all.iter().find(|record| record.kind == ObjectKind::Block && record.tokens == boundary);
    let hit = hit.context("a stored block has a record")?;
    let plane = &hit.planes[usize::try_from(random.below(hit.planes.len() as u64))?];
    change(&hit.file, plane.start + random.below(plane.end - plane.start), |byte| byte ^ 0x20)?;
    let (clean, report) = json(&["fsck", path, "--json"])?;
    assert!(!clean && report["problems"] == 1, "{report}");
    let (mended, report) = json(&["fsck", path, "--json", "--repair"])?;
    assert!(mended && report["repair"]["quarantined"] == 1, "{report}");
    let (clean, report) = json(&["fsck", path, "--json"])?;
    // The blocks and the layout of their namespace, less the one that was hit.
    assert!(clean && report["quarantined"] == 1 && report["live"] == BLOCKS, "{report}");

    let node = Node::store_only(&data).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, number - 1);
    node.store(&prompt, prompt.blocks(1..=u64::from(BLOCKS))).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, u64::from(BLOCKS));
    node.stop().await?;
    Ok(())
}
