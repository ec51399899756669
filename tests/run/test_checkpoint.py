"""The run directory as the identity of a run: resuming, refusing, interruptions, kill -9, damaged files, full disks."""

import importlib
import io
import os
import re
import resource
import shlex
import shutil
import signal

import environments
import filelock
import pytest
import torch
from environments import SCRIPTS, RecordingEnv, call_at, flat, load, main, scalars, start, train
from reference import DEVICES

import sac

# The number of the environment step at which something happens, see call_at.
MOMENTS = {"training": 20, "evaluation": 58, "training after it": 80, "last evaluation": 114}


@pytest.fixture(autouse=True)
def signals():
    """As in a terminal, also if the tests run in the background or under nohup."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run of SAC; tests work on copies."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert train("Recording", directory, "sac") is None
    return directory


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "run.lock"}


def test_a_finished_run_says_so(run_dir, capsys):
    before = content(run_dir)
    assert main("sac", ["--run-dir", run_dir]) is None
    assert train("Recording", run_dir, "sac") is None
    assert train("Recording", run_dir, "sac", total_timesteps=90) is None
    assert capsys.readouterr().out.splitlines() == [f"{run_dir} is already finished at step 100"] * 3
    assert content(run_dir) == before


def test_a_longer_run_continues(run_dir, capsys):
    """With other values of the arguments that may change."""
    changed = "--total-timesteps 150 --eval-interval 60 --eval-episodes 1 --checkpoint-interval 30 --device auto --compile"
    assert main("sac", ["--run-dir", run_dir, *changed.split()]) is None
    assert ", step 100;" in capsys.readouterr().out
    assert load(run_dir)["step"] == load(run_dir, "policy.pt")["step"] == 150
    assert list(scalars(run_dir)["eval/episodic_return"]) == [0, 50, 100, 120, 150]
    assert load(run_dir)["args"]["hidden_width"] == 8  # from the run, not the default
    moments = load(run_dir)["optimizer"]["state"]  # one update per vector step from 40 on:
    assert max(float(moment["step"]) for moment in moments.values()) == 55


def test_the_policy_is_saved_before_every_evaluation(tmp_path, monkeypatch):
    """For --evaluate and --capture-video of a run that is training, also between two checkpoints."""
    steps = []
    call_at(monkeypatch, MOMENTS["evaluation"], lambda: steps.append(load(tmp_path, "policy.pt")["step"]))
    assert train("Recording", tmp_path, "sac", checkpoint_interval=1000) is None
    assert steps == [50]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_continues_where_it_stopped(tmp_path, monkeypatch, script, device):
    """With the weights, buffers and moments of the last update, and with the policy in every third update."""
    module, states, flags = importlib.import_module(script), [], []

    def state(agent):
        tensors = [*agent.parameters(), *agent.buffers(), *flat(agent.optimizer.state_dict()["state"])]
        return [tensor.detach().clone() for tensor in tensors]

    def update(self, batch, update_policy):
        states.append(state(self))
        flags.append(update_policy)
        log = original(self, batch, update_policy)
        states.append(state(self))
        return log

    original = module.Agent.update
    monkeypatch.setattr(module.Agent, "update", update)
    arguments = {"policy_delay": 3, "device": device}
    arguments |= {"center_entropy": True} if script == "dsac_e" else {}  # the shift is a buffer
    train("Recording", tmp_path, script, total_timesteps=62, **arguments)
    last = len(states) - 1
    train("Recording", tmp_path, script, total_timesteps=66, **arguments)
    assert flags == [step // 2 % 3 == 0 for step in range(40, 66, 2)]  # resumed at 62
    assert all(torch.equal(a, b) for a, b in zip(states[last], states[last + 1], strict=True))


@pytest.mark.parametrize("arguments, says", [
    ({"gamma": 0.5, "hidden_width": 16}, "has another (gamma, hidden_width|hidden_width, gamma): "),
    ({"env_id": "environments:OneStep-v0"}, "has another env_id: "),
    ({"script": "td3"}, "it was saved by sac.py"),
])  # fmt: skip
def test_another_run_is_refused(run_dir, arguments, says):
    before = content(run_dir)
    assert re.search(says, train("Recording", run_dir, **{"script": "sac"} | arguments))
    assert content(run_dir) == before


def test_arguments_that_may_not_change(run_dir):
    args, before = load(run_dir)["args"], content(run_dir)
    may = "total_timesteps eval_interval eval_episodes checkpoint_interval device compile run_dir evaluate capture_video"
    for name in args.keys() - {*may.split(), "env_id"}:
        assert f"has another {name}" in train("Recording", run_dir, "sac", **{name: args[name] * 2 + 1})
    assert content(run_dir) == before


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "contains other files" in train("Recording", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "log.txt")  # as a shell may write it
    assert train("Recording", tmp_path) is None


def test_changed_spaces_are_refused(run_dir, monkeypatch):
    monkeypatch.setattr(RecordingEnv, "action_space", environments.box(-1, 1, (2,)))
    for arguments in ([], ["--evaluate"]):
        assert "has changed" in main("sac", ["--run-dir", run_dir, "--total-timesteps", "150", *arguments])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_saves_and_the_printed_command_resumes(tmp_path, monkeypatch, capsys, moment, number):
    run_dir = tmp_path / "a directory"
    step = {"training": 14, "evaluation": 50, "training after it": 68, "last evaluation": 100}[moment]
    with monkeypatch.context() as patch:
        call_at(patch, MOMENTS[moment], lambda: [signal.raise_signal(number) for _ in range(2)])
        assert train("Recording", run_dir, "sac") == 128 + number
        if "evaluation" in moment:  # it ends at once
            assert sum(map(len, RecordingEnv.actions.values())) <= MOMENTS[moment] + 1
            assert step not in scalars(run_dir)["eval/episodic_return"]
    saved = load(run_dir)
    assert (saved["step"], len(saved["replay"]), saved["finished"]) == (step, step, False)
    command = re.search(rf"stopped at step {step}; .*: (python .*)", capsys.readouterr().err)[1]
    assert main("sac", shlex.split(command)[2:]) is None
    out = capsys.readouterr().out
    assert f", step {step};" in out and "finished at step 100" in out
    assert load(run_dir)["step"] == 100 and load(run_dir)["finished"]
    assert {0, 50, 100} <= scalars(run_dir)["eval/episodic_return"].keys() <= {0, 14, 50, 68, 100}


def test_an_ignored_sighup_stays_ignored(tmp_path, monkeypatch):
    call_at(monkeypatch, 20, lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert train("Recording", tmp_path / "run", "sac") is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step, last", [(0, 0), (60, 62)])
def test_a_signal_during_a_save(tmp_path, monkeypatch, step, last):
    def interrupted(saved, file):
        if saved["step"] == step:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        write(saved, file)

    write = torch.save
    monkeypatch.setattr(torch, "save", interrupted)
    assert train("Recording", tmp_path / "run", "sac", checkpoint_interval=60) == 128 + signal.SIGINT
    assert load(tmp_path / "run")["step"] == last


def test_signals_to_a_process(tmp_path):
    process = start(environments.options("Recording", tmp_path / "run", total_timesteps=10**7), "sac")
    while "step 50:" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()  # as Ctrl-C does, if stdout is a pipe to tee
    process.terminate()
    err = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert err.startswith(f"stopped at step {load(tmp_path / 'run')['step']};") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["policy.pt", "checkpoint.pt"])
@pytest.mark.parametrize("point", ["write", "replace"])
def test_kill_9_during_a_save_keeps_the_previous_files(run_dir, monkeypatch, name, point):
    def kill_write(saved, file):
        if ("replay" in saved) == (name == "checkpoint.pt"):
            file.write(b"half of a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        write(saved, file)

    def kill_replace(source, target):
        if str(target).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    write, replace = torch.save, os.replace
    target = (torch, "save", kill_write) if point == "write" else (os, "replace", kill_replace)
    before = content(run_dir)
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(*target)
            main("sac", ["--run-dir", run_dir, "--total-timesteps", "150"])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert content(run_dir)[name] == before[name]
    assert main("sac", ["--run-dir", run_dir, "--total-timesteps", "150"]) is None
    assert load(run_dir)["step"] == 150 and not (run_dir / "save.tmp").exists()


def test_a_run_without_a_checkpoint(run_dir, capsys):
    """It starts over if it is not finished. If it is, the policy would be lost."""
    (run_dir / "checkpoint.pt").unlink()
    before = content(run_dir)
    message = train("Recording", run_dir, "sac", total_timesteps=150)
    assert message == f"cannot extend {run_dir}: its checkpoint.pt is missing" and content(run_dir) == before
    torch.save(load(run_dir, "policy.pt") | {"finished": False}, run_dir / "policy.pt")
    assert train("Recording", run_dir, "sac", total_timesteps=150) is None
    assert ", step 0;" in capsys.readouterr().out
    assert list(scalars(run_dir)["eval/episodic_return"]) == [0, 50, 100, 150]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["policy.pt", "checkpoint.pt"])
@pytest.mark.parametrize("what", ["empty", "truncated", "text", "list", "dictionary", "malicious"])
def test_damaged_and_foreign_files(run_dir, tmp_path, monkeypatch, name, what):
    path = run_dir / name
    data = path.read_bytes()
    contents = {"empty": b"", "truncated": data[: len(data) // 2], "text": b"some text", "list": [1, 2],
                "dictionary": {"a": 1}, "malicious": {"algorithm": Malicious()}}  # fmt: skip
    if isinstance(contents[what], bytes):
        path.write_bytes(contents[what])
    else:
        torch.save(contents[what], path)
    monkeypatch.chdir(tmp_path)
    before = path.read_bytes()
    message = main("sac", ["--run-dir", run_dir, "--total-timesteps", "150"])
    assert message.startswith(f"{path} is damaged") and "\n" not in message
    assert path.read_bytes() == before and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("n", [None, 80], ids=["at the start", "later"])
def test_a_full_disk(tmp_path, monkeypatch, n):
    """Writing to /dev/full fails as on a full disk."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    call_at(monkeypatch, n, lambda: (run_dir / "save.tmp").symlink_to("/dev/full"))
    if n is None:
        (run_dir / "save.tmp").symlink_to("/dev/full")
    message = train("Recording", run_dir, "sac", checkpoint_interval=60, eval_interval=50)
    assert "cannot write" in message and "No space left on device" in message and "\n" not in message
    assert not (run_dir / "save.tmp").is_symlink()
    monkeypatch.undo()
    assert train("Recording", run_dir, "sac", checkpoint_interval=60) is None


