"""Times the scripts, and their peers where installed, beside each other on this machine. Not part of the test suite.

    python tests/speed.py                             Ant-v4 and Humanoid-v4, about ten minutes
    python tests/speed.py --tasks Hopper-v4 --rounds 9
    pip install sbx-rl stable-baselines3              before it, to have the peers in the table

The first table is one update: as written (eager), compiled, and its floor, which is the update's own matrix products
and nothing else, recorded from an update and repeated. The second is whole training, environments included. Every
figure is measured in a process of its own, of which one at a time works while the others wait for their turn. Times are
medians over rounds in which everyone has a turn, and ratios are medians of the ratios within a round, so that noise
that outlasts a round cancels. Everyone has three hidden GELU layers of 256 units, batches of 256 and 20 environments,
and makes one update per step of all of them.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("dsac_e", "dsac_t", "sac", "td3")
PEERS = {"sbx_sac": "sbx", "sbx_td3": "sbx", "sb3_sac": "stable_baselines3", "sb3_td3": "stable_baselines3"}
sys.path.insert(0, str(ROOT))


def wait(seconds: dict[str, float]):
    """Reports what the last turn took and waits for the next."""
    print(*(f"{name}={value}" for name, value in seconds.items()), flush=True)
    if not sys.stdin.readline():
        os._exit(0)  # nobody listens any more: do not save, do not say goodbye


def time_update(name: str, task: str, iterations: int):
    """Turns of an agent's update, alone: eager, compiled and floor, in seconds per update."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    script = importlib.import_module(name)
    envs = script.make_envs(task, 1)
    space, obs_dim = envs.single_action_space, envs.single_observation_space.shape[0]
    args = script.Args(env_id=task)
    eager, compiled = (script.Agent(args, obs_dim, space.low, space.high) for _ in range(2))
    script.compile_update(compiled)
    buffer = script.ReplayBuffer(10_000, obs_dim, len(space.low), torch.device("cpu"))
    buffer.rows.normal_()
    buffer.filled.fill_(len(buffer.rows))
    products = {False: [], True: []}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.bmm.default:
                products[delayed].append(arguments)
            return function(*arguments, **options or {})

    for delayed in products:
        with Recorder():
            eager.update(buffer.sample(args.batch_size), delayed)
    assert all(products.values())

    def floor(batch, delayed):
        for a, b in products[delayed]:
            torch.bmm(a, b)

    def seconds(update):
        batch = buffer.sample(args.batch_size)
        start = time.perf_counter()
        for i in range(iterations):
            update(batch, i % 2 == 1)
        return (time.perf_counter() - start) / iterations

    ways = {"eager": eager.update, "compiled": compiled.update, "floor": torch.no_grad()(floor)}
    for update in ways.values():
        seconds(update)
    while True:
        wait({way: seconds(update) for way, update in ways.items()})


