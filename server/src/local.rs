//! The local fast path: payload bytes pass between the node and a client on its host through shared memory, and are copied once
//! after the drive's DMA. The protocol is described in `proto/esker/v1/local.proto`; here are its two sockets and the table of
//! arenas.
//!
//! ```text
//! PATH          gRPC, all services; the peer's uid says who asks (auth.rs)
//! PATH.arena    hands out arenas, one for each connection, which lives as long as the connection
//! ```
//!
//! Invariants:
//! - One arena for each client. What a client does to its arena hurts nobody else: bytes are verified in the node's own memory
//!   before they are written to an arena, and copied out of an arena before they are looked at.
//! - The node maps no arena: it reads and writes the file, so that no trick with the file becomes a signal, and no reference to
//!   memory that another process changes exists here. The file is sealed against shrinking and growing, so that none becomes a
//!   signal in an honest client either.
//! - A slot that a client holds comes back: when it is released, when its call ends, when its lease is over, when the connection
//!   ends.
//! - Arenas are bounded in number, and half of them for one tenant; each is bounded in size.

mod arena;

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use esker_proto::v1;
use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tonic::Status;

pub(crate) use arena::{Arena, Call, FetchSlot, SlotError, TakeError};

use crate::auth::Authenticator;
use crate::principal::{Principal, Role, TenantId};
use crate::tenants::exhausted;

/// Arenas of a node, 48 MiB each where all of one is used.
const MAX_ARENAS: usize = 16;
/// Between two attempts to accept, after one failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Name of an arena; unguessable.
pub(crate) type ArenaId = [u8; 16];

/// The arenas that clients hold.
pub(crate) struct Arenas {
    key: [u8; 32],
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    made: u64,
    live: HashMap<ArenaId, (TenantId, Arc<Arena>)>,
}

impl Arenas {
    /// `seed` must differ between processes and be known to nobody.
    pub(crate) fn new(seed: &[u8]) -> Self {
        let key = blake3::derive_key("esker 2026-11 arena ids v1", seed);
        Self { key, table: Mutex::default() }
    }

    /// Makes an arena for a tenant.
    pub(crate) fn make(&self, tenant: &TenantId, lease: Duration) -> Result<(ArenaId, Arc<Arena>), Status> {
        let mut table = self.table();
        let of_tenant = table.live.values().filter(|(owner, _)| owner == tenant).count();
        if table.live.len() >= MAX_ARENAS || of_tenant >= MAX_ARENAS / 2 {
            let text = format!(
                "all arenas are taken, {of_tenant} by this tenant: at most {} of one, {MAX_ARENAS} in all; \
                 close one, or fetch over gRPC",
                MAX_ARENAS / 2
            );
            return Err(exhausted(text, 1000));
        }
        let arena = Arena::new(lease).map_err(|error| {
            tracing::error!(%error, "an arena cannot be made");
            exhausted(format!("the node cannot make an arena: {error}"), 1000)
        })?;
        table.made += 1;
        let mut id = ArenaId::default();
        id.copy_from_slice(&blake3::keyed_hash(&self.key, &table.made.to_le_bytes()).as_bytes()[..16]);
        let arena = Arc::new(arena);
        table.live.insert(id, (tenant.clone(), Arc::clone(&arena)));
        Ok((id, arena))
    }

    /// An arena of this tenant. Another tenant's is as unknown as one that never was.
    pub(crate) fn get(&self, id: &[u8], tenant: &TenantId) -> Result<Arc<Arena>, Status> {
        let id = ArenaId::try_from(id).ok();
        let table = self.table();
        let found = id.and_then(|id| table.live.get(&id)).filter(|(owner, _)| owner == tenant);
        found.map(|(_, arena)| Arc::clone(arena)).ok_or_else(|| {
            Status::not_found("this arena is not known: its connection has ended, or it is not this tenant's")
        })
    }

