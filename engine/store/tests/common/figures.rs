//! What a harness has to report: seeds and sizes from the environment, figures to a file.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A number from the environment, or this one.
pub fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")),
        Err(_) => default,
    }
}

/// `$ESKER_SEED`, or another one each time; printed, so that a failure names it.
pub fn seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = number("ESKER_SEED", u64::from(now.subsec_nanos()) << 20 | now.as_secs() & 0xf_ffff);
    println!("ESKER_SEED={seed}");
    LAST_SEED.set(Some(seed));
    seed
}

thread_local! {
    /// Of this test, for its report.
    static LAST_SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Prints figures, and adds them to those in `$ESKER_FIGURES/NAME.json` if that folder is named: a long test is run in rounds,
/// each of which leaves the figures of all so far.
pub fn report(name: &str, figures: &[(&str, u64)]) {
    let seed = LAST_SEED.get().map(|seed| ("seed", seed));
    let figures: Vec<(&str, u64)> = figures.iter().copied().chain(seed).collect();
    println!("{name}: {}", to_json(&figures));
    if let Some(dir) = std::env::var_os("ESKER_FIGURES") {
        let path = std::path::Path::new(&dir).join(format!("{name}.json"));
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        let all: Vec<_> =
            figures.into_iter().map(|(field, value)| (field, add(&before, field, value))).collect();
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(path, to_json(&all) + "\n").unwrap();
    }
}

fn to_json(figures: &[(&str, u64)]) -> String {
    let fields: Vec<String> = figures.iter().map(|(field, value)| format!("\"{field}\": {value}")).collect();
    format!("{{{}}}", fields.join(", "))
}

/// A figure together with what `before`, which [`to_json`] has made, says of it: counts add up, of extremes and percentiles
/// the worst holds, of the others the last.
fn add(before: &str, field: &str, value: u64) -> u64 {
    let said = before.split_once(&format!("\"{field}\": ")).and_then(|(_, rest)| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..digits].parse::<u64>().ok()
    });
    match said {
        None => value,
        Some(_) if field == "seed" || field == "states_per_second" => value,
        Some(said) if field.ends_with("_max") || field.ends_with("_p50") || field.ends_with("_p99") => {
            said.max(value)
        }
        Some(said) => said + value,
    }
}

/// Ends the process if nobody calls [`Watchdog::progress`] for this long: a store that hangs is a failure, not a wait.
pub struct Watchdog {
    steps: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Watchdog {
    pub fn start(patience: Duration) -> Self {
        let (steps, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let watched = (Arc::clone(&steps), Arc::clone(&over));
        std::thread::spawn(move || {
            let (steps, over) = watched;
            let mut last = (steps.load(Ordering::Relaxed), Instant::now());
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                let now = steps.load(Ordering::Relaxed);
                if now != last.0 {
                    last = (now, Instant::now());
                } else if last.1.elapsed() > patience {
                    eprintln!("nothing has moved for {patience:?} after {now} steps: a hang");
                    std::process::abort();
                }
            }
        });
        Self { steps, over }
    }

    pub fn progress(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
