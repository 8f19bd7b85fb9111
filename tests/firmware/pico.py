"""Builds a story for the Raspberry Pi Pico, or runs it in an emulator.

    python3 tests/firmware/pico.py MODEL OUT.uf2 [--board pico2] [--window KEYS] [--tokens N]
                                   [--prompt TEXT] [--emulate NODE_MODULES]

Hold the board's button while you plug it in and copy OUT.uf2 to the drive that appears. --emulate
runs it in rp2040js (npm) instead, compares text (of UART and USB) and logits with this computer and
counts cycles.
"""
import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from boards import (ARM, FIRMWARE, KIB, ROOT, STRICT, Failed, command, host, shrink, symbols,
                    value)

FLASH, BOOT = 0x10000000, 256           # the boot block stands before the program
BOARDS = {                              # flags, flash and RAM in KiB, number of the family in UF2
    "pico": (["-mcpu=cortex-m0plus", "-mthumb"], 2048, 264, 0xe48bff56),
    "pico2": (["-mcpu=cortex-m33", "-mthumb", "-mfloat-abi=hard", "-DPICO2"], 4096, 512,
              0xe48bff59)}


def crc(data):
    """CRC-32 as the ROM computes it: from the highest bit on, not inverted at the end."""
    c = 0xffffffff
    for byte in data:
        c ^= byte << 24
        for _ in range(8):
            c = (c << 1 ^ (0x04c11db7 if c >> 31 else 0)) & 0xffffffff
    return c


def uf2(image, family):
    """Blocks of 512 bytes that each say where their 256 bytes of the flash belong."""
    image += bytes(-len(image) % 256)
    count = len(image) // 256
    for i in range(count):
        yield struct.pack("<8I", 0x0a324655, 0x9e5d5157, 0x2000, FLASH + 256 * i, 256, i, count,
                          family) + image[256 * i:256 * i + 256] + bytes(220)
        yield struct.pack("<I", 0x0ab16f30)


def build(model, options, elf):
    """Links the firmware; returns the bytes of the flash."""
    flags, flash, ram, _ = BOARDS[options.board]
    if not shutil.which(f"{ARM}gcc"):
        raise Failed(f"{ARM}gcc is not here "
                     "(on Debian: apt-get install gcc-arm-none-eabi picolibc-arm-none-eabi)")
    places = {"__flash": FLASH + BOOT, "__flash_size": flash * KIB - BOOT, "__ram": 0x20000000,
              "__ram_size": ram * KIB, "__stack_size": 6 * KIB}
    command(f"{ARM}gcc", *STRICT, "-O2", *flags, "--specs=picolibc.specs", "--crt0=minimal",
            f'-DMODEL="{model}"', f'-DPROMPT="{options.prompt}"', f"-DTOKENS={options.tokens}",
            f"-DARENA={(ram - 12) * KIB}", ROOT / "based.c", ROOT / "tokenizer.c",
            *(FIRMWARE / name for name in ("main.c", "pico.c", "usb.c", "model.S")),
            "-Wl,--gc-sections", "-Wl,--undefined=boot_block",
            f"-Wl,--section-start=.boot={FLASH:#x}",
            *(f"-Wl,--defsym={name}={at:#x}" for name, at in places.items()), "-o", elf, "-lm")
    raw = elf.with_suffix(".raw")
    command(f"{ARM}objcopy", "-O", "binary", elf, raw)
    image = bytearray(raw.read_bytes())
    if any(image[BOOT - 4:BOOT]):
        raise Failed(f"the boot block is longer than {BOOT - 4} bytes")
    if options.board == "pico":
        struct.pack_into("<I", image, BOOT - 4, crc(image[:BOOT - 4]))
    return image


def emulate(path, elf, modules, want):
    mark = dict((name, at) for at, name in symbols(ARM, elf))["token_begins"]
    text = command("node", FIRMWARE / "pico.mjs", path, hex(mark), modules).replace("\r", "")
    got, story = value(text, "logits #"), text.split("\nlogits #")[0]
    if got != want["logits"] or story.rstrip("\n") != want["story"].rstrip("\n"):
        raise Failed(f"logits #{got} on the board, #{want['logits']} on this computer\n{text}")
    print(text, end="")


def pico(options, directory):
    model = Path(options.model).resolve()
    if options.window:
        model = shrink(model, options.window, directory / model.name)
    elf, out = directory / "story.elf", Path(options.out)
    image = build(model, options, elf)
    out.write_bytes(b"".join(uf2(image, BOARDS[options.board][3])))
    print(f"{out}: {len(image):,} bytes of flash. Hold the board's button BOOTSEL while you plug "
          "it in,\nand copy the file to the drive that appears. Then open the board's serial port "
          "(README.md).")
    if options.emulate:
        emulate(out, elf, options.emulate, host(model, options))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--board", choices=BOARDS, default="pico")
    parser.add_argument("--window", type=int, metavar="KEYS")
    parser.add_argument("--tokens", type=int, default=200, metavar="N")
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT")
    parser.add_argument("--emulate", metavar="NODE_MODULES", help="where rp2040js is")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as name:
            pico(options, Path(name))
    except (Failed, OSError, subprocess.TimeoutExpired) as e:
        print(f"pico.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
