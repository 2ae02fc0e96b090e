"What may not happen to what a run leaves: lost work, other bits, half-written files, foreign code."

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fairmix_nb import data as D
from fairmix_nb import runs as R
from fairmix_nb import train as T
from fairmix_nb.methods import Averaged, LogitAdjusted, Method, Pipeline, TrainCfg
from fairmix_nb.models import build
from fairmix_nb.records import digest

HERE = Path(__file__).resolve().parent
CFG = TrainCfg(eps=0.1, epochs=4, batch=64, lr=3e-3, smoothing=0.1)
MIXED = Pipeline(("attack", "mix"))
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and locks")


@pytest.fixture(scope="module")
def digits():
    whole = D.load("digits", seed=0, per_class=16, progress=False)
    return replace(whole, val=whole.val.subset(torch.arange(20)))


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )


def fit(data, cfg=CFG, method=MIXED, **kw):
    return T.fit(network(), data, cfg, method, device="cpu", progress=False, **kw)


def resume(out, data, cfg=None, method=None, **kw):
    return T.resume(out, network(9), data, cfg, method, device="cpu", progress=False, **kw)


def stop_after(epoch, error=KeyboardInterrupt):
    def stop(row):
        if row["epoch"] == epoch:
            raise error

    return stop


def same_bits(a, b):
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().items())
    return a.curves == b.curves and all(k == j and torch.equal(v, w) for (k, v), (j, w) in pairs)


@pytest.fixture
def stopped(digits, tmp_path):
    "A run that was interrupted after its third epoch: two checkpoints."
    with pytest.raises(KeyboardInterrupt):
        fit(digits, out=tmp_path / "run", on_epoch=stop_after(3))
    return tmp_path / "run"


# exact


def test_resume_keeps_how_and_refuses_what_differs(digits, stopped):
    with pytest.raises(
        ValueError,
        match=r"another configuration: eps \(0.1 then, 0.2 now\), lr \(0.003 then, 0.01 now\)",
    ):
        resume(stopped, digits, replace(CFG, eps=0.2, lr=0.01))
    with pytest.raises(ValueError, match="trained on data with digest"):
        resume(stopped, D.load("digits", progress=False))
    with pytest.raises(ValueError, match="model must have the checkpoint's weights"):
        T.resume(
            stopped,
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            digits,
            device="cpu",
            progress=False,
        )
    with pytest.raises(FileExistsError, match="resume it"):
        fit(digits, out=stopped)
    assert same_bits(fit(digits), resume(stopped, digits, CFG))


def test_another_build_is_said(digits, stopped):
    found = R.load_checkpoint(stopped)
    found["versions"]["torch"] = "1.0"
    with pytest.warns(UserWarning, match=r"last bits may differ from here on: torch \(1.0 then"):
        T.fit(network(), digits, CFG, MIXED, device="cpu", progress=False, resume_from=found)


def test_a_finished_run_is_not_run_again(digits, tmp_path):
    done = fit(digits, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"last.pt", "previous.pt", "record.json", "curves.csv"}
    again = resume(tmp_path, digits)
    assert same_bits(done, again) and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert json.loads(before["record.json"])["finished"] and before["curves.csv"].count(b"\n") == 5


def test_a_checkpoint_that_lacked_only_its_name_gets_it(digits, stopped, tmp_path, monkeypatch):
    "Killed between the two renames of a write: the newest is new.pt, and there is no last.pt."
    done = fit(digits, out=tmp_path / "done")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "done").iterdir()}
    (tmp_path / "done" / "last.pt").rename(tmp_path / "done" / "new.pt")
    with pytest.warns(UserWarning, match="last.pt is missing: going on from .*new.pt, epoch 4"):
        again = resume(tmp_path / "done", digits)
    assert (
        same_bits(done, again)
        and {p.name: p.read_bytes() for p in (tmp_path / "done").iterdir()} == whole
    )

    def interrupted(*args):
        raise KeyboardInterrupt

    (stopped / "last.pt").rename(stopped / "new.pt")
    monkeypatch.setattr(T, "run_epoch", interrupted)
    with (
        pytest.warns(UserWarning, match="new.pt, epoch 3"),
        pytest.raises(KeyboardInterrupt, match=r"last.pt \(epoch 3\)"),
    ):
        resume(stopped, digits)
    assert (
        R.read_checkpoint(stopped / "last.pt")["epoch"] == 3 and not (stopped / "new.pt").exists()
    )


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:100],
        lambda b: b[: len(b) // 2],
        lambda b: b[:-1],
        lambda b: b"hello",
        lambda b: pickle.dumps(os.getcwd),
    ],
)
def test_damaged_last_is_said_and_previous_taken(digits, stopped, damage):
    last = stopped / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(UserWarning, match="last.pt is .*: going on from .*previous.pt, epoch 2"):
        again = resume(stopped, digits)
    assert same_bits(fit(digits), again)
    R.read_checkpoint(last)


