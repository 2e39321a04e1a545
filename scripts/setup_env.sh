#!/usr/bin/env bash
# Makes the virtual environment .venv from the constraints, or leaves it alone if it is there and current. Usage: setup_env.sh [run|test]
#   run    what training and evaluating needs
#   test   also the tests, notebooks and, on Python 3.11, the PyTorch references
# PYTHON=... chooses the interpreter (3.11 or 3.12), VENV=... the folder.
set -euo pipefail
cd "$(dirname "$0")/.."

kind="${1:-run}"
venv="${VENV:-.venv}"
say() { echo "setup_env: $*" >&2; }
fail() { say "$*"; exit 1; }
case "$kind" in run|test) ;; *) fail "unknown argument '$kind'; use run or test." ;; esac

as_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if suitable "$candidate"; then command -v "$candidate"; return; fi
  done
  return 1
}

if ! python="$(find_python)"; then
  [ -z "${PYTHON:-}" ] || fail "$PYTHON is not Python 3.11 or newer; set PYTHON to one that is."
  as_root || fail "Python 3.11 or 3.12 is needed: on Debian or Ubuntu run 'apt-get install python3 python3-venv' as root, then try again."
  say "installing python3"
  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy python3 python3-venv
  python="$(find_python)" || fail "this system's python3 is older than 3.11; install Python 3.11 or 3.12 and set PYTHON."
fi
version="$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')"

constraints="constraints/py$version.txt"
arguments=()
if [ -f "$constraints" ]; then
  arguments=(-c "$constraints")
else
  say "there is no tested set for this Python; installing the newest versions in range (3.11 and 3.12 are tested)"
  constraints=/dev/null
fi

# A stamp says what was installed; it is written last, so that an interrupted installation is taken up again.
stamp="$venv/.installed-$kind"
wanted="$version $(cat setup.py vlm_jax/__init__.py "$constraints" scripts/setup_env.sh | sha256sum | cut -d' ' -f1) $PWD"
for done in "$stamp" "$venv/.installed-test"; do     # test contains run
  if [ -x "$venv/bin/python" ] && [ "$(cat "$done" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
done

if ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
       [ "$("$venv/bin/python" -c 'import sys; print("%d%d" % sys.version_info[:2])')" = "$version" ]; }; then
  if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    as_root || fail "$python cannot make virtual environments: run 'apt-get install python3-venv' as root, then try again."
    say "installing python3-venv"
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy python3-venv
  fi
  say "making $venv with $python"
  "$python" -m venv --clear "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
say "installing packages ($kind); this takes some minutes the first time"
extras=""
if [ "$kind" = test ]; then
  extras="[test]"
  if [ "$version" = 311 ]; then
    # The references are optional: tests that need them skip where they are missing. torch comes first and alone, so that pip does not
    # look for a newer build when it resolves the rest.
    if pip install -q "torch==2.13.0"; then
      extras="[test,parity]"
    else
      say "torch==2.13.0 could not be installed: the tests against PyTorch will be skipped"
    fi
  fi
fi
pip install -q "${arguments[@]}" -e ".$extras"
echo "$wanted" > "$stamp"
say "done: $venv/bin/python"
