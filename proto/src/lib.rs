//! What travels between the processes of a cluster: the messages of `grokpipe.v1`, how connections are made and guarded, and how
//! hidden states become bytes.
//!
//! Coordinator and worker meet only here. Nothing here decides what to compute or where.

pub mod address;
pub mod bounds;
mod dial;
pub mod hidden_states;
pub mod ids;
pub mod link;
pub mod link_token;
pub mod probe;
pub mod secret;
pub mod snapshot;
pub mod transport;

/// The generated messages, clients and servers of package `grokpipe.v1`.
#[expect(
    missing_docs,
    clippy::missing_errors_doc,
    clippy::allow_attributes_without_reason,
    reason = "generated from the commented .proto files"
)]
pub mod v1 {
    tonic::include_proto!("grokpipe.v1");
}

/// Descriptors of every message and service, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Protocol versions that this build speaks, both inclusive.
pub const PROTOCOL_VERSIONS: std::ops::RangeInclusive<u32> = 2..=2;

/// How often a worker says that it lives.
pub const HEARTBEAT_INTERVAL: std::time::Duration = std::time::Duration::from_millis(500);

/// Silence after which a peer counts as lost: six missed heartbeats, so that one lost packet is not a lost node.
pub const LOST_AFTER: std::time::Duration = std::time::Duration::from_secs(3);

/// Largest frame for a model: hidden states in f32, ids and positions of every token, and room for the rest.
pub fn max_frame_bytes(max_batch_tokens: usize, hidden_size: usize) -> usize {
    max_batch_tokens.saturating_mul(hidden_size.saturating_mul(4).saturating_add(64)).saturating_add(256 * 1024)
}
