#!/usr/bin/env bash
# Ways to exchange over a slow link: nanoGPT's CPU preset on two hosts (network namespaces, one worker with one thread in
# each) that are joined by 100 Mbit/s with 1 ms from host to host. Speed, bytes a step and validation loss of each way.
# usage: benches/slow_link.sh TEXT_FILE [STEPS] [WAY]...   (root; after cargo build --release --workspace --examples)
# A way is keys with commas between them, as compress.kind=powersgd or local.every=16, or `plain`. The speed is that of
# LINK_STEPS steps over the link (default 200), and the loss that of STEPS steps (2000) on this host, where the same bits
# take less time. With PYTHON=an interpreter that has torch, the same of PyTorch's DDP on gloo with its hooks: PEERS (none bf16
# powersgd).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${HOST_0:-}" ]; then
  exec target/release/examples/on_hosts 2 "${MBIT:-100}" "${DELAY_US:-1000}" "$0" "$@"
fi
text=$(realpath "${1:?a text file to train on}") steps=${2:-2000} link=${LINK_STEPS:-200}
shift; shift || true
ways=("$@")
[ ${#ways[@]} -gt 0 ] || ways=(
  plain compress.kind={bf16,int8,int4,onebit,topk,randomk,powersgd} compress.kind=dgc,compress.ratio=0.001
  local.every=16 local.every=100,local.outer=diloco
  local.every=100,local.outer=diloco,local.fragments=4,local.overlap=5,compress.kind=int4
  local.every=16,local.outer=gossip
)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common=(configs/gpt-shakespeare-cpu.toml --set "data.path=$text" --set "data.cache=\"$out/data\"" --set sample.prompt=)

# Trains on both hosts.
on_link() {
  local name=$1; shift
  local environment="WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=$ADDRESS_0 MASTER_PORT=29511 REGATTA_TLS=off
    REGATTA_TRANSPORT=tcp RAYON_NUM_THREADS=1"
  local program=(target/release/regatta train "${common[@]}" --set parallel.threads=1 --steps "$link"
    --set train.eval_every=0 --set train.eval_batches=1 --out "$out/$name" "$@")
  # A core for each, as two hosts would have.
  ip netns exec "$HOST_1" env $environment REGATTA_IFACE_ADDR="$ADDRESS_1" RANK=1 taskset -c 1 "${program[@]}" >/dev/null 2>&1 &
  local other=$!
  ip netns exec "$HOST_0" env $environment REGATTA_IFACE_ADDR="$ADDRESS_0" RANK=0 taskset -c 0 "${program[@]}" \
    >"$out/$name.log" 2>&1 || { cat "$out/$name.log"; exit 1; }
  wait "$other"
}
for way in "${ways[@]}"; do
  sets=()
  IFS=, read -r -a parts <<<"${way/#plain/}"
  for set in "${parts[@]}"; do sets+=(--set "$set"); done
  name=${way//[^a-z0-9]/-}
  speed=()
  # Over the link without a warm-up, in which gradients travel as they are.
  case $way in *onebit* | *dgc*) speed=(--set compress.warmup=0) ;; esac
  on_link "$name" "${sets[@]}" "${speed[@]}"
  target/release/regatta train "${common[@]}" --workers 2 --steps "$steps" --out "$out/$name-loss" "${sets[@]}" \
    >"$out/$name.log" 2>&1 || { cat "$out/$name.log"; exit 1; }
  target/release/regatta plan show "${common[@]}" --workers 2 --set "train.steps=$steps" "${sets[@]}" >"$out/$name.plan"
  python3 - "$out" "$name" "$way" <<'P'
import json, os, sys
out, name, way = sys.argv[1:]
speed = json.load(open(f"{out}/{name}/summary.json"))
loss = json.load(open(f"{out}/{name}-loss/summary.json"))
# The last line of rank 0's sums: bytes sent in a step.
sent = next(int(line.split()[-1]) for line in open(f"{out}/{name}.plan") if line.split()[:1] == ["all"])
plain = f"{out}/plain.first"
if not os.path.exists(plain):
    open(plain, "w").write(f"{speed['tokens_per_s']} {loss['val_loss']} {sent}")
first = [float(x) for x in open(plain).read().split()]
print(f"{way:84} {speed['tokens_per_s']:7.0f} tokens/s ({speed['tokens_per_s'] / first[0]:5.2f} x) {sent:9} bytes a step "
      f"({first[2] / sent:6.1f} x fewer) loss {loss['val_loss']:.4f} ({loss['val_loss'] - first[1]:+.4f})", flush=True)
P
done
[ -n "${PYTHON:-}" ] || exit 0
for hook in ${PEERS:-none bf16 powersgd}; do
  script=(taskset -c 0,1 "$PYTHON" benches/peers/torch_gpt.py nanogpt --text "$text" --hook "$hook")
  environment="WORLD_SIZE=2 MASTER_ADDR=$ADDRESS_0 MASTER_PORT=29513 GLOO_SOCKET_IFNAME=eth0"
  ip netns exec "$HOST_1" env $environment RANK=1 taskset -c 1 "${script[@]:3}" --steps "$link" >/dev/null 2>&1 &
  other=$!
  ip netns exec "$HOST_0" env $environment RANK=0 taskset -c 0 "${script[@]:3}" --steps "$link" >"$out/torch.json" 2>"$out/torch.log" \
    || { cat "$out/torch.log"; exit 1; }
  wait "$other"
  "${script[@]}" --world 2 --steps "$steps" --judge >"$out/torch-loss.json" 2>"$out/torch.log" || { cat "$out/torch.log"; exit 1; }
  python3 - "$out" "$hook" <<'P'
import json, sys
out, hook = sys.argv[1:]
speed, loss = json.load(open(f"{out}/torch.json")), json.load(open(f"{out}/torch-loss.json"))
print(f"PyTorch DDP, hook {hook:67} {speed['tokens_per_s']:7.0f} tokens/s, loss {loss['val_loss']:.4f}", flush=True)
P
done
