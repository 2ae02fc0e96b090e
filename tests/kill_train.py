"""Kill a training run at random moments, resume it, compare the bits with a run that was left
alone.

    python tests/kill_train.py 20 nbs/results/kill_resume.json

One process loads PyTorch and the data; every run is a child of it, killed with SIGKILL, which no
program can catch. Every other kill is aimed at a place inside the writing of a checkpoint.
"""

import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from fairmix_nb import data as D
from fairmix_nb import runs as R
from fairmix_nb import train as T
from fairmix_nb.methods import Pipeline, TrainCfg, describe
from fairmix_nb.records import digest, provenance, write_aside

# every stream is drawn from, BatchNorm and Adam have memory, the learning rate drops
METHOD = Pipeline(("attack", "mix"))
CFG = TrainCfg(
    attack="pgd",
    steps=2,
    eps=0.1,
    epochs=24,
    batch=64,
    lr=3e-3,
    augment="crop_flip",
    schedule=("step", 9, 0.3),
    smoothing=0.1,
)
PHASES = ("before", "steps", "watching", "checkpoint", "record", "done")
AIMS = (
    "half of the checkpoint written",
    "before it is flushed",
    "before last.pt moves",
    "before the new one is renamed",
    "before the folder is flushed",
    "half of the record written",
)


def small_data():
    whole = D.load("digits", seed=0, per_class=20, test_per_class=5, progress=False)
    return replace(whole, val=whole.val.subset(torch.arange(20)))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def watched_by(phase):
    "Tell the parent, through shared memory, what the child is doing."

    def tell(module, name, code):
        inner = getattr(module, name)

        def outer(*args, **kw):
            was, phase[0] = phase[0], code
            try:
                return inner(*args, **kw)
            finally:
                phase[0] = was

        setattr(module, name, outer)

    tell(T, "run_epoch", 1)
    tell(T, "watch", 2)
    tell(R, "save_state", 3)
    tell(R.Keeper, "save_record", 4)


def aim_at(place, saves):
    "Die at `place` of the checkpoint number `saves` from now."
    count, save, replace_, write = [0], R.save_state, os.replace, R.write_aside

    def counted(*args):
        count[0] += 1
        return save(*args)

    def half(path, content):
        path, target = Path(path), ("new.pt", "record.json")[place == 5]
        if count[0] == saves and path.name == target and place in (0, 5):
            content = content.encode() if isinstance(content, str) else content
            path.with_name(f"{path.name}.tmp-{os.getpid()}").write_bytes(
                content[: len(content) // 2]
            )
            die()
        if count[0] == saves and path.name == target and place == 1:
            os.fsync = lambda fd: die()
        return write(path, content)

    def renamed(a, b):
        names = Path(a).name, Path(b).name
        if count[0] == saves and names == {
            2: ("last.pt", "previous.pt"),
            3: ("new.pt", "last.pt"),
        }.get(place):
            die()
        replace_(a, b)
        if count[0] == saves and place == 4 and names == ("new.pt", "last.pt"):
            die()

    R.save_state, R.write_aside, os.replace = counted, half, renamed


def child(cfg, folder, data, phase, aim=None, saves=1):
    "Train, or go on, in a process of its own; its id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        warnings.simplefilter("ignore")
        watched_by(phase)
        if aim is not None:
            aim_at(aim, saves)
        quiet = dict(device="cpu", progress=False)
        if R.checkpoints(folder):
            T.resume(folder, network(), data, cfg, METHOD, **quiet)
        else:
            T.fit(network(), data, cfg, METHOD, out=folder, **quiet)
        code, phase[0] = 0, 5
    finally:
        os._exit(code)


def result(folder):
    "Digest of all that a run leaves but its clock."
    found = R.read_checkpoint(Path(folder) / "last.pt")
    return digest({k: v for k, v in found.items() if k != "seconds"}), found["epoch"]


def state_of(folder):
    "What a killed run left, and what `resume` would take."
    files = (
        sorted(p.name.split("-")[0] for p in Path(folder).iterdir())
        if Path(folder).exists()
        else []
    )
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            epoch, taken = R.load_checkpoint(folder)["epoch"], "last.pt"
        except FileNotFoundError:
            epoch, taken = 0, "none"
    if notes:
        taken = str(notes[0].message).split("/")[-1].split(",")[0]
    return dict(files=files, epoch=epoch, taken=taken)


def kill_and_resume(cfg, kills, base, seed=0):
    "Rows of the log, and per finished run whether its bits equal those of the run left alone."
    rng, data, phase = random.Random(seed), small_data(), mmap.mmap(-1, 1)
    torch.set_num_threads(1)
    whole = Path(base) / "whole"
    start = time.perf_counter()
    assert os.waitpid(child(cfg, whole, data, phase), 0)[1] == 0
    each, want = (time.perf_counter() - start) / cfg.epochs, result(whole)
    rows, equal, folder = [], [], Path(base) / "run-0"
    while len(rows) < kills or len(equal) <= len({r["run"] for r in rows}) - 1:
        aim = (len(rows) // 2) % len(AIMS) if len(rows) % 2 and len(rows) < kills else None
        phase[0] = 0
        pid = child(cfg, folder, data, phase, aim, rng.randint(1, 2))
        if aim is None and len(rows) < kills:
            time.sleep(rng.uniform(0, 6 * each))
            seen = PHASES[phase[0]]
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            where = seen if aim is None else AIMS[aim]
            rows.append(
                dict(
                    run=len(equal),
                    how="random" if aim is None else "aimed",
                    where=where,
                    **state_of(folder),
                )
            )
        else:
            assert status == 0, status
            equal.append(result(folder) == want)
            folder = Path(base) / f"run-{len(equal)}"
    return rows, equal, want


def main(kills, path=None):
    start, cfg = time.perf_counter(), replace(CFG, epochs=24 if kills > 5 else 8)
    with tempfile.TemporaryDirectory() as base:
        rows, equal, (digest, epochs) = kill_and_resume(cfg, kills, base)
    record = dict(
        schema=1,
        kind="kill_resume",
        provenance=provenance("cpu"),
        cfg=asdict(cfg),
        method=describe(METHOD),
        epochs=epochs,
        seconds=round(time.perf_counter() - start, 1),
        digest=digest,
        kills=rows,
        equal=equal,
    )
    if path:
        write_aside(path, json.dumps(record, indent=1) + "\n")
    print(json.dumps(dict(kills=len(rows), runs=len(equal), equal=all(equal))))
    return all(equal)


if __name__ == "__main__":
    sys.exit(not main(int(sys.argv[1]), *sys.argv[2:]))
