"Wheel and sdist, installed where nothing else is (pytest -m slow: downloads PyTorch)."
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True)
    wheel, sdist = next(tmp_path.glob("*.whl")), next(tmp_path.glob("*.tar.gz"))
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    names = [p.stem for p in (ROOT / "fairmix_nb").glob("[a-z]*.py")]
    code = f"""
import importlib, importlib.util, pathlib
for name in {names}: importlib.import_module('fairmix_nb.' + name)
import fairmix_nb
assert 'site-packages' in fairmix_nb.__file__, fairmix_nb.__file__
for tool in ('nbdev', 'fastcore', 'jupyterlab'): assert importlib.util.find_spec(tool) is None, tool
"""
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    subprocess.run([tmp_path / "env" / "bin" / "fairmix", "compare", "--methods", "natural", "--seeds", "0", "--epochs", "1",
                    "--out", str(tmp_path / "run")], check=True, cwd=tmp_path)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(sdist)], check=True)
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