def test_a_disk_that_becomes_full_within_a_file(tmp_path):
    """torch.save then raises a RuntimeError; a limit of the file size has the same effect as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        message = train("Recording", tmp_path / "run", "sac", hidden_width=128)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message and "File too large" in message and "\n" not in message


def test_a_file_that_accepts_a_part_of_each_write(run_dir, monkeypatch):
    """As on Linux above 2 GiB. torch.save ignores how much a raw file has written."""

    class PartialFile(io.FileIO):
        def write(self, data):
            return super().write(memoryview(data)[:1000])

    def open_partial(path, mode, buffering=-1):
        return PartialFile(path, mode) if buffering == 0 else io.BufferedWriter(PartialFile(path, mode))

    monkeypatch.setattr(sac, "open", open_partial, raising=False)
    assert main("sac", ["--run-dir", run_dir, "--total-timesteps", "120"]) is None
    assert main("sac", ["--run-dir", run_dir, "--total-timesteps", "150"]) is None


def test_a_second_process_is_refused(tmp_path):
    with filelock.FileLock(tmp_path / "run.lock"):  # as the other process holds it
        assert f"another process is training in {tmp_path};" in train("Recording", tmp_path, "sac")
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert train("Recording", tmp_path, "sac") is None


@pytest.mark.parametrize("what", ["weight", "moment", "action"])
def test_a_diverged_run_keeps_the_last_checkpoint(tmp_path, monkeypatch, what):
    update, calls = sac.Agent.update, []

    def diverge(self, batch, update_policy):
        log = update(self, batch, update_policy)
        calls.append(0)
        if len(calls) == 25:  # step 88
            with torch.no_grad():
                if what == "moment":  # weights stay finite
                    next(iter(self.optimizer.state.values()))["exp_avg_sq"].fill_(torch.inf)
                else:
                    network = self.policy if what == "action" else self.target_critics
                    network.net[-1].bias.fill_(torch.nan)
        return log

    monkeypatch.setattr(sac.Agent, "update", diverge)
    monkeypatch.setattr(sac, "LOG_INTERVAL", 1)
    message = train("Recording", tmp_path / "run", "sac", checkpoint_interval=60)
    assert re.search(r"training.* diverged", message) and "\n" not in message
    assert load(tmp_path / "run")["step"] == 60
    assert 84 in scalars(tmp_path / "run")["losses/pev"]  # the log shows how it diverged


def test_checkpoints_at_intervals(tmp_path, monkeypatch):
    """A power failure at step 88 costs the steps since 76, the first one after three intervals of 25."""
    call_at(monkeypatch, 112, lambda: shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    train("Recording", tmp_path / "run", "sac", checkpoint_interval=25, eval_interval=25)
    assert load(tmp_path / "copy")["step"] == 76
    assert main("sac", ["--run-dir", tmp_path / "copy"]) is None
    assert list(scalars(tmp_path / "copy")["eval/episodic_return"]) == [0, 26, 50, 76, 100]
