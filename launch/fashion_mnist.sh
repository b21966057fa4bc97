#!/usr/bin/env bash
# The main job on Fashion-MNIST. Everything it needs goes into .venv.
#
#   launch/fashion_mnist.sh [FOLDER] [further arguments of `distunlearn run`]
#
# FOLDER holds the four IDX files, or what torchvision's FashionMNIST downloads. Without it, Debian's package
# dataset-fashion-mnist is used, and installed if this runs as root.
set -euo pipefail

. "$(dirname -- "${BASH_SOURCE[0]}")/_venv.sh"

packaged=/usr/share/datasets/fashion-mnist
root=""
case "${1:-}" in
"" | -*) ;;
*)
    root="$1"
    shift
    [ -d "$root" ] || fail "$root is not a folder" 3
    root="$(cd -- "$root" && pwd -P)"
    ;;
esac

if [ -z "$root" ] && [ ! -d "$packaged" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing the Debian package dataset-fashion-mnist"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq dataset-fashion-mnist; } >/dev/null ||
            fail "dataset-fashion-mnist could not be installed; give the folder of the IDX files: $0 FOLDER" 3
    else
        fail "there is no $packaged; apt-get install dataset-fashion-mnist, or give a folder: $0 FOLDER" 3
    fi
fi

use_venv "$repo/.venv" -e "$repo"
if [ -n "$root" ]; then
    set -- --set "data.root=$root" "$@"
fi
run_recipe fashion_mnist "$@"
