"""Training steps against PyTorch: the same model, batch and optimizer, in one sitting, in turn, medians and ratios.

usage: python benches/peers/training.py [--only NAME,...] [--rounds 5] [--text FILE] [--mnist FOLDER] [--targets]
       (after cargo build --release)

Every rank has one thread, on a core of its own where there is one. PyTorch is the one of this interpreter, several ranks
are DistributedDataParallel over gloo; ours are processes over shared memory. `speed` is PyTorch's step over ours, the
median of the rounds' ratios; `memory` is our most resident memory of any rank over PyTorch's. The language models need a
text, the digits a folder from `regatta data mnist`; what is missing is skipped. `--targets` fails when one is missed.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))
PROGRAM = os.path.join(ROOT, "target", "release", "regatta")

# name: configuration, ranks, steps, peer and its arguments, least speed, what data it needs
CASES = {
    "gpt-base": ("gpt-base", 1, 16, ("torch_gpt.py", "base"), 1.0, "text"),
    "gpt-base x2": ("gpt-base", 2, 16, ("torch_gpt.py", "base"), 1.15, "text"),
    "nanogpt x2": ("gpt-shakespeare-cpu", 2, 120, ("torch_gpt.py", "nanogpt"), 1.5, "text"),
    "mnist-cnn": ("mnist-cnn", 1, 60, ("torch_images.py", "mnist-cnn"), 0.9, "mnist"),
    "resnet18": ("resnet18", 1, 10, ("torch_images.py", "resnet18"), 0.9, None),
}
MEMORY = 0.5


def pinned(world):
    """One rank runs on one core, so that no thread of either side has more than it should."""
    return ["taskset", "-c", "0"] if world == 1 and sys.platform == "linux" else []


def torch(case, args):
    _, world, steps, (script, model), _, needs = CASES[case]
    command = [*pinned(world), sys.executable, os.path.join(HERE, script), model]
    command += ["--world", str(world), "--threads", "1", "--steps", str(steps)]
    command += ["--text", args.text] if needs == "text" else []
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200).stdout
    found = json.loads(out.strip().splitlines()[-1])
    return found["step_ms"], found["peak_rss_mib"]


def ours(case, args, folder):
    config, world, steps, _, _, needs = CASES[case]
    out = os.path.join(folder, "run")
    command = [*pinned(world), PROGRAM, "train", os.path.join(ROOT, "configs", config + ".toml"), "--out", out]
    command += ["--workers", str(world), "--steps", str(steps), "--set", "parallel.threads=1"]
    command += ["--set", "train.eval_batches=1", "--set", "train.eval_every=0", "--set", "sample.tokens=0"]
    if needs:
        command += ["--set", f"data.path={args.text if needs == 'text' else args.mnist}"]
        command += ["--set", f"data.cache={folder}/data"] if needs == "text" else []
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    with open(os.path.join(out, "summary.json"), encoding="utf-8") as file:
        summary = json.load(file)
    subprocess.run(["rm", "-rf", out], check=True)
    return summary["step_ms"], max(summary["peak_rss_bytes"]) / (1 << 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", default=os.path.join(ROOT, "..", "shared", "data", "tinyshakespeare.txt"))
    parser.add_argument("--mnist", default=os.path.join(ROOT, "data", "mnist"))
    parser.add_argument("--targets", action="store_true")
    args = parser.parse_args()
    missed = []
    print(f"{'':12}  {'ours ms':>9}  {'torch ms':>9}  {'speed':>6}  {'ours MiB':>9}  {'torch MiB':>9}  {'memory':>6}")
    for case in (name.strip() for name in args.only.split(",")):
        least, needs = CASES[case][4:]
        place = {"text": args.text, "mnist": args.mnist}.get(needs)
        if place and not os.path.exists(place):
            print(f"{case:12}  skipped: no {place}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            rounds = [(ours(case, args, folder), torch(case, args)) for _ in range(args.rounds)]
        speed = statistics.median(peer[0] / own[0] for own, peer in rounds)
        memory = statistics.median(own[1] / peer[1] for own, peer in rounds)
        columns = [statistics.median(side[column] for side in sides) for column in (0, 1) for sides in zip(*rounds)]
        print(
            f"{case:12}  {columns[0]:9.1f}  {columns[1]:9.1f}  {speed:6.2f}  {columns[2]:9.0f}  {columns[3]:9.0f}  {memory:6.2f}",
            flush=True,
        )
        missed += [f"{case}: speed {speed:.2f} of {least}"] if speed < least else []
        missed += [f"{case}: memory {memory:.2f} of {MEMORY}"] if memory > MEMORY else []
    for line in missed:
        print("missed:", line)
    if args.targets and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
