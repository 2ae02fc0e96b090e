__version__ = "0.2.0"

import os

# Threads that wait for each other spin before they sleep, 300,000 times by default: beside other
# programs a step then takes many times as long (nbs/24_speed.ipynb). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
del os
