//! The one error type of the command line: what went wrong, where, why, and what to do, with the exit code that it ends in.
//!
//! Decides exit codes. Knows nothing of the subcommands; they wrap what they meet with the `From` and helper functions here.

use std::{error::Error, fmt};

use grokpipe_kernels::KernelError;
use grokpipe_model::ModelError;

/// What `grokpipe` exits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// The work failed.
    Failed = 1,
    /// The command line, the configuration or the environment makes no sense.
    Usage = 2,
    /// A server could not be reached.
    Unreachable = 3,
    /// A deadline passed.
    TimedOut = 4,
    /// Memory does not suffice.
    OutOfMemory = 5,
}

impl Code {
    /// The code that a child process, also a `grokpipe`, ended with; anything unknown is a plain failure.
    pub(crate) fn from_exit(status: i32) -> Self {
        match status {
            2 => Self::Usage,
            3 => Self::Unreachable,
            4 => Self::TimedOut,
            5 => Self::OutOfMemory,
            _ => Self::Failed,
        }
    }
}

/// A failure as people read it. Parts that are not known are left out.
#[derive(Debug)]
pub(crate) struct CliError {
    code: Code,
    what: String,
    place: Option<String>,
    why: Option<String>,
    advice: Option<String>,
    /// Whoever read the output has had enough.
    is_closed_output: bool,
}

impl CliError {
    /// An error that ends in `code`; `what` went wrong.
    pub(crate) fn new(code: Code, what: impl Into<String>) -> Self {
        Self { code, what: what.into(), place: None, why: None, advice: None, is_closed_output: false }
    }

    /// [`CliError::new`] with [`Code::Usage`].
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::new(Code::Usage, what)
    }

    /// [`CliError::new`] with [`Code::Failed`].
    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self::new(Code::Failed, what)
    }

    /// Where: a file and line, a flag, an address.
    pub(crate) fn at(mut self, place: impl Into<String>) -> Self {
        self.place = Some(place.into());
        self
    }

    /// Why it is wrong.
    pub(crate) fn because(mut self, why: impl fmt::Display) -> Self {
        self.why = Some(why.to_string());
        self
    }

    /// What to do about it.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Whether all that happened is that whoever read the output has had enough, as `head` has. That is no failure.
    pub(crate) fn is_closed_output(&self) -> bool {
        self.is_closed_output
    }

    /// What the process exits with.
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// The failure of a call to a server at `server`.
    pub(crate) fn from_status(server: &str, status: &tonic::Status) -> Self {
        use tonic::Code as Grpc;
        let why = with_sources(status.message(), status.source());
        if is_own_time_out(status) {
            return Self::no_answer(server, "no answer within the time that the call had");
        }
        // With a source it is not the server that speaks, but what happened on the way to it.
        if status.source().is_some() {
            return Self::new(Code::Unreachable, "the connection to the server failed")
                .at(server.to_owned())
                .because(why)
                .advise("check that the cluster runs and that --server names its gRPC address");
        }
        if status.message().starts_with(TOO_LONG) {
            // What a server sent has its headers; what was made here has none.
            let error = if status.metadata().is_empty() {
                Self::failed("the server's answer is longer than this program reads")
            } else {
                let advice =
                    "shorten it; limits.max_prompt_bytes in the server's configuration says how long a text may be";
                Self::failed("the request is longer than the server takes").advise(advice)
            };
            return error.at(server.to_owned()).because(why);
        }
        let (code, advice) = match status.code() {
            Grpc::Unavailable => (Code::Failed, "see `grokpipe status` for the nodes"),
            Grpc::DeadlineExceeded => (Code::TimedOut, "try again, or allow more time"),
            Grpc::ResourceExhausted => (Code::Failed, "try again later"),
            Grpc::InvalidArgument | Grpc::OutOfRange => (Code::Failed, "change the request"),
            Grpc::Unimplemented => (Code::Failed, "this server does not offer it yet"),
            _ => (Code::Failed, ""),
        };
        let error = Self::new(code, format!("the server answered {}", grpc_name(status.code())))
            .at(server.to_owned())
            .because(why);
        if advice.is_empty() { error } else { error.advise(advice) }
    }

    /// A server at `server` that took a call and said nothing until the time for it was over.
    pub(crate) fn no_answer(server: &str, why: impl fmt::Display) -> Self {
        Self::new(Code::TimedOut, "the server does not answer")
            .at(server.to_owned())
            .because(why)
            .advise("try again; `grokpipe status` says whether it answers at all")
    }

    /// Whether trying again may help: nobody answered, or not in time.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self.code, Code::Unreachable | Code::TimedOut)
    }

    /// The planner refuses for lack of memory.
    pub(crate) fn no_room(why: impl fmt::Display) -> Self {
        Self::new(Code::OutOfMemory, "the workers' memory does not suffice")
            .because(why)
            .advise("add a worker, give one more memory, or lower kv.tokens")
    }

    /// A server at `server` that could not be dialled.
    pub(crate) fn unreachable(server: &str, error: &(dyn Error + 'static)) -> Self {
        Self::new(Code::Unreachable, "no server answers")
            .at(server.to_owned())
            .because(with_sources(&error.to_string(), error.source()))
            .advise("check that the cluster runs and that --server names its gRPC address")
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        for (label, part) in [("where", &self.place), ("why", &self.why), ("do", &self.advice)] {
            if let Some(part) = part {
                write!(f, "\n  {label:<6} {part}")?;
            }
        }
        Ok(())
    }
}

