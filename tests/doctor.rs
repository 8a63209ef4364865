//! `grokpipe doctor` against real processes.

use grokpipe_tests::processes::{Cluster, ClusterOptions, grokpipe, read_json};

#[test]
fn doctor_measures_all_links_of_a_cluster_and_its_bundle_has_no_secret() {
    let cluster = Cluster::start(ClusterOptions { workers: 2, ..ClusterOptions::demo() });
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (secret, planted) = (folder.path().join("cluster.secret"), "planted-0123456789-planted");
    std::fs::write(&secret, planted).expect("a file");
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("our file");
    let log = folder.path().join("log");
    std::fs::write(&log, format!("a line\nsaid {planted}\npassword = {planted}\n")).expect("a file");
    let bundle = folder.path().join("bundle");
    let output = grokpipe(["doctor", "--no-config", "--json", "--server", &cluster.grpc])
        .arg("--bundle")
        .arg(&bundle)
        .arg("--log")
        .arg(&log)
        .env("GROKPIPE__CLUSTER__SECRET_FILE", &secret)
        .output()
        .expect("grokpipe runs");
    let report = read_json(output);
    let links = report["links"].as_array().expect("links");
    assert_eq!(links.len(), 6, "{report}");
    for link in links {
        assert!(link["error"].is_null() && link["round_trip_seconds"].is_f64(), "{link}");
        assert!(link["bytes_per_second"].is_f64(), "{link}");
    }
    for entry in std::fs::read_dir(&bundle).expect("a bundle") {
        let path = entry.expect("a file").path();
        let text = std::fs::read_to_string(&path).expect("text");
        assert!(!text.contains(planted), "{}: {text}", path.display());
    }
    assert!(bundle.join("snapshot.json").is_file() && bundle.join("log.txt").is_file());

    let nobody = grokpipe(["doctor", "--no-config", "--server", "127.0.0.1:1"]).output().expect("grokpipe runs");
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stdout).contains("FAIL  cluster"), "{nobody:?}");
}
