//! Promise: with `--otlp` a collector hears of every call, in the caller's own trace, and of the steps of a generation; without it
//! nobody hears of anything.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use esker_client::v1;
use esker_tests::{Node, question, scratch, tokens};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// Keeps what it hears.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

impl Collector {
    async fn start(&self) -> Result<SocketAddr> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(address)
    }

    /// Spans by name.
    fn spans(&self) -> BTreeMap<String, Vec<Span>> {
        let mut named: BTreeMap<String, Vec<Span>> = BTreeMap::new();
        let heard = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        heard.iter().for_each(|span| named.entry(span.name.clone()).or_default().push(span.clone()));
        named
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let of_scopes = request.into_inner().resource_spans.into_iter().flat_map(|spans| spans.scope_spans);
        let mut heard = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        heard.extend(of_scopes.flat_map(|spans| spans.spans));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn number(span: &Span, name: &str) -> Option<i64> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Value::IntValue(number) => Some(*number),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A generation, a lookup in the trace of its caller, and one that is refused.
async fn calls(node: &Node) -> Result<()> {
    let prompt = tokens(3, 700);
    node.ask(question(&prompt)).await?;
    let mut cache = node.cache.clone();
    let ids: Vec<u32> = prompt.iter().map(|token| token.0).collect();
    for namespace in [node.client.describe().await?.namespace, vec![1; 32].into()] {
        let mut request =
            Request::new(v1::LookupRequest { namespace, tokens: ids.clone(), ..Default::default() });
        let traceparent = format!("00-{TRACE}-{PARENT}-01");
        request.metadata_mut().insert("traceparent", traceparent.parse()?);
        let _ = cache.lookup(request).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_hears_of_every_call() -> Result<()> {
    let folder = scratch();
    let collector = Collector::default();
    let url = format!("http://{}", collector.start().await?);
    let node = Node::start(&folder.path().join("data"), &["--otlp", &url]).await?;
    calls(&node).await?;
    // What was not sent yet is sent at the end.
    assert!(node.stop().await?.success());
    let spans = collector.spans();

    let lookups = &spans["esker.v1.PrefixCache/Lookup"];
    assert_eq!(lookups.len(), 2);
    for lookup in lookups {
        assert_eq!((hex(&lookup.trace_id), hex(&lookup.parent_span_id)), (TRACE.into(), PARENT.into()));
    }
    let codes: Vec<_> = lookups.iter().map(|span| number(span, "rpc.grpc.status_code")).collect();
    assert_eq!(codes, [Some(0), Some(i64::from(i32::from(tonic::Code::NotFound)))]);

    let generation = spans["esker.v1.Decoder/Generate"].first().context("no span of the generation")?;
    assert_eq!(number(generation, "rpc.grpc.status_code"), Some(0));
    let mut reached = generation.start_time_unix_nano;
    for step in ["wait", "restore", "prefill", "decode"] {
        let span = spans[step].first().with_context(|| format!("no span of {step}"))?;
        assert_eq!(
            (&span.trace_id, &span.parent_span_id),
            (&generation.trace_id, &generation.span_id),
            "{step}"
        );
        assert!(span.start_time_unix_nano >= reached && span.end_time_unix_nano >= span.start_time_unix_nano);
        reached = span.end_time_unix_nano;
    }
    assert!(generation.end_time_unix_nano >= reached, "a call ended before its last step");
    assert_eq!(number(&spans["restore"][0], "esker.hit_tokens"), Some(0));
    assert_eq!(number(&spans["prefill"][0], "esker.computed_tokens"), Some(700));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_it_nobody_hears_of_anything_and_a_collector_that_is_not_there_costs_nothing() -> Result<()> {
    let folder = scratch();
    let collector = Collector::default();
    let address = collector.start().await?;
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    calls(&node).await?;
    assert!(node.stop().await?.success());
    assert!(collector.spans().is_empty(), "{address} was told");

    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let node = Node::start(&folder.path().join("data"), &["--otlp", &format!("http://{free}")]).await?;
    calls(&node).await?;
    assert!(node.stop().await?.success());
    Ok(())
}
