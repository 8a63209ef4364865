//! Whether all workers have the same numbers. Pure.
//!
//! Each worker computes checksums of what it loads. The first to load a layer sets its checksum, unless a manifest does. A worker with
//! another checksum is not trusted, except that one whose manifest confirms its numbers outweighs one without a manifest. A layer that
//! only one worker has loaded, and that no manifest covers, cannot be checked.

use std::{collections::BTreeMap, time::Duration};

use grokpipe_model::contents::{Part, Sum};
use grokpipe_proto::ids::{Generation, LayerRange};

use super::{
    Cluster, Until,
    messages::{ContentSum, StageFailed, StageReady},
};
use crate::facts::ModelFacts;

/// The checksum of a part, and who reported it.
#[derive(Clone, Debug)]
struct Said {
    sum: Sum,
    /// `None`: the manifest next to the coordinator's files.
    by: Option<String>,
    confirmed: bool,
}

/// The checksums of a model's parts.
#[derive(Debug)]
pub(super) struct Contents {
    layers: u32,
    said: BTreeMap<Part, Said>,
}

/// What a worker loaded, compared with earlier reports.
#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    /// Parts of which it reported another checksum itself when it last loaded them.
    changed: Vec<Part>,
    differing: Option<Differing>,
}

/// Two copies that differ.
#[derive(Debug, PartialEq, Eq)]
struct Differing {
    /// The worker that is believed; `None` for the coordinator's manifest.
    believed: Option<String>,
    /// The worker that is not; `None` for the one that reported last.
    blamed: Option<String>,
    parts: Vec<Part>,
}

impl Contents {
    pub(super) fn new(facts: &ModelFacts) -> Self {
        let said = |known: &grokpipe_model::contents::PartSum| {
            (known.part, Said { sum: known.sum, by: None, confirmed: true })
        };
        Self { layers: facts.config.num_hidden_layers, said: facts.contents.iter().map(said).collect() }
    }

    /// Takes in what a worker loaded; malformed entries are skipped.
    fn hear(&mut self, worker: &str, contents: &[ContentSum]) -> Heard {
        let mut heard = Heard::default();
        // A worker has each part once; more entries are not read.
        for said in contents.iter().take(self.layers as usize + 3) {
            let (Some(part), Some(sum)) = (Part::from_index(said.part, self.layers), Sum::from_bytes(&said.sum)) else {
                continue;
            };
            let new = Said { sum, by: Some(worker.to_owned()), confirmed: said.confirmed };
            let Some(known) = self.said.get_mut(&part) else {
                self.said.insert(part, new);
                continue;
            };
            if known.sum == sum {
                known.confirmed |= said.confirmed;
            } else if known.by == new.by {
                // Its files were damaged since, or repaired. Only it has loaded this part.
                *known = new;
                heard.changed.push(part);
            } else {
                let newer = said.confirmed && !known.confirmed;
                let (believed, blamed) =
                    if newer { (new.by.clone(), known.by.clone()) } else { (known.by.clone(), None) };
                if newer {
                    *known = new;
                }
                let found = heard.differing.get_or_insert(Differing { believed, blamed, parts: Vec::new() });
                found.parts.push(part);
            }
        }
        heard
    }
}

impl Cluster {
    /// Compares what a worker loaded with what others did. `false` when that worker is not trusted and has lost its stage.
    pub fn check_contents(&mut self, now: Duration, name: &str, generation: Generation, ready: &StageReady) -> bool {
        let current = self.is_current(ready.plan_epoch, ready.coordinator_generation);
        if !current || !self.runs_stage(name) || self.present(name, generation).is_none() {
            return true;
        }
        let Heard { changed, differing } = self.contents.hear(name, &ready.contents);
        if !changed.is_empty() {
            let text =
                format!("{name} has other numbers than it had before in {}: its files have changed", listed(&changed));
            self.record(now, "contents_changed", Some(name), text);
        }
        let Some(Differing { believed, blamed, parts }) = differing else { return true };
        let is_newcomer = blamed.is_none();
        let blamed = blamed.unwrap_or_else(|| name.to_owned());
        let than = believed.map_or_else(|| "the manifest of the coordinator has".to_owned(), |by| format!("{by} has"));
        let message = format!(
            "other numbers than {than} in {}: one of the two copies is damaged, `grokpipe verify` on both machines says which",
            listed(&parts)
        );
        self.record(now, "contents_differ", Some(&blamed), format!("{blamed} has {message}"));
        let Some(node) = self.nodes.get_mut(blamed.as_str()) else { return !is_newcomer };
        let generation = node.hello.generation;
        node.excluded = Some(Until::Rejoin);
        node.last_error = Some((now, message.clone()));
        self.changes += 1;
        let failed = StageFailed {
            plan_epoch: self.epoch,
            coordinator_generation: self.settings.generation,
            message,
            retryable: false,
            ..StageFailed::default()
        };
        self.stage_failed(now, &blamed, generation, &failed);
        !is_newcomer
    }
}

