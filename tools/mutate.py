#!/usr/bin/env python3
"""Plant a wrong formula in a copy of each function and ask the notebook whether it notices.

    python tools/mutate.py [--sample 40] [--record nbs/results/mutation.json] [gaussian theory ...]

A mutant changes one thing in one exported function: an operator, a comparison, a constant, a
dropped
root or sign, two swapped arguments, a minimum for a maximum, a check left out. The notebook's code
cells then run in one process until one fails. Cells before the change are run once for all mutants
and each mutant goes on from there in a fork of its own. Flagged cells are skipped, as in
nbdev_test.
"""

import argparse
import ast
import copy
import io
import json
import os
import random
import re
import resource
import signal
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import book  # noqa: E402

MODULES = ["gaussian", "mixup", "theory", "tempering", "synthetic", "attacks", "risk", "cures"]
BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = dict(
    min="max",
    max="min",
    amin="amax",
    amax="amin",
    nanmin="nanmax",
    nanmax="nanmin",
    minimum="maximum",
    maximum="minimum",
    argmin="argmax",
    argmax="argmin",
    clamp_min="clamp_max",
    clamp_max="clamp_min",
    any="all",
    all="any",
    sum="mean",
    mean="sum",
    floor="ceil",
    ceil="floor",
    sin="cos",
    cosh="sinh",
    sinh="cosh",
    zeros="ones",
    logical_or="logical_and",
    ppf="isf",
    isf="ppf",
    log="log1p",
    log1p="log",
    nanmean="nanmax",
    nansum="nanmax",
)
COMMUTE = {
    "two_sum",
    "two_prod",
    "maximum",
    "minimum",
    "hypot",
    "max",
    "min",
    "add",
    "multiply",
    "logaddexp",
    "isclose",
    "broadcast_shapes",
    "common_shape",
}
DROPPED = {"sqrt", "abs", "sign", "log", "exp", "square", "expm1"}


