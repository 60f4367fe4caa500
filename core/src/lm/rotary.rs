//! Rotary position embedding and its scalings.

use anyhow::{bail, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::kernels;
use crate::config::InputError;

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
    /// How the frequencies are changed for long contexts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<Value>,
    /// All of these together, where newer files have them; or an entry of them for each type of layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<Value>,
    /// The longest context before it was made longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<f64>,
}

impl Rope {
    /// The embedding of heads of a width; `theta` where the config gives no base.
    pub fn rotary(&self, head_dim: i64, theta: f64, max_positions: i64) -> Result<Rotary> {
        self.read(self.rope_parameters.as_ref(), head_dim, theta, max_positions)
    }

    /// The same for one type of layers, where `rope_parameters` has an entry for it.
    pub fn rotary_of(&self, layers: &str, head_dim: i64, theta: f64, max_positions: i64) -> Result<Option<Rotary>> {
        let parameters = self.rope_parameters.as_ref().and_then(|parameters| parameters.get(layers));
        parameters.map(|parameters| self.read(Some(parameters), head_dim, theta, max_positions)).transpose()
    }

    fn read(&self, parameters: Option<&Value>, head_dim: i64, theta: f64, max_positions: i64) -> Result<Rotary> {
        let parameters = parameters.filter(|parameters| parameters.is_object());
        let number = |name: &str| parameters?.get(name)?.as_f64();
        let part = number("partial_rotary_factor").or(self.partial_rotary_factor).unwrap_or(1.0);
        let theta = number("rope_theta").or(self.rope_theta).unwrap_or(theta);
        let mut rotary = Rotary::new((head_dim as f64 * part) as i64, theta)?;
        if let Some(scaling) = parameters.or(self.rope_scaling.as_ref()).filter(|scaling| !scaling.is_null()) {
            rotary.scaling = self.scaling(scaling, rotary.width / 2, max_positions)?;
        }
        Ok(rotary)
    }

    fn scaling(&self, scaling: &Value, frequencies: i64, max_positions: i64) -> Result<Scaling> {
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
        let number = |name: &str| -> Result<f64> {
            scaling.get(name).and_then(Value::as_f64).ok_or_else(|| {
                let kind = kind.unwrap_or_default();
                InputError::new(format!("config.json: `rope_scaling` of type `{kind}` has no number `{name}`")).into()
            })
        };
        Ok(match kind {
            Some("default") => Scaling::None,
            Some("linear") => Scaling::Linear { factor: number("factor")? },
            Some("llama3") => Scaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            },
            Some("longrope" | "su") => {
                let list = |name: &str| -> Result<Vec<f64>> {
                    let list = scaling.get(name).and_then(Value::as_array).into_iter().flatten();
                    let list: Vec<f64> = list.filter_map(Value::as_f64).collect();
                    if list.len() as i64 != frequencies {
                        bail!(InputError::new(format!(
                            "config.json: `rope_scaling.{name}` has {} numbers, and {frequencies} frequencies are to be \
                             scaled",
                            list.len(),
                        )));
                    }
                    Ok(list)
                };
                let original = scaling.get("original_max_position_embeddings").and_then(Value::as_f64);
                let Some(original) = original.or(self.original_max_position_embeddings) else {
                    bail!(InputError::new(
                        "config.json: `rope_scaling` of type `longrope` needs \
                         `original_max_position_embeddings`"
                    ));
                };
                let longest = max_positions as f64;
                let factor = longest / original;
                let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                let magnitude = scaling.get("attention_factor").and_then(Value::as_f64).unwrap_or(usual);
                Scaling::Long {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original: original as i64,
                    magnitude,
                }
            }
            other => {
                bail!(InputError::new(format!(
                    "config.json: `rope_scaling` of type `{}` is not supported",
                    other.unwrap_or("(none)")
                ))
                .help(
                    "supported are default, linear, llama3 and longrope; it changes what the model computes, so it is \
                     not ignored"
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
