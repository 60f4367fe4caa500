//! `.pt` files: writes state dicts as `torch.save` does, and reads files of `torch.save` without Python.
//!
//! A pickle is a program, and loading one in Python runs it. This reader knows the few calls that build tensors, dicts
//! and numbers, builds the values itself, and refuses a file that names anything else. It checks claimed sizes, strides
//! and offsets before use, and bounds the memory of the values by the file's length.

mod file;
mod pickle;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

pub use file::StateDictFile;
pub use read::{read, read_bytes};
pub use write::write;

/// Supported storage classes of module `torch`, with their dtypes.
const STORAGES: [(&str, Kind); 10] = [
    ("FloatStorage", Kind::Float),
    ("DoubleStorage", Kind::Double),
    ("HalfStorage", Kind::Half),
    ("BFloat16Storage", Kind::BFloat16),
    ("LongStorage", Kind::Int64),
    ("IntStorage", Kind::Int),
    ("ShortStorage", Kind::Int16),
    ("CharStorage", Kind::Int8),
    ("ByteStorage", Kind::Uint8),
    ("BoolStorage", Kind::Bool),
];

/// A value of a pickle.
#[derive(Debug)]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A tensor or parameter: contiguous, on the CPU, with the saved shape and dtype.
    Tensor(Tensor),
    /// A list, a tuple, a set or a `torch.Size`.
    List(Vec<Value>),
    /// A dict, in file order. If a key occurs twice, the later entry counts.
    Dict(Vec<(Value, Value)>),
    /// The name of a dtype (`torch.float32`), a device (`cuda:0`) or a class.
    Name(String),
}

impl Value {
    /// Returns the dict entry with this string as its key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.as_dict()?.iter().rev().find(|(name, _)| name.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// Returns the entries of a dict.
    pub fn as_dict(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// Returns the values of a list, tuple or set.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(values) => Some(values),
            _ => None,
        }
    }

    /// Returns a string. A [`Value::Name`] is not a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns a boolean, or the element of a one-element boolean tensor.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            Value::Tensor(tensor) if tensor.kind() == Kind::Bool => one(tensor).map(|value| value != 0.0),
            _ => None,
        }
    }

    /// Returns an integer. A float or one-element tensor counts if its value is integral, as Adam's `step` is.
    pub fn as_i64(&self) -> Option<i64> {
        // Up to this value, an f64 represents every integer.
        const EXACT: f64 = (1_u64 << 53) as f64;
        match self {
            Value::Int(value) => Some(*value),
            Value::Tensor(tensor) if tensor.kind() == Kind::Int64 && tensor.numel() == 1 => {
                tensor.f_int64_value(&vec![0; tensor.dim()]).ok()
            }
            _ => self.as_f64().filter(|value| value.fract() == 0.0 && value.abs() <= EXACT).map(|value| value as i64),
        }
    }

    /// Returns a float, an integer, or the element of a one-element tensor that is not boolean.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(value) => Some(*value),
            Value::Int(value) => Some(*value as f64),
            Value::Tensor(tensor) if tensor.kind() != Kind::Bool => one(tensor),
            _ => None,
        }
    }

    /// Returns a tensor of any shape.
    pub fn as_tensor(&self) -> Option<&Tensor> {
        match self {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// Returns the tensors of a state dict, a dict from strings to tensors; `None` for any other value. The tensors
    /// share memory with this value.
    pub fn state_dict(&self) -> Option<BTreeMap<String, Tensor>> {
        let entry =
            |(key, value): &(Value, Value)| Some((key.as_str()?.to_owned(), value.as_tensor()?.shallow_clone()));
        self.as_dict()?.iter().map(entry).collect()
    }
}

/// Returns the element of a one-element tensor.
fn one(tensor: &Tensor) -> Option<f64> {
    (tensor.numel() == 1).then(|| tensor.f_double_value(&vec![0; tensor.dim()]).ok()).flatten()
}
