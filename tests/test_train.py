"What may not happen to a training run: lost work, other bits, hidden waits, half-written files."

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairmix_nb import data as D
from fairmix_nb import mixup
from fairmix_nb import train as T
from fairmix_nb.models import build, fold_batchnorm

HERE = Path(__file__).resolve().parent
CFG = T.TrainCfg(("attack", "mix"), eps=0.1, epochs=4, batch=64, lr=3e-3, smoothing=0.1)
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


def fit(data, cfg=CFG, seed=0, **kw):
    return T.fit(network(seed), data, cfg, device="cpu", progress=False, **kw)


def resume(out, data, cfg=None, **kw):
    return T.resume(out, network(9), data, cfg, device="cpu", progress=False, **kw)


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


# every configuration trains


@pytest.mark.parametrize(
    "kw",
    [dict(pipeline=p, attack=a) for p in T.PIPELINES[1:] for a in T.CHOICES["attack"]]
    + [
        dict(pipeline=("attack", "mix"), partner=p, k=k)
        for p, k in [("self", 2), ("any", 2), ("set", 3), ("batch", 3)]
    ]
    + [
        dict(grad_align=0.2),
        dict(norm="l2", eps=0.5, attack="nfgsm"),
        dict(eps=(0.1,), box=None, attack="noise"),
        dict(optimizer="sgd", schedule=("cyclic", 0.4), smoothing=0.1, logit_adjust=1.0),
        dict(lam_per="batch", pipeline=("mix",)),
        dict(class_weights=(1.0,) * 10, augment="crop_flip", weight_decay=1e-3),
        dict(law=("beta", 2, 2), pipeline=("mix",)),
    ],
)
def test_every_choice_trains_and_repeats(digits, kw):
    cfg = T.TrainCfg(**{**dict(eps=0.1, epochs=1, batch=80, lr=3e-3), **kw})
    a, b = fit(digits, cfg), fit(digits, cfg)
    assert same_bits(a, b) and a.curves[0]["loss"] > 0
    assert not same_bits(a, fit(digits, replace(cfg, seed=1))), "the seed must matter"
    json.dumps(a.record)


def test_paper_and_control_are_what_they_say(digits):
    one = replace(CFG, epochs=1)
    assert same_bits(
        fit(digits, replace(one, partner="self")), fit(digits, replace(one, pipeline=("attack",)))
    )
    fields = T.TrainCfg.__dataclass_fields__
    assert (
        len(fields) <= 24
        and T.TrainCfg().schedule == ("step", 50, 0.1)
        and T.TrainCfg().smoothing == 0
    )


# nothing waits


class Waits(TorchDispatchMode):
    "Counts what makes a GPU wait: numbers read from tensors, shapes that depend on values, copies."

    found = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and "device" in (kwargs or {})
        if (
            name
            in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")
            or copies
        ):
            self.found = (*self.found, name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(partner="set"),
        dict(partner="any"),
        dict(pipeline=("mix", "attack"), k=3),
        dict(attack="pgd", steps=2),
        dict(attack="nfgsm", eps=(0.1,)),
        dict(grad_align=0.1),
        dict(augment="crop_flip", logit_adjust=1.0, class_weights=(1.0,) * 10),
    ],
)
def test_an_epoch_asks_the_device_for_nothing(digits, kw, monkeypatch):
    monkeypatch.setattr(
        mixup, "_check_labels", lambda *a: None
    )  # done on the CPU only, see 02_mixup
    cfg, model = replace(CFG, **kw), network()
    state = T.State(model, T.make_optimizer(model, cfg), T.make_streams(0), net=model)
    job = T.make_job(digits.train, cfg)
    T.run_epoch(state, job)  # what is made once is made now
    with Waits() as waits:
        T.run_epoch(state, job)
    assert waits.found == ()
    with Waits() as waits:
        T.one_epoch(state, job, digits.val, 20)
    assert "_local_scalar_dense" in waits.found, "the losses are looked at when the epoch ends"


# gradients, modes, flags


def naive_step(model, x, y, eps):
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    adv = (x + eps * x.grad.sign()).clamp(0, 1).detach()
    model.zero_grad()
    F.cross_entropy(model(adv), y).backward()
    return [p.grad for p in model.parameters()]


