/* test_refusals.c - what cannot be is refused with a line that says what was found and what was
 * expected: headers, sampler values, kinds of attention, files. And what only a machine of the
 * other byte order does, done here to see it undone.
 */
#define _POSIX_C_SOURCE 200809L  /* as based.c, which is not the first to include something here */
#define _DEFAULT_SOURCE 1
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>

/* The compiler checks the arguments of every error line in based.c, as it does for printf: a wrong
 * one does not compile here. printf's %llu is an unsigned long long, so that is what uint64_t must
 * be while based.c is read; on many machines it is an unsigned long, like size_t. */
#ifdef __GNUC__
#include <float.h>
#include <math.h>
#define uint64_t unsigned long long
#include "based.h"
static int fail(based_error *e, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
#pragma GCC diagnostic error "-Wformat"
#pragma GCC diagnostic error "-Wformat-extra-args"
#endif

#include "based.c"

#include "tests/model.h"

static based_error e;

#define REFUSED(call, expected, words)                                                             \
    do {                                                                                           \
        e.status = 0, e.text[0] = 0;                                                               \
        CHECK((call) == (expected) && e.status == (expected));                                     \
        if (!strstr(e.text, words)) printf("\"%s\" does not say \"%s\"\n", e.text, words);         \
        CHECK(strstr(e.text, words) != NULL && !strchr(e.text, '\n'));                             \
    } while (0)

/* ---- error lines ---- */

static void test_lines(void) {
    char expected[300], too_long[300];
    const uint64_t least = 0, most = UINT64_MAX;
    fail(&e, BASED_EIO, "%s: %d %d %d, %u %u, %zu %zu, %llu %llu%s", "numbers", INT32_MIN, 0,
         INT32_MAX, 0u, UINT32_MAX, (size_t)0, SIZE_MAX, least, most, "");
    CHECK_EQUAL(e.status, BASED_EIO);
    snprintf(expected, sizeof expected, "numbers: %d 0 %d, 0 %u, 0 %zu, 0 %llu", INT32_MIN,
             INT32_MAX, UINT32_MAX, SIZE_MAX, (unsigned long long)most);
    CHECK_TEXT(e.text, expected);
    memset(too_long, 'x', sizeof too_long);
    too_long[sizeof too_long - 1] = 0;
    for (size_t n = sizeof e.text - 3; n < sizeof e.text + 3; n++) {
        const char *text = too_long + sizeof too_long - 1 - n;
        CHECK(fail(&e, BASED_EINVAL, "%s%u", text, 12345u) == BASED_EINVAL);
        size_t digits = n < sizeof e.text - 1 ? sizeof e.text - 1 - n : 0;
        CHECK(strlen(e.text) == sizeof e.text - 1
              && strspn(e.text, "x") == sizeof e.text - 1 - digits);
        CHECK(strncmp(e.text + sizeof e.text - 1 - digits, "12345", digits) == 0);
    }
    CHECK(fail(NULL, BASED_ENOMEM, "%s", "nobody reads this") == BASED_ENOMEM);
}

/* ---- headers ---- */

static int opens(const void *bytes, size_t n) {
    static based_model *m;
    static void *memory;
    if (!memory) memory = block_of(MODEL_ROOM);
    return based_model_init(&m, memory, MODEL_ROOM, bytes, n, BASED_NO_CHECKSUM, &e);
}

/* The least and the largest value of each word: of the header, and of a layer by its mixer. */
struct range { uint32_t low, high; };
#define HEADER(name, low, high) { #name, offsetof(based_config, name), { low, high } }
#define LAYER(name, ...) { #name, offsetof(based_layer, name), { __VA_ARGS__ } }
#define SAME(high) { 0, high }, { 0, high }, { 0, high }, { 0, high }

static const struct { const char *name; size_t at; struct range range; } header_words[] = {
    HEADER(flags, 0, 31), HEADER(dim, 1, BASED_MAX_DIM), HEADER(layers, 1, BASED_MAX_LAYERS),
    HEADER(vocab, 0, BASED_MAX_VOCAB), HEADER(rows, VOCAB, BASED_MAX_VOCAB),
    HEADER(input, 0, BASED_MAX_DIM), HEADER(embedding_dtype, 0, BASED_Q4),
    HEADER(head_dtype, 0, BASED_Q4), HEADER(final_norm, 0, BASED_NORM_L2),
    HEADER(prefix, 0, BASED_MAX_BLOCK)
};

/* The taylor layer is the last one of model.h, which has one head and an MLP. */
enum { HIDDEN = BASED_MAX_HIDDEN, HALF = HIDDEN / 2, WINDOW = BASED_MAX_WINDOW,
       HEADS = BASED_MAX_HEADS, MAX_CONV = BASED_MAX_CONV_WIDTH };
static const struct { const char *name; size_t at; struct range range[4]; } layer_words[] = {
    /*                none      conv             taylor                   window */
    LAYER(mixer,      SAME(BASED_WINDOW)),
    LAYER(flags,      SAME(8191)),
    LAYER(norm1,      SAME(BASED_NORM_L2)),
    LAYER(norm2,      SAME(BASED_NORM_L2)),
    LAYER(heads,      { 0, 0 }, { 1, 1 },        { 1, HEADS },            { 1, HEADS }),
    LAYER(kv_heads,   { 0, 0 }, { 0, 0 },        { 1, 1 },                { 1, 2 }),
    LAYER(head_dim_k, { 0, 0 }, { 0, 0 },        { 1, HIDDEN },           { 1, HALF }),
    LAYER(head_dim_v, { 0, 0 }, { 1, HIDDEN },   { 1, HIDDEN },           { 1, HALF }),
    LAYER(conv_width, { 0, 0 }, { 1, MAX_CONV }, { 0, 0 },                { 0, 0 }),
    LAYER(window,     { 0, 0 }, { 0, 0 },        { 0, WINDOW },           { 1, WINDOW }),
    LAYER(chunk,      { 0, 0 }, { 0, 0 },        { 1, BASED_MAX_CHUNK },  { 0, 0 }),
    LAYER(degree,     { 0, 0 }, { 0, 0 },        { 1, BASED_MAX_DEGREE }, { 0, 0 }),
    LAYER(kernel,     { 0, 0 }, { 0, 0 },        { 0, BASED_HEDGEHOG },   { 0, 0 }),
    LAYER(normalizer, { 0, 0 }, { 0, 0 },        { 0, BASED_ONE },        { 0, 0 }),
    LAYER(rope_pairs, { 0, 0 }, { 0, 0 },        { 0, 1 },                { 0, 2 }),
    LAYER(mlp,        SAME(BASED_GELU_TANH)),
    LAYER(hidden_dim, { 0, 0 }, { 0, 0 },        { 1, HIDDEN },           { 0, 0 }),
    LAYER(in_dtype,   SAME(BASED_Q4)),
    LAYER(out_dtype,  SAME(BASED_Q4)),
    LAYER(up_dtype,   SAME(BASED_Q4)),
    LAYER(down_dtype, SAME(BASED_Q4)),
    LAYER(sinks,      { 0, 0 }, { 0, 0 },        { 0, WINDOW },           { 0, 0 }),
    LAYER(fading,     { 0, 0 }, { 0, 0 },        { 0, BASED_FIXED },      { 0, 0 })
};

/* A word at and beyond both ends of its range, and at 0, 1 and what has the highest bits: outside,
 * the line names it and says both ends; inside, whatever else is wrong with the file, it is not
 * this word. */
static void try_word(unsigned char *bytes, size_t n, size_t at, const char *where, const char *name,
                     struct range r) {
    const uint32_t values[] = { 0, 1, r.low - 1, r.low, r.high, r.high + 1, 0x80000000u,
                                0xffffffffu };
    uint32_t kept;
    char named[100], ends[50];
    memcpy(&kept, bytes + at, 4);
    for (size_t i = 0; i < COUNT(values); i++) {
        int inside = values[i] >= r.low && values[i] <= r.high;
        memcpy(bytes + at, &values[i], 4);
        snprintf(named, sizeof named, "%s: %s is %u, expected", where, name, (unsigned)values[i]);
        snprintf(ends, sizeof ends, " expected %u to %u;", (unsigned)r.low, (unsigned)r.high);
        e.text[0] = 0;
        int status = opens(bytes, n), told = strncmp(e.text, named, strlen(named)) == 0;
        CHECK_EACH(status == 0
                   || (e.status == status && strlen(e.text) > 10 && !strchr(e.text, '\n')));
        if (told == inside)
            printf("%s: %s = %u: \"%s\"\n", where, name, (unsigned)values[i], e.text);
        CHECK(inside ? !told : status == BASED_EFORMAT && told && strstr(e.text, ends) != NULL);
    }
    memcpy(bytes + at, &kept, 4);
}

static void test_ranges(void) {
    static const uint32_t at_layer[4] = { 0, 0, 3, 2 };    /* of each mixer */
    const based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    unsigned char *bytes = block_of(MODEL_ROOM);
    const size_t n = m->c->file_size[0];
    memcpy(bytes, m->c, n);
    for (size_t i = 0; i < COUNT(header_words); i++)
        try_word(bytes, n, header_words[i].at, "header 0", header_words[i].name,
                 header_words[i].range);
    for (uint32_t mixer = BASED_MIXER_NONE; mixer <= BASED_WINDOW; mixer++) {
        size_t layer = sizeof(based_config) + at_layer[mixer] * sizeof(based_layer);
        char where[20];
        snprintf(where, sizeof where, "layer %u", (unsigned)at_layer[mixer]);
        memcpy(bytes, m->c, n);
        if (mixer == BASED_MIXER_NONE) memset(bytes + layer, 0, sizeof(based_layer));
        for (size_t i = 0; i < COUNT(layer_words); i++)
            try_word(bytes, n, layer + layer_words[i].at, where, layer_words[i].name,
                     layer_words[i].range[mixer]);
    }
}

/* The words of which only one value is right, and the floats, of which most are. */
static void test_other_words(void) {
    const based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    const size_t n = m->c->file_size[0], conv = sizeof(based_config),
        window = conv + 2 * sizeof(based_layer),
        last = conv + 3 * sizeof(based_layer);
    static const uint32_t no_numbers[] = { 0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc00000u,
                                           0x7f800001u, 0xffffffffu };
    const struct { size_t at; const char *says; } floats[] = {
        { offsetof(based_config, final_norm_eps), "final_norm_eps is not a number" },
        { last + offsetof(based_layer, norm1_eps), "layer 3: norm1_eps, norm2_eps or scale" },
        { last + offsetof(based_layer, norm2_eps), "layer 3: norm1_eps, norm2_eps or scale" },
        { last + offsetof(based_layer, normalizer_eps), "layer 3: scale or normalizer_eps" },
        { last + offsetof(based_layer, scale), "layer 3: scale or normalizer_eps" },
        { last + offsetof(based_layer, decay), "layer 3: decay is not a number from 0 to below 1" },
        { window + offsetof(based_layer, scale),
          "layer 2: norm1_eps, norm2_eps or scale is not a number" },
        { window + offsetof(based_layer, normalizer_eps),
          "layer 2: only taylor layers have a key mean, decay or normalizer_eps, expected 0" },
        { conv + offsetof(based_layer, scale),
          "layer 0: norm1_eps, norm2_eps or scale is not a number" },
        { conv + offsetof(based_layer, normalizer_eps),
          "layer 0: only taylor layers have a key mean, decay or normalizer_eps, expected 0" },
        { conv + offsetof(based_layer, decay),
          "layer 0: only taylor layers have a key mean, decay or normalizer_eps, expected 0" }
    };
    unsigned char *bytes = block_of(MODEL_ROOM);
    based_config *c = (based_config *)(void *)bytes;
    memcpy(bytes, m->c, n);
    for (size_t i = 0; i < COUNT(floats); i++)
        for (size_t k = 0; k < COUNT(no_numbers); k++) {
            memcpy(bytes + floats[i].at, &no_numbers[k], 4);
            REFUSED(opens(bytes, n), BASED_EFORMAT, floats[i].says);
            memcpy(bytes + floats[i].at, (const unsigned char *)m->c + floats[i].at, 4);
        }
    for (size_t i = 0; i < 8; i++) {
        bytes[i] ^= 0x20;
        REFUSED(opens(bytes, n), BASED_EFORMAT, "not a based checkpoint");
        bytes[i] ^= 0x20;
    }
    const uint32_t formats[] = { 0, BASED_FORMAT - 1, BASED_FORMAT + 1, BASED_FORMAT << 24,
                                 0xffffffffu };
    for (size_t i = 0; i < COUNT(formats); i++) {
        c->format = formats[i];
        REFUSED(opens(bytes, n), BASED_EFORMAT, "this program reads format 2");
    }
    c->format = BASED_FORMAT;
    const uint32_t orders[] = { 0, 0x01020305u, 0x02010403u, 0x03040102u, 0xffffffffu };
    for (size_t i = 0; i < COUNT(orders); i++) {
        c->byte_order = orders[i];
        REFUSED(opens(bytes, n), BASED_EFORMAT, "the byte-order mark is damaged");
    }
    c->byte_order = 0x04030201u;
    REFUSED(opens(bytes, n), BASED_EINVAL, "based_to_native");
    c->byte_order = BASED_BYTE_ORDER;
    for (size_t i = 0; i < COUNT(c->reserved); i++) {
        c->reserved[i] = 1;
        REFUSED(opens(bytes, n), BASED_EFORMAT, "header 0: a reserved field is 1, expected 0");
        c->reserved[i] = 0;
    }
    uint32_t *reserved = ((based_layer *)(void *)(bytes + last))->reserved;
    for (size_t i = 0; i < COUNT(m->layer[0].c->reserved); i++) {
        reserved[i] = 0x80000000u;
        REFUSED(opens(bytes, n), BASED_EFORMAT,
                "layer 3: a reserved field is 2147483648, expected 0");
        reserved[i] = 0;
    }
    CHECK(opens(bytes, n) == 0);
    based_layer *taylor = (based_layer *)(void *)(bytes + last);
    taylor->kernel = BASED_HEDGEHOG, taylor->degree = 0;
    REFUSED(opens(bytes, n), BASED_EFORMAT, "degree is 0, expected 1 to");
    taylor->degree = BASED_MAX_HIDDEN + 1;
    REFUSED(opens(bytes, n), BASED_EFORMAT, "degree is 1048577, expected 0 to");
    taylor->degree = 1, taylor->normalizer = BASED_CLAMP;
    REFUSED(opens(bytes, n), BASED_EFORMAT, "normalizer 0");
    taylor->normalizer = BASED_ADD, taylor->normalizer_eps = 1.0f;
    REFUSED(opens(bytes, n), BASED_EFORMAT, "normalizer_eps 0");
    taylor->normalizer_eps = 0.0f, taylor->fading = BASED_GATED;
    REFUSED(opens(bytes, n), BASED_EFORMAT, "another kernel");
}

/* Files as long as their header says, but not as it means: cut at every byte, and longer; a section
 * that swallows others. */
static void test_sizes(void) {
    const based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    const size_t n = m->c->file_size[0], header = sizeof(based_config) + 4 * sizeof(based_layer);
    unsigned char *bytes = block_of(MODEL_ROOM);
    based_config *c = (based_config *)(void *)bytes;
    memcpy(bytes, m->c, n);
    for (size_t cut = sizeof *c; cut < n; cut++) {
        c->file_size[0] = (uint32_t)cut;
        CHECK_EACH(opens(bytes, cut) == BASED_EFORMAT);
        const char *says = cut < header ? "too few for 4 layers" : "header describes more than the";
        CHECK_EACH(strstr(e.text, says));
    }
    for (size_t more = 1; more <= 130; more++) {
        c->file_size[0] = (uint32_t)(n + more);
        CHECK_EACH(opens(bytes, n + more) == BASED_EFORMAT
                   && strstr(e.text, "the header describes less than the"));
    }
    const uint32_t sizes[][2] = { { 0, 0 }, { (uint32_t)n - 1, 0 }, { (uint32_t)n + 1, 0 },
                                  { (uint32_t)n, 1 }, { (uint32_t)n, 0x80000000u },
                                  { 0xffffffffu, 0xffffffffu } };
    for (size_t i = 0; i < COUNT(sizes); i++) {
        memcpy(c->file_size, sizes[i], sizeof sizes[i]);
        REFUSED(opens(bytes, n), BASED_EFORMAT, "was the file cut off?");
    }
    memcpy(bytes, m->c, sizeof *c);
    const uint32_t tokenizers[] = { 1, 64, (uint32_t)(n - header), (uint32_t)n, 0x7fffffffu,
                                    0xffffffc1u, 0xffffffffu };
    for (size_t i = 0; i < COUNT(tokenizers); i++) {
        c->tokenizer_bytes = tokenizers[i];
        REFUSED(opens(bytes, n), BASED_EFORMAT, "the header describes more than the");
    }
}

/* All dimensions at their maxima together: sizes are sums of products of up to three of them, and
 * none of it overflows. Counted once more in doubles. */
static void test_largest(void) {
    enum { LAYERS = BASED_MAX_LAYERS, BYTES = sizeof(based_config) + LAYERS * sizeof(based_layer) };
    const double dim = BASED_MAX_DIM, inner = BASED_MAX_HIDDEN, heads = BASED_MAX_HEADS,
        width = BASED_MAX_HIDDEN / heads, features = 1 + width + width * (width + 1) / 2,
        kept = 2.0 * BASED_MAX_WINDOW + BASED_MAX_CHUNK, row = width + 1;
    const struct { based_layer layer; double weights, state; } table[] = {
        { { .mixer = BASED_CONV, .heads = 1, .head_dim_v = BASED_MAX_HIDDEN,
            .conv_width = BASED_MAX_CONV_WIDTH },
          3 * inner * dim + BASED_MAX_CONV_WIDTH * inner, (BASED_MAX_CONV_WIDTH - 1) * inner },
        { { .mixer = BASED_WINDOW, .window = BASED_MAX_WINDOW }, 4 * inner * dim,
          BASED_MAX_WINDOW * 2 * inner },
        { { .mixer = BASED_TAYLOR, .degree = 2, .window = BASED_MAX_WINDOW,
            .sinks = BASED_MAX_WINDOW, .chunk = BASED_MAX_CHUNK },
          4 * inner * dim, heads * (features * (row + 1 + floor(row / 2)) + kept * 2 * width) }
    };
    unsigned char *bytes = block_of(BYTES);
    based_model *m = block_of(MODEL_ROOM);
    based_config *c = (based_config *)(void *)bytes;
    for (size_t i = 0; i < COUNT(table) && SIZE_MAX > UINT32_MAX; i++) {
        based_layer l = table[i].layer;
        if (l.mixer != BASED_CONV) {
            l.heads = l.kv_heads = BASED_MAX_HEADS;
            l.head_dim_k = l.head_dim_v = BASED_MAX_HIDDEN / BASED_MAX_HEADS;
        }
        l.mlp = BASED_SWIGLU, l.hidden_dim = BASED_MAX_HIDDEN;
        *c = small;
        memcpy(c->magic, BASED_MAGIC, 8);
        c->file_size[0] = BYTES, c->flags = 0;
        c->dim = BASED_MAX_DIM, c->layers = LAYERS, c->vocab = c->rows = BASED_MAX_VOCAB;
        for (size_t k = 0; k < LAYERS; k++) memcpy(bytes + sizeof *c + k * sizeof l, &l, sizeof l);
        size_t need = sizeof *m + LAYERS * sizeof *m->layer;
        size_t tables = l.mixer == BASED_TAYLOR ? LAYERS * (size_t)features * 4 : 0;
        CHECK_EQUAL(based_model_bytes(bytes, BYTES, &e), need + tables);
        if (tables) REFUSED(opens(bytes, BYTES), BASED_ENOMEM, "are needed");
        else REFUSED(opens(bytes, BYTES), BASED_EFORMAT, "the header describes more than the");
        struct reader reader = { .bytes = bytes, .size = UINT64_MAX / 4 };
        memset(m, 0, MODEL_ROOM);
        m->c = c, m->k = choose_kernels(0);
        bind_weights(&reader, m, m->layer);
        double weights = LAYERS * (table[i].weights + 3 * inner * dim)
            + 2.0 * BASED_MAX_VOCAB * dim;
        CHECK(!reader.short_of_bytes && fabs((double)reader.at / (4 * weights) - 1) < 1e-4);
        CHECK(fabs((double)m->parameters / weights - 1) < 1e-4);
        CHECK(fabs((double)m->state / (LAYERS * table[i].state) - 1) < 1e-9);
    }
}

/* A field of the header or of a layer (counted from 1) gets a value; the rest stays right. */
static void test_headers(void) {
    const based_model *tokens = make_model((struct wish){ .seed = 1, .constant = 1 });
    const based_model *vectors = make_model((struct wish){ .seed = 2, .constant = 1, .input = 6 });
    const struct {
        const based_model *m;
        uint32_t layer;
        size_t at;
        uint32_t value;
        const char *says;
    } table[] = {
        { tokens, 0, offsetof(based_config, flags), 32, "flags is 32, expected 0 to 31" },
        { tokens, 0, offsetof(based_config, flags), BASED_TIED | BASED_SAMPLING,
          "repeat_penalty must be" },
        { tokens, 0, offsetof(based_config, top_k), 40, "settings without the flag SAMPLING" },
        { vectors, 0, offsetof(based_config, prefix), 1, "prefix is 1, expected 0 to 0" },
        { tokens, 1, offsetof(based_layer, flags), BASED_QK_NORM, "only attention has norms" },
        { tokens, 2, offsetof(based_layer, flags), BASED_PREFIX, "a prefix needs a taylor layer" },
        { tokens, 2, offsetof(based_layer, flags), BASED_VALUE_GATES | BASED_VALUE_FACTORS,
          "exclude each other" },
        { tokens, 2, offsetof(based_layer, fading), BASED_GATED, "more than" },
        { tokens, 0, offsetof(based_config, flags), BASED_TIED | BASED_INPUT_PROJECTION,
          "projection without input vectors" },
        { tokens, 0, offsetof(based_config, head_dtype), BASED_Q8, "tied head" },
        { tokens, 0, offsetof(based_config, name) + 60, 0x61616161u, "not terminated" },
        { tokens, 0, offsetof(based_config, final_norm_eps), 0x7fc00000u, "final_norm_eps" },
        { tokens, 0, offsetof(based_config, layers), BASED_MAX_LAYERS, "too few for 1024 layers" },
        { tokens, 0, offsetof(based_config, dim), 13, "there are" },
        { vectors, 0, offsetof(based_config, flags), 0, "width 6 without a projection to dim 12" },
        { vectors, 0, offsetof(based_config, input), 0, "projection without input vectors" },
        { tokens, 1, offsetof(based_layer, norm1_eps), 0x7f800000u, "norm1_eps" },
        { tokens, 1, offsetof(based_layer, flags), BASED_NO_OUT, "less than" },
        { tokens, 1, offsetof(based_layer, flags), BASED_KEY_MEAN, "only taylor layers" },
        { tokens, 2, offsetof(based_layer, window), 4, "layer 1: a window beside the sums needs" },
        { tokens, 1, offsetof(based_layer, conv_width), 0, "conv_width is 0, expected 1 to 64" },
        { tokens, 1, offsetof(based_layer, head_dim_v), BASED_MAX_HIDDEN, "more than" },
        { tokens, 2, offsetof(based_layer, flags), BASED_NO_OUT,
          "no out projection, but its width is 20 and dim is 12" },
        { tokens, 2, offsetof(based_layer, kv_heads), 3, "4 heads cannot share 3" },
        { tokens, 2, offsetof(based_layer, head_dim_k), 6000, "more than 16777216 features" },
        { tokens, 2, offsetof(based_layer, degree), BASED_MAX_DEGREE + 1,
          "degree is 13, expected 1 to 12" },
        { tokens, 3, offsetof(based_layer, window), BASED_MAX_WINDOW + 1, "window is 1048577" },
        { tokens, 4, offsetof(based_layer, hidden_dim), 0, "hidden_dim is 0" },
        { tokens, 1, offsetof(based_layer, scale), 0x3f800000u,
          "layer 0: only attention has a scale, expected 0" },
        { tokens, 1, offsetof(based_layer, normalizer_eps), 1, "layer 0: only taylor layers" },
        { tokens, 3, offsetof(based_layer, normalizer_eps), 1, "layer 2: only taylor layers" }
    };
    unsigned char *bytes = block_of(MODEL_ROOM);
    for (size_t i = 0; i < COUNT(table); i++) {
        size_t n = table[i].m->c->file_size[0];
        size_t at = table[i].at + (table[i].layer ? sizeof(based_config)
                                   + (table[i].layer - 1) * sizeof(based_layer) : 0);
        memcpy(bytes, table[i].m->c, n);
        CHECK(opens(bytes, n) == 0);
        memcpy(bytes + at, &table[i].value, 4);
        REFUSED(opens(bytes, n), BASED_EFORMAT, table[i].says);
    }
    memcpy(bytes, tokens->c, sizeof(based_config));
    ((based_config *)(void *)bytes)->rows = ((based_config *)(void *)bytes)->vocab = 0;
    REFUSED(opens(bytes, tokens->c->file_size[0]), BASED_EFORMAT, "neither an embedding");
    REFUSED(opens(NULL, 1000), BASED_EINVAL, "aligned to 64");
    REFUSED(opens(bytes + 4, 1000), BASED_EINVAL, "aligned to 64");
}

/* ---- sampling ---- */

static void test_samplers(void) {
    static uint64_t memory[100];
    const based_sampler good = { .temperature = 1, .top_p = 1, .repeat_penalty = 1, .vocab = 20 };
    based_sampler bad[11];
    for (size_t i = 0; i < COUNT(bad); i++) bad[i] = good;
    bad[0].temperature = -1, bad[1].temperature = INFINITY, bad[2].top_p = 1.5f, bad[3].top_p = -1,
        bad[4].min_p = NAN;
    bad[5].min_p = 2, bad[6].repeat_penalty = 0, bad[7].repeat_penalty = INFINITY;
    bad[8].vocab = 0, bad[9].vocab = BASED_MAX_VOCAB + 1,
        bad[10].repeat_last_n = BASED_MAX_VOCAB + 1;
    for (size_t i = 0; i < COUNT(bad); i++) {
        const char *says = i < 2 ? "temperature" : i < 6 ? "top_p and min_p"
                           : i < 8 ? "repeat_penalty" : i < 10 ? "needs 1 to"
                           : "repeat_last_n";
        REFUSED(based_sampler_init(&bad[i], memory, sizeof memory, &e), BASED_EINVAL, says);
    }
    based_sampler s = good;
    REFUSED(based_sampler_init(&s, NULL, sizeof memory, &e), BASED_ENOMEM, "aligned to 8");
    REFUSED(based_sampler_init(&s, (char *)memory + 4, 700, &e), BASED_ENOMEM, "aligned to 8");
    REFUSED(based_sampler_init(&s, memory, based_sampler_bytes(&s) - 1, &e), BASED_ENOMEM,
            "needs 160 bytes");
    CHECK(based_sampler_init(&s, memory, sizeof memory, NULL) == 0);
    based_sampler_accept(&s, 3);                        /* a sampler that remembers nothing */
    CHECK(based_sampler_recent(&s, NULL) == 0 && s.seen == 1);
}

/* Tokens that are none, numbers that are none: nothing is read outside, and NaN is never chosen. */
static void test_odd_logits(void) {
    static uint64_t memory[100];
    based_sampler s = { .temperature = 1, .top_p = 1, .repeat_penalty = 2, .repeat_last_n = 3,
                        .vocab = 4 };
    float logits[4] = { NAN, 1, NAN, 1 }, none[4] = { NAN, NAN, NAN, NAN };
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == 0);
    based_sampler_accept(&s, -7), based_sampler_accept(&s, 4), based_sampler_accept(&s, 0);
    for (int i = 0; i < 50; i++) CHECK_EACH(based_sample(&s, logits) % 2 == 1);
    CHECK(based_sample(&s, none) == 0);
    s.repeat_penalty = 1;
    CHECK(based_sample(&s, logits) % 2 == 1);
}

