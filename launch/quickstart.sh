#!/usr/bin/env bash
# The main job on the embedded digits: train, forget, audit, report. Everything it needs goes into .venv.
#
#   launch/quickstart.sh [further arguments of `distunlearn run`, such as --set seed=1 --out DIR]
#
# Ends with the exit code of the run; 7 (inconclusive) is a legitimate end.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

use_venv "$repo/.venv" -e "$repo"
run_recipe digits "$@"
