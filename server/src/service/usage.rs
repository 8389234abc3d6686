//! `Usage`: sums of the billing ledger, and its records.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use esker_proto::v1::{self, export_usage_reply};
use esker_proto::{MAX_NAME_BYTES, check_name};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::cache::blocking;
use super::status::{from_ledger, from_wire};
use crate::audit::Event;
use crate::control::Table;
use crate::ledger::sums::{Account, HOUR_S};
use crate::ledger::{Position, Reader, Step};
use crate::node::Node;
use crate::principal::{Principal, Role, principal_of};
use crate::tenants::exhausted;
use crate::usage::event::hex;
use crate::usage::rows::{Grouping, group};

/// Rows of one reply, so that it fits into a message.
const MAX_ROWS: usize = 20_000;
/// Exports at a time; each holds one segment of the ledger in memory.
const MAX_EXPORTS: usize = 8;
/// Records read at a time, and replies buffered for a client.
const EXPORT_BATCH: usize = 256;
/// A client that takes nothing for this long is let go.
const IDLE_PROGRESS: Duration = Duration::from_secs(30);

/// The service.
pub(crate) struct UsageService {
    node: Arc<Node>,
    exports: Arc<Semaphore>,
}

impl UsageService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, exports: Arc::new(Semaphore::new(MAX_EXPORTS)) }
    }
}

#[tonic::async_trait]
impl v1::usage_server::Usage for UsageService {
    async fn query_usage(
        &self,
        request: Request<v1::QueryUsageRequest>,
    ) -> Result<Response<v1::QueryUsageReply>, Status> {
        let principal = principal_of(&request)?;
        let request = request.into_inner();
        let asked = Asked::of(&principal, request)?;
        let node = self.node.clone();
        blocking(move || {
            let Range { start, end } = asked.hours;
            let (accounts, through_sequence) =
                node.ledger.query(start, end).map_err(|error| from_ledger(&error))?;
            let rows = group(&accounts, &asked.grouping, |account| asked.wants(account));
            if rows.len() > MAX_ROWS {
                return Err(Status::out_of_range(format!(
                    "{} rows, more than the {MAX_ROWS} of one reply: ask for a shorter time",
                    rows.len()
                )));
            }
            let cluster = node.ledger.cluster().to_owned();
            // It counts everybody's records.
            let through_sequence = if asked.tenant.is_none() { through_sequence } else { 0 };
            Ok(Response::new(v1::QueryUsageReply { rows, through_sequence, cluster }))
        })
        .await
    }

    type ExportUsageStream = ReceiverStream<Result<v1::ExportUsageReply, Status>>;

