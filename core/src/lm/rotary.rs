//! Rotary position embedding and its scalings.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::kernels;
use crate::error::InputError;
use crate::suggest::nearest;

/// Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>): dimension i is rotated with dimension
/// i + width / 2, as in most Hugging Face models, or neighbouring dimensions are rotated with each other.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// Number of rotated dimensions of a head; the rest pass unchanged.
    width: i64,
    /// Base of the frequencies.
    theta: f64,
    scaling: Scaling,
    /// Whether dimensions 2i and 2i + 1 are rotated with each other.
    interleaved: bool,
}

/// Scaling of the frequencies for contexts longer than the original ones.
#[derive(Debug, Clone)]
enum Scaling {
    None,
    /// Divides all frequencies (Chen et al. 2023, <https://arxiv.org/abs/2306.15595>).
    Linear {
        factor: f64,
    },
    /// Raises the base for contexts longer than `longest` ("NTK-aware" scaling with the context's length).
    Dynamic {
        factor: f64,
        longest: f64,
    },
    /// YaRN: keeps the frequencies of dimensions below `low`, divides those above `high`, mixes both between, and scales
    /// cosines and sines (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>).
    Yarn {
        factor: f64,
        low: f64,
        high: f64,
        magnitude: f64,
    },
    /// Rotates only the first `rotated` pairs of a head, at the frequencies of a head that is rotated as a whole, divided by
    /// `factor` (Gemma 4).
    Proportional {
        rotated: i64,
        factor: f64,
    },
    /// Divides low frequencies, keeps high ones and interpolates between (Llama 3.1,
    /// <https://arxiv.org/abs/2407.21783>).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// LongRoPE: divides each frequency by its own factor, with one list for short and one for long contexts (Ding et
    /// al. 2024, <https://arxiv.org/abs/2402.13753>).
    Long {
        short: Vec<f64>,
        long: Vec<f64>,
        original: i64,
        magnitude: f64,
    },
}

/// Fields of a Hugging Face config.json that define rotary embeddings.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
pub struct Rope {
    /// Base of the rotary frequencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Fraction of a head that is rotated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
    /// Scaling of the frequencies for long contexts, as written by transformers before release 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Value>,
    /// All rotary settings, as written by transformers 5: one map, or one map per layer type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Value>,
    /// Longest context before its extension, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<f64>,
}

/// Layer types for which a config may give separate rotary embeddings.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// Supported types of scaling; older spellings are accepted too.
const SCALINGS: [&str; 7] = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"];

/// Known keys of a map of rotary settings.
const SETTINGS: [&str; 19] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "mrope_section",
    "mrope_interleaved",
    "finetuned",
];

/// Keys of a map of rotary settings that need no `rope_type`. On text alone, multimodal sections (Qwen2-VL, Wang et al.
/// 2024, <https://arxiv.org/abs/2409.12191>) rotate as plain positions do.
const UNTYPED: [&str; 4] = ["rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"];

/// One map of rotary settings in a config, under either key.
struct Spelled<'a> {
    /// The key: `rope_scaling` or `rope_parameters`.
    key: &'static str,
    /// Value.
    map: &'a Map<String, Value>,
}

