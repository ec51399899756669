"""A run that is cut short loses nothing that was saved, and one that cannot go on says why in one line."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, Ledger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac

SMALL = (
    "--num-envs 2 --learning-starts 40 --batch-size 16 --buffer-size 150 --hidden-width 16 --eval-episodes 1 "
    "--eval-interval 100 --checkpoint-interval 100 --device cpu"
)


def cli(monkeypatch, script, arguments):
    """Runs the script's main() with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{script.ALGORITHM}.py", *str(arguments).split()])
    script.main()


def refuse(monkeypatch, capsys, script, arguments) -> str:
    """The one line with which the script refuses these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli(monkeypatch, script, arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


def flat(value, name=""):
    """Every number and tensor in a checkpoint, by its path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}
    return {name: value}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def differences(first, second) -> list[str]:
    a, b = flat(first), flat(second)
    assert a.keys() == b.keys()
    return [name for name in a if not same(a[name], b[name])]


def checkpoint(run_dir) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def scalars(run_dir) -> dict:
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


@pytest.fixture
def finished(monkeypatch, run, tmp_path, script):
    """A finished run of each script, whose ring of 150 transitions has gone round more than once."""
    cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 400 --run-dir {tmp_path / 'run'}")
    return tmp_path / "run"


def test_checkpoint_is_everything(monkeypatch, run, tmp_path, script):
    """What goes on from a checkpoint has every weight, target, moment of Adam, running mean, alpha, counter, random
    state and transition of the agent that was saved, to the bit."""
    agents, buffers = [], []
    for kind, made in (("Agent", agents), ("ReplayBuffer", buffers)):

        class Kept(getattr(script, kind)):
            def __init__(self, *args, made=made):
                super().__init__(*args)
                made.append(self)

        monkeypatch.setattr(script, kind, Kept)
    cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 400 --run-dir {tmp_path / 'run'}")
    random_state = torch.get_rng_state()
    torch.manual_seed(1)

    args = script.Args(env_id="Ledger-v0", hidden_width=16)
    box = gym.spaces.Box(np.array([-2.0, 1.0]), np.array([5.0, 1.5]))
    agent, buffer = script.Agent(args, 4, box.low, box.high), script.ReplayBuffer(150, 4, 2, torch.device("cpu"))
    saved = script.read(tmp_path / "run" / "checkpoint.pt", "--resume")
    counters = script.load_checkpoint(tmp_path / "run", saved, agent, buffer)
    assert counters == {"step": 400, "updates": 180, "next_evaluation": 500}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (buffer.added, buffer.filled.item(), buffer.files) == (400, 150, buffers[0].files)
    assert torch.equal(buffer.rows, buffers[0].rows)
    assert not differences(agent.state_dict(), agents[0].state_dict())
    for name in ("critic_optimizer", "policy_optimizer"):
        ours, theirs = getattr(agent, name).state_dict(), getattr(agents[0], name).state_dict()
        assert len(flat(ours)) > 30 and not differences(ours, theirs)
    tensors = {name for name, value in vars(agent).items() if isinstance(value, torch.Tensor)}
    tensors |= {name for name, _ in agent.named_parameters()} | {name for name, _ in agent.named_buffers()}
    assert tensors - set(agent.state_dict()) <= {"budget"}  # which follows from the arguments


