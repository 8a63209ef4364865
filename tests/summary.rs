//! How `./test.sh` counts: what it makes of the output of `cargo test`.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use grokpipe_tests::root;

/// Suites that pass, fail, end without a result and are empty, as cargo and its tests print them.
const SAID: &str = "
     Running unittests src/lib.rs (target/debug/deps/grokpipe_model-0123456789abcdef)

running 4 tests
test passes ... ok
test of::a_module::lacks_something ... ok
test fails ... FAILED
test takes_an_hour ... ignored

successes:

---- of::a_module::lacks_something stdout ----
skipped: no goldens
skipped: no more goldens

---- passes stdout ----
it says that nothing was skipped: all is here

successes:
    of::a_module::lacks_something
    passes

failures:

---- fails stdout ----
    an indented line
skipped: half of it

failures:
    fails

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: test failed, to rerun pass `-p grokpipe-model --lib`
     Running bench.rs (target/debug/deps/bench-fedcba9876543210)

running 1 test
error: test failed, to rerun pass `-p grokpipe-tests --test bench`

Caused by:
  process didn't exit successfully: `bench` (signal: 6, SIGABRT: process abort signal)
   Doc-tests grokpipe_model

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

fn summary(code: i32, said: &str) -> String {
    let mut awk = Command::new("awk")
        .args(["-v", &format!("code={code}"), "-f", "tests/summary.awk"])
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("awk runs");
    awk.stdin.take().expect("piped").write_all(said.as_bytes()).expect("awk reads");
    let output = awk.wait_with_output().expect("awk ends");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn failed_skipped_and_crashed_tests_are_named_and_counted() {
    let expected = "skipped: grokpipe_model: of::a_module::lacks_something: no goldens\n\
                    failed: grokpipe_model: fails\n\
                    failed: bench ended without a result\n\
                    1 more run only when asked for (--ignored)\n\
                    1 passed, 2 failed, 1 skipped\n";
    assert_eq!(summary(101, SAID), expected);
}

#[test]
fn a_build_that_fails_is_a_failure() {
    let said = "error: could not compile `grokpipe-tests` (test \"hosts\") due to 1 previous error\n";
    assert_eq!(summary(101, said), "failed: cargo test itself, with code 101\n0 passed, 1 failed, 0 skipped\n");
}
