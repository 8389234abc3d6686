//! Calls of tools in what a model wrote: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, a form that many open
//! models are trained on. What is not of that form stays text.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::conversation::Function;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(default)]
    arguments: Value,
}

impl Written {
    /// With arguments by name, as all tools take them: none where none were written, and those that were written as a text. `None`
    /// if they are something else.
    fn function(self) -> Option<Function> {
        let arguments = match self.arguments {
            Value::Null => Value::Object(Map::new()),
            Value::String(text) => serde_json::from_str(&text).ok()?,
            other => other,
        };
        arguments.is_object().then_some(Function { name: self.name, arguments })
    }
}

/// The text before the first call, and the calls.
pub(crate) fn split(text: &str) -> (&str, Vec<Function>) {
    let Some((before, _)) = text.split_once(OPEN) else { return (text, Vec::new()) };
    let mut calls = Vec::new();
    let mut rest = &text[before.len()..];
    while let Some((_, inner)) = rest.split_once(OPEN) {
        let Some((inner, after)) = inner.split_once(CLOSE) else { break };
        let written = serde_json::from_str::<Written>(inner.trim());
        let Some(function) = written.ok().and_then(Written::function) else { break };
        calls.push(function);
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
        let none = [
            "no call",
            "<tool_call>{\"name\": 3}</tool_call>",
            "<tool_call>{\"name\": \"f\"",
            "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
            "<tool_call>{\"name\": \"f\", \"arguments\": \"x\"}</tool_call>",
            "",
        ];
        for text in none {
            assert_eq!(split(text), (text, vec![]));
        }
        for (written, arguments) in [
            ("{\"name\": \"f\"}", json!({})),
            ("{\"name\": \"f\", \"arguments\": null}", json!({})),
            ("{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}", json!({"x": 1})),
        ] {
            let call = Function { name: "f".into(), arguments };
            assert_eq!(split(&format!("<tool_call>{written}</tool_call>")), ("", vec![call]));
        }
    }
}
