/* test_based.c - unit tests of based.c: arithmetic, kernels, mixers, the file reader, caller-owned
 * memory, sampling. Whole models are compared with a float64 reference in test_golden.py and
 * test_random.py.
 */
#include "based.c"

#include "tests/test.h"

static uint64_t random_state = 1;

static uint32_t random_u32(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

static float random_float(void) { return (float)random_u32() / 1073741824.0f - 1.0f; }

static void fill(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = random_float();
}

/* ---- arithmetic ---- */

static void test_functions(void) {
    double worst_exp = 0, worst_gelu = 0, worst_silu = 0, worst_turn = 0;
    for (int i = -869990; i <= 880000; i++) {
        double x = (double)((float)i / 10000.0f), e = exp(x),
               error = fabs(exp_approx((float)x) - e) / e;
        if (error > worst_exp) worst_exp = error;
    }
    for (int i = -100000; i <= 100000; i++) {
        double x = (double)((float)i / 10000.0f), s = x / (1 + exp(-x)),
               g = x * 0.5 * erfc(-x / sqrt(2.0));
        worst_silu = fmax(worst_silu, fabs(silu((float)x) - s) / (1 + fabs(x)));
        worst_gelu = fmax(worst_gelu, fabs(gelu((float)x) - g) / (1 + fabs(x)));
    }
    for (int i = 0; i < 100000; i++) {
        uint64_t turn = (uint64_t)random_u32() << 33 ^ random_u32();
        double angle = (double)turn / 18446744073709551616.0 * 6.283185307179586, error;
        float c, s;
        sincos_turns(turn, &c, &s);
        error = fabs(c - cos(angle)) + fabs(s - sin(angle));
        if (error > worst_turn) worst_turn = error;
    }
    CHECK(worst_exp < 1.5e-7);
    CHECK(worst_silu < 2e-7);
    CHECK(worst_gelu < 2e-7);
    CHECK(worst_turn < 2.5e-7);
    CHECK(exp_approx(-1000.0f) == 0.0f && exp_approx(0.0f) == 1.0f);
    CHECK(exp_approx(1000.0f) == exp_approx(88.0f));
    CHECK(exp_approx(NAN) != exp_approx(NAN));
    CHECK(silu(-1e30f) <= 0.0f && silu(-1e30f) > -1e-6f);
    float c, s;
    for (uint64_t quarter = 0; quarter < 4; quarter++) {
        sincos_turns(quarter << 62, &c, &s);
        CHECK(c == (quarter == 0 ? 1.0f : quarter == 2 ? -1.0f : 0.0f));
        CHECK(s == (quarter == 1 ? 1.0f : quarter == 3 ? -1.0f : 0.0f));
    }
}

static void test_sums(void) {
    float a[100], b[100];
    fill(a, 100);
    fill(b, 100);
    for (size_t n = 0; n <= 100; n++) {
        double exact = 0, total = 0;
        for (size_t i = 0; i < n; i++) exact += (double)a[i] * b[i], total += a[i];
        CHECK(fabs(dot(a, b, n) - exact) < 1e-5);
        CHECK(fabs(sum(a, n) - total) < 1e-5);
    }
    for (size_t n = 1; n <= 32; n++) {      /* the order of sixteen lanes and a tree, spelled out */
        float lane[16] = { 0 };
        for (size_t i = 0; i < n; i++) lane[i % 16] += a[i];
        for (size_t l = 0; l < 8; l++) lane[l] += lane[l + 8];
        for (size_t l = 0; l < 4; l++) lane[l] += lane[l + 4];
        CHECK(sum(a, n) == (lane[0] + lane[2]) + (lane[1] + lane[3]));
    }
}

static void test_norms(void) {
    float x[30], w[30], b[30], y[30];
    fill(x, 30), fill(w, 30), fill(b, 30);
    for (uint32_t kind = BASED_NORM_NONE; kind <= BASED_NORM_L2; kind++) {
        struct norm n = { w, kind == BASED_NORM_LAYER ? b : NULL, kind, 1e-5f };
        double mean = 0, squares = 0, worst = 0;
        for (int i = 0; i < 30 && kind == BASED_NORM_LAYER; i++) mean += x[i] / 30.0;
        for (int i = 0; i < 30; i++) squares += (x[i] - mean) * (x[i] - mean);
        double scale = kind == BASED_NORM_L2 ? sqrt(30.0) / sqrt(squares)
                                             : 1 / sqrt(squares / 30 + 1e-5);
        normalize(y, x, &n, 30);
        for (int i = 0; i < 30; i++) {
            double expected = kind == BASED_NORM_NONE ? x[i] : (x[i] - mean) * scale * w[i];
            if (kind == BASED_NORM_LAYER) expected += b[i];
            worst = fmax(worst, fabs(y[i] - expected));
        }
        CHECK(worst < 1e-6);
    }
}

/* ---- kernels: every instruction set gives the bits of the plain one ---- */

/* n vectors in packs, the last of which is not full; more groups than an AMX panel holds, and an
 * odd number of them with COLS columns: there, the last group of 64 is half a one, and nothing lies
 * behind its weights. */
static void test_kernels_agree(const struct kernels *k, size_t n, size_t cols) {
    enum { COLS = 1180, STORED = 1184, MOST = 37, WIDEST = 1216, N = 43, ROWS = 16, PACKED = 48 };
    static float x[N * COLS], w[ROWS * COLS], a[N * ROWS], b[N * ROWS], scale[2][PACKED * MOST];
    static int8_t q[2][PACKED * WIDEST];
    static int32_t offset[2][PACKED * MOST];
    static uint32_t words[STORED * 4], scales[MOST * 8];
    const struct kernels *plain = &generic_kernels;
    fill(x, COUNT(x)), fill(w, COUNT(w));
    for (size_t i = 0; i < COUNT(words); i++) words[i] = random_u32() ^ random_u32() << 7;
    words[3] = 0x0101ff01u;
    for (size_t i = 0; i < COUNT(scales); i++)
        scales[i] = 0x3c003c10u + (random_u32() & 0x00ff00ffu);
    if (k->mm->begin) k->mm->begin(n);
    for (int bits = 8; bits >= 4; bits -= 4) {
        size_t many = groups(cols, bits);
        struct activations one = { x, q[0], scale[0], offset[0], n, cols, many, pack_of(n), bits };
        struct activations two = { x, q[1], scale[1], offset[1], n, cols, many, pack_of(n), bits };
        plain->mm->quantize(&one, 0, n * many);
        k->mm->quantize(&two, 0, 5), k->mm->quantize(&two, 5, n * many);
        CHECK(memcmp(q[0], q[1], sizeof q[0]) == 0
              && memcmp(scale[0], scale[1], sizeof scale[0]) == 0);
        CHECK(memcmp(offset[0], offset[1], sizeof offset[0]) == 0);
        for (size_t from = 0; from <= 2; from += 2) {
            plain->mm->tile[bits == 4](a, ROWS, scales, words, &one, from, n);
            k->mm->tile[bits == 4](b, ROWS, scales, words, &one, from, n);
            CHECK(memcmp(a, b, sizeof a) == 0);
        }
    }
    if (k->mm->end) k->mm->end();
    for (size_t rows = 1; rows <= ROWS; rows++) {
        struct activations as_they_are = { .x = x, .n = n, .cols = COLS };
        plain->mm->rows_f32(a, ROWS, w, rows, &as_they_are),
            k->mm->rows_f32(b, ROWS, w, rows, &as_they_are);
        CHECK(memcmp(a, b, sizeof a) == 0);
    }
    for (size_t width = 1; width <= 200; width++) {
        plain->weighted_sum(a, x, w, ROWS, width, COLS),
            k->weighted_sum(b, x, w, ROWS, width, COLS);
        CHECK(memcmp(a, b, width * sizeof *a) == 0);
    }
    memcpy(a, x, sizeof a), memcpy(b, x, sizeof b);
    float top[2] = { -FLT_MAX, -FLT_MAX }, p = plain->softmax_exp(a, 100, 3.0f, &top[0]),
          s = k->softmax_exp(b, 100, 3.0f, &top[1]);
    CHECK(p == s && memcmp(a, b, sizeof a) == 0);
    plain->silu_mul(a, x, w, 101), k->silu_mul(b, x, w, 101);
    CHECK(memcmp(a, b, 101 * sizeof *a) == 0);
    plain->mul_add(a, x, w, 101), k->mul_add(b, x, w, 101);
    CHECK(memcmp(a, b, 101 * sizeof *a) == 0);
    memset(a, 0, sizeof a), memset(b, 0, sizeof b);   /* sums, and from 32 on their compensation */
    for (size_t width = 1; width <= 32; width++)
        for (size_t i = 0; i < 8; i++) {
            plain->compensated_add(a, a + 32, x + 32 * i, width),
                k->compensated_add(b, b + 32, x + 32 * i, width);
            CHECK(memcmp(a, b, 48 * sizeof *a) == 0);
        }
}

/* Fusing an addition with the multiplication before it must not show, neither where products are
 * all but too small nor where they are all but too large to be exact. */
static void test_extreme_scales(const struct kernels *k, uint32_t scale, float size, int bits) {
    enum { N = 17, GROUPS = 3, WIDEST = 64, PACKED = 32 };
    static float x[N * GROUPS * WIDEST], a[N * 16], b[N * 16], x_scale[PACKED * GROUPS];
    static int8_t q[PACKED * GROUPS * WIDEST];
    static int32_t offset[PACKED * GROUPS];
    static uint32_t words[GROUPS * WIDEST * 4], scales[GROUPS * 8];
    struct activations act =
        { x, q, x_scale, offset, N, GROUPS * group_width(bits), GROUPS, 16, bits };
    fill(x, COUNT(x));
    for (size_t i = 0; i < COUNT(x); i++) x[i] *= size;
    for (size_t i = 0; i < COUNT(words); i++) words[i] = random_u32() ^ random_u32() << 7;
    for (size_t i = 0; i < COUNT(scales); i++) scales[i] = scale | scale << 16;
    generic_kernels.mm->quantize(&act, 0, N * GROUPS);
    if (k->mm->begin) k->mm->begin(N);
    generic_kernels.mm->tile[bits == 4](a, 16, scales, words, &act, 0, N);
    k->mm->tile[bits == 4](b, 16, scales, words, &act, 0, N);
    if (k->mm->end) k->mm->end();
    CHECK(memcmp(a, b, sizeof a) == 0 && a[0] == a[0] && fabsf(a[0]) <= FLT_MAX);
}

/* The weight in row r and column i of a block of `bits`, as part 7 of based.h says. */
static double weight_of(const uint32_t *words, size_t r, size_t i, int bits) {
    if (bits == 8)
        return (double)(words[i / 64 * 256 + 16 * (i % 64 / 4) + r] >> (i % 4 * 8) & 255) - 128;
    const uint32_t *word = words + i / 32 * 64 + r;
    size_t c = i % 32 / 4;
    return (double)(word[16 * (c / 2)] >> (i % 4 * 8 + c % 2 * 4) & 15) - 8;
}

/* The quantized products against the definition in doubles. */
static void test_quantised_definition(int bits) {
    static float x[128], y[16];
    static int8_t q[128];
    static uint32_t words[512], scales[32];
    float scale[4];
    int32_t offset[4];
    size_t width = bits == 8 ? 64 : 32;
    struct activations a = { x, q, scale, offset, 1, 110, 128 / width, 1, bits };
    fill(x, 128);
    for (size_t i = 0; i < COUNT(words); i++) words[i] = random_u32() ^ random_u32() << 9;
    /* rows 2i: 0.5, rows 2i + 1: 1 */
    for (size_t i = 0; i < COUNT(scales); i++) scales[i] = 0x3f803f00u;
    generic_kernels.mm->quantize(&a, 0, a.groups);
    CHECK(q[110] == 0 && q[127] == 0);
    for (size_t i = 0; i < 110; i++) {
        double step = (double)scale[i / width];
        CHECK_EACH(fabs(q[i] * step - (double)x[i]) <= step * 0.5000001);
    }
    generic_kernels.mm->tile[bits == 4](y, 16, scales, words, &a, 0, 1);
    for (size_t r = 0; r < 16; r++) {
        double expected = 0;
        for (size_t i = 0; i < 128; i++)
            expected += weight_of(words, r, i, bits) * (r % 2 ? 1.0 : 0.5) * q[i]
                        * (double)scale[i / width];
        CHECK(fabs(y[r] - expected) < 1e-3);
    }
}

/* A NaN stays one, whatever its bits are, which no standard says; an infinity counts as a large
 * number. */
/* The definition in based.h, a word at a time, against the loop that compilers vectorize. */
static void test_checksum(const struct kernels *k) {
    unsigned char bytes[300];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)(i * i * 37 >> 3);
    for (size_t n = 0; n <= sizeof bytes; n++) {
        uint32_t lane[16];
        uint64_t sum = n;
        for (uint32_t l = 0; l < 16; l++) lane[l] = l + 1;
        for (size_t at = 0; at < n; at += 4) {
            uint32_t word = 0;
            for (size_t i = at; i < n && i < at + 4; i++)
                word |= (uint32_t)bytes[i] << 8 * (i - at);
            lane[at / 4 % 16] = lane[at / 4 % 16] * 0x9e3779b1u + word;
        }
        for (size_t l = 0; l < 16; l++) {
            sum = (sum ^ lane[l]) * 0x9e3779b97f4a7c15u;
            sum ^= sum >> 32;
        }
        CHECK(k->mm->checksum(bytes, n) == sum);
    }
}

