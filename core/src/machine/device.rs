//! Where tensors live and in which type their products are computed.

use std::cell::Cell;
use std::fmt;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tch::{Cuda, Device, Kind, Tensor};

use crate::error::InputError;

/// The type of the matrix products. Weights, moments and losses are float32 whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Products in float32.
    Float32,
    /// Operands rounded to bfloat16, sums in float32, results in float32.
    BFloat16,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Precision::Float32 => "float32",
            Precision::BFloat16 => "bfloat16",
        })
    }
}

impl Precision {
    /// The kind of the operands.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 => Kind::Float,
            Precision::BFloat16 => Kind::BFloat16,
        }
    }

    /// The float32 product of two matrices of this kind.
    pub fn product(self, a: &Tensor, b: &Tensor) -> Tensor {
        a.matmul(b).to_kind(Kind::Float)
    }

    /// `x wᵀ + b` for x [.., in], w [out, in], b `[out]`.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Precision::Float32 => match bias {
                // A dictionary that computes in half the width (`adapted`) rounds where PyTorch code of two steps does.
                Some(bias) if x.kind() != Kind::Float => x.linear::<Tensor>(weight, None) + bias,
                bias => x.linear(weight, bias),
            },
            Precision::BFloat16 => {
                let kind = self.kind();
                let product = x.to_kind(kind).linear::<Tensor>(&weight.to_kind(kind), None);
                match bias {
                    // The sum of the two kinds is float32, which a GPU calculates in one pass.
                    Some(bias) => product + bias,
                    None => product,
                }
                .to_kind(Kind::Float)
            }
        }
    }
}

/// What the system says of the CPU; empty where it is not Linux.
fn cpu_info() -> &'static str {
    static INFO: LazyLock<String> = LazyLock::new(|| std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
    &INFO
}

/// The first entry of that name.
fn entry<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let entries = info.lines().filter_map(|line| line.split_once(':'));
    entries.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Whether the CPU takes products of bfloat16 in less time than float32's. Measured (docs/performance.md): with AMX a step of
/// `standard` in 118 ms instead of 322, with AMD's AVX512-BF16 a product in 19 instead of 37 (Zen 5) or 41 instead of 78 (Zen 4); but with Intel's AVX512-BF16
/// alone a product in 120 instead of 83.
pub fn bfloat16_is_faster() -> bool {
    is_faster(cpu_info())
}

fn is_faster(info: &str) -> bool {
    let has = |flag| entry(info, "flags").is_some_and(|flags| flags.split(' ').any(|known| known == flag));
    has("amx_bf16") || has("avx512_bf16") && entry(info, "vendor_id") == Some("AuthenticAMD")
}

/// Whether the CPU has the instructions of AVX-512 that all processors with it have had since the first.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512dq")
}

/// The widest vector instructions that the CPU has and loops of our own use.
pub fn cpu_vectors() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            return "AVX-512";
        }
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            return "AVX2";
        }
    }
    "what every processor of its kind has"
}

/// What the CPU calls itself, with its vectors: on another one sums may be taken in another order.
pub fn processor() -> String {
    let model = entry(cpu_info(), "model name").unwrap_or(std::env::consts::ARCH);
    format!("{model}, {}", cpu_vectors())
}

/// True if host code can read the tensors of a device without a GPU sync, so that loops of our own can go over them. Tests
/// may call a CPU a GPU ([`as_a_gpu`]).
pub fn on_host(device: Device) -> bool {
    device == Device::Cpu && !AS_A_GPU.get()
}

thread_local! {
    static AS_A_GPU: Cell<bool> = const { Cell::new(false) };
}

/// Does something with a CPU's tensors as if they were a GPU's: for tests, where there is none.
pub fn as_a_gpu<T>(work: impl FnOnce() -> T) -> T {
    crate::flag::during(&AS_A_GPU, work)
}

/// The first GPU where there is one, otherwise the CPU.
pub fn best() -> Device {
    load_cuda();
    Device::cuda_if_available()
}

/// How many GPUs there are.
pub fn gpus() -> usize {
    load_cuda();
    Cuda::device_count().max(0) as usize
}

/// Loads libtorch's CUDA part, if libtorch has one and the machine a driver.
///
/// No symbol of it is called by name, so linkers leave it out of a program; without it libtorch knows no GPU. It must
/// be there before libtorch is first asked, for it remembers the answer.
fn load_cuda() {
    #[cfg(target_os = "linux")]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            let driver = ["/dev/nvidiactl", "/dev/dxg"].iter().any(|device| std::path::Path::new(device).exists());
            if driver {
                // SAFETY: the name is a C string. The library's initialisers register its devices with libtorch, which
                // is loaded already, and is made for that. It stays loaded.
                unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) };
            }
        });
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
            DeviceChoice::Auto => Ok(best()),
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(index) => {
                let count = gpus();
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

crate::inline_schema!(DeviceChoice, {"type": "string", "pattern": "^(auto|cpu|cuda|cuda:[0-9]+)$"});

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
            PrecisionChoice::Auto if bfloat16_is_faster() => {
                (Precision::BFloat16, "auto: the CPU multiplies bfloat16 faster")
            }
            PrecisionChoice::Auto => (Precision::Float32, "auto: the CPU does not multiply bfloat16 faster"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_where_it_is_faster() {
        let info = |vendor: &str, flags: &str| {
            let core =
                format!("processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A\nflags\t\t: fpu {flags} sse\n\n");
            core.repeat(2)
        };
        assert!(is_faster(&info("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile")));
        assert!(is_faster(&info("AuthenticAMD", "avx512f avx512_bf16")));
        assert!(!is_faster(&info("GenuineIntel", "avx512f avx512_bf16")));
        assert!(!is_faster(&info("AuthenticAMD", "avx2")));
        assert!(!is_faster(""));
        assert_eq!(entry(&info("GenuineIntel", "avx2"), "model name"), Some("A"));
    }
}
