"""Which quantity influences which.

PEV, PIS  train the critics only; targets are constants; alpha appears only in entangled targets
          (DSAC-T, SAC, DSAC-E with --no-res)
PIM       trains the policy only, through the critics and, for DSAC-E, through Qe; alpha is a constant
TUP       trains log_alpha only; the entropy is a constant

The two gradient methods have no side effects. The control flow of an update does not depend on the value of a tensor,
for which a GPU would have to be synchronized.
"""

import copy

import pytest
import torch
from reference import DEVICES, SCRIPTS, VARIANTS, B, make_agent, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

TRAINED = {
    "pev": {"q", "sigma"},
    "pis": {"qe"},
    "pim": {"q", "entropy", "trajectory_entropy"},
    "tup": {"log_alpha"},
}
STEPS = [(script, step) for script in SCRIPTS for step in TRAINED if hasattr(SCRIPTS[script], step)]


@pytest.mark.parametrize("script, step", STEPS)
def test_gradients_of_each_step(script, step):
    """All arguments except tau and the budget require gradients; those that the step trains receive one."""
    function = getattr(SCRIPTS[script], step)
    numbers = {"tau": 0.1, "budget": torch.tensor(-2.0), "h0": torch.tensor(-2.0)}
    shapes = dict.fromkeys(("q", "sigma", "next_q", "next_sigma"), (2, B))
    shapes |= {"alpha": (), "log_alpha": (), "mean_sigma": (2,)}
    names = function.__annotations__.keys() - {"return"}
    inputs = {name: torch.rand(shapes.get(name, B), requires_grad=True) for name in names - numbers.keys()}
    result = function(**inputs, **{name: numbers[name] for name in names & numbers.keys()})
    loss, *rest = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(loss, inputs.values(), allow_unused=True)
    reached = {name for name, gradient in zip(inputs, gradients, strict=True) if gradient is not None}
    assert reached == TRAINED[step] & names
    assert not any(tensor.requires_grad for tensor in rest)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_methods_have_no_side_effects(variant):
    """The methods that are compiled change no weight, buffer or .grad."""
    script, arguments = VARIANTS[variant]
    agent, batch = make_agent(script, **arguments), make_batch(script, 1)
    before = copy.deepcopy(agent.state_dict())
    for name in agent.to_compile:
        getattr(agent, name)(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())
    assert all(weight.grad is None for weight in agent.parameters())


class NoSynchronization(TorchDispatchMode):
    """Raises where the host needs the value of a tensor and would wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0].removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_does_not_synchronize_with_the_host(variant, device, request):
    """No .item(), float(), bool() or boolean index in an update of either kind."""
    script, arguments = VARIANTS[variant]
    agent = make_agent(script, **arguments).to(device)
    batch = script.Batch(*(column.to(device) for column in make_batch(script, 1)))
    if device == "cuda":  # PyTorch's own check
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
    with NoSynchronization():
        for update_policy in (False, True, True):
            agent.update(batch, update_policy)
    with pytest.raises((AssertionError, RuntimeError)), NoSynchronization():
        batch.reward[0].item()
