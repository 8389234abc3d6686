//! What is remembered of answers, kept on the drive so that a node that starts again spells them as it did before.
//!
//! Records are appended as they come and flushed by nobody: what a power cut takes, or damage, is spelled anew, as it is where
//! the table forgot it. What the table let go stays in the file until it is written anew, which is when it has grown past its
//! bound, when a tenant is erased, and after a start that found something in it of no use. Where the node encrypts, each record is
//! sealed by its tenant's key.
//!
//! ```text
//! DATA/replay    little-endian
//!   0   8  magic "EskrRpl\0"
//!   8   4  version, 1
//!  12      records, each:
//!   0   4  length in bytes of what is behind the checksum, n
//!   4   8  checksum: the first bytes of its BLAKE3
//!  12  32  name of the answer
//!  44   4  epoch of the tenant
//!  48   1  kind: 0 tokens, 1 text
//!  49   1  length of the tenant's name, t
//!  50   4  number of the key, 0 if it is not sealed
//!  54  12  salt
//!  66   t  tenant
//! 66+t     the tokens, each u32, or the text in UTF-8; sealed, where it is, with all of this before it from the name on as
//!          associated data, and its tag behind it
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use esker_prefix::TokenId;
use esker_store::{SALT_BYTES, Seal, Sealer};

use super::{Key, Owner, Sampled};
use crate::principal::TenantId;

const MAGIC: &[u8; 8] = b"EskrRpl\0";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 12;
/// Before what a record's checksum covers.
const LEAD_BYTES: usize = 12;
/// What it covers, without the tenant's name and the answer.
const FIXED_BYTES: usize = 54;

/// The file, open for more.
pub(super) struct ReplayFile {
    path: PathBuf,
    file: File,
    len_bytes: u64,
    sealer: Option<Arc<dyn Sealer>>,
}

/// What is remembered of one answer.
#[derive(Clone)]
pub(super) struct Remembered {
    pub(super) key: Key,
    pub(super) owner: Owner,
    pub(super) sampled: Sampled,
}

/// What a file had.
#[derive(Default)]
pub(super) struct Read {
    /// In the order in which it was written; of those with one name the last counts.
    pub(super) remembered: Vec<Found>,
    /// Something was damaged, or cannot be opened any more.
    pub(super) has_waste: bool,
}

/// One of them. Its scope is not in the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Found {
    pub(super) key: Key,
    pub(super) tenant: TenantId,
    pub(super) epoch: u32,
    pub(super) sampled: Sampled,
}

impl ReplayFile {
    /// Opens the file, made anew if it is none, and reads at most `max_bytes` of it.
    pub(super) fn open(
        path: &Path,
        sealer: Option<Arc<dyn Sealer>>,
        max_bytes: u64,
    ) -> io::Result<(Self, Read)> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&mut file, max_bytes), &mut bytes)?;
        let len_bytes = file.metadata()?.len();
        let mut opened = Self { path: path.to_owned(), file, len_bytes, sealer };
        let read = match bytes.strip_prefix(&head()) {
            Some(records) => {
                let mut read = parse(records, opened.sealer.as_deref());
                read.has_waste |= bytes.len() as u64 != len_bytes;
                read
            }
            None => {
                opened.clear()?;
                Read::default()
            }
        };
        Ok((opened, read))
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// On an error the file is as it was before.
    pub(super) fn append(&mut self, remembered: &Remembered) -> io::Result<()> {
        let Some(record) = record(remembered, self.sealer.as_deref()) else { return Ok(()) };
        match self.file.write_all(&record) {
            Ok(()) => self.len_bytes += record.len() as u64,
            Err(error) => {
                self.file.set_len(self.len_bytes)?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes the file anew with these, the oldest first, and flushes it: what it had besides them is gone, also after a crash.
    pub(super) fn rewrite(&mut self, all: &[Remembered]) -> io::Result<()> {
        let draft = self.path.with_extension("new");
        let written = self.write(&draft, all);
        if written.is_err() {
            let _ = fs::remove_file(&draft);
        }
        written
    }

    fn write(&mut self, draft: &Path, all: &[Remembered]) -> io::Result<()> {
        let _ = fs::remove_file(draft);
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(draft)?;
        let mut writer = io::BufWriter::new(file);
        writer.write_all(&head())?;
        let mut len_bytes = HEAD_BYTES as u64;
        for record in all.iter().filter_map(|remembered| record(remembered, self.sealer.as_deref())) {
            writer.write_all(&record)?;
            len_bytes += record.len() as u64;
        }
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(draft, &self.path)?;
        (self.file, self.len_bytes) = (file, len_bytes);
        self.sync_name()
    }

    /// Leaves nothing in it, durably.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all(&head())?;
        self.len_bytes = HEAD_BYTES as u64;
        self.file.sync_all()?;
        // A file that was to take its place may have done so not quite: the old one must not come back.
        self.sync_name()
    }

    fn sync_name(&self) -> io::Result<()> {
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(dir.unwrap_or(Path::new(".")))?.sync_all()
    }
}

fn head() -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(MAGIC);
    head[8..].copy_from_slice(&VERSION.to_le_bytes());
    head
}

