//! How soon blocks of a class are used again, and what keeping one is worth.
//!
//! For every class and age the life table counts how many blocks came to that age unused (`exposed`) and how many of them
//! were used at that age (`used`). From it follows the *worth* of a block of a given age: the most uses per second of
//! keeping it that any plan "keep it until age T" can expect. That is the Gittins index, which ranks jobs that may be
//! dropped at any time (Aalto, Ayesta, Righter: On the Gittins index in the M/G/1 queue, 2009); LHD (Beckmann, Chen,
//! Cidon, NSDI '18) ranks cached objects likewise by hits per space and time.
//!
//! Blocks of one prompt live and die together, so a thousand of them are one observation. Each class counts its prompts
//! beside its blocks, and is believed against the average of all classes by the number of prompts; that average likewise
//! against an assumption under which the worth falls with age alone: with nothing measured the order is LRU's.

use super::age::{self, AGES};
use super::class::{CLASSES, Class};

/// Prompts after which all classes together are believed as much as the assumption.
const PRIOR_PROMPTS: f32 = 16.0;

/// Prompts after which one class is believed as much as all together.
const POOL_PROMPTS: f32 = 8.0;

/// Prompts at which the counts of a class are halved: what was learned fades as traffic changes.
const PROMPTS_MAX: f32 = 4096.0;

/// Blocks at which they are halved at the latest: a float counts in steps of one up to 2^24.
const BLOCKS_MAX: f32 = 1_000_000.0;

/// Assumed share of blocks used in any age bucket. Buckets widen with age, so uses per second fall.
const PRIOR_SHARE: f32 = 0.05;

/// The life tables of all classes, and the worth that follows.
#[derive(Debug)]
pub(super) struct Reuse {
    classes: Vec<LifeTable>,
}

#[derive(Clone, Debug)]
struct LifeTable {
    used: [f32; AGES],
    exposed: [f32; AGES],
    prompts: f32,
    /// Time of the last use that was counted: uses in one second pass for one prompt.
    last_s: Option<u32>,
    worth: [f32; AGES],
}

impl Reuse {
    pub(super) fn new() -> Self {
        let (zero, worth) = ([0.0; AGES], worth(&[PRIOR_SHARE; AGES]));
        let table = LifeTable { used: zero, exposed: zero, prompts: 0.0, last_s: None, worth };
        Self { classes: vec![table; CLASSES] }
    }

    /// A block became one of `class`.
    pub(super) fn count_block(&mut self, class: Class, now_s: u32) {
        let table = &mut self.classes[usize::from(class.0)];
        if table.last_s != Some(now_s) {
            table.last_s = Some(now_s);
            table.prompts += 1.0;
        }
    }

    /// A block of `class` came through the ages `from..to` unused.
    pub(super) fn count_unused(&mut self, class: Class, from: usize, to: usize) {
        for exposed in &mut self.classes[usize::from(class.0)].exposed[from.min(to)..to] {
            *exposed += 1.0;
        }
    }

    /// A block of `class` was used at age `at`, after it was counted unused up to `from`.
    pub(super) fn count_used(&mut self, class: Class, from: usize, at: usize) {
        self.count_unused(class, from, at + 1);
        self.classes[usize::from(class.0)].used[at] += 1.0;
    }

    /// Works the worth out anew, and lets what was counted long ago fade.
    pub(super) fn appraise(&mut self) {
        let pool = self.pool();
        for table in &mut self.classes {
            let weight = POOL_PROMPTS * blocks_per_prompt(table.exposed[0], table.prompts);
            let mut shares = [0.0_f32; AGES];
            for (at, share) in shares.iter_mut().enumerate() {
                *share = (table.used[at] + weight * pool[at]) / (table.exposed[at] + weight);
            }
            table.worth = worth(&shares);
            if table.prompts > PROMPTS_MAX || table.exposed[0] > BLOCKS_MAX {
                table.halve();
            }
        }
    }

    /// Expected uses per second of keeping a block of `class` whose last use is `age_s` ago.
    pub(super) fn worth(&self, class: Class, age_s: u32) -> f32 {
        self.classes[usize::from(class.0)].worth[age::bucket(age_s)]
    }

    /// The share of blocks used at each age, all classes together.
    fn pool(&self) -> [f32; AGES] {
        let sum = |count: &dyn Fn(&LifeTable) -> f32| self.classes.iter().map(count).sum::<f32>();
        let weight =
            PRIOR_PROMPTS * blocks_per_prompt(sum(&|table| table.exposed[0]), sum(&|table| table.prompts));
        let mut pool = [0.0; AGES];
        for (at, share) in pool.iter_mut().enumerate() {
            let used = sum(&|table| table.used[at]);
            let exposed = sum(&|table| table.exposed[at]);
            *share = (used + weight * PRIOR_SHARE) / (exposed + weight);
        }
        pool
    }
}

impl LifeTable {
    fn halve(&mut self) {
        for count in self.used.iter_mut().chain(&mut self.exposed) {
            *count /= 2.0;
        }
        self.prompts /= 2.0;
    }
}

fn blocks_per_prompt(blocks: f32, prompts: f32) -> f32 {
    (blocks / prompts.max(1.0)).max(1.0)
}

/// The worth at every age, from the share of blocks used in each age bucket.
fn worth(shares: &[f32; AGES]) -> [f32; AGES] {
    let mut worth = [0.0; AGES];
    for (from, worth) in worth.iter_mut().enumerate() {
        let (mut left, mut uses, mut seconds) = (1.0_f32, 0.0_f32, 0.0_f32);
        for (at, share) in shares.iter().enumerate().skip(from) {
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            let width_s = age::width_s(at) as f32;
            uses += left * share;
            seconds += left * width_s * (1.0 - share / 2.0);
            left *= 1.0 - share;
            *worth = f32::max(*worth, uses / seconds);
        }
    }
    worth
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASS: Class = Class(3);

    #[test]
    fn with_nothing_measured_worth_falls_with_age() {
        let reuse = Reuse::new();
        for age_s in [5_u32, 60, 3_600, 86_400] {
            assert!(reuse.worth(CLASS, age_s) > reuse.worth(CLASS, age_s * 2 + 4), "at {age_s} s");
        }
    }

    #[test]
    fn a_block_due_soon_is_worth_more_than_a_new_one_and_one_overdue() {
        let mut reuse = Reuse::new();
        for prompt in 0..1000 {
            reuse.count_block(CLASS, prompt);
            reuse.count_used(CLASS, 0, age::bucket(100));
        }
        reuse.appraise();
        let worth = |age_s| reuse.worth(CLASS, age_s);
        assert!(worth(80) > worth(0) && worth(80) > worth(400), "{} {} {}", worth(0), worth(80), worth(400));
    }

    #[test]
    fn a_class_never_used_again_is_worth_less_than_one_that_is() {
        let mut reuse = Reuse::new();
        for prompt in 0..200 {
            reuse.count_block(CLASS, prompt);
            reuse.count_unused(CLASS, 0, AGES);
            reuse.count_block(Class(1), prompt);
            reuse.count_used(Class(1), 0, age::bucket(1000));
        }
        reuse.appraise();
        assert!(reuse.worth(CLASS, 0) < reuse.worth(Class(1), 0) / 10.0);
    }
}