impl Error for CliError {}

impl From<ModelError> for CliError {
    fn from(error: ModelError) -> Self {
        Self::failed("the model cannot be used").because(error)
    }
}

impl From<KernelError> for CliError {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::OutOfMemory { .. } => Self::new(Code::OutOfMemory, "the device cannot do this").because(error),
            KernelError::NotFinite { .. } => Self::failed("the model's results are not finite")
                .because(error)
                .advise("look for damaged weights: `grokpipe convert` names a number that is not finite"),
            KernelError::Model(error) => error.into(),
            _ => Self::failed("the device cannot do this").because(error),
        }
    }
}

/// What `logits` and `bench` return: any error, of which the known ones keep their codes.
impl From<Box<dyn Error + Send + Sync>> for CliError {
    fn from(error: Box<dyn Error + Send + Sync>) -> Self {
        let error = match error.downcast::<Self>() {
            Ok(own) => return *own,
            Err(other) => other,
        };
        let error = match error.downcast::<KernelError>() {
            Ok(kernel) => return (*kernel).into(),
            Err(other) => other,
        };
        match error.downcast::<ModelError>() {
            Ok(model) => (*model).into(),
            Err(other) => Self::failed("the command failed").because(with_sources(&other.to_string(), other.source())),
        }
    }
}

/// Writing to standard output failed, as it does when a disk is full or a pipe is closed.
pub(crate) fn output(error: &std::io::Error) -> CliError {
    let is_closed_output = error.kind() == std::io::ErrorKind::BrokenPipe;
    CliError { is_closed_output, ..CliError::failed("the output could not be written") }
        .at("standard output")
        .because(error)
}

/// How tonic begins what it says of a message beyond a limit, on either side.
const TOO_LONG: &str = "Error, decoded message length too large";

/// Whether this side gave up waiting: tonic says so as if the call had been cancelled.
fn is_own_time_out(status: &tonic::Status) -> bool {
    let mut source = status.source();
    while let Some(cause) = source {
        if cause.is::<tonic::TimeoutExpired>() {
            return true;
        }
        source = cause.source();
    }
    status.code() == tonic::Code::Cancelled && status.message() == "Timeout expired"
}

