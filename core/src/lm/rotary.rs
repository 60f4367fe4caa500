//! Rotary position embedding and its scalings.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::kernels;
use crate::error::InputError;
use crate::suggest::nearest;

/// Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>), in the half-split form that Hugging
/// Face's models use: dimension i is turned with dimension i + width / 2.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// How many of a head's dimensions are rotated; the rest stay.
    width: i64,
    /// Base of the frequencies.
    theta: f64,
    scaling: Scaling,
}

/// How the frequencies are changed for contexts longer than those of the first training.
#[derive(Debug, Clone)]
enum Scaling {
    None,
    /// All frequencies divided (Chen et al. 2023, <https://arxiv.org/abs/2306.15595>).
    Linear {
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, those between interpolated (Llama 3.1,
    /// <https://arxiv.org/abs/2407.21783>).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// Each frequency divided by a factor of its own, one list for short and one for long contexts (Ding et al. 2024,
    /// <https://arxiv.org/abs/2402.13753>).
    Long {
        short: Vec<f64>,
        long: Vec<f64>,
        original: i64,
        magnitude: f64,
    },
}

/// The fields of a Hugging Face config.json that rotary embeddings follow from.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct Rope {
    /// Base of the rotary frequencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Which part of a head is rotated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// How the frequencies are changed for long contexts, as transformers writes it before release 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Value>,
    /// All of these together, as transformers 5 writes them; or an entry of them for each type of layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Value>,
    /// The longest context before it was made longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<f64>,
}

/// The types of layers that a config may give rotary embeddings of their own.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// The types of scaling, some of which have two names.
const SCALINGS: [&str; 4] = ["default", "linear", "llama3", "longrope"];

/// What a config says of rotary embeddings in one place, whichever of the spellings it uses.
struct Spelled<'a> {
    /// The key: `rope_scaling` or `rope_parameters`.
    key: &'static str,
    /// Its value.
    map: &'a Map<String, Value>,
}

impl<'a> Spelled<'a> {
    /// The entries by type of layers, where there are such. Whatever else stands beside them says nothing.
    fn nested(&self) -> Result<Option<BTreeMap<&'a str, Self>>> {
        let Spelled { key, map } = *self;
        if !map.iter().any(|(name, value)| value.is_object() || LAYER_TYPES.contains(&name.as_str())) {
            return Ok(None);
        }
        let mut entries = BTreeMap::new();
        for (layers, value) in map.iter().filter(|(_, value)| value.is_object()) {
            if !LAYER_TYPES.contains(&layers.as_str()) {
                let near = nearest(layers, LAYER_TYPES).map(|near| format!("did you mean `{near}`? "));
                bail!(
                    InputError::new(format!("config.json: `{key}` has an entry for layers of type `{layers}`"))
                        .help(format!("{}known: {}", near.unwrap_or_default(), LAYER_TYPES.join(", ")))
                );
            }
            entries.insert(layers.as_str(), Spelled { key, map: value.as_object().unwrap_or(map) });
        }
        Ok(Some(entries))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => bail!(InputError::new(format!("config.json: `{}.{name}` is {value}, not a number", self.key))),
            },
        }
    }
}

impl Rope {
    /// The embedding of heads of a width in all layers; `theta` where the config gives no base.
    pub fn rotary(&self, head_dim: i64, theta: f64, max_positions: i64) -> Result<Rotary> {
        let theta = self.rope_theta.unwrap_or(theta);
        let Some(spelled) = self.spelled()? else { return self.read(None, head_dim, theta, max_positions) };
        let Some(entries) = spelled.nested()? else {
            return self.read(Some(&spelled), head_dim, theta, max_positions);
        };
        let mut entries = entries.into_values();
        let first = entries.next();
        if entries.any(|other| first.as_ref().is_none_or(|first| first.map != other.map)) {
            bail!(
                InputError::new(format!(
                    "config.json: `{}` differs between types of layers, and all layers of this family have the same",
                    spelled.key
                ))
                .help("it changes what the model computes, so it is not ignored; is `model_type` right?")
            );
        }
        self.read(first.as_ref(), head_dim, theta, max_positions)
    }

