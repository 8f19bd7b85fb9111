/* model.h - a small model with every mixer, made in memory, for the tests that include based.c:
 * they need no other file.
 */
#ifndef MODEL_H
#define MODEL_H

#include "tests/test.h"

enum { VOCAB = 37, MODEL_ROOM = 1 << 20 };

static uint64_t random_state = 1;

static inline uint32_t random_u32(void) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

/* The n low bytes of value, little-endian. */
static inline void put_little(unsigned char *to, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = (unsigned char)(value >> (8 * i) & 255);
}

static inline void *block_of(size_t n) {
    void *owned;                                        /* the process ends soon */
    return aligned(n, &owned);
}

static const based_config small = {
    .format = BASED_FORMAT, .byte_order = BASED_BYTE_ORDER, .flags = BASED_TIED, .dim = 12,
    .layers = 4, .vocab = VOCAB, .rows = VOCAB, .final_norm = BASED_NORM_RMS,
    .final_norm_eps = 1e-5f
};

static const based_layer layers[] = {
    { .mixer = BASED_CONV, .norm1 = BASED_NORM_RMS, .norm1_eps = 1e-5f, .heads = 1,
      .head_dim_v = 12, .conv_width = 4 },
    { .mixer = BASED_TAYLOR, .norm1 = BASED_NORM_RMS, .norm1_eps = 1e-5f, .heads = 4, .kv_heads = 2,
      .head_dim_k = 4, .head_dim_v = 5, .chunk = 6, .degree = 2, .normalizer_eps = 1e-6f,
      .scale = 0.5f, .rope_pairs = 2, .flags = BASED_SHIFT },
    { .mixer = BASED_WINDOW, .norm1 = BASED_NORM_RMS, .norm1_eps = 1e-5f, .heads = 2, .kv_heads = 1,
      .head_dim_k = 4, .head_dim_v = 6, .window = 9, .scale = 0.5f, .rope_pairs = 2 },
    { .mixer = BASED_TAYLOR, .norm1 = BASED_NORM_RMS, .norm1_eps = 1e-5f, .heads = 1, .kv_heads = 1,
      .head_dim_k = 3, .head_dim_v = 7, .chunk = 1, .degree = 3, .normalizer_eps = 1e-6f,
      .scale = 0.6f, .mlp = BASED_SWIGLU, .hidden_dim = 9 }
};

struct wish {
    uint64_t seed;
    float constant;                     /* coefficient of s^0; 0: zero keys count for nothing */
    uint32_t input;                     /* 0, or the width of vectors */
    uint32_t dtype;                     /* of all matrices */
    uint32_t window;                    /* of the last layer, whose keys then have a mean */
    uint32_t kernel;                    /* of the last layer; HEDGEHOG needs a window */
};

/* Random bits make good weights, but no good scales. */
static inline void set_scales(unsigned char *bytes, const struct matrix *a) {
    if (!a->scales) return;
    size_t at = (size_t)((const unsigned char *)a->scales - bytes);
    for (size_t i = 0; i < (a->rows + 15) / 16 * groups(a->cols, bits_of(a->dtype)) * 8; i++) {
        uint32_t two = 0x3b003b00u + (random_u32() & 0x007f007fu);
        memcpy(bytes + at + 4 * i, &two, 4);
    }
}

/* The bytes of the checkpoint are those at based_model_config, as many as file_size says. */
static inline based_model *make_model(struct wish wish) {
    unsigned char *bytes = block_of(MODEL_ROOM);
    void *memory = block_of(MODEL_ROOM);
    based_config *c = (based_config *)(void *)bytes;
    based_layer *l = (based_layer *)(void *)(c + 1);
    struct reader reader = { .bytes = bytes, .size = MODEL_ROOM };
    based_model *m = memory;
    based_error e;
    uint64_t sum;
    memset(bytes, 0, MODEL_ROOM), memset(memory, 0, MODEL_ROOM);
    *c = small;
    memcpy(c->magic, BASED_MAGIC, 8);
    memcpy(l, layers, sizeof layers);
    c->embedding_dtype = c->head_dtype = wish.dtype;
    for (uint32_t i = 0; i < c->layers; i++) {
        l[i].in_dtype = l[i].out_dtype = wish.dtype;
        if (l[i].mlp) l[i].up_dtype = l[i].down_dtype = wish.dtype;
    }
    if (wish.window)
        l[3].window = wish.window, l[3].normalizer_eps = 0.0f, l[3].flags |= BASED_KEY_MEAN;
    l[3].kernel = wish.kernel;
    if (wish.input) c->input = wish.input, c->flags = BASED_INPUT_PROJECTION;
    m->c = c;
    m->k = choose_kernels(0);
    bind_weights(&reader, m, m->layer);
    CHECK(!reader.short_of_bytes && reader.at < MODEL_ROOM);
    random_state = wish.seed;
    for (uint64_t at = align64(sizeof *c + sizeof layers); at < reader.at; at += 4) {
        float x = ((float)random_u32() / 1073741824.0f - 1.0f) * 0.5f;
        memcpy(bytes + at, &x, 4);
    }
    set_scales(bytes, &m->embedding), set_scales(bytes, &m->head);
    for (uint32_t i = 0; i < c->layers; i++) {
        const struct matrix *all[] = { &m->layer[i].in, &m->layer[i].out, &m->layer[i].up,
                                       &m->layer[i].down };
        for (size_t a = 0; a < COUNT(all); a++) set_scales(bytes, all[a]);
        for (size_t h = 0; m->layer[i].taylor.c.coefficients && h < layers[i].heads; h++) {
            float series[] = { wish.constant, 1.0f, 0.5f, 0.1666667f };
            size_t n = layers[i].degree + 1,
                at = (size_t)((const unsigned char *)m->layer[i].taylor.c.coefficients - bytes);
            memcpy(bytes + at + h * n * sizeof(float), series, n * sizeof(float));
        }
    }
    c->file_size[0] = (uint32_t)reader.at;
    sum = based_checksum(bytes + 32, (size_t)reader.at - 32);
    c->checksum[0] = (uint32_t)sum, c->checksum[1] = (uint32_t)(sum >> 32);
    if (based_model_init(&m, memory, MODEL_ROOM, bytes, (size_t)reader.at, 0, &e)) {
        printf("%s\n", e.text);
        exit(1);
    }
    return m;
}

#endif
