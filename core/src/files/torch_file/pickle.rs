//! Pickle's stack machine, which builds values and calls nothing.
//!
//! It runs through the instructions once. Containers lie in one list and refer to each other by index. Shared values
//! therefore stay shared, and neither a cycle nor deep nesting costs more than its instructions.

use std::collections::HashMap;

use tch::Kind;

use super::STORAGES;
use crate::error::InputError;

/// Maximum number of instructions and copied values. A tensor of a state dict takes about forty.
const MAX_WORK: usize = 4 << 20;
/// Maximum number of dimensions, the limit of libtorch's own loops.
const MAX_DIMS: usize = 64;

pub(super) const SAVE_STATE_DICT: &str = "save the state dict alone: torch.save(model.state_dict(), path)";

/// Why a file is refused. The message starts with the file's name, followed by `what`.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) what: String,
    pub(super) help: Option<&'static str>,
}

impl Fault {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Fault { what: what.into(), help: None }
    }

    pub(super) fn help(self, help: &'static str) -> Self {
        Fault { help: Some(help), ..self }
    }

    /// Returns the error for a file with this name.
    pub(super) fn of(self, name: &str) -> InputError {
        let error = InputError::new(format!("{name} {}", self.what));
        match self.help {
            Some(help) => error.help(help),
            None => error,
        }
    }

    /// The file is malformed.
    pub(super) fn damaged(why: impl AsRef<str>) -> Self {
        Fault::new(format!("is damaged: {}", why.as_ref()))
    }

    /// The file is valid but has something that is not supported.
    fn unsupported(what: impl AsRef<str>) -> Self {
        Fault::new(format!("has {}, which is not supported", what.as_ref())).help(SAVE_STATE_DICT)
    }
}

type Result<T> = std::result::Result<T, Fault>;

/// Shortens a file's text for a message and escapes its control characters.
pub(super) fn quoted(text: &str) -> String {
    let mut short: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() {
        short.push('…');
    }
    short
}

/// A value on the stack.
#[derive(Debug, Clone, Copy)]
pub(super) enum Item<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    Global(&'static Global),
    /// An index into [`Pickle::nodes`].
    Node(usize),
}

/// A value that holds others, or is too large for the stack.
#[derive(Debug)]
pub(super) enum Node<'a> {
    List(Vec<Item<'a>>),
    Tuple(Vec<Item<'a>>),
    Set(Vec<Item<'a>>),
    Dict(Vec<(Item<'a>, Item<'a>)>),
    Bytes(Vec<u8>),
    Device(String),
    NumpyType(NumpyType),
    Storage(Storage<'a>),
    /// Boxed, because it is larger than the other variants, and a hostile pickle has millions of those.
    Tensor(Box<Strided<'a>>),
}

/// The archive entry that holds a tensor's elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) key: &'a str,
    pub(super) kind: Kind,
    /// Number of elements that the pickle claims.
    pub(super) elements: i64,
}

/// A tensor: a view of a storage.
#[derive(Debug)]
pub(super) struct Strided<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) view: View,
}

/// A tensor's place in its storage, in elements. No number is negative, and there are as many strides as sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    pub(super) offset: i64,
    pub(super) sizes: Vec<i64>,
    pub(super) strides: Vec<i64>,
}

/// The dtype of a NumPy scalar.
#[derive(Debug, Clone, Copy)]
pub(super) struct NumpyType {
    /// `f`, `i`, `u` or `b`.
    class: u8,
    bytes: usize,
}

impl NumpyType {
    pub(super) fn name(self) -> String {
        format!("{}{}", self.class as char, self.bytes)
    }
}

/// A global that a pickle may name.
#[derive(Debug)]
pub(super) struct Global {
    pub(super) module: &'static str,
    pub(super) name: &'static str,
    call: Call,
}

/// What calling a global returns.
#[derive(Debug, Clone, Copy)]
enum Call {
    Dict,
    /// A dict. Its first argument, the factory of missing values, is ignored.
    DefaultDict,
    List,
    Tuple,
    Set,
    Int,
    Float,
    Bool,
    Bytes,
    Encode,
    Tensor,
    Parameter,
    Device,
    NumpyType,
    NumpyScalar,
    /// Not callable: the storage class in a persistent id.
    Storage(Kind),
    /// Not callable.
    Name,
}

