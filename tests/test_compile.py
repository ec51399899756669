"""Compiled updates are the same updates, and a run goes over to them by itself, or stays without them in one line."""

import contextlib
import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

OBS, LOW, HIGH = 5, np.array([-2.0, 1.0], np.float32), np.array([5.0, 1.5], np.float32)


def make_agent(script, **arguments):
    torch.manual_seed(0)
    return script.Agent(script.Args(hidden_width=16, **arguments), OBS, LOW, HIGH)


def make_buffer(script):
    buffer, rng = script.ReplayBuffer(64, OBS, len(LOW), torch.device("cpu")), np.random.default_rng(0)
    obs, action, next_obs = rng.normal(size=(64, OBS)), rng.uniform(LOW, HIGH, (64, 2)), rng.normal(size=(64, OBS))
    buffer.add(obs, action, next_obs, rng.normal(size=64), rng.integers(2, size=64))
    return buffer


@torch._inductor.config.patch(fallback_random=True)  # else compiled noise is another stream
def test_compiled_is_eager(script):
    """Ten updates, five of them delayed, from the same weights, batches and noise: every weight, target, gradient and
    logged tensor agrees between eager and compiled to float32's rounding, and nothing falls out of the graph."""
    eager, buffer = make_agent(script), make_buffer(script)
    compiled = copy.deepcopy(eager)
    script.compile_update(compiled)
    torch.manual_seed(1)
    for step in range(10):
        batch, state = buffer.sample(16), torch.get_rng_state()
        expected = eager.update(batch, step % 2 == 1)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        actual = compiled.update(batch, step % 2 == 1)
        assert torch.equal(torch.get_rng_state(), after)
        assert actual.keys() == expected.keys()
        for tag in actual:
            torch.testing.assert_close(actual[tag], expected[tag], rtol=1e-4, atol=1e-5)
    weights = dict(compiled.named_parameters())
    for name, weight in eager.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)
        if weight.grad is not None:
            torch.testing.assert_close(weights[name].grad, weight.grad, rtol=1e-3, atol=1e-4)
            assert weights[name].grad.stride() == weight.grad.stride() == weight.stride(), f"layout of {name}"


def test_two_compiled_agents_do_not_mix(script):
    """Compiled agents of one process move their own weights, also when they differ in nothing but those."""
    buffer = make_buffer(script)
    agents = [make_agent(script), make_agent(script)]
    for agent in agents:
        script.compile_update(agent)
    agents[0].update(buffer.sample(16), delayed=True)
    before = copy.deepcopy(agents[0].state_dict())
    agents[1].update(buffer.sample(16), delayed=True)
    after = agents[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = make_agent(script).state_dict()
    assert not all(torch.equal(fresh[name], value) for name, value in agents[1].state_dict().items())


def test_update_is_fit_for_a_cuda_graph(script):
    """What a capture forbids does not happen in an update, drawing the batch included: no number is read from a tensor,
    nothing has a shape that depends on values, and both kinds of update allocate the same shapes every time."""
    agent, buffer = make_agent(script), make_buffer(script)
    forbidden = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "equal", "allclose"}
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            assert name not in forbidden, name
            result = function(*arguments, **options or {})
            seen.append(
                (
                    name,
                    [
                        tensor.shape
                        for tensor in (result if isinstance(result, tuple) else [result])
                        if isinstance(tensor, torch.Tensor)
                    ],
                )
            )
            return result

    for delayed in (False, True):
        runs = []
        for _ in range(3):
            with Recorder():
                agent.update(buffer.sample(16), delayed)
            runs.append(seen[:])
            seen.clear()
        assert len(runs[0]) > 100 and runs[1] == runs[2]
    for optimizer in (agent.critic_optimizer, agent.policy_optimizer):
        assert all(group["capturable"] for group in optimizer.param_groups)


def train(tmp_path, after, **environment):
    """A run of dsac_e that goes over to compiled updates after some updates; what it printed."""
    code = f"""
import sys
import time
from pathlib import Path
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import dsac_e
if __name__ == "__main__":
    dsac_e.COMPILE_AFTER = dsac_e.LOG_INTERVAL = {after}
    compile_update = dsac_e.compile_update
    dsac_e.compile_update = lambda agent: print("compiled") or compile_update(agent)
    small = dict(num_envs=2, total_timesteps=400, learning_starts=50, batch_size=16, buffer_size=1000, hidden_width=16)
    run_dir = Path({str(tmp_path / "run")!r})
    dsac_e.train(dsac_e.Args(env_id="Pendulum-v1", eval_episodes=1, run_dir=run_dir, device="cpu", **small))
"""
    (tmp_path / "main.py").write_text(code)
    command = [sys.executable, str(tmp_path / "main.py")]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def test_run_goes_over_to_compiled_updates(tmp_path):
    """A run that is long enough starts a helper, and uses what it made."""
    done = train(tmp_path, 20)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines().count("compiled") == 1 and "finished at step 400" in done.stdout


def test_without_a_compiler_a_run_goes_on(tmp_path):
    """No C++ compiler: one line says so, and the run ends as ever."""
    done = train(tmp_path, 20, CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "compiled" not in done.stdout.splitlines() and "finished at step 400" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("dsac_e: updates stay uncompiled: ") and "--no-compile" in line


@pytest.mark.parametrize("arguments", [{"compile": False}, {"total_timesteps": 120}])
def test_no_helper(monkeypatch, run, script, arguments):
    """--no-compile means it, and a short run does not bother."""
    monkeypatch.setattr(script, "COMPILE_AFTER", 15)
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda method: pytest.fail("a helper was made"))
    run(script, env_id="Pendulum-v1", **{"total_timesteps": 200} | arguments)


def test_helper_ends_with_its_run(tmp_path):
    """A run that is killed with -9 while its helper compiles leaves no process behind."""
    marker = f"TORCHINDUCTOR_CACHE_DIR={tmp_path / 'cache'}"

    def alive():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if marker in path.read_text() and "\nState:\tZ" not in path.with_name("status").read_text():
                    found.append(path.parent.name)
        return found

    command = [sys.executable, str(ROOT / "sac.py"), "--env-id", "Pendulum-v1", "--learning-starts", "100"]
    command += ["--eval-episodes", "1", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((tmp_path / "cache").glob("**/*.cpp")):  # the helper is at work
        assert run.poll() is None
        time.sleep(0.1)
    assert len(alive()) >= 2
    run.kill()
    run.wait()
    deadline = time.time() + 20
    while alive() and time.time() < deadline:
        time.sleep(0.2)
    assert alive() == []
