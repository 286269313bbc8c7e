#!/usr/bin/env bash
# Feeds what regatta-comm reads from strangers, peers and users with arbitrary bytes: fails on the first crash.
# usage: benches/fuzz.sh [RUNS]   (inputs for each target, 100000; needs `cargo install cargo-fuzz` and a C++ compiler)
set -euo pipefail
cd "$(dirname "$0")/../crates/regatta-comm"
runs=${1:-100000}
command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing: cargo install cargo-fuzz" >&2; exit 1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A stable toolchain will do.
export RUSTC_BOOTSTRAP=1
cargo fuzz build
for target in wire rendezvous call tls table schedule; do
  count=$runs
  # Each of these inputs takes a handshake, or threads that take turns.
  case $target in tls | schedule) count=$((runs / 10)) ;; esac
  if ! cargo fuzz run "$target" -- "-runs=$count" -max_len=512 -len_control=0 -timeout=10 -rss_limit_mb=2048 \
    -print_final_stats=1 >"$log" 2>&1; then
    tail -n 60 "$log"
    exit 1
  fi
  echo "$target: $(grep '^Done' "$log"), $(sed -n 's/^stat::average_exec_per_sec: *//p' "$log") a second"
done
