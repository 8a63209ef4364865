//! Connections to a running cluster, for the subcommands that ask it something.

use std::{future::Future, sync::Arc, time::Duration};

use grokpipe_proto::{
    address::Address,
    snapshot::ClusterSnapshot,
    transport::{self, Keepalive, Net, Tcp},
    v1::{
        DiagnoseRequest, DiagnoseResponse, GetPlanRequest, GetPlanResponse, GetStatusRequest,
        cluster_service_client::ClusterServiceClient, inference_service_client::InferenceServiceClient,
    },
};
use tonic::{Request, transport::Channel};

use crate::{
    common::variable,
    error::{CliError, Code},
};

/// Where a cluster listens unless told otherwise.
pub(crate) const DEFAULT_SERVER: &str = "127.0.0.1:7070";
/// Variable with the cluster to ask.
const SERVER: &str = "GROKPIPE_SERVER";

/// Which cluster to ask.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServerArgs {
    /// gRPC address of the cluster [env: GROKPIPE_SERVER] [default: 127.0.0.1:7070]
    #[arg(long, value_name = "ADDR", value_parser = parse_server)]
    server: Option<String>,
}

impl ServerArgs {
    /// The flag's, else the environment's, else the usual one.
    ///
    /// # Errors
    /// A usage error when the environment's is no address.
    pub(crate) fn address(&self) -> Result<String, CliError> {
        match (&self.server, variable(SERVER)) {
            (Some(server), _) => Ok(server.clone()),
            (None, None) => Ok(DEFAULT_SERVER.to_owned()),
            (None, Some(text)) => parse_server(&text).map_err(|error| {
                CliError::usage(format!("{SERVER} is {text:?}"))
                    .at(format!("environment variable {SERVER}"))
                    .because(error)
            }),
        }
    }
}

/// Deadline of GetStatus, as the protocol states it.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);
/// Deadline of GetPlan, as the protocol states it.
const PLAN_DEADLINE: Duration = Duration::from_secs(10);

/// Deadline of Diagnose, as the protocol states it.
const DIAGNOSE_DEADLINE: Duration = Duration::from_secs(150);
/// One that has just been done is asked for again after this time, this often.
const DIAGNOSE_PAUSE: Duration = Duration::from_secs(1);
const DIAGNOSE_TRIES: u32 = 10;

/// A value of `--server`.
pub(crate) fn parse_server(text: &str) -> Result<String, String> {
    text.parse().map(|address: Address| address.to_string()).map_err(|error| error.to_string())
}

/// A connected channel.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    server: String,
}

impl Client {
    /// Connects to a gRPC address.
    ///
    /// # Errors
    /// Exit code 3 when nobody answers within two seconds.
    pub(crate) async fn connect(server: &str) -> Result<Self, CliError> {
        let net: Arc<dyn Net> = Arc::new(Tcp);
        let channel = transport::connect(&net, server, Keepalive::Client)
            .await
            .map_err(|error| CliError::unreachable(server, &error))?;
        Ok(Self { channel, server: server.to_owned() })
    }

    /// Address of the server, for messages.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }

    /// For generations.
    pub(crate) fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone())
    }

    /// The cluster as it is now.
    ///
    /// # Errors
    /// What the server said, or that it said something that makes no sense.
    pub(crate) async fn status(&self) -> Result<ClusterSnapshot, CliError> {
        let mut client = ClusterServiceClient::new(self.channel.clone());
        let mut request = Request::new(GetStatusRequest {});
        request.set_timeout(STATUS_DEADLINE);
        let answer = self.within(STATUS_DEADLINE, client.get_status(request)).await?;
        let answer = answer.map_err(|status| CliError::from_status(&self.server, &status))?;
        let nonsense =
            |why: String| CliError::failed("the server's status makes no sense").at(self.server()).because(why);
        let snapshot = answer.into_inner().snapshot.ok_or_else(|| nonsense("it is empty".to_owned()))?;
        snapshot.checked().map_err(|error| nonsense(error.to_string()))
    }

    /// Has the cluster examine its machines and links; what comes are its findings.
    ///
    /// # Errors
    /// What the server said. One that has just done it is asked again for a while.
    pub(crate) async fn diagnose(&self, gentle: bool) -> Result<tonic::Streaming<DiagnoseResponse>, CliError> {
        let mut client = ClusterServiceClient::new(self.channel.clone());
        let mut tries = 0;
        loop {
            let mut request = Request::new(DiagnoseRequest { gentle });
            request.set_timeout(DIAGNOSE_DEADLINE);
            match client.diagnose(request).await {
                Ok(findings) => return Ok(findings.into_inner()),
                Err(status) if status.code() == tonic::Code::ResourceExhausted && tries < DIAGNOSE_TRIES => {
                    tries += 1;
                    tokio::time::sleep(DIAGNOSE_PAUSE).await;
                }
                Err(status) => return Err(CliError::from_status(&self.server, &status)),
            }
        }
    }

    /// The plan in force.
    ///
    /// # Errors
    /// What the server said; exit code 5 when its workers' memory does not suffice.
    pub(crate) async fn plan(&self) -> Result<GetPlanResponse, CliError> {
        let mut client = ClusterServiceClient::new(self.channel.clone());
        let mut request = Request::new(GetPlanRequest {});
        request.set_timeout(PLAN_DEADLINE);
        let answer = self.within(PLAN_DEADLINE, client.get_plan(request)).await?;
        let answer = answer.map_err(|status| match status.code() {
            // Here it is the workers' memory that is exhausted, as the protocol states.
            tonic::Code::ResourceExhausted => CliError::no_room(status.message()).at(&self.server),
            _ => CliError::from_status(&self.server, &status),
        })?;
        Ok(answer.into_inner())
    }

    /// What a call comes to, if it does within its time.
    async fn within<T>(&self, time: Duration, call: impl Future<Output = T>) -> Result<T, CliError> {
        let late = || CliError::no_answer(&self.server, format!("no answer within {} s", time.as_secs()));
        tokio::time::timeout(time, call).await.map_err(|_elapsed| late())
    }
}

/// Runs a client's future to its end on this thread.
///
/// # Errors
/// What the future fails with, or that the system gives no event queue.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::new(Code::Failed, "the runtime could not start").because(error))?;
    let result = runtime.block_on(work);
    // A read of standard input may still block a thread; nobody waits for it.
    runtime.shutdown_background();
    result
}
