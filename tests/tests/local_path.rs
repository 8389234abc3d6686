//! Promise: through shared memory come the same verified bytes as over the network, and a client that dies, scribbles, lies or
//! lets nothing go hurts nobody but itself.

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use esker_client::{LocalClient, LocalEvent, v1};
use esker_prefix::ObjectKind;
use esker_tests::{Node, Prompt, flat_layout, output, scratch, staged_layout, text_of};
use prost::Message;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use v1::fetch_local_reply::Event as Fetching;
use v1::fetch_local_request::Step as FetchStep;
use v1::local_client::LocalClient as Calls;
use v1::put_local_request::Step as PutStep;

/// An arena as a client has it that follows no rule.
struct Raw {
    attached: v1::Attached,
    memory: File,
    calls: Calls<Channel>,
    connection: UnixStream,
}

impl Raw {
    async fn attach(path: &Path) -> Result<Self> {
        let (attached, memory, connection) = attach(path)?;
        ensure!(attached.refused.is_empty(), "{}", attached.refused);
        let memory = memory.context("an arena comes with a descriptor")?;
        let channel = Endpoint::from_shared(format!("unix://{}", path.display()))?.connect().await?;
        Ok(Self { attached, memory, calls: Calls::new(channel), connection })
    }

    /// Starts a fetch of the best resume point.
    async fn fetch(
        &self,
        node: &Node,
        prompt: &Prompt,
    ) -> Result<(Requests, Streaming<v1::FetchLocalReply>)> {
        let grant = node.lookup(prompt).await?.grant;
        Ok(self.fetch_with(self.attached.arena.clone(), grant).await?)
    }

    async fn fetch_with(
        &self,
        arena: Bytes,
        grant: Bytes,
    ) -> Result<(Requests, Streaming<v1::FetchLocalReply>), Status> {
        let (requests, queue) = mpsc::channel(64);
        let fetch = Some(v1::FetchRequest { grant, ..Default::default() });
        let start = FetchStep::Start(v1::FetchLocalStart { arena, fetch, together: false });
        let _ = requests.send(v1::FetchLocalRequest { step: Some(start) }).await;
        let replies = self.calls.clone().fetch_local(ReceiverStream::new(queue)).await?;
        Ok((Requests(requests), replies.into_inner()))
    }

    fn stamp(&self, slot: u32) -> Result<u64> {
        let mut stamp = [0; 8];
        self.memory.read_exact_at(&mut stamp, u64::from(slot) * 8)?;
        Ok(u64::from_le_bytes(stamp))
    }

    fn scribble(&self, byte: u8) -> Result<()> {
        let all = vec![byte; usize::try_from(self.attached.arena_bytes)?];
        Ok(self.memory.write_all_at(&all, 0)?)
    }
}

struct Requests(mpsc::Sender<v1::FetchLocalRequest>);

impl Requests {
    async fn release(&self, slots: Vec<u32>) {
        let step = Some(FetchStep::Release(v1::ReleaseSlots { slots }));
        let _ = self.0.send(v1::FetchLocalRequest { step }).await;
    }
}

/// What the arena socket sends.
fn attach(path: &Path) -> Result<(v1::Attached, Option<File>, UnixStream)> {
    let mut connection = UnixStream::connect(format!("{}.arena", path.display()))?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut len = [0; 4];
    let got = recvmsg(&connection, &mut [IoSliceMut::new(&mut len)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    ensure!(got.bytes == 4, "the length comes whole");
    let mut memory = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            memory = descriptors.map(File::from).next();
        }
    }
    let mut frame = vec![0; u32::from_le_bytes(len) as usize];
    connection.read_exact(&mut frame)?;
    Ok((v1::Attached::decode(&frame[..])?, memory, connection))
}

async fn node(folder: &Path, options: &[&str]) -> Result<(Node, PathBuf)> {
    let path = folder.join("local");
    let mut all =
        vec!["--no-model", "--segment-mib", "64", "--local", path.to_str().context("a path of text")?];
    all.extend(options);
    Ok((Node::start(&folder.join("data"), &all).await?, path))
}

/// The beginning of a put of a prompt.
fn prefix_of(prompt: &Prompt) -> v1::PutPrefix {
    v1::PutPrefix {
        namespace: Bytes::copy_from_slice(prompt.namespace.as_bytes()),
        tokens: prompt.tokens.iter().map(|token| token.0).collect(),
        ..Default::default()
    }
}

