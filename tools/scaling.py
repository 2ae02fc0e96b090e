#!/usr/bin/env python3
"""The measured cases of chapter 25, on the embedded digits.

    python tools/scaling.py ranks    one run in one and in two processes   ->
    nbs/results/scaling.json
    python tools/scaling.py ray      a grid on two Ray nodes, one is lost  ->
    nbs/results/ray_grid.json

`ranks` calls the command line, so that what is timed is what a reader types; `ray` needs the extra
`ray`. Both take a few minutes on two cores, which should have nothing else to do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fairmix_nb.compare import compare, preset
from fairmix_nb.methods import Pipeline
from fairmix_nb.records import provenance, write_aside
from fairmix_nb.train import fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"
TRAIN = ["-m", "fairmix_nb.train"]
WAYS = {  # words after `python`, threads
    "one process, one thread": (TRAIN, 1),
    "one process, two threads": (TRAIN, 2),
    "launch, two processes": ([*TRAIN, "--procs", "2"], 2),
    "torchrun, two processes": (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *TRAIN],
        1,
    ),
}
WORK = {64: 10, 512: 20}  # batch -> epochs


def one_command(words, threads, batch, epochs):
    "Seconds of the whole command and of its training alone, and its record."
    with tempfile.TemporaryDirectory() as top:
        argv = [
            "--model",
            "small_cnn",
            "--eps",
            "0.1",
            "--lr",
            "3e-3",
            "--batch",
            batch,
            "--epochs",
            epochs,
        ]
        argv += ["--device", "cpu", "--timeout", "60", "--out", f"{top}/run"]
        env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT))
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *words, *map(str, argv)],
            env=env,
            check=True,
            capture_output=True,
            timeout=300,
        )
        wall = time.perf_counter() - start
        record = json.loads(Path(top, "run", "record.json").read_text())
    return dict(
        wall=round(wall, 2),
        training=record["seconds"],
        loss=record["curves"][-1]["loss"],
        ranks=(record.get("ranks") or dict(size=1))["size"],
        n=record["data"]["sizes"]["train"],
    )


def ranks(rounds=3):
    """Every way in every round, so that a slow minute meets all of them; the record after each
    round."""
    found = {}
    for done in range(1, rounds + 1):
        for batch, epochs in WORK.items():
            for name, (words, threads) in WAYS.items():
                found.setdefault((name, batch), []).append(
                    one_command(words, threads, batch, epochs)
                )
        note = "training: the epochs alone; wall: the whole command"
        yield dict(
            schema=1,
            kind="scaling",
            provenance=ORIGIN,
            data="digits",
            model="small_cnn",
            rounds=done,
            note=note,
            load_average=os.getloadavg()[0],
            rows=[row(name, batch, runs) for (name, batch), runs in found.items()],
        )


def row(name, batch, runs):
    "Medians and spread of a way."
    speed = [r["n"] * WORK[batch] / r["training"] for r in runs]
    middle = {k: statistics.median(r[k] for r in runs) for k in ("wall", "training")}
    return dict(
        way=name,
        batch=batch,
        epochs=WORK[batch],
        processes=runs[0]["ranks"],
        **middle,
        images_per_second=round(statistics.median(speed)),
        least=round(min(speed)),
        most=round(max(speed)),
        losses=sorted({r["loss"] for r in runs}),
    )


def logged(name, pipeline, folder):
    "A method that notes each of its attempts, and the node it runs on."

    def method(model, data, cfg, **kw):
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        start = dict(
            method=name,
            seed=cfg.seed,
            node=node,
            at=time.time(),
            epochs_before=(kw.get("resume_from") or {}).get("epoch", 0),
        )
        if folder:
            Path(folder, f"{name}-{cfg.seed}-{time.time_ns()}.json").write_text(json.dumps(start))
        return fit(model, data, cfg, Pipeline(pipeline), **kw)

    method.__name__ = name
    return method


def methods(folder=None):
    return (
        logged("natural", (), folder),
        logged("at", ("attack",), folder),
        logged("attack_mix", ("attack", "mix"), folder),
    )


def attempts(folder):
    return sorted(
        (json.loads(p.read_text()) for p in Path(folder).glob("*.json")), key=lambda a: a["at"]
    )


def without_clock(record):
    "What two records of the same runs must agree in."
    drop = ("seconds", "provenance")
    return [{k: v for k, v in r.items() if k not in drop} for r in record["runs"]]


def remove_in_the_middle(cluster, node, node_id, log, out, notes):
    "Remove the node once its second run has a checkpoint, but not its record."
    deadline = time.time() + 240
    while time.time() < deadline and "removed" not in notes:
        mine = [a for a in attempts(log) if a["node"] == node_id]
        if len(mine) >= 2:
            run = out / f"{mine[-1]['method']}-{mine[-1]['seed']}"
            if (run / "last.pt").exists():
                done = [
                    p.parent.name
                    for p in out.glob("*/record.json")
                    if "attacks" in json.loads(p.read_text())
                ]
                if run.name not in done:
                    notes["removed"] = time.time()
                    cluster.remove_node(node, allow_graceful=False)
                    notes.update(running=run.name, finished=sorted(done))
        time.sleep(0.02)


def ray_grid(epochs=30, seeds=(0, 1, 2)):
    "The grid one after another, and on two nodes of which one is lost; the record."
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cfg = preset("digits", epochs)[1]
    start = time.time()
    alone = compare("digits", methods(), seeds, cfg=cfg, progress=False).record
    alone_seconds = time.time() - start
    start = time.time()
    cluster = Cluster(
        initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False)
    )
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = [n["NodeID"] for n in ray.nodes()]
        notes, ready = {}, time.time()
        with tempfile.TemporaryDirectory() as top:
            log, out = Path(top, "log"), Path(top, "run")
            log.mkdir()
            watcher = threading.Thread(
                target=remove_in_the_middle,
                args=(cluster, node, node.node_id, log, out, notes),
                daemon=True,
            )
            watcher.start()
            found = compare(
                "digits", methods(log), seeds, cfg=cfg, out=out, workers="ray", progress=False
            ).record
            ended, tried = time.time(), attempts(log)
            watcher.join(10)
        alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    finally:
        ray.shutdown()
        cluster.shutdown()
    short = {n: f"node {i}" for i, n in enumerate(sorted(nodes, key=lambda n: n == node.node_id))}
    runs = [f"{r['method']}-{r['seed']}" for r in found["runs"]]
    log = [
        dict(
            run=f"{a['method']}-{a['seed']}",
            node=short[a["node"]],
            second=round(a["at"] - ready, 2),
            epochs_before=a["epochs_before"],
        )
        for a in tried
    ]
    return dict(
        schema=1,
        kind="ray_grid",
        provenance=dict(provenance(), ray=ray.__version__),
        data="digits",
        model="small_cnn",
        epochs=epochs,
        cluster=dict(nodes=len(nodes), cpus_per_node=1, start_seconds=round(ready - start, 2)),
        alive_at_the_end=len(alive),
        removed=dict(
            node="node 1",
            second=round(notes["removed"] - ready, 2),
            running=notes["running"],
            finished=notes["finished"],
        ),
        log=log,
        attempts={run: sum(a["run"] == run for a in log) for run in runs},
        runs=runs,
        equal_to_sequential=without_clock(found) == without_clock(alone),
        seconds=dict(sequential=round(alone_seconds, 2), ray=round(ended - ready, 2)),
    )


if __name__ == "__main__":
    ORIGIN = provenance()  # before the records make the tree dirty
    name, make = dict(ranks=("scaling", ranks), ray=("ray_grid", lambda: [ray_grid()]))[sys.argv[1]]
    for record in make():
        print(
            write_aside(RESULTS / f"{name}.json", json.dumps(record, indent=1) + "\n"), flush=True
        )
