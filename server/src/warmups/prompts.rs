//! The prompts of jobs, and how they lie in the control database until their job has ended. Where the node encrypts they are sealed by
//! the key of their tenant, which goes first when that is erased.
//!
//! ```text
//! not sealed   JSON, an array of arrays: of tokens, or of the hashes of a chain in hexadecimal digits
//! sealed       little-endian
//!   0   8  magic "EskrPrm\0"
//!   8   2  version, 1
//!  10   4  number of the key
//!  14  12  salt
//!  26      the JSON, sealed, with all before it and the row's name, tenant/job, as associated data; its tag behind it
//! ```

use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use esker_prefix::{BlockHash, KvLayout, ScopeTag, TokenId};
use esker_store::{OpenError, SALT_BYTES, Seal, SealError, Sealer, TAG_BYTES};
use serde::{Deserialize, Serialize};

use crate::control::{Control, Table};
use crate::generate::whole_tokens;

const MAGIC: &[u8; 8] = b"EskrPrm\0";
const VERSION: u16 = 1;
const HEAD_BYTES: usize = 14 + SALT_BYTES;

/// See the module.
pub(super) struct Prompts {
    control: Arc<Control>,
    sealer: Option<Arc<dyn Sealer>>,
}

/// What is to be warmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Tokens(Vec<TokenId>),
    /// Blocks by their hashes, from the first one on.
    Chain(Vec<BlockHash>),
}

/// As it is written down.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Tokens(Vec<u32>),
    Chain(Vec<String>),
}

/// What there is of a job's prompts.
#[derive(Debug, PartialEq)]
pub(super) enum Kept {
    All(Vec<Prompt>),
    Nothing,
    /// Their key was destroyed: their tenant was erased.
    Shredded,
}

impl Prompt {
    /// Tokens of its whole blocks.
    pub(crate) fn whole_tokens(&self, layout: &KvLayout) -> usize {
        match self {
            Self::Tokens(tokens) => whole_tokens(layout, tokens.len()),
            Self::Chain(hashes) => hashes.len() * layout.block_tokens() as usize,
        }
    }

    fn written(&self) -> Written {
        match self {
            Self::Tokens(tokens) => Written::Tokens(tokens.iter().map(|token| token.0).collect()),
            Self::Chain(hashes) => {
                let hex = |hash: &BlockHash| blake3::Hash::from_bytes(hash.0).to_hex().to_string();
                Written::Chain(hashes.iter().map(hex).collect())
            }
        }
    }

    fn read(written: Written) -> anyhow::Result<Self> {
        Ok(match written {
            Written::Tokens(tokens) => Self::Tokens(tokens.into_iter().map(TokenId).collect()),
            Written::Chain(hashes) => {
                let hash = |hex: &String| Ok(BlockHash(*blake3::Hash::from_hex(hex)?.as_bytes()));
                Self::Chain(hashes.iter().map(hash).collect::<anyhow::Result<_>>()?)
            }
        })
    }
}

impl Prompts {
    pub(super) fn new(control: Arc<Control>, sealer: Option<Arc<dyn Sealer>>) -> Self {
        Self { control, sealer }
    }

    /// Writes the prompts of a job down, durably, sealed for whose scope this is.
    pub(super) fn keep(&self, row: &str, scope: ScopeTag, prompts: &[Prompt]) -> anyhow::Result<()> {
        let written: Vec<Written> = prompts.iter().map(Prompt::written).collect();
        let mut bytes = serde_json::to_vec(&written).context("prompts cannot be written as JSON")?;
        if let Some(sealer) = &self.sealer
            && let Some(seal) = sealer.begin(scope).map_err(unsealed)?
        {
            let head = head(&seal);
            let tag = sealer.seal(&seal, 0, &about(&head, row), &mut bytes).map_err(unsealed)?;
            bytes = [&head[..], &bytes, &tag].concat();
        }
        self.control.put_bytes(Table::WarmupPrompts, row, &bytes)
    }

    pub(super) fn read(&self, row: &str) -> anyhow::Result<Kept> {
        let Some(mut bytes) = self.control.get_bytes(Table::WarmupPrompts, row)? else {
            return Ok(Kept::Nothing);
        };
        let damaged = || format!("the prompts of {row} are damaged: submit the job again under another name");
        if bytes.starts_with(MAGIC) {
            match self.open(row, &bytes).with_context(damaged)? {
                Some(opened) => bytes = opened,
                None => return Ok(Kept::Shredded),
            }
        }
        let written: Vec<Written> = serde_json::from_slice(&bytes).with_context(damaged)?;
        let prompts: anyhow::Result<Vec<Prompt>> = written.into_iter().map(Prompt::read).collect();
        Ok(Kept::All(prompts.with_context(damaged)?))
    }

