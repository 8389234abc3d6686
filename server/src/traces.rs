//! Traces: a span for each call and for the steps of a generation, sent by OTLP over gRPC where `esker serve --otlp` says so. Off
//! otherwise, and then nothing is made.
//!
//! The span of a call continues the trace that its `traceparent` header names (W3C Trace Context) and lasts until the last byte
//! of the answer. Attributes are those of the OpenTelemetry conventions for RPC, and counts of tokens and bytes; never a tenant,
//! a token or text. What the collector does not take in time is dropped: no call waits for it. The variables `OTEL_*` of the
//! OpenTelemetry SDK say how often, how much and which share is sent.

mod layer;

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

pub(crate) use layer::TraceLayer;

use crate::generate::Account;

/// Where spans go; nowhere by default.
#[derive(Clone, Default)]
pub struct Traces(Option<Exporting>);

#[derive(Clone)]
struct Exporting {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// A call that is traced, as its handler finds it among the request's extensions.
#[derive(Clone)]
pub(crate) struct Call(Context);

impl Traces {
    /// To the collector at `endpoint`, such as `http://127.0.0.1:4317`. Called on the async runtime; that the collector is not
    /// there shows later, in the log.
    pub fn to(endpoint: &str) -> anyhow::Result<Self> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter.with_context(|| format!("cannot send traces to {endpoint}"))?;
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let resource = Resource::builder().with_service_name("esker").with_attribute(version).build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("esker");
        Ok(Self(Some(Exporting { provider, tracer })))
    }

    /// The span of a call of this method, `/package.Service/Method`.
    fn call(&self, headers: &HeaderMap, method: &'static str) -> Option<Call> {
        let Exporting { tracer, .. } = self.0.as_ref()?;
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        let name = method.trim_start_matches('/');
        let (service, method) = name.split_once('/').unwrap_or(("", name));
        let attributes = [("rpc.system", "grpc"), ("rpc.service", service), ("rpc.method", method)];
        let attributes = attributes.map(|(name, value)| KeyValue::new(name, value));
        let span = tracer.span_builder(name).with_kind(SpanKind::Server).with_attributes(attributes);
        let span = span.start_with_context(tracer, &parent);
        Some(Call(parent.with_span(span)))
    }

    /// The steps of a generation that took from `began` until now, `waited` of it for its turn: spans below that of its call, or
    /// below one of their own where it came over HTTP.
    pub(crate) fn generation(
        &self,
        call: Option<&Call>,
        waited: Duration,
        began: SystemTime,
        account: &Account,
    ) {
        let Some(Exporting { tracer, .. }) = &self.0 else { return };
        let own = || {
            let span = tracer.span_builder("generate").with_start_time(began);
            Context::new().with_span(span.start_with_context(tracer, &Context::new()))
        };
        let parent = call.map_or_else(own, |call| call.0.clone());
        let count = |name, value: usize| KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX));
        let bytes_read =
            KeyValue::new("esker.bytes_read", i64::try_from(account.bytes_read).unwrap_or(i64::MAX));
        let computed = account.prompt_tokens.saturating_sub(account.hit_tokens);
        let now = SystemTime::now();
        let started = began + waited;
        let restored = started + account.restore;
        let prefilled = restored + account.prefill;
        let steps = [
            ("wait", began, started, vec![]),
            ("restore", started, restored, vec![count("esker.hit_tokens", account.hit_tokens), bytes_read]),
            ("prefill", restored, prefilled, vec![count("esker.computed_tokens", computed)]),
            (
                "decode",
                prefilled,
                now.max(prefilled),
                vec![count("esker.completion_tokens", account.completion_tokens)],
            ),
        ];
        for (name, start, end, attributes) in steps {
            let span = tracer.span_builder(name).with_start_time(start).with_attributes(attributes);
            span.start_with_context(tracer, &parent).end_with_timestamp(end);
        }
    }

    /// Sends what has not been sent, and ends. Blocks for as long as the collector takes, 5 seconds at most.
    pub fn stop(&self) {
        if let Some(Exporting { provider, .. }) = &self.0
            && let Err(error) = provider.shutdown_with_timeout(Duration::from_secs(5))
        {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

impl Call {
    /// How the call ended, by its gRPC status code.
    fn end(&self, code: tonic::Code) {
        use tonic::Code;
        let span = self.0.span();
        span.set_attribute(KeyValue::new("rpc.grpc.status_code", i64::from(i32::from(code))));
        // Those that are the server's fault, by the conventions.
        let failed = matches!(
            code,
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unimplemented
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss
        );
        if failed {
            span.set_status(Status::error(code.description()));
        }
        span.end();
    }
}

/// Headers as the propagator reads them.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
