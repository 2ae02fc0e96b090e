"""What strangers bring: networks, files and checkpoints that were right elsewhere. Each test is an
example that once gave a wrong number without a word, or died after the work, with its right
answer."""

import cProfile
import errno
import json
import math
import os
import pstats
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fairmix_nb.attacks import Threat, apgd, attack_by_name, pgd
from fairmix_nb.audit import audit, audit_checkpoint
from fairmix_nb.compare import Comparison, compare, preset
from fairmix_nb.data import ImageSet, each_class, load
from fairmix_nb.diagnosis import attackable
from fairmix_nb.methods import TrainCfg
from fairmix_nb.mixup import SameClassMixup
from fairmix_nb.models import LogitsOnly, as_attacked, build, fold_batchnorm, small_cnn
from fairmix_nb.records import digest
from fairmix_nb.runs import load_model
from fairmix_nb.train import fit, resume

QUIET = dict(progress=False, device="cpu")
FEW = ("clean", "fgsm", "pgd-5")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits", progress=False)


@pytest.fixture(scope="module")
def trained(digits):
    cfg = TrainCfg(eps=0.1, epochs=3, batch=64, lr=3e-3)
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

    with pytest.warns(UserWarning, match="no numbers at 1.00 of the attacked images"):
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
        head(prune.random_unstructured(nn.Conv2d(1, 8, 3, padding=1), "weight", 0.5)),
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
    def go_on(data, again=True):
        job = dict(cfg=preset("digits", 1)[1], model=Coded, out=tmp_path / "a", progress=False)
        return compare(data, ("natural",), (0,), resume=again, device="cpu", **job)

    first = go_on(digits, again=False)
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
    cfg = TrainCfg(eps=0.1, epochs=1, batch=8)
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
    with pytest.raises(ValueError, match="other classes .* cat, zebra differ"):
        audit_checkpoint(tmp_path / "run", str(top), **kw)


# ---- folders


def test_no_image_comes_in_twice(tmp_path, no_cache):
    top = tree(tmp_path / "pets")
    (top / "cat" / "up").symlink_to(top)
    (top / "cat" / "around").symlink_to(tmp_path)
    (top / "dog" / "again.png").symlink_to(top / "dog" / "1.png")
    with pytest.warns(
        UserWarning, match="2 links to a folder around them, 1 images that are there"
    ):
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
    path = top / "cat" / "0.bmp"
    png(path, 5)
    before, kept = load_folder(top, progress=False), os.stat(path)
    png(path, 77)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (kept.st_size, kept.st_mtime_ns)
    found = load_folder(top, progress=False)
    assert (int(before.x[0].max()), int(found.x[0].max())) == (5, 77)


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


# ---- any torch module


class Habit(nn.Module):
    "A small network with habits: how it flattens, what it keeps, what it returns."

    def __init__(self, habit="", n_cls=10):
        super().__init__()
        self.habit, self.body = habit, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4 * 36, n_cls)
        if habit == "attribute":
            self.scale = torch.ones(1, requires_grad=True) * 2  # a tensor with a history
        if habit == "old weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(self.head)
        if habit == "old spectral norm":
            nn.utils.spectral_norm(self.head)
        if habit == "conv3d":
            self.deep = nn.Conv3d(1, 1, 1)

    def forward(self, x):
        if self.habit == "conv3d":
            x = self.deep(x[:, None])[:, 0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.habit == "autocast"):
            z = self.body(x).relu()
            z = self.head(z.view(len(z), -1))
        if self.habit == "attribute":
            z = self.scale * z
        if self.habit == "random":
            z = z + torch.randn_like(z)
        forms = {"tuple": (z, x), "dict": dict(logits=z), "one": z[:, :1], "flat": z[:, 0]}
        return forms.get(self.habit, z)


