#!/usr/bin/env bash
# Bytes a parameter under ZeRO as counted by the program, and the most that was resident. Over TCP: registered shared
# memory that a peer reads would count for both.
# usage: benches/memory.sh [TEXT]
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-../shared/data/tinyshakespeare.txt}
[ -e "$text" ] || { echo "skipped: no text $text"; exit 0; }
cargo build --release -q
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for plan in "--mesh data=2" "--mesh data=2 --zero 1" "--mesh data=2 --zero 2" "--mesh data=2 --zero 3" \
  "--mesh data=2 --zero 1 --set parallel.offload=true" "--mesh tensor=2" "--mesh pipe=2 --micro-batches 2"; do
  rm -rf "$out/run"
  target/release/regatta train configs/gpt-base.toml --set data.path="$text" --set data.cache="$out/data" --steps 3 \
    --set model.layers=12 --set model.embed=768 --set model.context=32 --set train.batch_per_worker=2 \
    --set train.eval_batches=1 --transport tcp --out "$out/run" $plan >/dev/null 2>"$out/log" || { cat "$out/log"; exit 1; }
  python3 - "$out/run/summary.json" "$plan" <<'P'
import json, sys
s = json.load(open(sys.argv[1]))
p, last, mib = s["parameters"], s["memory"][-1], 1 << 20
kinds = ("parameters", "gradients", "optimizer")
each = " + ".join(f"{last[kind] / p:.3f}" for kind in kinds)
counted = sum(last[kind] for kind in kinds) / mib
beside = (last["working"] + last["saving"]) / mib
print(f"{sys.argv[2]:<52} {each} B/parameter; {counted:5.0f} MiB kept, {beside:4.0f} beside; resident {s['peak_rss_bytes'][-1] / mib:5.0f} MiB")
P
done
