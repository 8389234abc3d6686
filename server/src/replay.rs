//! From a conversation to tokens, the same tokens every time it is resent.
//!
//! A model spells its text in tokens of its own choice, and a tokenizer given that text may choose others; the KV of the
//! answer would then never be found again. So what was sampled is remembered by the prompt before it and its text, and put in
//! its place when the text comes back behind the same prompt. Only what the tokenizer would spell otherwise needs to be
//! remembered, so the table, which is bounded, lasts long; what it forgot is computed again. It is kept in a file ([`file`]), so
//! that a conversation goes on behind a restart. Tool calls are
//! remembered as the text in which they were sampled, by their ids, since callers give them back as JSON; what a caller changed
//! meanwhile, arguments, the text before them or a call that is gone, is not what was sampled and is spelled as it came.
//!
//! All of it is one tenant's, and goes when the tenant is erased.

mod file;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use esker_decoder::{DecoderError, Tokenizer};
use esker_prefix::{ScopeTag, TokenId};
use esker_store::Sealer;
use serde_json::Value;

use crate::chat_template::conversation::{Conversation, Message, Role};
use crate::chat_template::{Part, tool_call};
use crate::principal::TenantId;
use file::{Remembered, ReplayFile};

/// Answers remembered, and what they may take together.
const MAX_ENTRIES: usize = 16_384;
const MAX_BYTES: usize = 64 << 20;
/// The file of them: as it grows past this it is written anew.
const MAX_FILE_BYTES: u64 = 2 * MAX_BYTES as u64;
/// Answers on their way to the file. What finds no room is remembered until the node ends.
const MAX_QUEUED: usize = 1024;
/// Tokens at the end of what was sampled that may belong to a stop sequence and not to the answer.
const MAX_STOP_TOKENS: usize = 32;

type Key = [u8; 32];

/// Who is reminded of an answer: a tenant, until it is erased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) tenant: TenantId,
    pub(crate) epoch: u32,
    /// Whose key seals what is kept of it.
    pub(crate) scope: ScopeTag,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Replay {
    table: Arc<Mutex<Table>>,
    keeper: Option<Keeper>,
    /// There may be a file all the same, which this process can neither read nor write.
    shut_out: bool,
}

#[derive(Default)]
struct Table {
    remembered: HashMap<Key, Entry>,
    /// Keys by when they were last used.
    used: BTreeMap<u64, Key>,
    uses: u64,
    bytes: usize,
    /// Tenants that were erased, with the epoch that they are in since: what is still sampled for one before is not kept.
    erased: HashMap<TenantId, u32>,
}

struct Entry {
    used: u64,
    owner: Owner,
    sampled: Sampled,
}

#[derive(Clone, Debug, PartialEq)]
enum Sampled {
    Tokens(Arc<[TokenId]>),
    Text(Arc<str>),
}

/// The thread that writes the file.
struct Keeper {
    /// `None` once it is to end.
    queue: Option<SyncSender<Command>>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Append(Remembered),
    /// Whether nothing is left in the file that is not in the table.
    Rewrite(SyncSender<bool>),
}

