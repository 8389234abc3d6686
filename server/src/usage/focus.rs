//! Rows as CSV in the columns of FOCUS 1.2 (focus.finops.org): one line for each kind of charge of an account and hour.
//!
//! Cost columns are filled where there are prices, from integer micro-units; without prices they are 0 and only quantities speak.

use std::fmt::Write;

use esker_proto::v1;

use super::calendar::{month, utc};
use crate::ledger::sums::HOUR_S;
use crate::price::{PriceFile, decimal, rate};

const COLUMNS: [&str; 34] = [
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
];

/// One kind of charge.
struct Charge {
    sku: &'static str,
    description: &'static str,
    unit: &'static str,
    quantity: u64,
    /// Micro-units for so many of the unit.
    price: u64,
    price_unit: &'static str,
    /// How many units a price is for.
    price_quantity: u64,
    micro_units: u64,
}

/// The header and a line for each charge. Rows are by tenant, namespace, scope and hour.
pub(crate) fn csv(cluster: &str, rows: &[v1::UsageRow], prices: Option<&PriceFile>) -> String {
    let mut text = COLUMNS.join(",");
    text.push('\n');
    for row in rows {
        for charge in charges(row, prices).iter().filter(|charge| charge.quantity > 0) {
            line(&mut text, cluster, row, charge, prices.map_or("XXX", |prices| &prices.currency));
        }
    }
    text
}

fn charges(row: &v1::UsageRow, prices: Option<&PriceFile>) -> Vec<Charge> {
    const MILLION: u64 = 1_000_000;
    const GIB_HOUR: u64 = (1 << 30) * 3600;
    let sums = row.sums.unwrap_or_default();
    let prices = prices.map(|prices| prices.of(&row.tenant)).unwrap_or_default();
    let writes = sums.write_tokens.unwrap_or_default();
    let tokens = |sku, description, quantity, price, of: fn(&mut v1::UsageSums, u64)| {
        // Each charge is rated by the one function that rates, with everything else at nothing.
        let mut alone = v1::UsageSums::default();
        of(&mut alone, quantity);
        let amounts = rate(&alone, &prices);
        let micro_units = amounts.total();
        let (unit, price_unit, price_quantity) = ("Tokens", "1000000 Tokens", MILLION);
        Charge { sku, description, unit, quantity, price, price_unit, price_quantity, micro_units }
    };
    let bytes = |sku, description, quantity, price, of: fn(&mut v1::UsageSums, u64)| {
        let mut alone = v1::UsageSums::default();
        of(&mut alone, quantity);
        let micro_units = rate(&alone, &prices).total();
        let (unit, price_unit, price_quantity) = ("Byte-Seconds", "GiB-Hours", GIB_HOUR);
        Charge { sku, description, unit, quantity, price, price_unit, price_quantity, micro_units }
    };
    type Of = fn(&mut v1::UsageSums, u64);
    let write: [(&str, &str, u64, u64, Of); 5] = [
        ("write-5m", "Prompt tokens stored for 5 minutes", writes.ttl_5m, prices.write.ttl_5m, |sums, n| {
            sums.write_tokens.get_or_insert_default().ttl_5m = n;
        }),
        ("write-1h", "Prompt tokens stored for 1 hour", writes.ttl_1h, prices.write.ttl_1h, |sums, n| {
            sums.write_tokens.get_or_insert_default().ttl_1h = n;
        }),
        (
            "write-24h",
            "Prompt tokens stored for 24 hours",
            writes.ttl_24h,
            prices.write.ttl_24h,
            |sums, n| {
                sums.write_tokens.get_or_insert_default().ttl_24h = n;
            },
        ),
        (
            "write-72h",
            "Prompt tokens stored for 72 hours",
            writes.ttl_72h,
            prices.write.ttl_72h,
            |sums, n| {
                sums.write_tokens.get_or_insert_default().ttl_72h = n;
            },
        ),
        ("write-lease", "Prompt tokens stored under a lease", writes.lease, prices.write.lease, |sums, n| {
            sums.write_tokens.get_or_insert_default().lease = n;
        }),
    ];
    let mut charges = vec![
        tokens("hit", "Prompt tokens from the cache", sums.hit_tokens, prices.hit, |sums, n| {
            sums.hit_tokens = n;
        }),
        tokens("miss", "Prompt tokens computed", sums.miss_tokens, prices.miss, |sums, n| {
            sums.miss_tokens = n;
        }),
    ];
    charges.extend(
        write.into_iter().map(|(sku, text, quantity, price, of)| tokens(sku, text, quantity, price, of)),
    );
    charges.push(tokens(
        "completion",
        "Tokens written",
        sums.completion_tokens,
        prices.completion,
        |sums, n| sums.completion_tokens = n,
    ));
    charges.push(bytes(
        "stored",
        "Cache stored",
        sums.stored_byte_seconds,
        prices.stored_gib_hour,
        |sums, n| sums.stored_byte_seconds = n,
    ));
    charges.push(bytes(
        "pinned",
        "Cache kept under leases",
        sums.pinned_byte_seconds,
        prices.pinned_gib_hour,
        |sums, n| sums.pinned_byte_seconds = n,
    ));
    charges
}

