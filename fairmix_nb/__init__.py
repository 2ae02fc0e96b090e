__version__ = "0.2.0"

import importlib
import os
import sys
import types

# Threads that wait for each other spin before they sleep, 300,000 times by default: beside other
# programs a step then takes many times as long (nbs/24_speed.ipynb). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if os.environ.get("IN_TEST"):  # a notebook under nbdev_test
    from fairmix_nb import _tested

    _tested.one_thread()
    _tested.aloud()

# A first import is one line, `from fairmix_nb import load, build, fit, audit`, and loads a module
# when a name of it is asked for: the package alone takes no time, and `theory` no PyTorch.
NAMES = dict(
    load="data",
    build="models",
    preset="compare",
    TrainCfg="methods",
    Method="methods",
    METHODS="cures",
    fit="train",
    attack_errors="report",
    Outcome="report",
    show="compare",
    Threat="attacks",
    fgsm="attacks",
    pgd="attacks",
    same_class_mixup="mixup",
    GaussianPair="gaussian",
)
VERBS = ("audit", "mend", "compare")  # modules named like their main function: call either

# Names of version 0.1 that live elsewhere now: where they were, they work for one version more.
MOVED = dict(
    data=dict(
        lookup="attacks.one_of",
        progress_bar="records",
        sync_folder="records",
        write_aside="records",
    ),
    train=dict(
        ALL="runs",
        CHECKPOINT="runs",
        FAST="methods",
        Damaged="runs",
        PIPELINES="methods",
        Ranks="ranks",
        SCHEMA="records",
        STREAMS="methods",
        bn_mode="methods",
        checkpoints="runs",
        fit_ranks="ranks",
        frozen="methods",
        launch="ranks",
        lock_folder="runs",
        misalignment="methods",
        mix_step="methods",
        process_group="ranks",
        provenance="records",
        read_checkpoint="runs",
        sha256_of="records.digest",
    ),
    audit=dict(
        AuditReport="report.Outcome",
        Journal="records",
        canvas="report",
        columns="report",
        html_table="report",
        load_model="runs",
        load_report="report.load_outcome",
        short="report",
    ),
    compare=dict(main="cli", parse_eps="cli"),
)


def found(place, name):
    "What `place` names: a module, then the same name, or after a point another"
    module, _, other = place.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), other or name)


class Room(types.ModuleType):
    "A module that knows where its names of version 0.1 went"

    def __getattr__(self, name):
        place = MOVED.get(self.__name__.rpartition(".")[2], {}).get(name)
        if place is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        import warnings

        says = f"{name} of {self.__name__} is now in {__name__}.{place}"
        warnings.warn(says, DeprecationWarning, stacklevel=2)
        return found(place, name)


class Verb(Room):
    "A module that is called as its main function: `fairmix_nb.audit(...)`"

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self):  # what an editor shows
        import inspect

        return inspect.signature(getattr(self, self.__name__.rpartition(".")[2]))


class Package(types.ModuleType):
    "This package: the import of a module ends with its name being set here"

    def __setattr__(self, name, value):
        if isinstance(value, types.ModuleType) and (name in VERBS or name in MOVED):
            value.__class__ = Verb if name in VERBS else Room
        super().__setattr__(name, value)


def __getattr__(name):
    if name in VERBS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in NAMES:
        return found(NAMES[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *NAMES, *VERBS])


sys.modules[__name__].__class__ = Package