def test_no_flipped_bit_gets_through(stopped):
    last, whole = stopped / "last.pt", (stopped / "last.pt").read_bytes()
    good = digest(R.read_checkpoint(last))
    refused = 0
    for at in range(0, len(whole), len(whole) // 200):
        last.write_bytes(flip(whole, at))
        try:
            assert digest(R.read_checkpoint(last)) == good, (
                at
            )  # padding and zip headers hold no content
        except ValueError:
            refused += 1
    assert refused > 100


def test_both_damaged(stopped, digits):
    for name in ("last.pt", "previous.pt"):
        (stopped / name).write_bytes(b"hello")
    with pytest.raises(
        ValueError, match="last.pt is not a readable.*previous.pt is not a readable"
    ):
        resume(stopped, digits)


@pytest.mark.parametrize(
    "content, says",
    [
        (dict(schema=R.CHECKPOINT + 1, sha256=""), "got schema 4: a newer fairmix_nb wrote it"),
        (dict(schema=1), "must be a checkpoint of schema 3, got schema 1"),
        ([1], "got list"),
        (nn.Linear(2, 2).state_dict(), "got OrderedDict"),
        (dict(schema=R.CHECKPOINT, sha256="0"), "does not agree with its digest"),
    ],
)
def test_foreign_checkpoints_are_refused(stopped, digits, content, says):
    torch.save(content, stopped / "last.pt")
    (stopped / "previous.pt").unlink()
    with pytest.raises(ValueError, match=says):
        resume(stopped, digits)


def test_code_in_a_checkpoint_is_not_run(stopped, digits):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(stopped / "evil"),)

    torch.save(dict(schema=R.CHECKPOINT, sha256="", x=Evil()), stopped / "last.pt")
    with pytest.warns(UserWarning, match="going on from"):
        resume(stopped, digits)
    assert not (stopped / "evil").exists()


def test_checkpoint_says_what_it_is(stopped):
    found = torch.load(stopped / "last.pt", weights_only=True)
    assert TrainCfg(**found["cfg"]) == CFG and found["epoch"] == 3 and len(found["sha256"]) == 64
    assert set(found["versions"]) == {"torch", "fairmix_nb", "cpu", "gpu", "threads"}


def test_numpy_numbers_in_a_configuration(digits, tmp_path):
    import numpy as np

    cfg = replace(CFG, eps=np.float64(0.1), epochs=1)
    fit(digits, cfg, out=tmp_path)
    assert R.load_checkpoint(tmp_path)["cfg"]["eps"] == 0.1


# what a method remembers


@dataclass(frozen=True)
class ClassRadius(Method):
    "A radius for each class, smaller where the class was wrong more often than the mean."

    rate: float = 0.5

    def start(self, run):
        return dict(radius=run.ones() * run.cfg.eps)

    def step(self, run, x, y):
        z = run.logits(run.attack(x, y, eps=run.state["radius"][y]))
        run.tally(z, y)
        return run.loss(z, y)

    def end_epoch(self, run):
        risk = run.risk()
        run.state["radius"] *= 1 - self.rate * (risk - risk.mean())


@pytest.mark.parametrize(
    "method",
    [
        ClassRadius(),
        Averaged(MIXED, decay=0.9),
        Averaged(MIXED, decay=0.5, every="epoch", gate=1.0),
        LogitAdjusted(("attack",), tau=1.0),
    ],
    ids=("radius", "ema", "gated", "adjusted"),
)
def test_a_method_with_a_memory_is_resumed(digits, tmp_path, method):
    digits = replace(digits, val=D.spread_subset(digits.train, 20))  # every class, for the gate
    whole = fit(digits, method=method)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, method=method, out=tmp_path, on_epoch=stop_after(2))
    found = R.load_checkpoint(tmp_path)
    assert found["state"] and (("result" in found) == isinstance(method, Averaged))
    assert same_bits(whole, resume(tmp_path, digits))
    forgot = dict(found, state=method.start(T.new_run(network(), digits, CFG, T.Alone(), "cpu")[0]))
    if not isinstance(method, LogitAdjusted):  # its state is a constant of the data
        other = fit(digits, method=method, resume_from=forgot)
        assert not same_bits(whole, other), "what a method remembers must matter"


