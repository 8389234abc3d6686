//! Promise: with a root key nothing that a tenant stores lies readable in the data folder, and what an erased tenant stored stays
//! unreadable even for whoever has kept the old segments.

use std::path::Path;

use anyhow::{Context, Result};
use esker_client::v1;
use esker_prefix::ObjectKind;
use esker_tests::{Node, Prompt, flat_layout, output, scratch, staged_layout, text_of};
use v1::admin_client::AdminClient;

/// Bytes of a plane that are looked for, at several places of it.
const NEEDLE_BYTES: usize = 48;

fn write_key(folder: &Path, byte: u8) -> Result<String> {
    let path = folder.join(format!("root-{byte}.key"));
    std::fs::write(&path, [byte; 32])?;
    Ok(path.to_str().context("a path of text")?.to_owned())
}

/// Copies a folder and everything below it.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() { copy_tree(&from, &to)? } else { std::fs::copy(&from, &to).map(drop)? }
    }
    Ok(())
}

async fn start(data: &Path, root_key: Option<&str>) -> Result<Node> {
    let mut options = vec!["--no-model", "--segment-mib", "4", "--codec", "raw"];
    options.extend(root_key.into_iter().flat_map(|path| ["--root-key", path]));
    Node::start(data, &options).await
}

/// How many pieces of the prompt's blocks lie in the files below a folder.
fn readable_pieces(folder: &Path, prompt: &Prompt, blocks: u64) -> Result<usize> {
    let mut files = vec![folder.to_owned()];
    let mut contents = Vec::new();
    while let Some(path) = files.pop() {
        if path.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                files.push(entry?.path());
            }
        } else {
            contents.push(std::fs::read(&path)?);
        }
    }
    let mut needles = Vec::new();
    for block in 1..=blocks {
        for plane in 0..prompt.layout.planes(ObjectKind::Block).len() {
            let bytes = prompt.plane(ObjectKind::Block, prompt.boundary(block), plane);
            needles.extend([0, bytes.len() / 2].map(|at| bytes[at..at + NEEDLE_BYTES].to_vec()));
        }
    }
    // Every needle starts with eight bytes that tell where to look closer.
    let starts: std::collections::HashMap<[u8; 8], &Vec<u8>> =
        needles.iter().filter_map(|needle| Some((*needle.first_chunk()?, needle))).collect();
    let found = contents.iter().flat_map(|content| {
        content.windows(NEEDLE_BYTES).filter(|window| {
            window
                .first_chunk()
                .and_then(|start| starts.get(start))
                .is_some_and(|needle| needle[..] == **window)
        })
    });
    Ok(found.count())
}

#[tokio::test]
async fn nothing_of_a_tenant_lies_readable_on_the_disk() -> Result<()> {
    let folder = scratch();
    let key = write_key(folder.path(), 1)?;
    let layout = flat_layout();
    for root_key in [Some(key.as_str()), None] {
        let data = folder.path().join(if root_key.is_some() { "sealed" } else { "plain" });
        let node = start(&data, root_key).await?;
        let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 5, 20);
        node.store(&prompt, prompt.blocks(1..=20)).await?;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, 20);
        node.kill()?;
        let found = readable_pieces(&data, &prompt, 20)?;
        // The control: without a root key the same search finds all of it.
        assert_eq!(found > 0, root_key.is_none(), "{found} pieces with {root_key:?}");
        let node = start(&data, root_key).await?;
        node.fetch_best(&prompt).await?.expect_blocks(&prompt, 20);
        node.kill()?;
    }
    Ok(())
}