/// Everything of a prompt, fetched through the arena and compared with what its writer put.
async fn fetch_all(node: &Node, local: &LocalClient, prompt: &Prompt) -> Result<v1::FetchDone> {
    let grant = node.lookup(prompt).await?.grant;
    let mut fetch = local.fetch(v1::FetchRequest { grant, ..Default::default() }).await?;
    let (mut plane, mut last) = (Vec::new(), None);
    while let Some(event) = fetch.next().await? {
        match event {
            LocalEvent::Filled(filled) => {
                for part in filled.parts() {
                    ensure!(part.offset == plane.len() as u64 && part.at % 64 == 0, "parts are in order");
                    plane.extend_from_slice(&filled.read(part)?);
                    if plane.len() as u64 == part.plane_bytes {
                        let kind = match part.kind() {
                            v1::ObjectKind::State => ObjectKind::State,
                            _ => ObjectKind::Block,
                        };
                        let right = prompt.plane(kind, part.tokens, part.plane as usize);
                        ensure!(right == plane, "plane {} at {} tokens is wrong", part.plane, part.tokens);
                        plane.clear();
                    }
                }
            }
            LocalEvent::Missing(missing) => anyhow::bail!("{missing:?}"),
            LocalEvent::Done(done) => last = Some(done),
        }
    }
    ensure!(plane.is_empty(), "a plane has no end");
    last.context("the fetch ended without its account")
}

#[tokio::test]
async fn the_same_bytes_come_through_shared_memory() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &[]).await?;
    let local = LocalClient::attach(&path).await?;
    for (layout, seed, blocks) in [(staged_layout(), 1, 40_u32), (flat_layout(), 2, 400)] {
        let namespace = node.register(&layout, u8::try_from(seed)?).await?;
        let prompt = Prompt::new(namespace, &layout, seed, blocks);
        let mut objects = prompt.blocks(1..=blocks.into());
        if layout.has_states() {
            objects.push(prompt.state(blocks.into()));
        }
        let count = objects.len();
        let bytes: usize = objects.iter().flat_map(|object| &object.planes).map(Bytes::len).sum();
        let prefix = prefix_of(&prompt);
        let results = local.put(prefix.clone(), objects.clone()).await?;
        assert_eq!(results.len(), count);
        assert!(results.iter().all(|result| result.outcome() == v1::Outcome::Stored), "{results:?}");
        // The same objects once more, and over the network: they are the same bytes.
        let again = local.put(prefix, objects.clone()).await?;
        assert!(again.iter().all(|result| result.outcome() == v1::Outcome::Present), "{again:?}");
        node.store(&prompt, objects).await?;
        let done = fetch_all(&node, &local, &prompt).await?;
        assert_eq!((done.bytes, done.usable_tokens), (bytes as u64, prompt.boundary(blocks.into())));
        let over_grpc = node.fetch_best(&prompt).await?;
        assert_eq!((over_grpc.done, over_grpc.wrong_planes(&prompt)), (done, 0));
    }
    // Everything else works over the same socket.
    assert!(local.client().describe().await.is_err_and(|error| error.code() == Some(Code::Unimplemented)));
    node.kill()
}

#[tokio::test]
async fn whoever_scribbles_and_dies_spoils_only_its_own_arena() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &[]).await?;
    let layout = flat_layout();
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 7, 300);
    node.store(&prompt, prompt.blocks(1..=300)).await?;
    let honest = LocalClient::attach(&path).await?;
    // More of them than there are arenas, one after another.
    for round in 0..20 {
        let raw = Raw::attach(&path).await?;
        let (_requests, mut replies) = raw.fetch(&node, &prompt).await?;
        raw.scribble(round)?;
        assert!(matches!(replies.message().await?.and_then(|reply| reply.event), Some(Fetching::Filled(_))));
        raw.scribble(0xff)?;
        assert!(raw.memory.set_len(0).is_err(), "the arena is sealed against shrinking");
        // It goes with slots in its hands, over calls that still run.
        drop(raw.connection);
        let ended = loop {
            match replies.message().await {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(status) => break Some(status.code()),
            }
        };
        assert_eq!(ended, Some(Code::Aborted));
        if round % 10 == 0 {
            fetch_all(&node, &honest, &prompt).await?;
        }
    }
    // Nothing of it reached the store: no record was blamed.
    let fetched = node.fetch_best(&prompt).await?;
    fetched.expect_blocks(&prompt, 300);
    node.kill()
}

