#!/usr/bin/env python3
"""Does mixing after the attack prevent FGSM training from collapsing, or only delay it? Digits.

    python tools/digits_survival.py              # goes on with nbs/results/digits_survival.json
    python tools/digits_survival.py --out /tmp/x.json --epochs 2 --seeds 1       # a rehearsal
    python tools/digits_survival.py --show       # survival table and log-rank tests of the record

Controls take the mixture apart: lambda delta on the same image without a partner, a clean partner,
a noise partner, partners of the same class or of any, labels hard or soft, label smoothing; N-FGSM,
GradAlign and PGD are what the field uses. A run has collapsed at the first epoch whose PGD-5 risk
on validation exceeds its FGSM risk by `GAP`; the class that collapses first is the one whose
PGD-20 risk is largest then. Runs that end without are censored at the last epoch.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy import stats

from fairmix_nb.data import load
from fairmix_nb.methods import METHODS, Method, TrainCfg, describe
from fairmix_nb.mixup import any_partner, mix, same_class_partners
from fairmix_nb.models import build
from fairmix_nb.records import SCHEMA, provenance, write_aside
from fairmix_nb.report import attack_errors, columns, outcome_of
from fairmix_nb.train import fit

ROOT, GAP = Path(__file__).resolve().parent.parent, 0.3


@dataclass(frozen=True)
class Apart(Method):
    "FGSM, then lambda times the attacked image plus the rest of a partner, lambda ~ U(0, 1)"

    partner: str = "attacked"  # what is mixed in: 'self' (the clean image), 'clean', 'noise'
    same: bool = True  # partners of the same class, or any
    hard: bool = True  # the label stays; False: mixed like the images

    def step(self, run, x, y):
        a, stream = run.attack(x, y), run.streams["mix"]
        lam = torch.rand(len(x), generator=stream, device=x.device)
        (j,) = same_class_partners(y, run.n_cls, 2, stream)
        j = j if self.same else any_partner(len(x), stream)
        noise = torch.rand(x.shape, generator=stream, device=x.device)
        other = dict(attacked=a[j], self=x, clean=x[j], noise=noise)[self.partner]
        weights = torch.stack([lam, 1 - lam], 1)
        z = run.logits(mix(a, [other], weights))
        if self.hard:
            return run.loss(z, y)
        hot = torch.eye(run.n_cls, device=x.device)[y]
        return run.loss(z, mix(hot, [hot[j]], weights))


CONTROLS = {  # name -> method, attack in training, label smoothing
    "FGSM": (METHODS["at"], "fgsm", 0.0),
    "same class": (Apart(), "fgsm", 0.0),
    "any, hard label": (Apart(same=False), "fgsm", 0.0),
    "any, soft label": (Apart(same=False, hard=False), "fgsm", 0.0),
    "lambda delta, no partner": (Apart("self"), "fgsm", 0.0),
    "clean partner, same class": (Apart("clean"), "fgsm", 0.0),
    "clean partner, any": (Apart("clean", same=False), "fgsm", 0.0),
    "noise partner": (Apart("noise"), "fgsm", 0.0),
    "mixed before the attack": (METHODS["mix_attack"], "fgsm", 0.0),
    "label smoothing .4": (METHODS["at"], "fgsm", 0.4),
    "N-FGSM": (METHODS["at"], "nfgsm", 0.0),
    "GradAlign": (METHODS["gradalign"], "fgsm", 0.0),
    "PGD-7": (METHODS["at"], "pgd", 0.0),
}


class Collapsed(Exception):
    "Ends a run: there is no more to learn from it."


def one(name, eps, seed, epochs):
    "Train until the collapse or the end; when, and which class first."
    data, (method, attack, smoothing) = load("digits", seed, progress=False), CONTROLS[name]
    how = dict(epochs=epochs, batch=64, lr=3e-3, schedule=("constant",), seed=seed)
    cfg, curve = TrainCfg(eps=eps, attack=attack, smoothing=smoothing, **how), []
    net, first = build("small_cnn", 10, 1, seed), None

    def on_epoch(row):
        curve.append([round(row[k], 3) for k in ("clean", "fgsm", "pgd-5")])
        if row["pgd-5"] - row["fgsm"] > GAP:
            raise Collapsed

    try:
        kw = dict(device="cpu", watched=epochs, progress=False, on_epoch=on_epoch)
        fit(net, data, cfg, method, **kw)
    except Collapsed:
        wrong = attack_errors(net, data.val, cfg.threat, ("pgd-20",))
        first = int(outcome_of(wrong, data.val, cfg.threat).risks("pgd-20").argmax())
    about = dict(control=name, eps=eps, seed=seed, epoch=len(curve), collapsed=first is not None)
    return about | dict(first_class=first, curve=curve)


def sample(record, control, eps):
    "The epochs of collapse of a control's runs; those that stand at their end are censored."
    runs = [r for r in record["runs"] if (r["control"], r["eps"]) == (control, eps)]
    epochs, stands = [r["epoch"] for r in runs], [not r["collapsed"] for r in runs]
    return stats.CensoredData.right_censored(epochs, stands)


def survival(record, eps, against=("FGSM", "lambda delta, no partner")):
    "Rows of a table: collapses, their epochs, the class that falls first, log-rank p-values."
    rows = [
        ["control", "collapsed", "epochs", "median", "first class", *(f"p, {a}" for a in against)]
    ]
    for control in dict.fromkeys(r["control"] for r in record["runs"] if r["eps"] == eps):
        runs = [r for r in record["runs"] if (r["control"], r["eps"]) == (control, eps)]
        fell, mine = [r for r in runs if r["collapsed"]], sample(record, control, eps)
        epochs = [r["epoch"] for r in fell]
        classes = Counter(r["first_class"] for r in fell).most_common()
        middle = stats.ecdf(mine).sf
        below = middle.quantiles[middle.probabilities <= 0.5]
        p = [
            "" if a == control else f"{stats.logrank(sample(record, a, eps), mine).pvalue:.3g}"
            for a in against
        ]
        span = f"{min(epochs)} to {max(epochs)}" if fell else ""
        median = f"{below[0]:.0f}" if len(below) else f"beyond {max(r['epoch'] for r in runs)}"
        first = ", ".join(f"{c} ({n})" for c, n in classes)
        rows.append([control, f"{len(fell)} of {len(runs)}", span, median, first, *p])
    return rows


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "digits_survival.json")
    p.add_argument("--epochs", type=int, default=100)
    p.add_argument("--seeds", type=int, default=10)
    p.add_argument("--eps", type=float, nargs="+", default=[0.25, 0.3])
    p.add_argument("--show", action="store_true")
    args = p.parse_args(words)
    torch.set_num_threads(1)
    record = dict(schema=SCHEMA, kind="digits survival", epochs=args.epochs, eps=args.eps, gap=GAP)
    record.update(data=load("digits", 0, progress=False).describe(), provenance=provenance("cpu"))
    record.update(controls={k: describe(v[0]) for k, v in CONTROLS.items()}, device="cpu", runs=[])
    if args.out.exists():
        record["runs"] = json.loads(args.out.read_text())["runs"]
    if args.show:
        for eps in args.eps:
            print(f"eps {eps}\n{columns(survival(record, eps))}")
        return
    done, start = {(r["control"], r["eps"], r["seed"]) for r in record["runs"]}, time.perf_counter()
    for seed in range(args.seeds):
        for eps in args.eps:
            for name in CONTROLS:
                if (name, eps, seed) in done:
                    continue
                record["runs"].append(one(name, eps, seed, args.epochs))
                write_aside(args.out, json.dumps(record))
                r = record["runs"][-1]
                fate = f"collapsed, class {r['first_class']} first" if r["collapsed"] else "stands"
                spent = time.perf_counter() - start
                print(f"{spent:.0f} s: {name}, seed {seed}: epoch {r['epoch']}, {fate}", flush=True)


if __name__ == "__main__":
    main()
