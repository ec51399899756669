#!/usr/bin/env bash
# Measurements on a machine with a GPU, about ten minutes: tools/gpu.sh OUT
# Splits of an iteration by threads of the environments and of torch, tests on CUDA, then HalfCheetah as a run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
for task in Humanoid-v4 HalfCheetah-v4 Ant-v4; do
    timeout 70 python tools/iteration.py dsac_e.py "$task" 0 4 8 15 >"$out/iteration-$task.txt" 2>&1
done
for threads in 1 2 4 8 16; do # of torch, without the GPU
    OMP_NUM_THREADS=$threads CUDA_VISIBLE_DEVICES="" timeout 25 \
        python tools/iteration.py dsac_e.py Humanoid-v4 0 >"$out/torch-threads-$threads.txt" 2>&1
done
timeout 120 python -m pytest -n 4 tests/algorithm tests/run/test_compile.py tests/run/test_threads.py >"$out/tests.txt" 2>&1
timeout --signal TERM 100 python dsac_e.py --env-id HalfCheetah-v4 --run-dir "$out/run" >"$out/run.txt" 2>&1
rm -f "$out/run/checkpoint.pt"
