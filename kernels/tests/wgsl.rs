//! Every shader parses, validates and becomes a pipeline, and its parameters are as large as in Rust. Needs no GPU.

use std::{collections::HashSet, path::Path};

use grokpipe_kernels::{SHADERS, Shader, gpu_kernels};
use wgpu::{
    Features,
    naga::{
        AddressSpace, Module, ShaderStage, StorageAccess, TypeInner,
        back::pipeline_constants::process_overrides,
        front::wgsl,
        valid::{Capabilities, ValidationFlags, Validator},
    },
};

/// The folders of the files that shaders are joined with.
const SHARED: [&str; 2] = ["product", "lanes"];

/// Halves within words: Vulkan, Metal and DX12 have them always, OpenGL does not.
const CAPABILITIES: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

fn validator(capabilities: Capabilities) -> Validator {
    Validator::new(ValidationFlags::all(), capabilities)
}

fn parse(shader: &Shader) -> Module {
    let source = shader.source();
    wgsl::parse_str(&source).unwrap_or_else(|error| panic!("{}: {}", shader.name, error.emit_to_string(&source)))
}

/// What a shader may use, by the features that it names.
fn capabilities(shader: &Shader) -> Capabilities {
    let features = [
        (Features::SUBGROUP, Capabilities::SUBGROUP),
        (Features::SHADER_F16, Capabilities::SHADER_FLOAT16),
        (Features::EXPERIMENTAL_COOPERATIVE_MATRIX, Capabilities::COOPERATIVE_MATRIX),
    ];
    let named = features.into_iter().filter(|(feature, _)| shader.features().contains(*feature));
    named.fold(CAPABILITIES, |all, (_, capability)| all | capability)
}

#[test]
fn shaders_are_valid_without_capabilities_that_they_do_not_name() {
    for shader in SHADERS {
        let validated = validator(capabilities(shader)).validate(&parse(shader));
        assert!(validated.is_ok(), "{}: {:?}", shader.name, validated.err());
        let portable = validator(CAPABILITIES).validate(&parse(shader));
        assert_eq!(portable.is_ok(), shader.features().is_empty(), "{} names features for nothing", shader.name);
    }
}

#[test]
fn a_shader_that_needs_features_has_one_without_beside_it() {
    let has_portable = |name| SHADERS.iter().any(|shader| shader.name == name && shader.features().is_empty());
    for shader in SHADERS.iter().filter(|shader| shader.name != "subgroup_probe") {
        assert!(has_portable(shader.name.trim_end_matches("_cooperative")), "{}", shader.name);
    }
}

#[test]
fn every_variant_is_valid_with_its_constants() {
    for (shader, constants) in gpu_kernels() {
        let module = parse(shader);
        let info = validator(capabilities(shader)).validate(&module).unwrap();
        let values = constants.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let entry = Some((ShaderStage::Compute, shader.name));
        let made = process_overrides(&module, &info, entry, &values);
        assert!(made.is_ok(), "{} {constants:?}: {:?}", shader.name, made.err());
    }
}

#[test]
fn no_kernel_is_listed_twice() {
    let kernels = gpu_kernels();
    let different: HashSet<String> = kernels.iter().map(|kernel| format!("{kernel:?}")).collect();
    assert_eq!(different.len(), kernels.len());
}

#[test]
fn a_shader_has_one_entry_point_with_its_name() {
    for shader in SHADERS {
        let module = parse(shader);
        let entries: Vec<_> = module.entry_points.iter().map(|entry| (entry.name.as_str(), entry.stage)).collect();
        assert_eq!(entries, [(shader.name, ShaderStage::Compute)]);
    }
}

#[test]
fn parameters_have_the_same_size_in_rust() {
    for shader in SHADERS {
        let module = parse(shader);
        let (_, params) =
            module.global_variables.iter().find(|(_, variable)| variable.space == AddressSpace::Uniform).unwrap();
        let TypeInner::Struct { span, .. } = module.types[params.ty].inner else {
            panic!("{}: parameters are no struct", shader.name)
        };
        assert_eq!(span as usize, shader.params_bytes, "{}", shader.name);
    }
}

