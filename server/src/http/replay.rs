//! From a conversation to tokens, the same tokens every time it is resent.
//!
//! A model spells its text in tokens of its own choice, and a tokenizer given that text may choose others; the KV of the
//! answer would then never be found again. So what was sampled is remembered by the prompt before it and its text, and put in
//! its place when the text comes back behind the same prompt. Only what the tokenizer would spell otherwise needs to be
//! remembered, so the table, which is in memory and bounded, lasts long; what it forgot is computed again. Tool calls are
//! remembered as the text in which they were sampled, by their ids, since callers give them back as JSON; what a caller changed
//! meanwhile, arguments, the text before them or a call that is gone, is not what was sampled and is spelled as it came.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use esker_decoder::{DecoderError, Tokenizer};
use esker_prefix::TokenId;
use serde_json::Value;

use crate::chat_template::conversation::{Conversation, Message, Role};
use crate::chat_template::{Part, tool_call};
use crate::principal::TenantId;

/// Answers remembered, and what they may take together.
const MAX_ENTRIES: usize = 16_384;
const MAX_BYTES: usize = 64 << 20;
/// Tokens at the end of what was sampled that may belong to a stop sequence and not to the answer.
const MAX_STOP_TOKENS: usize = 32;

type Key = [u8; 32];

/// See the module.
#[derive(Default)]
pub(super) struct Replay(Mutex<Table>);

#[derive(Default)]
struct Table {
    remembered: HashMap<Key, (u64, Sampled)>,
    /// Keys by when they were last used.
    used: BTreeMap<u64, Key>,
    uses: u64,
    bytes: usize,
}

#[derive(Clone)]
enum Sampled {
    Tokens(Arc<[TokenId]>),
    Text(Arc<str>),
}

impl Replay {
    /// Gives calls of tools the text in which this node sampled them, if they are those calls still.
    pub(super) fn recall_calls(&self, tenant: &TenantId, conversation: &mut Conversation) {
        for message in &mut conversation.messages {
            let Some(call) = message.tool_calls.first() else { continue };
            if let Some(Sampled::Text(text)) = self.get(&call_key(tenant, &call.id))
                && says_the_same(message, &text)
            {
                message.content = text.as_ref().to_owned();
                message.tool_calls.clear();
            }
        }
    }

    /// Remembers the text in which a call was sampled.
    pub(super) fn remember_call(&self, tenant: &TenantId, id: &str, text: &str) {
        self.put(call_key(tenant, id), Sampled::Text(text.into()));
    }

    /// The tokens of a prompt.
    pub(super) fn tokens(
        &self,
        tenant: &TenantId,
        tokenizer: &Tokenizer,
        parts: &[Part],
    ) -> Result<Vec<TokenId>, DecoderError> {
        let mut tokens: Vec<TokenId> = Vec::new();
        let mut prefix = blake3::Hasher::new();
        for part in parts {
            let more = match part {
                Part::Text(text) => tokenizer.encode(text)?,
                Part::Said(text) => match self.get(&answer_key(tenant, &prefix, text)) {
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
    pub(super) fn remember(
        &self,
        tenant: &TenantId,
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
                self.put(answer_key(tenant, &prefix, text), Sampled::Tokens(tokens));
                return Ok(());
            }
            if decoded.len() < text.len() {
                break;
            }
        }
        Ok(())
    }

    fn get(&self, key: &Key) -> Option<Sampled> {
        let mut table = self.table();
        let table = &mut *table;
        let (used, sampled) = table.remembered.get_mut(key)?;
        table.used.remove(used);
        table.uses += 1;
        *used = table.uses;
        table.used.insert(table.uses, *key);
        Some(sampled.clone())
    }

    fn put(&self, key: Key, sampled: Sampled) {
        let mut table = self.table();
        table.remove(&key);
        table.uses += 1;
        let now = table.uses;
        table.bytes += sampled.bytes();
        table.remembered.insert(key, (now, sampled));
        table.used.insert(now, key);
        while table.remembered.len() > MAX_ENTRIES || table.bytes > MAX_BYTES {
            let Some((_, oldest)) = table.used.pop_first() else { break };
            table.remove(&oldest);
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn remove(&mut self, key: &Key) {
        if let Some((used, sampled)) = self.remembered.remove(key) {
            self.used.remove(&used);
            self.bytes -= sampled.bytes();
        }
    }
}

impl Sampled {
    fn bytes(&self) -> usize {
        // The table's own share of an entry is about this.
        const ENTRY_BYTES: usize = 160;
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

/// Of one tenant only: what another's prompts are followed by is none of its business.
fn answer_key(tenant: &TenantId, prefix: &blake3::Hasher, text: &str) -> Key {
    let mut hasher = blake3::Hasher::new_derive_key("esker 2026-11 replayed answer v1");
    hasher.update(prefix.finalize().as_bytes());
    hasher.update(blake3::hash(text.as_bytes()).as_bytes());
    hasher.update(tenant.0.as_bytes());
    *hasher.finalize().as_bytes()
}

fn call_key(tenant: &TenantId, id: &str) -> Key {
    let mut hasher = blake3::Hasher::new_derive_key("esker 2026-11 replayed call v1");
    hasher.update(blake3::hash(id.as_bytes()).as_bytes());
    hasher.update(tenant.0.as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::conversation::ToolCall;
    use serde_json::json;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_bytes(include_bytes!("../../../engine/decoder/model/tokenizer.json")).unwrap()
    }

    fn tenant(name: &str) -> TenantId {
        TenantId(name.into())
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
        let plain = |tenant: &TenantId, before: &str| {
            let tokens = replay.tokens(tenant, &tokenizer, &parts(before, "Elizabeth")).unwrap();
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
            |message| message.tool_calls[1].function.arguments = json!({}),
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
}
