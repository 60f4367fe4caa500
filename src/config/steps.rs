//! Steps at which weights are saved.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};

/// `save_steps:` of a config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum SaveSteps {
    /// These steps.
    Listed(Vec<u64>),
    /// Steps with a constant ratio, and step 0.
    Spaced {
        /// Number of steps, before duplicates are merged.
        log: u64,
    },
}

impl SaveSteps {
    /// Returns the steps to save in a run of `steps` steps, in ascending order.
    pub fn of(&self, steps: u64) -> BTreeSet<u64> {
        match self {
            SaveSteps::Listed(listed) => listed.iter().copied().collect(),
            // As in the reference's demo: 0, and 10^-3 to 10^0 without the last, truncated to whole steps.
            SaveSteps::Spaced { log } => {
                let last = log.saturating_sub(1);
                let part = |index: u64| 10f64.powf(-3.0 + 3.0 * index as f64 / last as f64);
                // The factor keeps rounding errors from truncating a whole step.
                let step = |index: u64| (steps as f64 * part(index) * (1.0 + 1e-12)) as u64;
                std::iter::once(0).chain((0..last).map(step)).collect()
            }
        }
    }
}

impl<'de> Deserialize<'de> for SaveSteps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = SaveSteps;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of steps, or `{log: N}`")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<SaveSteps, A::Error> {
                let mut listed = Vec::new();
                while let Some(step) = items.next_element()? {
                    listed.push(step);
                }
                Ok(SaveSteps::Listed(listed))
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut entries: A) -> Result<SaveSteps, A::Error> {
                let mut log = None;
                while let Some(key) = entries.next_key::<String>()? {
                    if key != "log" {
                        return Err(de::Error::unknown_field(&key, &["log"]));
                    }
                    log = Some(entries.next_value()?);
                }
                log.map(|log| SaveSteps::Spaced { log }).ok_or_else(|| de::Error::missing_field("log"))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

dictlearn_core::inline_schema!(SaveSteps, {"anyOf": [
    {"type": "array", "items": {"type": "integer", "minimum": 0}},
    {
        "type": "object",
        "properties": {
            "log": {
                "type": "integer", "minimum": 1, "maximum": 1000,
                "description": "Maximum number of steps, including step 0; duplicates are merged."
            }
        },
        "required": ["log"],
        "additionalProperties": false
    }
]});
