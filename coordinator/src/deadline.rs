//! When something has to be over, and what becomes of work that is not.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::request::RequestError;

/// Longest time that counts as one; nobody waits for more than a century.
const FOREVER: Duration = Duration::from_secs(1 << 31);

/// When something has to be over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// The time that was given for all of it, for messages.
    pub limit: Duration,
    /// Until when.
    pub until: Instant,
}

impl Deadline {
    /// This much from now on.
    pub fn after(limit: Duration) -> Self {
        Self { limit, until: Instant::now() + limit.min(FOREVER) }
    }

    /// Whether it has passed.
    pub fn is_over(&self) -> bool {
        self.until <= Instant::now()
    }

    /// Whichever comes first.
    #[must_use]
    pub fn or_earlier(self, other: Option<Self>) -> Self {
        other.filter(|other| other.until < self.until).unwrap_or(self)
    }

    /// What `work` gives, unless it takes too long.
    ///
    /// # Errors
    /// [`RequestError::CallDeadline`].
    pub async fn bounds<T>(self, work: impl Future<Output = T>) -> Result<T, RequestError> {
        timeout_at(self.until, work).await.map_err(|_late| RequestError::CallDeadline { limit: self.limit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_without_an_end_is_not_over() {
        assert!(!Deadline::after(Duration::MAX).is_over());
    }
}
