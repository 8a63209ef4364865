//! A cluster of real processes under load, with one random fault after the other:
//!
//! `cargo run -p grokpipe-tests --bin chaos -- --minutes 20 --seed 7`
//!
//! Linux only. All is on loopback, and only its own children are touched. It says what it does, and ends with one line: faults by kind,
//! requests, wrong tokens and hung requests (there must be none), the longest time from the end of a fault until an answer was exact
//! again, and what the processes take. Exit code 1 when a token was wrong, a request hung, or that time was above `--within`.

mod cluster;
mod faults;
mod hang;
mod load;
mod random;
mod relay;

use std::{
    collections::BTreeMap,
    error::Error,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Duration,
};

use clap::Parser;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use cluster::{Cluster, Growth};
use faults::Fault;
use load::{Outcome, Question, Tally, ask, client, questions};
use random::Random;

/// A cluster under load, with one random fault after the other
#[derive(Debug, Parser)]
struct Args {
    /// How long
    #[arg(long, default_value_t = 20.0)]
    minutes: f64,
    /// Of the faults and the questions
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Workers
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    workers: u32,
    /// Clients that ask all the time
    #[arg(long, default_value_t = 4)]
    clients: u32,
    /// Seconds within which an answer must be exact again once a fault is over
    #[arg(long, default_value_t = 10.0)]
    within: f64,
    /// Where logs are left [default: a temporary folder that is removed]
    #[arg(long)]
    logs: Option<std::path::PathBuf>,
}

/// Without an exact answer for this long, the run ends.
const GIVE_UP_AFTER: Duration = Duration::from_secs(180);

/// Asks until an answer is exact; how long that took.
async fn until_exact(grpc: &str, question: &Question) -> Result<Duration, String> {
    let since = Instant::now();
    let mut last = String::new();
    while since.elapsed() < GIVE_UP_AFTER {
        match ask(grpc, question).await {
            Outcome::Exact => return Ok(since.elapsed()),
            Outcome::Wrong(what) => return Err(format!("WRONG TOKENS: {what}")),
            Outcome::Hung => "it hung".clone_into(&mut last),
            Outcome::Error(status) => last = format!("{:?}: {}", status.code(), status.message()),
        }
        sleep(Duration::from_millis(50)).await;
    }
    Err(format!("no exact answer within {GIVE_UP_AFTER:?}; the last one: {last}"))
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args = Args::parse();
    // Before anything waits for the cluster: it may have to be built.
    grokpipe_tests::processes::binary();
    let temporary = tempfile::tempdir()?;
    let folder = args.logs.clone().unwrap_or_else(|| temporary.path().to_owned());
    std::fs::create_dir_all(&folder)?;
    let mut random = Random::new(args.seed);
    let questions = Arc::new(questions());
    let cluster = Cluster::start(args.workers as usize, &folder).await?;
    let ready = until_exact(&cluster.grpc, &questions[0]).await?;
    eprintln!("seed {}: serving after {:.1} s; logs in {}", args.seed, ready.as_secs_f64(), folder.display());

    let (over, ends) = watch::channel(false);
    let tally = Arc::new(Mutex::new(Tally::default()));
    let clients: Vec<_> = (0..args.clients)
        .map(|number| {
            let random = Random::new(args.seed ^ (u64::from(number) + 1) << 32);
            tokio::spawn(client(cluster.grpc.clone(), Arc::clone(&questions), random, Arc::clone(&tally), ends.clone()))
        })
        .collect();
    let (members, mut ended) = (cluster.members.clone(), ends.clone());
    let watching = tokio::spawn(async move {
        let mut growth = Growth::default();
        loop {
            growth.look(&members);
            tokio::select! {
                () = sleep(Duration::from_secs(5)) => {}
                _ends = ended.changed() => return growth,
            }
        }
    });

    let started = Instant::now();
    let (mut counts, mut longest) = (BTreeMap::<&str, u64>::new(), (Duration::ZERO, String::new()));
    let mut trouble = None;
    while started.elapsed().as_secs_f64() < 60.0 * args.minutes && trouble.is_none() {
        sleep(Duration::from_millis(random.between(1000, 6000))).await;
        let fault = Fault::random(&mut random, args.workers as usize);
        *counts.entry(fault.kind()).or_default() += 1;
        let at = started.elapsed().as_secs();
        let name = fault.strike(&cluster).await;
        match until_exact(&cluster.grpc, random.pick(&questions)).await {
            Ok(took) => {
                eprintln!("{at:5} s  {name}: exact again after {:.2} s", took.as_secs_f64());
                if took > longest.0 {
                    longest = (took, name);
                }
            }
            Err(reason) => trouble = Some(format!("{name}: {reason}")),
        }
    }
    // What is under way comes to its end before memory is looked at for the last time.
    sleep(Duration::from_secs(2)).await;
    over.send_replace(true);
    for client in clients {
        client.await?;
    }
    let growth = watching.await?;
    let tally = std::mem::take(&mut *tally.lock().expect("no panic"));
    let faults = counts.iter().map(|(kind, count)| format!("{kind} {count}")).collect::<Vec<_>>().join(", ");
    let errors = tally.errors.iter().map(|(code, count)| format!("{code} {count}")).collect::<Vec<_>>().join(", ");
    if let Some(trouble) = &trouble {
        eprintln!("{trouble}");
    }
    println!(
        "seed {}, {} s: faults: {faults}; {} requests: {} exact, errors: {errors}; {} wrong, {} hung; exact again within {:.2} s ({}); {}",
        args.seed,
        started.elapsed().as_secs(),
        tally.requests(),
        tally.exact,
        tally.wrong.len(),
        tally.hung,
        longest.0.as_secs_f64(),
        longest.1,
        growth.text(&cluster.members),
    );
    let good = trouble.is_none() && tally.wrong.is_empty() && tally.hung == 0 && longest.0.as_secs_f64() <= args.within;
    cluster.end().await;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
