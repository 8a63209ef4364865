//! Programs in pickle's language that no checkpoint contains: foreign functions, foreign instructions, known ones misused.

use super::{build::Pickle, hostile_pickles::norm};

/// A pickle that must be refused.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) file: Vec<u8>,
    /// What the message must say.
    pub(super) wanted: &'static str,
}

pub(super) fn case(name: impl Into<String>, file: Vec<u8>, wanted: &'static str) -> Case {
    Case { name: name.into(), file, wanted }
}

/// Functions that real attacks call, each on a command that would leave a mark.
pub(super) fn calls(command: &str) -> Vec<Case> {
    let names = [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("os", "execv"),
        ("os", "popen"),
        ("subprocess", "Popen"),
        ("subprocess", "check_output"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "compile"),
        ("builtins", "open"),
        ("builtins", "__import__"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("importlib", "import_module"),
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "ndarray.tofile"),
        ("numpy", "dtype.__reduce__"),
        ("Numpy", "ndarray"),
        ("torch", "load"),
        ("pickle", "loads"),
        ("_pickle", "loads"),
        ("codecs", "decode"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("shutil", "rmtree"),
        ("socket", "create_connection"),
        ("ctypes", "CDLL"),
        ("runpy", "_run_code"),
        ("pty", "spawn"),
        ("timeit", "timeit"),
        ("webbrowser", "open"),
        ("types", "CodeType"),
        ("__main__", "os.system"),
        ("__main__", "QuantizedWeight8bit.__init__"),
        ("", ""),
        ("os\n", "system\u{1b}[2J"),
    ];
    let call = |(module, name): (&str, &str)| {
        let file = Pickle::new().global(module, name).text(command).op(0x85).op(b'R').done();
        case(format!("{module}.{name}"), file, "a name that checkpoints use")
    };
    names.into_iter().map(call).collect()
}

/// Instructions of pickle that no checkpoint has, each with operands that Python would accept.
pub(super) fn instructions() -> Vec<Case> {
    let names: &[(&str, &[u8])] = &[
        ("GLOBAL", b"cos\nsystem\n"),
        ("INST", b"(ios\nsystem\n"),
        ("OBJ", b"(o"),
        ("EXT1", b"\x82\x01"),
        ("EXT2", b"\x83\x01\x00"),
        ("EXT4", b"\x84\x01\x00\x00\x00"),
        ("PERSID", b"Pname\n"),
        ("BINPERSID", b"NQ"),
        ("NEWOBJ_EX", b"NNN\x92"),
        ("BINUNICODE", b"X\x01\x00\x00\x00a"),
        ("BINUNICODE8", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"),
        ("BINBYTES8", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"),
        ("BYTEARRAY8", b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f"),
        ("NEXT_BUFFER", b"\x97"),
        ("READONLY_BUFFER", b"N\x98"),
        ("LONG1", b"\x8a\x01\x01"),
        ("LONG4", b"\x8b\xff\xff\xff\x7f"),
        ("LONG", b"L1L\n"),
        ("INT", b"I1\n"),
        ("FLOAT", b"F1.5\n"),
        ("BINFLOAT", b"G\x3f\xf0\x00\x00\x00\x00\x00\x00"),
        ("STRING", b"S'a'\n"),
        ("BINSTRING", b"T\x01\x00\x00\x00a"),
        ("SHORT_BINSTRING", b"U\x01a"),
        ("UNICODE", b"Va\n"),
        ("DUP", b"N2"),
        ("POP", b"N0"),
        ("POP_MARK", b"(1"),
        ("APPEND", b"]Na"),
        ("APPENDS", b"](Ne"),
        ("LIST", b"(l"),
        ("EMPTY_LIST", b"]"),
        ("DICT", b"(d"),
        ("SETITEM", b"}NNs"),
        ("EMPTY_SET", b"\x8f"),
        ("ADDITEMS", b"\x8f(N\x90"),
        ("FROZENSET", b"(\x91"),
        ("PUT", b"Np0\n"),
        ("BINPUT", b"Nq\x00"),
        ("LONG_BINPUT", b"Nr\xff\xff\xff\xff"),
        ("GET", b"g0\n"),
        ("LONG_BINGET", b"j\xff\xff\xff\xff"),
        ("PROTO again", b"\x80\x04"),
        ("no instruction", b"\x00"),
    ];
    names.iter().map(|(name, code)| case(*name, Pickle::new().raw(code).done(), "opcode 0x")).collect()
}

/// Programs that misuse the known instructions.
pub(super) fn programs() -> Vec<Case> {
    let (good, norm) = (|| Pickle::new().array(&norm()), norm());
    let unknown_class = Pickle::new().bare_quantised();
    let ten_nones: &[u8] = b"NNNNNNNNNN";
    vec![
        case(
            "quantised with arguments",
            Pickle::new().global("__main__", "QuantizedWeight8bit").raw(b"N\x85\x81").done(),
            "without arguments",
        ),
        case(
            "quantised called",
            Pickle::new().global("__main__", "QuantizedWeight8bit").raw(b")R").done(),
            "another call",
        ),
        case("quantised twice", unknown_class.clone().raw(b")\x81").done(), "without arguments"),
        case("new ndarray", Pickle::new().global("numpy", "ndarray").raw(b")\x81").done(), "without arguments"),
        case("quantised without state", unknown_class.clone().done(), "an array or a quantised weight"),
        case("quantised with a tuple", unknown_class.clone().raw(b")b").done(), "another state"),
        case("quantised with nothing in it", unknown_class.clone().raw(b"}b").done(), "another state"),
        case(
            "quantised with __reduce__",
            unknown_class.raw(b"}(").text("__reduce__").array(&norm).raw(b"ub").done(),
            "another state",
        ),
        case("state of a dictionary", Pickle::new().raw(b"}}b").done(), "another state"),
        case("state of a tuple", Pickle::new().raw(b")}b").done(), "another state"),
        case("state of a class", Pickle::new().global("numpy", "ndarray").raw(b"}b").done(), "another state"),
        case("state without an object", Pickle::new().raw(b"}b").done(), "an object on the stack"),
        case("array without state", Pickle::new().bare_array().done(), "an array or a quantised weight"),
        case("array with two states", good().raw(b"(").int(1).raw(b"tb").done(), "another state"),
        case("a dtype alone", Pickle::new().dtype("f4", "<").done(), "an array or a quantised weight"),
        case("a class alone", Pickle::new().global("numpy", "dtype").done(), "an array or a quantised weight"),
        case("None alone", Pickle::new().raw(b"N").done(), "an array or a quantised weight"),
        case("two arrays", good().array(&norm).done(), "one value at the end"),
        case("nothing", Pickle::new().done(), "one value at the end"),
        case("an open mark", Pickle::new().raw(b"(").array(&norm).done(), "one value at the end"),
        case(
            "reconstruct without arguments",
            Pickle::new().global("numpy.core.multiarray", "_reconstruct").raw(b")R").done(),
            "another call",
        ),
        case(
            "reconstruct of another class",
            Pickle::new()
                .global("numpy.core.multiarray", "_reconstruct")
                .global("numpy", "dtype")
                .int(0)
                .raw(b"\x85C\x01b\x87R")
                .done(),
            "another call",
        ),
        case(
            "reconstruct of a size",
            Pickle::new()
                .global("numpy.core.multiarray", "_reconstruct")
                .global("numpy", "ndarray")
                .int(1 << 30)
                .raw(b"\x85C\x01b\x87R")
                .done(),
            "another call",
        ),
        case(
            "arguments that are no tuple",
            Pickle::new().global("numpy", "dtype").raw(b"}R").done(),
            "a tuple of arguments",
        ),
        case("a call of None", Pickle::new().raw(b"N)R").done(), "another call"),
        case("dtype of an object", Pickle::new().bare_dtype("O8").done(), "dtype \"O8\""),
        case("dtype f8", Pickle::new().bare_dtype("f8").done(), "dtype \"f8\""),
        case("dtype u1", Pickle::new().bare_dtype("u1").done(), "dtype \"u1\""),
        case("dtype of fields", Pickle::new().bare_dtype("V4").done(), "dtype \"V4\""),
        case(
            "dtype of a class",
            Pickle::new().global("numpy", "dtype").global("numpy", "ndarray").raw(b"\x89\x88\x87R").done(),
            "another call",
        ),
        case(
            "dtype that copies",
            Pickle::new().global("numpy", "dtype").text("f4").raw(b"\x88\x88\x87R").done(),
            "another call",
        ),
        case("big-endian floats", Pickle::new().dtype("f4", ">").done(), "byte order \"<\""),
        case("native byte order", Pickle::new().dtype("f4", "=").done(), "byte order \"<\""),
        case("bytes with an order", Pickle::new().dtype("i1", "<").done(), "byte order \"|\""),
        case("big-endian bf16", Pickle::new().dtype("bfloat16", ">").done(), "byte order \"<\""),
        case(
            "dtype with an inner array",
            Pickle::new()
                .bare_dtype("f4")
                .raw(b"(")
                .int(3)
                .text("<")
                .raw(b")NN")
                .int(-1)
                .int(-1)
                .int(0)
                .raw(b"tb")
                .done(),
            "another state",
        ),
        case(
            "dtype with names",
            Pickle::new()
                .bare_dtype("f4")
                .raw(b"(")
                .int(3)
                .text("<")
                .raw(b"N)N")
                .int(-1)
                .int(-1)
                .int(0)
                .raw(b"tb")
                .done(),
            "another state",
        ),
        case(
            "dtype of version 4",
            Pickle::new()
                .bare_dtype("f4")
                .raw(b"(")
                .int(4)
                .text("<")
                .raw(b"NNN")
                .int(-1)
                .int(-1)
                .int(0)
                .raw(b"tb")
                .done(),
            "another state",
        ),
        case(
            "dtype without byte order",
            Pickle::new()
                .bare_array()
                .op(b'(')
                .int(1)
                .shape(&[8])
                .bare_dtype("f4")
                .op(0x89)
                .bytes(&[0; 32])
                .raw(b"tb")
                .done(),
            "another state",
        ),
        case(
            "array of version 2",
            Pickle::new()
                .bare_array()
                .op(b'(')
                .int(2)
                .shape(&[8])
                .dtype("f4", "<")
                .op(0x89)
                .bytes(&[0; 32])
                .raw(b"tb")
                .done(),
            "another state",
        ),
        case(
            "array whose bytes are a text",
            Pickle::new()
                .bare_array()
                .op(b'(')
                .int(1)
                .shape(&[1])
                .dtype("f4", "<")
                .op(0x89)
                .text("abcd")
                .raw(b"tb")
                .done(),
            "another state",
        ),
        case(
            "shape with a text",
            Pickle::new()
                .bare_array()
                .op(b'(')
                .int(1)
                .op(b'(')
                .text("8")
                .op(b't')
                .dtype("f4", "<")
                .op(0x89)
                .bytes(&[0; 32])
                .raw(b"tb")
                .done(),
            "sizes in the shape",
        ),
        case("memo flood", Pickle::new().op(b'N').repeat(3000, b"\x94").done(), "at most 1024 remembered"),
        case("recall of nothing", Pickle::new().raw(b"h\x00").done(), "0 remembered values"),
        case("recall of what comes later", Pickle::new().raw(b"N\x94h\x01N\x94").done(), "1 remembered values"),
        case("memo of nothing", Pickle::new().raw(b"\x94").done(), "a value on the stack"),
        case("recall bomb", Pickle::new().op(b'N').op(0x94).repeat(3000, b"h\x00").done(), "at most 1024 values"),
        case("a tuple of tuples of tuples", Pickle::new().op(b')').repeat(5000, &[0x85]).done(), "at most 1024 values"),
        case(
            "a thousand laughs",
            Pickle::new().op(b')').repeat(400, b"\x94h\x00h\x00\x87h\x00\x86").done(),
            "expected",
        ),
        case(
            "doubling tuples",
            (0..=255_u8)
                .fold(Pickle::new().op(b')').op(0x94), |pickle, i| pickle.raw(&[b'h', i, b'h', i, 0x86, 0x94]))
                .done(),
            "one value at the end",
        ),
        case("mark bomb", Pickle::new().repeat(100_000, b"(").done(), "at most 1024 marks"),
        case("value bomb", Pickle::new().repeat(10_000, ten_nones).done(), "at most 1024 values"),
        case(
            "frames for ever",
            Pickle::new().repeat(5000, &[0x95, 0, 0, 0, 0, 0, 0, 0, 0]).done(),
            "at most 2048 instructions",
        ),
        case("tuple without a mark", Pickle::new().raw(b"Nt").done(), "a mark on the stack"),
        case("items without a mark", Pickle::new().raw(b"}NNu").done(), "a mark on the stack"),
        case("items in no dictionary", Pickle::new().raw(b")(NNu").done(), "a dictionary on the stack"),
        case("items in nothing", Pickle::new().raw(b"(NNu").done(), "a dictionary on the stack"),
        case("a key without a value", Pickle::new().raw(b"}(Nu").done(), "in pairs"),
        case("items below a mark", Pickle::new().raw(b"N(\x85").done(), "a value on the stack"),
        case("a name from nothing", Pickle::new().raw(b"\x93").done(), "a value on the stack"),
        case("a name of numbers", Pickle::new().raw(b"NN\x93").done(), "a module and a name"),
        case("a text that is no text", Pickle::new().raw(b"\x8c\x02\xff\xfe").done(), "UTF-8"),
        case("a dictionary that grows", Pickle::new().op(b'}').repeat(400, b"(NNNNu").done(), "at most 1024 values"),
        case("protocol 0", b"cos\nsystem\n(S'true'\ntR.".to_vec(), "begins with 0x80"),
        case("protocol 2", b"\x80\x02N.".to_vec(), "protocol 2"),
        case("protocol 255", b"\x80\xffN.".to_vec(), "protocol 255"),
        case("a text file", b"hello, world\n".to_vec(), "begins with 0x80"),
        case("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03".to_vec(), "found 0x1f"),
        case("zip", b"PK\x03\x04\x14\x00\x00\x00\x08\x00".to_vec(), "found 0x50"),
        case("zeros", vec![0; 4096], "found 0x00"),
        case("an empty file", Vec::new(), "the end of the file at 0"),
        case("one byte", vec![0x80], "the end of the file at 1"),
        case("bytes after the end", [good().done(), b"x".to_vec()].concat(), "1 further bytes"),
        case("a second pickle after the first", [good().done(), good().done()].concat(), "further bytes"),
        case(
            "a frame past the end",
            Pickle::new().raw(&[0x95, 255, 255, 0, 0, 0, 0, 0, 0]).array(&norm).done(),
            "a frame within the file",
        ),
        case(
            "a frame of 2^64 - 1",
            Pickle::new().raw(&[0x95]).raw(&[255; 8]).array(&norm).done(),
            "a frame within the file",
        ),
    ]
}
