"""The run directory as the identity of a run: resuming, refusing, interruptions, kill -9, damaged files, full disks."""

import copy
import importlib
import io
import os
import re
import resource
import shutil
import signal

import environments
import filelock
import numpy as np
import pytest
import torch
from environments import RecordingEnv
from reference import DEVICES
from scripts import SCRIPTS, Moment, call_at, command_in, equal, evaluated, load, main, scalars, start, train

import sac

LONGER = ["--total-timesteps", "150"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run of SAC; tests work on copies."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert train("Recording", directory, "sac").code == 0
    return directory


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "run.lock"}


def test_a_finished_run_says_so(run_dir, capsys):
    before = content(run_dir)
    assert main("sac", ["--run-dir", run_dir]).code == 0
    assert train("Recording", run_dir, "sac").code == 0
    assert train("Recording", run_dir, "sac", total_timesteps=90).code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("already finished at step 100" in line for line in lines)
    assert content(run_dir) == before


def test_a_longer_run_continues(run_dir, capsys):
    """With other values of the arguments that may change."""
    changed = "--total-timesteps 150 --eval-interval 60 --eval-episodes 1 --checkpoint-interval 30 --device auto --compile"
    assert main("sac", ["--run-dir", run_dir, *changed.split()]).code == 0
    assert evaluated(capsys.readouterr().out) == [100, 120, 150]
    assert load(run_dir)["step"] == load(run_dir, "policy.pt")["step"] == 150
    assert list(scalars(run_dir)["eval/episodic_return"]) == [0, 50, 100, 120, 150]
    assert load(run_dir)["args"]["hidden_width"] == 8  # from the run, not the default
    moments = load(run_dir)["optimizer"]["state"]  # one update per vector step from 40 on:
    assert max(float(moment["step"]) for moment in moments.values()) == 55