def script(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
        return torch.jit.script(net.eval())


STRANGE = {
    h: lambda h=h: Habit(h)
    for h in ("view", "attribute", "conv3d", "autocast", "old weight norm", "old spectral norm")
} | {
    "double": lambda: Habit().double(),
    "bfloat16": lambda: Habit().bfloat16(),
    "half": lambda: Habit().half(),
    "TorchScript": lambda: script(None),
    "frozen": lambda: Habit().requires_grad_(False),
}


@pytest.mark.parametrize("name", STRANGE)
def test_any_module_is_audited_as_a_plain_reference_does(digits, name):
    torch.manual_seed(0)
    net, few = STRANGE[name]().eval(), digits.test.subset(torch.arange(12))
    x, y = few.floats(), few.y
    found = audit(net, (x, y), 0.1, ("clean", "fgsm"), diagnose=12, **QUIET)
    dtype = next(net.parameters()).dtype
    want = []
    for image, label in zip(x, y):  # one by one, unfolded, by loss.backward()
        z = image[None].clone().requires_grad_()
        F.cross_entropy(net(z.to(dtype)).float(), label[None]).backward(retain_graph=True)
        moved = (z + 0.1 * z.grad.sign()).clamp(0, 1).detach()
        want.append([net(v.to(dtype)).argmax(1).item() != label for v in (image[None], moved)])
    order = np.argsort(y.numpy(), kind="stable")
    differ = sum(
        (found.flags(a, raw=True) != w).sum()
        for a, w in zip(("clean", "fgsm"), np.array(want).T[:, order])
    )
    assert differ <= (2 if name in ("autocast", "bfloat16", "half") else 0)


@pytest.mark.parametrize("habit", ["tuple", "dict", "one", "flat"])
def test_other_outputs_are_refused_with_the_wrapper_that_helps(digits, habit):
    torch.manual_seed(0)
    net, few = Habit(habit).eval(), digits.test.subset((digits.test.y < 2).nonzero()[:12, 0])
    x, y = few.floats(), few.y
    with pytest.raises(ValueError, match=r"models.LogitsOnly\(model\)"):
        audit(net, (x, y), 0.1, ("clean",), diagnose=0, **QUIET)
    wrapped = LogitsOnly(net)
    assert audit(wrapped, (x, y), 0.1, FEW, diagnose=0, **QUIET).n.sum() == 12
    if habit in ("one", "flat"):  # class 1 where the logit is positive
        logit = net(x).reshape(len(x))
        assert (wrapped(x).argmax(1) == (logit > 0)).all()


def test_auxiliary_outputs_are_refused_before_training(digits):
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Habit()

        def forward(self, x):
            return (self.net(x), self.net(x)) if self.training else self.net(x)

    cfg = TrainCfg(eps=0.1, epochs=1, batch=256)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="in training mode model must return logits .* got tuple"):
        fit(Aux(), digits, cfg, "natural", **QUIET)
    assert torch.equal(torch.get_rng_state()[:8], before[:8])
    fit(LogitsOnly(Aux()), digits, cfg, "natural", watched=1, **QUIET)
    with pytest.raises(ValueError, match=r"float32 weights, got torch.float64: model.float\(\)"):
        fit(Habit().double(), digits, cfg, "natural", **QUIET)


