#!/usr/bin/env python3
"""Does mixing after the attack prevent FGSM training from collapsing, or only delay it? Digits.

    python tools/digits_survival.py              # goes on with nbs/results/digits_survival.json
    python tools/digits_survival.py --out /tmp/x.json --epochs 20 --seeds 0      # a rehearsal
    python tools/digits_survival.py --show       # survival table and log-rank tests of the record

Controls take the mixture apart: lambda delta on the same image without a partner, a clean partner,
a noise partner, partners of the same class or of any, labels hard or soft, label smoothing. What
the field has stands beside them: FGSM-RS, N-FGSM, GradAlign, the shrinking step of Kim et al.,
FGSM-PCO, PGD. Every `EVERY` epochs 300 images that are not learnt are attacked by FGSM, PGD-5 and
APGD-T. A run has collapsed when it has *lost* robustness: where its APGD-T risk, the mean of
`WINDOW` looks, lies `RISE` above its least such mean so far. All runs go on to the end; those that
have not collapsed by then are censored. Rises are counted class by class, from the best look on.
The radius was chosen on seed 0, which is not among the seeds.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digits_cures import differing
from scipy import stats
from torch import nn

from fairmix_nb.data import as_floats, load, spread_subset
from fairmix_nb.methods import METHODS, Method, TrainCfg, describe
from fairmix_nb.mixup import any_partner, mix, same_class_partners
from fairmix_nb.models import Quarters, conv_bn, kaiming
from fairmix_nb.records import SCHEMA, provenance, write_aside
from fairmix_nb.report import attack_errors, columns
from fairmix_nb.train import fit

ROOT, SEEN = Path(__file__).resolve().parent.parent, 300  # test images: nothing is chosen by them
EVERY, WINDOW, RISE = 10, 2, 0.1  # epochs; looks; of the APGD-T risk
ATTACKS = ("clean", "fgsm", "pgd-5", "apgd-t")


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


@dataclass(frozen=True)
class Shrunk(Method):
    "The attack cut to the first of `parts` equal parts that is wrong - Kim et al. 2021, c = parts"

    parts: int = 3  # looked at; where none is wrong, the whole attack

    def step(self, run, x, y):
        delta, share = run.attack(x, y) - x, torch.ones(len(x), 1, 1, 1, device=x.device)
        for k in range(self.parts - 1, 0, -1):  # the smallest is written last
            found = run.probabilities(x + k / self.parts * delta).argmax(1)
            share[found != y] = k / self.parts
        return run.loss(run.logits(x + share * delta), y)


@dataclass(frozen=True)
class Fused(Method):
    "FGSM-PCO: an image's last attack mixed with a step on from it - Wang et al. 2024"

    reach: float = 1.5  # of the new perturbation in the mixture
    weight: float = 10.0  # of the penalty on logits that lie unequally far from the new ones

    def start(self, run):
        x = as_floats(run.images.x)
        noise = torch.rand(x.shape, generator=run.streams["attack"], device=x.device)
        return {"last.turn": run.images.y[:0], "last.delta": run.cfg.eps * (noise - 0.5).sign()}

    def take(self, run, idx):
        run.state["last.turn"] = idx
        return idx

    def step(self, run, x, y):
        idx, kept = run.state["last.turn"], run.state["last.delta"]
        old = (x + kept[idx]).clamp(0, 1)
        new = run.attack(x, y, start=old, loss=run.loss)
        kept[idx] = new - x
        before, after = run.logits(old), run.logits(new)
        sure = before.detach().softmax(1).gather(1, y[:, None]).view(-1, 1, 1, 1)
        z = run.logits((1 - sure) * old + sure * (x + self.reach * (new - x)))
        unequal = (F.mse_loss(after, before) - F.mse_loss(after, z)).abs()
        return run.loss(z, y).mean() + self.weight * unequal


AT, FGSM = METHODS["at"], dict(attack="fgsm")
RANDOM = dict(attack="pgd", steps=1, step_size=1.25)  # of the radius: FGSM-RS, Wong et al. 2020
CONTROLS = {  # name -> method, what it changes in the recipe
    "FGSM": (AT, FGSM),
    "same class": (Apart(), FGSM),
    "any, hard label": (Apart(same=False), FGSM),
    "any, soft label": (Apart(same=False, hard=False), FGSM),
    "lambda delta, no partner": (Apart("self"), FGSM),
    "clean partner, same class": (Apart("clean"), FGSM),
    "clean partner, any": (Apart("clean", same=False), FGSM),
    "noise partner": (Apart("noise"), FGSM),
    "mixed before the attack": (METHODS["mix_attack"], FGSM),
    "label smoothing .4": (AT, FGSM | dict(smoothing=0.4)),
    "FGSM-RS": (AT, RANDOM),
    "shrinking step": (Shrunk(), RANDOM),
    "FGSM-PCO": (Fused(), FGSM | dict(smoothing=4 / 9)),  # .6 for the label, the rest is shared
    "GradAlign": (METHODS["gradalign"], FGSM),
    "N-FGSM": (AT, dict(attack="nfgsm")),
    "PGD-7": (AT, dict(attack="pgd")),
}


def network(seed):
    "Of chapter 17: three convolutions with BatchNorm, the mean of each quarter, a linear layer."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [(1, 16, 1), (16, 32, 2), (32, 64, 2)]
        convs = [m for a, b, stride in sizes for m in (*conv_bn(a, b, stride=stride), nn.ReLU())]
        return kaiming(nn.Sequential(*convs, Quarters(), nn.Flatten(), nn.Linear(256, 10)))


def smooth(risk):
    "Means of `WINDOW` neighbouring looks; each is known at the end of its window."
    return np.convolve(risk, np.ones(WINDOW) / WINDOW, "valid")


def fate(risk):
    "Of risks `(looks,)`: the best look and that of the collapse or None, counted from 1."
    mean = smooth(risk)
    lost = mean > np.minimum.accumulate(mean) + RISE
    end = int(lost.argmax()) if lost.any() else len(mean)
    best = int(mean[:end].argmin()) + WINDOW
    return best, end + WINDOW if lost.any() else None


def setting(name, eps, seed, epochs):
    "Method and recipe of a control."
    method, recipe = CONTROLS[name]
    if "step_size" in recipe:
        recipe = recipe | dict(step_size=eps * recipe["step_size"])
    how = dict(epochs=epochs, batch=64, lr=1e-3, schedule=("constant",), seed=seed)
    return method, TrainCfg(eps=eps, **how, **recipe)


def one(name, eps, seed, epochs):
    "Train to the end; the risks of every look, the collapse, and what each class lost by it."
    method, cfg = setting(name, eps, seed, epochs)
    data = load("digits", seed, progress=False)
    images = spread_subset(data.test, SEEN)
    net, wrong = network(seed), {k: [] for k in ATTACKS}  # images of each class

    def on_epoch(row):
        if row["epoch"] % EVERY == 0:
            for k, found in attack_errors(net, images, cfg.threat, ATTACKS).items():
                wrong[k].append(images.y[found].bincount(minlength=10).numpy())

    fit(net, data, cfg, method, device="cpu", watched=1, progress=False, on_epoch=on_epoch)
    strong = np.array(wrong["apgd-t"])
    best, fell = fate(strong.sum(1) / len(images))
    last = fell or len(strong)
    at, before = (
        strong[max(look - WINDOW, 0) : look].mean(0) / images.counts() for look in (last, best)
    )
    about = dict(control=name, eps=eps, seed=seed, epoch=EVERY * last, collapsed=bool(fell))
    about.update(best=EVERY * best, rises=(at - before).round(3).tolist())
    return about | {k: np.sum(v, 1).tolist() for k, v in wrong.items()}


def sample(record, control, eps):
    "The epochs of collapse of a control's runs; those that stand at their end are censored."
    runs = [r for r in record["runs"] if (r["control"], r["eps"]) == (control, eps)]
    epochs, stands = [r["epoch"] for r in runs], [not r["collapsed"] for r in runs]
    return stats.CensoredData.right_censored(epochs, stands)


def survival(record, eps, against=("FGSM",)):
    "Rows of a table: collapses, their epochs, log-rank p-values."
    rows = [["control", "collapsed", "epochs", "median", *(f"p, {a}" for a in against)]]
    for control in dict.fromkeys(r["control"] for r in record["runs"] if r["eps"] == eps):
        runs = [r for r in record["runs"] if (r["control"], r["eps"]) == (control, eps)]
        mine, epochs = sample(record, control, eps), [r["epoch"] for r in runs if r["collapsed"]]
        middle = stats.ecdf(mine).sf
        below = middle.quantiles[middle.probabilities <= 0.5]
        p = [
            "" if a == control else f"{stats.logrank(sample(record, a, eps), mine).pvalue:.3g}"
            for a in against
        ]
        span = f"{min(epochs)} to {max(epochs)}" if epochs else ""
        median = f"{below[0]:.0f}" if len(below) else f"beyond {max(r['epoch'] for r in runs)}"
        rows.append([control, f"{len(epochs)} of {len(runs)}", span, median, *p])
    return rows


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "digits_survival.json")
    p.add_argument("--epochs", type=int, default=100)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    p.add_argument("--eps", type=float, nargs="+", default=[0.19])
    p.add_argument("--show", action="store_true")
    args = p.parse_args(words)
    torch.set_num_threads(1)
    record = dict(schema=SCHEMA, kind="digits survival", epochs=args.epochs, eps=args.eps)
    data = load("digits", 0, progress=False)
    record.update(rise=RISE, window=WINDOW, every=EVERY, images=len(spread_subset(data.test, SEEN)))
    record.update(data=data.describe(), provenance=provenance("cpu"))
    record.update(controls={k: describe(m) | dict(recipe=r) for k, (m, r) in CONTROLS.items()})
    record.update(device="cpu", runs=[])
    if args.out.exists():
        kept = json.loads(args.out.read_text())
        old = kept["controls"]  # others may have come since
        known = {k: v for k, v in record["controls"].items() if k in old}
        names = ("epochs", "rise", "window", "every", "images", "controls")
        if differ := differing(kept, record | dict(controls=known), names):
            raise SystemExit(f"{args.out} was made with another {', '.join(differ)}")
        record["runs"] = kept["runs"]
    if args.show:
        for eps in args.eps:
            print(f"eps {eps}\n{columns(survival(record, eps))}")
        return
    done, start = {(r["control"], r["eps"], r["seed"]) for r in record["runs"]}, time.perf_counter()
    for seed in args.seeds:
        for eps in args.eps:
            for name in CONTROLS:
                if (name, eps, seed) in done:
                    continue
                record["runs"].append(r := one(name, eps, seed, args.epochs))
                record["runs"].sort(key=lambda r: (r["seed"], list(CONTROLS).index(r["control"])))
                write_aside(args.out, json.dumps(record))
                said = f"collapsed at {r['epoch']}" if r["collapsed"] else "stands"
                spent = time.perf_counter() - start
                print(f"{spent:.0f} s: {name}, {eps}, seed {seed}: {said}", flush=True)


if __name__ == "__main__":
    main()
