"""The compiled update is the eager one; a failing compilation does not end the run."""

import copy

import numpy as np
import pytest
import torch
import torch._inductor.config
from reference import DEVICES, every_script
from scripts import load, train

import sac


@every_script
@pytest.mark.parametrize("device", DEVICES)
@torch._inductor.config.patch(force_shape_pad=True)  # pads as on a GPU
def test_compiled_updates_equal_eager_updates(script, device, monkeypatch):
    """fullgraph=True fails on a graph break. Padded gradients have other strides than weights."""
    noise = torch.randn(32, device=device)  # the same in both modes, which may draw in different orders
    monkeypatch.setattr(torch, "randn_like", lambda x: noise[: x.numel()].view_as(x))
    monkeypatch.setattr("torch._inductor.fx_passes.pad_mm.check_device", lambda *_: True)
    monkeypatch.setattr("torch._inductor.fx_passes.pad_mm.has_triton", lambda: True)
    low, high = np.array([-2, 1], np.float32), np.array([5, 1.5], np.float32)
    torch.manual_seed(0)
    eager = script.Agent(script.Args(hidden_width=16), 3, low, high).to(device)
    rows = np.random.default_rng(0).normal(size=(64, 10))
    buffer = script.ReplayBuffer(64, 3, 2, device)
    buffer.add(rows[:, :3], rows[:, 3:5], rows[:, 5:8], rows[:, 8], rows[:, 9] > 1)
    compiled = copy.deepcopy(eager)
    script.compile_update(compiled, buffer.sample(16))
    assert set(compiled.to_compile) < vars(compiled).keys()
    before = copy.deepcopy(compiled.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in eager.state_dict().items())
    for i in range(6):
        batch = buffer.sample(16)
        noise.normal_()
        expected = eager.update(batch, i % 2 == 0)
        logged = compiled.update(batch, i % 2 == 0)
        assert logged.keys() == expected.keys()
        for tag in logged:
            torch.testing.assert_close(logged[tag], expected[tag], rtol=1e-4, atol=1e-5)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=2e-5)
        assert "net" not in name or not torch.equal(before[name], value)


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nand more"), AssertionError(), OSError("g++")])
def test_a_failing_compilation(tmp_path, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sac, "COMPILE_FROM", 20)
    monkeypatch.setattr(torch, "compile", fail)
    assert train("Recording", tmp_path, "sac", compile=True).code == 0
    assert f"continuing in eager mode: {error}\n" in capsys.readouterr().out and load(tmp_path)["finished"]


@pytest.mark.parametrize("arguments", [{"compile": False}, {"compile": True, "total_timesteps": 60}])
def test_short_runs_and_no_compile(tmp_path, monkeypatch, capsys, arguments):
    """Also the short rest of a long run."""
    monkeypatch.setattr(sac, "COMPILE_FROM", 30)
    assert train("Recording", tmp_path, "sac", **arguments).code == 0
    other = {"total_timesteps": 120, "compile": not arguments["compile"]}
    assert train("Recording", tmp_path, "sac", **other).code == 0
    assert "compiling" not in capsys.readouterr().out