static void test_quantised_nan(const struct kernels *k) {
    static float x[128], y[16];
    static int8_t q[128];
    static uint32_t words[512], scales[16];
    float scale[2];
    int32_t offset[2];
    struct activations a = { x, q, scale, offset, 1, 128, 2, 1, 8 };
    const uint32_t none[] = { 0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff800001u };
    for (size_t i = 0; i < 16; i++) scales[i] = 0x3f803f80u;
    for (size_t i = 0; i < COUNT(none); i++) {
        fill(x, 128);
        memcpy(&x[80], &none[i], 4);
        k->mm->quantize(&a, 0, 2);
        k->mm->tile[0](y, 16, scales, words, &a, 0, 1);
        CHECK(scale[0] == scale[0] && scale[1] != scale[1] && y[0] != y[0] && y[15] != y[15]);
    }
    x[80] = (float)INFINITY;
    k->mm->quantize(&a, 0, 2);
    CHECK(scale[1] == 0x1p84f && q[80] == 127 && q[81] == 0);
    x[80] = -0x1.fcp20f;                /* 127/64 of a power of two just fits */
    k->mm->quantize(&a, 0, 2);
    CHECK(scale[1] == 0x1p14f && q[80] == -127);
    x[80] = 0x1.fc0002p20f;
    k->mm->quantize(&a, 0, 2);
    CHECK(scale[1] == 0x1p15f && q[80] == 64);
    x[80] = 0.0f;
    for (size_t i = 64; i < 128; i++) x[i] *= 1e-20f;
    k->mm->quantize(&a, 0, 2);
    CHECK(scale[1] == 0x1p-56f && q[80] == 0 && q[81] == 0);
}

