//! Keys of encryption at rest: one data key for each tenant and month, wrapped by the root key of a file that the operator keeps.
//!
//! What is stored of a tenant is encrypted by AES-256-GCM after it was compressed (the store's `sealing.rs` says what is bound to
//! it). A record's own key comes from its data key and the record's salt, so nonces never meet: plane `n` of a record has nonce
//! `n`, and two records share a key only if 96 random bits repeat.
//!
//! Data keys lie in `DATA/keys`, outside the index and the segments. Erasing a tenant overwrites and removes its files and flushes
//! the folder *before* any record is touched: whoever has the old segments, and the root key, still reads nothing. Copies of
//! `DATA/keys` undo that; keep them no longer than an erasure may take.
//!
//! ```text
//! DATA/keys/KKKKKKKK.dek    K: number of the key, hexadecimal. Little-endian
//!   0   8  magic "EskrDek\0"
//!   8   2  version, 1
//!  10   2  length of the owner's name in bytes, n
//!  12   4  number of the key, not 0
//!  16   4  month: 12 * year + month - 1
//!  20   n  owner
//!  20+n 12 nonce, random
//!  32+n 48 the data key, AES-256-GCM by the root key, with all before the nonce as associated data; its tag behind it
//! ```

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use esker_prefix::ScopeTag;
use esker_store::{OpenError, SALT_BYTES, Seal, SealError, Sealer, TAG_BYTES};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

const MAGIC: &[u8; 8] = b"EskrDek\0";
const VERSION: u16 = 1;
const FIXED_BYTES: usize = 20;
const KEY_BYTES: usize = 32;
const MAX_OWNER_BYTES: usize = 512;
const RECORD_KEY_CONTEXT: &[u8] = b"esker 2026-11 record key v1";

/// See the module.
pub(crate) struct Keys {
    dir: PathBuf,
    root: LessSafeKey,
    random: SystemRandom,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    keys: HashMap<u32, DataKey>,
    current: HashMap<(String, u32), u32>,
    /// Whose a scope is. A scope that is not here is not written to.
    owners: HashMap<ScopeTag, String>,
    /// Owners whose keys were destroyed. A request that was under way at that time must not bring one back.
    gone: HashSet<String>,
}

struct DataKey {
    owner: String,
    key: [u8; KEY_BYTES],
}

impl Drop for DataKey {
    fn drop(&mut self) {
        // Not a promise, as copies may lie elsewhere; but the obvious one goes.
        self.key = std::hint::black_box([0; KEY_BYTES]);
        std::hint::black_box(&self.key);
    }
}

