//! Promise: a generation that resumed from the cache is, token by token and logit by logit, the one that computed all.

use anyhow::Result;
use esker_client::Request;
use esker_prefix::{ObjectKind, TokenId};
use esker_tests::{Answer, Node, change, copy_folder, question, records, scratch, tokens};

const BLOCK: usize = 128;

/// The answer of a node that has never seen anything.
async fn from_nothing(request: Request) -> Result<Answer> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let answer = node.ask(request).await?;
    assert_eq!(answer.usage.prompt_cache_hit_tokens, 0);
    node.kill()?;
    Ok(answer)
}

fn check_account(answer: &Answer, prompt: &[TokenId]) {
    let usage = &answer.usage;
    assert_eq!(usage.prompt_tokens, prompt.len() as u64);
    assert_eq!(usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens, usage.prompt_tokens);
    assert_eq!(usage.completion_tokens, answer.tokens.len() as u64);
    assert_eq!(usage.bytes_read > 0, usage.prompt_cache_hit_tokens > 0);
}

#[tokio::test]
async fn prompts_of_every_shape() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    // Prompt length, and tokens that may come from the cache once the very same prompt was asked before.
    let shapes = [
        (1, 0),
        (BLOCK - 1, 0),
        (BLOCK, 0),
        (BLOCK + 1, BLOCK),
        (3 * BLOCK, 2 * BLOCK),
        (3 * BLOCK + 1, 3 * BLOCK),
        (1000, 7 * BLOCK),
    ];
    let prompts: Vec<_> =
        (0..).zip(shapes).map(|(seed, (length, hit))| (tokens(seed, length), hit)).collect();
    let node = Node::start(&data, &[]).await?;
    let mut cold = Vec::new();
    for (prompt, _) in &prompts {
        cold.push(node.ask(question(prompt)).await?);
        node.parked(prompt).await?;
    }
    node.kill()?;

    let node = Node::start(&data, &[]).await?;
    let mut compared = 0;
    for ((prompt, hit), cold) in prompts.iter().zip(&cold) {
        let warm = node.ask(question(prompt)).await?;
        check_account(cold, prompt);
        check_account(&warm, prompt);
        assert_eq!(cold.usage.prompt_cache_hit_tokens, 0);
        assert_eq!(warm.usage.prompt_cache_hit_tokens, *hit as u64, "a prompt of {}", prompt.len());
        assert_eq!(warm.tokens, cold.tokens, "a prompt of {}", prompt.len());
        compared += warm.tokens.len();
    }
    assert!(compared > 0, "the model wrote nothing to compare");
    node.kill()
}

#[tokio::test]
async fn another_ending_and_a_sampled_answer() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let document = tokens(7, 900);
    node.ask(question(&document)).await?;
    node.parked(&document).await?;
    for seed in 1..=3 {
        let prompt = [&document[..], &tokens(100 + seed, 30)].concat();
        let request = Request { temperature: 0.9, top_p: 0.95, seed, ..question(&prompt) };
        let warm = node.ask(request.clone()).await?;
        check_account(&warm, &prompt);
        assert_eq!(warm.usage.prompt_cache_hit_tokens, 900, "up to the last token of the document");
        assert_eq!(warm.tokens, from_nothing(request).await?.tokens, "seed {seed}");
    }
    node.kill()
}

#[tokio::test]
async fn a_damaged_store_gives_fewer_hits_and_the_same_answer() -> Result<()> {
    let folder = scratch();
    let data = folder.path().join("data");
    let prompt = tokens(11, 8 * BLOCK + 5);
    let node = Node::start(&data, &[]).await?;
    let cold = node.ask(question(&prompt)).await?;
    node.parked(&prompt).await?;
    node.kill()?;

    // From the fifth block on, then from the first: one byte near the middle of each block's last plane.
    for (damaged_from, hit) in [(5, 4 * BLOCK), (1, 0)] {
        let boundary = (damaged_from * BLOCK) as u64;
        let mut damaged = 0;
        for record in records(&data)?.iter().filter(|r| r.kind == ObjectKind::Block && r.tokens >= boundary) {
            let plane = record.planes.last().expect("a block has planes");
            change(&record.file, plane.start.midpoint(plane.end) - damaged_from as u64, |byte| byte ^ 0x10)?;
            damaged += 1;
        }
        assert!(damaged >= 9 - damaged_from, "only {damaged} records");
        let node = Node::start(&data, &[]).await?;
        let mut hits = Vec::new();
        while hits.len() < 10 && hits.last() != Some(&(8 * BLOCK as u64)) {
            let answer = node.ask(question(&prompt)).await?;
            check_account(&answer, &prompt);
            assert_eq!(answer.tokens, cold.tokens);
            hits.push(answer.usage.prompt_cache_hit_tokens);
            node.settled(&prompt).await?;
        }
        assert_eq!(hits[0], hit as u64);
        assert!(hits.is_sorted() && hits.last() == Some(&(8 * BLOCK as u64)), "it does not heal: {hits:?}");
        node.kill()?;
    }
    Ok(())
}

#[tokio::test]
async fn together_as_alone() -> Result<()> {
    let folder = scratch();
    let node = Node::start(&folder.path().join("data"), &[]).await?;
    let document = tokens(13, 700);
    let prompts: Vec<_> =
        (0..4).map(|i| [&document[..300 + 100 * i], &tokens(200 + i as u64, 40)].concat()).collect();
    let ask = |prompt: &Vec<TokenId>| node.ask(Request { max_new_tokens: 24, ..question(prompt) });
    for _ in 0..2 {
        let together = tokio::join!(ask(&prompts[0]), ask(&prompts[1]), ask(&prompts[2]), ask(&prompts[3]));
        let together = [together.0?, together.1?, together.2?, together.3?];
        for (prompt, answer) in prompts.iter().zip(&together) {
            check_account(answer, prompt);
            let alone = from_nothing(Request { max_new_tokens: 24, ..question(prompt) }).await?;
            assert_eq!(answer.tokens, alone.tokens, "a prompt of {}", prompt.len());
        }
        node.settled(&document[..600]).await?;
    }
    node.kill()
}

#[tokio::test]
async fn new_weights_under_the_same_name_get_misses() -> Result<()> {
    let folder = scratch();
    let (data, model) = (folder.path().join("data"), folder.path().join("model"));
    let bundled = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/decoder/model");
    copy_folder(&bundled, &model)?;
    let options = ["--model", model.to_str().expect("a UTF-8 path")];
    let prompt = tokens(17, 300);
    let node = Node::start(&data, &options).await?;
    node.ask(question(&prompt)).await?;
    node.parked(&prompt).await?;
    assert_eq!(node.ask(question(&prompt)).await?.usage.prompt_cache_hit_tokens, 256);
    node.stop().await?;

    let weights = model.join("model.safetensors");
    let middle = weights.metadata()?.len() / 2;
    change(&weights, middle, |byte| byte ^ 1)?;
    let node = Node::start(&data, &options).await?;
    assert_eq!(node.ask(question(&prompt)).await?.usage.prompt_cache_hit_tokens, 0);
    node.kill()
}
