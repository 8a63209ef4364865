//! The GPU backend against xAI's own code, and against itself: split, chunked, batched, with its weights cut into shards.
//!
//! `GPU_REQUIRED=1` makes a missing adapter fail; else tests say that they are skipped. `GPU_NAME` picks an adapter by name.

mod golden;

use golden::{
    Golden, NAMES, Part, check_greedy, check_logits, check_measured, check_trace, check_wanted, prompt, same_bits,
    step, table,
};
use grokpipe_kernels::{GpuBackend, GpuChoice, GpuOptions, KernelError, Stage, StageModel};

fn gpu(max_shard_bytes: Option<u64>) -> Option<GpuBackend> {
    let choice = std::env::var("GPU_NAME").map_or(GpuChoice::Best, GpuChoice::Named);
    match GpuBackend::open_with(&choice, &GpuOptions { max_shard_bytes, ..GpuOptions::default() }) {
        Ok(backend) => Some(backend),
        Err(error @ KernelError::NoDevice { .. }) => {
            assert!(std::env::var_os("GPU_REQUIRED").is_none(), "a GPU is required: {error}");
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Every golden with a device for it.
fn goldens() -> impl Iterator<Item = (Golden, GpuBackend)> {
    NAMES.iter().filter_map(|name| Some((Golden::open(name)?, gpu(None)?)))
}

#[test]
fn logits_of_every_prompt_are_xais() {
    for (golden, backend) in goldens() {
        check_logits(&golden, backend, 1e-3);
    }
}

#[test]
fn hidden_states_and_experts_of_every_layer_are_xais() {
    for (golden, backend) in goldens() {
        check_trace(&golden, backend, 1e-3);
    }
}

#[test]
fn greedy_tokens_through_the_cache_are_xais() {
    for (golden, backend) in goldens() {
        check_greedy(&golden, backend, 1e-3);
    }
}

#[test]
fn a_prompt_alone_in_chunks_and_among_others_has_the_same_bits() {
    for (golden, backend) in goldens() {
        let mut model = golden.whole(backend);
        let ids = golden.prompts.iter().max_by_key(|ids| ids.len()).unwrap();
        let other = &golden.prompts[1];
        let whole = prompt(&mut model, ids);
        for size in [1, 7] {
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
    }
}

#[test]
fn wanted_rows_have_the_same_bits_as_among_all() {
    for (golden, backend) in goldens() {
        check_wanted(&golden, backend);
    }
}

#[test]
fn measuring_the_memory_of_a_stage_leaves_no_trace() {
    let (Some(golden), Some(backend)) = (Golden::open("a4"), gpu(None)) else { return };
    check_measured(&golden, backend);
}

#[test]
fn a_model_split_into_stages_gives_the_same_bits() {
    for (golden, backend) in goldens() {
        let (ids, layers) = (&golden.prompts[1], golden.config.num_hidden_layers);
        let want = prompt(&mut golden.whole(backend), ids);
        for count in [2, 4].into_iter().filter(|&count| count <= layers) {
            let mut stages: Vec<StageModel<GpuBackend>> = (0..count)
                .filter_map(|i| Some(golden.stage(gpu(None)?, i * layers / count..(i + 1) * layers / count)))
                .collect();
            let mut stages: Vec<&mut dyn Stage> = stages.iter_mut().map(|stage| stage as &mut dyn Stage).collect();
            let got = step(&mut stages, &[Part { first: 0, ids, table: table(0) }]);
            same_bits(&format!("{} in {count} stages", golden.name), &got, &want);
        }
    }
}

#[test]
fn weights_in_small_shards_give_the_same_bits() {
    for (golden, backend) in goldens().filter(|(golden, _)| golden.name != "b64") {
        let ids = &golden.prompts[1];
        let want = prompt(&mut golden.whole(backend), ids);
        let Some(cut) = gpu(Some(32 << 10)) else { return };
        same_bits(&format!("{} in shards", golden.name), &prompt(&mut golden.whole(cut), ids), &want);
    }
}
