# Sourced by the scripts beside it: finds Python, makes or reuses a virtual environment, installs the package.
# Uses nothing but bash, coreutils and Python >= 3.10. PYTHON=... chooses another interpreter.

repo="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

# find_python: sets `python` to an interpreter that is new enough and can make virtual environments.
find_python() {
    python=""
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python="$candidate"
            break
        fi
        if [ -n "${PYTHON:-}" ]; then
            fail "PYTHON=$PYTHON is not a Python of version 3.10 or newer"
        fi
    done
    [ -n "$python" ] || fail "no Python 3.10 or newer was found; install one, or name it: PYTHON=/path/to/python3 $0"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"
}

# use_venv FOLDER REQUIREMENT...: after it, FOLDER/bin holds the requirement (such as /repo[test], or -e /repo).
# An existing environment is reused; the package itself is installed anew, since its sources may have changed.
use_venv() {
    local venv="$1" free
    shift
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        fail "$venv exists and is not a virtual environment; move it away"
    fi
    free="$(df -Pk "$(dirname -- "$venv")" | awk 'NR == 2 { print int($4 / 1048576) }')"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # new, interrupted, or its Python is gone
        find_python
        echo "making the virtual environment $venv (the first installation downloads several GB)"
        if [ "${free:-99}" -lt 12 ]; then
            echo "warning: only $free GiB are free on this disk; PyTorch with CUDA takes about 6 installed" >&2
        fi
        "$python" -m venv --clear "$venv" || fail "the virtual environment $venv cannot be made" 70
    fi
    rm -rf -- "$repo/build/lib" # setuptools would ship modules that no longer exist
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; then
        # pip gives back what it had written, so what is free now would no longer tell.
        if [ "${free:-99}" -lt 7 ]; then
            echo "only $free GiB were free where $venv lies; PyTorch with CUDA takes about 6 installed" >&2
        fi
        fail "the installation failed; the lines above say why, and the same command tries again" 70
    fi
}

# explain CODE: what the exit code of `distunlearn run` means, for codes that are a legitimate end.
explain() {
    case "$1" in
    0) echo "exit code 0: every gate passed" ;;
    6) echo "exit code 6: an evidence gate failed; the report says which" ;;
    7) echo "exit code 7: finished, the evidence is inconclusive (no gate failed; the data cannot settle every one)" ;;
    75) echo "exit code 75: stopped; the same command goes on from the last checkpoint" ;;
    *) echo "exit code $1: the run did not finish; the lines above say why" ;;
    esac
}

# run_recipe RECIPE ARGUMENTS...: `distunlearn run` into runs/RECIPE of the repository unless --out is given.
run_recipe() {
    local recipe="$1" argument out="" code=0
    shift
    for argument in "$@"; do
        case "$argument" in --out | --out=*) out=given ;; esac
    done
    if [ -z "$out" ]; then
        set -- --out "$repo/runs/$recipe" "$@"
    fi
    "$repo/.venv/bin/distunlearn" run "$recipe" "$@" || code=$?
    explain "$code"
    return "$code"
}

# All cores for one process, unless the caller or a scheduler has decided otherwise.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
export MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false
