//! The GPU backend held to the references of all operations, cut into shards, and its own promises.
//!
//! `GPU_REQUIRED=1` makes a missing adapter fail; else tests say that they are skipped. `GPU_NAME` picks an adapter by name.

use std::time::Duration;

use grokpipe_model::{BlockType, Format, Layout};

use super::{
    GpuBackend, GpuChoice, GpuOptions,
    adapters::gpu_adapters,
    failure::Patience,
    pipelines::Kernel,
    probe,
    shaders::{self, Lanes},
};
use crate::{
    AttentionParams, Backend, KV_BLOCK_TOKENS, KernelError, Precision, check_batch_invariance,
    ops::{
        self,
        testing::{
            Random, TestMatrix, check_rows_in_chunks, compare_bits, download, one_sequence, seed, single_tokens, upload,
        },
    },
};

fn choice() -> GpuChoice {
    std::env::var("GPU_NAME").map_or(GpuChoice::Best, GpuChoice::Named)
}

/// A backend whose shards have at most `shard_bytes`, or `None` where there is no adapter.
pub(super) fn open(shard_bytes: Option<u64>) -> Option<GpuBackend> {
    open_with(&GpuOptions { max_shard_bytes: shard_bytes, ..GpuOptions::default() })
}

pub(super) fn open_with(options: &GpuOptions) -> Option<GpuBackend> {
    match GpuBackend::open_with(&choice(), options) {
        Ok(backend) => Some(backend),
        Err(error @ KernelError::NoDevice { .. }) => {
            assert!(std::env::var_os("GPU_REQUIRED").is_none(), "a GPU is required: {error}");
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

macro_rules! held_to_the_reference {
    ($($name:ident: $check:path;)*) => {
        $(
            #[test]
            fn $name() {
                if let Some(mut backend) = open(None) {
                    $check(&mut backend);
                }
            }
        )*
    };
}

held_to_the_reference! {
    rms_norm_keeps_to_the_reference: ops::rms_norm::tests::check;
    matmul_keeps_to_the_reference: ops::matmul::tests::check;
    attention_keeps_to_the_reference: ops::attention::tests::check;
    chunks_and_places_of_keys_do_not_show: ops::attention::tests::check_chunks;
    router_keeps_to_the_reference: ops::moe_router::tests::check;
    gated_gelu_keeps_to_the_reference: ops::gated_gelu::tests::check;
    gates_of_fifty_are_finite: ops::gated_gelu::tests::check_extremes;
    expert_down_keeps_to_the_reference: ops::expert_down::tests::check;
    gather_copies_rows: ops::gather::tests::check;
}

#[test]
fn one_row_alone_and_among_thirty_three_has_the_same_bits() {
    if let Some(mut backend) = open(None) {
        assert_eq!(check_batch_invariance(&mut backend).unwrap().difference, None);
    }
}

/// All that an expert layer computes from `x`, and a product of `x` with a float matrix as a head has it.
fn expert_layer(
    backend: &mut GpuBackend,
    seed: u64,
    format: Format,
    (hidden, ffn): (usize, usize),
    rows: usize,
) -> Vec<f32> {
    let layout = if matches!(format, Format::Blocks(_)) { Layout::OutIn } else { Layout::InOut };
    let mut random = Random::new(seed);
    let random = &mut random;
    let x = random.floats(rows * hidden, 2.0);
    let matrix = |random: &mut Random, shape, format, layout| TestMatrix::random(random, shape, format, layout);
    let router = matrix(random, (1, hidden, 8), Format::F32, Layout::InOut);
    let [gate, up] = [(); 2].map(|()| matrix(random, (8, hidden, ffn), format, layout));
    let down = matrix(random, (8, ffn, hidden), format, layout);
    let head = matrix(random, (1, hidden, 301), Format::F32, Layout::OutIn);
    let mut load = |matrix: &TestMatrix| backend.load_matrix(matrix, &mut |_| ()).unwrap();
    let (router, gate, up, down, head) = (load(&router), load(&gate), load(&up), load(&down), load(&head));
    let input = upload(backend, &single_tokens(rows), hidden, &x);
    let mut selection = backend.selection(rows, 2).unwrap();
    let mut inner = backend.activations(rows * 2, ffn).unwrap();
    let mut out = backend.activations(rows, hidden).unwrap();
    let mut logits = backend.activations(rows, 301).unwrap();
    backend.route(&input, &router, &mut selection);
    backend.expert_gate_up(&input, &selection, &gate, &up, &mut inner);
    backend.expert_down(&inner, &selection, &down, &mut out);
    backend.matmul(&out, &head, 0.5, &mut logits);
    download(backend, &logits, rows)
}

/// Each way in which a format is held and may be cut: f32, int8 with padded groups, and blocks with every kind of scales.
const CUT: [Format; 7] = [
    Format::F32,
    Format::Int8 { groups: 1 },
    Format::Int8 { groups: 8 },
    Format::Blocks(BlockType::Bf16),
    Format::Blocks(BlockType::Q4_0),
    Format::Blocks(BlockType::Q4K),
    Format::Blocks(BlockType::Q6K),
];

/// A software adapter runs the kernels of hardware, whose threads share sums, as slowly as its own: they must not show.
#[test]
fn sums_that_threads_share_do_not_show() {
    for precision in [Precision::Exact, Precision::Fast] {
        let options = |share_sums| GpuOptions { precision, share_sums: Some(share_sums), ..GpuOptions::default() };
        let (Some(mut alone), Some(mut shared)) = (open_with(&options(false)), open_with(&options(true))) else {
            return;
        };
        // Floats, groups with filling, and blocks.
        for format in [Format::F32, Format::Int8 { groups: 8 }, Format::Blocks(BlockType::Q4K)] {
            let sizes = if matches!(format, Format::Blocks(_)) { (256, 512) } else { (96, 264) };
            for rows in [1, 9] {
                let want = expert_layer(&mut alone, 5, format, sizes, rows);
                let got = expert_layer(&mut shared, 5, format, sizes, rows);
                compare_bits("expert layer", &(precision, format, rows), "sliced", 5, &got, &want);
            }
        }
    }
}

/// A backend that reduces through memory and one that does so within subgroups; `None` where there is no adapter with these.
fn with_and_without_subgroups() -> Option<[GpuBackend; 2]> {
    let options = |subgroups| GpuOptions { subgroups: Some(subgroups), ..GpuOptions::default() };
    let backends = [open_with(&options(false))?, open_with(&options(true))?];
    assert_eq!(backends[0].lanes, Lanes::Memory);
    if backends[1].lanes == Lanes::Subgroups {
        return Some(backends);
    }
    assert!(!super::device::open(&choice(), &GpuOptions::default()).unwrap().has_subgroups, "the probe refuses them");
    println!("skipped: the adapter has no subgroups of eight threads");
    None
}

#[test]
fn norms_by_subgroups_have_the_same_bits() {
    let Some([mut memory, mut subgroups]) = with_and_without_subgroups() else { return };
    let seed = seed(41);
    let mut random = Random::new(seed);
    for (rows, width) in [(1, 1), (2, 7), (65, 64), (3, 127), (5, 128), (1, 129), (33, 768), (1, 1000), (2, 6144)] {
        let [x, residual] = [(); 2].map(|()| random.floats(rows * width, 3.0));
        let weight = random.floats(width, 2.0);
        let run = |backend: &mut GpuBackend| {
            let weight = backend.load_vector(&weight).unwrap();
            let mut sum = upload(backend, &single_tokens(rows), width, &residual);
            let x = upload(backend, &single_tokens(rows), width, &x);
            let mut out = backend.activations(rows, width).unwrap();
            backend.rms_norm(1e-5, &x, &weight, &mut out);
            backend.rms_norm_add(1e-5, &out, &weight, &mut sum);
            backend.finish(&[(&out, rows), (&sum, rows)]).unwrap().concat()
        };
        let (want, got) = (run(&mut memory), run(&mut subgroups));
        compare_bits("rms_norm", &(rows, width), "subgroups", seed, &got, &want);
    }
}

#[test]
fn attention_by_subgroups_has_the_same_bits() {
    let Some([mut memory, mut subgroups]) = with_and_without_subgroups() else { return };
    let seed = seed(42);
    let mut random = Random::new(seed);
    // Of some, no key may be attended to.
    for (tokens, kv_heads, head_dim, step) in
        [(1, 1, 2, 2), (13, 1, 16, 1), (128, 2, 16, 5), (129, 1, 128, 200), (260, 2, 12, 3), (300, 1, 130, 7)]
    {
        let attended = |position: usize| !(position + 1).is_multiple_of(step);
        let (heads, multiplier) = (2 * kv_heads, 1.0 / (head_dim as f32).sqrt());
        let params = AttentionParams { heads, kv_heads, head_dim, multiplier, logit_cap: 30.0, rope_theta: 10_000.0 };
        let [q_width, kv_width] = [heads, kv_heads].map(|heads| heads * head_dim);
        let q = random.floats(tokens * q_width, 6.0);
        let [k, v] = [6.0, 2.0].map(|size| random.floats(tokens * kv_width, size));
        let blocks = tokens.div_ceil(KV_BLOCK_TOKENS) as u32;
        let run = |backend: &mut GpuBackend| {
            let mut kv = backend.kv_pool(1, blocks as usize * KV_BLOCK_TOKENS, kv_width).unwrap();
            let mut room =
                [q_width, kv_width, kv_width, q_width].map(|width| backend.activations(tokens, width).unwrap());
            let [dq, dk, dv, out] = &mut room;
            backend.begin(&one_sequence(0, tokens, blocks, attended), &mut kv).unwrap();
            for (values, to) in [(&q, &mut *dq), (&k, &mut *dk), (&v, &mut *dv)] {
                backend.write(values, to).unwrap();
            }
            backend.rope_store(&params, dq, dk, dv, &mut kv, 0);
            backend.attention(&params, dq, &kv, 0, out);
            download(backend, out, tokens)
        };
        let (want, got) = (run(&mut memory), run(&mut subgroups));
        compare_bits("attention", &(tokens, kv_heads, head_dim), "subgroups", seed, &got, &want);
    }
}

/// Broken shuffles and lanes, made by hand: a device that has such must not use them.
#[test]
fn subgroups_that_do_not_work_are_not_used() {
    let Some([mut backend, _]) = with_and_without_subgroups() else { return };
    let source = shaders::SUBGROUP_PROBE.source();
    let breaks = [
        ("subgroupShuffleXor(sum, 4u)", "sum"),
        ("subgroupShuffleXor(sum, 1u)", "subgroupShuffleXor(sum, 2u)"),
        ("subgroupShuffleXor(maximum, 2u)", "maximum"),
        ("thread.subgroup * thread.subgroup_size + thread.place", "thread.place"),
        ("thread.subgroup * thread.subgroup_size", "thread.subgroup * 2u * thread.subgroup_size"),
        // The driver refuses it.
        ("thread.subgroup_size);", "thread.none);"),
    ];
    for (whole, broken) in breaks {
        assert!(source.contains(whole), "{whole}");
        let shader = shaders::SUBGROUP_PROBE.with_text(source.replace(whole, broken));
        backend.recorder.replace(Kernel::SubgroupProbe, shader);
        assert!(!probe::subgroups_work(&mut backend.recorder, &mut backend.memory).unwrap(), "{broken}");
    }
    backend.recorder.replace(Kernel::SubgroupProbe, shaders::SUBGROUP_PROBE);
    assert!(probe::subgroups_work(&mut backend.recorder, &mut backend.memory).unwrap());
}

/// Whole numbers times a power of two are the same in any format: bits of a layer do not depend on whether gate and up are held alike.
#[test]
fn gates_and_ups_held_in_different_ways_have_the_bits_of_ones_held_alike() {
    for precision in [Precision::Exact, Precision::Fast] {
        for max_shard_bytes in [None, Some(70_000)] {
            let options = GpuOptions { precision, max_shard_bytes, ..GpuOptions::default() };
            let Some(mut backend) = open_with(&options) else { return };
            for rows in [1, 9] {
                let alike = gate_up(&mut backend, rows, Format::Int8 { groups: 8 });
                // Floats are cut at other places than bytes.
                for format in [Format::Int8 { groups: 1 }, Format::F32] {
                    let mixed = gate_up(&mut backend, rows, format);
                    let case = (precision, max_shard_bytes, rows, format);
                    compare_bits("gate and up", &case, "mixed", 7, &mixed, &alike);
                }
            }
        }
    }
}

/// Gate in this format, of whole numbers times a power of two, and up of eight scale groups. Their kernels are there before the step.
fn gate_up(backend: &mut GpuBackend, rows: usize, format: Format) -> Vec<f32> {
    let random = &mut Random::new(7);
    let int8 = Format::Int8 { groups: 8 };
    let router = TestMatrix::random(random, (1, 256, 8), Format::F32, Layout::InOut);
    let mut gate = TestMatrix::random(random, (8, 256, 130), int8, Layout::InOut);
    let up = TestMatrix::random(random, (8, 256, 130), int8, Layout::InOut);
    let x: Vec<f32> = (0..rows * 256).map(|i| if i % 32 == 0 { 127.0 } else { random.below(9) as f32 - 4.0 }).collect();
    // Small enough for what a gelu makes of them to show.
    let scale = 1.0 / 1024.0;
    gate.spec.format = format;
    gate.scales = vec![scale; gate.spec.scale_count()];
    if format == Format::F32 {
        gate.bytes = gate.bytes.iter().flat_map(|&byte| (scale * f32::from(byte as i8)).to_le_bytes()).collect();
    }
    let [router, gate, up] = [&router, &gate, &up].map(|matrix| backend.load_matrix(matrix, &mut |_| ()).unwrap());
    backend.pair_experts(&gate, &up).unwrap();
    let x = upload(backend, &single_tokens(rows), 256, &x);
    let mut selection = backend.selection(rows, 2).unwrap();
    let mut out = backend.activations(rows * 2, 130).unwrap();
    backend.route(&x, &router, &mut selection);
    let compiled = backend.recorder.compiled();
    backend.expert_gate_up(&x, &selection, &gate, &up, &mut out);
    assert_eq!(backend.recorder.compiled(), compiled);
    download(backend, &out, rows * 2)
}

#[test]
fn shards_do_not_show() {
    let Some(mut whole) = open(None) else { return };
    // One block of columns a shard, one expert in parts, some experts a shard.
    let mut cut: Vec<_> = [70_000, 150_000, 400_000].into_iter().filter_map(|bytes| open(Some(bytes))).collect();
    for format in CUT {
        let sizes = if matches!(format, Format::Blocks(_)) { (256, 256) } else { (96, 264) };
        for rows in [1, 9] {
            let want = expert_layer(&mut whole, 5, format, sizes, rows);
            for (index, backend) in cut.iter_mut().enumerate() {
                let got = expert_layer(backend, 5, format, sizes, rows);
                compare_bits("expert layer", &(format, rows, index), "shards", 5, &got, &want);
            }
        }
    }
}

#[test]
fn rows_of_every_format_alone_and_in_chunks_have_the_same_bits() {
    if let Some(mut backend) = open(None) {
        check_rows_in_chunks(&mut backend);
    }
}

#[test]
fn what_a_matrix_takes_is_known_before_it_is_loaded() {
    for shard_bytes in [None, Some(100_000)] {
        let Some(mut backend) = open(shard_bytes) else { return };
        let int8 = [1, 8].map(|groups| (Format::Int8 { groups }, (3, 88, 70)));
        let blocks = BlockType::all().map(|kind| (Format::Blocks(kind), (3, 512, 70)));
        for (format, shape) in int8.into_iter().chain([(Format::F32, (1, 35, 7))]).chain(blocks) {
            let matrix = TestMatrix::random(&mut Random::new(3), shape, format, Layout::OutIn);
            let before = backend.memory.allocated();
            let held = backend.load_matrix(&matrix, &mut |_| ()).unwrap();
            assert_eq!(backend.held_bytes(&matrix.spec), backend.memory.allocated() - before, "{format}");
            let limit = backend.memory.shard_bytes();
            let buffers = held.shards.iter().flat_map(|shard| [&shard.chunks, shard.scales()]);
            assert!(buffers.into_iter().all(|buffer| buffer.bytes() <= limit), "{format}");
        }
        // A full block of columns is held in about the bytes of the file.
        for (kind, most) in
            [(BlockType::Q4_0, 1.0), (BlockType::Q8_0, 1.0), (BlockType::Q4K, 1.06), (BlockType::Q6K, 1.32)]
        {
            let spec = TestMatrix::random(&mut Random::new(3), (1, 512, 64), Format::Blocks(kind), Layout::OutIn).spec;
            let (held, stored) = (backend.held_bytes(&spec) as f64, spec.weight_bytes() as f64);
            assert!(held <= most * stored, "{kind:?}: {held} bytes for {stored}");
        }
    }
}

#[test]
fn kernels_of_a_matrix_are_compiled_when_it_is_loaded() {
    let Some(mut backend) = open(None) else { return };
    let format = Format::Blocks(BlockType::Q4_1);
    let w = TestMatrix::random(&mut Random::new(6), (1, 64, 64), format, Layout::OutIn);
    let before = backend.recorder.compiled();
    let w = backend.load_matrix(&w, &mut |_| ()).unwrap();
    let loaded = backend.recorder.compiled();
    assert!(loaded > before);
    for rows in [1, 5] {
        let x = upload(&mut backend, &single_tokens(rows), 64, &vec![1.0; rows * 64]);
        let mut out = backend.activations(rows, 64).unwrap();
        backend.matmul(&x, &w, 1.0, &mut out);
        download(&mut backend, &out, rows);
    }
    assert_eq!(backend.recorder.compiled(), loaded);
}

#[test]
fn a_router_in_blocks_chooses_as_its_numbers_in_f32_do() {
    let Some(mut backend) = open(None) else { return };
    let random = &mut Random::new(8);
    let blocks = TestMatrix::random(random, (1, 64, 8), Format::Blocks(BlockType::Q8_0), Layout::OutIn);
    let numbers = (0..8).flat_map(|n| (0..64).map(move |k| (k, n))).map(|(k, n)| blocks.at(0, k, n) as f32);
    let mut floats = TestMatrix::random(random, (1, 64, 8), Format::F32, Layout::OutIn);
    floats.bytes = numbers.flat_map(f32::to_le_bytes).collect();
    let x = upload(&mut backend, &single_tokens(5), 64, &random.floats(5 * 64, 2.0));
    let mut chosen = |matrix: &TestMatrix| {
        let router = backend.load_router(matrix, &mut |_| ()).unwrap();
        let mut selection = backend.selection(5, 2).unwrap();
        backend.route(&x, &router, &mut selection);
        backend.read_selection(&selection, 5).unwrap()
    };
    assert_eq!(chosen(&blocks), chosen(&floats));
}

#[test]
fn a_decode_step_is_one_submission_and_a_long_one_is_cut() {
    let Some(mut backend) = open(None) else { return };
    let w = TestMatrix::random(&mut Random::new(4), (1, 64, 64), Format::Int8 { groups: 1 }, Layout::InOut);
    let w = backend.load_matrix(&w, &mut |_| ()).unwrap();
    let mut submissions = |rows: usize, work: u64| {
        let x = upload(&mut backend, &single_tokens(rows), 64, &vec![1.0; rows * 64]);
        let mut out = backend.activations(rows, 64).unwrap();
        let before = backend.recorder.submissions();
        for _ in 0..200 {
            backend.recorder.add_work(work);
            backend.matmul(&x, &w, 1.0, &mut out);
            backend.layer_done();
        }
        download(&mut backend, &out, rows);
        backend.recorder.submissions() - before
    };
    assert_eq!(submissions(1, 1 << 40), 1);
    assert_eq!(submissions(33, 1 << 40), 1);
    assert_eq!(submissions(34, 0), 1);
    assert!(submissions(34, 4_000_000_000) > 20);
}

/// No dispatch is more than a block of columns here, so that every kernel is cut wherever it may be.
#[test]
fn dispatches_that_are_cut_along_their_blocks_do_not_show() {
    let (Some(mut whole), Some(mut cut)) = (open(None), open(None)) else { return };
    let (hidden, ffn) = (256, 512);
    for format in [Format::F32, Format::Int8 { groups: 8 }, Format::Blocks(BlockType::Q4K)] {
        for rows in [1, 9, 33] {
            let a_block = (rows * 2 * 64 * ffn) as u64;
            whole.recorder.set_work_max(u64::MAX);
            let want = expert_layer(&mut whole, 5, format, (hidden, ffn), rows);
            cut.recorder.set_work_max(a_block);
            let got = expert_layer(&mut cut, 5, format, (hidden, ffn), rows);
            compare_bits("expert layer", &(format, rows), "cut", 5, &got, &want);
            let [of_whole, of_cut] = [&whole, &cut].map(|backend| backend.recorder.most_work());
            assert!(of_cut <= a_block && of_whole > a_block, "{of_cut}, {of_whole} of {a_block}");
        }
    }
}

/// Its kernel ends after seconds; the wait for it ends before.
#[test]
fn a_wait_for_a_device_that_gives_no_answer_ends_and_says_what_for() {
    let Some(mut backend) = open(None) else { return };
    let name = backend.info().name.clone();
    let text = shaders::READ_WORDS.source().replace(
        "if thread == 0u {",
        "var turns = of_threads[thread];\n    for (var turn = 0u; turn < 1000000u; turn++) { turns = turns * 1664525u + turn; }\n    \
         if thread == 0u { sums[workgroup.x] = turns; }\n    if thread == 1u {",
    );
    backend.recorder.replace(Kernel::ReadWords, shaders::READ_WORDS.with_text(text));
    backend.recorder.failure.patience = Patience { least: Duration::from_millis(1), rate: u64::MAX };
    let error = backend.measure_read_bandwidth(1 << 20).unwrap_err();
    assert!(matches!(&error, KernelError::DeviceLost { device, .. } if *device == name), "{error}");
    assert!(error.to_string().contains("did not finish what it was given within 0.001 s"), "{error}");
    // It is not asked again, and what it holds does not keep anybody.
    assert!(matches!(backend.activations(1, 1), Err(KernelError::DeviceLost { .. })));
}

#[test]
fn what_exceeds_a_binding_is_refused_and_named() {
    let Some(mut backend) = open(Some(4096)) else { return };
    let mut random = Random::new(1);
    let wide = TestMatrix::random(&mut random, (1, 1000, 64), Format::F32, Layout::InOut);
    let error = backend.load_matrix(&wide, &mut |_| ()).err().unwrap();
    assert!(matches!(error, KernelError::Limit { needed: 256_000, offered: 4096, .. }), "{error}");
    let error = backend.kv_pool(1, 1 << 20, 1024).err().unwrap();
    assert!(matches!(error, KernelError::Limit { needed: 0x1_0000_0000, .. }), "{error}");
    let error = backend.activations(usize::MAX, usize::MAX).err().unwrap();
    assert!(matches!(error, KernelError::Limit { .. }), "{error}");
}

#[test]
fn more_than_the_memory_is_refused_and_named() {
    let Some(mut backend) = open(None) else { return };
    if backend.info().memory_bytes == 0 {
        return println!("skipped: the device does not say how much memory it has");
    }
    // Nothing is touched: the device's count refuses before its memory is full.
    let width = usize::try_from(backend.memory.binding_bytes() / 4).unwrap();
    let pieces = backend.info().memory_bytes / backend.memory.binding_bytes() + 1;
    let mut held = Vec::new();
    let error = (0..pieces).find_map(|_| backend.activations(1, width).map(|x| held.push(x)).err());
    assert!(matches!(error, Some(KernelError::OutOfMemory { .. })), "{error:?}");
    drop(held);
    backend.activations(1, 1).unwrap();
}

#[test]
fn sizes_that_do_not_belong_together_are_told_by_finish() {
    let Some(mut backend) = open(None) else { return };
    let w = TestMatrix::random(&mut Random::new(2), (1, 8, 8), Format::F32, Layout::InOut);
    let w = backend.load_matrix(&w, &mut |_| ()).unwrap();
    let x = upload(&mut backend, &single_tokens(2), 7, &[0.0; 14]);
    let mut out = backend.activations(2, 8).unwrap();
    backend.matmul(&x, &w, 1.0, &mut out);
    let error = backend.finish(&[(&out, 2)]).unwrap_err();
    assert!(error.to_string().contains("expected 8 in input of test, found 7"), "{error}");
    // The device is as good as new.
    let x = upload(&mut backend, &single_tokens(2), 8, &[0.0; 16]);
    backend.matmul(&x, &w, 1.0, &mut out);
    assert_eq!(download(&mut backend, &out, 2), [0.0; 16]);
}

#[test]
fn an_infinite_input_stays_in_its_group() {
    let Some(mut backend) = open(None) else { return };
    // Groups of three: a quad's fourth input would be the next group's first, which is infinite and has weight 0 here.
    let mut w = TestMatrix::random(&mut Random::new(3), (1, 6, 4), Format::Int8 { groups: 2 }, Layout::InOut);
    w.scales[4..].fill(0.0);
    w.bytes[12..].fill(1);
    let w = backend.load_matrix(&w, &mut |_| ()).unwrap();
    let mut out = backend.activations(1, 4).unwrap();
    let mut run = |x: [f32; 6]| {
        let x = upload(&mut backend, &single_tokens(1), 6, &x);
        backend.matmul(&x, &w, 1.0, &mut out);
        download(&mut backend, &out, 1)
    };
    assert!(run([1.0, 2.0, 3.0, f32::MAX, 0.0, 0.0]).iter().all(|y| y.is_finite()));
}

#[test]
fn a_lost_device_is_an_error_and_not_a_panic() {
    let Some(mut backend) = open(None) else { return };
    let x = upload(&mut backend, &single_tokens(1), 4, &[1.0; 4]);
    backend.recorder.device.destroy();
    let error = backend.finish(&[(&x, 1)]).unwrap_err();
    assert!(matches!(error, KernelError::DeviceLost { .. }), "{error}");
    assert!(matches!(backend.activations(1, 1), Err(KernelError::DeviceLost { .. })));
}

#[test]
fn an_adapter_that_is_not_there_is_refused_with_those_there_are() {
    let there = gpu_adapters();
    for which in ["no such adapter", "99", "0f:1e.7"] {
        let error = GpuBackend::open(&GpuChoice::of(which)).err().unwrap().to_string();
        assert!(error.contains("gpu:") && error.contains(which), "{error}");
        assert!(there.iter().all(|adapter| error.contains(&format!("{}: {}", adapter.index, adapter.name))), "{error}");
    }
}

#[test]
fn measured_speeds_are_above_nothing() {
    let Some(mut backend) = open(None) else { return };
    let (bytes, flops) = (backend.measure_read_bandwidth(u64::MAX).unwrap(), backend.measure_flop_rate().unwrap());
    println!("{}: {:.2} GB/s, {:.2} GFLOP/s", backend.info().name, bytes / 1e9, flops / 1e9);
    assert!(bytes > 1e6 && flops > 1e6);
}

#[test]
fn the_devices_clock_counts_no_more_than_the_hosts() {
    let Some(mut backend) = open(None) else { return };
    assert_eq!(backend.device_seconds().unwrap(), None);
    backend.time_by_device(true);
    let matrix = TestMatrix::random(&mut Random::new(7), (1, 512, 512), Format::F32, Layout::OutIn);
    let w = backend.load_matrix(&matrix, &mut |_| ()).unwrap();
    let x = upload(&mut backend, &single_tokens(1), 512, &[0.5; 512]);
    let mut out = backend.activations(1, 512).unwrap();
    let started = std::time::Instant::now();
    backend.matmul(&x, &w, 1.0, &mut out);
    backend.finish(&[]).unwrap();
    let (found, most) = (backend.device_seconds().unwrap(), started.elapsed().as_secs_f64());
    match found {
        Some(seconds) => assert!(seconds > 0.0 && seconds <= most, "{seconds} of {most}"),
        None => println!("skipped: the device has no clock"),
    }
}
