"""Times Agent.update of two scripts in turns and prints the ratio: python tools/speed.py sac.py old/sac.py

Sizes of HalfCheetah, one thread; blocks of ten updates alternate, so that other load affects both.
"""

import importlib.util
import sys
import time

import numpy as np
import torch

OBS, ACTIONS, BLOCKS = 17, 6, 20


def load(path: str, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(path: str, name: str, compiled: bool):
    """An agent and a batch; the first updates compile and warm up."""
    module = load(path, name)
    agent = module.Agent(module.Args(env_id="HalfCheetah-v4"), OBS, -np.ones(ACTIONS), np.ones(ACTIONS))
    shapes = (OBS,), (ACTIONS,), (), (OBS,)
    batch = module.Batch(*(torch.randn(256, *shape) for shape in shapes), torch.zeros(256))
    if compiled:
        module.compile_update(agent, batch)
    for i in range(20):
        agent.update(batch, i % 2 == 0)
    return agent, batch


def main():
    torch.set_num_threads(1)
    for compiled in (False, True):
        pair = [prepare(path, f"script{i}", compiled) for i, path in enumerate(sys.argv[1:3])]
        seconds = np.zeros((BLOCKS, len(pair)))
        for row in seconds:
            for j, (agent, batch) in enumerate(pair):
                start = time.perf_counter()
                for i in range(10):
                    agent.update(batch, i % 2 == 0)
                row[j] = (time.perf_counter() - start) / 10
        ratio = np.median(seconds[:, 0] / seconds[:, -1])
        milliseconds = " and ".join(f"{value:.1f}" for value in 1e3 * np.median(seconds, 0))
        print(f"{'compiled' if compiled else 'eager'}: {milliseconds} ms per update, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
