#!/usr/bin/env bash
# The same bits everywhere: compares what small models compute on every compiler, instruction set, thread count and machine
# that can be had here with what is written down in tests/reproduce.txt. `make reproduce` runs it.
#
#     tests/reproduce.sh             check, and print a table
#     tests/reproduce.sh --record    compute the known values anew, with plain gcc -O2; look at the difference before you commit
#
# For each model three values are compared: the fingerprint of all logits of a greedy text of 40 tokens after a prompt of 100
# (of 4 after 8 for models above 4 MB, or emulation would take hours); the bytes of the past saved after it; and the fingerprint of its continuation, from the file that the first machine of the table
# saved. So every machine also loads what another one wrote, whatever its byte order.
#
# Other machines are emulated (qemu-user; node for WebAssembly). What is not installed is listed as missing, with the package
# that has it on Debian; with CI set it counts as failed. Ends with `N passed, N failed`.
set -u
cd "$(dirname "$0")/.."
known=tests/reproduce.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 missing=0
sources="run.c based.c tokenizer.c"
flags="-std=gnu11"             # as most projects build, which lets gcc fuse float operations; based.c turns that off
python=${PYTHON:-python3}
prompt=$(for i in $(seq 100); do printf '%d ' $((i * 7 % 47)); done)
short=$(for i in $(seq 8); do printf '%d ' $((i * 7 % 47)); done)
greedy="-t 0 --repeat-penalty 1"            # whatever a checkpoint recommends
export OMP_WAIT_POLICY=passive WORK=$work

# ---- The models: all that ship, and of random weights one of each dtype with every mixer, and the kinds of memory below.
models=$(ls models/*.bin)
for dtype in f32 q8 q4; do
    if "$python" export.py --random tests/data/hazyresearch-tiny/config.json "$work/tiny-$dtype.bin" --dtype $dtype >"$work/log" 2>&1; then
        models="$models $work/tiny-$dtype.bin"
    else
        absent="$absent tiny-$dtype"
    fi
done
# Random models of single kinds of memory: windows beside sums, sinks and decay; sums that fade by gates beside newest keys, and by
# fixed factors; a prefix; norms of queries and keys; hedgehog features.
"$python" - "$work" <<'END' >"$work/log" 2>&1
import sys
sys.path += ["tests", "."]
import numpy, reference
sums = {"kernel": 0, "sinks": 0, "decay": 0.0, "degree": 2, "chunk": 9, "window": 0, "normalizer": 0, "normalizer_eps": 0.0,
        "rope_pairs": 0, "head_dim_k": 16, "fading": 0}
for seed, name, mixers, layer, config in (
        (39, "beside", [2, 2, 2], {"fading": 0}, {}),
        (40, "gates", [2, 2], {**sums, "fading": 1, "window": 11, "heads": 6, "kv_heads": 2}, {}),
        (41, "factors", [2, 2], {**sums, "fading": 2, "flags": 4096}, {}),
        (42, "prefix", [2, 2], {**sums, "flags": 2048, "mlp": 3, "hidden_dim": 40}, {"prefix": 64}),
        (43, "norms", [3, 2], {"flags": 1024}, {}),
        (44, "hedgehog", [2, 2], {**sums, "kernel": 2, "degree": 6, "window": 11, "heads": 6, "kv_heads": 2}, {})):
    rng = numpy.random.default_rng(seed)
    reference.random_checkpoint(rng, f"{sys.argv[1]}/{name}.bin", mixers=mixers, layer=layer, dim=48, input=0, rows=64, vocab=64,
                                flags=1, **config)
END
for name in beside gates factors prefix norms hedgehog; do
    if [ -f "$work/$name.bin" ]; then models="$models $work/$name.bin"; else absent="$absent $name"; fi
done

# values PROGRAM...: for each model a line of its name, the fingerprint, the sum of the saved past, and the fingerprint of what
# continues the past in $work/first.
values() {
    local m name text n more
    for m in $models; do
        name=$(basename "$m" .bin)
        text=$prompt n=40 more=20
        [ "$(wc -c <"$m")" -gt 4000000 ] && text=$short n=4 more=3
        "$@" "$m" --tokens "$text" $greedy -n $n --ignore-eos -v --save "$work/state" 2>"$work/err" >/dev/null || { cat "$work/err"; return 1; }
        local logits=$(sed -n 's/^logits #\([0-9a-f]*\).*/\1/p' "$work/err") state=$(sha256sum <"$work/state" | cut -c 1-16)
        [ -f "$work/first-$name" ] || cp "$work/state" "$work/first-$name"
        "$@" "$m" --load "$work/first-$name" $greedy -n $more --ignore-eos -v 2>"$work/err" >/dev/null || { cat "$work/err"; return 1; }
        echo "$name $logits $state $(sed -n 's/^logits #\([0-9a-f]*\).*/\1/p' "$work/err")"
    done
}

