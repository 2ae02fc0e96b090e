#!/usr/bin/env python3
"""Time the package against what one would write first, and write the record that chapter 24 draws.

    python tools/bench.py                    # all blocks on the CPU -> nbs/results/speed_cpu.json
    python tools/bench.py --only step data   # some blocks; the record keeps the others
    python tools/bench.py --peers            # torchattacks, foolbox, ART -> speed_peers.json
    python tools/bench.py --log ci.log       # what .ci/run printed: where a tester waits
    python tools/bench.py --device cuda      # an epoch, 80 epochs, several runs -> speed_cuda.json
    python tools/bench.py --rehearse --out x # any of them in seconds, tiny, nothing to conclude

Inside a block the candidates take turns in one process, round after round: clocks drift severalfold
between hours on a shared machine, and only a ratio of neighbours means something. A ratio is formed
in each round; its median, smallest and largest value are the result, every raw second is kept.
Give the machine to it alone. 'audit' attacks test images of CIFAR-10 (`--data`).
"""

import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # a compile time is a cold one

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fairmix_nb.attacks import Threat, attack_by_name, fgsm, pgd
from fairmix_nb.audit import audit
from fairmix_nb.data import ImageSet, as_floats, augment, batches, load, make_data, spread_subset
from fairmix_nb.mend import Front, margins
from fairmix_nb.methods import METHODS, Pipeline, Run, TrainCfg, frozen, make_streams, mix_step
from fairmix_nb.mixup import ClassTable, same_class_partner
from fairmix_nb.models import as_attacked, build, fold_batchnorm
from fairmix_nb.records import provenance, write_aside
from fairmix_nb.report import outcome_of
from fairmix_nb.risk import class_counts, paired_bootstrap
from fairmix_nb.runs import load_model
from fairmix_nb.train import Alone, fit, make_optimizer, numerics, run_epoch

EPS = 8 / 255
STAYS = contextlib.ExitStack()  # what `fit` sets for a run holds here until the process ends
atexit.register(STAYS.close)
MARKS = dict(  # ratio -> (slower, faster, the least that is accepted)
    step=dict(
        S1=("naive", "eager", 1.15),
        S2=("naive", "compiled", 1.45),
        S3=("fast_adversarial", "compiled", 1.5),
        S4=("fast_adversarial", "eager", 1.25),
    ),
    data=dict(
        D1=("loader, 0 workers", "resident", 10),
        D2=("loader, 2 workers", "resident", 5),
        P1=("per class, 256", "table, 256", 3),
    ),
    peers=dict(
        E1_torchattacks=("fgsm torchattacks", "fgsm folded", 1.35),
        E1_foolbox=("fgsm foolbox", "fgsm folded", 1.8),
        E1_art=("fgsm ART", "fgsm folded", 1.5),
        E2_torchattacks=("pgd-10 torchattacks", "pgd-10 folded", 1.3),
    ),
    audit=dict(
        E3=("pyautoattack", "ours", 2.0),
        E3_floor=("ours", "gradients alone", None),
    ),
)


# ---- measuring


def interleave(jobs, rounds, warmup=1, device="cpu", clock=time.perf_counter):
    "Seconds of each job in each round; the jobs take turns, another one first every round."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    names, seconds = list(jobs), {name: [] for name in jobs}
    for name in names * warmup:
        jobs[name]()
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            wait()
            start = clock()
            jobs[name]()
            wait()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds, slow, fast, hold=None):
    "How much longer `slow` takes, round by round."
    each = [a / b for a, b in zip(seconds[slow], seconds[fast])]
    return dict(
        slow=slow,
        fast=fast,
        hold=hold,
        median=statistics.median(each),
        min=min(each),
        max=max(each),
    )


def ratios(block, seconds):
    "The ratios of a block whose candidates were both timed."
    return {
        name: ratio(seconds, *mark)
        for name, mark in MARKS[block].items()
        if mark[0] in seconds and mark[1] in seconds
    }


def peak_bytes(job, device="cpu"):
    "The most that tensors made by `job` hold at once, beyond what was there before."
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=cpu) as prof:
        job()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(steps).max(initial=0))


class Counter(TorchDispatchMode):
    "FLOPs, and bytes of tensors read and written, of every operator that is called."

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        touched = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        moved = 0 if func.is_view else sum(t.numel() * t.element_size() for t in touched)
        self.rows.append((flops, moved))
        return out


def floors(job, flops_per_s, bytes_per_s):
    "Seconds below which `job` cannot go on a machine with these two ceilings."
    with Counter() as seen:
        job()
    heavy = [row for row in seen.rows if row[0]]

    def at(rows):
        return sum(max(f / flops_per_s, b / bytes_per_s) for f, b in rows)

    return dict(
        operators=len(seen.rows),
        flops=sum(f for f, _ in seen.rows),
        bytes=sum(b for _, b in seen.rows),
        bytes_fused=sum(b for _, b in heavy),
        arithmetic=sum(f for f, _ in heavy) / flops_per_s,
        memory=sum(b for _, b in heavy) / bytes_per_s,
        each_operator=at(seen.rows),
        fused=at(heavy),
    )


# ---- the candidates: training steps


def naive_step(model, optimizer, x, y, eps):
    "FGSM training as one writes it first: two full backward passes."
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    adv = (x + eps * x.grad.sign()).clamp(0, 1).detach()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(adv), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def image_gradient_step(model, optimizer, x, y, eps):
    "The same step; the attack asks for the gradient of the images only."
    adv = fgsm(model, x, y, eps, check=False)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(adv), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def wong_step(model, optimizer, scheduler, x, y, eps, alpha):
    "Algorithm 3 of Wong, Rice & Kolter 2020: random start, one step of alpha, projection."
    delta = torch.empty_like(x).uniform_(-eps, eps)
    delta = torch.max(torch.min(delta, 1 - x), -x).requires_grad_()
    F.cross_entropy(model(x + delta), y).backward()
    delta = (delta + alpha * delta.grad.sign()).clamp(-eps, eps)
    delta = torch.max(torch.min(delta, 1 - x), -x).detach()
    logits = model(x + delta)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.item(), (logits.argmax(1) == y).float().mean().item()


