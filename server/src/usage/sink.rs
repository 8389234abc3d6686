//! Sinks: where events go by themselves. A file gets JSON lines, an HTTP endpoint CloudEvents in batches.
//!
//! A sink sees every record at least once, in order, and tells repeats by `source` and `id`. The cursor moves, durably, only after
//! the sink has taken a batch; a batch that it may have taken is sent again as it was. Metering systems remember ids for 24 hours:
//! what was first sent longer ago than [`RESEND_WINDOW_MS`] is not sent again unless an operator says so, since it might count
//! twice. At damage in the ledger the export halts.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use http::Uri;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ureq::Agent;
use ureq::tls::{PemItem, RootCerts, TlsConfig};

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
/// Longest wait for the sink to take a batch and to answer.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);

/// Where events go and how.
#[derive(Clone, Debug)]
pub struct SinkSettings {
    /// `https://HOST[:PORT]/PATH`, the same with `http`, or the path of a file.
    pub target: String,
    /// File with a bearer token for it.
    pub token: Option<PathBuf>,
    /// File with the certificates, as PEM, that vouch for it instead of the public authorities.
    pub ca: Option<PathBuf>,
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

/// CloudEvents' batched mode.
pub(crate) struct HttpSink {
    agent: Agent,
    target: Uri,
    token: Option<PathBuf>,
}

impl HttpSink {
    pub(crate) fn new(settings: &SinkSettings) -> anyhow::Result<Self> {
        let named = &settings.target;
        let target: Uri = named.parse().with_context(|| format!("the usage sink {named} is no address"))?;
        let (scheme, host) = (target.scheme_str(), target.host());
        if !matches!(scheme, Some("http" | "https")) || host.is_none_or(str::is_empty) {
            bail!("the usage sink {named} is neither an https:// or http:// address nor a file");
        }
        if scheme == Some("http") && settings.ca.is_some() {
            bail!("--usage-sink-ca is for https: {named} shows no certificate");
        }
        let tls = match &settings.ca {
            None => TlsConfig::default(),
            Some(path) => TlsConfig::builder().root_certs(authorities(path)?).build(),
        };
        let config = Agent::config_builder()
            .timeout_global(Some(DELIVERY_TIMEOUT))
            .tls_config(tls)
            // What is not answered by the address that was given is not delivered, and a token is for that address alone.
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("esker/", env!("CARGO_PKG_VERSION")));
        Ok(Self { agent: config.build().into(), target, token: settings.token.clone() })
    }

    fn post(&self, body: &[u8]) -> anyhow::Result<u16> {
        let mut request = self.agent.post(&self.target).content_type("application/cloudevents-batch+json");
        if let Some(path) = &self.token {
            // Read each time: tokens are replaced while we run.
            let token = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
            request = request.header("Authorization", format!("Bearer {}", token.trim()));
        }
        Ok(request.send(body)?.status().as_u16())
    }
}

/// The certificates of a PEM file.
fn authorities(path: &Path) -> anyhow::Result<RootCerts> {
    let pem = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let certificates = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    });
    let certificates = certificates.collect::<Result<Vec<_>, _>>();
    let certificates = certificates.with_context(|| format!("{} is not PEM", path.display()))?;
    ensure!(!certificates.is_empty(), "{} has no certificate", path.display());
    Ok(RootCerts::new_with_certs(&certificates))
}

