//! Devices of tensors, and the precision of matrix products.

use std::cell::Cell;
use std::fmt;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tch::{Cuda, Device, Kind, Tensor};

use crate::error::InputError;

/// Precision of matrix products. Weights, moments and losses are always float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Products in float32.
    Float32,
    /// Operands rounded to bfloat16; sums and results in float32.
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
    /// Returns the kind of the operands.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 => Kind::Float,
            Precision::BFloat16 => Kind::BFloat16,
        }
    }

    /// Returns the product of two matrices of this kind as float32.
    pub fn product(self, a: &Tensor, b: &Tensor) -> Tensor {
        a.matmul(b).to_kind(Kind::Float)
    }

    /// Returns `x wᵀ + b` for x [.., in], w [out, in], b `[out]`.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Precision::Float32 => match bias {
                // A dictionary in half precision (`adapted`) rounds product and sum separately, as two PyTorch steps
                // do.
                Some(bias) if x.kind() != Kind::Float => x.linear::<Tensor>(weight, None) + bias,
                bias => x.linear(weight, bias),
            },
            Precision::BFloat16 => {
                let kind = self.kind();
                let product = x.to_kind(kind).linear::<Tensor>(&weight.to_kind(kind), None);
                match bias {
                    // bfloat16 plus float32 is float32; a GPU computes the sum in one pass.
                    Some(bias) => product + bias,
                    None => product,
                }
                .to_kind(Kind::Float)
            }
        }
    }
}

/// Returns /proc/cpuinfo; empty if it cannot be read.
fn cpu_info() -> &'static str {
    static INFO: LazyLock<String> = LazyLock::new(|| std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
    &INFO
}

/// Returns the first entry of this name.
fn entry<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let entries = info.lines().filter_map(|line| line.split_once(':'));
    entries.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Returns true if the CPU multiplies bfloat16 faster than float32.
///
/// Measured (docs/performance.md), bfloat16 against float32: with AMX, a step of `standard` takes 118 ms against 322.
/// With AMD's AVX512-BF16, a product takes 19 against 37 (Zen 5) or 41 against 78 (Zen 4). With Intel's AVX512-BF16 and
/// no AMX it is slower: 120 against 83.
pub fn bfloat16_is_faster() -> bool {
    is_faster(cpu_info())
}

fn is_faster(info: &str) -> bool {
    let has = |flag| entry(info, "flags").is_some_and(|flags| flags.split(' ').any(|known| known == flag));
    has("amx_bf16") || has("avx512_bf16") && entry(info, "vendor_id") == Some("AuthenticAMD")
}

/// Returns true if the CPU has AVX-512 F, BW, VL and DQ.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512dq")
}

/// Returns the widest vector instructions of the CPU that this crate's loops use.
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
    "baseline vectors"
}

/// Returns the CPU's name and vector instructions. The order of sums may differ on another processor.
pub fn processor() -> String {
    let model = entry(cpu_info(), "model name").unwrap_or(std::env::consts::ARCH);
    format!("{model}, {}", cpu_vectors())
}

/// Returns true if host code can read the tensors of a device without a GPU sync, and so this crate's loops can. Tests
/// may treat a CPU as a GPU ([`as_a_gpu`]).
pub fn on_host(device: Device) -> bool {
    device == Device::Cpu && !AS_A_GPU.get()
}

thread_local! {
    static AS_A_GPU: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` with CPU tensors treated as a GPU's, for tests on machines without one.
pub fn as_a_gpu<T>(work: impl FnOnce() -> T) -> T {
    crate::flag::during(&AS_A_GPU, work)
}

/// Returns the first GPU, or the CPU if there is none.
pub fn best() -> Device {
    load_cuda();
    Device::cuda_if_available()
}

/// Returns the number of GPUs.
pub fn gpus() -> usize {
    load_cuda();
    Cuda::device_count().max(0) as usize
}

/// Loads libtorch's CUDA library, if libtorch has one and the machine has a driver.
///
/// Nothing refers to its symbols, so linkers drop it, and libtorch then finds no GPU. It must be loaded before libtorch
/// is first asked for GPUs, because libtorch caches the answer.
fn load_cuda() {
    #[cfg(target_os = "linux")]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            let driver = ["/dev/nvidiactl", "/dev/dxg"].iter().any(|device| std::path::Path::new(device).exists());
            if driver {
                // SAFETY: the name is a C string. The library is designed to be loaded after libtorch: its initialisers
                // register its devices there. It stays loaded.
                unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) };
            }
        });
    }
}

/// Returns the name that PyTorch uses: `cpu`, `cuda:0`.
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Cpu => "cpu".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Device in a config (`device:`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU, or the CPU if there is none.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU by index.
    Cuda(usize),
}

impl DeviceChoice {
    /// Resolves the choice on this machine.
    ///
    /// # Errors
    /// Fails if there is no such GPU.
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
                    .help(format!("{found}; `device: auto` uses the best available")))
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

/// Precision in a config (`precision:`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub enum PrecisionChoice {
    /// The fastest on the device without losing quality.
    #[default]
    Auto,
    /// Products in float32.
    Float32,
    /// Products in bfloat16, sums in float32.
    BFloat16,
}

impl PrecisionChoice {
    /// Resolves the choice on a device. Returns the precision and the reason.
    pub fn precision(self, device: Device) -> (Precision, &'static str) {
        match self {
            PrecisionChoice::Float32 => (Precision::Float32, "set in the config"),
            PrecisionChoice::BFloat16 => (Precision::BFloat16, "set in the config"),
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
    fn bfloat16_is_chosen_only_where_it_is_faster() {
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
