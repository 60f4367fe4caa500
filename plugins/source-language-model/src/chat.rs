//! Renders chats to text with the tokenizer's chat template, as transformers does.

mod python;

use std::fmt::Write;

use chrono::NaiveDate;
use dictlearn_core::lm::ModelFiles;
use dictlearn_core::prelude::*;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::Map;

const NAME: &str = "chat";
/// Maximum instructions that a template may run for one chat: enough for thousands of messages, and run in a fraction
/// of a second. This also bounds how deeply a template can nest lists, and the stack needed to free them.
const INSTRUCTIONS: u64 = 2_000_000;
/// Tokens of tokenizer_config.json that templates can refer to by name.
const SPECIAL: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Keys of a message's reasoning. Templates read the first; gpt-oss's template reads the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A tokenizer's template for chats (<https://huggingface.co/docs/transformers/chat_templating>).
///
/// It renders like `apply_chat_template(messages, tokenize=False)` of transformers 5: no tools, no documents, no
/// generation prompt. `strftime_now` formats the date that the source is built with.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
    /// True if the template uses today's date.
    is_dated: bool,
}

/// Returns the text of a special token, which is a string or an object with the string as `content`.
pub fn special_token<'a>(tokenizer_config: &'a Value, name: &str) -> Option<&'a str> {
    let token = tokenizer_config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str())
}

impl ChatTemplate {
    /// Reads the template of a model's tokenizer. Returns the reason if there is no usable one.
    pub fn read(
        files: &ModelFiles,
        tokenizer_config: &Value,
        today: NaiveDate,
    ) -> Result<std::result::Result<Self, String>> {
        let name = files.name();
        let template = match source(files, tokenizer_config)? {
            Ok(template) => template,
            Err(why) => return Ok(Err(why)),
        };
        let special = SPECIAL.iter().filter_map(|name| {
            special_token(tokenizer_config, name).map(|token| ((*name).to_owned(), Value::from(token)))
        });
        let template = Self::new(&template, special.collect(), today);
        Ok(template.map_err(|error| format!("the chat template of {name} cannot be used: {error:#}")))
    }

    fn new(template: &str, special: Map<String, Value>, today: NaiveDate) -> std::result::Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_fuel(Some(INSTRUCTIONS));
        python::extend(&mut environment);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        let mut template =
            ChatTemplate { environment, special, is_dated: template.contains("strftime_now") }.with_source(template)?;
        template.set_today(today);
        Ok(template)
    }

    fn with_source(mut self, template: &str) -> std::result::Result<Self, Error> {
        let template = template.replace("\r\n", "\n").replace('\r', "\n");
        self.environment.add_template_owned(NAME, without_generation(&template))?;
        Ok(self)
    }

    /// True if the text of chats depends on the date.
    pub fn is_dated(&self) -> bool {
        self.is_dated
    }

    /// Sets the date that `strftime_now` formats.
    pub fn set_today(&mut self, today: NaiveDate) {
        self.environment.add_function("strftime_now", move |format: &str| {
            let mut text = String::new();
            match write!(text, "{}", today.and_time(Default::default()).format(format)) {
                Ok(()) => Ok(text),
                Err(_) => {
                    let why = format!("strftime_now does not support the format `{format}`");
                    Err(Error::new(ErrorKind::InvalidOperation, why))
                }
            }
        });
    }

    /// Returns a chat's text, or why the template rejects it.
    pub fn render(&self, messages: &[Value]) -> std::result::Result<String, String> {
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let mut values = self.special.clone();
        // transformers passes these as None, so templates find them defined.
        values.insert("tools".to_owned(), Value::Null);
        values.insert("documents".to_owned(), Value::Null);
        values.insert("add_generation_prompt".to_owned(), false.into());
        values.insert("messages".to_owned(), messages.into());
        let values = minijinja::Value::from(Serde(values));
        let text = self.environment.get_template(NAME).and_then(|template| template.render(values));
        text.map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => format!("it does not finish within {INSTRUCTIONS} instructions"),
            _ => error.to_string(),
        })
    }
}