impl Keys {
    /// Whether a data folder has encrypted records.
    pub(crate) fn exist(data: &Path) -> bool {
        let entries = fs::read_dir(data.join("keys")).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.path().extension().is_some_and(|extension| extension == "dek"))
    }

    /// Unwraps every data key of a data folder. A root key that is not theirs is an error, before anything is served or written.
    pub(crate) fn open(data: &Path, root: &Path) -> anyhow::Result<Self> {
        let dir = data.join("keys");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let root_key = LessSafeKey::new(unbound(&root_key(root)?));
        let mut state = State::default();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry.with_context(|| format!("cannot read {}", dir.display()))?.path();
            if path.extension().is_none_or(|extension| extension != "dek") {
                continue;
            }
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let (number, month, owner, key) = unwrap(&bytes, &root_key).with_context(|| {
                format!("{} does not open with the key of {}", path.display(), root.display())
            })?;
            // A copy under another name would bring back, at the next start, what was destroyed under its own.
            let own = name(number);
            ensure!(
                path.file_name().is_some_and(|found| *found == *own),
                "{} is a copy of {own}, which an erasure would miss: move it away",
                path.display()
            );
            state.current.insert((owner.clone(), month), number);
            state.keys.insert(number, DataKey { owner, key });
        }
        Ok(Self { dir, root: root_key, random: SystemRandom::new(), state: RwLock::new(state) })
    }

    /// Says whose a scope is; what is put into it from now on is encrypted by that owner's keys.
    pub(crate) fn own(&self, scope: ScopeTag, owner: &str) {
        if self.read().owners.get(&scope).is_some_and(|known| known == owner) {
            return;
        }
        let mut state = self.write();
        if !state.gone.contains(owner) {
            state.owners.insert(scope, owner.to_owned());
        }
    }

    /// Nothing is put into this scope any more, until somebody says again whose it is.
    pub(crate) fn disown(&self, scope: ScopeTag) {
        self.write().owners.remove(&scope);
    }

    /// Destroys all keys of an owner, durably, and takes no more for it. Returns how many there were.
    pub(crate) fn destroy(&self, owner: &str) -> anyhow::Result<usize> {
        let mut state = self.write();
        state.owners.retain(|_, other| other != owner);
        state.gone.insert(owner.to_owned());
        let numbers: Vec<u32> =
            state.keys.iter().filter(|(_, key)| key.owner == owner).map(|(&number, _)| number).collect();
        for number in &numbers {
            let path = self.path(*number);
            // Overwritten first, for what a file system keeps of a removed file; then flushed, then removed.
            let mut file = OpenOptions::new()
                .write(true)
                .open(&path)
                .with_context(|| format!("cannot destroy {}", path.display()))?;
            let len = usize::try_from(file.metadata()?.len()).unwrap_or(0);
            file.write_all(&vec![0; len])?;
            file.sync_all().with_context(|| format!("cannot flush {}", path.display()))?;
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            state.keys.remove(number);
        }
        state.current.retain(|(other, _), _| other != owner);
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("cannot flush {}", self.dir.display()))?;
        Ok(numbers.len())
    }

    /// The number of an owner's key of a month, made if there is none.
    fn number(&self, owner: &str, month: u32) -> anyhow::Result<u32> {
        let key = (owner.to_owned(), month);
        let mut state = self.write();
        if let Some(&number) = state.current.get(&key) {
            return Ok(number);
        }
        let number = loop {
            let number = u32::from_le_bytes(self.random_bytes()?);
            // Also that of a key that was destroyed is met once in four billion times; its records are misses then as before.
            if number != 0 && !state.keys.contains_key(&number) {
                break number;
            }
        };
        let data_key = self.random_bytes()?;
        self.save(number, month, owner, &data_key)?;
        state.keys.insert(number, DataKey { owner: owner.to_owned(), key: data_key });
        state.current.insert(key, number);
        Ok(number)
    }

    /// Written under another name, flushed, then renamed: nothing is ever sealed by a key that a crash could take away.
    fn save(&self, number: u32, month: u32, owner: &str, key: &[u8; KEY_BYTES]) -> anyhow::Result<()> {
        ensure!(owner.len() <= MAX_OWNER_BYTES, "an owner's name of {} bytes", owner.len());
        let bytes = wrap(head(number, month, owner), self.random_bytes()?, key, &self.root)?;
        let (path, draft) = (self.path(number), self.dir.join("draft"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&draft, &path)?;
        File::open(&self.dir)?.sync_all()?;
        Ok(())
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(name(number))
    }

    fn random_bytes<const N: usize>(&self) -> anyhow::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.random.fill(&mut bytes).map_err(|_| anyhow::anyhow!("the system gives no random bytes"))?;
        Ok(bytes)
    }

    /// The key of one record.
    fn record_key(&self, seal: &Seal) -> Option<LessSafeKey> {
        let state = self.read();
        let mut hasher = blake3::Hasher::new_keyed(&state.keys.get(&seal.key)?.key);
        hasher.update(RECORD_KEY_CONTEXT).update(&seal.salt);
        Some(LessSafeKey::new(unbound(hasher.finalize().as_bytes())))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sealer for Keys {
    fn begin(&self, scope: ScopeTag) -> Result<Option<Seal>, SealError> {
        let failed = |error: anyhow::Error| SealError(format!("{error:#}"));
        let month = month(SystemTime::now());
        let (owner, known) = {
            let state = self.read();
            let owner = state.owners.get(&scope).cloned();
            let owner = owner.ok_or_else(|| SealError("its scope was erased".into()))?;
            let known = state.current.get(&(owner.clone(), month)).copied();
            (owner, known)
        };
        let key = known.map_or_else(|| self.number(&owner, month).map_err(failed), Ok)?;
        let salt: [u8; SALT_BYTES] = self.random_bytes().map_err(failed)?;
        Ok(Some(Seal { key, salt }))
    }

    fn seal(
        &self,
        seal: &Seal,
        plane: u32,
        about: &[u8],
        bytes: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], SealError> {
        let key = self.record_key(seal).ok_or_else(|| SealError("its key was destroyed meanwhile".into()))?;
        let sealed = key.seal_in_place_separate_tag(nonce(plane), Aad::from(about), bytes);
        let tag = sealed.map_err(|_| SealError("it is too long for its cipher".into()))?;
        tag.as_ref().try_into().map_err(|_| SealError("the cipher's tag has another length".into()))
    }

    fn open(&self, seal: &Seal, plane: u32, about: &[u8], bytes: &mut [u8]) -> Result<(), OpenError> {
        let key = self.record_key(seal).ok_or(OpenError::NoKey)?;
        key.open_in_place(nonce(plane), Aad::from(about), bytes).map(drop).map_err(|_| OpenError::Forged)
    }
}

/// Unique for every use: a record's key is its own.
fn nonce(plane: u32) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..4].copy_from_slice(&plane.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

fn unbound(key: &[u8; KEY_BYTES]) -> UnboundKey {
    UnboundKey::new(&AES_256_GCM, key).expect("a key of AES-256 has 32 bytes")
}

fn head(number: u32, month: u32, owner: &str) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend(u16::try_from(owner.len()).unwrap_or(u16::MAX).to_le_bytes());
    head.extend(number.to_le_bytes());
    head.extend(month.to_le_bytes());
    head.extend(owner.as_bytes());
    head
}

