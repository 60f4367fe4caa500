//! Chats as the text that a model was trained on: the tokenizer's template.

use dictlearn_core::lm::ModelFiles;
use dictlearn_core::prelude::*;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{context, Environment, ErrorKind};

const NAME: &str = "chat";
/// How many of its instructions a template may run for a chat: so many take 0.2 s.
const INSTRUCTIONS: u64 = 10_000_000;

/// A tokenizer's template for chats (<https://huggingface.co/docs/transformers/chat_templating>), run as Hugging Face's
/// library runs it, except that there is no function that gives today's date: templates that ask for it have a date of
/// their own for that case, and the text stays the same every day.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template of a model's tokenizer, or why there is none.
    pub fn read(files: &ModelFiles, tokenizer_config: &Value) -> Result<std::result::Result<Self, String>> {
        let file = files.read("chat_template.jinja")?;
        let file = file.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let written = match tokenizer_config.get("chat_template") {
            Some(Value::String(template)) => Some(template.clone()),
            // Several, by name.
            Some(Value::Array(several)) => {
                let default = several.iter().find(|template| template["name"] == "default").or(several.first());
                default.and_then(|template| template["template"].as_str()).map(str::to_owned)
            }
            _ => None,
        };
        // A special token is a string, or an object with the string as `content`.
        let token = |name: &str| {
            let token = tokenizer_config.get(name);
            let token = token.and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
            token.unwrap_or_default().to_owned()
        };
        Ok(match file.or(written) {
            None => Err(format!("the tokenizer of {} has no chat template", files.name())),
            Some(template) => Self::new(template, token("bos_token"), token("eos_token"))
                .map_err(|error| format!("the chat template of {} cannot be used: {error:#}", files.name())),
        })
    }

    fn new(template: String, bos: String, eos: String) -> std::result::Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_fuel(Some(INSTRUCTIONS));
        // Templates call Python's methods of strings and dictionaries.
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, template)?;
        Ok(ChatTemplate { environment, bos, eos })
    }

    /// A chat's text, or why the template refuses it.
    pub fn render(&self, messages: &[Value]) -> std::result::Result<String, String> {
        let template = self.environment.get_template(NAME).map_err(|error| error.to_string())?;
        let values = context! {
            messages => minijinja::Value::from(Serde(messages)), bos_token => &self.bos, eos_token => &self.eos, add_generation_prompt => false,
        };
        template.render(values).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Of the kind that instruct models have: checks, Python's methods, loop variables.
    const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
{{ '<|' + message['role'] + '|>' }}
{{ message['content'].strip() }}{{ eos_token if not loop.last }}
{% endfor %}";

    #[test]
    fn a_chat_is_put_into_the_models_form() {
        let template = ChatTemplate::new(TEMPLATE.to_owned(), "<s>".to_owned(), "</s>".to_owned()).unwrap();
        let chat = [json!({"role": "user", "content": " Hi "}), json!({"role": "assistant", "content": "Hello."})];
        // What Jinja2 makes of it: a newline after a block goes, one after a value stays.
        assert_eq!(template.render(&chat).unwrap(), "<s><|user|>\nHi</s>\n<|assistant|>\nHello.\n");
        let error = template.render(&chat[1..]).unwrap_err();
        assert!(error.contains("roles must alternate"), "{error}");
    }

    #[test]
    fn a_template_that_does_not_end_is_left() {
        let forever = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(forever.to_owned(), String::new(), String::new()).unwrap();
        let error = template.render(&[]).unwrap_err();
        assert!(error.contains("fuel"), "{error}");
    }
}
