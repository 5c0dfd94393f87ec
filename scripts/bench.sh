#!/usr/bin/env bash
# Builds broker and bench, runs `bench quick` (arguments are passed on) and puts its output into RESULTS.md.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --bin blipmqd
cargo build --release -p bench
out=$(mktemp)
trap 'rm -f "$out"' EXIT
# Run as a child of this shell and not of cargo, so that nothing of cargo's is in memory meanwhile.
"${CARGO_TARGET_DIR:-target}/release/bench" quick --json "${CARGO_TARGET_DIR:-target}/bench/last.json" "$@" | tee "$out"

awk -v table="$out" '
    /<!-- bench:begin -->/ { print; print "```"; while ((getline line < table) > 0) print line; print "```"; inside = 1 }
    /<!-- bench:end -->/   { inside = 0 }
    !inside                { print }
' RESULTS.md > RESULTS.md.new
mv RESULTS.md.new RESULTS.md