/* ---- attention by itself ---- */

static void test_attentions(void) {
    const based_taylor_config good = { .head_dim_k = 4, .head_dim_v = 4, .group = 1, .degree = 2,
                                       .chunk = 4, .scale = 0.5f };
    based_taylor_config k = good;
    based_taylor_sizes sizes;
    based_taylor *t = NULL;
    k.head_dim_k = 0;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "head_dim_k is 0, expected 1 to");
    k.head_dim_k = BASED_MAX_HIDDEN + 1;
    REFUSED(based_taylor_init(&t, &k, NULL, 0, &e), BASED_EINVAL, "head_dim_k is 1048577");
    k = good, k.kernel = BASED_HEDGEHOG;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "kernel is 2, expected 0 to 1");
    k = good, k.scale = NAN;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "not a number");
    k = good, k.normalizer_eps = INFINITY;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "not a number");
    k = good, k.head_dim_k = 10000;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_ENOMEM, "a state needs");
    k.head_dim_k = BASED_MAX_HIDDEN, k.degree = 12;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_ENOMEM, "more than");
    CHECK(based_taylor_measure(&sizes, &k, NULL) == BASED_ENOMEM);
    CHECK(based_taylor_measure(&sizes, &good, &e) == 0);
    void *memory = block_of(sizes.attention + 64);
    REFUSED(based_taylor_init(&t, &good, memory, sizes.attention - 1, &e), BASED_ENOMEM,
            "are needed");
    REFUSED(based_taylor_init(&t, &good, (char *)memory + 8, sizes.attention, &e), BASED_EINVAL,
            "aligned to 64");
    REFUSED(based_taylor_init(&t, &good, NULL, sizes.attention, &e), BASED_EINVAL, "aligned to 64");
}

