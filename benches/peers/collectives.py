"""Collectives of f32 against Open MPI and gloo: all in one sitting, in turn, medians and ratios.

usage: python benches/peers/collectives.py [--ops all_reduce,...] [--busy N] [--targets]   (after cargo build --release)

Bytes are those of the larger side on each rank. Everyone counts alike: per size clamp(64 MiB / bytes, 5, 400) runs after
3 warm-ups, rank 0's median, then the median of the rounds. Gloo is torch's under this interpreter; Open MPI needs
`mpicc` (Debian: libopenmpi-dev, openmpi-bin). A peer that is missing, or lacks an operation, leaves blanks.

With --busy, N processes that compute all the time stand for the machine's other users. Then compare ratios of one
sitting only, and take several rounds: whose turn it is on a core is a matter of luck.

The memory bound is an in-place `x[i] *= c` over the same bytes by all ranks at once: each must read its data once and
write its result once. "of bound" = bound / ours, for all_reduce of private memory. It is rank 0's pass, so with more
ranks than cores, where a small pass fits in one turn on a core, it asks for more than can be had.

Rank 0 is the source of broadcast and send_recv (even ranks send to the next odd rank, one way): small messages are timed
until they are handed over, not until they have arrived.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "..", "..", "target", "release", "regatta")
CORES = len(os.sched_getaffinity(0))
OPS = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "barrier", "send_recv"]
IN_BLOCKS = {"reduce_scatter", "all_gather", "all_to_all"}
REGISTERED = {"all_reduce", "broadcast"}
KIB, MIB = 1 << 10, 1 << 20
LIMIT_S = 600

# Of all_reduce: transport, world, column, least value, smallest and largest bytes.
TARGETS = [
    ("shm", 2, "mpi/ours", 0.5, 4, KIB),
    ("shm", 2, "mpi/ours", 1, 16 * KIB, 4 * MIB),
    ("shm", 2, "mpi/ours", 2, 16 * MIB, 64 * MIB),
    ("shm", 2, "of bound", 0.6, 64 * MIB, 64 * MIB),
    ("shm", 2, "gloo/ours", 20, 4, 64 * KIB),
    ("shm", 2, "gloo/ours", 4, MIB, 64 * MIB),
    ("shm", 4, "mpi/ours", 1, 4, 64 * MIB),
    ("shm", 4, "gloo/ours", 1, 4, 64 * MIB),
    ("tcp", 2, "gloo/ours", 1.5, 4 * KIB, 64 * MIB),
    ("tcp", 4, "gloo/ours", 1.5, 4 * KIB, 64 * MIB),
]
COLUMNS = ["bytes", "ours us", "registered us", "mpi us", "gloo us", "mpi/ours", "gloo/ours", "of bound"]


def parse_size(text):
    factor = {"K": KIB, "M": MIB, "G": 1 << 30}.get(text[-1:], 1)
    digits = text if factor == 1 else text[:-1]
    size = int(digits) * factor if digits.isdecimal() else 0
    if not size or size % 4:
        raise argparse.ArgumentTypeError(f"{text} is no size of f32 data; write 4096, 16K, 4M")
    return size


def listed(parse, allowed=None):
    """An argument of values separated by commas."""
    def values(text):
        found = [parse(value) for value in text.split(",") if value]
        for value in found:
            if allowed and value not in allowed:
                raise argparse.ArgumentTypeError(f"{value} is none of {', '.join(allowed)}")
        return found
    return values


def sizes_of(op, world, sizes):
    if op == "barrier":
        return [0]
    return [size for size in sizes if op not in IN_BLOCKS or size >= 4 * world]


@functools.cache
def note(text):
    """Says it once, however many rounds meet it."""
    print(text, flush=True)


def output(name, command):
    """Lines that a program prints; none where it fails, which leaves blanks in the table."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        note(f"  {name}: left blank, still running after {LIMIT_S} s")
        return []
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.strip(" -")), f"exit status {done.returncode}")
        note(f"  {name}: left blank, {said}")
        return []
    return done.stdout.splitlines()


def cores():
    """What two busy processes get done against one: a machine shared with others may give less than two cores."""
    def busy(results):
        end, count = time.perf_counter() + 1, 0
        while time.perf_counter() < end:
            count += 1
        results.put(count)

    def run(processes):
        fork = multiprocessing.get_context("fork")
        results = fork.Queue()
        workers = [fork.Process(target=busy, args=(results,)) for _ in range(processes)]
        for worker in workers:
            worker.start()
        total = sum(results.get() for _ in workers)
        for worker in workers:
            worker.join()
        return total

    one = run(1)
    return run(2) / one