#[test]
fn bindings_run_from_parameters_to_outputs_and_fit_the_default_limits() {
    for shader in SHADERS {
        let module = parse(shader);
        let mut bindings = Vec::new();
        for (_, variable) in module.global_variables.iter() {
            let Some(binding) = &variable.binding else { continue };
            assert_eq!(binding.group, 0, "{}", shader.name);
            let written = match variable.space {
                AddressSpace::Uniform => None,
                AddressSpace::Storage { access } => Some(access.contains(StorageAccess::STORE)),
                other => panic!("{}: binding in {other:?}", shader.name),
            };
            bindings.push((binding.binding, written));
        }
        bindings.sort();
        let declared = std::iter::once(None).chain(shader.written.iter().copied().map(Some));
        let want: Vec<_> = declared.enumerate().map(|(index, written)| (index as u32, written)).collect();
        assert_eq!(bindings, want, "{}", shader.name);
        assert!(shader.written.len() <= 8, "{} has more storage buffers than every adapter allows", shader.name);
    }
}

#[test]
fn every_shader_file_is_in_the_list_and_opens_with_its_name() {
    let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
    let mut files = Vec::new();
    let folders = std::fs::read_dir(ops).unwrap().map(|entry| entry.unwrap().path());
    for folder in folders.filter(|path| path.is_dir() && !SHARED.iter().any(|shared| path.ends_with(shared))) {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.extend(entries.filter(|path| path.extension().is_some_and(|extension| extension == "wgsl")));
    }
    let mut found: Vec<_> = files.iter().map(|file| file.file_stem().unwrap().to_str().unwrap()).collect();
    let mut listed: Vec<_> = SHADERS.iter().map(|shader| shader.name).collect();
    found.sort_unstable();
    listed.sort_unstable();
    // The precisions of a shader are in one file, and so are its ways to reduce and its sizes of cooperative matrices.
    listed.dedup();
    assert_eq!(found, listed);
    for shader in SHADERS {
        assert!(shader.source().starts_with(&format!("// {}: ", shader.name)), "{}", shader.name);
    }
}

/// A device that computes nothing.
#[expect(unsafe_code, reason = "wgpu's cooperative matrices are experimental, and asked for by name")]
fn noop_device(adapter: &wgpu::Adapter, features: Features) -> wgpu::Device {
    let descriptor = wgpu::DeviceDescriptor {
        required_features: features,
        // SAFETY: nothing runs on this device.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    };
    let opened = pollster::block_on(adapter.request_device(&descriptor));
    opened.expect("a noop device has every feature").0
}

/// wgpu's own checks of pipelines, on devices with the features that a kernel names and no others.
#[test]
fn every_kernel_becomes_a_pipeline() {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::NOOP;
    descriptor.backend_options.noop = wgpu::NoopBackendOptions { enable: true, ..Default::default() };
    let instance = wgpu::Instance::new(descriptor);
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP));
    let adapter = adapters.first().expect("the noop backend is built in");
    let mut kernels = gpu_kernels();
    while let Some((shader, _)) = kernels.first() {
        let features = shader.features();
        let device = noop_device(adapter, features);
        let (these, others) = kernels.into_iter().partition(|(shader, _)| shader.features() == features);
        kernels = others;
        let these: Vec<_> = these;
        for (shader, constants) in these {
            let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(shader.name),
                source: wgpu::ShaderSource::Wgsl(shader.source().into()),
            });
            let _pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(shader.name),
                layout: None,
                module: &module,
                entry_point: Some(shader.name),
                compilation_options: wgpu::PipelineCompilationOptions { constants: &constants, ..Default::default() },
                cache: None,
            });
            let error = pollster::block_on(scope.pop());
            assert!(error.is_none(), "{} {constants:?}: {error:?}", shader.name);
        }
    }
}