/// The file of a data key.
fn name(number: u32) -> String {
    format!("{number:08x}.dek")
}

/// What stands in it behind its head.
fn wrap(
    head: Vec<u8>,
    nonce: [u8; NONCE_LEN],
    key: &[u8; KEY_BYTES],
    root: &LessSafeKey,
) -> anyhow::Result<Vec<u8>> {
    let mut wrapped = key.to_vec();
    let sealed = root.seal_in_place_append_tag(
        Nonce::assume_unique_for_key(nonce),
        Aad::from(&head[..]),
        &mut wrapped,
    );
    sealed.map_err(|_| anyhow::anyhow!("a data key cannot be wrapped"))?;
    Ok([&head[..], &nonce, &wrapped].concat())
}

/// Number, month, owner and key of a wrapped data key.
fn unwrap(bytes: &[u8], root: &LessSafeKey) -> anyhow::Result<(u32, u32, String, [u8; KEY_BYTES])> {
    let (fixed, rest) = bytes.split_at_checked(FIXED_BYTES).context("the file is cut short")?;
    let number = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    ensure!(fixed.starts_with(MAGIC), "the file is no data key");
    let version = u16::from_le_bytes([fixed[8], fixed[9]]);
    ensure!(version == VERSION, "the file has version {version}, this build knows {VERSION}");
    let owner_len = usize::from(u16::from_le_bytes([fixed[10], fixed[11]]));
    ensure!(
        owner_len <= MAX_OWNER_BYTES,
        "its owner's name has {owner_len} bytes, at most {MAX_OWNER_BYTES}"
    );
    ensure!(number(12) != 0, "the file has the number 0, which no key has");
    let (owner, rest) = rest.split_at_checked(owner_len).context("the file is cut short")?;
    let (nonce, wrapped) = rest.split_first_chunk::<NONCE_LEN>().context("the file is cut short")?;
    let mut wrapped = wrapped.to_vec();
    let head = &bytes[..FIXED_BYTES + owner_len];
    let opened = root
        .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(head), &mut wrapped)
        .map_err(|_| anyhow::anyhow!("it is not the root key of this data folder, or the file is damaged"))?;
    let Ok(key) = <[u8; KEY_BYTES]>::try_from(&*opened) else { bail!("the file holds no key of 32 bytes") };
    let owner = std::str::from_utf8(owner).context("the owner's name is no text")?;
    Ok((number(12), number(16), owner.to_owned(), key))
}

