//! Workers that people start by hand on two hosts.

use super::{
    Files,
    network::{Family, HandStarted, TwoHosts, settings},
    said,
};

#[test]
fn workers_in_two_network_namespaces_serve_and_need_the_secret() {
    let Some(hosts) = TwoHosts::make(Family::V4) else { return };
    let files = Files::new();
    let good = settings(&files, &["w1", "w2"]);
    files.write_private("other.secret", "a-secret-of-other-hosts\n");
    let bad = files.write("bad.toml", &files.read("cluster.toml").replace("cluster.secret", "other.secret"));
    let mut cluster = HandStarted::coordinator(&hosts, &files, good);
    let refused = cluster.worker_command(1, "w2", &bad, &[]).output().expect("a worker starts");
    assert!(!refused.status.success(), "a worker with another secret must not join");
    assert!(said(&refused).contains("another one"), "{}", said(&refused));
    cluster.worker(0, "w1", &[]);
    cluster.worker(1, "w2", &[]);
    cluster.serves();
}
