//! Stop sequences: texts at which a generation ends, without giving them out.

/// Watches text go by and holds back what may yet turn out to be the beginning of a stop sequence.
pub(super) struct StopText {
    sequences: Vec<String>,
    held: String,
}

impl StopText {
    /// None of the sequences is empty.
    pub(super) fn new(sequences: Vec<String>) -> Self {
        Self { sequences, held: String::new() }
    }

    /// Takes text; gives what of it may be shown, and the sequence that ends it, if one does.
    pub(super) fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if self.sequences.is_empty() {
            return (piece.to_owned(), None);
        }
        self.held.push_str(piece);
        let found = self.sequences.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        // The earliest; of two at one place, the longer.
        if let Some((at, stop)) = found.min_by_key(|(at, stop)| (*at, usize::MAX - stop.len())) {
            let stop = stop.clone();
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let begun = self.sequences.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let shown = self.held.len() - begun;
        (self.held.drain(..shown).collect(), None)
    }

    /// What was held back and is no stop sequence after all.
    pub(super) fn finish(self) -> String {
        self.held
    }
}

/// Bytes at the end of `text` that `stop` begins with.
fn begun(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&bytes| text.as_bytes().ends_with(&stop.as_bytes()[..bytes])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], text: &str, piece_bytes: usize) -> (String, Option<String>) {
        let mut stop = StopText::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = String::new();
        let mut rest = text;
        while !rest.is_empty() {
            let mut cut = piece_bytes.min(rest.len());
            while !rest.is_char_boundary(cut) {
                cut += 1;
            }
            let (now, later) = rest.split_at(cut);
            rest = later;
            let (more, found) = stop.push(now);
            shown.push_str(&more);
            if found.is_some() {
                return (shown, found);
            }
        }
        (shown + &stop.finish(), None)
    }

    #[test]
    fn text_ends_before_the_first_stop_however_it_is_cut() {
        let text = "an ox – and an oxen, and – end";
        for piece_bytes in 1..=text.len() {
            assert_eq!(run(&[], text, piece_bytes), (text.into(), None));
            assert_eq!(run(&["never", "– end!"], text, piece_bytes), (text.into(), None), "{piece_bytes}");
            let (shown, stop) = run(&["oxen", "– end"], text, piece_bytes);
            assert_eq!((shown.as_str(), stop.as_deref()), ("an ox – and an ", Some("oxen")), "{piece_bytes}");
            let (shown, stop) = run(&["– e", "– end"], text, text.len());
            assert_eq!((shown.as_str(), stop.as_deref()), ("an ox – and an oxen, and ", Some("– end")));
        }
        // A false start, and the sequence begins within it.
        assert_eq!(run(&["aab"], "aaab", 1), ("a".into(), Some("aab".into())));
    }
}
