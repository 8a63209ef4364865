//! Whether an HTTP/2 client has opened a stream yet. Pure: bytes come in, in pieces of any size.
//!
//! Only frame headers are looked at; whether what they frame makes sense is the HTTP/2 library's to say.

/// What a client sends before its first frame.
const PREFACE_BYTES: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const FRAME_HEADER_BYTES: usize = 9;
/// The type of the frame that opens a stream.
const HEADERS: u8 = 1;

/// The beginning of a connection.
#[derive(Debug)]
pub(super) struct Opening {
    /// Bytes until the next frame header.
    skip: usize,
    header: [u8; FRAME_HEADER_BYTES],
    filled: usize,
}

impl Opening {
    pub(super) fn new() -> Self {
        Self { skip: PREFACE_BYTES, header: [0; FRAME_HEADER_BYTES], filled: 0 }
    }

    /// Takes the next bytes; whether the client has opened a stream with them.
    pub(super) fn has_stream(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return false;
            }
            let taken = (FRAME_HEADER_BYTES - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled == FRAME_HEADER_BYTES {
                let [high, middle, low, kind, ..] = self.header;
                if kind == HEADERS {
                    return true;
                }
                self.skip = u32::from_be_bytes([0, high, middle, low]) as usize;
                self.filled = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 1, 0, 0];
    const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1];
    const HEADERS: &[u8] = &[0, 0, 1, 1, 4, 0, 0, 0, 1];

    #[test]
    fn only_a_headers_frame_opens_a_stream() {
        let cases: [(&[&[u8]], bool); 7] = [
            (&[], false),
            (&[&PREFACE[..10]], false),
            (&[PREFACE], false),
            (&[PREFACE, SETTINGS], false),
            (&[PREFACE, SETTINGS, PING, PING], false),
            (&[PREFACE, SETTINGS, &HEADERS[..8]], false),
            (&[PREFACE, SETTINGS, PING, HEADERS], true),
        ];
        for (frames, expected) in cases {
            let bytes = frames.concat();
            for piece in 1..=bytes.len().max(1) {
                let mut opening = Opening::new();
                let found = bytes.chunks(piece).any(|piece| opening.has_stream(piece));
                assert_eq!(found, expected, "{frames:?} in pieces of {piece}");
            }
        }
    }
}
