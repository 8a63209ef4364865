//! Removes from a text what must not leave the cluster: paths of files, addresses, process ids, pointers.
//!
//! Reasons are made where something failed, from what the system said, and may hold anything. What a client is told goes through
//! here, so that no place has to think of it.

/// Replaces what was removed.
const WITHHELD: &str = "(withheld)";

/// How the system begins to say that a device failed (EIO). It is no path.
const SYSTEMS_WORD: &str = "Input/output";

/// The text without such places. A path may have spaces, so all of its clause goes: to the next colon, comma or semicolon.
pub(crate) fn without_places(text: &str) -> String {
    let mut told = String::with_capacity(text.len());
    let mut in_path = false;
    let mut after_pid = false;
    for word in text.split_inclusive(' ') {
        let bare = word.trim_end();
        let ends_clause = bare.ends_with([':', ',', ';']);
        let is_path = bare.contains(['/', '\\']) && !bare.starts_with(SYSTEMS_WORD);
        let is_number = bare.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().is_ok();
        if in_path || is_path || is_address(bare) || is_pointer(bare) || (after_pid && is_number) {
            if !told.trim_end().ends_with(WITHHELD) {
                told.push_str(WITHHELD);
            }
            if ends_clause {
                told.extend(bare.chars().last());
            }
            if (ends_clause || !(in_path || is_path)) && word.ends_with(' ') {
                told.push(' ');
            }
        } else {
            told.push_str(word);
        }
        in_path = (in_path || is_path) && !ends_clause;
        after_pid = matches!(bare, "pid" | "process");
    }
    told
}

/// `host:port`, `address:port`, or an address alone.
fn is_address(word: &str) -> bool {
    let word =
        word.trim_matches(|c: char| !(c.is_ascii_alphanumeric() || c == '[' || c == ']' || c == ':' || c == '*'));
    let word = word.trim_end_matches(':');
    let has_port = word.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
    });
    let inner = word.trim_start_matches('[').trim_end_matches(']');
    let numeric = inner.split('%').next().unwrap_or(inner);
    has_port || word.starts_with('[') && word.contains(':') || numeric.parse::<std::net::IpAddr>().is_ok()
}

fn is_pointer(word: &str) -> bool {
    word.to_ascii_lowercase().contains("0x")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_and_words_stay() {
        let cases = [
            (
                "w1 cannot reach w2 at 10.0.0.2:43197: connection timed out",
                "w1 cannot reach w2 at (withheld): connection timed out",
            ),
            ("/my models/ckpt-0/tensor 1: failed to fill whole buffer", "(withheld): failed to fill whole buffer"),
            ("C:\\models\\grok: no such file", "(withheld): no such file"),
            ("worker w1, pid 4711, left", "worker w1, pid (withheld), left"),
            ("resolving node3.lan:7070, no such host", "resolving (withheld), no such host"),
            ("[::1]:7070 refused, fe80::1%eth0 too", "(withheld) refused, (withheld) too"),
            ("at 0x7ffd1234, a bug", "at (withheld), a bug"),
        ];
        for (text, told) in cases {
            assert_eq!(without_places(text), told, "{text:?}");
        }
    }

    #[test]
    fn what_holds_no_place_is_told_as_it_is() {
        let texts = [
            "",
            "Loading: 48 of 64 layers, w1 at 100 %",
            "expected at most 8192 tokens, found 9000: the model's context",
            "worker w2 with layers 16–31 was lost: no heartbeat for 3 s",
            "sampling.top_p: expected a number in (0, 1], found NaN",
            "this cluster has no tokenizer: send token ids, or start it with --tokenizer",
            "expected an end within 300 ms, found 0 tokens by then",
            "worker w1 with layers 0–15 was lost: Input/output error (os error 5)",
        ];
        for text in texts {
            assert_eq!(without_places(text), text);
        }
    }
}
