//! JSON Schemas of values with a custom form in a config.

/// Implements `JsonSchema` for a type from literal JSON. The schema is inlined wherever the type is used.
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