/* ---- files ---- */

static void test_files(void) {
    char path[] = "/tmp/based-XXXXXX", deep[600];
    FILE *out = fdopen(mkstemp(path), "wb");
    CHECK(out && fclose(out) == 0);
    CHECK(based_open(path, 0, &e) == NULL && e.status == BASED_EFORMAT
          && strstr(e.text, "the file is empty"));
    remove(path);
    CHECK(based_open(path, 0, &e) == NULL && e.status == BASED_EIO
          && based_open(path, 0, NULL) == NULL);
    CHECK(based_open("/tmp", 0, &e) == NULL && e.status == BASED_EIO);
    CHECK_TEXT(e.text, "/tmp: Is a directory");
    CHECK(based_open("/dev/null", 0, &e) == NULL && e.status == BASED_EFORMAT);
    CHECK_TEXT(e.text, "/dev/null: the file is empty");
    /* a pipe that stays open: no more is read than the header, which is none */
    CHECK(mkfifo(path, 0600) == 0 && (out = fopen(path, "r+b")) != NULL);
    for (size_t i = 0; out && i < sizeof(based_config); i++) CHECK_EACH(fputc('B', out) == 'B');
    CHECK(fflush(out) == 0 && based_open(path, 0, &e) == NULL && e.status == BASED_EFORMAT
          && strstr(e.text, "not a based checkpoint"));
    CHECK(fclose(out) == 0 && remove(path) == 0);
    CHECK(based_open("tests/test.h", 0, &e) == NULL && e.status == BASED_EFORMAT
          && strncmp(e.text, "tests/test.h: ", 14) == 0);
    CHECK(based_open("tests/test.h", 0, NULL) == NULL);
    memset(deep, 'a', sizeof deep);
    deep[sizeof deep - 1] = 0;                          /* a name longer than an error line */
    CHECK(based_open(deep, 0, &e) == NULL && e.status == BASED_EIO
          && strlen(e.text) == sizeof e.text - 1);
    based_close(NULL);
    based_session_free(NULL);
}

