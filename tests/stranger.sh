#!/bin/sh
# What somebody does who meets this project for the first time: clones it, tells a story, converses, saves, exports,
# installs, and writes a program of 20 lines. Shows each command and its output; ends with `N passed, N failed`.
#
#     tests/stranger.sh [ADDRESS]             the address of a clone; default: this one, with its last commit
#
# PYTHON (default: build/venv/bin/python or python3) needs numpy.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
address=${1:-file://$here}
python=${PYTHON:-$here/build/venv/bin/python}
[ -x "$python" ] || python=python3
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
trap 'exit 1' HUP INT TERM
prefix="$place/an empty prefix"
export prefix python place
passed=0 failed=0
cd "$place" || exit 1

# try COMMAND [WORDS [STATUS]]: the command must end with this status (0), and what it prints must contain these words.
try() {
    printf '\n$ %s\n' "$1"
    (eval "$1") > "$place/out" 2> "$place/errors" < /dev/null
    status=$?
    cat "$place/out" "$place/errors"
    if [ $status = "${3:-0}" ] && { [ -z "${2:-}" ] || cat "$place/out" "$place/errors" | grep -qF -e "$2"; }; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED (status $status): expected status ${3:-0} and: ${2:-}"
    fi
}

# A try that was refused must also have been so in one line, and have written no text.
refused() {
    try "$1" "$2" "$3"
    if [ -s "$place/out" ] || [ "$(wc -l < "$place/errors")" != 1 ]; then
        failed=$((failed + 1))
        echo "FAILED: more than one line"
    fi
}

try "git -c advice.detachedHead=false clone -q --depth 1 '$address' based.c"
cd based.c || { echo "$passed passed, $((failed + 1)) failed"; exit 1; }
M=models/based-82m-english.bin S=models/stories260K.bin
export M S

# The demo, and a text of one's own.
try "make -s demo" "The fox looked up"
try './run $M -i "The old bear sat down" -n 40 -s 7' "The old bear sat down"
try './run $M -i "The old bear sat down" -n 40 -s 7 2>/dev/null > a.txt; wc -w a.txt'
try './run $M -i "The old bear sat down" -n 40 -s 7 -j 1 -q | cmp - a.txt'
try './run --help | head -n 8' "usage: run CHECKPOINT"
try './run $M --info | head -n 9' "mixers"
refused './run' "CHECKPOINT" 2
refused './run nothing.bin' "nothing.bin" 1
refused './run README.md' "README.md" 1
refused './run $M --temprature 2' "--temprature" 2
refused './run $M -t hot' "hot" 2

# A conversation, and saving.
try 'printf "Good morning!\nWhat is your name?\n" | ./run $M -m chat -n 20 -s 1 --save chat.state'
try './run $M -i "The old bear" -n 50 -s 1 -q > whole.txt'
try './run $M -i "The old bear" -n 20 -s 1 -q --save bear.state > part.txt'
try './run $M --load bear.state -n 30 -q > rest.txt; cat part.txt rest.txt'
try 'tr -d "\n" < whole.txt > 1; cat part.txt rest.txt | tr -d "\n" > 2; cmp 1 2'
refused './run $S --load bear.state' "bear.state" 1

# Exporting: a model of the original code, and a smaller file of one that is here.
try '"$python" export.py tests/data/hazyresearch-tiny tiny.bin'
try './run tiny.bin --tokens "3 1 4" -n 8'
try '"$python" export.py $S small.bin --dtype q8 --window 64'
try './run small.bin -i "One day" -n 20 -s 1' "One day"
try './run small.bin --check' "is sound"

# Installing into an empty prefix, and a program that pkg-config compiles.
try 'make -s install PREFIX="$prefix"'
try '"$prefix/bin/based" $S -i "One day" -n 20 -s 1' "One day"
cat > ids.c <<'END'
#include <based.h>
#include <stdio.h>

int main(int count, char **name) {
    based_error e;
    based_model *model = based_open(name[count - 1], 0, &e);
    based_session *session = model ? based_session_new(model, 1, &e) : NULL;
    int32_t id = 1;
    for (int i = 0; session && i < 8; i++) {
        if (based_step(session, id, &e) != BASED_OK) break;
        const float *logits = based_logits(session);
        id = 0;
        for (size_t k = 1; k < based_width(model); k++)
            if (logits[k] > logits[id]) id = (int32_t)k;
        printf("%d ", (int)id);
    }
    if (!session) fprintf(stderr, "%s\n", e.text);
    based_session_free(session);
    based_close(model);
    return session == NULL;
}
END
export PKG_CONFIG_PATH="$prefix/lib/pkgconfig" LD_LIBRARY_PATH="$prefix/lib"
# pkg-config writes paths with blanks as a shell reads them, so its output is evaluated.
try 'cat ids.c; eval "cc -o ids ids.c $(pkg-config --cflags --libs based)"; ./ids $S' "403 407"
try 'eval "cc -o ids ids.c $(pkg-config --cflags based) \"$prefix/lib/libbased.a\" -lm"; LD_LIBRARY_PATH= ./ids $S' "403 407"
refused './ids nothing.bin' "nothing.bin" 1
try 'man -l "$prefix/share/man/man1/based.1" 2>/dev/null | head -n 4 || true'
try 'make -s uninstall PREFIX="$prefix"; find "$prefix" -type f | wc -l' "0"

printf '\n%s\n' "$passed passed, $failed failed"
[ $failed = 0 ]