#[tokio::test]
async fn compressed_planes_and_states_are_sealed_too() -> Result<()> {
    let folder = scratch();
    let (data, key) = (folder.path().join("data"), write_key(folder.path(), 1)?);
    let layout = staged_layout();
    let options = ["--no-model", "--segment-mib", "8", "--root-key", &key];
    let node = Node::start(&data, &options).await?;
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 5, 20);
    let mut objects = prompt.blocks(1..=20);
    objects.push(prompt.state(20));
    node.store(&prompt, objects).await?;
    node.kill()?;
    assert_eq!(readable_pieces(&data, &prompt, 20)?, 0);
    let node = Node::start(&data, &options).await?;
    let fetched = node.fetch_best(&prompt).await?;
    assert_eq!((fetched.whole_objects(&prompt).len(), fetched.wrong_planes(&prompt)), (21, 0));
    // In restore order the planes are read by themselves.
    let grant = node.lookup(&prompt).await?.grant;
    let order = v1::Order::ByPlane.into();
    let fetched = node.fetch(v1::FetchRequest { grant, order, ..Default::default() }).await?;
    assert_eq!((fetched.whole_objects(&prompt).len(), fetched.wrong_planes(&prompt)), (21, 0));
    node.kill()?;
    // Offline nobody needs the key to find damage.
    let checked = output([std::ffi::OsStr::new("fsck"), data.as_os_str()]);
    assert!(checked.status.success(), "{}", text_of(&checked.stdout));
    Ok(())
}

#[tokio::test]
async fn what_was_erased_stays_unreadable_with_the_old_segments_back() -> Result<()> {
    let folder = scratch();
    let (data, key) = (folder.path().join("data"), write_key(folder.path(), 1)?);
    let layout = flat_layout();
    let node = start(&data, Some(&key)).await?;
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 5, 20);
    node.store(&prompt, prompt.blocks(1..=20)).await?;
    node.stop().await?;
    let backup = folder.path().join("backup");
    copy_tree(&data, &backup)?;
    let node = start(&data, Some(&key)).await?;
    let mut admin = AdminClient::new(node.channel.clone());
    // Everyone's tenant on a node that asks nobody who they are.
    admin.erase_tenant(v1::EraseTenantRequest { tenant: "default".into() }).await?;
    assert_eq!(node.lookup(&prompt).await?.history_tokens, 0);
    // The tenant goes on, with keys of its own.
    node.store(&prompt, prompt.blocks(1..=3)).await?;
    node.fetch(v1::FetchRequest { grant: node.lookup(&prompt).await?.grant, ..Default::default() })
        .await?
        .expect_blocks(&prompt, 3);
    node.kill()?;
    // Everything but the keys comes back from the backup: segments, index, and the tenant's old epoch.
    let keys = folder.path().join("keys-now");
    std::fs::rename(data.join("keys"), &keys)?;
    std::fs::remove_dir_all(&data)?;
    copy_tree(&backup, &data)?;
    let old_keys = folder.path().join("keys-then");
    std::fs::rename(data.join("keys"), &old_keys)?;
    copy_tree(&keys, &data.join("keys"))?;
    let node = start(&data, Some(&key)).await?;
    assert_eq!(node.lookup(&prompt).await?.history_tokens, prompt.boundary(20), "its names are back");
    let fetched = node.fetch_best(&prompt).await?;
    assert!(fetched.planes.is_empty(), "{:?}", fetched.names());
    assert!(!fetched.missing.is_empty() && fetched.missing.iter().all(|missing| missing.reason == "no_key"));
    assert_eq!(fetched.done.usable_tokens, 0);
    node.kill()?;
    // The control: with the old keys back as well, all of it would be readable.
    std::fs::remove_dir_all(data.join("keys"))?;
    copy_tree(&old_keys, &data.join("keys"))?;
    let node = start(&data, Some(&key)).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 20);
    node.kill()
}

#[tokio::test]
async fn a_wrong_root_key_and_none_are_told_before_anything_is_served() -> Result<()> {
    let folder = scratch();
    let (data, key) = (folder.path().join("data"), write_key(folder.path(), 1)?);
    let layout = flat_layout();
    let node = start(&data, Some(&key)).await?;
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 5, 4);
    node.store(&prompt, prompt.blocks(1..=4)).await?;
    node.kill()?;
    let wrong = write_key(folder.path(), 2)?;
    for (root_key, says) in [(Some(wrong), "not the root key of this data folder"), (None, "--root-key")] {
        let mut args = vec!["serve", "--no-model", "--listen", "127.0.0.1:0"];
        args.extend(root_key.iter().flat_map(|path| ["--root-key", path]));
        let args = args
            .into_iter()
            .map(std::ffi::OsStr::new)
            .chain([std::ffi::OsStr::new("--data"), data.as_os_str()]);
        let refused = output(args);
        let text = text_of(&refused.stderr);
        assert!(!refused.status.success() && text.contains(says), "{text}");
    }
    let node = start(&data, Some(&key)).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 4);
    node.kill()
}