#[tokio::test]
async fn whoever_lets_nothing_go_is_let_go() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &["--local-lease-s", "4"]).await?;
    let layout = flat_layout();
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 7, 300);
    node.store(&prompt, prompt.blocks(1..=300)).await?;
    let raw = Raw::attach(&path).await?;
    let (requests, mut replies) = raw.fetch(&node, &prompt).await?;
    let started = Instant::now();
    let mut filled = Vec::new();
    let ended = loop {
        match replies.message().await {
            Ok(Some(reply)) => match reply.event {
                Some(Fetching::Filled(slot)) => filled.push(slot),
                event => anyhow::bail!("{event:?} although nothing was released"),
            },
            Ok(None) => anyhow::bail!("the fetch ended well"),
            Err(status) => break status,
        }
        // Another client of the node goes on.
        if filled.len() == 1 {
            fetch_all(&node, &LocalClient::attach(&path).await?, &prompt).await?;
        }
    };
    assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended}");
    assert_eq!(filled.len(), raw.attached.slots as usize);
    assert!(started.elapsed() < Duration::from_secs(60));
    // The slots are there for the next fetch, and whoever still reads the old ones finds out.
    drop(requests);
    let (requests, mut replies) = raw.fetch(&node, &prompt).await?;
    let mut reused = 0;
    while let Some(reply) = replies.message().await? {
        if let Some(Fetching::Filled(slot)) = reply.event {
            let old = filled.iter().find(|old| old.slot == slot.slot).context("a slot of the arena")?;
            assert_eq!(raw.stamp(slot.slot)?, slot.stamp);
            assert_ne!(old.stamp, slot.stamp);
            requests.release(vec![slot.slot]).await;
            reused += 1;
        }
    }
    assert!(reused > filled.len(), "{reused}");
    node.kill()
}

#[tokio::test]
async fn lies_are_named_and_end_only_their_call() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &[]).await?;
    let layout = flat_layout();
    let prompt = Prompt::new(node.register(&layout, 1).await?, &layout, 7, 60);
    node.store(&prompt, prompt.blocks(1..=60)).await?;
    let raw = Raw::attach(&path).await?;
    let end = async |mut replies: Streaming<v1::FetchLocalReply>| loop {
        match replies.message().await {
            Ok(Some(_)) => {}
            Ok(None) => break None,
            Err(status) => break Some(status.code()),
        }
    };
    // Slots that it does not hold.
    for slot in [15, 16, u32::MAX] {
        let (requests, replies) = raw.fetch(&node, &prompt).await?;
        requests.release(vec![slot]).await;
        assert_eq!(end(replies).await, Some(Code::InvalidArgument), "slot {slot}");
    }
    // Its side closed while it holds slots: the call ends.
    let (requests, replies) = raw.fetch(&node, &prompt).await?;
    drop(requests);
    let _ = end(replies).await;
    // Arenas and grants that are not there.
    let grant = node.lookup(&prompt).await?.grant;
    for (arena, grant) in [
        (Bytes::from_static(&[0; 16]), grant.clone()),
        (Bytes::new(), grant),
        (raw.attached.arena.clone(), Bytes::from_static(&[0; 16])),
    ] {
        assert_eq!(raw.fetch_with(arena, grant).await.err().map(|s| s.code()), Some(Code::NotFound));
    }
    // Objects that lie elsewhere, or are of another length, or too many at a time.
    let (bytes, put_at, end_at) =
        (layout.object_bytes(ObjectKind::Block), raw.attached.put_at, raw.attached.arena_bytes);
    for (at, bytes, count) in [
        (0, bytes, 1),
        (put_at - 1, bytes, 1),
        (end_at - bytes + 1, bytes, 1),
        (u64::MAX - 5, bytes, 1),
        (put_at, bytes - 1, 1),
        (put_at, 0, 1),
        (put_at, u64::MAX, 1),
        (put_at, bytes, 1025),
    ] {
        let prefix = prefix_of(&prompt);
        let start =
            v1::PutLocalStart { arena: raw.attached.arena.clone(), prefix: Some(prefix), together: false };
        let object =
            v1::LocalObject { kind: v1::ObjectKind::Block.into(), tokens: prompt.boundary(1), at, bytes };
        let objects = vec![object; count];
        let steps = [PutStep::Start(start), PutStep::Objects(v1::LocalObjects { objects })];
        let steps = steps.map(|step| v1::PutLocalRequest { step: Some(step) });
        let mut replies = raw.calls.clone().put_local(tokio_stream::iter(steps)).await?.into_inner();
        let refused = loop {
            match replies.message().await {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(status) => break Some(status.code()),
            }
        };
        assert_eq!(refused, Some(Code::InvalidArgument), "{count} of {bytes} bytes at {at}");
    }
    fetch_all(&node, &LocalClient::attach(&path).await?, &prompt).await?;
    node.kill()
}

