/* lx106.c - the core of an ESP8266 (Xtensa lx106) on QEMU's machine `sim`: start, output, and the
 * arithmetic that the ROM of the chip has and the compiler's library for it therefore lacks.
 */
#include "board.h"

#include <stdint.h>
#include <string.h>

/* ---- Start and output: SIMCALL asks the emulator for what a2 says, 1: exit, 4: write --------- */
__asm__("    .section .vector, \"ax\"\n"
        "    .global reset\n"
        "reset:\n"
        "    j enter\n"
        "    .align 4\n"
        "stack_top: .word __stack\n"
        "first: .word main\n"
        "enter:\n"
        "    l32r a1, stack_top\n"
        "    l32r a0, first\n"
        "    jx a0\n"
        "    .text\n"
        "    .align 4\n"
        "    .global simcall\n"
        "simcall:\n"
        "    .byte 0x00, 0x51, 0x00\n"
        "    ret\n");
long simcall(long call, long a, long b, long c);

void put(const char *text) { simcall(4, 1, (long)text, (long)strlen(text)); }

void leave(unsigned status) {
    simcall(1, (long)status, 0, 0);
    for (;;) { }
}

/* ---- Integers -------------------------------------------------------------------------------- */

static uint64_t divide(uint64_t n, uint64_t d, uint64_t *rest) {
    uint64_t q = 0, r = 0;
    for (int i = 63; i >= 0; i--) {
        r = r << 1 | (n >> i & 1);
        if (r >= d) {
            r -= d;
            q |= (uint64_t)1 << i;
        }
    }
    *rest = r;
    return q;
}

uint64_t __udivdi3(uint64_t n, uint64_t d) { return divide(n, d, &n); }

uint64_t __umoddi3(uint64_t n, uint64_t d) {
    divide(n, d, &n);
    return n;
}

uint32_t __udivsi3(uint32_t n, uint32_t d) {
    uint32_t q = 0, r = 0;
    for (int i = 0; i < 32; i++) {      /* the bits of n move into r, highest first */
        r = r << 1 | n >> 31;
        n <<= 1;
        q <<= 1;
        if (r >= d) {
            r -= d;
            q |= 1;
        }
    }
    return q;
}

uint32_t __umodsi3(uint32_t n, uint32_t d) { return n - __udivsi3(n, d) * d; }

int32_t __divsi3(int32_t n, int32_t d) {
    uint32_t q = __udivsi3(n < 0 ? 0u - (uint32_t)n : (uint32_t)n,
                           d < 0 ? 0u - (uint32_t)d : (uint32_t)d);
    return (n ^ d) < 0 ? (int32_t)(0u - q) : (int32_t)q;
}

uint64_t __muldi3(uint64_t a, uint64_t b) {
    uint32_t x = (uint32_t)a, y = (uint32_t)b;
    uint32_t x0 = x & 0xffff, x1 = x >> 16, y0 = y & 0xffff, y1 = y >> 16;
    uint32_t low = x0 * y0, middle = x1 * y0 + (low >> 16), other = x0 * y1 + (middle & 0xffff);
    uint32_t high = x1 * y1 + (middle >> 16) + (other >> 16);
    high += x * (uint32_t)(b >> 32) + (uint32_t)(a >> 32) * y;
    return (uint64_t)high << 32 | other << 16 | (low & 0xffff);
}

/* ---- Floats: exactly rounded, to nearest, ties to even ------------------------------------------
 * A number in pieces: its sign in place, m with the highest bit set, value m / 2^31 * 2^(e - 127).
 */
#define SIGN 0x80000000u
#define INFINITE 0x7f800000u
#define NOT_A_NUMBER 0x7fc00000u

static uint32_t bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static uint32_t normalize(uint32_t m, int *e) {
    for (; !(m & SIGN); m <<= 1) --*e;
    return m;
}

/* m, and the exponent, of a finite number that is not 0 */
static uint32_t split(uint32_t u, int *e) {
    *e = u >> 23 & 255;
    if (*e) return u << 8 | SIGN;
    *e = 1;
    return normalize(u << 8, e);
}

