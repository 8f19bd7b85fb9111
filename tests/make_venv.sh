#!/bin/sh
# make_venv.sh PYTHON DIR - makes a virtual environment. Debian and Ubuntu keep a part of Python's venv in a package of
# its own; as root it is installed on the way, otherwise the one command to type is printed.
set -u
python=$1 dir=$2
"$python" -m venv "$dir" >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
    rm -rf "$dir"
    "$python" -m venv "$dir" && exit 0
fi
echo "make test: $python -m venv does not work here; on Debian or Ubuntu: sudo apt install python3-venv" >&2
exit 1
