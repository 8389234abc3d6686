//! vLLM's publisher of KV events: a socket that publishes, and one that is asked for what was missed.
//!
//! Whoever follows a vLLM engine follows a node by the same code. A message is `[topic, number, payload]` with one event in its
//! payload; numbers have no gaps but where something was lost. A follower that is slow reads the log later than others, and has a
//! gap where the log let events go; it then asks for `[b"", number]`, and gets `[b"", topic, number, payload]` for each event from
//! that number on that is kept, and `[b"", b"", -1, b""]`.
//!
//! ZeroMQ as vLLM uses it neither hides what passes nor asks who calls. So these sockets show the private scope of one tenant,
//! which the operator names, and listen beyond loopback only with `--insecure`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use esker_proto::v1;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::feed::Feed;
use super::message::payload;
use super::zmtp::{self, Kind, Reader, Said, Writer};
use crate::node::Node;
use crate::principal::{Principal, Roles, TenantId};

/// Connections of a socket at a time; more wait in the system's queue.
const MAX_CONNECTIONS: usize = 64;
/// Subscriptions of a connection that cover the topic.
const MAX_SUBSCRIPTIONS: usize = 64;
/// Bytes that the system keeps for a peer which does not take them.
const SEND_BUFFER: usize = 256 << 10;
/// Events read from the log at a time.
const MAX_BATCH: usize = 64;
/// Signs of life that a peer may have asked for and not got yet.
const MAX_PONGS: usize = 4;
/// After a failed accept, such as one for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Number of the message that ends a replay: -1.
const END: [u8; 8] = [0xff; 8];

/// Where events are published, and whose.
#[derive(Clone, Debug)]
pub struct PublisherSettings {
    /// Address of the socket that publishes; port 0 takes a free one.
    pub address: SocketAddr,
    /// Address of the socket for what was missed.
    pub replay: Option<SocketAddr>,
    /// First frame of each message.
    pub topic: String,
    /// Whose events.
    pub tenant: TenantId,
}

/// Bound sockets.
pub(crate) struct Publisher {
    /// Where the one that publishes is.
    pub(crate) address: SocketAddr,
    /// Where the one for what was missed is.
    pub(crate) replay: Option<SocketAddr>,
    listeners: Vec<(Kind, TcpListener)>,
    shared: Arc<Shared>,
}

struct Shared {
    feed: Feed,
    topic: Vec<u8>,
}

impl Publisher {
    /// Binds the sockets of a node.
    pub(crate) async fn bind(settings: &PublisherSettings, node: &Arc<Node>) -> anyhow::Result<Self> {
        let (of, tenant) = (Arc::clone(node), settings.tenant.clone());
        let scope = move || {
            let name = "kv events".to_owned();
            let principal = Principal { tenant: tenant.clone(), name, roles: Roles::default() };
            Some(of.tenants.followed(&principal, "", v1::Scope::Private).ok()?.tag())
        };
        let feed = Feed::new(Arc::clone(&node.events), scope).context("the tenant has no scope to follow")?;
        Self::of(feed, settings).await
    }

    async fn of(feed: Feed, settings: &PublisherSettings) -> anyhow::Result<Self> {
        let mut listeners = Vec::new();
        let bound = [(Kind::Publisher, Some(settings.address)), (Kind::Router, settings.replay)];
        for (kind, address) in bound.into_iter().filter_map(|(kind, address)| Some((kind, address?))) {
            let listener = TcpListener::bind(address).await;
            listeners.push((kind, listener.with_context(|| format!("cannot listen on {address}"))?));
        }
        let addresses = listeners.iter().map(|(_, listener)| listener.local_addr());
        let addresses: Vec<SocketAddr> =
            addresses.collect::<io::Result<_>>().context("cannot tell the listening address")?;
        Ok(Self {
            address: addresses[0],
            replay: addresses.get(1).copied(),
            listeners,
            shared: Arc::new(Shared { feed, topic: settings.topic.clone().into_bytes() }),
        })
    }

    /// Serves for ever.
    pub(crate) async fn serve(self) {
        let mut sockets = JoinSet::new();
        for (kind, listener) in self.listeners {
            sockets.spawn(listen(kind, listener, Arc::clone(&self.shared)));
        }
        while sockets.join_next().await.is_some() {}
    }
}