def images_of(n, size=32, n_cls=10, seed=0):
    "Random images: their content does not change how long anything takes."
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)
    return ImageSet(x, torch.arange(n) % n_cls, tuple(map(str, range(n_cls))))


def new_run(model, images, cfg, method=METHODS["at"], device="cpu"):
    "A run before its first step, on `images` alone."
    streams = make_streams(cfg.seed, device)
    run = Run(model, cfg, images, images, streams, tuple(images.counts()), net=model, epoch=1)
    run.optimizer, run.state = make_optimizer(model, cfg), method.start(run)
    return run


def trainer(
    images,
    cfg,
    device="cpu",
    name="resnet20",
    compile=False,
    method=METHODS["at"],
    precision="fp32",
):
    "An epoch of the package's own loop over `images`, as a call without arguments."
    model = build(name, images.n_cls).to(device, memory_format=torch.channels_last)
    STAYS.enter_context(numerics(model, device, compile, precision, False))
    run, one = new_run(model, images, cfg, method, device), Alone()
    return lambda: run_epoch(run, method, one, precision)


def naive(x, y, device="cpu", step=naive_step, layout=torch.contiguous_format):
    model = build("resnet20").to(device, memory_format=layout)
    x, optimizer = x.contiguous(memory_format=layout), torch.optim.Adam(model.parameters(), lr=1e-3)
    return lambda: step(model, optimizer, x, y, EPS)


def wong(x, y):
    model = build("resnet20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=0.0, max_lr=0.2, step_size_up=500, step_size_down=500
    )
    return lambda: wong_step(model, optimizer, scheduler, x, y, EPS, 1.25 * EPS)


def ceilings(side=2048, mib=256, device="cpu"):
    "What the machine can do at best, as jobs to be timed beside the others, and their work."
    a, b = torch.rand(2, side, side, device=device)
    source = torch.rand(mib * 2**18, device=device)
    target = torch.empty_like(source)
    jobs = dict(gemm=lambda: a @ b, copy=lambda: target.copy_(source))
    work = dict(gemm=2 * side**3, copy=2 * source.nbytes)
    if device == "cpu":  # another library multiplies there, on some processors twice as fast
        c = side // 8
        x = torch.rand(4, c, 32, 32).to(memory_format=torch.channels_last)
        w = torch.rand(c, c, 3, 3).to(memory_format=torch.channels_last)
        jobs["convolution"] = lambda: torch.conv2d(x, w, None, 1, 1)
        work["convolution"] = 2 * x.numel() * c * 9
    return jobs, work


def peaks(work, seconds):
    "The best FLOPs a second, and bytes a second, that `ceilings` reached."
    rates = {name: done / statistics.median(seconds[name]) for name, done in work.items()}
    copy = rates.pop("copy")
    return max(rates.values()), copy


def block_step(rounds, tiny):
    "S1 to S4, and the share of the machine's ceilings that a step reaches."
    batch = 32 if tiny else 256
    images, cfg = images_of(batch), TrainCfg(batch=batch, eps=EPS)
    x, y = images.floats(), images.y
    tops, work = ceilings(256, 4) if tiny else ceilings()
    eager = trainer(images, cfg)
    jobs = dict(naive=naive(x, y), fast_adversarial=wong(x, y), eager=eager)
    jobs["image gradient"] = naive(x, y, step=image_gradient_step)
    jobs["channels last"] = naive(x, y, step=image_gradient_step, layout=torch.channels_last)
    first = {}
    if not tiny:
        jobs["compiled"] = trainer(images, cfg, compile=True)
        start = time.perf_counter()
        jobs["compiled"]()
        first["compiled"] = time.perf_counter() - start
    seconds = interleave({**jobs, **tops}, rounds)
    peak, copy = peaks(work, seconds)
    return dict(
        config=dict(batch=batch, eps=EPS, model="resnet20", size=32),
        seconds=seconds,
        ratios=ratios("step", seconds),
        first_call=first,
        flops_per_s=peak,
        bytes_per_s=copy,
        floors=floors(eager, peak, copy),
        peak_bytes={name: peak_bytes(job) for name, job in jobs.items()},
    )


# ---- the roofline, layer by layer and phase by phase

PHASES = ("data", "attack, forward", "attack, input gradient")
PHASES += ("training, forward", "training, both gradients", "optimizer")


def step_in_phases(run, idx, done):
    "The package's FGSM step, written out; `done(name)` is called at the end of each of its phases."
    model, box, eps = run.model, run.cfg.box, run.cfg.eps
    x, y = run.batch(idx)
    done("data")
    z = x.clone().requires_grad_()
    with frozen(model):
        loss = F.cross_entropy(model(z), y)
        done("attack, forward")
        adv = (x + eps * torch.autograd.grad(loss, z)[0].sign()).clamp(*box)
    done("attack, input gradient")
    loss = F.cross_entropy(model(adv), y)
    done("training, forward")
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    done("training, both gradients")
    run.optimizer.step()
    done("optimizer")
    return adv


def phase_floors(run, idx, flops_per_s, bytes_per_s):
    "FLOPs, bytes and floor of each phase, operator by operator and with all else fused."
    found, at = {}, [0]
    with Counter() as seen:

        def done(name):
            rows, at[0] = seen.rows[at[0] :], len(seen.rows)
            heavy = [row for row in rows if row[0]]
            low = [sum(max(f / flops_per_s, b / bytes_per_s) for f, b in v) for v in (rows, heavy)]
            found[name] = dict(flops=sum(f for f, _ in rows), bytes=sum(b for _, b in rows))
            found[name].update(each_operator=low[0], fused=low[1])

        step_in_phases(run, idx, done)
    return found


