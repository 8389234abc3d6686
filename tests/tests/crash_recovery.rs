//! Promise: what was acknowledged as durable is found again, byte for byte, after any crash.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use esker_prefix::NamespaceId;
use esker_tests::{
    Audit, Journal, Node, Prompt, Random, change, copy_folder, flat_layout, question, scratch, tokens,
};

const KILLS: u64 = 20;
const WRITERS: u64 = 4;
/// For a first acknowledgement.
const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn acknowledged_blocks_survive_a_kill_and_the_loss_of_the_index() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let (journal, namespace) = killed_after(&data, 4).await?;

    let all = Audit { acknowledged: 80, lost: 0, wrong: 0 };
    let node = Node::store_only(&data).await?;
    assert_eq!(journal.audit(&node).await?, all);
    node.kill()?;

    std::fs::remove_dir_all(data.join("store/index"))?;
    let node = Node::store_only(&data).await?;
    assert_eq!(journal.audit(&node).await?, all, "after the index was deleted");
    // The namespace came back with its blocks, and the store goes on taking them.
    journal.put(&node, &Prompt::new(namespace, &flat_layout(), 9, 4), 1..=4).await?;
    assert_eq!(journal.audit(&node).await?, Audit { acknowledged: 84, ..all });
    node.kill()
}

/// The control: of what is destroyed the journal says so.
#[tokio::test]
async fn what_is_destroyed_is_missed() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let (journal, _) = killed_after(&data, 1).await?;
    // The layout came first, and lies apart from blocks, which are not kept for ever.
    let mut segments: Vec<_> = std::fs::read_dir(data.join("store/segments"))?
        .map(|segment| segment.map(|segment| segment.path()))
        .collect::<Result<_, _>>()?;
    segments.sort();
    segments[1..].iter().try_for_each(std::fs::remove_file)?;
    let audit = audit(&data, &journal).await?;
    assert_eq!(audit, Audit { acknowledged: 20, lost: 20, wrong: 0 });
    Ok(())
}

#[tokio::test]
async fn a_damaged_index_costs_a_rebuild_and_no_data() -> Result<()> {
    let folder = scratch();
    let (data, sound) = (folder.path().join("data"), folder.path().join("sound"));
    let index = data.join("store/index");
    let mut random = Random::announced();
    let layout = flat_layout();
    let journal = Journal::default();
    // Every restart leaves another table behind; a fourth would join them.
    for seed in 0..3 {
        let node = Node::store_only(&data).await?;
        let namespace = node.register(&layout, 1).await?;
        journal.put(&node, &Prompt::new(namespace, &layout, seed, 10), 1..=10).await?;
        assert!(node.stop().await?.success());
    }
    copy_folder(&index, &sound)?;

    let all = Audit { acknowledged: 30, lost: 0, wrong: 0 };
    let mut failures = Vec::new();
    for file in std::fs::read_dir(&sound)? {
        let name = file?.file_name();
        let length = sound.join(&name).metadata()?.len();
        // What an entry of the manifest loses may look like the end of it: everywhere.
        let everywhere = if name.to_string_lossy().starts_with("MANIFEST") { length } else { 0 };
        let places = [0, length / 2, random.below(length.max(1))].into_iter();
        for at in places.chain((0..everywhere).step_by(8)).filter(|&at| at < length) {
            std::fs::remove_dir_all(&index)?;
            // Left by the case before.
            let _ = std::fs::remove_file(data.join("store/index.damaged"));
            copy_folder(&sound, &index)?;
            for byte in at..length.min(at + 16) {
                change(&index.join(&name), byte, |byte| byte ^ 0x5a)?;
            }
            // What cannot be read is a miss; the next opening builds the index anew.
            let first = audit(&data, &journal).await;
            let second = audit(&data, &journal).await;
            let started = first.as_ref().is_ok_and(|audit| audit.wrong == 0);
            if !started || second.as_ref().ok() != Some(&all) {
                failures.push(format!("{} at {at}: {first:?}, then {second:?}", name.display()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

/// A node that was killed when so many prompts of 20 blocks were stored.
async fn killed_after(data: &Path, prompts: u64) -> Result<(Journal, NamespaceId)> {
    let node = Node::store_only(data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let journal = Journal::default();
    for seed in 0..prompts {
        journal.put(&node, &Prompt::new(namespace, &layout, seed, 20), 1..=20).await?;
    }
    node.kill()?;
    Ok((journal, namespace))
}

/// What a node started for this finds of the journal.
async fn audit(data: &Path, journal: &Journal) -> Result<Audit> {
    let node = Node::store_only(data).await?;
    let audit = journal.audit(&node).await?;
    node.kill()?;
    Ok(audit)
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
        // Mostly not before something was acknowledged, however slow the machine is.
        let (before, started, waits) = (journal.acknowledged(), Instant::now(), random.below(4) > 0);
        while waits && journal.acknowledged() == before && started.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
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
