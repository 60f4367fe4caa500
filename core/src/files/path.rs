//! Paths in configs.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Newtype name that marks a path for the config deserializer (`node.rs`), which resolves it against the config file's
/// folder.
pub(crate) const PATH: &str = "dictlearn::ConfigPath";
/// Marks a value that is a path or a name. It is a path if it exists or starts with `/`, `~` or `.`.
pub(crate) const PATH_OR_NAME: &str = "dictlearn::PathOrName";

/// Reads a path's text from the newtype.
struct PathText;

impl<'de> de::Visitor<'de> for PathText {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a path")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<String, D::Error> {
        inner.deserialize_str(self)
    }
}

macro_rules! path_value {
    ($(#[$doc:meta])* $name:ident, $marker:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name(pub String);

        impl $name {
            /// Returns the value as a path.
            pub fn as_path(&self) -> &Path {
                Path::new(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<PathBuf> for $name {
            fn from(path: PathBuf) -> Self {
                $name(path.to_string_lossy().into_owned())
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                $name(text.to_owned())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_newtype_struct($marker, PathText).map($name)
            }
        }

        crate::inline_schema!($name, {"type": "string"});
    };
}

path_value! {
    /// A path in a config: relative to the config file's folder, absolute once the config is loaded.
    ConfigPath, PATH
}

path_value! {
    /// A path or a name (`embedded:austen`, `EleutherAI/pythia-70m`) in a config. Loading makes a path absolute.
    PathOrName, PATH_OR_NAME
}
