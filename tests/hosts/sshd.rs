//! An OpenSSH server of our own that lets one key in.

use std::{
    fs,
    net::TcpListener,
    os::fd::OwnedFd,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use grokpipe_tests::command;

use super::{Files, Running, is_root, is_there, network::TwoHosts, run, wait_for};

/// Where the server listens.
enum Place<'a> {
    /// On loopback of this machine, at a port that the system chooses.
    Here,
    /// On this host, which is its own.
    On(&'a TwoHosts, usize),
}

/// Its port where it has a host to itself.
const PORT: u16 = 2222;
const PROGRAM: &str = "/usr/sbin/sshd";

pub(crate) struct Sshd {
    pub(crate) files: Files,
    pub(crate) port: u16,
    servers: Arc<Mutex<Running>>,
}

impl Sshd {
    /// A server on loopback. `None` after saying that the test is skipped.
    pub(crate) fn here() -> Option<Self> {
        Self::start(&Place::Here)
    }

    /// A server on another host. `None` after saying that the test is skipped.
    pub(crate) fn on(hosts: &TwoHosts, host: usize) -> Option<Self> {
        Self::start(&Place::On(hosts, host))
    }

    fn start(place: &Place<'_>) -> Option<Self> {
        if !is_root() || !is_there(Path::new(PROGRAM), "no sshd on this machine (Debian package openssh-server)") {
            return None;
        }
        command("ssh-keygen")?;
        // sshd wants this folder, which its service makes.
        fs::create_dir_all("/run/sshd").expect("root may");
        let files = Files::new();
        let path = |name: &str| files.path(name).display().to_string();
        for key in ["host_key", "user_key"] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]).expect("a key");
        }
        let config = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
             PasswordAuthentication no\nPermitRootLogin prohibit-password\nLogLevel VERBOSE\n",
            path("host_key"),
            path("user_key.pub")
        );
        files.write("sshd_config", &config);
        let arguments = ["-f", &path("sshd_config"), "-E", &path("sshd.log")].map(str::to_owned);
        let servers = Arc::new(Mutex::new(Running::default()));
        let (host, port) = match place {
            Place::Here => ("127.0.0.1", answer(&arguments, Arc::clone(&servers))),
            Place::On(hosts, host) => {
                let mut server = hosts.command(*host, PROGRAM);
                server.args(["-D", "-p", &PORT.to_string()]).args(arguments).stderr(Stdio::null());
                servers.lock().expect("no panic").start(&mut server);
                let log = || files.read("sshd.log");
                wait_for(|| log().contains("Server listening").then_some(()), log);
                (hosts.ip(*host), PORT)
            }
        };
        let key = files.read("host_key.pub");
        files.write("known_hosts", &format!("[{host}]:{port} {key}"));
        Some(Self { files, port, servers })
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.files.path(name).display().to_string()
    }

    pub(crate) fn log(&self) -> String {
        self.files.read("sshd.log")
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.servers.lock().expect("no panic").end();
    }
}

/// Takes connections and starts a server for each, as inetd does: sshd cannot be given a port that the system chooses.
fn answer(arguments: &[String], servers: Arc<Mutex<Running>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port of loopback");
    let port = listener.local_addr().expect("bound").port();
    let mut server = Command::new(PROGRAM);
    server.arg("-i").args(arguments).stderr(Stdio::null());
    // Ends with the process of this test.
    std::thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            let input = connection.try_clone().expect("a descriptor");
            server.stdin(Stdio::from(OwnedFd::from(input))).stdout(Stdio::from(OwnedFd::from(connection)));
            servers.lock().expect("no panic").start(&mut server);
        }
    });
    port
}
