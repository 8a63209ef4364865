//! The CPU backend against xAI's own code, and against itself: split, chunked, batched, with other threads.

mod golden;

use std::{path::Path, sync::Arc};

use golden::{
    Golden, NAMES, Part, batch, check_greedy, check_logits, check_measured, check_trace, check_wanted, prompt,
    same_bits, step, table,
};
use grokpipe_kernels::{Backend, CpuBackend, KernelError, Precision, Row, Stage, StageModel, StageOptions, StepInput};
use grokpipe_model::Model;

fn cpu(threads: usize) -> CpuBackend {
    CpuBackend::new(threads, Precision::Exact).expect("threads can be started")
}

#[test]
fn logits_of_every_prompt_are_xais() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        check_logits(&golden, cpu(2), 2e-4);
    }
}

#[test]
fn hidden_states_and_experts_of_every_layer_are_xais() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        check_trace(&golden, cpu(1), 1e-3);
    }
}

#[test]
fn greedy_tokens_through_the_cache_are_xais() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        check_greedy(&golden, cpu(1), 2e-4);
    }
}

#[test]
fn a_prompt_alone_in_chunks_and_among_others_has_the_same_bits() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        let mut model = golden.whole(cpu(1));
        let ids = golden.prompts.iter().max_by_key(|ids| ids.len()).unwrap();
        let other = &golden.prompts[1];
        let whole = prompt(&mut model, ids);
        for size in [1, 7, 16] {
            let mut chunked = Vec::new();
            for (index, chunk) in ids.chunks(size).enumerate() {
                let part = Part { first: index * size, ids: chunk, table: table(1) };
                chunked.extend(step(&mut [&mut model], &[part]));
            }
            same_bits(&format!("{} in chunks of {size}", golden.name), &chunked, &whole);
        }
        let parts = [Part { first: 0, ids: other, table: table(2) }, Part { first: 0, ids, table: table(0) }];
        let among = step(&mut [&mut model], &parts);
        same_bits(&format!("{} among others", golden.name), &among[other.len() * golden.config.vocab_size..], &whole);
        let first = &among[..other.len() * golden.config.vocab_size];
        same_bits(&format!("{}, the other", golden.name), first, &prompt(&mut model, other));
    }
}

#[test]
fn one_two_and_three_threads_give_the_same_bits() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        let ids = &golden.prompts[1];
        let want = prompt(&mut golden.whole(cpu(1)), ids);
        for threads in [2, 3] {
            let got = prompt(&mut golden.whole(cpu(threads)), ids);
            same_bits(&format!("{} with {threads} threads", golden.name), &got, &want);
        }
    }
}

/// Nodes of one fingerprint continue each other's sequences, whatever their CPUs and systems are. So where a bit of these changes, the
/// fingerprint must. The demo's weights are int8; other formats are compared between the paths of one CPU.
#[test]
fn logits_of_the_demo_have_the_bits_that_their_fingerprint_stands_for() {
    let demo = Arc::new(Model::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo")).unwrap());
    let config = demo.config().clone();
    for (precision, fingerprint, expected) in [
        (Precision::Exact, "cpu-exact/2", 0x9fb8_51a5_394d_8acf),
        (Precision::Fast, "cpu-fast/3", 0xb397_e912_0baa_e180),
    ] {
        let backend = CpuBackend::new(1, precision).unwrap();
        assert_eq!(backend.info().fingerprint, fingerprint);
        let options = StageOptions { kv_blocks: 24, max_rows: 64, head: true, logit_rows: 5 };
        let layers = 0..config.num_hidden_layers;
        let mut model = StageModel::load(backend, &config, demo.clone(), layers, options, &mut |_, _| ()).unwrap();
        let ids: Vec<u32> = (0..60).map(|i| i * 7 % config.vocab_size as u32).collect();
        let bytes = prompt(&mut model, &ids).into_iter().flat_map(f32::to_le_bytes);
        // FNV-1a
        let found =
            bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(found, expected, "{fingerprint}: {found:#018x}");
    }
}

#[test]
fn wanted_rows_have_the_same_bits_as_among_all() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        check_wanted(&golden, cpu(2));
    }
}

#[test]
fn measuring_the_memory_of_a_stage_leaves_no_trace() {
    let Some(golden) = Golden::open("a4") else { return };
    check_measured(&golden, cpu(2));
}

