"Bad inputs, the cache and the sources of fairmix_nb.data that do not teach."

import os
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from fairmix_nb import data as D
from fairmix_nb.records import write_aside


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(seed, shape=(6, 5, 3)):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def make(folder, counts=(4, 5), shape=(6, 5, 3)):
    for k, n in zip("abcdef", counts):
        (folder / k).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(noise(10 * ord(k) + i, shape)).save(folder / k / f"{i}.png")
    return folder


def fails(text, *args, **kw):
    with pytest.raises(ValueError) as e:
        D.load(*args, **kw)
    assert text in str(e.value), str(e.value)


def decodes(monkeypatch):
    "A list that grows by one with every call of decode."
    calls, decode = [], D.decode
    monkeypatch.setattr(D, "decode", lambda *a: calls.append(1) or decode(*a))
    return calls


# names, numbers


@pytest.mark.parametrize(
    "name, text",
    [
        ("digit", "did you mean 'digits'?"),
        ("cifar-10", "did you mean 'cifar10'?"),
        ("", "got ''"),
        ("/no/such/folder", "or a folder, got '/no/such/folder'"),
    ],
)
def test_names(name, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fails(text, name)


@pytest.mark.parametrize(
    "kw, text",
    [
        (dict(seed=-1), "seed must be an integer >= 0, got -1"),
        (dict(seed=1.5), "got 1.5"),
        (dict(seed="1"), "got '1'"),
        (dict(seed=True), "got True"),
        (dict(size=0), "size must be"),
        (dict(size=(8, -1)), "size must be"),
        (dict(size=(8, 8, 3)), "size must be"),
        (dict(size=2.5), "size must be"),
        (dict(size="8"), "size must be"),
        (dict(size=True), "size must be"),
        (dict(per_class=0), "per_class must lie in [1, "),
        (dict(per_class=1000), "per_class must lie in [1, "),
        (dict(per_class=2.5), "per_class must be an integer"),
        (dict(test_per_class="3"), "test_per_class must be an"),
        (dict(test_per_class=0), "test_per_class must lie in [1, 58]"),
        (dict(test_per_class=59), "in [1, 58]"),
    ],
)
def test_numbers(kw, text):
    fails(text, "digits", **kw)


def test_numpy_numbers_are_fine():
    d = D.load("digits", np.int64(1), per_class=np.int64(5), size=np.int64(4))
    assert (
        d.train.counts() == [5] * 10 and d.describe()["seed"] == 1 and d.train.x.shape[2:] == (4, 4)
    )


def test_describe_is_plain():
    import json

    d = D.load("digits", seed=4)
    r = json.loads(json.dumps(d.describe()))
    assert r == d.describe() and r["split"]["fold"] == 1 and r["split"]["shuffle"] == 1
    assert sum(r["sizes"].values()) == 1797 and r["shape"] == [1, 8, 8]
    assert D.load("digits", seed=4).digest() == d.digest() != D.load("digits", seed=5).digest()


def test_three_parts_are_the_whole_set():
    d, (whole, _) = D.load("digits"), D._digits(None, None)
    rows = [p.x[i].numpy().tobytes() for p in (d.train, d.val, d.test) for i in range(len(p))]
    assert sorted(rows) == sorted(x.numpy().tobytes() for x in whole.x)


def test_the_global_state_stays():
    np.random.seed(0), torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    D.load("digits", seed=3)
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(
        torch.get_rng_state(), before[1]
    )


# folders


def test_layouts(tmp_path):
    make(tmp_path / "set" / "train", (20, 30)), make(tmp_path / "set" / "test", (3, 4))
    a, b = (D.load(tmp_path / "set", seed=s) for s in (0, 1))
    assert a.test.counts() == [3, 4] and a.val.counts() == [2, 3] and a.train.counts() == [18, 27]
    assert a.test.digest() == b.test.digest() and a.val.digest() != b.val.digest()
    assert a.split["rule"] == "official test"
    a, b = (D.load(tmp_path / "set", seed=s, per_class=5) for s in (0, 1))
    assert a.train.digest() == b.train.digest() and a.train.counts() == [5, 5]
    fails(
        "per_class must lie in [1, 18], the training images of class 'a', got 19",
        tmp_path / "set",
        per_class=19,
    )


def test_the_minimum_is_the_minimum(tmp_path):
    d = D.load(make(tmp_path / "three", (3, 3)))
    assert [p.counts() for p in (d.train, d.val, d.test)] == [[1, 1]] * 3
    fails("class 'b' must have at least 3 images", make(tmp_path / "two", (3, 2)))
    make(tmp_path / "o" / "train", (2, 2)), make(tmp_path / "o" / "test", (1, 1))
    d = D.load(tmp_path / "o")
    assert [p.counts() for p in (d.train, d.val, d.test)] == [[1, 1]] * 3
    make(tmp_path / "p" / "train", (2, 1)), make(tmp_path / "p" / "test", (1, 1))
    fails("class 'b' must have at least 2 images", tmp_path / "p")


def test_folders_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    fails("must hold one folder per class, got none", tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    fails("or a folder, got", tmp_path / "file")
    make(tmp_path / "a" / "train"), make(tmp_path / "a" / "test", (2, 2, 2))
    fails("must have the same class folders, got only in one of them: ['c']", tmp_path / "a")
    make(tmp_path / "b" / "train")
    fails("must have test/ too", tmp_path / "b")
    make(tmp_path / "c" / "train"), make(tmp_path / "c" / "test", shape=(6, 6, 3))
    fails("must have one shape, got (3, 6, 5) and (3, 6, 6)", tmp_path / "c")
    (make(tmp_path / "d") / "c").mkdir()
    fails("class 'c' must have images", tmp_path / "d")


def test_different_sizes_name_both_files(tmp_path):
    make(tmp_path / "s")
    Image.fromarray(noise(0, (7, 5, 3))).save(tmp_path / "s" / "b" / "2.png")
    fails(
        f"got {os.path.join('a', '0.png')} (6, 5) and {os.path.join('b', '2.png')} (7, 5)",
        tmp_path / "s",
    )
    assert D.load(tmp_path / "s", size=(4, 3)).train.x.shape[1:] == (3, 4, 3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "header"])
def test_unreadable_files_are_named(tmp_path, damage):
    f = make(tmp_path / "s", shape=(40, 40, 3)) / "a" / "3.png"
    whole = f.read_bytes()
    half = whole[: len(whole) // 2]
    f.write_bytes(dict(truncated=half, empty=b"", text=b"hello", header=whole[:30])[damage])
    fails(f"{f} must be a readable image", tmp_path / "s")


def test_resize_is_pillows(tmp_path):
    make(tmp_path / "s")
    ours = D.load_folder(tmp_path / "s", size=(9, 4))
    ref = Image.open(tmp_path / "s" / "b" / "1.png").resize((4, 9), Image.BILINEAR)
    assert np.array_equal(ours.x[5].permute(1, 2, 0), np.asarray(ref))
    whole = D.ImageSet(D.load_folder(tmp_path / "s").x, ours.y, ours.classes)
    assert torch.equal(D._resized(whole, (9, 4)).x, ours.x)


# modes


def test_grey_stays_grey_and_mixtures_become_rgb(tmp_path):
    grey = make(tmp_path / "grey", shape=(6, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert D.load_folder(grey).x.shape[1:] == (1, 6, 5)
    Image.fromarray(noise(1, (6, 5, 4))).save(grey / "a" / "0.png")
    Image.fromarray(noise(2)).convert("P").save(grey / "a" / "1.png")
    for _ in range(2):  # decoded, then from the cache: the same words, once
        with pytest.warns(UserWarning) as w:
            s = D.load_folder(grey)
        assert len(w) == 1 and "converted to RGB: 7 L, 1 P, 1 RGBA" in str(w[0].message)
    from torchvision.datasets import ImageFolder

    for i, (im, y) in enumerate(ImageFolder(grey)):
        assert np.array_equal(s.x[i].permute(1, 2, 0), np.asarray(im)) and s.y[i] == y


def test_sixteen_bits_are_refused(tmp_path):
    make(tmp_path / "s", shape=(6, 5))
    Image.fromarray(noise(0, (6, 5)).astype(np.uint16) * 256).save(tmp_path / "s" / "a" / "0.png")
    fails("must have 8 bits a channel", tmp_path / "s")


def test_other_files_are_passed_over(tmp_path):
    s = make(tmp_path / "s")
    digest = D.load_folder(s).digest()
    for name in ("a/notes.txt", "a/._0.png", "README"):
        (s / name).write_text("x")
    (s / ".git").mkdir()
    assert D.load_folder(s).digest() == digest
    (s / "a" / "deeper").mkdir()
    Image.fromarray(noise(0)).save(s / "a" / "deeper" / "X.PNG")
    assert D.load_folder(s).counts() == [5, 5]


# cache


def test_cache_is_used_and_refreshed(tmp_path, monkeypatch, cache):
    s, calls = make(tmp_path / "s"), decodes(monkeypatch)
    first = D.load_folder(s).digest()
    assert D.load_folder(s).digest() == first and len(calls) == 1
    assert len(list(cache.iterdir())) == 1 and sorted(p.name for p in s.iterdir()) == ["a", "b"]
    Image.fromarray(noise(99)).save(s / "a" / "0.png")
    assert D.load_folder(s).digest() != first and len(calls) == 2, "a changed file"
    Image.fromarray(noise(98)).save(s / "a" / "new.png")
    assert D.load_folder(s).counts() == [5, 5] and len(calls) == 3, "an added file"
    (s / "a" / "new.png").unlink()
    assert D.load_folder(s).counts() == [4, 5] and len(calls) == 4, "a removed file"
    (s / "b" / "0.png").rename(s / "a" / "moved.png")
    assert D.load_folder(s).counts() == [5, 4] and len(calls) == 5, "a moved file"
    assert len(list(cache.iterdir())) == 1, "stale caches do not pile up"
    D.load_folder(s, size=(3, 3))
    assert len(calls) == 6 and len(list(cache.iterdir())) == 2, "the size is part of the key"


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:100],
        lambda b: b[:-30],
        lambda b: b"not a zip",
        lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
    ],
)
def test_damaged_cache_is_rebuilt(tmp_path, monkeypatch, cache, damage):
    s, calls = make(tmp_path / "s"), decodes(monkeypatch)
    digest = D.load_folder(s).digest()
    (f,) = cache.iterdir()
    f.write_bytes(damage(f.read_bytes()))
    assert D.load_folder(s).digest() == digest and len(calls) == 2
    assert D.load_folder(s).digest() == digest and len(calls) == 2


def test_cache_with_pickles_is_not_opened(tmp_path, monkeypatch, cache):
    s, calls = make(tmp_path / "s"), decodes(monkeypatch)
    D.load_folder(s)
    (f,) = cache.iterdir()
    with np.load(f) as z:
        arrays = dict(z)
    np.savez(f, **(arrays | {"x": np.array([{}], dtype=object)}))
    D.load_folder(s)
    assert len(calls) == 2


def test_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    s = make(tmp_path / "s")
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("FAIRMIX_CACHE", str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match="not cached") as w:
        assert D.load_folder(s).counts() == [4, 5]
    assert len(w) == 1


# writing aside


def test_write_aside(tmp_path):
    f = tmp_path / "f"
    write_aside(f, "old")

    def dies(out):
        out.write(b"x" * 10**6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(f, dies)
    with pytest.raises(OSError, match="nowhere"):
        write_aside(tmp_path / "nowhere" / "f", b"")
    with pytest.raises(TypeError):
        write_aside(f, 3)
    assert f.read_text() == "old" and os.listdir(tmp_path) == ["f"]


# CIFAR-10


def test_cifar10_without_network(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as cifar

    def offline(*a, **k):
        raise URLError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", offline)
    with pytest.raises(OSError, match="cifar-10-python.tar.gz in .*no_data") as e:
        D.load("cifar10", root=tmp_path / "no_data")
    assert "\n" not in str(e.value)


def test_cifar10_happy_path(tmp_path, monkeypatch):
    class Fake:
        classes = ["plane", "car"]

        def __init__(self, root, train, download):
            assert download
            n = 400 if train else 60
            self.data, self.targets = noise(n, (n, 32, 32, 3)), [0, 1] * (n // 2)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    d = D.load("cifar10", seed=2, root=tmp_path)
    assert [p.counts() for p in (d.train, d.val, d.test)] == [[180] * 2, [20] * 2, [30] * 2]
    assert np.array_equal(d.test.x[7].permute(1, 2, 0), noise(60, (60, 32, 32, 3))[7])
    assert d.name == "cifar10" and D.load("cifar10", root=tmp_path, size=16).test.x.shape == (
        60,
        3,
        16,
        16,
    )


# augmentation against slices, with the same offsets


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_crop_against_a_loop(dtype):
    x = torch.randint(0, 256, (50, 2, 7, 9), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = D.random_crop(x, 3, torch.Generator().manual_seed(5))
    shift = torch.randint(-3, 4, (2, 50, 1), generator=torch.Generator().manual_seed(5))[
        ..., 0
    ].tolist()
    for i in range(50):
        wide = np.pad(x[i].numpy(), ((0, 0), (3, 3), (3, 3)), mode="reflect")
        a, b = 3 + shift[0][i], 3 + shift[1][i]
        assert np.array_equal(out[i], wide[:, a : a + 7, b : b + 9])
    assert out.dtype == dtype


@pytest.mark.cuda
def test_floats_and_augmentation_on_a_gpu():
    s = D.ImageSet(torch.arange(256).byte().view(1, 1, 16, 16), torch.zeros(1).long(), ("a",))
    assert torch.equal(s.to("cuda").floats().cpu(), s.floats())
    gen = torch.Generator("cuda").manual_seed(0)
    assert D.augment(s.to("cuda").x, "crop_flip", gen).device.type == "cuda"


def test_a_source_is_one_entry(monkeypatch):
    whole = D.load("digits").test
    monkeypatch.setitem(D.SOURCES, "mine", lambda root, size: (whole, None))
    assert len(D.load("mine").train) < len(whole)
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        D.load("mime")


def test_the_order_of_the_labels_or_its_reverse():
    data = D.load("digits")
    tail = D.long_tailed(data, 10)
    counts = tail.train.counts()
    assert counts == sorted(counts, reverse=True) and counts[0] / counts[-1] == pytest.approx(
        10, 0.1
    )
    assert tail.test.digest() == data.test.digest() and tail.val.digest() == data.val.digest()
