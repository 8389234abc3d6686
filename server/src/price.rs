//! Prices: from usage to amounts, by integers alone.
//!
//! A TOML file. Amounts are in micro-units: millionths of the currency. Every field may be left out and is 0 then.
//!
//! ```toml
//! currency = "USD"
//! # Micro-units for a million tokens.
//! hit = 28_000                  # a prompt token that came from the cache
//! miss = 280_000                # a prompt token that was computed
//! # On top of `miss`, for computed tokens that were stored, by how long they are kept.
//! write = { ttl_5m = 0, ttl_1h = 20_000, ttl_24h = 70_000, ttl_72h = 140_000, lease = 200_000 }
//! completion = 420_000          # a token that the bundled decoder wrote
//! # Micro-units for a GiB (2^30 bytes) kept for an hour.
//! stored_gib_hour = 150
//! pinned_gib_hour = 600
//!
//! [tenants.acme]                # every price that is named here replaces the one above, for this tenant
//! hit = 14_000
//! ```
//!
//! Amounts are computed for each account of each hour, rounded down, and only then added: whatever rows are grouped by, their
//! amounts add up to the same.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use esker_proto::v1;
use serde::Deserialize;

/// Tokens that a price is for.
const MILLION: u128 = 1_000_000;
/// Byte-seconds that a price is for.
const GIB_HOUR: u128 = (1 << 30) * 3600;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct PriceFile {
    pub(crate) currency: String,
    all: Overrides,
    tenants: BTreeMap<String, Overrides>,
}

/// The parts of the file that are not prices; the rest of its table is [`Overrides`].
#[derive(Deserialize)]
struct Named {
    currency: String,
    #[serde(default)]
    tenants: BTreeMap<String, Overrides>,
}

/// Prices that are named somewhere.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Overrides {
    hit: Option<u64>,
    miss: Option<u64>,
    write: Option<WritePrices>,
    completion: Option<u64>,
    stored_gib_hour: Option<u64>,
    pinned_gib_hour: Option<u64>,
}

/// Micro-units for a million tokens written, by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WritePrices {
    pub(crate) ttl_5m: u64,
    pub(crate) ttl_1h: u64,
    pub(crate) ttl_24h: u64,
    pub(crate) ttl_72h: u64,
    pub(crate) lease: u64,
}

/// What one tenant pays, in micro-units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prices {
    pub(crate) hit: u64,
    pub(crate) miss: u64,
    pub(crate) write: WritePrices,
    pub(crate) completion: u64,
    pub(crate) stored_gib_hour: u64,
    pub(crate) pinned_gib_hour: u64,
}

/// What usage costs, in micro-units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    pub(crate) hit: u64,
    pub(crate) miss: u64,
    pub(crate) write: u64,
    pub(crate) completion: u64,
    pub(crate) stored: u64,
    pub(crate) pinned: u64,
    /// What the prompts would cost without a cache: every token computed, none written, nothing stored.
    pub(crate) without_cache: u64,
}

impl PriceFile {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the prices {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("the prices {} are not usable", path.display()))
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let Named { currency, tenants } = toml::from_str(text)?;
        let mut prices: toml::Table = toml::from_str(text)?;
        prices.retain(|name, _| name != "currency" && name != "tenants");
        let all = prices.try_into()?;
        Ok(Self { currency, all, tenants })
    }

    /// What this tenant pays.
    pub(crate) fn of(&self, tenant: &str) -> Prices {
        let own = self.tenants.get(tenant).copied().unwrap_or_default();
        let pick = |price: fn(&Overrides) -> Option<u64>| price(&own).or(price(&self.all)).unwrap_or(0);
        Prices {
            hit: pick(|of| of.hit),
            miss: pick(|of| of.miss),
            write: own.write.or(self.all.write).unwrap_or_default(),
            completion: pick(|of| of.completion),
            stored_gib_hour: pick(|of| of.stored_gib_hour),
            pinned_gib_hour: pick(|of| of.pinned_gib_hour),
        }
    }
}

impl Amounts {
    /// What the cache did for these prompts is charged with.
    pub(crate) fn prompt(&self) -> u64 {
        self.hit.saturating_add(self.miss).saturating_add(self.write)
    }

    /// Everything.
    pub(crate) fn total(&self) -> u64 {
        [self.prompt(), self.completion, self.stored, self.pinned].into_iter().fold(0, u64::saturating_add)
    }

    /// What caching saved, its own costs taken off; below 0 if it cost more than it brought.
    pub(crate) fn saved(&self) -> i128 {
        let with_cache = self.prompt().saturating_add(self.stored).saturating_add(self.pinned);
        i128::from(self.without_cache) - i128::from(with_cache)
    }

