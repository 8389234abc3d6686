//! The kept corpus of every target, and random mutations of it: no panic, all that is kept is accepted, and some of what is made of it
//! is not. `make fuzz` goes further.
//!
//! `ESKER_WRITE_CORPUS=1` writes the sound examples that are not written by hand to the corpus; `ESKER_SEED` repeats a run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use prost::Message;
use serde_json::json;

use super::*;
use crate::ledger::head::Head;
use crate::ledger::index::{account_key, name_value};
use crate::ledger::segment::SegmentHeader;
use crate::ledger::sums::Account;
use crate::principal::TenantId;
use crate::replay::{Owner, Replay};

/// Of each target.
const MUTATIONS: usize = 8_000;

type Target = fn(&[u8]) -> bool;

const TARGETS: [(&str, Target); 17] = [
    ("zmtp", zmtp),
    ("ledger_frame", ledger_frame),
    ("ledger_head", ledger_head),
    ("ledger_index", ledger_index),
    ("request", request),
    ("http_body", http_body),
    ("chat_template", chat_template),
    ("data_key", data_key),
    ("audit_log", audit_log),
    ("policy", policy),
    ("prices", prices),
    ("key_set", key_set),
    ("bearer_token", bearer_token),
    ("certificate", certificate),
    ("warmup_prompts", warmup_prompts),
    ("warmup_job", warmup_job),
    ("replay_file", replay_file),
];

#[test]
fn what_is_kept_of_each_target_can_be_damaged_at_will() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    if std::env::var_os("ESKER_WRITE_CORPUS").is_some() {
        write(&corpus);
    }
    let seed = std::env::var("ESKER_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut state: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5eed);
    println!("ESKER_SEED={state}");
    let mut below = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % bound.max(1)
    };
    for (name, target) in TARGETS {
        let kept = kept(&corpus.join(name));
        for (path, bytes) in &kept {
            assert!(target(bytes), "{} is refused", path.display());
        }
        let mut accepted = 0;
        for _ in 0..MUTATIONS {
            let mut bytes = kept[below(kept.len())].1.clone();
            for _ in 0..=below(4) {
                let at = below(bytes.len());
                match below(6) {
                    _ if bytes.is_empty() => bytes.push(0),
                    0 => bytes[at] ^= 1 << below(8),
                    1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'9', b'"', b'{'][below(8)],
                    2 => bytes.truncate(at),
                    3 => bytes.extend_from_within(at..),
                    4 => drop(bytes.splice(at..at, *b"18446744073709551615")),
                    _ => {
                        let other = &kept[below(kept.len())].1;
                        let from = below(other.len());
                        let len = below(48).min(other.len() - from);
                        bytes.splice(at..at, other[from..from + len].iter().copied());
                    }
                }
            }
            accepted += usize::from(target(&bytes));
        }
        println!("{name}: {MUTATIONS} fed, {accepted} accepted");
        assert!(accepted > 0 && accepted < MUTATIONS, "{name}: {accepted} of {MUTATIONS} were accepted");
    }
}

/// A kind of request that is never accepted would be fuzzed no further than to its first check.
#[test]
fn every_kind_of_request_has_sound_ones_in_the_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/request");
    let kinds: BTreeSet<u8> = kept(&corpus).into_iter().map(|(_, bytes)| bytes[0]).collect();
    assert_eq!(kinds, (0..KINDS).collect());
}

/// A decoder without a target, or a target that nothing feeds, would go unnoticed.
#[test]
fn every_target_is_built_and_has_a_corpus() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let names = |folder: &str| -> BTreeSet<String> {
        let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        std::fs::read_dir(fuzz.join(folder)).unwrap().map(|entry| stem(entry.unwrap().path())).collect()
    };
    let targets = names("fuzz_targets");
    assert_eq!(targets, names("corpus"));
    for (name, _) in TARGETS {
        assert!(targets.contains(name), "{name} has no target");
    }
    for name in &targets {
        assert!(
            manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")),
            "{name}"
        );
    }
}

fn kept(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).unwrap());
    let mut kept: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| read(entry.unwrap().path())).collect();
    kept.sort();
    assert!(!kept.is_empty(), "{} is empty", folder.display());
    kept
}

