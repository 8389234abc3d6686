//! The crate `foyer`: its hybrid cache with the block engine on io_uring and O_DIRECT, written on insertion.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    IoEngineConfig, RecoverMode, UringIoEngineConfig,
};
use tokio::runtime::Runtime;

use super::{Blob, CALLERS, Rival, TURN_BLOCKS};

const CAPACITY_BYTES: usize = 3 << 30;
/// Next to nothing: gets are to be cold.
const MEMORY_BYTES: usize = 1 << 20;
/// Room for all that eight callers put at once, so that nothing is dropped for want of it.
const BUFFER_BYTES: usize = 256 << 20;

type Cache = HybridCache<Vec<u8>, Bytes>;

/// See the module.
pub(super) struct Foyer {
    dir: PathBuf,
    runtime: Runtime,
    /// `None` only while it is opened again.
    cache: Option<Cache>,
}

impl Foyer {
    pub(super) fn open(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build()?;
        let cache = runtime.block_on(build(dir))?;
        Ok(Self { dir: dir.to_owned(), runtime, cache: Some(cache) })
    }

    fn cache(&self) -> anyhow::Result<Cache> {
        self.cache.clone().context("the cache is closed")
    }
}

async fn build(dir: &Path) -> anyhow::Result<Cache> {
    let device = FsDeviceBuilder::new(dir).with_capacity(CAPACITY_BYTES).with_direct(true).build()?;
    let engine = BlockEngineConfig::new(device)
        .with_block_size(64 << 20)
        .with_flushers(2)
        .with_buffer_pool_size(BUFFER_BYTES)
        .with_submit_queue_size_threshold(4 * BUFFER_BYTES);
    let io: Box<dyn IoEngineConfig> = Box::new(UringIoEngineConfig::new().with_io_depth(64));
    let cache = HybridCacheBuilder::new()
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(MEMORY_BYTES)
        .with_weighter(|_: &Vec<u8>, bytes: &Bytes| bytes.len())
        .storage()
        .with_io_engine_config(io)
        .with_engine_config(engine)
        .with_recover_mode(RecoverMode::Quiet)
        .build()
        .await?;
    Ok(cache)
}

impl Rival for Foyer {
    fn put(&self, callers: &[Vec<Blob>]) -> anyhow::Result<()> {
        let cache = self.cache()?;
        self.runtime.block_on(async {
            let mut tasks = Vec::new();
            for blobs in callers {
                let (cache, blobs) = (cache.clone(), blobs.clone());
                tasks.push(tokio::spawn(async move {
                    for turn in blobs.chunks(TURN_BLOCKS) {
                        for blob in turn {
                            cache.insert(blob.key.to_vec(), blob.bytes.clone());
                        }
                        cache.storage().wait().await;
                    }
                }));
            }
            for task in tasks {
                task.await?;
            }
            anyhow::Ok(())
        })?;
        // It leaves that to its user.
        for item in std::fs::read_dir(&self.dir)? {
            File::open(item?.path())?.sync_data()?;
        }
        Ok(())
    }

    fn get(&self, keys: &[[u8; 32]]) -> anyhow::Result<u64> {
        let (cache, keys) = (self.cache()?, Arc::new(keys.to_vec()));
        self.runtime.block_on(async {
            let mut tasks = Vec::new();
            for caller in 0..CALLERS {
                let (cache, keys) = (cache.clone(), Arc::clone(&keys));
                tasks.push(tokio::spawn(async move {
                    let mut bytes = 0;
                    for key in keys.iter().skip(caller).step_by(CALLERS) {
                        let entry = cache.get(&key.to_vec()).await?.context("a block is missing")?;
                        bytes += entry.value().len() as u64;
                    }
                    anyhow::Ok(bytes)
                }));
            }
            let mut bytes = 0;
            for task in tasks {
                bytes += task.await??;
            }
            Ok(bytes)
        })
    }

    fn reopen(&mut self) -> anyhow::Result<()> {
        if let Some(cache) = self.cache.take() {
            self.runtime.block_on(cache.close())?;
        }
        self.cache = Some(self.runtime.block_on(build(&self.dir))?);
        Ok(())
    }
}
