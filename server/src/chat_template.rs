//! From a conversation to the text that the model continues, the same text for the same conversation every time.
//!
//! Where the model's `tokenizer_config.json` has a chat template, that is rendered, as transformers renders it: Jinja with
//! `trim_blocks` and `lstrip_blocks`, `tojson` in Python's spacing, `raise_exception`. `strftime_now` is not defined: a prompt
//! that tells the date is another prompt tomorrow, and templates that use it have a fixed date for when it is missing.
//!
//! Otherwise the plain template: each message as its label, its content verbatim and an empty line, and in the end the
//! assistant's label. Tools come first, one definition a line:
//!
//! ```text
//! System:
//! You answer briefly.
//!
//! User:
//! Who said so?
//!
//! Assistant:
//! ```
//!
//! The text comes in parts, cut where assistants speak, because what they say is not always spelled in the tokens that the
//! tokenizer would choose for it (replay.rs).

pub(crate) mod conversation;
pub(crate) mod tool_call;

use anyhow::Context;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use conversation::{Conversation, Role};

const NAME: &str = "chat";
/// Instructions of one rendering, and bytes of what it writes. A long conversation takes thousands; a template that never ends is
/// refused within seconds.
const FUEL: u64 = 20_000_000;
const MAX_BYTES: usize = esker_proto::MAX_TEXT_BYTES;
/// Widest indent of `tojson`.
const MAX_INDENT: usize = 64;
/// Where the plain template's model would go on to speak for the user.
const PLAIN_STOP: &str = "\n\nUser:\n";
/// Between these stands the number of an assistant's message while its template is taken apart. From a private use area.
const MARK: [char; 2] = ['\u{F8F0}', '\u{F8F1}'];

/// See the module.
#[derive(Default)]
pub(crate) struct ChatTemplate(Option<Jinja>);

struct Jinja {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Written by the template, users and tools.
    Text(String),
    /// Said by the assistant.
    Said(String),
}

impl Part {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Text(text) | Self::Said(text) => text,
        }
    }
}

/// The template refuses this conversation; it says why.
#[derive(Debug, thiserror::Error)]
#[error("the chat template does not take this conversation: {0}")]
pub(crate) struct Refused(String);

/// What of `tokenizer_config.json` matters here.
#[derive(Deserialize)]
struct Config {
    chat_template: Option<Templates>,
    bos_token: Option<Special>,
    eos_token: Option<Special>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Many(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Token { content: String },
}

impl ChatTemplate {
    /// From the text of `tokenizer_config.json`; `template` stands in a file of its own in newer model folders.
    pub(crate) fn new(config: &str, template: Option<String>) -> anyhow::Result<Self> {
        let config: Config =
            serde_json::from_str(config).context("tokenizer_config.json is not understood")?;
        let named = match config.chat_template {
            None => None,
            Some(Templates::One(text)) => Some(text),
            Some(Templates::Many(all)) => {
                all.into_iter().find(|one| one.name == "default").map(|one| one.template)
            }
        };
        let Some(text) = template.or(named) else { return Ok(Self(None)) };
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_template_owned(NAME, text).context("the chat template is not usable")?;
        let special = |token: Option<Special>| match token {
            Some(Special::Text(content) | Special::Token { content }) => content,
            None => String::new(),
        };
        let (bos_token, eos_token) = (special(config.bos_token), special(config.eos_token));
        Ok(Self(Some(Jinja { environment, bos_token, eos_token })))
    }

    /// Texts at which the assistant's turn is over, besides what the caller names.
    pub(crate) fn stops(&self) -> Vec<String> {
        if self.0.is_some() { Vec::new() } else { vec![PLAIN_STOP.into()] }
    }

    /// The prompt of a conversation.
    pub(crate) fn render(&self, conversation: &Conversation) -> Result<Vec<Part>, Refused> {
        match &self.0 {
            None => Ok(plain(conversation)),
            Some(jinja) => jinja.render(conversation),
        }
    }
}

fn plain(conversation: &Conversation) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut text = String::new();
    if !conversation.tools.is_empty() {
        text += "Tools, each called by <tool_call>{\"name\": ..., \"arguments\": {...}}</tool_call>:\n";
        for tool in &conversation.tools {
            text += &tool.to_string();
            text.push('\n');
        }
        text.push('\n');
    }
    for message in &conversation.messages {
        text += label(message.role);
        if message.role == Role::Assistant {
            let mut said = message.content.clone();
            said.extend(message.tool_calls.iter().map(|call| tool_call::spell(&call.function)));
            if !said.is_empty() {
                parts.extend([Part::Text(std::mem::take(&mut text)), Part::Said(said)]);
            }
        } else {
            text += &message.content;
        }
        text += "\n\n";
    }
    text += label(Role::Assistant);
    parts.push(Part::Text(text));
    parts
}

