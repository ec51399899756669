"""What TensorBoard shows is what the names say."""

import pytest
from environments import RecordingEnv
from scripts import SCRIPTS, scalars, train

import dsac_e

COMMON = """charts/SPS charts/episodic_return charts/episodic_length eval/episodic_return eval/episodic_return_std
eval/episodic_length losses/pim critic/q_mean critic/q_std critic/target_mean critic/target_std"""
TEMPERATURE = "losses/tup losses/alpha entropy/policy_mean entropy/policy_std entropy/budget"
PEV = "losses/pev"
SIGMA = "critic/sigma_mean critic/sigma_std critic/td_error_mean critic/td_error_std"
ENTROPY_CRITIC = "losses/pis entropy/qe_mean entropy/qe_std entropy/trajectory_mean entropy/trajectory_std"
TAGS = {"td3": f"{COMMON} {PEV}", "sac": f"{COMMON} {PEV} {TEMPERATURE}", "dsac_t": f"{COMMON} {TEMPERATURE} {SIGMA}",
        "dsac_e": f"{COMMON} {TEMPERATURE} {SIGMA} {ENTROPY_CRITIC}"}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_tags_of_a_run_of_200_updates(tmp_path, script):
    train("OneStep", tmp_path, script, total_timesteps=440, eval_interval=300)
    log = scalars(tmp_path)
    assert log.keys() == set(TAGS[script].split())
    for tag, points in log.items():  # one point per 100 updates, not one per episode
        assert list(points) == [0, 300, 440] if tag.startswith("eval/") else [200, 400], tag


def test_values(tmp_path, monkeypatch):
    logs, update = [], dsac_e.Agent.update

    def recorded(*args):
        logs.append(update(*args))
        return logs[-1]

    monkeypatch.setattr(dsac_e, "LOG_INTERVAL", 5)
    monkeypatch.setattr(dsac_e.Agent, "update", recorded)
    train("OneStep", tmp_path, total_timesteps=240, batch_size=16)
    log = scalars(tmp_path)
    assert list(log["losses/pim"]) == list(range(40, 240, 20))
    for step in log["losses/pim"]:
        values = logs[step // 2 - 20]  # of the iteration that begins at this step
        for tag in ("critic/q", "critic/sigma", "critic/td_error", "entropy/qe", "entropy/policy"):
            array = values[tag].double().numpy()
            assert log[f"{tag}_mean"][step] == pytest.approx(array.mean(), rel=1e-5)
            assert log[f"{tag}_std"][step] == pytest.approx(array.std(), rel=1e-4)
        for tag in ("losses/pis", "losses/pim", "losses/tup", "losses/alpha", "entropy/budget"):
            assert log[tag][step] == pytest.approx(float(values[tag]))
        last = step // 2  # the last episode of both environments; the return of episode i is 100 i + 1
        episodes = range(max(0, last - 49), last + 1)
        assert log["charts/episodic_return"][step] == pytest.approx(100 * sum(episodes) / len(episodes) + 1)
        assert log["charts/episodic_length"][step] == 1


def test_sps_counts_steps_per_second_without_evaluations_and_warm_up(tmp_path, monkeypatch):
    """With a clock that only the environments advance: 0.4 s per step of an evaluation, 2 ms per step of training,
    20 ms from step 62 on.
    """
    clock = [0.0]

    def slow(self):
        training = 0.0 if self.episode < 20 else 0.002 if self.episode <= 30 else 0.02
        clock[0] += 0.4 if self.copy >= 2 else training
        return 0.0

    monkeypatch.setattr(dsac_e, "LOG_INTERVAL", 5)
    monkeypatch.setattr(RecordingEnv, "reward", slow)
    monkeypatch.setattr(dsac_e.time, "perf_counter", lambda: clock[0])
    train("OneStep", tmp_path, eval_interval=25)
    assert scalars(tmp_path)["charts/SPS"] == pytest.approx({40: 500, 60: 500, 80: 50}, rel=1e-5)