def time_script(name: str, task: str, iterations: int):
    """Turns of a script's own train(), in seconds per iteration: all of it, stepping environments, updating."""
    import gymnasium

    script = importlib.import_module(name)
    spent = {"all": 0.0, "env": 0.0, "update": 0.0}

    def timed(part, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            spent[part] += time.perf_counter() - start
            return result

        return call

    class Bar:
        """In the place of tqdm: told of every iteration by the loop itself."""

        disable = False

        def __init__(self, **options):
            self.count = 0

        def set_postfix(self, *arguments, **options):
            pass

        def update(self, steps):
            self.count += 1
            if self.count == warm:
                self.start = time.perf_counter()
            elif self.count > warm and (self.count - warm) % iterations == 0:
                spent["all"] = time.perf_counter() - self.start
                wait({part: seconds / iterations for part, seconds in spent.items()})
                spent.update(all=0.0, env=0.0, update=0.0)
                self.start = time.perf_counter()

    script.tqdm, script.COMPILE_AFTER, script.print = Bar, 50, lambda *arguments, **options: None
    warm = 1000 // 20 + 100
    gymnasium.vector.SyncVectorEnv.step = timed("env", gymnasium.vector.SyncVectorEnv.step)
    script.Agent.update = timed("update", script.Agent.update)
    with tempfile.TemporaryDirectory() as directory:
        script.train(script.Args(env_id=task, learning_starts=1000, eval_interval=10**12, run_dir=Path(directory)))


def time_peer(name: str, task: str, iterations: int):
    """Turns of a peer's learn(), in seconds per iteration."""
    library, algorithm = name.split("_")
    networks = {"net_arch": [256, 256, 256]}
    if library == "sbx":
        import jax
        import sbx as library

        networks["activation_fn"] = functools.partial(jax.nn.gelu, approximate=False)
        special = {"policy_delay": 2} if algorithm == "sac" else {}
    else:
        import stable_baselines3 as library
        import torch

        networks["activation_fn"] = torch.nn.GELU
        special = {}
    from stable_baselines3.common.env_util import make_vec_env

    script = importlib.import_module("sac")
    script.make_envs(task, 1)  # what silences gymnasium and MuJoCo
    model = getattr(library, algorithm.upper())(
        "MlpPolicy", make_vec_env(task, 20), batch_size=256, train_freq=1, gradient_steps=1, learning_starts=1000,
        buffer_size=1_000_000, policy_kwargs=networks, **special,
    )  # fmt: skip
    model.learn(1000 + 100 * 20)
    while True:
        start = time.perf_counter()
        model.learn(iterations * 20, reset_num_timesteps=False)
        wait({"all": (time.perf_counter() - start) / iterations})


class Program:
    """A process of this file that times one thing whenever it is its turn."""

    def __init__(self, kind: str, name: str, task: str, iterations: int):
        command = [sys.executable, __file__, "--worker", kind, name, task, str(iterations)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rounds = []

    def turn(self, keep: bool = True):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"speed.py: {self.name} stopped")
        if keep:
            self.rounds.append({key: float(value) for key, value in (pair.split("=") for pair in line.split())})

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def measure(programs: list[tuple[str, str]], task: str, rounds: int, iterations: int) -> dict[str, list[dict]]:
    """Every program's rounds, by name; programs are (kind, name), start one after the other and then take turns."""
    running = []
    for kind, name in programs:
        running.append(Program(kind, name, task, iterations))
        running[-1].turn(keep=False)  # started, compiled, and one turn to warm up
    for _ in range(rounds):
        for program in running:
            program.go()
            program.turn()
    for program in running:
        program.process.kill()
        program.process.wait()
    return {program.name: program.rounds for program in running}


def ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def ratio(above: list[float], below: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(above, below, strict=True)):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["Ant-v4", "Humanoid-v4"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=100, help="of one turn")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, name, task, iterations = options.worker
        {"update": time_update, "script": time_script, "peer": time_peer}[kind](name, task, int(iterations))
        return
    peers = [name for name, package in PEERS.items() if importlib.util.find_spec(package)]
    for task in options.tasks:
        print(f"\n{task}: one update, ms\n")
        print("| script | eager | compiled | floor | eager / floor | compiled / floor |\n|-|-|-|-|-|-|")
        updates = measure([("update", name) for name in SCRIPTS], task, options.rounds, options.iterations)
        for name, rounds in updates.items():
            eager, compiled, floor = ([r[way] for r in rounds] for way in ("eager", "compiled", "floor"))
            times = " | ".join(map(ms, (eager, compiled, floor)))
            print(f"| {name} | {times} | {ratio(eager, floor)} | {ratio(compiled, floor)} |", flush=True)

        print(f"\n{task}: training, ms per iteration of 20 environment steps and one update\n")
        columns = ["program", "all", "iterations/s", "environments", "update", "rest", "rest / all"]
        print("|", " | ".join(columns + [f"speed / {peer}" for peer in peers]), "|")
        print("|" + "-|" * (len(columns) + len(peers)))
        programs = [("script", name) for name in SCRIPTS] + [("peer", name) for name in peers]
        training = measure(programs, task, options.rounds, options.iterations)
        for name, rounds in training.items():
            total = [r["all"] for r in rounds]
            cells = [name, ms(total), f"{1 / statistics.median(total):.0f}"]
            if name in SCRIPTS:
                env, update = [r["env"] for r in rounds], [r["update"] for r in rounds]
                rest = [a - e - u for a, e, u in zip(total, env, update, strict=True)]
                cells += [ms(env), ms(update), ms(rest), ratio(rest, total)]
            else:
                cells += [""] * 4
            print("|", " | ".join(cells + [ratio([r["all"] for r in training[peer]], total) for peer in peers]), "|")


if __name__ == "__main__":
    main()
