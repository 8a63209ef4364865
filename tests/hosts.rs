//! Several hosts: workers in two network namespaces joined by a veth pair, and a worker that `up` starts over OpenSSH.

use std::{
    fs::{self, File, Permissions},
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Instant,
};

use grokpipe_tests::{
    command, demo_model,
    processes::{PATIENCE, binary, read_json, wait},
};
use serde_json::Value;

const PROMPT: &str = "The capital of France is";

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {}: {said}", arguments.join(" "))) }
}

/// Two network namespaces and a cable between them; removed on drop.
struct TwoHosts {
    names: [String; 2],
    addresses: [String; 2],
}

impl TwoHosts {
    fn make() -> Result<Self, String> {
        let id = std::process::id();
        let names = [format!("grokpipe-{id}-a"), format!("grokpipe-{id}-b")];
        let hosts = Self { names, addresses: ["10.213.77.1".into(), "10.213.77.2".into()] };
        let [a, b] = &hosts.names;
        run("ip", &["netns", "add", a])?;
        run("ip", &["netns", "add", b])?;
        run("ip", &["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (name, address) in hosts.names.iter().zip(&hosts.addresses) {
            run("ip", &["-n", name, "addr", "add", &format!("{address}/24"), "dev", "cable"])?;
            run("ip", &["-n", name, "link", "set", "cable", "up"])?;
            run("ip", &["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// `grokpipe` on one of the hosts, without the settings of this one.
    fn grokpipe(&self, host: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]).arg(binary()).args(arguments).env("NO_COLOR", "1");
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("GROKPIPE")) {
            command.env_remove(key);
        }
        command.stdin(Stdio::null());
        command
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}

/// Processes that end with the test.
#[derive(Default)]
struct Running(Vec<Child>);

impl Running {
    fn start(&mut self, command: &mut Command) -> &mut Child {
        self.0.push(command.spawn().expect("a process starts"));
        self.0.last_mut().expect("just pushed")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn write_private(path: &Path, text: &str) {
    fs::write(path, text).expect("a file in a temporary folder");
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("a file of ours");
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

#[test]
fn workers_in_two_network_namespaces_serve_and_need_the_secret() {
    if command("ip").is_none() {
        return;
    }
    let hosts = match TwoHosts::make() {
        Ok(hosts) => hosts,
        Err(reason) => return println!("skipped: no right to make network namespaces: {reason}"),
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    write_private(&path("cluster.secret"), "a-secret-of-two-hosts\n");
    write_private(&path("other.secret"), "a-secret-of-other-hosts\n");
    let config = |name: &str, secret: &str| {
        let model = demo_model();
        let workers = "[[worker]]\nname = \"w1\"\n[[worker]]\nname = \"w2\"\n";
        let text = format!(
            "[model]\npath = {model:?}\n[cluster]\nsecret_file = {secret:?}\n[plan]\nsplit = \"even\"\n{workers}"
        );
        fs::write(path(name), text).expect("a file in a temporary folder");
        path(name).display().to_string()
    };
    let (good, bad) = (config("good.toml", "cluster.secret"), config("bad.toml", "other.secret"));
    let log = |name: &str| File::create(path(name)).expect("a log");
    let mut running = Running::default();

    let grpc = format!("{}:0", hosts.addresses[0]);
    let mut coordinator = hosts.grokpipe(0, &["coordinator", "--config", &good, "--grpc", &grpc, "--http", &grpc]);
    let coordinator = running.start(coordinator.stdout(Stdio::piped()).stderr(log("coordinator.log")));
    let mut line = String::new();
    BufReader::new(coordinator.stdout.take().expect("piped")).read_line(&mut line).expect("addresses");
    let addresses: Value = serde_json::from_str(&line).unwrap_or_else(|error| {
        panic!("{error}: {line:?} {}", fs::read_to_string(path("coordinator.log")).unwrap_or_default())
    });
    let server = addresses["grpc"].as_str().expect("an address").to_owned();

    let worker = |host: usize, name: &'static str, config: &str| {
        let arguments = ["worker", "--config", config, "--coordinator", &server, "--name", name, "--device", "cpu"];
        hosts.grokpipe(host, &arguments)
    };
    let refused = worker(1, "w2", &bad).output().expect("a worker starts");
    assert!(!refused.status.success(), "a worker with another secret must not join");
    assert!(said(&refused).contains("another one"), "{}", said(&refused));
    for (host, name) in [(0, "w1"), (1, "w2")] {
        running.start(worker(host, name, &good).stdout(Stdio::null()).stderr(log(&format!("{name}.log"))));
    }
    let started = Instant::now();
    loop {
        let status = hosts.grokpipe(1, &["status", "--server", &server, "--json"]).output().expect("status runs");
        if status.status.success() {
            break;
        }
        let logs: String =
            ["w1.log", "w2.log"].iter().map(|name| fs::read_to_string(path(name)).unwrap_or_default()).collect();
        assert!(started.elapsed() < PATIENCE, "not serving: {}\n{logs}", said(&status));
        wait(std::time::Duration::from_millis(200));
    }
    let arguments = ["generate", PROMPT, "--server", &server, "--max-tokens", "8", "--json"];
    let generated = read_json(hosts.grokpipe(1, &arguments).output().expect("generate runs"));
    println!("two hosts serve after {:.1} s: {}", started.elapsed().as_secs_f64(), generated["text"]);
    assert!(generated["text"].as_str().expect("text").contains("Paris"), "{generated}");
}

/// An OpenSSH server of our own on loopback that lets one key in.
struct Sshd {
    server: Child,
    folder: tempfile::TempDir,
    port: u16,
}

impl Sshd {
    fn start() -> Option<Self> {
        let user = command("whoami").and_then(|path| Command::new(path).output().ok())?;
        if String::from_utf8_lossy(&user.stdout).trim() != "root" {
            println!("skipped: sshd is started as root only");
            return None;
        }
        let program = Path::new("/usr/sbin/sshd");
        if !program.exists() {
            println!("skipped: no sshd on this machine (Debian package openssh-server)");
            return None;
        }
        command("ssh-keygen")?;
        // sshd wants this folder, which its service makes.
        fs::create_dir_all("/run/sshd").expect("root may");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        for key in ["host_key", "user_key"] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]).expect("a key");
        }
        let port = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a free port").port();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
             PasswordAuthentication no\nPermitRootLogin prohibit-password\nLogLevel VERBOSE\n",
            path("host_key"),
            path("user_key.pub")
        );
        fs::write(path("sshd_config"), config).expect("a file in a temporary folder");
        let key = fs::read_to_string(path("host_key.pub")).expect("a key");
        fs::write(path("known_hosts"), format!("[127.0.0.1]:{port} {key}")).expect("a file in a temporary folder");
        let log = File::create(path("sshd.log")).expect("a log");
        let server = Command::new(program)
            .args(["-D", "-e", "-f", &path("sshd_config")])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("sshd starts");
        Some(Self { server, folder, port })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("sshd.log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Processes whose command line has this word.
fn processes_with(word: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").expect("Linux").flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(word)).collect()
}

#[test]
fn up_starts_a_worker_over_ssh_and_ends_it() {
    let Some(sshd) = Sshd::start() else { return };
    let started = Instant::now();
    while !sshd.log().contains("Server listening") {
        assert!(started.elapsed() < PATIENCE, "{}", sshd.log());
        wait(std::time::Duration::from_millis(50));
    }
    let path = |name: &str| sshd.folder.path().join(name).display().to_string();
    let name = format!("far-{}", std::process::id());
    let text = format!(
        "[model]\npath = {:?}\n[cluster]\nssh_options = [\"-p\", \"{}\", \"-i\", {:?}, \"-o\", \"UserKnownHostsFile={}\"]\n\
         [plan]\nsplit = \"even\"\n[[worker]]\nname = \"near\"\ndevice = \"cpu\"\n\
         [[worker]]\nname = {name:?}\nhost = \"root@127.0.0.1\"\ndevice = \"cpu\"\nthreads = 1\nbinary = {:?}\n",
        demo_model(),
        sshd.port,
        path("user_key"),
        path("known_hosts"),
        binary(),
    );
    fs::write(path("cluster.toml"), text).expect("a file in a temporary folder");
    let ports = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let mut up = grokpipe_tests::processes::grokpipe(["up", "--config", &path("cluster.toml"), "--once", PROMPT])
        .args(ports)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(path("up.log")).expect("a log"))
        .spawn()
        .expect("up starts");
    let mut text = String::new();
    up.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
    let status = up.wait().expect("up ends");
    let log = fs::read_to_string(path("up.log")).unwrap_or_default();
    assert!(status.success(), "{status}: {log}\n{}", sshd.log());
    assert!(text.contains("Paris"), "{text}");
    assert!(sshd.log().contains("Accepted publickey"), "{}", sshd.log());
    let started = Instant::now();
    loop {
        let left = processes_with(&name);
        if left.is_empty() {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "left over there: {left:?}");
        wait(std::time::Duration::from_millis(50));
    }
    println!("a worker over SSH answered: {text}");
}
