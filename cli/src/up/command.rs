//! The command lines of a cluster's processes: the same program again, here or over SSH. Pure.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
    process::Stdio,
};

use tokio::process::Command;

use super::reach::Reach;
use crate::{
    common::variable,
    config::{Config, WorkerSection},
    error::CliError,
    logging,
};

/// How to start a process.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    program: OsString,
    args: Vec<OsString>,
    /// Written to its standard input first; the input then stays open until the process is to end.
    pub(crate) first_line: Option<String>,
    /// Its log lines are read and shown with its name.
    pub(crate) relayed: bool,
    environment: Vec<(&'static str, &'static str)>,
}

impl Launch {
    /// A program with these arguments, whose complaints are shown with its name.
    pub(crate) fn new(program: &Path, args: Vec<OsString>, first_line: Option<String>) -> Self {
        let environment = environment(true, "error");
        Self { program: program.into(), args, first_line, relayed: true, environment }
    }

    /// The command, with pipes. In a process group of its own, so that Ctrl-C reaches `up` alone, which then ends the others.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(if self.relayed { Stdio::piped() } else { Stdio::inherit() });
        command.kill_on_drop(true);
        #[cfg(unix)]
        command.process_group(0);
        command
    }
}

/// How a process is to log: in which style, and with which filter where the environment has none.
fn environment(pretty: bool, filter: &'static str) -> Vec<(&'static str, &'static str)> {
    let mut environment = vec![(logging::STYLE, if pretty { "pretty" } else { "json" })];
    if variable(logging::FILTER).is_none() {
        environment.push((logging::FILTER, filter));
    }
    environment
}

/// What all processes of this cluster share.
pub(super) struct Common<'a> {
    pub(super) config: &'a Config,
    pub(super) program: &'a Path,
    pub(super) insecure: bool,
    /// Lines go to a terminal, so they are made for people.
    pub(super) pretty: bool,
    /// Filter of the processes' logs where the environment has none.
    pub(super) filter: &'static str,
}

impl Common<'_> {
    fn local(&self, subcommand: &str, model: &Path) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec![subcommand.into(), "--exit-with-stdin".into()];
        match &self.config.file {
            Some(file) => args.extend(["--config".into(), file.into()]),
            None => args.push("--no-config".into()),
        }
        args.extend(["--model".into(), model.into()]);
        if self.config.secret.is_set() {
            args.push("--secret-stdin".into());
        }
        if self.insecure {
            args.push("--insecure".into());
        }
        args
    }

    /// The secret goes through a pipe: nobody else can read it there, as they can a command line.
    fn first_line(&self) -> Option<String> {
        self.config.secret.text().map(str::to_owned)
    }

    /// The coordinator, listening at these addresses.
    pub(super) fn coordinator(&self, grpc: &str, http: &str, roster: &[WorkerSection]) -> Launch {
        let mut args = self.local("coordinator", &self.config.model.path);
        if let Some(tokenizer) = &self.config.model.tokenizer {
            args.extend(["--tokenizer".into(), tokenizer.into()]);
        }
        let names: Vec<&str> = roster.iter().map(|worker| worker.name.as_str()).collect();
        args.extend(["--grpc", grpc, "--http", http, "--expect"].map(OsString::from));
        args.push(names.join(",").into());
        Launch {
            program: self.program.into(),
            args,
            first_line: self.first_line(),
            relayed: self.pretty,
            environment: environment(self.pretty, self.filter),
        }
    }

    /// A worker on this machine. `memory_share` is what it may take of the machine's memory when its device is the CPU.
    pub(super) fn local_worker(
        &self,
        worker: &WorkerSection,
        reach: &Reach,
        threads: u32,
        memory_share: Option<u64>,
    ) -> Launch {
        let mut args = self.local("worker", worker.model.as_deref().unwrap_or(&self.config.model.path));
        args.extend(worker_args(worker, reach).into_iter().map(OsString::from));
        args.extend(["--threads".into(), threads.to_string().into()]);
        if let Some(bytes) = memory_share.filter(|_| worker.memory.is_none()) {
            args.extend(["--memory-share".into(), bytes.to_string().into()]);
        }
        Launch {
            program: self.program.into(),
            args,
            first_line: self.first_line(),
            relayed: self.pretty,
            environment: environment(self.pretty, self.filter),
        }
    }

    /// A worker on another host, started by OpenSSH as the user has set it up. Nothing here weakens the check of host keys.
    ///
    /// # Errors
    /// When the model's path cannot be made absolute.
    pub(super) fn remote_worker(&self, worker: &WorkerSection, host: &str, reach: &Reach) -> Result<Launch, CliError> {
        let model = worker.model.clone().map_or_else(|| std::path::absolute(&self.config.model.path), Ok);
        let model = model.map_err(|error| CliError::usage("the model's path cannot be used").because(error))?;
        let mut words: Vec<OsString> = ["exec", "env"].map(OsString::from).to_vec();
        let filter = variable(logging::FILTER).unwrap_or_else(|| self.filter.to_owned());
        let style = format!("{}={}", logging::STYLE, if self.pretty { "pretty" } else { "json" });
        for setting in [style, format!("{}={filter}", logging::FILTER)] {
            words.push(quoted(OsStr::new(&setting)));
        }
        words.push(quoted_path(&worker.binary));
        let mut args: Vec<OsString> = ["worker", "--exit-with-stdin", "--no-config"].map(OsString::from).to_vec();
        args.extend(["--model".into(), model.into()]);
        args.extend(worker_args(worker, reach).into_iter().map(OsString::from));
        if let Some(threads) = worker.threads {
            args.extend(["--threads".into(), threads.to_string().into()]);
        }
        let first_line = self.first_line();
        if first_line.is_some() {
            args.push("--secret-stdin".into());
        }
        if self.insecure {
            args.push("--insecure".into());
        }
        words.extend(args.iter().map(|arg| quoted(arg)));

        // The first value of an option wins: batch mode is fixed, the rest are the user's before ours.
        let mut ssh: Vec<OsString> = ["-o", "BatchMode=yes", "-T"].map(OsString::from).to_vec();
        ssh.extend(self.config.cluster.ssh_options.iter().map(OsString::from));
        let limits = ["-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "--"];
        ssh.extend(limits.map(OsString::from));
        ssh.push(destination(host).into());
        ssh.push(words.join(OsStr::new(" ")));
        Ok(Launch { program: "ssh".into(), args: ssh, first_line, relayed: true, environment: Vec::new() })
    }
}

