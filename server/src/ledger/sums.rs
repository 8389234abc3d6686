//! Sums over records: how each fact counts, in one place. Integers only; all of them saturate rather than wrap.

use esker_proto::v1;

/// Seconds of the hour that usage is counted by.
pub(crate) const HOUR_S: u64 = 3600;

/// What usage is counted by, finest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Account {
    /// Start of a UTC hour, which does not include its end.
    pub(crate) hour_unix_s: u64,
    pub(crate) tenant: String,
    /// 32 bytes, or none where a fact is about no namespace.
    pub(crate) namespace: Vec<u8>,
    pub(crate) scope: String,
}

/// The hour that a moment lies in. Unix time has no leap seconds and UTC no daylight saving: every moment lies in one hour.
pub(crate) fn hour_of(unix_ms: u64) -> u64 {
    unix_ms / 1000 / HOUR_S * HOUR_S
}

/// The account of a record.
pub(crate) fn account(record: &v1::UsageRecord) -> Account {
    let hour_unix_s = if is_storage(record) { record.hour_unix_s } else { hour_of(record.time_unix_ms) };
    Account {
        hour_unix_s,
        tenant: record.tenant.clone(),
        namespace: record.namespace.to_vec(),
        scope: record.scope.clone(),
    }
}

/// Whether a record states absolute values of an hour.
pub(crate) fn is_storage(record: &v1::UsageRecord) -> bool {
    record.op == "storage"
}

/// Counts a record. What it states in absolute values replaces what stood there.
pub(crate) fn count(sums: &mut v1::UsageSums, record: &v1::UsageRecord) {
    if is_storage(record) {
        sums.stored_byte_seconds = record.stored_byte_seconds;
        sums.pinned_byte_seconds = record.pinned_byte_seconds;
        return;
    }
    let many = record.count.max(1);
    sums.bytes_served = sums.bytes_served.saturating_add(record.bytes_served);
    sums.faults = sums.faults.saturating_add(u64::from(record.fault));
    if !record.complete {
        sums.incomplete_requests = sums.incomplete_requests.saturating_add(many);
        return;
    }
    sums.requests = sums.requests.saturating_add(many);
    for (sum, more) in [
        (&mut sums.prompt_tokens, record.prompt_tokens),
        (&mut sums.hit_tokens, record.hit_tokens),
        (&mut sums.miss_tokens, record.miss_tokens),
        (&mut sums.completion_tokens, record.completion_tokens),
    ] {
        *sum = sum.saturating_add(more);
    }
    if let Some(more) = &record.write_tokens {
        add_writes(sums.write_tokens.get_or_insert_default(), more);
    }
}

/// Adds sums of different accounts.
pub(crate) fn add(sums: &mut v1::UsageSums, more: &v1::UsageSums) {
    for (sum, more) in [
        (&mut sums.requests, more.requests),
        (&mut sums.incomplete_requests, more.incomplete_requests),
        (&mut sums.prompt_tokens, more.prompt_tokens),
        (&mut sums.hit_tokens, more.hit_tokens),
        (&mut sums.miss_tokens, more.miss_tokens),
        (&mut sums.bytes_served, more.bytes_served),
        (&mut sums.stored_byte_seconds, more.stored_byte_seconds),
        (&mut sums.pinned_byte_seconds, more.pinned_byte_seconds),
        (&mut sums.completion_tokens, more.completion_tokens),
        (&mut sums.faults, more.faults),
    ] {
        *sum = sum.saturating_add(more);
    }
    if let Some(more) = &more.write_tokens {
        add_writes(sums.write_tokens.get_or_insert_default(), more);
    }
}

/// Tokens written, of all classes.
pub(crate) fn written(writes: &v1::WriteTokens) -> u64 {
    [writes.ttl_5m, writes.ttl_1h, writes.ttl_24h, writes.ttl_72h, writes.lease]
        .into_iter()
        .fold(0, u64::saturating_add)
}

fn add_writes(sums: &mut v1::WriteTokens, more: &v1::WriteTokens) {
    for (sum, more) in [
        (&mut sums.ttl_5m, more.ttl_5m),
        (&mut sums.ttl_1h, more.ttl_1h),
        (&mut sums.ttl_24h, more.ttl_24h),
        (&mut sums.ttl_72h, more.ttl_72h),
        (&mut sums.lease, more.lease),
    ] {
        *sum = sum.saturating_add(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_half_open_whatever_the_calendar_does() {
        // 2016-12-31T23:59:60Z was a leap second; Unix time gives it the number of the second after it.
        let new_year = 1_483_228_800;
        assert_eq!(hour_of(new_year * 1000 - 1), new_year - HOUR_S);
        assert_eq!(hour_of(new_year * 1000), new_year);
        assert_eq!(hour_of((new_year + HOUR_S) * 1000 - 1), new_year);
        // 2026-03-29T01:00:00Z and 2026-10-25T01:00:00Z, when Central Europe changes its clocks: hours like any other.
        for change in [1_774_746_000_u64, 1_792_890_000] {
            let hours: Vec<u64> =
                (0..4).map(|quarter| hour_of((change - HOUR_S + quarter * 1800) * 1000)).collect();
            assert_eq!(hours, [change - HOUR_S, change - HOUR_S, change, change]);
        }
    }

    #[test]
    fn what_is_not_complete_counts_no_tokens() {
        let mut sums = v1::UsageSums::default();
        let record = v1::UsageRecord {
            prompt_tokens: 10,
            miss_tokens: 10,
            bytes_served: 5,
            count: 3,
            ..Default::default()
        };
        count(&mut sums, &record);
        let expected = v1::UsageSums { incomplete_requests: 3, bytes_served: 5, ..Default::default() };
        assert_eq!(sums, expected);
    }

    #[test]
    fn an_hour_of_storage_replaces_and_never_adds() {
        let mut sums = v1::UsageSums::default();
        let mut record =
            v1::UsageRecord { op: "storage".into(), stored_byte_seconds: 70, ..Default::default() };
        for value in [70, 70, 60] {
            record.stored_byte_seconds = value;
            count(&mut sums, &record);
            assert_eq!((sums.stored_byte_seconds, sums.requests), (value, 0));
        }
    }
}