    /// The embedding in layers of one type, for a config that says it by type; `theta` where it gives no base for them.
    /// `None` for a config that makes no difference between layers.
    pub fn rotary_of(&self, layers: &str, head_dim: i64, theta: f64, max_positions: i64) -> Result<Option<Rotary>> {
        let Some(entries) = self.spelled()?.map(|spelled| spelled.nested()).transpose()?.flatten() else {
            return Ok(None);
        };
        self.read(entries.get(layers), head_dim, theta, max_positions).map(Some)
    }

    /// What the config says. Where it uses both keys, transformers 5 takes the older one.
    fn spelled(&self) -> Result<Option<Spelled<'_>>> {
        for (key, value) in [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)] {
            match value {
                None | Some(Value::Null) => {}
                Some(Value::Object(map)) if map.is_empty() => {}
                Some(Value::Object(map)) => return Ok(Some(Spelled { key, map })),
                Some(other) => bail!(InputError::new(format!("config.json: `{key}` is {other}, not a map"))),
            }
        }
        Ok(None)
    }

    fn read(&self, spelled: Option<&Spelled>, head_dim: i64, theta: f64, max_positions: i64) -> Result<Rotary> {
        let number = |name| spelled.map_or(Ok(None), |spelled| spelled.number(name));
        let part = number("partial_rotary_factor")?.or(self.partial_rotary_factor).unwrap_or(1.0);
        let theta = number("rope_theta")?.unwrap_or(theta);
        let mut rotary = Rotary::new((head_dim as f64 * part) as i64, theta)?;
        if let Some(spelled) = spelled {
            rotary.scaling = self.scaling(spelled, rotary.width / 2, max_positions)?;
        }
        Ok(rotary)
    }

    fn scaling(&self, spelled: &Spelled, frequencies: i64, max_positions: i64) -> Result<Scaling> {
        let Spelled { key, map } = spelled;
        let kind = match map.get("rope_type").or_else(|| map.get("type")) {
            Some(kind) => kind.as_str().map(str::to_owned).unwrap_or_else(|| kind.to_string()),
            // A type that only scaling has a need of must be said.
            None => match map.keys().find(|name| !["rope_theta", "partial_rotary_factor"].contains(&name.as_str())) {
                None => "default".to_owned(),
                Some(other) => {
                    bail!(
                        InputError::new(format!("config.json: `{key}` has `{other}`, and no `rope_type`"))
                            .help(format!("types are: {}", SCALINGS.join(", ")))
                    )
                }
            },
        };
        let positive = |name: &str| -> Result<f64> {
            match spelled.number(name)? {
                Some(number) if number > 0.0 => Ok(number),
                Some(number) => {
                    bail!(InputError::new(format!("config.json: `{key}.{name}` is {number}, not positive")))
                }
                None => bail!(InputError::new(format!("config.json: `{key}` of type `{kind}` has no number `{name}`"))),
            }
        };
        // The longest context of the first training, from where transformers 5 takes it.
        let original = || -> Result<f64> {
            let inside = spelled.number("original_max_position_embeddings")?;
            Ok(self.original_max_position_embeddings.or(inside).unwrap_or(max_positions as f64))
        };
        Ok(match kind.as_str() {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: positive("factor")? },
            "llama3" => Scaling::Llama3 {
                factor: positive("factor")?,
                low: positive("low_freq_factor")?,
                high: positive("high_freq_factor")?,
                original: original()?,
            },
            // Phi-3 has had all three names for it.
            "longrope" | "su" | "yarn" if kind != "yarn" || map.contains_key("short_factor") => {
                let list = |name: &str| -> Result<Vec<f64>> {
                    let list = map.get(name).and_then(Value::as_array).into_iter().flatten();
                    let list: Vec<f64> = list.filter_map(Value::as_f64).collect();
                    if list.len() as i64 != frequencies {
                        bail!(InputError::new(format!(
                            "config.json: `{key}.{name}` has {} numbers, and {frequencies} frequencies are to be scaled",
                            list.len(),
                        )));
                    }
                    Ok(list)
                };
                let original = original()?;
                let factor = match spelled.number("factor")? {
                    Some(_) => positive("factor")?,
                    None => max_positions as f64 / original,
                };
                let default = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                let magnitude = spelled.number("attention_factor")?.unwrap_or(default);
                Scaling::Long {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original: original as i64,
                    magnitude,
                }
            }
            other => {
                let near = nearest(other, SCALINGS).map(|near| format!("did you mean `{near}`? "));
                bail!(InputError::new(format!("config.json: `{key}` of type `{other}` is not supported")).help(
                    format!(
                        "{}supported are {}; it changes what the model computes, so it is not ignored",
                        near.unwrap_or_default(),
                        SCALINGS.join(", ")
                    )
                ))
            }
        })
    }
}