impl<'a> Spelled<'a> {
    /// Returns the entries by layer type; `None` if the map is not nested. Ignores other keys.
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
                    InputError::new(format!("config.json: `{key}` has an entry for unknown layer type `{layers}`"))
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
    /// Returns the embedding that all layers share; `theta` is the default base.
    ///
    /// # Errors
    /// Fails if the settings are invalid or differ between layer types.
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
                    "config.json: `{}` differs between layer types, but all layers of this family share one",
                    spelled.key
                ))
                .help("it cannot be ignored because it changes what the model computes; is `model_type` right?")
            );
        }
        self.read(first.as_ref(), head_dim, theta, max_positions)
    }

    /// Returns the embedding of one layer type; `theta` is the default base. `None` if the config has one map for all
    /// layers.
    pub fn rotary_of(&self, layers: &str, head_dim: i64, theta: f64, max_positions: i64) -> Result<Option<Rotary>> {
        let Some(entries) = self.spelled()?.map(|spelled| spelled.nested()).transpose()?.flatten() else {
            return Ok(None);
        };
        self.read(entries.get(layers), head_dim, theta, max_positions).map(Some)
    }

    /// Returns the embeddings of full-attention and of sliding-window layers, each for its width of a head and default
    /// base. Settings that are not given per layer type apply to full-attention layers.
    pub fn full_and_sliding(&self, full: (i64, f64), sliding: (i64, f64), max_positions: i64) -> Result<Vec<Rotary>> {
        let theta = self.rope_theta.unwrap_or(full.1);
        let full = match self.rotary_of("full_attention", full.0, theta, max_positions)? {
            Some(rotary) => rotary,
            None => self.rotary(full.0, theta, max_positions)?,
        };
        let sliding = match self.rotary_of("sliding_attention", sliding.0, sliding.1, max_positions)? {
            Some(rotary) => rotary,
            None => Rotary::new(sliding.0, sliding.1)?,
        };
        Ok(vec![full, sliding])
    }

    /// Returns the map of settings. If both keys are set, `rope_scaling` wins, as in transformers 5.
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
        if !(0.0..=1.0).contains(&part) {
            bail!(InputError::new(format!("config.json: `partial_rotary_factor` is {part}, not from 0 to 1")));
        }
        let theta = number("rope_theta")?.unwrap_or(theta);
        let rotated = head_dim as f64 * part;
        let is_proportional = spelled.is_some_and(|it| it.map.get("rope_type").is_some_and(|it| it == "proportional"));
        let mut rotary = Rotary::new(if is_proportional { head_dim } else { rotated as i64 }, theta)?;
        if let Some(spelled) = spelled {
            rotary.scaling = self.scaling(spelled, &rotary, max_positions)?;
        }
        if let Scaling::Proportional { rotated: pairs, .. } = &mut rotary.scaling {
            *pairs = (rotated / 2.0) as i64;
        }
        Ok(rotary)
    }

    fn scaling(&self, spelled: &Spelled, rotary: &Rotary, max_positions: i64) -> Result<Scaling> {
        let frequencies = rotary.width / 2;
        let Spelled { key, map } = spelled;
        if let Some(name) = map.keys().find(|name| !map[*name].is_null() && !SETTINGS.contains(&name.as_str())) {
            let near = nearest(name, SETTINGS).map(|near| format!("did you mean `{near}`? "));
            bail!(InputError::new(format!("config.json: `{key}` has the unknown setting `{name}`")).help(format!(
                "{}known: {}; it cannot be ignored because it may change what the model computes",
                near.unwrap_or_default(),
                SETTINGS.join(", ")
            )));
        }
        let kind = match map.get("rope_type").or_else(|| map.get("type")) {
            Some(kind) => kind.as_str().map(str::to_owned).unwrap_or_else(|| kind.to_string()),
            // Parameters of a scaling need an explicit type.
            None => match map.keys().find(|name| !UNTYPED.contains(&name.as_str())) {
                None => "default".to_owned(),
                Some(other) => {
                    bail!(
                        InputError::new(format!("config.json: `{key}` has `{other}` but no `rope_type`"))
                            .help(format!("known types: {}", SCALINGS.join(", ")))
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
        // The longest context before its extension, with the precedence of transformers 5.
        let original = || -> Result<f64> {
            let inside = spelled.number("original_max_position_embeddings")?;
            Ok(self.original_max_position_embeddings.or(inside).unwrap_or(max_positions as f64))
        };
        Ok(match kind.as_str() {
            "default" | "mrope" => Scaling::None,
            "dynamic" => Scaling::Dynamic { factor: positive("factor")?, longest: max_positions as f64 },
            "proportional" => {
                let factor = if map.contains_key("factor") { positive("factor")? } else { 1.0 };
                Scaling::Proportional { rotated: frequencies, factor }
            }
            "yarn" if !map.contains_key("short_factor") => {
                let factor = positive("factor")?;
                let (width, original) = (rotary.width as f64, original()?);
                // The dimension that turns this many times in the original context.
                if original <= 0.0 || rotary.theta <= 1.0 {
                    bail!(InputError::new(format!(
                        "config.json: `{key}` of type `yarn` needs a positive original context and a base above 1, not \
                         {original} and {}",
                        rotary.theta
                    )));
                }
                let turns = |key: &str, default: f64| -> Result<f64> {
                    let turns = if map.contains_key(key) { positive(key)? } else { default };
                    Ok(width * (original / (turns * 2.0 * PI)).ln() / (2.0 * rotary.theta.ln()))
                };
                let (mut low, mut high) = (turns("beta_fast", 32.0)?, turns("beta_slow", 1.0)?);
                if map.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(width - 1.0));
                let growth = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                // A zero counts as absent, as in transformers.
                let number = |key| Ok::<_, anyhow::Error>(spelled.number(key)?.filter(|number| *number != 0.0));
                let magnitude =
                    match (spelled.number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?) {
                        (Some(given), ..) => given,
                        (None, Some(scale), Some(all)) => growth(scale) / growth(all),
                        _ => growth(1.0),
                    };
                Scaling::Yarn { factor, low, high, magnitude }
            }
            "linear" => Scaling::Linear { factor: positive("factor")? },
            "llama3" => {
                let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
                if low >= high {
                    bail!(InputError::new(format!(
                        "config.json: `{key}.low_freq_factor` is {low}, not below `high_freq_factor`, {high}"
                    )));
                }
                Scaling::Llama3 { factor: positive("factor")?, low, high, original: original()? }
            }
            // Phi-3 has used all three names.
            "longrope" | "su" | "yarn" => {
                let list = |name: &str| -> Result<Vec<f64>> {
                    let list = map.get(name).and_then(Value::as_array).into_iter().flatten();
                    let list: Vec<f64> = list.filter_map(Value::as_f64).collect();
                    if list.len() as i64 != frequencies {
                        bail!(InputError::new(format!(
                            "config.json: `{key}.{name}` has {} numbers, but there are {frequencies} frequencies",
                            list.len(),
                        )));
                    }
                    Ok(list)
                };
                let original = original()?;
                if original <= 1.0 {
                    bail!(InputError::new(format!(
                        "config.json: `original_max_position_embeddings` is {original}, not above 1"
                    )));
                }
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
                        "{}supported types: {}; it cannot be ignored because it changes what the model computes",
                        near.unwrap_or_default(),
                        SCALINGS.join(", ")
                    )
                ))
            }
        })
    }
}