fn label(role: Role) -> &'static str {
    match role {
        Role::System => "System:\n",
        Role::User => "User:\n",
        Role::Assistant => "Assistant:\n",
        Role::Tool => "Tool:\n",
    }
}

impl Jinja {
    fn render(&self, conversation: &Conversation) -> Result<Vec<Part>, Refused> {
        let whole = self.text(conversation)?;
        // A template may look into what an assistant said, or cut it: parts only where they come to the same text.
        Ok(self.parts(conversation, &whole).unwrap_or_else(|| vec![Part::Text(whole)]))
    }

    fn parts(&self, conversation: &Conversation, whole: &str) -> Option<Vec<Part>> {
        let mut marked = conversation.clone();
        let mut said = Vec::new();
        for message in &mut marked.messages {
            if message.role == Role::Assistant && !message.content.is_empty() {
                let mark = format!("{}{}{}", MARK[0], said.len(), MARK[1]);
                said.push(std::mem::replace(&mut message.content, mark));
            }
        }
        let text = self.text(&marked).ok()?;
        let parts = |as_written: fn(&str) -> &str| {
            let mut parts = Vec::new();
            let mut rest = text.as_str();
            for (number, said) in said.iter().enumerate() {
                let (before, after) = rest.split_once(&format!("{}{number}{}", MARK[0], MARK[1]))?;
                parts.extend([Part::Text(before.into()), Part::Said(as_written(said).into())]);
                rest = after;
            }
            parts.push(Part::Text(rest.into()));
            Some(parts).filter(|parts| joined(parts) == whole)
        };
        parts(|said| said).or_else(|| parts(str::trim))
    }

    fn text(&self, conversation: &Conversation) -> Result<String, Refused> {
        #[derive(Serialize)]
        struct Given<'a> {
            messages: &'a [conversation::Message],
            #[serde(skip_serializing_if = "Option::is_none")]
            tools: Option<&'a [serde_json::Value]>,
            add_generation_prompt: bool,
            bos_token: &'a str,
            eos_token: &'a str,
        }
        let given = Given {
            messages: &conversation.messages,
            tools: Some(conversation.tools.as_slice()).filter(|tools| !tools.is_empty()),
            add_generation_prompt: true,
            bos_token: &self.bos_token,
            eos_token: &self.eos_token,
        };
        let refused = |error: minijinja::Error| {
            Refused(match error.kind() {
                ErrorKind::WriteFailure => format!("it writes more than {MAX_BYTES} bytes"),
                ErrorKind::OutOfFuel => format!("it takes more than {FUEL} steps"),
                _ => error.detail().unwrap_or("it fails").to_owned(),
            })
        };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let mut written = Bounded(Vec::new());
        template.render_captured_to(given, &mut written).map_err(refused)?;
        String::from_utf8(written.0).map_err(|_| Refused("what it writes is no text".into()))
    }
}

/// Takes [`MAX_BYTES`] at most.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// For fuzzing: the length of a `tokenizer_config.json` (u16, little-endian), it, and the body of a request for an answer. Whether
/// the template is usable.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn hear(bytes: &[u8]) -> bool {
    let Some((len, rest)) = bytes.split_first_chunk() else { return false };
    let Some((config, body)) = rest.split_at_checked(u16::from_le_bytes(*len).into()) else { return false };
    let template = std::str::from_utf8(config).ok().and_then(|text| ChatTemplate::new(text, None).ok());
    let Some(template) = template else { return false };
    for conversation in crate::http::hear(body).0 {
        let Ok(parts) = template.render(&conversation) else { continue };
        assert!(template.0.is_none() || joined(&parts).len() <= MAX_BYTES, "longer than any text");
    }
    true
}

fn joined(parts: &[Part]) -> String {
    parts.iter().map(Part::as_str).collect()
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let failed = |error| minijinja::Error::new(ErrorKind::BadSerialization, "not JSON").with_source(error);
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|indent| indent > MAX_INDENT) {
        let wide = format!("an indent of tojson is at most {MAX_INDENT}");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, wide));
    }
    // Others, such as ensure_ascii=False, say what is done anyway.
    let json: serde_json::Value = serde_json::to_value(&value).map_err(failed)?;
    let text = match indent {
        None => {
            let mut text = String::new();
            python_json(&json, &mut text);
            text
        }
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let mut bytes = Vec::new();
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
                .map_err(failed)?;
            String::from_utf8_lossy(&bytes).into_owned()
        }
    };
    Ok(Value::from_safe_string(text))
}

