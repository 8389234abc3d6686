//! Promise: on a full disk what is worth least goes; where nothing may go puts are refused, and everything else goes on.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;
use bytes::Bytes;
use esker_client::v1::{self, sessions_client::SessionsClient};
use esker_prefix::TokenId;
use esker_tests::{Journal, Node, Prompt, flat_layout, question, scratch, tokens};
use tonic::Code;

/// A small file system of its own, in a file. Unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// 128 MiB of ext4, of which the ledger takes some 50; `None`, with the reason on standard output, where that cannot be had.
    fn new(folder: &Path) -> Option<Self> {
        let (image, mount) = (folder.join("image"), folder.join("mount"));
        std::fs::create_dir(&mount).ok()?;
        std::fs::File::create(&image).ok()?.set_len(128 << 20).ok()?;
        let made = run("mkfs.ext4", ["-q".as_ref(), "-m".as_ref(), "0".as_ref(), image.as_os_str()])
            && run("mount", ["-o".as_ref(), "loop".as_ref(), image.as_os_str(), mount.as_os_str()]);
        if !made {
            println!("SKIPPED: a small disk needs root, mkfs.ext4 and loop devices");
        }
        made.then_some(Self(mount))
    }

    /// Takes what is left of the space, to the last block.
    fn fill(&self) -> Result<()> {
        let mut filler = std::fs::File::create(self.0.join("filler"))?;
        for size in [1 << 20, 4096] {
            while filler.write(&vec![1; size]).is_ok() {}
        }
        Ok(filler.sync_all()?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run("umount", ["-l".as_ref(), self.0.as_os_str()]);
    }
}

fn run<const N: usize>(program: &str, args: [&OsStr; N]) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut command = Command::new(program);
    command.args(args).env("PATH", path).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[tokio::test]
async fn puts_are_refused_and_reads_go_on() -> Result<()> {
    let folder = scratch();
    let Some(disk) = SmallDisk::new(folder.path()) else { return Ok(()) };
    // By a link, so that the node's log, which lies beside its data, is not on the full disk: what cannot be told is not read.
    let data = folder.path().join("data");
    std::fs::create_dir(disk.0.join("data"))?;
    std::os::unix::fs::symlink(disk.0.join("data"), &data)?;
    std::fs::write(disk.0.join("reserve"), vec![1; 8 << 20])?;
    // More than there is: a store that knows no bound of its own meets the disk's.
    let options = ["--segment-mib", "4", "--capacity", "1GiB"];
    let question = || question(&tokens(3, 300));

    let node = Node::start(&data, &options).await?;
    let answer = node.ask(question()).await?;
    node.settled(&tokens(3, 300)).await?;
    keep(&node, "asked", node.client.describe().await?.namespace, &tokens(3, 300)).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let journal = Journal::default();
    let mut refusal = None;
    for seed in 0..100 {
        let prompt = Prompt::new(namespace, &layout, seed, 20);
        let put = journal.put(&node, &prompt, 1..=20).await;
        // What nobody keeps would go for what comes.
        let name = Bytes::copy_from_slice(namespace.as_bytes());
        let kept = keep(&node, &format!("prompt {seed}"), name, &prompt.tokens).await;
        if let Err(error) = put {
            refusal = Some(error.downcast::<tonic::Status>()?);
            break;
        }
        kept?;
    }
    let refusal = refusal.expect("128 MiB hold 100 prompts of 2 MiB");
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    assert!(refusal.message().contains("store is full"), "{refusal}");
    let before = journal.audit(&node).await?;
    assert!(before.acknowledged > 300 && (before.lost, before.wrong) == (0, 0), "{before:?}");

    for round in ["no room for a segment", "not a byte left, not even for the index"] {
        assert_eq!(journal.audit(&node).await?, before, "{round}");
        let fresh = Prompt::new(namespace, &layout, 1000, 1);
        assert_eq!(refusal_of(&node, &fresh).await, Code::ResourceExhausted, "{round}");
        disk.fill()?;
    }
    assert_eq!(journal.audit(&node).await?, before);
    let warm = node.ask(question()).await?;
    assert_eq!((warm.usage.prompt_cache_hit_tokens, &warm.tokens), (256, &answer.tokens));
    assert!(!node.ask(esker_tests::question(&tokens(4, 300))).await?.tokens.is_empty());
    node.kill()?;

    // What others left of the disk is not enough to open the index: it says so, and nothing is lost by trying.
    let refused = Node::start(&data, &options).await.err().expect("not a byte is free").to_string();
    assert!(refused.contains("store is full: the index needs"), "{refused}");
    std::fs::remove_file(disk.0.join("filler"))?;
    let node = Node::start(&data, &options).await?;
    assert_eq!(journal.audit(&node).await?, before, "after a restart on a disk that the store has filled");
    assert_eq!(node.ask(question()).await?.tokens, answer.tokens);
    // A start writes logs of databases out and gives back what was reserved for them: room that others take.
    disk.fill()?;
    let fresh = Prompt::new(namespace, &layout, 1000, 1);
    let outcome = refusal_of(&node, &fresh).await;
    // A segment may have been begun while there was room: the answer is stored again where nobody kept it.
    assert!([Code::ResourceExhausted, Code::Ok].contains(&outcome), "{outcome}");
    assert_eq!(journal.audit(&node).await?, before);

    // Room again: the store takes puts again, without a restart.
    std::fs::remove_file(disk.0.join("filler"))?;
    std::fs::remove_file(disk.0.join("reserve"))?;
    node.store(&fresh, fresh.blocks(1..=1)).await?;
    node.fetch_best(&fresh).await?.expect_blocks(&fresh, 1);
    assert_eq!(journal.audit(&node).await?, before);
    assert!(node.stop().await?.success());
    Ok(())
}

