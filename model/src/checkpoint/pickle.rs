//! Reads the pickles of xAI's checkpoint without executing anything.
//!
//! A pickle is a program for a small stack machine. This reader knows the two dozen instructions and the few names that the
//! published files use, builds nothing but descriptions of arrays, and refuses every other instruction and name by saying which
//! it met and where. Array contents are never copied: the result says where in the file they lie.

use super::storage::ReadAt;

mod input;

use input::Input;

/// Number format of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// Signed byte.
    I8,
    /// Upper half of a 32-bit float.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::I8 => 1,
            Self::Bf16 => 2,
        }
    }
}

/// An array in a file: little-endian, last index fastest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Number format.
    pub dtype: Dtype,
    /// Where its bytes begin; they end within the file.
    pub offset: u64,
}

/// What a file of the checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// The numbers.
    pub weight: Array,
    /// The scales of a quantised matrix.
    pub scales: Option<Array>,
}

/// Why a pickle was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: expected {expected}, found {found}")]
pub struct PickleError {
    /// Where in the file.
    pub offset: u64,
    /// What it should have been.
    pub expected: String,
    /// What it was.
    pub found: String,
}

/// The instruction that every pickle begins with.
const PROTOCOL: u8 = 0x80;
/// The published files need fewer than 100 of each; more is an attack or another kind of file.
const MOST_INSTRUCTIONS: usize = 2048;
const MOST_VALUES: usize = 1024;
const MOST_DIMENSIONS: usize = 4;

/// Names that may occur, and what they mean here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    QuantizedWeight,
    Reconstruct,
    NdArray,
    NumpyDtype,
    Bfloat16,
}

fn global(module: &str, name: &str) -> Option<Global> {
    match (module, name) {
        ("__main__", "QuantizedWeight8bit") => Some(Global::QuantizedWeight),
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Some(Global::Reconstruct),
        ("numpy", "ndarray") => Some(Global::NdArray),
        ("numpy", "dtype") => Some(Global::NumpyDtype),
        ("ml_dtypes", "bfloat16") => Some(Global::Bfloat16),
        _ => None,
    }
}

/// Number of a value in the arena; stack, memo and tuples hold these, so that an object changed by BUILD is changed everywhere.
type Id = usize;

#[derive(Clone, Debug)]
enum Value {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    Bytes {
        offset: u64,
        length: u64,
    },
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// The Boolean says whether its byte order has been given.
    Dtype(Dtype, bool),
    Array(Option<Array>),
    Quantized(Option<(Array, Array)>),
}

/// Reads the description of the tensor in `file`.
///
/// # Errors
/// [`PickleError`] naming the byte.
pub fn read(file: &dyn ReadAt) -> Result<Tensor, PickleError> {
    let mut machine =
        Machine { input: Input::new(file), values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: Vec::new() };
    machine.run()
}

