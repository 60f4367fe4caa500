//! JSON Schema of a config: the registry fills the slots that components go into.

use std::borrow::Cow;
use std::cell::RefCell;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use crate::registry::{Kind, components};

/// One of the components of a kind, told apart by `type`.
fn slot(kind: Kind, generator: &mut SchemaGenerator) -> Schema {
    thread_local! {
        static OPEN: RefCell<Vec<Kind>> = const { RefCell::new(Vec::new()) };
    }
    // A component may hold others of its kind. What stands here then is a reference to the definition that is being made.
    if OPEN.with_borrow(|open| open.contains(&kind)) {
        return json_schema!({});
    }
    OPEN.with_borrow_mut(|open| open.push(kind));
    let schema = variants(kind, generator);
    OPEN.with_borrow_mut(|open| open.pop());
    schema
}

fn variants(kind: Kind, generator: &mut SchemaGenerator) -> Schema {
    let mut variants = Vec::new();
    for component in components(kind) {
        let mut schema: Map<String, Value> = (component.schema)().to_value().as_object().cloned().unwrap_or_default();
        schema.remove("$schema");
        schema.remove("title");
        // A component's own definitions move to the config's, where `#/$defs/` finds them.
        if let Some(Value::Object(defs)) = schema.remove("$defs") {
            generator.definitions_mut().extend(defs);
        }
        let tag = json!({"const": component.name, "description": component.summary});
        let properties = schema.entry("properties").or_insert_with(|| json!({}));
        if let Some(properties) = properties.as_object_mut() {
            properties.insert("type".to_owned(), tag);
        }
        let required = schema.entry("required").or_insert_with(|| json!([]));
        if let Some(required) = required.as_array_mut() {
            required.insert(0, json!("type"));
        }
        schema.entry("description").or_insert_with(|| json!(component.summary));
        variants.push(Value::Object(schema));
    }
    json_schema!({"oneOf": variants})
}

macro_rules! slots {
    ($($config:path => $kind:ident),* $(,)?) => {$(
        impl JsonSchema for dyn $config {
            fn schema_name() -> Cow<'static, str> {
                Kind::$kind.name().into()
            }
            fn json_schema(generator: &mut SchemaGenerator) -> Schema {
                slot(Kind::$kind, generator)
            }
        }
    )*};
}

slots! {
    crate::component::TaggedDictionary => Dictionary,
    crate::component::TaggedTrainer => Trainer,
    crate::component::TaggedModifier => Modifier,
    crate::component::TaggedSource => Source,
    crate::component::TaggedText => Text,
    crate::component::TaggedMetric => Metric,
    crate::component::TaggedLogger => Logger,
}