# ---- checkpoints of others


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "net", "ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_found_under_the_names_that_others_give(tmp_path, key, prefix):
    net, path = build("small_cnn", 10, 1, seed=4), tmp_path / "theirs.pt"
    weights = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({key: weights, "epoch": 7, "arch": "x"} if key else weights, path)
    found = load_model(path, 10, 1)[0].state_dict()
    assert all(torch.equal(v, found[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("held", [build("small_cnn", 10, 1), dict(model={}, best=np.float64(0.3))])
def test_what_is_no_tensor_is_refused_with_the_way_to_convert_it(tmp_path, held):
    torch.save(held, tmp_path / "theirs.pt")
    with pytest.raises(
        ValueError, match=r"save model.state_dict\(\), and NumPy's numbers as float"
    ):
        load_model(tmp_path / "theirs.pt", 10, 1)


def test_a_compiled_network_leaves_a_checkpoint_like_any_other(tmp_path, digits):
    cfg = TrainCfg(eps=0.1, epochs=1, batch=256)
    plain = fit(build("small_cnn", 10, 1), digits, cfg, "natural", watched=1, **QUIET).model
    net = torch.compile(build("small_cnn", 10, 1), backend="eager")
    fit(net, digits, cfg, "natural", out=tmp_path / "run", watched=1, **QUIET)
    found = load_model(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(v, found[k]) for k, v in plain.state_dict().items())
    resume(tmp_path / "run", build("small_cnn", 10, 1), digits, **QUIET)
    assert audit_checkpoint(tmp_path / "run", attacks=("clean",), diagnose=0, **QUIET).n.sum()


def test_a_run_from_a_gpu_goes_on_here_and_says_what_changes(tmp_path, digits):
    cfg, out = TrainCfg(eps=0.1, epochs=2, batch=256), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(build("small_cnn", 10, 1), digits, cfg, "at", out=out, on_epoch=stop, **QUIET)
    found = torch.load(out / "last.pt", weights_only=True)
    for name in found["streams"]:  # a CUDA generator's state: seed and offset
        found["streams"][name] = torch.arange(16, dtype=torch.uint8)
    del found["sha256"]
    torch.save(dict(found, sha256=digest(found)), out / "last.pt")
    (out / "previous.pt").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="begin anew: those of another kind of device"):
        assert resume(out, build("small_cnn", 10, 1), digits, **QUIET).record["epochs_done"] == 2


def stop(row):
    raise KeyboardInterrupt


# ---- small things that killed a run


def test_a_last_batch_of_one_joins_the_one_before(digits):
    n = len(digits.train)
    size = next(k for k in range(64, n) if n % k == 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    cfg = TrainCfg(eps=0.1, epochs=2, batch=size)
    with pytest.warns(UserWarning, match="a last batch of 1 joins the one before") as told:
        fit(net, digits, cfg, "natural", watched=1, **QUIET)
    assert sum("last batch" in str(w.message) for w in told) == 1
    dropped = fit(net, digits, replace(cfg, drop_last=True), "natural", watched=1, **QUIET)
    assert dropped.record["gradient_evaluations"] == 2 * (n - 1)
    with pytest.raises(ValueError, match="drop_last must be True or False, got 'yes'"):
        TrainCfg(drop_last="yes")


def test_images_of_four_pixels_a_side():
    assert small_cnn(3, 1)(torch.rand(2, 1, 4, 4)).shape == (2, 3)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL])
def test_file_systems_without_locks_or_flushed_folders_are_warned_of(
    tmp_path, digits, monkeypatch, number
):
    fcntl, fsync = pytest.importorskip("fcntl"), os.fsync

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    def only_files(at):
        return refuse() if os.path.isdir(f"/proc/self/fd/{at}") else fsync(at)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", only_files)
    cfg = TrainCfg(eps=0.1, epochs=1, batch=256)
    with pytest.warns(UserWarning) as told:
        fit(build("small_cnn", 10, 1), digits, cfg, "natural", out=tmp_path / "run", **QUIET)
    said = " ".join(str(w.message) for w in told)
    assert "cannot be locked" in said and "cannot be flushed" in said
    assert load_model(tmp_path / "run")[1]["epoch"] == 1


def test_a_name_that_no_terminal_can_show_costs_nothing(tmp_path):
    top = os.fsencode(tmp_path / "pets")
    for k in (b"caf\xe9", "日本".encode(), b"dog"):
        os.makedirs(os.path.join(top, k))
        for i in range(6):
            Image.new("L", (8, 8), 20 * i).save(os.fsdecode(os.path.join(top, k, b"%d.png" % i)))
    env = os.environ | dict(PYTHONIOENCODING="cp1252:strict", FAIRMIX_CACHE=str(tmp_path / "c"))
    env |= dict(PYTHONPATH=str(Path(__file__).parent.parent))

    def fairmix(*words):
        done = subprocess.run(
            [sys.executable, "-m", "fairmix_nb.cli", *words],
            env=env,
            cwd=tmp_path,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        return done.stdout

    fairmix(
        "train",
        "--data",
        "pets",
        "--model",
        "small_cnn",
        "--epochs",
        "1",
        "--batch",
        "4",
        "--out",
        "run",
    )
    fairmix("audit", "run", "--data", "pets", "--attacks", "clean,fgsm", "--out", "report")
    assert b"caf\\udce9" in fairmix("show", "report")
    assert json.loads((tmp_path / "report" / "audit.json").read_text())["classes"][0] == "caf\udce9"


def test_numbers_of_numpy_and_pixels_with_a_rounding(digits, trained, tmp_path):
    few = digits.test.subset(torch.arange(20))
    kw = dict(attacks=("clean", "fgsm"), diagnose=0, **QUIET)
    plain = audit(trained, few, 0.1, sweep=(0.0625, 1.0), seed=3, **kw)
    odd = audit(
        trained,
        few,
        np.float64(0.1),
        sweep=np.array([0.0625, 1]),
        seed=np.int64(3),
        batch=np.int32(256),
        out=tmp_path,
        **kw,
    )
    assert plain.record["sweep"] == odd.record["sweep"] and np.array_equal(
        plain.flags(), odd.flags()
    )
    assert abs(audit(trained, few, np.float32(0.1), **kw).threat.eps - 0.1) < 1e-8
    x, y = few.floats(), few.y
    near = audit(trained, (x + 1e-7 * (x == 1), y), 0.1, **kw)
    assert (
        near.record["attacks"]["fgsm"]["flags"]
        == audit(trained, (x, y), 0.1, **kw).record["attacks"]["fgsm"]["flags"]
    )
    with pytest.raises(ValueError, match=r"max 1\.0000020"):
        audit(trained, (x + 2e-6 * (x == 1), y), 0.1, **kw)


# ---- randomised networks, and what users ask for


def test_dice_are_recognised_averaged_and_repeated(digits):
    torch.manual_seed(0)
    net, few = Habit("random").eval(), digits.test.subset(torch.arange(60))
    job = dict(attacks=("clean", "pgd-5"), diagnose=60, **QUIET)
    three = [audit(net, few, 0.05, **job) for _ in range(3)]
    assert all(r.record["diagnosis"] == three[0].record["diagnosis"] for r in three)
    assert all(np.array_equal(r.flags(), three[0].flags()) for r in three)
    assert (
        "a randomised network (dice)" in three[0].verdict and "neighbours" not in three[0].flagged
    )
    state = torch.get_rng_state()
    averaged = audit(net, few, 0.05, eot=8, **job)
    assert torch.equal(state, torch.get_rng_state())  # the caller's dice were not thrown
    found = {c["check"]: c for c in averaged.record["diagnosis"]}["dice"]
    assert found["state"] == "note" and "mean of 8 passes" in found["sentence"]
    spent = [r.record["attacks"]["pgd-5"]["gradients"] for r in (three[0], averaged)]
    assert spent[1] > 4 * spent[0]


def test_adversarial_images_are_kept_and_can_be_bytes(digits, trained, tmp_path):
    few = digits.test.subset(torch.arange(30))
    job = dict(attacks=("clean", "fgsm"), batch=10, diagnose=0, out=tmp_path, **QUIET)
    found = audit(trained, few, 0.1, quantise=True, save_images=True, **job)
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 6
    wrong = 0
    for path in files:
        with np.load(path) as kept:
            z, y = torch.from_numpy(kept["attacked"]), torch.from_numpy(kept["y"])
            assert torch.equal((255 * z).round() / 255, z)
            wrong += int((trained(z).argmax(1) != y).sum()) * ("fgsm" in path.name)
    assert wrong == found.flags("fgsm", raw=True).sum()
    with pytest.raises(ValueError, match="save_images needs out"):
        audit(trained, few, 0.1, save_images=True, **QUIET)


def test_a_model_in_training_mode_is_said(digits, trained):
    few = digits.test.subset(torch.arange(10))
    net = nn.Sequential(*trained).train()
    with pytest.warns(UserWarning, match="came in training mode"):
        audit(net, few, 0.1, ("clean",), diagnose=0, **QUIET)
    assert net.training


# ---- odd values that ten thousand drawn ones met


@pytest.mark.parametrize("name", ["clean", "pgd-1x3"])
@pytest.mark.parametrize(
    "x, y, told",
    [
        (torch.full((2, 1, 3, 3), math.inf), torch.tensor([0, 1]), "x must lie in the box"),
        (torch.rand(2, 1, 3, 3), torch.tensor([], dtype=torch.half), "one label per sample"),
        (torch.rand(2, 1, 3, 3), torch.tensor([0.0, 1.0]), "long or"),
        (torch.tensor(0.5), torch.tensor(0), "shape"),
    ],
)
def test_attacks_by_name_look_before_they_begin(name, x, y, told):
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=told):
        attack_by_name(name)(lambda z: z.flatten(1)[:, :2], x, y, 0.1, generator=g)


def test_images_in_bfloat16_are_audited():
    x, y = torch.rand(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3

    def net(z):
        return z.flatten(1).float()[:, :3]

    found, want = (
        audit(net, (v, y), 0.1, ("clean",), diagnose=0, **QUIET) for v in (x.bfloat16(), x)
    )
    assert (found.flags("clean") == want.flags("clean")).all()


@pytest.mark.parametrize("y", [torch.tensor(0), torch.arange(3), [0, 1]])
def test_a_pair_that_is_none_is_refused(y):
    with pytest.raises(ValueError, match="x and y must be tensors, equally many"):
        audit(lambda z: z.flatten(1), (torch.rand(2, 1, 2, 1), y), 0.1, **QUIET)


NEW = (
    "attackable identity check_images check_labels check_pair number_check output_check dice_check"
)


@pytest.mark.slow
def test_the_checks_cost_an_audit_less_than_two_percent(capsys):
    "Looking for what is no number, folding compared, identity by content: share of the time."
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    data = torch.rand(200, 3, 32, 32, generator=g), torch.arange(200) % 10
    seen = cProfile.Profile()
    attacks = ("clean", "fgsm", "pgd-50", "apgd-ce", "apgd-t")
    seen.runcall(audit, build("resnet20", 10, 3, 0).eval(), data, 8 / 255, attacks, **QUIET)
    stats = pstats.Stats(seen).stats  # (file, line, name) -> calls, own calls, own time, time with

    def spent(*names):
        return sum(v[3] for k, v in stats.items() if k[2] in names)

    digests = sum(v[3] for k, v in stats.items() if k[2] == "add" and "audit" in k[0])
    finite = sum(v[2] for k, v in stats.items() if "isfinite" in k[2])
    share = (spent(*NEW, "dice_check") + digests + finite) / spent("audit")
    with capsys.disabled():
        print(f"\nchecks: {100 * share:.2f} % of {spent('audit'):.0f} s")
    assert spent("attackable") and spent("identity") and finite
    assert share < 0.02
