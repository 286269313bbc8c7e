#!/usr/bin/env bash
# The idle share of a pipeline of two stages, measured, beside what its schedule has by the formula.
# usage: benches/pipeline.sh [TEXT] [STEPS]; prints a line a schedule and number of micro-batches.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-../shared/data/tinyshakespeare.txt}
steps=${2:-15}
[ -e "$text" ] || { echo "skipped: no text $text"; exit 0; }
cargo build --release -q
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
printf '%-12s %3s  %8s %8s %6s  %s\n' schedule m idle formula ratio "micro-batches held"
for micros in ${MICROS:-2 4 8 16}; do
  for schedule in ${SCHEDULES:-gpipe 1f1b interleaved zero-bubble}; do
    target/release/regatta train configs/gpt-base.toml --set data.path="$text" --set data.cache="$out/data" \
      --set model.layers="${LAYERS:-8}" --set model.embed="${EMBED:-512}" --set train.batch_per_worker=$((${ROWS:-4} * micros)) --set train.eval_batches=1 --steps "$steps" \
      --mesh pipe=2 --schedule "$schedule" --micro-batches "$micros" --out "$out/run" >/dev/null 2>"$out/log" || { cat "$out/log"; exit 1; }
    python3 - "$out/run/summary.json" "$schedule" "$micros" <<'P'
import json, sys
s = json.load(open(sys.argv[1]))["pipeline"]
p = f"{sys.argv[2]:<12} {sys.argv[3]:>3}  {s['idle_share']:8.4f} {s['bubble']:8.4f} {s['idle_share'] / s['bubble']:6.3f}  {s['peak_in_flight']}"
print(p)
P
    rm -rf "$out/run"
  done
done
