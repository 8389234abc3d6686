//! What happened on this node lately, in memory and bounded: prompts and how they were answered, by steps of time, for the last
//! hour and the last seven days; and damage as it was found. For people and graphs; what is billed stands in the ledger.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use esker_store::{MissKind, StoreStats};

/// Step and length of what is kept of the last hour, and of the last seven days.
const FINE: (u64, usize) = (30, 120);
const COARSE: (u64, usize) = (1800, 336);
/// Findings remembered.
const MAX_FINDINGS: usize = 100;
/// Bounds of the times kept, four to an octave from a quarter of a millisecond: the last reaches beyond four minutes.
const TIMES: usize = 80;

/// See the module.
pub(crate) struct History {
    started_ms: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    fine: Steps,
    coarse: Steps,
    all: Step,
    findings: VecDeque<Finding>,
    seen: Option<StoreStats>,
}

/// What happened in one step of time, or in several.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    pub(crate) requests: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) hit_tokens: u64,
    /// Times to the first token, of prompts of which at least half came from the cache, and of the others.
    pub(crate) warm: Times,
    pub(crate) cold: Times,
}

/// Times in buckets.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times(Vec<u32>);

/// Something that was found damaged.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) at_ms: u64,
    pub(crate) text: String,
}

/// Steps of equal length, the newest last.
struct Steps {
    step_s: u64,
    most: usize,
    /// Number of the newest step.
    newest: u64,
    steps: VecDeque<Step>,
}

impl Default for History {
    fn default() -> Self {
        let steps = |(step_s, most)| Steps { step_s, most, newest: 0, steps: VecDeque::new() };
        let inner = Inner {
            fine: steps(FINE),
            coarse: steps(COARSE),
            all: Step::default(),
            findings: VecDeque::new(),
            seen: None,
        };
        Self { started_ms: unix_ms(), inner: Mutex::new(inner) }
    }
}

impl History {
    /// When the node started.
    pub(crate) fn started_ms(&self) -> u64 {
        self.started_ms
    }

    /// A prompt was computed: how many of its tokens came from the cache, and how long its first token took, where known.
    pub(crate) fn prompt(&self, prompt_tokens: u64, hit_tokens: u64, first_token: Option<Duration>) {
        let mut inner = self.inner();
        let now_s = unix_ms() / 1000;
        let Inner { fine, coarse, all, .. } = &mut *inner;
        for step in [fine.at(now_s), coarse.at(now_s), all] {
            step.add(prompt_tokens, hit_tokens, first_token);
        }
    }

    /// Looks at the store's counts; damage since the last look is a finding.
    pub(crate) fn look(&self, stats: StoreStats) {
        let mut inner = self.inner();
        let Some(before) = inner.seen.replace(stats) else { return };
        let at_ms = unix_ms();
        let mut find = |count: u64, text: String| {
            if count > 0 {
                inner.findings.push_back(Finding { at_ms, text });
                if inner.findings.len() > MAX_FINDINGS {
                    inner.findings.pop_front();
                }
            }
        };
        for kind in MissKind::ALL.into_iter().filter(|kind| kind.is_damage()) {
            let more = stats.misses.get(kind).saturating_sub(before.misses.get(kind));
            find(more, format!("{more} stored object(s) answered as misses: {}", words(kind)));
        }
        let scrubbed = stats.scrub_bad.saturating_sub(before.scrub_bad);
        find(scrubbed, format!("{scrubbed} damaged record(s) found by the background check"));
        let trips = stats.breaker_trips.saturating_sub(before.breaker_trips);
        find(trips, "reads failed so often that reading was stopped for a while".into());
        let suspect = stats.suspect_segments.saturating_sub(before.suspect_segments);
        find(suspect, format!("{suspect} segment(s) given up after a failed write"));
        let mismatch = stats.content_mismatch.saturating_sub(before.content_mismatch);
        find(mismatch, format!("{mismatch} put(s) of other bytes under a known name refused"));
    }

    /// Everything since the start, and the last hour.
    pub(crate) fn totals(&self) -> (Step, Step) {
        let mut inner = self.inner();
        let now_s = unix_ms() / 1000;
        inner.fine.at(now_s);
        let mut hour = Step::default();
        inner.fine.steps.iter().for_each(|step| hour.merge(step));
        (inner.all.clone(), hour)
    }

    /// Steps with the time at which each begins, the oldest first; of the last hour, or of seven days.
    pub(crate) fn steps(&self, week: bool) -> (u64, Vec<(u64, Step)>) {
        let mut inner = self.inner();
        let now_s = unix_ms() / 1000;
        let steps = if week { &mut inner.coarse } else { &mut inner.fine };
        steps.at(now_s);
        let first = steps.newest + 1 - steps.steps.len() as u64;
        let numbered =
            (first..).zip(&steps.steps).map(|(number, step)| (number * steps.step_s * 1000, step.clone()));
        (steps.step_s, numbered.collect())
    }

