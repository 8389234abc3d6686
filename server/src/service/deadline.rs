//! The caller's deadline, from the `grpc-timeout` header: work that nobody waits for any more is dropped before it costs I/O.

use std::time::{Duration, Instant};

use tonic::Request;

/// When the caller stops waiting; `None` where it does not say.
pub(super) fn deadline_of<T>(request: &Request<T>) -> Option<Instant> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    Instant::now().checked_add(timeout(text)?)
}

/// At most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// For fuzzing: the header. Whether it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let timeout = std::str::from_utf8(bytes).ok().and_then(timeout);
    assert!(timeout.is_none_or(|timeout| timeout.as_secs() < 100_000_000 * 3600));
    timeout.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_and_nonsense_is_none() {
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(timeout("2H"), Some(Duration::from_secs(7200)));
        for bad in ["", "5", "m", "123456789S", "-1S", "1é", "1.5S"] {
            assert_eq!(timeout(bad), None, "{bad:?}");
        }
    }
}
