//! `Usage`: sums of the billing ledger, and its records.

use esker_proto::v1;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// The service.
pub(crate) struct UsageService;

#[tonic::async_trait]
impl v1::usage_server::Usage for UsageService {
    async fn query_usage(
        &self,
        _: Request<v1::QueryUsageRequest>,
    ) -> Result<Response<v1::QueryUsageReply>, Status> {
        Err(Status::unimplemented("this node keeps no billing ledger yet"))
    }

    type ExportUsageStream = ReceiverStream<Result<v1::ExportUsageReply, Status>>;

    async fn export_usage(
        &self,
        _: Request<v1::ExportUsageRequest>,
    ) -> Result<Response<Self::ExportUsageStream>, Status> {
        Err(Status::unimplemented("this node keeps no billing ledger yet"))
    }
}
