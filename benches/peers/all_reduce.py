"""All-reduce of f32 over shared memory against gloo: both in one sitting, in turn, medians and ratios.

usage: python benches/peers/all_reduce.py [ROUNDS]   (Python with torch; after cargo build --release)
"""
import json
import os
import statistics
import subprocess
import sys
import time

SIZES = [4, 1 << 10, 16 << 10, 256 << 10, 4 << 20, 16 << 20, 64 << 20]
WORLD = 2
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.path.join(ROOT, "target", "release", "regatta")


def ours(memory):
    sizes = ",".join(map(str, SIZES))
    command = [PROGRAM, "bench", "collective", "--op", "all_reduce", "--workers", str(WORLD), "--transport", "shm",
               "--sizes", sizes, "--memory", memory, "--json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line["bytes"]: line["median_us"] for line in map(json.loads, out.splitlines())}


def gloo_rank(rank, port, results):
    import torch
    import torch.distributed as dist
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    medians = {}
    for size in SIZES:
        data = torch.ones(size // 4)
        iterations = max(5, min(400, (64 << 20) // size))
        for _ in range(3):
            dist.all_reduce(data)
        dist.barrier()
        times = []
        for _ in range(iterations):
            begun = time.perf_counter()
            dist.all_reduce(data)
            times.append(time.perf_counter() - begun)
        medians[size] = statistics.median(times) * 1e6
    if rank == 0:
        results.put(medians)
    dist.destroy_process_group()


def gloo():
    import socket
    import torch.multiprocessing as mp
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(gloo_rank, args=(port, results), nprocs=WORLD)
    return results.get()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    runs = {"private": [], "registered": [], "gloo": []}
    for _ in range(rounds):
        runs["private"].append(ours("private"))
        runs["gloo"].append(gloo())
        runs["registered"].append(ours("registered"))
    median = {name: {size: statistics.median(run[size] for run in all_runs) for size in SIZES}
              for name, all_runs in runs.items()}
    print(f"all-reduce f32 sum, {WORLD} ranks, median of {rounds} runs; GB/s are bytes over time")
    print(f"{'bytes':>10} {'ours us':>10} {'GB/s':>7} {'in place us':>12} {'GB/s':>7} {'gloo us':>10} {'GB/s':>7} {'gloo/ours':>10}")
    for size in SIZES:
        a, b, c = (median[name][size] for name in ("private", "registered", "gloo"))
        print(f"{size:>10} {a:>10.1f} {size / a / 1e3:>7.2f} {b:>12.1f} {size / b / 1e3:>7.2f} {c:>10.1f} "
              f"{size / c / 1e3:>7.2f} {c / a:>10.1f}")


if __name__ == "__main__":
    main()