def shapes_of(model, x):
    "Its convolutions by what they do: (input, weight, stride) -> how many."
    found = {}

    def seen(layer, args, out):
        key = tuple(args[0].shape[1:]), tuple(layer.weight.shape), layer.stride[0]
        found[key] = found.get(key, 0) + 1

    hooks = [m.register_forward_hook(seen) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(x)
    for h in hooks:
        h.remove()
    return found


def convolution_jobs(shape, weight, stride, batch):
    "Forward, gradient of the input, gradient of the weights of one convolution, each alone."
    x = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
    w = torch.randn(weight).contiguous(memory_format=torch.channels_last)
    pad = weight[-1] // 2
    out = torch.conv2d(x, w, None, stride, pad)
    g = torch.randn_like(out)
    rest = [0], [stride] * 2, [pad] * 2, [1] * 2, False, [0] * 2, 1

    def backward(*mask):
        return torch.ops.aten.convolution_backward(g, x, w, *rest, [*mask, False])

    flops = 2 * out.numel() * w[0].numel()
    jobs = {
        "forward": lambda: torch.conv2d(x, w, None, stride, pad),
        "input gradient": lambda: backward(True, False),
        "weight gradient": lambda: backward(False, True),
    }
    return jobs, dict(flops=flops, bytes=4 * (x.numel() + w.numel() + out.numel()))


def block_roofline(rounds, tiny):
    "Where the FLOPs of a step go, in processor time of one thread, which neighbours hardly move."
    batch, threads = (16, torch.get_num_threads()) if tiny else (256, torch.get_num_threads())
    torch.set_num_threads(1)
    cfg, images = TrainCfg(batch=batch, eps=EPS), images_of(batch)
    model = build("resnet20").to(memory_format=torch.channels_last).train()
    run, idx = new_run(model, images, cfg), torch.arange(batch)
    tops, work = ceilings(256, 4) if tiny else ceilings()
    layers = []
    for (shape, weight, stride), times in shapes_of(model, images.floats()[:2]).items():
        jobs, cost = convolution_jobs(shape, weight, stride, batch)
        name = f"{weight[1]} to {weight[0]}, {weight[-1]}x{weight[-1]}, {shape[-1]} wide"
        layers.append((dict(name=name, times=times, **cost), jobs))
    spent = {name: [] for name in PHASES}

    def phased():
        last = [time.process_time()]

        def done(name):
            now = time.process_time()
            spent[name].append(now - last[0])
            last[0] = now

        step_in_phases(run, idx, done)

    each = {f"{a['name']}: {p}": job for a, jobs in layers for p, job in jobs.items()}
    seconds = interleave({**each, **tops, "step": phased}, rounds, clock=time.process_time)
    torch.set_num_threads(threads)
    peak, copy = peaks(work, seconds)
    return dict(
        config=dict(batch=batch, eps=EPS, model="resnet20", size=32, clock="processor time"),
        seconds=seconds,
        phases={name: v[1:] for name, v in spent.items()},  # without the first, a warm-up
        layers=[a for a, _ in layers],
        floors=phase_floors(run, idx, peak, copy),
        flops_per_s=peak,
        bytes_per_s=copy,
    )


# ---- the candidates: data and partners


class Photos(Dataset):
    "Image by image through PIL, as torchvision's data sets give them."

    def __init__(self, images):
        self.x, self.y = images.x.permute(0, 2, 3, 1).numpy(), images.y.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i])), self.y[i]


