//! `grokpipe doctor`: what stands in the way of a cluster, before the first start or while something is wrong.
//!
//! Decides what is looked at and in which order: this machine and the configuration first, then a cluster, if one runs. Exit code 0 when
//! nothing failed. What figures mean is `verdicts`' to say; machines and links of a cluster are examined by its own processes.

mod bundle;
mod check;
mod local;
pub(crate) mod machine;
mod verdicts;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use grokpipe_proto::{
    probe::clock_us,
    v1::{DiagnosedLink, DiagnosedNode, diagnose_response::Finding},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use self::{
    bundle::Scrubber,
    check::{Check, Report},
};
use crate::{
    client::{self, Client},
    common::ConfigArgs,
    config::Config,
    error::CliError,
    text::print,
};

/// Longest that the HTTP port may take to answer.
const HTTP_WITHIN: Duration = Duration::from_secs(5);

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// gRPC address of the cluster [default: coordinator.grpc of the configuration]
    #[arg(long, value_name = "ADDR", env = "GROKPIPE_SERVER", value_parser = client::parse_server)]
    server: Option<String>,
    /// Leave the bandwidth of links and the speed of the cluster's disks out
    #[arg(long)]
    gentle: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Also write a folder with all of it, without secrets, for a report
    #[arg(long, value_name = "FOLDER")]
    bundle: Option<PathBuf>,
    /// A log whose end goes into the bundle
    #[arg(long, value_name = "FILE", requires = "bundle")]
    log: Option<PathBuf>,
}

/// Runs `doctor`; whether nothing failed.
///
/// # Errors
/// [`CliError`] when the report cannot be shown or written.
pub(crate) fn run(args: &Args) -> Result<bool, CliError> {
    client::block_on(async {
        let mut report = Report::default();
        let config = match args.config.layers().load() {
            Ok(config) => Some(config),
            Err(error) => {
                report.push(Check::fail("configuration", local::one_line(&error)));
                None
            }
        };
        report.checks.extend(local::here(config.as_ref()));
        report.push(local::clock());
        report.checks.extend(local::devices(config.as_ref()));
        let server = match (&args.server, &config) {
            (Some(server), _) => server.clone(),
            (None, Some(config)) => dialled_here(config.coordinator.grpc).to_string(),
            (None, None) => client::DEFAULT_SERVER.to_owned(),
        };
        let cluster = connect(&server).await;
        if let Some(config) = &config {
            report.checks.extend(local::settings(config));
            report.checks.extend(local::model(config));
            report.checks.extend(local::advertised(config).await);
            if args.server.is_none() {
                let (grpc, http) = (config.coordinator.grpc, config.coordinator.http);
                report.push(local::port("coordinator.grpc", grpc, cluster.is_ok()));
                report.push(local::port("coordinator.http", http, cluster.is_ok()));
                if cluster.is_ok() {
                    report.push(http_check(dialled_here(http)).await);
                }
            }
            for worker in &config.workers {
                report.checks.extend(local::host(worker, config).await);
            }
        }
        let snapshot = match cluster {
            Ok((client, snapshot)) => {
                examine(&client, args.gentle, &mut report).await;
                Some(snapshot)
            }
            Err(error) if args.server.is_some() => {
                report.push(Check::fail("cluster", local::one_line(&error)));
                None
            }
            Err(_nobody) => {
                report.push(Check::skipped(
                    "cluster",
                    format!("none runs at {server}; its links are measured once it does"),
                ));
                None
            }
        };
        if let Some(path) = &args.bundle {
            let mut files = vec![("report.txt", report.render()), ("report.json", format!("{:#}\n", report.to_json()))];
            files.extend(config.as_ref().map(|config| ("settings.txt", bundle::settings(config))));
            files.extend(
                snapshot.and_then(|snapshot| Some(("snapshot.json", serde_json::to_string_pretty(&snapshot).ok()?))),
            );
            if let Some(log) = &args.log {
                files.push(("log.txt", bundle::log_end(log)?));
            }
            bundle::write(path, files, &scrubber(config.as_ref()))?;
        }
        print(&if args.json { format!("{:#}\n", report.to_json()) } else { report.render() })?;
        Ok(report.is_sound())
    })
}

fn scrubber(config: Option<&Config>) -> Scrubber {
    Scrubber::new(config.and_then(|config| config.secret.text()).map(str::to_owned))
}

async fn connect(server: &str) -> Result<(Client, grokpipe_proto::snapshot::ClusterSnapshot), CliError> {
    let client = Client::connect(server).await?;
    let snapshot = client.status().await?;
    Ok((client, snapshot))
}

/// Has the cluster examine itself, and judges what it finds.
async fn examine(client: &Client, gentle: bool, report: &mut Report) {
    let (mut nodes, mut links): (Vec<DiagnosedNode>, Vec<DiagnosedLink>) = (Vec::new(), Vec::new());
    match client.status().await {
        Ok(snapshot) if snapshot.verdict().serving => report.push(Check::ok("cluster", &snapshot.verdict().text)),
        Ok(snapshot) => report.push(Check::warn("cluster", &snapshot.verdict().text).advise("see `grokpipe status`")),
        Err(error) => report.push(Check::fail("cluster", local::one_line(&error))),
    }
    let asked = (Instant::now(), clock_us());
    let mut findings = match client.diagnose(gentle).await {
        Ok(findings) => findings,
        Err(error) => return report.push(Check::fail("links", local::one_line(&error))),
    };
    let mut is_whole = false;
    loop {
        match findings.message().await {
            Ok(Some(response)) => match response.finding {
                Some(Finding::Started(started)) => {
                    let half = asked.0.elapsed().as_secs_f64() / 2.0;
                    let ahead = asked.1 as f64 / 1e6 + half - started.clock_us as f64 / 1e6;
                    report.checks.extend(verdicts::clock("this machine", Some(ahead), Some(half)));
                }
                Some(Finding::Node(node)) => nodes.push(node),
                Some(Finding::Link(link)) => links.push(link),
                Some(Finding::Done(_)) => is_whole = true,
                None => {}
            },
            Ok(None) => break,
            Err(status) => {
                report.push(Check::fail("links", format!("the diagnosis broke off: {}", status.message())));
                break;
            }
        }
    }
    report.push(verdicts::builds(&nodes));
    report.checks.extend(nodes.iter().flat_map(verdicts::node));
    let wrong: Vec<Check> = links.iter().filter_map(verdicts::link).collect();
    if wrong.is_empty() && is_whole {
        report.push(Check::ok("links", format!("all {} work", links.len())));
    }
    report.checks.extend(wrong);
    report.links = links;
}

async fn http_check(address: SocketAddr) -> Check {
    let what = "HTTP";
    match timeout(HTTP_WITHIN, http_answer(address)).await {
        Err(_late) => Check::fail(what, format!("{address} gives no answer within {} s", HTTP_WITHIN.as_secs())),
        Ok(Err(error)) => Check::fail(what, format!("{address}: {error}")),
        Ok(Ok(line)) if line.starts_with("HTTP/1.1 200") || line.starts_with("HTTP/1.1 503") => {
            Check::ok(what, format!("{address} answers /readyz: {}", line.trim_start_matches("HTTP/1.1 ")))
        }
        Ok(Ok(line)) => Check::fail(what, format!("{address} answers {line:?}")),
    }
}

async fn http_answer(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(4096).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned())
}

/// An address that listens everywhere is dialled on loopback from here.
fn dialled_here(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, address.port())),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::from((Ipv6Addr::LOCALHOST, address.port())),
        _ => address,
    }
}
