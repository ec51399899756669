"""Makes the scripts, results/ and the shared helpers importable; runs torch on one thread, which is repeatable."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "results"), str(TESTS)]

import torch  # noqa: E402

torch.set_num_threads(1)

from tensorboard.summary.writer import event_file_writer  # noqa: E402

# TensorBoard reads the event files of one second in the order of their names: keep the length of the counter fixed.
event_file_writer._global_uid._value = 10_000
