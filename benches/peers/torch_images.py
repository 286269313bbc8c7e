"""Training steps of image models in PyTorch, under DDP on gloo where there are several ranks.

usage: python benches/peers/torch_images.py mnist-cnn|resnet18 [--world N] [--threads N] [--batch N] [--steps N]
       [--channels-last]

The models and optimizers are those of configs/mnist-cnn.toml and configs/resnet18.toml: a step is forward, backward and
update over one batch of random images that is already in memory. `--batch` is a rank's. Prints one line of JSON: the
median step in milliseconds without the first fifth of the steps, samples a second over all ranks, and the most resident
memory of rank 0 in MiB.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn


def mnist_cnn():
    convolution = lambda inputs, outputs: [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    hidden = [nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.25), nn.Linear(128, 10)]
    return nn.Sequential(*convolution(1, 16), *convolution(16, 32), *hidden)


class Block(nn.Module):
    """He et al. 2016, "Deep Residual Learning for Image Recognition", figure 2."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu_()
        return self.norm2(self.conv2(y)).add_(self.shortcut(x)).relu_()


def resnet18():
    layers = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    inputs = 64
    for stage, outputs in enumerate([64, 128, 256, 512]):
        for block in range(2):
            layers.append(Block(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def run(rank, args, store):
    torch.set_num_threads(args.threads)
    torch.manual_seed(1337)
    digits = args.model == "mnist-cnn"
    model = mnist_cnn() if digits else resnet18()
    batch = args.batch or (128 if digits else 32)
    images = torch.randn(batch, *((1, 28, 28) if digits else (3, 32, 32)))
    labels = torch.randint(10, (batch,))
    if args.channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    if digits:
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.999))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if args.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.world)
        model = nn.parallel.DistributedDataParallel(model)
    times = []
    for _ in range(args.steps):
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if digits:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        times.append((time.perf_counter() - begun) * 1e3)
    if args.world > 1:
        dist.destroy_process_group()
    if rank == 0:
        step = statistics.median(times[args.steps // 5 :])
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        print(
            json.dumps(
                {
                    "model": args.model,
                    "world": args.world,
                    "threads": args.threads,
                    "batch": batch,
                    "step_ms": round(step, 3),
                    "samples_per_s": round(args.world * batch / step * 1e3, 1),
                    "peak_rss_mib": round(rss, 1),
                    "loss": round(loss.item(), 4),
                    "torch": torch.__version__,
                }
            ),
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["mnist-cnn", "resnet18"])
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        if args.world > 1:
            multiprocessing.spawn(run, args=(args, store), nprocs=args.world)
        else:
            run(0, args, store)


if __name__ == "__main__":
    main()
