//! Parses YAML with limits on alias expansion and on brackets.
//!
//! An alias can stand for a value that contains aliases itself, so a few lines can expand to more than memory holds.
//! serde_yaml limits how often aliases are followed, but not the size of their expansion. It also refuses deep nesting,
//! but its parser first takes time quadratic in the depth of brackets.

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess};
use serde::de::{SeqAccess, VariantAccess, Visitor};

/// Maximum ratio of expanded size to text length.
const UNFOLDS: usize = 16;
/// Expanded size, in bytes, that any text may reach.
const SMALL: usize = 1 << 16;

/// Maximum number of lists and mappings in brackets, and so of their depth. The parser takes 0.2 s at this depth.
const BRACKETS: usize = 10_000;

/// Parses a text. Fails if its aliases expand to far more than the text, or if it has too many brackets.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, serde_yaml::Error> {
    if text.bytes().filter(|byte| matches!(byte, b'{' | b'[')).count() > BRACKETS {
        return Err(serde_yaml::Error::custom(format!("it has more than {BRACKETS} lists and mappings in brackets")));
    }
    let mut left = text.len().saturating_mul(UNFOLDS).max(SMALL);
    Counted(&mut left).deserialize(serde_yaml::Deserializer::from_str(text))?;
    serde_yaml::from_str(text)
}

/// Counts a value without keeping it. Holds the number of bytes still allowed.
struct Counted<'a>(&'a mut usize);

impl Counted<'_> {
    /// Counts a value at the shortest length that YAML could give it.
    fn count<E: Error>(self, length: usize) -> Result<(), E> {
        let left = self.0.checked_sub(length + 1);
        *self.0 = left.ok_or_else(|| E::custom(format!("aliases expand to more than {UNFOLDS} times the text")))?;
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Counted<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.count(0)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.count(0)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.count(0)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.count(0)
    }

    /// An empty document.
    fn visit_none<E: Error>(self) -> Result<(), E> {
        self.count(0)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.count(0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.count(text.len())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Counted(self.0))?.is_some() {}
        self.count(0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while entries.next_key_seed(Counted(self.0))?.is_some() {
            entries.next_value_seed(Counted(self.0))?;
        }
        self.count(0)
    }

    /// A tagged value.
    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        let ((), value) = tagged.variant_seed(Counted(self.0))?;
        value.newtype_variant_seed(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_yaml::Value;

    #[test]
    fn excessive_alias_expansion_is_refused() {
        let value: Value = parse("a: &a [1, null, -1.5, true, !tag x]\nb: [*a, *a]\n").unwrap();
        assert_eq!(value["b"][1], value["a"]);
        assert!(parse::<Value>("").unwrap().is_null());
        let many = |times: usize| format!("a: &a [{}]\nb: [{}]\n", "1,".repeat(times), "*a,".repeat(times));
        assert!(parse::<Value>(&many(100)).is_ok());
        let error = parse::<Value>(&many(1000)).unwrap_err().to_string();
        assert!(error.contains("aliases expand to more than 16 times the text"), "{error}");
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1000), "*a,".repeat(1000));
        assert!(parse::<Value>(&long).is_err());
    }

    #[test]
    fn excessive_brackets_are_refused() {
        assert!(parse::<Value>(&format!("[{}]", "[1],{a: 2},".repeat(1000))).is_ok());
        for deep in ["{a: ", "[", r#"{"}": "#] {
            let error = parse::<Value>(&deep.repeat(BRACKETS + 1)).unwrap_err().to_string();
            assert!(error.contains("more than 10000 lists and mappings in brackets"), "{error}");
        }
    }
}