async fn listen(kind: Kind, listener: TcpListener, shared: Arc<Shared>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // They end with this task.
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            accepted = next => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, peer)) => {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let _slot = slot;
                    // Errors of a connection are its peer's: gone, slow, or of another protocol.
                    if let Err(error) = connection(kind, stream, &shared).await {
                        tracing::debug!(%error, %peer, "a follower of KV events is gone");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a follower of KV events could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(kind: Kind, stream: TcpStream, shared: &Shared) -> io::Result<()> {
    // A peer that vanished without a word would keep its place for ever.
    rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
    rustix::net::sockopt::set_tcp_keepidle(&stream, Duration::from_secs(60))?;
    rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
    let (reader, writer) = zmtp::accept(stream, kind).await?;
    match kind {
        Kind::Router => answer(reader, writer, shared).await,
        Kind::Publisher => {
            let (wanted, wants) = watch::channel(None);
            let (pings, pongs) = mpsc::channel(MAX_PONGS);
            tokio::try_join!(
                subscriptions(reader, shared, wanted, pings),
                publish(writer, shared, wants, pongs)
            )
            .map(|_| ())
        }
    }
}

/// Hears what a subscriber wants: events from that number on, or none.
async fn subscriptions(
    mut reader: Reader,
    shared: &Shared,
    wanted: watch::Sender<Option<u64>>,
    pings: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let mut prefixes: Vec<Vec<u8>> = Vec::new();
    loop {
        match reader.next().await? {
            Said::Subscribe(prefix) if shared.topic.starts_with(&prefix) => {
                if prefixes.is_empty() {
                    wanted.send_replace(Some(shared.feed.next()));
                }
                prefixes.push(prefix);
                if prefixes.len() > MAX_SUBSCRIPTIONS {
                    return Err(io::Error::other("a follower subscribes without end"));
                }
            }
            Said::Cancel(prefix) => {
                if let Some(at) = prefixes.iter().position(|known| *known == prefix) {
                    prefixes.swap_remove(at);
                    if prefixes.is_empty() {
                        wanted.send_replace(None);
                    }
                }
            }
            // Who asks faster than it takes answers gets fewer.
            Said::Ping(context) => drop(pings.try_send(context)),
            Said::Subscribe(_) | Said::Message(_) => {}
        }
    }
}

/// Sends a subscriber what it wants, as it comes.
async fn publish(
    mut writer: Writer,
    shared: &Shared,
    mut wants: watch::Receiver<Option<u64>>,
    mut pongs: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    let mut grew = shared.feed.grew();
    let mut from = None;
    loop {
        grew.mark_unchanged();
        if wants.has_changed().unwrap_or(false) {
            from = *wants.borrow_and_update();
        }
        if let Some(next) = &mut from
            && send(&mut writer, shared, next, &[]).await?
        {
            writer.flush().await?;
            continue;
        }
        tokio::select! {
            // The senders live as long as this does.
            _ = grew.changed(), if from.is_some() => {}
            _ = wants.changed() => wants.mark_changed(),
            Some(context) = pongs.recv() => {
                writer.pong(&context).await?;
                writer.flush().await?;
            }
        }
    }
}

/// Answers those who missed something.
async fn answer(mut reader: Reader, mut writer: Writer, shared: &Shared) -> io::Result<()> {
    loop {
        match reader.next().await? {
            Said::Message(frames) => {
                let [empty, number] = &frames[..] else { continue };
                let Some(number) =
                    number.first_chunk::<8>().filter(|_| empty.is_empty() && number.len() == 8)
                else {
                    continue;
                };
                let mut next = u64::from_be_bytes(*number);
                // What comes while this is sent is published, and need not be sent here.
                let end = shared.feed.next();
                while next < end && send(&mut writer, shared, &mut next, &[b""]).await? {}
                writer.message(&[b"", b"", &END, b""]).await?;
                writer.flush().await?;
            }
            Said::Ping(context) => {
                writer.pong(&context).await?;
                writer.flush().await?;
            }
            Said::Subscribe(_) | Said::Cancel(_) => {}
        }
    }
}

/// Sends some events from number `next` on, each behind these frames, and moves it on; false if there are none.
async fn send(writer: &mut Writer, shared: &Shared, next: &mut u64, before: &[&[u8]]) -> io::Result<bool> {
    let (first, events) = shared.feed.read(*next, MAX_BATCH);
    for (number, event) in (first..).zip(&events) {
        let (number, payload) = (number.to_be_bytes(), payload(event).map_err(io::Error::other)?);
        let mut frames = before.to_vec();
        frames.extend_from_slice(&[&shared.topic, &number, &payload]);
        writer.message(&frames).await?;
    }
    *next = first + events.len() as u64;
    Ok(!events.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::tests::change;
    use crate::events::zmtp::tests::subscriber;
    use crate::events::{Events, MAX_SCOPE_EVENTS};
    use esker_prefix::ScopeTag;
    use esker_store::Observer;
    use std::time::Instant;

    /// Number of the next event of this follower.
    async fn number(follower: &mut Reader) -> u64 {
        let said = tokio::time::timeout(Duration::from_secs(20), follower.next()).await.unwrap().unwrap();
        let Said::Message(frames) = said else { panic!("{said:?}") };
        u64::from_be_bytes(frames[1][..].try_into().unwrap())
    }

    #[tokio::test]
    async fn a_follower_that_takes_nothing_holds_nobody_up_and_sees_a_gap() {
        let events = Arc::new(Events::default());
        let feed = Feed::new(Arc::clone(&events), || Some(ScopeTag([1; 16]))).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let (topic, tenant) = ("kv".into(), TenantId("default".into()));
        let settings = PublisherSettings { address, replay: None, topic, tenant };
        let publisher = Publisher::of(feed, &settings).await.unwrap();
        let address = publisher.address;
        let serving = tokio::spawn(publisher.serve());
        let (mut follower, mut stalled) = (subscriber(address).await, subscriber(address).await);

        // More than the log keeps and the buffers of a connection take.
        let count = 4 * MAX_SCOPE_EVENTS as u64;
        let mut longest = Duration::ZERO;
        for batch in 0..count / 64 {
            let changes = (0..64).map(|at| change(1, batch * 64 + at, None)).collect();
            let start = Instant::now();
            events.changed(changes);
            longest = longest.max(start.elapsed());
            for at in 0..64 {
                assert_eq!(
                    number(&mut follower).await,
                    batch * 64 + at,
                    "a gap for one who takes what comes"
                );
            }
        }
        assert!(longest < Duration::from_secs(1), "the store was held up for {longest:?}");

        let (mut lost, mut next) = (0, 0);
        while next < count {
            let number = number(&mut stalled).await;
            lost += number - next;
            next = number + 1;
        }
        // Not all, since it has some of the first; not none, or this test shows nothing.
        assert!(lost > 0 && lost < count - MAX_SCOPE_EVENTS as u64, "{lost} of {count} lost");
        serving.abort();
    }
}
