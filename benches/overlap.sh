#!/usr/bin/env bash
# How much of the communication hides behind backward when two hosts (network namespaces, one rank with one thread in
# each) are joined by 2 Gbit/s.
# usage: benches/overlap.sh TEXT_FILE   (root; after cargo build --release --workspace --examples)
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:?a text file to train gpt-base on}
if [ -z "${HOST_0:-}" ]; then
  exec target/release/examples/on_hosts 2 "${MBIT:-2000}" 0 "$0" "$@"
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# Runs a program as rank 0 and rank 1, one in each namespace.
both() {
  local common="WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=$ADDRESS_0 MASTER_PORT=29507 REGATTA_TRANSPORT=tcp RAYON_NUM_THREADS=1"
  # A core for each, as two hosts would have.
  ip netns exec "$HOST_1" env $common RANK=1 taskset -c 1 "$@" >/dev/null 2>&1 &
  local other=$!
  ip netns exec "$HOST_0" env $common RANK=0 taskset -c 0 "$@"
  wait "$other"
}

echo "gpt-base over ${MBIT:-2000} Mbit/s:"
both target/release/regatta train configs/gpt-base.toml --set "data.path=$text" --set "data.cache=\"$out/data\"" --steps 25 \
  --set parallel.transport=tcp --set train.eval_batches=1 --out "$out/run" >/dev/null 2>&1
python3 - "$out/run/summary.json" <<'P'
import json, sys
s = json.load(open(sys.argv[1]))
print(f"  step {s['step_ms']:.1f} ms, communication {s['comm_ms']:.1f} ms, not hidden {s['comm_exposed_ms']:.1f} ms, "
      f"hidden {100 * (1 - s['comm_exposed_ms'] / s['comm_ms']):.0f} %")
P
echo "a plain Burn module (examples/char_lm) over ${MBIT:-2000} Mbit/s:"
both target/release/examples/overlap
