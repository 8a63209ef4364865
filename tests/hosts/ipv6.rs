//! Hosts without any IPv4 address but loopback's.

use super::{
    Files, PROMPT,
    network::{Family, HandStarted, TwoHosts, settings},
    ssh::{Way, up_once},
    sshd::Sshd,
};

#[test]
fn workers_find_their_own_addresses_where_there_is_ipv6_only() {
    let Some(hosts) = TwoHosts::make(Family::V6) else { return };
    let files = Files::new();
    let mut cluster = HandStarted::coordinator(&hosts, &files, settings(&files, &["w1", "w2"]));
    cluster.worker(0, "w1", &[]);
    cluster.worker(1, "w2", &[]);
    cluster.serves();
}

#[test]
fn up_starts_a_worker_over_ssh_where_there_is_ipv6_only() {
    let Some(hosts) = TwoHosts::make(Family::V6) else { return };
    let Some(sshd) = Sshd::on(&hosts, 1) else { return };
    let (port, known_hosts) = (sshd.port.to_string(), format!("UserKnownHostsFile={}", sshd.path("known_hosts")));
    let key = sshd.path("user_key");
    let ssh_options = ["-p", &port, "-i", &key, "-o", &known_hosts];
    let (grpc, http) = (hosts.address(0, 7070), hosts.address(0, 8080));
    for host in [format!("root@{}", hosts.ip(1)), format!("root@[{}]", hosts.ip(1))] {
        let way = Way { host: &host, options: &ssh_options };
        up_once(&sshd, &way, hosts.grokpipe(0, &["up", "--grpc", &grpc, "--http", &http, "--once", PROMPT]));
    }
}