/// The root key: 32 bytes, or 64 hexadecimal digits.
fn root_key(path: &Path) -> anyhow::Result<[u8; KEY_BYTES]> {
    let bytes = fs::read(path).with_context(|| {
        format!("cannot read the root key {0}; one is made by: head -c 32 /dev/urandom > {0}", path.display())
    })?;
    parse_root(&bytes).with_context(|| {
        format!("{} must hold 32 bytes or 64 hexadecimal digits, has {} bytes", path.display(), bytes.len())
    })
}

fn parse_root(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    if let Ok(key) = bytes.try_into() {
        return Some(key);
    }
    // `from_str_radix` alone takes a sign for a digit.
    let text = std::str::from_utf8(bytes).ok()?.trim();
    let text = Some(text).filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let digits: Option<Vec<u8>> = (0..text.len()).step_by(2).map(digit).collect();
    digits?.try_into().ok()
}

/// For fuzzing: a root key; a wrapped key as it is, and its head wrapped anew, since nobody guesses a tag. Whether one opens.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let opens = parse_root(bytes);
    if let Some(key) = opens {
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(parse_root(hex.as_bytes()), Some(key));
    }
    let root = LessSafeKey::new(unbound(&[9; KEY_BYTES]));
    let accept = |bytes: &[u8]| {
        let Ok((number, month, owner, key)) = unwrap(bytes, &root) else { return false };
        assert!(number != 0 && owner.len() <= MAX_OWNER_BYTES);
        let nonce = *bytes[FIXED_BYTES + owner.len()..].first_chunk().expect("it was unwrapped");
        let again = wrap(head(number, month, &owner), nonce, &key, &root);
        assert_eq!(again.expect("as before"), bytes, "a key that does not come back");
        true
    };
    let head_bytes =
        bytes.get(10..12).map_or(0, |len| FIXED_BYTES + usize::from(u16::from_le_bytes([len[0], len[1]])));
    let again = bytes.get(..head_bytes).filter(|head| !head.is_empty()).map(|head| {
        accept(&wrap(head.to_vec(), [1; NONCE_LEN], &[2; KEY_BYTES], &root).expect("a short one"))
    });
    accept(bytes) | again.unwrap_or(false) | opens.is_some()
}

