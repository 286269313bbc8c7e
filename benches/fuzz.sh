#!/usr/bin/env bash
# Feeds what is read from strangers, peers and users with arbitrary bytes: fails on the first crash. First what regatta-comm
# reads from the network, then what regatta reads from files that others made.
# usage: benches/fuzz.sh [RUNS]   (inputs for each target, 100000; needs `cargo install cargo-fuzz` and a C++ compiler)
set -euo pipefail
cd "$(dirname "$0")/../crates"
runs=${1:-100000}
command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing: cargo install cargo-fuzz" >&2; exit 1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A stable toolchain will do.
export RUSTC_BOOTSTRAP=1
# usage: feed TARGET COUNT LONGEST
feed() {
  if ! cargo fuzz run "$1" -- "-runs=$2" "-max_len=$3" -len_control=0 -timeout=10 -rss_limit_mb=2048 \
    -print_final_stats=1 >"$log" 2>&1; then
    tail -n 60 "$log"
    exit 1
  fi
  echo "$1: $(grep -a '^Done' "$log"), $(sed -n 's/^stat::average_exec_per_sec: *//p' "$log") a second," \
    "at most $(sed -n 's/^stat::peak_rss_mb: *//p' "$log") MiB"
}

cd regatta-comm
cargo fuzz build
for target in wire rendezvous call tls table schedule; do
  count=$runs
  # Each of its inputs takes a handshake.
  if [ "$target" = tls ]; then count=$((runs / 10)); fi
  feed "$target" "$count" 512
done

cd ../regatta
cargo fuzz build
for target in manifest huggingface tokenizer configuration; do
  # Lists of changes of a whole file, three bytes each, or the file's bytes.
  feed "$target" "$runs" 96
done
feed images "$runs" 1024
