//! What an operator asks of a node: its tenants, and the end of one.

use esker_proto::v1;

use crate::{Client, Result};

impl Client {
    /// Takes back, for good, everything that an account has put until now.
    pub async fn revoke_writer(&self, tenant: &str, account: &str) -> Result<v1::RevokeWriterReply> {
        let request = v1::RevokeWriterRequest { tenant: tenant.to_owned(), account: account.to_owned() };
        Ok(self.admin.clone().revoke_writer(request).await?.into_inner())
    }

    /// Every tenant and what it holds.
    pub async fn list_tenants(&self) -> Result<Vec<v1::Tenant>> {
        Ok(self.admin.clone().list_tenants(v1::ListTenantsRequest {}).await?.into_inner().tenants)
    }

    /// Destroys the keys of what a tenant stored, then takes it away.
    pub async fn erase_tenant(&self, tenant: &str) -> Result<v1::EraseTenantReply> {
        let request = v1::EraseTenantRequest { tenant: tenant.to_owned() };
        Ok(self.admin.clone().erase_tenant(request).await?.into_inner())
    }
}
