//! Refusals, summed: what a caller is refused again and again is two lines a minute, however often it asks, so that nobody fills
//! the drive by being refused.
//!
//! In a minute the first of a kind (who was refused what, on what grounds) is a line at once; those that follow are counted, and
//! are one more line when the minute is over. Kinds are told apart up to a bound, and up to a lower one where nobody knows who
//! calls, so that strangers do not hide the others. What is beyond is in a line of `others`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Event;

const WINDOW: Duration = Duration::from_secs(60);
/// Told apart in a window.
const MAX_KINDS: usize = 100;
const MAX_STRANGERS: usize = 10;

/// See the module.
#[derive(Default)]
pub(super) struct Refusals {
    since: Option<Instant>,
    /// How many there were beyond those that are written down.
    kinds: BTreeMap<Event, u64>,
    strangers: usize,
}

/// What becomes of a refusal.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It is written down now.
    First,
    /// It is counted.
    Again,
    /// It is counted among others.
    Beyond,
}

impl Refusals {
    /// `over` comes before: nothing here is older than a window.
    pub(super) fn see(&mut self, event: &Event, now: Instant) -> Seen {
        self.since.get_or_insert(now);
        let count = event.count.unwrap_or(1);
        let kind = Event { count: None, ..event.clone() };
        if let Some(more) = self.kinds.get_mut(&kind) {
            *more += count;
            return Seen::Again;
        }
        let is_stranger = event.is_strangers();
        let room = match is_stranger {
            true => self.strangers < MAX_STRANGERS,
            false => self.kinds.len() - self.strangers < MAX_KINDS,
        };
        if !room {
            *self.kinds.entry(Event::others(&event.result)).or_default() += count;
            return Seen::Beyond;
        }
        self.strangers += usize::from(is_stranger);
        self.kinds.insert(kind, 0);
        Seen::First
    }

    /// What was counted, once the window is over.
    pub(super) fn over(&mut self, now: Instant) -> Vec<Event> {
        match self.since {
            Some(since) if now.duration_since(since) >= WINDOW => self.all(),
            _ => Vec::new(),
        }
    }

    /// What was counted so far; a new window begins.
    pub(super) fn all(&mut self) -> Vec<Event> {
        let counted = std::mem::take(self).kinds.into_iter().filter(|(_, more)| *more > 0);
        counted.map(|(kind, more)| kind.count(more)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(who: usize, result: &str) -> Event {
        Event { who: format!("tenant/{who}"), ..Event::others(result) }
    }

    #[test]
    fn a_kind_is_a_line_at_once_and_one_more_when_the_minute_is_over() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        assert!(refusals.over(start).is_empty());
        assert_eq!(refusals.see(&event(1, "denied"), start), Seen::First);
        assert_eq!(refusals.see(&event(2, "denied"), start), Seen::First);
        for _ in 0..999 {
            assert_eq!(refusals.see(&event(1, "denied"), start), Seen::Again);
        }
        assert_eq!(refusals.see(&event(1, "denied").count(5), start), Seen::Again);
        assert!(refusals.over(start + WINDOW / 2).is_empty());
        assert_eq!(refusals.over(start + WINDOW), [event(1, "denied").count(1004)]);
        assert_eq!(refusals.see(&event(1, "denied"), start + WINDOW), Seen::First);
        assert!(refusals.over(start + WINDOW + WINDOW / 2).is_empty(), "its minute began anew");
    }

    #[test]
    fn kinds_are_bounded_and_strangers_do_not_hide_the_others() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let mut lines = 0;
        for number in 0..5000 {
            let seen = refusals.see(&event(number, "unauthenticated"), start);
            assert_eq!(seen == Seen::First, number < MAX_STRANGERS);
            lines += usize::from(seen == Seen::First);
        }
        for number in 0..MAX_KINDS - 1 {
            assert_eq!(refusals.see(&event(number, "denied"), start), Seen::First, "{number}");
        }
        for number in MAX_KINDS..MAX_KINDS + 500 {
            refusals.see(&event(number, "denied"), start);
        }
        assert_eq!(refusals.see(&event(1, "denied"), start), Seen::Again);
        let told = refusals.over(start + WINDOW);
        let others = |result| told.iter().find(|event| event.who == "others" && event.result == result);
        assert_eq!(
            others("unauthenticated").and_then(|event| event.count),
            Some(5000 - MAX_STRANGERS as u64)
        );
        assert!(others("denied").is_some_and(|event| event.count >= Some(499)), "{told:?}");
        assert!(lines + told.len() < 2 * (MAX_KINDS + MAX_STRANGERS));
    }
}
