//! Pickles that would run something, fill the memory or lie about their sizes: each is refused, by name, and nothing happens.

use super::{
    build::{ArraySpec, Pickle},
    hostile_programs::{Case, calls, case, instructions, programs},
    tiny, *,
};

pub(super) fn norm() -> ArraySpec {
    ArraySpec::f32(&[8], &[1.0; 8])
}

/// Arrays that are not what they say, put in the place of the final norm: f32 of `[8]`.
fn arrays() -> Vec<Case> {
    let file = |array: ArraySpec| Pickle::new().array(&array).done();
    let shaped = |shape: &[i32]| file(ArraySpec { shape: shape.to_vec(), ..norm() });
    let declared = |length: u32| {
        let begun = Pickle::new().bare_array().op(b'(').int(1).shape(&[8]).dtype("f4", "<").op(0x89).op(b'B');
        begun.raw(&length.to_le_bytes()).raw(&[0; 32]).raw(b"tb").done()
    };
    vec![
        case("Fortran order", file(ArraySpec { fortran: true, ..norm() }), "C order"),
        case("a size too many", shaped(&[9]), "36 bytes for [9]"),
        case("a size too few", shaped(&[7]), "28 bytes for [7]"),
        case("no size", shaped(&[]), "4 bytes for []"),
        case("size 0", shaped(&[0]), "0 bytes for [0]"),
        case("a negative size", shaped(&[-8]), "sizes in the shape"),
        case("two negative sizes", shaped(&[-2, -4]), "sizes in the shape"),
        case("sizes that overflow", shaped(&[i32::MAX, i32::MAX, i32::MAX]), "a shape that fits a file"),
        case(
            "sizes that overflow to the right length",
            shaped(&[1 << 30, 1 << 30, 1 << 2, 8]),
            "a shape that fits a file",
        ),
        case("five dimensions", shaped(&[1, 1, 1, 1, 8]), "at most 4 dimensions"),
        case("a shape of its own", shaped(&[2, 4]), "[8] of F32"),
        case("int8 for f32", file(ArraySpec::i8(&[8], &[1; 8])), "[8] of F32"),
        case("bf16 for f32", file(ArraySpec::bf16(&[8], &[1.0; 8])), "[8] of F32"),
        case(
            "quantised for f32",
            tiny::pickle(&ArraySpec::i8(&[8], &[1; 8]), Some(&ArraySpec::bf16(&[1], &[1.0]))),
            "[8] of F32",
        ),
        case("scales on f32", tiny::pickle(&norm(), Some(&ArraySpec::bf16(&[1], &[1.0]))), "no scales"),
        case("length 2^31", declared(1 << 31), "2147483648 more bytes"),
        case("length 2^32 - 1", declared(u32::MAX), "4294967295 more bytes"),
        case("length one too long", declared(33), "another state"),
        case("length to the end of the file", declared(35), "the end of the file"),
        case("NaN", file(ArraySpec::f32(&[8], &[1.0, 1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0])), "NaN at 2"),
        case("infinity", file(ArraySpec::f32(&[8], &[f32::INFINITY; 8])), "inf at 0"),
    ]
}

/// Quantised matrices that are wrong, put in the place of the attention output: i8 `[8, 8]` with bf16 scales `[2, 8]`.
fn matrices() -> Vec<Case> {
    let weight = ArraySpec::i8(&[8, 8], &[3; 64]);
    let scales = ArraySpec::bf16(&[2, 8], &[0.5; 16]);
    let with = |scales: &ArraySpec| tiny::pickle(&weight, Some(scales));
    let state = |state: &[(&str, &ArraySpec)]| Pickle::new().quantised(state).done();
    let one_bad = |bad: f32| {
        let mut values = [1.0; 16];
        values[9] = bad;
        with(&ArraySpec::bf16(&[2, 8], &values))
    };
    vec![
        case("weight and scales swapped", tiny::pickle(&scales, Some(&weight)), "[8, 8] of I8"),
        case("keys swapped", state(&[("scales", &scales), ("weight", &weight)]), "another state"),
        case("no scales in the state", state(&[("weight", &weight)]), "another state"),
        case("three entries", state(&[("weight", &weight), ("scales", &scales), ("extra", &scales)]), "another state"),
        case("weight twice", state(&[("weight", &weight), ("weight", &weight)]), "another state"),
        case("a plain array", tiny::pickle(&weight, None), "bf16 scales of [2, 8]"),
        case("floats", tiny::pickle(&ArraySpec::f32(&[8, 8], &[1.0; 64]), None), "[8, 8] of I8"),
        case("quantised floats", tiny::pickle(&ArraySpec::f32(&[8, 8], &[1.0; 64]), Some(&scales)), "[8, 8] of I8"),
        case("one scale group", with(&ArraySpec::bf16(&[1, 8], &[0.5; 8])), "bf16 scales of [2, 8]"),
        case("four scale groups", with(&ArraySpec::bf16(&[4, 8], &[0.5; 32])), "bf16 scales of [2, 8]"),
        case("scales in one row", with(&ArraySpec::bf16(&[16], &[0.5; 16])), "bf16 scales of [2, 8]"),
        case("scales transposed", with(&ArraySpec::bf16(&[8, 2], &[0.5; 16])), "bf16 scales of [2, 8]"),
        case("scales in f32", with(&ArraySpec::f32(&[2, 8], &[0.5; 16])), "F32 scales"),
        case("scales in int8", with(&ArraySpec::i8(&[2, 8], &[1; 16])), "I8 scales"),
        case(
            "a matrix transposed in shape",
            tiny::pickle(&ArraySpec::i8(&[4, 16], &[3; 64]), Some(&scales)),
            "[8, 8] of I8",
        ),
        case("a NaN scale", one_bad(f32::NAN), "NaN at 9"),
        case("an infinite scale", one_bad(f32::INFINITY), "inf at 9"),
        case("a scale of minus infinity", one_bad(f32::NEG_INFINITY), "-inf at 9"),
    ]
}

