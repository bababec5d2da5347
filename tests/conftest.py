"""One thread a process, here and in everything a test starts: bit-for-bit comparisons need equal thread counts."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
