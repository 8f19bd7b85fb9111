#!/usr/bin/env python3
"""Writes the table of Unicode classes into tokenizer.c, or checks it.

GPT-2 cuts text at letters, numbers and spaces, so its token ids depend on what these are, for every
code point. The answer is taken from the reference library itself (Hugging Face tokenizers) and not
from a copy of the Unicode tables, because it is the library that decides which ids a model was
trained on: each code point is put behind a letter, a number and a sign, and where the library keeps
the two together, there the class is known.

    python3 tests/unicode_tables.py
        compare the table in tokenizer.c with the library; exit 1 if they differ
    python3 tests/unicode_tables.py --write
        write the table (after a new version of Unicode reached the library)
"""
import re
import sys
from pathlib import Path

OTHER, LETTER, NUMBER, SPACE = range(4)
SOURCE = Path(__file__).resolve().parent.parent / "tokenizer.c"
BEGIN, END = "/* BEGIN TABLE, written by tests/unicode_tables.py */\n", "/* END TABLE */\n"

# The first letters that each version of Unicode added and the one before it had not.
VERSIONS = [("14.0", 0x10570), ("15.0", 0x1E4D0), ("15.1", 0x2EBF0), ("16.0", 0x10D50),
            ("17.0", 0x323B0)]


def library_classes():
    """The class of all 0x110000 code points.

    Surrogates are no characters: nothing can ask for them, they are OTHER.
    """
    from tokenizers import pre_tokenizers
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    classes = bytearray(0x110000)
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            kinds = ((LETTER, "a"), (NUMBER, "1"), (OTHER, "!"))
            classes[code] = next((kind for kind, before in kinds
                                  if len(cut(before + chr(code))) == 1), SPACE)
    return bytes(classes)


def table_text(classes):
    """The C text of the table: one entry wherever the class changes, 4 * code point + class."""
    changes = [code for code in range(0x110000) if code == 0 or classes[code] != classes[code - 1]]
    entries = [code << 2 | classes[code] for code in changes]
    version = [name for name, code in VERSIONS if classes[code] == LETTER][-1]
    lines, line = [], "   "
    for entry in entries:
        item = f" {entry},"
        if len(line) + len(item) > 100:
            lines.append(line)
            line = "   "
        line += item
    return (f"/* Unicode {version}. Each entry is 4 * code point + class: from there on, up to the "
            f"next entry, all\n"
            f" * code points have that class. */\n"
            f"static const uint32_t class_table[{len(entries)}] = {{\n"
            + "\n".join(lines + [line]) + "\n};\n")


def source_classes(text):
    """The class of all code points as the table in the source says.

    It is read back independently of table_text.
    """
    table = text[text.index(BEGIN):text.index(END)]
    entries = [int(n) for n in re.findall(r"(\d+),", table[table.index("{"):])]
    classes = bytearray(0x110000)
    for entry, after in zip(entries, entries[1:] + [0x110000 << 2]):
        first, end = entry >> 2, after >> 2
        classes[first:end] = bytes([entry & 3]) * (end - first)
    return bytes(classes)


def main():
    text = SOURCE.read_text()
    classes = library_classes()
    if sys.argv[1:] == ["--write"]:
        before, after = text[:text.index(BEGIN) + len(BEGIN)], text[text.index(END):]
        text = before + table_text(classes) + after
        SOURCE.write_text(text)
    elif sys.argv[1:]:
        sys.exit(__doc__)
    wrong = [code for code, (a, b) in enumerate(zip(source_classes(text), classes)) if a != b]
    print(f"{0x110000} code points, {len(wrong)} differ"
          + "".join(f", U+{code:04X}" for code in wrong[:10]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
