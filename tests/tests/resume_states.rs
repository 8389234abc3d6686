//! Promise: a model that keeps windows beside its history resumes where a state is stored, replays exactly where none
//! is, and answers in both cases what it would have answered from nothing.

use std::path::{Path, PathBuf};

use anyhow::Result;
use esker_client::Request;
use esker_prefix::{ObjectKind, TokenId};
use esker_tests::{Answer, Node, Random, change, question, records, scratch};

const BLOCK: usize = 64;

/// A V4 model with a tokenizer of made-up words; `None`, and why, where there is none to take.
fn model(folder: &Path) -> Result<Option<PathBuf>> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden");
    let golden = std::env::var_os("ESKER_GOLDEN").map_or(beside, PathBuf::from).join("v4-small");
    if !golden.join("model.safetensors").exists() {
        println!("SKIPPED: no V4 model in {}; set ESKER_GOLDEN", golden.display());
        return Ok(None);
    }
    let model = folder.join("v4-small");
    std::fs::create_dir_all(&model)?;
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), model.join(file))?;
    }
    let words: Vec<String> = (0..128).map(|word| format!("\"w{word}\":{word}")).collect();
    let tokenizer = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{{"type":"WhitespaceSplit"}},"post_processor":null,"decoder":null,
        "model":{{"type":"WordLevel","vocab":{{{}}},"unk_token":"w0"}}}}"#,
        words.join(",")
    );
    std::fs::write(model.join("tokenizer.json"), tokenizer)?;
    Ok(Some(model))
}

fn tokens(seed: u64, count: usize) -> Vec<TokenId> {
    let mut random = Random(seed + 1);
    (0..count).map(|_| TokenId(u32::try_from(random.below(128)).expect("a small number"))).collect()
}

async fn start(data: &Path, model: &Path) -> Result<Node> {
    let model = model.to_str().expect("a path of the test's own");
    Node::start(data, &["--model", model, "--kv", "f32", "--block-tokens", "64", "--segment-mib", "4"]).await
}

async fn from_nothing(model: &Path, request: Request) -> Result<Answer> {
    let folder = scratch();
    let node = start(&folder.path().join("data"), model).await?;
    let answer = node.ask(request).await?;
    assert_eq!(answer.usage.prompt_cache_hit_tokens, 0);
    node.kill()?;
    Ok(answer)
}

#[tokio::test]
async fn with_states_and_without_them() -> Result<()> {
    let folder = scratch();
    let Some(model) = model(folder.path())? else { return Ok(()) };
    let data = folder.path().join("data");
    let document = tokens(1, 10 * BLOCK + 7);
    let node = start(&data, &model).await?;
    node.ask(question(&document)).await?;
    assert!(node.stop().await?.success());
    let states = || -> Result<Vec<_>> {
        Ok(records(&data)?.into_iter().filter(|record| record.kind == ObjectKind::State).collect())
    };
    assert!(!states()?.is_empty(), "no state was stored");

    // A new turn behind the whole document, and one that left it early.
    let turns =
        [[&document[..], &tokens(2, 30)].concat(), [&document[..6 * BLOCK + 3], &tokens(3, 90)].concat()];
    for damaged in [false, true] {
        if damaged {
            // Without its state a boundary is reached by replay.
            for state in states()? {
                for plane in state.planes.iter().filter(|plane| !plane.is_empty()) {
                    change(&state.file, plane.start, |byte| byte ^ 1)?;
                }
            }
        }
        // The state at the very end of the document brings along what no block holds.
        let document = if damaged { 10 * BLOCK } else { document.len() };
        for (turn, hit) in turns.iter().zip([document, 6 * BLOCK]) {
            // A copy for each, so that no turn finds another.
            let copy = scratch();
            let copied = std::process::Command::new("cp").arg("-r").arg(&data).arg(copy.path()).status()?;
            assert!(copied.success());
            let node = start(&copy.path().join("data"), &model).await?;
            let warm = node.ask(question(turn)).await?;
            assert_eq!(warm.usage.prompt_cache_hit_tokens, hit as u64, "states damaged: {damaged}");
            assert_eq!(warm.tokens, from_nothing(&model, question(turn)).await?.tokens, "damaged: {damaged}");
            assert!(warm.tokens.len() > 1);
            node.kill()?;
        }
    }
    Ok(())
}
