//! The three shapes in which APIs report what a cache did for a prompt, all from one account. With `P` tokens of the prompt, `H`
//! of them hit and `W` of the rest newly written:
//!
//! | shape | whose | fields |
//! |---|---|---|
//! | split | DeepSeek | hit `H`, miss `P - H`; their sum is `P` |
//! | subset | OpenAI, Gemini, OpenTelemetry | prompt `P`; cached `H` and written `W` lie within it |
//! | additive | Anthropic | read `H`, created `W`, input `P - H - W`; their sum is `P` |

use esker_proto::v1;

use crate::ledger::sums::written;

/// One account. Made by [`PromptAccount::new`], which keeps `hit + written <= prompt`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PromptAccount {
    prompt_tokens: u64,
    hit_tokens: u64,
    writes: v1::WriteTokens,
}

/// DeepSeek's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) prompt_cache_hit_tokens: u64,
    pub(crate) prompt_cache_miss_tokens: u64,
    /// Not part of the public shape; carried so that nothing is lost.
    pub(crate) writes: v1::WriteTokens,
}

/// OpenAI's, with OpenTelemetry's `cache_creation`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Subset {
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) cache_creation: v1::WriteTokens,
}

/// Anthropic's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Additive {
    pub(crate) input_tokens: u64,
    pub(crate) cache_read_input_tokens: u64,
    pub(crate) cache_creation: v1::WriteTokens,
}

impl PromptAccount {
    /// `None` if more is hit and written than the prompt has.
    pub(crate) fn new(prompt_tokens: u64, hit_tokens: u64, writes: v1::WriteTokens) -> Option<Self> {
        let left = prompt_tokens.checked_sub(hit_tokens)?;
        (written(&writes) <= left).then_some(Self { prompt_tokens, hit_tokens, writes })
    }

    pub(crate) fn of(record: &v1::UsageRecord) -> Option<Self> {
        Self::new(record.prompt_tokens, record.hit_tokens, record.write_tokens.unwrap_or_default())
    }

    pub(crate) fn split(&self) -> Split {
        Split {
            prompt_cache_hit_tokens: self.hit_tokens,
            prompt_cache_miss_tokens: self.prompt_tokens - self.hit_tokens,
            writes: self.writes,
        }
    }

    pub(crate) fn subset(&self) -> Subset {
        Subset {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.hit_tokens,
            cache_creation: self.writes,
        }
    }

    pub(crate) fn additive(&self) -> Additive {
        Additive {
            input_tokens: self.prompt_tokens - self.hit_tokens - written(&self.writes),
            cache_read_input_tokens: self.hit_tokens,
            cache_creation: self.writes,
        }
    }

    /// All three, as a reply carries them.
    pub(crate) fn wire(&self) -> v1::CacheUsage {
        let (split, subset, additive) = (self.split(), self.subset(), self.additive());
        v1::CacheUsage {
            prompt_tokens: subset.prompt_tokens,
            prompt_cache_hit_tokens: split.prompt_cache_hit_tokens,
            prompt_cache_miss_tokens: split.prompt_cache_miss_tokens,
            cached_tokens: subset.cached_tokens,
            cache_creation_tokens: written(&subset.cache_creation),
            input_tokens: additive.input_tokens,
            cache_read_input_tokens: additive.cache_read_input_tokens,
            cache_creation_input_tokens: written(&additive.cache_creation),
            cache_creation: Some(additive.cache_creation),
        }
    }
}

/// The way back: here to prove that nothing is lost on the way there.
#[cfg(test)]
impl Split {
    pub(crate) fn account(&self) -> Option<PromptAccount> {
        let prompt = self.prompt_cache_hit_tokens.checked_add(self.prompt_cache_miss_tokens)?;
        PromptAccount::new(prompt, self.prompt_cache_hit_tokens, self.writes)
    }
}

#[cfg(test)]
impl Subset {
    pub(crate) fn account(&self) -> Option<PromptAccount> {
        PromptAccount::new(self.prompt_tokens, self.cached_tokens, self.cache_creation)
    }
}

#[cfg(test)]
impl Additive {
    pub(crate) fn account(&self) -> Option<PromptAccount> {
        let read_and_input = self.input_tokens.checked_add(self.cache_read_input_tokens)?;
        let prompt = read_and_input.checked_add(written(&self.cache_creation))?;
        PromptAccount::new(prompt, self.cache_read_input_tokens, self.cache_creation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(ttl_5m: u64, ttl_1h: u64, ttl_24h: u64, ttl_72h: u64, lease: u64) -> v1::WriteTokens {
        v1::WriteTokens { ttl_5m, ttl_1h, ttl_24h, ttl_72h, lease }
    }

    #[test]
    fn golden_shapes() {
        let account = PromptAccount::new(4096, 3072, writes(0, 512, 256, 0, 0)).unwrap();
        let (split, subset, additive) = (account.split(), account.subset(), account.additive());
        assert_eq!((split.prompt_cache_hit_tokens, split.prompt_cache_miss_tokens), (3072, 1024));
        assert_eq!((subset.prompt_tokens, subset.cached_tokens), (4096, 3072));
        assert_eq!((additive.input_tokens, additive.cache_read_input_tokens), (256, 3072));
        assert_eq!(written(&additive.cache_creation), 768);
        let wire = account.wire();
        assert_eq!(wire.prompt_cache_hit_tokens + wire.prompt_cache_miss_tokens, wire.prompt_tokens);
        assert_eq!(
            wire.input_tokens + wire.cache_read_input_tokens + wire.cache_creation_input_tokens,
            wire.prompt_tokens
        );
        assert!(wire.cached_tokens + wire.cache_creation_tokens <= wire.prompt_tokens);
    }

    #[test]
    fn every_shape_converts_into_every_other_without_loss() {
        let mut checked = 0;
        for prompt in [1, 2, 127, 128, 4096, 1 << 20] {
            for hit in [0, 1, 128, prompt / 2, prompt - 1] {
                for part in [0, 1, 100, prompt / 4] {
                    let writes = writes(part, part / 2, 0, part / 3, 1);
                    let Some(account) = PromptAccount::new(prompt, hit, writes) else { continue };
                    checked += 1;
                    assert_eq!(account.split().account().as_ref(), Some(&account));
                    assert_eq!(account.subset().account().as_ref(), Some(&account));
                    assert_eq!(account.additive().account().as_ref(), Some(&account));
                    let additive = account.split().account().unwrap().additive();
                    assert_eq!(additive.account().unwrap().subset(), account.subset());
                }
            }
        }
        assert!(checked > 50, "only {checked} accounts were possible");
    }

    #[test]
    fn what_does_not_add_up_is_no_account() {
        assert_eq!(PromptAccount::new(10, 11, writes(0, 0, 0, 0, 0)), None);
        assert_eq!(PromptAccount::new(10, 8, writes(1, 1, 1, 0, 0)), None);
        assert_eq!(PromptAccount::new(10, 8, writes(u64::MAX, 1, 1, 0, 0)), None);
        let split = Split {
            prompt_cache_hit_tokens: u64::MAX,
            prompt_cache_miss_tokens: 1,
            writes: writes(0, 0, 0, 0, 0),
        };
        assert_eq!(split.account(), None);
    }
}