/* ---- the Taylor features ---- */

static void test_features(void) {
    static float phi[200000], multinomial[200000], x[64];
    for (uint32_t width = 1; width <= 8; width++)
        for (uint32_t degree = 1; degree <= 5; degree++) {
            based_taylor_config c = { .head_dim_k = width, .degree = degree };
            float k[8], q[8], s = 0;
            double got = 0, expected = 0, power = 1, factorial = 1;
            size_t f = 0, n = (size_t)count_features(&c, BASED_MAX_FEATURES);
            fill(q, width), fill(k, width);
            for (uint32_t i = 0; i < width; i++) {    /* three vectors at once: k, q, and k again */
                x[i * 3] = x[i * 3 + 2] = k[i];
                x[i * 3 + 1] = q[i];
                s += q[i] * k[i];
            }
            feature_map(phi, x, 3, 3, &c);
            fill_multinomials(multinomial, &c);
            for (uint32_t p = 0; p <= degree; p++) {
                size_t many = (size_t)monomials(width, p, BASED_MAX_FEATURES);
                double total = 0, part = 0;
                if (p) power *= s, factorial *= p;
                for (size_t end = f + many; f < end; f++) {
                    part += (double)multinomial[f] * phi[3 * f] * phi[3 * f + 1];
                    total += multinomial[f];
                    CHECK_EACH(phi[3 * f] == phi[3 * f + 2]);
                }
                CHECK_EACH(fabs(part - power) < 1e-4 * (1 + fabs(power)));
                CHECK_EACH(total == pow(width, p));             /* all p-tuples are accounted for */
                got += part / factorial;
                expected += power / factorial;
            }
            CHECK(f == n);
            CHECK(fabs(got - expected) < 1e-4 * (1 + fabs(expected)));
        }
    based_taylor_config widest = { .head_dim_k = 16, .degree = 2 },
                        deep = { .head_dim_k = 4, .degree = 12 };
    CHECK(count_features(&widest, BASED_MAX_FEATURES) == 153);
    CHECK(count_features(&deep, BASED_MAX_FEATURES) == 1820);
}

