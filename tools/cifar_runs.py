#!/usr/bin/env python3
"""Train and audit the CIFAR-10 runs behind nbs/22_cifar10.ipynb: those whose records are missing.

    python tools/cifar_runs.py --list                           # the grid and its price
    python tools/cifar_runs.py --form cpu                       # the short form, block by block
    python tools/cifar_runs.py --form gpu --device cuda --block 1
    python tools/cifar_runs.py --rehearse                       # every code path, tiny, kept nowhere

A run leaves its checkpoint in runs/cifar10/NAME (not tracked; an interrupted run goes on from its
last epoch) and, when it has been trained and audited, one small record in
nbs/results/cifar10/NAME.json: configuration, seed, versions, hardware, seconds, a value per epoch,
per attack the errors of each class and which images they are. `--until` and `--as-it-is` audit
an unfinished run, which its record says; a later call goes on with it.
`--data` names a folder with train/ and test/ of class folders, or 'cifar10' (torchvision).
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fairmix_nb import attacks, compare
from fairmix_nb.data import load, rank_in_class, write_aside
from fairmix_nb.models import CIFAR_STD, build, fold_batchnorm
from fairmix_nb.risk import classwise_risk, pack_flags
from fairmix_nb.train import (
    ALL,
    TrainCfg,
    as_eps,
    attack_errors,
    checkpoints,
    fit,
    load_checkpoint,
    pick_device,
    provenance,
    resume,
    spread_subset,
)

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
WATCHED = 500  # validation images of the curves, classes alike

# The grid as data: what a method, a radius and an attack in training mean, then blocks of runs.
METHODS = dict(compare.METHODS, self_mix=dict(pipeline=("attack", "mix"), partner="self"))
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
CPU = ("clean", "fgsm", "pgd-50x2", "apgd-ce", "apgd-t")
FORMS = dict(
    cpu=dict(epochs=5, audited=500, attacks=CPU),
    full=dict(epochs=80, audited=1000, attacks=CPU),
    gpu=dict(epochs=80, audited=1000, attacks=(*CPU, "autoattack")),
)


@dataclass(frozen=True)
class Run:
    "One training: its name says everything but the recipe all share."

    form: str  # of FORMS
    block: int
    method: str  # of METHODS
    radius: str  # of RADII
    seed: int
    attack: str = "fgsm"  # of ATTACKS
    lam: str = "batch"  # one lambda per 'batch' or 'sample', or 'half': 1/2
    weights: str = ""  # of the classes in the loss: by 'counts', or by plain AT's 'risk'
    ratio: int = 1  # of the largest to the smallest class
    more: dict = field(default_factory=dict)  # what else differs in the configuration

    @property
    def name(self):
        parts = [self.form, self.method, self.attack, self.radius]
        parts += [] if self.lam == "batch" else [self.lam]
        parts += [] if not self.weights else [f"w{self.weights}"]
        parts += [] if self.ratio == 1 else [f"ratio{self.ratio}"]
        parts += [f"{k}{v}" for k, v in self.more.items() if k != "partner"]
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def cfg(self):
        "What the trainer is told, as plain data."
        law = dict(law=0.5) if self.lam == "half" else {}
        return (
            dict(
                METHODS[self.method],
                **RADII[self.radius],
                **ATTACKS[self.attack],
                **law,
                lam_per="sample" if self.lam == "sample" else "batch",
                epochs=FORMS[self.form]["epochs"],
                seed=self.seed,
            )
            | self.more
        )


def runs_of(form, block, methods, radii, seeds, **kw):
    "Seed by seed, so that pairs are complete early."
    return [Run(form, block, m, r, s, **kw) for r in radii for s in range(seeds) for m in methods]


PAIR, THREE = ("at", "attack_mix"), ("at", "attack_mix", "mix_attack")
CONTROLS = ("any_mix", "self_mix")
RARE = dict(ratio=10)
GRID = [
    *runs_of("cpu", 1, PAIR, ["n0.3"], 2),
    *runs_of("cpu", 2, PAIR, ["8"], 3),
    *runs_of("cpu", 3, ("any_mix",), ["n0.3"], 2),
    *runs_of("cpu", 3, ("mix_attack",), ["n0.3"], 2),
    *runs_of("full", 1, PAIR[::-1], ["n0.3"], 2),
    *runs_of("full", 2, ("any_mix",), ["n0.3"], 2),
    *runs_of("gpu", 1, PAIR, ["n0.3"], 5),
    *runs_of("gpu", 2, PAIR, ["8"], 3, attack="nfgsm"),
    *runs_of("gpu", 2, PAIR, ["8"], 3, attack="pgd"),
    *runs_of("gpu", 3, ("mix_attack",), ["n0.3"], 5),
    *runs_of("gpu", 3, CONTROLS, ["8", "n0.3"], 3),
    *runs_of("gpu", 3, PAIR, ["8"], 3),
    *runs_of("gpu", 3, ("at",), ["8", "n0.3"], 3, attack="noise"),
    *runs_of("gpu", 3, ("at",), ["8", "n0.3"], 3, attack="galign"),
    *runs_of("gpu", 3, ("at",), ["8", "n0.3"], 3, weights="risk"),
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
    *runs_of("gpu", 6, ("natural", "at"), ["8"], 3, attack="pgd", **RARE),
    *runs_of("gpu", 6, ("natural", "at"), ["8"], 3, attack="pgd", weights="counts", **RARE),
    *runs_of(
        "gpu", 6, ("natural", "at"), ["8"], 3, attack="pgd", more=dict(logit_adjust=1.0), **RARE
    ),
    *runs_of(
        "gpu", 6, ("mixup", "attack_mix"), ["8"], 3, attack="pgd", more=dict(partner="set"), **RARE
    ),
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
    y, n_cls = images.y.cpu().numpy(), images.n_cls
    by_class = {
        name: classwise_risk(wrong[name].cpu().numpy(), y, n_cls).round(4).tolist()
        for name in ("fgsm", "pgd-20")
    }
    return row | dict(alignment=round(cosine, 4), by_class=by_class)


def keep_row(path, epoch, row):
    "Rows by epoch, in a file beside the checkpoint."
    rows = json.loads(path.read_text()) if path.exists() else {}
    write_aside(path, json.dumps(rows | {str(epoch): row}))


def thinned(data, ratio, falling=True):
    "Training classes of geometrically falling (or rising) size, in the order of the labels."
    y, c = data.train.y.numpy(), np.arange(data.train.n_cls)
    want = np.rint(
        np.bincount(y).min() * ratio ** (-(c if falling else c[::-1]) / (len(c) - 1))
    ).astype(int)
    kept = rank_in_class(y, np.random.RandomState(0)) < want[y]
    train = data.train.subset(torch.from_numpy(np.flatnonzero(kept)))
    return replace(data, train=train, split=dict(data.split, per_class=want.tolist()))


def weights_of(run, data, args):
    "Class weights of mean 1: by the size of the classes, or by their risk after plain AT."
    if not run.weights:
        return None
    if run.weights == "counts":
        w = 1 / torch.tensor(data.train.counts())
    else:
        path = args.records / f"{replace(run, weights='').name}.json"
        if not path.exists():
            raise FileNotFoundError(f"{run.name} needs the record {path.name}: run it first")
        w = (
            1
            - torch.tensor(json.loads(path.read_text())["pairs"]["confusion"]["pgd-20"]).diag()
            / 100
        )
    return tuple((w / w.mean()).tolist())


class Stopped(Exception):
    "The epoch that `--until` names is done and its checkpoint written."


def train(run, data, folder, args):
    "Train, or go on from the last checkpoint: model, configuration and the trainer's record."
    cfg = TrainCfg(**run.cfg, class_weights=weights_of(run, data, args))
    model = build("resnet20", data.train.n_cls, data.train.x.shape[1], run.seed)
    val, rows = spread_subset(data.val.to(args.device), WATCHED), folder / "watched.json"
    kw = dict(device=args.device, watched=1, progress=False)

    def on_epoch(row):
        start = time.perf_counter()
        found = watch(model, val, cfg)
        keep_row(rows, row["epoch"], found)
        spent = time.perf_counter() - start
        now = time.strftime("%H:%M:%S")
        print(f"{now} {run.name} epoch {row['epoch']} {found} ({spent:.0f} s)", flush=True)
        if row["epoch"] == args.until:
            raise Stopped

    with contextlib.suppress(Stopped):
        if checkpoints(folder, ALL):
            found = load_checkpoint(folder)
            model.load_state_dict(found["model"])
            if not rows.exists() or str(found["epoch"]) not in json.loads(rows.read_text()):
                on_epoch(dict(epoch=found["epoch"]))  # stopped between the checkpoint and its row
            if found["epoch"] < (args.until or cfg.epochs) and not args.as_it_is:
                resume(folder, model, data, on_epoch=on_epoch, **kw)
        else:
            fit(model, data, cfg, out=folder, on_epoch=on_epoch, **kw)
    return model, cfg, json.loads((folder / "record.json").read_text())


def columns(curves, rows):
    "The curves, a list per quantity."
    full = [dict(loss=round(c["loss"], 4), **rows[str(c["epoch"])]) for c in curves]
    return dict(epoch=[c["epoch"] for c in curves], **{k: [r[k] for r in full] for k in full[0]})


# The audit: attacks from weak to strong on test images in order of class.
def attacked(net, x, y, eps, name, box, generator):
    "The final points of the attack `name`."
    return attacks.attack_by_name(name)(net, x, y, eps, box=box, generator=generator, check=False)


@torch.no_grad()
def wrong_after(net, images, idx, name, cfg, seed=0, batch=250):
    "Which of the images `idx` are wrong at the final points of an attack."
    generator, found = torch.Generator(images.x.device).manual_seed(seed), []
    for part in idx.split(batch):
        x, y = images.floats(part).contiguous(memory_format=torch.channels_last), images.y[part]
        z = attacked(net, x, y, as_eps(cfg.eps, x), name, cfg.box, generator)
        found.append(net(z).argmax(1) != y)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool, device=images.x.device)


def audit(model, images, cfg, names):
    "Per attack its errors; those after FGSM are run on the images that stand, and are cumulative."
    net = fold_batchnorm(model).to(memory_format=torch.channels_last)
    every, out = torch.arange(len(images), device=images.x.device), {}
    broken = torch.zeros(len(images), dtype=torch.bool, device=images.x.device)
    for name in names:
        start, raw = time.perf_counter(), name in ("clean", "fgsm")
        idx = every if raw else every[~broken]
        wrong = torch.zeros_like(broken)
        wrong[idx] = wrong_after(net, images, idx, name, cfg)
        broken |= wrong
        shown = wrong if raw else broken
        count = torch.bincount(images.y[shown], minlength=images.n_cls).tolist()
        out[name] = dict(
            n=images.counts(),
            wrong=count,
            flags=pack_flags(shown.cpu().numpy()),
            raw=raw,
            attacked=len(idx),
            seconds=round(time.perf_counter() - start, 1),
        )
        print(f"{time.strftime('%H:%M:%S')}   {name} {sum(count) / len(images):.3f}", flush=True)
    return out


STEPS = tuple(k / 4 for k in range(7))


@torch.no_grad()
def probes(model, images, cfg):
    "Signs of a broken evaluation: the risk along the step, and FGSM with other labels."
    net = fold_batchnorm(model).to(memory_format=torch.channels_last)
    x, y = images.floats(), images.y
    eps, generator = as_eps(cfg.eps, x), torch.Generator(x.device).manual_seed(0)
    risk = lambda z: round((net(z).argmax(1) != y).float().mean().item(), 4)
    push = attacks.fgsm(net, x, y, eps, box=None, check=False) - x
    logits = net(x)
    offset = torch.randint(1, images.n_cls, y.shape, generator=generator, device=x.device)
    labels = dict(
        true=y,
        predicted=logits.argmax(1),
        random=(y + offset) % images.n_cls,
        least=logits.argmin(1),
    )
    clip = lambda z: z if cfg.box is None else z.clamp(*cfg.box)
    away = {
        k: risk(attacks.fgsm(net, x, v, eps, box=cfg.box, check=False))
        for k, v in labels.items()
        if k in ("true", "predicted")
    }
    towards = {
        k: risk(attacks.fgsm(net, x, v, eps, box=cfg.box, targeted=True, check=False))
        for k, v in labels.items()
        if k in ("random", "least")
    }
    return dict(
        step=[risk(clip(x + k * push)) for k in STEPS],
        steps=list(STEPS),
        away=away,
        towards=towards,
    )


@torch.no_grad()
def pairs(model, images, cfg):
    "Spread of class a along the line to the centre of class b, and who is taken for whom."
    net = fold_batchnorm(model).to(memory_format=torch.channels_last)
    x, y, n = images.floats(), images.y, images.n_cls
    z = torch.cat([net[:-1](part) for part in x.split(250)]).double()
    centre = torch.stack([z[y == c].mean(0) for c in range(n)])
    line = centre[:, None] - centre[None]
    line = line / line.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    spread = torch.stack([(z[y == c] @ line[c].T).std(0) for c in range(n)])
    distance = (centre[:, None] - centre[None]).norm(dim=-1)
    generator, confusion = torch.Generator(x.device).manual_seed(0), {}
    for name in ("clean", "pgd-20"):
        said = [
            net(attacked(net, a, b, as_eps(cfg.eps, a), name, cfg.box, generator)).argmax(1)
            for a, b in zip(x.split(250), y.split(250))
        ]
        found = torch.bincount(y * n + torch.cat(said), minlength=n * n).view(n, n)
        confusion[name] = found.tolist()
    rounded = lambda t: [[round(v, 4) for v in row] for row in t.tolist()]
    return dict(
        part="validation", spread=rounded(spread), distance=rounded(distance), confusion=confusion
    )


def attacks_for(run):
    "The form's attacks; AutoAttack needs pyautoattack, and has no radius per channel in a box."
    names = FORMS[run.form]["attacks"]
    able = run.radius != "n0.3c" and importlib.util.find_spec("pyautoattack")
    return [n for n in names if able or n != "autoattack"]


def do_run(run, data, args):
    "One run from nothing, or from where it stopped, to its record."
    folder, data = args.runs / run.name, thinned(data, run.ratio) if run.ratio > 1 else data
    model, cfg, found = train(run, data, folder, args)
    start, form = time.perf_counter(), FORMS[run.form]
    rows = json.loads((folder / "watched.json").read_text())
    images = spread_subset(data.test, form["audited"]).to(args.device)
    kept = (
        "cfg",
        "data",
        "provenance",
        "device",
        "seconds",
        "gradient_evaluations",
        "epochs_done",
        "finished",
    )
    if found["provenance"]["commit"] == args.origin["commit"]:
        found["provenance"] = args.origin  # the tree as it was before the first record
    record = dict(
        schema=SCHEMA,
        kind="cifar10 run",
        name=run.name,
        form=run.form,
        block=run.block,
        method=run.method,
        radius=run.radius,
        seed=run.seed,
        model="resnet20",
        **{k: found[k] for k in kept},
        watched=WATCHED,
        curves=columns(found["curves"], rows),
        test=images.digest(),
        attacks=audit(model, images, cfg, attacks_for(run)),
        probes=probes(model, images, cfg),
        pairs=pairs(model, data.val.to(args.device), cfg),
        audit=dict(provenance=args.origin, seconds=round(time.perf_counter() - start, 1)),
    )
    write_aside(args.records / f"{run.name}.json", json.dumps(record))


def missing(run, args):
    "No record, or one of an unfinished run that is to go on."
    path = args.records / f"{run.name}.json"
    if not path.exists():
        return True
    r = json.loads(path.read_text())
    return not r["finished"] and r["epochs_done"] < (args.until or r["cfg"]["epochs"])


# The price: seconds per gradient evaluation, measured by the records of the device, or assumed.
ASSUMED = dict(cpu=3.3e-3, cuda=8e-6)


def gradients(run):
    "Gradient evaluations an image and epoch: one for the weights, and the attack's."
    cfg = run.cfg
    attack = {"fgsm": 1, "nfgsm": 1, "pgd": cfg.get("steps", 7), "noise": 0}[cfg["attack"]]
    sets = 2 if cfg.get("partner") == "set" and cfg["pipeline"] == ("attack", "mix") else 1
    return 1 + ("attack" in cfg["pipeline"]) * (sets * attack + 4 * ("grad_align" in cfg))


def size(run, n=49_000):
    "Training images of a run, of the `n` there are: a ratio of 10 leaves two fifths."
    return n if run.ratio == 1 else round(0.4085 * n)


def price_list(runs, args, n=49_000):
    "What is done, what is to do and what it will cost; audits add about a tenth on a GPU."
    found = {p.stem: json.loads(p.read_text()) for p in args.records.glob("*.json")}
    device = "cuda" if args.device == "cuda" or args.form == "gpu" else "cpu"
    rates = [
        r["seconds"] / r["gradient_evaluations"] for r in found.values() if r["device"] == device
    ]
    rate = sum(rates) / len(rates) if rates else ASSUMED[device]
    total = 0
    for run in runs:
        seconds = size(run, n) * run.cfg["epochs"] * gradients(run) * rate
        total += seconds * missing(run, args)
        state = "to do" if missing(run, args) else "done"
        print(f"block {run.block}  {run.name:44} {state:6} {seconds:8.0f} s")
    how = f"measured by {len(rates)} records" if rates else "assumed"
    print(
        f"{len(runs)} runs, {total / 3600:.1f} h to do; {rate:.2g} s a gradient ({device}, {how})"
    )


def rehearsal(args):
    "Every distinct recipe of the grid, tiny and in a folder that goes away; the first with the whole audit."
    global WATCHED
    WATCHED = 20
    for form in FORMS.values():
        form |= dict(epochs=2, audited=20)
    data, met = load(args.data, 0, per_class=70, progress=False), set()
    data = replace(data, val=spread_subset(data.val, 40))
    with tempfile.TemporaryDirectory() as folder:
        args.runs, args.records = Path(folder) / "runs", Path(folder) / "records"
        args.records.mkdir()
        for run in (r for r in GRID if r.form == args.form):
            recipe = (run.method, run.attack, run.lam, run.weights, run.ratio, str(run.more))
            if {recipe, run.radius} <= met:
                continue
            met |= {recipe, run.radius}
            args.until = 1
            plain = replace(run, weights="")
            if run.weights == "risk" and missing(plain, args):
                do_run(plain, data, args)
            do_run(run, data, args)
            if len(met) == 2:  # an interrupted run goes on; the other audits are short
                args.until = None
                assert missing(run, args)
                do_run(run, data, args)
                assert not missing(run, args)
                FORMS[args.form]["attacks"] = ("clean", "fgsm")
        price_list([r for r in GRID if r.form == args.form], args, 600)


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
    p.add_argument("--rehearse", action="store_true", help="every code path, tiny, kept nowhere")
    p.add_argument("--until", type=int, help="stop every run after this epoch, to go on later")
    p.add_argument("--as-it-is", action="store_true", help="audit unfinished runs, train nothing")
    return p.parse_args(words)


def main(words=None):
    args = arguments(words)
    runs = [r for r in GRID if r.form == args.form and args.block in (None, r.block)]
    runs = [r for r in runs if not args.only or args.only in r.name]
    if args.list:
        return price_list(runs, args)
    args.device = pick_device(args.device)
    args.origin = provenance(args.device)  # before a record changes the tree
    if args.rehearse:
        return rehearsal(args)
    args.records.mkdir(parents=True, exist_ok=True)
    data = load(args.data, 0, progress=False)
    for run in runs:
        started = checkpoints(args.runs / run.name, ALL)
        if missing(run, args) and (started or not args.as_it_is):
            do_run(run, data, args)


if __name__ == "__main__":
    main()
