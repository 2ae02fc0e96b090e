#!/usr/bin/env python3
"""Train and audit the CIFAR-10 runs behind nbs/22_cifar10.ipynb: those whose records are missing.

    python tools/cifar_runs.py --list                           # the grid and its price
    python tools/cifar_runs.py --form short                     # five epochs a run, block by block
    python tools/cifar_runs.py --form full --block 1            # eighty epochs
    python tools/cifar_runs.py --rehearse                       # every recipe, tiny, kept nowhere

A run leaves its checkpoint in runs/cifar10/NAME (not tracked; an interrupted run goes on from its
last epoch) and, when it has been trained and audited, one small record in
nbs/results/cifar10/NAME.json. `--until` and `--as-it-is` audit an unfinished run, which its record
says; a later call goes on with it. `--data` names a folder with train/ and test/ of class folders,
or 'cifar10' (torchvision).
"""

import argparse
import importlib.util
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from digits_cures import before_and_after

from fairmix_nb import methods
from fairmix_nb.audit import audit
from fairmix_nb.data import load, spread_subset
from fairmix_nb.diagnosis import Subject
from fairmix_nb.mend import with_offsets
from fairmix_nb.models import CIFAR_STD, build
from fairmix_nb.records import pick_device, provenance, write_aside
from fairmix_nb.risk import pack_flags
from fairmix_nb.runs import checkpoints, load_model
from fairmix_nb.train import PRECISIONS, fit, resume, watch_closely

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 10

# The grid as data: what a radius and an attack in training mean, then blocks of runs.
PAPER = {f"n{e}": tuple(round(e * s, 6) for s in CIFAR_STD) for e in (0.1, 0.2, 0.3)}  # normalised
RADII = {name: dict(eps=eps, box=None) for name, eps in PAPER.items()}
RADII["8"] = dict(eps=8 / 255, box=(0.0, 1.0))  # what the field uses
ATTACKS = {name: dict(attack=name) for name in ("fgsm", "nfgsm", "noise")}
ATTACKS |= dict(pgd=dict(attack="pgd", steps=7), galign=dict(attack="fgsm"))  # with GradAlign
AUDIT = ("clean", "fgsm", "pgd-50x2", "apgd-ce", "apgd-t")
MENDED, STEPS = ("clean", "fgsm", "apgd-t"), 10  # of an audit; of the margins, a wrong class
FORMS = dict(short=dict(epochs=5, audited=500), full=dict(epochs=80, audited=1000))


@dataclass(frozen=True)
class Run:
    "One training: its name says everything but the recipe all share."

    form: str  # of FORMS
    block: int
    method: str  # of METHODS
    radius: str  # of RADII
    seed: int
    attack: str = "fgsm"  # of ATTACKS

    @property
    def name(self):
        return f"{self.form}-{self.method}-{self.attack}-{self.radius}-s{self.seed}"

    @property
    def cfg(self):
        "The recipe."
        how = RADII[self.radius] | ATTACKS[self.attack]
        return methods.TrainCfg(**how, epochs=FORMS[self.form]["epochs"], seed=self.seed)

    @property
    def way(self):
        "The method, one lambda a batch as the paper writes; GradAlign is an attack only here."
        kind = methods.GradAlign if self.attack == "galign" else methods.Pipeline
        return kind(**vars(methods.METHODS[self.method]) | dict(lam_per="batch"))


def runs_of(form, block, names, radii, seeds, **kw):
    "Seed by seed, so that pairs are complete early."
    return [Run(form, block, m, r, s, **kw) for r in radii for s in range(seeds) for m in names]


PAIR, THREE = ("at", "attack_mix"), ("at", "attack_mix", "mix_attack")
CONTROLS = ("any_mix", "self_mix")
GRID = [
    *runs_of("short", 1, PAIR, ["n0.3"], 2),
    *runs_of("short", 2, PAIR, ["8"], 3),
    *runs_of("short", 3, ("any_mix",), ["n0.3"], 2),
    *runs_of("short", 3, ("mix_attack",), ["n0.3"], 2),
    *runs_of("full", 1, PAIR, ["n0.3"], 5),
    *(r for a in ("nfgsm", "pgd") for r in runs_of("full", 2, PAIR, ["8"], 3, attack=a)),
    *runs_of("full", 3, ("mix_attack",), ["n0.3"], 5),
    *runs_of("full", 3, CONTROLS, ["8", "n0.3"], 3),
    *runs_of("full", 3, PAIR, ["8"], 3),
    *runs_of("full", 3, PAIR[:1], ["8", "n0.3"], 3, attack="noise"),
    *runs_of("full", 3, PAIR[:1], ["8", "n0.3"], 3, attack="galign"),
    *runs_of("full", 4, THREE, ["n0.1", "n0.2"], 5),
    *runs_of("full", 4, ("natural", "mixup"), ["n0.3"], 5),
    *(r for a in ("nfgsm", "pgd") for r in runs_of("full", 4, THREE[2:], ["8"], 3, attack=a)),
    *(r for a in ("nfgsm", "pgd") for r in runs_of("full", 4, THREE, ["n0.3"], 3, attack=a)),
]


