#!/usr/bin/env bash
# Speed of tensor=2 over shared memory against one worker, one thread each, gpt-base at 512 wide; in turn.
# usage: benches/tensor.sh [TEXT] [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-../shared/data/tinyshakespeare.txt}
[ -e "$text" ] || { echo "skipped: no text $text"; exit 0; }
cargo build --release -q
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for round in $(seq "${2:-5}"); do
  for plan in "--workers 1" "--mesh tensor=2 --transport shm"; do
    rm -rf "$out/run"
    target/release/regatta train configs/gpt-base.toml --set data.path="$text" --set data.cache="$out/data" --steps 12 \
      --set model.embed=512 --set train.eval_batches=1 --out "$out/run" $plan >/dev/null 2>"$out/log" || { cat "$out/log"; exit 1; }
    python3 -c "import json; print(json.load(open('$out/run/summary.json'))['step_ms'])" >> "$out/${plan//[ =]/_}"
  done
done
python3 - "$out" <<'P'
import glob, statistics, sys
one, two = ([float(x) for x in open(f"{sys.argv[1]}/{name}")] for name in ("--workers_1", "--mesh_tensor_2_--transport_shm"))
print("one worker", *(f"{x:.0f}" for x in one), "ms; tensor=2", *(f"{x:.0f}" for x in two), "ms")
print(f"median ratio {statistics.median(a / b for a, b in zip(one, two)):.2f}")
P
