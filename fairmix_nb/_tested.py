"""`nbdev_test` as it should be: a line for each notebook, and one thread in each of its processes

Loaded only where `nbdev_test` runs a notebook (it sets IN_TEST), when the notebook imports the package.
"""

import os
import sys


def one_thread():
    "Two processes with two threads each on two processors spin for each other: nine minutes, not four"
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is loaded
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)


def tell(path):
    "Past the capture of a notebook's output"
    os.write(2, f"testing {path.name}\n".encode())


def aloud():
    "From here on every notebook of this process is named when it begins, this one now"
    test = sys.modules.get("nbdev.test")
    if test is None:
        return
    shell, frame = test.CaptureShell, sys._getframe()

    def named(path):
        tell(path)
        return shell(path)

    test.CaptureShell = named
    while frame and frame.f_code is not test.test_nb.__code__:
        frame = frame.f_back
    if frame:
        tell(frame.f_locals["fn"])
