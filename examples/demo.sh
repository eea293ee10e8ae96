#!/usr/bin/env bash
# Builds zddsup, wraps a server with it, and puts five new versions in its place while a load runs against it.
#
#     examples/demo.sh [SECONDS]
#
# The server is examples/python/server.py where there is a python3, else the axum example of this crate.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-12}

cargo build --release --locked --bin zddsup --example axum_hello --example load
bin=${CARGO_TARGET_DIR:-target}/release

run=$(mktemp -d)
export XDG_RUNTIME_DIR=$run
trap 'kill %1 2>/dev/null; wait; rm -rf "$run"' EXIT

if python3 -c 'import http.server' 2>/dev/null; then
  server=(python3 examples/python/server.py)
else
  server=("$bin/examples/axum_hello")
fi

echo VERSION=1 >"$run/env"
"$bin/zddsup" run --name demo --listen web=127.0.0.1:0 --ready notify --env-file "$run/env" \
  --drain-timeout 30s -- "${server[@]}" &
until "$bin/zddsup" status --name demo --ready >/dev/null 2>&1; do
  kill -0 %1 || exit 1
  sleep 0.05
done
address=$("$bin/zddsup" status --name demo --json | sed -n 's/.*"address": *"tcp:\/\/\(127[^"?]*\).*/\1/p' | head -n 1)

"$bin/examples/load" --url "http://$address/" --seconds "$seconds" &
load=$!
for version in 2 3 4 5 6; do
  sleep "$(awk "BEGIN { print $seconds / 7 }")"
  echo "VERSION=$version" >"$run/env"
  echo ">>> zddsup upgrade: version $version"
  "$bin/zddsup" upgrade --name demo
done
wait "$load"
"$bin/zddsup" status --name demo