fn line(text: &mut String, cluster: &str, row: &v1::UsageRow, charge: &Charge, currency: &str) {
    let cost = decimal(charge.micro_units.into());
    let unit_price = decimal(charge.price.into());
    let (billing_start, billing_end) = month(row.start_unix_s);
    let tenant = if row.tenant.is_empty() { "(shared)" } else { &row.tenant };
    let namespace = row.namespace.get(..8).unwrap_or("all");
    let tags = serde_json::json!({"scope": row.scope, "namespace": namespace}).to_string();
    let fields: [&str; COLUMNS.len()] = [
        &cost,
        tenant,
        tenant,
        currency,
        &utc(billing_end),
        &utc(billing_start),
        "Usage",
        "",
        charge.description,
        "Usage-Based",
        &utc(row.start_unix_s + HOUR_S),
        &utc(row.start_unix_s),
        &charge.quantity.to_string(),
        charge.unit,
        &cost,
        &cost,
        cluster,
        &cost,
        &unit_price,
        "Standard",
        &quotient(charge.quantity, charge.price_quantity),
        charge.price_unit,
        "Esker",
        cluster,
        namespace,
        "KV cache namespace",
        "AI and Machine Learning",
        "Esker prefix cache",
        "Generative AI",
        charge.sku,
        charge.sku,
        tenant,
        tenant,
        &tags,
    ];
    let line: Vec<String> = fields.iter().map(|field| quoted(field)).collect();
    let _ = writeln!(text, "{}", line.join(","));
}

/// `quantity / unit` with nine decimals, rounded down.
fn quotient(quantity: u64, unit: u64) -> String {
    let scaled = u128::from(quantity) * 1_000_000_000 / u128::from(unit);
    format!("{}.{:09}", scaled / 1_000_000_000, scaled % 1_000_000_000)
}

/// RFC 4180. What a spreadsheet would run as a formula is kept from it.
fn quoted(field: &str) -> String {
    let field = if field.starts_with(['=', '+', '-', '@']) { format!("'{field}") } else { field.to_owned() };
    if field.contains([',', '"', '\n', '\r']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_lines() {
        let prices = PriceFile::parse(
            "currency = \"USD\"\nhit = 28000\nmiss = 280000\nwrite = { ttl_1h = 20000 }\nstored_gib_hour = 150",
        )
        .unwrap();
        let row = v1::UsageRow {
            tenant: "acme".into(),
            namespace: "12".repeat(32),
            scope: "private".into(),
            start_unix_s: 1_795_431_600,
            sums: Some(v1::UsageSums {
                prompt_tokens: 4_000_000,
                hit_tokens: 3_000_000,
                miss_tokens: 1_000_000,
                write_tokens: Some(v1::WriteTokens { ttl_1h: 500_000, ..Default::default() }),
                stored_byte_seconds: 2 * (1 << 30) * 3600,
                ..Default::default()
            }),
        };
        let text = csv("fleet", std::slice::from_ref(&row), Some(&prices));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        let hit: Vec<&str> = lines[1].splitn(COLUMNS.len(), ',').collect();
        let of = |name: &str| hit[COLUMNS.iter().position(|column| *column == name).unwrap()];
        assert_eq!((of("BilledCost"), of("ListCost")), ("0.084000", "0.084000"));
        assert_eq!((of("ConsumedQuantity"), of("ConsumedUnit")), ("3000000", "Tokens"));
        assert_eq!((of("PricingQuantity"), of("PricingUnit")), ("3.000000000", "1000000 Tokens"));
        assert_eq!(of("ChargePeriodStart"), "2026-11-23T11:00:00Z");
        assert_eq!(of("ChargePeriodEnd"), "2026-11-23T12:00:00Z");
        assert_eq!(
            (of("BillingPeriodStart"), of("BillingPeriodEnd")),
            ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
        );
        assert_eq!((of("SkuId"), of("SubAccountId"), of("ChargeCategory")), ("hit", "acme", "Usage"));
        assert_eq!(of("Tags"), "\"{\"\"namespace\"\":\"\"12121212\"\",\"\"scope\"\":\"\"private\"\"}\"");
        assert!(lines[2].starts_with("0.280000,") && lines[3].starts_with("0.010000,"));
        assert!(lines[4].starts_with("0.000300,") && lines[4].contains(",2.000000000,GiB-Hours,"));

        let without = csv("fleet", &[row], None);
        assert!(without.lines().nth(1).unwrap().starts_with("0.000000,acme,acme,XXX,"));
    }

    #[test]
    fn a_name_is_no_formula() {
        assert_eq!(quoted("=1+1"), "'=1+1");
        assert_eq!(quoted("a,b"), "\"a,b\"");
        assert_eq!(quoted("say \"x\""), "\"say \"\"x\"\"\"");
    }
}
