#!/usr/bin/env python3
"""The cures that fine-tune, from robust CIFAR-10 networks, each before and after mending.

    python tools/cifar_cures.py --data ~/cifar10            # goes on where it was stopped
    python tools/cifar_cures.py --rehearse --data ~/cifar10 # the whole way in a few minutes

Base: ResNet-20, N-FGSM at 8/255, crop and flip, SGD with a cyclic schedule, 15 epochs; 300 training
images a class are held out for every choice. From each base the methods and AT itself, the control,
train two epochs more at the rates of FAAL (.01, .001). Judged on `--test` test images: clean and by
margins (Auto-PGD towards every wrong class), without and with offsets chosen on the held-out
images; AutoAttack on `--autoattack` of them where asked for. A seed is finished before
the next begins, and several processes may share a record, each with its `--seeds`. nbs/networks
keeps the bases, runs/cifar_cures what is tuned from them; the record is written after every run.
"""

import argparse
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from digits_cures import before_and_after, differing

from fairmix_nb.data import load, spread_subset
from fairmix_nb.methods import FAST, METHODS, TrainCfg, describe
from fairmix_nb.models import build
from fairmix_nb.records import SCHEMA, digest, provenance, write_aside
from fairmix_nb.report import attack_errors
from fairmix_nb.risk import pack_flags
from fairmix_nb.runs import checkpoints, load_model, read_checkpoint
from fairmix_nb.train import Fit, fit, resume

ROOT = Path(__file__).resolve().parent.parent
OWN = ("optimizer", "streams", "state")  # of a run: needed to go on with it, and by nobody else
HELD_OUT, ROBUST = 300, dict(eps=8 / 255, attack="nfgsm", bn_attack="eval")
TUNED = ("at", "trades", "ccm", "dafa", "frl", "faal", "codat", "variance", "wat", "cfol")
TUNED += ("fairtat", "trix", "confsr", "skg", "attack_mix")


def recipes(epochs, tuning, seed):
    "Of the base, and of what goes on from it."
    base = TrainCfg(**FAST | dict(epochs=epochs), **ROBUST, seed=seed)
    how = dict(optimizer="sgd", batch=128, lr=0.01, schedule=("step", 1, 0.1))
    how.update(weight_decay=5e-4, augment="crop_flip", epochs=tuning)
    return base, TrainCfg(**how, **ROBUST, seed=seed)


def trained(args, data, name, part, cfg, start=None):
    "A network that is there, gone on with, or new; its record."
    out = args.runs / f"{name}-{part}-{cfg.seed}"
    net, kw = build(args.model, data.train.n_cls, 3, cfg.seed), dict(device=args.device)
    kw.update(progress=False, on_epoch=lambda row: print(said(out.name, row), flush=True))
    if checkpoints(out):
        return resume(out, net, data, cfg, METHODS[name], **kw)
    return fit(net, data, cfg, name, out=out, start_from=start, **kw)


def kept_network(folder, path):
    "The weights of a finished run for others to use, without what only the run itself needs."
    content = {k: v for k, v in read_checkpoint(Path(folder) / "last.pt").items() if k not in OWN}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, partial(torch.save, dict(content, sha256=digest(content))))


def base_of(args, data, cfg):
    "The network that others go on from, trained where it is not there yet; and its file."
    path = args.networks / f"{args.model}-s{cfg.seed}.pt"
    if not path.exists():
        trained(args, data, "at", "base", cfg)
        kept_network(args.runs / f"at-base-{cfg.seed}", path)
    net, content = load_model(path, data.train.n_cls, 3, args.model)
    cost = dict(gradient_evaluations=content["gradients"], seconds=content["seconds"])
    return Fit(net, cost, content["curves"]), path


