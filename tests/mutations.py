"""Proves the proofs: makes one small mistake at a time in a copy of the project, and sees whether the tests notice.

    python tests/mutations.py            every mutation
    python tests/mutations.py spread     those whose line or file contains the word

Each mutation replaces one token or two in one file, or in the harness of all four scripts. One that no test notices is printed
as a survivor, and the exit code is 1. Not part of the test suite: it takes ten minutes or more on one core.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILY = ("dsac_e", "dsac_t", "sac", "td3")

# (scripts, the text as it is, the text with the mistake); `old` must occur exactly once in each script.
E, T, S, D = ("dsac_e",), ("dsac_t",), ("sac",), ("td3",)
P, B = ("plot",), ("benchmark.sh",)
MUTATIONS = [
    # PEV of DSAC-E
    (E, "y_q = batch.reward + discount * next_q", "y_q = batch.reward - discount * next_q"),
    (E, "discount = gamma * (1 - batch.terminated)", "discount = gamma * (1 + batch.terminated)"),
    (E, "discount = gamma * (1 - batch.terminated)", "discount = 1 - batch.terminated"),
    (E, "next_q.argmin(0", "next_q.argmax(0"),
    (E, "next_sigma.gather(0, smaller)", "next_sigma[:1]"),
    (E, "noise.clamp(-3, 3)", "noise"),
    (E, "bound = 3 * spread", "bound = 2 * spread"),
    (E, "y_z.clamp(q - bound, q + bound)", "y_z.clamp(-bound, bound)"),
    (E, "eps = 0.1", "eps = 0.0"),
    (E, "weight = spread.square()", "weight = spread"),
    (E, "q_gradient = -weight", "q_gradient = weight"),
    (E, "((y_z - q) ** 2 - sigma**2)", "((y_z - q) ** 2 + sigma**2)"),
    (E, "((y_z - q) ** 2 - sigma**2)", "((y_q - q) ** 2 - sigma**2)"),
    (E, "(sigma**3 + eps)", "(sigma**2 + eps)"),
    (E, "spread.lerp(sigma.mean(1), tau)", "spread.lerp(sigma.mean(1), 1 - tau)"),
    (E, "torch.where(spread > 0", "torch.where(spread >= 0"),
    (E, "next_q, next_sigma = target_critics(", "next_q, next_sigma = critics("),
    # PIS
    (E, "(-next_log_prob + next_qe)", "(next_log_prob + next_qe)"),
    (E, "(-next_log_prob + next_qe)", "-next_log_prob"),
    (E, "y_e = gamma * (1 - batch.terminated)", "y_e = gamma"),
    (E, "y_e = gamma * (1 - batch.terminated)", "y_e = (1 - batch.terminated)"),
    (E, "next_qe = target_entropy_critic(batch.next_obs, next_action)", "next_qe = target_entropy_critic(batch.obs, next_action)"),
    (E, "next_qe = target_entropy_critic(", "next_qe = entropy_critic("),
    # PIM and TUP
    (E, "torch.minimum(q[0], q[1])", "torch.maximum(q[0], q[1])"),
    (E, "entropy = -log_prob", "entropy = log_prob"),
    (E, "+ alpha.detach() * (trajectory_entropy", "- alpha.detach() * (trajectory_entropy"),
    (E, "(trajectory_entropy if res else entropy)", "trajectory_entropy"),
    (E, "weight.detach() for name, weight in net", "weight for name, weight in net"),
    (E, "entropy.detach().mean() - budget", "entropy.detach().mean() + budget"),
    (E, "return log_alpha.exp() * (entropy", "return -log_alpha.exp() * (entropy"),
    (E, "entropy.detach().mean() - budget", "entropy.mean() - budget"),
    # The order of DSAC-E
    (E, "/ (1 - args.gamma if args.tec else 1)", "/ (1 - args.gamma)"),
    (E, "/ (1 - args.gamma if args.tec else 1)", "* 1"),
    (E, "self.target_policy(batch.next_obs", "self.policy(batch.next_obs"),
    (E, "grad(pev_loss + pis_loss, self.critic_weights)", "grad(pev_loss + 0 * pis_loss, self.critic_weights)"),
    (E, "self.log_alpha.clamp_(-15, 15)", "self.log_alpha.clamp_(-200, 15)"),
    (E, "self.log_alpha.clamp_(-15, 15)", "self.log_alpha.clamp_(-15, 200)"),
    (E, "_foreach_lerp_(self.targets, self.online, self", "_foreach_lerp_(self.online, self.targets, self"),
    (E, "        weight.grad = gradient\n", "        weight.grad = -gradient\n"),
    (E, "trajectory_entropy if self.args.tec else entropy", "trajectory_entropy"),
    (E, "* alpha * next_log_prob)", "* next_log_prob)"),
    (E, "20.0 if re.search", "2.0 if re.search"),
    (E, "        if not delayed:", "        if delayed:"),
    (E, "self.spread.copy_(spread)", "self.spread.copy_(self.spread)"),
    (E, "args.critic_lr, fused", "args.policy_lr * 2, fused"),
    # The policy
    (E, "+ self.half_range.log()", "- self.half_range.log()"),
    (E, "+ self.half_range.log()", ""),
    (E, "F.softplus(-2 * u)", "F.softplus(2 * u)"),
    (E, "-noise.square() / 2 - log_std", "-noise.square() / 2 + log_std"),
    (E, "log_std.clamp(-20, 0.5)", "log_std.clamp(-20, 2)"),
    (E, "torch.tensor((high + low) / 2", "torch.tensor((high + low)"),
    (E, "self.center + self.half_range * u.tanh()", "self.half_range * u.tanh()"),
    (E, "draw = torch.zeros if deterministic", "draw = torch.randn if deterministic"),
    # The siblings
    (T, "next_q = next_q - alpha * next_log_prob", "next_q = next_q + alpha * next_log_prob"),
    (T, "next_q.argmin(0", "next_q.argmax(0"),
    (T, "entropy = -log_prob", "entropy = log_prob"),
    (T, "budget = -float(action_dim)", "budget = float(action_dim)"),
    (T, "self.target_policy(batch.next_obs", "self.policy(batch.next_obs"),
    (S, "- alpha * next_log_prob", "+ alpha * next_log_prob"),
    (S, "torch.minimum(next_q[0], next_q[1])", "torch.maximum(next_q[0], next_q[1])"),
    (S, "F.mse_loss(q[0], y_q) + F.mse_loss(q[1], y_q)", "F.mse_loss(q[0], y_q) + F.mse_loss(q[0], y_q)"),
    (S, "next_q = target_critics(", "next_q = critics("),
    (S, "gamma * (1 - batch.terminated)", "gamma * batch.terminated"),
    (D, ".clamp(-clip, clip)", ""),
    (D, "(action + self.half_range * noise).clamp(low, high)", "action + self.half_range * noise"),
    (D, "self.half_range * noise", "noise"),
    (D, "self.target_policy(batch.next_obs)", "self.policy(batch.next_obs)"),
    (D, "return -q[0].mean()", "return -q[1].mean()"),
    (D, "return -q[0].mean()", "return q[0].mean()"),
    (D, "torch.minimum(next_q[0], next_q[1])", "next_q[0]"),
    (D, "action if deterministic else", "action if not deterministic else"),
    # The harness
    (FAMILY, "final_obs[done] = np.stack(infos[\"final_obs\"][done])", "pass"),
    (FAMILY, "buffer.add(obs, action, final_obs, reward, terminated)", "buffer.add(obs, action, final_obs, reward, terminated | truncated)"),
    (FAMILY, "AutoresetMode.SAME_STEP", "AutoresetMode.NEXT_STEP"),
    (FAMILY, "updates % args.policy_delay == 0", "updates % args.policy_delay == 1"),
    (FAMILY, "self.widths = (obs_dim, action_dim, obs_dim, 1, 1)", "self.widths = (obs_dim, obs_dim, action_dim, 1, 1)"),
    (FAMILY, "self.filled.fill_(min(self.added, len(self.rows)))", "self.filled.fill_(len(self.rows))"),
    (FAMILY, "self.filled.fill_(min(self.added, len(self.rows)))", "self.filled.fill_(self.added)"),
    (FAMILY, "% len(self.rows)", "% (len(self.rows) - 1)"),
    (FAMILY, "return Batch(obs, action, reward.squeeze(1), next_obs,", "return Batch(next_obs, action, reward.squeeze(1), obs,"),
    (FAMILY, "updating = step >= max(args.learning_starts, 1)", "updating = step > max(args.learning_starts, 1)"),
    (FAMILY, "spawn_key=(step,)", "spawn_key=()"),
    (FAMILY, "            obs = next_obs\n", "            obs = final_obs\n"),
    (FAMILY, "action.astype(space.dtype).clip(space.low, space.high)", "action.astype(space.dtype)"),
    (FAMILY, "        running &= ~(terminated | truncated)", "        running &= ~terminated"),
    # Survival
    (FAMILY, 'agent.load_state_dict(saved["agent"])', 'agent.load_state_dict(saved["agent"] | {k: v for k, v in agent.state_dict().items() if "target" in k})'),
    (FAMILY, "        optimizer.load_state_dict(state)\n", "        pass\n"),
    (FAMILY, '    torch.set_rng_state(saved["rng"])\n', ""),
    (FAMILY, "if file[1] > oldest]", "if file[0] >= oldest]"),
    (FAMILY, "first = max(oldest, self.files[-1][1] if self.files else 0)", "first = oldest"),
    (FAMILY, "        os.replace(aside, path)\n", "        path.write_bytes(aside.read_bytes())\n"),
    (FAMILY, "        if path.name not in needed:", "        if path.name in needed:"),
    (FAMILY, "        if path.name not in needed:", "        if False:"),
    (FAMILY, "weights_only=True)\n        if saved", "weights_only=False)\n        if saved"),
    (FAMILY, 'map_location="cpu", weights_only=True))\n', 'map_location="cpu", weights_only=False))\n'),
    (FAMILY, "purge_step=step + 1 if saved else None", "purge_step=None"),
    (FAMILY, "purge_step=step + 1 if saved else None", "purge_step=step if saved else None"),
    (FAMILY, 'spawn_key=(counters["step"], 1)', 'spawn_key=(1,)'),
    (FAMILY, "if evaluating or saving:", "if evaluating:"),
    (FAMILY, "        aside.unlink(missing_ok=True)\n", ""),
    (FAMILY, 'agent.policy_gradients = torch.compile(agent.policy_gradients', 'agent.policy_gradients = torch.compile(agent.critic_gradients'),
    (FAMILY, "    threading.Thread(target=watch, daemon=True).start()\n", ""),
    (FAMILY, "caught.setdefault(signum, time.monotonic()) > 2:", "caught.setdefault(signum, time.monotonic()) > 0.01:"),
    (FAMILY, "caught.setdefault(signum, time.monotonic()) > 2:", "caught.setdefault(signum, time.monotonic()) > 99:"),
    # Video
    (FAMILY, "lambda episode: episode == 0", "lambda episode: True"),
    (FAMILY, "lambda episode: episode == 0", "lambda episode: episode == 1"),
    (FAMILY, "        envs.close()  # writes", "        pass  # writes"),
    (FAMILY, "        imageio_ffmpeg.get_ffmpeg_version()\n", ""),
    (FAMILY, 'imageio_ffmpeg.count_frames_and_secs(f"{video}-episode-0.mp4")', "pass"),
    (FAMILY, 'os.environ.setdefault("MUJOCO_GL", "egl")', "pass"),
    # plot.py
    (P, 'size_guidance={"scalars": 0}', 'size_guidance={"scalars": 1000}'),
    (P, "1 if tag == RETURN else", ""),
    (P, "event.step, float", "event.step + 1, float"),
    (P, "(settings.env_id == own[\"env_id\"]) & ", ""),
    (P, "name not in SHARED and ", ""),
    (P, 'keep="last"', 'keep="first"'),
    (P, "first, last = max(run.step.min() for run in runs), min(", "first, last = min(run.step.min() for run in runs), max("),
    (P, "for run in runs), key=len)", "for run in runs), key=lambda steps: -len(steps))"),
    (P, 'method="percentile"', 'method="basic"'),
    (P, "n_resamples=2000", "n_resamples=2000, confidence_level=0.5"),
    (P, "steps >= 0.9 * steps[-1]", "steps >= 0.5 * steps[-1]"),
    (P, "proportiontocut=0.25", "proportiontocut=0.0"),
    (P, 'mine.tag == "entropy/budget"', 'mine.tag == "entropy/trajectory_mean"'),
    (P, '~bound.line.str.contains("tec False")', "bound.value < 0"),
    (P, "if budget > low - 5 * (high - low):", "if True:"),
    (P, 'metadata={"Date": None}', "metadata={}"),
    # benchmark.sh
    (B, "finished \"${words[2]}\" \"$STEPS\" || todo", "false || todo"),
    (B, "-ge $2 ]]", "-ge 0 ]]"),
    (B, "    if [[ -f $dir/checkpoint.pt ]]; then", "    if false; then"),
    (B, 'rm -f "$dir"/{', ': "$dir"/{'),
    (B, ",replay-*,*.tmp}", ",replay-*}"),
    (B, "flock -n 9 ||", "true ||"),
    (B, "while kill -0 $pid 2>/dev/null; do wait", "for _ in 1; do wait"),
    (B, '    elif [[ -f $dir/finished ]]; then', "    elif false; then"),
    (B, "made =~ ^[0-9]+$ && $made", "made"),
    (B, "cores=$(env -u OMP_NUM_THREADS nproc)", "cores=$(nproc)"),
    (B, '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"', '"$SLURM_JOB_ID"'),
    (B, "signalled=1; requeue=1;", "signalled=1;"),
    (B, "wait \"$pid\" || failed=1", "wait \"$pid\" || true"),
    (B, "|| $last == *\"has made its\"*", ""),
    (B, "${BASH_REMATCH[2]//-no-/ --no-}", "${BASH_REMATCH[2]//-no-tec/ --no-tec}"),
]  # fmt: skip

# The quick files first: a mutant dies at the first failure. Without test_family.py, which would notice any change to a
# part that the scripts share, and prove nothing about it.
TESTS = ["test_update", "test_separation", "test_distribution", "test_temperature", "test_entropy", "test_contraction",
         "test_harness", "test_video", "test_survival", "test_compile"]  # fmt: skip


def survives(scripts, old, new) -> bool:
    """Whether the whole suite passes with this mistake made."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "README.md", ROOT / "benchmark.sh"]:
            shutil.copy(path, copy)
        for script in scripts:
            path = copy / (script if script.endswith(".sh") else f"{script}.py")
            source = path.read_text()
            assert source.count(old) == 1, f"{path.name} has {source.count(old)} times: {old}"
            path.write_text(source.replace(old, new))
        if scripts in (P, B):
            order = ["test_plot" if scripts == P else "test_benchmark"]
        else:
            first = "test_video" if "video" in old + new or "ffmpeg" in old or "episode == 0" in old else "test_harness"
            order = TESTS if len(scripts) == 1 else sorted(TESTS, key=first.__ne__)
        files = [f"tests/{name}.py" for name in order]
        return (
            subprocess.run([sys.executable, "-m", "pytest", "-qx", *files], cwd=copy, capture_output=True).returncode
            == 0
        )


def main():
    chosen = [mutation for mutation in MUTATIONS if any(word in str(mutation) for word in sys.argv[1:] or [""])]
    survivors = 0
    for scripts, old, new in chosen:
        alive = survives(scripts, old, new)
        survivors += alive
        where = scripts[0] if len(scripts) == 1 else "harness"
        print(f"{'SURVIVED' if alive else 'killed  '}  {where}:  {old.strip()}  ->  {new.strip()}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations killed")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
