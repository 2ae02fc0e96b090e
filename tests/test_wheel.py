"""Wheel and sdist, installed where nothing else is, on every supported Python at hand (pytest -m
slow: downloads PyTorch)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pythons() -> dict:
    "Version -> interpreter: this one, those on PATH, those of pyenv."
    found = {f"3.{sys.version_info.minor}": Path(sys.executable)}
    for minor in range(10, 14):
        places = [
            shutil.which(f"python3.{minor}"),
            *sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")),
        ]
        for place in filter(None, places):
            told = subprocess.run(
                [place, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
                capture_output=True,
                text=True,
            ).stdout.strip()
            if told == f"3.{minor}":
                found.setdefault(told, Path(place))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The wheel and the sdist."
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_archives_hold_what_they_should(built):
    import tarfile
    import zipfile

    wheel, sdist = zipfile.ZipFile(built[0]), tarfile.open(built[1])
    modules = {f"fairmix_nb/{p.name}" for p in (ROOT / "fairmix_nb").glob("*.py")}
    assert {n for n in wheel.namelist() if not re.search(r"\.dist-info/", n)} == modules
    assert {f"{n.split('/', 1)[1]}" for n in sdist.getnames() if "/" in n} >= modules | {
        "settings.ini",
        "README.md",
        "setup.py",
    }
    told = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert (
        "Requires-Python: >=3.10" in told
        and "Provides-Extra: dev" in told
        and "# fairmix_nb" in told
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", pythons())
def test_wheel_works_in_an_empty_environment(built, tmp_path, version):
    wheel, sdist = built
    subprocess.run([pythons()[version], "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    names = [p.stem for p in (ROOT / "fairmix_nb").glob("[a-z]*.py")]
    code = f"""
import importlib, importlib.util, sys
for name in {names}: importlib.import_module('fairmix_nb.' + name)
import fairmix_nb
assert 'site-packages' in fairmix_nb.__file__, fairmix_nb.__file__
assert sys.version.startswith('{version}.'), sys.version
for tool in ('nbdev', 'fastcore', 'jupyterlab'): assert importlib.util.find_spec(tool) is None, tool
"""
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    subprocess.run(
        [
            tmp_path / "env" / "bin" / "fairmix",
            "compare",
            "--methods",
            "natural",
            "--seeds",
            "0",
            "--epochs",
            "1",
            "--out",
            str(tmp_path / "run"),
        ],
        check=True,
        cwd=tmp_path,
    )
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(sdist)],
        check=True,
    )
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    subprocess.run([python, "-m", "pip", "install", "-q", "jupyterlab"], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    shutil.rmtree(tmp_path / "env")  # PyTorch is large
