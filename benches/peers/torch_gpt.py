"""A GPT with nanoGPT's architecture under PyTorch, as one process or with DistributedDataParallel over gloo.

usage: python benches/peers/torch_gpt.py base|nanogpt --text FILE [--world N] [--threads N] [--steps N] [--hook HOOK] [--judge]

`base` is configs/gpt-base.toml, `nanogpt` is configs/gpt-shakespeare-cpu.toml: the same sizes, batches, optimizer, clipping
and learning rate. Prints one line of JSON: the median duration of a step in ms from its batch to its update, tokens a
second over all ranks, and the most resident memory of any rank in MiB; with --judge also the loss on the last tenth of the
text. --hook is one of DDP's for its gradients. With RANK and WORLD_SIZE in the environment, as under torchrun, it is that
rank of a job.
"""
import argparse
import json
import math
import os
import resource
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

# layers, heads, width, context, batch, and whether that is the batch of each rank
SIZES = {"base": (6, 8, 256, 128, 8, True), "nanogpt": (4, 4, 128, 64, 12, False)}


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        batch, time_, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, time_, self.heads, -1).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, vocab, layers, heads, width, context):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * layers) if residual else 1))

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        # The output projection is the embedding.
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step, steps):
    if step < 100:
        return 1e-3 * (step + 1) / 100
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / max(1, steps - 100))) * 9e-4


def hooked(model, hook):
    """The model with one of DDP's hooks, in its best settings here."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if hook == "bf16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif hook == "powersgd":
        # By default the first thousand steps are not compressed.
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=10)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return model


def judged(model, data, context):
    """The mean loss over all parts of `data`."""
    parts = data[: (len(data) - 1) // context * context + 1]
    ids, targets = parts[:-1].view(-1, context), parts[1:].view(-1, context)
    with torch.no_grad():
        losses = [model(a, b).item() * len(a) for a, b in zip(ids.split(64), targets.split(64))]
    return sum(losses) / len(ids)


def run(rank, args, port, results):
    torch.set_num_threads(args.threads)
    if args.world > 1:
        if port:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=args.world)
    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    index = {char: i for i, char in enumerate(sorted(set(text)))}
    whole = torch.tensor([index[char] for char in text])
    data, rest = whole[: int(0.9 * len(text))], whole[int(0.9 * len(text)) :]
    layers, heads, width, context, batch, each = SIZES[args.model]
    rows = batch if each else batch // args.world
    torch.manual_seed(1)
    model = Gpt(len(index), layers, heads, width, context)
    # With several buckets, PowerSGD's reductions of one rank are in another order than those of the other.
    bucket = {"bucket_cap_mb": 100} if args.hook == "powersgd" else {}
    wrapped = hooked(nn.parallel.DistributedDataParallel(model, **bucket), args.hook) if args.world > 1 else model
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(rank)
    times = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        begun = time.perf_counter()
        starts = torch.randint(len(data) - context - 1, (rows,), generator=generator)
        ids = torch.stack([data[i : i + context] for i in starts])
        targets = torch.stack([data[i + 1 : i + context + 1] for i in starts])
        optimizer.zero_grad()
        loss = wrapped(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - begun)
    loss = judged(model, rest, context) if args.judge and rank == 0 else None
    # With PowerSGD the first steps are not compressed.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put((rank, statistics.median(times[len(times) // 4 :]), peak, loss))
    if args.world > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--text", required=True)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hook", choices=["none", "bf16", "powersgd"], default="none")
    parser.add_argument("--judge", action="store_true")
    args = parser.parse_args()
    if "RANK" in os.environ:
        import queue

        args.world, results = int(os.environ["WORLD_SIZE"]), queue.Queue()
        run(int(os.environ["RANK"]), args, None, results)
        return told(args, [results.get()])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if args.world == 1:
        import queue

        results = queue.Queue()
        run(0, args, port, results)
    else:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(run, args=(args, port, results), nprocs=args.world)
    told(args, sorted(results.get() for _ in range(args.world)))


def told(args, found):
    context, batch, each = SIZES[args.model][3:]
    tokens = context * batch * (args.world if each else 1)
    print(json.dumps({
        "step_ms": found[0][1] * 1e3,
        "tokens_per_s": tokens / found[0][1],
        "peak_rss_mib": max(one[2] for one in found),
        **({"val_loss": found[0][3]} if args.judge else {}),
    }))


if __name__ == "__main__":
    main()
