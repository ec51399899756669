"""Times an iteration (actions, one update, a step of 20 environments) and its parts, in ms.

    python tools/iteration.py dsac_e.py Humanoid-v4 0 1 4     with 0, 1 and 4 threads for the environments

Blocks of all variants alternate, so that other load affects all; the numbers are medians.
"""

import contextlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROUNDS, BLOCK = 20, 20


def prepare(path: str, env_id: str, threads: int, cleanup: contextlib.ExitStack):
    """A Trainer of the script with some transitions in the buffer and a compiled update."""
    spec = importlib.util.spec_from_file_location(f"script_{threads}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run_dir = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    args = module.Args(env_id=env_id, env_threads=threads, buffer_size=20_000)
    trainer = module.Trainer(args, run_dir, None, cleanup)
    obs, _ = trainer.envs.reset(seed=0)
    for _ in range(20):
        action = trainer.agent.policy.act(obs)
        next_obs, reward, terminated, _, _ = trainer.envs.step(action)
        trainer.buffer.add(obs, action, next_obs, reward, terminated)
        obs = next_obs
    module.compile_update(trainer.agent, trainer.buffer.sample(256))
    return module, trainer, obs


def block(module, trainer, obs: np.ndarray, parts: set[str]) -> float:
    """Milliseconds per iteration of those parts."""
    action = trainer.agent.policy.act(obs)
    start = time.perf_counter()
    for i in range(BLOCK):
        if "actions" in parts:
            action = trainer.agent.policy.act(obs)
        if "environments" in parts:
            module.begin_step(trainer.envs, action)
        if "update" in parts:
            trainer.agent.update(trainer.buffer.sample(256), i % 2 == 0)
        if "environments" in parts:
            obs, *_ = trainer.envs.step(action)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / BLOCK


def main():
    path, env_id, *numbers = sys.argv[1:]
    cases = {name: {name} for name in ("actions", "update", "environments")}
    cases["iteration"] = {"actions", "update", "environments"}
    with contextlib.ExitStack() as cleanup:
        variants = [prepare(path, env_id, int(number), cleanup) for number in numbers]
        times = np.array([[[block(*variant, parts) for parts in cases.values()] for variant in variants]
                          for _ in range(ROUNDS)])  # fmt: skip
    print(f"{env_id}, {torch.get_num_threads()} threads of torch")
    print(f"| env threads | {' | '.join(cases)} | steps/s |")
    for number, row in zip(numbers, np.median(times, 0), strict=True):
        print(f"| {number} | {' | '.join(f'{value:.2f}' for value in row)} | {20_000 / row[-1]:.0f} |")


if __name__ == "__main__":
    main()
