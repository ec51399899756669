"""Makes the four scripts importable from the tests, and keeps the suite on its feet on small machines."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tests' networks are small: a second thread only costs
