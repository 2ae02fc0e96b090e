"Folders as users have them: what is converted, what is refused by name, and a cache that follows the folder."
import json
import os
import warnings
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from fairmix_nb.data import load

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(mode="RGB", size=6):
    shape = (size, size) if mode in ("L", "P") else (size, size, len(mode))
    return Image.fromarray(RNG.integers(0, 256, shape).astype(np.uint8), "L" if mode == "P" else mode).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(6): picture().save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def refused(folder, says, **kw):
    before = sorted(p.name for p in Path(folder).rglob("*")) if Path(folder).exists() else None
    with pytest.raises((ValueError, OSError)) as e: load(folder, progress=False, **kw)
    assert says in str(e.value), str(e.value)
    if before is not None: assert sorted(p.name for p in Path(folder).rglob("*")) == before


def test_missing_and_empty(tmp_path, folder):
    refused(tmp_path / "nowhere", "a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "one folder per class")
    (folder / "bird").mkdir()
    refused(folder, "class 'bird' must have images")


def test_a_class_of_one(folder):
    (folder / "bird").mkdir()
    picture().save(folder / "bird" / "0.png")
    refused(folder, "class 'bird' must have at least 3 images")


def test_train_and_test_must_hold_the_same_classes(tmp_path, folder):
    top = tmp_path / "both"
    top.mkdir()
    folder.rename(top / "train")
    (top / "test" / "cat").mkdir(parents=True)
    for i in range(3): picture().save(top / "test" / "cat" / f"{i}.png")
    refused(top, "dog")


def test_two_sizes_are_refused_or_resized(folder):
    picture(size=9).save(folder / "dog" / "9.png")
    refused(folder, "9.png")
    assert load(folder, size=6, progress=False).train.x.shape[1:] == (3, 6, 6)
    refused(folder, "size must be a positive integer", size=0)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_one_odd_image_is_converted_and_said_once(folder, mode):
    picture(mode).save(folder / "dog" / "9.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = load(folder, progress=False)
    assert data.train.x.shape[1] == 3
    assert len([w for w in said if issubclass(w.category, UserWarning)]) == 1


def test_all_grey_keeps_one_channel(tmp_path):
    for name in "ab":
        (tmp_path / "g" / name).mkdir(parents=True)
        for i in range(4): picture("L").save(tmp_path / "g" / name / f"{i}.png")
    assert load(tmp_path / "g", progress=False).train.x.shape[1:] == (1, 6, 6)


def test_a_truncated_file_is_named(folder):
    bad = folder / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:50])
    refused(folder, "3.png")
    bad.write_bytes(b"")
    refused(folder, "3.png")


def test_other_files_are_ignored(folder):
    before = load(folder, progress=False).digest()
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "README").write_text("nor this")
    assert load(folder, progress=False).digest() == before


def test_cache_follows_the_folder_and_survives_damage(folder, own_cache):
    first = load(folder, progress=False)
    entries = [p for p in own_cache.rglob("*") if p.is_file()]
    assert entries and not any(".tmp" in p.name for p in entries)
    with mock.patch("fairmix_nb.data.decode", side_effect=AssertionError("decoded again")):
        assert load(folder, progress=False).digest() == first.digest()
    for p in entries: p.write_bytes(b"damaged")
    assert load(folder, progress=False).digest() == first.digest()
    picture().save(folder / "cat" / "0.png")
    os.utime(folder / "cat" / "0.png", (1, 1))
    assert load(folder, progress=False).digest() != first.digest()


def test_an_unwritable_cache_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file where the cache should be")
    monkeypatch.setenv("FAIRMIX_CACHE", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(load(folder, progress=False).test) == 4


def test_cifar10_without_network_says_what_to_place_where(tmp_path):
    with mock.patch("torchvision.datasets.CIFAR10", side_effect=URLError("no network")):
        with pytest.raises(OSError, match="place cifar-10-python.tar.gz in"): load("cifar10", root=tmp_path)


def test_cifar10_as_torchvision_gives_it(tmp_path):
    class Fake:
        classes = [f"c{i}" for i in range(10)]
        def __init__(self, root, train, download, **kw):
            n = 200 if train else 50
            self.data = RNG.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
            self.targets = [i % 10 for i in range(n)]
    with mock.patch("torchvision.datasets.CIFAR10", Fake): data = load("cifar10", root=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (180, 20, 50)
    assert data.train.x.shape[1:] == (3, 32, 32) and data.split["rule"] == "official test"
    json.dumps(data.describe())