fn worker_args(worker: &WorkerSection, reach: &Reach) -> Vec<String> {
    let mut args = vec![
        "--coordinator".to_owned(),
        reach.coordinator.to_string(),
        "--name".to_owned(),
        worker.name.clone(),
        "--device".to_owned(),
        worker.device.clone(),
    ];
    if let Some(listen) = &reach.listen {
        args.extend(["--listen".to_owned(), listen.to_string()]);
    }
    if let Some(advertise) = &reach.advertise {
        args.extend(["--advertise".to_owned(), advertise.to_string()]);
    }
    if let Some(memory) = worker.memory {
        args.extend(["--memory".to_owned(), memory.0.to_string()]);
    }
    if let Some(precision) = worker.precision {
        args.extend(["--precision".to_owned(), precision.name().to_owned()]);
    }
    if let Some(prefill) = worker.prefill {
        args.extend(["--prefill".to_owned(), prefill.name().to_owned()]);
    }
    args
}

/// A host as `ssh` wants it: an IPv6 address without the brackets that people put around it.
fn destination(host: &str) -> String {
    let (user, node) = host.rsplit_once('@').map_or((None, host), |(user, node)| (Some(user), node));
    let node = node.strip_prefix('[').and_then(|node| node.strip_suffix(']')).unwrap_or(node);
    user.map_or_else(|| node.to_owned(), |user| format!("{user}@{node}"))
}

/// As [`quoted`], for a path: a `~/` at its beginning stays what the other host's shell takes for the home there.
fn quoted_path(path: &str) -> OsString {
    let (home, rest) = path.strip_prefix("~/").map_or(("", path), |rest| ("~/", rest));
    let mut word = OsString::from(home);
    word.push(quoted(OsStr::new(rest)));
    word
}

/// A word as a POSIX shell reads it back, byte for byte.
pub(crate) fn quoted(word: &OsStr) -> OsString {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:=,@%+".contains(byte);
    let bytes = word.as_bytes();
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return word.to_owned();
    }
    let parts: Vec<&[u8]> = bytes.split(|byte| *byte == b'\'').collect();
    OsString::from_vec([b"'".as_slice(), &parts.join(br"'\''".as_slice()), b"'"].concat())
}

#[cfg(test)]
mod tests {
    use grokpipe_kernels::Prefill;

    use super::*;
    use crate::config::{Layers, SecretText};

