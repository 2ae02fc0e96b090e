#!/usr/bin/env python3
"""Execute the notebooks and store their outputs, or check that the stored outputs are current.

    python tools/run_notebooks.py [--check] [--flags "slow cuda"] [nbs/01_gaussian.ipynb ...]
    python tools/run_notebooks.py --check --slowest 20         # and the cells that take longest

nbdev's directives are obeyed: a cell marked `#| eval: false`, or with a flag of `tst_flags` that
`--flags` does not name, is not run and keeps the outputs it has. Two runs give identical files:
one thread, cleaned by nbdev, and no widget state (a reader sees the static picture beside each
widget). `--check` writes nothing and exits 1 where an output differs: text must agree, its
numbers to 1 in 1,000; a cell marked `#| structure` (results that vary with the processor) may
differ in its numbers; of pictures and HTML only the kind is compared.
"""

import argparse
import copy
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from book import directives
from execnb.nbio import dict2nb, read_nb, write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbformat import from_dict

WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|[-+]?\.\d+(?:[eE][-+]?\d+)?")


class Client(NotebookClient):
    "Runs only the cells that nbdev_test would run."

    skip: frozenset = frozenset()
    took: list = []

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        found = directives(cell)
        if (
            cell.cell_type != "code"
            or found.get("eval", "").lower() == "false"
            or self.skip & found.keys()
        ):
            return cell
        before = cpu_seconds(self.km.provisioner.pid)
        done = await super().async_execute_cell(cell, cell_index, **kwargs)
        spent = cpu_seconds(self.km.provisioner.pid) - before
        self.took.append((spent, cell_index, cell.source))
        return done


def cpu_seconds(pid):
    "Processor time of a process and what it has waited for; elapsed time without /proc."
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    except OSError:
        return time.perf_counter()
    return sum(map(int, numbers)) / os.sysconf("SC_CLK_TCK")


def without_widgets(cell):
    "Widgets live only in a running kernel; stored they would show as an error."
    if cell["cell_type"] == "code":
        cell["outputs"] = [o for o in cell["outputs"] if WIDGET not in o.get("data", {})]


def execute(path: Path, skip: frozenset, took: list | None = None):
    "A cleaned, executed copy of the notebook `path`; seconds, number and text of a cell in `took`."
    nb = from_dict(copy.deepcopy(dict(read_nb(path))))
    for cell in nb.cells:
        cell.pop("idx_", None)
    client = Client(
        nb,
        timeout=1200,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.skip, client.took = skip, [] if took is None else took
    client.execute()
    for key in ("language_info", "widgets"):
        nb.metadata.pop(key, None)
    for cell in nb.cells:
        without_widgets(cell)
    nb = dict2nb(nb)
    clean_nb(
        nb,
        clean_ids=True,
        allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys.split(),
    )
    return nb


def shape_of(output) -> tuple:
    return output["output_type"], output.get("name"), tuple(sorted(output.get("data", {})))


def text_of(output) -> str:
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(text)


def differs(old: str, new: str, loose: bool) -> bool:
    words, others = NUMBER.sub("#", old), NUMBER.sub("#", new)
    if loose:  # a longer number moves its neighbours
        return "".join(words.split()) != "".join(others.split())
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new))
    return words != others or any(
        abs(float(a) - float(b)) > 1e-3 * max(1e-3, abs(float(a))) for a, b in pairs
    )


def differences(old, new) -> list[str]:
    "Where the outputs of two versions of a notebook disagree."
    out = []
    for i, (a, b) in enumerate(zip(old["cells"], new["cells"])):
        if a["cell_type"] != "code":
            continue
        loose = "structure" in directives(a)
        if [shape_of(o) for o in a["outputs"]] != [shape_of(o) for o in b["outputs"]]:
            out.append(
                f"cell {i}: stored {[shape_of(o) for o in a['outputs']]}, now {[shape_of(o) for o in b['outputs']]}"  # noqa: E501
            )
        else:
            for o, n in zip(a["outputs"], b["outputs"]):
                picture = any(
                    kind.startswith("image/") or kind == "text/html" for kind in o.get("data", {})
                )
                if not picture and differs(text_of(o), text_of(n), loose):
                    out.append(f"cell {i}: stored {text_of(o)[:300]!r}, now {text_of(n)[:300]!r}")
    return out


def handle(path: Path, skip: frozenset, check: bool, slowest: list) -> bool:
    start, took = time.time(), []
    try:
        new = execute(path, skip, took)
    except CellExecutionError as e:
        print(f"{path.name}: {e}", file=sys.stderr)
        return False
    found = differences(read_nb(path), new) if check else []
    for line in found:
        print(f"{path.name}: {line}", file=sys.stderr)
    if not check:
        aside = path.with_suffix(".tmp")
        write_nb(new, aside)
        os.replace(aside, path)
    spent = sum(seconds for seconds, *_ in took)
    slowest += [(seconds, path.stem, *rest) for seconds, *rest in took]
    said = f"{time.time() - start:.0f} s, {spent:.0f} s of processor time"
    print(f"{path.name}: {'differs' if found else 'ok'}, {said}", flush=True)
    return not found


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("notebooks", nargs="*", type=Path)
    ap.add_argument("--check", action="store_true", help="compare, write nothing")
    ap.add_argument("--flags", default="", help="flags whose cells are run too")
    ap.add_argument("--slowest", type=int, default=0, metavar="N", help="list the N slowest cells")
    ap.add_argument("--workers", type=int, default=2, help="notebooks run at a time")
    args = ap.parse_args()
    cfg = get_config()
    root = Path(cfg.config_path)
    paths = args.notebooks or sorted((root / "nbs").glob("*.ipynb"))
    if missing := [str(p) for p in paths if not p.is_file()]:
        ap.error("no such notebook: " + ", ".join(missing))
    os.environ.update(
        OMP_NUM_THREADS="1",
        TQDM_DISABLE="1",
        PYTHONHASHSEED="0",
        PYTHONPATH=os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    )
    skip = frozenset(cfg.tst_flags.split()) - set(args.flags.split())
    slowest = []
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = pool.map(lambda p: handle(p.resolve(), skip, args.check, slowest), paths)
        right = all(list(jobs))
    for seconds, name, i, text in sorted(slowest, reverse=True)[: args.slowest]:
        first = next(line for line in text.splitlines() if line.strip() and line[:2] != "#|")
        print(f"{seconds:6.1f} s  {name} [{i}]  {first[:70]}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
