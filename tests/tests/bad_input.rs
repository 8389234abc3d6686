//! Promise: bad input gets a clear error, and nothing that was stored is lost by it.

use std::path::Path;

use anyhow::Result;
use bytes::Bytes;
use esker_client::v1::put_request::Step;
use esker_client::{Object, Request, v1};
use esker_prefix::{KvLayout, NamespaceId, ObjectKind, TokenId};
use esker_proto::{MAX_CHUNK_BYTES, MAX_PROMPT_TOKENS, MAX_TEXT_BYTES};
use esker_tests::{
    Node, Prompt, change, copy_folder, flat_layout, output, put_steps, question, scratch, staged_layout,
    text_of, tokens,
};
use tonic::{Code, Status};

/// A node, and a prompt of three blocks of which the first is stored.
async fn one_block(data: &Path) -> Result<(Node, Prompt)> {
    let node = Node::store_only(data).await?;
    let layout = flat_layout();
    let namespace = node.register(&layout, 1).await?;
    let prompt = Prompt::new(namespace, &layout, 1, 3);
    node.store(&prompt, prompt.blocks([1])).await?;
    Ok((node, prompt))
}

/// Runs a put to its end, or to the status that ended it.
async fn put(node: &Node, steps: Vec<Step>) -> Result<Vec<v1::PutReply>, Status> {
    let mut replies = node.put_steps(steps).await?;
    let mut results = Vec::new();
    while let Some(reply) = replies.message().await? {
        results.push(reply);
    }
    Ok(results)
}

#[track_caller]
fn expect(status: &Status, code: Code, text: &str) {
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(text), "expected {text:?} in {:?}", status.message());
}

#[tokio::test]
async fn an_unknown_namespace() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = one_block(&folder.path().join("data")).await?;
    let unknown = Prompt { namespace: NamespaceId([9; 32]), ..prompt.clone() };
    let error = node.client.lookup(unknown.namespace, &unknown.tokens).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
    assert!(error.to_string().contains("call RegisterNamespace first"), "{error}");
    let status = put(&node, put_steps(&unknown, unknown.blocks([1]))).await.unwrap_err();
    expect(&status, Code::NotFound, "call RegisterNamespace first");

    let request =
        v1::LookupRequest { namespace: Bytes::from_static(b"short"), tokens: vec![1], ..Default::default() };
    let status = node.cache.clone().lookup(request).await.unwrap_err();
    expect(&status, Code::InvalidArgument, "namespace must be 32 bytes, got 5");
    node.kill()
}

#[tokio::test]
async fn unusable_registrations() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = one_block(&folder.path().join("data")).await?;
    let good = v1::RegisterNamespaceRequest {
        weights_fingerprint: Bytes::from(vec![1; 32]),
        tokenizer_digest: Bytes::from(vec![2; 32]),
        layout_json: flat_layout().to_json(),
        adapter: String::new(),
    };
    let json = |from: &str, to: &str| {
        let layout_json = good.layout_json.replacen(from, to, 1);
        assert_ne!(layout_json, good.layout_json, "{from} is not in the layout");
        v1::RegisterNamespaceRequest { layout_json, ..good.clone() }
    };
    let whole = |layout_json: String| v1::RegisterNamespaceRequest { layout_json, ..good.clone() };
    let short = Bytes::from(vec![1; 31]);
    let cases = [
        (whole("{".into()), "EOF"),
        (whole(String::new()), "EOF"),
        (json("\"block_tokens\":64", "\"block_tokens\":100"), "block_tokens is a power of two"),
        (json("\"rows\":64", "\"rows\":0"), "rows and plane_layers must be positive"),
        (json("\"rows\":64", "\"rows\":4294967295"), "would exceed"),
        (json("\"rows\":64", "\"rows\":400000"), "use smaller blocks"),
        (json("\"layers\":[0,1,2]", "\"layers\":[2,1,0]"), "layers must ascend"),
        (json("\"name\":\"latent\"", "\"name\":\"indexer_key\""), "name is used twice"),
        (json("\"dtype\":\"bf16\"", "\"dtype\":\"bf17\""), "bf17"),
        (json("\"rows\"", "\"lines\""), "lines"),
        (whole(" ".repeat((1 << 20) + 1)), "layout_json is limited to 1048576 bytes"),
        (
            v1::RegisterNamespaceRequest { adapter: "a".repeat(257), ..good.clone() },
            "adapter is limited to 256",
        ),
        (
            v1::RegisterNamespaceRequest { weights_fingerprint: short.clone(), ..good.clone() },
            "weights_fingerprint must be 32 bytes, got 31",
        ),
        (
            v1::RegisterNamespaceRequest { tokenizer_digest: short, ..good.clone() },
            "tokenizer_digest must be 32 bytes, got 31",
        ),
    ];
    for (request, text) in cases {
        let status = node.cache.clone().register_namespace(request).await.unwrap_err();
        expect(&status, Code::InvalidArgument, text);
    }
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
    node.kill()
}

