//! The local fast path: fetches and puts through memory shared with a node on this host. The rules are in
//! `proto/esker/v1/local.proto`.

pub(crate) mod arena;

use std::collections::VecDeque;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use esker_proto::{MAX_MESSAGE_BYTES, WireError, v1};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;
use v1::local_client::LocalClient as Calls;

use crate::{Client, ClientError, Object, PutResult, Result, tuned};
use arena::Arena;

/// Messages of a call that wait to be sent: never more than there are slots, and one.
const REQUESTS: usize = 1024;

/// A client on the node's host, with an arena of its own.
pub struct LocalClient {
    client: Client,
    calls: Calls<tonic::transport::Channel>,
    arena: Arc<Arena>,
    /// One put at a time has the put area. Whether the node may still read what one has left there that was given up.
    unread: Mutex<bool>,
}

impl LocalClient {
    /// Attaches to the node that serves `--local PATH`.
    pub async fn attach(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let fail = |source| ClientError::Connect { address: name.clone(), source };
        let endpoint = Endpoint::from_shared(format!("unix://{name}")).map_err(fail)?;
        let channel = tuned(endpoint).connect().await.map_err(fail)?;
        let path = path.to_owned();
        let attached = tokio::task::spawn_blocking(move || Arena::attach(&path)).await;
        let arena = attached.map_err(|error| ClientError::Arena(std::io::Error::other(error)))??;
        let calls = Calls::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let unread = Mutex::new(false);
        Ok(Self { client: Client::over(channel), calls, arena: Arc::new(arena), unread })
    }

    /// The same node over the same socket, for everything else.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Starts a fetch of a granted prefix.
    pub async fn fetch(&self, fetch: v1::FetchRequest) -> Result<LocalFetch> {
        use v1::fetch_local_request::Step;
        let (requests, queue) = mpsc::channel(REQUESTS);
        let start = v1::FetchLocalStart { arena: self.arena.id(), fetch: Some(fetch), together: true };
        let _ = requests.try_send(v1::FetchLocalRequest { step: Some(Step::Start(start)) });
        let replies = self.calls.clone().fetch_local(ReceiverStream::new(queue)).await?.into_inner();
        Ok(LocalFetch {
            arena: Arc::clone(&self.arena),
            replies,
            requests: Some(requests),
            several: VecDeque::new(),
        })
    }

    /// Stores objects of a prefix, parents first. One result per object: a refusal is a result too. Puts of one client wait for each
    /// other; once one was dropped before its end, or broke off with its connection, [`ClientError::PutGivenUp`] is what the
    /// next ones come to.
    pub async fn put(&self, prefix: v1::PutPrefix, objects: Vec<Object>) -> Result<Vec<PutResult>> {
        let mut unread = self.unread.lock().await;
        if std::mem::replace(&mut *unread, true) {
            return Err(ClientError::PutGivenUp);
        }
        let results = self.put_alone(prefix, objects).await;
        // The node's own refusal comes behind the last that it reads.
        *unread = match &results {
            Err(ClientError::Refused(status)) => status.source().is_some(),
            Err(ClientError::Protocol(WireError::TooLarge { .. })) | Ok(_) => false,
            Err(_) => true,
        };
        results
    }

    async fn put_alone(&self, prefix: v1::PutPrefix, objects: Vec<Object>) -> Result<Vec<PutResult>> {
        use v1::put_local_reply::Event;
        use v1::put_local_request::Step;
        let (requests, queue) = mpsc::channel(REQUESTS);
        let send = |step| {
            let requests = requests.clone();
            // A put that has ended says why in its replies.
            async move { requests.send(v1::PutLocalRequest { step: Some(step) }).await.is_ok() }
        };
        let start = v1::PutLocalStart { arena: self.arena.id(), prefix: Some(prefix), together: true };
        send(Step::Start(start)).await;
        let mut replies = self.calls.clone().put_local(ReceiverStream::new(queue)).await?.into_inner();
        let (mut results, mut taken, mut sent) = (Vec::new(), 0, 0);
        let mut place = self.arena.put_area();
        for object in objects {
            let bytes = object.planes.iter().map(|plane| plane.len() as u64).sum();
            if place.end - place.start < bytes {
                // All that was sent is waited for, and the area is filled from its start again.
                while taken < sent {
                    match replies.message().await?.and_then(|reply| reply.event) {
                        Some(Event::Taken(count)) => taken = taken.max(count),
                        Some(event) => {
                            results.extend(results_of(event));
                            taken = taken.max(results.len() as u64);
                        }
                        None => return Ok(results),
                    }
                }
                place = self.arena.put_area();
                if place.end - place.start < bytes {
                    let (limit, got) = (place.end - place.start, bytes);
                    let narrow = |value| usize::try_from(value).unwrap_or(usize::MAX);
                    let (field, unit) = ("an object put through the arena", "bytes");
                    return Err(
                        WireError::TooLarge { field, unit, limit: narrow(limit), got: narrow(got) }.into()
                    );
                }
            }
            let at = place.start;
            for plane in &object.planes {
                self.arena.write(place.start, plane)?;
                place.start += plane.len() as u64;
            }
            let kind = v1::ObjectKind::from(object.kind).into();
            if !send(Step::Object(v1::LocalObject { kind, tokens: object.tokens, at, bytes })).await {
                break;
            }
            sent += 1;
        }
        drop(requests);
        while let Some(reply) = replies.next().await.transpose()? {
            results.extend(reply.event.map(results_of).unwrap_or_default());
        }
        Ok(results)
    }
}