class Stopped(Exception):
    "The epoch that `--until` names is done and its checkpoint written."


def train(run, data, folder, args):
    "Train, or go on from the last checkpoint: the network as it is then."
    model = build("resnet20", CLASSES, 3, run.seed)

    def on_epoch(row):
        told = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
        print(f"{time.strftime('%H:%M:%S')} {run.name} {told}", flush=True)
        if row["epoch"] == args.until:
            raise Stopped

    def look(model, images, threat):
        return watch_closely(model, images, threat) | dict(precision=args.precision)

    kw = dict(device=args.device, watched=run.cfg.epochs, watch=look, progress=False)
    kw["precision"] = args.precision
    try:
        if not checkpoints(folder):
            fit(model, data, run.cfg, run.way, out=folder, on_epoch=on_epoch, **kw)
        elif not args.as_it_is:
            resume(folder, model, data, run.cfg, run.way, on_epoch=on_epoch, **kw)
    except Stopped:
        pass
    return load_model(folder, CLASSES, 3, "resnet20")[0]


@torch.no_grad()
def probes(model, images, threat):
    "The risk along the FGSM step, for the picture of it."
    s = Subject(model, images.floats(), images.y, threat)
    steps = [k / 4 for k in range(7)]
    return dict(steps=steps, step=[round(float(s.wrong(s.step(k)).mean()), 4) for k in steps])


@torch.no_grad()
def pairs(model, images, confusion):
    "Spread of class a along the line to the centre of class b, on validation images."
    x, y, n = images.floats(), images.y, images.n_cls
    z = torch.cat([model.eval()[:-1](part) for part in x.split(250)]).double()
    centre = torch.stack([z[y == c].mean(0) for c in range(n)])
    line = centre[:, None] - centre[None]
    distance = line.norm(dim=-1)
    line = line / distance[..., None].clamp_min(1e-30)
    spread = torch.stack([(z[y == c] @ line[c].T).std(0) for c in range(n)])
    found = dict(spread=spread.cpu(), distance=distance.cpu())
    rounded = {name: t.numpy().round(4).tolist() for name, t in found.items()}
    return dict(part="validation", **rounded, confusion=confusion)


def attacked(outcome):
    "The attacks of an audit as the record keeps them: FGSM raw, what is stronger cumulative."
    found = {}
    for name, kept in outcome.record["attacks"].items():
        raw = name in ("clean", "fgsm")
        wrong, flags = outcome.counts(name, raw)[0].tolist(), pack_flags(outcome.flags(name, raw))
        found[name] = dict(kept, n=outcome.record["n"], wrong=wrong, raw=raw, flags=flags)
    return found


def mended(model, data, test, threat, **kw):
    "Offsets chosen on the validation part: what margins and an audit say of the test images then."
    flags, offsets = before_and_after(model, data.val, test, threat, steps=STEPS, **kw)
    found = audit(with_offsets(model, offsets), test, threat, MENDED, diagnose=0, **kw)
    flags = {name: pack_flags(wrong) for name, wrong in flags.items()}
    about = dict(val=len(data.val), steps=STEPS, offsets=offsets.round(4).tolist(), flags=flags)
    return about | dict(attacks=attacked(found))