/* ---- files ---- */

/* 64-byte aligned: the checkpoint, and room to spoil a copy */
static unsigned char *file_bytes, *scratch;
static size_t file_size;
static void *model_memory;

static unsigned char *aligned_block(size_t n) {
    void *owned;
    return aligned(n, &owned);
}

static void load_stories(void) {
    struct file f = { 0 };
    based_error e;
    int status = load_file(&f, "models/stories260K.bin", &e);
    if (status) printf("%s (run the tests from the top folder)\n", e.text);
    CHECK(status == 0);
    file_size = f.size;
    file_bytes = aligned_block(f.size);
    scratch = aligned_block(f.size);
    memcpy(file_bytes, f.bytes, f.size);
    model_memory = aligned_block(1 << 20);
    close_file(&f);
    CHECK(based_to_native(file_bytes, file_size, 0, &e) == 0);
}

static int opens(const unsigned char *bytes, size_t size, int flags, based_error *e) {
    based_model *m = NULL;
    int status;
    e->text[0] = 0;
    status = based_model_init(&m, model_memory, 1 << 20, bytes, size, flags, e);
    CHECK_EACH((status == 0) == (m != NULL));
    CHECK_EACH(status == 0
               || (e->status == status && strlen(e->text) > 10 && !strchr(e->text, '\n')));
    return status;
}

static void test_truncation(void) {
    based_error e;
    CHECK(opens(file_bytes, file_size, 0, &e) == 0);
    for (size_t n = 0; n < file_size; n = n < 4096 ? n + 1 : n + 997)
        CHECK_EACH(opens(file_bytes, n, BASED_NO_CHECKSUM, &e) == BASED_EFORMAT);
    CHECK(opens(file_bytes, file_size - 1, 0, &e) == BASED_EFORMAT);
    CHECK_TEXT(e.text + strlen(e.text) - 21, "was the file cut off?");
}