def one_step(model, data, cfg, idx):
    state = T.State(model.train(), T.make_optimizer(model, cfg), T.make_streams(0), net=model)
    loss, _ = T.step_loss(state, T.make_job(data.train, cfg), idx)
    loss.backward()
    return [p.grad for p in model.parameters()]


def test_gradients_of_a_step_are_the_naive_ones(digits):
    cfg, idx = T.TrainCfg(eps=0.1, batch=32), torch.arange(32)
    ours = one_step(
        build("resnet20", 10, 1, seed=1).to(memory_format=torch.channels_last), digits, cfg, idx
    )
    theirs = naive_step(
        build("resnet20", 10, 1, seed=1).train(), digits.train.floats(idx), digits.train.y[idx], 0.1
    )
    size = max(g.abs().max().item() for g in theirs)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs)) < 1e-3 * size
    wrong = naive_step(
        build("resnet20", 10, 1, seed=1).train(),
        digits.train.floats(idx),
        digits.train.y[idx],
        0.09,
    )
    assert max((a - b).abs().max().item() for a, b in zip(ours, wrong)) > 1e-2 * size


@pytest.mark.parametrize("attack", T.CHOICES["attack"])
def test_attack_leaves_no_trace_on_the_weights(digits, attack):
    model, idx = network().train(), torch.arange(20)
    model[0].bias.requires_grad_(False)  # a weight that is not learnt stays so
    T.training_batch(model, digits.train, idx, replace(CFG, attack=attack), T.make_streams(0))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]


def test_flags_come_back_after_an_error(digits):
    model = network().train()
    broken = lambda *a: (_ for _ in ()).throw(RuntimeError("broken"))
    handle = model[3].register_forward_hook(broken)
    for mode in T.CHOICES["bn_attack"]:
        with pytest.raises(RuntimeError, match="broken"):
            T.attack_step(
                model,
                digits.train.floats(torch.arange(4)),
                digits.train.y[:4],
                replace(CFG, bn_attack=mode),
                None,
            )
        assert (
            model.training
            and all(p.requires_grad for p in model.parameters())
            and model[1].track_running_stats
        )
    handle.remove()


