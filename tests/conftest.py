"""Makes the scripts, results/ and the helpers importable; one thread, which is repeatable; signals as in a terminal."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "results"), str(TESTS)]

import torch  # noqa: E402

torch.set_num_threads(1)

from tensorboard.summary.writer import event_file_writer  # noqa: E402

# TensorBoard reads the event files of one second in the order of their names: keep the length of the counter fixed.
event_file_writer._global_uid._value = 10_000


@pytest.fixture(autouse=True)
def signals():
    """Handlers as in a terminal, also if the tests run under nohup; restores those that a script replaces."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