/* Every single-bit flip of header and layers is refused, by the checksum or, with it switched off,
 * by a check or by the sizes; what may pass without the checksum must be harmless: notes, names,
 * scales. */
static void test_bit_flips(void) {
    size_t header = sizeof(based_config) + 5 * sizeof(based_layer);
    based_error e;
    unsigned long passed = 0;
    memcpy(scratch, file_bytes, file_size);
    for (size_t bit = 0; bit < header * 8; bit++) {
        scratch[bit / 8] ^= (unsigned char)(1u << bit % 8);
        CHECK_EACH(opens(scratch, file_size, 0, &e) != 0);
        if (opens(scratch, file_size, BASED_NO_CHECKSUM, &e) == 0) passed++;
        scratch[bit / 8] ^= (unsigned char)(1u << bit % 8);
    }
    for (size_t at = header; at < file_size; at += 1013) {   /* and anywhere else by the checksum */
        scratch[at] ^= 0x10;
        CHECK_EACH(opens(scratch, file_size, 0, &e) == BASED_ECHECKSUM);
        scratch[at] ^= 0x10;
    }
    CHECK(passed < header * 8);
}

/* Each 32-bit field of header and layers at the values where readers break: never a crash, and
 * sizes must still add up. */
static void test_extreme_fields(void) {
    static const uint32_t values[] = { 0, 1, 2, 255, 65535, 65536, 65537, 1u << 20, (1u << 20) + 1,
                                       1u << 24, 0x7fffffff,
                                       0x80000000u, 0xfffffffeu, 0xffffffffu, 0x7f800000u,
                                           0x7fc00000u };
    size_t header = sizeof(based_config) + 5 * sizeof(based_layer);
    based_error e;
    memcpy(scratch, file_bytes, file_size);
    for (size_t at = 8; at < header; at += 4)
        for (size_t i = 0; i < COUNT(values); i++) {
            memcpy(scratch + at, &values[i], 4);
            opens(scratch, file_size, BASED_NO_CHECKSUM, &e);
            memcpy(scratch + at, file_bytes + at, 4);
        }
    struct { size_t at; uint32_t value; const char *says; } table[] = {
        { offsetof(based_config, magic), 0, "not a based checkpoint" },
        { offsetof(based_config, format), 1, "checkpoint format 1" },
        { offsetof(based_config, byte_order), 0x04030201u, "other byte order" },
        { offsetof(based_config, dim), 0, "dim is 0, expected 1 to 65536" },
        { offsetof(based_config, vocab), 600, "rows is 512, expected 600" },
        { offsetof(based_config, layers), 6, "the checkpoint is damaged" },
        { offsetof(based_config, embedding_dtype), 77, "embedding_dtype is 77" },
        { sizeof(based_config) + offsetof(based_layer, kv_heads), 3, "cannot share" },
        { sizeof(based_config) + offsetof(based_layer, scale), 0x7fc00000u, "not a number" },
        { sizeof(based_config) + offsetof(based_layer, mixer), 9, "layer 0: mixer is 9" },
        { sizeof(based_config) + offsetof(based_layer, window), 0, "window is 0, expected 1" },
        { sizeof(based_config) + offsetof(based_layer, mixer), BASED_MIXER_NONE,
          "layer 0: heads is 8, expected 0 to 0" },
        { offsetof(based_config, reserved), 1, "header 0: a reserved field is 1" },
        { sizeof(based_config) + sizeof(based_layer) - 4, 7, "layer 0: a reserved field is 7" }
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        memcpy(scratch + table[i].at, &table[i].value, 4);
        int status = opens(scratch, file_size, BASED_NO_CHECKSUM, &e);
        if (!strstr(e.text, table[i].says))
            printf("\"%s\" does not say \"%s\"\n", e.text, table[i].says);
        CHECK(status != 0 && strstr(e.text, table[i].says) != NULL);
        memcpy(scratch + table[i].at, file_bytes + table[i].at, 4);
    }
    CHECK(opens(scratch, file_size, 0, &e) == 0);
}

/* Every float and every scale counts, and the message says where the first one is that is no
 * number. */
