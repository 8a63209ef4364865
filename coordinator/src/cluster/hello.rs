//! Which hellos are accepted: every value that a plan or a message rests on is checked here, once.

use grokpipe_proto::{
    address::Address,
    bounds,
    ids::{BadName, Generation, WorkerName},
};

use super::{JoinRefusal, messages::Hello};

/// Checks the values of a hello; the name of its worker.
pub(super) fn check_hello(hello: &Hello) -> Result<WorkerName, JoinRefusal> {
    let invalid = |field, expected: &str, found: String| {
        Err(JoinRefusal::Invalid { field, expected: expected.to_owned(), found })
    };
    let name = match hello.name.parse::<WorkerName>() {
        Ok(name) => name,
        Err(BadName { found }) => return invalid("name", WorkerName::EXPECTED, format!("{found:?}")),
    };
    if hello.generation == Generation::default() {
        return invalid("generation", "a positive number", "0".into());
    }
    if !(hello.read_bandwidth.is_finite() && hello.read_bandwidth > 0.0) {
        return invalid("read_bandwidth", "a positive number of bytes a second", hello.read_bandwidth.to_string());
    }
    if !(hello.flop_rate.is_finite() && hello.flop_rate > 0.0) {
        return invalid("flop_rate", "a positive number", hello.flop_rate.to_string());
    }
    check_rates(hello)?;
    check_texts(hello)?;
    let address = hello.data_address.parse::<Address>();
    if !address.is_ok_and(|address| address.port() > 0) {
        return invalid(
            "data_address",
            "host:port, an IPv6 address in brackets",
            format!("{:?}", hello.data_address.chars().take(80).collect::<String>()),
        );
    }
    if hello.held_layer_start > hello.held_layer_end {
        return invalid(
            "held_layers",
            "start before end",
            format!("{}..{}", hello.held_layer_start, hello.held_layer_end),
        );
    }
    Ok(name)
}

/// Checks that texts for people are not too long.
fn check_texts(hello: &Hello) -> Result<(), JoinRefusal> {
    let invalid = |field, most: usize, found: usize| {
        Err(JoinRefusal::Invalid { field, expected: format!("at most {most}"), found: found.to_string() })
    };
    if hello.notes.len() > bounds::NOTES_MAX {
        return invalid("notes", bounds::NOTES_MAX, hello.notes.len());
    }
    let texts = [
        ("device", &hello.device, bounds::DEVICE_BYTES_MAX),
        ("fingerprint", &hello.fingerprint, bounds::FINGERPRINT),
        ("build", &hello.build, bounds::BUILD_BYTES_MAX),
        ("model_digest", &hello.model_digest, bounds::DIGEST_BYTES_MAX),
    ];
    let notes = hello.notes.iter().map(|note| ("notes", note, bounds::NOTE_BYTES_MAX));
    match texts.into_iter().chain(notes).find(|(_, text, most)| text.len() > *most) {
        Some((field, text, most)) => invalid(field, most, text.len()),
        None => Ok(()),
    }
}

/// Most formats that a hello may have rates of; there are some twenty.
const FORMATS_MAX: usize = 64;

/// Checks the rates by format, and what a step takes besides its products.
fn check_rates(hello: &Hello) -> Result<(), JoinRefusal> {
    let invalid = |field, expected: &str, found: String| {
        Err(JoinRefusal::Invalid { field, expected: expected.to_owned(), found })
    };
    if hello.format_rates.len() > FORMATS_MAX {
        return invalid("format_rates", "at most 64", hello.format_rates.len().to_string());
    }
    for rate in &hello.format_rates {
        let is_name = (1..=32).contains(&rate.format.len())
            && rate.format.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        if !is_name {
            let found = format!("{:?}", rate.format.chars().take(80).collect::<String>());
            return invalid("format_rates.format", "1 to 32 of a-z, 0-9, '_'", found);
        }
        for figure in [rate.decode_bytes_per_second, rate.prefill_flops_per_second] {
            if !(figure.is_finite() && figure > 0.0) {
                return invalid("format_rates", "positive numbers", format!("{figure} in {}", rate.format));
            }
        }
    }
    let overhead = hello.step_overhead;
    for seconds in [overhead.step_seconds, overhead.layer_seconds, overhead.draw_seconds] {
        if !(seconds.is_finite() && seconds >= 0.0) {
            return invalid("step_overhead", "seconds that are not negative", seconds.to_string());
        }
    }
    Ok(())
}