impl Replay {
    /// With what was remembered in `path`. Without it, where it cannot be read or written: then what is sampled is remembered
    /// until the node ends. `owner` is that of a tenant now.
    pub(crate) fn open(
        path: &Path,
        sealer: Option<Arc<dyn Sealer>>,
        owner: impl Fn(&TenantId) -> Owner,
    ) -> Self {
        let (file, read) = match ReplayFile::open(path, sealer, MAX_FILE_BYTES) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "answers are not remembered beyond this process");
                return Self { shut_out: true, ..Self::default() };
            }
        };
        let mut table = Table::default();
        let mut has_waste = read.has_waste;
        for found in read.remembered {
            let owner = owner(&found.tenant);
            if owner.epoch == found.epoch {
                table.put(found.key, owner, found.sampled);
            } else {
                has_waste = true;
            }
        }
        let table = Arc::new(Mutex::new(table));
        let keeper = Keeper::start(file, Arc::clone(&table));
        if has_waste && let Some(keeper) = &keeper {
            // Nobody waits for it.
            keeper.rewrite();
        }
        Self { table, shut_out: keeper.is_none(), keeper }
    }

    /// Forgets all of a tenant that was sampled before `epoch`, on the drive as well. Whether it did.
    pub(crate) fn forget(&self, tenant: &TenantId, epoch: u32) -> bool {
        self.table().forget(tenant, epoch);
        match &self.keeper {
            Some(keeper) => keeper.rewrite().recv().unwrap_or(false),
            None => !self.shut_out,
        }
    }

    /// Whether the file cannot be used: answers are remembered until this process ends.
    pub(crate) fn is_shut_out(&self) -> bool {
        self.shut_out
    }

    /// Gives calls of tools the text in which this node sampled them, if they are those calls still.
    pub(crate) fn recall_calls(&self, owner: &Owner, conversation: &mut Conversation) {
        for message in &mut conversation.messages {
            let Some(call) = message.tool_calls.first() else { continue };
            if let Some(Sampled::Text(text)) = self.get(&call_key(owner, &call.id))
                && says_the_same(message, &text)
            {
                message.content = text.as_ref().to_owned();
                message.tool_calls.clear();
            }
        }
    }

    /// Remembers the text in which a call was sampled.
    pub(crate) fn remember_call(&self, owner: &Owner, id: &str, text: &str) {
        self.put(call_key(owner, id), owner, Sampled::Text(text.into()));
    }

    /// The tokens of a prompt.
    pub(crate) fn tokens(
        &self,
        owner: &Owner,
        tokenizer: &Tokenizer,
        parts: &[Part],
    ) -> Result<Vec<TokenId>, DecoderError> {
        let mut tokens: Vec<TokenId> = Vec::new();
        let mut prefix = blake3::Hasher::new();
        for part in parts {
            let more = match part {
                Part::Text(text) => tokenizer.encode(text)?,
                Part::Said(text) => match self.get(&answer_key(owner, tokenizer, &prefix, text)) {
                    Some(Sampled::Tokens(sampled)) => sampled.to_vec(),
                    _ => tokenizer.encode(text)?,
                },
            };
            extend(&mut prefix, &more);
            tokens.extend(more);
        }
        Ok(tokens)
    }

    /// Remembers how `text` was sampled behind `prompt`, if the tokenizer would spell it otherwise.
    pub(crate) fn remember(
        &self,
        owner: &Owner,
        tokenizer: &Tokenizer,
        prompt: &[TokenId],
        text: &str,
        sampled: &[TokenId],
    ) -> Result<(), DecoderError> {
        if text.is_empty() || tokenizer.encode(text)? == sampled {
            return Ok(());
        }
        // A stop sequence is no part of the text; where it began within a token, the text was not sampled as such.
        let shortest = sampled.len().saturating_sub(MAX_STOP_TOKENS);
        for count in (shortest..=sampled.len()).rev() {
            let decoded = tokenizer.decode(&sampled[..count])?;
            if decoded == text {
                let mut prefix = blake3::Hasher::new();
                extend(&mut prefix, prompt);
                let tokens = sampled[..count].into();
                self.put(answer_key(owner, tokenizer, &prefix, text), owner, Sampled::Tokens(tokens));
                return Ok(());
            }
            if decoded.len() < text.len() {
                break;
            }
        }
        Ok(())
    }

    fn get(&self, key: &Key) -> Option<Sampled> {
        self.table().get(key)
    }

    fn put(&self, key: Key, owner: &Owner, sampled: Sampled) {
        let mut table = self.table();
        if table.put(key, owner.clone(), sampled.clone())
            && let Some(keeper) = &self.keeper
        {
            // While the table is held: whoever erases the tenant comes behind this.
            keeper.append(Remembered { key, owner: owner.clone(), sampled });
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    fn get(&mut self, key: &Key) -> Option<Sampled> {
        let entry = self.remembered.get_mut(key)?;
        self.used.remove(&entry.used);
        self.uses += 1;
        entry.used = self.uses;
        self.used.insert(self.uses, *key);
        Some(entry.sampled.clone())
    }

    /// Whether it is of a tenant as it is now.
    fn put(&mut self, key: Key, owner: Owner, sampled: Sampled) -> bool {
        if self.erased.get(&owner.tenant).is_some_and(|&since| owner.epoch < since) {
            return false;
        }
        self.remove(&key);
        self.uses += 1;
        self.bytes += sampled.bytes();
        self.used.insert(self.uses, key);
        self.remembered.insert(key, Entry { used: self.uses, owner, sampled });
        while self.remembered.len() > MAX_ENTRIES || self.bytes > MAX_BYTES {
            let Some((_, oldest)) = self.used.pop_first() else { break };
            self.remove(&oldest);
        }
        true
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.remembered.remove(key) {
            self.used.remove(&entry.used);
            self.bytes -= entry.sampled.bytes();
        }
    }

    fn forget(&mut self, tenant: &TenantId, epoch: u32) {
        self.erased.insert(tenant.clone(), epoch);
        let is_theirs = |entry: &Entry| entry.owner.tenant == *tenant && entry.owner.epoch < epoch;
        let theirs: Vec<Key> =
            self.remembered.iter().filter(|(_, entry)| is_theirs(entry)).map(|(key, _)| *key).collect();
        theirs.iter().for_each(|key| self.remove(key));
    }

    /// All of it, what was used least lately first.
    fn all(&self) -> Vec<Remembered> {
        let entry = |key: &Key| {
            let Entry { owner, sampled, .. } = self.remembered.get(key)?;
            Some(Remembered { key: *key, owner: owner.clone(), sampled: sampled.clone() })
        };
        self.used.values().filter_map(entry).collect()
    }
}

impl Keeper {
    fn start(file: ReplayFile, table: Arc<Mutex<Table>>) -> Option<Self> {
        let (queue, commands) = mpsc::sync_channel(MAX_QUEUED);
        let work = move || keep(file, &table, &commands, MAX_FILE_BYTES);
        match thread::Builder::new().name("replay".into()).spawn(work) {
            Ok(thread) => Some(Self { queue: Some(queue), thread: Some(thread) }),
            Err(error) => {
                tracing::warn!(%error, "answers are not remembered beyond this process");
                None
            }
        }
    }

    fn append(&self, remembered: Remembered) {
        // Full: the drive is behind, and an answer that is lost is spelled anew.
        let _ = self.queue.as_ref().map(|queue| queue.try_send(Command::Append(remembered)));
    }

    /// Gives what comes of it.
    fn rewrite(&self) -> Receiver<bool> {
        let (done, outcome) = mpsc::sync_channel(1);
        let _ = self.queue.as_ref().map(|queue| queue.send(Command::Rewrite(done)));
        outcome
    }
}

impl Drop for Keeper {
    /// Waits for what is on its way.
    fn drop(&mut self) {
        self.queue = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Does what is asked until nobody can ask any more.
fn keep(mut file: ReplayFile, table: &Mutex<Table>, commands: &Receiver<Command>, max_file_bytes: u64) {
    let mut failing = false;
    for command in commands {
        let written = match command {
            Command::Append(remembered) if file.len_bytes() < max_file_bytes => file.append(&remembered),
            // It is in the table, if that has not let it go already.
            Command::Append(_) => rewrite(&mut file, table),
            Command::Rewrite(done) => {
                let written = rewrite(&mut file, table);
                let _ = done.try_send(written.is_ok());
                written
            }
        };
        if let Err(error) = &written
            && !failing
        {
            tracing::warn!(%error, "answers cannot be written down: a restart spells them anew");
        }
        failing = written.is_err();
    }
}

/// Where there is no room for that, nothing is kept of what was written so far.
fn rewrite(file: &mut ReplayFile, table: &Mutex<Table>) -> std::io::Result<()> {
    let all = lock(table).all();
    file.rewrite(&all).or_else(|_| file.clear())
}

impl Sampled {
    fn bytes(&self) -> usize {
        // The table's own share of an entry is about this.
        const ENTRY_BYTES: usize = 240;
        ENTRY_BYTES
            + match self {
                Self::Tokens(tokens) => size_of_val(tokens.as_ref()),
                Self::Text(text) => text.len(),
            }
    }
}

/// Whether a message is what a caller was given of this text.
fn says_the_same(message: &Message, sampled: &str) -> bool {
    let (before, calls) = tool_call::split(sampled);
    message.role == Role::Assistant
        && message.content == before
        && message.tool_calls.len() == calls.len()
        && message.tool_calls.iter().zip(calls).all(|(sent, call)| {
            sent.function.name == call.name && same(&sent.function.arguments, &as_given(call.arguments))
        })
}

/// A value as it is read from what a caller was given: a number may lose its last digit on the way.
fn as_given(value: Value) -> Value {
    serde_json::from_str(&value.to_string()).unwrap_or(value)
}

/// The same JSON: some languages write 1.0 as 1.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            x == y || (x.is_f64() != y.is_f64() && x.as_f64() == y.as_f64())
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(name, x)| y.get(name).is_some_and(|y| same(x, y)))
        }
        _ => a == b,
    }
}

