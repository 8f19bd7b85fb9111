/* test_soft_float.c - the arithmetic of machines without floats ("Walled off I" of based.c) on a
 * machine that has them: the same bits for the same numbers, chosen so that cancellation, halves,
 * carries and all differences of exponents are frequent.
 */
#define BASED_NARROW 1
#define BASED_SOFT_FLOAT 1
#include "based.c"
#include "tests/test.h"

static uint32_t seed = 2463534242u;

static uint32_t next(void) {
    seed ^= seed << 13;
    seed ^= seed >> 17;
    return seed ^= seed << 5;
}

static int same(float a, float b) {
    return bits_of_float(a) == bits_of_float(b) || (a != a && b != b);
}

/* A float of any kind, or one near 1 with few bits. */
static float any(void) {
    uint32_t bits = next(), how = next();
    if (how & 1) bits = (bits & 0x807fffff) | ((117 + (how >> 8) % 20) << 23);
    if (how & 2) bits &= 0xffffff00u << (how >> 28);
    return float_of_bits((how & 0x1fc) == 0 ? bits & 0x80000000u : bits);
}

/* A float whose exponent is near that of x; often -x but for some bits. */
static float near(float x) {
    uint32_t how = next(), bits = bits_of_float(x), e = (bits >> 23 & 255) + how % 61 - 30;
    if (how >> 30 == 0) return any();
    if (how >> 30 == 1) return float_of_bits(bits ^ 0x80000000u ^ (next() >> (how >> 8 & 31)));
    return float_of_bits((next() & 0x807fffff) | (e & 255) << 23);
}

static void test_mul_add(void) {
    for (int i = 0; i < 3000000; i++) {
        float a = any(), b = any(), c = near(a * b);
        CHECK(same(mul_add(a, b, c), a * b + c));
    }
}

static void test_divide(void) {
    for (int i = 0; i < 3000000; i++) {
        float b = any(), a = next() & 1 ? any() : near(b);
        CHECK(same(divide(a, b), a / b));
    }
}

/* w: a bfloat16 as is_bad_scale allows it; x: a power of two, as quantize_group makes it */
static void test_add_scaled(void) {
    for (int i = 0; i < 3000000; i++) {
        int32_t s = ((int32_t)(next() & 0x3fffff) - 0x200000) >> next() % 22;
        float w = float_of_bits((next() & 0x807f0000) | (45 + next() % 100) << 23);
        float x = float_of_bits((71 + next() % 130) << 23);
        float y = next() & 7 ? near((float)s * w * x) : 0.0f;
        if (bits_of_float(y) == 0x80000000u) y = 0.0f;          /* no sum that began with 0 is -0 */
        CHECK(same(add_scaled_sum(y, s, w, x), y + (float)s * w * x));
    }
}

/* Sums in order; zeros, infinities and tiny numbers come in between. */
static void test_weighted_sum(void) {
    for (int i = 0; i < 100000; i++) {
        float w[8], rows[8][2], out[2];
        for (size_t j = 0; j < 8; j++) w[j] = any(), rows[j][0] = any(), rows[j][1] = near(w[j]);
        if (i & 1) w[1] = -w[0], rows[1][1] = rows[0][1];       /* 0 in between */
        weighted_sum_generic(out, w, rows[0], 8, 2, 2);
        for (size_t e = 0; e < 2; e++) {
            float sum = 0.0f;
            for (size_t j = 0; j < 8; j++) sum += w[j] * rows[j][e];
            CHECK(same(out[e], sum));
        }
    }
}

static void test_quantized(void) {
    for (int i = 0; i < 1000000; i++) {
        float scale = float_of_bits((40 + next() % 143) << 23), x = any(), product = x * scale;
        if (product > -127.5f && product < 127.5f)
            CHECK(quantized(x, scale)
                  == (int32_t)bits_of_float(product + ROUND_MAGIC_F) - ROUND_MAGIC);
        else if (product == product)
            CHECK(quantized(x, scale) == (product < 0.0f ? -127 : 127));
    }
}

/* Every 4001st float, and the neighborhood of each number at which exp_approx changes its way; r is
 * rounded up to a power of two for the last two. */
static void test_exp(void) {
    static const uint32_t at[] = { 0, 0x32800000, 0x3e800000, 0x42ae0000, 0x42b00000, 0x7f800000,
                                   0x3ee2e430, 0x3fea2b24 };
    for (uint32_t bits = 0; bits < 0xfffff000; bits += 4001) {
        float x = float_of_bits(bits);
        CHECK(same(exp_approx(x), exp_definition(x)));
    }
    for (uint32_t i = 0; i < 2 * COUNT(at); i++) for (uint32_t d = 0; d < 2000; d++) {
        float x = float_of_bits((at[i / 2] + d - 1000) ^ (i << 31));
        CHECK(same(exp_approx(x), exp_definition(x)));
    }
}

int main(void) {
    test_mul_add();
    test_divide();
    test_exp();
    test_weighted_sum();
    test_quantized();
    test_add_scaled();
    return test_end();
}