#[test]
fn a_model_split_into_stages_gives_the_same_bits() {
    for golden in NAMES.iter().filter_map(|name| Golden::open(name)) {
        let (ids, layers) = (&golden.prompts[1], golden.config.num_hidden_layers);
        let want = prompt(&mut golden.whole(cpu(1)), ids);
        for count in [1, 2, 4, 7].into_iter().filter(|&count| count <= layers) {
            let mut stages: Vec<StageModel<CpuBackend>> =
                (0..count).map(|i| golden.stage(cpu(1), i * layers / count..(i + 1) * layers / count)).collect();
            let mut stages: Vec<&mut dyn Stage> = stages.iter_mut().map(|stage| stage as &mut dyn Stage).collect();
            let got = step(&mut stages, &[Part { first: 0, ids, table: table(0) }]);
            same_bits(&format!("{} in {count} stages", golden.name), &got, &want);
        }
    }
}

#[test]
fn used_blocks_leave_no_trace_in_the_next_sequence() {
    let Some(golden) = Golden::open("a4") else { return };
    let want = prompt(&mut golden.whole(cpu(1)), &golden.prompts[2]);
    let mut model = golden.whole(cpu(1));
    // Prompt 3 has ids 0 inside: its masked slots must not stay masked.
    for used in [1, 2, 3] {
        prompt(&mut model, &golden.prompts[used]);
    }
    same_bits("a4 after other sequences", &prompt(&mut model, &golden.prompts[2]), &want);
}

/// A batch of the first two ids of a prompt, changed by `change`, is refused with a message that has `words` in it.
fn check_refusal<B: Backend>(
    model: &mut StageModel<B>,
    words: &str,
    change: impl Fn(&mut grokpipe_kernels::Batch, &mut Vec<u32>, &mut Vec<u32>),
) {
    let (mut batch, mut ids) = batch(&[Part { first: 0, ids: &[5, 6], table: vec![3] }]);
    let mut wanted = vec![0, 1];
    change(&mut batch, &mut ids, &mut wanted);
    let error = model.run(&batch, StepInput::TokenIds(&ids), &wanted).expect_err(words);
    assert!(error.to_string().contains(words), "{error} does not say {words:?}");
}

#[test]
fn a_step_that_does_not_fit_is_refused_and_named() {
    let Some(golden) = Golden::open("a4") else { return };
    let mut model = golden.whole(cpu(1));
    let row = |position, table_offset| Row { position, table_offset, attended: true };
    check_refusal(&mut model, "rows of a step", |batch, _, _| batch.rows.clear());
    check_refusal(&mut model, "expected 1 to 64", |batch, _, _| batch.rows.resize(65, row(0, 0)));
    check_refusal(&mut model, "token ids of a step", |_, ids, _| ids.truncate(1));
    check_refusal(&mut model, "512", |_, ids, _| ids[1] = 512);
    check_refusal(&mut model, "position of row 1", |batch, _, _| batch.rows[1].position = 128);
    check_refusal(&mut model, "block table of row 1", |batch, _, _| batch.rows[1].position = 16);
    check_refusal(&mut model, "block table of row 0", |batch, _, _| batch.rows[0].table_offset = u32::MAX);
    check_refusal(&mut model, "block numbers less than 24", |batch, _, _| batch.block_tables[0] = 24);
    check_refusal(&mut model, "slot 48 twice", |batch, _, _| batch.rows[1].position = 0);
    check_refusal(&mut model, "more than 1", |batch, _, _| batch.rows.swap(0, 1));
    check_refusal(&mut model, "ascending rows less than 2", |_, _, wanted| wanted.swap(0, 1));
    check_refusal(&mut model, "ascending rows less than 2", |_, _, wanted| wanted[1] = 2);
    let (batch, _) = batch(&[Part { first: 0, ids: &[5], table: vec![3] }]);
    let error = model.run(&batch, StepInput::HiddenStates(&[0.0; 64]), &[]).unwrap_err();
    assert!(error.to_string().contains("token ids, as layer 0 is here"), "{error}");
    // The stage is as good as new after all of this.
    same_bits("a4", &prompt(&mut model, &golden.prompts[1]), &prompt(&mut golden.whole(cpu(1)), &golden.prompts[1]));
}

#[test]
fn hidden_states_that_are_not_finite_are_refused_with_their_row() {
    let Some(golden) = Golden::open("a4") else { return };
    let mut model = golden.stage(cpu(1), 1..3);
    let (batch, _) = batch(&[Part { first: 0, ids: &[5, 6], table: vec![3] }]);
    let mut hidden = vec![0.5; 128];
    hidden[64] = f32::NAN;
    let error = model.run(&batch, StepInput::HiddenStates(&hidden), &[]).unwrap_err();
    assert!(matches!(error, KernelError::NotFinite { row: 1, .. }), "{error}");
}
