#!/usr/bin/env python3
"""Audit and train 25 architectures of torchvision, none of which knows this package.

    python tools/architectures.py [nbs/results/architectures.json]     goes on where it was

Each network has random weights and running statistics that are not the initial ones. `audit` runs
on four noisy images and is compared with a plain reference: the network itself, image by image, in
evaluation mode, under FGSM by `loss.backward()`. `fit` trains an epoch of two steps. What is
refused must be refused with a sentence, before any work."""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fairmix_nb.audit import audit
from fairmix_nb.data import Data, ImageSet
from fairmix_nb.methods import TrainCfg
from fairmix_nb.models import LogitsOnly, as_attacked, n_params
from fairmix_nb.records import SCHEMA, provenance, write_aside
from fairmix_nb.train import fit

NAMES = """squeezenet1_0 squeezenet1_1 resnet18 shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small
mobilenet_v3_large mnasnet0_5 regnet_x_400mf regnet_y_400mf efficientnet_b0 googlenet densenet121
inception_v3 maxvit_t swin_t swin_v2_t convnext_tiny resnet50 resnext50_32x4d efficientnet_v2_s
densenet169 vit_b_16 alexnet vgg11_bn""".split()
SIDES = dict(inception_v3=299)  # its auxiliary head fits no smaller image
QUIET = dict(progress=False, device="cpu")


def network(name):
    "Random weights; running statistics far from 0 and 1."
    words = dict(weights=None, num_classes=10)
    if name in ("googlenet", "inception_v3"):
        words["init_weights"] = False
    if name == "vit_b_16":
        words["image_size"] = 64
    if name == "maxvit_t":
        return torchvision.models.MaxVit(
            input_size=(64, 64), stem_channels=32, partition_size=2, block_channels=[32, 64],
            block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.1, num_classes=10,
        ).eval()  # fmt: skip
    net = torchvision.models.get_model(name, **words)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1), m.running_var.uniform_(0.5, 1.5)
    if name == "vit_b_16":
        nn.init.normal_(net.heads.head.weight, std=0.02)  # zero as it comes: no logits to compare
    return net.eval()


def images(side, n=12):
    "Noise, of ten classes."
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return ImageSet(x, torch.arange(n) % 10, tuple("abcdefghij"))


def reference(net, x, y, eps):
    "Wrong or not, clean and under FGSM: one image at a time, nothing folded, nothing batched."
    found = []
    for image, label in zip(x, y):
        z = image[None].clone().requires_grad_()
        F.cross_entropy(net(z), label[None]).backward()
        moved = (z + eps * z.grad.sign()).clamp(0, 1).detach()
        found.append([net(v).argmax(1).item() != label.item() for v in (image[None], moved)])
    return np.array(found).T


def tried(do):
    "'ran', or the sentence of a refusal; anything else is a crash."
    try:
        do()
        return "ran"
    except ValueError as e:
        return f"refused: {e}"


def examine(name):
    "One row: what the audit made of a network, whether it agrees, and whether it can be trained."
    torch.manual_seed(0)
    start, net, side, eps = time.time(), network(name), SIDES.get(name, 64), 2 / 255
    data, row = images(side), dict(name=name, parameters=n_params(net))
    few = data.subset(torch.arange(4))
    x, y = few.floats(), few.y
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ready = as_attacked(net, x)
        left = sum(isinstance(m, nn.BatchNorm2d) for m in ready.modules())
        had = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        with torch.no_grad():
            plain, fast = net(x), ready(x)
        row.update(folded=had - left, norms=had, order="last" if ready.channels_last else "first")
        row["difference"] = ((plain - fast).abs().max() / plain.abs().max()).item()
        report = []
        words = dict(attacks=("clean", "fgsm", "pgd-3"), diagnose=4, batch=4, **QUIET)
        row["audit"] = tried(lambda: report.append(audit(net, few, eps, **words)))
        order = np.argsort(y.numpy(), kind="stable")
        want = reference(net, x, y, eps)[:, order]
        row["agrees"] = all(
            (report[0].flags(a, raw=True) == w).all() for a, w in zip(("clean", "fgsm"), want)
        )
    row["notes"] = sorted({str(w.message) for w in said})
    cfg = TrainCfg(eps=eps, epochs=1, batch=6, attack="fgsm", optimizer="sgd", lr=1e-4)
    whole = Data(data, few, few, "noise", 0, dict(rule="by hand"))
    row["fit"] = tried(lambda: fit(net, whole, cfg, watched=1, **QUIET))
    if row["fit"] != "ran":
        row["with LogitsOnly"] = tried(lambda: fit(LogitsOnly(net), whole, cfg, watched=1, **QUIET))
    return row | dict(seconds=round(time.time() - start, 1))


def main(path="nbs/results/architectures.json"):
    torch.set_num_threads(1)
    path, origin = Path(path), provenance("cpu")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in NAMES:
        if name in [r["name"] for r in rows]:
            continue
        rows.append(examine(name))
        print({k: v for k, v in rows[-1].items() if k != "notes"}, file=sys.stderr, flush=True)
        record = dict(schema=SCHEMA, kind="architectures", provenance=origin, rows=rows)
        write_aside(path, json.dumps(record, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
