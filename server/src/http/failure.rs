//! Why a request was not answered, in the shape that the caller's library understands: OpenAI's, or Anthropic's below
//! `/v1/messages`.

use axum::Json;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tonic::{Code, Status};

/// Whose error shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shape {
    #[default]
    OpenAi,
    Anthropic,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Failure {
    status: StatusCode,
    message: String,
    /// The field at fault.
    param: Option<String>,
    code: Option<&'static str>,
    retry_after_ms: Option<u64>,
    shape: Shape,
}

impl Shape {
    pub(crate) fn of(uri: &Uri) -> Self {
        if uri.path().starts_with("/v1/messages") { Self::Anthropic } else { Self::OpenAi }
    }
}

impl Failure {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let (message, shape) = (message.into(), Shape::default());
        Self { status, message, param: None, code: None, retry_after_ms: None, shape }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn late(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, message)
    }

    /// Something here is broken, not the request.
    pub(super) fn broken(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// A body that was too long, or broken off.
    pub(super) fn unread(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, message)
    }

    /// A feature that this node does not have, asked for by this field.
    pub(super) fn unsupported(param: &str, why: &str) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(format!("`{param}`: {why}")) }
            .about(param)
    }

    /// With the code that applications look for, to cut a conversation short and ask again.
    pub(super) fn too_long(tokens: usize, context: usize) -> Self {
        let message = format!(
            "the prompt has {tokens} tokens and the model's context {context}: at least one must be left to write"
        );
        Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    pub(super) fn unknown_model(asked: &str, served: Option<&str>) -> Self {
        let message = match served {
            Some(served) => format!("the model {asked:?} is not served here; this node serves {served:?}"),
            None => "this node was started without a model".to_owned(),
        };
        Self { code: Some("model_not_found"), ..Self::not_found(message) }.about("model")
    }

    /// Names the field at fault.
    pub(super) fn about(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// In the shape of whoever calls this address.
    pub(crate) fn at(self, uri: &Uri) -> Self {
        self.shaped(Shape::of(uri))
    }

    pub(crate) fn shaped(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// The body: also what an event of a stream that fails half-way carries.
    pub(crate) fn body(&self) -> Value {
        match self.shape {
            Shape::OpenAi => json!({"error": {
                "message": self.message,
                "type": self.kind(),
                "param": self.param,
                "code": self.code,
            }}),
            Shape::Anthropic => {
                json!({"type": "error", "error": {"type": self.kind(), "message": self.message}})
            }
        }
    }

    fn kind(&self) -> &'static str {
        match (self.status.as_u16(), self.shape) {
            (401, _) => "authentication_error",
            (403, _) => "permission_error",
            (404, Shape::Anthropic) => "not_found_error",
            (413, Shape::Anthropic) => "request_too_large",
            (429, _) => "rate_limit_error",
            (503, Shape::Anthropic) => "overloaded_error",
            (400..=499, _) => "invalid_request_error",
            (_, Shape::OpenAi) => "server_error",
            (_, Shape::Anthropic) => "api_error",
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let http = match status.code() {
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => StatusCode::BAD_REQUEST,
            Code::Unauthenticated => StatusCode::UNAUTHORIZED,
            Code::PermissionDenied => StatusCode::FORBIDDEN,
            Code::NotFound | Code::Unimplemented => StatusCode::NOT_FOUND,
            Code::Aborted | Code::AlreadyExists => StatusCode::CONFLICT,
            Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let pushback = status.metadata().get("grpc-retry-pushback-ms");
        let retry_after_ms = pushback.and_then(|value| value.to_str().ok()?.parse().ok());
        Self { retry_after_ms, ..Self::new(http, status.message()) }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(after) = self.retry_after_ms {
            response.headers_mut().insert(header::RETRY_AFTER, after.div_ceil(1000).into());
            // Both libraries look for the finer one first.
            response.headers_mut().insert("retry-after-ms", after.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shape_is_the_one_that_its_library_reads() {
        let failure = || Failure::from(crate::tenants::over("puts_per_s", 5, 5, 1500));
        let openai = failure().body();
        assert_eq!(openai["error"]["type"], "rate_limit_error");
        assert!(openai["error"]["param"].is_null());
        let anthropic = failure().shaped(Shape::Anthropic).body();
        assert_eq!(
            (&anthropic["type"], &anthropic["error"]["type"]),
            (&json!("error"), &json!("rate_limit_error"))
        );
        let response = failure().into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.headers()["retry-after-ms"], "1500");
    }
}
