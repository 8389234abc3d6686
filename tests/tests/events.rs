//! Promise: whoever follows a node's events knows which blocks it holds, of its own scope and of no other.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::v1;
use esker_tests::{Node, Prompt, change, flat_layout, question, records, scratch, tokens};
use tonic::{Code, Streaming};
use v1::admin_client::AdminClient;
use v1::events_client::EventsClient;
use v1::kv_event::Event;

/// A follower as a router would be one: hashes that are stored.
struct Follower {
    stream: Streaming<v1::KvEventBatch>,
    epoch: u64,
    next: u64,
    held: BTreeSet<Bytes>,
    removed: Vec<String>,
    stored: Vec<v1::BlockStored>,
    cleared: bool,
    lost: bool,
}

impl Follower {
    async fn start(node: &Node, epoch: u64, from_sequence: u64) -> Result<Self> {
        let request = v1::SubscribeRequest { epoch, from_sequence, ..Default::default() };
        let stream = EventsClient::new(node.channel.clone()).subscribe(request).await?.into_inner();
        let mut follower = Self {
            stream,
            epoch: 0,
            next: 0,
            held: BTreeSet::new(),
            removed: Vec::new(),
            stored: Vec::new(),
            cleared: false,
            lost: false,
        };
        // The first batch says where it begins.
        follower.take().await?;
        Ok(follower)
    }

    async fn take(&mut self) -> Result<bool> {
        let batch = tokio::time::timeout(Duration::from_secs(30), self.stream.message()).await??;
        let Some(batch) = batch else { return Ok(false) };
        self.lost |= batch.lost;
        ensure!(
            self.epoch == 0 || (batch.epoch, batch.sequence) == (self.epoch, self.next),
            "a gap: {batch:?}"
        );
        self.epoch = batch.epoch;
        self.next = batch.sequence + batch.events.len() as u64;
        ensure!(batch.ts > 1.6e9, "{}", batch.ts);
        for event in batch.events {
            match event.event.context("an event without content")? {
                Event::BlockStored(stored) => {
                    self.held.extend(stored.block_hashes.iter().cloned());
                    self.stored.push(stored);
                }
                Event::BlockRemoved(removed) => {
                    self.held.retain(|hash| !removed.block_hashes.contains(hash));
                    self.removed.push(removed.reason);
                }
                Event::AllBlocksCleared(_) => {
                    self.held.clear();
                    self.cleared = true;
                }
            }
        }
        Ok(true)
    }

    async fn until(&mut self, enough: impl Fn(&Self) -> bool) -> Result<()> {
        while !enough(self) {
            ensure!(self.take().await?, "the stream has ended");
        }
        Ok(())
    }
}

#[tokio::test]
async fn what_the_decoder_stores_is_followed_with_its_tokens_and_can_be_replayed() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::start(&data, &[]).await?;
    let mut follower = Follower::start(&node, 0, 0).await?;
    let prompt = tokens(1, 700);
    node.ask(question(&prompt)).await?;
    follower.until(|seen| seen.held.len() == 5).await?;
    let ids: Vec<u32> = prompt.iter().map(|token| token.0).collect();
    let mut parent = Bytes::new();
    for (number, stored) in follower.stored.iter().enumerate() {
        assert_eq!(stored.token_ids, &ids[number * 128..(number + 1) * 128]);
        assert_eq!((stored.block_size, stored.tokens), (128, (number as u64 + 1) * 128));
        assert_eq!((stored.medium.as_str(), stored.locality.as_str()), ("STORAGE", "LOCAL"));
        assert_eq!(stored.parent_block_hash, parent);
        parent.clone_from(&stored.block_hashes[0]);
    }
    // The hashes are those that a lookup names.
    let namespace = node.client.describe().await?.namespace;
    let request = v1::LookupRequest { namespace, tokens: ids, want_hashes: true, ..Default::default() };
    let found = node.cache.clone().lookup(request).await?.into_inner();
    assert_eq!(found.hashes.into_iter().collect::<BTreeSet<_>>(), follower.held);

    // One who comes late asks for what was before.
    let late = Follower::start(&node, follower.epoch, 0).await?;
    assert_eq!((late.held.clone(), late.lost), (follower.held.clone(), false));
    let newest = Follower::start(&node, follower.epoch, follower.next - 1).await?;
    assert_eq!(newest.held.len(), 1);
    node.kill()?;

    // After a restart the numbering is another, and who asks for the old one is told.
    let node = Node::start(&data, &[]).await?;
    let after = Follower::start(&node, follower.epoch, follower.next).await?;
    assert!(after.lost && after.epoch != follower.epoch && after.next == 0);
    node.kill()
}

#[tokio::test]
async fn what_goes_is_followed_with_its_reason() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let node = Node::store_only(&data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let mut follower = Follower::start(&node, 0, 0).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 4);
    node.store(&prompt, prompt.blocks(1..=4)).await?;
    follower.until(|seen| seen.held.len() == 4).await?;

    // Damage is found by the fetch that meets it.
    let bad =
        records(&data)?.into_iter().find(|record| record.tokens == prompt.boundary(3)).context("a record")?;
    for plane in &bad.planes {
        change(&bad.file, plane.start, |byte| byte ^ 1)?;
    }
    node.fetch_best(&prompt).await?;
    follower.until(|seen| seen.held.len() == 3).await?;
    assert_eq!(follower.removed, ["damaged"]);

    let mut admin = AdminClient::new(node.channel.clone());
    admin.erase_tenant(v1::EraseTenantRequest { tenant: "default".into() }).await?;
    follower.until(|seen| seen.cleared).await?;
    assert!(follower.held.is_empty());
    assert_eq!(&follower.removed[1..], ["erased"; 3]);
    assert!(!follower.take().await?, "nothing comes of a scope that is gone");
    // The scope in its place begins anew.
    let mut follower = Follower::start(&node, 0, 0).await?;
    node.store(&prompt, prompt.blocks(1..=4)).await?;
    follower.until(|seen| seen.held.len() == 4).await?;
    node.kill()
}

#[tokio::test]
async fn a_follower_sees_one_scope() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let subscribe = |user: &str, scope: v1::Scope| {
        let request = v1::SubscribeRequest { user: user.into(), scope: scope.into(), ..Default::default() };
        let mut client = EventsClient::new(node.channel.clone());
        async move { client.subscribe(request).await }
    };
    let mut own = Follower::start(&node, 0, 0).await?;
    let mut others = Vec::new();
    for (user, scope) in [("ann", v1::Scope::Private), ("", v1::Scope::Public)] {
        let mut stream = subscribe(user, scope).await?.into_inner();
        let first = stream.message().await?.context("a first batch")?;
        assert!(first.events.is_empty());
        others.push(stream);
    }
    assert_eq!(subscribe("", v1::Scope::Org).await.unwrap_err().code(), Code::PermissionDenied);
    node.ask(question(&tokens(9, 300))).await?;
    own.until(|seen| seen.held.len() == 2).await?;
    for mut stream in others {
        let silent = tokio::time::timeout(Duration::from_millis(500), stream.message()).await;
        assert!(silent.is_err(), "events of another scope: {silent:?}");
    }
    node.kill()
}
