// node pico.mjs STORY.uf2 MARK NODE_MODULES: runs a program for the Raspberry Pi Pico in rp2040js as the ROM of the board
// would. Writes what comes from UART0, and how many cycles lie between two visits of the address MARK.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';
const [uf2, mark, modules] = [readFileSync(process.argv[2]), parseInt(process.argv[3], 16) & ~1, process.argv[4]];
const { RP2040 } = createRequire(resolve(modules) + '/')('rp2040js');
const board = new RP2040(), core = board.core;

for (let at = 0; at < uf2.length; at += 512) {
    if (uf2.readUInt32LE(at) !== 0x0a324655) throw Error('this is not UF2');
    const to = uf2.readUInt32LE(at + 12) - 0x10000000;
    if (to < 0 || to + 256 > 2 << 20) throw Error('more than the flash of a Pico');
    board.flash.set(uf2.subarray(at + 32, at + 288), to);
}
// The ROM runs the first 252 bytes of the flash in RAM, if the CRC behind them is right.
let crc = -1;
for (const byte of board.flash.subarray(0, 252)) {
    crc ^= byte << 24;
    for (let i = 0; i < 8; i++) crc = crc << 1 ^ (crc < 0 ? 0x04c11db7 : 0);
}
if (crc !== new DataView(board.flash.buffer, board.flash.byteOffset).getInt32(252, true)) throw Error('the CRC of the boot block is wrong');
board.sram.set(board.flash.subarray(0, 256), 0x41f00);
core.PC = 0x20041f00;
core.SP = 0x20041f00;

let text = '', ended = false;
board.uart[0].onByte = (byte) => {
    process.stdout.write(String.fromCharCode(byte));
    if (byte === 10) {
        ended = /^(done|failed)\r$/.test(text);
        text = '';
    } else {
        text += String.fromCharCode(byte);
    }
};
const marks = [];
while (!ended) {
    if (core.PC === mark) marks.push(core.cycles);
    core.executeInstruction();
}
console.log(`cycles per token ${Math.round((marks.at(-1) - marks[0]) / (marks.length - 1))}`);
process.exit(0);