# row NAME PROGRAM...: one line of the table.
row() {
    local name=$1
    shift
    values "$@" >"$work/got" 2>&1
    if cmp -s "$work/got" "$work/want"; then
        passed=$((passed + 1))
        printf '%-44s same\n' "$name"
    else
        failed=$((failed + 1))
        printf '%-44s DIFFERENT\n' "$name"
        diff "$work/want" "$work/got" | sed 's/^/        /'
    fi
}

lacks() {       # lacks NAME WHAT
    missing=$((missing + 1))
    printf '%-44s missing (%s)\n' "$1" "$2"
}

# build NAME COMPILER...: into $work/program
build() {
    local name=$1
    shift
    if "$@" $flags -o "$work/program" $sources -lm >"$work/log" 2>&1; then return 0; fi
    failed=$((failed + 1))
    printf '%-44s DOES NOT BUILD\n' "$name"
    sed 's/^/        /' "$work/log" | head -n 20
    return 1
}

# machine NAME PACKAGES RUNNER COMPILER FLAGS...: builds for a machine and runs there. RUNNER - is this one.
machine() {
    local name=$1 packages=$2 runner=$3 tool
    shift 3
    [ "$runner" = - ] && runner=
    for tool in $1 ${runner%% *}; do
        command -v "$tool" >/dev/null || { lacks "$name" "$packages"; return; }
    done
    if [ -n "${probe:-}" ] && ! echo 'int main(void) { return 0; }' | "$@" -x c - -o "$work/probe" 2>/dev/null; then
        lacks "$name" "$packages"
        return
    fi
    build "$name" "$@" && row "$name" $runner "$work/program"
}

# ---- What is known.
if [ "${1:-}" = --record ]; then
    gcc -O2 $flags -o "$work/program" $sources -lm || exit 1
    { sed -n '/^#/p' "$known"; values "$work/program"; } >"$work/new" || { cat "$work/new"; exit 1; }
    cp "$work/new" "$known"
    cat "$known"
    exit
fi
for m in $models; do
    name=$(basename "$m" .bin)
    grep "^$name " "$known" || { echo "$name has no known values in $known; tests/reproduce.sh --record writes them" >&2; failed=$((failed + 1)); }
done >"$work/want"
for name in ${absent:-}; do lacks "model $name" "python3 with numpy: PYTHON=build/venv/bin/python"; done
grep -v '^#' "$known" | sed 's/^/known   /'
echo

# ---- This machine: instruction sets, threads, blocks, compilers.
here=$(uname -m)
make -s run >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cp run "$work/run"
newest=$(grep -qs amx_int8 /proc/cpuinfo && echo ", AMX")
row "$here, make$newest" "$work/run"
for k in plain avx2 avx512vnni; do row "$here, $k instructions only" env BASED_KERNELS=$k "$work/run"; done
for j in 2 3 4; do row "$here, $j threads" "$work/run" -j $j; done
gcc -O2 $flags -c based.c -o "$work/based.o" && gcc -O2 $flags -c tokenizer.c -o "$work/tokenizer.o"
for b in $(seq 64); do          # the only line of the program that knows how many tokens of a prompt go together
    sed "s/enum { BLOCK = 128 }/enum { BLOCK = $b }/" run.c >"$work/run$b.c"
    gcc -O0 $flags -I. -o "$work/run$b" "$work/run$b.c" "$work/based.o" "$work/tokenizer.o" -lm || exit 1
    values "$work/run$b" >"$work/got" 2>&1
    cmp -s "$work/got" "$work/want" || { blocks="${blocks:-} $b"; break; }
done
if [ -z "${blocks:-}" ] && grep -q 'enum { BLOCK = 128 }' run.c; then
    passed=$((passed + 1)); printf '%-44s same\n' "$here, prompts in blocks of 1, 2, ... 64"
