//! The cluster's shared secret: membership and pipeline calls carry it, and a call without it is refused.

use std::{fmt, net::SocketAddr};

use subtle::ConstantTimeEq;
use tonic::{Request, Status, metadata::MetadataValue, service::Interceptor};

use crate::address::is_loopback;

const HEADER: &str = "authorization";

/// The shared secret, or none for a cluster on loopback. Never printed.
#[derive(Clone, Default)]
pub struct Secret(Option<MetadataValue<tonic::metadata::Ascii>>);

/// Why a text cannot be a secret.
#[derive(Debug, thiserror::Error)]
#[error("expected a secret of 16 to 1024 visible ASCII characters, found {0}")]
pub struct BadSecret(&'static str);

impl Secret {
    /// No secret: for clusters that listen on loopback only.
    pub fn none() -> Self {
        Self(None)
    }

    /// A secret.
    ///
    /// # Errors
    /// [`BadSecret`] when it is too short to guard anything or cannot travel in a header.
    pub fn new(text: &str) -> Result<Self, BadSecret> {
        if text.len() < 16 {
            return Err(BadSecret("fewer characters"));
        }
        if text.len() > 1024 {
            return Err(BadSecret("more characters"));
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadSecret("other characters"));
        }
        let mut value = MetadataValue::try_from(format!("Bearer {text}"))
            .map_err(|_invalid| BadSecret("characters that a header cannot carry"))?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }

    /// Whether there is a secret.
    pub fn is_set(&self) -> bool {
        self.0.is_some()
    }

    /// Client side: puts the secret on every call.
    pub fn attach(&self) -> impl Interceptor + Clone + Send + Sync + use<> {
        let secret = self.clone();
        move |mut request: Request<()>| {
            if let Some(value) = &secret.0 {
                request.metadata_mut().insert(HEADER, value.clone());
            }
            Ok(request)
        }
    }

    /// Server side: refuses every call that does not carry the secret.
    pub fn require(&self) -> impl Interceptor + Clone + Send + Sync + use<> {
        let secret = self.clone();
        move |request: Request<()>| secret.check(&request).map(|()| request)
    }

    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let Some(expected) = &self.0 else { return Ok(()) };
        match request.metadata().get(HEADER) {
            None => {
                Err(Status::unauthenticated("expected the cluster's secret, found none; set [cluster] secret_file"))
            }
            Some(found) if is_equal(expected.as_encoded_bytes(), found.as_encoded_bytes()) => Ok(()),
            Some(_) => Err(Status::unauthenticated("expected the cluster's secret, found another one")),
        }
    }
}

/// Compares without stopping at the first difference, so that time does not tell how much of a guess was right.
pub(crate) fn is_equal(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_set() { "Secret(set)" } else { "Secret(none)" })
    }
}

/// An address that others can reach may only be opened with a secret.
pub fn needs_secret(address: &SocketAddr) -> bool {
    !is_loopback(address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(secret: &Secret) -> Request<()> {
        secret.attach().call(Request::new(())).unwrap()
    }

    #[test]
    fn only_the_right_secret_passes() {
        let ours = Secret::new("0123456789abcdef").unwrap();
        let theirs = Secret::new("0123456789abcdeg").unwrap();
        let longer = Secret::new("0123456789abcdef0").unwrap();
        assert!(ours.require().call(call(&ours)).is_ok());
        for wrong in [&theirs, &longer, &Secret::none()] {
            let status = ours.require().call(call(wrong)).unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unauthenticated);
            assert!(!status.message().contains("0123456789"));
        }
        assert!(Secret::none().require().call(call(&ours)).is_ok());
    }

    #[test]
    fn secrets_that_guard_nothing_are_refused() {
        for bad in ["", "short", "with a space in between", "umlaut-äöü-umlaut-äöü", "newline\nnewline\nnewline"]
        {
            assert!(Secret::new(bad).is_err(), "{bad:?}");
        }
        assert!(Secret::new(&"x".repeat(1025)).is_err());
    }

    #[test]
    fn a_secret_is_not_printed() {
        let secret = Secret::new("correct-horse-battery").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(set)");
    }
}
