#!/usr/bin/env bash
# How much of the communication hides behind backward when two hosts are joined by 2 Gbit/s: two network
# namespaces, a veth pair held to the rate by tc, one rank with one thread in each.
# usage: benches/overlap.sh TEXT_FILE   (root; after cargo build --release --workspace --examples)
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:?a text file to train gpt-base on}
rate=${RATE:-2gbit}
a=regatta-a-$$ b=regatta-b-$$
out=$(mktemp -d)
cleanup() { ip netns del "$a" 2>/dev/null || true; ip netns del "$b" 2>/dev/null || true; rm -rf "$out"; }
trap cleanup EXIT
ip netns add "$a"; ip netns add "$b"
ip link add "va$$" netns "$a" type veth peer name "vb$$" netns "$b"
ip -n "$a" addr add 10.213.0.1/24 dev "va$$"; ip -n "$b" addr add 10.213.0.2/24 dev "vb$$"
for side in "$a va$$" "$b vb$$"; do
  set -- $side
  ip -n "$1" link set lo up; ip -n "$1" link set "$2" up
  ip netns exec "$1" tc qdisc add dev "$2" root tbf rate "$rate" burst 512kb latency 50ms
done

# Runs a program as rank 0 and rank 1, one in each namespace.
both() {
  local common="WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.213.0.1 MASTER_PORT=29507 REGATTA_TRANSPORT=tcp RAYON_NUM_THREADS=1"
  # A core for each, as two hosts would have.
  ip netns exec "$b" env $common RANK=1 taskset -c 1 "$@" >/dev/null 2>&1 &
  local other=$!
  ip netns exec "$a" env $common RANK=0 taskset -c 0 "$@"
  wait "$other"
}

echo "gpt-base over $rate:"
both target/release/regatta train configs/gpt-base.toml --set "data.path=$text" --set "data.cache=\"$out/data\"" --steps 25 \
  --set parallel.transport=tcp --set train.eval_batches=1 --out "$out/run" >/dev/null 2>&1
python3 - "$out/run/summary.json" <<'P'
import json, sys
s = json.load(open(sys.argv[1]))
print(f"  step {s['step_ms']:.1f} ms, communication {s['comm_ms']:.1f} ms, not hidden {s['comm_exposed_ms']:.1f} ms, "
      f"hidden {100 * (1 - s['comm_exposed_ms'] / s['comm_ms']):.0f} %")
P
echo "a plain Burn module (examples/char_lm) over $rate:"
both target/release/examples/overlap