#[tokio::test]
async fn what_an_arena_held_that_is_gone_is_not_stored() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &[]).await?;
    let prompt = Prompt::new(node.register(&flat_layout(), 7).await?, &flat_layout(), 5, 1);
    let raw = Raw::attach(&path).await?;
    let object = prompt.blocks([1]).remove(0);
    let (at, mut end) = (raw.attached.put_at, raw.attached.put_at);
    for plane in &object.planes {
        raw.memory.write_all_at(plane, end)?;
        end += plane.len() as u64;
    }
    let prefix = prefix_of(&prompt);
    let start =
        v1::PutLocalStart { arena: raw.attached.arena.clone(), prefix: Some(prefix), together: false };
    let (steps, queue) = mpsc::channel(4);
    steps.send(v1::PutLocalRequest { step: Some(PutStep::Start(start)) }).await?;
    let mut replies = raw.calls.clone().put_local(ReceiverStream::new(queue)).await?.into_inner();
    drop(raw.connection);
    // The node gives the memory back: from here on it is zeros that lie there.
    let mut first = [1; 16];
    let until = Instant::now() + Duration::from_secs(10);
    while first != [0; 16] {
        ensure!(Instant::now() < until, "the arena outlives its connection");
        tokio::time::sleep(Duration::from_millis(5)).await;
        raw.memory.read_exact_at(&mut first, at)?;
    }
    let kind = v1::ObjectKind::Block.into();
    let announced = v1::LocalObject { kind, tokens: prompt.boundary(1), at, bytes: end - at };
    steps.send(v1::PutLocalRequest { step: Some(PutStep::Object(announced)) }).await?;
    drop(steps);
    let refused = replies.message().await.err().map(|status| status.code());
    assert_eq!(refused, Some(Code::Aborted));
    assert_eq!(node.lookup(&prompt).await?.history_tokens, 0);
    node.kill()
}

#[tokio::test]
async fn puts_of_one_client_wait_for_each_other_and_a_dropped_one_leaves_no_room() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &[]).await?;
    let local = LocalClient::attach(&path).await?;
    let namespace = node.register(&flat_layout(), 7).await?;
    let prompts: Vec<Prompt> = (0..4).map(|seed| Prompt::new(namespace, &flat_layout(), seed, 20)).collect();
    let put = |prompt: &Prompt| local.put(prefix_of(prompt), prompt.blocks(1..=20));
    let (one, two, three) = tokio::join!(put(&prompts[0]), put(&prompts[1]), put(&prompts[2]));
    for (prompt, results) in prompts.iter().zip([one?, two?, three?]) {
        ensure!(results.len() == 20, "{results:?}");
        fetch_all(&node, &local, prompt).await?;
    }
    let given_up = tokio::time::timeout(Duration::from_millis(1), put(&prompts[3])).await;
    ensure!(given_up.is_err(), "it was over already");
    let refused = put(&prompts[3]).await.err().context("the area may still be read")?;
    ensure!(refused.to_string().contains("attach again"), "{refused}");
    node.kill()
}

#[tokio::test]
async fn the_policy_says_which_user_is_whom() -> Result<()> {
    let folder = scratch();
    let policy = folder.path().join("policy.toml");
    let own = std::fs::metadata(folder.path())?.uid();
    let text = |uid: u32| {
        format!(
            "[tenants.acme]\n[tenants.acme.service_accounts]\nengine = [\"reader\", \"writer\"]\n\
             [tenants.acme.local_uids]\nengine = [{uid}]\n"
        )
    };
    std::fs::write(&policy, text(own + 1))?;
    let path = folder.path().join("local");
    let options = [
        "--no-model",
        "--local",
        path.to_str().context("text")?,
        "--policy",
        policy.to_str().context("text")?,
    ];
    let node = Node::start(&folder.path().join("data"), &options).await?;
    let (refused, memory, _) = attach(&path)?;
    assert!(refused.refused.contains(&format!("uid {own}")) && memory.is_none(), "{refused:?}");
    let layout = flat_layout();
    let channel = Endpoint::from_shared(format!("unix://{}", path.display()))?.connect().await?;
    let client = esker_client::Client::over(channel);
    let namespace = esker_prefix::Namespace {
        weights: [1; 32],
        tokenizer: [2; 32],
        layout: layout.id(),
        adapter: String::new(),
    };
    let denied = client.register_namespace(&namespace, &layout).await.err().and_then(|error| error.code());
    assert_eq!(denied, Some(Code::Unauthenticated));
    // Taken up without a restart.
    std::fs::write(&policy, text(own))?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    client.register_namespace(&namespace, &layout).await?;
    let local = LocalClient::attach(&path).await?;
    local.client().register_namespace(&namespace, &layout).await?;
    node.kill()
}

#[tokio::test]
async fn a_socket_that_was_left_behind_is_taken_over_and_a_live_one_is_not() -> Result<()> {
    let folder = scratch();
    let (node, path) = node(folder.path(), &[]).await?;
    let data = folder.path().join("other");
    let args = [
        "serve",
        "--no-model",
        "--listen",
        "127.0.0.1:0",
        "--local",
        path.to_str().context("text")?,
        "--data",
    ];
    let refused = output(args.iter().map(std::ffi::OsStr::new).chain([data.as_os_str()]));
    let text = text_of(&refused.stderr);
    assert!(!refused.status.success() && text.contains("another process listens there"), "{text}");
    node.kill()?;
    let (node, path) = self::node(folder.path(), &[]).await?;
    LocalClient::attach(&path).await?;
    node.kill()
}
