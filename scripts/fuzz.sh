#!/usr/bin/env bash
# Fuzzes whatever reads bytes we did not write (DURABILITY 3.5).
#
#   scripts/fuzz.sh quick [TARGET…]           about ten seconds per target
#   scripts/fuzz.sh SECONDS [TARGET…]         so long per target
#   scripts/fuzz.sh keep [TARGET…]            makes fuzz/corpus/ of the best of what the runs so far have found
#   scripts/fuzz.sh planted                   plants mistakes, one at a time, and succeeds if each is caught
#
# Options, in front: --record FILE appends a row per target for RESULTS.md, which states the sum of all runs tallied in
# target/chaos/fuzz-seconds.jsonl. FUZZ_JOBS: targets at once [one per CPU].
# Needs a C++ compiler (installed if that is possible) and any toolchain: neither nightly nor cargo-fuzz.
# A crash leaves its input in target/chaos/fuzz-TARGET/, and makes this script end with 1.
set -uo pipefail
cd "$(dirname "$0")/.."

called="scripts/fuzz.sh $*"
record=
if [ "${1:-}" = --record ]; then
    record=$2
    shift 2
    called="scripts/fuzz.sh $*"
fi
mode=${1:-quick}
[ $# -gt 0 ] && shift
case $mode in
    quick) seconds=10 ;;
    keep | planted) seconds= ;;
    *[!0-9]* | "") sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) seconds=$mode ;;
esac

all=$(cd fuzz/fuzz_targets && ls -- *.rs | sed 's/\.rs$//')
targets=${*:-$all}
host=$(rustc -vV | sed -n 's/^host: //p')
chaos=target/chaos
tally=$chaos/fuzz-seconds.jsonl
mkdir -p $chaos

if ! command -v c++ >/dev/null; then
    echo "fuzz: libFuzzer is C++; installing a compiler"
    apt-get update -qq && apt-get install -y -qq g++ >/dev/null || { echo "fuzz: no C++ compiler" >&2; exit 2; }
fi

# Coverage and comparisons of everything that is built for the host's target; --target keeps build scripts out of it.
build() {
    local pass=-Cllvm-args=-sanitizer-coverage
    RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module $pass-level=4 $pass-inline-8bit-counters $pass-pc-table \
$pass-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0" \
        cargo build --quiet --release --manifest-path fuzz/Cargo.toml --target "$host" --bins "$@"
}

# What an input of this target can be, so that the fuzzer does not try what makes no difference.
options() {
    case $1 in
        segment_recovery) echo "-max_len=400 -len_control=20" ;;
        checkpoint) echo "-max_len=1500" ;;
        import_v1) echo "-max_len=600" ;;
        record) echo "-max_len=1000" ;;
        config | http_request) echo "-max_len=2000" ;;
    esac
    if [ -f "fuzz/dictionaries/$1.dict" ]; then echo "-dict=fuzz/dictionaries/$1.dict"; fi
}

# fuzz BINARIES TARGET SECONDS: one run; its log lies beside its artefacts. Writes the tally.
fuzz() {
    local target=$2 folder=$chaos/fuzz-$2 began=$SECONDS status user
    mkdir -p "$folder" "$chaos/fuzz-corpus/$target"
    local TIMEFORMAT=%U
    # shellcheck disable=SC2046
    user=$({ time "$1/$target" "$chaos/fuzz-corpus/$target" "fuzz/corpus/$target" -max_total_time="$3" \
        -rss_limit_mb=1024 -timeout=20 -artifact_prefix="$folder/" -print_final_stats=1 $(options "$target") \
        >"$folder/log" 2>&1; echo $? >"$folder/status"; } 2>&1)
    status=$(cat "$folder/status")
    local executions cov
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/log" | tail -1)
    cov=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$folder/log" | tail -1)
    printf '{"target":"%s","commit":"%s","at":%s,"user":%s,"wall":%s,"executions":%s,"edges":%s,"crashed":%s}\n' \
        "$target" "$commit" "$(date +%s)" "$user" $((SECONDS - began)) "${executions:-0}" "${cov:-0}" \
        "$([ "$status" = 0 ] && echo false || echo true)" >>$tally
    printf '%-18s %6.0f CPU s %12s executions %6s edges%s\n' "$target" "$user" "${executions:-0}" "${cov:-0}" \
        "$([ "$status" = 0 ] || echo "  CRASHED")"
    [ "$status" = 0 ]
}

# sum TARGET: CPU seconds, executions, edges, first and last commit, crashes at the last commit; over all tallied runs.
sum() {
    sed -n "s/^{\"target\":\"$1\",\"commit\":\"\([^\"]*\)\",\"at\":[0-9]*,\"user\":\([0-9.]*\),.*\"executions\":\([0-9]*\),\"edges\":\([0-9]*\),\"crashed\":\(true\|false\)}$/\1 \2 \3 \4 \5/p" $tally |
        awk '{ if (NR == 1) first = $1; if ($1 != last) crashes = 0; last = $1; user += $2; runs += $3
               if ($4 > edges) edges = $4; if ($5 == "true") crashes++ }
             END { printf "%.0f %.0f %d %s %s %d\n", user, runs, edges, first, last, crashes }'
}

row() {
    local user executions edges first last crashes
    read -r user executions edges first last crashes < <(sum "$1")
    local program=target/sim/chaos
    [ -x $program ] || cargo build --quiet --profile sim -p chaos --bin chaos || return 1
    $program record --file "$record" --name "fuzz $1" --seconds "$user" --command "$called" \
        --clean "$([ "$crashes" = 0 ] && echo true || echo false)" \
        --extent "$(printf "%'d executions of commits %s to %s" "$executions" "$first" "$last")" \
        --found "$crashes crashes, $edges edges"
}

