#!/usr/bin/env bash
# All that only a GPU can tell, in at most 10 minutes: the engine's tests on it, then bench/gpu.py.
#
# It needs a source tree and a Python with torch 2.11 or newer, transformers 5.17 or newer and pytest; nothing is
# installed, and no registry is asked. Where beartype, jaxtyping or msgspec is missing: unpack their wheels into a
# folder, and name it in PYTHONPATH. Results are in bench/results/gpu-CARD.json; with OUT set, copies are there, and
# the tests' log.
#
#   bench/gpu.sh [SECONDS]      PYTHON=python3 by default
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${1:-600}
python=${PYTHON:-python3}
log=${OUT:-$(mktemp -d)}/gpu-tests.log
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1

"$python" - <<'CHECK' || exit 2
import importlib.util, sys

missing = [name for name in ("torch", "transformers", "pytest", "beartype", "jaxtyping", "msgspec")
           if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} has no {', '.join(missing)}: name another Python (PYTHON=...), or put them in PYTHONPATH")
import torch, transformers

for module, least in ((torch, (2, 11)), (transformers, (5, 17))):
    if tuple(map(int, module.__version__.split(".")[:2])) < least:
        sys.exit(f"{module.__name__} {module.__version__} is too old: {'.'.join(map(str, least))} or newer is needed")
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device; bench/gpu.py --cpu --quick runs the benchmark's code on the processor")
CHECK

workers=$("$python" -c 'import importlib.util; print("-n 8 --dist worksteal" if importlib.util.find_spec("xdist") else "")')
# shellcheck disable=SC2086  # several words
timeout --signal=INT $((limit / 2)) "$python" -m pytest -q --device cuda $workers -p no:cacheprovider --tb=short \
  -m "not real and not subprocess" tests/test_cuda.py tests/freeze tests/network tests/maps tests/spectral \
  tests/analyses tests/steering tests/results tests/common tests/test_*.py 2>&1 | tee "$log" | tail -n 60
tests=${PIPESTATUS[0]}

"$python" bench/gpu.py --seconds $((limit - SECONDS - 60)) ||
  exit 1
[ -z "${OUT:-}" ] || cp bench/results/gpu-*.json "$OUT"
echo "tests: exit code $tests, log $log; $SECONDS s in all"
exit "$tests"
