//! File descriptors: as many as the system allows, and which part of them connections may take.
//!
//! The soft limit is often 1,024 for the sake of old programs, far below the hard one. A quarter stays free for files, pipes and the
//! process's own links.

use grokpipe_proto::transport::ConnectionLimits;
use tracing::debug;

/// What is assumed where the system does not say: the usual soft limit.
const USUAL: u64 = 1024;
/// Most connections of an HTTP port: it has short requests and at most 64 event streams.
const HTTP_MAX: usize = 512;

/// Raises the soft limit to the hard one; the limit then.
pub(crate) fn raise() -> u64 {
    let limit = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(USUAL);
    debug!(limit, "file descriptors");
    limit
}

/// Limits of a coordinator's gRPC and HTTP ports.
pub(crate) fn of_coordinator(descriptors: u64) -> (ConnectionLimits, ConnectionLimits) {
    let for_connections = for_connections(descriptors);
    let http = (for_connections / 4).min(HTTP_MAX);
    (limits(for_connections - http), limits(http))
}

/// Limits of a worker's only port.
pub(crate) fn of_worker(descriptors: u64) -> ConnectionLimits {
    limits(for_connections(descriptors))
}

fn for_connections(descriptors: u64) -> usize {
    usize::try_from(descriptors - descriptors / 4).unwrap_or(usize::MAX)
}

fn limits(total: usize) -> ConnectionLimits {
    let default = ConnectionLimits::default();
    ConnectionLimits { total: total.clamp(8, default.total), ..default }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_files_and_links() {
        // Descriptors; then connections of gRPC, HTTP and a worker.
        let cases = [
            (256, [144, 48, 192]),
            (1024, [576, 192, 768]),
            (20_000, [4096, 512, 4096]),
            (u64::MAX, [4096, 512, 4096]),
        ];
        for (descriptors, expected) in cases {
            let (grpc, http) = of_coordinator(descriptors);
            let found = [grpc, http, of_worker(descriptors)].map(|limits| limits.total);
            assert_eq!(found, expected, "{descriptors}");
            assert!((grpc.total + http.total) as u64 <= descriptors - descriptors / 4);
        }
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let raised = raise();
        let (soft, hard) = rlimit::Resource::NOFILE.get().unwrap();
        assert_eq!(raised, soft);
        assert!(soft == hard || cfg!(target_os = "macos"), "{soft} of {hard}");
    }
}
