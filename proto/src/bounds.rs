//! The longest texts that a worker may say of itself.
//!
//! All of them can reach the snapshot, which anybody may ask for again and again. A worker cuts its own texts; the coordinator refuses
//! a hello with a longer one and cuts those in later messages.

/// Bytes of a device's name.
pub const DEVICE_BYTES_MAX: usize = 256;
/// Bytes of a fingerprint.
pub const FINGERPRINT: usize = 1024;
/// Bytes of a build's version and revision.
pub const BUILD_BYTES_MAX: usize = 128;
/// Bytes of a model's digest.
pub const DIGEST_BYTES_MAX: usize = 128;
/// Notes in a hello.
pub const NOTES_MAX: usize = 16;
/// Bytes of a note.
pub const NOTE_BYTES_MAX: usize = 512;
/// Bytes of a reason why something failed.
pub const REASON_BYTES_MAX: usize = 1024;
/// Bytes of a worker's name.
pub const NAME_BYTES_MAX: usize = 64;
/// Bytes of a message on a worker's membership stream: far more than the longest hello.
pub const MEMBERSHIP_MESSAGE_BYTES_MAX: usize = 64 << 10;

/// `text` with at most `bytes` bytes. Where it was cut, it ends with an ellipsis.
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
