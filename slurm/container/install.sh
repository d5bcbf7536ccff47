#!/usr/bin/env bash
# What both recipes run inside of the image, in the folder of the checkout: the same packages as `make setup`.
set -euo pipefail
: "${UV_VERSION:=0.13.8}"

apt-get update -q
# git: versions of checkouts; gcc, g++: torch.compile and Triton build small kernels when they run
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends gcc g++ git libc6-dev
rm -rf /var/lib/apt/lists/*

python -m pip install --no-cache-dir --disable-pip-version-check "uv==$UV_VERSION"
uv pip install --system --no-cache -r constraints.txt
uv pip install --system --no-cache --no-deps --no-build-isolation -e .
python -c 'import launch.submit, pipeline.doctor.__main__'
