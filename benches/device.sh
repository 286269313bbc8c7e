#!/usr/bin/env bash
# Losses of 10 steps of a small GPT on 2 workers, on a device against on the cpu; whether DistributedOptimizer averages
# there; on hardware also the speed of both.
# usage: benches/device.sh [wgpu|vulkan|cuda]; without a GPU, wgpu runs on Debian's software Vulkan (mesa-vulkan-drivers).
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-wgpu}
cargo build --release -q -p regatta-cli --features "$device"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
seq 1 6000 | awk '{ print "line", $1 % 97, "has", ($1 * $1) % 31, "words" }' > "$out/text.txt"
cat > "$out/small.toml" <<'T'
[model]
kind = "gpt"
layers = 2
heads = 4
embed = 64
context = 32
[data]
kind = "text"
[train]
steps = 10
batch = 8
eval_batches = 1
[optimizer]
lr = 1e-3
T
run() {
  "${CARGO_TARGET_DIR:-target}/release/regatta" train "$1" --out "$2" --set data.path="$out/text.txt" --set data.cache="$out/data" \
    --workers "${WORKERS:-2}" "${@:3}" >/dev/null 2>"$out/log" || { cat "$out/log"; exit 1; }
}
run "$out/small.toml" "$out/cpu"
if ! (run "$out/small.toml" "$out/device" --set train.device="$device"); then
  grep -q "finds no device" "$out/log" && { echo "skipped: $device finds no device"; exit 0; }
  exit 1
fi
python3 - "$out" "$device" <<'P'
import sys
losses = lambda name: [float(line.split(",")[1]) for line in open(f"{sys.argv[1]}/{name}/losses.csv").readlines()[1:]]
cpu, device = losses("cpu"), losses("device")
largest = max(abs(x - y) / x for x, y in zip(cpu, device))
print(f"{sys.argv[2]}: 10 steps on 2 workers, losses within {largest:.1e} of the cpu's (bound 1e-4)")
sys.exit(not (len(cpu) == len(device) == 10 and largest < 1e-4))
P
# A loop of one's own: two ranks on the device against one on the host.
cargo test --release -q -p regatta --features "$device" --test face_devices -- --show-output
# Software drivers have no speed to speak of.
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || [ -n "${SPEED:-}" ]; then
  sed 's/^steps = .*/steps = 60/' configs/gpt-base.toml > "$out/base.toml"
  for precision in f32 bf16 f16; do
    WORKERS=1 run "$out/base.toml" "$out/base-$precision" --set train.device="$device" --set train.precision=$precision \
      --set train.eval_batches=1 || true
  done
  WORKERS=1 run "$out/base.toml" "$out/base-cpu" --set train.eval_batches=1
  python3 - "$out" "$device" <<'P'
import json, os, sys
for name in ("cpu", "f32", "bf16", "f16"):
    path = f"{sys.argv[1]}/base-{name}/summary.json"
    if os.path.exists(path):
        summary = json.load(open(path))
        what = name if name == "cpu" else f"{sys.argv[2]} {name}"
        print(f"gpt-base, 1 worker, {what}: {summary['tokens_per_s']:.0f} tokens/s, {summary['step_ms']:.1f} ms a step")
P
fi