/* ---- what does nothing, and says so ---- */

static void test_nothing_to_do(void) {
    const based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    based_session *s = based_session_new(m, 4, &e), *small_block = based_session_new(m, 1, &e),
        *two[2] = { small_block, s };
    size_t tokenizer_bytes = 1;
    int32_t ids[2] = { 1, 2 };
    CHECK(based_model_tokenizer(m, &tokenizer_bytes) == NULL && tokenizer_bytes == 0);
    CHECK(based_feed(s, NULL, 0, NULL, &e) == 0 && based_count(s) == 0 && based_logits(s) == NULL);
    CHECK(based_step_many(NULL, NULL, 0, &e) == 0 && based_copy(s, s, &e) == 0);
    REFUSED(based_step_many(two, ids, 2, &e), BASED_EINVAL, "the first was made for blocks of 1");
    REFUSED((int)based_feed_draft(s, NULL, 0, NULL, NULL, &e), BASED_EINVAL,
            "a draft of no tokens");
    REFUSED(based_keep(s, 1, &e), BASED_EINVAL, "1 tokens to keep of a draft of 0");
    CHECK(based_step(s, 99, NULL) == BASED_EINVAL);
    CHECK(based_model_config(m) == m->c && based_model_layer(m, 3)->degree == 3
          && based_model_layer(m, 4) == NULL);
    CHECK(based_model_weight_bytes(m) > 1000 && based_model_parameters(m) > 300
          && based_model_kernels(m)[0]);
    CHECK(based_threads(s) == 1);
    based_set_threads(s, 0);                            /* too small a model for more than one */
    CHECK(based_threads(s) == 1);
    based_set_threads(s, -3);
    CHECK(based_threads(s) == 1);
    based_set_threads(s, 2);
#ifdef _OPENMP
    CHECK(based_threads(s) == 2);
#else
    CHECK(based_threads(s) == 1);
#endif
    based_session_free(s), based_session_free(small_block);
}

