//! Where tensors live and in which type their products are computed.

use tch::{Device, Kind, Tensor};

/// The type of the matrix products. Weights, moments and losses are float32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Products in float32.
    Float32,
    /// Operands rounded to bfloat16, sums in float32, results in float32.
    BFloat16,
}

impl Precision {
    /// The kind of the operands.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 => Kind::Float,
            Precision::BFloat16 => Kind::BFloat16,
        }
    }

    /// `x wᵀ + b` for x [.., in], w [out, in], b `[out]`.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Precision::Float32 => x.linear(weight, bias),
            Precision::BFloat16 => {
                let kind = self.kind();
                let product = x.to_kind(kind).linear::<Tensor>(&weight.to_kind(kind), None).to_kind(Kind::Float);
                match bias {
                    Some(bias) => product + bias,
                    None => product,
                }
            }
        }
    }
}

/// The name that the reference and PyTorch use: `cpu`, `cuda:0`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Cpu => "cpu".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}
