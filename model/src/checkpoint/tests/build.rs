//! Writes pickles, good and bad, one instruction at a time.

/// A pickle being written. The methods append what pickle's instructions of the same names are made of.
#[derive(Clone, Default)]
pub(crate) struct Pickle(pub(crate) Vec<u8>);

/// An array to be written.
#[derive(Clone)]
pub(crate) struct ArraySpec {
    pub(crate) code: &'static str,
    pub(crate) order: &'static str,
    pub(crate) shape: Vec<i32>,
    pub(crate) fortran: bool,
    pub(crate) bytes: Vec<u8>,
}

impl ArraySpec {
    pub(crate) fn f32(shape: &[i32], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { code: "f4", order: "<", shape: shape.to_vec(), fortran: false, bytes }
    }

    pub(crate) fn i8(shape: &[i32], values: &[i8]) -> Self {
        let bytes = values.iter().map(|value| *value as u8).collect();
        Self { code: "i1", order: "|", shape: shape.to_vec(), fortran: false, bytes }
    }

    /// Scales are given as f32 and cut to their upper halves.
    pub(crate) fn bf16(shape: &[i32], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect();
        Self { code: "bfloat16", order: "<", shape: shape.to_vec(), fortran: false, bytes }
    }
}

impl Pickle {
    /// Protocol 4 and nothing else.
    pub(crate) fn new() -> Self {
        Self(vec![0x80, 4])
    }

    pub(crate) fn op(mut self, opcode: u8) -> Self {
        self.0.push(opcode);
        self
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The same piece so many times.
    pub(crate) fn repeat(mut self, times: usize, bytes: &[u8]) -> Self {
        for _ in 0..times {
            self.0.extend_from_slice(bytes);
        }
        self
    }

    pub(crate) fn text(self, text: &str) -> Self {
        let length = u8::try_from(text.len()).expect("a short text");
        self.raw(&[0x8c, length]).raw(text.as_bytes())
    }

    pub(crate) fn global(self, module: &str, name: &str) -> Self {
        self.text(module).text(name).op(0x93)
    }

    pub(crate) fn int(self, value: i32) -> Self {
        self.op(b'J').raw(&value.to_le_bytes())
    }

    pub(crate) fn bytes(self, bytes: &[u8]) -> Self {
        let length = u32::try_from(bytes.len()).expect("less than 4 GiB");
        self.op(b'B').raw(&length.to_le_bytes()).raw(bytes)
    }

    /// The dtype before its byte order is given.
    pub(crate) fn bare_dtype(self, code: &str) -> Self {
        let dtype = self.global("numpy", "dtype");
        let code = if code == "bfloat16" { dtype.global("ml_dtypes", code) } else { dtype.text(code) };
        code.raw(&[0x89, 0x88, 0x87, b'R'])
    }

    pub(crate) fn dtype(self, code: &str, order: &str) -> Self {
        self.bare_dtype(code).op(b'(').int(3).text(order).raw(b"NNN").int(-1).int(-1).int(0).raw(b"tb")
    }

    pub(crate) fn shape(self, sizes: &[i32]) -> Self {
        sizes.iter().fold(self.op(b'('), |pickle, size| pickle.int(*size)).op(b't')
    }

    /// `_reconstruct(ndarray, (0,), b"b")`.
    pub(crate) fn bare_array(self) -> Self {
        self.global("numpy.core.multiarray", "_reconstruct")
            .global("numpy", "ndarray")
            .int(0)
            .op(0x85)
            .raw(&[b'C', 1, b'b'])
            .raw(&[0x87, b'R'])
    }

    pub(crate) fn array(self, array: &ArraySpec) -> Self {
        self.bare_array()
            .op(b'(')
            .int(1)
            .shape(&array.shape)
            .dtype(array.code, array.order)
            .op(if array.fortran { 0x88 } else { 0x89 })
            .bytes(&array.bytes)
            .raw(b"tb")
    }

    /// `QuantizedWeight8bit()` before its state is given.
    pub(crate) fn bare_quantised(self) -> Self {
        self.global("__main__", "QuantizedWeight8bit").raw(&[b')', 0x81])
    }

    pub(crate) fn quantised(self, state: &[(&str, &ArraySpec)]) -> Self {
        let begun = self.bare_quantised().raw(b"}(");
        state.iter().fold(begun, |pickle, (key, array)| pickle.text(key).array(array)).raw(b"ub")
    }

    /// With STOP: the finished file.
    pub(crate) fn done(self) -> Vec<u8> {
        self.op(b'.').0
    }
}