def loader(images, workers, batch=256):
    return DataLoader(
        Photos(images), batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def consume(source):
    batch = None
    for batch in source:  # noqa: B007
        pass
    return batch


def resident(images, generator, batch=256):
    "An epoch of batches from the resident tensor, cropped and flipped."
    for idx in batches(len(images), batch, generator):
        yield as_floats(augment(images.x[idx], "crop_flip", generator)), images.y[idx]


def per_class_partner(y, pools):
    "For every sample a random member of its class's pool: a shuffle a class."
    partner = torch.empty_like(y)
    for c, pool in enumerate(pools):
        where = (y == c).nonzero()[:, 0]
        partner[where] = pool[torch.randperm(len(pool))[: len(where)]]
    return partner


def members(y, n_cls):
    "Where the members of each class are."
    return [(y == c).nonzero()[:, 0] for c in range(n_cls)]


def per_sample_partner(y):
    "A random other member of the same class, sample by sample."
    partner = torch.empty_like(y)
    for i in range(len(y)):
        others = (y == y[i]).nonzero()[:, 0]
        others = others[others != i]
        partner[i] = others[torch.randint(len(others), ())]
    return partner


def repeat(job, times):
    def many():
        for _ in range(times):
            job()

    return many


def block_data(rounds, tiny):
    "D1 and D2: images a second; P1: seconds a draw of partners."
    n, sizes, times = (512, (64,), 2) if tiny else (12_800, (256, 65_536), 50)
    images, g = images_of(n), torch.Generator().manual_seed(0)
    loaders = {w: loader(images, w) for w in (0, 2)}
    jobs = {"resident": lambda: consume(resident(images, g))}
    jobs |= {f"loader, {w} workers": lambda w=w: consume(loaders[w]) for w in loaders}
    table = ClassTable(torch.arange(100_000) % 10, 10)
    whole, draws = members(table.y, 10), {}
    for b in sizes:
        idx = torch.randint(100_000, (b,), generator=g)
        y = table.y[idx]
        draws |= {
            f"table, {b}": lambda idx=idx: table.partner(idx, g),
            f"per class, {b}": lambda y=y: per_class_partner(y, whole),
            f"in batch, {b}": lambda y=y: same_class_partner(y, 10, g),
            f"per class in batch, {b}": lambda y=y: per_class_partner(y, members(y, 10)),
        }
    jobs |= {name: repeat(draw, times) for name, draw in draws.items()}
    few = table.y[: sizes[0]]
    jobs[f"per sample, {sizes[0]}"] = lambda: per_sample_partner(few)
    seconds = interleave(jobs, rounds)
    for name in draws:
        seconds[name] = [s / times for s in seconds[name]]
    found = ratios("data", seconds)
    small = sizes[0]
    found |= dict(
        P1_in_batch=ratio(seconds, f"per class in batch, {small}", f"in batch, {small}"),
        P1_per_sample=ratio(seconds, f"per sample, {small}", f"table, {small}"),
    )
    return dict(
        config=dict(images=n, batch=256, partners=sizes, set=100_000), seconds=seconds, ratios=found
    )


# ---- scaling: time and memory against what a user turns

K_BATCH = (2, 3, 4, 6, 8)


def scaling_jobs(tiny):
    "Name of the axis -> (value -> job, bytes that are there before the job starts)."
    b, width, name = (40, 1, "small_cnn") if tiny else (64, 4, "resnet20")

    def point(n, method=METHODS["at"], **kw):
        images, cfg = images_of(n), TrainCfg(**{**dict(batch=b, eps=EPS), **kw})
        job = trainer(images, cfg, name=name, method=method)
        return job, images.x.nbytes + images.y.nbytes

    def from_set(k):
        return point(b, Pipeline(("attack", "mix"), partner="set", k=k))

    return b, dict(
        images={n: point(n) for n in [i * width * b for i in (1, 2, 3, 4)]},
        batch={n: point(n, batch=n) for n in [i * b for i in (1, 2, 3, 4)]},
        pgd_steps={s: point(b, attack="pgd", steps=s) for s in (1, 2, 4, 7, 10)},
        k_set={k: from_set(k) for k in (2, 3, 4)},
    )


def block_scaling(rounds, tiny):
    "Seconds and peak memory against set size, batch, PGD steps and images in a mixture."
    b, points = scaling_jobs(tiny)
    jobs = {f"{axis} {v}": job for axis, at in points.items() for v, (job, _) in at.items()}
    x, g = images_of(32 if tiny else 256).floats(), torch.Generator().manual_seed(0)
    y = torch.arange(len(x)) % 10
    for k in K_BATCH:
        mixing = Pipeline(("mix",), k=k)
        jobs[f"k_batch {k}"] = repeat(lambda c=mixing: mix_step(x, y, c, 10, g), 20)
    seconds = interleave(jobs, rounds)
    memory = {name: peak_bytes(job) for name, job in jobs.items()}
    for axis, at in points.items():
        for v, (_, there) in at.items():
            memory[f"{axis} {v}"] += there
    axes = {axis: list(at) for axis, at in points.items()} | dict(k_batch=list(K_BATCH))
    config = dict(model="resnet20", eps=EPS, batch=b, axes=axes, k_batch_draws=20)
    return dict(config=config, seconds=seconds, peak_bytes=memory)


# ---- what did not pay, and what does in an audit


def many_models(x, y, m=4):
    "Gradients of `m` small networks for one batch: in turn, as grouped convolutions, by vmap."
    nets = [build("small_cnn", 10, 3, seed=i) for i in range(m)]
    params, _ = torch.func.stack_module_state(nets)
    buffers = dict(nets[0].named_buffers())
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    where = sorted({k.rsplit(".", 1)[0] for k in leaves}, key=int)

    def one(p):
        return F.cross_entropy(torch.func.functional_call(nets[0], (p, buffers), (x,)), y)

    def grouped():
        z = nets[0][0](x).repeat(1, m, 1, 1)
        for i, stride in zip(where[:-1], (1, 2, 2)):
            w, b = leaves[f"{i}.weight"].flatten(0, 1), leaves[f"{i}.bias"].flatten()
            z = F.relu(F.conv2d(z, w, b, stride, 1, groups=m))
        z = F.avg_pool2d(z, z.shape[-1] // 2).unflatten(1, (m, -1)).flatten(2).transpose(0, 1)
        z = torch.baddbmm(
            leaves[f"{where[-1]}.bias"][:, None], z, leaves[f"{where[-1]}.weight"].transpose(1, 2)
        )
        loss = sum(F.cross_entropy(logits, y) for logits in z)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    def in_turn():
        found = [
            torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())) for net in nets
        ]
        return dict(zip(leaves, (torch.stack(g) for g in zip(*found))))

    return {
        "in turn": in_turn,
        "grouped": grouped,
        "vmap": lambda: torch.vmap(torch.func.grad(one))(params),
    }


def strong_attack(net, x, y, eps, steps, restarts, drop):
    "Which images PGD with restarts breaks; `drop`: a broken one is not attacked again."
    g, left = torch.Generator().manual_seed(0), torch.arange(len(y))
    if not drop:
        z = pgd(net, x, y, eps, steps, restarts=restarts, generator=g)
        return net(z).argmax(1) != y
    broken = torch.zeros(len(y), dtype=torch.bool)
    for _ in range(restarts):
        z = pgd(net, x[left], y[left], eps, steps, generator=g)
        broken[left] = net(z).argmax(1) != y[left]
        left = left[~broken[left]]
    return broken


def block_tried(rounds, tiny):
    "bf16, several models at once; an audit that stops attacking what is broken."
    images = images_of(16 if tiny else 128)
    cfg = TrainCfg(batch=len(images), eps=EPS)
    jobs = {p: trainer(images, cfg, precision=p) for p in ("fp32", "bf16")}
    x, y = images.floats()[:64], images.y[:64]
    jobs |= {f"4 models {name}": job for name, job in many_models(x, y).items()}
    digits = load("digits")
    eps, steps, restarts = 0.2, *((3, 2) if tiny else (50, 10))
    run = fit(
        build("small_cnn", 10, 1),
        digits,
        TrainCfg(eps=0.1, epochs=1 if tiny else 10, batch=64, lr=3e-3),
        device="cpu",
        progress=False,
    )
    test = digits.test.subset(slice(32 if tiny else 200))
    x, y, net = test.floats(), test.y, fold_batchnorm(run.model)
    broken = {}
    for name, drop in [("PGD, all again", False), ("PGD, broken dropped", True)]:

        def job(name=name, drop=drop):
            broken[name] = strong_attack(net, x, y, eps, steps, restarts, drop)

        jobs[name] = job
    seconds = interleave(jobs, rounds)
    pairs = dict(
        bf16=("fp32", "bf16"),
        grouped=("4 models in turn", "4 models grouped"),
        vmap=("4 models in turn", "4 models vmap"),
        dropping=("PGD, all again", "PGD, broken dropped"),
    )
    return dict(
        config=dict(
            batch=len(images),
            model="resnet20",
            models="small_cnn, batch 64",
            audit=dict(data="digits", images=len(y), eps=eps, steps=steps, restarts=restarts),
        ),
        seconds=seconds,
        ratios={k: ratio(seconds, *v) for k, v in pairs.items()},
        broken={k: int(v.sum()) for k, v in broken.items()},
    )


# ---- evaluation attacks of other packages


