#!/usr/bin/env python3
"""Train and audit the CIFAR-10 runs behind nbs/14_cifar10.ipynb: those whose records are missing.

    python tools/cifar_runs.py --list                           # the grid and its price
    python tools/cifar_runs.py --form cpu                       # the short form, block by block
    python tools/cifar_runs.py --form gpu --device cuda --block 1
    python tools/cifar_runs.py --rehearse                       # every code path, tiny, kept nowhere

A run leaves its checkpoint in runs/cifar10/NAME (not tracked; an interrupted run goes on from its
last epoch) and, when it ends, one small record in nbs/results/cifar10/NAME.json: configuration,
seed, versions, hardware, seconds, a row per epoch. `--data` names a folder with train/ and test/
of class folders, or 'cifar10' for torchvision's download.
"""
import argparse
import json
import time
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import torch
import torch.nn.functional as F

from fairmix_nb.data import load
from fairmix_nb.data import write_aside
from fairmix_nb.models import CIFAR_STD
from fairmix_nb.models import build
from fairmix_nb.models import fold_batchnorm
from fairmix_nb.train import TrainCfg
from fairmix_nb.train import as_eps
from fairmix_nb.train import attack_errors
from fairmix_nb.train import fit
from fairmix_nb.train import load_checkpoint
from fairmix_nb.train import pick_device
from fairmix_nb.train import resume
from fairmix_nb.train import spread_subset

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
WATCHED = 250  # validation images of the curves, classes alike

# The grid as data: what a method, a radius and an attack in training mean, then blocks of runs.
METHODS = dict(
    natural=dict(pipeline=()),
    mixup=dict(pipeline=("mix",)),
    at=dict(pipeline=("attack",)),
    attack_mix=dict(pipeline=("attack", "mix")),
    mix_attack=dict(pipeline=("mix", "attack")),
    any_mix=dict(pipeline=("attack", "mix"), partner="any"),
    self_mix=dict(pipeline=("attack", "mix"), partner="self"),
)
normalised = lambda eps: tuple(round(eps * s, 6) for s in CIFAR_STD)
RADII = {
    "n0.1": dict(eps=normalised(0.1), box=None),  # the paper's three, in normalised units
    "n0.2": dict(eps=normalised(0.2), box=None),
    "n0.3": dict(eps=normalised(0.3), box=None),
    "n0.3c": dict(eps=normalised(0.3), box=(0.0, 1.0)),  # clamped to valid pixels
    "p0.3": dict(eps=0.3, box=None),  # the same number read in pixel units
    "8": dict(eps=8 / 255, box=(0.0, 1.0)),  # what the field uses
}
ATTACKS = dict(
    fgsm=dict(attack="fgsm"),
    nfgsm=dict(attack="nfgsm"),
    pgd=dict(attack="pgd", steps=7),
    galign=dict(attack="fgsm", grad_align=0.2),
    noise=dict(attack="noise"),
)
FORMS = dict(cpu=5, gpu=80)  # epochs


@dataclass(frozen=True)
class Run:
    "One training: its name says everything but the recipe all share."

    form: str  # 'cpu' or 'gpu'
    block: int
    method: str  # of METHODS
    radius: str  # of RADII
    seed: int
    attack: str = "fgsm"  # of ATTACKS
    lam: str = "batch"  # one lambda per 'batch' or 'sample', or 'half': 1/2
    more: dict = field(default_factory=dict)  # what else differs

    @property
    def name(self):
        lam = "" if self.lam == "batch" else f"-{self.lam}"
        return f"{self.form}-{self.method}-{self.attack}-{self.radius}{lam}-s{self.seed}"

    @property
    def cfg(self):
        "What the trainer is told, as plain data."
        law = dict(law=0.5) if self.lam == "half" else {}
        return dict(
            METHODS[self.method],
            **RADII[self.radius],
            **ATTACKS[self.attack],
            **law,
            lam_per="sample" if self.lam == "sample" else "batch",
            epochs=FORMS[self.form],
            seed=self.seed,
        ) | self.more


def runs_of(form, block, methods, radii, seeds, **kw):
    "Seed by seed, so that pairs are complete early."
    return [Run(form, block, m, r, s, **kw) for r in radii for s in range(seeds) for m in methods]


