//! Promise: whoever follows vLLM's KV events follows a node by the same means, and asks for what it missed.
//!
//! The bytes of ZeroMQ are written out here; that its own library and vLLM's own types agree is tested in `client/python`.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use esker_client::v1;
use esker_tests::{Node, Prompt, change, flat_layout, output, question, records, scratch, text_of, tokens};
use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, de};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use v1::admin_client::AdminClient;

const TOPIC: &str = "kv@one@model";

#[derive(Deserialize, Debug, PartialEq)]
#[serde(tag = "type")]
enum Event {
    BlockStored {
        block_hashes: Vec<Hash>,
        parent_block_hash: Option<Hash>,
        token_ids: Vec<u32>,
        block_size: u32,
        medium: String,
        lora_id: Option<u32>,
    },
    BlockRemoved {
        block_hashes: Vec<Hash>,
        medium: String,
        reason: String,
    },
    AllBlocksCleared,
}

#[derive(Clone, Debug, PartialEq)]
struct Hash(Vec<u8>);

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Hash;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Hash, E> {
                Ok(Hash(bytes.to_vec()))
            }

            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Hash, E> {
                Ok(Hash(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// A peer by the letter of ZMTP 3.0.
struct Peer(TcpStream);

impl Peer {
    async fn connect(address: &str, kind: &[u8]) -> Result<Self> {
        let mut peer = Self(TcpStream::connect(address).await?);
        let mut hello = [0; 64];
        (hello[0], hello[9], hello[10]) = (0xff, 0x7f, 3);
        hello[12..16].copy_from_slice(b"NULL");
        peer.0.write_all(&hello).await?;
        let ready = [b"\x05READY\x0bSocket-Type\0\0\0", &[u8::try_from(kind.len())?][..], kind].concat();
        peer.frame(4, &ready).await?;
        let mut theirs = [0; 64];
        peer.0.read_exact(&mut theirs).await?;
        ensure!(theirs[0] == 0xff && theirs[9] == 0x7f && theirs[10] == 3 && &theirs[12..16] == b"NULL");
        let (flags, ready) = peer.take_frame().await?;
        ensure!(flags == 4 && ready.starts_with(b"\x05READY"));
        Ok(peer)
    }

    async fn subscriber(node: &Node, topic: &str) -> Result<Self> {
        let mut peer = Self::connect(node.events.as_deref().context("no KV events")?, b"SUB").await?;
        peer.frame(0, &[&[1], topic.as_bytes()].concat()).await?;
        // A ping is answered after the subscription was heard.
        peer.frame(4, b"\x04PING\0\0here").await?;
        let (flags, pong) = peer.take_frame().await?;
        ensure!((flags, &pong[..]) == (4, b"\x04PONGhere"), "{flags} {pong:?}");
        Ok(peer)
    }

    async fn frame(&mut self, flags: u8, body: &[u8]) -> Result<()> {
        self.0.write_all(&[flags, u8::try_from(body.len())?]).await?;
        Ok(self.0.write_all(body).await?)
    }

    async fn take_frame(&mut self) -> Result<(u8, Vec<u8>)> {
        let taken = timeout(Duration::from_secs(30), async {
            let flags = self.0.read_u8().await?;
            let length = match flags & 2 {
                0 => self.0.read_u8().await?.into(),
                _ => self.0.read_u64().await?,
            };
            let mut body = vec![0; usize::try_from(length)?];
            self.0.read_exact(&mut body).await?;
            anyhow::Ok((flags, body))
        });
        taken.await?
    }

    async fn take(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let (flags, frame) = self.take_frame().await?;
            frames.push(frame);
            if flags & 1 == 0 {
                return Ok(frames);
            }
        }
    }

    /// Number and content of the next that is published.
    async fn event(&mut self) -> Result<(u64, Event)> {
        let frames = self.take().await?;
        let [topic, number, payload] = &frames[..] else { bail!("{} frames", frames.len()) };
        ensure!(topic == TOPIC.as_bytes());
        decoded(number, payload)
    }

    /// All from this number on that is kept.
    async fn missed(&mut self, from: u64) -> Result<Vec<(u64, Event)>> {
        self.frame(1, b"").await?;
        self.frame(0, &from.to_be_bytes()).await?;
        let mut all = Vec::new();
        loop {
            let frames = self.take().await?;
            let [empty, topic, number, payload] = &frames[..] else { bail!("{} frames", frames.len()) };
            ensure!(empty.is_empty());
            if number == &[0xff; 8] {
                ensure!(topic.is_empty() && payload.is_empty());
                return Ok(all);
            }
            ensure!(topic == TOPIC.as_bytes());
            all.push(decoded(number, payload)?);
        }
    }
}

fn decoded(number: &[u8], payload: &[u8]) -> Result<(u64, Event)> {
    let (at, mut events, rank): (f64, Vec<Event>, u32) = rmp_serde::from_slice(payload)?;
    ensure!(at > 1.6e9 && events.len() == 1 && rank == 0);
    Ok((u64::from_be_bytes(number.try_into()?), events.remove(0)))
}

const OPTIONS: [&str; 6] = [
    "--kv-events",
    "tcp://127.0.0.1:0",
    "--kv-events-replay",
    "tcp://127.0.0.1:0",
    "--kv-events-topic",
    TOPIC,
];

#[tokio::test]
async fn what_the_decoder_stores_is_published_and_can_be_asked_for_again() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &OPTIONS).await?;
    let mut follower = Peer::subscriber(&node, "kv@").await?;
    let mut elsewhere = Peer::subscriber(&node, "kv@two").await?;
    let prompt = tokens(1, 700);
    node.ask(question(&prompt)).await?;
    let ids: Vec<u32> = prompt.iter().map(|token| token.0).collect();
    let mut seen = Vec::new();
    let mut parent = None;
    for block in 0..5 {
        let (number, event) = follower.event().await?;
        let Event::BlockStored { block_hashes, parent_block_hash, token_ids, block_size, medium, lora_id } =
            &event
        else {
            bail!("{event:?}")
        };
        assert_eq!(number, block as u64);
        assert_eq!((token_ids, *block_size), (&ids[block * 128..(block + 1) * 128].to_vec(), 128));
        assert_eq!((parent_block_hash, medium.as_str(), *lora_id), (&parent, "STORAGE", None));
        parent = block_hashes.first().cloned();
        seen.push((number, event));
    }
    // The hashes are those that a lookup names.
    let namespace = node.client.describe().await?.namespace;
    let request = v1::LookupRequest { namespace, tokens: ids, want_hashes: true, ..Default::default() };
    let found = node.cache.clone().lookup(request).await?.into_inner();
    assert_eq!(found.hashes.last().map(|hash| Hash(hash.to_vec())), parent);

    let mut asking = Peer::connect(node.replay.as_deref().context("no replay")?, b"REQ").await?;
    assert_eq!(asking.missed(0).await?, seen);
    assert_eq!(asking.missed(3).await?, seen[3..]);
    assert_eq!(asking.missed(5).await?, []);
    assert_eq!(asking.missed(u64::MAX).await?, []);

    // Who comes late gets what is to come; another topic is silent.
    let mut late = Peer::subscriber(&node, "").await?;
    node.ask(question(&tokens(2, 200))).await?;
    assert_eq!((late.event().await?.0, follower.event().await?.0), (5, 5));
    let silent = timeout(Duration::from_millis(300), elsewhere.0.read_u8()).await;
    assert!(silent.is_err(), "{silent:?}");
    node.kill()
}

