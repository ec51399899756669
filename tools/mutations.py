"""Plants mistakes in the scripts, one at a time, and prints those that no test notices.

    python tools/mutations.py tools/mutations.txt

A line of the file is "tests | old | new": `old`, which must occur once in a script, becomes `new` in every
script that contains it, and the tests named (a folder or files in tests/) run in a copy of the repository.
A line break is written as \\n, a bar between spaces as \\|.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("dsac_e.py", "dsac_t.py", "sac.py", "td3.py")


def survives(copy: Path, tests: str, old: str, new: str) -> bool:
    """Whether all tests pass with the mistake."""
    texts = {script: (ROOT / script).read_text() for script in SCRIPTS}
    if not any(old in text for text in texts.values()) or any(text.count(old) > 1 for text in texts.values()):
        sys.exit(f"not found, or found more than once in a script: {old}")
    for script, text in texts.items():
        (copy / script).write_text(text.replace(old, new))
    return passes(copy, tests)


def passes(copy: Path, tests: str) -> bool:
    paths = [f"tests/{path}" for path in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *paths]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True).returncode == 0


def main():
    lines = [line for line in Path(sys.argv[1]).read_text().splitlines() if line and line[0] != "#"]
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".*cache"))
        if not passes(copy, "algorithm run"):
            sys.exit("the tests fail without a mistake")
        for number, line in enumerate(lines, 1):
            tests, old, new = line.replace("\\n", "\n").split(" | ")
            survived = survives(copy, tests, old, new.replace("\\|", "|"))
            survivors += [line] * survived
            result = "SURVIVED" if survived else "noticed"
            print(f"{number} of {len(lines)}: {result}: {old} -> {new}", flush=True)
    print(f"{len(lines) - len(survivors)} of {len(lines)} noticed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
