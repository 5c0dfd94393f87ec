#!/usr/bin/env bash
# Attacks the broker with everything there is, and writes the durability part of RESULTS.md (DURABILITY part 3).
#
#   scripts/chaos.sh quick              about ten minutes: every harness, briefly; RESULTS.md is left alone
#   scripts/chaos.sh full               hours: the figures of RESULTS.md
#   scripts/chaos.sh quick|full NAME…   only these steps
#
# Steps: units sim mutants crash power disk net fuzz unsafe. Every step runs, also after one has failed. What a harness
# records goes to target/chaos/rows-MODE.jsonl; `full` puts it into RESULTS.md. A failure leaves its artefacts in a folder
# that the harness names, and makes this script end with 1. Power cuts and failing disks need root, loop devices, FUSE and
# qemu-storage-daemon: scripts/rig.sh installs what is missing.
set -uo pipefail
cd "$(dirname "$0")/.."

mode=${1:-quick}
[ $# -gt 0 ] && shift
case $mode in
    quick | full) ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
steps=${*:-units sim mutants crash power disk net fuzz unsafe}
rows=target/chaos/rows-$mode.jsonl
mkdir -p target/chaos
failed=()

# What quick and full do; full's figures are those the issue of a release asks for.
pick() { if [ "$mode" = full ]; then echo "$2"; else echo "$1"; fi; }

# run NAME COMMAND…: goes on after a failure, and remembers it.
run() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    if "$@"; then
        printf -- '-- %s: %d s\n' "$name" $((SECONDS - began))
    else
        printf -- '-- %s FAILED after %d s\n' "$name" $((SECONDS - began))
        failed+=("$name")
    fi
}

build() {
    cargo build --release --bin blipmqd && cargo build --profile sim -p chaos --bin chaos
}
chaos() { target/sim/chaos "$@" --record "$rows"; }
planted_chaos() { target/planted/sim/chaos "$@" --record "$rows"; }

run build build
[ ${#failed[@]} -eq 0 ] || exit 1
export BLIPMQD=$PWD/target/release/blipmqd

for step in $steps; do
    case $step in
        units) run units cargo test --quiet -p blipmq --lib --test scenarios -- wal:: shard:: protocol:: every_scenario ;;
        sim) run sim chaos sim --seeds "$(pick 2000 100000)" ;;
        mutants)
            run "build with mistakes" cargo build --profile sim -p chaos -p blipmq --features chaos/planted-bugs \
                --target-dir target/planted --bin chaos --bin blipmqd
            run mutants planted_chaos mutants --seeds "$(pick 200 2000)"
            ;;
        crash) run crash chaos crash --rounds "$(pick 24 2000)" ;;
        power) run power chaos power --images "$(pick 10 500)" --fs ext4 --policy all ;;
        disk) run disk chaos disk --fault all --runs "$(pick 2 50)" ;;
        net) run net chaos net --scenario all ;;
        fuzz) run fuzz scripts/fuzz.sh --record "$rows" "$(pick quick 3600)" ;;
        unsafe) run unsafe scripts/unsafe.sh --record "$rows" ;;
        *) echo "no step $step" >&2; exit 2 ;;
    esac
done

if [ "$mode" = full ]; then
    run report target/sim/chaos report "$rows" --into RESULTS.md
fi
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\neverything held\n'