fn extend(prefix: &mut blake3::Hasher, tokens: &[TokenId]) {
    for token in tokens {
        prefix.update(&token.0.to_le_bytes());
    }
}

/// Of one tenant only: what another's prompts are followed by is none of its business. And of one tokenizer: the file outlives
/// the model.
fn answer_key(owner: &Owner, tokenizer: &Tokenizer, prefix: &blake3::Hasher, text: &str) -> Key {
    let mut hasher = blake3::Hasher::new_derive_key("esker 2026-11 replayed answer v2");
    hasher.update(&tokenizer.digest());
    hasher.update(prefix.finalize().as_bytes());
    hasher.update(blake3::hash(text.as_bytes()).as_bytes());
    of(owner, hasher)
}

fn call_key(owner: &Owner, id: &str) -> Key {
    let mut hasher = blake3::Hasher::new_derive_key("esker 2026-11 replayed call v2");
    hasher.update(blake3::hash(id.as_bytes()).as_bytes());
    of(owner, hasher)
}

fn of(owner: &Owner, mut hasher: blake3::Hasher) -> Key {
    hasher.update(&owner.epoch.to_le_bytes());
    hasher.update(owner.tenant.0.as_bytes());
    *hasher.finalize().as_bytes()
}

/// For fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use file::hear;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::conversation::ToolCall;
    use serde_json::json;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_bytes(include_bytes!("../../engine/decoder/model/tokenizer.json")).unwrap()
    }

    fn tenant(name: &str) -> Owner {
        Owner { tenant: TenantId(name.into()), epoch: 0, scope: ScopeTag([0; 16]) }
    }

    #[test]
    fn sampled_tokens_come_back_behind_the_same_prompt_and_nowhere_else() {
        let (tokenizer, replay, a) = (tokenizer(), Replay::default(), tenant("a"));
        let parts = |text: &str, said: &str| [Part::Text(text.into()), Part::Said(said.into())];
        let prompt = tokenizer.encode("User:\nWho?\n\nAssistant:\n").unwrap();
        // Spelled letter by letter, as no tokenizer would.
        let sampled: Vec<TokenId> =
            "Elizabeth".chars().flat_map(|c| tokenizer.encode(&c.to_string()).unwrap()).collect();
        assert_ne!(tokenizer.encode("Elizabeth").unwrap(), sampled);
        replay.remember(&a, &tokenizer, &prompt, "Elizabeth", &sampled).unwrap();
        let again =
            replay.tokens(&a, &tokenizer, &parts("User:\nWho?\n\nAssistant:\n", "Elizabeth")).unwrap();
        assert_eq!(again, [prompt.clone(), sampled.clone()].concat());
        let plain = |owner: &Owner, before: &str| {
            let tokens = replay.tokens(owner, &tokenizer, &parts(before, "Elizabeth")).unwrap();
            assert!(!tokens.ends_with(&sampled));
        };
        plain(&a, "User:\nWhy?\n\nAssistant:\n");
        plain(&tenant("b"), "User:\nWho?\n\nAssistant:\n");
        // The stop sequence that ended it is no part of the answer.
        let stopped = [sampled.clone(), tokenizer.encode("\n\nUser:").unwrap()].concat();
        replay.remember(&tenant("c"), &tokenizer, &prompt, "Elizabeth", &stopped).unwrap();
        let again =
            replay.tokens(&tenant("c"), &tokenizer, &parts("User:\nWho?\n\nAssistant:\n", "Elizabeth"));
        assert!(again.unwrap().ends_with(&sampled));
    }

    /// What a caller is given of `sampled`, with ids, and gives back.
    fn given(sampled: &str) -> Conversation {
        let (before, calls) = tool_call::split(sampled);
        let mut message = Message::new(Role::Assistant, before);
        message.tool_calls = (1..)
            .zip(calls)
            .map(|(at, call)| ToolCall::new(format!("call_{at}"), call.name, as_given(call.arguments)))
            .collect();
        Conversation { messages: vec![message], tools: Vec::new() }
    }

    const SAMPLED: &str = "I look.\n<tool_call>{ \"name\":\"f\",\n\"arguments\": {\"x\":  2.0, \"y\": [0.12345678901234567890]} }</tool_call>\n\n\
                           <tool_call>{\"name\": \"g\"}</tool_call> so";

    #[test]
    fn calls_come_back_as_they_were_sampled() {
        let (replay, a) = (Replay::default(), tenant("a"));
        replay.remember_call(&a, "call_1", SAMPLED);
        let asked = given(SAMPLED);
        let mut whole = asked.clone();
        // A language without a type of its own for whole numbers.
        whole.messages[0].tool_calls[0].function.arguments["x"] = json!(2);
        for mut recalled in [asked.clone(), whole] {
            replay.recall_calls(&a, &mut recalled);
            assert_eq!(recalled.messages[0].content, SAMPLED);
            assert!(recalled.messages[0].tool_calls.is_empty());
        }
        let mut others = asked.clone();
        replay.recall_calls(&tenant("b"), &mut others);
        assert_eq!(others, asked);
    }

    #[test]
    fn calls_that_a_caller_changed_are_what_it_says_they_are() {
        let (replay, a) = (Replay::default(), tenant("a"));
        replay.remember_call(&a, "call_1", SAMPLED);
        let changes: [fn(&mut Message); 8] = [
            |message| message.tool_calls[0].function.arguments["x"] = json!(3),
            |message| message.tool_calls[0].function.arguments["z"] = json!(1),
            |message| message.tool_calls[1].function.arguments = json!({"z": {}}),
            |message| message.tool_calls[0].function.name = "h".into(),
            |message| message.content = "I do not look.\n".into(),
            |message| message.content.clear(),
            |message| drop(message.tool_calls.pop()),
            |message| message.role = Role::User,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut changed = given(SAMPLED);
            change(&mut changed.messages[0]);
            let mut recalled = changed.clone();
            replay.recall_calls(&a, &mut recalled);
            assert_eq!(recalled, changed, "change {number}");
        }
    }

    #[test]
    fn the_table_is_bounded_and_forgets_what_was_not_used() {
        let (replay, a) = (Replay::default(), tenant("a"));
        for number in 0..MAX_ENTRIES + 10 {
            replay.remember_call(&a, &number.to_string(), "x");
            assert!(replay.get(&call_key(&a, "0")).is_some());
        }
        let table = replay.table();
        assert_eq!((table.remembered.len(), table.used.len()), (MAX_ENTRIES, MAX_ENTRIES));
        assert!(!table.remembered.contains_key(&call_key(&a, "1")));
        assert!(table.bytes > 0 && table.bytes <= MAX_BYTES);
        drop(table);
        replay.remember_call(&a, "large", &"x".repeat(MAX_BYTES));
        assert!(replay.get(&call_key(&a, "large")).is_none());
    }

    #[test]
    fn nothing_is_said_to_be_forgotten_in_a_file_that_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("replay");
        std::fs::create_dir(&path).unwrap();
        let replay = reopen(&path, None);
        replay.remember_call(&tenant("a"), "call_1", SAMPLED);
        assert!(replay.is_shut_out() && !replay.forget(&tenant("a").tenant, 1));
        assert!(replay.get(&call_key(&tenant("a"), "call_1")).is_none(), "in memory it is");
        drop(replay);
        std::fs::remove_dir(&path).unwrap();
        let replay = reopen(&path, None);
        assert!(!replay.is_shut_out() && replay.forget(&tenant("a").tenant, 1));
    }

    /// A folder, and how its file is opened; tenant "gone" is in its epoch 1.
    fn reopen(path: &Path, sealer: Option<Arc<dyn Sealer>>) -> Replay {
        Replay::open(path, sealer, |id| Owner { epoch: u32::from(id.0 == "gone"), ..tenant(&id.0) })
    }

    #[test]
    fn what_was_remembered_is_there_after_a_restart() {
        let (dir, tokenizer, a) = (tempfile::tempdir().unwrap(), tokenizer(), tenant("a"));
        let path = dir.path().join("replay");
        let sampled: Vec<TokenId> =
            "Elizabeth".chars().flat_map(|c| tokenizer.encode(&c.to_string()).unwrap()).collect();
        let replay = reopen(&path, None);
        replay.remember(&a, &tokenizer, &[], "Elizabeth", &sampled).unwrap();
        replay.remember_call(&a, "call_1", SAMPLED);
        replay.remember_call(&tenant("gone"), "call_1", SAMPLED);
        drop(replay);
        let replay = reopen(&path, None);
        assert_eq!(replay.tokens(&a, &tokenizer, &[Part::Said("Elizabeth".into())]).unwrap(), sampled);
        let mut recalled = given(SAMPLED);
        replay.recall_calls(&a, &mut recalled);
        assert_eq!(recalled.messages[0].content, SAMPLED);
        // Of the epoch that is over nothing is taken up, and nothing stays in the file.
        assert_eq!(replay.table().remembered.len(), 2);
        drop(replay);
        let bytes = std::fs::read(&path).unwrap();
        assert!(
            bytes.windows(4).all(|some| some != b"gone") && bytes.windows(6).any(|some| some == b"I look")
        );
    }

    #[test]
    fn damage_costs_what_it_hit_and_no_more() {
        let (dir, a) = (tempfile::tempdir().unwrap(), tenant("a"));
        let path = dir.path().join("replay");
        let replay = reopen(&path, None);
        (0..10).for_each(|number| replay.remember_call(&a, &number.to_string(), &format!("text {number}")));
        drop(replay);
        let whole = std::fs::read(&path).unwrap();
        let kept = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let replay = reopen(&path, None);
            let kept =
                (0..10).filter(|number| replay.get(&call_key(&a, &number.to_string())).is_some()).count();
            replay.remember_call(&a, "new", "after the damage");
            drop(replay);
            let replay = reopen(&path, None);
            assert!(replay.get(&call_key(&a, "new")).is_some());
            assert_eq!(replay.table().remembered.len(), kept + 1);
            kept
        };
        assert_eq!(kept(&whole), 10);
        let mut hit = whole.clone();
        let at = whole.windows(6).position(|some| some == b"text 4").unwrap();
        hit[at] ^= 1;
        assert_eq!(kept(&hit), 9);
        assert_eq!(kept(&whole[..at + 3]), 4);
        assert_eq!(kept(b"something else"), 0);
        assert_eq!(kept(b""), 0);
    }

    #[test]
    fn nothing_of_an_erased_tenant_stays_in_memory_or_on_the_drive() {
        let (dir, a, b) = (tempfile::tempdir().unwrap(), tenant("a"), tenant("b"));
        let path = dir.path().join("replay");
        let has = |text: &str| {
            std::fs::read(&path).unwrap().windows(text.len()).any(|some| some == text.as_bytes())
        };
        let replay = reopen(&path, None);
        replay.remember_call(&a, "1", "of the one");
        replay.remember_call(&b, "1", "of the other");
        assert!(replay.forget(&TenantId("a".into()), 1));
        assert!(!has("of the one") && has("of the other"));
        // What was still being sampled comes too late; what is sampled from now on does not.
        replay.remember_call(&a, "2", "still of the one");
        replay.remember_call(&Owner { epoch: 1, ..a.clone() }, "3", "another one");
        drop(replay);
        assert!(!has("of the one") && has("of the other") && has("another one"));
    }

    #[test]
    fn a_node_that_encrypts_keeps_no_plain_text() {
        use crate::keys::Keys;
        let (dir, a) = (tempfile::tempdir().unwrap(), tenant("a"));
        let (path, root) = (dir.path().join("replay"), dir.path().join("root"));
        std::fs::write(&root, [7; 32]).unwrap();
        let keys = || {
            let keys = Keys::open(dir.path(), &root).unwrap();
            keys.own(a.scope, "private/a#0");
            Arc::new(keys)
        };
        let replay = reopen(&path, Some(keys()));
        replay.remember_call(&a, "1", "a secret");
        drop(replay);
        assert!(std::fs::read(&path).unwrap().windows(6).all(|some| some != b"secret"));
        let known = |keys: Arc<Keys>| reopen(&path, Some(keys)).get(&call_key(&a, "1"));
        assert_eq!(known(keys()), Some(Sampled::Text("a secret".into())));
        let destroyed = keys();
        destroyed.destroy("private/a#0").unwrap();
        assert_eq!(known(destroyed), None);
    }

    #[test]
    fn the_file_is_bounded() {
        let (dir, a) = (tempfile::tempdir().unwrap(), tenant("a"));
        let path = dir.path().join("replay");
        let (file, _) = ReplayFile::open(&path, None, 10_000).unwrap();
        let table = Arc::new(Mutex::new(Table::default()));
        let (queue, commands) = mpsc::sync_channel(1000);
        for number in 0..1000 {
            let remembered =
                Remembered { key: [3; 32], owner: a.clone(), sampled: Sampled::Text("x".into()) };
            lock(&table).put(remembered.key, a.clone(), Sampled::Text(number.to_string().into()));
            queue.send(Command::Append(remembered)).unwrap();
        }
        drop(queue);
        keep(file, &table, &commands, 10_000);
        assert!(std::fs::metadata(&path).unwrap().len() < 10_100);
        assert_eq!(reopen(&path, None).table().remembered.len(), 1);
    }
}
