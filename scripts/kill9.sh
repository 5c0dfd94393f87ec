#!/usr/bin/env bash
# Kills the broker again and again under load and judges what its clients saw (DURABILITY 3.2).
#
#   scripts/kill9.sh quick [chaos options]    20 rounds over all policies, 4 rounds of v1 clients
#   scripts/kill9.sh full  [chaos options]    500 rounds, 40 of v1 clients, and the planted bug must be caught first
#
# Exit 0: no anomaly. Otherwise the store, history and output of the run stay under target/chaos, and the replay command
# is printed.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-quick}
[ $# -gt 0 ] && shift
case $mode in
    quick) rounds=20 v1_rounds=4 ;;
    full) rounds=500 v1_rounds=40 ;;
    *) echo "usage: $0 quick|full [chaos options]" >&2; exit 2 ;;
esac

cargo build --release --bin blipmqd
cargo build --release -p chaos --bin chaos
chaos=target/release/chaos

if [ "$mode" = full ]; then
    # Zero losses count only if the harness sees one that is there.
    cargo build --release --features planted-bugs --target-dir target/planted --bin blipmqd
    "$chaos" crash --planted --policy always --rounds 10
fi
"$chaos" crash --rounds "$rounds" --policy all "$@"
"$chaos" crash --protocol v1 --rounds "$v1_rounds" --policy all
