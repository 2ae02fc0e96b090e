"""What strangers bring: networks, files and checkpoints that were right elsewhere. Each test is an
example that once gave a wrong number without a word, or died after the work, with its right
answer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fairmix_nb.attacks import Threat, apgd, attack_by_name, pgd
from fairmix_nb.audit import audit, audit_checkpoint
from fairmix_nb.compare import Comparison, compare, preset
from fairmix_nb.data import ImageSet, each_class, load
from fairmix_nb.diagnosis import attackable
from fairmix_nb.methods import TrainCfg
from fairmix_nb.mixup import SameClassMixup
from fairmix_nb.models import LogitsOnly, as_attacked, build, fold_batchnorm, small_cnn
from fairmix_nb.train import fit

QUIET = dict(progress=False, device="cpu")
FEW = ("clean", "fgsm", "pgd-5")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits", progress=False)


@pytest.fixture(scope="module")
def trained(digits):
    cfg = TrainCfg(eps=0.1, epochs=3, batch=64, lr=3e-3, attack="none")
    return fit(build("small_cnn", 10, 1), digits, cfg, "natural", watched=1, **QUIET).model


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRMIX_CACHE", str(tmp_path / "cache"))


# ---- gradients that are no numbers


class Rooted(nn.Module):
    "Two logits of three pixels; where pixel 1 is 0 its slope, 0 times infinity, is no number."

    def forward(self, x):
        x = x.flatten(1)
        return torch.stack([4 * x[:, 2] - 2 + 0 * x[:, 1].sqrt(), torch.zeros(len(x))], 1)


class Bounded(nn.Module):
    "The same, and logits that are no numbers where pixel 0 is below .45."

    def forward(self, x):
        return Rooted()(x) + 0 * (x.flatten(1)[:, :1] - 0.45).log()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("net", [Rooted(), Bounded()], ids=["gradient", "logits"])
def test_what_is_no_number_hides_nothing_and_breaks_nothing(net, norm):
    x = torch.tensor([0.5, 0.0, 0.52]).repeat(20, 1).view(20, 3, 1, 1)
    y = torch.zeros(20).long()  # all breakable: pixel 2 may fall to .37, and .5 is the border
    for name in ("pgd-20", "pgd-50x10", "apgd-ce"):
        z = attack_by_name(name)(net, x, y, 0.15, norm=norm, generator=generator())
        assert net(z).isfinite().all() and (net(z).argmax(1) == 1).all(), name
    safe = torch.tensor([0.5, 0.0, 0.9]).repeat(20, 1).view(20, 3, 1, 1)  # .75 at least: not one
    for name in ("fgsm", "pgd-50x10", "apgd-ce"):
        found = audit(net, (safe, y), Threat(0.15, norm), ("clean", name), diagnose=20, **QUIET)
        assert found.flags().sum() == 0, name
        check = {c["check"]: c for c in found.record["diagnosis"]}["numbers"]
        assert check["state"] == "flag" and "do not trust" in found.verdict


def test_points_behind_a_root_are_not_broken_because_they_are_not_numbers():
    w = torch.randn(64, 4, generator=generator(0))
    x = torch.rand(200, 1, 8, 8, generator=generator(1)) * 0.5 + 0.3
    y = (x.flatten(1) - 0.1).sqrt().mm(w).argmax(1)

    def net(x):
        return (x.flatten(1) - 0.1).sqrt() @ w

    for attack in (apgd, pgd):
        z = attack(net, x, y, 0.25, generator=generator())
        assert net(z).isfinite().all() and 0.3 < (net(z).argmax(1) != y).float().mean()


def test_an_image_without_logits_is_refused_and_a_step_that_has_none_is_told():
    x, y = torch.full((4, 3, 1, 1), 0.52), torch.zeros(4).long()
    x[1, 0] = 0.1
    with pytest.raises(ValueError, match="logits must be finite"):
        audit(Bounded(), (x, y), 0.1, ("clean",), diagnose=0, **QUIET)
    x[:, 0] = 0.46

    def steep(x):  # one step to the left, and there is nothing
        return Bounded()(x) + x.flatten(1)[:, :1] * torch.tensor([1.0, 0.0])

    with pytest.warns(UserWarning, match="no numbers at 1.0 of the attacked images"):
        found = audit(steep, (x, y), 0.1, ("clean", "fgsm"), diagnose=0, **QUIET)
    assert found.record["attacks"]["fgsm"]["lost"] == 4 and found.flags("fgsm").sum() == 0


# ---- folding


class Standardised(nn.Conv2d):
    "Weight standardisation: the kernels that are used are not those that are stored."

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias, self.stride, 1)


def head(conv):
    net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    net[1].running_mean.uniform_(-1, 1), net[1].running_var.uniform_(0.1, 2)
    return net.eval()


class Twice(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Reversed(nn.Module):
    "A container that runs a Sequential's layers in an order of its own."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))
        self.body[1].running_var.fill_(0.01)
        self.body[1].running_mean.fill_(1.0)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body[0](self.body[1](x)).flatten(1))


def with_hook():
    net = head(nn.Conv2d(1, 8, 3, padding=1))
    net[0].register_forward_hook(lambda m, args, out: 3 * out)
    return net


@pytest.mark.parametrize(
    "net",
    [
        head(Standardised(1, 8, 3)),
        with_hook(),
        nn.Sequential(
            Twice(*head(nn.Conv2d(1, 8, 3, padding=1))[:3]), nn.Flatten(), nn.Linear(512, 10)
        ).eval(),
        head(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3, padding=1))),
        head(nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 8, 3, padding=1))),
        head(nn.utils.prune.random_unstructured(nn.Conv2d(1, 8, 3, padding=1), "weight", 0.5)),
    ],
    ids=["standardised", "hook", "own forward", "weight norm", "spectral norm", "pruned"],
)
def test_only_a_plain_pair_is_folded(net, digits):
    x = digits.test.floats(torch.arange(40))
    with torch.no_grad():
        torch.testing.assert_close(fold_batchnorm(net)(x), net(x))
        torch.testing.assert_close(attackable(net, x=x)(x), net(x))


def test_a_folded_copy_that_says_something_else_is_dropped_with_a_note(digits):
    x, net = digits.test.floats(torch.arange(40)), Reversed().eval()
    assert (fold_batchnorm(net)(x) - net(x)).abs().max() > 0.1  # by its types it may be folded
    with pytest.warns(UserWarning, match="BatchNorm is not folded"):
        torch.testing.assert_close(as_attacked(net, x)(x), net(x))


# ---- iterators, counts


def test_whatever_can_be_gone_through_once_is_counted_once(digits, trained):
    x, y = digits.test.floats(torch.arange(40)), digits.test.y[:40]
    whole = audit(trained, (x, y), 0.1, FEW, diagnose=40, batch=10, **QUIET)
    assert whole.n.sum() == 40
    for ways in (
        zip(x.split(10), y.split(10)),
        ((a, b) for a, b in zip(x.split(10), y.split(10))),
        iter([(x, y)]),
        [(x[:20], y[:20]), (x[20:], y[20:])],
        DataLoader(TensorDataset(x, y), batch_size=10),
    ):
        once = audit(trained, ways, 0.1, FEW, diagnose=40, **QUIET)
        assert once.record["test"] == whole.record["test"] and once.n.tolist() == whole.n.tolist()
        assert np.array_equal(once.flags("fgsm"), whole.flags("fgsm"))


def test_five_of_each_are_five_of_each():
    y = torch.repeat_interleave(torch.arange(3), torch.tensor([600, 60, 12]))
    images = ImageSet(torch.zeros(672, 1, 4, 4, dtype=torch.uint8), y, ("a", "b", "c"))
    assert each_class(images, 5).counts() == [5, 5, 5]
    with pytest.raises(ValueError, match=r"\[1, 12\], the smallest class, got 13"):
        each_class(images, 13)


# ---- identity


def test_an_audit_goes_on_with_the_same_network_only(digits, trained, tmp_path):
    job = dict(data=digits.test.subset(torch.arange(60)), eps=0.1, attacks=FEW, diagnose=0, **QUIET)
    audit(trained, **job, out=tmp_path)
    audit(trained, **job, out=tmp_path, resume=True)
    other = nn.Sequential(*trained)
    other[-1] = nn.Linear(512, 10)
    other[-1].load_state_dict(trained[-1].state_dict())
    other[-1].weight.data[0, 0] += 1e-5  # no logit moves by a thousandth
    with pytest.raises(ValueError, match="model differ"):
        audit(other, **job, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="logits differ"):  # no weight, but another function
        audit(nn.Sequential(*trained, nn.Hardtanh(-2, 2)), **job, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="classes differ"):
        audit(trained, **job, out=tmp_path, resume=True, classes="abcdefghij")


ACT = [torch.relu]


class Coded(nn.Module):
    "What it computes is in its code, not in its weights."

    def __init__(self, n_cls, in_ch, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(64 * in_ch, 16), nn.Linear(16, n_cls)

    def forward(self, x):
        return self.b(ACT[0](self.a(x.flatten(1))))


def test_a_comparison_goes_on_with_the_same_things_only(digits, tmp_path, monkeypatch):
    def go_on(data, resume=True):
        job = dict(cfg=preset("digits", 1)[1], model=Coded, out=tmp_path / "a", progress=False)
        return compare(data, ("natural",), (0,), resume=resume, device="cpu", **job)

    first = go_on(digits, resume=False)
    assert go_on(digits).record["runs"] == first.record["runs"]
    monkeypatch.setitem(globals(), "ACT", [torch.tanh])
    with pytest.raises(ValueError, match="the logits are others"):
        go_on(digits)
    monkeypatch.undo()
    x = digits.train.x.clone()
    x[0, 0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="the images are others"):
        go_on(replace(digits, train=replace(digits.train, x=x)))
    parts = {
        p: replace(getattr(digits, p), classes=tuple("abcdefghij"))
        for p in ("train", "val", "test")
    }
    with pytest.raises(ValueError, match="the classes are others"):
        go_on(replace(digits, **parts))


def test_test_parts_that_differ_are_no_folds(digits):
    path = Path(__file__).parent.parent / "nbs" / "results" / "digits.json"
    record = json.loads(path.read_text())
    Comparison(record).flags("at")
    record["data"]["split"]["rule"] = "official test"
    with pytest.raises(ValueError, match="must share a test part, or be folds of one set"):
        Comparison(record).flags("at")


def png(path, value=0, size=(8, 8), **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path, **kw)


def tree(top, classes=("cat", "dog"), n=9, first=0):
    for k in classes:
        for i in range(n):
            png(top / k / f"{i}.png", first + i)
    return top


def test_a_name_that_means_two_things_says_so(tmp_path, monkeypatch, no_cache):
    tree(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="./digits means the folder"):
        assert load("digits", progress=False).train.n_cls == 10
    mine = load("./digits", progress=False)
    assert (mine.train.n_cls, mine.name) == (2, "digits (folder)")
    assert preset(mine.name)[0] == "resnet20"  # and not the recipe of the embedded set


def test_a_commit_is_this_packages_or_none(tmp_path):
    root, package = Path(__file__).parent.parent, tmp_path / "project" / "venv" / "fairmix_nb"
    package.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(root / "fairmix_nb"), str(package)], check=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], cwd=tmp_path / "project", check=True)
    code = "from fairmix_nb.records import provenance; print(provenance()['commit'])"
    env = os.environ | dict(PYTHONPATH=str(package.parent))
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert said.stdout.strip() == "None", said


# ---- moved or renamed


def test_a_renamed_class_or_another_size_is_refused_with_the_difference(tmp_path, no_cache):
    top = tmp_path / "pets"
    for part, n in (("train", 12), ("test", 4)):
        tree(top / part, n=n, first=100 * (part == "test"))
    data = load(top, size=6, progress=False)
    cfg = TrainCfg(eps=0.1, epochs=1, batch=8, attack="none")
    fit(small_cnn(2, 1), data, cfg, "natural", out=tmp_path / "run", watched=1, **QUIET)
    alone = tmp_path / "last.pt"  # without its record: the size is in the checkpoint
    alone.write_bytes((tmp_path / "run" / "last.pt").read_bytes())
    kw = dict(attacks=("clean",), diagnose=0, **QUIET)
    a, b = (audit_checkpoint(p, str(top), **kw) for p in (tmp_path / "run", alone))
    assert a.record["test"] == b.record["test"]
    with pytest.raises(ValueError, match=r"images of another shape, got \[1, 6, 6\] then"):
        audit_checkpoint(alone, str(top), size=8, **kw)
    for part in ("train", "test"):
        (top / part / "cat").rename(top / part / "zebra")
    with pytest.raises(ValueError, match="other classes .* got cat, zebra differ"):
        audit_checkpoint(tmp_path / "run", str(top), **kw)


# ---- folders


def test_no_image_comes_in_twice(tmp_path, no_cache):
    top = tree(tmp_path / "pets")
    (top / "cat" / "up").symlink_to(top)
    (top / "cat" / "around").symlink_to(tmp_path)
    (top / "dog" / "again.png").symlink_to(top / "dog" / "1.png")
    with pytest.warns(UserWarning, match="2 links to a folder around them, 1 links to images"):
        data = load(top, progress=False)
    assert len(data.train) + len(data.val) + len(data.test) == 18
    (top / "dog" / "mine.png").symlink_to(top / "cat" / "1.png")
    with pytest.raises(ValueError, match="must have one class, got it in 'cat' too"):
        load(top, progress=False)
    both = tmp_path / "both"
    tree(both / "train"), tree(both / "test", first=50)
    (both / "test" / "cat" / "seen.png").symlink_to(both / "train" / "cat" / "3.png")
    with pytest.raises(ValueError, match="must not share images, got 1 in both"):
        load(both, progress=False)


def test_what_is_passed_over_is_counted(tmp_path, no_cache):
    top = tree(tmp_path / "pets")
    for i in range(3):
        png(top / "cat" / f"moving{i}.gif")
    png(top / "dog" / "phone.jfif", format="JPEG")
    with pytest.warns(UserWarning, match=r"passed over 3 .gif, 1 .jfif"):
        load(top, progress=False)


def test_orientation_is_applied_and_said(tmp_path, no_cache):
    top, exif = tree(tmp_path / "pets", n=3), Image.Exif()
    upright = np.arange(64, dtype=np.uint8).reshape(8, 8)
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(top / "cat" / "0.png", exif=exif)
    with pytest.warns(UserWarning, match="1 images turned as their EXIF orientation says"):
        from fairmix_nb.data import load_folder

        found = load_folder(top, progress=False)
    assert (found.x[0, 0].numpy() == upright).all()


def test_a_file_that_changed_and_kept_its_times_is_read_again(tmp_path, no_cache):
    from fairmix_nb.data import load_folder

    top = tree(tmp_path / "pets", n=2)
    path = top / "cat" / "0.png"
    before, kept = load_folder(top, progress=False).digest(), os.stat(path)
    raw = path.read_bytes()
    png(path, 77)
    new = path.read_bytes()
    assert len(new) == len(raw) and new != raw
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    found = load_folder(top, progress=False)
    assert found.digest() != before and int(found.x[0].max()) == 77


# ---- probabilities


class Ends(nn.Module):
    def __init__(self, net, end):
        super().__init__()
        self.net, self.end = net, end

    def forward(self, x):
        z = self.net(x)
        return z.softmax(1) if self.end == "softmax" else z.sigmoid()


@pytest.mark.parametrize("end", ["softmax", "sigmoid"])
def test_probabilities_are_said_before_the_attack_and_undone_by_one_line(trained, digits, end):
    some = digits.test.subset(torch.arange(120))
    job = dict(data=some, eps=0.06, attacks=("clean", "pgd-20"), **QUIET)
    net, logits = Ends(trained, end), audit(trained, **job).flags().sum()
    with pytest.warns(UserWarning, match=r"LogitsOnly\(model, probabilities=True\)"):
        blind = audit(net, **job)
    assert "probabilities in the place of logits (outputs)" in blind.verdict
    seeing = audit(LogitsOnly(net, probabilities=True), **job)
    assert abs(int(seeing.flags().sum()) - int(logits)) <= 2 and "outputs" not in seeing.flagged


# ---- workers


class Batches:
    "A collate function, as torchvision's documentation has it."

    def __init__(self, mixer):
        self.mixer = mixer

    def __call__(self, rows):
        x, y = default_collate(rows)
        return self.mixer(x, y)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_weights_of_their_own(persistent):
    x = torch.cat([torch.zeros(64, 1), torch.ones(64, 1)])[
        torch.randperm(128, generator=generator(1))
    ]
    data = TensorDataset(x, torch.zeros(128).long())

    def two_epochs():
        mixer = SameClassMixup(1, generator=generator(3))
        loader = DataLoader(
            data,
            8,
            collate_fn=Batches(mixer),
            num_workers=4,
            generator=generator(5),
            persistent_workers=persistent,
        )
        return [b[0].flatten().tolist() for _ in range(2) for b in loader]

    found = two_epochs()
    values = [tuple(sorted({round(v, 6) for v in b} - {0.0, 1.0})) for b in found]
    seen = [v for b in values for v in b]
    assert len(seen) > 50 and len(set(seen)) > 0.95 * len(seen)  # no weight comes twice
    assert found == two_epochs()  # and all come again
