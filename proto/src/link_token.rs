//! Who may send frames to a stage, and results to the coordinator.
//!
//! Everybody who can reach a port could otherwise speak as the previous stage. The coordinator tells each stage, over the worker's own
//! stream, the token that its previous stage will present and the one that it is to present itself. Tokens are derived from a key that
//! lives as long as the coordinator's process and never leaves it, so they can be made where nothing is random, and guessed by nobody.

use std::fmt;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tonic::{
    Request, Status,
    metadata::{MetadataMap, MetadataValue},
};

use crate::{ids::PlanEpoch, secret::is_equal};

const HEADER: &str = "grokpipe-link-bin";
const TOKEN_BYTES: usize = 32;

/// What all tokens of a coordinator's process are derived from. Never printed, never sent.
#[derive(Clone)]
pub struct LinkKey([u8; 32]);

/// What a sender presents when it opens a stream. Never printed.
#[derive(Clone)]
pub struct LinkToken([u8; TOKEN_BYTES]);

impl LinkKey {
    /// A key; random bytes in production.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// For frames into stage `stage` (from 0) of a plan epoch.
    pub fn frames(&self, plan_epoch: PlanEpoch, stage: usize) -> LinkToken {
        self.token("frames", plan_epoch, stage as u64)
    }

    /// For results of a plan epoch.
    pub fn results(&self, plan_epoch: PlanEpoch) -> LinkToken {
        self.token("results", plan_epoch, 0)
    }

    fn token(&self, use_of_it: &str, plan_epoch: PlanEpoch, stage: u64) -> LinkToken {
        let mut hash = Sha256::new();
        // Every part but the last has a length of its own, so that no two uses hash the same bytes.
        hash.update(self.0);
        hash.update(plan_epoch.0.to_le_bytes());
        hash.update(stage.to_le_bytes());
        hash.update(use_of_it);
        LinkToken(hash.finalize().into())
    }
}

impl LinkToken {
    /// The token of an assignment's field; `None` when that is no token.
    pub fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// As an assignment carries it.
    pub fn to_wire(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    /// A call that presents this token.
    pub fn present<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let mut value = MetadataValue::from_bytes(&self.0);
        value.set_sensitive(true);
        request.metadata_mut().insert_bin(HEADER, value);
        request
    }

    /// Whether a call presents this token.
    pub fn is_presented(&self, metadata: &MetadataMap) -> bool {
        let presented = metadata.get_bin(HEADER).and_then(|value| value.to_bytes().ok());
        presented.is_some_and(|presented| is_equal(&presented, &self.0))
    }
}

/// What a sender is told whose token is not the wanted one. Says nothing that a stranger does not know.
pub fn refused() -> Status {
    Status::permission_denied("expected the token of a link of the plan in force, found none or another one")
}

impl PartialEq for LinkToken {
    fn eq(&self, other: &Self) -> bool {
        is_equal(&self.0, &other.0)
    }
}

impl Eq for LinkToken {}

impl fmt::Debug for LinkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkKey")
    }
}

impl fmt::Debug for LinkToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkToken")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_link_of_every_epoch_and_process_has_a_token_of_its_own() {
        let keys = [LinkKey::new([1; 32]), LinkKey::new([2; 32])];
        let mut tokens = HashSet::new();
        for key in &keys {
            for epoch in [0, 1, 2, u64::MAX].map(PlanEpoch) {
                assert!(tokens.insert(key.results(epoch).to_wire()));
                for stage in 0..4 {
                    assert!(tokens.insert(key.frames(epoch, stage).to_wire()));
                    assert_eq!(key.frames(epoch, stage), key.frames(epoch, stage));
                }
            }
        }
    }

    #[test]
    fn only_the_wanted_token_is_accepted() {
        let key = LinkKey::new([7; 32]);
        let wanted = key.frames(PlanEpoch(3), 1);
        assert!(wanted.is_presented(wanted.present(()).metadata()));
        for other in [
            key.frames(PlanEpoch(2), 1),
            key.frames(PlanEpoch(3), 0),
            key.results(PlanEpoch(3)),
            LinkKey::new([8; 32]).frames(PlanEpoch(3), 1),
        ] {
            assert!(!wanted.is_presented(other.present(()).metadata()));
        }
        assert!(!wanted.is_presented(Request::new(()).metadata()));
        for short in [&[][..], &wanted.to_wire()[..31]] {
            assert!(LinkToken::from_wire(short).is_none());
            let mut request = Request::new(());
            request.metadata_mut().insert_bin(HEADER, MetadataValue::from_bytes(short));
            assert!(!wanted.is_presented(request.metadata()));
        }
        assert_eq!(LinkToken::from_wire(&wanted.to_wire()), Some(wanted));
    }

    #[test]
    fn keys_and_tokens_are_not_printed() {
        let key = LinkKey::new([7; 32]);
        assert_eq!(format!("{key:?} {:?}", key.results(PlanEpoch(1))), "LinkKey LinkToken");
        assert!(format!("{:?}", key.results(PlanEpoch(1)).present(()).metadata()).contains("Sensitive"));
    }
}