impl Rotary {
    /// Creates an embedding without scaling.
    pub fn new(width: i64, theta: f64) -> Result<Self> {
        if width < 2 || width % 2 != 0 {
            bail!(InputError::new(format!(
                "config.json: `head_dim` and `partial_rotary_factor` rotate {width} dimensions of a head; the number must be \
                 even and positive"
            )));
        }
        if theta.is_nan() || theta <= 0.0 {
            bail!(InputError::new(format!("config.json: the rotary base is {theta}, not positive")));
        }
        Ok(Rotary { width, theta, scaling: Scaling::None, interleaved: false })
    }

    /// Returns the embedding that rotates neighbouring dimensions with each other.
    pub fn interleaved(self) -> Self {
        Rotary { interleaved: true, ..self }
    }

    /// Returns the same embedding without scaling.
    pub fn unscaled(&self) -> Self {
        Rotary { scaling: Scaling::None, ..self.clone() }
    }

    /// Returns true if the base follows the context's length, which then has no limit.
    pub(super) fn is_dynamic(&self) -> bool {
        matches!(self.scaling, Scaling::Dynamic { .. })
    }

    /// Returns cosines and sines for the positions of a context, [L, width] each, float32.
    pub(super) fn tables(&self, length: i64, device: Device) -> (Tensor, Tensor) {
        let half = self.width / 2;
        let plain = (0..half).map(|i| self.theta.powf(-2.0 * i as f64 / self.width as f64));
        let (frequencies, magnitude): (Vec<f64>, f64) = match &self.scaling {
            Scaling::None => (plain.collect(), 1.0),
            Scaling::Linear { factor } => (plain.map(|frequency| frequency / factor).collect(), 1.0),
            Scaling::Dynamic { factor, longest } => {
                let stretch = factor * (length as f64).max(*longest) / longest - (factor - 1.0);
                let width = self.width as f64;
                let theta = self.theta * stretch.powf(width / (width - 2.0));
                ((0..half).map(|i| theta.powf(-2.0 * i as f64 / width)).collect(), 1.0)
            }
            Scaling::Yarn { factor, low, high, magnitude } => {
                let mixed = |(i, frequency): (usize, f64)| {
                    // 0 for dimensions that are kept, 1 for those that are divided. Equal bounds make a step.
                    let divided = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    frequency * (1.0 - divided) + frequency / factor * divided
                };
                (plain.enumerate().map(mixed).collect(), *magnitude)
            }
            Scaling::Proportional { rotated, factor } => {
                let turned =
                    |(i, frequency): (usize, f64)| if (i as i64) < *rotated { frequency / factor } else { 0.0 };
                (plain.enumerate().map(turned).collect(), 1.0)
            }
            Scaling::Llama3 { factor, low, high, original } => {
                let scaled = |frequency: f64| {
                    let wavelength = 2.0 * PI / frequency;
                    // 0 for long waves, which are divided; 1 for short ones, which are kept.
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

    /// Rotates heads [B, H, L, D] by float32 tables [L, width]. The result has the heads' dtype.
    pub(super) fn rotate(&self, x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Tensor {
        if self.interleaved {
            return Self::rotate_neighbours(x, &cos.to_kind(x.kind()), &sin.to_kind(x.kind()));
        }
        if kernels::fit([x]) && x.stride()[3] == 1 {
            return kernels::rotate(x, cos, sin);
        }
        Self::rotate_plainly(x, &cos.to_kind(x.kind()), &sin.to_kind(x.kind()))
    }

    /// Rotates dimensions 2i and 2i + 1 with each other.
    fn rotate_neighbours(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let width = cos.size()[1];
        let [cos, sin] = [cos, sin].map(|table| table.narrow(-1, 0, width / 2));
        let pairs = x.narrow(-1, 0, width).unflatten(-1, [-1, 2]);
        let (a, b) = (pairs.select(-1, 0), pairs.select(-1, 1));
        let turned = Tensor::stack(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin], -1).flatten(-2, -1);
        match x.size()[3] - width {
            0 => turned,
            rest => Tensor::cat(&[turned, x.narrow(-1, width, rest)], -1),
        }
    }

    /// Computes the half-split form with libtorch operations.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(config: Value) -> String {
        let rope: Rope = serde_json::from_value(config).unwrap();
        rope.rotary(8, 10_000.0, 64).unwrap_err().to_string()
    }

    #[test]
    fn sizes_that_divide_by_zero_are_refused() {
        assert!(refused(json!({"partial_rotary_factor": 1.5})).contains("`partial_rotary_factor` is 1.5"));
        let equal = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0});
        assert!(refused(json!({"rope_scaling": equal})).contains("low_freq_factor` is 4, not below"));
        let long = json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 1, 1, 1],
            "original_max_position_embeddings": 1});
        assert!(refused(json!({"rope_scaling": long})).contains("original_max_position_embeddings` is 1"));
    }
}