/* ---- the other byte order ---- */

/* As another machine would have written it: every word of 4 bytes is reversed, but not the text. */
static void reverse(unsigned char *p, size_t from, size_t to) {
    for (size_t i = from; i + 4 <= to; i += 4) {
        const unsigned char word[4] = { p[i], p[i + 1], p[i + 2], p[i + 3] };
        for (size_t b = 0; b < 4; b++) p[i + b] = word[3 - b];
    }
}

/* A checkpoint of the other byte order becomes what it was: without a tokenizer, and with one of 3
 * words and some text. */
static void test_swapping(void) {
    const based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    const size_t n = m->c->file_size[0], header = sizeof(based_config) + 4 * sizeof(based_layer),
        name = offsetof(based_config, name);
    unsigned char *bytes = block_of(MODEL_ROOM), *copy = block_of(MODEL_ROOM),
        odd[7] = { 1, 2, 3, 4, 5, 6, 7 };
    uint32_t words[5] = { 3, 0x01020304u, 0x05060708u, 0x09090909u, 0 };
    swap_bytes(odd, 1, 4);
    CHECK(memcmp(odd, "\4\3\2\1\5\6\7", 7) == 0);
    swap_bytes(odd, 3, 2);
    CHECK(memcmp(odd, "\3\4\1\2\6\5\7", 7) == 0);
    for (uint32_t tokenizer = 0; tokenizer <= 20; tokenizer++) {
        size_t room = tokenizer ? 64 : 0, size = n + room;
        CHECK(header % 64 == 0 && header + 4 <= n);
        memcpy(bytes, m->c, header);
        ((based_config *)(void *)bytes)->tokenizer_bytes = tokenizer;
        memset(bytes + header, 0, room);
        memcpy(bytes + header, words, tokenizer);
        memcpy(bytes + header + room, (const unsigned char *)m->c + header, n - header);
        memcpy(copy, bytes, size);
        reverse(copy, 8, name), reverse(copy, name + 64, header);
        if (tokenizer >= 12) reverse(copy, header, header + 12);
        else if (tokenizer >= 4) reverse(copy, header, header + 4);
        reverse(copy, header + room, size);
        if (tokenizer && tokenizer < 12)
            REFUSED(swap_checkpoint(copy, size, &e), BASED_EFORMAT, "tokenizer section");
        else CHECK(swap_checkpoint(copy, size, &e) == 0 && memcmp(copy, bytes, size) == 0);
    }
    /* no words at all; and headers that describe more than there is */
    memcpy(copy, bytes, n);
    memset(copy + header, 0, 64);
    reverse(copy, 8, name), reverse(copy, name + 64, header);
    REFUSED(swap_checkpoint(copy, n, &e), BASED_EFORMAT, "tokenizer section");
    const struct { size_t at; uint32_t value; } more[] = {
        { offsetof(based_config, layers), BASED_MAX_LAYERS },
        { offsetof(based_config, layers), BASED_MAX_LAYERS + 1 },
        { offsetof(based_config, layers), 0xffffffffu },
        { offsetof(based_config, tokenizer_bytes), (uint32_t)(n - header) + 1 },
        { offsetof(based_config, tokenizer_bytes), 0xffffffffu }
    };
    for (size_t i = 0; i < COUNT(more); i++) {
        memcpy(copy, m->c, n);
        memcpy(copy + more[i].at, &more[i].value, 4);
        reverse(copy, 8, name), reverse(copy, name + 64, header);
        REFUSED(swap_checkpoint(copy, n, &e), BASED_EFORMAT, "the header describes more than the");
    }
    memset(copy, 0, n);
    /* nothing to do here, or too short to be ours */
    CHECK(based_to_native(copy, 160, 0, &e) == 0);
}

/* ---- kernels by wish ---- */

static void test_wishes(void) {
    CHECK(setenv("BASED_KERNELS", "plain", 1) == 0 && kernel_flags() == BASED_PLAIN);
    CHECK(setenv("BASED_KERNELS", "avx2", 1) == 0 && kernel_flags() == BASED_AVX2);
    CHECK(setenv("BASED_KERNELS", "avx512vnni", 1) == 0 && kernel_flags() == BASED_AVX512);
    CHECK(setenv("BASED_KERNELS", "anything else", 1) == 0 && kernel_flags() == 0);
    CHECK(unsetenv("BASED_KERNELS") == 0 && kernel_flags() == 0);
    CHECK(choose_kernels(BASED_PLAIN) == &generic_kernels);
}

int main(void) {
    test_lines();
    test_ranges();
    test_other_words();
    test_sizes();
    test_largest();
    test_headers();
    test_samplers();
    test_odd_logits();
    test_attentions();
    test_files();
    test_nothing_to_do();
    test_swapping();
    test_wishes();
    return test_end();
}
