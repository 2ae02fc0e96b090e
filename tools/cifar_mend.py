#!/usr/bin/env python3
"""Train the CIFAR-10 networks that chapter 19 mends: those that are missing.

    python tools/cifar_mend.py --train --seeds 1 --epochs 6     # ResNet-20, N-FGSM at 8/255

A network stays in runs/mend/NAME (not tracked; an interrupted run goes on from its last epoch).
3,000 training images, 300 a class, are held out of training: offsets are chosen on them. `--data`
names a folder with train/ and test/ of class folders, or 'cifar10' (torchvision).
"""

import argparse
import time
from pathlib import Path

import torch

from fairmix_nb.data import load
from fairmix_nb.methods import FAST, TrainCfg
from fairmix_nb.models import build
from fairmix_nb.runs import checkpoints
from fairmix_nb.train import fit, resume

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 300  # training images a class


def recipe(epochs, seed):
    return TrainCfg(**FAST | dict(epochs=epochs), eps=8 / 255, attack="nfgsm", seed=seed)


def train(data, epochs, seed, out):
    "Train a network, or go on from its last checkpoint."
    cfg, model = recipe(epochs, seed), build("resnet20", data.train.n_cls, 3, seed)

    def on_epoch(row):
        told = {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
        print(f"{time.strftime('%H:%M:%S')} {out.name} epoch {row['epoch']} {told}", flush=True)

    kw = dict(on_epoch=on_epoch, progress=False)
    if checkpoints(out):
        return resume(out, model, data, cfg, "at", **kw)
    return fit(model, data, cfg, "at", out=out, **kw)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--train", action="store_true", help="train what is missing")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=15)
    p.add_argument("--data", default="cifar10", help="'cifar10' or a folder")
    p.add_argument("--runs", type=Path, default=ROOT / "runs" / "mend")
    args = p.parse_args()
    torch.set_num_threads(1)
    data = load(args.data, 0, val_per_class=HELD_OUT, progress=False)
    for seed in range(args.seeds):
        train(data, args.epochs, seed, args.runs / f"nfgsm{args.epochs}-s{seed}")


if __name__ == "__main__":
    main()