const fn global(module: &'static str, name: &'static str, call: Call) -> Global {
    Global { module, name, call }
}

static GLOBALS: [Global; 35] = [
    global("collections", "OrderedDict", Call::Dict),
    global("collections", "defaultdict", Call::DefaultDict),
    global("torch._utils", "_rebuild_tensor_v2", Call::Tensor),
    global("torch._utils", "_rebuild_tensor", Call::Tensor),
    global("torch._utils", "_rebuild_parameter", Call::Parameter),
    global("torch", "Size", Call::Tuple),
    global("torch", "device", Call::Device),
    // An untyped storage counts bytes.
    global("torch.storage", "UntypedStorage", Call::Storage(Kind::Uint8)),
    global("torch", "UntypedStorage", Call::Storage(Kind::Uint8)),
    global("numpy", "dtype", Call::NumpyType),
    global("numpy.core.multiarray", "scalar", Call::NumpyScalar),
    global("numpy._core.multiarray", "scalar", Call::NumpyScalar),
    global("_codecs", "encode", Call::Encode),
    global("builtins", "dict", Call::Dict),
    global("builtins", "list", Call::List),
    global("builtins", "tuple", Call::Tuple),
    global("builtins", "set", Call::Set),
    global("builtins", "frozenset", Call::Set),
    global("builtins", "int", Call::Int),
    // The name of `int` in protocol 2.
    global("builtins", "long", Call::Int),
    global("builtins", "float", Call::Float),
    global("builtins", "bool", Call::Bool),
    global("builtins", "bytes", Call::Bytes),
    // PyTorch's dtypes.
    global("torch", "float32", Call::Name),
    global("torch", "float64", Call::Name),
    global("torch", "float16", Call::Name),
    global("torch", "bfloat16", Call::Name),
    global("torch", "int64", Call::Name),
    global("torch", "int32", Call::Name),
    global("torch", "int16", Call::Name),
    global("torch", "int8", Call::Name),
    global("torch", "uint8", Call::Name),
    global("torch", "bool", Call::Name),
    global("torch", "complex64", Call::Name),
    global("torch", "complex128", Call::Name),
];

/// The storage classes as globals.
static STORAGE_GLOBALS: [Global; STORAGES.len()] = {
    let mut globals = [const { global("torch", "", Call::Name) }; STORAGES.len()];
    let mut at = 0;
    while at < STORAGES.len() {
        globals[at] = global("torch", STORAGES[at].0, Call::Storage(STORAGES[at].1));
        at += 1;
    }
    globals
};

/// Finds a global by its name. The error states why it is refused.
fn find(module: &str, name: &str) -> Result<&'static Global> {
    // Its name in Python 2, and still in protocol 2.
    let module = if module == "__builtin__" { "builtins" } else { module };
    if let Some(known) =
        GLOBALS.iter().chain(&STORAGE_GLOBALS).find(|global| global.module == module && global.name == name)
    {
        return Ok(known);
    }
    if module == "torch" && name.ends_with("Storage") {
        return Err(Fault::unsupported(format!("a tensor in a `{}`", quoted(name))));
    }
    if module == "torch._utils" && name == "_rebuild_tensor_v3" {
        // PyTorch uses it for these dtypes only.
        return Err(Fault::unsupported("a tensor of a dtype without a storage class (float8, uint16)"));
    }
    let name = quoted(&format!("{module}.{name}"));
    Err(Fault::new(format!("wants to call `{name}`, which a weights file does not need; none of its code was run"))
        .help(SAVE_STATE_DICT))
}

/// The result of a pickle.
pub(super) struct Pickle<'a> {
    pub(super) root: Item<'a>,
    pub(super) nodes: Vec<Node<'a>>,
}

