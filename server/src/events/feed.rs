//! The events of one tenant under one numbering, which goes on when the tenant is erased and begins a new scope.

use std::sync::{Arc, Mutex, PoisonError};

use esker_prefix::ScopeTag;
use tokio::sync::watch;

use super::{Events, Logged};

/// Erasures that the numbering remembers. Who was not here since is told of a gap, and drops its view all the same.
const MAX_SPANS: usize = 16;

/// What followers of a tenant read.
pub(super) struct Feed {
    events: Arc<Events>,
    /// The tenant's scope of this moment.
    scope: Box<dyn Fn() -> Option<ScopeTag> + Send + Sync>,
    /// Of the scopes that it has had, oldest first; never empty.
    spans: Mutex<Vec<Span>>,
}

/// A scope, whose event 0 has this number.
#[derive(Clone, Copy)]
struct Span {
    base: u64,
    scope: ScopeTag,
}

impl Feed {
    pub(super) fn new(
        events: Arc<Events>,
        scope: impl Fn() -> Option<ScopeTag> + Send + Sync + 'static,
    ) -> Option<Self> {
        let first = Span { base: 0, scope: scope()? };
        Some(Self { events, scope: Box::new(scope), spans: Mutex::new(vec![first]) })
    }

    /// Resolves whenever anything happened, to this tenant or another.
    pub(super) fn grew(&self) -> watch::Receiver<()> {
        self.events.grew()
    }

    /// Number of the next event.
    pub(super) fn next(&self) -> u64 {
        self.spans().last().map_or(0, |span| span.base + self.events.next(span.scope))
    }

    /// At most `limit` events from number `from` on, or from the oldest that is kept, with the number of the first.
    pub(super) fn read(&self, from: u64, limit: usize) -> (u64, Vec<Logged>) {
        let spans = self.spans();
        let at = spans.partition_point(|span| span.base <= from).saturating_sub(1);
        // A span that is over may have nothing left; what follows it has the next number.
        for (number, span) in spans.iter().enumerate().skip(at) {
            let end = spans.get(number + 1).map_or(u64::MAX, |next| next.base);
            let room = usize::try_from(end.saturating_sub(from)).unwrap_or(usize::MAX);
            let (first, mut events) =
                self.events.logged(span.scope, from.saturating_sub(span.base), limit.min(room));
            let first = span.base + first;
            // What still went on in a scope after it was cleared has no number.
            events.truncate(usize::try_from(end.saturating_sub(first)).unwrap_or(usize::MAX));
            if !events.is_empty() || end == u64::MAX {
                return (first, events);
            }
        }
        (from, Vec::new())
    }

    /// The spans, with a new one where the last scope was erased.
    fn spans(&self) -> Vec<Span> {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&last) = spans.last()
            && let Some(length) = self.events.ended(last.scope)
            && let Some(scope) = (self.scope)()
            && scope != last.scope
        {
            spans.push(Span { base: last.base + length, scope });
            if spans.len() > MAX_SPANS {
                spans.remove(0);
            }
        }
        spans.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::MAX_SCOPE_EVENTS;
    use crate::events::tests::change;
    use esker_proto::v1::kv_event::Event;
    use esker_store::Observer;
    use std::sync::atomic::{AtomicU8, Ordering};

    fn tag(scope: u8) -> ScopeTag {
        ScopeTag([scope; 16])
    }

    #[test]
    fn numbers_go_on_when_a_tenant_is_erased() {
        let events = Arc::new(Events::default());
        let scope = Arc::new(AtomicU8::new(1));
        let asked = Arc::clone(&scope);
        let feed = Feed::new(Arc::clone(&events), move || Some(tag(asked.load(Ordering::Relaxed)))).unwrap();
        assert_eq!((feed.next(), feed.read(0, 9).0), (0, 0));
        events.changed(vec![change(1, 1, None), change(2, 2, None), change(1, 3, None)]);
        assert_eq!((feed.next(), feed.read(0, 9).1.len(), feed.read(1, 9).1.len()), (2, 2, 1));
        // The tenant has a new scope, but the old one is not cleared yet: its end is still to come.
        scope.store(3, Ordering::Relaxed);
        events.changed(vec![change(3, 4, None)]);
        assert_eq!(feed.next(), 2);
        events.cleared(&[tag(1)]);
        assert_eq!(feed.next(), 4);
        // Of no interest any more.
        events.changed(vec![change(1, 5, None)]);
        let mut numbers = Vec::new();
        let mut from = 0;
        loop {
            let (first, read) = feed.read(from, 2);
            if read.is_empty() {
                break;
            }
            numbers.extend((first..).zip(read.into_iter().map(|logged| logged.event)));
            from = numbers.last().unwrap().0 + 1;
        }
        // Of what is erased nothing is told any more.
        assert_eq!(numbers.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [2, 3]);
        assert!(matches!(numbers[0].1, Event::AllBlocksCleared(_)));
        assert!(matches!(numbers[1].1, Event::BlockStored(_)));
    }

    #[test]
    fn what_the_log_let_go_is_a_gap() {
        let events = Arc::new(Events::default());
        let feed = Feed::new(Arc::clone(&events), || Some(tag(1))).unwrap();
        let count = MAX_SCOPE_EVENTS as u64 + 7;
        events.changed((0..count).map(|number| change(1, number, None)).collect());
        let (first, read) = feed.read(3, 2);
        assert_eq!((first, read.len()), (7, 2));
        assert_eq!(feed.read(count, 2).0, count);
    }
}