static void test_check_weights(void) {
    static const struct { const char *says; uint32_t bits; } bad[] = {
        { "embedding: 1 of the 32768 numbers are NaN", 0x7fc00000u },
        { "layer 0, in: 1 of the 8192 numbers", 0xff800000u },
        { "layer 4, down: 1 of the 11008 numbers", 0x7f800001u },
        { "final_norm: 1 of the 64 numbers", 0x7f800000u }
    };
    based_error e;
    based_model *m = NULL;
    memcpy(scratch, file_bytes, file_size);
    CHECK(based_model_init(&m, model_memory, 1 << 20, scratch, file_size, 0, &e) == 0);
    CHECK(based_check_weights(m, &e) == BASED_OK);
    const float *places[] = {
        m->embedding.data + 77, m->layer[0].in.data + 8191, m->layer[4].down.data,
            m->final_norm.weight + 1
    };
    uint32_t kept;
    for (size_t i = 0; i < COUNT(bad); i++) {
        size_t at = (size_t)((const unsigned char *)places[i] - scratch);
        memcpy(&kept, scratch + at, 4), memcpy(scratch + at, &bad[i].bits, 4);
        CHECK(based_check_weights(m, &e) == BASED_EFORMAT);
        if (!strstr(e.text, bad[i].says))
            printf("\"%s\" does not say \"%s\"\n", e.text, bad[i].says);
        CHECK(strstr(e.text, bad[i].says) != NULL && strstr(e.text, ", 1 in all") != NULL);
        memcpy(scratch + at, &kept, 4);
    }
    for (size_t at = (size_t)((const unsigned char *)m->embedding.data - scratch), i = 0; i < 3;
         i++)
        memcpy(scratch + at + 4 * i, &bad[0].bits, 4);
    memcpy(scratch + ((const unsigned char *)m->layer[2].norm2.weight - scratch), &bad[1].bits, 4);
    CHECK(based_check_weights(m, &e) == BASED_EFORMAT);
    CHECK_TEXT(e.text, "embedding: 3 of the 32768 numbers are NaN or infinite, 4 in all; export "
               "the model again, or train it again");
}

static void test_bad_scales(void) {
    static const uint32_t good[] = { 0, 0x8000, 0x3f80, 0xbf80, 0x1680, 0x497f, 0xc97f };
    static const uint32_t bad[] =
        { 0x7f80, 0xff80, 0x7fc0, 0x0001, 0x8001, 0x167f, 0x967f, 0x4980, 0xc980 };
    for (size_t i = 0; i < COUNT(good); i++)
        CHECK(!is_bad_scale(good[i]) && !is_bad_scale(0x7fff0000u | good[i]));
    for (size_t i = 0; i < COUNT(bad); i++)
        CHECK(is_bad_scale(bad[i]) && is_bad_scale(0x3f800000u | bad[i]));
}

/* The largest sums that the maxima allow are more than 32 bits can count. */
static void test_session_beyond_addresses(void) {
    enum { HEADER = sizeof(based_config) + sizeof(based_layer) };
    unsigned char *header = aligned_block(HEADER);
    based_config *c = (based_config *)(void *)header;
    based_layer *l = (based_layer *)(void *)(c + 1);
    based_error e = { 0, "" };
    *c = (based_config){ .format = BASED_FORMAT, .byte_order = BASED_BYTE_ORDER, .dim = 1,
                         .layers = 1, .rows = 1, .vocab = 1, .file_size = { HEADER } };
    *l = (based_layer){ .mixer = BASED_TAYLOR, .heads = 1, .kv_heads = 1, .head_dim_k = 12,
                        .head_dim_v = BASED_MAX_HIDDEN, .chunk = 1, .degree = 12 };
    memcpy(c->magic, BASED_MAGIC, 8);
    size_t need = based_model_bytes(header, HEADER, &e);
    if (SIZE_MAX > UINT32_MAX)
        CHECK(need > 4 * 2704156);
    else
        CHECK(need == 0 && e.status == BASED_ENOMEM
              && strstr(e.text, "more than this machine can address"));
    l->head_dim_k = 13;
    CHECK(based_model_bytes(header, HEADER, &e) > 0 || e.status == BASED_ENOMEM);
    l->head_dim_k = 20;
    CHECK(based_model_bytes(header, HEADER, &e) == 0 && e.status == BASED_EFORMAT);
    CHECK(strstr(e.text, "more than 16777216 features") != NULL);
}

/* ---- sessions ---- */

static const int32_t text[] =
    { 1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401 };

static void test_caller_memory(void) {
    based_error e;
    based_model *m = NULL;
    based_session *s = NULL, *same = NULL;
    size_t need = based_model_bytes(file_bytes, file_size, &e), session;
    unsigned char *memory, *session_memory;
    CHECK(need > 0 && need < 4096);
    memory = aligned_block(need + 64);
    memset(memory + need, 0xA5, 64);
    CHECK(based_model_init(&m, memory, need - 1, file_bytes, file_size, 0, &e) == BASED_ENOMEM);
    CHECK(based_model_init(&m, memory + 4, need, file_bytes, file_size, 0, &e) == BASED_EINVAL);
    CHECK(based_model_init(&m, memory, need, file_bytes, file_size, 0, &e) == 0);
    session = based_session_bytes(m, 7);
    CHECK(based_session_bytes(m, 0) == 0 && based_session_bytes(m, BASED_MAX_BLOCK + 1) == 0);
    session_memory = aligned_block(session + 64);
    memset(session_memory, 0x5A, session + 64);       /* a session must not rely on zeroed memory */
    CHECK(based_session_init(&s, m, session_memory, session - 1, 7, &e) == BASED_ENOMEM
          && s == NULL);
    CHECK(based_session_init(&s, m, session_memory, session, 7, &e) == 0);
    same = based_session_new(m, 7, &e);
    CHECK(based_logits(s) == NULL && based_count(s) == 0);
    CHECK(based_feed(s, text, COUNT(text), NULL, &e) == 0);
    for (size_t i = 0; i < COUNT(text); i++) CHECK(based_step(same, text[i], &e) == 0);
    CHECK(memcmp(based_logits(s), based_logits(same), based_width(m) * 4) == 0);
    for (int i = 0; i < 64; i++)
        CHECK_EACH(memory[need + (size_t)i] == 0xA5 && session_memory[session + (size_t)i] == 0x5A);
    based_session_free(same);
}