def peer_jobs(model, x, y, steps):
    "FGSM and PGD of whichever of torchattacks, foolbox and ART is installed, as jobs."
    jobs, versions = {}, {}
    try:
        import torchattacks

        ta_fgsm = torchattacks.FGSM(model, eps=EPS)
        ta_pgd = torchattacks.PGD(model, eps=EPS, alpha=2.5 * EPS / steps, steps=steps)
        jobs["fgsm torchattacks"] = lambda: ta_fgsm(x, y)
        jobs["pgd-10 torchattacks"] = lambda: ta_pgd(x, y)
        versions["torchattacks"] = version("torchattacks")
    except ImportError:
        pass
    try:
        import foolbox

        fool = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        jobs["fgsm foolbox"] = lambda: foolbox.attacks.FGSM()(fool, x, y, epsilons=EPS)
        jobs["fgsm foolbox, points only"] = lambda: foolbox.attacks.FGSM().run(
            fool, x, foolbox.Misclassification(y), epsilon=EPS
        )
        versions["foolbox"] = foolbox.__version__
    except ImportError:
        pass
    try:
        import art
        from art.attacks.evasion import FastGradientMethod
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
        )
        attack = FastGradientMethod(classifier, eps=EPS, batch_size=len(x))
        xs, ys = x.numpy(), y.numpy()
        jobs["fgsm ART"] = lambda: attack.generate(xs, ys)
        versions["adversarial-robustness-toolbox"] = art.__version__
    except ImportError:
        pass
    return jobs, versions


def block_peers(rounds, tiny):
    "E1, E2: an evaluation attack of ours and of others on the same ResNet-20, the same images."
    batch, steps = (8, 2) if tiny else (256, 10)
    images, plain = images_of(batch), build("resnet20").eval()
    with torch.no_grad():  # running statistics of a network that has seen images
        plain.train()(images.floats())
    plain.eval().requires_grad_(True)
    x, y = images.floats(), images.y
    net = fold_batchnorm(plain).to(memory_format=torch.channels_last)
    last, g = x.contiguous(memory_format=torch.channels_last), torch.Generator().manual_seed(0)

    def judged():
        z = fgsm(net, last, y, EPS)
        with torch.no_grad():
            return z, net(z).argmax(1) != y

    jobs = {
        "fgsm folded": lambda: fgsm(net, last, y, EPS),
        "fgsm folded, judged": judged,
        "fgsm unfolded": lambda: fgsm(plain, x, y, EPS),
        "pgd-10 folded": lambda: pgd(net, last, y, EPS, steps, keep="last", generator=g),
        "pgd-10 folded, best": lambda: pgd(net, last, y, EPS, steps, generator=g),
    }
    others, versions = peer_jobs(plain, x, y, steps)
    seconds = interleave(jobs | others, rounds)
    found, same = ratios("peers", seconds), {}
    for name, slow in [("E1_foolbox_judged", "fgsm foolbox"), ("E1_art_judged", "fgsm ART")]:
        if slow in others:
            found[name] = ratio(seconds, slow, "fgsm folded, judged")
    if "fgsm foolbox" in others:
        found["E1_foolbox_points"] = ratio(seconds, "fgsm foolbox, points only", "fgsm folded")
    ours = jobs["fgsm unfolded"]()
    results = {
        name: others[f"fgsm {name}"]()
        for name in ("torchattacks", "foolbox", "ART")
        if f"fgsm {name}" in others
    }
    for name, z in results.items():
        z = torch.as_tensor(z[1] if isinstance(z, (tuple, list)) else z)
        same[name] = dict(bits=torch.equal(z, ours), differ=int((z - ours).abs().gt(1e-6).sum()))
    return dict(
        config=dict(batch=batch, eps=EPS, model="resnet20", pgd_steps=steps),
        versions=versions,
        seconds=seconds,
        ratios=found,
        same_as_unfolded=same,
    )


# ---- an audit


def judged(n, source):
    "A robust network that the project keeps, and test images of CIFAR-10, or noise as it sees it."
    net = load_model(ROOT / "nbs" / "networks" / "resnet20-s0.pt")[0].eval()
    images = spread_subset(load(source, 0, progress=False).test, n) if source else images_of(n)
    x = images.floats()
    return net, x, images.y if source else net(x).argmax(1)


def block_audit(rounds, tiny, source=None):
    "E3: Auto-PGD of ours and of pyautoattack on the same images; E4: an audit of 1,000 images."
    n, eps, threads = 10 if tiny else 50, EPS, torch.get_num_threads()
    torch.set_num_threads(1)
    net, x, y = judged(n, None if tiny else source)
    ours = fold_batchnorm(net).to(memory_format=torch.channels_last)
    last, left = x.contiguous(memory_format=torch.channels_last), {}

    seen = []  # images a gradient was asked for, call by call

    def counted(z):
        seen.append(len(z) if z.requires_grad else 0)
        return ours(z)

    def two():
        "APGD-CE, then APGD-T on what stands."
        seen.clear()
        todo, g = torch.arange(n), torch.Generator().manual_seed(0)
        for name in ("apgd-ce", "apgd-t"):
            z = attack_by_name(name)(counted, last[todo], y[todo], Threat(eps), generator=g)
            with torch.no_grad():
                todo = todo[ours(z).argmax(1) == y[todo]]
            if not len(todo):
                break
        left["ours"] = sorted(todo.tolist())

    def theirs():
        from pyautoattack import AutoAttack

        judge = AutoAttack(
            net, norm="Linf", eps=eps, seed=0, device="cpu"
        )  # one restart, 9 targets
        judge.attacks_to_run = ["apgd-ce", "apgd-t"]
        z = judge.run_standard_evaluation(x, y, batch_size=n)[0]
        with torch.no_grad():
            left["pyautoattack"] = (net(z).argmax(1) == y).nonzero()[:, 0].tolist()

    def alone():
        "As many gradients of as many images as `two` asked for."
        for k in seen:
            if k:
                z = last[:k].clone().requires_grad_()
                torch.autograd.grad(ours(z).logsumexp(1).sum(), z)

    two()
    jobs = {"ours": two, "gradients alone": alone}
    if importlib.util.find_spec("pyautoattack"):
        jobs["pyautoattack"] = theirs
    seconds = interleave(jobs, rounds, warmup=0, clock=time.process_time)
    start = time.process_time()
    attacks = ("clean", "fgsm", "pgd-2x2") if tiny else None  # None: all of an audit
    outcome = audit(net, (x, y), eps, attacks, device="cpu", diagnose=0, progress=False)
    spent = time.process_time() - start
    torch.set_num_threads(threads)
    gradients = sum(a["gradients"] for a in outcome.record["attacks"].values())
    return dict(
        config=dict(images=n, eps=eps, model="resnet20", clock="processor time, one thread"),
        seconds=seconds,
        ratios=ratios("audit", seconds),
        left=left,
        audit=dict(attacks=outcome.attacks, seconds=spent, gradients=gradients),
        seconds_1000=1000 * spent / n,
    )