    async fn export_usage(
        &self,
        request: Request<v1::ExportUsageRequest>,
    ) -> Result<Response<Self::ExportUsageStream>, Status> {
        let principal = principal_of(&request)?;
        let request = request.into_inner();
        if request.past_damage {
            principal.require(Role::Admin)?;
        }
        let permit = Arc::clone(&self.exports).try_acquire_owned();
        let permit =
            permit.map_err(|_| exhausted(format!("{MAX_EXPORTS} exports are running, the limit"), 1000))?;
        let from = self.start(&principal, &request).await?;
        let end = self.node.ledger.end().borrow().clone();
        if from.as_ref().is_some_and(|from| from.sequence > end.sequence) {
            return Err(Status::failed_precondition(format!(
                "this cursor is beyond the ledger, which ends at record {}: it is of another ledger, or this one was \
                 put back to an earlier state",
                end.sequence
            )));
        }
        let export = Export {
            reader: self.node.ledger.read(from),
            node: Arc::clone(&self.node),
            principal,
            left: if request.limit == 0 { u64::MAX } else { request.limit.into() },
            follow: request.follow,
            tenant: Some(request.tenant).filter(|tenant| !tenant.is_empty()),
            past_damage: request.past_damage,
            _permit: permit,
        };
        let (sender, receiver) = mpsc::channel(EXPORT_BATCH);
        tokio::spawn(export.run(sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl UsageService {
    /// Where an export begins: at the cursor that was given, which acknowledges what is before it, or at the consumer's.
    async fn start(
        &self,
        principal: &Principal,
        request: &v1::ExportUsageRequest,
    ) -> Result<Option<Position>, Status> {
        let given = given(request)?;
        if request.consumer.is_empty() {
            return Ok(given);
        }
        let name = format!("{}/{}", principal.tenant, request.consumer);
        let node = Arc::clone(&self.node);
        let text = request.cursor.clone();
        blocking(move || {
            let failed = |error: anyhow::Error| {
                tracing::error!(error = format!("{error:#}"), "a consumer's cursor cannot be kept");
                Status::unavailable("the node cannot keep the consumer's cursor; its log says why")
            };
            if given.is_some() {
                node.control.put(Table::UsageCursors, &name, &text).map_err(failed)?;
                return Ok(given);
            }
            let kept: Option<String> = node.control.get(Table::UsageCursors, &name).map_err(failed)?;
            Ok(kept.and_then(|text| Position::from_cursor(&text)))
        })
        .await
    }
}

/// The cursor that a request brings, beside a consumer's name if there is one.
fn given(request: &v1::ExportUsageRequest) -> Result<Option<Position>, Status> {
    let given = match request.cursor.as_str() {
        "" => None,
        text => Some(Position::from_cursor(text).ok_or_else(|| {
            Status::invalid_argument("cursor is not one that an export gave: leave it empty to begin anew")
        })?),
    };
    if !request.consumer.is_empty() {
        check_name("consumer", &request.consumer).map_err(from_wire)?;
    }
    Ok(given)
}

/// A query, checked.
struct Asked {
    /// In seconds of Unix time, whole hours.
    hours: Range<u64>,
    grouping: Grouping,
    /// Whose usage the caller sees; `None` for all.
    tenant: Option<String>,
    /// How the namespaces begin that are wanted, in hexadecimal.
    namespace: String,
}

impl Asked {
    fn of(principal: &Principal, request: v1::QueryUsageRequest) -> Result<Self, Status> {
        let groups = request.group_by().collect::<Vec<_>>();
        if request.namespace.len() > 64 || request.tenant.len() > MAX_NAME_BYTES {
            return Err(Status::invalid_argument("tenant or namespace is too long to be one"));
        }
        let tenant = visible(principal, request.tenant)?;
        let start = request.start_unix_s / HOUR_S * HOUR_S;
        let end = match request.end_unix_s {
            0 => unix_s() + HOUR_S,
            end => end.checked_next_multiple_of(HOUR_S).unwrap_or(u64::MAX),
        };
        let (grouping, namespace) = (Grouping::of(&groups), request.namespace);
        Ok(Self { hours: start..end, grouping, tenant, namespace })
    }

    fn wants(&self, account: &Account) -> bool {
        self.tenant.as_ref().is_none_or(|tenant| account.tenant == *tenant)
            && (self.namespace.is_empty() || hex(&account.namespace).starts_with(&self.namespace))
    }
}

/// The tenant whose usage a caller sees; `None` for all.
fn visible(principal: &Principal, asked: String) -> Result<Option<String>, Status> {
    if principal.roles.has(Role::BillingReader) {
        return Ok(Some(asked).filter(|tenant| !tenant.is_empty()));
    }
    // The same answer whether the other tenant exists or not.
    if !asked.is_empty() && asked != principal.tenant.0 {
        return Err(Status::permission_denied("the usage of other tenants needs the role billing-reader"));
    }
    Ok(Some(principal.tenant.0.clone()))
}

/// One stream of records.
struct Export {
    reader: Reader,
    node: Arc<Node>,
    principal: Principal,
    left: u64,
    follow: bool,
    tenant: Option<String>,
    past_damage: bool,
    _permit: OwnedSemaphorePermit,
}

type Reply = Result<v1::ExportUsageReply, Status>;

impl Export {
    async fn run(mut self, replies: mpsc::Sender<Reply>) {
        let mut end = self.node.ledger.end();
        loop {
            let bound = end.borrow_and_update().clone();
            let work = tokio::task::spawn_blocking(move || {
                let batch = self.read(&bound);
                (self, batch)
            });
            let Ok((export, batch)) = work.await else { return };
            self = export;
            let caught_up = batch.is_empty();
            for reply in batch {
                let last = reply.is_err();
                if replies.send_timeout(reply, IDLE_PROGRESS).await.is_err() || last {
                    return;
                }
            }
            if self.left == 0 || (caught_up && !self.follow) {
                return;
            }
            if caught_up {
                let idle = Some(export_usage_reply::Event::Idle(true));
                let cursor = self.reader.position().to_cursor();
                let cluster = self.node.ledger.cluster().to_owned();
                let reply = Ok(v1::ExportUsageReply { event: idle, cursor, cluster });
                if replies.send_timeout(reply, IDLE_PROGRESS).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = replies.closed() => return,
                    grown = end.changed() => if grown.is_err() { return },
                }
            }
        }
    }

    /// Some events; none when there is nothing more for now. An error is the last.
    fn read(&mut self, bound: &Position) -> Vec<Reply> {
        let mut batch = Vec::new();
        while batch.len() < EXPORT_BATCH && self.left > 0 {
            let step = match self.reader.next(bound) {
                Ok(step) => step,
                Err(error) => {
                    tracing::error!(%error, "the ledger cannot be read");
                    batch
                        .push(Err(Status::unavailable("the ledger cannot be read; the node's log says why")));
                    break;
                }
            };
            let event = match step {
                Step::End => break,
                Step::Record(record) => {
                    if self.tenant.as_ref().is_some_and(|tenant| record.tenant != *tenant) {
                        continue;
                    }
                    self.left -= 1;
                    export_usage_reply::Event::Record(*record)
                }
                Step::Gap(gap) => {
                    if self.node.ledger.alert(&gap) {
                        self.node.audit.record(&Event::system("ledger-gap", gap.to_string()));
                    }
                    if !self.past_damage {
                        batch.push(Err(Status::data_loss(format!(
                            "{gap}. The export halts here; an admin goes on behind it with past_damage"
                        ))));
                        break;
                    }
                    let event = Event::new(&self.principal, "export-past-damage", gap.to_string(), "ok");
                    self.node.audit.record(&event);
                    export_usage_reply::Event::Gap(v1::UsageGap {
                        after_sequence: gap.after_sequence,
                        next_sequence: gap.next_sequence,
                        reason: gap.reason.into(),
                    })
                }
            };
            let cursor = self.reader.position().to_cursor();
            let cluster = self.node.ledger.cluster().to_owned();
            batch.push(Ok(v1::ExportUsageReply { event: Some(event), cursor, cluster }));
        }
        batch
    }
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// For fuzzing: a query or an export, asked by whoever sees all and by whoever sees its own. Whether it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    use prost::Message;
    let of = |tenant: &str, hour_unix_s| Account {
        hour_unix_s,
        tenant: tenant.into(),
        namespace: vec![0x11; 32],
        scope: "private".into(),
    };
    let sums = v1::UsageSums { requests: 1, hit_tokens: 128, ..Default::default() };
    let accounts =
        [("acme", 0), ("acme", 26 * HOUR_S), ("globex", HOUR_S)].map(|(t, hour)| (of(t, hour), sums));
    let all = Principal::local();
    let own = Principal {
        tenant: crate::principal::TenantId("acme".into()),
        roles: [Role::Reader].into_iter().collect(),
        ..all.clone()
    };
    let queries = v1::QueryUsageRequest::decode(bytes).is_ok_and(|request| {
        for (principal, most) in [(&all, 3), (&own, 2)] {
            let Ok(asked) = Asked::of(principal, request.clone()) else { continue };
            assert!(asked.hours.start.is_multiple_of(HOUR_S) && asked.hours.end > 0);
            let rows = group(&accounts, &asked.grouping, |account| asked.wants(account));
            let requests: u64 = rows.iter().filter_map(|row| row.sums).map(|sums| sums.requests).sum();
            assert!(requests <= most, "more than the caller may see");
        }
        Asked::of(&all, request).is_ok()
    });
    let exports = v1::ExportUsageRequest::decode(bytes).is_ok_and(|request| given(&request).is_ok());
    queries || exports
}