/// A wrapped key and a root key, for the corpus of fuzzers.
#[cfg(test)]
pub(crate) fn samples() -> [(&'static str, Vec<u8>); 2] {
    let root = LessSafeKey::new(unbound(&[9; KEY_BYTES]));
    let wrapped = wrap(head(7, 24_322, "private/acme#1"), [1; NONCE_LEN], &[2; KEY_BYTES], &root);
    [("wrapped", wrapped.expect("a short one")), ("root", [9; KEY_BYTES].to_vec())]
}

/// Months since the year 0, by the Gregorian calendar.
fn month(time: SystemTime) -> u32 {
    let days = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 86_400;
    // Days from March 1 of the year 0, in cycles of 400 years of 146,097 days.
    let days = days + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day + 2) / 153;
    let months = 12 * (400 * cycle + year) + from_march + 2;
    u32::try_from(months).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SCOPE: ScopeTag = ScopeTag([7; 16]);

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root.key");
        fs::write(&root, [9; 32]).unwrap();
        (dir, root)
    }

    #[test]
    fn a_copy_of_a_key_under_another_name_is_not_taken() {
        let (dir, root) = folder();
        let keys = Keys::open(dir.path(), &root).unwrap();
        keys.own(SCOPE, "private/acme#1");
        keys.begin(SCOPE).unwrap();
        drop(keys);
        let own = fs::read_dir(dir.path().join("keys")).unwrap().next().unwrap().unwrap().path();
        assert!(Keys::open(dir.path(), &root).is_ok());
        fs::copy(&own, own.with_file_name("copy.dek")).unwrap();
        let refused = format!("{:#}", Keys::open(dir.path(), &root).err().unwrap());
        assert!(refused.contains("copy.dek") && refused.contains("move it away"), "{refused}");
    }

    #[test]
    fn what_is_sealed_opens_as_itself_only_and_after_a_restart() {
        let (dir, root) = folder();
        let keys = Keys::open(dir.path(), &root).unwrap();
        assert!(keys.begin(SCOPE).is_err(), "whose it is was not said");
        keys.own(SCOPE, "private/a#0");
        let seal = keys.begin(SCOPE).unwrap().unwrap();
        let other = keys.begin(SCOPE).unwrap().unwrap();
        assert_eq!(seal.key, other.key);
        assert_ne!(seal.salt, other.salt);
        let mut bytes = b"latents".to_vec();
        let tag = keys.seal(&seal, 3, b"about", &mut bytes).unwrap();
        assert_ne!(bytes, b"latents");
        bytes.extend(tag);
        drop(keys);
        let keys = Keys::open(dir.path(), &root).unwrap();
        let open = |seal: &Seal, plane, about: &[u8]| {
            let mut bytes = bytes.clone();
            keys.open(seal, plane, about, &mut bytes).map(|()| bytes[..7].to_vec())
        };
        assert_eq!(open(&seal, 3, b"about"), Ok(b"latents".to_vec()));
        assert_eq!(open(&seal, 4, b"about"), Err(OpenError::Forged));
        assert_eq!(open(&seal, 3, b"abouT"), Err(OpenError::Forged));
        assert_eq!(open(&other, 3, b"about"), Err(OpenError::Forged));
        assert_eq!(open(&Seal { key: seal.key ^ 1, ..seal }, 3, b"about"), Err(OpenError::NoKey));
    }

    #[test]
    fn destroyed_keys_are_gone_from_memory_and_disk_and_nobody_elses() {
        let (dir, root) = folder();
        let keys = Keys::open(dir.path(), &root).unwrap();
        let neighbour = ScopeTag([8; 16]);
        keys.own(SCOPE, "private/a#0");
        keys.own(neighbour, "private/b#0");
        let (gone, stays) = (keys.begin(SCOPE).unwrap().unwrap(), keys.begin(neighbour).unwrap().unwrap());
        assert!(keys.path(gone.key).exists() && Keys::exist(dir.path()));
        assert_eq!(keys.destroy("private/a#0").unwrap(), 1);
        assert!(!keys.path(gone.key).exists() && keys.path(stays.key).exists());
        keys.own(SCOPE, "private/a#0");
        assert!(keys.begin(SCOPE).is_err(), "nothing more is taken for it");
        assert_eq!(keys.open(&gone, 0, b"", &mut [0; 16]), Err(OpenError::NoKey));
        assert_eq!(keys.open(&stays, 0, b"", &mut [0; 16]), Err(OpenError::Forged));
        assert_eq!(keys.destroy("private/a#0").unwrap(), 0);
    }

    #[test]
    fn another_root_key_or_a_changed_file_is_named() {
        let (dir, root) = folder();
        let keys = Keys::open(dir.path(), &root).unwrap();
        keys.own(SCOPE, "private/a#0");
        let path = keys.path(keys.begin(SCOPE).unwrap().unwrap().key);
        let refused = |root: &Path| format!("{:#}", Keys::open(dir.path(), root).err().unwrap());
        let other = dir.path().join("other.key");
        fs::write(&other, "0a".repeat(32) + "\n").unwrap();
        assert!(refused(&other).contains("not the root key of this data folder"));
        fs::write(&other, "0a").unwrap();
        assert!(refused(&other).contains("64 hexadecimal digits"));
        assert!(refused(&dir.path().join("none")).contains("head -c 32 /dev/urandom"));
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(refused(&root).contains("does not open"), "byte {at}");
        }
        fs::write(&path, &good[..50]).unwrap();
        assert!(refused(&root).contains("does not open"));
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        let at = |seconds| month(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), 12 * 1970);
        assert_eq!(at(1_709_164_800), 12 * 2024 + 1); // 29 February 2024
        assert_eq!(at(1_709_251_200), 12 * 2024 + 2); // 1 March 2024
        assert_eq!(at(1_767_225_599), 12 * 2025 + 11); // 31 December 2025
        assert_eq!(at(1_767_225_600), 12 * 2026); // 1 January 2026
    }
}
