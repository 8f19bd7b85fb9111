#!/usr/bin/env bash
# Compiles the program for systems and processors that are not here, with the compiler and the C libraries of zig: without a
# warning. Where an emulator is here, it also runs, with the fingerprint and the saved past of ./run.
#
#     python3 -m pip install --target build/zig ziglang==0.17.1
#     tests/cross.sh [TARGET...]
#
# Ends with `N passed, N failed`.
set -u
cd "$(dirname "$0")/.."
export work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export zig=$PWD/build/zig/ziglang/zig ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$work/cache} ZIG_LOCAL_CACHE_DIR=$work/cache
export WINEPREFIX=$work/wine WINEDEBUG=-all
export strict="-std=c99 -O2 -ffp-contract=off -Wall -Wextra -Wconversion -Wshadow -pedantic -Werror"

# Targets, and how far each goes: to an object file, since building a C library takes a minute; to a program; or to a run by
# an emulator. reproduce.sh runs more processors, with gcc's compilers.
targets="x86_64-macos link
aarch64-macos link
x86_64-windows-gnu wine
x86-windows-gnu link
aarch64-windows-gnu link
x86_64-freebsd link
aarch64-freebsd link
x86_64-netbsd link
aarch64-netbsd link
x86_64-openbsd link
aarch64-openbsd link
x86_64-linux-musl compile
x86-linux-musl compile
aarch64-linux-musl compile
arm-linux-musleabihf compile
riscv64-linux-musl compile
s390x-linux-musl compile
mips-linux-musleabihf compile
mipsel-linux-musleabihf compile
loongarch64-linux-musl compile
powerpc-linux-musleabihf qemu-ppc
riscv32-linux-musl qemu-riscv32
powerpc64-linux-musl qemu-ppc64
powerpc64le-linux-musl qemu-ppc64le"

# values DIRECTORY PROGRAM...: what a short text computes, the text, and the past after it.
values() {
    local at=$1
    shift
    "$@" models/stories260K-q8.bin -i "Once upon a time" -s 1 -n 30 -v --save "$at/past" 2>&1 >"$at/text" |
        grep -o '^logits #[0-9a-f]*'
    cksum <"$at/text"
    cksum <"$at/past"
}
wine() { "$(command -v wine64 || echo /usr/lib/wine/wine64)" "$@"; }      # Debian has it outside of PATH

# try TARGET HOW
try() {
    local at=$work/$1 source
    mkdir "$at"
    for source in run based tokenizer; do
        "$zig" cc -target "$1" $strict -c $source.c -o "$at/$source.o" || return
    done
    [ "$2" != compile ] || { echo compiled; return; }
    "$zig" cc -target "$1" -O2 -o "$at/program.exe" "$at"/{run,based,tokenizer}.o -lm || return
    [ "$2" != link ] || { echo linked; return; }
    values "$at" $2 "$at/program.exe" | diff "$work/want" - && echo "same bits"
}
one() {
    local result status
    result=$(try "$@" 2>&1 </dev/null)
    status=$?
    [ $status = 0 ] || echo "$1" >>"$work/failed"
    printf '%-32s %s\n' "$1" "$result"
    echo "$1" >>"$work/tried"
}
export -f values wine try one

make -s run && values "$work" ./run >"$work/want" || exit 1
: >"$work/failed" >"$work/tried"
while read -r target how; do
    [ $# = 0 ] || [[ " $* " = *" $target "* ]] || continue
    echo "$target $how"
done <<<"$targets" | xargs -P 2 -L 1 bash -c 'one "$@"' one
tried=$(wc -l <"$work/tried") failed=$(wc -l <"$work/failed")
echo "$((tried - failed)) passed, $failed failed"
[ "$tried" -gt 0 ] && [ "$failed" = 0 ]
