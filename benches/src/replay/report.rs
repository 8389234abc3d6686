//! Runs as a table for people.

use super::policy::Policy;
use super::run::Run;
use super::trace::Trace;

/// Runs of one trace, printed with what they mean in bytes.
pub struct Table<'a> {
    /// The trace.
    pub trace: &'a Trace,
    /// Its runs.
    pub runs: &'a [Run],
    /// Bytes that a token takes on the drive.
    pub bytes_per_token: u64,
}

impl std::fmt::Display for Table<'_> {
    #[expect(clippy::cast_precision_loss, reason = "ratios to print")]
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let block_bytes = self.bytes_per_token * u64::from(self.trace.block_tokens);
        writeln!(
            f,
            "{:>22}  {:<11} {:>9} {:>9} {:>12} {:>12} {:>10}",
            "room", "policy", "hits %", "vs leaf", "written", "evicted", "seconds"
        )?;
        for run in self.runs {
            let room = if run.policy == Policy::Infinite {
                "unlimited".to_owned()
            } else {
                let share = f64::from(run.capacity_blocks) / self.trace.blocks() as f64 * 100.0;
                let bytes = u64::from(run.capacity_blocks) * block_bytes;
                format!("{} ({share:.2} %)", human_bytes(bytes))
            };
            let same_room = |other: &&Run| {
                other.policy == Policy::LruLeaf && other.capacity_blocks == run.capacity_blocks
            };
            let leaf = self.runs.iter().find(same_room);
            let versus = leaf.map(|leaf| format!("{:+.2}", (run.hit_ratio() - leaf.hit_ratio()) * 100.0));
            writeln!(
                f,
                "{room:>22}  {:<11} {:>9.2} {:>9} {:>12} {:>12} {:>10.2}",
                run.policy.name(),
                run.hit_ratio() * 100.0,
                versus.unwrap_or_default(),
                human_bytes(run.written_blocks * block_bytes),
                run.evicted_blocks,
                run.wall_s,
            )?;
        }
        Ok(())
    }
}

/// Bytes in the largest binary unit that leaves at least one.
#[expect(clippy::cast_precision_loss, reason = "three digits to print")]
pub fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}
