//! A firewall that drops what comes to one worker's data port, and nothing else.

use grokpipe_tests::command;

use super::{
    Files,
    network::{Family, HandStarted, TwoHosts, settings},
    said,
};

/// The data port of the worker behind the firewall; the host is its own.
const PORT: u16 = 7102;

#[test]
fn a_firewall_that_drops_a_data_port_is_named_with_both_workers_and_the_address() {
    if command("nft").is_none() {
        return;
    }
    let Some(hosts) = TwoHosts::make(Family::V4) else { return };
    let rules = format!(
        "add table inet wall\nadd chain inet wall input {{ type filter hook input priority 0; }}\n\
         add rule inet wall input tcp dport {PORT} drop\n"
    );
    let files = Files::new();
    let made = hosts.command(1, "nft").args(["-f", &files.write("rules.nft", &rules)]).output().expect("nft runs");
    if !made.status.success() {
        return println!("skipped: no firewall in a namespace: {}", said(&made));
    }
    let mut cluster = HandStarted::coordinator(&hosts, &files, settings(&files, &["w1", "w2"]));
    let behind = hosts.address(1, PORT);
    cluster.worker(0, "w1", &[]);
    cluster.worker(1, "w2", &["--listen", &behind]);
    let names = |text: &str| ["w1", "w2", &behind].iter().all(|word| text.contains(word)) && text.contains("reach");
    let status = cluster.wait_for_status("w1, w2 and the address", |good, text| !good && names(text));
    println!("{status}");
    let asked = hosts.grokpipe(1, &["generate", "x", "--server", &cluster.server]).output().expect("generate runs");
    // Clients are told who does not reach whom, and no address.
    let text = said(&asked);
    assert!(!asked.status.success() && ["w1", "w2", "reach"].iter().all(|word| text.contains(word)), "{text}");
    assert!(!text.contains(&behind), "{text}");
}