/// Interprets a pickle of protocol 0 to 5.
pub(super) fn load(bytes: &[u8]) -> Result<Pickle<'_>> {
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        work: 0,
    };
    let root = machine.run()?;
    Ok(Pickle { root, nodes: machine.nodes })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Item<'a>>,
    /// Stack heights of the marks. Nothing below the last mark is popped before the mark itself.
    marks: Vec<usize>,
    memo: HashMap<u64, Item<'a>>,
    nodes: Vec<Node<'a>>,
    work: usize,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Item<'a>> {
        loop {
            self.charge(1)?;
            let code = self.byte()?;
            match code {
                // PROTO
                0x80 => {
                    let protocol = self.byte()?;
                    if protocol > 5 {
                        return Err(Fault::unsupported(format!("a pickle of protocol {protocol}")));
                    }
                }
                // FRAME: a hint for reading ahead
                0x95 => drop(self.take(8)?),
                // STOP
                b'.' => return self.pop(),

                b'(' => self.marks.push(self.stack.len()),
                // POP, which also pops a mark
                b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
                b'0' => drop(self.pop()?),
                // POP_MARK
                b'1' => drop(self.pop_mark()?),
                // DUP
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }

                b'N' => self.stack.push(Item::None),
                // NEWTRUE, NEWFALSE
                0x88 | 0x89 => self.stack.push(Item::Bool(code == 0x88)),
                // INT, LONG, FLOAT: in decimal
                b'I' => {
                    let item = match self.line()? {
                        "00" => Item::Bool(false),
                        "01" => Item::Bool(true),
                        digits => Item::Int(parsed(digits)?),
                    };
                    self.stack.push(item);
                }
                b'L' => {
                    let digits = self.line()?;
                    self.stack.push(Item::Int(parsed(digits.strip_suffix('L').unwrap_or(digits))?));
                }
                b'F' => {
                    let digits = self.line()?;
                    self.stack.push(Item::Float(parsed(digits)?));
                }
                // BININT, BININT1, BININT2
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.stack.push(Item::Int(value.into()));
                }
                b'K' => {
                    let value = self.byte()?;
                    self.stack.push(Item::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.stack.push(Item::Int(value.into()));
                }
                // LONG1, LONG4
                0x8a => {
                    let length = self.length(1)?;
                    self.long(length)?;
                }
                0x8b => {
                    let length = self.length(4)?;
                    self.long(length)?;
                }
                // BINFLOAT
                b'G' => {
                    let value = f64::from_be_bytes(self.array()?);
                    self.stack.push(Item::Float(value));
                }

                // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
                0x8c => self.text(1)?,
                b'X' => self.text(4)?,
                0x8d => self.text(8)?,
                // UNICODE, STRING: one line
                b'V' => {
                    let text = plain(self.line()?)?;
                    self.stack.push(Item::Text(text));
                }
                b'S' => {
                    let line = self.line()?;
                    let inner = ['\'', '"'].iter().find_map(|quote| line.strip_prefix(*quote)?.strip_suffix(*quote));
                    let text = plain(inner.ok_or_else(|| Fault::damaged("a string in its pickle has no quotes"))?)?;
                    self.stack.push(Item::Text(text));
                }
                // SHORT_BINSTRING, BINSTRING: strings of Python 2, which may be text or bytes
                b'U' | b'T' => {
                    let bytes = self.counted(if code == b'U' { 1 } else { 4 })?;
                    self.stack.push(std::str::from_utf8(bytes).map_or(Item::Bytes(bytes), Item::Text));
                }
                // SHORT_BINBYTES, BINBYTES, BINBYTES8
                b'C' => self.raw(1)?,
                b'B' => self.raw(4)?,
                0x8e => self.raw(8)?,

                // EMPTY_LIST, EMPTY_TUPLE, EMPTY_DICT, EMPTY_SET
                b']' => self.push(Node::List(Vec::new())),
                b')' => self.push(Node::Tuple(Vec::new())),
                b'}' => self.push(Node::Dict(Vec::new())),
                0x8f => self.push(Node::Set(Vec::new())),
                // TUPLE1, TUPLE2, TUPLE3
                0x85..=0x87 => {
                    let mut items = vec![Item::None; usize::from(code - 0x84)];
                    for item in items.iter_mut().rev() {
                        *item = self.pop()?;
                    }
                    self.push(Node::Tuple(items));
                }
                // TUPLE, LIST, FROZENSET, DICT: of the items above the mark
                b't' => {
                    let items = self.pop_mark()?;
                    self.push(Node::Tuple(items));
                }
                b'l' => {
                    let items = self.pop_mark()?;
                    self.push(Node::List(items));
                }
                0x91 => {
                    let items = self.pop_mark()?;
                    self.push(Node::Set(items));
                }
                b'd' => {
                    let items = pairs(&self.pop_mark()?)?;
                    self.push(Node::Dict(items));
                }

                // APPEND, APPENDS, ADDITEMS, SETITEM, SETITEMS
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_mark()?;
                    self.set(&items)?;
                }

                // PUT, BINPUT, LONG_BINPUT, MEMOIZE
                b'p' | b'q' | b'r' => {
                    let index = self.memo_index(code)?;
                    self.remember(index)?;
                }
                0x94 => self.remember(self.memo.len() as u64)?,
                // GET, BINGET, LONG_BINGET
                b'g' | b'h' | b'j' => {
                    let index = self.memo_index(code)?;
                    self.recall(index)?;
                }

                // GLOBAL, STACK_GLOBAL
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.stack.push(Item::Global(find(module, name)?));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Item::Text(module), Item::Text(name)) = (module, name) else {
                        return Err(Fault::damaged("its pickle names a global by something that is not a string"));
                    };
                    self.stack.push(Item::Global(find(module, name)?));
                }
                // REDUCE, NEWOBJ: a function or class and its arguments
                b'R' | 0x81 => {
                    let (arguments, callee) = (self.pop()?, self.pop()?);
                    let made = self.call(callee, arguments)?;
                    self.stack.push(made);
                }
                // INST: the same, with the name on two lines
                b'i' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let callee = Item::Global(find(module, name)?);
                    let arguments = self.pop_mark()?;
                    let arguments = self.node(Node::Tuple(arguments));
                    let made = self.call(callee, arguments)?;
                    self.stack.push(made);
                }
                // BUILD
                b'b' => {
                    let state = self.pop()?;
                    self.build(state)?;
                }
                // BINPERSID
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(Node::Storage(storage));
                }
                other => {
                    return Err(Fault::unsupported(format!("the instruction {other:#04x} in its pickle")));
                }
            }
        }
    }

    /// Counts work, so that a few bytes cannot cause much of it.
    fn charge(&mut self, work: usize) -> Result<()> {
        self.work = self.work.saturating_add(work);
        match self.work <= MAX_WORK {
            true => Ok(()),
            false => Err(Fault::new("has a pickle that is too long for a weights file").help(SAVE_STATE_DICT)),
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..length).ok_or_else(|| Fault::damaged("its pickle ends early"))?;
        self.at += length;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// Reads an unsigned integer of `bytes` bytes, at most eight.
    fn length(&mut self, bytes: usize) -> Result<u64> {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(self.take(bytes)?);
        Ok(u64::from_le_bytes(word))
    }

    /// Reads bytes that follow their length, an integer of `bytes` bytes.
    fn counted(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let length = self.length(bytes)?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|byte| *byte == b'\n');
        let line = self.take(length.ok_or_else(|| Fault::damaged("its pickle ends early"))? + 1)?;
        utf8(&line[..line.len() - 1])
    }

    fn text(&mut self, bytes: usize) -> Result<()> {
        let text = utf8(self.counted(bytes)?)?;
        self.stack.push(Item::Text(text));
        Ok(())
    }

    fn raw(&mut self, bytes: usize) -> Result<()> {
        let bytes = self.counted(bytes)?;
        self.stack.push(Item::Bytes(bytes));
        Ok(())
    }

    fn long(&mut self, length: u64) -> Result<()> {
        if length > 8 {
            return Err(Fault::unsupported("an integer of more than 64 bits"));
        }
        let bytes = self.take(length as usize)?;
        // The last byte holds the sign.
        let sign = bytes.last().is_some_and(|byte| *byte >= 0x80);
        let mut word = [if sign { 0xff } else { 0 }; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        self.stack.push(Item::Int(i64::from_le_bytes(word)));
        Ok(())
    }

    fn top(&self) -> Result<Item<'a>> {
        let fence = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(item) if self.stack.len() > fence => Ok(*item),
            _ => Err(Fault::damaged("its pickle pops more values than it pushes")),
        }
    }

    fn pop(&mut self) -> Result<Item<'a>> {
        let item = self.top()?;
        self.stack.pop();
        Ok(item)
    }

    fn pop_mark(&mut self) -> Result<Vec<Item<'a>>> {
        let mark = self.marks.pop().ok_or_else(|| Fault::damaged("its pickle pops a mark that it did not push"))?;
        Ok(self.stack.split_off(mark))
    }

    fn node(&mut self, node: Node<'a>) -> Item<'a> {
        self.nodes.push(node);
        Item::Node(self.nodes.len() - 1)
    }

    fn push(&mut self, node: Node<'a>) {
        let item = self.node(node);
        self.stack.push(item);
    }

    /// Reads a memo index: a line for PUT and GET, one byte for BINPUT and BINGET, four for their LONG forms.
    fn memo_index(&mut self, code: u8) -> Result<u64> {
        match code {
            b'p' | b'g' => parsed(self.line()?),
            b'q' | b'h' => self.length(1),
            _ => self.length(4),
        }
    }

    fn remember(&mut self, index: u64) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Result<()> {
        let item = self.memo.get(&index).copied();
        self.stack.push(item.ok_or_else(|| Fault::damaged("its pickle reads a memo entry that it never wrote"))?);
        Ok(())
    }

    fn append(&mut self, items: &[Item<'a>]) -> Result<()> {
        let top = self.top()?;
        match self.held_mut(top) {
            Some(Node::List(held) | Node::Set(held)) => held.extend_from_slice(items),
            _ => return Err(Fault::damaged("its pickle appends to something that is not a list")),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Item<'a>]) -> Result<()> {
        let (top, items) = (self.top()?, pairs(items)?);
        match self.held_mut(top) {
            Some(Node::Dict(held)) => held.extend(items),
            _ => return Err(Fault::damaged("its pickle sets a key of something that is not a dict")),
        }
        Ok(())
    }

    fn held(&self, item: Item<'a>) -> Option<&Node<'a>> {
        match item {
            Item::Node(index) => self.nodes.get(index),
            _ => None,
        }
    }

    fn held_mut(&mut self, item: Item<'a>) -> Option<&mut Node<'a>> {
        match item {
            Item::Node(index) => self.nodes.get_mut(index),
            _ => None,
        }
    }

    /// Copies the items of a list, tuple or set.
    fn items(&mut self, item: Item<'a>) -> Result<Vec<Item<'a>>> {
        let items = match self.held(item) {
            Some(Node::List(items) | Node::Tuple(items) | Node::Set(items)) => items.clone(),
            _ => return Err(Fault::damaged("its pickle uses something as a list that is not one")),
        };
        self.charge(items.len())?;
        Ok(items)
    }

    /// Copies the entries of a dict, or of a list of pairs.
    fn entries(&mut self, item: Item<'a>) -> Result<Vec<(Item<'a>, Item<'a>)>> {
        if let Some(Node::Dict(entries)) = self.held(item) {
            let entries = entries.clone();
            self.charge(entries.len())?;
            return Ok(entries);
        }
        let pairs = self.items(item)?;
        let entry = |pair| match self.items(pair)?[..] {
            [key, value] => Ok((key, value)),
            _ => Err(Fault::damaged("its pickle makes a dict of items that are not pairs")),
        };
        pairs.into_iter().map(entry).collect()
    }

    /// Evaluates a call of a known function or class.
    fn call(&mut self, callee: Item<'a>, arguments: Item<'a>) -> Result<Item<'a>> {
        let Item::Global(global) = callee else {
            return Err(Fault::damaged("its pickle calls something that is not a function"));
        };
        let arguments = self.items(arguments)?;
        let node = match (global.call, &arguments[..]) {
            (Call::Dict, []) | (Call::DefaultDict, [] | [_]) => Node::Dict(Vec::new()),
            (Call::Dict, [entries]) | (Call::DefaultDict, [_, entries]) => Node::Dict(self.entries(*entries)?),
            (Call::List, []) => Node::List(Vec::new()),
            (Call::List, [items]) => Node::List(self.items(*items)?),
            (Call::Tuple, []) => Node::Tuple(Vec::new()),
            (Call::Tuple, [items]) => Node::Tuple(self.items(*items)?),
            (Call::Set, []) => Node::Set(Vec::new()),
            (Call::Set, [items]) => Node::Set(self.items(*items)?),
            (Call::Int, []) => return Ok(Item::Int(0)),
            (Call::Int, [item @ Item::Int(_)]) => return Ok(*item),
            (Call::Int, [Item::Bool(value)]) => return Ok(Item::Int((*value).into())),
            (Call::Float, []) => return Ok(Item::Float(0.0)),
            (Call::Float, [item @ Item::Float(_)]) => return Ok(*item),
            (Call::Float, [Item::Int(value)]) => return Ok(Item::Float(*value as f64)),
            (Call::Bool, []) => return Ok(Item::Bool(false)),
            (Call::Bool, [item @ Item::Bool(_)]) => return Ok(*item),
            (Call::Bool, [Item::Int(value)]) => return Ok(Item::Bool(*value != 0)),
            (Call::Bytes, []) => return Ok(Item::Bytes(&[])),
            // Protocol 2 has no bytes and writes them as encoded text.
            (Call::Encode, [Item::Text(text), Item::Text("latin1" | "latin-1")]) => {
                self.charge(text.len())?;
                let bytes: Option<Vec<u8>> = text.chars().map(|char| u8::try_from(char).ok()).collect();
                Node::Bytes(bytes.ok_or_else(|| Fault::damaged("bytes in its pickle have values above 255"))?)
            }
            // The remaining arguments are about gradients and hooks, which a loaded tensor does not have.
            (Call::Tensor, [storage, offset, sizes, strides, ..]) => {
                Node::Tensor(Box::new(self.layout(*storage, *offset, *sizes, *strides)?))
            }
            (Call::Parameter, [tensor, ..]) if matches!(self.held(*tensor), Some(Node::Tensor(_))) => {
                return Ok(*tensor);
            }
            (Call::Device, [Item::Text(name)]) => {
                self.charge(name.len())?;
                Node::Device((*name).to_owned())
            }
            (Call::Device, [Item::Text(name), Item::Int(index)]) => {
                self.charge(name.len())?;
                Node::Device(format!("{name}:{index}"))
            }
            (Call::NumpyType, [Item::Text(name), ..]) => Node::NumpyType(numpy_type(name)?),
            (Call::NumpyScalar, [kind, bytes]) => return self.numpy_scalar(*kind, *bytes),
            _ => {
                let Global { module, name, .. } = global;
                return Err(Fault::damaged(format!("its pickle calls `{module}.{name}` with wrong arguments")));
            }
        };
        Ok(self.node(node))
    }

    fn layout(
        &mut self,
        storage: Item<'a>,
        offset: Item<'a>,
        sizes: Item<'a>,
        strides: Item<'a>,
    ) -> Result<Strided<'a>> {
        let Some(Node::Storage(storage)) = self.held(storage) else {
            return Err(Fault::damaged("a tensor in its pickle has no storage"));
        };
        let storage = *storage;
        let count = |item: &Item| match item {
            Item::Int(count) if *count >= 0 => Ok(*count),
            _ => Err(Fault::damaged("a tensor in its pickle has an invalid size, stride or offset")),
        };
        let offset = count(&offset)?;
        let sizes: Vec<i64> = self.items(sizes)?.iter().map(count).collect::<Result<_>>()?;
        let strides: Vec<i64> = self.items(strides)?.iter().map(count).collect::<Result<_>>()?;
        if sizes.len() != strides.len() || sizes.len() > MAX_DIMS {
            let (sizes, strides) = (sizes.len(), strides.len());
            return Err(Fault::damaged(format!("a tensor in its pickle has {sizes} sizes and {strides} strides")));
        }
        Ok(Strided { storage, view: View { offset, sizes, strides } })
    }

    fn numpy_scalar(&self, kind: Item<'a>, bytes: Item<'a>) -> Result<Item<'a>> {
        let Some(Node::NumpyType(kind)) = self.held(kind) else {
            return Err(Fault::damaged("a numpy scalar in its pickle has no dtype"));
        };
        let bytes = match (bytes, self.held(bytes)) {
            (Item::Bytes(bytes), _) => bytes,
            (_, Some(Node::Bytes(bytes))) => bytes,
            _ => return Err(Fault::damaged("a numpy scalar in its pickle has no bytes")),
        };
        if bytes.len() != kind.bytes {
            return Err(Fault::damaged("a numpy scalar in its pickle has the wrong length for its dtype"));
        }
        // Extend the value to the widest dtype of its class.
        let signed = kind.class == b'i' && bytes.last().is_some_and(|byte| *byte >= 0x80);
        let mut word = [if signed { 0xff } else { 0 }; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        Ok(match (kind.class, bytes) {
            (b'b', _) => Item::Bool(word[0] != 0),
            (b'f', [a, b, c, d]) => Item::Float(f32::from_le_bytes([*a, *b, *c, *d]).into()),
            (b'f', _) => Item::Float(f64::from_le_bytes(word)),
            _ => Item::Int(i64::from_le_bytes(word)),
        })
    }

    /// Sets the state of the value on top of the stack. A dict's state is attributes such as `_metadata`, which weights
    /// do not need.
    fn build(&mut self, state: Item<'a>) -> Result<()> {
        let top = self.top()?;
        match self.held(top) {
            Some(Node::Dict(_)) => Ok(()),
            Some(Node::NumpyType(kind)) => {
                let kind = *kind;
                match self.items(state)?.get(1) {
                    Some(Item::Text(">")) => {
                        Err(Fault::unsupported(format!("a numpy scalar of dtype >{}", kind.name())))
                    }
                    Some(Item::Text("<" | "=" | "|")) => Ok(()),
                    _ => Err(Fault::damaged("a numpy dtype in its pickle has no byte order")),
                }
            }
            _ => Err(Fault::damaged("its pickle sets the state of something that has none")),
        }
    }

    /// Reads the storage of a persistent id: `("storage", class, key, device, number of elements)`.
    fn storage(&mut self, id: Item<'a>) -> Result<Storage<'a>> {
        match self.items(id)?[..] {
            [Item::Text("storage"), Item::Global(class), Item::Text(key), _, Item::Int(elements), ..]
                if elements >= 0 =>
            {
                match class.call {
                    Call::Storage(kind) => Ok(Storage { key, kind, elements }),
                    _ => Err(Fault::damaged(format!("its pickle uses `{}` as a storage class", class.name))),
                }
            }
            _ => Err(Fault::damaged("its pickle has a persistent id that is not a storage")),
        }
    }
}

/// Pairs up alternating keys and values.
fn pairs<'a>(items: &[Item<'a>]) -> Result<Vec<(Item<'a>, Item<'a>)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    match rest {
        [] => Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect()),
        _ => Err(Fault::damaged("its pickle has a key without a value")),
    }
}