PAIR, THREE = ("at", "attack_mix"), ("at", "attack_mix", "mix_attack")
CONTROLS = ("any_mix", "self_mix")
GRID = [
    *runs_of("cpu", 1, PAIR, ["n0.3"], 2),
    *runs_of("cpu", 2, PAIR, ["8"], 1),
    *runs_of("cpu", 3, ("mix_attack", "any_mix"), ["n0.3"], 1),
    *runs_of("gpu", 1, PAIR, ["n0.3"], 5),
    *runs_of("gpu", 2, PAIR, ["8"], 3, attack="nfgsm"),
    *runs_of("gpu", 2, PAIR, ["8"], 3, attack="pgd"),
    *runs_of("gpu", 3, ("mix_attack",), ["n0.3"], 5),
    *runs_of("gpu", 3, CONTROLS, ["8", "n0.3"], 3),
    *runs_of("gpu", 3, PAIR, ["8"], 3),
    *runs_of("gpu", 3, ("at",), ["8", "n0.3"], 3, attack="noise"),
    *runs_of("gpu", 3, ("at",), ["8", "n0.3"], 3, attack="galign"),
    *runs_of("gpu", 4, THREE, ["n0.1", "n0.2"], 5),
    *runs_of("gpu", 4, ("natural", "mixup"), ["n0.3"], 5),
    *runs_of("gpu", 4, ("mix_attack",), ["8"], 3, attack="nfgsm"),
    *runs_of("gpu", 4, ("mix_attack",), ["8"], 3, attack="pgd"),
    *runs_of("gpu", 4, THREE, ["n0.3"], 3, attack="nfgsm"),
    *runs_of("gpu", 4, THREE, ["n0.3"], 3, attack="pgd"),
    *runs_of("gpu", 5, THREE[1:], ["n0.3"], 1, lam="half"),
    *runs_of("gpu", 5, THREE[1:], ["n0.3"], 1, lam="sample"),
    *runs_of("gpu", 5, THREE, ["p0.3", "n0.3c"], 1),
    *runs_of("gpu", 5, ("mix_attack",), ["8"], 1),
]


# What is watched after every epoch, on the same validation images and with its own randomness.
def alignment(model, x, y, eps, box, generator):
    "Mean cosine of the input gradients at x and at x + uniform noise (Andriushchenko 2020)."
    noisy = x + (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1) * eps
    noisy = noisy if box is None else noisy.clamp(*box)

    def grad(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)[0].flatten(1)

    return F.cosine_similarity(grad(x), grad(noisy), eps=1e-30).mean().item()


def watch(model, images, cfg):
    "Risks under three attacks and the alignment of the gradients, BatchNorm in evaluation mode."
    common = dict(norm=cfg.norm, box=cfg.box)
    wrong = attack_errors(model, images, cfg.eps, ("clean", "fgsm", "pgd-20"), **common)
    x = images.floats()
    generator = torch.Generator(x.device).manual_seed(0)
    cosine = alignment(fold_batchnorm(model), x, images.y, as_eps(cfg.eps, x), cfg.box, generator)
    row = {name: round(w.float().mean().item(), 4) for name, w in wrong.items()}
    return row | dict(alignment=round(cosine, 4))


def keep_row(path, epoch, row):
    "Rows by epoch, in a file beside the checkpoint."
    rows = json.loads(path.read_text()) if path.exists() else {}
    write_aside(path, json.dumps(rows | {str(epoch): row}))