# ---- mending, and what grows with what


def gradients_alone(net, x, y, steps):
    "As many gradients as the margins ask for, and nothing else."
    for k in range(10):
        rows = (y != k).nonzero()[:, 0]
        for _ in range(steps):
            z = x[rows].detach().requires_grad_()
            logits = net(z)
            torch.autograd.grad((logits[:, k] - logits.gather(1, y[rows, None])[:, 0]).sum(), z)


def block_mend(rounds, tiny):
    "M1: margins of a ResNet-20 against the gradients they are made of; seconds for 1,000 images."
    n, steps, threads = *((4, 2) if tiny else (24, 20)), torch.get_num_threads()
    torch.set_num_threads(1)
    net, images = build("resnet20"), images_of(n)
    x, y = images.floats(), images.y
    with torch.no_grad():
        net.train()(x)
    folded = as_attacked(net.eval(), x)
    last = x.contiguous(memory_format=torch.channels_last)
    jobs = {
        "margins": lambda: margins(net, x, y, EPS, steps=steps, device="cpu"),
        "gradients alone": lambda: gradients_alone(folded, last, y, steps),
    }
    seconds = interleave(jobs, rounds, clock=time.process_time)
    torch.set_num_threads(threads)
    each = statistics.median(seconds["margins"]) / n
    return dict(
        config=dict(images=n, steps=steps, model="resnet20", clock="processor time, one thread"),
        seconds=seconds,
        ratios=dict(M1=ratio(seconds, "margins", "gradients alone")),
        seconds_1000=1000 * each,
    )


def random_margins(n, n_cls):
    "A matrix of margins of classes that are not alike, and labels."
    rng, y = np.random.default_rng(0), np.arange(n) % n_cls
    lift = 1.5 + 0.3 * np.log(n_cls) + 0.3 * rng.normal(size=(n_cls, n_cls))
    m = lift[y] + rng.normal(size=(n, n_cls))
    m[np.arange(n), y] = np.inf
    return m, y


def an_outcome(n, n_cls):
    "What two attacks did to images of so many classes."
    y = torch.arange(n) % n_cls
    images = ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), y, tuple(map(str, range(n_cls))))
    flags = {a: torch.arange(n) % 7 < k for a, k in (("clean", 1), ("pgd-20", 3))}
    return outcome_of(flags, images, EPS)


