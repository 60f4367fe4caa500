//! JSON Schemas of values that a config writes in forms of their own.

/// Implements `JsonSchema` for a type by the JSON of its schema, which is written in place of the type's name.
#[macro_export]
macro_rules! inline_schema {
    ($of:ident, $($json:tt)+) => {
        impl $crate::schemars::JsonSchema for $of {
            fn schema_name() -> ::std::borrow::Cow<'static, str> {
                stringify!($of).into()
            }
            fn inline_schema() -> bool {
                true
            }
            fn json_schema(_: &mut $crate::schemars::SchemaGenerator) -> $crate::schemars::Schema {
                $crate::schemars::json_schema!($($json)+)
            }
        }
    };
}
