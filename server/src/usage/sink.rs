//! Sinks: where events go by themselves. A file gets JSON lines, an HTTP endpoint CloudEvents in batches.
//!
//! A sink sees every record at least once, in order, and tells repeats by `source` and `id`. The cursor moves, durably, only after
//! the sink has taken a batch; a batch that it may have taken is sent again as it was. Metering systems remember ids for 24 hours:
//! what was first sent longer ago than [`RESEND_WINDOW_MS`] is not sent again unless an operator says so, since it might count
//! twice. At damage in the ledger the export halts.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::event::cloud_event;
use crate::audit::{Audit, Event};
use crate::control::{Control, Table};
use crate::ledger::{Ledger, Position, Step};

/// Events of one batch at most; sinks refuse larger requests.
const BATCH: usize = 500;
/// An hour less than what sinks remember.
const RESEND_WINDOW_MS: u64 = 23 * 3600 * 1000;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Between two looks for new records.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
/// Longest wait for the sink to connect, to take, or to answer.
const IO_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest answer that is read; of a longer one the status has come long before.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// Where events go and how.
#[derive(Clone, Debug)]
pub struct SinkSettings {
    /// `http://HOST[:PORT]/PATH`, or the path of a file.
    pub target: String,
    /// File with a bearer token for it.
    pub token: Option<PathBuf>,
    /// Send again what may have been delivered so long ago that the sink has forgotten it.
    pub resend: bool,
}

/// Takes batches of events.
pub(crate) trait Sink: Send {
    /// `Ok` only if all of it is taken for good.
    fn deliver(&mut self, events: &[Value]) -> Result<(), String>;
}

/// What is kept of an export, durably.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Behind the last batch that was taken.
    cursor: String,
    /// A batch that was sent and not known to be taken.
    attempt: Option<Attempt>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Attempt {
    through: String,
    first_unix_ms: u64,
}

/// What one step of an export came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stepped {
    /// So many events were taken.
    Delivered(usize),
    /// Nothing new.
    Idle,
    /// Not taken; try again after this long.
    Retry(Duration),
    /// Nothing goes on without an operator.
    Halted(String),
}

/// The export of a ledger to one sink.
pub(crate) struct Exporter<S> {
    ledger: Arc<Ledger>,
    control: Arc<Control>,
    name: String,
    sink: S,
    state: State,
    resend: bool,
    batch: Option<Batch>,
    failures: u32,
}

struct Batch {
    events: Vec<Value>,
    through: String,
}

impl<S: Sink> Exporter<S> {
    /// Goes on where the export of this name stopped.
    pub(crate) fn open(
        ledger: Arc<Ledger>,
        control: Arc<Control>,
        name: &str,
        sink: S,
        resend: bool,
    ) -> anyhow::Result<Self> {
        let state = control.get(Table::UsageSinks, name)?.unwrap_or_default();
        Ok(Self { ledger, control, name: name.to_owned(), sink, state, resend, batch: None, failures: 0 })
    }

