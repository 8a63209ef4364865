//! One request from its first token to its end: text, stop strings, limits. Pure: tokens go in, what the client is to see comes out.
//!
//! Knows nothing of stages or micro-batches. Text is held back while a character is incomplete or a stop text may be beginning.

use grokpipe_model::tokenizer::{StreamDecoder, Tokenizer};

use crate::request::FinishReason;

/// When a generation ends.
#[derive(Clone, Debug, PartialEq)]
pub struct StopRules {
    /// Most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// Texts that end it; none is empty.
    pub stop: Vec<String>,
    /// Id that ends it; `None` to continue after it.
    pub eos_token_id: Option<u32>,
}

/// What a token adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// From 0, without gaps.
    pub index: u32,
    /// Text that is certain now.
    pub text: String,
    /// Whether, and why, this was the last token.
    pub end: Option<End>,
}

/// How a generation ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why.
    pub reason: FinishReason,
    /// The stop text that matched; empty otherwise.
    pub stop_text: String,
    /// Text held back until now.
    pub text: String,
}

/// The state of one generation.
#[derive(Debug)]
pub struct Session {
    rules: StopRules,
    decoder: Option<StreamDecoder>,
    /// Text that may be the beginning of a stop text.
    held: String,
    produced: u32,
}

impl Session {
    /// A generation that follows `prompt`; without a tokenizer there is no text.
    pub fn new(rules: StopRules, tokenizer: Option<&Tokenizer>, prompt: &[u32]) -> Self {
        let decoder = tokenizer.map(|tokenizer| StreamDecoder::after(tokenizer, prompt));
        Self { rules, decoder, held: String::new(), produced: 0 }
    }

    /// Tokens so far.
    pub fn produced(&self) -> u32 {
        self.produced
    }

    /// Takes the next token.
    pub fn push(&mut self, tokenizer: Option<&Tokenizer>, token: u32) -> Step {
        let index = self.produced;
        self.produced += 1;
        let is_eos = self.rules.eos_token_id == Some(token);
        if let (Some(decoder), Some(tokenizer)) = (&mut self.decoder, tokenizer) {
            self.held.push_str(&decoder.push(tokenizer, token));
        }
        if let Some((at, stop)) = first_stop(&self.held, &self.rules.stop) {
            let text = self.held[..at].to_owned();
            let end = End { reason: FinishReason::Stop, stop_text: stop.to_owned(), text: String::new() };
            return Step { index, text, end: Some(end) };
        }
        let certain = self.held.len() - held_back(&self.held, &self.rules.stop);
        let text: String = self.held.drain(..certain).collect();
        let end = if is_eos {
            Some(self.end(FinishReason::Stop))
        } else if self.produced >= self.rules.max_tokens {
            Some(self.end(FinishReason::Length))
        } else {
            None
        };
        Step { index, text, end }
    }

    fn end(&mut self, reason: FinishReason) -> End {
        let mut text = std::mem::take(&mut self.held);
        if let Some(decoder) = &mut self.decoder {
            text.push_str(&decoder.finish());
        }
        // The end of an incomplete character may still complete a stop text.
        match first_stop(&text, &self.rules.stop) {
            Some((at, stop)) => {
                End { reason: FinishReason::Stop, stop_text: stop.to_owned(), text: text[..at].to_owned() }
            }
            None => End { reason, stop_text: String::new(), text },
        }
    }
}

/// Where the first stop text begins, and which it is; the longest of those that begin there.
fn first_stop<'a>(text: &str, stops: &'a [String]) -> Option<(usize, &'a str)> {
    let found = stops.iter().filter_map(|stop| Some((text.find(stop.as_str())?, stop.as_str())));
    found.min_by_key(|(at, stop)| (*at, usize::MAX - stop.len()))
}

/// Bytes at the end of `text` that may be the beginning of a stop text.
fn held_back(text: &str, stops: &[String]) -> usize {
    let longest = |stop: &String| {
        (1..stop.len().min(text.len() + 1))
            .rev()
            .find(|length| stop.is_char_boundary(*length) && text.ends_with(&stop[..*length]))
            .unwrap_or(0)
    };
    stops.iter().map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn text_that_may_begin_a_stop_is_held_back() {
        let cases: &[(&str, &[&str], usize)] = &[
            ("hello", &[], 0),
            ("hello", &["lord"], 2),
            ("hell", &["lord"], 1),
            ("a\n", &["\n\n"], 1),
            ("ab", &["abc", "b"], 2),
            ("xé", &["é!"], 2),
            ("", &["a"], 0),
            ("ab", &["ab"], 0),
        ];
        for (text, stop, expected) in cases {
            assert_eq!(held_back(text, &stops(stop)), *expected, "{text:?} {stop:?}");
        }
    }

    #[test]
    fn the_earliest_stop_wins_and_of_those_the_longest() {
        let cases = [
            ("one two", vec!["two", "one"], Some((0, "one"))),
            ("one two", vec!["o", "one"], Some((0, "one"))),
            ("one two", vec!["three"], None),
        ];
        for (text, stop, expected) in cases {
            assert_eq!(first_stop(text, &stops(&stop)), expected, "{text:?} {stop:?}");
        }
    }

    #[test]
    fn a_generation_ends_at_its_limit_or_at_the_end_of_sequence() {
        let rules = StopRules { max_tokens: 3, stop: Vec::new(), eos_token_id: Some(2) };
        let mut session = Session::new(rules.clone(), None, &[5]);
        assert!(session.push(None, 7).end.is_none());
        assert!(session.push(None, 8).end.is_none());
        assert_eq!(session.push(None, 9).end.unwrap().reason, FinishReason::Length);
        let mut session = Session::new(rules.clone(), None, &[5]);
        assert_eq!(session.push(None, 2).end.unwrap().reason, FinishReason::Stop);
        let mut session = Session::new(StopRules { eos_token_id: None, ..rules }, None, &[5]);
        assert!(session.push(None, 2).end.is_none());
    }
}