    fn close(&self, id: &ArenaId) {
        let closed = self.table().live.remove(id);
        if let Some((_, arena)) = closed {
            arena.close();
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where local clients come, and how long they may hold what they were given.
#[derive(Clone, Debug)]
pub struct LocalSettings {
    /// The socket for calls; its path with `.arena` behind hands out shared memory.
    pub path: PathBuf,
    /// A slot that is not released within this time after it was filled ends its fetch.
    pub lease: Duration,
}

/// The two sockets, bound.
pub(crate) struct LocalSockets {
    calls: UnixListener,
    arenas: UnixListener,
    lease: Duration,
}

impl LocalSockets {
    /// Binds both. Whoever may connect is told apart by uid, so with a policy everyone may, and without one only this user.
    pub(crate) fn bind(settings: &LocalSettings, asks: bool) -> anyhow::Result<Self> {
        let mode = if asks { 0o666 } else { 0o600 };
        let LocalSettings { path, lease } = settings;
        Ok(Self { calls: bind(path, mode)?, arenas: bind(&arena_path(path), mode)?, lease: *lease })
    }
}

/// Where arenas are handed out, beside the socket for calls.
fn arena_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".arena");
    name.into()
}

fn bind(path: &Path, mode: u32) -> anyhow::Result<UnixListener> {
    // What a node left behind that was killed; one that lives is left alone.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        bail!("{} is taken: another process listens there", path.display());
    }
    if std::fs::symlink_metadata(path)
        .is_ok_and(|about| std::os::unix::fs::FileTypeExt::is_socket(&about.file_type()))
    {
        std::fs::remove_file(path).with_context(|| format!("cannot remove the old {}", path.display()))?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set who may connect to {}", path.display()))?;
    Ok(listener)
}

impl LocalSockets {
    /// Splits off the socket for calls; hands out arenas for as long as the returned task runs.
    pub(crate) fn serve(
        self,
        arenas: Arc<Arenas>,
        authenticator: Arc<Authenticator>,
    ) -> (UnixListener, tokio::task::JoinHandle<()>) {
        let Self { calls, arenas: listener, lease } = self;
        let task = tokio::spawn(async move {
            let mut clients = tokio::task::JoinSet::new();
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    Some(_) = clients.join_next() => continue,
                };
                match accepted {
                    Ok((stream, _)) => {
                        let (arenas, authenticator) = (Arc::clone(&arenas), Arc::clone(&authenticator));
                        clients.spawn(async move { attend(stream, &arenas, lease, &authenticator).await });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a local client could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        });
        (calls, task)
    }
}

/// Gives one client its arena, and takes it back when the connection ends, however that happens.
async fn attend(mut stream: UnixStream, arenas: &Arenas, lease: Duration, authenticator: &Authenticator) {
    let made = principal(&stream, authenticator).and_then(|principal| arenas.make(&principal.tenant, lease));
    let (id, arena) = match made {
        Ok(made) => made,
        Err(status) => {
            let refused = v1::Attached { refused: status.message().to_owned(), ..Default::default() };
            // Who has left by now needs no reason.
            let _ = send(&stream, &refused, None).await;
            return;
        }
    };
    let _closing = Closing { arenas, id };
    let sent = send(&stream, &arena.describe(Bytes::copy_from_slice(&id)), Some(&arena)).await;
    if sent.is_ok() {
        // Nothing is to come; whatever does come ends the connection.
        let _ = stream.read_u8().await;
    }
}

/// Takes an arena back when it goes, also with the whole task.
struct Closing<'a> {
    arenas: &'a Arenas,
    id: ArenaId,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.arenas.close(&self.id);
    }
}

fn principal(stream: &UnixStream, authenticator: &Authenticator) -> Result<Principal, Status> {
    let peer = stream.peer_cred();
    let peer =
        peer.map_err(|error| Status::unauthenticated(format!("the peer's uid cannot be told: {error}")))?;
    let principal = authenticator.local(peer.uid())?;
    if !principal.roles.has_any(&[Role::Reader, Role::Writer, Role::Publisher]) {
        return Err(Status::permission_denied("an arena needs one of the roles reader, writer, publisher"));
    }
    Ok(principal)
}

/// Sends one frame, with the arena's descriptor beside its first byte.
async fn send(stream: &UnixStream, message: &v1::Attached, arena: Option<&Arena>) -> std::io::Result<()> {
    let len = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
    let mut frame = len.to_le_bytes().to_vec();
    frame.extend(message.encode_to_vec());
    let mut from = 0;
    while from < frame.len() {
        from += stream
            .async_io(Interest::WRITABLE, || {
                let descriptors: Vec<_> =
                    arena.filter(|_| from == 0).map(|arena| arena.file().as_fd()).into_iter().collect();
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&descriptors));
                }
                let bytes = [IoSlice::new(&frame[from..])];
                Ok(sendmsg(stream, &bytes, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
            })
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_known_to_its_tenant_only_and_nobody_takes_them_all() {
        let arenas = Arenas::new(b"seed");
        let (a, b) = (TenantId("a".into()), TenantId("b".into()));
        let make = |tenant| arenas.make(tenant, Duration::from_secs(1));
        let (id, _) = make(&a).unwrap();
        assert!(arenas.get(&id, &a).is_ok());
        let stranger = arenas.get(&id, &b).err().unwrap();
        let nobody = arenas.get(&[0; 16], &a).err().unwrap();
        assert_eq!((stranger.code(), stranger.message()), (nobody.code(), nobody.message()));
        assert_eq!(arenas.get(&[0; 3], &a).err().unwrap().code(), nobody.code());
        let more = (0..MAX_ARENAS).filter(|_| make(&a).is_ok()).count();
        assert_eq!(more, MAX_ARENAS / 2 - 1);
        assert!(make(&b).is_ok());
        arenas.close(&id);
        assert!(arenas.get(&id, &a).is_err() && make(&a).is_ok());
    }
}