else
    failed=$((failed + 1)); printf '%-44s DIFFERENT\n' "$here, prompts in blocks of${blocks:- any size: not tried}"
fi
for o in -O0 -O1 -O2 -O3 -Os; do machine "$here, gcc $o" gcc - gcc $o; done
for o in -O0 -O2 -O3; do machine "$here, clang $o" clang-14 - clang-14 $o; done
machine "$here, gcc -O3 -march=native" gcc - gcc -O3 -march=native
machine "$here, clang -O3 -march=native" clang-14 - clang-14 -O3 -march=native
machine "$here, tcc" tcc - tcc
machine "$here, musl" musl-tools - musl-gcc -O2 -static

# ---- Other machines.
probe=1
[ "$here" = x86_64 ] && machine "i686" gcc-12-multilib - gcc -O2 -m32 -msse2 -mfpmath=sse -idirafter /usr/include/x86_64-linux-gnu
for cpu in "cortex-a72, NEON" "neoverse-n1, dot products" "max, i8mm"; do
    machine "aarch64, ${cpu#*, }" "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user" "qemu-aarch64 -cpu ${cpu%,*}" \
        aarch64-linux-gnu-gcc -O2 -static
done
for fpu in vfpv3-d16 neon; do
    machine "armhf, $fpu" "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user" qemu-arm \
        arm-linux-gnueabihf-gcc -O2 -static -mfpu=$fpu
done
machine "riscv64" "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross qemu-user" qemu-riscv64 riscv64-linux-gnu-gcc -O2 -static
machine "s390x (big-endian)" "gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user" qemu-s390x s390x-linux-gnu-gcc -O2 \
    -static -fexcess-precision=fast
machine "mips (big-endian, 32 bits)" "gcc-mips-linux-gnu libc6-dev-mips-cross qemu-user" qemu-mips mips-linux-gnu-gcc -O2 -static
cat >"$work/wasi.mjs" <<'END'
import { readFile } from 'node:fs/promises';
import { WASI } from 'node:wasi';
const wasi = new WASI({ version: 'preview1', args: ['run', ...process.argv.slice(3)], env: {}, preopens: { [process.env.WORK]: process.env.WORK, '.': '.' } });
const { instance } = await WebAssembly.instantiate(await readFile(process.argv[2]), wasi.getImportObject());
process.exit(wasi.start(instance));
END
# Without dynamic tiering, because the engine of node 20 now and then dies of it when the program has ended.
for o in "" -msimd128; do
    machine "WebAssembly (node)${o:+, SIMD}" "clang-14 lld wasi-libc libclang-rt-14-dev-wasm32 nodejs" \
        "node --no-warnings --no-wasm-dynamic-tiering $work/wasi.mjs" clang-14 --target=wasm32-wasi -O2 $o
done

# Windows. The server of wine stays for all runs, and ends by itself.
wine=$(command -v wine64 || echo /usr/lib/wine/wine64)
if [ -x "$wine" ]; then
    export WINEPREFIX=$work/prefix WINEDEBUG=-all
    { "${wine%/*}/wineserver64" -p20; "$wine" wineboot -i; } >"$work/log" 2>&1
    printf '#!/bin/sh\nprogram=$1.exe\nshift\nexec "%s" "$program" "$@"\n' "$wine" >"$work/windows"
    chmod +x "$work/windows"
fi
machine "Windows (wine)" "gcc-mingw-w64-x86-64 wine64" "$work/windows" x86_64-w64-mingw32-gcc -O2 -static

# ---- A past saved on a big-endian machine is continued here. (The other way round is in every row above.)
if command -v s390x-linux-gnu-gcc >/dev/null && command -v qemu-s390x >/dev/null; then
    rm -f "$work"/first-*
    build "s390x" s390x-linux-gnu-gcc -O2 -static -fexcess-precision=fast && values qemu-s390x "$work/program" >/dev/null
    row "saved on s390x, continued on $here" "$work/run"
else
    lacks "saved on s390x, continued on $here" "gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user"
fi

echo
[ $missing = 0 ] || echo "$missing missing: not tried here"
[ -z "${CI:-}" ] || failed=$((failed + missing))
echo "$passed passed, $failed failed"
[ $failed = 0 ]