/// What the writers of this crate write.
fn write(corpus: &Path) {
    let save = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus.join(target)).unwrap();
        std::fs::write(corpus.join(target).join(name), bytes).unwrap();
    };
    write_requests(&|kind, name, bytes| save("request", name, &[&[kind], bytes].concat()));
    let claims = json!({
        "sub": "engine", "exp": 1_795_006_000, "iat": 1_795_003_190, "tenant": "default", "aud": "esker",
        "roles": ["reader", "billing-reader"]
    });
    save("bearer_token", "claims", claims.to_string().as_bytes());
    // {"alg":"EdDSA","kid":"k"}, {"sub":"engine"}, and no signature.
    save(
        "bearer_token",
        "unsigned",
        b"Bearer eyJhbGciOiJFZERTQSIsImtpZCI6ImsifQ.eyJzdWIiOiJlbmdpbmUifQ.AAAA",
    );
    let head = |sequence| Head {
        sequence,
        segment: 1,
        end: 4096 + sequence,
        chain: [3; 32],
        unix_ms: 1_795_003_200_000,
        since_boot_ms: 5000,
        boot: [4; 16],
    };
    save("ledger_head", "two", &[head(8).encode(), head(7).encode()].concat());
    save("ledger_head", "one", &head(1).encode());
    let header =
        SegmentHeader { number: 2, first_sequence: 9, chain: [3; 32], previous: 1, previous_end: 4104 };
    save("ledger_head", "segment", &header.encode());

    let dir = tempfile::tempdir().unwrap();
    let (path, scope) = (dir.path().join("replay"), esker_prefix::ScopeTag([0; 16]));
    let owner = |tenant: &TenantId| Owner { tenant: tenant.clone(), epoch: 0, scope };
    let replay = Replay::open(&path, None, owner);
    for (number, text) in ["<tool_call>{\"name\": \"f\"}</tool_call>", "one more", ""].into_iter().enumerate()
    {
        replay.remember_call(&owner(&TenantId("acme".into())), &number.to_string(), text);
    }
    drop(replay);
    save("replay_file", "file", &std::fs::read(&path).unwrap());

    let account = Account {
        hour_unix_s: 1_795_003_200,
        tenant: "acme".into(),
        namespace: vec![0, 7, 0],
        scope: "private".into(),
    };
    save("ledger_index", "account", &account_key(b'h', &account));
    let record = v1::UsageRecord { content: vec![5; 16].into(), time_unix_ms: 7, ..Default::default() };
    let place = ledger::log::Place { sequence: 1, segment: 1, offset: 128 };
    save("ledger_index", "name", &name_value(&record, place));
    let writes = v1::WriteTokens { ttl_24h: 128, ..Default::default() };
    let sums =
        v1::UsageSums { requests: 2, hit_tokens: 256, write_tokens: Some(writes), ..Default::default() };
    save("ledger_index", "sums", &sums.encode_to_vec());
    save("ledger_index", "cursor", ledger::Position::start("fleet").to_cursor().as_bytes());

    for (name, bytes) in crate::keys::samples() {
        save("data_key", name, &bytes);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let log = crate::audit::Audit::open(&path).unwrap();
    let who = crate::principal::Principal::local();
    log.record(&crate::audit::Event::new(&who, "erase-tenant", "globex", "ok").count(7));
    log.record(&crate::audit::Event::denied(&who, "/esker.v1.Admin/ListTenants"));
    save("audit_log", "two", &std::fs::read(&path).unwrap());

    let key = rcgen::KeyPair::generate().unwrap();
    let mut asked = rcgen::CertificateParams::default();
    let uri = rcgen::string::Ia5String::try_from("spiffe://fleet.example/tenant/acme/sa/engine").unwrap();
    asked.subject_alt_names = vec![rcgen::SanType::URI(uri)];
    save("certificate", "engine", asked.self_signed(&key).unwrap().der());

    save("warmup_job", "queued", json!({
        "digest": "00ff", "account": "engine", "publishes": true, "number": 3, "namespace": "11", "scope": 1, "ttl": 3,
        "user": "ann", "priority": 2, "max_tokens": 5000, "max_bytes": 70000, "deadline_s": 900, "stage": "queued",
        "reason": "", "prompts": 4, "prompts_done": 1, "tokens": 4096, "tokens_done": 1024, "prompt_tokens": 128,
        "tokens_cached": 512, "tokens_computed": 640, "bytes_written": 9000, "compute_us": 12345, "new_tokens": 2048,
        "new_bytes": 30000, "free_tokens": 128, "free_bytes": 2000
    }).to_string().as_bytes());

    let chat = json!({
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
            {"role": "assistant", "content": " She. ", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": [1, 2.5]}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "there"}
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
        "stop": ["\n\n"], "prompt_cache_key": "a chat", "prompt_cache_retention": "24h"
    });
    let messages = json!({
        "model": "m", "max_tokens": 10, "system": [{"type": "text", "text": "S", "cache_control": {"ttl": "1h"}}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {"at": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "there"}]}
        ],
        "tools": [{"name": "look", "description": "looks", "input_schema": {"type": "object"}}]
    });
    let text = json!({"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "stop": "x"});
    save("http_body", "chat", chat.to_string().as_bytes());
    save("http_body", "messages", messages.to_string().as_bytes());
    save("http_body", "text", text.to_string().as_bytes());
    let called = "I look.<tool_call>{\"name\": \"look\", \"arguments\": {\"at\": 1}}</tool_call>";
    save("http_body", "called", called.as_bytes());

    let template = "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% for message in messages %}\
        <|{{ message.role }}|>{{ message.content.strip() }}{% for call in message.tool_calls %}\
        {{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}<|assistant|>";
    let config =
        json!({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}).to_string();
    let named =
        json!({"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}).to_string();
    for (name, config, body) in
        [("chatml", config, &chat), ("named", named, &messages), ("none", "{}".into(), &chat)]
    {
        let len = u16::try_from(config.len()).unwrap().to_le_bytes();
        save("chat_template", name, &[&len, config.as_bytes(), body.to_string().as_bytes()].concat());
    }
}

/// Requests that are taken, of the kinds behind those that are written by hand.
fn write_requests(save: &dyn Fn(u8, &str, &[u8])) {
    let namespace = bytes::Bytes::from(vec![0x11; 32]);
    let write_tokens = Some(v1::WriteTokens { ttl_24h: 128, ..Default::default() });
    let settled = v1::SettleRequest {
        request_id: "request-1".into(),
        prompt_tokens: 1000,
        computed_tokens: 1000,
        namespace: namespace.clone(),
        write_tokens,
        ..Default::default()
    };
    let granted = v1::SettleRequest {
        grant: vec![9; 16].into(),
        namespace: bytes::Bytes::new(),
        used_hit_tokens: 512,
        computed_tokens: 488,
        prompt_tokens: 0,
        model: "m".into(),
        ..settled.clone()
    };
    save(3, "settle", &settled.encode_to_vec());
    save(3, "settle-grant", &granted.encode_to_vec());

    let put = |at: u32, prefix: v1::PutPrefix| {
        let step = Some(v1::put_request::Step::Prefix(prefix));
        [&at.to_le_bytes()[..], &v1::PutRequest { step }.encode_to_vec()].concat()
    };
    let tokens =
        v1::PutPrefix { namespace: namespace.clone(), tokens: (1..20).collect(), ..Default::default() };
    let engine_hashes = vec![bytes::Bytes::from_static(b"one"), bytes::Bytes::from_static(b"two")];
    let engine = v1::PutPrefix { tokens: Vec::new(), engine_hashes, unchained: true, ..tokens.clone() };
    save(4, "put-block", &put(8, tokens.clone()));
    save(4, "put-tail", &put(18, tokens));
    save(4, "put-engine", &put(8, engine));

    let fetch = v1::FetchRequest { grant: vec![9; 16].into(), tokens: 8, ..Default::default() };
    let groups = vec!["window".into(), "latent".into()];
    let some = v1::FetchRequest { groups, first_layer: 1, end_layer: 2, blocks: vec![0, 1], ..fetch.clone() };
    save(5, "fetch", &fetch.encode_to_vec());
    save(5, "fetch-some", &some.encode_to_vec());

    let opened = v1::OpenSessionRequest {
        session: "chat".into(),
        namespace: namespace.clone(),
        tokens: vec![1, 2, 300],
        keep_s: 3600,
        user: "ann".into(),
    };
    let extended = v1::ExtendSessionRequest { session: "chat".into(), tokens: vec![1, 2, 300], keep_s: 0 };
    save(6, "session-open", &opened.encode_to_vec());
    save(6, "session-extend", &extended.encode_to_vec());

    let prompt = |prompt| v1::WarmupPrompt { prompt: Some(prompt) };
    let job = v1::SubmitWarmupRequest {
        job: "night".into(),
        namespace,
        prompts: vec![
            prompt(v1::warmup_prompt::Prompt::Text("Once".into())),
            prompt(v1::warmup_prompt::Prompt::Tokens(v1::WarmupTokens { ids: vec![7, 4000] })),
            prompt(v1::warmup_prompt::Prompt::Chain(v1::WarmupChain { hashes: vec![vec![3; 32].into()] })),
        ],
        max_tokens: 5000,
        priority: 2,
        ..Default::default()
    };
    save(7, "warmup", &job.encode_to_vec());

    let query = v1::QueryUsageRequest {
        start_unix_s: 3601,
        end_unix_s: 90_001,
        namespace: "11".into(),
        group_by: vec![v1::UsageGroup::Tenant.into(), v1::UsageGroup::Day.into()],
        ..Default::default()
    };
    let export = v1::ExportUsageRequest {
        consumer: "books".into(),
        cursor: ledger::Position::start("fleet").to_cursor(),
        limit: 10,
        follow: true,
        ..Default::default()
    };
    save(8, "usage-query", &query.encode_to_vec());
    save(8, "usage-export", &export.encode_to_vec());

    let generate = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text("Once".into())),
        max_new_tokens: 5,
        temperature: 0.5,
        top_p: 0.5,
        seed: 7,
        stop: vec!["\n".into()],
        ..Default::default()
    };
    save(9, "generate", &generate.encode_to_vec());
    save(10, "timeout", b"250m");
}
