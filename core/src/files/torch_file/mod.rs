//! `.pt` files: a state dict written as `torch.save` writes it, and what `torch.save` wrote read without Python.
//!
//! A pickle is a program, and loading one in Python runs it. The reader here knows the few calls that make up tensors,
//! dicts and numbers, makes the values itself, and refuses a file that names anything else. What a file claims (sizes,
//! strides, places) is checked before it is used, and what is made of it is bounded by the file's length.

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

/// The storage classes of module `torch` whose tensors are written and read.
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
    /// A tensor or parameter: contiguous, on the CPU, of the shape and type that were saved.
    Tensor(Tensor),
    /// A list, a tuple, a set or a `torch.Size`.
    List(Vec<Value>),
    /// A dict, in the order of the file. A key may come twice; the later one counts.
    Dict(Vec<(Value, Value)>),
    /// Something that is only a name: a type (`torch.float32`), a device (`cuda:0`).
    Name(String),
}

impl Value {
    /// The entry of a dict with that text as its key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.as_dict()?.iter().rev().find(|(name, _)| name.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// The entries of a dict.
    pub fn as_dict(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    /// The values of a list, tuple or set.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(values) => Some(values),
            _ => None,
        }
    }

    /// A string. A name is none.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// `True` or `False`, also as a tensor of one boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            Value::Tensor(tensor) if tensor.kind() == Kind::Bool => one(tensor).map(|value| value != 0.0),
            _ => None,
        }
    }

    /// A whole number: an integer, or a float or tensor of one element whose value is whole, as Adam's `step` is.
    pub fn as_i64(&self) -> Option<i64> {
        // Up to here a float holds every whole number.
        const EXACT: f64 = (1_u64 << 53) as f64;
        match self {
            Value::Int(value) => Some(*value),
            Value::Tensor(tensor) if tensor.kind() == Kind::Int64 && tensor.numel() == 1 => {
                tensor.f_int64_value(&vec![0; tensor.dim()]).ok()
            }
            _ => self.as_f64().filter(|value| value.fract() == 0.0 && value.abs() <= EXACT).map(|value| value as i64),
        }
    }

    /// A number: a float, an integer, or a tensor of one element that is not a boolean.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(value) => Some(*value),
            Value::Int(value) => Some(*value as f64),
            Value::Tensor(tensor) if tensor.kind() != Kind::Bool => one(tensor),
            _ => None,
        }
    }

    /// A tensor, of any shape.
    pub fn as_tensor(&self) -> Option<&Tensor> {
        match self {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// The tensors of a state dict, which is a dict of text to tensors; `None` when it is not one. They share their
    /// memory with the tensors here.
    pub fn state_dict(&self) -> Option<BTreeMap<String, Tensor>> {
        let entry =
            |(key, value): &(Value, Value)| Some((key.as_str()?.to_owned(), value.as_tensor()?.shallow_clone()));
        self.as_dict()?.iter().map(entry).collect()
    }
}

/// The element of a tensor that has only one.
fn one(tensor: &Tensor) -> Option<f64> {
    (tensor.numel() == 1).then(|| tensor.f_double_value(&vec![0; tensor.dim()]).ok()).flatten()
}