/// Most memory that the process of a hostile table may have used: the reader itself needs a few kilobytes.
const MEMORY_KIB_MOST: u64 = 64 << 10;
const MEMORY_CHECK: &str = "GROKPIPE_TEST_MEMORY";

#[test]
fn every_hostile_pickle_is_refused_and_nothing_is_run() {
    let folder = tiny::write();
    let marker = folder.path().join("marker");
    let command = format!("touch {}", marker.display());
    let output = TensorName::Layer(0, crate::LayerTensor::AttentionOutput);
    let tables = [
        (TensorName::FinalNorm, calls(&command)),
        (TensorName::FinalNorm, instructions()),
        (TensorName::FinalNorm, programs()),
        (TensorName::FinalNorm, arrays()),
        (output, matrices()),
    ];
    let mut count = 0;
    for (name, cases) in tables {
        let path = folder.path().join(tiny::file_of(&name));
        let good = std::fs::read(&path).unwrap();
        for case in cases {
            std::fs::write(&path, &case.file).unwrap();
            let error = tiny::load(folder.path()).expect_err(&case.name).to_string();
            assert_refused(&case.name, &error, case.wanted);
            assert!(error.contains(&tiny::file_of(&name)), "{}: {error}", case.name);
            assert!(!marker.exists(), "{}", case.name);
            count += 1;
        }
        std::fs::write(&path, good).unwrap();
        tiny::load(folder.path()).unwrap();
    }
    assert!(count >= 150, "{count} cases");
    if let (Ok(_), Some(used)) = (std::env::var(MEMORY_CHECK), memory_kib_max()) {
        assert!(used < MEMORY_KIB_MOST, "{used} KiB");
    }
}

/// The most memory that this process has had, where the system says so.
fn memory_kib_max() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// Other tests in the same process would blur the figure, so the table runs once more in a process of its own.
#[test]
fn hostile_pickles_take_no_memory() {
    let name = "checkpoint::tests::hostile_pickles::every_hostile_pickle_is_refused_and_nothing_is_run";
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", name]).env(MEMORY_CHECK, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn instructions_that_checkpoints_lack_are_refused_whatever_stands_before() {
    let known = b"\x95\x8c\x94h\x93)}(t\x85\x86\x87KMJCBN\x88\x89\x81Rbu.";
    for opcode in (0..=255).filter(|opcode| !known.contains(opcode)) {
        let file = Pickle::new().array(&norm()).op(opcode).raw(&[0; 16]).done();
        let error = pickle::read(&Memory(&file)).unwrap_err();
        assert_eq!(error.found, format!("opcode {opcode:#04x}"));
        assert_eq!(error.offset, file.len() as u64 - 18);
    }
}

#[test]
fn a_truncated_pickle_is_refused_at_every_length() {
    let (weight, scales) = tiny::arrays(&TensorName::Layer(0, crate::LayerTensor::MoeGate));
    for file in [tiny::pickle(&weight, scales.as_ref()), tiny::pickle(&norm(), None)] {
        for length in 0..file.len() {
            let error = pickle::read(&Memory(&file[..length])).unwrap_err();
            assert_refused(&format!("{length} bytes"), &error.to_string(), "byte");
        }
        pickle::read(&Memory(&file)).unwrap();
    }
}

#[test]
fn a_golden_truncated_at_a_kibibyte_is_refused() {
    let Some(folder) = golden("c8way") else { return };
    let file = std::fs::read(folder.join("ckpt-0/tensor00003_000")).unwrap();
    for length in (0..file.len()).step_by(1024).chain(0..300) {
        assert!(pickle::read(&Memory(&file[..length])).is_err(), "{length} bytes");
    }
    pickle::read(&Memory(&file)).unwrap();
}