#[tokio::test]
async fn what_goes_is_published_with_its_reason_and_an_erasure_does_not_end_the_numbering() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let options = ["--no-model", "--segment-mib", "4", "--codec", "raw"];
    let node = Node::start(&data, &[&options[..], &OPTIONS[..]].concat()).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let mut follower = Peer::subscriber(&node, TOPIC).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 3);
    node.store(&prompt, prompt.blocks(1..=3)).await?;
    for number in 0..3 {
        assert_eq!(follower.event().await?.0, number);
    }
    let bad =
        records(&data)?.into_iter().find(|record| record.tokens == prompt.boundary(3)).context("a record")?;
    change(&bad.file, bad.planes[0].start, |byte| byte ^ 1)?;
    node.fetch_best(&prompt).await?;
    let (number, event) = follower.event().await?;
    let Event::BlockRemoved { block_hashes, medium, reason } = event else { bail!("{event:?}") };
    assert_eq!((number, block_hashes.len(), medium.as_str(), reason.as_str()), (3, 1, "STORAGE", "damaged"));

    let mut admin = AdminClient::new(node.channel.clone());
    admin.erase_tenant(v1::EraseTenantRequest { tenant: "default".into() }).await?;
    for number in 4..6 {
        let (at, event) = follower.event().await?;
        assert!(matches!(&event, Event::BlockRemoved { reason, .. } if reason == "erased"), "{event:?}");
        assert_eq!(at, number);
    }
    assert_eq!(follower.event().await?, (6, Event::AllBlocksCleared));
    node.store(&prompt, prompt.blocks(1..=2)).await?;
    for number in 7..9 {
        let (at, event) = follower.event().await?;
        assert!(matches!(event, Event::BlockStored { .. }), "{event:?}");
        assert_eq!(at, number);
    }
    let mut asking = Peer::connect(node.replay.as_deref().context("no replay")?, b"DEALER").await?;
    // Of what was stored before the erasure nothing is told any more, only that it went.
    let numbers: Vec<u64> = asking.missed(0).await?.into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, (3..9).collect::<Vec<_>>());
    node.kill()
}

#[tokio::test]
async fn events_are_shown_to_nobody_by_accident() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data").display().to_string();
    let policy = folder.path().join("policy.toml");
    std::fs::write(&policy, "[tenants.acme]\n")?;
    let policy = policy.display().to_string();
    for (more, why) in [
        (&["--kv-events", "tcp://0.0.0.0:0"][..], "refusing to publish KV events on 0.0.0.0:0"),
        (&["--kv-events", "tcp://*:0"], "refusing to publish KV events on 0.0.0.0:0"),
        (&["--kv-events", "tcp://127.0.0.1:0", "--kv-events-replay", "tcp://[::]:0"], "events on [::]:0"),
        (&["--kv-events", "tcp://127.0.0.1:0", "--policy", &policy], "--kv-events-tenant"),
        (&["--kv-events", "tcp://127.0.0.1:0", "--kv-events-tenant", "a/b"], "not the name of a tenant"),
        (&["--kv-events", "ipc:///tmp/x"], "must be tcp://IP:PORT"),
    ] {
        let args = ["serve", "--no-model", "--listen", "127.0.0.1:0", "--data", &data];
        let ended = output(args.iter().chain(more));
        assert!(!ended.status.success());
        let said = text_of(&ended.stderr);
        assert!(said.contains(why), "{said}, not {why}");
    }
    Ok(())
}
