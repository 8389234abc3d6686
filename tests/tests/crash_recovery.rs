//! Promise: what was acknowledged as durable is found again, byte for byte, after any crash.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use esker_tests::{Audit, Journal, Node, Prompt, Random, flat_layout, question, scratch, tokens};

const KILLS: u64 = 20;
const WRITERS: u64 = 4;

#[tokio::test]
async fn acknowledged_blocks_survive_a_kill_and_the_loss_of_the_index() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::store_only(&data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let journal = Journal::default();
    for seed in 0..4 {
        journal.put(&node, &Prompt::new(namespace, &layout, seed, 20), 1..=20).await?;
    }
    node.kill()?;

    let all = Audit { acknowledged: 80, lost: 0, wrong: 0 };
    let node = Node::store_only(&data).await?;
    assert_eq!(journal.audit(&node).await?, all);
    node.kill()?;

    std::fs::remove_dir_all(data.join("store/index"))?;
    let node = Node::store_only(&data).await?;
    assert_eq!(journal.audit(&node).await?, all, "after the index was deleted");
    // The namespace came back with its blocks, and the store goes on taking them.
    journal.put(&node, &Prompt::new(namespace, &layout, 9, 4), 1..=4).await?;
    assert_eq!(journal.audit(&node).await?, Audit { acknowledged: 84, ..all });
    node.kill()
}

#[tokio::test]
async fn a_damaged_index_costs_a_rebuild_and_no_data() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut random = Random::announced();
    let node = Node::store_only(&data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let journal = Journal::default();
    journal.put(&node, &Prompt::new(namespace, &layout, 1, 30), 1..=30).await?;
    node.stop().await?;

    for round in 0..8 {
        damage_one_file(&data.join("store/index"), &mut random)?;
        let mut node = Node::store_only(&data).await?;
        let mut audit = journal.audit(&node).await?;
        if audit.lost > 0 && audit.wrong == 0 {
            // Damage that only a read of the index can find gives misses until the next opening builds it anew.
            node.stop().await?;
            node = Node::store_only(&data).await?;
            audit = journal.audit(&node).await?;
        }
        assert_eq!(audit, Audit { acknowledged: 30, lost: 0, wrong: 0 }, "round {round}: {}", node.log()?);
        node.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn random_kills_under_concurrent_puts_lose_nothing() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut random = Random::announced();
    let layout = flat_layout();
    let journal = Arc::new(Journal::default());
    for round in 0..KILLS {
        let node = Arc::new(Node::store_only(&data).await?);
        let namespace = node.register(&layout, 1).await?;
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (node, layout, journal) = (node.clone(), layout.clone(), journal.clone());
                tokio::spawn(async move {
                    // Until the node is gone.
                    for turn in 0.. {
                        let prompt =
                            Prompt::new(namespace, &layout, (round << 32) + (writer << 16) + turn, 6);
                        if journal.put(&node, &prompt, 1..=6).await.is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(5 + random.below(120))).await;
        node.signal("KILL")?;
        for writer in writers {
            writer.await?;
        }
        if random.below(4) == 0 {
            std::fs::remove_dir_all(data.join("store/index"))?;
        }
    }
    let node = Node::store_only(&data).await?;
    let audit = journal.audit(&node).await?;
    println!("{KILLS} kills: {audit:?}");
    assert!(audit.acknowledged > 100, "too little was put to prove anything: {audit:?}");
    assert_eq!((audit.lost, audit.wrong), (0, 0), "{audit:?}");
    node.kill()
}

#[tokio::test]
async fn an_orderly_stop_stores_what_the_decoder_had_waiting() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let prompt = tokens(5, 600);
    let node = Node::start(&data, &[]).await?;
    node.ask(question(&prompt)).await?;
    assert!(node.stop().await?.success());
    let node = Node::start(&data, &[]).await?;
    assert_eq!(node.ask(question(&prompt)).await?.usage.prompt_cache_hit_tokens, 512);
    node.kill()
}

/// Overwrites part of one of RocksDB's files.
fn damage_one_file(index: &Path, random: &mut Random) -> Result<()> {
    let mut files: Vec<_> = std::fs::read_dir(index)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0));
    files.sort();
    let file = &files[usize::try_from(random.below(files.len() as u64))?];
    let mut bytes = std::fs::read(file)?;
    let at = usize::try_from(random.below(bytes.len() as u64))?;
    let end = bytes.len().min(at + 64);
    bytes[at..end].iter_mut().for_each(|byte| *byte ^= 0x5a);
    println!("damaged {} at {at}", file.display());
    Ok(std::fs::write(file, bytes)?)
}