#[tokio::test]
async fn a_put_that_does_not_match_the_table() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = one_block(&folder.path().join("data")).await?;
    let steps = put_steps(&prompt, prompt.blocks([2]));
    let altered = |alter: &dyn Fn(&mut v1::PlaneChunk)| {
        let mut steps = steps.clone();
        if let Step::Chunk(chunk) = &mut steps[1] {
            alter(chunk);
        }
        steps
    };
    let of_other_layout = |layout: &KvLayout| {
        let other = Prompt { layout: std::sync::Arc::new(layout.clone()), ..prompt.clone() };
        [&steps[..1], &put_steps(&other, other.blocks([2]))[1..]].concat()
    };
    let cases = [
        (altered(&|chunk| chunk.plane_bytes -= 2), "the request says"),
        (altered(&|chunk| chunk.data = [&chunk.data[..], b"more"].concat().into()), "has sent"),
        (altered(&|chunk| chunk.data.truncate(100)), "expected plane 0 of Block at 128 tokens"),
        (altered(&|chunk| chunk.data.clear()), "chunk.data must not be empty"),
        (altered(&|chunk| chunk.plane = 1), "expected plane 0"),
        (altered(&|chunk| chunk.offset = 8), "at offset 8"),
        (altered(&|chunk| chunk.kind = 0), "kind is missing"),
        (altered(&|chunk| chunk.kind = 77), "kind is missing"),
        (altered(&|chunk| chunk.kind = v1::ObjectKind::State.into()), "has no State planes"),
        (altered(&|chunk| chunk.tokens = 64), "is incomplete"),
        (
            altered(&|chunk| chunk.data = vec![0; MAX_CHUNK_BYTES + 1].into()),
            "chunk.data is limited to 1048576",
        ),
        (of_other_layout(&staged_layout()), "of layout"),
        (steps[..2].to_vec(), "stream ended inside Block at 128 tokens"),
        (steps[1..].to_vec(), "the first message of a put must be `prefix`"),
        ([&steps[..1], &steps[..1]].concat(), "a put has one `prefix`"),
        (vec![], "the first message of a put must be `prefix`"),
        (put_steps(&prompt, vec![at(&prompt, 100)]), "a block at 100 tokens does not fit"),
        (put_steps(&prompt, vec![at(&prompt, 0)]), "a block at 0 tokens does not fit"),
        (
            put_steps(&prompt, vec![at(&prompt, 256)]),
            "the prefix of this put has 193 tokens, 3 whole blocks of 64",
        ),
        (put_steps(&prompt, vec![at(&prompt, u64::MAX / 64 * 64)]), "does not fit"),
    ];
    for (steps, text) in cases {
        let status = put(&node, steps).await.map(|results| panic!("{text}: {results:?}")).unwrap_err();
        expect(&status, Code::InvalidArgument, text);
    }
    let empty = tokio_stream::iter([v1::PutRequest { step: None }]);
    let status = node.cache.clone().put(empty).await.map(|_| ()).unwrap_err();
    expect(&status, Code::InvalidArgument, "needs `prefix` or `chunk`");

    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
    node.store(&prompt, prompt.blocks(1..=3)).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 3);
    node.kill()
}

/// The prompt's second block, said to be at another length.
fn at(prompt: &Prompt, tokens: u64) -> Object {
    Object { tokens, ..prompt.object(ObjectKind::Block, 128) }
}

#[tokio::test]
async fn a_chain_with_a_missing_parent() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = one_block(&folder.path().join("data")).await?;
    let results = put(&node, put_steps(&prompt, prompt.blocks([3, 2]))).await?;
    let outcomes: Vec<_> = results.iter().map(|result| (result.tokens, result.outcome())).collect();
    assert_eq!(outcomes, [(192, v1::Outcome::Refused), (128, v1::Outcome::Stored)]);
    assert!(results[0].reason.contains("parent") && results[0].reason.contains("not stored"), "{results:?}");
    assert_eq!(results[0].durability(), v1::Durability::Unspecified);
    node.store(&prompt, prompt.blocks([3])).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 3);
    node.kill()
}

