#!/bin/sh
# Writes what `make install` installs beside the program and the library: two man pages, completions for three shells, and
# the files by which pkg-config and CMake find the library. It needs sh, sed and awk alone.
#
#     tests/package/generate.sh DIRECTORY     in which everything lies as it will lie below PREFIX
#
# based(1) and the completions are made from what `./run --help` prints, based(3) from based.h; so they say the same. EMULATOR
# runs a ./run that is for another machine: make install CC=aarch64-linux-gnu-gcc EMULATOR=qemu-aarch64.
set -eu
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^#define BASED_VERSION "\(.*\)".*/\1/p' based.h)
date=$(sed -n 's/^#define BASED_VERSION .* of \([0-9-]*\).*/\1/p' based.h)

# to FILE: standard input becomes FILE in DIRECTORY.
directory=$1
help=$(${EMULATOR:-} ./run --help)
to() {
    mkdir -p "$directory/${1%/*}"
    cat > "$directory/$1"
}

# ---- The help as records, a line each, in fields that a tab separates. The names of options are those of the C table.
#
#     paragraph TEXT · heading TITLE · option LETTER NAME VALUE TEXT BRIEF · example LINE
#
# BRIEF is the beginning of TEXT, for a menu.
records() {
    printf '%s\n' "$help" | awk '
    function finish() {
        brief = text
        sub(/^With --[a-z]+: /, "", brief)
        if (match(brief, /[.;:]( |$)|, such as| \(default /)) brief = substr(brief, 1, RSTART - 1)
        if (text != "") print start "\t" text (start == "paragraph" ? "" : "\t" brief)
        start = "paragraph"
        text = ""
    }
    function add(words) { text = text (text == "" ? "" : " ") words }
    BEGIN                       { start = "paragraph" }
    /^usage: /                  { next }
    /^$/                        { finish(); next }
    /^[A-Z][A-Za-z ]*:$/        { finish(); sub(/:$/, ""); print "heading\t" $0; examples = $0 == "Examples"; next }
    examples && /^  /           { sub(/^ *[^ ]*/, "based"); print "example\t" $0; next }
    /^  (-.,|   ) --[a-z]/      {
        finish()
        match($0, /--[-a-z]+( [A-Z]+)?/)
        split(substr($0, RSTART + 2, RLENGTH - 2) " ", left, " ")
        start = "option\t" ($1 ~ /^-.,$/ ? substr($1, 2, 1) : "") "\t" left[1] "\t" left[2]
        $0 = substr($0, RSTART + RLENGTH)
    }
                                { sub(/^ +/, ""); add($0) }
    END                         { finish() }'
}

# ---- Man pages. Words become lines of at most 78 bytes; what roff would take for its own is escaped.
roff='
function escape(s) {
    gsub(/\\/, "\\e", s); gsub(/-/, "\\-", s); gsub(/\047/, "\\(aq", s)
    gsub(/`/, "\\(ga", s); gsub(/\^/, "\\(ha", s); gsub(/~/, "\\(ti", s)
    return s ~ /^\./ ? "\\&" s : s
}
function print_text(s,    words, n, i, line) {
    n = split(s, words, " ")
    for (i = 1; i <= n; i++) {
        if (line != "" && length(line " " words[i]) > 70) { print escape(line); line = "" }
        line = line (line == "" ? "" : " ") words[i]
    }
    if (line != "") print escape(line)
}
'
title() {       # title SECTION NAME DESCRIPTION
    printf '.TH BASED %s %s "based %s"\n.SH NAME\n%s \\- %s\n' "$1" "$date" "$version" "$2" "$3"
}
{
    title 1 based "continue a text with a Based language model"
    echo '.SH SYNOPSIS
.B based
.I CHECKPOINT
.RI [ options ]
.SH DESCRIPTION'
    records | awk -F '\t' "$roff"'
    $1 == "heading" && $2 == "Examples" { print ".SH EXAMPLES\n.nf"; next }
    $1 == "heading"                     { if (!options++) print ".SH OPTIONS"; print ".SS " escape($2) }
    $1 == "example"                     { print escape($2) }
    $1 == "option"                      {
        print ".TP\n" ($2 == "" ? "" : "\\fB\\-" $2 "\\fR, ") "\\fB" escape("--" $3) "\\fR" ($4 == "" ? "" : " \\fI" $4 "\\fR")
        print_text($5)
    }
    $1 == "paragraph" && sub(/^Exit status: /, "", $2) { print ".fi\n.SH EXIT STATUS" }
    $1 == "paragraph"                   { if (paragraphs++) print last == "paragraph" ? ".PP" : ""; print_text($2) }
                                        { last = $1 }'
    echo '.SH SEE ALSO
.BR based (3)'
} | sed '/^$/d' | to share/man/man1/based.1

# The comments of based.h that begin in the first column are text, and what is indented in them is shown as it is; the rest
# is C. A comment stands below the C that it is about, and a part is a section.
{
    title 3 based "run Based language models from plain C"
    echo '.SH SYNOPSIS
.nf
#include <based.h>

cc ... \-lbased \-lm
.fi
.SH DESCRIPTION'
    awk "$roff"'
    function begin(what) {                              # what: title, text or code
        if (kind == "code" && what == "code") return
        if (kind == "code") print ".fi"
        if (kind != "title" && what != "title") print ".PP"
        if (what == "code") print ".nf"
        kind = what
    }
    function finish_text() { if (words != "") { begin("text"); print_text(words) } words = "" }
    function print_code(s) { begin("code"); print escape(s) }
    function print_comment(    i) {                     # its lines are the first ones
        for (i = 1; i <= comments; i++) {
            if (line[i] ~ /^   /) { finish_text(); print_code(line[i]) }
            else if (line[i] == "") finish_text()
            else words = words " " line[i]
        }
        finish_text()
    }
    function finish(    i) {
        if (part) print_comment()
        while (line[lines] == "" && lines > comments) lines--
        if (kind == "code" && lines > comments) print_code("")
        for (i = comments + 1; i <= lines; i++) if (line[i] != "" || i > comments + 1) print_code(line[i])
        if (!part) print_comment()
        lines = comments = part = 0
    }
    BEGIN { kind = "title" }
    /^#ifdef __cplusplus/, /^#endif/ { next }
    /^#(ifndef BASED_H|define BASED_H$|include|endif)/ { next }
    /^\/\*/ { finish(); inside = 1 }
    /^\/\* ====/ {
        gsub(/^.* =+ [0-9]+\. | =+$/, "")
        begin("title")
        print ".SH " toupper($0)
        part = 1
        next
    }
    inside {
        comments++
        if (sub(/ *\*\/$/, "")) inside = 0
        sub(/^ *\/?\* ?/, "")
    }
    { line[++lines] = $0 }
    END { finish(); begin("title") }' based.h
    echo '.SH SEE ALSO
.BR based (1)'
} | to share/man/man3/based.3

# ---- Completions: names of options, of files where a file is meant, and the two modes.
{
    printf '_based() {\n    case $3 in\n        -m|--mode) COMPREPLY=($(compgen -W "generate chat" -- "$2")) ;;\n'
    printf '        *) [[ $2 != -* ]] || COMPREPLY=($(compgen -W "%s" -- "$2")) ;;\n    esac\n}\n' \
        "$(records | awk -F '\t' '$1 == "option" { printf "%s--%s ", $2 == "" ? "" : "-" $2 " ", $3 }')"
    echo 'complete -o default -F _based based'
} | to share/bash-completion/completions/based

{
    echo '#compdef based'
    printf '_arguments -s'
    records | awk -F '\t' '
    $1 == "option" {
        gsub(/[][\\]/, "\\\\&", $6)
        gsub(/\047/, "\047\\\047\047", $6)
        repeats = $5 ~ /given several times/ ? "\047*\047" : $2 == "" ? "" : "\047(-" $2 " --" $3 ")\047"
        value = $4 == "" ? "" : ":" $4 ":" ($4 == "FILE" ? "_files" : $4 == "MODE" ? "(generate chat)" : "")
        printf " \\\n    %s\047[%s]%s\047", repeats ($2 == "" ? "--" $3 : "{-" $2 ",--" $3 "}"), $6, value
    }'
    printf ' \\\n    1:CHECKPOINT:_files\n'
} | to share/zsh/site-functions/_based

records | awk -F '\t' '
$1 == "option" {
    gsub(/[\\\047]/, "\\\\&", $6)
    value = $4 == "" ? "" : $4 == "FILE" ? " -r -F" : $4 == "MODE" ? " -x -a \047generate chat\047" : " -x"
    print "complete -c based" ($2 == "" ? "" : " -s " $2) " -l " $3 value " -d \047" $6 "\047"
}' | to share/fish/vendor_completions.d/based.fish

# ---- How other builds find the library, wherever the directory was moved.
to lib/pkgconfig/based.pc <<END
prefix=\${pcfiledir}/../..
includedir=\${prefix}/include
libdir=\${prefix}/lib

Name: based
Description: Based language models from plain C
Version: $version
Libs: -L\${libdir} -lbased
Libs.private: -lm
Cflags: -I\${includedir}
END

to lib/cmake/based/based-config.cmake <<'END'
# find_package(based) makes the target based::based: the shared library, or the static one where there is no other.
get_filename_component(based_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET based::based)
  find_library(based_library based PATHS "${based_prefix}/lib" NO_DEFAULT_PATH NO_CACHE)
  add_library(based::based UNKNOWN IMPORTED)
  set_target_properties(based::based PROPERTIES IMPORTED_LOCATION "${based_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${based_prefix}/include" INTERFACE_LINK_LIBRARIES m)
endif()
END

# Before 1.0 the second number, too, tells what programs may rely on.
to lib/cmake/based/based-config-version.cmake <<END
set(PACKAGE_VERSION $version)
if("${version%.*}" VERSION_EQUAL "\${PACKAGE_FIND_VERSION_MAJOR}.\${PACKAGE_FIND_VERSION_MINOR}" AND
   NOT PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
END
