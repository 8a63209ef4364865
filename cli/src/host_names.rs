//! The names of this machine, by which a browser may call it.
//!
//! Its host name, that name on the local link (mDNS), and what `/etc/hosts` calls it. Nobody else is asked: a name server may be slow,
//! and whoever answers for one could give us any name.

use std::fs;

use crate::machine;

/// What this machine is called.
pub(crate) fn of_this_machine() -> Vec<String> {
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    machine::host_name().map_or_else(Vec::new, |host| names(&host, &hosts))
}

fn names(host: &str, hosts_file: &str) -> Vec<String> {
    let host = host.trim().to_ascii_lowercase();
    if host.is_empty() {
        return Vec::new();
    }
    let short = host.split('.').next().unwrap_or(&host).to_owned();
    let mut names = vec![host.clone(), format!("{short}.local"), short];
    for line in hosts_file.lines() {
        let line = line.split('#').next().unwrap_or_default().to_ascii_lowercase();
        let on_line: Vec<&str> = line.split_whitespace().skip(1).collect();
        if on_line.contains(&host.as_str()) {
            names.extend(on_line.into_iter().map(str::to_owned));
        }
    }
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_called_by_its_name_and_by_its_line_in_the_hosts_file() {
        let hosts = "127.0.0.1 localhost\n127.0.1.1 Node0.example.com node0 # by the installer\n10.0.0.2 other node02\n# 10.0.0.1 x node0\n";
        let cases: [(&str, &[&str]); 4] = [
            ("node0\n", &["node0", "node0.example.com", "node0.local"]),
            ("Node0.example.com", &["node0", "node0.example.com", "node0.local"]),
            ("else", &["else", "else.local"]),
            ("", &[]),
        ];
        for (host, expected) in cases {
            assert_eq!(names(host, hosts), expected, "{host:?}");
        }
    }
}
