//! How long the texts may be that a worker says of itself.
//!
//! All of them stand in the snapshot, which anybody may ask for again and again. A worker cuts its own texts; the coordinator refuses a
//! hello that is longer and cuts what comes later.

/// Bytes of a device's name.
pub const DEVICE: usize = 256;
/// Bytes of a fingerprint.
pub const FINGERPRINT: usize = 1024;
/// Bytes of a build's version and revision.
pub const BUILD: usize = 128;
/// Bytes of a model's digest.
pub const DIGEST: usize = 128;
/// Notes in a hello.
pub const NOTES: usize = 16;
/// Bytes of each.
pub const NOTE: usize = 512;
/// Bytes of a reason why something failed.
pub const REASON: usize = 1024;
/// Bytes of a worker's name.
pub const NAME: usize = 64;
/// Bytes of a whole message on a worker's membership stream: far more than a hello at its bounds.
pub const MEMBERSHIP_MESSAGE: usize = 64 << 10;

/// `text`, cut so that it has at most `bytes` bytes; then it ends with an ellipsis.
pub fn cut(mut text: String, bytes: usize) -> String {
    const ELLIPSIS: &str = "…";
    if text.len() > bytes {
        text.truncate(text.floor_char_boundary(bytes.saturating_sub(ELLIPSIS.len())));
        text.push_str(ELLIPSIS);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        for (text, bytes, expected) in
            [("short", 5, "short"), ("longer", 5, "lo…"), ("äöü", 5, "ä…"), ("äöü", 6, "äöü"), ("", 3, "")]
        {
            assert_eq!(cut(text.to_owned(), bytes), expected, "{text:?} {bytes}");
        }
    }
}
