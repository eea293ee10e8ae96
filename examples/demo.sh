#!/usr/bin/env bash
# Wraps a server with zddsup and puts five new versions in its place while requests run against it. None fails.
#
#     examples/demo.sh [SECONDS]
#
# The server is examples/python/server.py where there is a python3; without one, and with ZDDSUP_DEMO_SERVER=rust, it is
# examples/axum_hello.rs. ZDDSUP_DEMO_BIN=DIR takes the programs from there (a target/debug, say) and builds nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-12}
[[ $seconds =~ ^[1-9][0-9]{0,4}$ ]] || { echo "usage: examples/demo.sh [SECONDS]" >&2; exit 2; }

bold= plain=
[[ ! -t 1 ]] || bold=$'\033[1m' plain=$'\033[0m'
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

if [[ ! ${ZDDSUP_DEMO_BIN:-} ]]; then
  say "Building zddsup (once; some minutes)"
  cargo build --release --locked --bin zddsup --example axum_hello --example load
  target=$(cargo metadata --locked --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
  ZDDSUP_DEMO_BIN=$target/release
fi
zddsup=$ZDDSUP_DEMO_BIN/zddsup
load=$ZDDSUP_DEMO_BIN/examples/load

if [[ ${ZDDSUP_DEMO_SERVER:-} != rust ]] && python3 -c 'import http.server' 2>/dev/null; then
  server=(python3 examples/python/server.py)
else
  server=("$ZDDSUP_DEMO_BIN/examples/axum_hello")
fi

# Everything that runs and everything that is written ends with this script, however that ends.
run=$(mktemp -d)
export XDG_RUNTIME_DIR=$run
supervisor=
loads=()
finish() {
  kill ${loads[@]+"${loads[@]}"} 2>/dev/null || true
  if [[ $supervisor ]]; then
    "$zddsup" stop --name demo --quick >/dev/null 2>&1 || kill "$supervisor" 2>/dev/null || true
  fi
  wait
  rm -rf "$run"
}
trap finish EXIT

deploy() { echo "VERSION=$1" >"$run/env.new" && mv "$run/env.new" "$run/env"; }

deploy 1
say "$ zddsup run --name demo --listen http=127.0.0.1:0 --ready notify --env-file env -- ${server[*]##*/}"
"$zddsup" run --name demo --listen http=127.0.0.1:0 --ready notify --env-file "$run/env" -- "${server[@]}" 2>"$run/log" &
supervisor=$!
until "$zddsup" status --name demo --ready >/dev/null 2>&1; do
  kill -0 "$supervisor" 2>/dev/null || { cat "$run/log" >&2; exit 1; }
  sleep 0.05
done
address=$("$zddsup" status --name demo --json | sed -n 's/.*"address": *"tcp:\/\/\([^"?]*\).*/\1/p' | head -n 1)
echo "version 1 serves http://$address/"

say "Requests for $seconds seconds: by clients that connect for each (shown now), and by some that stay connected"
"$load" --url "http://$address/" --seconds "$seconds" &
loads+=($!)
"$load" --url "http://$address/" --seconds "$seconds" --keep-alive >"$run/kept" &
loads+=($!)

pause=$((seconds * 1000 / 7))
for version in 2 3 4 5 6; do
  sleep "$((pause / 1000)).$(printf %03d $((pause % 1000)))"
  say "$ zddsup upgrade --name demo        # to version $version"
  deploy "$version"
  "$zddsup" upgrade --name demo 2>"$run/upgrade" || { cat "$run/upgrade" "$run/log" >&2; exit 1; }
done

result=0
for pid in "${loads[@]}"; do
  wait "$pid" || result=1
done
loads=()
say "Clients that stayed connected until a version asked them to connect anew"
sed -n '/ requests on /,$p' "$run/kept"
say "$ zddsup status --name demo"
"$zddsup" status --name demo
if ((result == 0)); then
  say "Five upgrades, no failed request."
else
  say "Requests failed: that must not be."
fi
exit "$result"
