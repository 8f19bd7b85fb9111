// node pico.mjs STORY.uf2 MARK NODE_MODULES: runs a program for the Raspberry Pi Pico in rp2040js as the ROM of the board
// would, with a host on its USB. Writes what comes from UART0, and how many cycles lie between two visits of the address
// MARK; fails unless the host reads the same text from USB, twice, and gets the answers that a real one asks for.
import assert from 'node:assert';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';
const [uf2, mark, modules] = [readFileSync(process.argv[2]), parseInt(process.argv[3], 16) & ~1, process.argv[4]];
const { RP2040, USBCDC, ConsoleLogger, LogLevel } = createRequire(resolve(modules) + '/')('rp2040js');
const board = new RP2040(), core = board.core;
board.logger = new ConsoleLogger(LogLevel.Warn);

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

const marks = [];
function until(condition, what, seconds) {
    const limit = board.clock.nanos + seconds * 1e9;
    while (!condition()) {
        if (board.clock.nanos > limit) throw Error(`${what}: nothing for ${seconds} s`);
        if (core.PC === mark) marks.push(core.cycles);
        board.clock.tick(core.waiting ? 1000 : core.executeInstruction() * 8);      // ns; 125 MHz
    }
}

// The host of rp2040js gives the board an address, reads its configuration and chooses it. It ignores DATA0 and DATA1, which
// must alternate for a real one, and whether a buffer was complete before it was handed over.
const usb = board.usbCtrl, host = new USBCDC(usb);
const { DPRAMUpdated, sendSetupPacket, onEndpointWrite } = usb;
const data = new Array(32).fill(0), old = new Array(32).fill(0);
usb.sendSetupPacket = (packet) => {
    data[0] = data[1] = 1;
    if (packet[0] === 0 && packet[1] === 9) data.fill(0, 2);        // a new configuration
    usb.epStallArm = 0;
    sendSetupPacket.call(usb, packet);
};
usb.DPRAMUpdated = (offset, value) => {
    const e = (offset - 0x80) / 4, available = 1 << 10;
    if (e >= 0 && e < 32 && value & available) {
        assert.equal(value >> 13 & 1, data[e], `DATA0 or DATA1 of endpoint ${e >> 1}`);
        assert.equal(value & ~available, old[e], `a buffer of endpoint ${e >> 1} in two steps`);
        data[e] ^= 1;
    }
    if (e >= 0 && e < 32) old[e] = value;
    DPRAMUpdated.call(usb, offset, value);
};
let connected = false, answer = [], request = [], listening = 0, fromUSB = Buffer.alloc(0);
host.cdcSetControlLineState = () => host.initialized = connected = true;     // instead of a terminal at once
host.onSerialData = (bytes) => fromUSB = Buffer.concat([fromUSB, bytes]);
usb.onEndpointWrite = (endpoint, bytes) => {
    if (endpoint > 0 || !connected) return onEndpointWrite(endpoint, bytes);
    answer.push(...bytes);
    answer.done = bytes.length < 64;
};
usb.onEndpointRead = (endpoint) => {
    if (endpoint > 0) listening++;
    else if (request.length) usb.endpointReadDone(0, Uint8Array.from(request));
};
function ask(type, code, value, index, length, bytes = []) {
    [answer, request] = [[], bytes];
    usb.sendSetupPacket(Uint8Array.of(type, code, value & 255, value >> 8, index & 255, index >> 8, length & 255, length >> 8));
    until(() => answer.done || answer.length === length && length || usb.epStallArm, 'an answer by USB', 1);
    return usb.epStallArm ? null : Buffer.from(answer);
}
const terminal = (open) => ask(0x21, 0x22, open, 0, 0);

let text = Buffer.alloc(0);
board.uart[0].onByte = (byte) => {
    text = Buffer.concat([text, Buffer.of(byte)]);
    process.stdout.write(Buffer.of(byte));
};
until(() => connected && text.length > 20, 'a host and the first words', 60);
terminal(1);
until(() => text.at(-1) === 10 && /\n(done|failed)\r\n$/.test(text), 'the end of the story', 3600);
until(() => fromUSB.length >= text.length, 'the story by USB', 1);

assert.deepEqual([board.clkSys, board.pllUsb.frequency], [125e6, 48e6]);
const device = ask(0x80, 6, 1 << 8, 0, 18), all = ask(0x80, 6, 2 << 8, 0, 255);
assert.equal(device.length, 18);
assert.equal(all.length, all.readUInt16LE(2));
for (let at = 0; at < all.length; at += all[at]) assert(all[at] > 1 && at + all[at] <= all.length, 'lengths of descriptors');
assert.equal(ask(0x80, 6, 3 << 8 | device[15], 0x409, 255).toString('utf16le', 2), 'based.c');
assert.equal(ask(0x80, 6, 6 << 8, 0, 10), null, 'what a device without high speed refuses');
ask(0x21, 0x20, 0, 0, 7, [0x80, 0x25, 0, 0, 0, 0, 8]);
assert.equal(ask(0xa1, 0x21, 0, 0, 7).readUInt32LE(0), 9600);
// A terminal that comes when the story is told reads from the beginning, too, whatever is typed.
usb.endpointReadDone(host.outEndpoint, Buffer.from('what?'));
until(() => listening === 2, 'room for what is typed', 1);
terminal(0);
terminal(1);
until(() => fromUSB.length >= 2 * text.length, 'the story again', 1);
assert.equal(fromUSB.toString(), text.toString() + text.toString());
console.log(`the same by USB, ${text.length} bytes`);
console.log(`cycles per token ${Math.round((marks.at(-1) - marks[0]) / (marks.length - 1))}`);
process.exit(0);