    fn words(launch: &Launch) -> Vec<String> {
        launch.args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_remote_worker_gets_its_secret_through_the_pipe_and_words_are_quoted() {
        let flags = vec![("cluster.name", "x".to_owned())];
        let mut config = Layers { no_file: true, flags, ..Layers::default() }.load().unwrap();
        config.secret = SecretText::new("0123456789abcdef", "here").unwrap();
        config.cluster.ssh_options = vec!["-p".into(), "2222".into()];
        let program = Path::new("grokpipe");
        let common = Common { config: &config, program, insecure: false, pretty: false, filter: "info" };
        let mut worker = WorkerSection::named("w3");
        worker.binary = "/opt/my tools/grokpipe".into();
        worker.model = Some("/it's here".into());
        worker.device = "gpu:A B; rm".into();
        worker.prefill = Some(Prefill::Fast);
        let reach = Reach { coordinator: "n1:7070".parse().unwrap(), listen: None, advertise: "n3:0".parse().ok() };
        let launch = common.remote_worker(&worker, "me@n3", &reach).unwrap();
        let words = words(&launch);
        assert_eq!(launch.program, "ssh");
        assert_eq!(words[..5], ["-o", "BatchMode=yes", "-T", "-p", "2222"]);
        assert_eq!(words[words.len() - 3..words.len() - 1], ["--", "me@n3"]);
        let line = words.last().unwrap();
        for part in [
            "'/opt/my tools/grokpipe' worker",
            r"'/it'\''s here'",
            "'gpu:A B; rm'",
            "--secret-stdin",
            "n3:0",
            "--prefill fast",
        ] {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(launch.first_line.as_deref(), Some("0123456789abcdef"));
        assert!(!words.iter().any(|word| word.contains("0123456789") || word.contains("StrictHostKey")));
    }

    #[test]
    fn a_path_that_is_not_utf_8_reaches_every_worker_as_it_is() {
        let odd = Path::new(OsStr::from_bytes(b"/gr\xf6k's/m"));
        let layers = Layers { no_file: true, ..Layers::default() };
        let config = layers.path_flag("model.path", Some(odd)).path_flag("model.tokenizer", Some(odd)).load().unwrap();
        assert_eq!((config.model.path.as_path(), config.model.tokenizer.as_deref()), (odd, Some(odd)));
        let program = Path::new("grokpipe");
        let common = Common { config: &config, program, insecure: false, pretty: false, filter: "info" };
        let worker = WorkerSection::named("w1");
        let listen = "127.0.0.1:0".parse().ok();
        let reach = Reach { coordinator: "127.0.0.1:7070".parse().unwrap(), listen, advertise: None };
        for launch in [common.coordinator("a", "b", &[]), common.local_worker(&worker, &reach, 1, None)] {
            assert!(launch.args.iter().any(|arg| arg == odd.as_os_str()), "{:?}", launch.args);
        }
        let remote = common.remote_worker(&worker, "n3", &reach).unwrap();
        let line = remote.args.last().unwrap().as_bytes();
        let told = b"--model '/gr\xf6k'\\''s/m'";
        assert!(line.windows(told.len()).any(|words| words == told), "{}", String::from_utf8_lossy(line));
    }

    #[test]
    fn processes_here_get_the_secret_through_the_pipe() {
        let mut config = Layers { no_file: true, ..Layers::default() }.load().unwrap();
        config.secret = SecretText::random().unwrap();
        let secret = config.secret.text().unwrap().to_owned();
        let program = Path::new("grokpipe");
        let common = Common { config: &config, program, insecure: false, pretty: false, filter: "info" };
        let listen = "127.0.0.1:0".parse().ok();
        let reach = Reach { coordinator: "127.0.0.1:7070".parse().unwrap(), listen, advertise: None };
        let worker = WorkerSection::named("w1");
        let coordinator = common.coordinator("127.0.0.1:0", "127.0.0.1:0", std::slice::from_ref(&worker));
        for launch in [coordinator, common.local_worker(&worker, &reach, 1, None)] {
            assert_eq!(launch.first_line.as_deref(), Some(secret.as_str()));
            let words = words(&launch);
            assert!(words.contains(&"--secret-stdin".to_owned()), "{words:?}");
            assert!(!words.iter().any(|word| word.contains(&secret)));
        }
    }

    #[test]
    fn a_worker_here_too_reads_the_model_that_it_is_told() {
        let config = Layers { no_file: true, ..Layers::default() }.load().unwrap();
        let program = Path::new("grokpipe");
        let common = Common { config: &config, program, insecure: false, pretty: false, filter: "info" };
        let mut worker = WorkerSection::named("w1");
        let listen = "127.0.0.1:0".parse().ok();
        let reach = Reach { coordinator: "127.0.0.1:7070".parse().unwrap(), listen, advertise: None };
        let model = |worker: &WorkerSection| {
            let words = words(&common.local_worker(worker, &reach, 1, None));
            words.iter().position(|word| word == "--model").map(|at| words[at + 1].clone())
        };
        assert_eq!(model(&worker), Some(config.model.path.display().to_string()));
        worker.model = Some("/elsewhere".into());
        assert_eq!(model(&worker), Some("/elsewhere".to_owned()));
    }

    #[test]
    fn ssh_gets_hosts_as_it_wants_them() {
        for (host, expected) in [
            ("gpu1", "gpu1"),
            ("me@node", "me@node"),
            ("me@fd00::2", "me@fd00::2"),
            ("me@[fd00::2]", "me@fd00::2"),
            ("[fe80::2%eth0]", "fe80::2%eth0"),
        ] {
            assert_eq!(destination(host), expected);
        }
    }

    #[test]
    fn a_home_on_the_other_host_is_left_to_its_shell() {
        for (path, quote) in [("~/bin/grokpipe", "~/bin/grokpipe"), ("~/my bin/x", "~/'my bin/x'"), ("a b", "'a b'")] {
            assert_eq!(quoted_path(path), quote);
        }
    }

    #[test]
    fn shell_words_survive() {
        for (word, quote) in [("plain-1.2/x:0", "plain-1.2/x:0"), ("", "''"), ("a'b", r"'a'\''b'"), ("$x", "'$x'")] {
            assert_eq!(quoted(OsStr::new(word)), quote);
        }
    }
}
