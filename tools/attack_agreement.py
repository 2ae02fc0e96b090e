#!/usr/bin/env python3
"""Compare our attacks with foolbox and pyautoattack, image by image, and write a record.

    python tools/attack_agreement.py [--out nbs/results/attack_agreement.json] [--nets 10]

Ten digits nets, each attacked at 1,000 of the 1,797 images. A record that is already there is
continued: nets that it holds are not run again. Needs foolbox and pyautoattack. One core, about
half an hour.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch

import fairmix_nb.attacks as ours
from fairmix_nb.data import load
from fairmix_nb.methods import TrainCfg
from fairmix_nb.models import small_cnn
from fairmix_nb.records import provenance, write_aside
from fairmix_nb.risk import pack_flags
from fairmix_nb.train import fit

ROOT = Path(__file__).resolve().parent.parent
RECIPES = dict(natural=dict(), fgsm=dict(attack="fgsm"), pgd=dict(attack="pgd"))
CONFIG = dict(
    data="digits, all 1,797 images; 1,000 of them for each net, drawn by its seed",
    points=1000,
    model="small_cnn",
    width=8,
    steps=20,
    targets=9,
    train=dict(epochs=8, batch=64, lr=3e-3, eps=0.1, steps=5),
    eps=dict(natural=0.1, fgsm=0.15, pgd=0.15),
    nets=["natural", "pgd", "fgsm", "natural", "pgd", "fgsm", "natural", "pgd", "natural", "pgd"],
    pairs=[
        ["fgsm", "foolbox fgsm"],
        ["pgd", "foolbox pgd"],
        ["apgd-ce", "pyautoattack apgd-ce"],
        ["apgd-t", "pyautoattack apgd-t"],
        ["worst", "pyautoattack standard"],
        ["pyautoattack apgd-ce", "pyautoattack apgd-ce, other seed"],
    ],
)


def trained(recipe: str, seed: int):
    "A small net, trained on the digits as `recipe` says, and the data"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = small_cnn(10, 1, CONFIG["width"])
    data = load("digits", seed, progress=False)
    cfg = TrainCfg(**{**CONFIG["train"], **RECIPES[recipe], "seed": seed})
    method = "natural" if recipe == "natural" else "at"
    fit(net, data, cfg, method, device="cpu", watched=1, progress=False)
    return net.eval().to(memory_format=torch.contiguous_format).requires_grad_(False), data


def points(data, seed: int):
    "1,000 images of the whole set, training images included: agreement is no matter of fairness"
    parts = (data.train, data.val, data.test)
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    draw = torch.Generator().manual_seed(seed)
    idx = torch.randperm(len(x), generator=draw)[: CONFIG["points"]]
    return x[idx].float() / 255, y[idx]


def theirs(net, x, y, eps: float, attacks: list, seed: int = 0):
    "Final points of attacks of pyautoattack, with the settings of its standard version"
    from pyautoattack import AutoAttack

    judge = AutoAttack(net, eps=eps, norm="Linf", seed=seed, version="custom", attacks=attacks)
    judge.apgd.n_restarts = judge.apgd_targeted.n_restarts = 1
    judge.apgd_targeted.n_target_classes = CONFIG["targets"]
    return judge.run_standard_evaluation(x, y, batch_size=len(x))[0]


def attacked(net, x, y, eps: float, wrong: dict):
    "Name and final points of every attack, ours and theirs; `wrong` fills up with the verdicts"
    import foolbox as fb

    judge, gen = fb.PyTorchModel(net, bounds=(0, 1)), torch.Generator().manual_seed
    k = CONFIG["steps"]
    pgd = fb.attacks.LinfPGD(rel_stepsize=2.5 / k, steps=k, random_start=False)
    yield "fgsm", lambda: ours.fgsm(net, x, y, eps)
    yield "foolbox fgsm", lambda: fb.attacks.FGSM()(judge, x, y, epsilons=eps)[1]
    yield "pgd", lambda: ours.pgd(net, x, y, eps, k, random_start=False, keep="last")
    yield "foolbox pgd", lambda: pgd(judge, x, y, epsilons=eps)[1]
    yield "apgd-ce", lambda: ours.apgd(net, x, y, eps, generator=gen(0))
    yield "pyautoattack apgd-ce", lambda: theirs(net, x, y, eps, ["apgd-ce"])
    yield "pyautoattack apgd-ce, other seed", lambda: theirs(net, x, y, eps, ["apgd-ce"], 1)
    yield "apgd-t", lambda: ours.apgd(net, x, y, eps, targets=CONFIG["targets"], generator=gen(0))
    yield "pyautoattack apgd-t", lambda: theirs(net, x, y, eps, ["apgd-t"])
    left = ~(wrong["pyautoattack apgd-ce"] | wrong["pyautoattack apgd-t"])
    yield (
        "pyautoattack fab-t, square",
        lambda: x.masked_scatter(
            left.view(-1, 1, 1, 1), theirs(net, x[left], y[left], eps, ["fab-t", "square"])
        ),
    )


def one_net(recipe: str, seed: int) -> dict:
    "Which points each attack breaks, and the counts of every pair"
    net, data = trained(recipe, seed)
    (x, y), eps = points(data, seed), CONFIG["eps"][recipe]
    wrong, seconds = {"clean": net(x).argmax(1) != y}, {}
    for name, points_of in attacked(net, x, y, eps, wrong):
        start = time.time()
        z = points_of()
        seconds[name] = round(time.time() - start, 1)
        out = max((z - x).abs().max().item() - eps, -z.min().item(), z.max().item() - 1)
        assert out < 1e-6, f"{name} leaves the ball or the range by {out}"
        wrong[name] = net(z).argmax(1) != y
        print(f"{recipe} {seed} {name}: {wrong[name].sum()} broken, {seconds[name]} s", flush=True)
    wrong["worst"] = wrong["apgd-ce"] | wrong["apgd-t"]  # no FAB and no Square in ours
    # the standard version is these four, each on the points that the ones before it left
    parts = [wrong[f"pyautoattack {a}"] for a in ("apgd-ce", "apgd-t", "fab-t, square")]
    wrong["pyautoattack standard"] = torch.stack(parts).any(0)
    counts = {}
    for a, b in CONFIG["pairs"]:
        u, v = wrong[a], wrong[b]
        parts = dict(both=u & v, only_first=u & ~v, only_second=v & ~u, neither=~(u | v))
        counts[f"{a} | {b}"] = {k: p.sum().item() for k, p in parts.items()}
    return dict(
        recipe=recipe,
        seed=seed,
        eps=eps,
        n=len(y),
        seconds=seconds,
        counts=counts,
        broken={k: v.sum().item() for k, v in wrong.items()},
        flags={k: pack_flags(v.numpy()) for k, v in wrong.items()},
    )


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--out", type=Path, default=ROOT / "nbs/results/attack_agreement.json")
    ap.add_argument("--nets", type=int, default=len(CONFIG["nets"]), help="the first so many")
    args = ap.parse_args()
    if args.out.exists():
        record = json.loads(args.out.read_text())
        if record["config"] != CONFIG:
            sys.exit(f"{args.out} was made with another configuration: move it away")
    else:
        import importlib.metadata as meta

        origin = {**provenance(), **{p: meta.version(p) for p in ("foolbox", "pyautoattack")}}
        record = dict(
            schema=1,
            kind="attack agreement",
            provenance=origin,
            config=CONFIG,
            seconds=0.0,
            nets=[],
        )
    for seed, recipe in itertools.islice(enumerate(CONFIG["nets"]), len(record["nets"]), args.nets):
        start = time.time()
        record["nets"].append(one_net(recipe, seed))
        record["seconds"] = round(record["seconds"] + time.time() - start, 1)
        write_aside(args.out, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