def said(name, row):
    numbers = {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
    return f"{time.strftime('%H:%M:%S')} {name} epoch {row['epoch']} {numbers}"


def judged(args, net, data, threat):
    "Flags of the test images in order of class, by attack, and the offsets."
    val, images = spread_subset(data.val, args.val), spread_subset(data.test, args.test)
    how = dict(steps=args.steps, device=args.device)
    flags, chosen = before_and_after(net, val, images, threat, **how)
    flags = {k: pack_flags(v) for k, v in flags.items()}
    return dict(flags=flags, offsets=chosen.round(4).tolist())


def network_file(args, run):
    "Where a network of the record is kept: a base, or what was tuned from one."
    name, _, part = run["method"].partition(", ")
    base = args.networks / f"{args.model}-s{run['seed']}.pt"
    return args.runs / f"{name}-{part}-{run['seed']}" / "last.pt" if part else base


def checked(args, run, data, threat):
    "AutoAttack on some of the images that the margins were taken of: which ones, and its flags."
    images = spread_subset(data.test, args.test)
    places = torch.linspace(0, len(images) - 1, args.autoattack).round().long()
    few, net = images.subset(places), load_model(network_file(args, run), 10, 3, args.model)[0]
    few, net = few.to(args.device), net.to(args.device)
    wrong = attack_errors(net, few, threat, ("autoattack",))["autoattack"]
    return dict(places=places.tolist(), flags=pack_flags(wrong.cpu().numpy()))


def data_of(args, seed):
    return load(
        args.data, seed, val_per_class=args.held_out, per_class=args.per_class, progress=False
    )


def of_seed(args, seed, done):
    "The runs of a seed that are not done yet, as they end: the base, then what goes on from it."
    data, (base, cfg) = data_of(args, seed), recipes(args.epochs, args.tuning, seed)
    first, start = base_of(args, data, base)
    plan = [("at", base), *[(f"{name}, tuned", cfg) for name in args.methods]]
    for key, recipe in plan:
        if (key, seed) in done:
            continue
        name, _, part = key.partition(", ")
        found = trained(args, data, name, part, recipe, start) if part else first
        spent = found.record["gradient_evaluations"] / len(data.train)
        about = dict(method=key, seed=seed, gradients=round(spent, 2))
        yield (
            about
            | dict(seconds=round(found.record["seconds"], 1))
            | judged(args, found.model, data, recipe.threat)
        )


def frame(args):
    "The record before its first run."
    data = data_of(args, 0)
    base, tuned = (json.loads(json.dumps(asdict(c))) for c in recipes(args.epochs, args.tuning, 0))
    return dict(
        schema=SCHEMA,
        kind="cifar cures",
        model=args.model,
        base=base,
        tuned=tuned,
        steps=args.steps,
        images=dict(margins=spread_subset(data.test, args.test).counts()),
        val=args.val,
        classes=list(data.test.classes),
        data=data.describe(),
        provenance=provenance(args.device),
        device=args.device,
        runs=[],
    )


def runs_so_far(path, record):
    "Of a record made in the same way; read anew each time: another process may have other seeds."
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    differ = differing(kept, record, ("model", "base", "tuned", "steps", "images"))
    if differ:
        raise SystemExit(f"{path} was made with another {', '.join(differ)}")
    return kept["runs"]


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="cifar10", help="'cifar10', or a folder with train/ and test/")
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "cifar_cures.json")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar_cures")
    p.add_argument("--networks", type=Path, default=ROOT / "nbs" / "networks", help="of the bases")
    p.add_argument("--methods", nargs="*", default=list(TUNED), choices=sorted(METHODS))
    p.add_argument("--model", default="resnet20", help="resnet18 with a GPU")
    p.add_argument("--device", default="cpu")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--epochs", type=int, default=15)
    p.add_argument("--tuning", type=int, default=2, help="epochs from the base")
    p.add_argument("--steps", type=int, default=20, help="of the margins, for each wrong class")
    p.add_argument("--val", type=int, default=1000, help="held-out images that offsets see")
    p.add_argument("--test", type=int, default=2000)
    p.add_argument("--autoattack", type=int, default=0, help="test images")
    p.add_argument("--rehearse", action="store_true", help="few images, one seed")
    args = p.parse_args(words)
    args.held_out, args.per_class = HELD_OUT, None
    if args.rehearse:
        args.held_out, args.per_class, args.val, args.test = 10, 40, 50, 50
        args.seeds, args.epochs, args.tuning, args.steps = [0], 1, 2, 2
        args.autoattack, args.networks = min(args.autoattack, 20), args.runs
    torch.set_num_threads(1)
    record = frame(args)
    record["runs"] = runs_so_far(args.out, record)

    def keep(run, what):
        key = run["method"], run["seed"]
        by = {(r["method"], r["seed"]): r for r in runs_so_far(args.out, record)} | {key: run}
        record["runs"] = sorted(by.values(), key=lambda r: r["seed"])  # a run judged anew stays put
        names = dict.fromkeys(r["method"].partition(",")[0] for r in record["runs"])
        record["methods"] = {name: describe(METHODS[name]) for name in names}
        write_aside(args.out, json.dumps(record))
        print(f"{time.strftime('%H:%M:%S')} {key}: {what}", flush=True)

    for seed in args.seeds:
        done = {(r["method"], r["seed"]) for r in record["runs"]}
        for run in of_seed(args, seed, done):
            keep(run, "done")
        for run in record["runs"] if args.autoattack else ():
            if run["seed"] != seed or "autoattack" in run:
                continue
            if not (path := network_file(args, run)).exists():
                print(f"{run['method']}, seed {seed} is left out: no network at {path}")
                continue
            data, cfg = data_of(args, seed), recipes(args.epochs, args.tuning, seed)[0]
            keep(run | dict(autoattack=checked(args, run, data, cfg.threat)), "AutoAttack")


if __name__ == "__main__":
    main()