    /// Whether nobody can read them any more. What is damaged is told when the job is run.
    pub(super) fn are_shredded(&self, row: &str) -> anyhow::Result<bool> {
        let bytes =
            self.control.get_bytes(Table::WarmupPrompts, row)?.filter(|bytes| bytes.starts_with(MAGIC));
        Ok(bytes.is_some_and(|bytes| matches!(self.open(row, &bytes), Ok(None))))
    }

    /// `None` without its key.
    fn open(&self, row: &str, bytes: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        let Some((head, sealed)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
            bail!("they are cut short")
        };
        let version = u16::from_le_bytes([head[8], head[9]]);
        ensure!(version == VERSION, "they have version {version}, this build knows {VERSION}");
        let key = u32::from_le_bytes([head[10], head[11], head[12], head[13]]);
        let seal = Seal { key, salt: *head.last_chunk().expect("a head ends with its salt") };
        let sealer = self.sealer.as_ref().context("they are sealed, and this node has no root key")?;
        let mut opened = sealed.to_vec();
        match sealer.open(&seal, 0, &about(head, row), &mut opened) {
            Ok(()) => {}
            Err(OpenError::NoKey) => return Ok(None),
            Err(OpenError::Forged) => return Err(anyhow!("they are not what was sealed")),
        }
        opened.truncate(opened.len().saturating_sub(TAG_BYTES));
        Ok(Some(opened))
    }
}

fn unsealed(error: SealError) -> anyhow::Error {
    anyhow!("prompts cannot be sealed: {error}")
}

fn head(seal: &Seal) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(MAGIC);
    head[8..10].copy_from_slice(&VERSION.to_le_bytes());
    head[10..14].copy_from_slice(&seal.key.to_le_bytes());
    head[14..].copy_from_slice(&seal.salt);
    head
}

fn about(head: &[u8; HEAD_BYTES], row: &str) -> Vec<u8> {
    [head, row.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Keys;

    const SCOPE: ScopeTag = ScopeTag([7; 16]);

    #[test]
    fn what_is_sealed_is_no_other_jobs_and_goes_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root.key");
        std::fs::write(&root, [9; 32]).unwrap();
        let keys = Arc::new(Keys::open(dir.path(), &root).unwrap());
        keys.own(SCOPE, "private/a#0");
        let control = Arc::new(Control::open(&dir.path().join("control")).unwrap());
        let plain = Prompts::new(Arc::clone(&control), None);
        let sealing = Prompts::new(Arc::clone(&control), Some(Arc::clone(&keys) as Arc<dyn Sealer>));
        let tokens = |ids: &[u32]| Prompt::Tokens(ids.iter().copied().map(TokenId).collect());
        let prompts = vec![tokens(&[1234, 5678]), tokens(&[9])];
        let bytes = |row| control.get_bytes(Table::WarmupPrompts, row).unwrap().unwrap();
        plain.keep("a/plain", SCOPE, &prompts).unwrap();
        assert_eq!(bytes("a/plain"), b"[[1234,5678],[9]]");
        sealing.keep("a/sealed", SCOPE, &prompts).unwrap();
        let sealed = bytes("a/sealed");
        assert_eq!(&sealed[..10], b"EskrPrm\0\x01\0");
        assert_eq!(sealed.len(), HEAD_BYTES + 17 + TAG_BYTES);
        assert!(!sealed.windows(4).any(|part| part == b"1234"));
        // Also what an earlier build wrote down is read.
        for row in ["a/plain", "a/sealed"] {
            assert_eq!(sealing.read(row).unwrap(), Kept::All(prompts.clone()));
        }
        assert_eq!(sealing.read("a/none").unwrap(), Kept::Nothing);
        let with_chain = vec![tokens(&[9]), Prompt::Chain(vec![BlockHash([3; 32]), BlockHash([255; 32])])];
        sealing.keep("a/chain", SCOPE, &with_chain).unwrap();
        assert_eq!(sealing.read("a/chain").unwrap(), Kept::All(with_chain));
        assert!(format!("{:#}", plain.read("a/sealed").unwrap_err()).contains("root key"));
        let put = |row, bytes: &[u8]| control.put_bytes(Table::WarmupPrompts, row, bytes).unwrap();
        put("a/other", &sealed);
        assert!(sealing.read("a/other").is_err(), "of another job");
        for at in 8..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            put("a/changed", &changed);
            let read = sealing.read("a/changed");
            assert!(read.is_err() || read.unwrap() == Kept::Shredded, "byte {at}");
        }
        for cut in 8..sealed.len() {
            put("a/cut", &sealed[..cut]);
            assert!(sealing.read("a/cut").is_err(), "cut at {cut}");
        }
        keys.destroy("private/a#0").unwrap();
        assert_eq!(sealing.read("a/sealed").unwrap(), Kept::Shredded);
        assert!(sealing.keep("a/late", SCOPE, &prompts).is_err(), "its key does not come back");
    }
}
