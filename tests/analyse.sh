#!/usr/bin/env bash
# Static analysis of the three C files by gcc, clang-tidy and cppcheck; what they are asked and what not is said here and in
# tests/clang-tidy.yml. Ends with `N passed, N failed`.
#
# All three lose sight of one thing, that fail() (in tokenizer.c reject()) returns the status it was given, and then see null
# pointers after every check. So they read copies of the files that tell them, by one line behind it; nothing else is different.
set -u
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
cp based.h "$work"
for f in based.c tokenizer.c run.c; do
    fail=fail
    [ $f = tokenizer.c ] && fail=reject
    macro="#define $fail(e, status, ...) ($fail((e), (status), __VA_ARGS__), (status))"
    [ $f = run.c ] && macro='#define fail(status, ...) (fail((status), __VA_ARGS__), (status))'
    awk -v macro="$macro" -v f="$f" -v fail="^static int $fail\\\\(.*[^;]\$" '{ print } $0 ~ fail { at = 1 }
        at && /^}/ { print macro; print "#line " NR + 1 " \"" f "\""; at = 0; told = 1 } END { exit !told }' $f >"$work/$f" ||
        { echo "$f has no $fail()"; exit 1; }
done

report() {      # report NAME STATUS FILE: any line in FILE is a finding
    if [ "$2" = 0 ] && [ ! -s "$3" ]; then
        passed=$((passed + 1)); echo "ok     $1"
    else
        failed=$((failed + 1)); echo "FAILED $1"; cat "$3"
    fi
}

flags="-std=c99 -ffp-contract=off"
for f in based.c tokenizer.c run.c; do
    gcc $flags -O1 -fanalyzer -c "$work/$f" -o "$work/$f.o" >"$work/log" 2>&1
    report "gcc -fanalyzer $f" $? "$work/log"
    clang-tidy-14 --quiet --config-file=tests/clang-tidy.yml "$work/$f" -- $flags >"$work/log" 2>/dev/null
    report "clang-tidy $f" $? "$work/log"
    # style: opinions on scopes and names, which are not ours. The two others are wrong: an array that a loop has just
    # filled is not uninitialized (MemorySanitizer looks, too); log() gets a sum that is at least 1, of the largest.
    cppcheck -q --std=c99 --max-configs=40 --enable=warning,performance,portability '--suppress=uninitvar:*based.c' \
        '--suppress=invalidFunctionArg:*based.c' --error-exitcode=1 "$work/$f" >"$work/log" 2>&1
    report "cppcheck $f" $? "$work/log"
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