    /// Delivers the next batch, or tries the last one again.
    pub(crate) fn step(&mut self, now_ms: u64) -> anyhow::Result<Stepped> {
        let batch = match self.batch.take() {
            Some(batch) => batch,
            None => match self.read()? {
                Ok(Some(batch)) => batch,
                Ok(None) => return Ok(Stepped::Idle),
                Err(halted) => return Ok(Stepped::Halted(halted)),
            },
        };
        self.ledger.hooks().at("export.read")?;
        match &self.state.attempt {
            None => {
                // Before the first byte leaves: whoever goes on after a crash must know since when it may have been taken.
                let through = batch.through.clone();
                self.save(State {
                    cursor: self.state.cursor.clone(),
                    attempt: Some(Attempt { through, first_unix_ms: now_ms }),
                })?;
            }
            Some(attempt)
                if now_ms.saturating_sub(attempt.first_unix_ms) > RESEND_WINDOW_MS && !self.resend =>
            {
                let count = batch.events.len();
                self.batch = Some(batch);
                return Ok(Stepped::Halted(format!(
                    "{count} usage events may have reached the sink more than 23 hours ago; sent again they might count \
                     twice, so nothing more is sent. Check the sink, then start with --usage-sink-resend to send them again"
                )));
            }
            Some(_) => {}
        }
        if let Err(reason) = self.sink.deliver(&batch.events) {
            self.failures += 1;
            self.batch = Some(batch);
            let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(10)).min(LONGEST_PAUSE);
            tracing::warn!(%reason, ?pause, failures = self.failures, "the usage sink did not take a batch");
            return Ok(Stepped::Retry(pause));
        }
        self.ledger.hooks().at("export.sent")?;
        self.save(State { cursor: batch.through, attempt: None })?;
        self.ledger.hooks().at("export.acknowledged")?;
        self.failures = 0;
        Ok(Stepped::Delivered(batch.events.len()))
    }

    /// The batch behind the cursor: the one that was sent before, if one was.
    fn read(&mut self) -> anyhow::Result<Result<Option<Batch>, String>> {
        let from = match self.state.cursor.as_str() {
            "" => None,
            text => Some(Position::from_cursor(text).context("the sink's cursor cannot be understood")?),
        };
        let known_end = self.ledger.end().borrow().clone();
        let bound = match &self.state.attempt {
            None => known_end,
            Some(attempt) => {
                Position::from_cursor(&attempt.through).context("the sink's cursor cannot be understood")?
            }
        };
        let limit = if self.state.attempt.is_some() { usize::MAX } else { BATCH };
        let mut reader = self.ledger.read(from);
        let mut events = Vec::new();
        while events.len() < limit {
            match reader.next(&bound).context("the ledger cannot be read")? {
                Step::Record(record) => events.push(cloud_event(self.ledger.cluster(), &record)),
                Step::End => break,
                // What is before the gap is sent first.
                Step::Gap(_) if !events.is_empty() => break,
                Step::Gap(gap) => {
                    self.ledger.alert(&gap);
                    return Ok(Err(format!("{gap}. The export to the sink halts here")));
                }
            }
        }
        if events.is_empty() {
            return Ok(Ok(None));
        }
        Ok(Ok(Some(Batch { events, through: reader.position().to_cursor() })))
    }

    fn save(&mut self, state: State) -> anyhow::Result<()> {
        self.control.put(Table::UsageSinks, &self.name, &state)?;
        self.state = state;
        Ok(())
    }
}

/// The thread that exports, ended when it is dropped.
pub(crate) struct Exporting {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Exporting {
    /// Starts to export to where the settings say.
    pub(crate) fn start(
        settings: &SinkSettings,
        ledger: Arc<Ledger>,
        control: Arc<Control>,
        audit: Arc<Audit>,
    ) -> anyhow::Result<Self> {
        let sink: Box<dyn Sink> = match settings.target.split_once("://") {
            Some(_) => Box::new(HttpSink::new(settings)?),
            None => Box::new(FileSink { path: settings.target.clone().into() }),
        };
        let exporter = Exporter::open(ledger, control, &settings.target, sink, settings.resend)?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("usage-sink".into())
            .spawn(move || run(exporter, &told, &audit))
            .context("cannot start the thread that exports usage")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Exporting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn run(mut exporter: Exporter<Box<dyn Sink>>, stop: &AtomicBool, audit: &Audit) {
    while !stop.load(Ordering::Acquire) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        match exporter.step(u64::try_from(now.as_millis()).unwrap_or(u64::MAX)) {
            Ok(Stepped::Delivered(_)) => {}
            Ok(Stepped::Idle) => std::thread::park_timeout(IDLE_PAUSE),
            Ok(Stepped::Retry(pause)) => std::thread::park_timeout(pause),
            Ok(Stepped::Halted(reason)) => {
                tracing::error!("ALERT: {reason}");
                audit.record(&Event::system("usage-export-halted", reason));
                return;
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "usage cannot be exported; tried again");
                std::thread::park_timeout(LONGEST_PAUSE);
            }
        }
    }
}

impl Sink for Box<dyn Sink> {
    fn deliver(&mut self, events: &[Value]) -> Result<(), String> {
        (**self).deliver(events)
    }
}

/// JSON lines, flushed before they count as taken.
struct FileSink {
    path: PathBuf,
}

impl Sink for FileSink {
    fn deliver(&mut self, events: &[Value]) -> Result<(), String> {
        let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
        let write = || {
            let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&self.path)?;
            let before = file.metadata()?.len();
            let written = file.write_all(lines.as_bytes()).and_then(|()| file.sync_data());
            if written.is_err() {
                // Half a line would spoil the whole one that comes after it.
                file.set_len(before)?;
            }
            written
        };
        write().map_err(|error: io::Error| format!("cannot write {}: {error}", self.path.display()))
    }
}

