#!/usr/bin/env bash
# Gets the colour emoji font and libfribidi for the emoji data, as root by apt; otherwise says how to get them. Never fails: the demo
# draws shapes instead where there is no font.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${VENV:-.venv}/bin/python"
missing() { "$python" -c 'from vlm_jax.data.worlds.emoji_font import emoji_ready; print(emoji_ready() or "")'; }

why="$(missing)"
[ -n "$why" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "install_font: installing fonts-noto-color-emoji and libfribidi0" >&2
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy fonts-noto-color-emoji libfribidi0; } >/dev/null || true
  why="$(missing)"
  [ -n "$why" ] || exit 0
fi
echo "install_font: $why" >&2
echo "install_font: on Debian or Ubuntu run as root: apt-get install fonts-noto-color-emoji libfribidi0" >&2
