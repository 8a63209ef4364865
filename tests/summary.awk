# Reads what `cargo test --no-fail-fast -- --show-output` said: lists the tests that failed or were skipped, and ends with one line for
# machines, "N passed, N failed, N skipped".
#
# A test is skipped when its output has a line "skipped: WHY". A suite that ends without a result has failed. `code` is cargo's own.

function suite_ends() {
    if (running != "") failures[++failed] = running " ended without a result"
    running = section = name = ""
    names = 0
}

/^ +Running .*\(.*\)$/ || /^ +Doc-tests / {
    suite_ends()
    running = $NF
    gsub(/^.*[\/\\]|-[0-9a-f]+(\.exe)?\)$/, "", running)
    if (/Doc-tests/) running = "documentation of " running
}
/^successes:$/ { section = "successes"; name = "" }
/^failures:$/ { section = "failures"; name = ""; names = 0 }
/^---- .* stdout ----$/ { name = $0; sub(/^---- /, "", name); sub(/ stdout ----$/, "", name); reason = 0 }
section == "successes" && name != "" && /^skipped: / && !reason++ { skips[++skipped] = running ": " name ": " substr($0, 10) }
section == "failures" && /^    [^ ]/ { of_suite[++names] = $1 }
/^test result: / {
    for (i = 1; i <= NF; i++) {
        if ($i == "passed;") passed += $(i - 1)
        if ($i == "ignored;") ignored += $(i - 1)
        if ($i == "failed;") {
            count = $(i - 1)
            for (j = names - count + 1; j <= names; j++) failures[++failed] = running ": " (j > 0 ? of_suite[j] : "a test")
        }
    }
    running = section = ""
    names = 0
}

END {
    suite_ends()
    if (code && !failed) failures[++failed] = "cargo test itself, with code " code
    for (i = 1; i <= skipped; i++) print "skipped: " skips[i]
    for (i = 1; i <= failed; i++) print "failed: " failures[i]
    if (ignored) print ignored " more run only when asked for (--ignored)"
    printf "%d passed, %d failed, %d skipped\n", passed - skipped, failed, skipped
}
