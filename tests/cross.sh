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
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
zig=$PWD/build/zig/ziglang/zig
export ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$work/cache} ZIG_LOCAL_CACHE_DIR=$work/cache WINEPREFIX=$work/wine WINEDEBUG=-all
strict="-std=c99 -O2 -ffp-contract=off -Wall -Wextra -Wconversion -Wshadow -pedantic -Werror"

# Targets, and what runs their programs: "-" links without running, "" only compiles, since building a C library takes a minute.
# reproduce.sh runs more processors, with gcc's compilers.
targets='x86_64-macos -
aarch64-macos -
x86_64-windows-gnu wine
x86-windows-gnu -
aarch64-windows-gnu -
x86_64-freebsd -
aarch64-freebsd -
x86_64-netbsd -
aarch64-netbsd -
x86_64-openbsd -
aarch64-openbsd -
x86_64-linux-musl
x86-linux-musl
aarch64-linux-musl
arm-linux-musleabihf
riscv64-linux-musl
s390x-linux-musl
mips-linux-musleabihf
mips64el-linux-muslabi64
powerpc-linux-musleabihf
riscv32-linux-musl qemu-riscv32
powerpc64-linux-musl qemu-ppc64
powerpc64le-linux-musl qemu-ppc64le
loongarch64-linux-musl qemu-loongarch64'

# values PROGRAM...: what a short text computes, and the past after it.
values() {
    "$@" models/stories260K-q8.bin -i "Once upon a time" -s 1 -n 30 -v --save "$work/past" 2>&1 >"$work/text" |
        grep -o '^logits #[0-9a-f]*'
    cksum <"$work/text"
    cksum <"$work/past"
}
# A program for Windows writes CR LF nowhere, and takes the same paths; wine is not in every PATH.
wine() { "$(command -v wine64 || echo /usr/lib/wine/wine64)" "$@"; }

# try TARGET RUNNER
try() {
    local out=(-c) source
    for source in run.c based.c tokenizer.c; do
        "$zig" cc -target "$1" $strict -c "$source" -o "$work/${source%.c}.o" || return
    done
    [ -n "$2" ] || { echo compiled; return; }
    "$zig" cc -target "$1" -o "$work/program.exe" "$work"/{run,based,tokenizer}.o -lm || return
    [ "$2" != - ] || { echo linked; return; }
    values $2 "$work/program.exe" | diff "$work/want" - && echo "same bits"
}

make -s run && values ./run >"$work/want" || exit 1
while read -r target runner; do
    [ $# = 0 ] || [[ " $* " = *" $target "* ]] || continue
    if result=$(try "$target" "$runner" 2>&1 </dev/null); then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-32s %s\n' "$target" "$result"
done <<<"$targets"
echo "$passed passed, $failed failed"
[ $failed = 0 ]
