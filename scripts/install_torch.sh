#!/usr/bin/env bash
# Install torch into the environment of the Python given as $1, as the build that fits this machine:
# the one from PyPI on macOS and beside an NVIDIA GPU, else a CPU build. The default build for Linux brings several
# gigabytes of CUDA libraries, which a machine without a GPU must never get unasked.
set -euo pipefail
python=$1
cpu_index=https://download.pytorch.org/whl/cpu

if "$python" -c 'from importlib.metadata import version; print("torch", version("torch"), "is there")' 2>/dev/null; then
    exit 0
fi

if [[ $(uname -s) != Linux ]] || nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    "$python" -m pip install --quiet torch
    exit 0
fi

# A folder of wheels named in pip's own configuration (find-links) comes first: it is local, and may be all there is.
# Dependencies are left to the installation of virtualcell, since such a folder rarely holds them.
echo "No NVIDIA GPU here: installing the CPU build of torch."
if "$python" -m pip install --quiet --no-index --no-deps torch 2>/dev/null; then
    exit 0
fi
if "$python" -m pip install --quiet --no-deps --retries 1 --timeout 30 --index-url "$cpu_index" torch; then
    exit 0
fi
cat >&2 <<MESSAGE

The CPU build of torch could not be installed for $("$python" --version): no local wheel, and $cpu_index
did not answer or has none. Install a build of your choice yourself and repeat the command:
    $python -m pip install <wheel or package>
MESSAGE
exit 1