/// Returns the source of a model's template, or why there is none. Template files take precedence over
/// tokenizer_config.json.
fn source(files: &ModelFiles, tokenizer_config: &Value) -> Result<std::result::Result<String, String>> {
    for file in ["chat_template.jinja", "additional_chat_templates/default.jinja"] {
        if let Some(bytes) = files.read(file)? {
            let text = String::from_utf8(bytes.into_owned());
            return Ok(text.map_err(|_| format!("{file} of {} is not UTF-8", files.name())));
        }
    }
    let written = match tokenizer_config.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(several)) => {
            let default = several.iter().find(|template| template["name"] == "default");
            if default.is_none() && !several.is_empty() {
                let names: Vec<&str> = several.iter().filter_map(|template| template["name"].as_str()).collect();
                return Ok(Err(format!(
                    "the tokenizer of {} has several chat templates ({}) but no default; copy one of them into \
                     chat_template.jinja",
                    files.name(),
                    names.join(", ")
                )));
            }
            default.and_then(|template| template["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    };
    let written = match written {
        Some(template) => Some(template),
        // In multimodal models, the processor has the template.
        None => files
            .json("chat_template.json")?
            .and_then(|processor| processor["chat_template"].as_str().map(str::to_owned)),
    };
    Ok(written.ok_or_else(|| format!("the tokenizer of {} has no chat template", files.name())))
}

/// Returns a message as transformers passes it to a template: without nulls, and with its reasoning under the keys that
/// templates read.
fn message(message: &Value) -> Value {
    let Some(message) = message.as_object() else { return message.clone() };
    let there = || message.iter().filter(|(_, value)| !value.is_null());
    let reasoning = REASONING.iter().find_map(|name| message.get(*name).filter(|value| !value.is_null()));
    let thinking = reasoning.map(|reasoning| ("thinking".to_owned(), reasoning.clone()));
    let mut message: Map<String, Value> =
        thinking.into_iter().chain(there().map(|(name, value)| (name.clone(), value.clone()))).collect();
    if let Some(reasoning) = reasoning {
        message.insert(REASONING[0].to_owned(), reasoning.clone());
    }
    message.into()
}

/// Replaces `{% generation %}` blocks, which mark the assistant's text for transformers, with plain scopes.
fn without_generation(template: &str) -> String {
    let (mut out, mut rest) = (String::new(), template);
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, tag) = (&rest[..start], &rest[start..start + length + 2]);
        out.push_str(before);
        let trims = |c: char| "-+".contains(c) || c.is_whitespace();
        let inner = tag[2..tag.len() - 2].trim_matches(trims);
        match inner {
            "generation" => out.push_str(&tag.replace(inner, "with")),
            "endgeneration" => out.push_str(&tag.replace(inner, "endwith")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + tag.len()..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fixture(name: &str) -> String {
        let path = format!("{}/../../tests/fixtures/chat_templates/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Makes a template with the date of the fixtures.
    fn template(text: &str, special: &Value) -> std::result::Result<ChatTemplate, String> {
        let today = NaiveDate::from_ymd_opt(2026, 3, 9).unwrap();
        let template = ChatTemplate::new(text, special.as_object().unwrap().clone(), today);
        template.map_err(|error| error.to_string())
    }

    /// Checks that our rendering equals that of transformers, or that both are errors.
    fn compare(what: &str, ours: &std::result::Result<String, String>, theirs: &Value) {
        match (ours, theirs["text"].as_str()) {
            (Ok(ours), Some(theirs)) => assert_eq!(ours, theirs, "{what}"),
            (Err(_), None) => {}
            _ => panic!("{what}: {ours:?}, but in Python {theirs}"),
        }
    }

    #[test]
    fn published_templates_render_as_in_transformers() {
        let all: Value = serde_json::from_str(&fixture("rendered.json")).unwrap();
        let rendered = all["rendered"].as_object().unwrap();
        assert!(rendered.len() >= 30);
        for (name, chats) in rendered {
            let template = template(&fixture(&format!("{name}.jinja")), &all["special"]).unwrap();
            for (chat, theirs) in chats.as_object().unwrap() {
                let ours = template.render(all["chats"][chat].as_array().unwrap());
                compare(&format!("{name} of the chat `{chat}`"), &ours, theirs);
            }
        }
    }

    #[test]
    fn expressions_evaluate_as_in_python() {
        let all: Value = serde_json::from_str(&fixture("expressions.json")).unwrap();
        for (expression, theirs) in all["expressions"].as_object().unwrap() {
            let text = format!("{{%- set m = messages[0] -%}}{{{{ {expression} }}}}");
            let ours = template(&text, &json!({})).and_then(|it| it.render(&[all["value"].clone()]));
            compare(expression, &ours, theirs);
        }
    }

    #[test]
    fn generation_blocks_are_scopes() {
        let text = "{% set a = 1 %}\n{%- generation -%} {% set a = 2 %}{{ a }} {%- endgeneration %}{{ a }}{# {% x #}";
        assert_eq!(template(text, &json!({})).unwrap().render(&[]).unwrap(), "21");
        let error = template("{% generation %}", &json!({})).err().unwrap();
        assert!(error.contains("syntax error"), "{error}");
    }

    #[test]
    fn endless_templates_are_errors() {
        let forever = |text: &str| template(text, &json!({})).unwrap().render(&[]).unwrap_err();
        for text in [
            "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "{{ 'a'.ljust(9999999999) }}",
            "{{ [1]|tojson(indent=9999999999) }}",
            "{% set n = namespace(x=[]) %}{% for i in range(300) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
        ] {
            let error = forever(text);
            assert!(error.contains("does not finish within 2000000 instructions"), "{text}: {error}");
        }
        let error = forever("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
        assert!(error.contains("recursion limit"), "{error}");
    }

    #[test]
    fn deeply_nested_lists_fit_into_the_chat_stack() {
        let deep = "{% set n = namespace(x=[]) %}{% for a in range(100) %}{% for i in range(1000) %}\
                    {% set n.x = [n.x] %}{% endfor %}{% endfor %}{{ n.x|tojson }}";
        let render = || template(deep, &json!({})).unwrap().render(&[]).unwrap_err();
        let thread = std::thread::Builder::new().stack_size(crate::ahead::CHAT_STACK).spawn(render).unwrap();
        let error = thread.join().unwrap();
        assert!(error.contains("nested too deeply"), "{error}");
    }

    #[test]
    fn errors_of_templates_are_reported() {
        let error = template("{{ raise_exception('roles must alternate') }}", &json!({})).unwrap().render(&[]);
        assert!(error.unwrap_err().contains("roles must alternate"));
        let error = template("{{ strftime_now('%Q') }}", &json!({})).unwrap().render(&[]).unwrap_err();
        assert!(error.contains("strftime_now does not support the format `%Q`"), "{error}");
        let error = template("{{ [1]|tojson(indnt=2) }}", &json!({})).unwrap().render(&[]).unwrap_err();
        assert!(error.contains("indnt"), "{error}");
    }
}
