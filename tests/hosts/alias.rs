//! A host that only the configuration of ssh knows.

use super::{
    PROMPT,
    network::{Family, TwoHosts},
    ssh::{Way, up_once},
    sshd::Sshd,
};

/// An entry of an ssh configuration under which the server is found.
fn alias(sshd: &Sshd, alias: &str, host: &str) -> String {
    let text = format!(
        "Host {alias}\n  HostName {host}\n  Port {}\n  User root\n  IdentityFile {}\n  UserKnownHostsFile {}\n",
        sshd.port,
        sshd.path("user_key"),
        sshd.path("known_hosts")
    );
    sshd.files.write("ssh_config", &text)
}

#[test]
fn an_alias_of_the_ssh_configuration_with_a_port_and_a_user_is_no_network_address() {
    let Some(hosts) = TwoHosts::make(Family::V4) else { return };
    let Some(sshd) = Sshd::on(&hosts, 1) else { return };
    let config = alias(&sshd, "box-of-the-alias", hosts.ip(1));
    let way = Way { host: "box-of-the-alias", options: &["-F", &config] };
    let (grpc, http) = (hosts.address(0, 7070), hosts.address(0, 8080));
    up_once(&sshd, &way, hosts.grokpipe(0, &["up", "--grpc", &grpc, "--http", &http, "--once", PROMPT]));
}