/// A store that was told nothing keeps within the disk, and makes room from what is worth least.
#[tokio::test]
async fn a_disk_that_the_store_has_to_itself_is_filled_and_then_kept() -> Result<()> {
    let folder = scratch();
    let Some(disk) = SmallDisk::new(folder.path()) else { return Ok(()) };
    let node = Node::start(&disk.0.join("data"), &["--segment-mib", "4", "--no-model"]).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let (mut stored, mut found) = (0, 0);
    for seed in 0..60 {
        // 2 MiB each, twice what there is. Some may be declined, as nobody has asked for those before them; none is refused.
        let prompt = Prompt::new(namespace, &layout, seed, 20);
        let mut replies = node.put_stream(&prompt, prompt.blocks(1..=20)).await?;
        while let Some(reply) = replies.message().await? {
            stored += usize::from(reply.durability() == v1::Durability::Durable);
        }
    }
    for seed in 0..60 {
        let prompt = Prompt::new(namespace, &layout, seed, 20);
        let fetched = node.fetch_best(&prompt).await?;
        assert_eq!(fetched.wrong_planes(&prompt), 0);
        found += fetched.whole_objects(&prompt).len();
    }
    assert!(stored > 300 && found > 100, "{stored} blocks stored, {found} found");
    assert!(node.stop().await?.success());
    Ok(())
}

/// Opens a session: what there is of these tokens stays.
async fn keep(node: &Node, session: &str, namespace: Bytes, tokens: &[TokenId]) -> Result<()> {
    let request = v1::OpenSessionRequest {
        session: session.into(),
        namespace,
        tokens: tokens.iter().map(|token| token.0).collect(),
        keep_s: 24 * 3600,
        user: String::new(),
    };
    SessionsClient::new(node.channel.clone()).open_session(request).await?;
    Ok(())
}

/// A store that was told of more room than others leave it makes do with what there is.
#[tokio::test]
async fn a_disk_that_others_fill_costs_what_is_worth_least() -> Result<()> {
    let folder = scratch();
    let Some(disk) = SmallDisk::new(folder.path()) else { return Ok(()) };
    let options = ["--segment-mib", "4", "--capacity", "1GiB", "--no-model"];
    let node = Node::start(&disk.0.join("data"), &options).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let journal = Journal::default();
    for seed in 0..60 {
        journal.put(&node, &Prompt::new(namespace, &layout, seed, 20), 1..=20).await?;
    }
    let audit = journal.audit(&node).await?;
    assert!(audit.lost > 0 && audit.lost < audit.acknowledged && audit.wrong == 0, "{audit:?}");
    assert!(node.stop().await?.success());
    Ok(())
}

/// The status of a put that must be refused.
async fn refusal_of(node: &Node, prompt: &Prompt) -> Code {
    let refused = match node.put_stream(prompt, prompt.blocks(1..=1)).await {
        Ok(mut replies) => replies.message().await.map(|_| ()),
        Err(status) => Err(status),
    };
    refused.map_or_else(|status| status.code(), |()| Code::Ok)
}