def growth_jobs(tiny, steps=5):
    "Name of the axis -> value -> job; memory does not depend on the steps of the margins."
    few = 20 if tiny else 1
    draw = np.random.default_rng(0)

    def solve(n, n_cls):
        return lambda m=random_margins(n, n_cls): Front(*m).fair

    def find(n, n_cls=10, side=16):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 64), nn.ReLU())
        net.append(nn.Linear(64, n_cls))
        images = images_of(n, side, n_cls)
        x, y = images.floats(), images.y
        return lambda: margins(net, x, y, EPS, steps=steps, device="cpu", batch=n)

    def count(n, n_cls):
        y, wrong = np.arange(n) % n_cls, draw.random((4, n)) < 0.3
        return lambda: class_counts(wrong, y, n_cls)

    def redraw(n, n_cls):
        y, (a, b) = np.arange(n) % n_cls, draw.random((2, n)) < 0.3
        rng = np.random.default_rng(0)
        return lambda: paired_bootstrap(a, b, y, n_cls, n_boot=200, rng=rng)

    def tell(n, n_cls):
        return lambda outcome=an_outcome(n, n_cls): str(outcome)

    tens = [v // few for v in (10_000, 20_000, 40_000, 80_000)]
    axes = {
        "solver, images": {n: solve(n, 10) for n in [v // few for v in (1000, 2000, 4000, 8000)]},
        "solver, classes": {c: solve(2000 // few, c) for c in (10, 20, 40)[: 2 if tiny else 3]},
        "margins, images": {n: find(n) for n in [v // few for v in (80, 160, 320, 640)]},
        "margins, classes": {c: find(640 // few, c) for c in ((5, 10) if tiny else (10, 40, 160))},
        "margins, side": {s: find(160 // few, side=s) for s in ((4, 8) if tiny else (16, 32, 64))},
        "counting, images": {n: count(n, 10) for n in tens},
        "counting, classes": {c: count(tens[1], c) for c in (10, 100, 1000)},
        "bootstrap, images": {n: redraw(n, 10) for n in tens},
        "bootstrap, classes": {c: redraw(tens[1], c) for c in (10, 100, 1000)},
        "report, images": {n: tell(n, 10) for n in tens},
        "report, classes": {c: tell(tens[1], c) for c in (10, 100, 1000)},
    }
    return axes


def peak_of(job):
    "The most that `job` holds at once: arrays by NumPy's own count, or tensors."
    tracemalloc.start()
    job()
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return max(arrays, peak_bytes(job))


def block_growth(rounds, tiny):
    "Processor time and memory against images, classes and side; the power that each grows with."
    threads, axes = torch.get_num_threads(), growth_jobs(tiny)
    torch.set_num_threads(1)
    jobs = {f"{axis} {v}": job for axis, at in axes.items() for v, job in at.items()}
    seconds = interleave(jobs, min(rounds, 3), clock=time.process_time)
    short = growth_jobs(tiny, steps=1)
    memory = {f"{axis} {v}": peak_of(job) for axis, at in short.items() for v, job in at.items()}
    torch.set_num_threads(threads)
    powers = {}
    for axis, at in axes.items():
        v = np.log(list(at))
        took = [statistics.median(seconds[f"{axis} {k}"]) for k in at]
        held = [memory[f"{axis} {k}"] for k in at]
        powers[axis] = [
            float(np.polyfit(v, np.log(np.maximum(w, 1e-9)), 1)[0]) for w in (took, held)
        ]
    axes = {axis: list(at) for axis, at in axes.items()}
    config = dict(axes=axes, clock="processor time, one thread")
    return dict(config=config, seconds=seconds, peak_bytes=memory, powers=powers)


# ---- a GPU


def random_data(n):
    "Random images as `load` would give them: about `n` to learn, some to watch and to test."
    return make_data(images_of(n + n // 10), "random", 0, test=images_of(200))


def fit_epochs(data, epochs, device, **options):
    "Wall clock at the end of every epoch of `fit`, the paper's recipe."
    ends, cfg = [], TrainCfg(batch=min(256, len(data.train) // 2), eps=EPS, epochs=epochs)
    fit(
        build("resnet20"),
        data,
        cfg,
        device=device,
        watched=1,
        progress=False,
        on_epoch=lambda row: ends.append(time.time()),
        **options,
    )
    return ends


def inner_epochs(ends):
    "Seconds of the epochs between the first (compiles) and the last (watches)."
    return np.diff(ends)[:-1].tolist()


def loader_epoch(images, device, workers, steps):
    "Seconds of an epoch of the naive step fed by a DataLoader, from `steps` batches of it."
    source = iter(loader(images, workers, min(256, len(images) // 2)))
    x, y = next(source)
    model = build("resnet20").to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    naive_step(model, optimizer, x.to(device), y.to(device), EPS)
    start, n = time.perf_counter(), 0
    for (x, y), _ in zip(source, range(steps)):
        naive_step(model, optimizer, x.to(device), y.to(device), EPS)
        n += len(y)
    return (time.perf_counter() - start) * len(images) / n


def shared(runs, epochs, n, device, options):
    "Epochs a second of `runs` processes that share the device, while all of them are training."
    call = [
        sys.executable,
        __file__,
        "--device",
        device,
        "--worker",
        json.dumps(dict(n=n, epochs=epochs, options=options)),
    ]
    workers = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(runs)]
    ends = [json.loads(w.communicate()[0].splitlines()[-1]) for w in workers]
    start, stop = max(e[0] for e in ends), min(e[-2] for e in ends)
    done = sum(sum(start < t <= stop for t in e) for e in ends)
    return done / (stop - start) if stop > start and done else None


def block_epoch(rounds, tiny, device):
    "Seconds an epoch: `fit` against the DataLoader loop; floors; several runs on one device."
    size, epochs, steps = (100, 4, 2) if tiny else (50_000, 6, 40)
    data = random_data(size)
    n = len(data.train)
    batch = min(256, n // 2)
    ways = {"fit, eager": {}, "fit, compiled": dict(compile=True)}
    if device == "cuda":
        ways |= {f"fit, compiled, {p}": dict(compile=True, precision=p) for p in ("tf32", "bf16")}
    if tiny:
        del ways["fit, compiled"]
    seconds = {name: [] for name in (*ways, "loader")}
    for _ in range(rounds):
        for name, options in ways.items():
            seconds[name].append(
                statistics.median(inner_epochs(fit_epochs(data, epochs, device, **options)))
            )
        seconds["loader"].append(
            loader_epoch(data.train, device, 2 if tiny else min(8, os.cpu_count()), steps)
        )
    images = images_of(batch).to(device)
    tops, work = ceilings(256, 4, device) if tiny else ceilings(8192, 4096, device)
    seen = interleave(tops, 7, device=device)
    peak, copy = peaks(work, seen)
    step = trainer(images, TrainCfg(batch=batch, eps=EPS), device)
    low = floors(step, peak, copy)
    mid = {name: statistics.median(s) for name, s in seconds.items()}
    best = min(ways, key=mid.get)
    card = {
        k: shared(k, epochs + 2, size, device, ways[best])
        for k in ((1, 2) if tiny else (1, 2, 4, 8))
    }
    found = {name: ratio(seconds, "loader", name) for name in ways}
    return dict(
        config=dict(images=n, batch=batch, eps=EPS, model="resnet20", epochs=epochs, best=best),
        seconds=seconds,
        ratios=found,
        floors=low,
        flops_per_s=peak,
        bytes_per_s=copy,
        floor_epoch={k: low[k] * n / batch for k in ("arithmetic", "memory", "fused")},
        images_per_s={k: n / s for k, s in mid.items()},
        run_of_80={k: 80 * s for k, s in mid.items()},
        epochs_per_s_shared=card,
        runs_per_minute={k: v and 60 * v / 80 for k, v in card.items()},
        peak_bytes={"eager step": peak_bytes(step, device)},
    )


# ---- beside other programs

SPINS = (300_000, 10_000)  # what libgomp does by itself, and what `import fairmix_nb` asks for


@contextlib.contextmanager
def neighbours(n):
    "So many other programs that never rest."
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in busy:
            program.kill()
            program.wait()


def step_seconds(batch, seconds):
    "Median seconds of a training step, of all steps in about so many seconds."
    step, each = trainer(images_of(batch), TrainCfg(batch=batch, eps=EPS)), []
    step()
    while len(each) < 2 or sum(each) < seconds:
        start = time.perf_counter()
        step()
        each.append(time.perf_counter() - start)
    return statistics.median(each)


COMMANDS = {  # what people wait for, on one processor each
    "a notebook": "nbdev_test --path nbs/03_theory.ipynb --n_workers 1",
    "tests": "pytest -n 0 -p no:cacheprovider tests/test_mixup.py",
    "fairmix": "fairmix compare --methods at --seeds 0 --epochs {} --procs 1 --out {}",
}


def command_seconds(rounds, tiny):
    "Wall clock of the commands alone and beside four busy programs; times their fair share."
    cores, epochs, found = os.cpu_count(), 1 if tiny else 8, {}
    for name, words in list(COMMANDS.items())[2 if tiny else 0 :]:
        found[name] = {0: [], 4: []}
        for _ in range(rounds):
            for busy, seconds in found[name].items():
                with tempfile.TemporaryDirectory() as out, neighbours(busy):
                    start = time.perf_counter()
                    argv = words.format(epochs, Path(out) / "run").split()
                    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    subprocess.run(argv, cwd=ROOT, check=True, **quiet)
                    seconds.append(time.perf_counter() - start)
    fair = max(1, 5 / cores)  # five programs on so many processors
    shares = {
        name: statistics.median(b / a for a, b in zip(at[0], at[4])) / fair
        for name, at in found.items()
    }
    return dict(seconds=found, fair=fair, times_fair_share=shares)


def block_crowd(rounds, tiny):
    "A step alone and beside busy programs, by how long a waiting thread spins before it sleeps."
    batch, limit, cores = (4, 0.2, 1) if tiny else (32, 3, os.cpu_count())
    call = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--worker"]
    call.append(json.dumps(dict(job="step_seconds", batch=batch, seconds=limit)))
    found = {f"beside {k}, {n}": [] for k in (0, cores, 2 * cores) for n in SPINS}
    for r in range(rounds):
        for k in (0, cores, 2 * cores):
            with neighbours(k):
                for n in SPINS[:: 1 if r % 2 else -1]:
                    env = dict(os.environ, GOMP_SPINCOUNT=str(n))
                    said = subprocess.run(
                        call, env=env, stdout=subprocess.PIPE, text=True, check=True
                    )
                    found[f"beside {k}, {n}"].append(json.loads(said.stdout.splitlines()[-1]))
    pairs = {f"beside {k}": [f"beside {k}, {n}" for n in SPINS] for k in (0, cores, 2 * cores)}
    return dict(
        config=dict(batch=batch, model="resnet20", eps=EPS, spins=SPINS),
        seconds=found,
        ratios={name: ratio(found, *pair) for name, pair in pairs.items()},
        commands=command_seconds(1 if tiny else 2, tiny),
    )


# ---- what a tester waits for


def waits(log):
    "From the output of .ci/run: seconds of each command, the slowest cells and tests."
    starts = re.findall(r"^\++ (\d+) s: (.+)$", log, re.M)
    cells = re.findall(r"^ *([\d.]+) s  (\w+ \[\d+\])  (.*)$", log, re.M)
    tests = re.findall(r"^([\d.]+)s (?:call|setup|teardown) +(\S.*)$", log, re.M)
    if not (starts and cells and tests):
        raise SystemExit("the log must be what .ci/run printed: starts, slowest cells and tests")
    return dict(
        seconds={what: int(end) - int(start) for (start, what), (end, _) in pairwise(starts)},
        cells=[[float(s), *rest] for s, *rest in cells],
        tests=[[float(s), *rest] for s, *rest in tests],
    )


# ---- the record

BLOCKS = dict(
    step=block_step, data=block_data, scaling=block_scaling, tried=block_tried, crowd=block_crowd
)
BLOCKS.update(roofline=block_roofline, audit=block_audit, mend=block_mend, growth=block_growth)


def write(path, blocks, device, rounds, what):
    "Put the blocks just measured into the record at `path`; those of other calls stay."
    record = dict(schema=1, kind="speed", what=what, blocks={})
    if path.exists():
        record = json.loads(path.read_text())
    for name, found in blocks.items():
        record["blocks"][name] = dict(found, rounds=rounds, provenance=provenance(device))
    record["provenance"] = provenance(device)
    tidy = json.loads(json.dumps(record), parse_float=lambda s: float(f"{float(s):.5g}"))
    write_aside(path, json.dumps(tidy, indent=1))


def report(blocks):
    "The ratios as lines of text, with the mark each has to hold."
    lines = []
    for block, found in blocks.items():
        for name, r in found.get("ratios", {}).items():
            held = (
                ""
                if not r["hold"]
                else f"hold {r['hold']:<5}" + ("ok" if r["median"] >= r["hold"] else "MISSED")
            )
            lines.append(
                f"{name:18} {r['slow']:22} / {r['fast']:20} {r['median']:7.2f} "
                f"({r['min']:.2f} to {r['max']:.2f})  {held}"
            )
        lines.append(f"  [{block}: {found['block_seconds']:.0f} s]")
    return "\n".join(lines)


def worker(text, device):
    "A job in a process of its own: a step's seconds, or the wall clock at the end of each epoch."
    task = json.loads(text)
    if task.pop("job", None) == "step_seconds":
        return json.dumps(step_seconds(**task))
    return json.dumps(fit_epochs(random_data(task["n"]), task["epochs"], device, **task["options"]))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--peers", action="store_true", help="other packages' evaluation attacks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", default="cifar10", help="of 'audit': 'cifar10' or a folder")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own")
    parser.add_argument("--out", type=Path, help="default: nbs/results/speed_{cpu,peers,cuda}.json")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, two rounds")
    parser.add_argument("--epoch", action="store_true", help="the epoch block, on the CPU too")
    parser.add_argument(
        "--log", type=Path, help="what .ci/run printed: into the record, run nothing"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        return print(worker(args.worker, args.device))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA GPU")
    rounds, name = 2 if args.rehearse else args.rounds, args.device
    todo = {k: BLOCKS[k] for k in args.only}
    if "audit" in todo:
        todo["audit"] = partial(block_audit, source=args.data)
    if args.device == "cuda" or args.epoch:
        todo = dict(epoch=lambda r, tiny: block_epoch(r, tiny, args.device))
    if args.peers:
        todo, name = dict(peers=block_peers), "peers"
    if args.log:
        todo = dict(waits=lambda r, tiny: waits(args.log.read_text()))
    if args.rehearse and not args.out:
        parser.error("--rehearse needs --out: a rehearsal is no record")
    out, found = args.out or ROOT / f"nbs/results/speed_{name}.json", {}
    for key, block in todo.items():
        start = time.perf_counter()
        found[key] = block(rounds, args.rehearse)
        found[key]["block_seconds"] = time.perf_counter() - start
        write(out, {key: found[key]}, args.device, rounds, f"python tools/bench.py -> speed_{name}")
    print(report(found))


if __name__ == "__main__":
    main()
