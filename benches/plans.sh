#!/usr/bin/env bash
# Losses of 20 steps under every plan against one worker's, and whether each plan gives the same bits twice.
# usage: benches/plans.sh [TEXT]; for gpt-base and the encoder-decoder, under SGD and AdamW.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-../shared/data/tinyshakespeare.txt}
[ -e "$text" ] || { echo "skipped: no text $text"; exit 0; }
cargo build --release -q
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
grep -v '^batch_per_worker' configs/gpt-base.toml | sed 's/^steps = .*/steps = 20\nbatch = 8\naccumulate = 4/' > "$out/gpt.toml"
sed 's/^steps = .*/steps = 20/; s/^batch = .*/batch = 8/' configs/encoder-decoder.toml > "$out/encoder-decoder.toml"
run() {
  target/release/regatta train "$1" --set data.path="$text" --set data.cache="$out/data" --set train.eval_batches=1 \
    --out "$2" "${@:3}" >/dev/null 2>"$out/log" || { cat "$out/log"; exit 1; }
}
plans=("--mesh data=2" "--mesh tensor=2" "--mesh tensor=2 --set parallel.sequence=true"
  "--mesh pipe=2 --schedule gpipe" "--mesh pipe=2 --schedule 1f1b" "--mesh pipe=2 --schedule interleaved"
  "--mesh pipe=2 --schedule zero-bubble" "--mesh data=2 --zero 1" "--mesh data=2 --zero 2" "--mesh data=2 --zero 3"
  "--mesh data=2,tensor=2" "--mesh data=2,pipe=2" "--mesh tensor=2,pipe=2" "--mesh data=2,tensor=2,pipe=2"
  "--mesh data=2,tensor=2,pipe=2 --zero 1" "--mesh data=2,tensor=2,pipe=2 --zero 3"
  "--mesh replica=2,data=2 --zero 2 --micro-batches 2" "--mesh data=2 --set parallel.recompute=block"
  "--mesh data=2 --zero 1 --set parallel.offload=true")
# AdamW with the configuration's warm-up: without one its first steps divide rounding by rounding.
for model in ${MODELS:-gpt encoder-decoder}; do
  for optimizer in "sgd 0.1 --set optimizer.constant=true --set optimizer.warmup=0" "adamw 0.001"; do
    set -- $optimizer
    more=(--set optimizer.kind="$1" --set optimizer.lr="$2" "${@:3}")
    rm -rf "$out/one"; run "$out/$model.toml" "$out/one" --workers 1 "${more[@]}"
    for plan in "${plans[@]}"; do
      rm -rf "$out/a" "$out/b"
      run "$out/$model.toml" "$out/a" $plan "${more[@]}"
      run "$out/$model.toml" "$out/b" $plan "${more[@]}"
      python3 - "$out" "$model $1 $plan" <<'P'
import json, sys
def run(name):
    hash = json.load(open(f"{sys.argv[1]}/{name}/summary.json"))["parameter_hash"]
    return [float(line.split(",")[1]) for line in open(f"{sys.argv[1]}/{name}/losses.csv").readlines()[1:]], hash
one, a, b = run("one"), run("a"), run("b")
largest = max(abs(x - y) / x for x, y in zip(one[0], a[0]))
same = a == b
print(f"{sys.argv[2]:<70} {largest:.1e} {'same bits' if same else 'DIFFERS'}", flush=True)
P
    done
  done
done
