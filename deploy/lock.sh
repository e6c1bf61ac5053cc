#!/bin/sh
# Write the packages of the images into deploy/requirements-*.txt, with the hashes of their files: `make lock`.
#
# Versions come from constraints.txt; what it does not name stays as it was written here last. Needs PyPI, and for the CPU
# variant's torch the index of PyTorch (TORCH_CPU_INDEX). UV names the program: https://docs.astral.sh/uv
set -eu
cd "$(dirname "$0")/.."

compile() { # compile OUTPUT WORDS...: the packages that WORDS ask for, on the platform of the images
    output="deploy/requirements-$1.txt"
    shift
    "${UV:-uv}" pip compile --quiet --no-config --generate-hashes --no-annotate --custom-compile-command "make lock" \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --constraints constraints.txt \
        --output-file "$output" "$@" >/dev/null
}

without() { # without FILE...: words that leave out what these have
    sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' "$@"
}

worker="pyproject.toml --extra server --extra otel --extra torch"
# Who builds extensions needs setuptools; torch asks for it everywhere. An image has nothing that installs packages.
left_out="--no-emit-package setuptools"

# shellcheck disable=SC2046,SC2086 # lists of words
{
    compile api pyproject.toml --extra server --extra otel
    compile torch-cu130 $worker $left_out $(without deploy/requirements-api.txt)
    # What torch's CUDA build brings, and the CPU variant does not have, is called so.
    for_gpus="$(without deploy/requirements-torch-cu130.txt | grep -E ' (torch|triton|cuda-.*|nvidia-.*)$')"
    compile worker $worker $left_out $(without deploy/requirements-api.txt) $for_gpus
    compile torch-cu130 $worker $left_out $(without deploy/requirements-api.txt deploy/requirements-worker.txt)
}
version="$(sed -n 's/^torch==//p' constraints.txt)"
echo "torch==$version+cpu" |
    compile torch-cpu - --no-deps --default-index "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml | compile build -