/// CloudEvents' batched mode over HTTP/1.1, one connection for each batch.
pub(crate) struct HttpSink {
    host: String,
    address: String,
    path: String,
    token: Option<PathBuf>,
}

impl HttpSink {
    pub(crate) fn new(settings: &SinkSettings) -> anyhow::Result<Self> {
        let Some(rest) = settings.target.strip_prefix("http://") else {
            bail!(
                "the usage sink {} is neither an http:// address nor a file: for https put a local proxy in front of it",
                settings.target
            );
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        if host.is_empty() || !rest.chars().all(|c| c.is_ascii_graphic()) {
            bail!("the usage sink {} names no host", settings.target);
        }
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { host.to_owned() } else { format!("{host}:80") };
        Ok(Self { host: host.to_owned(), address, path: format!("/{path}"), token: settings.token.clone() })
    }

    fn post(&self, body: &[u8]) -> io::Result<u16> {
        let mut addresses = self.address.to_socket_addrs()?;
        let address = addresses.next().ok_or_else(|| io::Error::other("the host has no address"))?;
        let mut stream = TcpStream::connect_timeout(&address, IO_TIMEOUT)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        stream.set_write_timeout(Some(IO_TIMEOUT))?;
        let token = match &self.token {
            // Read each time: tokens are replaced while we run.
            Some(path) => format!("Authorization: Bearer {}\r\n", std::fs::read_to_string(path)?.trim()),
            None => String::new(),
        };
        let (path, host, len) = (&self.path, &self.host, body.len());
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/cloudevents-batch+json\r\n\
             Content-Length: {len}\r\n{token}Connection: close\r\n\r\n"
        )?;
        stream.write_all(body)?;
        status_of(BufReader::new(stream))
    }
}

impl Sink for HttpSink {
    fn deliver(&mut self, events: &[Value]) -> Result<(), String> {
        let body = Value::from(events.to_vec()).to_string();
        match self.post(body.as_bytes()) {
            Ok(200..300) => Ok(()),
            Ok(status) => Err(format!("{} answered {status}", self.host)),
            Err(error) => Err(format!("{} cannot be reached: {error}", self.host)),
        }
    }
}

/// The status of an HTTP/1.1 answer; interim ones are passed over.
fn status_of(answer: impl BufRead) -> io::Result<u16> {
    let bad = || io::Error::other("the answer is not HTTP");
    let mut answer = answer.take(MAX_ANSWER_BYTES);
    for _ in 0..8 {
        let mut line = String::new();
        answer.read_line(&mut line)?;
        let status =
            line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok()).ok_or_else(bad)?;
        if status >= 200 {
            return Ok(status);
        }
        while !line.trim().is_empty() {
            line.clear();
            answer.read_line(&mut line)?;
        }
    }
    Err(bad())
}

/// For fuzzing: what a sink answers. Whether a status is found.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    status_of(bytes).is_ok_and(|status| {
        assert!((200..1000).contains(&status), "no interim status, and of three digits");
        true
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_nonsense_is_an_error() {
        let status = |text: &str| status_of(text.as_bytes()).ok();
        assert_eq!(status("HTTP/1.1 204 No Content\r\n\r\n"), Some(204));
        assert_eq!(status("HTTP/1.0 503 x\r\n"), Some(503));
        assert_eq!(status("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 Accepted\r\n"), Some(202));
        for bad in ["", "HTTP/2 200", "200", "HTTP/1.1 20", "HTTP/1.1 100 Continue\r\n\r\n"] {
            assert_eq!(status(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn addresses() {
        let sink = |target: &str| {
            HttpSink::new(&SinkSettings { target: target.into(), token: None, resend: false })
                .map(|sink| (sink.address, sink.path))
        };
        assert_eq!(sink("http://h/a/b").unwrap(), ("h:80".into(), "/a/b".into()));
        assert_eq!(sink("http://h:81").unwrap(), ("h:81".into(), "/".into()));
        for bad in ["https://h/", "http:///x", "ftp://h", "http://h/a b", "http://h/\r\nX: y"] {
            assert!(sink(bad).is_err(), "{bad}");
        }
    }
}