def test_the_policy_is_saved_before_every_evaluation(tmp_path, monkeypatch):
    """For --evaluate and --capture-video of a run that is training, also between two checkpoints."""
    steps = []
    call_at(monkeypatch, Moment.EVALUATION, lambda: steps.append(load(tmp_path, "policy.pt")["step"]))
    assert train("Recording", tmp_path, "sac", checkpoint_interval=1000).code == 0
    assert steps == [50]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_continues_where_it_stopped(tmp_path, monkeypatch, script, device):
    """With the weights, buffers and moments of the last update, and with the policy in every third update."""
    module, states, flags = importlib.import_module(script), [], []

    def record(agent):
        states.append(copy.deepcopy({"agent": agent.state_dict(), "optimizer": agent.optimizer.state_dict()}))

    def update(self, batch, update_policy):
        record(self)
        flags.append(update_policy)
        log = original(self, batch, update_policy)
        record(self)
        return log

    original = module.Agent.update
    monkeypatch.setattr(module.Agent, "update", update)
    arguments = {"policy_delay": 3, "device": device}
    arguments |= {"center_entropy": True} if script == "dsac_e" else {}  # its means are buffers
    train("Recording", tmp_path, script, total_timesteps=62, **arguments)
    last = len(states) - 1
    train("Recording", tmp_path, script, total_timesteps=66, **arguments)
    assert flags == [step // 2 % 3 == 0 for step in range(40, 66, 2)]  # resumed at 62
    assert equal(states[last], states[last + 1], ["agent", "optimizer"])


def test_another_run_is_refused(run_dir):
    args, before = load(run_dir)["args"], content(run_dir)
    may = "total_timesteps eval_interval eval_episodes checkpoint_interval env_threads device compile run_dir evaluate capture_video"
    for name in args.keys() - {*may.split(), "env_id"}:
        result = train("Recording", run_dir, "sac", **{name: args[name] * 2 + 1})
        assert result.fails_with(f" {name}.*another --run-dir")
    assert train("OneStep", run_dir, "sac").fails_with(" env_id.*another --run-dir")
    assert train("Recording", run_dir, "td3").fails_with("saved by sac.py")
    assert content(run_dir) == before


def test_updates_per_step(tmp_path, monkeypatch):
    """Which of them updates the policy follows from the step, also after a resume."""
    flags, update = [], sac.Agent.update

    def record(self, batch, update_policy):
        flags.append(update_policy)
        return update(self, batch, update_policy)

    monkeypatch.setattr(sac.Agent, "update", record)
    for total_timesteps in (50, 60):
        train(
            "Recording", tmp_path, "sac", total_timesteps=total_timesteps, updates_per_step=3, policy_delay=4
        )
    assert flags == [i % 4 == 0 for i in range(60, 90)]  # three for each of the iterations 20 to 29


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert train("Recording", tmp_path).fails_with("contains other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    for name in ("log.txt", "run.log", "save.tmp"):  # of a shell, or of a start that was killed
        (tmp_path / name).touch()
    assert train("Recording", tmp_path).code == 0


def test_changed_spaces_are_refused(run_dir, monkeypatch):
    monkeypatch.setattr(RecordingEnv, "action_space", environments.box(-1, 1, (2,)))
    for words in (LONGER, [*LONGER, "--evaluate"]):
        assert main("sac", ["--run-dir", run_dir, *words]).fails_with("Recording-v0 has")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", Moment)
def test_a_signal_saves_and_the_printed_command_resumes(tmp_path, monkeypatch, capsys, moment, number):
    run_dir = tmp_path / "a directory"
    phase, step = moment.value
    if phase == "training":
        step += 2  # the iteration is completed
    with monkeypatch.context() as patch:
        call_at(patch, moment, lambda: signal.raise_signal(number))
        assert train("Recording", run_dir, "sac").code == 128 + number
    if phase == "evaluation":  # it ends at once
        assert len(RecordingEnv.actions[3]) % 3 == 1  # an evaluation takes three steps
        assert step not in scalars(run_dir)["eval/episodic_return"]
    saved = load(run_dir)
    assert (saved["step"], len(saved["replay"]), saved["finished"]) == (step, step, False)
    err = capsys.readouterr().err
    assert f"stopped at step {step}" in err
    assert main("sac", command_in(err)[2:]).code == 0
    assert evaluated(capsys.readouterr().out)[0] == step
    assert load(run_dir)["step"] == 100 and load(run_dir)["finished"]
    assert {0, 50, 100} <= scalars(run_dir)["eval/episodic_return"].keys() <= {0, 50, 100, step}


def test_an_ignored_sighup_stays_ignored(tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    call_at(monkeypatch, Moment.BEFORE_LEARNING, lambda: signal.raise_signal(signal.SIGHUP))
    assert train("Recording", tmp_path / "run", "sac").code == 0


@pytest.mark.parametrize("step", [0, 60])
def test_a_signal_during_a_save(tmp_path, monkeypatch, step):
    """Two signals, of which the second would interrupt an environment, do not interrupt a save."""

    def interrupted(saved, file):
        if saved["step"] == step:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        write(saved, file)

    write = torch.save
    monkeypatch.setattr(torch, "save", interrupted)
    assert train("Recording", tmp_path / "run", "sac", checkpoint_interval=60).code == 128 + signal.SIGINT
    assert load(tmp_path / "run")["step"] == step


def test_signals_to_a_process(tmp_path):
    """Its output through a pipe comes at once, long before the end of this run of half a minute."""
    process = start("Slow", tmp_path / "run", "sac", total_timesteps=1000)
    while "step 50:" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()  # as Ctrl-C does, if stdout is a pipe to tee
    process.terminate()
    err = process.stderr.read()
    assert process.wait(300) == 128 + signal.SIGTERM
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
            main("sac", ["--run-dir", run_dir, *LONGER])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert content(run_dir)[name] == before[name]
    assert main("sac", ["--run-dir", run_dir, *LONGER]).code == 0
    assert load(run_dir)["step"] == 150 and not (run_dir / "save.tmp").exists()


def test_a_run_without_a_checkpoint(run_dir, capsys):
    """It cannot be resumed or extended: the policy would be lost."""
    (run_dir / "checkpoint.pt").unlink()
    for finished in (True, False):
        torch.save(load(run_dir, "policy.pt") | {"finished": finished}, run_dir / "policy.pt")
        before = content(run_dir)
        assert main("sac", ["--run-dir", run_dir, *LONGER]).fails_with("cannot read .*checkpoint.pt")
        assert content(run_dir) == before


def test_a_run_killed_before_its_first_checkpoint(tmp_path, monkeypatch):
    """The same command resumes it. A copy of the directory is what kill -9 would leave."""
    with monkeypatch.context() as patch:
        call_at(patch, Moment.LEARNING, lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed"))
        train("Recording", tmp_path / "run", "sac")
    assert train("Recording", tmp_path / "killed", "sac").code == 0
    assert load(tmp_path / "killed")["step"] == 100


def test_a_run_that_finishes_while_another_process_starts(tmp_path, run_dir, monkeypatch):
    """The second process has seen no policy.pt, then waits for its environments; it must not start over."""
    handle_signals = sac.handle_signals

    def finish_meanwhile(cleanup):
        shutil.copytree(run_dir, tmp_path / "second")
        return handle_signals(cleanup)

    monkeypatch.setattr(sac, "handle_signals", finish_meanwhile)
    assert train("Recording", tmp_path / "second", "sac").fails_with("at the same time")
    assert content(tmp_path / "second")["policy.pt"] == content(run_dir)["policy.pt"]


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
    assert main("sac", ["--run-dir", run_dir, *LONGER]).fails_with(re.escape(str(path)))
    assert path.read_bytes() == before and not (tmp_path / "executed").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    """Writing to /dev/full fails as on a full disk."""
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        call_at(patch, Moment.LEARNING, lambda: (run_dir / "save.tmp").symlink_to("/dev/full"))
        result = train("Recording", run_dir, "sac", checkpoint_interval=60)
    assert result.fails_with("cannot write .*No space left on device")
    assert not (run_dir / "save.tmp").is_symlink()
    assert train("Recording", run_dir, "sac", checkpoint_interval=60).code == 0


def test_a_disk_that_becomes_full_within_a_file(tmp_path):
    """torch.save then raises a RuntimeError; a limit of the file size has the same effect as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        result = train("Recording", tmp_path / "run", "sac", hidden_width=128)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.fails_with("cannot write .*File too large")


def test_a_file_that_accepts_a_part_of_each_write(run_dir, monkeypatch):
    """As on Linux above 2 GiB. torch.save ignores how much a raw file has written."""

    class PartialFile(io.FileIO):
        def write(self, data):
            return super().write(memoryview(data)[:1000])

    def open_partial(path, mode, buffering=-1):
        return PartialFile(path, mode) if buffering == 0 else io.BufferedWriter(PartialFile(path, mode))

    monkeypatch.setattr(sac, "open", open_partial, raising=False)
    assert main("sac", ["--run-dir", run_dir, "--total-timesteps", "120"]).code == 0
    assert main("sac", ["--run-dir", run_dir, *LONGER]).code == 0


def test_a_second_process_is_refused(tmp_path):
    with filelock.FileLock(tmp_path / "run.lock"):  # as the other process holds it
        assert train("Recording", tmp_path, "sac").fails_with("another process is training")
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert train("Recording", tmp_path, "sac").code == 0


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
    assert train("Recording", tmp_path / "run", "sac", checkpoint_interval=60).fails_with("diverged")
    assert load(tmp_path / "run")["step"] == 60
    assert 84 in scalars(tmp_path / "run")["losses/pev"]  # the log shows how it diverged
    assert np.isfinite(RecordingEnv.actions[0]).all()


def test_checkpoints_at_intervals(tmp_path, monkeypatch):
    """A power failure costs the steps since 76, the first step after three intervals of 25."""
    call_at(monkeypatch, Moment.LEARNING, lambda: shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    train("Recording", tmp_path / "run", "sac", checkpoint_interval=25, eval_interval=25)
    assert load(tmp_path / "copy")["step"] == 76
    assert main("sac", ["--run-dir", tmp_path / "copy"]).code == 0
    assert list(scalars(tmp_path / "copy")["eval/episodic_return"]) == [0, 26, 50, 76, 100]