static void test_bad_tokens(void) {
    based_error e;
    based_model *m = based_open("models/stories260K.bin", 0, &e);
    based_session *s = based_session_new(m, 4, &e), *other = based_session_new(m, 2, &e);
    based_session *both[] = { s, other, s };
    int32_t bad[] = { 1, 2, 512 }, negative[] = { -1 };
    float before[512];
    CHECK(based_feed(s, text, 5, NULL, &e) == 0);
    memcpy(before, based_logits(s), sizeof before);
    CHECK(based_feed(s, bad, 3, NULL, &e) == BASED_EINVAL);
    CHECK_TEXT(e.text, "token 3 of 3 is 512, but the vocabulary has 512");
    CHECK(based_feed(s, negative, 1, NULL, &e) == BASED_EINVAL);
    CHECK_TEXT(e.text, "token 1 of 1 is -1, but the vocabulary has 512");
    CHECK(based_feed_vectors(s, before, 1, NULL, &e) == BASED_EINVAL);
    CHECK(based_step_many(both, text, 3, &e) == BASED_EINVAL);
    CHECK(based_step_many(both, bad + 1, 2, &e) == BASED_EINVAL);
    CHECK(based_count(s) == 5 && memcmp(before, based_logits(s), sizeof before) == 0);
    CHECK(based_feed(s, NULL, 0, NULL, &e) == 0 && based_count(s) == 5);
    based_session_free(s), based_session_free(other);
    based_close(m);
}

/* Far from the beginning: the same text fed at position t gives the same logits as at position 0,
 * once the window holds nothing else, up to the rounding of the angles. Both sides of 2^31 and
 * 2^32, and beyond. */
static void test_far_positions(void) {
    static const uint64_t places[] =
        { 2147483640u, 4294967290u, 3000000000u, 1000000000000u, (uint64_t)1 << 62 };
    based_error e;
    based_model *m = based_open("models/stories260K.bin", 0, &e);
    based_session *near = based_session_new(m, 32, &e), *far = based_session_new(m, 32, &e);
    for (size_t p = 0; p < COUNT(places); p++) {
        double worst = 0;
        based_reset(near), based_reset(far);
        near->count = 5120;              /* a full window of nothing (zero keys), as far will see */
        far->count = places[p] / 512 * 512;
        CHECK(based_feed(near, text, COUNT(text), NULL, &e) == 0
              && based_feed(far, text, COUNT(text), NULL, &e) == 0);
        for (size_t i = 0; i < 512; i++)
            worst = fmax(worst, fabs(based_logits(near)[i] - based_logits(far)[i]));
        CHECK(worst < 5e-5);
    }
    based_session_free(near), based_session_free(far);
    based_close(m);
}

/* ---- sampling ---- */

static based_sampler sampler_of(float temperature, float top_p, uint32_t top_k, float min_p,
                                uint32_t vocab) {
    based_sampler s = { .temperature = temperature, .top_p = top_p, .top_k = top_k, .min_p = min_p,
                        .repeat_penalty = 1.0f,
                        .seed = 42, .vocab = vocab };
    return s;
}

