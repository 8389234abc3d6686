//! `Events`: what comes and goes in a scope, as a stream.

use std::sync::Arc;
use std::time::Duration;

use esker_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::node::Node;
use crate::principal::principal_of;

/// Events of one message, about 700 bytes each.
const MAX_BATCH: usize = 256;
/// A client that takes nothing for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);

/// The service.
pub(crate) struct EventsService {
    node: Arc<Node>,
}

impl EventsService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

#[tonic::async_trait]
impl v1::events_server::Events for EventsService {
    type SubscribeStream = ReceiverStream<Result<v1::KvEventBatch, Status>>;

    async fn subscribe(
        &self,
        request: Request<v1::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let principal = principal_of(&request)?;
        let request = request.into_inner();
        let scope = self.node.tenants.followed(&principal, &request.user, request.scope())?.tag();
        let events = Arc::clone(&self.node.events);
        let epoch = events.epoch();
        // Before anything is read, so that nothing can come in between unnoticed.
        let mut grew = events.grew();
        let (mut from, mut lost) = match request.epoch {
            0 => (events.next(scope), false),
            asked if asked == epoch => (request.from_sequence, false),
            // Of a process that is gone nothing is kept.
            _ => (0, true),
        };
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut is_first = true;
            loop {
                grew.mark_unchanged();
                let read = events.read(scope, from, MAX_BATCH);
                lost |= read.lost;
                from = read.first + read.events.len() as u64;
                if is_first || lost || !read.events.is_empty() {
                    let (ts, sequence) = (read.at.as_secs_f64(), read.first);
                    let batch = v1::KvEventBatch { ts, epoch, sequence, lost, events: read.events };
                    if sender.send_timeout(Ok(batch), IDLE_PROGRESS).await.is_err() || read.cleared {
                        return;
                    }
                    (is_first, lost) = (false, false);
                    continue;
                }
                tokio::select! {
                    () = sender.closed() => return,
                    changed = grew.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