def do_run(run, data, args):
    "One run from nothing, or from where it stopped, to its record."
    folder = args.runs / run.name
    model, start = train(run, data, folder, args).to(args.device), time.perf_counter()
    found, threat, names = json.loads((folder / "record.json").read_text()), run.cfg.threat, AUDIT
    if args.device == "cuda" and importlib.util.find_spec("pyautoattack"):
        names += ("autoattack",)
    kw = dict(device=args.device, progress=False)
    test = spread_subset(data.test, args.audited or FORMS[run.form]["audited"])
    outcome = audit(model, test, threat, names, **kw)
    # the paper's own measurement
    whole = audit(model, data.test, threat, ("clean", "fgsm"), diagnose=0, **kw)
    taken = audit(model, data.val, threat, ("clean", "pgd-20"), diagnose=0, **kw)
    confusion = {a: taken.confusion(a).tolist() for a in taken.attacks}
    keys = ("cfg", "data", "provenance", "device", "seconds", "gradient_evaluations")
    record = dict(schema=1, kind="cifar10 run", name=run.name, model="resnet20")
    record |= {k: getattr(run, k) for k in ("form", "block", "method", "radius", "seed")}
    record |= {k: found[k] for k in (*keys, "epochs_done", "finished")}
    record |= dict(way=found["method"], watched=min(500, len(data.val)), test=test.digest())
    record["curves"] = {k: [row.get(k) for row in found["curves"]] for k in found["curves"][-1]}
    record |= dict(attacks=attacked(outcome), diagnosis=outcome.record["diagnosis"])
    record["whole"] = {a: whole.counts(a, raw=True)[0].tolist() for a in whole.attacks}
    record["probes"] = probes(model, test.to(args.device), threat)
    record["pairs"] = pairs(model, data.val.to(args.device), confusion)
    record["mended"] = mended(model, data, test, threat, **kw)
    record["audit"] = dict(provenance=args.origin, seconds=round(time.perf_counter() - start, 1))
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


def seconds(run, rate, n=49_000):
    "Of training alone, on `n` images; audits add a tenth on a GPU."
    return n * run.cfg.epochs * methods.gradients_per_image(run.way, run.cfg) * rate


def price_list(runs, args):
    "What is done, what is to do and what it will cost."
    found = [json.loads(p.read_text()) for p in args.records.glob("*.json")]
    rates = [r["seconds"] / r["gradient_evaluations"] for r in found if r["device"] == args.device]
    rate = sum(rates) / len(rates) if rates else ASSUMED[args.device]
    prices = [(run, missing(run, args), seconds(run, rate)) for run in runs]
    for run, todo, price in prices:
        print(f"block {run.block}  {run.name:44} {'to do' if todo else 'done':6} {price:8.0f} s")
    how = f"measured by {len(rates)} records" if rates else "assumed"
    hours = sum(todo * price for _, todo, price in prices) / 3600
    print(f"{len(runs)} runs, {hours:.1f} h to do; {rate:.2g} s a gradient ({args.device}, {how})")


def rehearsal(args):
    "Every distinct recipe of the grid, tiny, in a folder that goes away; one stopped and resumed."
    for form in FORMS.values():
        form |= dict(epochs=2)
    data, met = load(args.data, 0, per_class=70, progress=False), set()
    data, args.audited = replace(data, val=spread_subset(data.val, 40)), 20
    with tempfile.TemporaryDirectory() as folder:
        args.runs, args.records = Path(folder) / "runs", Path(folder) / "records"
        args.records.mkdir()
        for run in (r for r in GRID if r.form == args.form):
            recipe = (run.method, run.attack)
            if {recipe, run.radius} <= met:
                continue
            args.until = 1
            do_run(run, data, args)
            if not met:
                args.until = None
                assert missing(run, args)
                do_run(run, data, args)
                assert not missing(run, args)
            met |= {recipe, run.radius}
        price_list([r for r in GRID if r.form == args.form], args)


def arguments(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--form", choices=FORMS, default="short")
    p.add_argument("--block", type=int, help="only this block")
    p.add_argument("--only", help="only runs whose name contains this")
    p.add_argument("--data", default="cifar10", help="'cifar10' or a folder")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of training")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar10")
    p.add_argument("--records", type=Path, default=ROOT / "nbs" / "results" / "cifar10")
    p.add_argument("--list", action="store_true", help="the grid and its price; runs nothing")
    p.add_argument("--rehearse", action="store_true", help="every recipe, tiny, kept nowhere")
    p.add_argument("--until", type=int, help="stop every run after this epoch, to go on later")
    p.add_argument("--as-it-is", action="store_true", help="audit unfinished runs, train nothing")
    args = p.parse_args(words)
    args.device, args.audited = pick_device(args.device), None
    return args


def main(words=None):
    args = arguments(words)
    runs = [r for r in GRID if r.form == args.form and args.block in (None, r.block)]
    runs = [r for r in runs if not args.only or args.only in r.name]
    if args.list:
        return price_list(runs, args)
    args.origin = provenance(args.device)  # before a record changes the tree
    if args.rehearse:
        return rehearsal(args)
    args.records.mkdir(parents=True, exist_ok=True)
    data = load(args.data, 0, progress=False)
    for run in runs:
        if missing(run, args) and (checkpoints(args.runs / run.name) or not args.as_it_is):
            do_run(run, data, args)


if __name__ == "__main__":
    main()
