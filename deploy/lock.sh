#!/bin/sh
# Write the packages of the images into deploy/requirements-*.txt, with the hashes of their files: `make lock`.
#
# Versions come from constraints.txt; what it does not name stays as it was written here last. Needs PyPI. UV names the
# program: https://docs.astral.sh/uv
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

front="pyproject.toml --extra server --extra otel"
# Who builds extensions needs setuptools; torch asks for it everywhere. An image has nothing that installs packages.
left_out="--no-emit-package setuptools"

# shellcheck disable=SC2046,SC2086 # lists of words
{
    compile api $front
    # What a worker of either kind has beside a front end, and then what runs the model.
    echo safetensors | compile worker $front --extra images - $(without deploy/requirements-api.txt)
    others="$(without deploy/requirements-api.txt deploy/requirements-worker.txt)"
    compile runtime-cpu $front --extra cpu $others
    # Triton compiles its way to the driver on the host that runs it, for which it needs a C compiler.
    echo ziglang | compile runtime-cu130 $front --extra torch $left_out $others -
}
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml | compile build -