def test_what_is_remembered_of_each_class_is_in_the_curves(digits, tmp_path):
    done = fit(digits, method=ClassRadius(), out=tmp_path)
    radii = torch.tensor([row["radius"] for row in done.curves])
    assert radii.shape == (4, 10) and (radii[-1] != radii[0]).any()
    assert R.curves_csv(done.curves) == (tmp_path / "curves.csv").read_text()


def test_a_checkpoint_may_be_used_twice(digits, stopped):
    "A run that goes on changes no tensor and no curve of the content that it was given."
    found = R.load_checkpoint(stopped)
    before = digest(found)
    first, second = (fit(digits, resume_from=found) for _ in range(2))
    assert digest(found) == before and same_bits(first, second)


# version 0.1

OLD = HERE / "version_0_1.pt"  # written by 0.1.0 after two of three epochs, see `old_run`


def old_run(digits):
    "What version 0.1 ran: every stream is drawn from, no sign of a gradient is taken."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    cfg = TrainCfg(eps=0.1, epochs=3, batch=64, lr=1e-2, augment="crop_flip", smoothing=0.1)
    cfg = replace(cfg, attack="noise", schedule=("step", 2, 0.1))
    return net, cfg, LogitAdjusted(("attack", "mix"), tau=1.0)


@pytest.mark.filterwarnings("ignore:the last bits may differ")
def test_a_checkpoint_of_version_0_1_goes_on(digits, tmp_path):
    assert torch.load(OLD, weights_only=True)["schema"] == 2
    (tmp_path / "last.pt").write_bytes(OLD.read_bytes())
    net, cfg, method = old_run(digits)
    whole = T.fit(old_run(digits)[0], digits, cfg, method, device="cpu", progress=False)
    again = T.resume(tmp_path, net, digits, cfg, method, device="cpu", progress=False)
    assert [row["epoch"] for row in again.curves] == [1, 2, 3]
    for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    sums = [v.double().abs().sum().item() for v in again.model.state_dict().values()]
    assert sums == pytest.approx([20.14548106107395, 0.9817968253046274], rel=1e-4)  # 0.1.0's own
    today = torch.load(tmp_path / "last.pt", weights_only=True)
    assert today["schema"] == R.CHECKPOINT and today["method"]["kind"] == "LogitAdjusted"
    assert torch.equal(R.read_start(OLD)["2.weight"], R.read_checkpoint(OLD)["model"]["2.weight"])


def test_a_damaged_or_changed_old_checkpoint_is_refused(digits, tmp_path):
    found = torch.load(OLD, weights_only=True)
    found["model"]["2.bias"][0] += 1e-3
    torch.save(found, tmp_path / "last.pt")
    with pytest.raises(R.Damaged, match="does not agree with its digest"):
        R.read_checkpoint(tmp_path / "last.pt")


# a network back from its file


