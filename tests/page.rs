//! The health page in a browser: headless Chromium, driven by the WebDriver protocol as any other client would.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use grokpipe_tests::{
    command,
    processes::{Cluster, ClusterOptions, PATIENCE, wait},
    root,
};
use serde_json::{Value, json};

/// A browser with one page, through chromedriver.
struct Browser {
    driver: Child,
    curl: PathBuf,
    session: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    fn start() -> Option<Self> {
        let (curl, driver, chromium) = (command("curl")?, command("chromedriver")?, command("chromium")?);
        let mut driver = Command::new(driver)
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver starts");
        let lines = BufReader::new(driver.stdout.take().expect("piped")).lines();
        let port = lines.map_while(Result::ok).find_map(|line| {
            let port = line.split_once("successfully on port ")?.1;
            port.trim_end_matches('.').parse::<u16>().ok()
        });
        let port = port.expect("chromedriver says its port");
        let profile = tempfile::tempdir().expect("a temporary folder");
        let arguments = [
            "--headless".to_owned(),
            "--no-sandbox".into(),
            "--disable-gpu".into(),
            "--disable-quic".into(),
            "--no-first-run".into(),
            "--disable-background-networking".into(),
            "--disable-component-update".into(),
            "--disable-sync".into(),
            "--window-size=1280,1500".into(),
            format!("--user-data-dir={}", profile.path().display()),
        ];
        let options = json!({ "binary": chromium, "args": arguments });
        let capabilities = json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": options } } });
        let mut browser = Self { driver, curl, session: format!("http://127.0.0.1:{port}/session"), _profile: profile };
        let session = browser.post("", &capabilities);
        let id = session["sessionId"].as_str().unwrap_or_else(|| panic!("no browser: {session}")).to_owned();
        browser.session = format!("{}/{id}", browser.session);
        Some(browser)
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let mut curl = Command::new(&self.curl);
        curl.args(["--silent", "--show-error", "--max-time", "60", "--request", method]);
        if let Some(body) = body {
            curl.args(["--header", "Content-Type: application/json", "--data", &body.to_string()]);
        }
        let output = curl.arg(format!("{}{path}", self.session)).output().expect("curl runs");
        let answer: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        answer["value"].clone()
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        self.ask("POST", path, Some(body))
    }

    fn script(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    fn text(&self, selector: &str) -> String {
        let found = self.script(&format!("return document.querySelector({selector:?})?.textContent ?? ''"));
        found.as_str().unwrap_or_default().to_owned()
    }

    /// Waits until the page says so.
    fn until(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Duration {
        let started = Instant::now();
        loop {
            let verdict = self.text("#verdict");
            if wanted(&verdict) {
                return started.elapsed();
            }
            assert!(started.elapsed() < PATIENCE, "expected {what}, the page says {verdict:?}");
            wait(Duration::from_millis(50));
        }
    }

    fn screenshot(&self, path: &Path) {
        let script =
            "const { width, height } = document.documentElement.getBoundingClientRect(); return [width, height]";
        assert!(self.script(script).is_array());
        let picture = self.ask("GET", "/screenshot", None);
        let picture = picture.as_str().expect("a picture in base64");
        let mut decode = Command::new("base64")
            .arg("--decode")
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(path).expect("target/ is ours"))
            .spawn()
            .expect("base64 runs");
        std::io::Write::write_all(&mut decode.stdin.take().expect("piped"), picture.as_bytes()).expect("base64 reads");
        assert!(decode.wait().expect("base64 ends").success());
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let end = Command::new(&self.curl)
            .args(["--silent", "--max-time", "10", "--request", "DELETE", &self.session])
            .stdout(Stdio::null())
            .status();
        let _ = end;
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

#[test]
fn the_page_names_the_layers_of_a_killed_worker_and_then_serves_again() {
    let Some(browser) = Browser::start() else { return };
    let mut cluster = Cluster::start(ClusterOptions::demo());
    let pictures = root().join("target");
    browser.post("/url", &json!({ "url": format!("http://{}/", cluster.http) }));
    let shown = browser.until("a verdict of a serving cluster", |verdict| verdict.contains("Serving"));
    let layers =
        "return [...document.querySelectorAll('#strip .cell[data-layer]')].map(cell => Number(cell.dataset.layer))";
    let layers = browser.script(layers);
    assert_eq!(layers, json!((0..64).collect::<Vec<u32>>()), "all 64 layers, in order");
    let nodes = browser.text("#nodes");
    for name in ["w1", "w2", "w3", "w4"] {
        assert!(nodes.contains(name), "no row for {name}: {nodes}");
    }
    browser.screenshot(&pictures.join("page-serving.png"));

    cluster.kill_worker(2);
    let named = browser.until("the layers of w3", |verdict| verdict.contains("w3") && verdict.contains("32"));
    println!("the page after the kill: {}", browser.text("#verdict").split_whitespace().collect::<Vec<_>>().join(" "));
    browser.screenshot(&pictures.join("page-broken.png"));

    cluster.start_worker(2);
    let back = browser.until("serving again", |verdict| verdict.contains("Serving"));
    let foreign = "return performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith(location.origin))";
    assert_eq!(browser.script(foreign), json!([]), "requests to other hosts");
    println!(
        "verdict after {:.1} s, layers named {:.1} s after the kill, serving {:.1} s after the return",
        shown.as_secs_f64(),
        named.as_secs_f64(),
        back.as_secs_f64()
    );
}
