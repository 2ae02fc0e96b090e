#!/usr/bin/env python3
"""The published cures on the digits, on one schedule, each before and after mending.

    python tools/digits_cures.py                  # goes on with nbs/results/digits_cures.json
    python tools/digits_cures.py --out /tmp/x.json --seeds 1 --folds 1 --epochs 6   # a rehearsal

For each of `--seeds` shuffles and 3 folds: every method from the same first weights, and the
methods meant for fine-tuning, beside AT itself, from the AT network, for a third of the epochs at
a tenth of the learning rate. Offsets are chosen on 30 validation images a class, by margins; the
test part is attacked by PGD-20 and by Auto-PGD towards every wrong class (the margins), from which
the risk with the offsets follows, for an adversary who knows them.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fairmix_nb.cures import CURES
from fairmix_nb.data import load, spread_subset
from fairmix_nb.mend import margins, mend_at, wrong_at
from fairmix_nb.methods import METHODS, TrainCfg, describe
from fairmix_nb.records import SCHEMA, provenance, write_aside
from fairmix_nb.report import attack_errors
from fairmix_nb.risk import pack_flags
from fairmix_nb.train import fit

ROOT = Path(__file__).resolve().parent.parent
PER_CLASS, STEPS, FLAGS = 30, 20, ("clean", "pgd-20", "margins", "mended clean", "mended margins")
BESIDE = ("at", "trades", "ema", "attack_mix", "mix_attack")
TUNED = ("at", "dafa", "frl", "faal", "confsr")  # those of fine-tuning, and the control
FRESH = (*BESIDE, *(name for name in CURES if name not in (*TUNED[2:], "adjusted")))


def network(seed, width=128):
    "Two hidden layers: small enough for 360 runs with the ten steps of attack that the papers use."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def recipe(epochs, seed, tuned=False):
    "The recipe of a run, from first weights or from the AT network."
    epochs = max(1, round(epochs / 3)) if tuned else epochs
    drop = ("step", max(1, round(0.62 * epochs)), 0.1)
    how = dict(eps=0.1, attack="pgd", steps=10, batch=128, lr=5e-4 if tuned else 5e-3)
    return TrainCfg(epochs=epochs, seed=seed, schedule=drop, **how)


def differing(kept, record, names):
    "What differs between two records; a field that recipes gained later has its default."

    def today(v):
        return TrainCfg(**v) if isinstance(v, dict) and "eps" in v else v

    return [k for k in names if today(kept.get(k)) != today(record[k])]


def trained(data, method, cfg, out=None, start=None):
    kw = dict(device="cpu", watched=1, progress=False)
    return fit(network(cfg.seed), data, cfg, method, out=out, start_from=start, **kw)


def clean_margins(net, x, y):
    "Margins without an attack `(n, C)`, as `margins` lays them out."
    with torch.no_grad():
        z = net(x).double().numpy()
    own = z[np.arange(len(y)), y][:, None]
    return np.where(y[:, None] == np.arange(z.shape[1]), np.inf, own - z)


def before_and_after(net, val, images, threat, **how):
    "Flags of the images, clean and by margins, without and with offsets chosen on `val`; these."
    x, y = images.floats(), images.y.numpy()
    chosen = mend_at(margins(net, val.floats(), val.y, threat, **how), val.y.numpy()).offsets
    net, none = net.cpu().eval(), np.zeros(len(chosen))
    attacked = margins(net, x, images.y, threat, **how)
    matrices = dict(clean=clean_margins(net, x, y), margins=attacked)
    flags = {k: wrong_at(m, y, none) for k, m in matrices.items()}
    return flags | {f"mended {k}": wrong_at(m, y, chosen) for k, m in matrices.items()}, chosen


def judged(net, data, threat):
    "Flags of the test images in order of class, and the offsets."
    images = spread_subset(data.test, len(data.test))
    found, chosen = before_and_after(net, data.val, images, threat, steps=STEPS, batch=1024)
    found["pgd-20"] = attack_errors(net, images, threat, ("pgd-20",))["pgd-20"].numpy()
    flags = np.stack([found[name] for name in FLAGS])
    return dict(flags=pack_flags(flags), offsets=chosen.round(4).tolist())


def of_seed(seed, epochs, done, folder):
    "The runs of a seed that are not done yet, as they end."
    data, base = load("digits", seed, val_per_class=PER_CLASS, progress=False), folder / f"{seed}"
    jobs = [(name, False) for name in FRESH] + [(name, True) for name in TUNED]
    for name, tuned in jobs:
        key = f"{name}, tuned" if tuned else name
        if (key, seed) in done:
            continue
        if tuned and not base.exists():  # the AT network, again
            trained(data, "at", recipe(epochs, seed), base)
        cfg, first = recipe(epochs, seed, tuned), base if name == "at" and not tuned else None
        found = trained(data, METHODS[name], cfg, first, base / "last.pt" if tuned else None)
        spent = found.record["gradient_evaluations"] / len(data.train)
        seconds = round(found.record["seconds"], 2)
        run = dict(method=key, seed=seed, gradients=round(spent, 2), seconds=seconds)
        yield run | judged(found.model, data, cfg.threat)


def frame(epochs):
    "The record before its first run."
    data = load("digits", 0, val_per_class=PER_CLASS, progress=False)
    lean = {k: v for k, v in asdict(recipe(epochs, 0)).items() if k != "seed"}
    return dict(
        schema=SCHEMA,
        kind="digits cures",
        epochs=epochs,
        cfg=json.loads(json.dumps(lean)),
        tuned=json.loads(json.dumps(asdict(recipe(epochs, 0, True)))),
        model="64-128-128-10",
        steps=STEPS,
        flags=FLAGS,
        methods={name: describe(METHODS[name]) for name in dict.fromkeys((*FRESH, *TUNED))},
        classes=list(data.test.classes),
        data=data.describe(),
        provenance=provenance("cpu"),
        device="cpu",
        tests={},
        runs=[],
    )


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "digits_cures.json")
    p.add_argument("--seeds", type=int, default=5, help="shuffles")
    p.add_argument("--folds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=24)
    args = p.parse_args(words)
    torch.set_num_threads(1)
    record = frame(args.epochs)
    if args.out.exists():
        kept = json.loads(args.out.read_text())
        differ = differing(kept, record, ("epochs", "cfg", "methods"))
        if differ:
            raise SystemExit(f"{args.out} was made with another {', '.join(differ)}")
        record = kept
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in (3 * s + f for s in range(args.seeds) for f in range(args.folds)):
            test = load("digits", seed, progress=False).test
            record["tests"][str(seed)] = dict(n=test.counts(), digest=test.digest())
            done = {(r["method"], r["seed"]) for r in record["runs"]}
            for run in of_seed(seed, args.epochs, done, Path(folder)):
                record["runs"].append(run)
                write_aside(args.out, json.dumps(record))
            spent = time.perf_counter() - start
            print(f"seed {seed}: {len(record['runs'])} runs, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
