//! Types of config values that need more than serde's own: paths, devices, precisions.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tch::Device;

use super::InputError;
use crate::device::{self, Precision};

/// The newtype name by which the config's deserializer knows a path and makes it absolute, from the folder of the
/// file that it stands in. See `load`.
pub(super) const PATH: &str = "dictlearn::ConfigPath";
/// The same for a value that may be a path or a name: it is a path if something exists there, or if it looks like one.
pub(super) const PATH_OR_NAME: &str = "dictlearn::PathOrName";

macro_rules! path_value {
    ($(#[$doc:meta])* $name:ident, $marker:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name(pub String);

        impl $name {
            /// As a path.
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
                struct Visitor;
                impl<'de> de::Visitor<'de> for Visitor {
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
                deserializer.deserialize_newtype_struct($marker, Visitor).map($name)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn inline_schema() -> bool {
                true
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string"})
            }
        }
    };
}

path_value! {
    /// A path in a config: relative to the folder of the file that says it, absolute once the config is loaded.
    ConfigPath, PATH
}

path_value! {
    /// A path in a config or a name (`embedded:austen`, `EleutherAI/pythia-70m`): absolute if it is a path.
    PathOrName, PATH_OR_NAME
}

/// `device:` of a config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU where there is one, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by number.
    Cuda(usize),
}

impl DeviceChoice {
    /// The device that it means here.
    pub fn device(self) -> Result<Device, InputError> {
        match self {
            DeviceChoice::Auto => Ok(device::best()),
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(index) => {
                let count = device::gpus();
                if index < count {
                    return Ok(Device::Cuda(index));
                }
                let found = match count {
                    0 => "this machine (or this libtorch) has no GPU".to_owned(),
                    1 => "this machine has one GPU, cuda:0".to_owned(),
                    n => format!("this machine has {n} GPUs, cuda:0 to cuda:{}", n - 1),
                };
                Err(InputError::new(format!("there is no device `cuda:{index}`"))
                    .help(format!("{found}; `device: auto` takes what there is")))
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(DeviceChoice::Cuda)
                .ok_or_else(|| de::Error::unknown_variant(other, &["auto", "cpu", "cuda", "cuda:N"])),
        }
    }
}

impl JsonSchema for DeviceChoice {
    fn schema_name() -> Cow<'static, str> {
        "DeviceChoice".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^(auto|cpu|cuda|cuda:[0-9]+)$"})
    }
}

/// `save_steps:` of a config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum SaveSteps {
    /// These steps.
    Listed(Vec<u64>),
    /// Steps with a constant ratio, and step 0.
    Spaced {
        /// How many.
        log: u64,
    },
}

impl SaveSteps {
    /// The steps of a run of so many, rising.
    pub fn of(&self, steps: u64) -> BTreeSet<u64> {
        match self {
            SaveSteps::Listed(listed) => listed.iter().copied().collect(),
            // As in the reference's demo: 0, and 10^-3 to 10^0 without its last, cut off to whole steps.
            SaveSteps::Spaced { log } => {
                let last = log.saturating_sub(1);
                let part = |index: u64| 10f64.powf(-3.0 + 3.0 * index as f64 / last as f64);
                // What is a whole step but for rounding stays one.
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

impl JsonSchema for SaveSteps {
    fn schema_name() -> Cow<'static, str> {
        "SaveSteps".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "array", "items": {"type": "integer", "minimum": 0}},
            {
                "type": "object",
                "properties": {
                    "log": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "How many steps at most, step 0 among them: those that fall on the same step are one."}
                },
                "required": ["log"],
                "additionalProperties": false
            }
        ]})
    }
}

/// `precision:` of a config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum PrecisionChoice {
    /// What is fastest on the device without losing quality.
    #[default]
    Auto,
    /// Products in float32.
    Float32,
    /// Products in bfloat16, sums in float32.
    BFloat16,
}

impl PrecisionChoice {
    /// The precision that it means on a device, and why.
    pub fn precision(self, device: Device) -> (Precision, &'static str) {
        match self {
            PrecisionChoice::Float32 => (Precision::Float32, "as the config says"),
            PrecisionChoice::BFloat16 => (Precision::BFloat16, "as the config says"),
            PrecisionChoice::Auto if device.is_cuda() => (Precision::BFloat16, "auto: the device is a GPU"),
            PrecisionChoice::Auto if crate::device::bfloat16_is_faster() => {
                (Precision::BFloat16, "auto: the CPU multiplies bfloat16 faster")
            }
            PrecisionChoice::Auto => (Precision::Float32, "auto: the CPU does not multiply bfloat16 faster"),
        }
    }
}