# keep TARGET: the fewest small inputs that together reach most of what all runs have reached. Those named seed-* are made by
# hand (fuzz/examples/seeds.rs) and stay.
keep() {
    local scratch
    scratch=$(mktemp -d)
    # The control file has a line "FT number feature…" for every input, in the order of the names at its top.
    mkdir -p "$scratch/out" "$chaos/fuzz-corpus/$1" "fuzz/corpus/$1"
    "$bins/$1" -merge=1 -merge_control_file="$scratch/control" "$scratch/out" "$chaos/fuzz-corpus/$1" ${FUZZ_CORPUS:+"$FUZZ_CORPUS/$1"} \
        "fuzz/corpus/$1" >"$scratch/log" 2>&1 || { cat "$scratch/log" >&2; return 1; }
    rm -f "fuzz/corpus/$1"/kept-*
    awk -v files=32 -v bytes=12000 '
        NR == 1 { names = $1; next }
        NR == 2 { next }
        NR <= names + 2 { name[NR - 3] = $0; next }
        $1 == "STARTED" { size[$2] = $3 }
        $1 == "FT" && size[$2] <= 1000 && name[$2] !~ /\/seed-/ { for (i = 3; i <= NF; i++) has[$2] = has[$2] " " $i; open[$2] = NF - 2 }
        END {
            while (files-- > 0) {
                best = -1
                for (n in open) {
                    # A file has at most as many new features as when it was last counted.
                    if (best >= 0 && open[n] <= gain) continue
                    count = split(has[n], feature, " "); fresh = 0
                    for (i = 1; i <= count; i++) if (!(feature[i] in reached)) fresh++
                    open[n] = fresh
                    if (fresh > 0 && size[n] <= bytes && (best < 0 || fresh > gain)) { best = n; gain = fresh }
                }
                if (best < 0) break
                count = split(has[best], feature, " ")
                for (i = 1; i <= count; i++) reached[feature[i]]
                bytes -= size[best]; print name[best]; delete open[best]
            }
        }' "$scratch/control" | while read -r file; do
        cp "$file" "fuzz/corpus/$1/kept-$(sha256sum "$file" | cut -c1-12)"
    done
    rm -rf "$scratch"
    printf '%-18s %s inputs, %s bytes\n' "$1" "$(ls "fuzz/corpus/$1" | wc -l)" "$(cat "fuzz/corpus/$1"/* | wc -c)"
}

# planted TARGET BUG: whether it is caught within a minute (or FUZZ_SECONDS). A BUG that is none: whether nothing is found.
planted() {
    local folder=$chaos/fuzz-planted/$1-$2
    rm -rf "$folder"
    mkdir -p "$folder" "$chaos/fuzz-corpus/$1"
    # shellcheck disable=SC2046
    (
        [ "$2" = none ] || export BLIPMQ_PLANTED_BUG=$2
        "target/fuzz-planted/$host/release/$1" "$folder" "$chaos/fuzz-corpus/$1" "fuzz/corpus/$1" \
            -max_total_time="$([ "$2" = none ] && echo 10 || echo "${FUZZ_SECONDS:-60}")" -rss_limit_mb=1024 -timeout=20 \
            -artifact_prefix="$folder/" $(options "$1") >"$folder.log" 2>&1 </dev/null
    )
    local status=$?
    # 77: the fuzzer says that an input failed. Anything else but 0 is a failure of this script.
    case $2:$status in
        none:0) return 0 ;;
        none:*) return 1 ;;
        *:77) ls "$folder"/crash-* >/dev/null 2>&1 ;;
        *) return 1 ;;
    esac
}

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
git diff --quiet HEAD 2>/dev/null || commit=$commit+
bins=target/fuzz/$host/release

case $mode in
    keep)
        build --target-dir target/fuzz || exit 2
        for target in $targets; do keep "$target" || exit 2; done
        ;;
    planted)
        build --target-dir target/fuzz-planted --features planted-bugs || exit 2
        missed=0
        while read -r target bug; do
            if planted "$target" "$bug"; then
                [ "$bug" = none ] && found="nothing found" || found="caught: $(grep -m1 -A1 panicked "$chaos/fuzz-planted/$target-$bug.log" | tail -1)"
                printf '%-18s %-28s %.110s\n' "$target" "$bug" "$found"
            else
                printf '%-18s %-28s %s\n' "$target" "$bug" "FAILED: see $chaos/fuzz-planted/$target-$bug.log"
                missed=1
            fi
        done <scripts/fuzz-planted.txt
        exit $missed
        ;;
    *)
        build --target-dir target/fuzz || exit 2
        export -f fuzz options
        export chaos tally commit
        printf '%s\n' $targets |
            xargs -P "${FUZZ_JOBS:-$(nproc)}" -I{} bash -c 'fuzz "$0" "$1" "$2"' "$bins" {} "$seconds"
        failed=$((PIPESTATUS[1] != 0))
        for target in $targets; do
            if [ "$(cat "$chaos/fuzz-$target/status")" != 0 ]; then
                grep -m2 -A3 -e panicked -e ERROR "$chaos/fuzz-$target/log" >&2
                for input in "$chaos/fuzz-$target"/{crash,oom,timeout}-*; do
                    [ -e "$input" ] || continue
                    echo "replay: $bins/$target $input" >&2
                    echo "once fixed: cp $input fuzz/regressions/$target/WHAT-IT-WAS" >&2
                done
            fi
            if [ -n "$record" ]; then row "$target" || failed=1; fi
        done
        exit $failed
        ;;
esac