#[tokio::test]
async fn other_bytes_under_the_same_key() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = one_block(&folder.path().join("data")).await?;
    let mut forged = prompt.blocks([1]);
    forged[0].planes[0] = forged[0].planes[0].iter().map(|byte| !byte).collect();
    let results = put(&node, put_steps(&prompt, forged)).await?;
    assert_eq!(results[0].outcome(), v1::Outcome::Refused);
    assert!(results[0].reason.contains("other bytes are already stored"), "{results:?}");
    let again = put(&node, put_steps(&prompt, prompt.blocks([1]))).await?;
    assert_eq!(again[0].outcome(), v1::Outcome::Present);
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
    node.kill()
}

#[tokio::test]
async fn requests_over_the_limits() -> Result<()> {
    let folder = scratch();
    let (node, prompt) = one_block(&folder.path().join("data")).await?;
    let namespace = Bytes::copy_from_slice(prompt.namespace.as_bytes());
    let lookup = async |tokens| {
        let request = v1::LookupRequest { namespace: namespace.clone(), tokens, ..Default::default() };
        node.cache.clone().lookup(request).await.map(|_| ()).unwrap_err()
    };
    expect(&lookup(vec![]).await, Code::InvalidArgument, "tokens must not be empty");
    let status = lookup(vec![1; MAX_PROMPT_TOKENS + 1]).await;
    expect(&status, Code::InvalidArgument, "tokens is limited to 1048576 tokens, got 1048577");
    expect(&lookup(vec![u32::MAX; 1 << 20]).await, Code::OutOfRange, "4194304");

    // Puts that never come to an end.
    let mut open = Vec::new();
    let refused = loop {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let first = put_steps(&prompt, vec![]).pop();
        sender.send(v1::PutRequest { step: first }).await?;
        match node.cache.clone().put(tokio_stream::wrappers::ReceiverStream::new(receiver)).await {
            Ok(replies) => open.push((sender, replies)),
            Err(status) => break status,
        }
        assert!(open.len() <= 64, "puts are not limited");
    };
    expect(&refused, Code::ResourceExhausted, "try again in 200 ms");
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
    drop(open);
    while put(&node, put_steps(&prompt, prompt.blocks([2]))).await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    node.kill()
}

#[tokio::test]
async fn questions_that_cannot_be_answered() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let context = usize::try_from(node.client.describe().await?.max_tokens)?;
    let text = |text: String| Request::new(esker_client::Prompt::Text(text));
    let some = || question(&tokens(1, 5));
    let cases = [
        (question(&[]), "tokens must not be empty"),
        (text(String::new()), "text must not be empty"),
        (text("a".repeat(MAX_TEXT_BYTES + 1)), "text is limited to 3145728 bytes"),
        (question(&[TokenId(u32::MAX)]), "token 4294967295 is not in the vocabulary"),
        (question(&tokens(1, context)), "at least one must be left to write"),
        (Request { temperature: -1.0, ..some() }, "temperature -1 must be 0 or more"),
        (Request { temperature: f32::NAN, ..some() }, "temperature NaN"),
        (Request { temperature: 1.0, top_p: 1.5, ..some() }, "top_p 1.5"),
    ];
    for (request, text) in cases {
        let error = node.ask(request).await.map(|_| ()).unwrap_err();
        let error = error.downcast::<esker_client::ClientError>()?;
        assert_eq!(error.code(), Some(Code::InvalidArgument), "{error}");
        assert!(error.to_string().contains(text), "expected {text:?} in {error}");
    }
    node.ask(some()).await?;
    node.kill()
}

/// The message of an `esker serve` that must not come up.
#[track_caller]
fn does_not_start(data: &Path, options: &[&str]) -> String {
    let data = data.to_str().expect("a UTF-8 path");
    let done = output([&["serve", "--listen", "127.0.0.1:0", "--data", data], options].concat());
    assert!(!done.status.success() && done.stdout.is_empty(), "it started with {options:?}");
    let text = text_of(&done.stderr);
    assert!(!text.contains("panicked"), "{text}");
    text
}