def changes(node) -> list:
    "The wrong versions of one node, as (words, replacement)."
    out = []
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        out.append(("operator", ast.BinOp(node.left, BINARY[type(node.op)](), node.right)))
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in COMPARE:
                ops = [*node.ops[:i], COMPARE[type(op)](), *node.ops[i + 1 :]]
                out.append(("comparison", ast.Compare(node.left, ops, node.comparators)))
    elif isinstance(node, ast.BoolOp):
        out.append(
            (
                "and/or",
                ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values),
            )
        )
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        out.append(("sign dropped", node.operand))
    elif isinstance(node, ast.IfExp):
        out.append(("branches swapped", ast.IfExp(node.test, node.orelse, node.body)))
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        out.append(("constant", ast.Constant(node.value + 1)))
        if node.value not in (0, 1):
            out.append(
                ("constant", ast.Constant(-node.value if node.value < 10 else node.value // 2))
            )
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        out.append(("constant", ast.Constant(not node.value)))
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in NAMES:
            func = copy.deepcopy(node.func)
            setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", NAMES[name])
            out.append((f"{name} -> {NAMES[name]}", ast.Call(func, node.args, node.keywords)))
        if name in DROPPED and (node.args or isinstance(node.func, ast.Attribute)):
            out.append((f"{name} dropped", node.args[0] if node.args else node.func.value))
        if (
            len(node.args) > 1
            and not any(isinstance(a, ast.Starred) for a in node.args[:2])
            and name not in COMMUTE | {"isinstance", "getattr", "hasattr"}
        ):
            out.append(
                (
                    "arguments swapped",
                    ast.Call(
                        node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords
                    ),
                )
            )
    elif isinstance(node, (ast.Expr, ast.Raise)) and not isinstance(
        getattr(node, "value", None), ast.Constant
    ):
        if isinstance(node, ast.Raise) or "_check" in ast.unparse(node):
            out.append(("check left out", ast.Pass()))
    return out


def inner(node):
    "Nodes of a function that compute something: no annotations, docstrings, messages."
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "msg", "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield node, field, child
                yield from inner(child)


def mutants(tree) -> list:
    "(function, source line, change, mutated source) of every single change in a cell's functions."
    found = []
    defined = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    for top in defined:
        for number, (_parent, _field, child) in enumerate(inner(top)):
            for kind, new in changes(child):
                before = ast.unparse(child)
                whole = copy.deepcopy(tree)
                twin = next(n for n in whole.body if getattr(n, "name", None) == top.name)
                above, name, old = list(inner(twin))[number]
                value = getattr(above, name)
                if isinstance(value, list):
                    value[next(i for i, v in enumerate(value) if v is old)] = copy.deepcopy(new)
                else:
                    setattr(above, name, copy.deepcopy(new))
                after = ast.unparse(ast.fix_missing_locations(new))
                if after != before:
                    text = ast.unparse(ast.fix_missing_locations(whole))
                    found.append(
                        dict(
                            function=top.name,
                            kind=kind,
                            change=f"{' '.join(before.split())[:90]} -> {' '.join(after.split())[:90]}",  # noqa: E501
                            line=getattr(child, "lineno", top.lineno) - top.lineno,
                            text=text,
                        )
                    )
    return found


def chosen(found: list, n: int, seed: int = 0) -> list:
    "A seeded sample of n mutants in which every function occurs."
    rng, by = random.Random(seed), {}
    for m in found:
        by.setdefault(m["function"], []).append(m)
    for group in by.values():
        rng.shuffle(group)
    keep = [group.pop() for group in by.values() for _ in range(min(2, len(group)))]
    rest = [m for group in by.values() for m in group]
    rng.shuffle(rest)
    return keep + rest[: max(0, n - len(keep))]


def runnable(cell) -> bool:
    found = book.directives(cell)
    return (
        cell["cell_type"] == "code"
        and found.get("eval") != "false"
        and not {"slow", "cuda"} & found.keys()
    )


def run(source: str, space: dict) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(source, "<cell>", "exec"), space)


def forked(sources: list, space: dict, limit: float) -> tuple:
    """Run the cells in a fork, for so many seconds of its own: ('killed', which cell),
    ('survived', None) or ('timeout', None)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # a mutant may ask for more and more
        said = "survived"
        try:
            for i, source in sources:  # noqa: B007
                run(source, space)
        except BaseException:
            said = f"killed {i}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(read) as f:
        said = f.read().split()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return "timeout", None
    return (said[0], int(said[1]) if said[1:] else None) if said else ("killed", None)


def spent() -> float:
    "Processor seconds of the forks so far."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def module_mutants(module: str, n: int, before: list | None = None) -> tuple:
    """How many single changes there are, and the sampled ones (or the survivors of `before`) with
    what became of them."""
    path = book.modules()[module]
    cells = [
        (i, re.sub(r"^\s*[%!].*$", "pass", book.source(c), flags=re.M))
        for i, c in enumerate(book.cells(path))
        if runnable(c)
    ]
    every = []
    for i, source in cells:
        if {"export", "exporti"} & book.directives(book.cells(path)[i]).keys():
            every += [m | dict(cell=i) for m in mutants(ast.parse(source))]
    sample, out, start = chosen(every, n), [], spent()
    space = {"__name__": "__main__", "display": lambda *shown: None}  # IPython knows it too
    if before is not None:

        def name(m):
            return (m["function"], m["kind"], m["change"], m["line"])

        again = {name(m) for m in before if m["result"] == "survived"}
        sample, out = (
            [m for m in every if name(m) in again],
            [m for m in before if name(m) not in again],
        )
    os.chdir(book.NBS)
    _, took = forked(cells, dict(space), 600), spent() - start
    assert _[0] == "survived", f"{path.name} fails unchanged in cell {_[1]}"
    import matplotlib.pyplot as plt

    for k, (i, source) in enumerate(cells):
        for m in (m for m in sample if m["cell"] == i):
            rest = [(i, m["text"]), *cells[k + 1 :]]
            result, by = forked(rest, space, 10 + 1.5 * took)
            out.append(
                {key: m[key] for key in ("function", "line", "kind", "change")}
                | dict(module=module, result=result, by=by)
            )
            print(
                f"{module} {m['function']}: {m['change']}: {result} {by or ''}",
                file=sys.stderr,
                flush=True,
            )
        run(source, space)
        plt.close("all")
    return len(every), out


def explanation(m: dict) -> str:
    "Why a survivor is no gap, from tools/survivors.json."
    known = json.loads((Path(__file__).parent / "survivors.json").read_text())
    return known.get(f"{m['module']}.{m['function']}: {m['change']}", "")


def tallied(found: list, sites: int) -> dict:
    "Counts of one module; its survivors are explained, equivalent ones are left out of the score."
    for m in found:
        if m["result"] == "survived":
            m["why"] = explanation(m)
    alive = [m for m in found if m["result"] == "survived"]
    same, killed = sum(m["why"].startswith("equivalent") for m in alive), len(found) - len(alive)
    return dict(
        sites=sites,
        sampled=len(found),
        killed=killed,
        equivalent=same,
        score=round(killed / max(1, len(found) - same), 4),
    )


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("modules", nargs="*", default=MODULES)
    ap.add_argument("--sample", type=int, default=40, help="mutants a module (default: 40)")
    ap.add_argument(
        "--again",
        action="store_true",
        help="only the survivors of the record, after the notebook has changed",
    )
    ap.add_argument(
        "--explain",
        action="store_true",
        help="run nothing: only explain the survivors of the record anew",
    )
    ap.add_argument(
        "--record", type=Path, help="write the record there, beside what it holds of other modules"
    )
    args = ap.parse_args()
    os.environ.update(MPLBACKEND="agg", IN_TEST="1", OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    path, start = args.record and book.ROOT / args.record, time.time()
    record = (
        json.loads(path.read_text())
        if path and path.exists()
        else dict(schema=1, kind="mutation", provenance={}, modules={}, mutants=[])
    )
    from fairmix_nb.records import provenance

    origin = provenance()
    record["provenance"] = origin
    for module in args.modules:
        before = [m for m in record["mutants"] if m["module"] == module]
        told = record["modules"].get(module, {})
        sites, found = (
            (told.get("sites"), before)
            if args.explain
            else module_mutants(module, args.sample, before if args.again else None)
        )
        if not found:
            continue
        ran = (
            told
            if args.explain
            else dict(seconds=round(time.time() - start), commit=origin["commit"])
        )
        record["modules"][module] = told = {**ran, **tallied(found, sites)}
        record["mutants"] = [m for m in record["mutants"] if m["module"] != module] + found
        print(module, told, flush=True)
        for m in found:
            if m["result"] == "survived":
                print(
                    f"survived: {m['module']}.{m['function']}: {m['change']}  ({m['why'] or 'NOT EXPLAINED'})",  # noqa: E501
                    flush=True,
                )
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    chosen_rows = [m for m in record["mutants"] if m["module"] in args.modules]
    return (
        0
        if all(record["modules"][m]["score"] >= 0.95 for m in args.modules)
        and all(m.get("why", "x") for m in chosen_rows)
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
