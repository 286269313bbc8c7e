#!/usr/bin/env bash
# Weak scaling of gpt-base: 1 and 2 workers with one thread each and a fixed batch per worker, in turn.
# usage: benches/scaling.sh TEXT_FILE [ROUNDS]   (after cargo build --release)
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:?a text file to train on} rounds=${2:-5}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# What two busy processes get done against one: a machine shared with others may give less than two cores.
cores() {
  python3 - <<'P'
import multiprocessing, time
def busy(results):
    end, count = time.perf_counter() + 1, 0
    while time.perf_counter() < end:
        count += 1
    results.put(count)
def run(processes):
    results = multiprocessing.Queue()
    workers = [multiprocessing.Process(target=busy, args=(results,)) for _ in range(processes)]
    [worker.start() for worker in workers]
    total = sum(results.get() for _ in workers)
    [worker.join() for worker in workers]
    return total
one = run(1)
print(f"{run(2) / one:.2f}")
P
}
for round in $(seq "$rounds"); do
  cores > "$out/$round-cores"
  for workers in 1 2; do
    target/release/regatta train configs/gpt-base.toml --set "data.path=$text" --set "data.cache=\"$out/data\"" \
      --steps 30 --set train.eval_batches=1 --workers "$workers" --out "$out/$round-$workers" >/dev/null 2>&1
  done
done
python3 - "$out" "$rounds" <<'P'
import json, statistics, sys
out, rounds = sys.argv[1], int(sys.argv[2])
load = lambda r, w: json.load(open(f"{out}/{r}-{w}/summary.json"))
pairs = [(load(r, 1), load(r, 2)) for r in range(1, rounds + 1)]
for number, (one, two) in enumerate(pairs, 1):
    given = open(f"{out}/{number}-cores").read().strip()
    print(f"  machine gives {given} cores: 1 worker {one['tokens_per_s']:.0f} tokens/s, 2 workers {two['tokens_per_s']:.0f}, "
          f"efficiency {two['tokens_per_s'] / one['tokens_per_s'] / 2:.3f}, first step after {two['time_to_first_step_s']:.2f} s")
print("median efficiency", round(statistics.median(two["tokens_per_s"] / one["tokens_per_s"] / 2 for one, two in pairs), 3))
print("median time to first step, 2 workers:", round(statistics.median(two["time_to_first_step_s"] for _, two in pairs), 2), "s")
P
