#!/usr/bin/env bash
# Installs the project on a node of a cluster, in ~/venv, with the tested versions. Running it again changes nothing.
# Called by cluster.yaml and deploy/on-prem.yaml; needs Python >= 3.11 with venv, and a C++ compiler for fast inference.
set -euo pipefail

source_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$HOME/venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than 3.11; install a newer one and name it with PYTHON=" >&2
    exit 1
}

# Ubuntu's images come without these two; other systems bring their own.
if ! "$python" -c 'import ensurepip' 2> /dev/null || ! command -v g++ > /dev/null; then
    if command -v apt-get > /dev/null; then
        sudo apt-get update -qq
        sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv g++
    else
        echo "install Python's venv module and g++ on this machine, then start again" >&2
        exit 1
    fi
fi

# Without a GPU the CPU build of torch saves several GB; "2.13.0+cpu" satisfies the pin and is preferred to "2.13.0".
index=()
if ! nvidia-smi -L > /dev/null 2>&1; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${index[@]}" \
    -c "$source_dir/constraints.txt" -e "$source_dir"
