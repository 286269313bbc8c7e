"""The MNIST CNN and ResNet-18 beside PyTorch: a training step's time and the most resident memory, in turn in one sitting.

usage: python benches/peers/images.py [mnist-cnn] [resnet18] [--world N] [--threads N] [--rounds N] [--digits FOLDER]
       (after cargo build --release; digits come from `regatta data mnist`)

Each round runs both; the medians of the rounds are printed with their ratio (above 1: Regatta is faster, or smaller). A
batch is of 128 digits or 32 pictures on each worker. Python needs torch.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
PROGRAM = os.path.join(ROOT, "target", "release", "regatta")
BATCH = {"mnist-cnn": 128, "resnet18": 32}
STEPS = {"mnist-cnn": 100, "resnet18": 12}


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def ours(model, args):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "run")
        sets = {
            "parallel.threads": args.threads,
            "train.steps": STEPS[model],
            "train.batch": BATCH[model] * args.world,
            "train.eval_every": 0,
            "train.eval_batches": 1,
        }
        if model == "mnist-cnn":
            sets["data.path"] = args.digits
        command = [PROGRAM, "train", os.path.join(ROOT, "configs", f"{model}.toml"), "--out", out]
        command += ["--workers", str(args.world)]
        for key, value in sets.items():
            command += ["--set", f"{key}={value}"]
        run(command)
        with open(os.path.join(out, "summary.json")) as file:
            summary = json.load(file)
        return summary["step_ms"], max(summary["peak_rss_bytes"]) / (1 << 20)


def torch(model, args):
    command = [sys.executable, os.path.join(HERE, "torch_images.py"), model, "--steps", str(STEPS[model])]
    line = run(command + ["--world", str(args.world), "--threads", str(args.threads)]).splitlines()[-1]
    result = json.loads(line)
    return result["step_ms"], result["peak_rss_mib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help="mnist-cnn, resnet18; both if none is given")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--digits", default="data/mnist")
    args = parser.parse_args()
    for model in args.models or list(BATCH):
        if model not in BATCH:
            parser.error(f"{model} is neither mnist-cnn nor resnet18")
        rounds = [(ours(model, args), torch(model, args)) for _ in range(args.rounds)]
        for index, what in enumerate(["ms a step", "MiB a rank"]):
            mine, theirs = (statistics.median(one[side][index] for one in rounds) for side in (0, 1))
            ratio = statistics.median(torch[index] / ours[index] for ours, torch in rounds)
            print(f"{model:10} Regatta {mine:8.1f}  PyTorch {theirs:8.1f}  ratio {ratio:5.2f}  {what}", flush=True)


if __name__ == "__main__":
    main()
