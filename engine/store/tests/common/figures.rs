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

/// Prints figures, and writes them to `$ESKER_FIGURES/NAME.json` if that folder is named.
pub fn report(name: &str, figures: &[(&str, u64)]) {
    let seed = LAST_SEED.get().map(|seed| ("seed", seed));
    let fields: Vec<String> =
        figures.iter().chain(&seed).map(|(field, value)| format!("\"{field}\": {value}")).collect();
    let json = format!("{{{}}}", fields.join(", "));
    println!("{name}: {json}");
    if let Some(dir) = std::env::var_os("ESKER_FIGURES") {
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(std::path::Path::new(&dir).join(format!("{name}.json")), json + "\n").unwrap();
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