def test_the_averaged_network_is_the_one_that_comes_back(digits, tmp_path):
    cfg, net = replace(CFG, epochs=2), build("small_cnn", 10, 1)
    done = T.fit(net, digits, cfg, "ema", out=tmp_path, device="cpu", progress=False)
    back, found = R.load_model(tmp_path)  # classes and channels as the checkpoint says
    x = digits.test.floats(torch.arange(8))
    torch.testing.assert_close(back(x), done.model(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["model"]["0.weight"], found["result"]["0.weight"])
    assert found["classes"] == [str(c) for c in range(10)]


def test_start_from_is_the_weights_and_nothing_else(digits, stopped):
    started = fit(digits, replace(CFG, epochs=1, lr=1e-30), start_from=stopped)
    kept = R.read_start(stopped)
    assert torch.allclose(started.model[4].weight, kept["4.weight"])
    assert started.curves[0]["epoch"] == 1
    with pytest.raises(ValueError, match="start_from must fit the model"):
        T.fit(build("small_cnn", 10, 1), digits, CFG, start_from=stopped, progress=False)


# what the weights that a run begins with have seen


def bytes_of(images):
    return [x.numpy().tobytes() for x in images.x]


def shared(images, test):
    "Images of the second part that are in the first, by their bytes."
    learnt = set(bytes_of(images))
    return sum(x in learnt for x in bytes_of(test))


def cut_by(seed, **kw):
    return D.load("digits", seed=seed, progress=False, **kw)


@pytest.fixture(scope="module")
def of_fold_0(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "at-0"
    fit(cut_by(0), replace(CFG, epochs=1), Pipeline(), out=folder)
    return folder


def begun(data, start, **kw):
    return fit(data, replace(CFG, epochs=1), Pipeline(), start_from=start, **kw)


@pytest.mark.parametrize("how", [{}, dict(per_class=16), dict(test_per_class=9)], ids=str)
def test_a_start_that_has_learnt_test_images_is_refused(of_fold_0, tmp_path, how):
    other, own = cut_by(1, **how), cut_by(0, **how)
    assert shared(cut_by(0).train, other.test) > 0.8 * len(other.test)
    with pytest.raises(ValueError, match="cut by seed 1 here, got .*cut by seed 0: begin with"):
        begun(other, of_fold_0, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert shared(cut_by(0).train, own.test) == 0
    begun(own, of_fold_0)
    before = {k: v for k, v in R.read_weights(of_fold_0)[1].items() if k != "parts"}
    assert "another cut" not in R.check_start(before, own, "old.pt")  # of a version without them
    with pytest.raises(ValueError, match="cut by seed 1 here"):
        R.check_start(before, other, "old.pt")


def test_a_start_of_other_images_with_the_same_classes_is_refused(of_fold_0):
    digits = cut_by(0)
    fixed = D.make_data(digits.train, "fixed", test=digits.test)
    found = R.read_weights(of_fold_0)[1]
    assert R.check_start(found, fixed, of_fold_0).endswith("the test images are new to it")
    fewer = D.make_data(digits.train, "fewer")
    for data, says in [(fewer, "seed 0 here"), (replace(fixed, test=digits.val), "'official")]:
        with pytest.raises(ValueError, match=f"cut by {says}"):
            R.check_start(found, data, of_fold_0)


def test_with_a_fixed_test_part_another_seed_is_told_of_the_validation_images(tmp_path):
    digits = cut_by(0)

    def fixed(seed, **kw):
        return D.make_data(digits.train, "fixed", seed, test=digits.test, **kw)

    for name, kw, seen in [("all", {}, True), ("few", dict(per_class=16), False)]:
        fit(fixed(0, **kw), replace(CFG, epochs=1), Pipeline(), out=tmp_path / name)
        data = fixed(1, **kw)
        assert shared(fixed(0, **kw).train, data.test) == 0
        assert (shared(fixed(0, **kw).train, data.val) > 0) == seen
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            record = begun(data, tmp_path / name).record
        said = [str(w.message) for w in told if w.category is R.StartWarning]
        assert len(said) == seen and ("start_note" in record) == seen
        assert all("another validation part" in text for text in said)


def test_a_strangers_start_is_told_and_so_is_what_goes_on_from_it(of_fold_0, tmp_path):
    torch.save(R.read_start(of_fold_0), tmp_path / "theirs.pt")
    data, says = cut_by(1), "does not say what it was trained on"
    with pytest.warns(R.StartWarning, match=says) as told:
        tuned = begun(data, tmp_path / "theirs.pt", out=tmp_path / "tuned")
    assert sum(w.category is R.StartWarning for w in told) == 1
    assert says in tuned.record["start_note"]
    with pytest.warns(R.StartWarning, match=says):
        begun(data, tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("error", R.StartWarning)
        again = resume(tmp_path / "tuned", data)  # told when it began
    assert again.record["start_note"] == tuned.record["start_note"]


@pytest.mark.parametrize("names", ["zyxwvutsrq", "0124356789", "012345678", "0123456789a"])
def test_a_start_with_other_classes_is_refused(of_fold_0, names):
    found = R.read_weights(of_fold_0)[1]
    digits = cut_by(0)
    kept = digits.test.subset(digits.test.y < len(names))
    other = replace(digits, test=replace(kept, classes=tuple(names)))
    with pytest.raises(ValueError, match="must have the classes of digits in their order: class "):
        R.check_start(found, other, of_fold_0)


# disks, folders, interrupts


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["new.pt", "record.json"])
def test_full_disk(digits, tmp_path, name):
    def fill(row):
        if row["epoch"] == 2:
            (tmp_path / f"{name}.tmp-{os.getpid()}").symlink_to(
                "/dev/full"
            )  # every write: no space

    with pytest.raises(
        OSError,
        match="No space left on device; stopped in epoch .* of 4; last checkpoint: .*last.pt",
    ) as e:
        fit(digits, out=tmp_path, on_epoch=fill)
    kept = R.read_checkpoint(tmp_path / "last.pt")["epoch"]
    assert (
        e.value.errno == errno.ENOSPC
        and kept == (2 if name == "new.pt" else 3)
        and f"(epoch {kept})" in str(e.value)
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curves.csv",
        "last.pt",
        "previous.pt",
        "record.json",
    ]
    assert same_bits(fit(digits), resume(tmp_path, digits))


@posix
def test_folders_that_cannot_be_written(digits, tmp_path):
    (tmp_path / "file").write_text("x")

    def trained(row):
        pytest.fail("trained before it looked")

    for out in [tmp_path / "file" / "run", "/proc/run"]:
        with pytest.raises(OSError, match="run"):
            fit(digits, out=out, on_epoch=trained)
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        return  # root may write everywhere
    with pytest.raises(PermissionError, match="closed"):
        fit(digits, out=tmp_path / "closed", on_epoch=trained)


@posix
def test_folder_turning_read_only(digits, tmp_path, monkeypatch):
    def no(path, content):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.raises(
        OSError,
        match="Read-only file system; stopped in epoch 3 of 4; last checkpoint: .*last.pt .epoch 2",
    ):
        fit(
            digits,
            out=tmp_path,
            on_epoch=lambda row: row["epoch"] == 2 and monkeypatch.setattr(R, "write_aside", no),
        )
    monkeypatch.undo()
    assert same_bits(fit(digits), resume(tmp_path, digits))


@posix
def test_one_folder_one_process(digits, tmp_path):
    seen = []

    def second(row):
        for start in (lambda: fit(digits, out=tmp_path), lambda: resume(tmp_path, digits)):
            with pytest.raises(BlockingIOError, match="another process trains in .*: wait for it"):
                start()
            seen.append(row["epoch"])

    done = fit(digits, out=tmp_path, on_epoch=second)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4] and same_bits(done, fit(digits))
    fit(digits, out=tmp_path / "other"), resume(tmp_path, digits)  # free again


HOLDER = """
import sys, time
sys.path.insert(0, {here!r})
import kill_train as K, torch
from fairmix_nb import train as T
def tell(row): print(row["epoch"], flush=True); time.sleep({sleep})
quiet = dict(device="cpu", progress=False)
T.fit(K.network(), K.small_data(), K.CFG, K.METHOD, out={out!r}, on_epoch=tell, **quiet)
"""


def other_process(out, sleep):
    def heard():  # a background shell ignores it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    code = HOLDER.format(here=str(HERE), out=str(out), sleep=sleep)
    env = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
        env=env,
    )


@posix
def test_another_process_and_ctrl_c(tmp_path):
    import kill_train as K

    def go_on():
        quiet = dict(device="cpu", progress=False)
        return T.resume(tmp_path / "run", K.network(), K.small_data(), **quiet)

    process = other_process(tmp_path / "run", sleep=0.2)
    for _ in range(3):
        process.stdout.readline()
    with pytest.raises(BlockingIOError, match="another process trains in"):
        go_on()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1].strip().splitlines()[-1]
    assert error.startswith("KeyboardInterrupt: stopped in epoch") and "last.pt (epoch " in error
    assert R.load_checkpoint(tmp_path / "run")["epoch"] >= 3 and not list(
        (tmp_path / "run").glob("*.tmp-*")
    )
    assert go_on().record["finished"]


@pytest.mark.slow
def test_a_notebooks_interrupt_leaves_a_kernel_that_goes_on(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(HERE))
    try:
        run = HOLDER.format(here=str(HERE), out=str(tmp_path / "run"), sleep=0.2)
        client.execute(run)
        while client.get_iopub_msg(timeout=60)["content"].get("text", "") != "2\n":
            pass
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=30)["content"]
        assert (
            reply["status"] == "error"
            and reply["ename"] == "KeyboardInterrupt"
            and "last checkpoint" in reply["evalue"]
        )
        run = str(tmp_path / "run")
        go_on = f"T.resume({run!r}, K.network(), K.small_data(), **quiet).record['finished']"
        client.execute(go_on)
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
    finally:
        client.stop_channels(), manager.shutdown_kernel(now=True)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["finished"]


# kill -9


def kill(n, *args):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HERE.parent))
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_train.py"), str(n), *args],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@posix
def test_killed_three_times():
    assert kill(3)["equal"]


@posix
@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    assert kill(20, str(tmp_path / "log.json"))["equal"]
    kills = json.loads((tmp_path / "log.json").read_text())["kills"]
    assert len(kills) == 20 and len({k["where"] for k in kills}) >= 6
