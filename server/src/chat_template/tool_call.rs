//! Calls of tools in what a model wrote: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, a form that many open
//! models are trained on. What is not of that form stays text.

use serde::Deserialize;
use serde_json::Value;

use super::conversation::Function;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The text before the first call, and the calls.
pub(crate) fn split(text: &str) -> (&str, Vec<Function>) {
    #[derive(Deserialize)]
    struct Written {
        name: String,
        #[serde(default)]
        arguments: Value,
    }
    let Some((before, _)) = text.split_once(OPEN) else { return (text, Vec::new()) };
    let mut calls = Vec::new();
    let mut rest = &text[before.len()..];
    while let Some((_, inner)) = rest.split_once(OPEN) {
        let Some((inner, after)) = inner.split_once(CLOSE) else { break };
        let Ok(written) = serde_json::from_str::<Written>(inner.trim()) else { break };
        calls.push(Function { name: written.name, arguments: written.arguments });
        rest = after;
    }
    if calls.is_empty() { (text, calls) } else { (before, calls) }
}

/// A call that this node did not sample, or no longer remembers.
pub(crate) fn spell(call: &Function) -> String {
    format!(
        "{OPEN}{{\"name\": {}, \"arguments\": {}}}{CLOSE}",
        Value::from(call.name.as_str()),
        call.arguments
    )
}

/// For fuzzing: what a model wrote. Whether it calls a tool.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(text: &str) -> bool {
    let (before, calls) = split(text);
    assert!(text.starts_with(before) && (calls.is_empty() == (before.len() == text.len())));
    // What stands for the end of a call within one ends it.
    for call in
        calls.iter().filter(|call| !call.name.contains(CLOSE) && !call.arguments.to_string().contains(CLOSE))
    {
        let spelled = spell(call);
        let (before, again) = split(&spelled);
        assert!(before.is_empty() && again.len() == 1 && again[0].name == call.name, "{spelled}");
    }
    !calls.is_empty()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calls_are_found_and_what_is_none_stays_text() {
        let call = Function { name: "weather".into(), arguments: json!({"city": "Zürich"}) };
        let text = format!("I will look.\n{}\n{}", spell(&call), spell(&call));
        assert_eq!(split(&text), ("I will look.\n", vec![call.clone(), call]));
        for text in ["no call", "<tool_call>{\"name\": 3}</tool_call>", "<tool_call>{\"name\": \"f\"", ""] {
            assert_eq!(split(text), (text, vec![]));
        }
    }
}
