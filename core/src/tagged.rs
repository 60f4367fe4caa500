//! Tagged traits: config traits as objects that YAML names by `type`, with a JSON Schema built from the registry.
//!
//! Authors implement the plain traits (`DictionaryConfig`). [`component`](macro@crate::component) implements the tagged
//! ones, which a config holds in boxes.

use std::cell::RefCell;

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use crate::registry::{ComponentKind, components};

/// Returns the schema of any component of a kind, distinguished by `type`.
pub(crate) fn one_of(kind: ComponentKind, generator: &mut SchemaGenerator) -> Schema {
    thread_local! {
        static OPEN: RefCell<Vec<ComponentKind>> = const { RefCell::new(Vec::new()) };
    }
    // A component may hold others of its kind; the generator then refers to the definition that is under way.
    if OPEN.with_borrow(|open| open.contains(&kind)) {
        return json_schema!({});
    }
    OPEN.with_borrow_mut(|open| open.push(kind));
    let schema = variants(kind, generator);
    OPEN.with_borrow_mut(|open| open.pop());
    schema
}

fn variants(kind: ComponentKind, generator: &mut SchemaGenerator) -> Schema {
    let mut variants = Vec::new();
    for component in components(kind) {
        let mut schema: Map<String, Value> = (component.schema)().to_value().as_object().cloned().unwrap_or_default();
        schema.remove("$schema");
        schema.remove("title");
        // `#/$defs/` refers to the config's definitions, so a component's move there.
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

/// Defines the tagged trait of a kind: its config trait as an object that YAML names by `type`, with the JSON Schema of
/// the registered components.
macro_rules! tagged {
    ($(#[$doc:meta])* $tagged:ident: $config:ident => $kind:ident { $($method:tt)* }) => {
        $(#[$doc])*
        #[typetag::serde(tag = "type")]
        pub trait $tagged: $config {
            #[doc(hidden)]
            fn boxed(&self) -> Box<dyn $tagged>;
            $($method)*
        }

        impl Clone for Box<dyn $tagged> {
            fn clone(&self) -> Self {
                self.boxed()
            }
        }

        impl schemars::JsonSchema for dyn $tagged {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $crate::registry::ComponentKind::$kind.name().into()
            }
            fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                $crate::tagged::one_of($crate::registry::ComponentKind::$kind, generator)
            }
        }
    };
}
pub(crate) use tagged;