/// With ", " and ": " between things.
fn python_json(value: &serde_json::Value, text: &mut String) {
    match value {
        serde_json::Value::Array(items) => {
            text.push('[');
            for (at, item) in items.iter().enumerate() {
                text.push_str(if at > 0 { ", " } else { "" });
                python_json(item, text);
            }
            text.push(']');
        }
        serde_json::Value::Object(fields) => {
            text.push('{');
            for (at, (name, value)) in fields.iter().enumerate() {
                text.push_str(if at > 0 { ", " } else { "" });
                text.push_str(&serde_json::Value::from(name.as_str()).to_string());
                text.push_str(": ");
                python_json(value, text);
            }
            text.push('}');
        }
        other => text.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::conversation::{Message, ToolCall};
    use super::*;

    fn conversation(turns: &[(Role, &str)]) -> Conversation {
        let messages = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        Conversation { messages, tools: Vec::new() }
    }

    fn jinja(template: &str) -> ChatTemplate {
        let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}});
        ChatTemplate::new(&config.to_string(), None).unwrap()
    }

    const TURNS: [(Role, &str); 4] = [
        (Role::System, "Be brief."),
        (Role::User, "Who?"),
        (Role::Assistant, " She. "),
        (Role::User, "When?"),
    ];

    #[test]
    fn a_longer_conversation_begins_with_the_shorter_and_its_answer() {
        let chatml = "{{ bos_token }}{% for message in messages %}\n<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n\
                      {% endfor %}\n{% if add_generation_prompt %}\n<|assistant|>{% endif %}";
        for template in [ChatTemplate::default(), jinja(chatml)] {
            let first = template.render(&conversation(&TURNS[..2])).unwrap();
            let second = template.render(&conversation(&TURNS)).unwrap();
            let (first, whole) = (joined(&first), joined(&second));
            assert!(whole.starts_with(&format!("{first} She. ")), "{first:?} {whole:?}");
            assert_eq!(second[0], Part::Text(first));
            assert_eq!(second[1], Part::Said(" She. ".into()));
        }
        assert_eq!(
            joined(&ChatTemplate::default().render(&conversation(&TURNS[..2])).unwrap()),
            "System:\nBe brief.\n\nUser:\nWho?\n\nAssistant:\n"
        );
    }

    #[test]
    fn a_template_that_takes_too_much_is_refused() {
        let long = "{% for a in range(100000) %}{{ messages[0].content * 100 }}{% endfor %}";
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        let wide = "{{ messages | tojson(indent=18446744073709551615) }}";
        let wider = "{{ messages | tojson(indent=65) }}";
        for (template, why) in [(long, "bytes"), (endless, "steps"), (wide, ""), (wider, "indent")] {
            let refused = jinja(template).render(&conversation(&TURNS)).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn a_template_that_rewrites_what_was_said_still_decides_the_text() {
        let trims = jinja("{% for m in messages %}[{{ m.content.strip() }}]{% endfor %}");
        let parts = trims.render(&conversation(&TURNS)).unwrap();
        assert_eq!(joined(&parts), "[Be brief.][Who?][She.][When?]");
        assert!(parts.contains(&Part::Said("She.".into())));
        let looks = jinja(
            "{% for m in messages %}[{% if 'She' in m.content %}*{% endif %}{{ m.content }}]{% endfor %}",
        );
        let parts = looks.render(&conversation(&TURNS)).unwrap();
        assert_eq!(parts, [Part::Text("[Be brief.][Who?][* She. ][When?]".into())]);
    }

    #[test]
    fn python_spacing_tools_and_refusals() {
        let template = jinja(
            "{% if tools %}{{ tools | tojson }}{% endif %}{% if messages[0].role != 'user' %}\
             {{ raise_exception('begin with a user') }}{% endif %}{{ messages[0].content }}",
        );
        let mut asked = conversation(&TURNS[1..2]);
        asked.tools = vec![json!({"type": "function", "function": {"name": "f<é>"}})];
        let text = joined(&template.render(&asked).unwrap());
        assert_eq!(text, "[{\"function\": {\"name\": \"f<é>\"}, \"type\": \"function\"}]Who?");
        let refused = template.render(&conversation(&TURNS)).unwrap_err().to_string();
        assert!(refused.contains("begin with a user"), "{refused}");
        assert!(ChatTemplate::new("{\"chat_template\": \"{% if %}\"}", None).is_err());
    }

    #[test]
    fn the_plain_template_spells_tool_calls() {
        let mut message = Message::new(Role::Assistant, "Let me see.");
        message.tool_calls.push(ToolCall::new("call_1".into(), "f".into(), json!({"x": 1})));
        let asked = Conversation { messages: vec![message], tools: vec![json!({"name": "f"})] };
        let text = joined(&ChatTemplate::default().render(&asked).unwrap());
        assert!(
            text.contains("Let me see.<tool_call>{\"name\": \"f\", \"arguments\": {\"x\":1}}</tool_call>"),
            "{text}"
        );
        assert!(text.starts_with("Tools"));
    }
}
