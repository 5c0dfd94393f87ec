#!/usr/bin/env bash
# What a change should pass. Installs nothing; needs the Rust toolchain with rustfmt and clippy.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; }

step format
cargo fmt --all --check
step clippy
cargo clippy --workspace --all-targets -- -D warnings
step "the features apart from each other"
cargo check -p blipmq --lib --no-default-features --features client
cargo check -p blipmq --bin blipmqd --no-default-features --features server
step "the broker links no tokio"
if cargo tree -p blipmq --no-default-features --features server -e normal | grep -w tokio; then
    echo "tokio is in the broker's dependencies" >&2
    exit 1
fi
step tests
cargo test --workspace
step "the ring, all interleavings (loom)"
RUSTFLAGS="--cfg loom" cargo test -p blipmq --lib --release --no-default-features --target-dir target/loom ring::
step "simulation, 2,000 lives"
cargo build --profile sim -p chaos --bin chaos
target/sim/chaos sim --seeds 2000
step "fuzzing, ten seconds a target"
scripts/fuzz.sh quick
step "kill -9, a few rounds"
cargo build --bin blipmqd
cargo run -p chaos --bin chaos -- crash --broker target/debug/blipmqd --rounds 12 --max-run-ms 1000 --policy all --cores 1,2,4
cargo run -p chaos --bin chaos -- crash --broker target/debug/blipmqd --protocol v1 --rounds 4 --policy all
if command -v cargo-deny >/dev/null; then
    step "cargo deny"
    cargo deny check
fi
if command -v cargo-audit >/dev/null; then
    step "cargo audit"
    cargo audit
fi
echo
echo "all checks passed"
