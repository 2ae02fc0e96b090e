"One thread: the networks of the tests are tiny, and threads that wait for each other spin."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads PyTorch
