//! The coordinator's gRPC services. They check what comes in, hand it to the engine, and translate what comes back.
//!
//! `membership` and `results` are for workers and demand the cluster's secret; `inference` and `cluster` are for clients.

pub mod cluster;
pub mod errors;
pub mod inference;
pub mod intake;
pub mod membership;
pub mod results;
pub mod timed;
mod wire;
mod withheld;