def test_resume(monkeypatch, run, capsys, finished, script):
    """A run goes on from where it stopped with the arguments it had: counters, schedule, log and directory; two resumes
    of one checkpoint end in the same bits; what is longer than the first run is honoured."""
    copies = [finished.with_name(name) for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(finished, copy)
    for copy in copies:
        Ledger.copies = 0  # the task counts its copies, and shows the number
        cli(monkeypatch, script, f"--resume {copy} --total-timesteps 700")
    out = capsys.readouterr().out
    assert f"going on from step 400 in {copies[0]}" in out and out.count("finished at step 700") == 2
    a, b = map(checkpoint, copies)
    assert set(differences(a, b)) <= {"/args/resume", "/args/run_dir"}
    assert a["counters"] == {"step": 700, "updates": 330, "next_evaluation": 800} and a["args"]["hidden_width"] == 16
    assert differences(a["agent"], checkpoint(finished)["agent"])
    for start, end in a["files"]:
        assert same(*(torch.load(copy / f"replay-{start}-{end}.pt", weights_only=True) for copy in copies))
    first, whole = scalars(finished), scalars(copies[0])
    for tag, points in first.items():
        assert whole[tag][: len(points)] == points, f"{tag} lost points"
        steps = [step for step, _ in whole[tag]]
        assert steps == sorted(steps) and ("eval" not in tag or steps == [0, 100, 200, 300, 400, 500, 600, 700])


def test_resumed_run_trains_as_the_whole_one(monkeypatch, run, tmp_path, script):
    """Were it not for the new episodes, a run in two parts would be the run in one: with a task whose episodes are one
    step long, all transitions, weights and random numbers agree to the bit."""

    class Short(Ledger):
        observation_space = gym.spaces.Box(-1, 1, (4,), np.float64)

        def reset(self, *, seed=None, options=None):
            return np.full(4, 0.5), {}

        def step(self, action):
            return np.array([*action, 0, 1]) / 5, float(action[0] - action[1]), True, False, {}

    monkeypatch.setitem(gym.registry, "Short-v0", gym.envs.registration.EnvSpec("Short-v0", Short))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cli(monkeypatch, script, f"--env-id Short-v0 {SMALL} --total-timesteps 500 --run-dir {whole}")
    cli(monkeypatch, script, f"--env-id Short-v0 {SMALL} --total-timesteps 200 --run-dir {parts}")
    for total in (300, 500):
        cli(monkeypatch, script, f"--resume {parts} --total-timesteps {total}")
    assert set(differences(checkpoint(whole), checkpoint(parts))) <= {"/args/resume", "/args/run_dir"}


def test_files_of_the_ring(tmp_path, monkeypatch, script):
    """However the saves fall, the files hold the last transitions of the ring, and no file stays without need."""
    monkeypatch.setattr(script, "FILE_LENGTH", 7)
    rng = np.random.default_rng(0)
    agent = script.Agent(script.Args(hidden_width=4), 2, -np.ones(1), np.ones(1))
    buffer = script.ReplayBuffer(20, 2, 1, torch.device("cpu"))
    for _ in range(30):
        for _ in range(rng.integers(0, 9)):
            n = int(rng.integers(1, 5))
            columns = rng.normal(size=(n, 2)), rng.normal(size=(n, 1)), rng.normal(size=(n, 2)), rng.normal(size=n)
            buffer.add(*columns, rng.integers(2, size=n))
        script.save_checkpoint(tmp_path, agent, buffer, step=0)
        names = {f"replay-{start}-{end}.pt" for start, end in buffer.files} | {"checkpoint.pt"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert sum(end - start for start, end in buffer.files) <= 20 + 7 + 7
        again = script.ReplayBuffer(20, 2, 1, torch.device("cpu"))
        again.load(tmp_path, checkpoint(tmp_path)["files"])
        filled = min(buffer.added, 20)
        assert (again.added, again.filled) == (buffer.added, buffer.filled)
        assert torch.equal(again.rows[:filled], buffer.rows[:filled])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--hidden-width 32", "--hidden-width cannot change"),
        ("--env-id Pendulum-v1", "--env-id cannot change"),
        ("--gamma 0.5", "--gamma cannot change"),
        ("--buffer-size 151", "--buffer-size cannot change"),
        ("--run-dir elsewhere", "--run-dir cannot change"),
        ("", "made its 400 steps: give a larger --total-timesteps"),
        ("--total-timesteps 300", "made its 400 steps: give a larger --total-timesteps"),
    ],
)
def test_what_a_resume_refuses(monkeypatch, capsys, run, tmp_path, arguments, says):
    """An argument that cannot be honoured is refused in one line, and the run stays as it was."""
    cli(monkeypatch, sac, f"--env-id Ledger-v0 {SMALL} --total-timesteps 400 --run-dir {tmp_path / 'run'}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert says in refuse(monkeypatch, capsys, sac, f"--resume {tmp_path / 'run'} {arguments}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_damage_is_refused(monkeypatch, capsys, run, tmp_path):
    """A checkpoint that is missing, empty, cut, something else, a sibling's or a trap is refused in one line."""
    run_dir = tmp_path / "run"
    cli(monkeypatch, sac, f"--env-id Ledger-v0 {SMALL} --total-timesteps 400 --run-dir {run_dir}")
    command = f"--resume {run_dir} --total-timesteps 500"
    whole = {path: path.read_bytes() for path in run_dir.glob("*.pt") if path.name != "policy.pt"}
    assert len(whole) >= 3
    for path, content in whole.items():
        for damaged in (None, b"", content[:1], content[: len(content) // 2], content[:-1], b"x" * len(content)):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            says = refuse(monkeypatch, capsys, sac, command)
            assert "cannot use" in says if path.name == "checkpoint.pt" else "is damaged" in says
        path.write_bytes(content)

    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    for content in ({"some": "thing"}, [1, 2], checkpoint(run_dir) | {"args": {"no_such": 1}}, {"algorithm": Trap()}):
        torch.save(content, run_dir / "checkpoint.pt")
        assert "cannot use" in refuse(monkeypatch, capsys, sac, command)
    for part in ("agent", "optimizers", "rng", "counters"):
        torch.save(checkpoint_of(whole, run_dir) | {part: {}}, run_dir / "checkpoint.pt")
        assert "is damaged" in refuse(monkeypatch, capsys, sac, command)
    (run_dir / "replay-300-400.pt").unlink()
    torch.save({"rows": Trap()}, run_dir / "replay-300-400.pt")
    (run_dir / "checkpoint.pt").write_bytes(whole[run_dir / "checkpoint.pt"])
    assert "is damaged" in refuse(monkeypatch, capsys, sac, command)
    assert not trap.exists()

    import td3

    assert f"use sac.py --resume {run_dir}" in refuse(monkeypatch, capsys, td3, command)
    for path, content in whole.items():
        path.write_bytes(content)
    cli(monkeypatch, sac, command)  # and whole again, it goes on


def checkpoint_of(whole, run_dir):
    (run_dir / "checkpoint.pt").write_bytes(whole[run_dir / "checkpoint.pt"])
    return checkpoint(run_dir)


LAUNCHER = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import sac
sac.Agent(sac.Args(), 3, torch.ones(1).numpy() * -1, torch.ones(1).numpy())  # loads what torch loads late
run_dir, kills, during_a_save, started = Path({run_dir!r}), 0, 0, time.time()
random.seed(0)
while True:
    resumable = (run_dir / "checkpoint.pt").exists()
    pid = os.fork()  # spares the import: twenty times three seconds
    if pid == 0:
        if not resumable:
            os.system("rm -rf " + str(run_dir))
        start = "--resume {run_dir}" if resumable else "--env-id Pendulum-v1 --no-compile --run-dir {run_dir} {small}"
        total = 3_000_000
        if kills == 20:
            total = torch.load(run_dir / "checkpoint.pt", weights_only=True)["counters"]["step"] + 600
        sys.argv = ["sac.py", *start.split(), "--total-timesteps", str(total), "--checkpoint-interval", "20"]
        sys.stdout = open(os.devnull, "w")
        sac.main()
        os._exit(0)
    if kills < 20:
        time.sleep(random.uniform(0.3, 1.5))
        os.kill(pid, signal.SIGKILL)
        kills += 1
    _, status = os.waitpid(pid, 0)
    during_a_save += any(run_dir.glob("*.tmp"))
    if os.WIFEXITED(status):
        print(os.WEXITSTATUS(status), kills, during_a_save)
        break
"""


def test_kill_9_twenty_times(tmp_path):
    """Killed at twenty random moments, several of them in the middle of a save, a run can be resumed each time, and
    ends well when it is left alone."""
    run_dir = tmp_path / "run"
    small = SMALL.replace("--checkpoint-interval 100", "").replace("--eval-interval 100", "--eval-interval 1000")
    code = LAUNCHER.format(root=str(ROOT), run_dir=str(run_dir), small=small)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and done.returncode == 0
    status, kills, during_a_save = map(int, done.stdout.split())
    assert (status, kills) == (0, 20) and during_a_save >= 1
    saved = checkpoint(run_dir)
    assert saved["counters"]["step"] > 1000
    assert saved["counters"]["updates"] == (saved["counters"]["step"] - 40) // 2  # not one was lost, nor made twice
    assert {path.suffix for path in run_dir.iterdir() if "tfevents" not in path.name} == {".pt"}
    steps = [step for step, _ in scalars(run_dir)["eval/episodic_return"]]
    assert steps == sorted(set(steps))


def test_full_disk(monkeypatch, run, tmp_path):
    """A checkpoint that does not fit: one line says so, and how to go on; the previous one is whole. /dev/full gives
    the kernel's own "no space left"."""
    write = sac.write

    def fill(path, content):
        if path.name == "checkpoint.pt" and content["counters"]["step"] >= 300:
            path.with_suffix(".tmp").symlink_to("/dev/full")
        write(path, content)

    monkeypatch.setattr(sac, "write", fill)
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli(monkeypatch, sac, f"--env-id Ledger-v0 {SMALL} --total-timesteps 900 --run-dir {run_dir}")
    line = str(stop.value)
    assert re.search(
        r"^sac: step 300: cannot write .*checkpoint.pt \(.*\); .* --resume .*run goes on from step 200$", line
    )
    assert checkpoint(run_dir)["counters"]["step"] == 200
    assert not list(run_dir.glob("*.tmp"))
    monkeypatch.setattr(sac, "write", write)
    cli(monkeypatch, sac, f"--resume {run_dir}")
    assert checkpoint(run_dir)["counters"]["step"] == 900


def misbehave(how):
    """A step() that does something impossible in its 361st call."""
    calls = []

    def step(self, action):
        calls.append(0)
        obs, reward, terminated, truncated, info = healthy(self, action)
        if len(calls) > 360:  # by then there is a checkpoint
            if how == "raise":
                raise ZeroDivisionError("the robot fell")
            if how in ("nan reward", "inf reward"):
                reward = float(how[:3])
            else:
                obs = np.full(4, float(how[:3]))
        return obs, reward, terminated, truncated, info

    return step


healthy = Ledger.step


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", r"the task raised ZeroDivisionError\('the robot fell'\) \(.*test_survival.py, line \d+\)"),
        ("nan reward", "the task returned a reward that is not finite"),
        ("inf reward", "the task returned a reward that is not finite"),
        ("nan observation", "the task returned an observation that is not finite"),
        ("inf observation", "the task returned an observation that is not finite"),
    ],
)  # fmt: skip
def test_a_broken_task(monkeypatch, run, tmp_path, script, how, says):
    """It ends the run in one line with the step, what happened and the last checkpoint; nothing broken was stored."""
    monkeypatch.setattr(Ledger, "step", misbehave(how))
    with pytest.raises(SystemExit) as stop:
        cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 2000 --run-dir {tmp_path / 'run'}")
    pattern = rf"{script.ALGORITHM}: step \d+: {says}; python \S+ --resume \S+ goes on from step \d00"
    assert re.fullmatch(pattern, str(stop.value)), stop.value
    for start, end in checkpoint(tmp_path / "run")["files"]:
        assert torch.load(tmp_path / "run" / f"replay-{start}-{end}.pt", weights_only=True).isfinite().all()


def test_a_task_that_ends_every_step(monkeypatch, run, tmp_path, script):
    """Episodes of one step are a task like any other."""
    monkeypatch.setattr(Ledger, "step", lambda self, action: (*healthy(self, action)[:2], True, False, {}))
    cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 200 --run-dir {tmp_path / 'run'}")
    assert {length for _, length in scalars(tmp_path / "run")["charts/episodic_length"]} == {1.0}


@pytest.mark.parametrize("what", ["critics", "policy"])
def test_a_broken_number_stops_the_run_at_once(monkeypatch, run, tmp_path, script, what):
    """A loss that is not finite ends the run in the very iteration, with the step, the quantity and the checkpoint."""
    update, calls = script.Agent.update, []

    def spoil(self, batch, delayed):
        calls.append(delayed)
        if len(calls) == 150:
            with torch.no_grad():
                getattr(self, what).net[-1].bias.fill_(float("nan"))
        return update(self, batch, delayed)

    monkeypatch.setattr(script.Agent, "update", spoil)
    with pytest.raises(SystemExit) as stop:
        cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 2000 --run-dir {tmp_path / 'run'}")
    assert len(calls) == 150
    pattern = r"\w+: step 340: not finite: .*losses/p[ei][vm].*; python \S+ --resume \S+ goes on from step 300"
    assert re.fullmatch(pattern, str(stop.value)), stop.value
    for name in ("policy.pt", "checkpoint.pt"):
        saved = flat(torch.load(tmp_path / "run" / name, weights_only=True))
        assert all(value.isfinite().all() for value in saved.values() if isinstance(value, torch.Tensor))


def test_a_broken_weight_is_not_saved(monkeypatch, run, tmp_path, script):
    """Should a weight break while no loss shows it, the good policy and checkpoint are not overwritten."""
    act = script.act

    def spoil(policy, obs, space, deterministic=False):
        if spoil.calls == 150:
            with torch.no_grad():
                policy.net[-1].bias.fill_(float("inf"))
        spoil.calls += not deterministic
        return act(policy, obs, space, deterministic)

    spoil.calls = 0
    monkeypatch.setattr(script, "act", spoil)
    monkeypatch.setattr(script.Agent, "update", lambda self, batch, delayed: {"losses/pev": torch.tensor(0.0)})
    step_envs = script.step_envs
    monkeypatch.setattr(script, "step_envs", lambda envs, action: step_envs(envs, np.nan_to_num(action)))
    with pytest.raises(SystemExit, match=r"step 400: a weight is not finite; .* goes on from step 300"):
        cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 2000 --run-dir {tmp_path / 'run'}")
    saved = flat(torch.load(tmp_path / "run" / "policy.pt", weights_only=True))
    assert all(value.isfinite().all() for value in saved.values() if isinstance(value, torch.Tensor))


def test_runs_of_the_same_second(monkeypatch, run, tmp_path, script):
    """Two runs that start in the same second, with the same arguments, do not share a directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.time, "strftime", lambda form: "20260101-000000")
    for _ in range(2):
        cli(monkeypatch, script, f"--env-id Ledger-v0 {SMALL} --total-timesteps 60")
    runs = sorted(path.name for path in Path("runs").iterdir())
    name = f"Ledger-v0__{script.ALGORITHM}__0__20260101-000000"
    assert runs == [name, f"{name}-{os.getpid()}"]


def test_sigterm_and_on(tmp_path):
    """SIGTERM ends a run in order and says how to go on; the command it names does, with no argument repeated."""
    command = [sys.executable, str(ROOT / "sac.py"), "--env-id", "Pendulum-v1", *SMALL.split()]
    command += ["--total-timesteps", "1000000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == ""
    step = int(re.search(r"interrupted at step (\d+)", out).group(1))
    again = re.search(r"go on:    (python .*)", out).group(1).replace("python", sys.executable, 1).split()
    total = step + 200
    done = subprocess.run([*again, "--total-timesteps", str(total)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"going on from step {step} in" in done.stdout and f"finished at step {total}" in done.stdout


def test_what_the_killed_run_logged_is_superseded(monkeypatch, run, tmp_path, ledger):
    """What a run logged after its last checkpoint is made again by the resumed one: no step stands twice in the curves.
    New episodes have new seeds each time, and not those that the run began with."""
    run_dir, kept = tmp_path / "run", tmp_path / "kept"
    cli(monkeypatch, sac, f"--env-id Ledger-v0 {SMALL} --total-timesteps 200 --run-dir {run_dir}")
    shutil.copytree(run_dir, kept)
    cli(monkeypatch, sac, f"--resume {run_dir} --total-timesteps 500")
    for path in run_dir.glob("*.pt"):  # as if killed at step 500, with the checkpoint of step 200
        path.unlink()
    for path in kept.glob("*.pt"):
        shutil.copy(path, run_dir)
    cli(monkeypatch, sac, f"--resume {run_dir} --total-timesteps 400")
    cli(monkeypatch, sac, f"--resume {run_dir} --total-timesteps 600")
    points = scalars(run_dir)
    assert [step for step, _ in points["eval/episodic_return"]] == [0, 100, 200, 300, 400, 500, 600]
    steps = [step for step, _ in points["charts/episodic_length"]]
    assert steps == sorted(steps) and max(steps.count(step) for step in steps) <= 2  # there are two environments

    training = [seed for seed in ledger.seeds if ledger.seeds.count(seed) < 4]
    starts = [tuple(np.random.SeedSequence(0, spawn_key=key).generate_state(2)) for key in ((), (200, 1), (400, 1))]
    assert len(set(starts)) == 3
    for start in starts:
        assert all(int(seed) in training for seed in start)