@contextlib.contextmanager
def busy(processes):
    """So many processes that compute all the time, while it lasts."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def ours(program, op, transport, world, sizes, memory="private"):
    lines = output(f"ours {op}", [program, "bench", "collective", "--op", op, "--workers", str(world), "--transport",
                                  transport, "--sizes", ",".join(map(str, sizes)), "--memory", memory, "--json"])
    return {line["bytes"]: line["median_us"] for line in map(json.loads, lines)}


def build_mpi(folder):
    """The compiled peer, or None with the reason printed."""
    program = os.path.join(folder, "mpi_collectives")
    try:
        subprocess.run(["mpicc", "-O3", "-march=native", os.path.join(HERE, "mpi_collectives.c"), "-o", program],
                       check=True, capture_output=True, text=True)
        version = subprocess.run(["mpirun", "--version"], check=True, capture_output=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).splitlines()[0]
        print(f"Open MPI and the memory bound skipped (apt-get install libopenmpi-dev openmpi-bin): {reason}")
        return None
    print(f"Open MPI: {version.splitlines()[0]}")
    return program


def mpi(program, op, transport, world, sizes):
    """Times of an operation, or of the memory bound where `op` is `--bound`."""
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(world),
               "--bind-to", "core" if world <= CORES else "none"]
    if transport == "tcp":
        command += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]
    lines = output(f"mpi {op}", [*command, program, op, *map(str, sizes)])
    return {int(size): float(us) for size, us in map(str.split, lines)}


def gloo_rank(rank, op, world, sizes, store):
    import torch
    import torch.distributed as dist
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo announces its connections
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=LIMIT_S))
    medians = {}
    for size in sizes:
        share = size // 4 // world
        data, part, other = torch.ones(size // 4), torch.ones(share), torch.ones(share * world)
        blocks = data[:share * world]

        def send_recv():
            if rank % 2:
                dist.recv(data, rank - 1)
            elif rank + 1 < world:
                dist.send(data, rank + 1)

        run = {
            "all_reduce": lambda: dist.all_reduce(data),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, blocks),
            "all_gather": lambda: dist.all_gather_into_tensor(blocks, part),
            "broadcast": lambda: dist.broadcast(data, 0),
            "all_to_all": lambda: dist.all_to_all_single(other, blocks),
            "barrier": dist.barrier,
            "send_recv": send_recv,
        }[op]
        times = []
        for iteration in range(-3, max(5, min(400, 64 * MIB // max(size, 4)))):
            data[:16] = 1  # the same numbers each time, as ours
            if iteration == 0:
                dist.barrier()
            begun = time.perf_counter()
            run()
            if iteration >= 0:
                times.append(time.perf_counter() - begun)
        medians[size] = sorted(times)[len(times) // 2] * 1e6
    dist.destroy_process_group()
    return medians


def gloo(op, world, sizes):
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        rank = functools.partial(gloo_rank, op=op, world=world, sizes=sizes, store=os.path.join(folder, "store"))
        try:
            with concurrent.futures.ProcessPoolExecutor(world, mp_context=spawn) as pool:
                return list(pool.map(rank, range(world)))[0]
        except (RuntimeError, ValueError) as error:
            note(f"  gloo {op}: left blank, {str(error).splitlines()[0]}")
            return {}


def measure(arguments, mpi_program, with_gloo):
    """The cores of each round, and its microseconds under (who, op, transport, world, bytes).

    Gloo and the bound know no transport: theirs is None.
    """
    given, runs = [], collections.defaultdict(list)

    def keep(medians, *key):
        for size, us in medians.items():
            runs[*key, size].append(us)

    for number in range(1, arguments.rounds + 1):
        given.append(cores())
        print(f"round {number} of {arguments.rounds}: the machine gives {given[-1]:.2f} cores", flush=True)
        for op, world in itertools.product(arguments.ops, arguments.workers):
            sizes = sizes_of(op, world, arguments.sizes)
            large = [size for size in sizes if size >= MIB]
            if op == "all_reduce" and mpi_program and large:
                keep(mpi(mpi_program, "--bound", "shm", world, large), "bound", op, None, world)
            for transport in arguments.transports if sizes else []:
                keep(ours(arguments.program, op, transport, world, sizes), "ours", op, transport, world)
                if "mpi" in arguments.peers and mpi_program:
                    keep(mpi(mpi_program, op, transport, world, sizes), "mpi", op, transport, world)
                if op in REGISTERED:
                    keep(ours(arguments.program, op, transport, world, sizes, "registered"), "registered", op,
                         transport, world)
            if with_gloo and sizes:
                keep(gloo(op, world, sizes), "gloo", op, None, world)
    return given, runs


def row(runs, op, transport, world, size):
    """A line of the table: column to value, None where nothing was measured."""
    def median(who, transport=transport):
        values = runs.get((who, op, transport, world, size))
        return statistics.median(values) if values else None

    own, mpi_us, gloo_us = median("ours"), median("mpi"), median("gloo", None)
    over_ours = lambda us: us / own if us and own else None
    values = [size, own, median("registered"), mpi_us, gloo_us, over_ours(mpi_us), over_ours(gloo_us),
              over_ours(median("bound", None))]
    return dict(zip(COLUMNS, values))


def print_table(op, transport, world, rows, rounds):
    crowded = f"; {world} ranks on {CORES} cores" if world > CORES else ""
    print(f"\n{op}, {transport}, {world} ranks, median of {rounds} rounds{crowded}")
    columns = [column for column in COLUMNS if any(line[column] is not None for line in rows)]
    print(" ".join(f"{column:>13}" for column in columns))
    for line in rows:
        cells = [line[column] for column in columns]
        cells = ["" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(" ".join(f"{cell:>13}" for cell in cells).rstrip())


def print_targets(tables):
    print("\ntargets of all_reduce (the size that comes closest to failing)")
    for transport, world, column, least, smallest, largest in TARGETS:
        lines = tables.get(("all_reduce", transport, world), [])
        found = [(line[column], line["bytes"]) for line in lines
                 if smallest <= line["bytes"] <= largest and line[column] is not None]
        name = f"{transport} {world} ranks: {column} >= {least} for {smallest}..{largest} bytes"
        if not found:
            print(f"  none  {name}: not measured")
            continue
        value, size = min(found)
        print(f"  {'pass' if value >= least else 'FAIL'}  {name}: {value:.2f} at {size}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=listed(str, OPS), default=OPS, help=f"of {','.join(OPS)}; default all")
    parser.add_argument("--workers", type=listed(int), default=[2, 4], help="numbers of ranks; default 2,4")
    parser.add_argument("--transports", type=listed(str, ["shm", "tcp"]), default=["shm", "tcp"])
    parser.add_argument("--sizes", type=listed(parse_size), help="bytes; K, M and G multiply by 1024",
                        default="4,256,1K,4K,16K,64K,256K,1M,4M,16M,64M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that compute meanwhile; default 0")
    parser.add_argument("--program", default=PROGRAM, help="the regatta to measure; default that of target/release")
    parser.add_argument("--peers", type=listed(str, ["gloo", "mpi"]), default=["gloo", "mpi"])
    parser.add_argument("--json", metavar="FILE", help="write the medians of every round there")
    parser.add_argument("--targets", action="store_true", help="check the targets of all_reduce")
    arguments = parser.parse_args()
    if not os.path.exists(arguments.program):
        sys.exit(f"no {os.path.normpath(arguments.program)}: run cargo build --release first")

    with_gloo = "gloo" in arguments.peers
    if with_gloo and not importlib.util.find_spec("torch"):
        print(f"gloo skipped: {sys.executable} has no torch")
        with_gloo = False
    elif with_gloo:
        print(f"gloo: torch {importlib.metadata.version('torch')} of {sys.executable}, one thread a rank")
    with tempfile.TemporaryDirectory() as folder:
        mpi_program = build_mpi(folder)
        with busy(arguments.busy):
            given, runs = measure(arguments, mpi_program, with_gloo)

    tables = {(op, transport, world): [row(runs, op, transport, world, size)
                                       for size in sizes_of(op, world, arguments.sizes)]
              for op, transport, world in itertools.product(arguments.ops, arguments.transports, arguments.workers)}
    for key, rows in tables.items():
        print_table(*key, rows, arguments.rounds)
    if arguments.targets:
        print_targets(tables)
    if arguments.json:
        names = ["who", "op", "transport", "world", "bytes"]
        with open(arguments.json, "w") as file:
            rows = [dict(zip(names, key), rounds_us=values) for key, values in runs.items()]
            json.dump({"cores": given, "medians": rows}, file, indent=1)


if __name__ == "__main__":
    main()
