"""What can be read off the notebooks without running them: figures, statements, public names,
citations.

Used by docs/build.py and by the tests; needs nothing but the standard library.
"""

import ast
import io
import json
import re
import tokenize
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*?)\s*$", re.M)


def settings() -> dict:
    "What settings.ini says."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def addressed(text: str) -> str:
    "Addresses in place of their short forms."
    cfg = settings()
    colab = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/".format(
        **cfg
    )
    return text.replace("{git_url}", cfg["git_url"]).replace("(colab:", f"({colab}")


def source(cell) -> str:
    return "".join(cell["source"])


def directives(cell) -> dict:
    "The `#| name value` lines of a code cell."
    return dict(DIRECTIVE.findall(source(cell))) if cell["cell_type"] == "code" else {}


@lru_cache(None)
def cells(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def chapters() -> list:
    "The notebooks in order, without the index."
    return sorted(NBS.glob("[0-9]*.ipynb"))


PARTS = {
    "Theory": range(1, 7),
    "Measure": range(7, 13),
    "Train": range(13, 17),
    "Trust and mend": range(17, 20),
    "Evidence": range(20, 30),
}


def parts() -> dict:
    "Part of the book -> its chapters; the tour comes before all of them."
    return {
        part: [c for c in chapters() if int(c.stem[:2]) in numbers]
        for part, numbers in PARTS.items()
    }


def title(path: Path) -> str:
    return next(
        re.match(r"# (.*)", source(c))[1]
        for c in cells(path)
        if c["cell_type"] == "markdown" and source(c).startswith("# ")
    )


def headings(path: Path) -> list:
    "(index of the cell, level, text) of every heading, in order."
    return [
        (i, len(m[1]), m[2].strip())
        for i, c in enumerate(cells(path))
        if c["cell_type"] == "markdown"
        for m in re.finditer(r"^(#{1,4}) (.*)$", source(c), re.M)
    ]


# --- figures and their alternative texts ---------------------------------------------------

SYMBOLS = {
    r"\\epsilon": "epsilon",
    r"\\sigma": "sigma",
    r"\\mu": "mu",
    r"\\lambda": "lambda",
    r"\\alpha": "alpha",
    r"\\sum_i": "sum of",
    r"\\sqrt": "root of",
    r"\\ell": "l",
    r"\\Delta": "difference of",
    r"\\pm": "+-",
    r"\\(?:rm|mathrm|bf|,|;|!| )": " ",
}


def spoken(text: str) -> str:
    "Markdown with formulas as plain words."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for tex, word in SYMBOLS.items():
        text = re.sub(tex + r"(?![a-zA-Z])", f" {word} ", text)
    text = re.sub(r"\\([a-zA-Z]+)", r"\1 ", text)
    return (
        re.sub(r"\s+", " ", re.sub(r"[$*`{}\\_^|>]", " ", text))
        .replace(" ,", ",")
        .replace(" .", ".")
        .strip()
    )


def first_sentence(cell) -> str:
    if cell["cell_type"] != "markdown":
        return ""
    text = re.sub(
        r"<[^>]*>|\$\$.*?\$\$", " ", re.sub(r"^#+ .*$", "", source(cell), flags=re.M), flags=re.S
    )
    found = re.match(r"(.+?[.?!:])(\s|$)", spoken(text), re.S)
    return found[1].rstrip(":") if found and not text.strip().startswith("|") else ""


@lru_cache(None)
def definitions(path: Path) -> dict:
    "Functions defined in a notebook, by name: where a figure's labels may stand."
    found = {}
    for cell in cells(path):
        for node in ast.walk(
            parsed(source(cell)) if cell["cell_type"] == "code" else ast.Module([], [])
        ):
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node
    return found


def parsed(text: str):
    try:
        return ast.parse(re.sub(r"^\s*[%!].*$", "pass", text, flags=re.M))
    except SyntaxError:
        return ast.Module([], [])


def labels(path: Path, tree, seen=()) -> dict:
    "Axis labels, titles and legend entries that a piece of code writes, helpers included."
    out = dict(xlabel=[], ylabel=[], title=[], label=[])
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = [(k.arg, k.value) for k in node.keywords] + [
            (name[4:], a) for a in node.args[:1] if name.startswith("set_")
        ]
        for key, value in given:
            if (
                key in out
                and isinstance(value, ast.Constant)
                and isinstance(value.value, str)
                and value.value
            ):
                out[key].append(spoken(value.value))
        helper = definitions(path).get(name)
        if helper and name not in seen:
            for key, more in labels(path, helper, (*seen, name)).items():
                out[key] += more
    return {k: list(dict.fromkeys(v)) for k, v in out.items()}


def alt_text(path: Path, i: int) -> str:
    """The alternative text of the figure that cell i shows: `#| fig-alt:`, else from its labels
    and the prose around it."""
    every, cell = cells(path), cells(path)[i]
    if "fig-alt" in directives(cell):
        return directives(cell)["fig-alt"]
    drawn = labels(path, parsed(source(cell)))
    parts = [
        " and ".join(drawn["ylabel"][:2]) + " against " + " and ".join(drawn["xlabel"][:2])
        if drawn["xlabel"] and drawn["ylabel"]
        else " and ".join(drawn["xlabel"] or drawn["ylabel"])
    ]
    parts.append("; ".join(drawn["title"][:4] + drawn["label"][:6]))
    after = first_sentence(every[i + 1]) if i + 1 < len(every) else ""
    before = next((s for c in reversed(every[:i]) if (s := first_sentence(c))), "")
    under = [text for j, level, text in headings(path) if j <= i and level > 1][-1:] or [
        title(path)
    ]
    parts = [under[0] and spoken(under[0]), *parts, after or before]
    return ". ".join(p.rstrip(".") for p in parts if p) + "."


def figures() -> list:
    "(notebook, index of the cell, alternative text) of every stored picture."
    return [
        (p, i, alt_text(p, i))
        for p in [NBS / "index.ipynb", *chapters()]
        for i, c in enumerate(cells(p))
        if c["cell_type"] == "code"
        and any(k.startswith("image/") for o in c["outputs"] for k in o.get("data", {}))
    ]


# --- public names, from the modules' own source --------------------------------------------


def comments(text: str) -> dict:
    "Comment of each line."
    return {
        t.start[0]: t.string[1:].strip()
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type == tokenize.COMMENT
    }


def parameters(node, text: str, notes: dict) -> tuple:
    "[(name, type, default, meaning)] of a function, and (type, meaning) of what it returns."
    a = node.args
    pad = [None] * (len(a.posonlyargs + a.args) - len(a.defaults))
    rows, last = [], node.lineno
    pairs = [*zip(a.posonlyargs + a.args, pad + a.defaults), *zip(a.kwonlyargs, a.kw_defaults)]
    pairs += [(arg, None) for arg in (a.vararg, a.kwarg) if arg]
    for arg, default in sorted(pairs, key=lambda pair: pair[0].lineno):
        last = max(last, (default or arg).end_lineno)
        if arg.arg in ("self", "cls"):
            continue
        stars = "*" * ((arg is a.vararg) + 2 * (arg is a.kwarg))

        def segment(n):
            return ast.get_source_segment(text, n) if n is not None else ""

        rows.append(
            (stars + arg.arg, segment(arg.annotation), segment(default), notes.get(last, ""))
        )
    where = node.returns.end_lineno if node.returns else node.body[0].lineno - 1
    many = where > node.lineno or not rows
    ends = [
        k
        for k in range(last, node.body[0].lineno)
        if k in notes and (k > last or many and not rows)
    ]
    back = notes.get(where, "") if node.returns and many else notes[ends[-1]] if ends else ""
    return rows, (ast.get_source_segment(text, node.returns) if node.returns else "", back)


def described(node, text: str, notes: dict) -> dict:
    "What the documentation says about one definition."
    doc = " ".join((ast.get_docstring(node) or "").split())
    if isinstance(node, ast.FunctionDef):
        rows, back = parameters(node, text, notes)
        is_property = any(getattr(d, "id", "") == "property" for d in node.decorator_list)
        return dict(
            name=node.name,
            kind="property" if is_property else "function",
            doc=doc,
            rows=rows,
            back=back,
            methods=[],
        )
    fields = [
        (
            n.target.id,
            ast.get_source_segment(text, n.annotation),
            ast.get_source_segment(text, n.value) if n.value else "",
            notes.get(n.end_lineno, ""),
        )
        for n in node.body
        if isinstance(n, ast.AnnAssign)
    ]
    methods = [described(n, text, notes) for n in node.body if isinstance(n, ast.FunctionDef)]
    start = next((m["rows"] for m in methods if m["name"] == "__init__"), [])
    methods = [
        m
        for m in methods
        if (m["doc"] or m["rows"]) and (m["name"][0] != "_" or m["name"] == "__call__")
    ]
    return dict(
        name=node.name, kind="class", doc=doc, rows=fields or start, back=("", ""), methods=methods
    )


@lru_cache(None)
def modules() -> dict:
    "Module -> notebook, in the order of the chapters."
    found = {}
    for path in chapters():
        for cell in cells(path):
            if "default_exp" in directives(cell):
                found[directives(cell)["default_exp"]] = path
    return found


def patched(node) -> str:
    "The class that `@patch` adds a function to; empty where it is none."
    marks = {getattr(d, "id", "") for d in getattr(node, "decorator_list", [])}
    if "patch" not in marks:
        return ""
    return ast.unparse(node.args.args[0].annotation).strip("'\"")


@lru_cache(None)
def api(module: str) -> tuple:
    "The module's docstring, and a description of each name in its `__all__`."
    text = (ROOT / "fairmix_nb" / f"{module}.py").read_text(encoding="utf-8")
    tree, notes, found = ast.parse(text), comments(text), {}
    public = next(
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
    )
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    for n in tree.body:
        if owner := patched(n):  # a method, added to its class in a cell of its own
            method = described(n, text, notes)
            method["rows"] = [r for r in method["rows"] if r[0] != "self"]
            if owner in found and not n.name.startswith("_"):
                found[owner]["methods"].append(method)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public:
            found[n.name] = described(n, text, notes)
        elif isinstance(n, ast.Assign):
            targets = getattr(n.targets[0], "elts", [n.targets[0]])
            values = n.value.elts if len(targets) > 1 else [n.value]
            for t, v in zip(targets, values):
                if isinstance(t, ast.Attribute):  # Class.method = function, or property(function)
                    given = v.args[0] if isinstance(v, ast.Call) else v
                    owner, function = getattr(t.value, "id", ""), functions.get(given.id)
                    if owner in found and function:
                        method = described(function, text, notes) | dict(name=t.attr)
                        if isinstance(v, ast.Call):
                            method["kind"] = "property"
                        method["rows"] = method["rows"][1:] if owner else method["rows"]
                        found[owner]["methods"].append(method)
                elif isinstance(t, ast.Name) and t.id in public:
                    found[t.id] = dict(
                        name=t.id,
                        kind="constant",
                        doc=notes.get(n.lineno, "") or constant(v),
                        rows=[],
                        back=("", ""),
                        methods=[],
                    )
    return ast.get_docstring(tree), [found[name] for name in public if name in found]


def constant(value) -> str:
    "A constant in words: its keys, its members or itself."
    if isinstance(value, (ast.Dict, ast.Tuple, ast.Call)):
        items = (
            value.keys
            if isinstance(value, ast.Dict)
            else getattr(value, "elts", None) or [k.arg for k in value.keywords]
        )
        return "One of: " + ", ".join(
            f"`{i if isinstance(i, str) else ast.unparse(i)}`" for i in items
        )
    return f"`{ast.unparse(value)}`"


def exporting_cell(path: Path, name: str) -> int:
    "The cell that defines a public name."
    pattern = re.compile(rf"^(?:def|class) {name}\b|^(?:\w+, )*{name}\s*(?:,.*)?=", re.M)
    return next(
        i
        for i, c in enumerate(cells(path))
        if c["cell_type"] == "code"
        and pattern.search(source(c))
        and {"export", "exporti"} & directives(c).keys()
    )


# --- the paper's statements ----------------------------------------------------------------

NAMED = [
    "Definition 1",
    "Proposition 1",
    "Proposition 2",
    "Theorem 3",
    "Theorem 4",
    *(f"Remark {i}" for i in range(1, 5)),
    "Figure 1 (a)",
    "Figure 1 (b)",
    "Figure 2 (a)",
    "Figure 2 (b)",
    "Table I",
]
STATEMENTS = [f"({i})" for i in range(1, 39)] + NAMED
WORDS = {
    "Def": "Definition",
    "Prop": "Proposition",
    "Thm": "Theorem",
    "Theorem": "Theorem",
    "Remark": "Remark",
    "Definition": "Definition",
    "Proposition": "Proposition",
    "Figure": "Figure",
    "Fig": "Figure",
}


def mentions(text: str) -> set:
    """The statements that a piece of text names; `(5)-(8)`, `Thms 3, 4` and `Props 1-2` are spelt
    out."""
    found = set()
    for a, b in re.findall(r"\((\d+)\)(?:\s*(?:-|to)\s*\((\d+)\))?", text):
        found |= {f"({i})" for i in range(int(a), int(b or a) + 1)}
    for word, numbers in re.findall(
        r"\b(Def|Prop|Thm|Theorem|Remark|Definition|Proposition|Figure|Fig)s?\.? (\d(?:(?:,| and|-) ?\d)*)(?!\d| \([ab]\))",  # noqa: E501
        text,
    ):
        for a, b in re.findall(r"(\d)(?:-(\d))?", numbers):
            found |= {f"{WORDS[word]} {i}" for i in range(int(a), int(b or a) + 1)}
    found |= {f"Figure {i} ({p})" for i, p in re.findall(r"Figure (\d) \(([ab])\)", text)}
    found |= {
        f"Figure {i} ({p})"
        for f in list(found)
        if re.fullmatch(r"Figure \d", f)
        for i in f[-1]
        for p in "ab"
    }
    return (found | {"Table I"} if re.search(r"\bTable I\b", text) else found) & set(STATEMENTS)


def claimed(cell) -> set:
    "The statements that a text cell states: tags, bold names in quotations, names in headings."
    text = source(cell)
    found = {
        f"({t.strip()})" for tag in re.findall(r"\\tag\{([^}]*)\}", text) for t in tag.split(",")
    }
    for line in text.splitlines():
        for bold in (
            re.findall(r"\*\*([^*]+)\*\*", line)
            if line.startswith(">")
            else re.findall(r"^##+ (.*)", line)
        ):
            found |= {s for s in mentions(bold) if not s.startswith("(")}
    return found & set(STATEMENTS)


def heads(cell, statement: str) -> str:
    "The proposition or theorem under whose bold name an equation stands in a text cell."
    before = re.split(rf"\\tag\{{[^}}]*\b{re.escape(statement.strip('()'))}\b", source(cell))[0]
    bold = [s for name in re.findall(r"\*\*([^*]+)\*\*", before) for s in mentions(name)]
    return bold[-1] if bold else ""


def section(path: Path, i: int) -> tuple:
    "The section of the second level that cell i stands in: its first cell, its end, its heading."
    tops = [(j, text) for j, level, text in headings(path) if level == 2]
    start, text = [(j, t) for j, t in tops if j <= i][-1]
    return start, min([j for j, _ in tops if j > i], default=len(cells(path))), text


KINDS = {
    "SymPy": r"\bsp\.",
    "mpmath": r"\bmp\.|\bexact\w*\(|\bdecided\(",
    "Monte Carlo": r"\bmc_class_risk\(|\btest_mc\(|\bsimulated\(|rng\.standard_normal",
    "search": r"optimize\.|arg(?:min|max)|\breferee\(|\bsearch\w*\(",
    "quadrature": r"integrate\.",
    "SciPy": r"\bstats\.|\bnorm\.|\bndtr\(",
}
ASSERTS = re.compile(
    r"^\s*(?:assert\b|close\(|test_\w+\(|count\(|np\.testing\.|torch\.testing\.|with expect_fail\()|:\s*(?:assert\b|close\()",  # noqa: E501
    re.M,
)


def checks(path: Path, start: int, end: int) -> list:
    "The cells of a section that can fail, and by what they check."
    found = []
    for i in range(start, end):
        cell = cells(path)[i]
        if (
            cell["cell_type"] == "code"
            and ASSERTS.search(source(cell))
            and not {"export", "exporti"} & directives(cell).keys()
        ):
            found.append(
                (i, [k for k, pattern in KINDS.items() if re.search(pattern, source(cell))])
            )
    return found


@lru_cache(None)
def statements() -> dict:
    "Statement -> [(notebook, section, functions, checks)], one entry per section that states it."
    names = {d["name"]: (m, d) for m in modules() for d in api(m)[1] if d["kind"] != "constant"}
    found, theory = {s: [] for s in STATEMENTS}, [p for p in chapters() if p.stem[:2] <= "06"]
    by_doc = {s: [n for n, (_, d) in names.items() if s in mentions(d["doc"])] for s in STATEMENTS}
    for path in chapters():
        for i, cell in enumerate(cells(path)):
            for s in claimed(cell) if cell["cell_type"] == "markdown" else ():
                if s.startswith("(") and path not in theory:  # their numbers are their own
                    continue
                start, end, text = section(path, i)
                if any(place[:2] == (path, start) for place in found[s]):
                    continue
                tested = checks(path, i, end)
                code = "\n".join(source(cells(path)[j]) for j, _ in tested)
                used = [
                    n
                    for n, (_, d) in names.items()
                    if d["kind"] == "function"
                    and (n not in definitions(path) or modules()[names[n][0]] == path)
                    and re.search(rf"(?<![.\w]){n}\(", code)
                ]
                functions = by_doc[s] or by_doc.get(heads(cell, s), []) or used
                home = path
                if (
                    not tested and functions
                ):  # stated here, computed and checked where the function is
                    home = modules()[names[functions[0]][0]]
                    cell_of = exporting_cell(home, functions[0])
                    tested = [
                        c
                        for c in checks(home, cell_of, len(cells(home)))
                        if f"{functions[0]}(" in source(cells(home)[c[0]])
                    ]
                found[s].append((path, start, text, functions[:3], home, tested))
    return found


# --- citations -------------------------------------------------------------------------------

CITED = re.compile(
    r"(?<![A-Za-z])([A-Z][\w'éáö]+)(?:,? (?:et al\.?|(?:and|&) [A-Z]\w+)|-[A-Z]\w+|(?:, [A-Z]\w+)+ & [A-Z]\w+)?,? \(?((?:18|19|20)\d\d)\b"  # noqa: E501
)
PLACES = {
    "ICLR",
    "ICML",
    "CVPR",
    "ICCV",
    "ECCV",
    "NeurIPS",
    "JMLR",
    "ISIT",
    "Statistics",
    "Biometrika",
    "Psychometrika",
    "Journal",
    "BASE",
    "Python",
    "In",
}


def citations(text: str) -> set:
    "(first author, year) of the works that a text names; where they appeared is no author."
    return {(a, y) for a, y in CITED.findall(text) if a not in PLACES}


def entries() -> dict:
    """(first author, year) -> line of docs/bibliography.md; a second work of that author and year
    has the letter b after it."""
    lines = (ROOT / "docs" / "bibliography.md").read_text(encoding="utf-8").splitlines()
    return {
        m.groups(): line for line in lines if (m := re.match(r"- \*\*(\S+) (\d{4}b?)\*\*", line))
    }


def leans_on(text: str, entry: str) -> bool:
    "Does a text name the work: by author and year, or by the words after `Here:`?"
    author, year = re.match(r"- \*\*(\S+) (\d{4}b?)\*\*", entry).groups()
    words = re.search(r"\bHere: ([^.]+)\.", entry)
    alone = [author] * (
        len(author) > 4 and author not in ("Zhang", "Madry") and not year.endswith("b")
    )
    return (author, year) in citations(text) or any(
        re.search(rf"\b{re.escape(w)}\b", text)
        for w in alone + (words[1].split(", ") if words else [])
    )