static void test_sampler(void) {
    enum { V = 8, DRAWS = 200000 };
    static uint64_t memory[64];
    static const float logits[V] = { 1.0f, 3.0f, -2.0f, 3.0f, 0.5f, NAN, 2.0f, -INFINITY };
    based_error e;
    double p[V], total = 0, counts[V] = { 0 };
    based_sampler s = sampler_of(0.0f, 1.0f, 0, 0.0f, V);
    CHECK(based_sampler_bytes(&s) <= sizeof memory);
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == 0);
    CHECK(based_sample(&s, logits) == 1);               /* the lower of two equals */
    s = sampler_of(1.0f, 1.0f, 0, 0.0f, V);
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == 0);
    for (int i = 0; i < V; i++) total += p[i] = logits[i] == logits[i] ? exp(logits[i]) : 0;
    for (int i = 0; i < DRAWS; i++) counts[based_sample(&s, logits)]++;
    for (int i = 0; i < V; i++) CHECK(fabs(counts[i] / DRAWS - p[i] / total) < 0.005);
    CHECK(counts[5] == 0 && counts[7] == 0);
    struct { float top_p; uint32_t top_k; float min_p; const char *kept; } table[] = {
        { 0.0f, 0, 0.0f, "1" }, { 0.5f, 0, 0.0f, "13" }, { 0.9f, 0, 0.0f, "136" },
        { 1.0f, 1, 0.0f, "1" }, { 1.0f, 2, 0.0f, "13" }, { 1.0f, 3, 0.0f, "136" },
        { 1.0f, 0, 0.3f, "136" },
        { 1.0f, 0, 1.0f, "13" },
        { 0.5f, 3, 0.0f, "13" }, { 1.0f, 100, 0.0f, "012346" }, { 0.3f, 3, 0.0f, "1" }
    };
    for (size_t i = 0; i < COUNT(table); i++) {
        char seen[V + 1] = { 0 }, *end = seen;
        int drawn[V] = { 0 };
        s = sampler_of(1.0f, table[i].top_p, table[i].top_k, table[i].min_p, V);
        CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == 0);
        for (int d = 0; d < 20000; d++) drawn[based_sample(&s, logits)]++;
        for (int t = 0; t < V; t++) if (drawn[t]) *end++ = (char)('0' + t);
        CHECK_TEXT(seen, table[i].kept);
    }
}

static void test_repeat_penalty(void) {
    static uint64_t memory[64];
    float logits[4] = { 2.0f, 1.9f, -1.0f, -1.1f }, none[4] = { NAN, NAN, NAN, NAN };
    based_error e;
    based_sampler s = sampler_of(0.0f, 1.0f, 0, 0.0f, 4);
    s.repeat_penalty = 1.2f;
    s.repeat_last_n = 2;
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == 0);
    CHECK(based_sample(&s, logits) == 0);
    based_sampler_accept(&s, 0), based_sampler_accept(&s, 0);
    CHECK(based_sample(&s, logits) == 1);     /* 2 / 1.2 < 1.9; twice in the text, once penalized */
    based_sampler_accept(&s, 1);
    CHECK(based_sample(&s, logits) == 0);               /* both penalized again: 1.67 > 1.58 */
    based_sampler_accept(&s, 2), based_sampler_accept(&s, 2);
    CHECK(based_sample(&s, logits) == 0);               /* 0 and 1 are forgotten */
    CHECK(based_sample(&s, none) == 0);
    s.temperature = NAN;
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == BASED_EINVAL);
    s = sampler_of(1.0f, 1.5f, 0, 0.0f, 4);
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == BASED_EINVAL);
    s = sampler_of(1.0f, 1.0f, 0, 0.0f, 4);
    CHECK(based_sampler_init(&s, memory, 8, &e) == BASED_ENOMEM);
}

static void test_log_probability(void) {
    float logits[3] = { 0.0f, logf(2.0f), 100.0f };
    CHECK(fabs(based_log_probability(logits, 2, 1) - log(2.0 / 3.0)) < 1e-6);
    CHECK(fabs(based_log_probability(logits, 3, 0) + 100.0) < 1e-5);
}

static void test_hash(void) {
    float x[2] = { 1.0f, 2.0f }, y[2] = { 2.0f, 1.0f };
    CHECK(based_hash(0, x, 2) == based_hash(based_hash(0, x, 1), x + 1, 1));
    CHECK(based_hash(0, x, 2) != based_hash(0, y, 2));
    CHECK(based_checksum("", 0) != based_checksum("\0", 1));
}

int main(void) {
    test_functions();
    test_sums();
    test_norms();
    test_quantised_definition(8);
    test_quantised_definition(4);
    static const int sets[] = { 0, BASED_AVX512, BASED_AVX2, BASED_PLAIN };
    for (size_t i = 0; i < COUNT(sets); i++)
        for (size_t n = 3; n <= 43; n += 4)
            test_kernels_agree(choose_kernels(sets[i]), n, 1180),
                test_kernels_agree(choose_kernels(sets[i]), n, 1150);
    for (size_t i = 0; i < COUNT(sets); i++) {
        test_quantised_nan(choose_kernels(sets[i]));
        test_checksum(choose_kernels(sets[i]));
    }
    for (size_t i = 0; i < COUNT(sets); i++)
        for (size_t j = 0; j < 16; j++)
            test_extreme_scales(choose_kernels(sets[i]), j & 1 ? 0x497fu : 0x1680u,
                                (const float[]){ 0x1p-80f, 0x1p-50f, 0x1p-49f, 0x1p120f }[j >> 2],
                                    j & 2 ? 8 : 4);
    test_features();
    load_stories();
    test_truncation();
    test_bit_flips();
    test_extreme_fields();
    test_check_weights();
    test_bad_scales();
    test_session_beyond_addresses();
    test_caller_memory();
    test_bad_tokens();
    test_far_positions();
    test_sampler();
    test_repeat_penalty();
    test_log_probability();
    test_hash();
    return test_end();
}