fn results_of(event: v1::put_local_reply::Event) -> Vec<PutResult> {
    use v1::put_local_reply::Event;
    match event {
        Event::Taken(_) => Vec::new(),
        Event::Result(result) => vec![result],
        Event::Results(v1::PutReplies { results }) => results,
    }
}

/// A running fetch. Dropping it gives all its slots back.
pub struct LocalFetch {
    arena: Arc<Arena>,
    replies: Streaming<v1::FetchLocalReply>,
    /// Taken when everything has come: the node then waits for the last slots only.
    requests: Option<mpsc::Sender<v1::FetchLocalRequest>>,
    /// Slots that came together and were not given out yet.
    several: VecDeque<v1::FilledSlot>,
}

/// A step of a fetch.
pub enum LocalEvent {
    /// Planes in a slot.
    Filled(Filled),
    /// An object that could not be proven: the prefix ends before it.
    Missing(v1::Missing),
    /// The node's closing account. Slots that are still held stay.
    Done(v1::FetchDone),
}

impl LocalFetch {
    /// The next step; `None` after the last one.
    pub async fn next(&mut self) -> Result<Option<LocalEvent>> {
        use v1::fetch_local_reply::Event;
        loop {
            let Some(requests) = &self.requests else { return Ok(None) };
            if let Some(filled) = self.several.pop_front() {
                self.arena.check(&filled)?;
                let (arena, requests) = (Arc::clone(&self.arena), requests.clone());
                return Ok(Some(LocalEvent::Filled(Filled { arena, filled, requests })));
            }
            let Some(reply) = self.replies.message().await? else { return Ok(None) };
            match reply.event.ok_or(WireError::Missing("event"))? {
                Event::Filled(filled) => self.several.push_back(filled),
                Event::Several(v1::FilledSlots { slots }) => self.several.extend(slots),
                Event::Missing(missing) => return Ok(Some(LocalEvent::Missing(missing))),
                Event::Done(done) => {
                    self.requests = None;
                    return Ok(Some(LocalEvent::Done(done)));
                }
            }
        }
    }
}

/// A slot with parts of planes. Released when it is dropped.
pub struct Filled {
    arena: Arc<Arena>,
    filled: v1::FilledSlot,
    requests: mpsc::Sender<v1::FetchLocalRequest>,
}

impl Filled {
    /// What is in it.
    pub fn parts(&self) -> &[v1::LocalPart] {
        &self.filled.parts
    }

    /// Copies a part out. An error if the slot was written again meanwhile, and then nothing of it may be used.
    pub fn read(&self, part: &v1::LocalPart) -> Result<Bytes> {
        let mut out = vec![0; part.bytes as usize];
        self.copy(part, 0, &mut out);
        if self.is_current() { Ok(out.into()) } else { Err(ClientError::LeaseOver) }
    }

    /// Copies `out.len()` bytes of a part from `from` on. They are the right ones if [`Filled::is_current`] says so afterwards.
    ///
    /// # Panics
    /// If the part has not so many bytes, or is not of this slot.
    pub fn copy(&self, part: &v1::LocalPart, from: usize, out: &mut [u8]) {
        assert!(self.filled.parts.contains(part), "the part of another slot");
        assert!(from.checked_add(out.len()).is_some_and(|end| end <= part.bytes as usize), "behind the part");
        self.arena.copy(self.filled.slot, part.at as usize + from, out);
    }

    /// Where a part lies in this process, for what reads memory by itself, such as a copy to a GPU. What was read is right if
    /// [`Filled::is_current`] says so afterwards.
    pub fn as_ptr(&self, part: &v1::LocalPart) -> *const u8 {
        self.arena.as_ptr(self.filled.slot, part.at as usize)
    }

    /// Whether the slot still holds what it was announced with.
    pub fn is_current(&self) -> bool {
        self.arena.stamp(self.filled.slot) == self.filled.stamp
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        use v1::fetch_local_request::Step;
        let release = Step::Release(v1::ReleaseSlots { slots: vec![self.filled.slot] });
        // If the call has ended, the slot is free already.
        let _ = self.requests.try_send(v1::FetchLocalRequest { step: Some(release) });
    }
}
