#!/usr/bin/env bash
# Everything that can be said about the ring, which holds the project's only unsafe code (DURABILITY 3.6).
#
#   scripts/unsafe.sh [--record FILE]
#
# loom tries all interleavings (with up to three preemptions where there are too many). miri, where a toolchain has it, watches
# every access of the ring's tests for undefined behaviour. AddressSanitizer, and ThreadSanitizer where the sources of std are there, run them at full
# size with real threads; valgrind too, if it is installed. What cannot be run is said, not passed over. Installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

record=
[ "${1:-}" = --record ] && record=$2
host=$(rustc -vV | sed -n 's/^host: //p')
failed=0

# The ring alone: without the server's features a build takes a minute, not ten.
ring=(-p blipmq --lib --no-default-features)

row() {
    [ -n "$record" ] || return 0
    local program=target/sim/chaos
    [ -x $program ] || cargo build --quiet --profile sim -p chaos --bin chaos || return 1
    $program record --file "$record" --name "$1" --extent "$2" --found "$3" --clean "$4" --seconds "$5" --command scripts/unsafe.sh
}

# check NAME WHAT COMMAND…: runs it, counts its tests, remembers a failure.
check() {
    local name=$1 what=$2 began=$SECONDS log=target/chaos/unsafe-$1.log
    shift 2
    mkdir -p target/chaos
    printf '\n== %s: %s\n' "$name" "$what"
    "$@" >"$log" 2>&1
    local status=$? passed
    passed=$(sed -n 's/^test result: ok\. \([0-9]*\) passed.*/\1/p' "$log" | head -1)
    if [ $status = 0 ] && [ "${passed:-0}" -gt 0 ]; then
        echo "$passed tests, nothing found, $((SECONDS - began)) s"
        row "$name" "$what, $passed tests" "nothing" true $((SECONDS - began))
    else
        tail -n 40 "$log"
        echo "$name FAILED; all of it: $log"
        failed=1
        row "$name" "$what" "see $log" false $((SECONDS - began))
    fi
}

missing() { printf '\n== %s: not run: %s\n' "$1" "$2"; }

check loom "the ring, all interleavings" \
    env RUSTFLAGS="--cfg loom" cargo test "${ring[@]}" --release --target-dir target/loom ring::

miri=
for toolchain in "" +nightly; do
    # shellcheck disable=SC2086
    if cargo $toolchain miri --version >/dev/null 2>&1; then miri=$toolchain; found=1; break; fi
done
if [ -n "${found:-}" ]; then
    # shellcheck disable=SC2086
    check miri "the ring's tests, interpreted" \
        env MIRIFLAGS="-Zmiri-many-seeds=0..4" cargo $miri miri test "${ring[@]}" --target-dir target/miri ring::
else
    missing miri "no toolchain here has it (rustup component add miri --toolchain nightly)"
fi

check asan "the ring's tests, AddressSanitizer" \
    env RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" \
    cargo test "${ring[@]}" --target "$host" --target-dir target/asan ring::

# Without a std that is instrumented too, it takes std's own channels and the test harness for racing.
if [ -d "$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src/rust/library" ]; then
    check tsan "the ring's tests, ThreadSanitizer" \
        env RUSTFLAGS="-Zsanitizer=thread" cargo +nightly test -Zbuild-std "${ring[@]}" --target "$host" --target-dir target/tsan ring::
else
    missing tsan "needs the sources of a nightly std (rustup component add rust-src --toolchain nightly)"
fi

if command -v valgrind >/dev/null; then
    under_valgrind() {
        local program
        program=$(cargo test "${ring[@]}" --no-run --message-format=json 2>/dev/null |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
        valgrind --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite -q "$program" --test-threads=1 ring::
    }
    check valgrind "the ring's tests, memcheck" under_valgrind
else
    missing valgrind "not installed"
fi

echo
[ $failed = 0 ] && echo "nothing found"
exit $failed