def train(run, data, folder, device):
    "Train, or go on from the last checkpoint; the model, and its record so far."
    cfg = TrainCfg(**run.cfg)
    model = build("resnet20", data.train.n_cls, data.train.x.shape[1], run.seed)
    val, rows = spread_subset(data.val.to(device), WATCHED), folder / "watched.json"
    kw = dict(device=device, watched=1, progress=False)

    def on_epoch(row):
        start = time.perf_counter()
        keep_row(rows, row["epoch"], watch(model, val, cfg))
        spent = time.perf_counter() - start
        print(f"{time.strftime('%H:%M:%S')} {run.name} epoch {row['epoch']}", end=" ")
        print(json.loads(rows.read_text())[str(row["epoch"])], f"({spent:.0f} s)", flush=True)

    if (folder / "last.pt").exists():
        found = load_checkpoint(folder)
        if not rows.exists() or str(found["epoch"]) not in json.loads(rows.read_text()):
            model.load_state_dict(found["model"])  # stopped between the checkpoint and its row
            on_epoch(dict(epoch=found["epoch"]))
        done = resume(folder, model, data, on_epoch=on_epoch, **kw)
    else:
        done = fit(model, data, cfg, out=folder, on_epoch=on_epoch, **kw)
    return done, dict(
        schema=SCHEMA, kind="cifar10 run", name=run.name, form=run.form, block=run.block,
        method=run.method, radius=run.radius, seed=run.seed, model="resnet20",
        **{k: done.record[k] for k in ("cfg", "data", "provenance", "device", "seconds",
                                       "gradient_evaluations")},
        watched_images=len(val), curves=columns(done.curves, json.loads(rows.read_text())),
    )  # fmt: skip


def columns(curves, rows):
    "The curves, a list per quantity."
    full = [dict(loss=round(c["loss"], 4), **rows[str(c["epoch"])]) for c in curves]
    return dict(epoch=[c["epoch"] for c in curves], **{k: [r[k] for r in full] for k in full[0]})


def do_run(run, data, args):
    "One run from nothing, or from where it stopped, to its record."
    folder = args.runs / run.name
    done, record = train(run, data, folder, args.device)
    write_aside(args.records / f"{run.name}.json", json.dumps(record, indent=1))


# The price: seconds per gradient evaluation, measured by the records of the device, or assumed.
ASSUMED = dict(cpu=3.3e-3, cuda=8e-6)


def records_in(folder):
    return [json.loads(p.read_text()) for p in sorted(Path(folder).glob("*.json"))]


def price(run, n, rate):
    "Seconds of training for `n` images: one gradient for the weights, and the attack's."
    cfg = run.cfg
    attack = {"fgsm": 1, "nfgsm": 1, "pgd": cfg.get("steps", 7), "noise": 0}[cfg["attack"]]
    per_image = 1 + ("attack" in cfg["pipeline"]) * (attack + 3 * ("grad_align" in cfg))
    return n * cfg["epochs"] * per_image * rate


def price_list(runs, args, n=49_000):
    found = {r["name"]: r for r in records_in(args.records)}
    device = "cuda" if args.device == "cuda" or args.form == "gpu" else "cpu"
    rates = [r["seconds"] / r["gradient_evaluations"] for r in found.values()
             if r["device"] == device]  # fmt: skip
    rate = sum(rates) / len(rates) if rates else ASSUMED[device]
    total = 0
    for run in runs:
        seconds = price(run, n, rate)
        total += 0 if run.name in found else seconds
        state = "done" if run.name in found else "to do"
        print(f"block {run.block}  {run.name:38} {state:6} {seconds:8.0f} s")
    how = f"measured by {len(rates)} records" if rates else "assumed"
    print(f"{len(runs)} runs, {total / 3600:.1f} h to do; {rate:.2g} s a gradient ({device}, {how})")


def arguments(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--form", choices=FORMS, default="cpu")
    p.add_argument("--block", type=int, help="only this block")
    p.add_argument("--only", help="only runs whose name contains this")
    p.add_argument("--data", default="cifar10", help="'cifar10' or a folder")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar10")
    p.add_argument("--records", type=Path, default=ROOT / "nbs" / "results" / "cifar10")
    p.add_argument("--list", action="store_true", help="the grid and its price; runs nothing")
    return p.parse_args(words)


def main(words=None):
    args = arguments(words)
    runs = [r for r in GRID if r.form == args.form and args.block in (None, r.block)]
    runs = [r for r in runs if not args.only or args.only in r.name]
    if args.list:
        return price_list(runs, args)
    args.device = pick_device(args.device)
    args.records.mkdir(parents=True, exist_ok=True)
    data = load(args.data, 0, progress=False)
    for run in runs:
        if not (args.records / f"{run.name}.json").exists():
            do_run(run, data, args)


if __name__ == "__main__":
    main()