@pytest.mark.parametrize("mode, moves", [("train", 1), ("train_frozen", 0), ("eval", 0)])
@pytest.mark.parametrize(
    "kw, looks",
    [
        (dict(), 1),
        (dict(attack="pgd", steps=3), 3),
        (dict(attack="nfgsm"), 1),
        (dict(attack="noise"), 0),
        (dict(grad_align=0.1), 3),
    ],
)
def test_running_statistics_are_updated_exactly_as_configured(digits, mode, moves, kw, looks):
    cfg = replace(CFG, epochs=1, bn_attack=mode, **kw)
    steps = -(-len(digits.train) // cfg.batch)
    found = int(fit(digits, cfg).model[1].num_batches_tracked)
    assert found == steps * (1 + moves * looks)


def test_folded_logits_after_training(digits):
    model = fit(digits).model
    x = digits.test.floats()[:100]
    with torch.no_grad():
        assert (fold_batchnorm(model)(x) - model(x)).abs().max() < 1e-5


# arithmetic


@pytest.mark.parametrize(
    "how", [dict(precision="tf32"), dict(precision="bf16"), dict(deterministic=True), dict()]
)
def test_global_switches_come_back(digits, how):
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
    look = lambda: (
        cudnn.allow_tf32,
        product.allow_tf32,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    before, seen = look(), []
    with pytest.raises(ZeroDivisionError):
        fit(digits, on_epoch=lambda row: (seen.append(look()), 1 / 0), **how)
    tf32, slow = how.get("precision") == "tf32", how.get("deterministic", False)
    assert seen == [(tf32, tf32, not slow, slow)] and look() == before


def test_bf16_is_asked_for_and_said(digits):
    a, b = fit(digits), fit(digits, precision="bf16")
    assert not same_bits(a, b) and abs(a.curves[0]["loss"] - b.curves[0]["loss"]) < 0.1
    assert b.record["how"] == dict(compile=False, precision="bf16", deterministic=False)
    assert {p.dtype for p in b.model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp16'"):
        fit(digits, precision="fp16")


@pytest.mark.slow
def test_compiled_step_has_the_gradients_of_the_eager_one(digits):
    natural, idx = replace(CFG, pipeline=("mix",)), torch.arange(64)
    for cfg, most in [(natural, 1e-5), (CFG, 0.02)]:  # an attack turns last bits into signs
        eager = one_step(network(), digits, cfg, idx)
        model = network()
        with T.numerics(model, "cpu", True, "fp32", False):
            compiled = one_step(model, digits, cfg, idx)
        size = max(g.abs().max().item() for g in eager)
        assert max((a - b).abs().max().item() for a, b in zip(eager, compiled)) <= most * size
        assert model._compiled_call_impl is None


@pytest.mark.slow
def test_compiled_run_resumes_with_the_same_bits(digits, tmp_path):
    cfg = replace(CFG, epochs=3)
    whole = fit(digits, cfg, compile=True)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, cfg, compile=True, out=tmp_path, on_epoch=stop_after(1))
    again = resume(tmp_path, digits)
    assert again.record["how"]["compile"] and same_bits(whole, again)
    eager = fit(digits, cfg)
    assert abs(whole.curves[0]["loss"] - eager.curves[0]["loss"]) < 0.01


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
    found = T.load_checkpoint(stopped)
    found["versions"]["torch"] = "1.0"
    with pytest.warns(UserWarning, match=r"last bits may differ from here on: torch \(1.0 then"):
        T.fit(network(), digits, CFG, device="cpu", progress=False, resume_from=found)


def test_a_finished_run_is_not_run_again(digits, tmp_path):
    done = fit(digits, out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"last.pt", "previous.pt", "record.json", "curves.csv"}
    again = resume(tmp_path, digits)
    assert same_bits(done, again) and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert json.loads(before["record.json"])["finished"] and before["curves.csv"].count(b"\n") == 5


def test_a_checkpoint_that_lacked_only_its_name_gets_it(digits, stopped, tmp_path, monkeypatch):
    "Killed between the two renames of a write: the newest checkpoint is new.pt, and there is no last.pt."
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
        T.read_checkpoint(stopped / "last.pt")["epoch"] == 3 and not (stopped / "new.pt").exists()
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
    T.read_checkpoint(last)


def test_no_flipped_bit_gets_through(stopped):
    last, whole = stopped / "last.pt", (stopped / "last.pt").read_bytes()
    good = T.sha256_of(T.read_checkpoint(last))
    refused = 0
    for at in range(0, len(whole), len(whole) // 200):
        last.write_bytes(flip(whole, at))
        try:
            assert T.sha256_of(T.read_checkpoint(last)) == good, (
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
        (dict(schema=T.CHECKPOINT + 1, sha256=""), "got schema 3: a newer fairmix_nb wrote it"),
        (dict(schema=1), "must be a checkpoint of schema 2, got schema 1"),
        ([1], "got list"),
        (nn.Linear(2, 2).state_dict(), "got OrderedDict"),
        (dict(schema=T.CHECKPOINT, sha256="0"), "does not agree with its digest"),
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

    torch.save(dict(schema=T.CHECKPOINT, sha256="", x=Evil()), stopped / "last.pt")
    with pytest.warns(UserWarning, match="going on from"):
        resume(stopped, digits)
    assert not (stopped / "evil").exists()


def test_checkpoint_says_what_it_is(stopped):
    found = torch.load(stopped / "last.pt", weights_only=True)
    assert T.TrainCfg(**found["cfg"]) == CFG and found["epoch"] == 3 and len(found["sha256"]) == 64
    assert set(found["versions"]) == {"torch", "fairmix_nb", "cpu", "gpu", "threads"}


def test_numpy_numbers_in_a_configuration(digits, tmp_path):
    import numpy as np

    cfg = replace(CFG, eps=np.float64(0.1), epochs=1)
    fit(digits, cfg, out=tmp_path)
    assert T.load_checkpoint(tmp_path)["cfg"]["eps"] == 0.1


# disks and folders


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
    kept = T.read_checkpoint(tmp_path / "last.pt")["epoch"]
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
    trained = lambda row: pytest.fail("trained before it looked")
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
            on_epoch=lambda row: row["epoch"] == 2 and monkeypatch.setattr(T, "write_aside", no),
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
T.fit(K.network(), K.small_data(), K.CFG, device="cpu", out={out!r}, progress=False, on_epoch=tell)
"""


def other_process(out, sleep):
    heard = lambda: signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background shell ignores it
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


# interrupts, divergence


@posix
def test_another_process_and_ctrl_c(tmp_path):
    import kill_train as K

    go_on = lambda: T.resume(
        tmp_path / "run", K.network(), K.small_data(), device="cpu", progress=False
    )
    process = other_process(tmp_path / "run", sleep=0.2)
    for _ in range(3):
        process.stdout.readline()
    with pytest.raises(BlockingIOError, match="another process trains in"):
        go_on()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1].strip().splitlines()[-1]
    assert error.startswith("KeyboardInterrupt: stopped in epoch") and "last.pt (epoch " in error
    assert T.load_checkpoint(tmp_path / "run")["epoch"] >= 3 and not list(
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
        go_on = f"T.resume({str(tmp_path / 'run')!r}, K.network(), K.small_data(), device='cpu', progress=False).record['finished']"
        client.execute(go_on)
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
    finally:
        client.stop_channels(), manager.shutdown_kernel(now=True)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["finished"]


def test_divergence_stops_with_step_and_checkpoint(digits, tmp_path, monkeypatch):
    with pytest.raises(
        FloatingPointError,
        match=r"loss became .* at step \d+ of epoch 1: lower lr .*last checkpoint: none",
    ):
        fit(digits, replace(CFG, optimizer="sgd", lr=1e4))
    with pytest.raises(FloatingPointError, match="a weight is not finite after epoch 1"):
        fit(
            digits,
            replace(CFG, optimizer="sgd", lr=1e38, weight_decay=1e3, batch=len(digits.train)),
        )
    rate = T.learning_rate
    monkeypatch.setattr(
        T, "learning_rate", lambda cfg, epoch, *a: 1e6 if epoch == 2 else rate(cfg, epoch, *a)
    )
    with pytest.raises(
        FloatingPointError, match=r"at step 2 of epoch 3.*last checkpoint: .*last.pt \(epoch 2\)"
    ):
        fit(digits, out=tmp_path)
    monkeypatch.undo()
    assert same_bits(fit(digits), resume(tmp_path, digits))


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


# with a GPU


@pytest.mark.cuda
def test_cuda_step_has_the_gradients_of_the_cpu(digits):
    natural, idx = replace(CFG, pipeline=()), torch.arange(64)
    model = network().to("cuda", memory_format=torch.channels_last)
    with T.numerics(model, "cuda", False, "fp32", True):
        gpu = one_step(
            model, replace(digits, train=digits.train.to("cuda")), natural, idx.to("cuda")
        )
    for a, b in zip(gpu, one_step(network(), digits, natural, idx)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("how", [dict(deterministic=True), dict(deterministic=True, compile=True)])
def test_cuda_repeats_and_resumes(digits, tmp_path, how):
    cfg, kw = replace(CFG, augment="crop_flip"), dict(device="cuda", progress=False, **how)
    whole, twin = (T.fit(network(), digits, cfg, **kw) for _ in range(2))
    assert same_bits(whole, twin)
    with pytest.raises(KeyboardInterrupt):
        T.fit(network(), digits, cfg, out=tmp_path, on_epoch=stop_after(2), **kw)
    assert same_bits(whole, T.resume(tmp_path, network(9), digits, device="cuda", progress=False))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "how",
    [
        dict(compile=True),
        dict(precision="tf32"),
        dict(precision="bf16"),
        dict(compile=True, precision="bf16"),
    ],
)
def test_cuda_options_learn_the_same(digits, how):
    cfg = replace(CFG, epochs=6)
    losses = [
        T.fit(network(), digits, cfg, device="cuda", progress=False, **h).curves[-1]["loss"]
        for h in ({}, how)
    ]
    assert abs(losses[0] - losses[1]) < 0.1


@pytest.mark.cuda
def test_cuda_epoch_does_not_wait(digits):
    cfg, model = replace(CFG, augment="crop_flip", logit_adjust=1.0), network().to("cuda")
    state = T.State(model, T.make_optimizer(model, cfg), T.make_streams(0, "cuda"), net=model)
    job = T.make_job(digits.train.to("cuda"), cfg)
    T.run_epoch(state, job)
    torch.cuda.set_sync_debug_mode("error")
    try:
        T.run_epoch(state, job)
    finally:
        torch.cuda.set_sync_debug_mode("default")