/// "layers 32–47, the head".
fn listed(parts: &[Part]) -> String {
    let mut runs: Vec<LayerRange> = Vec::new();
    let mut others = Vec::new();
    for part in parts {
        match (part, runs.last_mut()) {
            (Part::Layer(layer), Some(run)) if run.end() == *layer => *run = run.through(layer + 1),
            (Part::Layer(layer), _) => runs.extend(LayerRange::new(*layer, layer + 1)),
            (other, _) => others.push(format!("the {other}")),
        }
    }
    runs.iter().map(LayerRange::to_string).chain(others).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use grokpipe_model::{ModelConfig, contents::PartSum};

    use super::*;

    fn sum(number: u32) -> Sum {
        Sum::of_vector(&[number as f32])
    }

    fn of(part: Part, number: u32, confirmed: bool) -> ContentSum {
        let sum = sum(number).as_bytes().to_vec().into();
        ContentSum { part: part.index(64), sum, confirmed }
    }

    fn contents(manifest: &[(Part, u32)]) -> Contents {
        let mut facts = ModelFacts::new(ModelConfig::grok_1(), "d".into(), vec![1; 64]);
        let known = |(part, number): &(Part, u32)| PartSum { part: *part, sum: sum(*number), confirmed: true };
        facts.contents = manifest.iter().map(known).collect();
        Contents::new(&facts)
    }

    /// What is known beforehand, who said what, and who is believed and blamed.
    #[test]
    fn the_first_to_load_a_layer_is_believed_unless_a_manifest_speaks_against_it() {
        use Part::{Embedding, Layer};
        type Says = Vec<(&'static str, ContentSum)>;
        type Verdict = Option<(Option<&'static str>, Option<&'static str>)>;
        type Case = (&'static str, &'static [(Part, u32)], Says, Verdict);
        let cases: Vec<Case> = vec![
            ("alone", &[], vec![("a", of(Layer(1), 7, false))], None),
            ("the same", &[], vec![("a", of(Layer(1), 7, false)), ("b", of(Layer(1), 7, false))], None),
            ("other layers", &[], vec![("a", of(Layer(1), 7, false)), ("b", of(Layer(2), 8, false))], None),
            (
                "another",
                &[],
                vec![("a", of(Layer(1), 7, false)), ("b", of(Layer(1), 8, false))],
                Some((Some("a"), None)),
            ),
            (
                "the first stage's embedding and the last one's head",
                &[],
                vec![("a", of(Embedding, 7, false)), ("b", of(Embedding, 8, false))],
                Some((Some("a"), None)),
            ),
            (
                "both confirmed",
                &[],
                vec![("a", of(Layer(1), 7, true)), ("b", of(Layer(1), 8, true))],
                Some((Some("a"), None)),
            ),
            (
                "the second confirmed",
                &[],
                vec![("a", of(Layer(1), 7, false)), ("b", of(Layer(1), 8, true))],
                Some((Some("b"), Some("a"))),
            ),
            (
                "the first confirmed by a third",
                &[],
                vec![("a", of(Layer(1), 7, false)), ("c", of(Layer(1), 7, true)), ("b", of(Layer(1), 8, true))],
                Some((Some("a"), None)),
            ),
            ("as the manifest says", &[(Layer(1), 7)], vec![("a", of(Layer(1), 7, false))], None),
            ("not as the manifest says", &[(Layer(1), 7)], vec![("a", of(Layer(1), 8, true))], Some((None, None))),
            ("loaded again", &[], vec![("a", of(Layer(1), 7, false)), ("a", of(Layer(1), 8, false))], None),
        ];
        for (case, manifest, says, expected) in cases {
            let mut contents = contents(manifest);
            let heard: Vec<_> =
                says.iter().map(|(worker, sum)| contents.hear(worker, std::slice::from_ref(sum))).collect();
            let (last, before) = heard.split_last().unwrap();
            assert!(before.iter().all(|heard| *heard == Heard::default()), "{case}");
            assert_eq!(last.changed.is_empty(), case != "loaded again");
            let found = last.differing.as_ref().map(|found| (found.believed.as_deref(), found.blamed.as_deref()));
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn sums_that_make_no_sense_are_passed_over() {
        let mut contents = contents(&[(Part::Layer(1), 7)]);
        let short = ContentSum { part: 1, sum: vec![1, 2].into(), confirmed: true };
        let beyond = ContentSum { part: 67, ..of(Part::Layer(1), 8, true) };
        assert_eq!(contents.hear("a", &[short, beyond]), Heard::default());
        assert_eq!(contents.said.len(), 1);
    }

    #[test]
    fn parts_are_listed_in_runs() {
        let parts = [Part::Layer(3), Part::Layer(4), Part::Layer(9), Part::Embedding, Part::FinalNorm];
        assert_eq!(listed(&parts), "layers 3–4, layer 9, the embedding, the final norm");
    }
}
