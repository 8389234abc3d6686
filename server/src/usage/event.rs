//! Records as CloudEvents 1.0, one JSON object each: what metering systems take. They tell repeats by `source` and `id`.

use esker_proto::v1;
use serde_json::{Value, json};

use super::calendar::{utc, utc_ms};
use crate::ledger::sums::is_storage;

/// The event of a record.
pub(crate) fn cloud_event(cluster: &str, record: &v1::UsageRecord) -> Value {
    let kind = if is_storage(record) { "esker.storage.v1" } else { "esker.usage.v1" };
    json!({
        "specversion": "1.0",
        "id": record.usage_id,
        "source": format!("//esker/{cluster}"),
        "type": kind,
        "subject": record.tenant,
        "time": utc_ms(record.time_unix_ms),
        "datacontenttype": "application/json",
        "data": if is_storage(record) { storage(record) } else { usage(record) },
    })
}

fn usage(record: &v1::UsageRecord) -> Value {
    let writes = record.write_tokens.unwrap_or_default();
    let mut data = json!({
        "request_id": record.request_id,
        "grant_id": hex(&record.grant),
        "op": record.op,
        "model": record.model,
        "namespace": hex(&record.namespace).get(..8).unwrap_or_default(),
        "prompt_tokens": record.prompt_tokens,
        "hit_tokens": record.hit_tokens,
        "miss_tokens": record.miss_tokens,
        "completion_tokens": record.completion_tokens,
        "write_tokens": {
            "ttl_5m": writes.ttl_5m,
            "ttl_1h": writes.ttl_1h,
            "ttl_24h": writes.ttl_24h,
            "ttl_72h": writes.ttl_72h,
            "lease": writes.lease,
        },
        "bytes_served": record.bytes_served,
        "scope": record.scope,
        "status": record.status,
        "complete": record.complete,
        "estimated": record.estimated,
        "fault": record.fault,
        "clock_skewed": record.clock_skewed,
        "started": utc_ms(record.started_unix_ms),
        "sequence": record.sequence,
        "price_class": "read",
    });
    let mut optional = |name: &str, value: Value| {
        data[name] = value;
    };
    if !record.miss_reason.is_empty() {
        optional("miss_reason", record.miss_reason.as_str().into());
    }
    if !record.reason.is_empty() {
        optional("reason", record.reason.as_str().into());
    }
    if record.count > 1 {
        optional("count", record.count.into());
    }
    data
}

/// Absolute values of an hour: a sink that has seen a lower revision of it takes these instead.
fn storage(record: &v1::UsageRecord) -> Value {
    json!({
        "hour": utc(record.hour_unix_s),
        "namespace": hex(&record.namespace).get(..8).unwrap_or_default(),
        "scope": record.scope,
        "stored_byte_seconds": record.stored_byte_seconds,
        "pinned_byte_seconds": record.pinned_byte_seconds,
        "revision": record.revision,
        "absolute": true,
        "sequence": record.sequence,
        "price_class": "storage",
    })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_event() {
        let record = v1::UsageRecord {
            usage_id: "k3f".into(),
            sequence: 7,
            tenant: "acme".into(),
            request_id: "r-1".into(),
            op: "fetch".into(),
            time_unix_ms: 1_795_434_000_123,
            started_unix_ms: 1_795_433_999_000,
            grant: vec![0xab; 16].into(),
            namespace: vec![0x12; 32].into(),
            scope: "private".into(),
            prompt_tokens: 4096,
            hit_tokens: 3072,
            miss_tokens: 1024,
            write_tokens: Some(v1::WriteTokens { ttl_1h: 1024, ..Default::default() }),
            status: "ok".into(),
            complete: true,
            miss_reason: "absent".into(),
            ..Default::default()
        };
        let event = cloud_event("fleet", &record);
        let expected: Value = serde_json::from_str(
            r#"{"specversion":"1.0","id":"k3f","source":"//esker/fleet","type":"esker.usage.v1","subject":"acme",
            "time":"2026-11-23T11:40:00.123Z","datacontenttype":"application/json",
            "data":{"request_id":"r-1","grant_id":"abababababababababababababababab","op":"fetch","model":"",
            "namespace":"12121212","prompt_tokens":4096,"hit_tokens":3072,"miss_tokens":1024,"completion_tokens":0,
            "write_tokens":{"ttl_5m":0,"ttl_1h":1024,"ttl_24h":0,"ttl_72h":0,"lease":0},"bytes_served":0,
            "scope":"private","status":"ok","complete":true,"estimated":false,"fault":false,"clock_skewed":false,
            "started":"2026-11-23T11:39:59.000Z","sequence":7,"miss_reason":"absent","price_class":"read"}}"#,
        )
        .unwrap();
        assert_eq!(event, expected);
        assert!(!event.to_string().contains('.') || no_floats(&event), "integers only");
    }

    fn no_floats(value: &Value) -> bool {
        match value {
            Value::Number(number) => number.is_u64(),
            Value::Object(map) => map.values().all(no_floats),
            Value::Array(values) => values.iter().all(no_floats),
            _ => true,
        }
    }

    #[test]
    fn an_hour_of_storage_states_the_hour() {
        let record = v1::UsageRecord {
            op: "storage".into(),
            hour_unix_s: 1_795_431_600,
            stored_byte_seconds: 5,
            revision: 1,
            ..Default::default()
        };
        let event = cloud_event("fleet", &record);
        assert_eq!(event["type"], "esker.storage.v1");
        assert_eq!(event["data"]["hour"], "2026-11-23T11:00:00Z");
        assert!(no_floats(&event["data"]));
    }
}
