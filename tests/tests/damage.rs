//! Promise: verified or miss. Whatever happens to a segment's file, no byte leaves that was not put.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use esker_client::v1;
use esker_prefix::ObjectKind;
use esker_tests::{Node, Prompt, Random, change, flat_layout, records, scratch};

const BLOCKS: u32 = 12;
const FLIPS: u64 = 60;

async fn filled(data: &std::path::Path) -> Result<(Node, Prompt)> {
    let node = Node::store_only(data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, 1, BLOCKS);
    node.store(&prompt, prompt.blocks(1..=u64::from(BLOCKS))).await?;
    Ok((node, prompt))
}

#[tokio::test]
async fn a_flipped_byte_is_a_miss_and_a_new_put_heals_it() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut random = Random::announced();
    let (mut node, prompt) = filled(&data).await?;
    let mut lost = 0;
    for flip in 0..FLIPS {
        // The newest record of a random block: any byte of its header, plane table or planes.
        let number = 1 + random.below(u64::from(BLOCKS));
        let newest = records(&data)?
            .into_iter()
            .rfind(|record| record.kind == ObjectKind::Block && record.tokens == prompt.boundary(number));
        let record = newest.context("a stored block has a record")?;
        let plane = &record.planes[usize::try_from(random.below(record.planes.len() as u64))?];
        let part = if random.below(4) == 0 { &record.header } else { plane };
        let at = part.start + random.below(part.end - part.start);
        let bit = 1 << random.below(8);
        change(&record.file, at, |byte| byte ^ bit)?;
        if flip % 10 == 9 {
            // A damaged header must not hide the records behind it from a rebuild either.
            node.kill()?;
            std::fs::remove_dir_all(data.join("store/index"))?;
            node = Node::store_only(&data).await?;
        }

        let fetched = node.fetch_best(&prompt).await?;
        assert_eq!(fetched.wrong_planes(&prompt), 0, "byte {at} of {}", record.file.display());
        // A bit that a decompressor does not read changes no content: that is what is proven, and what is served.
        let is_lost = !fetched.whole_objects(&prompt).contains(&(ObjectKind::Block, prompt.boundary(number)));
        lost += u64::from(is_lost);
        let again = node.fetch_best(&prompt).await?;
        again.expect_blocks(&prompt, if is_lost { number - 1 } else { u64::from(BLOCKS) });
        node.store(&prompt, prompt.blocks(1..=u64::from(BLOCKS))).await?;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, u64::from(BLOCKS));
    }
    assert!(lost * 10 > FLIPS * 9, "only {lost} of {FLIPS} flips were noticed");
    node.kill()
}

#[tokio::test]
async fn a_fetch_says_what_is_missing() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let (node, prompt) = filled(&data).await?;
    let grant = node.lookup(&prompt).await?.grant;
    let all = records(&data)?;
    let fifth = all.iter().find(|record| record.tokens == prompt.boundary(5)).context("block 5")?;
    change(&fifth.file, fifth.planes[0].start, |byte| !byte)?;
    for order in [v1::Order::ByObject, v1::Order::ByPlane] {
        let request = v1::FetchRequest { grant: grant.clone(), order: order.into(), ..Default::default() };
        let fetched = node.fetch(request).await?;
        assert_eq!(fetched.wrong_planes(&prompt), 0);
        assert_eq!(fetched.done.usable_tokens, prompt.boundary(4));
        let missing: Vec<_> =
            fetched.missing.iter().map(|missing| (missing.kind(), missing.tokens)).collect();
        assert_eq!(missing, [(v1::ObjectKind::Block, prompt.boundary(5))]);
        assert!(!fetched.missing[0].reason.is_empty());
    }
    node.kill()
}

#[tokio::test]
async fn a_truncated_segment_keeps_what_is_before_the_cut() -> Result<()> {
    let mut random = Random::announced();
    for _ in 0..6 {
        let folder = scratch();
        let data = folder.path().join("data");
        let (node, prompt) = filled(&data).await?;
        node.stop().await?;
        let mut blocks = records(&data)?;
        blocks.retain(|record| record.kind == ObjectKind::Block);
        let file = blocks[0].file.clone();
        assert!(blocks.iter().all(|record| record.file == file), "one segment holds them all");
        let ends: Vec<u64> =
            blocks.iter().map(|record| record.planes.last().map_or(0, |plane| plane.end)).collect();
        let length = random.below(ends[ends.len() - 1]);
        let kept = ends.iter().filter(|&&end| end.next_multiple_of(4096) <= length).count() as u64;
        OpenOptions::new().write(true).open(&file)?.set_len(length)?;
        if random.below(2) == 0 {
            std::fs::remove_dir_all(data.join("store/index"))?;
        }

        let node = Node::store_only(&data).await?;
        // A cut through the very first record takes the namespace with it; registering it again is harmless.
        node.register(&prompt.layout, 1).await?;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, kept);
        node.store(&prompt, prompt.blocks(1..=u64::from(BLOCKS))).await?;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, u64::from(BLOCKS));
        node.stop().await?;
        let node = Node::store_only(&data).await?;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, u64::from(BLOCKS));
        node.kill()?;
    }
    Ok(())
}

#[tokio::test]
async fn swapped_and_zeroed_records_are_misses() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let (node, prompt) = filled(&data).await?;
    let all = records(&data)?;
    let at = |number| all.iter().find(|record| record.tokens == prompt.boundary(number)).context("a block");
    let (second, fourth, sixth) = (at(2)?, at(4)?, at(6)?);
    let segment = OpenOptions::new().read(true).write(true).open(&fourth.file)?;
    let length =
        |record: &esker_tests::Record| record.planes.last().map_or(0, |p| p.end) - record.header.start;
    // A sound record of another block at the place of the fourth; a page of zeros within the sixth.
    let mut record = vec![0; usize::try_from(length(second))?];
    segment.read_exact_at(&mut record, second.header.start)?;
    segment.write_all_at(&record, fourth.header.start)?;
    segment.write_all_at(&[0; 4096], sixth.planes[0].start)?;
    segment.sync_all()?;

    let first = node.fetch_best(&prompt).await?;
    assert_eq!((first.wrong_planes(&prompt), first.done.usable_tokens), (0, prompt.boundary(3)));
    let missing: Vec<u64> = first.missing.iter().map(|missing| missing.tokens).collect();
    assert_eq!(missing, [prompt.boundary(4), prompt.boundary(6)]);
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 3);
    node.kill()
}
