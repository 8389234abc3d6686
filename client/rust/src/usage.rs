//! Usage: sums, and the records of the billing ledger.

use esker_proto::v1;

use crate::{Client, Result};

impl Client {
    /// Closes the account of a request.
    pub async fn settle(&self, request: v1::SettleRequest) -> Result<v1::SettleReply> {
        Ok(self.cache.clone().settle(request).await?.into_inner())
    }

    /// Sums of usage.
    pub async fn query_usage(&self, request: v1::QueryUsageRequest) -> Result<v1::QueryUsageReply> {
        Ok(self.usage.clone().query_usage(request).await?.into_inner())
    }

    /// Records in order, each with the cursor behind it.
    pub async fn export_usage(
        &self,
        request: v1::ExportUsageRequest,
    ) -> Result<tonic::Streaming<v1::ExportUsageReply>> {
        Ok(self.usage.clone().export_usage(request).await?.into_inner())
    }
}