struct Machine<'a> {
    input: Input<'a>,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Id>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Tensor, PickleError> {
        match self.input.byte()? {
            PROTOCOL => self.protocol()?,
            other => {
                return Err(self.error(
                    0,
                    format!("a pickle, which begins with {PROTOCOL:#04x}"),
                    format!("{other:#04x}"),
                ));
            }
        }
        for _ in 0..MOST_INSTRUCTIONS {
            let offset = self.input.at;
            let opcode = self.input.byte()?;
            if opcode == b'.' {
                return self.stop(offset);
            }
            self.step(opcode, offset)?;
        }
        Err(self.error(self.input.at, format!("at most {MOST_INSTRUCTIONS} instructions"), "more"))
    }

    fn step(&mut self, opcode: u8, offset: u64) -> Result<(), PickleError> {
        match opcode {
            0x95 => self.input.skip_frame(offset),
            0x8c => self.text(offset),
            0x94 => self.memoize(offset),
            b'h' => self.recall(offset),
            0x93 => self.global(offset),
            b')' => self.push(offset, Value::Tuple(Vec::new())),
            b'}' => self.push(offset, Value::Dict(Vec::new())),
            b'(' => self.mark(offset),
            b't' => self.tuple_to_mark(offset),
            0x85..=0x87 => self.short_tuple(offset, usize::from(opcode - 0x84)),
            b'K' => self.integer::<1>(offset),
            b'M' => self.integer::<2>(offset),
            b'J' => self.integer::<4>(offset),
            b'C' => self.bytes::<1>(offset),
            b'B' => self.bytes::<4>(offset),
            b'N' => self.push(offset, Value::None),
            0x88 => self.push(offset, Value::Bool(true)),
            0x89 => self.push(offset, Value::Bool(false)),
            0x81 => self.new_object(offset),
            b'R' => self.reduce(offset),
            b'b' => self.build(offset),
            b'u' => self.set_items(offset),
            other => Err(self.error(offset, "an instruction of a checkpoint", format!("opcode {other:#04x}"))),
        }
    }

    fn error(&self, offset: u64, expected: impl Into<String>, found: impl Into<String>) -> PickleError {
        PickleError { offset, expected: expected.into(), found: found.into() }
    }

    fn push(&mut self, offset: u64, value: Value) -> Result<(), PickleError> {
        if self.values.len() == MOST_VALUES {
            return Err(self.error(offset, format!("at most {MOST_VALUES} values"), "more"));
        }
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
        Ok(())
    }

    fn pop(&mut self, offset: u64) -> Result<Id, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(id) if self.stack.len() >= floor => Ok(id),
            _ => Err(self.error(offset, "a value on the stack", "none")),
        }
    }

    fn protocol(&mut self) -> Result<(), PickleError> {
        match self.input.byte()? {
            4..=5 => Ok(()),
            version => Err(self.error(1, "protocol 4 or 5", format!("protocol {version}"))),
        }
    }

    fn text(&mut self, offset: u64) -> Result<(), PickleError> {
        let length = usize::from(self.input.byte()?);
        let bytes = self.input.take(length)?;
        match String::from_utf8(bytes) {
            Ok(text) => self.push(offset, Value::Text(text)),
            Err(_) => Err(self.error(offset, "a text in UTF-8", "other bytes")),
        }
    }

    fn memoize(&mut self, offset: u64) -> Result<(), PickleError> {
        let Some(&top) = self.stack.last() else { return Err(self.error(offset, "a value on the stack", "none")) };
        if self.memo.len() == MOST_VALUES {
            return Err(self.error(offset, format!("at most {MOST_VALUES} remembered values"), "more"));
        }
        self.memo.push(top);
        Ok(())
    }

    fn recall(&mut self, offset: u64) -> Result<(), PickleError> {
        let index = usize::from(self.input.byte()?);
        let Some(&id) = self.memo.get(index) else {
            return Err(self.error(
                offset,
                format!("one of {} remembered values", self.memo.len()),
                format!("number {index}"),
            ));
        };
        if self.stack.len() >= MOST_VALUES {
            return Err(self.error(offset, format!("at most {MOST_VALUES} values"), "more"));
        }
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, offset: u64) -> Result<(), PickleError> {
        let (name, module) = (self.pop(offset)?, self.pop(offset)?);
        let (Value::Text(module), Value::Text(name)) = (&self.values[module], &self.values[name]) else {
            return Err(self.error(offset, "a module and a name", "other values"));
        };
        match global(module, name) {
            Some(global) => self.push(offset, Value::Global(global)),
            None => Err(self.error(offset, "a name that checkpoints use", format!("{:?}", format!("{module}.{name}")))),
        }
    }

    fn mark(&mut self, offset: u64) -> Result<(), PickleError> {
        if self.marks.len() == MOST_VALUES {
            return Err(self.error(offset, format!("at most {MOST_VALUES} marks"), "more"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn take_to_mark(&mut self, offset: u64) -> Result<Vec<Id>, PickleError> {
        match self.marks.pop() {
            Some(mark) if mark <= self.stack.len() => Ok(self.stack.split_off(mark)),
            _ => Err(self.error(offset, "a mark on the stack", "none")),
        }
    }

    fn tuple_to_mark(&mut self, offset: u64) -> Result<(), PickleError> {
        let items = self.take_to_mark(offset)?;
        self.push(offset, Value::Tuple(items))
    }

    fn short_tuple(&mut self, offset: u64, length: usize) -> Result<(), PickleError> {
        let mut items = vec![0; length];
        for item in items.iter_mut().rev() {
            *item = self.pop(offset)?;
        }
        self.push(offset, Value::Tuple(items))
    }

    fn integer<const N: usize>(&mut self, offset: u64) -> Result<(), PickleError> {
        let bytes = self.input.take(N)?;
        let unsigned = bytes.iter().rev().fold(0_u32, |value, byte| value << 8 | u32::from(*byte));
        // Only the four-byte form is signed.
        let value = if N == 4 { i64::from(unsigned as i32) } else { i64::from(unsigned) };
        self.push(offset, Value::Int(value))
    }

    fn bytes<const N: usize>(&mut self, offset: u64) -> Result<(), PickleError> {
        let length = self.input.take(N)?.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        let begin = self.input.at;
        self.input.skip(length)?;
        self.push(offset, Value::Bytes { offset: begin, length })
    }

    fn new_object(&mut self, offset: u64) -> Result<(), PickleError> {
        let (arguments, class) = (self.pop(offset)?, self.pop(offset)?);
        match (&self.values[class], &self.values[arguments]) {
            (Value::Global(Global::QuantizedWeight), Value::Tuple(arguments)) if arguments.is_empty() => {
                self.push(offset, Value::Quantized(None))
            }
            _ => Err(self.error(offset, "QuantizedWeight8bit without arguments", "another object")),
        }
    }

    fn reduce(&mut self, offset: u64) -> Result<(), PickleError> {
        let (arguments, callable) = (self.pop(offset)?, self.pop(offset)?);
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return Err(self.error(offset, "a tuple of arguments", "another value"));
        };
        let arguments: Vec<&Value> = arguments.iter().map(|id| &self.values[*id]).collect();
        let made = match (&self.values[callable], &arguments[..]) {
            (
                Value::Global(Global::Reconstruct),
                [Value::Global(Global::NdArray), Value::Tuple(shape), Value::Bytes { length: 1, .. }],
            ) if matches!(shape[..], [only] if matches!(self.values[only], Value::Int(0))) => Some(Value::Array(None)),
            (Value::Global(Global::NumpyDtype), [code, Value::Bool(false), Value::Bool(true)]) => match code {
                Value::Text(code) if code == "f4" => Some(Value::Dtype(Dtype::F32, false)),
                Value::Text(code) if code == "i1" => Some(Value::Dtype(Dtype::I8, false)),
                Value::Global(Global::Bfloat16) => Some(Value::Dtype(Dtype::Bf16, false)),
                Value::Text(code) => {
                    return Err(self.error(offset, "dtype f4, i1 or bfloat16", format!("dtype {code:?}")));
                }
                _ => None,
            },
            _ => None,
        };
        match made {
            Some(value) => self.push(offset, value),
            None => Err(self.error(offset, "an array or a dtype to be made", "another call")),
        }
    }

    fn build(&mut self, offset: u64) -> Result<(), PickleError> {
        let state = self.pop(offset)?;
        let Some(&object) = self.stack.last() else { return Err(self.error(offset, "an object on the stack", "none")) };
        let built = match (&self.values[object], &self.values[state]) {
            (Value::Dtype(dtype, false), Value::Tuple(state)) => self.built_dtype(offset, *dtype, state)?,
            (Value::Array(None), Value::Tuple(state)) => self.built_array(offset, state)?,
            (Value::Quantized(None), Value::Dict(state)) => self.built_quantized(state),
            _ => None,
        };
        match built {
            Some(value) => {
                self.values[object] = value;
                Ok(())
            }
            None => Err(self.error(offset, "the state of an array, a dtype or a quantised weight", "another state")),
        }
    }

    /// The Nones are what makes a dtype a plain number: no inner array, no names, no fields.
    fn built_dtype(&self, offset: u64, dtype: Dtype, state: &[Id]) -> Result<Option<Value>, PickleError> {
        let state: Vec<&Value> = state.iter().map(|id| &self.values[*id]).collect();
        let [
            Value::Int(3),
            Value::Text(order),
            Value::None,
            Value::None,
            Value::None,
            Value::Int(_),
            Value::Int(_),
            Value::Int(_),
        ] = state[..]
        else {
            return Ok(None);
        };
        let wanted = if dtype == Dtype::I8 { "|" } else { "<" };
        if order != wanted {
            return Err(self.error(offset, format!("byte order {wanted:?} of {dtype:?}"), format!("{order:?}")));
        }
        Ok(Some(Value::Dtype(dtype, true)))
    }

    fn built_array(&self, offset: u64, state: &[Id]) -> Result<Option<Value>, PickleError> {
        let state: Vec<&Value> = state.iter().map(|id| &self.values[*id]).collect();
        let [
            Value::Int(1),
            Value::Tuple(shape),
            Value::Dtype(dtype, true),
            Value::Bool(fortran),
            Value::Bytes { offset: begin, length },
        ] = state[..]
        else {
            return Ok(None);
        };
        if *fortran {
            return Err(self.error(offset, "an array in C order", "one in Fortran order"));
        }
        if shape.len() > MOST_DIMENSIONS {
            return Err(self.error(offset, format!("at most {MOST_DIMENSIONS} dimensions"), shape.len().to_string()));
        }
        let mut sizes = Vec::with_capacity(shape.len());
        for id in shape {
            match self.values[*id] {
                Value::Int(size) if size >= 0 => sizes.push(size as u64),
                _ => return Err(self.error(offset, "sizes in the shape", "other values")),
            }
        }
        let needed = sizes.iter().try_fold(dtype.bytes(), |bytes, size| bytes.checked_mul(*size));
        if needed != Some(*length) {
            let expected =
                needed.map_or("a shape that fits a file".to_owned(), |needed| format!("{needed} bytes for {sizes:?}"));
            return Err(self.error(offset, expected, format!("{length} bytes")));
        }
        Ok(Some(Value::Array(Some(Array { shape: sizes, dtype: *dtype, offset: *begin }))))
    }

    fn built_quantized(&self, state: &[(Id, Id)]) -> Option<Value> {
        let [(weight_key, weight), (scales_key, scales)] = state else { return None };
        let key = |id: &Id, name: &str| matches!(&self.values[*id], Value::Text(text) if text == name);
        let (Value::Array(Some(weight)), Value::Array(Some(scales))) = (&self.values[*weight], &self.values[*scales])
        else {
            return None;
        };
        let good = key(weight_key, "weight") && key(scales_key, "scales");
        good.then(|| Value::Quantized(Some((weight.clone(), scales.clone()))))
    }

    fn set_items(&mut self, offset: u64) -> Result<(), PickleError> {
        let items = self.take_to_mark(offset)?;
        let pairs: Vec<(Id, Id)> = items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        if items.len() % 2 != 0 {
            return Err(self.error(offset, "keys and values in pairs", format!("{} items", items.len())));
        }
        match self.stack.last().map(|id| &mut self.values[*id]) {
            Some(Value::Dict(dict)) if dict.len() + pairs.len() <= MOST_VALUES => {
                dict.extend(pairs);
                Ok(())
            }
            _ => Err(self.error(offset, "a dictionary on the stack", "another value")),
        }
    }

    fn stop(&mut self, offset: u64) -> Result<Tensor, PickleError> {
        if self.input.at != self.input.file.length() {
            let rest = self.input.file.length() - self.input.at;
            return Err(self.error(self.input.at, "the end of the file", format!("{rest} further bytes")));
        }
        if self.stack.len() != 1 || !self.marks.is_empty() {
            return Err(self.error(offset, "one value at the end", format!("{}", self.stack.len())));
        }
        match &self.values[self.stack[0]] {
            Value::Array(Some(weight)) => Ok(Tensor { weight: weight.clone(), scales: None }),
            Value::Quantized(Some((weight, scales))) => {
                Ok(Tensor { weight: weight.clone(), scales: Some(scales.clone()) })
            }
            _ => Err(self.error(offset, "an array or a quantised weight", "another value")),
        }
    }
}
