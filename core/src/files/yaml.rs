//! YAML whose aliases are counted before they are followed.
//!
//! An alias is a few bytes that stand for as many as one likes, aliases among them: some lines can unfold to more than any
//! memory holds. serde_yaml bounds how often aliases are followed, but not what lies behind them. It also refuses what is
//! nested deeply, but only after its parser has taken a time that is quadratic in the depth of brackets.

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess};
use serde::de::{SeqAccess, VariantAccess, Visitor};

/// How many times its length a text may unfold to.
const UNFOLDS: usize = 16;
/// What any text may unfold to, in bytes.
const SMALL: usize = 1 << 16;

/// How many lists and mappings may be in brackets, which is also how deep they may be: the parser takes 0.2 s for so many.
const BRACKETS: usize = 10_000;

/// A value of a text, unless its aliases unfold to far more than the text, or its brackets may be nested far too deeply.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, serde_yaml::Error> {
    if text.bytes().filter(|byte| matches!(byte, b'{' | b'[')).count() > BRACKETS {
        return Err(serde_yaml::Error::custom(format!("it has more than {BRACKETS} lists and mappings in brackets")));
    }
    let mut left = text.len().saturating_mul(UNFOLDS).max(SMALL);
    Counted(&mut left).deserialize(serde_yaml::Deserializer::from_str(text))?;
    serde_yaml::from_str(text)
}

/// A value that is counted and not kept: how many bytes there may still be.
struct Counted<'a>(&'a mut usize);

impl Counted<'_> {
    /// Counts a value, as it might be written at the shortest.
    fn count<E: Error>(self, length: usize) -> Result<(), E> {
        let left = self.0.checked_sub(length + 1);
        *self.0 = left.ok_or_else(|| E::custom(format!("aliases unfold to more than {UNFOLDS} times the text")))?;
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

    /// An empty text.
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

    /// What has a tag.
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
    fn aliases_are_counted() {
        let value: Value = parse("a: &a [1, null, -1.5, true, !tag x]\nb: [*a, *a]\n").unwrap();
        assert_eq!(value["b"][1], value["a"]);
        assert!(parse::<Value>("").unwrap().is_null());
        let many = |times: usize| format!("a: &a [{}]\nb: [{}]\n", "1,".repeat(times), "*a,".repeat(times));
        assert!(parse::<Value>(&many(100)).is_ok());
        let error = parse::<Value>(&many(1000)).unwrap_err().to_string();
        assert!(error.contains("aliases unfold to more than 16 times the text"), "{error}");
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(1000), "*a,".repeat(1000));
        assert!(parse::<Value>(&long).is_err());
    }

    #[test]
    fn brackets_are_counted() {
        assert!(parse::<Value>(&format!("[{}]", "[1],{a: 2},".repeat(1000))).is_ok());
        for deep in ["{a: ", "[", r#"{"}": "#] {
            let error = parse::<Value>(&deep.repeat(BRACKETS + 1)).unwrap_err().to_string();
            assert!(error.contains("more than 10000 lists and mappings in brackets"), "{error}");
        }
    }
}
