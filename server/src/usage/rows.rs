//! Rows: sums of accounts, grouped by what was asked for.

use std::collections::BTreeMap;

use esker_proto::v1;

use super::calendar::DAY_S;
use super::event::hex;
use crate::ledger::sums::{self, Account};

/// What rows are told apart by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Grouping {
    pub(crate) tenant: bool,
    pub(crate) namespace: bool,
    pub(crate) scope: bool,
    /// Seconds of a period: an hour or a day; `None` for all of it.
    pub(crate) period_s: Option<u64>,
}

impl Grouping {
    pub(crate) fn of(groups: &[v1::UsageGroup]) -> Self {
        let has = |group| groups.contains(&group);
        let day = has(v1::UsageGroup::Day).then_some(DAY_S);
        Self {
            tenant: has(v1::UsageGroup::Tenant),
            namespace: has(v1::UsageGroup::Namespace),
            scope: has(v1::UsageGroup::Scope),
            period_s: if has(v1::UsageGroup::Hour) { Some(sums::HOUR_S) } else { day },
        }
    }

    /// The account that a row stands for: what is not grouped by is empty.
    pub(crate) fn key(&self, account: &Account) -> Account {
        let text = |wanted: bool, text: &String| if wanted { text.clone() } else { String::new() };
        Account {
            hour_unix_s: self.period_s.map_or(0, |period| account.hour_unix_s / period * period),
            tenant: text(self.tenant, &account.tenant),
            namespace: if self.namespace { account.namespace.clone() } else { Vec::new() },
            scope: text(self.scope, &account.scope),
        }
    }
}

/// Sums of the accounts that `wanted` takes.
pub(crate) fn group(
    accounts: &[(Account, v1::UsageSums)],
    grouping: &Grouping,
    wanted: impl Fn(&Account) -> bool,
) -> Vec<v1::UsageRow> {
    let mut rows: BTreeMap<Account, v1::UsageSums> = BTreeMap::new();
    for (account, more) in accounts.iter().filter(|(account, _)| wanted(account)) {
        sums::add(rows.entry(grouping.key(account)).or_default(), more);
    }
    rows.into_iter().map(|(account, sums)| row(&account, &sums)).collect()
}

fn row(account: &Account, sums: &v1::UsageSums) -> v1::UsageRow {
    v1::UsageRow {
        tenant: account.tenant.clone(),
        namespace: hex(&account.namespace),
        scope: account.scope.clone(),
        start_unix_s: account.hour_unix_s,
        sums: Some(*sums),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_rows_are_grouped_they_add_up_to_the_same() {
        let mut accounts = Vec::new();
        for hour in 0..30_u64 {
            for tenant in ["a", "b"] {
                for scope in ["private", "org"] {
                    let account = Account {
                        hour_unix_s: hour * sums::HOUR_S,
                        tenant: tenant.into(),
                        namespace: vec![u8::try_from(hour % 3).unwrap(); 32],
                        scope: scope.into(),
                    };
                    let hit_tokens = hour + 1;
                    accounts.push((account, v1::UsageSums { hit_tokens, requests: 1, ..Default::default() }));
                }
            }
        }
        use v1::UsageGroup::{Day, Hour, Namespace, Scope, Tenant};
        let groupings: [(&[v1::UsageGroup], usize); 7] = [
            (&[], 1),
            (&[Tenant], 2),
            (&[Namespace], 3),
            (&[Tenant, Scope], 4),
            (&[Hour], 30),
            (&[Day], 2),
            (&[Tenant, Namespace, Scope, Hour], 120),
        ];
        for (groups, count) in groupings {
            let rows = group(&accounts, &Grouping::of(groups), |_| true);
            assert_eq!(rows.len(), count, "{groups:?}");
            let total: u64 = rows.iter().map(|row| row.sums.unwrap().hit_tokens).sum();
            assert_eq!(total, 4 * (30 * 31 / 2), "{groups:?}");
        }
        let own = group(&accounts, &Grouping::of(&[Tenant]), |account| account.tenant == "a");
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].sums.unwrap().requests, 60);
    }
}