#[tokio::test]
async fn a_folder_in_use_and_folders_that_cannot_be_used() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let (node, prompt) = one_block(&data).await?;
    let text = does_not_start(&data, &["--no-model"]);
    assert!(
        text.contains(data.to_str().expect("UTF-8")) && text.contains("in use by another process"),
        "{text}"
    );
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
    node.stop().await?;

    let secret = data.join("root-secret");
    let whole = std::fs::read(&secret)?;
    std::fs::write(&secret, b"short")?;
    let text = does_not_start(&data, &["--no-model"]);
    assert!(text.contains("must hold 32 bytes, has 5: restore it from a backup"), "{text}");
    std::fs::write(&secret, whole)?;
    let node = Node::store_only(&data).await?;
    node.fetch_best(&prompt).await?.expect_blocks(&prompt, 1);
    node.stop().await?;

    let file = folder.path().join("file");
    std::fs::write(&file, b"not a folder")?;
    let text = does_not_start(&file, &["--no-model"]);
    assert!(text.contains(file.to_str().expect("UTF-8")), "{text}");
    assert_eq!(std::fs::read(&file)?, b"not a folder");
    Ok(())
}

#[test]
fn options_that_make_no_sense() {
    let folder = scratch();
    let data = folder.path().join("data");
    let cases: [(&[&str], &str); 7] = [
        (&["--block-tokens", "100"], "must be a power of two between 16 and 1024"),
        (&["--block-tokens", "8"], "must be a power of two between 16 and 1024"),
        (&["--segment-mib", "3"], "--segment-mib"),
        (&["--segment-mib", "4096"], "--segment-mib"),
        (&["--model", "x", "--no-model"], "cannot be used with"),
        (&["--codec", "lz4"], "possible values: raw, zstd"),
        (&["--io", "fast"], "possible values: auto, uring, positional"),
    ];
    for (options, text) in cases {
        let got = does_not_start(&data, options);
        assert!(got.contains(text), "expected {text:?} in {got}");
    }
    assert!(!data.exists(), "an unusable command line made a data folder");
}

#[tokio::test]
async fn model_folders_that_are_none() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/decoder/model");
    type Breakage = fn(&Path) -> Result<()>;
    let cases: [(&str, Breakage, &str); 10] = [
        ("whole", |_| Ok(()), ""),
        ("absent", |dir| Ok(std::fs::remove_dir_all(dir)?), "config.json"),
        (
            "without-weights",
            |dir| Ok(std::fs::remove_file(dir.join("model.safetensors"))?),
            "a download is incomplete",
        ),
        ("without-tokenizer", |dir| Ok(std::fs::remove_file(dir.join("tokenizer.json"))?), "tokenizer.json"),
        ("cut-weights", |dir| cut(&dir.join("model.safetensors"), 1_000_000), "\"model.safetensors\""),
        ("cut-header", |dir| cut(&dir.join("model.safetensors"), 5), "\"model.safetensors\""),
        ("cut-config", |dir| cut(&dir.join("config.json"), 100), "config.json"),
        ("cut-tokenizer", |dir| cut(&dir.join("tokenizer.json"), 1000), "tokenizer"),
        ("other-shape", |dir| replace(dir, "\"hidden_size\": ", "\"hidden_size\": 1"), "expected"),
        ("other-model", |dir| replace(dir, "\"deepseek_v4\"", "\"llama\""), "llama"),
    ];
    for (name, damage, text) in cases {
        let model = folder.path().join(name);
        copy_folder(&bundled, &model)?;
        damage(&model)?;
        let options = ["--model", model.to_str().expect("a UTF-8 path")];
        if text.is_empty() {
            Node::start(&data, &options).await?.kill()?;
            continue;
        }
        let got = does_not_start(&data, &options);
        assert!(got.contains(name), "the folder is not named: {got}");
        assert!(got.contains(text), "expected {text:?} in {got}");
    }
    // A byte of the weights' header, which is JSON.
    let model = folder.path().join("damaged-header");
    copy_folder(&bundled, &model)?;
    change(&model.join("model.safetensors"), 9, |byte| byte ^ 0x80)?;
    let got = does_not_start(&data, &["--model", model.to_str().expect("a UTF-8 path")]);
    assert!(got.contains("damaged-header") && got.contains("\"model.safetensors\""), "{got}");
    Ok(())
}

fn cut(file: &Path, length: u64) -> Result<()> {
    Ok(std::fs::OpenOptions::new().write(true).open(file)?.set_len(length)?)
}

fn replace(dir: &Path, from: &str, to: &str) -> Result<()> {
    let config = dir.join("config.json");
    let text = std::fs::read_to_string(&config)?;
    anyhow::ensure!(text.contains(from), "{from} is not in {text}");
    Ok(std::fs::write(config, text.replacen(from, to, 1))?)
}