fn numpy_type(name: &str) -> Result<NumpyType> {
    let (class, bytes) = match name.trim_start_matches(['<', '=', '|']) {
        "b1" => (b'b', 1),
        "f4" => (b'f', 4),
        "f8" => (b'f', 8),
        "i1" => (b'i', 1),
        "i2" => (b'i', 2),
        "i4" => (b'i', 4),
        "i8" => (b'i', 8),
        "u1" => (b'u', 1),
        "u2" => (b'u', 2),
        "u4" => (b'u', 4),
        _ => return Err(Fault::unsupported(format!("a numpy scalar of dtype {}", quoted(name)))),
    };
    Ok(NumpyType { class, bytes })
}

fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|_| Fault::damaged("a string in its pickle is not UTF-8"))
}

/// Returns a string of protocol 0. Fails if it has escapes or is not ASCII.
fn plain(text: &str) -> Result<&str> {
    match text.is_ascii() && !text.contains('\\') {
        true => Ok(text),
        false => Err(Fault::unsupported("a string with escapes in a pickle of protocol 0")),
    }
}

fn parsed<T: std::str::FromStr>(digits: &str) -> Result<T> {
    digits.parse().map_err(|_| Fault::damaged(format!("`{}` in its pickle is not a number", quoted(digits))))
}