    pub(crate) fn add(&mut self, more: &Self) {
        for (sum, more) in [
            (&mut self.hit, more.hit),
            (&mut self.miss, more.miss),
            (&mut self.write, more.write),
            (&mut self.completion, more.completion),
            (&mut self.stored, more.stored),
            (&mut self.pinned, more.pinned),
            (&mut self.without_cache, more.without_cache),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

/// What usage costs. A pure function of both.
pub(crate) fn rate(sums: &v1::UsageSums, prices: &Prices) -> Amounts {
    let writes = sums.write_tokens.unwrap_or_default();
    let write = [
        (writes.ttl_5m, prices.write.ttl_5m),
        (writes.ttl_1h, prices.write.ttl_1h),
        (writes.ttl_24h, prices.write.ttl_24h),
        (writes.ttl_72h, prices.write.ttl_72h),
        (writes.lease, prices.write.lease),
    ];
    Amounts {
        hit: amount(sums.hit_tokens, prices.hit, MILLION),
        miss: amount(sums.miss_tokens, prices.miss, MILLION),
        write: write
            .into_iter()
            .map(|(tokens, price)| amount(tokens, price, MILLION))
            .fold(0, u64::saturating_add),
        completion: amount(sums.completion_tokens, prices.completion, MILLION),
        stored: amount(sums.stored_byte_seconds, prices.stored_gib_hour, GIB_HOUR),
        pinned: amount(sums.pinned_byte_seconds, prices.pinned_gib_hour, GIB_HOUR),
        without_cache: amount(sums.prompt_tokens, prices.miss, MILLION),
    }
}

/// `quantity / unit * price`, exact, rounded down once.
fn amount(quantity: u64, price: u64, unit: u128) -> u64 {
    u64::try_from(u128::from(quantity) * u128::from(price) / unit).unwrap_or(u64::MAX)
}

/// An amount as a decimal number, without ever being a float.
pub(crate) fn decimal(micro_units: i128) -> String {
    let sign = if micro_units < 0 { "-" } else { "" };
    let (whole, part) = (micro_units.unsigned_abs() / MILLION, micro_units.unsigned_abs() % MILLION);
    format!("{sign}{whole}.{part:06}")
}

/// For fuzzing: a price file, and what the least and the most usage costs by it. Whether it can be used.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let Some(file) = std::str::from_utf8(bytes).ok().and_then(|text| PriceFile::parse(text).ok()) else {
        return false;
    };
    let writes =
        v1::WriteTokens { ttl_5m: u64::MAX, ttl_1h: u64::MAX, lease: u64::MAX, ..Default::default() };
    let most = v1::UsageSums {
        hit_tokens: u64::MAX,
        miss_tokens: u64::MAX,
        prompt_tokens: u64::MAX,
        completion_tokens: u64::MAX,
        stored_byte_seconds: u64::MAX,
        pinned_byte_seconds: u64::MAX,
        write_tokens: Some(writes),
        ..Default::default()
    };
    for tenant in file.tenants.keys().map(String::as_str).chain(["another"]) {
        let prices = file.of(tenant);
        assert_eq!(rate(&v1::UsageSums::default(), &prices), Amounts::default(), "nothing costs nothing");
        let mut amounts = rate(&most, &prices);
        let once = amounts.total();
        amounts.add(&amounts.clone());
        assert!(amounts.total() >= once && !decimal(amounts.saved()).is_empty());
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> PriceFile {
        let text: String = include_str!("price.rs")
            .lines()
            .skip_while(|line| *line != "//! ```toml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| format!("{}\n", line.trim_start_matches("//!")))
            .collect();
        PriceFile::parse(&text).unwrap()
    }

    /// Golden: usage and prices in, amounts out. Lines of `prompt hit w5m w1h w24h w72h lease completion stored pinned tenant
    /// | hit miss write completion stored pinned without-cache`.
    #[test]
    fn golden_amounts() {
        let prices = example();
        let mut checked = 0;
        for line in include_str!("price/golden.txt").lines().filter(|line| !line.starts_with('#')) {
            let (usage, expected) = line.split_once('|').unwrap();
            let mut usage = usage.split_whitespace();
            let mut next = || usage.next().unwrap();
            let number = |text: &str| text.replace('_', "").parse::<u64>().unwrap();
            let (prompt_tokens, hit_tokens) = (number(next()), number(next()));
            let write_tokens = v1::WriteTokens {
                ttl_5m: number(next()),
                ttl_1h: number(next()),
                ttl_24h: number(next()),
                ttl_72h: number(next()),
                lease: number(next()),
            };
            let sums = v1::UsageSums {
                prompt_tokens,
                hit_tokens,
                miss_tokens: prompt_tokens - hit_tokens,
                write_tokens: Some(write_tokens),
                completion_tokens: number(next()),
                stored_byte_seconds: number(next()),
                pinned_byte_seconds: number(next()),
                ..Default::default()
            };
            let Amounts { hit, miss, write, completion, stored, pinned, without_cache } =
                rate(&sums, &prices.of(next()));
            let amounts = [hit, miss, write, completion, stored, pinned, without_cache];
            let expected: Vec<u64> = expected.split_whitespace().map(number).collect();
            assert_eq!(amounts[..], expected[..], "{line}");
            checked += 1;
        }
        assert!(checked >= 6);
    }

    #[test]
    fn tenants_replace_what_they_name() {
        let prices = example();
        assert_eq!((prices.of("acme").hit, prices.of("other").hit), (14_000, 28_000));
        assert_eq!(prices.of("acme").miss, 280_000);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, named) in [
            ("currency = \"USD\"\nhits = 3", "hits"),
            ("hit = 3", "currency"),
            ("currency = \"USD\"\nhit = 0.5", "hit"),
            ("currency = \"USD\"\nwrite = { ttl_2h = 3 }", "ttl_2h"),
            ("currency = \"USD\"\n[tenants.a]\nmis = 3", "mis"),
        ] {
            let error = format!("{:#}", PriceFile::parse(text).unwrap_err());
            assert!(error.contains(named), "{text:?}: {error}");
        }
    }

    #[test]
    fn decimals_are_exact() {
        assert_eq!(decimal(0), "0.000000");
        assert_eq!(decimal(1), "0.000001");
        assert_eq!(decimal(-1_500_000), "-1.500000");
        assert_eq!(decimal(123_456_789_012), "123456.789012");
    }
}
