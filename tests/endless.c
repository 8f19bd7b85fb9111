/* endless.c - measures whether the error of a taylor layer grows with the length of the text.
 *
 *     endless CHECKPOINT TOKENS SHAPE
 *
 * CHECKPOINT (written by endless.py) is one taylor layer whose input is q (16), k (16) and v (64).
 * The program feeds it TOKENS random tokens and keeps the same sums in float64. At 1, 2 and 5 times
 * every power of ten it prints the largest relative error of the output, |y - y64| / |y64|, over
 * the last block of tokens. SHAPE is the distribution of the numbers:
 *     centred   q, k, v have mean 0
 *     shifted   q, k, v have means as large as their standard deviation, as in trained models
 *     biased    the means are far from 0, so that the sums grow as fast as possible
 *     drifting  the means change slowly, so that the sums grow and shrink
 */
#include "based.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEY = 16, VALUE = 64, DIM = 2 * KEY + VALUE, BLOCK = 64 };
enum { FEATURES = 1 + KEY + KEY * (KEY + 1) / 2 };

static uint64_t generator = 1;

/* About normal, mean 0 and standard deviation 1: a sum of eight bytes. */
static float bell(void) {
    uint64_t z = generator += 0x9e3779b97f4a7c15u;
    int sum = -1020;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    for (int i = 0; i < 8; i++) sum += (int)(z >> (8 * i) & 255);
    return (float)sum / 209.0f;
}

/* The monomials of x up to degree 2 and, for a query, how often each counts in 1 + s + s^2/2, s =
 * q.k/4. */
static void monomials(double *phi, const float *x, int query) {
    double scale = query ? 0.25 : 1.0;
    *phi++ = 1;
    for (int i = 0; i < KEY; i++) *phi++ = scale * (double)x[i];
    for (int i = 0; i < KEY; i++)
        for (int j = i; j < KEY; j++)
            *phi++ = scale * (double)x[i] * scale * (double)x[j] * (query && i == j ? 0.5 : 1.0);
}

static double sums[FEATURES][VALUE], weights[FEATURES];

static void add_token(const float *k, const float *v) {
    double phi[FEATURES], wide[VALUE];
    monomials(phi, k, 0);
    for (int e = 0; e < VALUE; e++) wide[e] = (double)v[e];
    for (int f = 0; f < FEATURES; f++) {
        weights[f] += phi[f];
        for (int e = 0; e < VALUE; e++) sums[f][e] += phi[f] * wide[e];
    }
}

/* |y - y64| / |y64| for the query q. */
static double error_of(const float *y, const float *q) {
    double phi[FEATURES], exact[VALUE] = { 0 }, total = 0, off = 0, size = 0;
    monomials(phi, q, 1);
    for (int f = 0; f < FEATURES; f++) {
        total += phi[f] * weights[f];
        for (int e = 0; e < VALUE; e++) exact[e] += phi[f] * sums[f][e];
    }
    for (int e = 0; e < VALUE; e++) {
        double want = exact[e] / total, wrong = (double)y[e] - want;
        off += wrong * wrong;
        size += want * want;
    }
    return sqrt(off / size);
}

/* One block of tokens around `mean`. */
static void draw(float *x, float *mean, const char *shape, float spread) {
    for (int i = 0; i < BLOCK * DIM; i++) {
        if (strcmp(shape, "drifting") == 0 && i % BLOCK == 0)
            mean[i / BLOCK] += 0.02f * bell() - 0.0004f * mean[i / BLOCK];
        x[i] = mean[i % DIM] + spread * bell();
    }
}

static int is_milestone(uint64_t n) {
    for (; n % 10 == 0; n /= 10) {}
    return n == 1 || n == 2 || n == 5;
}

static int measure(based_session *s, uint64_t tokens, const char *shape) {
    static float x[BLOCK * DIM], y[BLOCK * DIM], mean[DIM];
    float size = strcmp(shape, "biased") == 0 ? 2.0f : strcmp(shape, "shifted") == 0 ? 1.0f : 0.0f;
    float spread = size == 2.0f ? 0.3f : 1.0f;
    uint64_t n = 0;
    based_error e;
    for (int i = 0; i < DIM; i++) mean[i] = size * bell();
    while (n < tokens) {
        double worst = 0;
        uint64_t next = n + BLOCK;
        draw(x, mean, shape, spread);
        for (uint64_t m = 10; m <= tokens; m *= 10)         /* a block ends at every milestone */
            for (uint64_t f = 1; f <= 5; f += f == 1 ? 1 : 3)
                if (f * m > n && f * m < next) next = f * m;
        if (based_feed_vectors(s, x, (size_t)(next - n), y, &e))
            return fprintf(stderr, "%s\n", e.text), 1;
        for (size_t r = 0; n < next; r++, n++) {
            add_token(x + r * DIM + KEY, x + r * DIM + 2 * KEY);
            if (!is_milestone(next)) continue;
            double error = error_of(y + r * DIM, x + r * DIM);
            worst = error > worst ? error : worst;
        }
        if (is_milestone(next))
            printf("%llu %.3g\n", (unsigned long long)next, worst), fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv) {
    based_error e;
    based_model *m = argc == 4 ? based_open(argv[1], 0, &e) : NULL;
    based_session *s = m ? based_session_new(m, BLOCK, &e) : NULL;
    int status = 1;
    if (argc != 4) fprintf(stderr, "usage: endless CHECKPOINT TOKENS SHAPE\n");
    else if (!s) fprintf(stderr, "%s\n", e.text);
    else status = measure(s, strtoull(argv[2], NULL, 10), argv[3]);
    based_session_free(s);
    based_close(m);
    return status;
}