impl Sink for HttpSink {
    fn deliver(&mut self, events: &[Value]) -> Result<(), String> {
        let body = Value::from(events.to_vec()).to_string();
        match self.post(body.as_bytes()) {
            Ok(200..300) => Ok(()),
            Ok(status) => Err(format!("{} answered {status}", self.target)),
            Err(error) => Err(format!("nothing can be delivered to {}: {error:#}", self.target)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_rustls::rustls;

    fn sink(target: &str, ca: Option<&Path>) -> anyhow::Result<HttpSink> {
        let ca = ca.map(Path::to_owned);
        HttpSink::new(&SinkSettings { target: target.into(), token: None, ca, resend: false })
    }

    #[test]
    fn addresses() {
        for good in ["http://h/a/b", "http://h:81", "https://h/", "https://[::1]:8443/x?y=z"] {
            assert_eq!(sink(good, None).unwrap().target, *good, "{good}");
        }
        for bad in ["http:///x", "ftp://h", "http://h/a b", "http://h/\r\nX: y", "https://"] {
            assert!(sink(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_vouches_for_a_sink_is_read_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let told = |target: &str| format!("{:#}", sink(target, Some(&path)).map(drop).unwrap_err());
        assert!(told("https://h/").contains("cannot read"));
        std::fs::write(&path, "no certificate").unwrap();
        assert!(told("https://h/").ends_with("has no certificate"));
        assert!(told("http://h/").starts_with("--usage-sink-ca is for https"));
    }

    /// Answers one request with each status, and gives what was asked; by TLS with a key and its certificate.
    fn answering(
        statuses: &'static [&'static str],
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> (u16, JoinHandle<Vec<String>>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let serve = move || {
            let mut asked = Vec::new();
            for status in statuses {
                let (stream, _) = listener.accept().unwrap();
                let mut stream: Box<dyn ReadWrite> = match &tls {
                    None => Box::new(stream),
                    Some(tls) => {
                        let connection = rustls::ServerConnection::new(Arc::clone(tls)).unwrap();
                        Box::new(rustls::StreamOwned::new(connection, stream))
                    }
                };
                let (mut text, mut buffer) = (String::new(), [0; 4096]);
                while !text.contains("]") {
                    match stream.read(&mut buffer) {
                        Ok(1..) => text += &String::from_utf8_lossy(&buffer),
                        // Who does not trust the certificate says nothing.
                        _ => break,
                    }
                }
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes()).and_then(|()| stream.flush());
                asked.push(text);
            }
            asked
        };
        (port, std::thread::spawn(serve))
    }

    trait ReadWrite: io::Read + Write {}
    impl<T: io::Read + Write> ReadWrite for T {}

    #[test]
    fn a_status_says_whether_a_batch_was_taken() {
        let (port, server) =
            answering(&["204 No Content", "503 Later", "307 Elsewhere\r\nLocation: /b"], None);
        let mut sink = sink(&format!("http://127.0.0.1:{port}/a"), None).unwrap();
        let events = [Value::from("event")];
        assert_eq!(sink.deliver(&events), Ok(()));
        for status in ["503", "307"] {
            let refused = sink.deliver(&events).unwrap_err();
            assert!(refused.ends_with(&format!("/a answered {status}")), "{refused}");
        }
        let asked = server.join().unwrap();
        assert!(
            asked[0].starts_with("POST /a HTTP/1.1\r\n") && asked[0].contains("[\"event\"]"),
            "{asked:?}"
        );
        let down = sink.deliver(&events).unwrap_err();
        assert!(down.starts_with("nothing can be delivered to http://127.0.0.1:"), "{down}");
    }

    #[test]
    fn over_tls_a_sink_shows_a_certificate_that_is_vouched_for() {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, signed.cert.pem()).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider);
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let config = config.with_single_cert(vec![signed.cert.der().clone()], key).unwrap();
        let (port, server) = answering(&["204 No Content", "204 No Content"], Some(Arc::new(config)));
        let target = format!("https://localhost:{port}/");
        let events = [Value::from("event")];
        assert_eq!(sink(&target, Some(&ca)).unwrap().deliver(&events), Ok(()));
        let refused = sink(&target, None).unwrap().deliver(&events).unwrap_err();
        assert!(refused.contains("certificate"), "{refused}");
        let asked = server.join().unwrap();
        assert_eq!(asked.iter().map(String::is_empty).collect::<Vec<_>>(), [false, true]);
    }
}
