//! The merged config as a serde deserializer.
//!
//! A map yields its `type` first, so that typetag streams the other keys to the component. Buffering them would lose
//! key paths and integer widths. Values convert to the requested type: `1e4` and `10_000` to an integer, `1` and `1e-3`
//! (a string in YAML) to a float. Paths become absolute.

use std::path::{Path, PathBuf};

use figment::value::{Num, Tag, Value};
use serde::de::value::{Error, MapDeserializer, SeqDeserializer};
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::path::{PATH, PATH_OR_NAME};
use super::yaml;
use crate::error::InputError;

/// Finds the file that a value was written in: relative paths start from its folder.
pub trait Origins {
    /// Returns the folder of the file that contains the value with this tag.
    fn folder(&self, tag: Tag) -> PathBuf;
}

/// Resolves all paths against one folder.
impl Origins for &Path {
    fn folder(&self, _: Tag) -> PathBuf {
        self.to_path_buf()
    }
}

/// A config value, with the files that its parts were merged from.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    value: &'a Value,
    origins: &'a dyn Origins,
}

impl<'a> Node<'a> {
    /// Pairs a value with the files that its parts were written in.
    pub fn new(value: &'a Value, origins: &'a dyn Origins) -> Self {
        Node { value, origins }
    }

    fn child(self, value: &'a Value) -> Self {
        Node { value, ..self }
    }

    /// Expands `~/` and resolves the path against the folder of its config file.
    fn path(self, text: &str) -> PathBuf {
        let text = match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
            (Some(rest), Some(home)) => Path::new(&home).join(rest),
            _ => PathBuf::from(text),
        };
        let dir = self.origins.folder(self.value.tag());
        let joined = dir.join(text);
        normal(&std::path::absolute(&joined).unwrap_or(joined))
    }
}

/// Removes `.` and `..` from a path.
fn normal(path: &Path) -> PathBuf {
    use std::path::Component;
    path.components().fold(PathBuf::new(), |mut path, component| {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                path.pop();
            }
            other => path.push(other),
        }
        path
    })
}

/// Reads an integer in any form that a config may use: `10000`, `10_000` or `1e4`.
pub fn integer(value: &Value) -> Option<i128> {
    match value {
        Value::Num(_, number) => match number {
            Num::F64(float) => (float.fract() == 0.0 && float.abs() < 9e15).then_some(*float as i128),
            other => other.to_i128().or_else(|| other.to_u128().map(|number| number as i128)),
        },
        Value::String(_, text) => {
            let plain = text.replace('_', "");
            let digits = plain.trim_start_matches(['-', '+']).starts_with(|c: char| c.is_ascii_digit());
            let float = || plain.parse::<f64>().ok().filter(|x| x.fract() == 0.0 && x.abs() < 9e15).map(|x| x as i128);
            plain.parse().ok().or_else(float).filter(|_| digits)
        }
        _ => None,
    }
}

/// Reads a number in any form that a config may use: `1`, `0.001` or `1e-3`.
pub fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Num(_, Num::F64(float)) => Some(*float),
        Value::Num(..) => integer(value).map(|number| number as f64),
        Value::String(_, text) => {
            let plain = text.replace('_', "");
            let digits = plain.trim_start_matches(['-', '+', '.']).starts_with(|c: char| c.is_ascii_digit());
            plain.parse().ok().filter(|_| digits)
        }
        _ => None,
    }
}

impl<'a> IntoDeserializer<'a, Error> for Node<'a> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! deserialize_integer {
    ($($method:ident => $type:ty, $visit:ident;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match integer(self.value).map(<$type>::try_from) {
                Some(Ok(number)) => visitor.$visit(number),
                Some(Err(_)) => Err(de::Error::custom(format!(
                    "the number is not between {} and {}", <$type>::MIN, <$type>::MAX
                ))),
                None => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Node<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::String(_, text) => visitor.visit_borrowed_str(text),
            Value::Char(_, c) => visitor.visit_char(*c),
            Value::Bool(_, flag) => visitor.visit_bool(*flag),
            Value::Empty(..) => visitor.visit_unit(),
            Value::Num(_, Num::F64(float)) => visitor.visit_f64(*float),
            Value::Num(_, number) => match (number.to_u128().map(u64::try_from), number.to_i128().map(i64::try_from)) {
                (Some(Ok(number)), _) => visitor.visit_u64(number),
                (_, Some(Ok(number))) => visitor.visit_i64(number),
                _ => Err(de::Error::custom("the number is too large")),
            },
            Value::Array(_, items) => {
                visitor.visit_seq(SeqDeserializer::new(items.iter().map(|item| self.child(item))))
            }
            Value::Dict(_, dict) => {
                let tag = dict.iter().filter(|(key, _)| *key == "type");
                let rest = dict.iter().filter(|(key, _)| *key != "type");
                let entries = tag.chain(rest).map(|(key, value)| (key.as_str(), self.child(value)));
                visitor.visit_map(MapDeserializer::new(entries))
            }
        }
    }

    deserialize_integer! {
        deserialize_u8 => u8, visit_u8;
        deserialize_u16 => u16, visit_u16;
        deserialize_u32 => u32, visit_u32;
        deserialize_u64 => u64, visit_u64;
        deserialize_i8 => i8, visit_i8;
        deserialize_i16 => i16, visit_i16;
        deserialize_i32 => i32, visit_i32;
        deserialize_i64 => i64, visit_i64;
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match float(self.value) {
            Some(number) => visitor.visit_f64(number),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            // In `name: 1`, the value is a string.
            Value::Num(..) => match (integer(self.value), float(self.value)) {
                (Some(number), _) => visitor.visit_string(number.to_string()),
                (_, Some(number)) => visitor.visit_string(number.to_string()),
                _ => self.deserialize_any(visitor),
            },
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Empty(..) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Error> {
        match (name, self.value.as_str()) {
            (PATH, Some(text)) => visitor.visit_string(self.path(text).to_string_lossy().into_owned()),
            (PATH_OR_NAME, Some(text)) => {
                let path = self.path(text);
                let looks = text.starts_with(['/', '~', '.']) || path.exists();
                visitor.visit_string(if looks { path.to_string_lossy().into_owned() } else { text.to_owned() })
            }
            (PATH | PATH_OR_NAME, None) => self.deserialize_any(visitor),
            _ => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.value {
            Value::String(_, variant) => visitor.visit_enum(variant.as_str().into_deserializer()),
            Value::Dict(_, dict) => {
                let entries = dict.iter().map(|(key, value)| (key.as_str(), self.child(value)));
                visitor.visit_enum(de::value::MapAccessDeserializer::new(MapDeserializer::new(entries)))
            }
            _ => {
                let _ = (name, variants);
                self.deserialize_any(visitor)
            }
        }
    }

    forward_to_deserialize_any! {
        bool i128 u128 char bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// Parses YAML as a config would. Relative paths start from the current folder.
pub fn from_yaml<T: DeserializeOwned>(yaml: &str) -> Result<T, InputError> {
    from_yaml_in(Path::new(""), yaml)
}

/// Parses YAML as a config file in `folder` would.
pub fn from_yaml_in<T: DeserializeOwned>(folder: &Path, yaml: &str) -> Result<T, InputError> {
    let parsed: Value = yaml::parse::<serde_yaml::Value>(yaml)
        .map_err(|error| InputError::new(format!("not YAML: {error}")))
        .and_then(|value| Value::serialize(&value).map_err(|error| InputError::new(error.to_string())))?;
    serde_path_to_error::deserialize(Node::new(&parsed, &folder)).map_err(|error| InputError::new(error.to_string()))
}
