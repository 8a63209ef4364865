//! `launch.sh` with stand-ins for the toolchain: nothing is built or installed, and what it asks for is written down.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use grokpipe_tests::root;
use tempfile::TempDir;

/// A folder with the script as a project's, and a toolchain whose programs write down what they are asked for.
struct Project {
    folder: TempDir,
}

impl Project {
    /// With `rustc` of this version, and a toolchain of rustup's of that one.
    fn with_rust(version: &str, installed: &str) -> Self {
        let project = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        fs::create_dir(project.path("p")).expect("a new folder");
        fs::copy(root().join("launch.sh"), project.path("p/launch.sh")).expect("the script");
        fs::write(project.path("p/Cargo.toml"), "").expect("a file");
        let (built, log) = (project.path("somewhere else/grok\"pipe"), project.path("log"));
        let json = r#"{"reason":"compiler-artifact","executable":null}\n{"executable":"@","fresh":true}\n"#;
        let json = json.replace('@', &built.display().to_string().replace('"', "\\\\\""));
        // Which one speaks for rustc is rustup's to say, by this variable.
        let rustc = format!("[ -n \"$RUSTUP_TOOLCHAIN\" ] && echo 'rustc {installed}' || echo 'rustc {version}'");
        let rustup = format!(
            "case $1 in run) echo 'rustc {installed}' ;; toolchain) [ $2 = list ] && echo 'named (default)' ;; esac"
        );
        project.program("bin/cargo", &format!("printf '{json}'"));
        project.program("bin/rustc", &rustc);
        project.program("bin/rustup", &format!("echo \"rustup $*\" >> {log:?}; {rustup}"));
        project.program("bin/cc", "");
        // It knows one subcommand and one flag.
        let program = "case \"$1 $2\" in 'status --help' | '--version --help') exit 0 ;; *--help) exit 2 ;; esac; echo ran \"$*\"";
        project.program("somewhere else/grok\"pipe", program);
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a new folder");
        fs::write(&path, format!("#!/bin/bash\n{script}\n")).expect("a file");
        fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("a file of ours");
    }

    fn launch(&self, script: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("bash");
        command.arg(script).args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        for variable in ["HOME", "CARGO_HOME", "RUSTUP_TOOLCHAIN"] {
            command.env_remove(variable);
        }
        command.env("PATH", path).envs(variables.iter().copied());
        command.output().expect("bash")
    }

    fn said(&self, script: &str, arguments: &[&str], variables: &[(&str, &str)]) -> String {
        let output = self.launch(Path::new(script), arguments, variables);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn asked_of_rustup(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

#[test]
fn it_finds_itself_and_what_cargo_built_however_it_is_called() {
    let project = Project::with_rust("1.95.0", "1.95.0");
    symlink("p/launch.sh", project.path("link")).expect("a link");
    symlink("../link", project.path("bin/grok")).expect("a link to a link");
    let absolute = project.path("p/launch.sh").display().to_string();
    for script in ["p/launch.sh", "./p/launch.sh", "link", "bin/grok", &absolute] {
        for variables in [vec![], vec![("CDPATH", ".:/tmp")], vec![("CARGO_BUILD_TARGET_DIR", "/nowhere")]] {
            assert_eq!(
                project.said(script, &["status", "--json"], &variables),
                "ran status --json",
                "{script} {variables:?}"
            );
        }
    }
    assert_eq!(project.asked_of_rustup(), "", "a toolchain that is new enough is not asked for");
}

#[test]
fn the_program_says_what_is_a_subcommand_and_the_rest_is_for_up() {
    let project = Project::with_rust("1.96.1 (abc 2026-01-01)", "");
    for (arguments, ran) in [
        (vec![], "ran up"),
        (vec!["--once", "a b"], "ran up --once a b"),
        (vec!["status"], "ran status"),
        (vec!["--version"], "ran --version"),
    ] {
        assert_eq!(project.said("p/launch.sh", &arguments, &[]), ran);
    }
}

#[test]
fn a_toolchain_is_installed_only_when_none_will_do() {
    for (rustc, installed, is_installed, works) in [
        ("1.95.0", "1.80.0", false, true),
        ("2.0.0", "1.80.0", false, true),
        ("1.100.0", "1.80.0", false, true),
        ("1.94.9", "1.97.0", false, true),
        ("1.94.9", "1.80.0", true, false),
    ] {
        let project = Project::with_rust(rustc, installed);
        let output = project.launch(Path::new("p/launch.sh"), &["status"], &[]);
        let asked = project.asked_of_rustup();
        assert_eq!(asked.contains("toolchain install 1.95"), is_installed, "{rustc} {installed}: {asked}");
        assert_eq!(output.status.success(), works, "{rustc} {installed}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
