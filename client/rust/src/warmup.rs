//! Warm-up jobs: submit, look at, watch, list, cancel.

use esker_proto::v1;

use crate::{Client, Result};

/// The job now and after each step; ends when the job has ended. Dropping it ends the watching only.
pub struct Watched(tonic::Streaming<v1::WarmupJob>);

impl Watched {
    /// The next state of the job, `None` after the last.
    pub async fn next(&mut self) -> Result<Option<v1::WarmupJob>> {
        Ok(self.0.message().await?)
    }
}

impl Client {
    /// Submits a job, or asks what it would do.
    pub async fn submit_warmup(&self, request: v1::SubmitWarmupRequest) -> Result<v1::WarmupJob> {
        Ok(self.warmup.clone().submit_warmup(request).await?.into_inner())
    }

    /// A job as it is now.
    pub async fn get_warmup(&self, job: &str) -> Result<v1::WarmupJob> {
        let request = v1::GetWarmupRequest { job: job.to_owned() };
        Ok(self.warmup.clone().get_warmup(request).await?.into_inner())
    }

    /// A job, step by step.
    pub async fn watch_warmup(&self, job: &str) -> Result<Watched> {
        let request = v1::GetWarmupRequest { job: job.to_owned() };
        Ok(Watched(self.warmup.clone().watch_warmup(request).await?.into_inner()))
    }

    /// The tenant's jobs above `after`, by name; at most 1,000.
    pub async fn list_warmups(&self, after: &str) -> Result<Vec<v1::WarmupJob>> {
        let request = v1::ListWarmupsRequest { after: after.to_owned(), limit: 0 };
        Ok(self.warmup.clone().list_warmups(request).await?.into_inner().jobs)
    }

    /// Ends a job; what it has stored stays.
    pub async fn cancel_warmup(&self, job: &str) -> Result<v1::WarmupJob> {
        let request = v1::CancelWarmupRequest { job: job.to_owned() };
        Ok(self.warmup.clone().cancel_warmup(request).await?.into_inner())
    }
}
