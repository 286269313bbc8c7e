#!/usr/bin/env bash
# Encodings of gradients over a slow link: nanoGPT's CPU preset on two hosts (network namespaces, one worker with one thread
# in each) that are joined by 100 Mbit/s with 1 ms from host to host. Speed, bytes a step and validation loss of each.
# usage: benches/slow_link.sh TEXT_FILE [STEPS] [KIND[,key=value...]]...   (root; after cargo build --release)
# The speed of one that takes long is measured in PLAIN_STEPS steps (default 100) beside a run on one host for the loss.
set -euo pipefail
cd "$(dirname "$0")/.."
text=$(realpath "${1:?a text file to train on}") steps=${2:-2000}
shift; shift || true
kinds=("$@")
[ ${#kinds[@]} -gt 0 ] || kinds=(none bf16 int8 int4 onebit topk dgc,compress.ratio=0.001 randomk powersgd)
rate=${RATE:-100mbit} delay=${DELAY:-500us} plain=${PLAIN_STEPS:-100}
a=regatta-a-$$ b=regatta-b-$$
out=$(mktemp -d)
cleanup() { ip netns del "$a" 2>/dev/null || true; ip netns del "$b" 2>/dev/null || true; rm -rf "$out"; }
trap cleanup EXIT
ip netns add "$a"; ip netns add "$b"
ip link add "va$$" netns "$a" type veth peer name "vb$$" netns "$b"
ip -n "$a" addr add 10.213.1.1/24 dev "va$$"; ip -n "$b" addr add 10.213.1.2/24 dev "vb$$"
for side in "$a va$$" "$b vb$$"; do
  set -- $side
  ip -n "$1" link set lo up; ip -n "$1" link set "$2" up
  # Each side delays by half of a way, and sends at the rate.
  parent=root
  if ip netns exec "$1" tc qdisc add dev "$2" root handle 1: netem delay "$delay" limit 100000 2>/dev/null; then
    parent="parent 1:"
  else
    echo "this kernel has no netem: the link has no delay"
  fi
  ip netns exec "$1" tc qdisc add dev "$2" $parent handle 2: tbf rate "$rate" burst 32kb latency 200ms
done

# Trains on both hosts.
run() {
  local name=$1; shift
  local common="WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.213.1.1 MASTER_PORT=29511 REGATTA_TLS=off REGATTA_TRANSPORT=tcp RAYON_NUM_THREADS=1"
  local args=(target/release/regatta train configs/gpt-shakespeare-cpu.toml --set "data.path=$text"
    --set "data.cache=\"$out/data\"" --set parallel.threads=1 --set sample.prompt= --out "$out/$name" "$@")
  ip netns exec "$b" env $common RANK=1 taskset -c 1 "${args[@]}" >/dev/null 2>&1 &
  local other=$!
  ip netns exec "$a" env $common RANK=0 taskset -c 0 "${args[@]}" >"$out/$name.log" 2>&1 || { cat "$out/$name.log"; exit 1; }
  wait "$other"
}
target/release/regatta data prepare configs/gpt-shakespeare-cpu.toml --set "data.path=$text" --set "data.cache=\"$out/data\"" >/dev/null 2>&1 || true
for kind in "${kinds[@]}"; do
  IFS=, read -r -a parts <<<"$kind"
  sets=(--set "compress.kind=${parts[0]}")
  for set in "${parts[@]:1}"; do sets+=(--set "$set"); done
  name=${kind//[^a-z0-9]/-}
  case ${parts[0]} in
    none | bf16 | f16)
      run "$name" --set "train.steps=$plain" --set train.eval_every=0 --set train.eval_batches=1 "${sets[@]}"
      target/release/regatta train configs/gpt-shakespeare-cpu.toml --set "data.path=$text" --set "data.cache=\"$out/data\"" \
        --workers 2 --set "train.steps=$steps" --set sample.prompt= --out "$out/$name-loss" "${sets[@]}" >/dev/null 2>&1
      ;;
    *) run "$name" --set "train.steps=$steps" "${sets[@]}" ;;
  esac
  python3 - "$out" "$name" "$kind" <<'P'
import json, os, sys
out, name, kind = sys.argv[1:]
speed = json.load(open(f"{out}/{name}/summary.json"))
loss = json.load(open(f"{out}/{name}-loss/summary.json")) if os.path.exists(f"{out}/{name}-loss") else speed
sent = sum(one["sent"] for one in speed["communication"][0] if one["purpose"] == "gradients")
plain = f"{out}/plain"
if not os.path.exists(plain):
    open(plain, "w").write(f"{speed['tokens_per_s']} {loss['val_loss']} {sent}")
first = [float(x) for x in open(plain).read().split()]
print(f"{kind:28} {speed['tokens_per_s']:8.0f} tokens/s ({speed['tokens_per_s'] / first[0]:5.2f} x), {sent:9} bytes a step "
      f"({first[2] / sent:6.1f} x fewer), validation loss {loss['val_loss']:.4f} ({loss['val_loss'] - first[1]:+.4f})", flush=True)
P
done
