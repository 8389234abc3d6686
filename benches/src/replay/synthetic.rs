//! Made-up traces: one habit of traffic each, so that a policy is not judged by two recordings alone.
//!
//! All are made from a seed and come out the same everywhere but for the rounding of logarithms. Blocks have 64 tokens.

use super::trace::{Trace, TraceBuilder};

/// Tokens of a block.
const BLOCK_TOKENS: u32 = 64;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Chats of a few turns with minutes between them, most over after one; system prompts shared by a Zipf law.
    Chats,
    /// Agents: many turns, seconds apart with pauses, subagents that never return.
    Agents,
    /// Independent prompts drawn from a fixed set of documents by a Zipf law.
    Documents,
    /// The same documents read round and round, twice as many as fit into 10 %.
    Loop,
    /// A hot set, and a stream of prompts that never come back.
    Scan,
    /// Batch jobs: each long document asked a handful of questions in a row, then never again.
    Batches,
    /// Chats, then a loop, then documents, then agents: what was learned stops being true.
    Phases,
}

impl Traffic {
    /// Every kind.
    pub const ALL: [Self; 7] =
        [Self::Chats, Self::Agents, Self::Documents, Self::Loop, Self::Scan, Self::Batches, Self::Phases];

    /// A trace of this kind: some tens of thousands of distinct blocks.
    pub fn trace(self, seed: u64) -> Trace {
        let mut made = Made { random: Random(seed), prompts: Vec::new(), ids: 0 };
        match self {
            Self::Chats => made.chats(0.0, 6_000),
            Self::Agents => made.agents(0.0, 120),
            Self::Documents => made.documents(0.0, 6_000, 2_000),
            Self::Loop => made.rounds(0.0, 200, 20),
            Self::Scan => made.scan(0.0, 8_000),
            Self::Batches => made.batches(0.0, 1_500),
            Self::Phases => {
                made.chats(0.0, 2_500);
                made.rounds(30_000.0, 120, 12);
                made.documents(60_000.0, 3_000, 800);
                made.agents(90_000.0, 50);
            }
        }
        made.finish()
    }
}

/// SplitMix64: a few lines, and good enough for traffic.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// At least 0, below 1.
    #[expect(clippy::cast_precision_loss, reason = "32 random bits are exact in a double")]
    fn unit(&mut self) -> f64 {
        (self.next() >> 32) as f64 / f64::from(u32::MAX)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Seconds with this mean, most of them shorter: exponential.
    fn wait(&mut self, mean_s: f64) -> f64 {
        -mean_s * (1.0 - self.unit() * 0.999_999).ln()
    }

    /// Seconds around this median, some far longer: log-normal with a spread of a factor of 3.
    fn think(&mut self, median_s: f64) -> f64 {
        let normal = (0..12).map(|_| self.unit()).sum::<f64>() - 6.0;
        median_s * (normal * 1.1).exp()
    }

    /// Below `bound`, small values far more often: Zipf with exponent 1.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below the bound")]
    #[expect(clippy::cast_precision_loss, reason = "bounds are small")]
    fn zipf(&mut self, bound: u64) -> u64 {
        (((bound as f64 + 1.0).powf(self.unit()) - 1.0) as u64).min(bound - 1)
    }
}

/// Prompts in the making.
struct Made {
    random: Random,
    prompts: Vec<(f64, Vec<u64>)>,
    ids: u64,
}

impl Made {
    /// So many ids that nothing else has.
    fn fresh(&mut self, count: u64) -> Vec<u64> {
        self.ids += count;
        (self.ids - count..self.ids).collect()
    }

    fn ask(&mut self, at_s: f64, path: &[u64]) {
        self.prompts.push((at_s, path.to_vec()));
    }

    fn chats(&mut self, from_s: f64, chats: u32) {
        let systems: Vec<Vec<u64>> = (0..40).map(|i| self.fresh(2 + i % 10)).collect();
        let mut start_s = from_s;
        for _ in 0..chats {
            start_s += self.random.wait(4.0);
            let mut path = systems[usize::try_from(self.random.zipf(40)).unwrap_or(0)].clone();
            let mut at_s = start_s;
            loop {
                let said = 2 + self.random.below(8);
                path.extend(self.fresh(said));
                self.ask(at_s, &path);
                if self.random.unit() < 0.6 {
                    break;
                }
                at_s += self.random.think(60.0);
            }
        }
    }

    fn agents(&mut self, from_s: f64, agents: u32) {
        let tools = self.fresh(60);
        let mut start_s = from_s;
        for _ in 0..agents {
            start_s += self.random.wait(120.0);
            let mut path = tools.clone();
            path.extend(self.fresh(40));
            let mut at_s = start_s;
            for _ in 0..10 + self.random.below(60) {
                let read = 1 + self.random.below(12);
                path.extend(self.fresh(read));
                self.ask(at_s, &path);
                if self.random.unit() < 0.05 {
                    let mut subagent = tools[..30].to_vec();
                    subagent.extend(self.fresh(30));
                    for turn in 0..5 {
                        subagent.extend(self.fresh(4));
                        self.ask(at_s + f64::from(turn) * 6.0, &subagent);
                    }
                }
                at_s +=
                    if self.random.unit() < 0.1 { self.random.think(240.0) } else { self.random.wait(8.0) };
            }
        }
    }

    fn documents(&mut self, from_s: f64, requests: u32, documents: u64) {
        let texts: Vec<Vec<u64>> = (0..documents).map(|i| self.fresh(4 + i * 7 % 30)).collect();
        let mut at_s = from_s;
        for _ in 0..requests {
            at_s += self.random.wait(3.0);
            let mut path = texts[usize::try_from(self.random.zipf(documents)).unwrap_or(0)].clone();
            path.extend(self.fresh(1));
            self.ask(at_s, &path);
        }
    }

    fn rounds(&mut self, from_s: f64, documents: u64, rounds: u32) {
        let texts: Vec<Vec<u64>> = (0..documents).map(|_| self.fresh(40)).collect();
        let mut at_s = from_s;
        for _ in 0..rounds {
            for text in &texts {
                at_s += 5.0;
                self.ask(at_s, text);
            }
        }
    }

    fn scan(&mut self, from_s: f64, requests: u32) {
        let hot: Vec<Vec<u64>> = (0..60).map(|_| self.fresh(20)).collect();
        let mut at_s = from_s;
        for _ in 0..requests {
            at_s += self.random.wait(2.0);
            let path = if self.random.unit() < 0.3 {
                hot[usize::try_from(self.random.zipf(60)).unwrap_or(0)].clone()
            } else {
                self.fresh(10)
            };
            self.ask(at_s, &path);
        }
    }

    fn batches(&mut self, from_s: f64, batches: u32) {
        let mut start_s = from_s;
        for _ in 0..batches {
            start_s += self.random.wait(30.0);
            let document = self.fresh(30);
            let mut at_s = start_s;
            for _ in 0..1 + self.random.below(6) {
                let mut path = document.clone();
                path.extend(self.fresh(2));
                self.ask(at_s, &path);
                at_s += self.random.wait(20.0);
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "days, in seconds")]
    fn finish(mut self) -> Trace {
        self.prompts.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut builder = TraceBuilder::default();
        for (at_s, ids) in self.prompts {
            let blocks = u32::try_from(ids.len()).expect("made up, and short");
            let tokens = blocks * BLOCK_TOKENS;
            builder.push(at_s as u32, BLOCK_TOKENS, tokens, ids.into_iter()).expect("made up in order");
        }
        builder.finish().expect("every kind of traffic has requests")
    }
}