    /// The newest findings first.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        self.inner().findings.iter().rev().cloned().collect()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Steps {
    /// The step of this time, which becomes the newest; a clock that goes back counts into the newest.
    fn at(&mut self, now_s: u64) -> &mut Step {
        let number = now_s / self.step_s;
        if self.steps.is_empty() || number > self.newest {
            let missed = if self.steps.is_empty() { 1 } else { number - self.newest };
            for _ in 0..missed.min(self.most as u64) {
                self.steps.push_back(Step::default());
            }
            while self.steps.len() > self.most {
                self.steps.pop_front();
            }
            self.newest = number;
        }
        self.steps.back_mut().expect("one was pushed")
    }
}

impl Step {
    fn add(&mut self, prompt_tokens: u64, hit_tokens: u64, first_token: Option<Duration>) {
        self.requests += 1;
        self.prompt_tokens += prompt_tokens;
        self.hit_tokens += hit_tokens;
        if let Some(time) = first_token {
            let warm = hit_tokens * 2 >= prompt_tokens;
            if warm { self.warm.add(time) } else { self.cold.add(time) }
        }
    }

    fn merge(&mut self, more: &Self) {
        self.requests += more.requests;
        self.prompt_tokens += more.prompt_tokens;
        self.hit_tokens += more.hit_tokens;
        self.warm.merge(&more.warm);
        self.cold.merge(&more.cold);
    }
}

impl Times {
    fn add(&mut self, time: Duration) {
        self.0.resize(TIMES, 0);
        self.0[bucket(time)] += 1;
    }

    fn merge(&mut self, more: &Self) {
        if !more.0.is_empty() {
            self.0.resize(TIMES, 0);
            self.0.iter_mut().zip(&more.0).for_each(|(count, more)| *count += more);
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|&count| u64::from(count)).sum()
    }

    /// The time that this share of all stayed below, in milliseconds, within a tenth; none where there are none.
    pub(crate) fn quantile_ms(&self, share: f64) -> Option<f64> {
        let all = self.count();
        let mut below = 0;
        for (at, &count) in self.0.iter().enumerate() {
            below += u64::from(count);
            if all > 0 && below as f64 >= share * all as f64 {
                return Some(middle_ms(at));
            }
        }
        None
    }
}

fn bucket(time: Duration) -> usize {
    let quarters = (time.as_secs_f64() * 4000.0).max(1.0).log2() * 4.0;
    // At most 256 with any Duration, and not negative.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let at = quarters as usize;
    at.min(TIMES - 1)
}

fn middle_ms(bucket: usize) -> f64 {
    ((bucket as f64 + 0.5) / 4.0).exp2() / 4.0
}

/// What an operator makes of it.
fn words(kind: MissKind) -> &'static str {
    match kind {
        MissKind::ReadError => "the drive failed to read them",
        MissKind::Truncated => "their file is shorter than it was",
        MissKind::HeaderChecksum => "their header is damaged",
        MissKind::WrongRecord => "another record was in their place",
        MissKind::PlaneChecksum | MissKind::Digest => "their bytes are damaged",
        MissKind::Decode => "their bytes do not decompress",
        MissKind::Absent | MissKind::Deadline | MissKind::Unavailable | MissKind::NoKey => "not damaged",
    }
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_go_by_and_are_bounded() {
        let mut steps = Steps { step_s: 10, most: 4, newest: 0, steps: VecDeque::new() };
        for (now_s, length) in [(1000, 1), (1009, 1), (1010, 2), (1005, 2), (1035, 4), (9000, 4)] {
            steps.at(now_s).requests += 1;
            assert_eq!(steps.steps.len(), length, "{now_s}");
        }
        let counts: Vec<u64> = steps.steps.iter().map(|step| step.requests).collect();
        assert_eq!(counts, [0, 0, 0, 1]);
    }

    #[test]
    fn quantiles_are_near() {
        let mut times = Times::default();
        assert_eq!(times.quantile_ms(0.5), None);
        for ms in 1..=1000 {
            times.add(Duration::from_millis(ms));
        }
        for (share, ms) in [(0.5, 500.0), (0.95, 950.0), (0.01, 10.0)] {
            let got = times.quantile_ms(share).unwrap();
            assert!((got / ms - 1.0).abs() < 0.15, "{share}: {got}");
        }
        times.add(Duration::from_secs(100_000));
        times.add(Duration::ZERO);
        assert_eq!(times.count(), 1002);
    }

    #[test]
    fn a_prompt_is_counted_in_every_span_and_damage_is_found_once() {
        let history = History::default();
        history.prompt(1000, 900, Some(Duration::from_millis(20)));
        history.prompt(1000, 0, Some(Duration::from_millis(400)));
        history.prompt(1000, 0, None);
        let (all, hour) = history.totals();
        for step in [all, hour, history.steps(true).1.pop().unwrap().1] {
            assert_eq!((step.requests, step.prompt_tokens, step.hit_tokens), (3, 3000, 900));
            assert_eq!((step.warm.count(), step.cold.count()), (1, 1));
        }
        let mut stats = StoreStats::default();
        history.look(stats);
        assert!(history.findings().is_empty());
        stats.scrub_bad = 2;
        history.look(stats);
        history.look(stats);
        let findings = history.findings();
        assert_eq!(findings.len(), 1);
        assert!(findings[0].text.starts_with("2 damaged record"));
    }
}
