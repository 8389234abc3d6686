//! What is learned of when an owner's blocks are used again.
//!
//! Each owner has a learner of its own, so that nothing another one writes or reads changes what its blocks are worth. Their
//! number is bounded: owners that come when there are [`LEARNERS_MAX`] share the last. What they learn together ranks the
//! blocks of each of them against its own all the same.

use super::class::Class;
use super::reuse::Reuse;
use super::sample::Sample;

/// Most learners. One takes 25 kB, and up to 400 kB more when its sample is full.
pub(super) const LEARNERS_MAX: u8 = 64;

/// Uses of sampled blocks between two appraisals: rare enough to cost little per use, often enough to follow the day.
const APPRAISE_USES: u32 = 1024;

/// Blocks unused for this many times the age at which blocks are evicted teach nothing that eviction could use.
const HORIZON_EVICTION_AGES: u32 = 16;

/// The least horizon, seconds, for when nothing was evicted yet.
const HORIZON_S_MIN: u32 = 600;

/// See the module.
#[derive(Debug)]
pub(super) struct Learner {
    sample: Sample,
    reuse: Reuse,
    uses_since_appraisal: u32,
    /// Time from last use to eviction of recent victims, the longest of them.
    eviction_age_s: f32,
}

impl Learner {
    /// Nothing known.
    pub(super) fn new() -> Self {
        Self { sample: Sample::new(), reuse: Reuse::new(), uses_since_appraisal: 0, eviction_age_s: 0.0 }
    }

    /// A block was used and is of `class` from now on.
    pub(super) fn use_block(&mut self, print: u32, class: Class, now_s: u32) {
        let sampled = self.sample.use_block(print, class, now_s, &mut self.reuse);
        self.uses_since_appraisal += u32::from(sampled);
    }

    /// A block goes `age_s` after its last use.
    pub(super) fn evicts(&mut self, age_s: u32) {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let age_s = age_s as f32;
        // Decays by half in some 700 evictions.
        self.eviction_age_s = (self.eviction_age_s * 0.999).max(age_s);
    }

    /// Works out anew what blocks are worth, if it is time to. Tells whether it was.
    pub(super) fn appraise_in_time(&mut self, now_s: u32) -> bool {
        if self.uses_since_appraisal < APPRAISE_USES {
            return false;
        }
        self.uses_since_appraisal = 0;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made of u32 seconds")]
        let eviction_age_s = self.eviction_age_s as u32;
        let horizon_s = eviction_age_s.saturating_mul(HORIZON_EVICTION_AGES).max(HORIZON_S_MIN);
        self.sample.count_unused(now_s, horizon_s, &mut self.reuse);
        self.reuse.appraise();
        true
    }

    /// Expected uses per second and byte of keeping a block whose last use is `age_s` ago.
    pub(super) fn worth(&self, class: Class, grade: u8, age_s: u32) -> f32 {
        self.reuse.worth(class, age_s) / f32::from(1_u16 << grade)
    }
}