/// `None` where it cannot be sealed, as after its tenant was erased.
fn record(remembered: &Remembered, sealer: Option<&dyn Sealer>) -> Option<Vec<u8>> {
    let Remembered { key, owner, sampled } = remembered;
    let seal = sealer.map(|sealer| sealer.begin(owner.scope)).transpose().ok()?.flatten();
    let (kind, mut answer) = match sampled {
        Sampled::Tokens(tokens) => (0, tokens.iter().flat_map(|token| token.0.to_le_bytes()).collect()),
        Sampled::Text(text) => (1, text.as_bytes().to_vec()),
    };
    let mut body = key.to_vec();
    body.extend(owner.epoch.to_le_bytes());
    body.extend([kind, u8::try_from(owner.tenant.0.len()).ok()?]);
    body.extend(seal.map_or(0, |seal| seal.key).to_le_bytes());
    body.extend(seal.map_or([0; SALT_BYTES], |seal| seal.salt));
    body.extend(owner.tenant.0.as_bytes());
    if let (Some(sealer), Some(seal)) = (sealer, seal) {
        let tag = sealer.seal(&seal, 0, &body, &mut answer).ok()?;
        answer.extend(tag);
    }
    body.append(&mut answer);
    let mut record = u32::try_from(body.len()).ok()?.to_le_bytes().to_vec();
    record.extend(checksum(&body));
    record.append(&mut body);
    Some(record)
}

/// Reads records until they end. One that is damaged is passed over if the next can be found behind it.
fn parse(bytes: &[u8], sealer: Option<&dyn Sealer>) -> Read {
    let mut read = Read::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some((lead, behind)) = rest.split_first_chunk::<LEAD_BYTES>() else { break };
        let len = u32::from_le_bytes([lead[0], lead[1], lead[2], lead[3]]);
        let Some((body, behind)) = behind.split_at_checked(len as usize) else { break };
        rest = behind;
        let found = Some(body).filter(|body| checksum(body) == lead[4..]).and_then(|body| open(body, sealer));
        read.has_waste |= found.is_none();
        read.remembered.extend(found);
    }
    read.has_waste |= !rest.is_empty();
    read
}

fn open(body: &[u8], sealer: Option<&dyn Sealer>) -> Option<Found> {
    let (fixed, _) = body.split_first_chunk::<FIXED_BYTES>()?;
    let number = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let (about, answer) = body.split_at_checked(FIXED_BYTES + usize::from(fixed[37]))?;
    let tenant = TenantId(std::str::from_utf8(&about[FIXED_BYTES..]).ok()?.to_owned());
    let mut answer = answer.to_vec();
    if number(38) != 0 {
        let seal = Seal { key: number(38), salt: *fixed.last_chunk()? };
        sealer?.open(&seal, 0, about, &mut answer).ok()?;
        answer.truncate(answer.len().checked_sub(esker_store::TAG_BYTES)?);
    }
    let sampled = match fixed[36] {
        0 => {
            let (tokens, rest) = answer.as_chunks();
            let tokens = tokens.iter().map(|bytes| TokenId(u32::from_le_bytes(*bytes))).collect();
            rest.is_empty().then_some(Sampled::Tokens(tokens))?
        }
        1 => Sampled::Text(String::from_utf8(answer).ok()?.into()),
        _ => return None,
    };
    Some(Found { key: *fixed.first_chunk()?, tenant, epoch: number(32), sampled })
}

fn checksum(body: &[u8]) -> [u8; 8] {
    let mut checksum = [0; 8];
    checksum.copy_from_slice(&blake3::hash(body).as_bytes()[..8]);
    checksum
}

/// For fuzzing: a file; or what the checksum of a record covers. Whether it is one, and what is found is the same once it is
/// written again.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let read = bytes.strip_prefix(&head()).map(|records| parse(records, None));
    let accepted = read.as_ref().is_some_and(|read| !read.has_waste);
    let found: Vec<Found> =
        read.into_iter().flat_map(|read| read.remembered).chain(open(bytes, None)).collect();
    for found in &found {
        let scope = esker_prefix::ScopeTag([0; 16]);
        let owner = Owner { tenant: found.tenant.clone(), epoch: found.epoch, scope };
        let again = record(&Remembered { key: found.key, owner, sampled: found.sampled.clone() }, None);
        let again = parse(&again.unwrap_or_default(), None);
        assert!(again.remembered == [found.clone()] && !again.has_waste, "an answer that does not come back");
    }
    accepted || !found.is_empty()
}