impl Rotary {
    /// Unscaled.
    pub fn new(width: i64, theta: f64) -> Result<Self> {
        if width < 2 || width % 2 != 0 {
            bail!(InputError::new(format!(
                "config.json: {width} dimensions of a head are rotated, which is not pairs"
            )));
        }
        if theta.is_nan() || theta <= 0.0 {
            bail!(InputError::new(format!("config.json: a rotary base of {theta} is not positive")));
        }
        Ok(Rotary { width, theta, scaling: Scaling::None })
    }

    /// Cosines and sines for the positions of a context, [L, width] each, float32.
    pub(super) fn tables(&self, length: i64, device: Device) -> (Tensor, Tensor) {
        let half = self.width / 2;
        let plain = (0..half).map(|i| self.theta.powf(-2.0 * i as f64 / self.width as f64));
        let (frequencies, magnitude): (Vec<f64>, f64) = match &self.scaling {
            Scaling::None => (plain.collect(), 1.0),
            Scaling::Linear { factor } => (plain.map(|frequency| frequency / factor).collect(), 1.0),
            Scaling::Llama3 { factor, low, high, original } => {
                let scaled = |frequency: f64| {
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    // 0 where waves are long and divided, 1 where they are short and kept.
                    let kept = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * (kept + (1.0 - kept) / factor)
                };
                (plain.map(scaled).collect(), 1.0)
            }
            Scaling::Long { short, long, original, magnitude } => {
                let factors = if length > *original { long } else { short };
                (plain.zip(factors).map(|(frequency, factor)| frequency / factor).collect(), *magnitude)
            }
        };
        let frequencies = Tensor::from_slice(&frequencies).to_kind(Kind::Float).to_device(device);
        let angles = Tensor::arange(length, (Kind::Float, device)).unsqueeze(1) * frequencies.unsqueeze(0);
        let angles = Tensor::cat(&[&angles, &angles], -1);
        (angles.cos() * magnitude, angles.sin() * magnitude)
    }

    /// Rotates heads [B, H, L, D] by tables [L, width], float32. The result has the heads' type.
    pub(super) fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Tensor {
        if kernels::fit([x]) && x.stride()[3] == 1 {
            return kernels::rotate(x, cos, sin);
        }
        Self::rotate_plainly(x, &cos.to_kind(x.kind()), &sin.to_kind(x.kind()))
    }

    /// The same as a libtorch expression.
    pub(super) fn rotate_plainly(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let width = cos.size()[1];
        let half = width / 2;
        let rotated = x.narrow(-1, 0, width);
        let turned = Tensor::cat(&[-rotated.narrow(-1, half, half), rotated.narrow(-1, 0, half)], -1);
        let rotated = &rotated * cos + turned * sin;
        let rest = x.size()[3] - width;
        if rest == 0 {
            return rotated;
        }
        Tensor::cat(&[rotated, x.narrow(-1, width, rest)], -1)
    }
}
