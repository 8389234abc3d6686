//! `esker tenants`.

use esker_client::v1;
use indicatif::HumanBytes;
use serde_json::json;

use super::{NodeArgs, client_runtime, print};

/// Arguments of `esker tenants`. The account that asks needs the role admin.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Destroy the keys of all that this tenant has stored, then take it away: there is no way back
    #[arg(long, value_name = "TENANT")]
    erase: Option<String>,
    /// Take back all that this account has put, in whatever scope: its word counts for nothing any more
    #[arg(long, value_name = "TENANT/ACCOUNT", value_parser = account, conflicts_with = "erase")]
    revoke: Option<(String, String)>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Tenant and account.
fn account(text: &str) -> Result<(String, String), String> {
    let (tenant, account) = text.split_once('/').ok_or("it has the form TENANT/ACCOUNT")?;
    Ok((tenant.to_owned(), account.to_owned()))
}

/// Lists, or erases one, or takes an account's word back.
pub fn run(args: Args) -> anyhow::Result<()> {
    client_runtime()?.block_on(tenants(args))
}

async fn tenants(args: Args) -> anyhow::Result<()> {
    let client = args.node.connect().await?;
    if let Some((tenant, account)) = &args.revoke {
        let v1::RevokeWriterReply { objects } = client.revoke_writer(tenant, account).await?;
        match args.json {
            true => say!("{}", json!({"tenant": tenant, "account": account, "objects": objects})),
            false => say!("{tenant}/{account}: {objects} objects taken back"),
        }
        return Ok(());
    }
    let Some(tenant) = &args.erase else {
        let tenants = client.list_tenants().await?;
        if args.json {
            return print(&format!(
                "{}\n",
                json!({"tenants": tenants.iter().map(to_json).collect::<Vec<_>>()})
            ));
        }
        return print(&tenants.iter().map(|tenant| told(tenant) + "\n").collect::<String>());
    };
    let v1::EraseTenantReply { objects, epochs } = client.erase_tenant(tenant).await?;
    if args.json {
        say!("{}", json!({"tenant": tenant, "objects": objects, "epochs": epochs}));
    } else {
        let epochs: Vec<String> = epochs.iter().map(u32::to_string).collect();
        say!("{tenant}: {objects} objects erased; the keys of epoch {} are destroyed", epochs.join(", "));
    }
    Ok(())
}

fn told(tenant: &v1::Tenant) -> String {
    let limit = match tenant.stored_bytes_limit {
        0 => "no limit".into(),
        bytes => format!("limit {}", HumanBytes(bytes)),
    };
    format!(
        "{}: {} stored ({limit}), {} sessions hold {}; epoch {}",
        tenant.tenant,
        HumanBytes(tenant.stored_bytes),
        tenant.sessions,
        HumanBytes(tenant.leased_bytes),
        tenant.epoch
    )
}

fn to_json(tenant: &v1::Tenant) -> serde_json::Value {
    json!({"tenant": tenant.tenant, "stored_bytes": tenant.stored_bytes,
           "held_bytes": tenant.held_bytes,
           "stored_bytes_limit": tenant.stored_bytes_limit, "leased_bytes": tenant.leased_bytes,
           "sessions": tenant.sessions, "epoch": tenant.epoch})
}
