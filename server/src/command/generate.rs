//! `esker generate`.

use std::time::Instant;

use esker_client::{Event, Prompt, Request};
use serde_json::json;

use super::{NodeArgs, TextArgs, client_runtime, is_taken};

/// Arguments of `esker generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    node: NodeArgs,
    /// Longest continuation, in tokens
    #[arg(long, short = 'n', default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Randomness; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Take only the likeliest tokens that make up this share of the probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the sampler
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Prints the continuation as it comes, then what it took.
pub fn run(args: Args) -> anyhow::Result<()> {
    client_runtime()?.block_on(stream(args))
}

async fn stream(args: Args) -> anyhow::Result<()> {
    let text = args.text.read()?;
    let client = args.node.connect().await?;
    let request = Request {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        ..Request::new(Prompt::Text(text))
    };
    let started = Instant::now();
    let mut events = client.generate(request).await?;
    let mut first = None;
    let mut written = String::new();
    while let Some(event) = events.next().await? {
        match event {
            Event::Progress(_) | Event::Prompt(_) => {}
            Event::Token(token) => {
                first.get_or_insert_with(|| started.elapsed());
                written.push_str(&token.text);
                // Nobody reads any more: nothing more needs to be computed.
                if !args.json && !is_taken(&token.text)? {
                    return Ok(());
                }
            }
            Event::Usage(usage) => {
                written.push_str(&usage.rest_of_text);
                let ttft_ms = first.unwrap_or_default().as_secs_f64() * 1e3;
                if args.json {
                    let usage = json!({
                        "prompt_tokens": usage.prompt_tokens,
                        "prompt_cache_hit_tokens": usage.prompt_cache_hit_tokens,
                        "prompt_cache_miss_tokens": usage.prompt_cache_miss_tokens,
                        "completion_tokens": usage.completion_tokens,
                        "bytes_read": usage.bytes_read,
                        "restore_us": usage.restore_us,
                        "prefill_us": usage.prefill_us,
                    });
                    say!("{}", json!({"text": written, "ttft_ms": ttft_ms, "usage": usage}));
                } else {
                    say!("{}", usage.rest_of_text);
                    note!(
                        "{} prompt tokens: {} from the cache ({} bytes read), {} computed; first token after {ttft_ms:.0} ms",
                        usage.prompt_tokens,
                        usage.prompt_cache_hit_tokens,
                        usage.bytes_read,
                        usage.prompt_cache_miss_tokens
                    );
                }
            }
        }
    }
    Ok(())
}
