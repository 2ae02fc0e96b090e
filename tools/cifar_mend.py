#!/usr/bin/env python3
"""Mend and judge the CIFAR-10 networks of nbs/19_mend.ipynb, the bases of tools/cifar_cures.py.

    python tools/cifar_mend.py --seeds 0     # nbs/networks/resnet20-s0.pt -> nbs/results/cifar_mend

Matrices of margins stay in runs/mend/NAME (not tracked): an interrupted one goes on from its last
batch. 3,000 training images, 300 a class, were held out of training; offsets are chosen on them.
The record keeps the matrices in half precision, so that whoever reads it can choose other offsets,
and is written again as more of it is known. `--data` names a folder with train/ and test/ of class
folders, or 'cifar10' (torchvision).
"""

import argparse
import base64
import json
import time
from pathlib import Path

import numpy as np
import torch

from fairmix_nb.attacks import Threat
from fairmix_nb.data import load, spread_subset
from fairmix_nb.mend import Front, margins, with_offsets
from fairmix_nb.records import SCHEMA, provenance, write_aside
from fairmix_nb.report import attack_errors, outcome_of
from fairmix_nb.runs import load_model

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT, EPS = 300, 8 / 255  # as in tools/cifar_cures.py
# name -> part, images, radius in units of EPS, steps: in the order of their worth
MATRICES = dict(
    val=("val", 3000, 1, 10),
    test=("test", 2000, 1, 10),
    val_half=("val", 500, 0.5, 10),
    train=("train", 500, 1, 10),
    test_half=("test", 500, 0.5, 10),
)
JUDGES = {"apgd-t": 150, "autoattack": 30}  # attack -> test images


def packed(matrix):
    return base64.b64encode(matrix.astype(np.float16).tobytes()).decode()


def matrices(net, data, out, names):
    "Matrices, each with its labels."
    for name in names:
        part, n, times, steps = MATRICES[name]
        images, folder = spread_subset(getattr(data, part), n), out / name
        kw = dict(out=folder, resume=folder.exists(), steps=steps)
        found = margins(net, images.floats(), images.y, Threat(times * EPS), **kw)
        clean = margins(net, images.floats(), images.y, Threat(0.0)) if name == "test" else None
        print(f"{time.strftime('%H:%M:%S')} {out.name} {name} {found.shape}", flush=True)
        yield (
            name,
            dict(
                part=part,
                eps=times * EPS,
                steps=steps,
                y=images.y.tolist(),
                margins=packed(found),
                **({} if clean is None else dict(clean=packed(clean))),
            ),
        )


def choices(front):
    "Offsets that a reader may want to try first."
    average = front.risks(np.zeros(len(front.fair))).mean()
    found = {
        "as trained": np.zeros(len(front.fair)),
        "best average": front.plain,
        "the same average": front.within(average),
        "one point of average": front.within(average + 0.01),
        "best worst class": front.fair,
    }
    return {name: b.round(4).tolist() for name, b in found.items()}


def judged(net, offsets, data, done):
    "The network before and after, under attacks that know nothing of a matrix."
    for attack, n in JUDGES.items():
        images = spread_subset(spread_subset(data.test, MATRICES["test"][1]), n)
        for name, model in {"before": net, "after": with_offsets(net, offsets)}.items():
            if f"{attack} {name}" in done:
                continue
            wrong = attack_errors(model, images, Threat(EPS), ("clean", attack))
            found = outcome_of(wrong, images, EPS)
            print(
                f"{time.strftime('%H:%M:%S')} {attack} {name} {found.risks().round(3)}", flush=True
            )
            yield f"{attack} {name}", found.record


def judge(data, network, out, path, origin):
    "The record of a trained network, written again as more of it is known."
    net, content = load_model(network)
    if content["data"] != data.digest():
        raise SystemExit(f"{network} was trained on data {content['data']}, got {data.digest()}")
    keys = ("cfg", "data", "versions", "seconds", "epoch", "curves")
    record = dict(schema=SCHEMA, kind="cifar10 mended", name=out.name, provenance=origin)
    record.update(classes=list(data.train.classes), trained={k: content[k] for k in keys})
    record.update(matrices={}, judged={})
    if path.exists():
        record["judged"] = json.loads(path.read_text())["judged"]
    first, *others = MATRICES
    [(_, found)] = matrices(net, data, out, [first])
    values = np.frombuffer(base64.b64decode(found["margins"]), np.float16).reshape(-1, 10)
    front = Front(values.astype(float), np.array(found["y"]))
    record.update(offsets=front.fair.round(5).tolist(), choices=choices(front))
    record["matrices"][first] = found
    for name, found in matrices(net, data, out, others[:1]):
        record["matrices"][name] = found
        write_aside(path, json.dumps(record))
    for name, found in judged(net, front.fair, data, record["judged"]):
        record["judged"][name] = found
        write_aside(path, json.dumps(record))
    for name, found in matrices(net, data, out, others[1:]):
        record["matrices"][name] = found
        write_aside(path, json.dumps(record))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--data", default="cifar10", help="'cifar10' or a folder")
    p.add_argument("--networks", type=Path, default=ROOT / "nbs" / "networks")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "mend")
    p.add_argument("--records", type=Path, default=ROOT / "nbs" / "results" / "cifar_mend")
    args = p.parse_args()
    torch.set_num_threads(1)
    origin = provenance("cpu")
    args.records.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        data = load(args.data, seed, val_per_class=HELD_OUT, progress=False)
        name = f"resnet20-s{seed}"
        network, record = args.networks / f"{name}.pt", args.records / f"{name}.json"
        judge(data, network, args.runs / name, record, origin)


if __name__ == "__main__":
    main()