/// A message and those of its causes that say something new.
fn with_sources(message: &str, mut source: Option<&(dyn Error + 'static)>) -> String {
    let mut text = message.to_owned();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// A gRPC code as the standard spells it.
fn grpc_name(code: tonic::Code) -> &'static str {
    use tonic::Code as Grpc;
    match code {
        Grpc::Ok => "OK",
        Grpc::Cancelled => "CANCELLED",
        Grpc::Unknown => "UNKNOWN",
        Grpc::InvalidArgument => "INVALID_ARGUMENT",
        Grpc::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Grpc::NotFound => "NOT_FOUND",
        Grpc::AlreadyExists => "ALREADY_EXISTS",
        Grpc::PermissionDenied => "PERMISSION_DENIED",
        Grpc::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Grpc::FailedPrecondition => "FAILED_PRECONDITION",
        Grpc::Aborted => "ABORTED",
        Grpc::OutOfRange => "OUT_OF_RANGE",
        Grpc::Unimplemented => "UNIMPLEMENTED",
        Grpc::Internal => "INTERNAL",
        Grpc::Unavailable => "UNAVAILABLE",
        Grpc::DataLoss => "DATA_LOSS",
        Grpc::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_parts_are_shown_in_order_and_missing_ones_left_out() {
        let full =
            CliError::usage("kv.tokens is \"many\"").at("cluster.toml:3").because("expected a number").advise("8192");
        assert_eq!(
            full.to_string(),
            "kv.tokens is \"many\"\n  where  cluster.toml:3\n  why    expected a number\n  do     8192"
        );
        assert_eq!(CliError::failed("no").to_string(), "no");
    }

    #[test]
    fn out_of_memory_keeps_its_code_through_a_boxed_error() {
        let error = KernelError::OutOfMemory {
            what: "layer 3".into(),
            needed_bytes: 9,
            available_bytes: 4,
            device: "cpu".into(),
        };
        let boxed: Box<dyn Error + Send + Sync> = Box::new(error);
        assert_eq!(CliError::from(boxed).code(), Code::OutOfMemory);
        let boxed: Box<dyn Error + Send + Sync> = Box::new(CliError::usage("x"));
        assert_eq!(CliError::from(boxed).code(), Code::Usage);
        assert_eq!(CliError::from(Box::<dyn Error + Send + Sync>::from("other")).code(), Code::Failed);
    }

    #[test]
    fn what_is_wrong_with_a_model_is_not_said_to_be_the_device() {
        let model =
            KernelError::Model(ModelError::Io { path: "m.gguf".into(), source: std::io::ErrorKind::NotFound.into() });
        let results = KernelError::NotFinite { what: "logits", row: 0 };
        for (error, says) in [(model, "the model cannot be used"), (results, "the model's results are not finite")] {
            assert!(CliError::from(error).to_string().starts_with(says));
        }
    }

    #[test]
    fn grpc_codes_map_to_exit_codes() {
        let cases = [
            (tonic::Status::unavailable("layers 3..4 are missing"), Code::Failed),
            (tonic::Status::deadline_exceeded("10 s"), Code::TimedOut),
            (tonic::Status::invalid_argument("empty prompt"), Code::Failed),
        ];
        for (status, code) in cases {
            let error = CliError::from_status("127.0.0.1:7070", &status);
            assert_eq!(error.code(), code, "{status:?}");
            assert!(error.to_string().contains(status.message()), "{error}");
            assert!(error.to_string().contains("the server answered"), "{error}");
        }
    }

    #[test]
    fn only_what_a_server_said_is_called_its_answer() {
        let on_the_way = || tonic::Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        let own_limit = tonic::Status::out_of_range("Error, decoded message length too large: found 9 bytes");
        for (status, code) in [
            (tonic::Status::cancelled("Timeout expired"), Code::TimedOut),
            (on_the_way(), Code::Unreachable),
            (own_limit, Code::Failed),
        ] {
            let error = CliError::from_status("127.0.0.1:7070", &status);
            assert_eq!(error.code(), code, "{error}");
            assert!(!error.to_string().contains("the server answered"), "{error}");
        }
    }
}
