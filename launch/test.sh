#!/usr/bin/env bash
# All tests, on the installed package. Everything they need goes into .venv-test.
#
#   launch/test.sh [arguments of pytest, such as -k audit or -m "not slow"]
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

use_venv "$repo/.venv-test" "${repo}[test]"
cd -- "$repo"
# Tests start processes of their own: one thread each. Nothing may be fetched from the network.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec .venv-test/bin/pytest -rs "$@"