/* m >> by, with the lowest bit set if bits are lost */
static uint32_t shift_sticky(uint32_t m, int by) {
    if (by == 0) return m;
    if (by > 31) return m != 0;
    return m >> by | (m << (32 - by) != 0);
}

static float round_to_float(uint32_t sign, int e, uint32_t m) {
    uint32_t u, rest;
    if (e >= 255) return from_bits(sign | INFINITE);
    if (e <= 0) {
        m = shift_sticky(m, 1 - e);
        e = 1;
    }
    u = ((uint32_t)(e - 1) << 23) + (m >> 8);       /* the highest bit of m carries into e */
    rest = m & 255;
    if (rest > 128 || (rest == 128 && (u & 1))) u++;
    return from_bits(sign | u);
}

float __mulsf3(float x, float y) {
    uint32_t a = bits(x), b = bits(y), sign = (a ^ b) & SIGN;
    int e, f;
    a &= ~SIGN;
    b &= ~SIGN;
    if (a > INFINITE || b > INFINITE) return from_bits(NOT_A_NUMBER);
    if (a == INFINITE || b == INFINITE) return from_bits(a && b ? sign | INFINITE : NOT_A_NUMBER);
    if (!a || !b) return from_bits(sign);
    uint64_t product = (uint64_t)split(a, &e) * split(b, &f);
    uint32_t m = (uint32_t)(product >> 32) | ((uint32_t)product != 0);
    e += f - 126;
    if (!(m & SIGN)) {                  /* the 48 bits of the product begin at bit 62 */
        m = m << 1;
        e--;
    }
    return round_to_float(sign, e, m);
}

float __addsf3(float x, float y) {
    uint32_t a = bits(x), b = bits(y), m, n;
    int e, f;
    if (a << 1 < b << 1) {              /* a is the larger one */
        uint32_t swap = a;
        a = b;
        b = swap;
    }
    if ((a & ~SIGN) > INFINITE) return from_bits(NOT_A_NUMBER);
    if ((a & ~SIGN) == INFINITE)
        return from_bits((b & ~SIGN) == INFINITE && a != b ? NOT_A_NUMBER : a);
    if (!(b & ~SIGN)) return from_bits(a & ~SIGN ? a : a & b);
    m = split(a, &e) >> 1;
    n = shift_sticky(split(b, &f) >> 1, e - f);
    m = (a ^ b) & SIGN ? m - n : m + n;
    if (!m) return 0.0f;
    e++;
    m = normalize(m, &e);
    return round_to_float(a & SIGN, e, m);
}

float __subsf3(float x, float y) { return __addsf3(x, from_bits(bits(y) ^ SIGN)); }

float __divsf3(float x, float y) {
    uint32_t a = bits(x), b = bits(y), sign = (a ^ b) & SIGN, m, n, q = 0;
    int e, f;
    a &= ~SIGN;
    b &= ~SIGN;
    if (a > INFINITE || b > INFINITE || (a == b && (!a || a == INFINITE)))
        return from_bits(NOT_A_NUMBER);
    if (a == INFINITE || !b) return from_bits(sign | INFINITE);
    if (b == INFINITE || !a) return from_bits(sign);
    m = split(a, &e) >> 1;
    n = split(b, &f) >> 1;
    e += 127 - f;
    if (m < n) {
        m <<= 1;
        e--;
    }
    for (int i = 0; i < 31; i++, m <<= 1) {
        q <<= 1;
        if (m >= n) {
            m -= n;
            q |= 1;
        }
    }
    return round_to_float(sign, e, q << 1 | (m != 0));
}

uint32_t __fixunssfsi(float x) {         /* of 0 <= x < 2^32; the rest has no defined value in C */
    int e;
    uint32_t u = bits(x), m;
    if (u < 127u << 23) return 0;
    m = split(u, &e);
    return m >> (127 + 31 - e);
}

float __floatunsisf(uint32_t u) {
    int e = 127 + 31;
    if (!u) return 0.0f;
    u = normalize(u, &e);
    return round_to_float(0, e, u);
}

float __floatsisf(int32_t i) {
    float size = __floatunsisf(i < 0 ? 0u - (uint32_t)i : (uint32_t)i);
    return from_bits(bits(size) | (i < 0 ? SIGN : 0));
}
