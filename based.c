/* based.c - the whole runtime of a Based language model, in one file, to be read from top to bottom.
 *
 * A transformer remembers everything it has read, so every token costs more than the one before. A Based model
 * (Arora et al. 2024, arXiv 2402.18668) remembers an unlimited past in a fixed number of bytes, with three mixers:
 *
 *   conv     a gated short convolution: remembers the last two vectors. Local word order is its business.
 *   window   softmax attention over the last 64 or so tokens: remembers a ring of keys and values. Exact, but short.
 *   taylor   linear attention: exp(q.k) is replaced by its Taylor polynomial 1 + s + s^2/2, s = q.k/sqrt(d). A polynomial
 *            of a dot product is itself a dot product, w(q, k) = phi(q).phi(k) of vectors of monomials, so the attention
 *            over all of the past, sum_j w(q, k_j) v_j = phi(q) . sum_j phi(k_j) v_j^T, needs only that last sum, a
 *            matrix that stays the same size for ever. Vague, but infinite.
 *
 * This file owns: the checkpoint's bytes -> a model; a model and memory -> a session; tokens -> logits; logits -> a token.
 * It refuses to be: a tokenizer (tokenizer.c), a command line (run.c), a trainer (models/), or anything that prints,
 * exits, allocates while it runs, or gives other numbers on another machine. Every float operation below happens in an
 * order that the source fixes: sums run in sixteen lanes that any vector unit can hold, and exp is our own.
 *
 * Order: errors, format, arithmetic, kernels, mixers, block, feeding, state, Taylor attention by itself, sampling,
 * operating system.
 */
#if !defined(BASED_FREESTANDING) && (defined(__unix__) || defined(__APPLE__))
#define BASED_POSIX 1
#define _POSIX_C_SOURCE 200809L         /* clocks, sleep and sched_yield here, mmap at the end                   */
#define _DEFAULT_SOURCE 1               /* syscall, on Linux                                                     */
#endif
#include "based.h"

#include <math.h>                       /* sqrtf: the only one whose result IEEE 754 fixes                       */
#include <float.h>
#include <stdarg.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef BASED_POSIX
#include <sched.h>
#include <time.h>
#include <unistd.h>
#endif

/* ==== Errors =========================================================================================================
 * One line per failure. A tiny formatter instead of snprintf, so that the core needs no stdio: %s is a string, %u a
 * uint64_t; nothing else is known.
 */
static void put_char(based_error *e, size_t *at, char c) {
    if (*at + 1 < sizeof e->text) e->text[(*at)++] = c;
}

static void put_number(based_error *e, size_t *at, uint64_t value) {
    char digits[20];
    size_t n = 0;
    do digits[n++] = (char)('0' + value % 10); while (value /= 10);
    while (n) put_char(e, at, digits[--n]);
}

static int fail(based_error *e, int status, const char *format, ...) {
    va_list args;
    size_t at = 0;
    if (!e) return status;
    va_start(args, format);
    for (const char *f = format; *f; f++) {
        if (f[0] == '%' && f[1] == 'u') {
            put_number(e, &at, va_arg(args, uint64_t));
            f++;
        } else if (f[0] == '%' && f[1] == 's') {
            for (const char *s = va_arg(args, const char *); *s; s++) put_char(e, &at, *s);
            f++;
        } else {
            put_char(e, &at, *f);
        }
    }
    va_end(args);
    e->text[at] = 0;
    e->status = status;
    return status;
}

#define U64(x) ((uint64_t)(x))

/* Small enough to become part of whoever calls it, and so of every instruction set it is compiled for. */
#ifdef __GNUC__
#define BODY static inline __attribute__((always_inline))
#else
#define BODY static inline
#endif

/* ==== The checkpoint in memory =======================================================================================
 * based.h part 7 describes the bytes. Nothing is copied: a model is a table of pointers into them.
 */
struct matrix {
    const float *data;                  /* F32: (rows, cols), row after row                                      */
    const uint32_t *words, *scales;     /* Q8: see based.h                                                       */
    const float *bias;                  /* (rows) or NULL                                                        */
    uint32_t rows, cols, dtype;
};

struct norm {
    const float *weight, *bias;         /* (dim), bias NULL unless LAYER                                         */
    uint32_t kind;
    float eps;
};

struct based_taylor {                   /* a Taylor attention: immutable                                         */
    based_taylor_kind c;                /* what was asked for; coefficients (heads, degree + 1)                  */
    const struct kernels *k;            /* the instruction set                                                   */
    const float *multiplicity;          /* (features) how often each monomial occurs in (q.k)^p                  */
    uint32_t features;                  /* C(key_width + degree, degree), the constant 1 included                */
};

struct layer {
    const based_layer *c;               /* what the file says                                                    */
    struct norm norm1, norm2;           /* before the mixer, before the MLP                                      */
    struct matrix in, out;              /* of the mixer                                                          */
    struct matrix up, down;             /* of the MLP                                                            */
    struct matrix gate;                 /* (heads, dim) value gates                                              */
    const float *taps, *taps_bias;      /* (taps, channels), (channels)                                          */
    const float *key_mean;              /* (kv_heads, key_width) or NULL: taken off every key                    */
    const uint32_t *turns;              /* (rotary, 2) 64-bit fractions of a turn per token, low word first      */
    struct based_taylor taylor;         /* the attention of one key/value head, with the coefficients of all     */
    size_t state;                       /* where the layer's state begins in a session, in floats                */
    size_t shift;                       /* SHIFT: where in it the previous input is kept, (dim)                  */
};

struct based_model {
    const based_config *c;
    const struct kernels *k;            /* the instruction set                                                   */
    const void *tokenizer;              /* its section, or NULL                                                  */
    struct matrix embedding, input, head;
    struct norm final_norm;
    uint32_t widest_in, widest_mid;     /* of what in/up produce, of what out/down consume                       */
    uint32_t widest_q, most_groups;     /* columns of the widest quantised matrix, in whole groups, and the most groups */
    size_t slot;                        /* floats of scratch that one head needs                                 */
    uint32_t slots;                     /* heads that may run at the same time                                   */
    size_t state;                       /* floats of state of one session                                        */
    uint64_t parameters, weight_bytes;
    void *self, *owned, *mapped;        /* what based_close gives back                                           */
    size_t mapped_size;
    struct layer layer[];
};

/* ---- Reading: every size is derived from checked fields and compared with what is left -------------------------- */

struct cursor {
    const unsigned char *bytes;         /* NULL: only count                                                      */
    uint64_t at, size;
    int short_of_bytes;                 /* a section did not fit                                                 */
    uint64_t bad_scales;                /* scales of weights that are out of range                               */
};

/* The next section of n bytes, aligned to 64, or NULL. n < 2^58 by the maxima of based.h, so nothing overflows. */
static const void *take(struct cursor *c, uint64_t n) {
    uint64_t gap = (64 - (c->at & 63)) & 63;
    if (c->short_of_bytes || gap > c->size - c->at || n > c->size - c->at - gap) {
        c->short_of_bytes = 1;
        return NULL;
    }
    c->at += gap + n;
    return c->bytes + (c->at - n);
}

static const float *take_floats(struct cursor *c, uint64_t n) {
    return (const float *)take(c, n * sizeof(float));
}

static uint64_t two_words(const uint32_t w[2]) {
    return U64(w[1]) << 32 | w[0];
}

uint64_t based_checksum(const void *bytes, size_t n) {
    const unsigned char *p = bytes;
    uint32_t lane[16];
    uint64_t g = n;
    size_t i = 0;
    for (uint32_t l = 0; l < 16; l++) lane[l] = l + 1;
    for (; n - i >= 64; i += 64)
        for (int l = 0; l < 16; l++) {
            const unsigned char *b = p + i + 4 * l;
            uint32_t w = (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
            lane[l] = lane[l] * 0x9e3779b1u + w;
        }
    for (int l = 0; i < n; l++) {
        uint32_t w = 0;
        for (int byte = 0; byte < 4 && i < n; byte++) w |= (uint32_t)p[i++] << (8 * byte);
        lane[l] = lane[l] * 0x9e3779b1u + w;
    }
    for (int l = 0; l < 16; l++) {
        g = (g ^ lane[l]) * 0x9e3779b97f4a7c15u;
        g ^= g >> 32;
    }
    return g;
}

/* The number of monomials of degree exactly p in d variables, C(d + p - 1, p), or `cap` if it is larger. */
static uint64_t monomials(uint64_t d, uint64_t p, uint64_t cap) {
    uint64_t n = 1;
    for (uint64_t i = 1; i <= p; i++) {
        n = n * (d + i - 1) / i;        /* exact at each step: n is C(d + i - 1, i)                              */
        if (n > cap) return cap;
    }
    return n;
}

/* What a taylor layer computes for each of its key/value heads; coefficients come later. */
static based_taylor_kind kind_of(const based_layer *l) {
    based_taylor_kind t = { l->key_width, l->value_width, l->kv_heads ? l->heads / l->kv_heads : 1, l->degree, l->kernel,
                            l->normaliser, l->chunk, l->window, l->keep, l->scale, l->normaliser_eps, l->forget, NULL };
    return t;
}

/* The number of features, or something above `cap` if there are more than that. */
static uint64_t count_features(const based_taylor_kind *t, uint64_t cap) {
    uint64_t n = 1;
    if (t->kernel == BASED_DIAGONAL) return 1 + U64(t->key_width) * t->degree;
    for (uint32_t p = 1; p <= t->degree; p++) n += monomials(t->key_width, p, cap);
    return n;
}

/* Tokens that are kept as keys and values: the first ones for ever, the last ones until they join the sums. */
static size_t slots(const based_taylor_kind *t) { return (size_t)t->keep + t->window + t->chunk; }

/* Floats of the sums of one key/value head, and of the tokens that are yet to join them. */
static uint64_t sums_floats(const based_taylor_kind *t, uint64_t features) {
    uint64_t lost = t->forget > 0.0f ? 0 : (U64(t->value_width) + 1) / 2;
    return features * (U64(t->value_width) + 2 + lost) + slots(t) * (U64(t->key_width) + t->value_width);
}

static uint32_t query_width(const based_layer *l) { return l->heads * l->key_width; }
static uint32_t key_width(const based_layer *l) { return l->kv_heads * l->key_width; }
static uint32_t value_width(const based_layer *l) { return l->kv_heads * l->value_width; }
static uint32_t inner_width(const based_layer *l) { return l->heads * l->value_width; }

/* Rows of in.weight: what the mixer wants to know of each token. */
static uint32_t in_rows(const based_layer *l) {
    if (l->mixer == BASED_CONV) return 2 * l->value_width;
    return query_width(l) + key_width(l) + value_width(l);
}

/* Floats of state of one layer; the mixers below say what they are. */
static uint64_t state_floats(const based_config *c, const based_layer *l) {
    uint64_t n = l->flags & BASED_SHIFT ? c->dim : 0;
    uint64_t width = U64(key_width(l)) + value_width(l);
    if (l->mixer == BASED_CONV) n += U64(l->taps - 1) * l->value_width;
    if (l->mixer == BASED_WINDOW) n += l->window * width;
    if (l->mixer == BASED_TAYLOR) {
        based_taylor_kind kind = kind_of(l);
        n += sums_floats(&kind, count_features(&kind, BASED_MAX_FEATURES)) * l->kv_heads;
    }
    return n;
}

/* ---- Checking: a field outside its range is named, with what was expected ---------------------------------------- */

struct field { const char *name; uint32_t value, low, high; };

static int check_fields(const struct field *f, size_t n, const char *where, uint64_t layer, based_error *e) {
    for (size_t i = 0; i < n; i++) {
        if (f[i].value >= f[i].low && f[i].value <= f[i].high) continue;
        return fail(e, BASED_EFORMAT, "%s %u: %s is %u, expected %u to %u; the checkpoint is damaged or from another tool",
                    where, layer, f[i].name, U64(f[i].value), U64(f[i].low), U64(f[i].high));
    }
    return BASED_OK;
}

static int is_finite(float x) {
    return x - x == 0.0f;
}

#define FIELD(c, name, low, high) { #name, (c)->name, low, high }
#define COUNT(a) (sizeof(a) / sizeof(a)[0])

/* What this version has no name for must be zero: a later one may mean something by it. */
static int check_reserved(const uint32_t *word, size_t n, const char *where, uint64_t layer, based_error *e) {
    for (size_t i = 0; i < n; i++)
        if (word[i])
            return fail(e, BASED_EFORMAT, "%s %u: a reserved field is %u, expected 0; the checkpoint is damaged or from a "
                        "later version", where, layer, U64(word[i]));
    return BASED_OK;
}

static int check_config(const based_config *c, based_error *e) {
    const struct field fields[] = {
        FIELD(c, flags, 0, BASED_TIED | BASED_HEAD_BIAS | BASED_INPUT_PROJECTION | BASED_BIDIRECTIONAL),
        FIELD(c, dim, 1, BASED_MAX_DIM), FIELD(c, layers, 1, BASED_MAX_LAYERS),
        FIELD(c, vocab, 0, BASED_MAX_VOCAB), FIELD(c, rows, c->vocab, c->vocab ? BASED_MAX_VOCAB : 0),
        FIELD(c, input, 0, BASED_MAX_DIM), FIELD(c, final_norm, 0, BASED_NORM_L2),
        FIELD(c, embedding_dtype, 0, BASED_Q4), FIELD(c, head_dtype, 0, BASED_Q4)
    };
    int status = check_fields(fields, COUNT(fields), "header", 0, e);
    if (status) return status;
    status = check_reserved(c->reserved, COUNT(c->reserved), "header", 0, e);
    if (status) return status;
    if (c->name[63]) return fail(e, BASED_EFORMAT, "header: the name is not terminated");
    if (!is_finite(c->final_norm_eps)) return fail(e, BASED_EFORMAT, "header: final_norm_eps is not a number");
    if (c->input == 0 && c->rows == 0)
        return fail(e, BASED_EFORMAT, "header: neither an embedding (rows) nor input vectors (input)");
    if ((c->flags & BASED_TIED) && (c->input || c->head_dtype != c->embedding_dtype))
        return fail(e, BASED_EFORMAT, "header: a tied head needs an embedding of the same dtype");
    if (c->input && c->input != c->dim && !(c->flags & BASED_INPUT_PROJECTION))
        return fail(e, BASED_EFORMAT, "header: input vectors of width %u without a projection to dim %u", U64(c->input),
                    U64(c->dim));
    if (c->input == 0 && (c->flags & BASED_INPUT_PROJECTION))
        return fail(e, BASED_EFORMAT, "header: an input projection without input vectors");
    return BASED_OK;
}

/* exp(s) next to the polynomial of another kernel, or a constant added to a sum in units of its largest weight, would mean
 * nothing. */
static int window_fits(const based_taylor_kind *t) {
    return !t->window || (t->kernel == BASED_DOT && t->normaliser == BASED_ADD && t->normaliser_eps == 0.0f);
}
#define NO_WINDOW "a window beside the sums needs kernel 0, normaliser 0 and normaliser_eps 0"

static int forgets_a_part(float forget) { return forget >= 0.0f && forget < 1.0f; }
#define NOT_A_PART "forget is not a number from 0 to below 1"

static int check_attention(const based_layer *l, uint64_t i, based_error *e) {
    uint32_t taylor = l->mixer == BASED_TAYLOR;
    const struct field fields[] = {
        FIELD(l, heads, 1, BASED_MAX_HEADS), FIELD(l, kv_heads, 1, l->heads),
        FIELD(l, key_width, 1, BASED_MAX_HIDDEN / (l->heads ? l->heads : 1)),
        FIELD(l, value_width, 1, BASED_MAX_HIDDEN / (l->heads ? l->heads : 1)),
        FIELD(l, taps, 0, 0), FIELD(l, rotary, 0, l->key_width / 2),
        FIELD(l, window, !taylor, BASED_MAX_WINDOW),
        FIELD(l, chunk, taylor, taylor ? BASED_MAX_CHUNK : 0), FIELD(l, keep, 0, taylor ? BASED_MAX_WINDOW : 0),
        FIELD(l, degree, taylor, taylor ? BASED_MAX_DEGREE : 0),
        FIELD(l, kernel, 0, taylor ? BASED_DIAGONAL : 0), FIELD(l, normaliser, 0, taylor ? BASED_ONE : 0)
    };
    int status = check_fields(fields, COUNT(fields), "layer", i, e);
    if (status) return status;
    if (l->heads % l->kv_heads)
        return fail(e, BASED_EFORMAT, "layer %u: %u heads cannot share %u key/value heads evenly", i, U64(l->heads),
                    U64(l->kv_heads));
    based_taylor_kind kind = kind_of(l);
    if (taylor && count_features(&kind, BASED_MAX_FEATURES) > BASED_MAX_FEATURES)
        return fail(e, BASED_EFORMAT, "layer %u: degree %u of width %u has more than %u features", i, U64(l->degree),
                    U64(l->key_width), U64(BASED_MAX_FEATURES));
    if (taylor && !window_fits(&kind))
        return fail(e, BASED_EFORMAT, "layer %u: %s", i, NO_WINDOW);
    if (!is_finite(l->scale) || !is_finite(l->normaliser_eps))
        return fail(e, BASED_EFORMAT, "layer %u: scale or normaliser_eps is not a number", i);
    if (!forgets_a_part(l->forget)) return fail(e, BASED_EFORMAT, "layer %u: %s", i, NOT_A_PART);
    return BASED_OK;
}

static int check_conv(const based_layer *l, uint64_t i, based_error *e) {
    const struct field fields[] = {
        FIELD(l, heads, 1, 1), FIELD(l, kv_heads, 0, 0), FIELD(l, key_width, 0, 0),
        FIELD(l, value_width, 1, BASED_MAX_HIDDEN), FIELD(l, taps, 1, BASED_MAX_TAPS), FIELD(l, window, 0, 0),
        FIELD(l, chunk, 0, 0), FIELD(l, keep, 0, 0), FIELD(l, degree, 0, 0), FIELD(l, rotary, 0, 0), FIELD(l, kernel, 0, 0),
        FIELD(l, normaliser, 0, 0)
    };
    return check_fields(fields, COUNT(fields), "layer", i, e);
}

static int check_no_mixer(const based_layer *l, uint64_t i, based_error *e) {
    const struct field fields[] = {
        FIELD(l, heads, 0, 0), FIELD(l, kv_heads, 0, 0), FIELD(l, key_width, 0, 0), FIELD(l, value_width, 0, 0),
        FIELD(l, taps, 0, 0), FIELD(l, window, 0, 0), FIELD(l, chunk, 0, 0), FIELD(l, degree, 0, 0), FIELD(l, rotary, 0, 0),
        FIELD(l, keep, 0, 0), FIELD(l, kernel, 0, 0), FIELD(l, normaliser, 0, 0)
    };
    return check_fields(fields, COUNT(fields), "layer", i, e);
}

static int check_layer(const based_config *c, const based_layer *l, uint64_t i, based_error *e) {
    const struct field fields[] = {
        FIELD(l, mixer, 0, BASED_WINDOW), FIELD(l, flags, 0, 1023),
        FIELD(l, norm1, 0, BASED_NORM_L2), FIELD(l, norm2, 0, BASED_NORM_L2), FIELD(l, mlp, 0, BASED_GELU),
        FIELD(l, hidden, l->mlp != 0, l->mlp ? BASED_MAX_HIDDEN : 0),
        FIELD(l, in_dtype, 0, BASED_Q4), FIELD(l, out_dtype, 0, BASED_Q4), FIELD(l, up_dtype, 0, BASED_Q4),
        FIELD(l, down_dtype, 0, BASED_Q4)
    };
    int status = check_fields(fields, COUNT(fields), "layer", i, e);
    if (status) return status;
    if (!is_finite(l->norm1_eps) || !is_finite(l->norm2_eps))
        return fail(e, BASED_EFORMAT, "layer %u: norm1_eps or norm2_eps is not a number", i);
    if ((l->flags & BASED_KEY_MEAN) && l->mixer != BASED_TAYLOR)
        return fail(e, BASED_EFORMAT, "layer %u: only taylor layers take a mean off their keys", i);
    if (l->forget != 0.0f && l->mixer != BASED_TAYLOR)
        return fail(e, BASED_EFORMAT, "layer %u: only taylor layers forget", i);
    if (l->mixer == BASED_CONV) status = check_conv(l, i, e);
    else if (l->mixer == BASED_MIXER_NONE) status = check_no_mixer(l, i, e);
    else status = check_attention(l, i, e);
    if (!status) status = check_reserved(l->reserved, COUNT(l->reserved), "layer", i, e);
    if (status) return status;
    if ((l->scale != 0.0f && l->mixer < BASED_TAYLOR) || (l->normaliser_eps != 0.0f && l->mixer != BASED_TAYLOR))
        return fail(e, BASED_EFORMAT, "layer %u: scale or normaliser_eps is not for mixer %u, expected 0", i, U64(l->mixer));
    if (l->mixer != BASED_MIXER_NONE && (l->flags & BASED_NO_OUT) && inner_width(l) != c->dim)
        return fail(e, BASED_EFORMAT, "layer %u: no out projection, but its width is %u and dim is %u", i,
                    U64(inner_width(l)), U64(c->dim));
    return BASED_OK;
}

/* Magic, version, byte order, size: is this a file of ours at all? */
static int check_identity(const void *bytes, size_t size, based_error *e) {
    const based_config *c = bytes;
    if (!bytes || U64((uintptr_t)bytes) % 64)
        return fail(e, BASED_EINVAL, "the checkpoint's bytes must be aligned to 64 bytes");
    if (size < sizeof *c)
        return fail(e, BASED_EFORMAT, "%u bytes are too few for a checkpoint, whose header has %u; was the file cut off?",
                    U64(size), U64(sizeof *c));
    if (memcmp(c->magic, BASED_MAGIC, 8))
        return fail(e, BASED_EFORMAT, "not a based checkpoint (it does not begin with the bytes BASED); make one with "
                    "export.py");
    if (c->byte_order == 0x04030201u)
        return fail(e, BASED_EINVAL, "the checkpoint is in the other byte order; call based_to_native first");
    if (c->byte_order != BASED_BYTE_ORDER)
        return fail(e, BASED_EFORMAT, "header: the byte-order mark is damaged");
    if (c->format != BASED_FORMAT)
        return fail(e, BASED_EFORMAT, "checkpoint format %u; this program reads format %u, so export the model again",
                    U64(c->format), U64(BASED_FORMAT));
    if (two_words(c->file_size) != size)
        return fail(e, BASED_EFORMAT, "the header says %u bytes, but there are %u; was the file cut off?",
                    two_words(c->file_size), U64(size));
    return BASED_OK;
}

static int check_header(const void *bytes, size_t size, based_error *e) {
    const based_config *c = bytes;
    int status = check_identity(bytes, size, e);
    if (!status) status = check_config(c, e);
    if (!status && size - sizeof *c < U64(c->layers) * sizeof(based_layer))
        status = fail(e, BASED_EFORMAT, "%u bytes are too few for %u layers", U64(size), U64(c->layers));
    for (uint32_t i = 0; !status && i < c->layers; i++)
        status = check_layer(c, (const based_layer *)(c + 1) + i, i, e);
    return status;
}

/* ---- Binding: walk the sections in file order and point at them --------------------------------------------------- */

static uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* At least one tile of rows. */
static size_t align16(size_t n) { return n ? (n + 15) / 16 * 16 : 16; }
static size_t tiles(uint32_t rows) { return ((size_t)rows + 15) / 16; }

/* Quantised weights of 8 bits share a scale in groups of 64 columns, those of 4 bits in groups of 32. Columns are filled up
 * to a multiple of 32, so that the last group of 64 may be half a one. */
static int bits_of(uint32_t dtype) { return dtype == BASED_Q4 ? 4 : 8; }
BODY size_t group_width(const int bits) { return bits == 8 ? 64 : 32; }
BODY size_t groups(size_t cols, const int bits) { return (cols + group_width(bits) - 1) / group_width(bits); }
BODY size_t filled_up(size_t cols) { return (cols + 31) / 32 * 32; }
BODY size_t tile_words(size_t cols, const int bits) { return filled_up(cols) * (bits == 8 ? 4 : 2); }  /* of 16 rows         */
BODY size_t group_words(const int bits) { return tile_words(group_width(bits), bits); }

/* A bfloat16 is the upper half of a float. Good are zero, and sizes from 2^-82 on and below 2^20: see quantise_group. */
static uint32_t is_bad_scale(uint32_t half) {
    uint32_t size = half & 0x7fff;
    return size && (size < (127 - 82) << 7 || size >= (127 + 20) << 7) ? 1 : 0;
}

static struct matrix take_matrix(struct cursor *c, based_model *m, uint32_t rows, uint32_t cols, uint32_t dtype, int bias) {
    struct matrix a = { NULL, NULL, NULL, NULL, rows, cols, dtype };
    size_t many = groups(cols, bits_of(dtype)), width = group_width(bits_of(dtype));
    uint64_t before = c->at, scales = U64(tiles(rows)) * many * 8;
    if (dtype == BASED_F32) {
        a.data = take_floats(c, U64(rows) * cols);
    } else {
        a.scales = take(c, scales * 4);
        a.words = take(c, U64(tiles(rows)) * tile_words(cols, bits_of(dtype)) * 4);
        m->most_groups = max_u32(m->most_groups, (uint32_t)many);
        m->widest_q = max_u32(m->widest_q, (uint32_t)(many * width));
        for (uint64_t i = 0; a.scales && i < scales; i++)
            c->bad_scales += is_bad_scale(a.scales[i]) + is_bad_scale(a.scales[i] >> 16);
    }
    m->weight_bytes += c->at - before;
    if (bias) a.bias = take_floats(c, rows);
    m->parameters += U64(rows) * cols + (bias ? rows : 0);
    return a;
}

static struct norm take_norm(struct cursor *c, based_model *m, uint32_t kind, float eps) {
    struct norm n = { NULL, NULL, kind, eps };
    if (kind != BASED_NORM_NONE) n.weight = take_floats(c, m->c->dim);
    if (kind == BASED_NORM_LAYER) n.bias = take_floats(c, m->c->dim);
    m->parameters += kind == BASED_NORM_NONE ? 0 : kind == BASED_NORM_LAYER ? 2 * U64(m->c->dim) : m->c->dim;
    return n;
}

static void bind_mixer(struct cursor *cur, based_model *m, struct layer *l) {
    const based_layer *c = l->c;
    uint32_t dim = m->c->dim;
    l->norm1 = take_norm(cur, m, c->norm1, c->norm1_eps);
    l->in = take_matrix(cur, m, in_rows(c), dim, c->in_dtype, c->flags & BASED_IN_BIAS);
    if (c->mixer == BASED_CONV) {
        l->taps = take_floats(cur, U64(c->taps) * c->value_width);
        m->parameters += U64(c->taps) * c->value_width;
        if (c->flags & BASED_TAPS_BIAS) l->taps_bias = take_floats(cur, c->value_width);
        if (c->flags & BASED_TAPS_BIAS) m->parameters += c->value_width;
    }
    if (c->rotary) l->turns = take(cur, U64(c->rotary) * 8);
    if (c->flags & BASED_KEY_MEAN) l->key_mean = take_floats(cur, key_width(c));
    if (c->mixer == BASED_TAYLOR) l->taylor.c.coefficients = take_floats(cur, U64(c->heads) * (c->degree + 1));
    if (c->flags & BASED_VALUE_GATES) l->gate = take_matrix(cur, m, c->heads, dim, BASED_F32, 0);
    if (!(c->flags & BASED_NO_OUT))
        l->out = take_matrix(cur, m, dim, inner_width(c), c->out_dtype, c->flags & BASED_OUT_BIAS);
    m->widest_in = max_u32(m->widest_in, in_rows(c));
    m->widest_mid = max_u32(m->widest_mid, inner_width(c));
}

static void bind_mlp(struct cursor *cur, based_model *m, struct layer *l) {
    const based_layer *c = l->c;
    uint32_t dim = m->c->dim, rows = c->mlp == BASED_SWIGLU ? 2 * c->hidden : c->hidden;
    l->norm2 = take_norm(cur, m, c->norm2, c->norm2_eps);
    if (c->mlp == BASED_MLP_NONE) return;
    l->up = take_matrix(cur, m, rows, dim, c->up_dtype, c->flags & BASED_UP_BIAS);
    l->down = take_matrix(cur, m, dim, c->hidden, c->down_dtype, c->flags & BASED_DOWN_BIAS);
    m->widest_in = max_u32(m->widest_in, rows);
    m->widest_mid = max_u32(m->widest_mid, c->hidden);
}

/* Scratch of one taylor head at work: the features of a whole chunk of keys or of one query, the weights of keys, a query. */
static uint64_t scratch_floats(const based_taylor_kind *t, uint64_t features) {
    return features * t->chunk + slots(t) + t->key_width;
}

/* Scratch of any head; window needs one weight per key. */
static uint64_t slot_floats(const struct layer *l) {
    if (l->c->mixer == BASED_WINDOW) return l->c->window;
    return l->c->mixer == BASED_TAYLOR ? scratch_floats(&l->taylor.c, l->taylor.features) : 0;
}

static void bind(struct cursor *cur, based_model *m) {
    const based_config *c = m->c;
    int tied = (c->flags & BASED_TIED) != 0;
    take(cur, sizeof *c);
    take(cur, U64(c->layers) * sizeof(based_layer));
    if (c->tokenizer_bytes) m->tokenizer = take(cur, c->tokenizer_bytes);
    if (c->input == 0) m->embedding = take_matrix(cur, m, c->rows, c->dim, c->embedding_dtype, 0);
    if (!tied) m->weight_bytes = 0;     /* one row of an embedding is read per token, all of a tied one              */
    if (c->flags & BASED_INPUT_PROJECTION) m->input = take_matrix(cur, m, c->dim, c->input, BASED_F32, 1);
    m->slots = 1;
    for (uint32_t i = 0; i < c->layers; i++) {
        struct layer *l = &m->layer[i];
        l->c = (const based_layer *)(c + 1) + i;
        if (l->c->mixer == BASED_TAYLOR) {
            l->taylor.c = kind_of(l->c);
            l->taylor.k = m->k;
            l->taylor.features = (uint32_t)count_features(&l->taylor.c, BASED_MAX_FEATURES);
        }
        if (l->c->mixer != BASED_MIXER_NONE) bind_mixer(cur, m, l);
        bind_mlp(cur, m, l);
        l->state = m->state;
        m->state += (size_t)state_floats(c, l->c);
        if (l->c->flags & BASED_SHIFT) l->shift = m->state - c->dim;
        uint64_t slot = slot_floats(l);
        if (slot > m->slot) m->slot = (size_t)slot;
#ifdef _OPENMP
        m->slots = max_u32(m->slots, l->c->kv_heads);
#endif
    }
    m->final_norm = take_norm(cur, m, c->final_norm, c->final_norm_eps);
    m->head = m->embedding;
    if (c->rows && !tied) m->head = take_matrix(cur, m, c->rows, c->dim, c->head_dtype, 0);
    if (c->flags & BASED_HEAD_BIAS) {
        m->head.bias = take_floats(cur, c->rows);
        m->parameters += c->rows;
    }
}

/* (q.k)^p is a sum over all p-tuples of coordinates; the ones that are permutations of each other are kept as one
 * monomial x_i^a x_j^b ..., which therefore counts p!/(a! b! ...) times. Monomials are the non-decreasing tuples in
 * lexicographic order, degree after degree; p <= 12 keeps every count exact in a float. */
static void fill_multiplicity(float *out, const based_taylor_kind *t) {
    *out++ = 1.0f;
    if (t->kernel == BASED_DIAGONAL) {
        for (uint64_t i = 0; i < U64(t->key_width) * t->degree; i++) *out++ = 1.0f;
        return;
    }
    for (uint32_t p = 1; p <= t->degree; p++) {
        uint32_t tuple[BASED_MAX_DEGREE] = { 0 };
        for (;;) {
            uint32_t count = 1, run = 0;
            for (uint32_t i = 0; i < p; i++) {
                run = i && tuple[i] == tuple[i - 1] ? run + 1 : 1;
                count = count * (i + 1) / run;
            }
            *out++ = (float)count;
            uint32_t i = p;             /* the next tuple: raise the last index that can rise, level the rest        */
            while (i && tuple[i - 1] == t->key_width - 1) i--;
            if (!i) break;
            uint32_t value = tuple[i - 1] + 1;
            for (i--; i < p; i++) tuple[i] = value;
        }
    }
}

/* Multiplying and adding in one rounding (FMA contraction) or in a wider type gives other bits than IEEE float32 does.
 * A compiler flag decides, so ask the machine: with a = 1 + 2^-12, a*a rounds to 1 + 2^-11 exactly. Sums in another order
 * (-ffast-math) cannot be found by trying, but compilers that were allowed to say so. */
static int arithmetic_is_strict(void) {
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
    if (sizeof(float) == sizeof(uint32_t)) return 0;
#endif
    if (sizeof(float) != sizeof(uint32_t)) return 1;    /* tests/double.c: there, float is another word for double           */
    volatile float a = 1.0f + 1.0f / 4096.0f, b = 1.0f + 1.0f / 2048.0f, tiny = 1.0f / 33554432.0f, one = 1.0f;
    float p = a, q = b, r = p * p - q, s = one + tiny - one;
    return r == 0.0f && s == 0.0f;
}

/* ==== Arithmetic =====================================================================================================
 * Every function here gives the same bits under every compiler, optimisation level and vector width: only + - * / and
 * sqrt, in an order that is written down.
 */
#define LANES 16

/* Asks for memory that will be read soon: what processors foresee by themselves ends where a page does. */
#ifdef __GNUC__
#define PREFETCH(p) __builtin_prefetch(p)
#else
#define PREFETCH(p) ((void)(p))
#endif

/* Without vector registers, sixteen sums at a time would live in memory. There, the bodies under BASED_NARROW take them
 * four at a time: the same additions in the same order, so the same bits. */
#if !defined(BASED_NARROW) && (defined(__arm__) || defined(__riscv)) && !defined(__ARM_NEON) && !defined(__riscv_vector)
#define BASED_NARROW 1
#endif

/* The sum of the sixteen lanes, in a fixed tree. */
BODY float fold(float s[LANES]) {
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) s[l] += s[l + half];
    return s[0];
}

#ifdef BASED_NARROW
struct four { float a, b, c, d; };      /* neighbouring lanes, in registers                                      */

BODY struct four multiply_add(struct four s, const float *x, const float *y) {
    s.a += x[0] * y[0];
    s.b += x[1] * y[1];
    s.c += x[2] * y[2];
    s.d += x[3] * y[3];
    return s;
}

BODY struct four add_four(struct four x, struct four y) {
    struct four s = { x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d };
    return s;
}

BODY float dot(const float *a, const float *b, size_t n) {
    struct four s0 = { 0, 0, 0, 0 }, s1 = s0, s2 = s0, s3 = s0;
    float s[LANES];
    size_t i = 0;
    for (; n - i >= LANES; i += LANES) {
        s0 = multiply_add(s0, a + i, b + i);
        s1 = multiply_add(s1, a + i + 4, b + i + 4);
        s2 = multiply_add(s2, a + i + 8, b + i + 8);
        s3 = multiply_add(s3, a + i + 12, b + i + 12);
    }
    if (i == n) {
        s0 = add_four(add_four(s0, s2), add_four(s1, s3));
        return (s0.a + s0.c) + (s0.b + s0.d);
    }
    memcpy(s, &s0, sizeof s0);
    memcpy(s + 4, &s1, sizeof s1);
    memcpy(s + 8, &s2, sizeof s2);
    memcpy(s + 12, &s3, sizeof s3);
    for (size_t l = 0; i < n; l++, i++) s[l] += a[i] * b[i];
    return fold(s);
}
#else
BODY float dot(const float *a, const float *b, size_t n) {
    float s[LANES] = { 0 };
    size_t i = 0;
    for (; n - i >= LANES; i += LANES)
        for (size_t l = 0; l < LANES; l++) s[l] += a[i + l] * b[i + l];
    for (size_t l = 0; i < n; l++, i++) s[l] += a[i] * b[i];
    return fold(s);
}
#endif

BODY float sum(const float *a, size_t n) {
    float s[LANES] = { 0 };
    size_t i = 0;
    for (; n - i >= LANES; i += LANES)
        for (size_t l = 0; l < LANES; l++) s[l] += a[i + l];
    for (size_t l = 0; i < n; l++, i++) s[l] += a[i];
    return fold(s);
}

/* exp(x) to 1 part in 10^7: x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial for exp(r) and n into the exponent.
 * Below -87 the result is 0 rather than a subnormal (they cost hundreds of cycles); above 88 it stays at exp(88). */
BODY float exponential(float x) {
    float c = x > -87.0f ? x : -87.0f, r, y, power;
    c = c < 88.0f ? c : 88.0f;
    float n = c * 1.44269504f + 12582912.0f;            /* + 1.5 * 2^23: the sum rounds to a whole number            */
    n -= 12582912.0f;
    r = c - n * 0.693359375f;                           /* ln 2 in two parts; the first product is exact             */
    r -= n * -2.12194440e-4f;
    y = 1.395060218e-3f;
    y = y * r + 8.368953523e-3f;
    y = y * r + 4.166620414e-2f;
    y = y * r + 1.666651831e-1f;
    y = y * r + 5.000000096e-1f;
    y = y * (r * r) + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    y = x < -87.0f ? 0.0f : y * power;
    return x == x ? y : x;                              /* NaN stays NaN                                             */
}

BODY float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
BODY float silu(float x) { return x / (1.0f + exponential(-x)); }

/* x Phi(x) with Phi from erf: a polynomial for |z| <= 1, exp(-z^2) times one in 1/(1 + z/2) beyond. */
static float gelu(float x) {
    float z = fabsf(x) * 0.707106781f, erf;
    if (z <= 1.0f) {
        static const float c[] = { 7.889122784e-05f, -8.020842254e-04f, 5.189535449e-03f, -2.685444465e-02f,
                                   1.128360018e-01f, -3.761262714e-01f, 1.128379166e+00f };
        float p = c[0];
        for (size_t i = 1; i < COUNT(c); i++) p = p * (z * z) + c[i];
        erf = z * p;
    } else {
        static const float c[] = { 9.379706612e-02f, -3.824765519e-01f, 4.324679613e-01f, 2.496074697e-03f,
                                   2.966584044e-01f, 2.743333388e-01f, 2.826056390e-01f };
        float t = 1.0f / (1.0f + 0.5f * z), p = c[0];
        for (size_t i = 1; i < COUNT(c); i++) p = p * t + c[i];
        erf = z < 4.0f ? 1.0f - exponential(-z * z) * t * p : 1.0f;
    }
    return x * (0.5f + (x < 0.0f ? -0.5f * erf : 0.5f * erf));
}

/* Cosine and sine of a fraction of a turn, in units of 2^-64 turns. Turns add up and wrap around exactly in integers,
 * so position 10^9 is as good as position 10; 32 bits of the fraction are more than a float can tell apart. */
static void cos_sin(uint64_t turns, float *cosine, float *sine) {
    uint32_t t = (uint32_t)(turns >> 32), quarter = (t + 0x20000000u) >> 30;
    uint32_t rest = t - (quarter << 30);                /* -1/8 .. 1/8 turn, two's complement                        */
    float r = rest < 0x80000000u ? (float)rest : -(float)(0u - rest);
    float x = r * 1.46291808e-9f, z = x * x;            /* 2 pi / 2^32                                               */
    float s = x + x * z * (-1.666665494e-1f + z * (8.332177915e-3f + z * -1.951726674e-4f));
    float c = 1.0f - 0.5f * z + z * z * (4.166664686e-2f + z * (-1.388736721e-3f + z * 2.443841536e-5f));
    float swap[4][2] = { { c, s }, { -s, c }, { -c, -s }, { s, -c } };
    *cosine = swap[quarter & 3][0];
    *sine = swap[quarter & 3][1];
}

static void normalise(float *out, const float *x, const struct norm *n, size_t dim) {
    float mean = 0.0f, scale = 1.0f, squares;
    if (n->kind == BASED_NORM_NONE) {
        memmove(out, x, dim * sizeof *out);
        return;
    }
    if (n->kind == BASED_NORM_LAYER) mean = sum(x, dim) / (float)dim;
    for (size_t i = 0; i < dim; i++) out[i] = x[i] - mean;
    squares = dot(out, out, dim);
    if (n->kind == BASED_NORM_L2) {
        float length = sqrtf(squares);
        scale = sqrtf((float)dim) / (length > n->eps ? length : n->eps);
    } else {
        scale = 1.0f / sqrtf(squares / (float)dim + n->eps);
    }
    for (size_t i = 0; i < dim; i++) out[i] = out[i] * scale * n->weight[i] + (n->bias ? n->bias[i] : 0.0f);
}

/* ==== The kernels ====================================================================================================
 * Nearly all time is spent here: matrix times vectors, and `combine`. Each body is written once, in plain C that
 * compilers turn into vector code, and compiled for every instruction set worth having; a model picks its set when it is
 * opened. Only the integer products of quantised weights need intrinsics, because no compiler finds those instructions by
 * itself; they stand behind the plain twin that defines them. Integer sums are exact in any order, and each float sum has
 * one order, so all sets give the same bits.
 */
#if defined(__GNUC__) && defined(__x86_64__) && !defined(BASED_FREESTANDING)
#define BASED_X86 1
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define BASED_AMX 1                     /* only Linux lets a program use them, and older compilers know them not */
#include <sys/syscall.h>
#endif
#elif defined(__GNUC__) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define BASED_DOTPROD 1
#include <arm_neon.h>
#elif defined(BASED_NARROW) && defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>
#elif defined(BASED_NARROW) && defined(__ARM_FEATURE_SIMD32)
#include <arm_acle.h>
#endif
/* n vectors as quantised products want them: groups as wide as those of the weights they meet share a scale; the last is
 * filled up with zeros. Vectors are packed in sixteens (fours, ones, if there are fewer), so that the same group of sixteen
 * lies side by side. */
struct activations {
    const float *x;                     /* (n, cols) as they are                                                 */
    int8_t *q;                          /* (n/pack, groups, pack, group_width) round(x / scale)                  */
    float *scale;                       /* (n/pack, groups, pack)                                                */
    int32_t *offset;                    /* (n/pack, groups, pack) SHIFT - what is added to weights * the sum of q */
    size_t n, cols, groups, pack;
    int bits;                           /* of the weights they meet                                              */
};

/* How many groups of the weights they meet are whole, and the columns of group g. */
BODY size_t whole_groups(const struct activations *a, const int bits) {
    return filled_up(a->cols) / group_width(bits);
}
BODY size_t group_columns(const struct activations *a, size_t g, const int bits) {
    return g < whole_groups(a, bits) ? group_width(bits) : 32;
}

/* The bits of the float 1.5 * 2^23; SHIFT + s are those of 1.5 * 2^23 + s, for whole numbers |s| < 2^22. */
enum { SHIFT = 0x4b400000 };

/* The size of packs. */
BODY size_t pack_of(size_t n) { return n < 4 ? 1 : n < 8 ? 4 : 16; }

/* Where group g of vector t is. */
BODY size_t group_at(const struct activations *a, size_t t, size_t g) {
    return (t / a->pack * a->groups + g) * a->pack + t % a->pack;
}

struct kernels {
    const char *name;
    /* around all work of a thread on n vectors */
    void (*begin)(size_t n);
    void (*end)(void);
    /* out[t][r] = row r of w . x[t], for a few rows of float weights */
    void (*rows_f32)(float *out, size_t out_stride, const float *w, size_t rows, const struct activations *x);
    /* the same for one tile of 16 rows of quantised weights, of 8 and of 4 bits, and vectors from .. to - 1 */
    void (*tile_q8)(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                    size_t from, size_t to);
    void (*tile_q4)(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                    size_t from, size_t to);
    /* out = sum_i w[i] rows[i], i ascending, for n rows of `width` floats that lie `stride` apart */
    void (*combine)(float *out, const float *w, const float *rows, size_t n, size_t width, size_t stride);
    /* y[i] += a[i] * x[i] */
    void (*add_products)(float *y, const float *a, const float *x, size_t n);
    /* y[i] = silu(gate[i]) * value[i] */
    void (*silu_times)(float *y, const float *gate, const float *value, size_t n);
    /* x[i] = exp(scale * x[i] - *top), *top the largest scale * x[i] or what it was, if that is more; returns their sum */
    float (*soften)(float *x, size_t n, float scale, float *top);
    /* total[i] += x[i] for n <= 32 numbers, which keep in `lost` what rounding cuts off */
    void (*absorb_row)(float *total, float *lost, const float *x, size_t n);
    /* groups from .. to - 1 of all vectors: x -> q, scale, offset */
    void (*quantise)(const struct activations *a, size_t from, size_t to);
};

/* ---- Float weights ------------------------------------------------------------------------------------------------ */

#ifndef BASED_NARROW
/* Four rows at a time; a row alone would wait for its own additions. ask: for the four rows after them, which are next. */
BODY void dot4(float out[4], const float *w, size_t stride, const float *x, size_t n, const int ask) {
    float s0[LANES] = { 0 }, s1[LANES] = { 0 }, s2[LANES] = { 0 }, s3[LANES] = { 0 };
    const float *w1 = w + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    size_t i = 0;
    for (; n - i >= LANES; i += LANES) {
        if (ask) {
            PREFETCH(w + 4 * stride + i);
            PREFETCH(w1 + 4 * stride + i);
            PREFETCH(w2 + 4 * stride + i);
            PREFETCH(w3 + 4 * stride + i);
        }
        for (size_t l = 0; l < LANES; l++) {
            s0[l] += w[i + l] * x[i + l];
            s1[l] += w1[i + l] * x[i + l];
            s2[l] += w2[i + l] * x[i + l];
            s3[l] += w3[i + l] * x[i + l];
        }
    }
    for (size_t l = 0; i < n; l++, i++) {
        s0[l] += w[i] * x[i];
        s1[l] += w1[i] * x[i];
        s2[l] += w2[i] * x[i];
        s3[l] += w3[i] * x[i];
    }
    out[0] = fold(s0);
    out[1] = fold(s1);
    out[2] = fold(s2);
    out[3] = fold(s3);
}
#endif

/* The first vector meets weights that come from memory, which is read fastest as they lie there, row by row, unless the
 * processor wants to be asked; all others, and short rows, find them in a cache. */
BODY void rows_f32(float *out, size_t out_stride, const float *w, size_t rows, const struct activations *x, const int ask) {
    size_t cols = x->cols;
    (void)ask;
    for (size_t r = 0; r < rows; r += 4)
        for (size_t t = 0; t < x->n; t++) {
            float *y = out + t * out_stride + r;
#ifndef BASED_NARROW
            if (rows - r >= 4 && (ask || t > 0 || cols < 256)) {
                if (ask && t == 0) dot4(y, w + r * cols, cols, x->x, cols, 1);
                else dot4(y, w + r * cols, cols, x->x + t * cols, cols, 0);
                continue;
            }
#endif
            for (size_t i = 0; i < 4 && i < rows - r; i++) y[i] = dot(w + (r + i) * cols, x->x + t * cols, cols);
        }
}

/* `width` (a constant to the compiler) neighbouring columns of the sum below, held in registers. */
BODY void combine_columns(float *out, const float *w, const float *rows, size_t n, size_t stride, const size_t width) {
    float s[32] = { 0 };
    for (size_t i = 0; i < n; i++)
        for (size_t l = 0; l < width; l++) s[l] += w[i] * rows[i * stride + l];
    for (size_t l = 0; l < width; l++) out[l] = s[l];
}

#ifdef BASED_NARROW
BODY void combine_four(float *out, const float *w, const float *rows, size_t n, size_t stride) {
    struct four s = { 0, 0, 0, 0 };
    for (size_t i = 0; i < n; i++) {
        const float wi[4] = { w[i], w[i], w[i], w[i] };
        s = multiply_add(s, wi, rows + i * stride);
    }
    memcpy(out, &s, sizeof s);
}
#endif

/* All attention is made of this one sum: scores (rows: coordinates of the keys), outputs (rows: values) and reading the
 * Taylor state (rows: features). */
BODY void combine_body(float *out, const float *w, const float *rows, size_t n, size_t width, size_t stride) {
    size_t e = 0;
#ifdef BASED_NARROW
    for (; width - e >= 4; e += 4) combine_four(out + e, w, rows + e, n, stride);
#endif
    for (; width - e >= 32; e += 32) combine_columns(out + e, w, rows + e, n, stride, 32);
    for (; width - e >= 8; e += 8) combine_columns(out + e, w, rows + e, n, stride, 8);
    for (; e < width; e++) combine_columns(out + e, w, rows + e, n, stride, 1);
}

/* *total += x, and returns what it lost: the exact difference (Knuth 1969). Numbers too small to matter become zero before
 * they are subnormal, which would make every later token some hundred times slower. */
BODY float add_and_keep(float *total, float x) {
    float old = *total, now = old + x, back = now - old, lost = (old - (now - back)) + (x - back);
    *total = fabsf(now) < 1e-30f ? 0.0f : now;
    return fabsf(lost) > 1e-36f && fabsf(lost) <= FLT_MAX ? lost : 0.0f;
}

BODY float upper_half(uint32_t bits) {
    float x = 0.0f;
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

BODY uint32_t rounded_to_half(float x) {
    uint32_t bits;
    if (sizeof x != sizeof bits) return 0;              /* a double (tests/double.c) loses nothing worth keeping             */
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x8000u) & 0xffff0000u;
}

/* total[i] += x[i]. `lost` has bfloat16s, two to a word: word i holds what total[i] has lost in its upper half, and what
 * total[half + i] has in its lower. */
BODY void absorb_numbers(float *total, float *lost, const float *x, const size_t n) {
    size_t half = (n + 1) / 2;
    for (size_t i = 0; i < half; i++) {
        uint32_t word, low = 0;
        memcpy(&word, lost + i, sizeof word);
        if (half + i < n) low = rounded_to_half(add_and_keep(total + half + i, x[half + i] + upper_half(word << 16)));
        word = rounded_to_half(add_and_keep(total + i, x[i] + upper_half(word))) | low >> 16;
        memcpy(lost + i, &word, sizeof word);
    }
}

BODY void absorb_row(float *total, float *lost, const float *x, size_t n) {
    if (n == 32) absorb_numbers(total, lost, x, 32);            /* a constant becomes vector code                            */
    else absorb_numbers(total, lost, x, n);
}

BODY float soften_body(float *x, size_t n, float scale, float *top) {
    float most = *top;
    for (size_t i = 0; i < n; i++) x[i] *= scale;
    for (size_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - most);
    *top = most;
    return sum(x, n);
}

/* x -> 8 bits, a group. The scale is a power of two, the smallest with which no number exceeds 127, so that scaling rounds
 * nothing; with weights' scales from 2^-82 to 2^20 (see is_bad_scale) also no product with it does, whence kernels may fuse
 * that product with the addition after it. The maximum is taken over the bits, which are in the order of the numbers once the
 * sign is off, and halves round to even by adding 1.5 * 2^23 and looking at the low bits: whole numbers all the way, which
 * compilers vectorise. An infinity counts as 127 * 2^84. A NaN makes the scale, and so all that is computed with it, a NaN:
 * its own bits are not the same everywhere. */
BODY void quantise_group(int8_t *q, float *scale, int32_t *offset, const float *x, const int bits) {
    const int32_t least = (127 - 50) << 23, most = (127 + 90) << 23, middle = bits == 8 ? 128 : 8;
    const size_t width = group_width(bits);
    int32_t n[64], top = 0, total = 0, power, opposite;
    float inverse;
    memcpy(n, x, width * sizeof *n);
    for (size_t l = 0; l < width; l++) top = (n[l] & 0x7fffffff) > top ? n[l] & 0x7fffffff : top;
    power = top < least ? least : top > most ? most : top;
    power = ((power + 0x1ffff) & 0x7f800000) - (6 << 23);          /* carries beyond 127/64 of a power of two            */
    opposite = (254 << 23) - power;
    memcpy(&inverse, &opposite, sizeof opposite);
    for (size_t l = 0; l < width; l++) {
        float shifted = x[l] * inverse + 12582912.0f;
        int32_t whole;
        memcpy(&whole, &shifted, sizeof whole);
        whole = whole > SHIFT - 127 ? whole : SHIFT - 127;
        n[l] = (whole < SHIFT + 127 ? whole : SHIFT + 127) - SHIFT;
    }
    for (size_t l = 0; l < width; l++) q[l] = (int8_t)n[l];
    for (size_t l = 0; l < width; l++) total += n[l];
    if (top > 0x7f800000) power = 0x7fc00000;
    memcpy(scale, &power, sizeof power);
    *offset = SHIFT - middle * total;
}

/* Groups `from` to `to` of all vectors, counted through; the last of each vector is filled up with zeros. */
BODY void quantise_groups(const struct activations *a, size_t from, size_t to, const int bits) {
    size_t t = from / a->groups, g = from % a->groups, at = group_at(a, t, g), width = group_width(bits);
    for (size_t i = from; i < to; i++) {
        size_t n = a->cols - g * width;
        const float *x = a->x + t * a->cols + g * width;
        float filled[64];
        if (n < width) {
            memset(filled, 0, sizeof filled);
            x = memcpy(filled, x, n * sizeof *x);
        }
        quantise_group(a->q + at * width, a->scale + at, a->offset + at, x, bits);
        at += a->pack;
        if (++g < a->groups) continue;
        g = 0;
        at = group_at(a, ++t, 0);
    }
}

BODY void quantise_body(const struct activations *a, size_t from, size_t to) {
    if (a->bits == 8) quantise_groups(a, from, to, 8);
    else quantise_groups(a, from, to, 4);
}

/* Every instruction set gets its own copies of the float kernels. */
#define ROWS_KERNEL(set, target, ask)                                                                                    \
    target static void rows_f32_##set(float *out, size_t out_stride, const float *w, size_t rows,                        \
                                      const struct activations *x) {                                                     \
        rows_f32(out, out_stride, w, rows, x, ask);                                                                      \
    }
#define FLOAT_KERNELS(set, target)                                                                                       \
    target static void combine_##set(float *out, const float *w, const float *rows, size_t n, size_t width,              \
                                     size_t stride) {                                                                    \
        combine_body(out, w, rows, n, width, stride);                                                                    \
    }                                                                                                                    \
    target static void add_products_##set(float *y, const float *a, const float *x, size_t n) {                          \
        for (size_t i = 0; i < n; i++) y[i] += a[i] * x[i];                                                              \
    }                                                                                                                    \
    target static void silu_times_##set(float *y, const float *gate, const float *value, size_t n) {                     \
        for (size_t i = 0; i < n; i++) y[i] = silu(gate[i]) * value[i];                                                  \
    }                                                                                                                    \
    target static float soften_##set(float *x, size_t n, float scale, float *top) {                                      \
        return soften_body(x, n, scale, top);                                                                            \
    }                                                                                                                    \
    target static void absorb_row_##set(float *total, float *lost, const float *x, size_t n) {                           \
        absorb_row(total, lost, x, n);                                                                              \
    }                                                                                                                    \
    target static void quantise_##set(const struct activations *a, size_t from, size_t to) { quantise_body(a, from, to); }

ROWS_KERNEL(plain, , 0)
FLOAT_KERNELS(plain, )
static void begin_plain(size_t n) { (void)n; }
static void end_plain(void) { }

/* ---- Quantised weights: the plain twin, which is the definition ----------------------------------------------------- */

static float bf16(uint32_t bits) {
    uint32_t wide = bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* The instances of a tile kernel for 8 and for 4 bits. */
#define TILE_KERNEL(name, set, target, bits)                                                                             \
    target static void name##_##set(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w,            \
                                    const struct activations *x, size_t from, size_t to) {                               \
        tile_##set(out, out_stride, scales, w, x, from, to, bits);                                                       \
    }
#define TILE_KERNELS(set, target) TILE_KERNEL(tile_q8, set, target, 8) TILE_KERNEL(tile_q4, set, target, 4)

#if defined(BASED_NARROW) && defined(__ARM_FEATURE_MVE)
/* The Helium unit of Cortex-M55 and M85: a load gathers the words of a row from where they lie between those of its
 * neighbours, and one instruction sums sixteen products of bytes with sign. */
BODY int8x16_t gather_row(const uint32_t *word, uint32x4_t rows) {
    return vreinterpretq_s8_u32(vldrwq_gather_shifted_offset_u32(word, rows));
}

/* Four rows of a group. */
BODY void four_rows(int32_t s[4], const uint32_t *word, const int8_t *q, size_t columns, int32_t offset, const int bits) {
    const uint32x4_t rows = vshlq_n_u32(vidupq_n_u32(0, 1), 4), second = vshlq_n_u32(vidupq_n_u32(0, 1), 1);
    const int32_t *x = (const int32_t *)(const void *)q;        /* four columns to a word, as on the other side            */
    if (bits == 8) {                    /* w + 128 with its highest bit turned is w, so no offset is left              */
        const int8x16_t turn = vdupq_n_s8(-128);
        int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (const int8_t *end = q + columns; q < end; q += 16, word += 64) {
            const int8x16_t v = vldrbq_s8(q);
            s0 = vmladavaq_s8(s0, veorq_s8(gather_row(word, rows), turn), v);
            s1 = vmladavaq_s8(s1, veorq_s8(gather_row(word + 1, rows), turn), v);
            s2 = vmladavaq_s8(s2, veorq_s8(gather_row(word + 2, rows), turn), v);
            s3 = vmladavaq_s8(s3, veorq_s8(gather_row(word + 3, rows), turn), v);
        }
        s[0] = s0;
        s[1] = s1;
        s[2] = s2;
        s[3] = s3;
    } else {                            /* the halves of the bytes meet every second word                          */
        const int8x16_t low = vreinterpretq_s8_s32(vldrwq_gather_shifted_offset_s32(x, second)),
                        high = vreinterpretq_s8_s32(vldrwq_gather_shifted_offset_s32(x + 1, second));
        (void)columns;
        for (size_t r = 0; r < 4; r++) {
            int8x16_t v = gather_row(word + r, rows), upper = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(v), 4));
            s[r] = vmladavaq_s8(vmladavaq_s8(offset, vandq_s8(v, vdupq_n_s8(15)), low), upper, high);
        }
    }
}
#elif defined(BASED_NARROW)
/* Four columns of a vector, ready to meet four bytes of each row. */
#ifdef __ARM_FEATURE_SIMD32             /* two 16-bit products in one instruction                                */
struct columns { int16x2_t even, odd; };

BODY struct columns four_columns(const int8_t *q) {
    uint32_t four;
    memcpy(&four, q, sizeof four);
    struct columns c = { __sxtb16((int8x4_t)four), __sxtb16((int8x4_t)(four >> 8)) };
    return c;
}

BODY int32_t add_products(int32_t s, uint32_t bytes, struct columns q) {
    uint32_t odd;
    __asm__("uxtb16 %0, %1, ror #8" : "=r"(odd) : "r"(bytes));      /* no compiler joins the two steps by itself         */
    return __smlad((int16x2_t)odd, q.odd, __smlad((int16x2_t)__uxtb16(bytes), q.even, s));
}
#else
struct columns { int32_t a, b, c, d; };

BODY struct columns four_columns(const int8_t *q) {
    struct columns c = { q[0], q[1], q[2], q[3] };
    return c;
}

BODY int32_t add_products(int32_t s, uint32_t bytes, struct columns q) {
    return s + (int32_t)(bytes & 255) * q.a + (int32_t)(bytes >> 8 & 255) * q.b + (int32_t)(bytes >> 16 & 255) * q.c
             + (int32_t)(bytes >> 24) * q.d;
}
#endif

/* A word holds four columns of 8 bits, or four and four more of 4 bits. */
BODY int32_t add_word(int32_t s, uint32_t word, struct columns q, struct columns high, const int bits) {
    if (bits == 8) return add_products(s, word, q);
    return add_products(add_products(s, word & 0x0f0f0f0f, q), word >> 4 & 0x0f0f0f0f, high);
}

/* Four rows of a group: their sums, the columns and the pointers just fit in thirteen registers. */
BODY void four_rows(int32_t s[4], const uint32_t *word, const int8_t *q, size_t columns, int32_t offset, const int bits) {
    int32_t s0 = offset, s1 = offset, s2 = offset, s3 = offset;
    for (const int8_t *end = q + columns; q < end; q += bits == 8 ? 4 : 8, word += 16) {
        struct columns c = four_columns(q), high = four_columns(bits == 8 ? q : q + 4);
        s0 = add_word(s0, word[0], c, high, bits);
        s1 = add_word(s1, word[1], c, high, bits);
        s2 = add_word(s2, word[2], c, high, bits);
        s3 = add_word(s3, word[3], c, high, bits);
    }
    s[0] = s0;
    s[1] = s1;
    s[2] = s2;
    s[3] = s3;
}

#endif

/* y[r] += (float)(sum of products of the group) * scale of the weights * scale of x, group after group. Weights are
 * kept as w + 128 or w + 8; `offset` takes that times the sum of x off again. 8 bits: word 16 c + r of a group holds columns
 * 4c .. 4c+3 of row r; 4 bits: columns 8c .. 8c+3 in the low halves of its bytes, 8c+4 .. 8c+7 in the high ones. */
#ifdef BASED_NARROW
BODY void tile_plain(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                     size_t from, size_t to, const int bits) {
    for (size_t t = from; t < to; t++, out += out_stride)
        for (size_t r = 0; r < 16; r += 4) {
            const uint32_t *two = scales + r / 2, *word = w + r;
            struct four y = { 0, 0, 0, 0 };
            size_t at = group_at(x, t, 0);
            for (size_t g = 0; g < x->groups; g++, at += x->pack, two += 8, word += group_words(bits)) {
                float scale = x->scale[at];
                int32_t s[4];
                four_rows(s, word, x->q + at * group_width(bits), group_columns(x, g, bits), x->offset[at] - SHIFT, bits);
                y.a += (float)s[0] * bf16(two[0] & 0xffff) * scale;
                y.b += (float)s[1] * bf16(two[0] >> 16) * scale;
                y.c += (float)s[2] * bf16(two[1] & 0xffff) * scale;
                y.d += (float)s[3] * bf16(two[1] >> 16) * scale;
            }
            memcpy(out + r, &y, sizeof y);
        }
}
#else
BODY void tile_plain(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                     size_t from, size_t to, const int bits) {
    for (size_t t = from; t < to; t++, out += out_stride) {
        float y[16] = { 0 };
        for (size_t g = 0; g < x->groups; g++) {
            size_t at = group_at(x, t, g), quads = group_columns(x, g, bits) / 4;
            int32_t s[16], offset = x->offset[at] - SHIFT;
            for (size_t r = 0; r < 16; r++) s[r] = offset;
            for (size_t c = 0; c < quads; c++) {
                const int8_t *q = x->q + at * group_width(bits) + 4 * c;
                const uint32_t *word = w + g * group_words(bits) + 16 * (bits == 8 ? c : c / 2);
                for (size_t r = 0; r < 16; r++) {
                    uint32_t v = bits == 8 ? word[r] : (c % 2 ? word[r] >> 4 : word[r]) & 0x0f0f0f0f;
                    s[r] += (int32_t)(v & 255) * q[0] + (int32_t)(v >> 8 & 255) * q[1] + (int32_t)(v >> 16 & 255) * q[2]
                          + (int32_t)(v >> 24) * q[3];
                }
            }
            for (size_t r = 0; r < 16; r++) {
                float scale = bf16(scales[g * 8 + r / 2] >> (r % 2 * 16) & 0xffff);
                y[r] += (float)s[r] * scale * x->scale[at];
            }
        }
        memcpy(out, y, sizeof y);
    }
}
#endif

TILE_KERNELS(plain, )

static const struct kernels plain_kernels = {
    "plain", begin_plain, end_plain,
    rows_f32_plain, tile_q8_plain, tile_q4_plain, combine_plain, add_products_plain, silu_times_plain,
    soften_plain, absorb_row_plain, quantise_plain
};

/* ---- Quantised weights: vector units -------------------------------------------------------------------------------- */
#ifdef BASED_X86
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
ROWS_KERNEL(avx2, AVX2, 0)     /* AVX-512 gains nothing here: float rows wait for memory anyway                   */
FLOAT_KERNELS(avx2, AVX2)
FLOAT_KERNELS(avx512, AVX512)

typedef int32_t __attribute__((may_alias)) four_bytes;  /* of a quantised vector, to meet a word of each row         */

/* How many words of weights ahead are asked for, where that helps: Intel's processors with AMX write 5 to 12 % faster, the
 * AVX2 tiles 10 % in 8 bits. With AVX-512 alone (Zen 4) it cost a sixth: that processor foresees better what it will need. */
enum { FAR = 512 };
#define UNROLL8 _Pragma("GCC unroll 8")
#define UNROLL16 _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")  /* unrolled, more would be kept at hand than there are registers         */

/* The sums of a group, eight rows in a register, for `many` (a constant to the compiler) vectors: s[half of the rows][vector].
 * Products of bytes want one factor without sign, and are summed in pairs of 16 bits. 8-bit weights: |w| <= 128, and x with
 * the sign of w; a pair just fits. 4-bit ones have no sign, and all sixteen products fit: 16 * 15 * 127 < 32768. */
AVX2 BODY void sum_group(__m256i s[2][4], const __m256i *word, const four_bytes *q, size_t columns, const size_t many,
                         const int bits) {
    const __m256i bias = _mm256_set1_epi8(-128), one = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    for (size_t i = 0; i < many; i++) s[0][i] = s[1][i] = _mm256_setzero_si256();
    ROLLED for (size_t pair = 0; pair < columns / 4; pair += 2) {
        for (size_t part = 0; part < 4; part++) {
            size_t c = pair + part / 2, h = part % 2;
            __m256i v = _mm256_loadu_si256(word + h + (bits == 8 ? 2 * c : pair)), size;
            if (bits == 8) v = _mm256_xor_si256(v, bias);
            else v = _mm256_and_si256(c > pair ? _mm256_srli_epi16(v, 4) : v, low);
            size = bits == 8 ? _mm256_abs_epi8(v) : v;
            for (size_t i = 0; i < many; i++) {
                __m256i x = _mm256_set1_epi32(q[i * (group_width(bits) / 4) + c]);
                x = _mm256_maddubs_epi16(size, bits == 8 ? _mm256_sign_epi8(x, v) : x);
                if (bits == 8) s[h][i] = _mm256_add_epi32(s[h][i], _mm256_madd_epi16(x, one));
                else s[h][i] = _mm256_add_epi16(s[h][i], x);
            }
        }
    }
    for (size_t i = 0; i < many && bits == 4; i++) {
        s[0][i] = _mm256_madd_epi16(s[0][i], one);
        s[1][i] = _mm256_madd_epi16(s[1][i], one);
    }
}

/* Vectors t .. t + many - 1, all of one pack, against the same weights. */
AVX2 BODY void tile_ymm(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                        size_t t, const size_t many, const int bits) {
    size_t groups = x->groups, at = group_at(x, t, 0), words = group_words(bits);
    __m256 y[2][4];
    for (size_t i = 0; i < many; i++) y[0][i] = y[1][i] = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; g++, at += x->pack) {
        __m256i s[2][4];
        const four_bytes *q = (const four_bytes *)(x->q + at * group_width(bits));
        for (size_t i = 0; i < words && t == 0; i += 16) PREFETCH(w + FAR + g * words + i);
        sum_group(s, (const __m256i *)(const void *)(w + g * words), q, group_columns(x, g, bits), many, bits);
        for (size_t h = 0; h < 2; h++) {
            __m128i half = _mm_loadu_si128((const __m128i *)(const void *)(scales + g * 8 + 4 * h));
            __m256 ws = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
            for (size_t i = 0; i < many; i++) {
                __m256 scale = _mm256_set1_ps(x->scale[at + i]);
                if (bits == 4) s[h][i] = _mm256_add_epi32(s[h][i], _mm256_set1_epi32(x->offset[at + i] - SHIFT));
                y[h][i] = _mm256_add_ps(y[h][i], _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s[h][i]), ws), scale));
            }
        }
    }
    for (size_t i = 0; i < many; i++, out += out_stride) {
        _mm256_storeu_ps(out, y[0][i]);
        _mm256_storeu_ps(out + 8, y[1][i]);
    }
}

AVX2 BODY void tile_avx2(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                         size_t from, size_t to, const int bits) {
    size_t t = from;
    for (; t % 4 == 0 && t + 4 <= to; t += 4, out += 4 * out_stride) tile_ymm(out, out_stride, scales, w, x, t, 4, bits);
    for (; t < to; t++, out += out_stride) tile_ymm(out, out_stride, scales, w, x, t, 1, bits);
}

/* One group of weights, sixteen rows and four columns in a register. */
AVX512 BODY void load_group(__m512i v[16], const uint32_t *w, const size_t columns, const int bits) {
    const __m512i low = _mm512_set1_epi8(15);
    for (size_t c = 0; c < columns / 4 && bits == 8; c++) v[c] = _mm512_loadu_si512(w + 16 * c);
    for (size_t c = 0; c < 8 && bits == 4; c += 2) {
        __m512i two = _mm512_loadu_si512(w + 8 * c);
        v[c] = _mm512_and_si512(two, low);
        v[c + 1] = _mm512_and_si512(_mm512_srli_epi16(two, 4), low);
    }
}

/* Its scales, and 1.5 * 2^23 times them. */
struct scales { __m512 once, shift; };

AVX512 BODY struct scales load_scales(const uint32_t *scales) {
    __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)scales);
    struct scales ws;
    ws.once = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    ws.shift = _mm512_mul_ps(ws.once, _mm512_set1_ps(12582912.0f));
    return ws;
}

/* y + (float)s * ws * x, where s comes as SHIFT + s: two instructions are enough. (A scale of weights has 8 bits, whence
 * `shift` is exact, and the first rounds s * ws once.) */
AVX512 BODY __m512 add_product(__m512 y, __m512i s, struct scales ws, float x) {
    return _mm512_fmadd_ps(_mm512_fmsub_ps(_mm512_castsi512_ps(s), ws.once, ws.shift), _mm512_set1_ps(x), y);
}

/* The part of one group in y, which is sixteen rows times `many` vectors. Two sums, for one would wait for itself. (Constants
 * to the compiler: many, columns, bits.) */
AVX512 BODY void add_group(__m512 y[8], const uint32_t *scales, const uint32_t *w, const struct activations *x, size_t at,
                           const size_t many, const size_t columns, const int bits) {
    const size_t half = columns / 8, stride = group_width(bits) / 4;
    const four_bytes *q = (const four_bytes *)(x->q + at * group_width(bits));
    struct scales ws = load_scales(scales);
    __m512i v[16];
    load_group(v, w, columns, bits);
    UNROLL8 for (size_t i = 0; i < many; i++, q += stride) {
        __m512i s = _mm512_set1_epi32(x->offset[at + i]), more = _mm512_setzero_si512();
        for (size_t c = 0; c < half; c++) s = _mm512_dpbusd_epi32(s, v[c], _mm512_set1_epi32(q[c]));
        for (size_t c = half; c < 2 * half; c++) more = _mm512_dpbusd_epi32(more, v[c], _mm512_set1_epi32(q[c]));
        y[i] = add_product(y[i], _mm512_add_epi32(s, more), ws, x->scale[at + i]);
    }
}

/* Sixteen rows at a time; `many` (a constant to the compiler) vectors from t on, all of one pack, against the same weights. */
AVX512 BODY void tile_vnni(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w,
                           const struct activations *x, size_t t, const size_t many, const int bits, const int ask) {
    size_t whole = whole_groups(x, bits), at = group_at(x, t, 0), words = group_words(bits);
    __m512 y[8];
    for (size_t i = 0; i < many; i++) y[i] = _mm512_setzero_ps();
    for (size_t g = 0; g < whole; g++, at += x->pack, scales += 8, w += words) {
        for (size_t i = 0; i < words && ask && t == 0; i += 16) PREFETCH(w + FAR + i);
        add_group(y, scales, w, x, at, many, group_width(bits), bits);
    }
    if (whole < x->groups) add_group(y, scales, w, x, at, many, 32, bits);
    for (size_t i = 0; i < many; i++) _mm512_storeu_ps(out + i * out_stride, y[i]);
}

AVX512 BODY void tiles_vnni(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w,
                            const struct activations *x, size_t from, size_t to, const int bits, const int ask) {
    size_t t = from;
    for (; t % 8 == 0 && t + 8 <= to; t += 8, out += 8 * out_stride)
        tile_vnni(out, out_stride, scales, w, x, t, 8, bits, ask);
    for (; t % 4 == 0 && t + 4 <= to; t += 4, out += 4 * out_stride)
        tile_vnni(out, out_stride, scales, w, x, t, 4, bits, ask);
    for (; t < to; t++, out += out_stride) tile_vnni(out, out_stride, scales, w, x, t, 1, bits, ask);
}

AVX512 BODY void tile_avx512(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w,
                             const struct activations *x, size_t from, size_t to, const int bits) {
    tiles_vnni(out, out_stride, scales, w, x, from, to, bits, 0);
}

TILE_KERNELS(avx2, AVX2)
TILE_KERNELS(avx512, AVX512)

static const struct kernels avx2_kernels = {
    "avx2", begin_plain, end_plain,
    rows_f32_avx2, tile_q8_avx2, tile_q4_avx2, combine_avx2, add_products_avx2, silu_times_avx2, soften_avx2,
    absorb_row_avx2, quantise_avx2
};
static const struct kernels avx512_kernels = {
    "avx512vnni", begin_plain, end_plain,
    rows_f32_avx2, tile_q8_avx512, tile_q4_avx512, combine_avx512, add_products_avx512, silu_times_avx512,
    soften_avx512, absorb_row_avx512, quantise_avx512
};

#ifdef BASED_AMX
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")))
enum { PANEL = 1024 };                  /* columns unpacked at a time: they and the sums fit the first-level cache   */
typedef __m512i panel[PANEL / 4];       /* weights as bytes with sign, four columns of sixteen rows each             */

/* Zeros take the place of the half that the last group may lack. */
AVX512 BODY void unpack_panel(panel to, const uint32_t *w, size_t columns, const int bits) {
    __m512i *next = to;
    for (size_t i = 0; i < columns; i += 32, next += 8, w += tile_words(32, bits)) {
        __m512i v[16];
        load_group(v, w, 32, bits);
        for (size_t c = 0; c < 8; c++) next[c] = _mm512_sub_epi8(v[c], _mm512_set1_epi8(bits == 8 ? -128 : 8));
    }
    for (size_t c = 0; c < 8 && columns % group_width(bits); c++) next[c] = _mm512_setzero_si512();
}

/* Tile `sum` becomes SHIFT (all of `shift`) + sixteen vectors times sixteen rows of group g: [t][r]. (Tiles are named by
 * literals.) */
#define MULTIPLY_TILES(sum, g)                                                                                           \
    do {                                                                                                                 \
        _tile_loadd(sum, shift, 0);                                                                                      \
        if (bits == 8) {                                                                                                 \
            _tile_loadd(2, q + (g) * 1024, 64);                                                                          \
            _tile_loadd(3, w + (g) * 16, 64);                                                                            \
            _tile_dpbssd(sum, 2, 3);                                                                                     \
        } else {                                                                                                         \
            _tile_loadd(4, q + (g) * 512, 32);                                                                           \
            _tile_loadd(5, w + (g) * 8, 64);                                                                             \
            _tile_dpbssd(sum, 4, 5);                                                                                     \
        }                                                                                                                \
    } while (0)

/* y[t] += the sums of a group, scaled. */
AVX512 BODY void add_scaled(__m512 y[16], const __m512i s[16], const uint32_t *scales, const float *x_scale) {
    struct scales ws = load_scales(scales);
    UNROLL16 for (size_t i = 0; i < 16; i++) y[i] = add_product(y[i], s[i], ws, x_scale[i]);
}

/* With each group, asks for so many bytes of what lies ahead. */
BODY size_t asked(const int bits) { return bits == 8 ? 128 : 64; }
BODY void ask(const char *ahead, const int bits) {
    PREFETCH(ahead);
    if (bits == 8) PREFETCH(ahead + 64);
}

/* A panel's part of the products of sixteen vectors, of which the first `many` are wanted; `at` is where their groups begin.
 * While one group is scaled, the tile unit hands out the next and multiplies the one after; and weights that will be needed,
 * at `ahead`, are asked of memory. */
AMX BODY void add_panel(float *out, size_t out_stride, size_t many, const uint32_t *scales, panel w, size_t groups,
                        const struct activations *x, size_t at, int first, const char *ahead, const int bits) {
    const int8_t *q = x->q + at * group_width(bits);
    const float *x_scale = x->scale + at;
    const __m512i shift[1] = { _mm512_set1_epi32(SHIFT) };
    __m512i s[2][16];
    __m512 y[16];
    UNROLL16 for (size_t i = 0; i < 16; i++)
        y[i] = first || i >= many ? _mm512_setzero_ps() : _mm512_loadu_ps(out + i * out_stride);
    MULTIPLY_TILES(0, 0);
    _tile_stored(0, s[0], 64);
    if (groups > 1) MULTIPLY_TILES(1, 1);
    for (size_t g = 0;;) {
        if (g + 2 < groups) MULTIPLY_TILES(0, g + 2);
        _tile_stored(1, s[1], 64);
        ask(ahead + g * asked(bits), bits);
        add_scaled(y, s[0], scales + g * 8, x_scale + g * 16);
        if (++g == groups) break;
        if (g + 2 < groups) MULTIPLY_TILES(1, g + 2);
        _tile_stored(0, s[0], 64);
        ask(ahead + g * asked(bits), bits);
        add_scaled(y, s[1], scales + g * 8, x_scale + g * 16);
        if (++g == groups) break;
    }
    UNROLL16 for (size_t i = 0; i < 16; i++) if (i < many) _mm512_storeu_ps(out + i * out_stride, y[i]);
}

AMX BODY void tile_amx(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w, const struct activations *x,
                       size_t from, size_t to, const int bits) {
    const size_t width = group_width(bits), stored = filled_up(x->cols);
    panel weights;
    if (x->pack < 16 || from % 16) {
        tiles_vnni(out, out_stride, scales, w, x, from, to, bits, 1);
        return;
    }
    for (size_t first = 0; first < stored; first += PANEL) {
        size_t columns = stored - first < PANEL ? stored - first : PANEL;
        size_t g = first / width, groups = (columns + width - 1) / width;
        unpack_panel(weights, w, columns, bits);
        w += tile_words(columns, bits);
        for (size_t t = from; t < to; t += 16)
            add_panel(out + (t - from) * out_stride, out_stride, to - t, scales + g * 8, weights, groups, x, group_at(x, t, g),
                      g == 0, (const char *)w + (t - from) / 16 * groups * asked(bits), bits);
    }
}

/* Setting the tiles up takes as long as six products, so it is done once for a block. */
AMX static void begin_amx(size_t n) {
    static const struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {
        1, 0, { 0 },                    /* sums twice; vectors and weights of 8 bits, of 4 bits                      */
        { 64, 64, 64, 64, 32, 64 }, { 16, 16, 16, 16, 16, 8 }
    };
    if (pack_of(n) == 16) _tile_loadconfig(&shape);
}

AMX static void end_amx(void) {
    _tile_release();
}

ROWS_KERNEL(amx, AVX2, 1)
TILE_KERNELS(amx, AMX)

static const struct kernels amx_kernels = {
    "amx", begin_amx, end_amx,
    rows_f32_amx, tile_q8_amx, tile_q4_amx, combine_avx512, add_products_avx512, silu_times_avx512,
    soften_avx512, absorb_row_avx512, quantise_avx512
};

/* The tiles are 8 KB more for the system to save whenever it switches, so Linux wants to be asked, once for a whole process.
 * Asking again does no harm. */
static int may_use_amx(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3            /* amx-tile, amx-int8              */
        && syscall(SYS_arch_prctl, 0x1023, 18) == 0;                                /* ARCH_REQ_XCOMP_PERM, XTILEDATA  */
}
#endif

static const struct kernels *choose_kernels(int flags) {
    if (flags & BASED_PLAIN || !__builtin_cpu_supports("avx2")) return &plain_kernels;
    if (flags & BASED_AVX2 || !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bw")
        || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return &avx2_kernels;
#ifdef BASED_AMX
    if (!(flags & BASED_AVX512) && may_use_amx()) return &amx_kernels;
#endif
    return &avx512_kernels;
}

#elif defined(BASED_DOTPROD)

/* Four rows in a register; both factors signed. */
BODY void tile_dotprod(float *out, size_t out_stride, const uint32_t *scales, const uint32_t *w,
                       const struct activations *x, size_t from, size_t to, const int bits) {
    const uint8x16_t bias = vdupq_n_u8(128), low = vdupq_n_u8(15);
    for (size_t t = from; t < to; t++, out += out_stride) {
        float32x4_t y[4] = { vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0) };
        for (size_t g = 0; g < x->groups; g++) {
            size_t at = group_at(x, t, g), quads = group_columns(x, g, bits) / 4;
            int32x4_t s[4];
            s[0] = s[1] = s[2] = s[3] = vdupq_n_s32(bits == 8 ? 0 : x->offset[at] - SHIFT);
            for (size_t c = 0; c < quads; c++) {
                const uint32_t *word = w + g * group_words(bits) + 16 * (bits == 8 ? c : c / 2);
                int32_t four;
                memcpy(&four, x->q + at * group_width(bits) + 4 * c, 4);
                int8x16_t xv = vreinterpretq_s8_s32(vdupq_n_s32(four));
                for (size_t h = 0; h < 4; h++) {
                    uint8x16_t v = vreinterpretq_u8_u32(vld1q_u32(word + 4 * h));
                    if (bits == 8) v = veorq_u8(v, bias);
                    else v = c % 2 ? vshrq_n_u8(v, 4) : vandq_u8(v, low);
                    s[h] = vdotq_s32(s[h], vreinterpretq_s8_u8(v), xv);
                }
            }
            for (size_t h = 0; h < 4; h++) {
                uint16x4_t half = vreinterpret_u16_u32(vld1_u32(scales + g * 8 + 2 * h));
                float32x4_t ws = vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16));
                y[h] = vfmaq_n_f32(y[h], vmulq_f32(vcvtq_f32_s32(s[h]), ws), x->scale[at]);
            }
        }
        for (size_t h = 0; h < 4; h++) vst1q_f32(out + 4 * h, y[h]);
    }
}

TILE_KERNELS(dotprod, )

static const struct kernels dotprod_kernels = {
    "dotprod", begin_plain, end_plain,
    rows_f32_plain, tile_q8_dotprod, tile_q4_dotprod, combine_plain, add_products_plain, silu_times_plain,
    soften_plain, absorb_row_plain, quantise_plain
};

static const struct kernels *choose_kernels(int flags) {
    return flags & BASED_PLAIN ? &plain_kernels : &dotprod_kernels;
}

#else

static const struct kernels *choose_kernels(int flags) {
    (void)flags;
    return &plain_kernels;
}
#endif

/* ==== Sessions =======================================================================================================
 * What moves. One block of memory, laid out once; the offsets are in floats from its start.
 */
struct row {                            /* one token of the block being computed                                 */
    based_session *s;                   /* whose                                                                 */
    uint64_t t;                         /* its position                                                          */
    float *out;                         /* where its logits go                                                   */
};

struct based_session {
    const based_model *m;
    uint64_t count;                     /* tokens fed                                                            */
    uint64_t history;                   /* a hash of all of them                                                 */
    uint32_t block;                     /* tokens computed together at most                                      */
    int threads;
    int both_ways;                      /* based_feed_window: all keys of the block are absorbed before any is read */
    int arrived, round;                 /* where threads meet                                                    */
    int crowded;                        /* more threads than processors                                          */
    int patience, wary;                 /* how long they wait awake (nanoseconds), and whether others need the processors */
    void *owned;                        /* what based_session_free gives back                                    */
    struct row *row;                    /* (block)                                                               */
    float *x;                           /* (block, dim) the residual stream                                      */
    float *xn;                          /* (block, dim) normalised, or what a projection gives back              */
    float *xs;                          /* (block, dim) the mixer's input                                        */
    float *u;                           /* (block, widest_in) what in/up produce                                 */
    float *y;                           /* (block, widest_mid) what out/down consume                             */
    float *slot;                        /* (slots, slot) scratch of the heads                                    */
    float *q;                           /* (block, groups, group_width bytes) quantised vectors                  */
    float *q_scale, *q_offset;          /* (block, groups) their scales, and offsets as int32                    */
    float *state;                       /* (state) everything that the past determines                           */
    float *logits;                      /* (width) of the last token                                             */
};

/* ---- Threads ------------------------------------------------------------------------------------------------------
 * One parallel region computes a whole block. Every thread walks through the same forward pass, does its share of each
 * step, and meets the others before the next: the steps are far too short to start threads for. No result depends on the
 * split, because every number is computed by one thread, in one order.
 */
struct worker {
    based_session *p;                   /* whose scratch memory is used                                          */
    size_t id, of;                      /* this thread, and how many                                             */
};

/* A worker's share of n things: from share(n, w, 0) up to share(n, w, 1). */
static size_t share(size_t n, const struct worker *w, size_t end) {
    return n / w->of * (w->id + end) + n % w->of * (w->id + end) / w->of;
}

enum { QUICK_LOOKS = 2000, PATIENCE_LEAST = 10000, PATIENCE_MOST = 500000, TAKEN = 300000, WARY = 8000 };

#if defined(_OPENMP) && defined(BASED_POSIX)
static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Waits awake until the round is over, as it usually is within microseconds. If not, another program may have the processor
 * of one who is missing: to offer it ours too would cost us a whole turn at each meeting, so we sleep for a moment, and whoever
 * has slept is soon served. Who was away for TAKEN nanoseconds between two looks knows that others want the processors, and
 * for the next WARY waits each sleep halves the patience of all: two programs that look on while they keep each other from
 * working had a tenth of their speed left. (Never below PATIENCE_LEAST, or one who overslept would be waited for by others who
 * then oversleep.) Otherwise nobody is missing but someone is slower, and patience grows. Only if there are more workers than
 * processors do we step aside at once, for one of ours. */
static void await(based_session *p, int round) {
    int now, patience, was, wary, slept = 0;
    int64_t begun = 0, last = 0;
#pragma omp atomic read
    was = p->patience;
#pragma omp atomic read
    wary = p->wary;
    for (int seen = 0;; seen++) {
#pragma omp atomic read seq_cst
        now = p->round;
        if (now != round) break;
        if (seen < QUICK_LOOKS) continue;
        int64_t t = nanoseconds();
        if (begun == 0) begun = last = t;
        if (t - last > TAKEN) wary = WARY;
        last = t;
        if (p->crowded) sched_yield();
        else if (t - begun > was) slept = nanosleep(&(struct timespec){ 0, 20000 }, NULL) == 0;
    }
    if (wary > 0) {
#pragma omp atomic write
        p->wary = wary - 1;
    }
    patience = slept && wary > 0 ? was / 2 : was + was / 32;
    patience = patience < PATIENCE_LEAST ? PATIENCE_LEAST : patience > PATIENCE_MOST ? PATIENCE_MOST : patience;
    if (patience == was) return;
#pragma omp atomic write
    p->patience = patience;
}
#elif defined(_OPENMP)
static void await(based_session *p, int round) {
    int now;
    do {
#pragma omp atomic read seq_cst
        now = p->round;
    } while (now == round);
}
#endif

/* Returns when all workers are here. */
static void meet(const struct worker *w) {
#ifdef _OPENMP
    based_session *p = w->p;
    int round, arrived;
    if (w->of == 1) return;
#pragma omp atomic read seq_cst
    round = p->round;
#pragma omp atomic capture seq_cst
    arrived = ++p->arrived;
    if (arrived < (int)w->of) {
        await(p, round);
        return;
    }
    p->arrived = 0;
#pragma omp atomic write seq_cst
    p->round = round ^ 1;
#else
    (void)w;
#endif
}

/* Sixteen rows of a (or the last ones) times all vectors. */
static void matmul_tile(float *out, size_t out_stride, const struct matrix *a, size_t first, size_t rows,
                        const struct activations *x, const struct kernels *k) {
    if (a->dtype == BASED_F32) {
        k->rows_f32(out, out_stride, a->data + first * a->cols, rows, x);
    } else {
        const uint32_t *scales = a->scales + first / 16 * x->groups * 8;
        const uint32_t *words = a->words + first / 16 * tile_words(a->cols, x->bits);
        void (*tile)(float *, size_t, const uint32_t *, const uint32_t *, const struct activations *, size_t, size_t) =
            x->bits == 4 ? k->tile_q4 : k->tile_q8;
        if (rows == 16) tile(out, out_stride, scales, words, x, 0, x->n);
        for (size_t t = 0; rows < 16 && t < x->n; t++) {        /* a tile that sticks out must not write there            */
            float y[16];
            tile(y, 16, scales, words, x, t, t + 1);
            memcpy(out + t * out_stride, y, rows * sizeof *y);
        }
    }
    for (size_t t = 0; a->bias && t < x->n; t++)
        for (size_t i = 0; i < rows; i++) out[t * out_stride + i] += a->bias[first + i];
}

/* out[t][r] = a.row(first + r) . x[t] + bias, for `rows` rows and n vectors x (n, cols); first is a multiple of 16. Weights
 * are read once for all vectors; each number is the same sum whatever n and however many threads. x must be complete
 * before, and out is when this returns. */
static void matmul(float *out, size_t out_stride, const struct matrix *a, size_t first, size_t rows, const float *x,
                   size_t n, const struct worker *w) {
    based_session *p = w->p;
    struct activations act = { x, (int8_t *)p->q, p->q_scale, (int32_t *)(void *)p->q_offset, n, a->cols,
                               groups(a->cols, bits_of(a->dtype)), pack_of(n), bits_of(a->dtype) };
    size_t count = (rows + 15) / 16;
    if (a->dtype != BASED_F32) {
        p->m->k->quantise(&act, share(n * act.groups, w, 0), share(n * act.groups, w, 1));
        meet(w);
    }
    for (size_t i = share(count, w, 0); i < share(count, w, 1); i++) {
        size_t r = i * 16, many = rows - r < 16 ? rows - r : 16;
        matmul_tile(out + r, out_stride, a, first + r, many, &act, p->m->k);
    }
    meet(w);
}

static float *state_of(const struct row *r, const struct layer *l) {
    return r->s->state + l->state;
}

/* Turns the first `rotary` pairs (i, i + width/2) of each head by the token's position times the pair's frequency. */
static void rotate(float *heads, size_t count, const struct layer *l, uint64_t t) {
    size_t width = l->c->key_width, half = width / 2;
    for (size_t i = 0; i < l->c->rotary; i++) {
        float c, s;
        cos_sin(two_words(l->turns + 2 * i) * t, &c, &s);
        for (size_t h = 0; h < count; h++) {
            float *a = heads + h * width + i, *b = a + half, x = *a, y = *b;
            *a = x * c - y * s;
            *b = y * c + x * s;
        }
    }
}

/* ==== The mixers =====================================================================================================
 * Each takes the rows of u (n, in_rows), one per token, updates the state of the token's session and leaves its result
 * in y (n, inner). Tokens of one session follow each other in order, so a block of tokens is a loop of single steps:
 * that is why feeding many and feeding one give the same bits.
 */

/* conv. State: the last taps - 1 inputs, (taps - 1, channels), as a ring: position t - k lives in slot (t - k) mod
 * (taps - 1), so the oldest, which tap 0 multiplies, is just where the newest will be written. */
static void mix_conv(const struct layer *l, const struct worker *w, size_t n) {
    size_t channels = l->c->value_width, past = l->c->taps - 1;
    size_t from = share(channels, w, 0), many = share(channels, w, 1) - from;
    const float *taps = l->taps + from;
    const struct kernels *k = w->p->m->k;
    for (size_t r = 0; r < n; r++) {
        const struct row *row = &w->p->row[r];
        float *ring = state_of(row, l) + from, *y = w->p->y + r * channels + from;
        const float *u = w->p->u + r * 2 * channels + from, *gate = u + channels;
        size_t oldest = past ? (size_t)(row->t % past) : 0;
        if (l->taps_bias) memcpy(y, l->taps_bias + from, many * sizeof *y);
        else memset(y, 0, many * sizeof *y);
        for (size_t i = 0; i < past; i++) k->add_products(y, taps + i * channels, ring + (oldest + i) % past * channels, many);
        k->add_products(y, taps + past * channels, u, many);
        k->silu_times(y, y, gate, many);
        if (past) memcpy(ring + oldest * channels, u, many * sizeof *u);
    }
}

/* window. State per key/value head: keys (key_width, window), one column per token, then values (window, value_width);
 * token t lives in column and row t mod window. The order of the keys does not matter to a softmax, so the ring is
 * read as it lies. */
static void window_head(const struct layer *l, based_session *p, size_t n, size_t head, float *weights) {
    const based_layer *c = l->c;
    const struct kernels *k = p->m->k;
    size_t dk = c->key_width, dv = c->value_width, window = c->window, group = c->heads / c->kv_heads;
    size_t width = in_rows(c), inner = inner_width(c);
    for (size_t r = 0; r < n; r++) {
        float *keys = state_of(&p->row[r], l) + head * window * (dk + dv), *values = keys + window * dk;
        const float *q = p->u + r * width, *key = q + query_width(c) + head * dk;
        const float *v = q + query_width(c) + key_width(c) + head * dv;
        uint64_t t = p->row[r].t;
        size_t at = (size_t)(t % window), seen = t < window ? (size_t)t + 1 : window;
        for (size_t i = 0; i < dk; i++) keys[i * window + at] = key[i];
        memcpy(values + at * dv, v, dv * sizeof *v);
        for (size_t h = head * group; h < (head + 1) * group; h++) {
            float *y = p->y + r * inner + h * dv, top = -FLT_MAX, total;
            k->combine(weights, q + h * dk, keys, dk, seen, window);
            total = k->soften(weights, seen, c->scale, &top);
            k->combine(y, weights, values, seen, dv, dv);
            for (size_t e = 0; e < dv; e++) y[e] /= total;
        }
    }
}

/* The features of n vectors at once: x (width, stride), one column per vector, becomes phi (features, n).
 * Monomials of degree p that begin with x_i are x_i times those of degree p - 1 that begin with x_i or later, and these
 * are the last ones in lexicographic order: every feature costs one multiplication, and no index table exists. */
static void features(float *phi, const float *x, size_t n, size_t stride, const based_taylor_kind *c) {
    size_t width = c->key_width;
    float *next = phi + n;
    for (size_t j = 0; j < n; j++) phi[j] = 1.0f;
    for (uint32_t p = 1; p <= c->degree; p++) {
        const float *end = next;                        /* of the monomials of degree p - 1                          */
        for (size_t i = 0; i < width; i++) {
            size_t many = (size_t)monomials(width - i, p - 1, BASED_MAX_FEATURES);
            const float *parent = end - many * n;
            if (c->kernel == BASED_DIAGONAL) {          /* x_i^p alone                                               */
                parent = p == 1 ? phi : end - (width - i) * n;
                many = 1;
            }
            for (size_t f = 0; f < many; f++, next += n)
                for (size_t j = 0; j < n; j++) next[j] = parent[f * n + j] * x[i * stride + j];
        }
    }
}

/* N of based.h part 7: what the weighted sum of values is divided by, and the original's rule for 0/0. */
static void divide(float *y, size_t n, float z, const based_taylor_kind *c) {
    if (c->normaliser == BASED_ONE) return;
    if (c->normaliser == BASED_ADD) z += c->normaliser_eps;
    if (c->normaliser == BASED_CLAMP) z = z > c->normaliser_eps ? z : c->normaliser_eps;
    for (size_t e = 0; e < n; e++) {
        y[e] /= z;
        if (c->normaliser != BASED_RAW) continue;
        if (y[e] != y[e]) y[e] = 0.0f;
        if (y[e] > FLT_MAX) y[e] = FLT_MAX;
        if (y[e] < -FLT_MAX) y[e] = -FLT_MAX;
    }
}

/* w(q, k_j) for `n` keys k (key_width, stride), q already scaled; a: the coefficients. */
static void kernel_weights(float *w, const float *q, const float *k, size_t n, size_t stride, const float *a,
                           const struct based_taylor *t) {
    const based_taylor_kind *c = &t->c;
    if (c->kernel == BASED_DOT) {
        t->k->combine(w, q, k, c->key_width, n, stride);
        for (size_t j = 0; j < n; j++) {
            float s = w[j], y = a[c->degree];
            for (uint32_t p = c->degree; p-- > 0;) y = y * s + a[p];
            w[j] = y;
        }
        return;
    }
    for (size_t j = 0; j < n; j++) {
        w[j] = a[0];
        for (size_t i = 0; i < c->key_width; i++) {
            float s = q[i] * k[i * stride + j], y = a[c->degree];
            for (uint32_t p = c->degree; p-- > 1;) y = y * s + a[p];
            w[j] += y * s;
        }
    }
}

/* taylor. State per key/value head, with D = features, C = chunk and N = keep + window + C:
 *     S (D, value_width)   sum of phi(k) v^T over the chunks that have joined
 *     z (D)                sum of phi(k) over them; z[0], the number of tokens, is filled in from an integer
 *     K (key_width, N)     keys of the tokens that have not, the oldest first, one column per token
 *     V (N, value_width)   their values
 *     L (D, value_width/2) what S has lost to rounding, two bfloat16 to a word
 *     l (D)                what z has lost
 * Adding token by token to S would lose low bits once S is large. So the last few tokens are kept as they are, their
 * weights w(q, k) evaluated directly (the same polynomial), and join S together, so that S is only written once per chunk.
 * What the rounding of that sum cuts off is kept and comes along the next time. With both, the error does not grow with
 * the text (tests/endless.py measures it); without L it does, and is seen after some hundred thousand tokens.
 *
 * With a window, the last tokens stay in K and V that much longer, and what they weigh there is exp(s), exactly: softmax
 * attention nearby, joined by what the polynomial makes of the rest under one denominator.
 *
 * The polynomial is never near zero, so a sum of everything ever read slowly drowns what matters now. A layer that forgets
 * takes a part of the sums off each time a chunk joins them: a token fades, exponentially, with its age. Errors fade with it,
 * so L is not there; l is, because z[0] grows by the same number each time, and so would its error. The first `keep` tokens
 * never fade: models lean on them as on a zero point (Xiao et al. 2023).
 */
struct taylor_state {
    float *s, *z, *k, *v, *lost, *lost_z;
    uint64_t count;                     /* tokens absorbed                                                       */
    size_t pending;                     /* how many of them are in K and V, at most N                            */
};

/* The state that begins at `base`. N tokens may be pending: C of them join the sums when the next one comes. */
static struct taylor_state taylor_state(float *base, const struct based_taylor *t, uint64_t count, size_t pending) {
    size_t d = t->features, dk = t->c.key_width, dv = t->c.value_width;
    struct taylor_state s;
    s.s = base;
    s.z = s.s + d * dv;
    s.k = s.z + d;
    s.v = s.k + slots(&t->c) * dk;
    s.lost = s.v + slots(&t->c) * dv;
    s.lost_z = s.lost + (t->c.forget > 0.0f ? 0 : d * ((dv + 1) / 2));
    s.count = count;
    s.pending = pending;
    return s;
}

/* total[i] += x[i] - forget * total[i]; what has faded away becomes zero before it is subnormal. */
BODY void fade_row(float *total, float forget, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float now = total[i] + (x[i] - forget * total[i]);
        total[i] = fabsf(now) < 1e-30f ? 0.0f : now;
    }
}

/* S += sum of phi_j v_j^T, z += sum of phi_j, for n tokens: phi (D, n), v (n, value_width). A layer that forgets lets S and z
 * fade before. */
static void add_to_sums(struct taylor_state *s, const struct based_taylor *t, const float *phi, const float *v, size_t n) {
    size_t dv = t->c.value_width;
    float forget = t->c.forget;
    int fades = forget > 0.0f;
    for (size_t f = 0; f < t->features; f++) {
        float part[32], key = sum(phi + f * n, n);
        if (fades) key -= forget * s->z[f];
        s->lost_z[f] = add_and_keep(s->z + f, key + s->lost_z[f]);
        for (size_t e = 0; e < dv; e += 32) {
            size_t width = dv - e < 32 ? dv - e : 32;
            t->k->combine(part, phi + f * n, v + e, n, width, dv);
            float *total = s->s + f * dv + e, *lost = s->lost + f * ((dv + 1) / 2) + e / 2;
            if (fades) fade_row(total, forget, part, width);
            else t->k->absorb_row(total, lost, part, width);
        }
    }
}

/* The sums hold all tokens but those pending; z[0], their number unless they fade, comes from the integer. */
static void count_sums(struct taylor_state *s, const struct based_taylor *t) {
    uint64_t n = s->count - s->pending;
    if (t->c.forget > 0.0f) return;
    s->z[0] = n >> 63 ? -(float)(0 - n) : (float)n;     /* below zero if what was taken off is still pending             */
    s->lost_z[0] = 0.0f;
}

/* The oldest chunk but for the tokens that are kept joins the sums, and those after it move up. scratch: (D, C). */
static void join(struct taylor_state *s, const struct based_taylor *t, float *scratch) {
    size_t chunk = t->c.chunk, dv = t->c.value_width, many = slots(&t->c), after;
    float *k = s->k + t->c.keep, *v = s->v + t->c.keep * dv;
    features(scratch, k, chunk, many, &t->c);
    add_to_sums(s, t, scratch, v, chunk);
    s->pending -= chunk;
    count_sums(s, t);
    after = s->pending - t->c.keep;
    for (size_t i = 0; i < t->c.key_width; i++) memmove(k + i * many, k + i * many + chunk, after * sizeof *k);
    memmove(v, v + chunk * dv, after * dv * sizeof *v);
}

/* One token more. scratch: (D, C). */
static void absorb(struct taylor_state *s, const struct based_taylor *t, const float *k, const float *v, float *scratch) {
    size_t many = slots(&t->c), dv = t->c.value_width, at;
    if (s->pending == many) join(s, t, scratch);
    at = s->pending++;
    for (size_t i = 0; i < t->c.key_width; i++) s->k[i * many + at] = k[i];
    memcpy(s->v + at * dv, v, dv * sizeof *v);
    s->count++;
}

/* The weights of the pending tokens; returns their sum. With a window they are exp(s), and all weights are counted in units of
 * exp(top), so that none overflows: also those in y and *z, what the sums have given. They do not count if they add up to zero
 * or less, as those of a polynomial may where exp is small. */
static float weigh_pending(float *weights, const struct taylor_state *s, const struct based_taylor *t, const float *q,
                           const float *a, float *y, float *z) {
    float top = *z > 0.0f ? 0.0f : -FLT_MAX, total;
    if (!t->c.window) {
        kernel_weights(weights, q, s->k, s->pending, slots(&t->c), a, t);
        return sum(weights, s->pending);
    }
    t->k->combine(weights, q, s->k, t->c.key_width, s->pending, slots(&t->c));
    total = t->k->soften(weights, s->pending, 1.0f, &top);
    if (*z > 0.0f) {
        float unit = exponential(-top);
        for (size_t e = 0; e < t->c.value_width; e++) y[e] *= unit;
        *z *= unit;
    } else {
        memset(y, 0, t->c.value_width * sizeof *y);
        *z = 0.0f;
    }
    return total;
}

/* y = sum over all of the past, the pending tokens included, of w(q, k) v / N, with the coefficients of head `head`. */
static void read_taylor(float *y, const struct taylor_state *s, const struct based_taylor *t, const float *q, size_t head,
                        float *scratch) {
    const based_taylor_kind *c = &t->c;
    const float *a = c->coefficients + head * (c->degree + 1);
    size_t dk = c->key_width, dv = c->value_width, f = 0;
    float *psi = scratch, *weights = psi + t->features, *scaled = weights + slots(c), z, total, part[32];
    for (size_t i = 0; i < dk; i++) scaled[i] = q[i] * c->scale;
    features(psi, scaled, 1, 1, c);
    for (uint32_t p = 0; p <= c->degree; p++) {
        size_t many = c->kernel == BASED_DIAGONAL && p ? dk : (size_t)monomials(dk, p, BASED_MAX_FEATURES);
        for (size_t end = f + many; f < end; f++) psi[f] *= a[p] * t->multiplicity[f];
    }
    t->k->combine(y, psi, s->s, t->features, dv, dv);
    z = dot(psi, s->z, t->features);
    total = weigh_pending(weights, s, t, scaled, a, y, &z);
    for (size_t e = 0; e < dv; e += 32) {
        size_t width = dv - e < 32 ? dv - e : 32;
        t->k->combine(part, weights, s->v + e, s->pending, width, dv);
        for (size_t i = 0; i < width; i++) y[e + i] += part[i];
    }
    divide(y, dv, z + total, c);
}

/* In a session, the position says how many tokens are pending: each chunk is full before it joins the sums. */
static struct taylor_state taylor_head_state(const struct row *r, const struct layer *l, size_t head) {
    const based_taylor_kind *c = &l->taylor.c;
    size_t stay = (size_t)c->keep + c->window, pending = (size_t)r->t;
    if (r->t > stay) pending = stay + (size_t)((r->t - stay - 1) % c->chunk) + 1;
    return taylor_state(state_of(r, l) + head * (size_t)sums_floats(c, l->taylor.features), &l->taylor, r->t, pending);
}

/* The query heads of row r that share this key/value head read its state. */
static void read_group(const struct layer *l, based_session *p, size_t r, size_t head, const struct taylor_state *state,
                       float *scratch) {
    const based_layer *c = l->c;
    const float *q = p->u + r * in_rows(c);
    float *y = p->y + r * inner_width(c);
    size_t group = c->heads / c->kv_heads;
    for (size_t h = head * group; h < (head + 1) * group; h++)
        read_taylor(y + h * c->value_width, state, &l->taylor, q + h * c->key_width, h, scratch);
}

static void taylor_head(const struct layer *l, based_session *p, size_t n, size_t head, float *scratch) {
    const based_layer *c = l->c;
    struct taylor_state state;
    for (size_t r = 0; r < n; r++) {
        const float *k = p->u + r * in_rows(c) + query_width(c) + head * c->key_width;
        const float *v = p->u + r * in_rows(c) + query_width(c) + key_width(c) + head * c->value_width;
        state = taylor_head_state(&p->row[r], l, head);
        absorb(&state, &l->taylor, k, v, scratch);
        if (!p->both_ways) read_group(l, p, r, head, &state, scratch);
    }
    for (size_t r = 0; p->both_ways && r < n; r++) read_group(l, p, r, head, &state, scratch);
}

/* Heads know nothing of each other, so workers may share them out in any way. */
static void mix_attention(const struct layer *l, const struct worker *w, size_t n) {
    const based_layer *c = l->c;
    based_session *p = w->p;
    for (size_t r = share(n, w, 0); r < share(n, w, 1); r++) {
        float *q = p->u + r * in_rows(c), *k = q + query_width(c);
        rotate(q, c->heads + c->kv_heads, l, p->row[r].t);              /* q's and k's lie side by side                      */
        for (size_t i = 0; l->key_mean && i < key_width(c); i++) k[i] -= l->key_mean[i];
    }
    if (c->rotary || l->key_mean) meet(w);
    for (size_t h = share(c->kv_heads, w, 0); h < share(c->kv_heads, w, 1); h++) {
        float *scratch = p->slot + (p->m->slots > 1 ? h * p->m->slot : 0);
        if (c->mixer == BASED_WINDOW) window_head(l, p, n, h, scratch);
        else taylor_head(l, p, n, h, scratch);
    }
}

/* ==== The block: one layer, for n rows ============================================================================== */

/* SHIFT: half of the channels of xs come from the token before, whose row another worker may have made. */
static void shift_rows(const struct layer *l, const struct worker *w, size_t n) {
    based_session *p = w->p;
    size_t dim = p->m->c->dim, kept = (dim + 1) / 2, moved = (dim - kept) * sizeof(float);
    meet(w);
    for (size_t r = 0; w->id == 0 && r < n; r++) {
        float *before = p->row[r].s->state + l->shift;
        memcpy(p->xs + r * dim + kept, before + kept, moved);
        memcpy(before + kept, p->x + r * dim + kept, moved);
    }
    meet(w);
}

/* VALUE_GATES: each head's result is scaled by one number, so a head can attend to nothing. */
static void gate_heads(const struct layer *l, const struct worker *w, size_t n) {
    size_t dv = l->c->value_width, heads = l->c->heads, dim = w->p->m->c->dim;
    for (size_t r = share(n, w, 0); r < share(n, w, 1); r++)
        for (size_t h = 0; h < heads; h++) {
            float open = sigmoid(dot(l->gate.data + h * dim, w->p->xs + r * dim, dim));
            for (size_t e = 0; e < dv; e++) w->p->y[(r * heads + h) * dv + e] *= open;
        }
    meet(w);
}

/* x += change, or x = change, for this worker's rows. */
static void add_or_replace(float *x, const float *change, size_t dim, size_t n, int replace, const struct worker *w) {
    for (size_t i = share(n, w, 0) * dim; i < share(n, w, 1) * dim; i++) x[i] = (replace ? 0.0f : x[i]) + change[i];
}

static void mixer_half(const struct layer *l, const struct worker *w, size_t n) {
    const based_layer *c = l->c;
    based_session *p = w->p;
    size_t dim = p->m->c->dim;
    for (size_t r = share(n, w, 0); r < share(n, w, 1); r++)
        memcpy(p->xs + r * dim, p->x + r * dim, dim * sizeof *p->x);
    if (c->flags & BASED_SHIFT) shift_rows(l, w, n);
    for (size_t r = share(n, w, 0); r < share(n, w, 1); r++)
        normalise(p->xn + r * dim, p->xs + r * dim, &l->norm1, dim);
    meet(w);
    matmul(p->u, l->in.rows, &l->in, 0, l->in.rows, p->xn, n, w);
    if (c->mixer == BASED_CONV) mix_conv(l, w, n);
    else mix_attention(l, w, n);
    meet(w);
    if (c->flags & BASED_VALUE_GATES) gate_heads(l, w, n);
    if (!(c->flags & BASED_NO_OUT)) matmul(p->xn, dim, &l->out, 0, dim, p->y, n, w);
    add_or_replace(p->x, c->flags & BASED_NO_OUT ? p->y : p->xn, dim, n, c->flags & BASED_NO_RESIDUAL, w);
}

static void mlp_half(const struct layer *l, const struct worker *w, size_t n) {
    based_session *p = w->p;
    size_t dim = p->m->c->dim, hidden = l->c->hidden, rows = l->up.rows;
    size_t from = share(hidden, w, 0), to = share(hidden, w, 1);
    for (size_t r = share(n, w, 0); r < share(n, w, 1); r++)
        normalise(p->xn + r * dim, p->x + r * dim, &l->norm2, dim);
    meet(w);
    matmul(p->u, rows, &l->up, 0, rows, p->xn, n, w);
    for (size_t r = 0; r < n; r++) {
        const float *gate = p->u + r * rows, *value = gate + hidden;
        float *y = p->y + r * hidden;
        if (l->c->mlp == BASED_SWIGLU) p->m->k->silu_times(y + from, gate + from, value + from, to - from);
        else for (size_t i = from; i < to; i++) y[i] = gelu(gate[i]);
    }
    meet(w);
    matmul(p->xn, dim, &l->down, 0, dim, p->y, n, w);
    add_or_replace(p->x, p->xn, dim, n, 0, w);
}

/* The whole forward pass of the n rows in p->row, from what enters (in p->x) to the final norm (in p->xn). */
static void forward(const struct worker *w, size_t n) {
    based_session *p = w->p;
    const based_model *m = p->m;
    size_t dim = m->c->dim;
    for (uint32_t i = 0; i < m->c->layers; i++) {
        const struct layer *l = &m->layer[i];
        if (l->c->mixer != BASED_MIXER_NONE) mixer_half(l, w, n);
        if (l->c->mlp != BASED_MLP_NONE) mlp_half(l, w, n);
    }
    for (size_t r = share(n, w, 0); r < share(n, w, 1); r++)
        normalise(p->xn + r * dim, p->x + r * dim, &m->final_norm, dim);
    meet(w);
}

/* ==== Feeding ========================================================================================================
 * A block is a list of rows. Rows of one session are consecutive tokens of its text; rows of different sessions have
 * nothing to do with each other but that they share each reading of the weights.
 */
static void embed(float *x, const based_model *m, int32_t token) {
    const struct matrix *a = &m->embedding;
    int bits = bits_of(a->dtype);
    size_t row = (size_t)token, r = row % 16, tile = row / 16, width = group_width(bits);
    if (a->dtype == BASED_F32) {
        memcpy(x, a->data + row * a->cols, a->cols * sizeof *x);
        return;
    }
    const uint32_t *word = a->words + tile * tile_words(a->cols, bits) + r;
    const uint32_t *two = a->scales + tile * groups(a->cols, bits) * 8 + r / 2;
    for (size_t e = 0; e < a->cols; e++) {
        size_t c = e / 4;
        uint32_t v = bits == 8 ? word[16 * c] >> (e % 4 * 8) & 255 : word[16 * (c / 2)] >> (e % 4 * 8 + c % 2 * 4) & 15;
        float scale = bf16(two[e / width * 8] >> (r % 2 * 16) & 0xffff);
        x[e] = (float)((int32_t)v - (bits == 8 ? 128 : 8)) * scale;
    }
}

size_t based_width(const based_model *m) {
    return m->c->rows ? m->c->vocab : m->c->dim;
}

/* The outputs of rows first .. first + n - 1 go where each wants them. The head is taken in tiles that fit the scratch memory:
 * a whole row of logits for every token of a block would be most of a session. */
static void head(const struct worker *w, size_t first, size_t n) {
    based_session *p = w->p;
    const based_model *m = p->m;
    const struct row *row = p->row + first;
    size_t dim = m->c->dim, width = based_width(m), tile = align16(m->widest_in);
    const float *x = p->xn + first * dim;
    for (size_t r = 0; m->c->rows == 0 && w->id == 0 && r < n; r++) memcpy(row[r].out, x + r * dim, dim * sizeof *x);
    for (size_t at = 0; m->c->rows && at < width; at += tile) {
        size_t rows = width - at < tile ? width - at : tile;
        matmul(p->u, tile, &m->head, at, rows, x, n, w);
        for (size_t r = share(n, w, 0); r < share(n, w, 1); r++) memcpy(row[r].out + at, p->u + r * tile, rows * sizeof *x);
        meet(w);
    }
}

static void compute_share(const struct worker *w, size_t n, size_t wanted) {
    const struct kernels *k = w->p->m->k;
    k->begin(n);
    forward(w, n);
    if (wanted) head(w, n - wanted, wanted);
    k->end();
}

/* Computes the n rows in p->row, and the outputs of the last `wanted` of them. */
static void compute(based_session *p, size_t n, size_t wanted) {
#ifdef _OPENMP
    if (p->threads > 1) {
        p->arrived = 0;
        p->crowded = p->threads > omp_get_num_procs();
#pragma omp parallel num_threads(p->threads)
        {
            struct worker w = { p, (size_t)omp_get_thread_num(), (size_t)omp_get_num_threads() };
            compute_share(&w, n, wanted);
        }
        return;
    }
#endif
    struct worker alone = { p, 0, 1 };
    compute_share(&alone, n, wanted);
}

/* One 32-bit word more. Each step is one-to-one in h, so two texts of equal hash that go on alike stay equal, and no word is
 * ever forgotten. */
static uint64_t history_word(uint64_t h, uint32_t word) {
    h = (h + word + 1) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

uint64_t based_history_of(uint64_t h, const int32_t *tokens, size_t n) {
    for (size_t i = 0; i < n; i++) h = history_word(h, (uint32_t)tokens[i]);
    return h;
}

/* A model that was trained to see the future gives something else, without a sign of it, if it is not shown any. */
static int check_direction(const based_model *m, based_error *e) {
    if (!(m->c->flags & BASED_BIDIRECTIONAL)) return BASED_OK;
    return fail(e, BASED_EINVAL, "this model looks at all inputs of a window in both directions: use based_feed_window, or "
                "export it with --mode causal to run it as what it was not trained to be");
}

static int check_tokens(const based_model *m, const int32_t *tokens, size_t n, based_error *e) {
    int status = check_direction(m, e);
    if (status) return status;
    if (m->c->input) return fail(e, BASED_EINVAL, "this model takes vectors of %u floats, not tokens", U64(m->c->input));
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= m->c->vocab)
            return fail(e, BASED_EINVAL, "token %u of %u is %s%u, but the vocabulary has %u", U64(i + 1), U64(n),
                        tokens[i] < 0 ? "-" : "", U64(tokens[i] < 0 ? -(int64_t)tokens[i] : tokens[i]),
                        U64(m->c->vocab));
    return BASED_OK;
}

/* Runs n <= block tokens of session s whose vectors are in s->x. Their outputs go to the rows of `out`; without it only the
 * last token of the feed gets one, for the session itself. */
static void run_block(based_session *s, size_t n, float *out, int last) {
    size_t width = based_width(s->m);
    for (size_t r = 0; r < n; r++) {
        s->row[r].s = s;
        s->row[r].t = s->count + r;
        s->row[r].out = out ? out + r * width : s->logits;
    }
    compute(s, n, out ? n : last ? 1 : 0);
    if (last && out) memcpy(s->logits, out + (n - 1) * width, width * sizeof *out);
    s->count += n;
}

int based_feed(based_session *s, const int32_t *tokens, size_t n, float *logits, based_error *e) {
    int status = check_tokens(s->m, tokens, n, e);
    size_t dim = s->m->c->dim, width = based_width(s->m);
    if (status) return status;
    for (size_t at = 0, many; at < n; at += many) {
        many = n - at < s->block ? n - at : s->block;
        for (size_t r = 0; r < many; r++) embed(s->x + r * dim, s->m, tokens[at + r]);
        run_block(s, many, logits ? logits + at * width : NULL, at + many == n);
    }
    s->history = based_history_of(s->history, tokens, n);
    return BASED_OK;
}

int based_step(based_session *s, int32_t token, based_error *e) {
    return based_feed(s, &token, 1, NULL, e);
}

/* n <= block vectors enter. */
static void enter(based_session *s, const float *x, size_t n) {
    const based_model *m = s->m;
    struct worker alone = { s, 0, 1 };
    if (m->input.data) matmul(s->x, m->c->dim, &m->input, 0, m->c->dim, x, n, &alone);
    else memcpy(s->x, x, n * m->c->dim * sizeof *x);
    for (size_t i = 0; i < n * m->c->input; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        s->history = history_word(s->history, bits);
    }
}

int based_feed_vectors(based_session *s, const float *x, size_t n, float *out, based_error *e) {
    size_t input = s->m->c->input, width = based_width(s->m);
    int status = check_direction(s->m, e);
    if (status) return status;
    if (!input) return fail(e, BASED_EINVAL, "this model takes tokens, not vectors");
    for (size_t at = 0, many; at < n; at += many) {
        many = n - at < s->block ? n - at : s->block;
        enter(s, x + at * input, many);
        run_block(s, many, out ? out + at * width : NULL, at + many == n);
    }
    return BASED_OK;
}

int based_feed_window(based_session *s, const float *x, size_t n, float *out, based_error *e) {
    const based_model *m = s->m;
    if (!m->c->input) return fail(e, BASED_EINVAL, "this model takes tokens, not vectors");
    if (n == 0 || n > s->block)
        return fail(e, BASED_EINVAL, "a window of %u inputs, but the session was made for blocks of 1 to %u", U64(n),
                    U64(s->block));
    for (uint32_t i = 0; i < m->c->layers; i++)
        if (m->layer[i].c->mixer == BASED_CONV || m->layer[i].c->window)
            return fail(e, BASED_EINVAL, "layer %u mixes by a convolution or a sliding window, which only look back", U64(i));
    based_reset(s);
    enter(s, x, n);
    s->both_ways = 1;
    run_block(s, n, out, 1);
    s->both_ways = 0;
    return BASED_OK;
}

int based_step_many(based_session *const *s, const int32_t *tokens, size_t n, based_error *e) {
    based_session *lead = n ? s[0] : NULL;
    int status = n ? check_tokens(lead->m, tokens, n, e) : BASED_OK;
    if (status) return status;
    for (size_t r = 0; r < n; r++) {
        if (s[r]->m != lead->m) return fail(e, BASED_EINVAL, "session %u is over another model", U64(r));
        if (n > s[r]->block)
            return fail(e, BASED_EINVAL, "%u sessions at once, but session %u was made for blocks of %u", U64(n), U64(r),
                        U64(s[r]->block));
        for (size_t other = 0; other < r; other++)
            if (s[other] == s[r]) return fail(e, BASED_EINVAL, "session %u is given twice", U64(r));
    }
    for (size_t r = 0; r < n; r++) {
        lead->row[r].s = s[r];
        lead->row[r].t = s[r]->count;
        lead->row[r].out = s[r]->logits;
        embed(lead->x + r * lead->m->c->dim, lead->m, tokens[r]);
    }
    if (n) compute(lead, n, n);
    for (size_t r = 0; r < n; r++) {
        s[r]->count++;
        s[r]->history = based_history_of(s[r]->history, tokens + r, 1);
    }
    return BASED_OK;
}

/* ==== Models and sessions in the caller's memory ===================================================================== */

size_t based_model_bytes(const void *bytes, size_t size, based_error *e) {
    const based_config *c = bytes;
    uint64_t n, floats = 0;
    if (check_header(bytes, size, e)) return 0;
    n = sizeof(based_model) + U64(c->layers) * sizeof(struct layer);
    for (uint32_t i = 0; i < c->layers; i++) {
        const based_layer *l = (const based_layer *)(c + 1) + i;
        based_taylor_kind kind = kind_of(l);
        uint64_t features = l->mixer == BASED_TAYLOR ? count_features(&kind, BASED_MAX_FEATURES) : 0;
        n += features * sizeof(float);
        floats += state_floats(c, l) + (features ? scratch_floats(&kind, features) : l->window);
    }
    if (floats > SIZE_MAX / 8)          /* size_t holds what a session has of state and scratch                      */
        return fail(e, BASED_ENOMEM, "a session needs %u bytes, more than this machine can address", 4 * floats), 0;
    if (n > SIZE_MAX) return fail(e, BASED_ENOMEM, "the model needs %u bytes, more than this machine can address", n), 0;
    return (size_t)n;
}

static int check_memory(const void *memory, size_t have, size_t need, based_error *e) {
    if (!memory || (uintptr_t)memory % 64) return fail(e, BASED_EINVAL, "the memory block must be aligned to 64 bytes");
    if (have < need) return fail(e, BASED_ENOMEM, "the memory block has %u bytes, %u are needed", U64(have), U64(need));
    return BASED_OK;
}

static int check_machine(based_error *e) {
    if (arithmetic_is_strict()) return BASED_OK;
    return fail(e, BASED_EMACHINE, "this build fuses or widens float operations; compile with -ffp-contract=off (and "
                "-msse2 -mfpmath=sse on 32-bit x86), without -ffast-math");
}

static int check_sum(const void *bytes, size_t size, uint64_t stored, based_error *e) {
    if (based_checksum((const unsigned char *)bytes + 32, size - 32) == stored) return BASED_OK;
    return fail(e, BASED_ECHECKSUM, "the checksum does not match: the checkpoint was damaged after it was written; copy or "
                "export it again");
}

static int machine_is_big_endian(void) {
    const uint32_t one = 1;
    return *(const unsigned char *)&one == 0;
}

int based_model_init(based_model **out, void *memory, size_t memory_bytes, const void *bytes, size_t size, int flags,
                     based_error *e) {
    int status = check_header(bytes, size, e);
    size_t need = status ? 0 : based_model_bytes(bytes, size, e);
    const based_config *c = bytes;
    based_model *m = memory;
    struct cursor cursor = { bytes, 0, size, 0, 0 };
    float *multiplicity;
    if (status) return status;
    if (!need) return BASED_ENOMEM;
    status = check_memory(memory, memory_bytes, need, e);
    if (status) return status;
    status = check_machine(e);
    if (status) return status;
    if (!machine_is_big_endian() && !(flags & BASED_NO_CHECKSUM)) status = check_sum(bytes, size, two_words(c->checksum), e);
    if (status) return status;
    memset(m, 0, need);
    m->c = c;
    m->k = choose_kernels(flags);
    bind(&cursor, m);
    if (cursor.short_of_bytes || cursor.at != size)
        return fail(e, BASED_EFORMAT, "the header describes %s than the %u bytes there are; the checkpoint is damaged",
                    cursor.short_of_bytes ? "more" : "less", U64(size));
    if (cursor.bad_scales)
        return fail(e, BASED_EFORMAT, "%u scales of weights are neither zero nor between 2^-82 and 2^20; export the "
                    "model again", cursor.bad_scales);
    multiplicity = (float *)(m->layer + c->layers);
    for (uint32_t i = 0; i < c->layers; i++) {
        struct layer *l = &m->layer[i];
        if (l->c->mixer != BASED_TAYLOR) continue;
        l->taylor.multiplicity = multiplicity;
        fill_multiplicity(multiplicity, &l->taylor.c);
        multiplicity += l->taylor.features;
    }
    *out = m;
    return BASED_OK;
}

/* ---- Are the weights numbers? ------------------------------------------------------------------------------------- */

struct census {
    const char *name, *part;            /* where the first one was that is no number                                 */
    uint64_t layer, of, bad, all;       /* layers: from 1, 0 for none; numbers there, how many are bad, bad anywhere  */
};

static void look_at(struct census *c, uint64_t layer, const char *name, const char *part, const float *x, uint64_t n) {
    uint64_t bad = 0;
    for (uint64_t i = 0; x && i < n; i++) bad += is_finite(x[i]) ? 0 : 1;
    if (bad && !c->all) c->name = name, c->part = part, c->layer = layer, c->of = n, c->bad = bad;
    c->all += bad;
}

static void look_at_matrix(struct census *c, uint64_t layer, const char *name, const struct matrix *a) {
    look_at(c, layer, name, "", a->data, U64(a->rows) * a->cols);
    look_at(c, layer, name, ".bias", a->bias, a->rows);
}

static void look_at_norm(struct census *c, uint64_t layer, const char *name, const struct norm *a, uint32_t dim) {
    look_at(c, layer, name, "", a->weight, dim);
    look_at(c, layer, name, ".bias", a->bias, dim);
}

static void look_at_layer(struct census *c, uint64_t i, const struct layer *l, uint32_t dim) {
    look_at_norm(c, i, "norm1", &l->norm1, dim);
    look_at_matrix(c, i, "in", &l->in);
    look_at(c, i, "taps", "", l->taps, U64(l->c->taps) * l->c->value_width);
    look_at(c, i, "taps", ".bias", l->taps_bias, l->c->value_width);
    if (l->c->mixer == BASED_TAYLOR)
        look_at(c, i, "coefficients", "", l->taylor.c.coefficients, U64(l->c->heads) * (l->c->degree + 1));
    look_at(c, i, "key_mean", "", l->key_mean, key_width(l->c));
    look_at_matrix(c, i, "gate", &l->gate);
    look_at_matrix(c, i, "out", &l->out);
    look_at_norm(c, i, "norm2", &l->norm2, dim);
    look_at_matrix(c, i, "up", &l->up);
    look_at_matrix(c, i, "down", &l->down);
}

int based_check_weights(const based_model *m, based_error *e) {
    struct census c = { NULL, NULL, 0, 0, 0, 0 };
    uint32_t dim = m->c->dim;
    look_at_matrix(&c, 0, "embedding", &m->embedding);
    look_at_matrix(&c, 0, "input", &m->input);
    for (uint32_t i = 0; i < m->c->layers; i++) look_at_layer(&c, U64(i) + 1, &m->layer[i], dim);
    look_at_norm(&c, 0, "final_norm", &m->final_norm, dim);
    if (m->head.data != m->embedding.data || m->head.scales != m->embedding.scales) look_at_matrix(&c, 0, "head", &m->head);
    else look_at(&c, 0, "head", ".bias", m->head.bias, m->c->rows);
    if (!c.all) return BASED_OK;
    if (c.layer)
        return fail(e, BASED_EFORMAT, "layer %u, %s%s: %u of the %u numbers are NaN or infinite, %u in all; export the model "
                    "again, or train it again", c.layer - 1, c.name, c.part, c.bad, c.of, c.all);
    return fail(e, BASED_EFORMAT, "%s%s: %u of the %u numbers are NaN or infinite, %u in all; export the model again, or train "
                "it again", c.name, c.part, c.bad, c.of, c.all);
}

/* Everything but the tokenizer's text is 4-byte words; a tokenizer says itself how many words it begins with. */
static void swap_words(unsigned char *p, size_t n) {
    for (; n >= 4; n -= 4, p += 4) {
        unsigned char a = p[0], b = p[1];
        p[0] = p[3];
        p[1] = p[2];
        p[2] = b;
        p[3] = a;
    }
}

/* Where the section after `at` begins. */
static uint64_t align64(uint64_t at) { return (at + 63) / 64 * 64; }

/* Swaps what follows the layers: the tokenizer's words, then all the tensors. */
static int swap_sections(unsigned char *p, size_t size, uint64_t at, uint32_t tokenizer_bytes, based_error *e) {
    uint32_t words = 0;
    if (tokenizer_bytes) {
        if (tokenizer_bytes < 4) return fail(e, BASED_EFORMAT, "the tokenizer section is damaged");
        swap_words(p + at, 4);
        memcpy(&words, p + at, 4);
        if (words == 0 || words > tokenizer_bytes / 4)
            return fail(e, BASED_EFORMAT, "the tokenizer section is damaged");
        swap_words(p + at + 4, (size_t)words * 4 - 4);
        at = align64(at + tokenizer_bytes);
    }
    if (at < size) swap_words(p + at, size - (size_t)at);
    return BASED_OK;
}

int based_to_native(void *bytes, size_t size, int flags, based_error *e) {
    based_config *c = bytes;
    unsigned char *p = bytes;
    uint64_t stored = 0, layers;
    if (!machine_is_big_endian() || size < sizeof *c || c->byte_order == BASED_BYTE_ORDER) return BASED_OK;
    if (memcmp(c->magic, BASED_MAGIC, 8)) return BASED_OK;      /* based_model_init says what is wrong               */
    for (int i = 0; i < 8; i++) stored |= U64(p[24 + i]) << (8 * i);
    if (!(flags & BASED_NO_CHECKSUM) && check_sum(bytes, size, stored, e)) return BASED_ECHECKSUM;
    swap_words(p + 8, offsetof(based_config, name) - 8);
    swap_words(p + offsetof(based_config, reserved), sizeof c->reserved);
    layers = align64(sizeof *c + U64(c->layers) * sizeof(based_layer));
    if (c->layers > BASED_MAX_LAYERS || layers > size || c->tokenizer_bytes > size - layers)
        return fail(e, BASED_EFORMAT, "the header describes more than the %u bytes there are", U64(size));
    swap_words(p + sizeof *c, (size_t)layers - sizeof *c);
    return swap_sections(p, size, layers, c->tokenizer_bytes, e);
}

const based_config *based_model_config(const based_model *m) { return m->c; }
const based_layer *based_model_layer(const based_model *m, uint32_t i) {
    return i < m->c->layers ? m->layer[i].c : NULL;
}
uint64_t based_model_parameters(const based_model *m) { return m->parameters; }
uint64_t based_model_weight_bytes(const based_model *m) { return m->weight_bytes; }
const char *based_model_kernels(const based_model *m) { return m->k->name; }
size_t based_state_bytes(const based_model *m) { return m->state * sizeof(float); }

int based_tokenizer_open(based_tokenizer *t, const based_model *m, based_error *e) {
    if (!m->tokenizer) return fail(e, BASED_EINVAL, "the checkpoint carries no tokenizer");
    return based_tokenizer_init(t, m->tokenizer, m->c->tokenizer_bytes, m->c->vocab, e);
}

/* Lays out a session: with memory NULL it only counts. */
static uint64_t lay_out(based_session *s, const based_model *m, uint64_t block, unsigned char *memory) {
    uint64_t at = 0, packed = block < 4 ? block : (block + 15) / 16 * 16, q_groups = packed * m->most_groups;
    struct { float **where; uint64_t n; } part[] = {
        { &s->x, block * m->c->dim }, { &s->xn, block * m->c->dim }, { &s->xs, block * m->c->dim },
        { &s->u, block * align16(m->widest_in) }, { &s->y, block * m->widest_mid },
        { &s->slot, U64(m->slots) * m->slot },
        { &s->q, packed * m->widest_q / 4 }, { &s->q_scale, q_groups }, { &s->q_offset, q_groups },
        { &s->state, m->state }, { &s->logits, based_width(m) }
    };
    at += align64(sizeof *s);
    if (memory) s->row = (struct row *)(void *)(memory + at);
    at += align64(block * sizeof(struct row));
    for (size_t i = 0; i < COUNT(part); i++) {
        if (memory) *part[i].where = (float *)(void *)(memory + at);
        at += align64(part[i].n * sizeof(float));
    }
    return at;
}

size_t based_session_bytes(const based_model *m, uint32_t block) {
    based_session count;
    uint64_t n = block && block <= BASED_MAX_BLOCK ? lay_out(&count, m, block, NULL) : 0;
    return n <= SIZE_MAX ? (size_t)n : 0;
}

int based_session_init(based_session **out, const based_model *m, void *memory, size_t memory_bytes, uint32_t block,
                       based_error *e) {
    size_t need = based_session_bytes(m, block);
    int status = need ? check_memory(memory, memory_bytes, need, e)
                      : fail(e, BASED_EINVAL, "a block of %u tokens; expected 1 to %u, and a session that fits in memory",
                             U64(block), U64(BASED_MAX_BLOCK));
    based_session *s = memory;
    if (status) return status;
    memset(s, 0, sizeof *s);
    s->m = m;
    s->block = block;
    s->threads = 1;
    s->patience = PATIENCE_MOST;
    lay_out(s, m, block, memory);
    based_reset(s);
    *out = s;
    return BASED_OK;
}

/* ==== State in and out ===============================================================================================
 * All that the past determines: how many tokens there were, a hash of them, the state, and the last logits, so that the
 * first token after a load needs nothing computed. Byte by byte, so that any machine reads what any machine wrote.
 */
void based_reset(based_session *s) {
    memset(s->state, 0, s->m->state * sizeof *s->state);
    memset(s->logits, 0, based_width(s->m) * sizeof *s->logits);
    s->count = s->history = 0;
}

int based_copy(based_session *dst, const based_session *src, based_error *e) {
    if (dst->m != src->m) return fail(e, BASED_EINVAL, "the two sessions are over different models");
    if (dst == src) return BASED_OK;
    memcpy(dst->state, src->state, src->m->state * sizeof *src->state);
    memcpy(dst->logits, src->logits, based_width(src->m) * sizeof *src->logits);
    dst->count = src->count;
    dst->history = src->history;
    return BASED_OK;
}

enum { SAVED_HEADER = 80 };

static void put_bytes(unsigned char *to, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = (unsigned char)(value >> (8 * i) & 255);
}

static uint64_t get_bytes(const unsigned char *from, size_t n) {
    uint64_t value = 0;
    for (size_t i = 0; i < n; i++) value |= U64(from[i]) << (8 * i);
    return value;
}

static void put_floats(unsigned char *to, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        put_bytes(to + 4 * i, bits, 4);
    }
}

static void get_floats(float *x, const unsigned char *from, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)get_bytes(from + 4 * i, 4);
        memcpy(x + i, &bits, sizeof bits);
    }
}

size_t based_saved_bytes(const based_model *m, size_t note_bytes) {
    size_t n = SAVED_HEADER + (based_width(m) + m->state) * sizeof(float);      /* less than a session has           */
    return note_bytes <= SIZE_MAX - n ? n + note_bytes : 0;
}

int based_save(const based_session *s, const void *note, size_t note_bytes, void *out, size_t room, based_error *e) {
    const based_model *m = s->m;
    size_t width = based_width(m), need = based_saved_bytes(m, note_bytes);
    unsigned char *p = out, *floats = p + SAVED_HEADER;
    if (!need || room < need)
        return fail(e, BASED_ENOMEM, "a saved state of this model needs %u bytes, there are %u", U64(need), U64(room));
    memcpy(p, BASED_STATE_MAGIC, 8);
    put_bytes(p + 8, BASED_STATE_FORMAT, 4);
    put_bytes(p + 12, BASED_BYTE_ORDER, 4);
    put_bytes(p + 16, need, 8);
    put_bytes(p + 32, two_words(m->c->checksum), 8);
    put_bytes(p + 40, s->count, 8);
    put_bytes(p + 48, s->history, 8);
    put_bytes(p + 56, width, 8);
    put_bytes(p + 64, m->state, 8);
    put_bytes(p + 72, note_bytes, 8);
    put_floats(floats, s->logits, width);
    put_floats(floats + 4 * width, s->state, m->state);
    if (note_bytes) memcpy(floats + 4 * (width + m->state), note, note_bytes);
    put_bytes(p + 24, based_checksum(p + 32, need - 32), 8);
    return BASED_OK;
}

/* Is it a saved state, whole and undamaged? Nothing but its own bytes is asked. */
static int check_saved(const unsigned char *p, size_t size, based_error *e) {
    if (size < 8 || memcmp(p, BASED_STATE_MAGIC, 8))
        return fail(e, BASED_EFORMAT, "not a saved state (it does not begin with the bytes BSTATE)");
    if (size < SAVED_HEADER)
        return fail(e, BASED_EFORMAT, "%u bytes are too few for a saved state, whose header has %u; was the file cut off?",
                    U64(size), U64(SAVED_HEADER));
    if (get_bytes(p + 8, 4) != BASED_STATE_FORMAT)
        return fail(e, BASED_EFORMAT, "saved state of version %u; this program reads version %u", get_bytes(p + 8, 4),
                    U64(BASED_STATE_FORMAT));
    if (get_bytes(p + 12, 4) != BASED_BYTE_ORDER)
        return fail(e, BASED_EFORMAT, "the byte-order mark of the saved state is damaged");
    if (get_bytes(p + 16, 8) != size)
        return fail(e, BASED_EFORMAT, "the saved state says %u bytes, but there are %u; was the file cut off?",
                    get_bytes(p + 16, 8), U64(size));
    if (get_bytes(p + 24, 8) != based_checksum(p + 32, size - 32))
        return fail(e, BASED_ECHECKSUM, "the checksum does not match: the saved state was damaged after it was written");
    return BASED_OK;
}

int based_load(based_session *s, const void *saved, size_t size, const void **note, size_t *note_bytes, based_error *e) {
    const based_model *m = s->m;
    const unsigned char *p = saved, *floats = p + SAVED_HEADER;
    size_t width = based_width(m), fixed = based_saved_bytes(m, 0);
    int status = check_saved(p, size, e);
    if (status) return status;
    if (get_bytes(p + 32, 8) != two_words(m->c->checksum))
        return fail(e, BASED_EINVAL, "the state was saved with another checkpoint; load it with the one it belongs to");
    if (get_bytes(p + 56, 8) != width || get_bytes(p + 64, 8) != m->state || size < fixed
        || get_bytes(p + 72, 8) != size - fixed)
        return fail(e, BASED_EFORMAT, "the configuration does not match: %u logits and %u numbers of state were saved, this "
                    "model has %u and %u", get_bytes(p + 56, 8), get_bytes(p + 64, 8), U64(width), U64(m->state));
    s->count = get_bytes(p + 40, 8);
    s->history = get_bytes(p + 48, 8);
    get_floats(s->logits, floats, width);
    get_floats(s->state, floats + 4 * width, m->state);
    if (note) *note = p + fixed;
    if (note_bytes) *note_bytes = size - fixed;
    return BASED_OK;
}

const float *based_logits(const based_session *s) { return s->count ? s->logits : NULL; }
uint64_t based_count(const based_session *s) { return s->count; }
uint64_t based_history(const based_session *s) { return s->history; }
int based_threads(const based_session *s) { return s->threads; }

void based_set_threads(based_session *s, int threads) {
#ifdef _OPENMP
    uint64_t useful = s->m->weight_bytes / (16 << 20), processors = (uint64_t)omp_get_num_procs();
    if (threads == 0) threads = (int)(useful < processors ? useful : processors);
#else
    threads = 1;
#endif
    s->threads = threads > 1 ? threads : 1;
}

uint32_t based_hash(uint32_t h, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        h = (h ^ bits) * 0x9e3779b1u;
        h ^= h >> 15;
    }
    return h;
}

/* ==== Taylor attention by itself =======================================================================================
 * based.h part 9: the taylor mixer's state and functions, without a model around them.
 */
struct based_taylor_state {
    const based_taylor *t;
    float *scratch;
    struct taylor_state sums;           /* points behind this struct                                             */
};

static int check_kind(const based_taylor_kind *c, based_error *e) {
    const struct field fields[] = {
        FIELD(c, key_width, 1, BASED_MAX_HIDDEN), FIELD(c, value_width, 1, BASED_MAX_HIDDEN),
        FIELD(c, group, 1, BASED_MAX_HEADS), FIELD(c, degree, 1, BASED_MAX_DEGREE), FIELD(c, kernel, 0, BASED_DIAGONAL),
        FIELD(c, normaliser, 0, BASED_ONE), FIELD(c, chunk, 1, BASED_MAX_CHUNK), FIELD(c, window, 0, BASED_MAX_WINDOW),
        FIELD(c, keep, 0, BASED_MAX_WINDOW)
    };
    for (size_t i = 0; i < COUNT(fields); i++)
        if (fields[i].value < fields[i].low || fields[i].value > fields[i].high)
            return fail(e, BASED_EINVAL, "Taylor attention: %s is %u, expected %u to %u", fields[i].name, U64(fields[i].value),
                        U64(fields[i].low), U64(fields[i].high));
    if (!is_finite(c->scale) || !is_finite(c->normaliser_eps))
        return fail(e, BASED_EINVAL, "Taylor attention: scale or normaliser_eps is not a number");
    if (!window_fits(c)) return fail(e, BASED_EINVAL, "Taylor attention: %s", NO_WINDOW);
    if (!forgets_a_part(c->forget)) return fail(e, BASED_EINVAL, "Taylor attention: %s", NOT_A_PART);
    return BASED_OK;
}

/* Bytes of an attention: the struct, the coefficients, the multiplicities. */
static uint64_t attention_bytes(const based_taylor_kind *c, uint64_t features) {
    return align64(sizeof(based_taylor)) + (U64(c->group) * (c->degree + 1) + features) * sizeof(float);
}

int based_taylor_measure(based_taylor_sizes *out, const based_taylor_kind *c, based_error *e) {
    const uint64_t cap = U64(1) << 36;      /* far above what is allowed, far below where bytes overflow                 */
    int status = check_kind(c, e);
    uint64_t d, state, scratch;
    if (status) return status;
    d = count_features(c, cap);
    state = align64(sizeof(based_taylor_state)) + sums_floats(c, d) * sizeof(float);
    scratch = scratch_floats(c, d) * sizeof(float);
    if (d > BASED_MAX_FEATURES || state > SIZE_MAX || scratch > SIZE_MAX)
        return fail(e, BASED_ENOMEM, "Taylor attention of degree %u and key width %u: a state needs %s%u bytes for %s%u "
                    "features; at most %u features, and what this machine can address, are possible", U64(c->degree),
                    U64(c->key_width), d > cap ? "more than " : "", state, d > cap ? "more than " : "", d > cap ? cap : d,
                    U64(BASED_MAX_FEATURES));
    out->features = d;
    out->work = (d + d * c->value_width) + c->group * (2 * d + d * (U64(c->value_width) + 1));
    out->attention = (size_t)attention_bytes(c, d);
    out->state = (size_t)state;
    out->scratch = (size_t)scratch;
    return BASED_OK;
}

int based_taylor_init(based_taylor **out, const based_taylor_kind *kind, void *memory, size_t memory_bytes, based_error *e) {
    based_taylor_sizes sizes;
    based_taylor *t = memory;
    int status = based_taylor_measure(&sizes, kind, e);
    float *a, power;
    if (!status) status = check_memory(memory, memory_bytes, sizes.attention, e);
    if (!status) status = check_machine(e);
    if (status) return status;
    a = (float *)(void *)((unsigned char *)memory + align64(sizeof *t));
    t->c = *kind;
    t->k = choose_kernels(0);
    t->features = (uint32_t)sizes.features;
    t->c.coefficients = a;
    for (uint32_t h = 0; h < kind->group; h++) {
        power = 1.0f;
        for (uint32_t p = 0; p <= kind->degree; p++) {
            if (p) power *= (float)p;
            *a++ = kind->coefficients ? kind->coefficients[h * (kind->degree + 1) + p] : 1.0f / power;
        }
    }
    t->multiplicity = a;
    fill_multiplicity(a, kind);
    *out = t;
    return BASED_OK;
}

int based_taylor_begin(based_taylor_state **out, const based_taylor *t, void *memory, size_t memory_bytes, void *scratch,
                       size_t scratch_bytes, based_error *e) {
    based_taylor_sizes sizes;
    based_taylor_state *s = memory;
    int status = based_taylor_measure(&sizes, &t->c, e);
    if (!status) status = check_memory(memory, memory_bytes, sizes.state, e);
    if (!status) status = check_memory(scratch, scratch_bytes, sizes.scratch, e);
    if (status) return status;
    s->t = t;
    s->scratch = scratch;
    s->sums = taylor_state((float *)(void *)((unsigned char *)memory + align64(sizeof *s)), t, 0, 0);
    based_taylor_reset(s);
    *out = s;
    return BASED_OK;
}

void based_taylor_reset(based_taylor_state *s) {
    memset(s->sums.s, 0, (size_t)sums_floats(&s->t->c, s->t->features) * sizeof(float));
    s->sums.count = s->sums.pending = 0;
}

uint64_t based_taylor_count(const based_taylor_state *s) { return s->sums.count; }

void based_taylor_absorb(based_taylor_state *s, const float *k, const float *v, size_t n) {
    const based_taylor_kind *c = &s->t->c;
    for (size_t i = 0; i < n; i++) absorb(&s->sums, s->t, k + i * c->key_width, v + i * c->value_width, s->scratch);
}

void based_taylor_read(const based_taylor_state *s, const float *q, size_t n, float *y) {
    const based_taylor_kind *c = &s->t->c;
    for (size_t i = 0; i < n * c->group; i++)
        read_taylor(y + i * c->value_width, &s->sums, s->t, q + i * c->key_width, i % c->group, s->scratch);
}

void based_taylor_feed(based_taylor_state *s, const float *q, const float *k, const float *v, size_t n, float *y) {
    size_t dk = s->t->c.key_width, dv = s->t->c.value_width, group = s->t->c.group;
    for (size_t i = 0; i < n; i++) {
        based_taylor_absorb(s, k + i * dk, v + i * dv, 1);
        based_taylor_read(s, q + i * group * dk, 1, y + i * group * dv);
    }
}

/* The sums receive -phi(k) v^T, wherever the pair itself is. */
int based_taylor_subtract(based_taylor_state *s, const float *k, const float *v, based_error *e) {
    if (!s->sums.count) return fail(e, BASED_EINVAL, "nothing can be taken off an empty state");
    if (s->t->c.window || s->t->c.forget > 0.0f)
        return fail(e, BASED_EINVAL, "nothing can be taken off a state with a window or one that forgets");
    features(s->scratch, k, 1, 1, &s->t->c);
    for (size_t f = 0; f < s->t->features; f++) s->scratch[f] = -s->scratch[f];
    add_to_sums(&s->sums, s->t, s->scratch, v, 1);
    s->sums.count--;
    count_sums(&s->sums, s->t);
    return BASED_OK;
}

int based_taylor_copy(based_taylor_state *dst, const based_taylor_state *src, based_error *e) {
    if (dst->t != src->t) return fail(e, BASED_EINVAL, "the two states belong to different attentions");
    if (dst == src) return BASED_OK;
    memcpy(dst->sums.s, src->sums.s, (size_t)sums_floats(&src->t->c, src->t->features) * sizeof(float));
    dst->sums.count = src->sums.count;
    dst->sums.pending = src->sums.pending;
    return BASED_OK;
}

/* Row f of src's sums, and what they have lost, onto dst's. */
static void merge_row(struct taylor_state *dst, const struct taylor_state *src, size_t f, size_t dv, const struct kernels *k) {
    dst->lost_z[f] = add_and_keep(dst->z + f, src->z[f] + dst->lost_z[f]) + src->lost_z[f];
    for (size_t e = 0; e < dv; e += 32) {
        size_t width = dv - e < 32 ? dv - e : 32, half = (width + 1) / 2, at = f * ((dv + 1) / 2) + e / 2;
        float lost[32];
        for (size_t i = 0; i < width; i++) {
            uint32_t word;
            memcpy(&word, src->lost + at + i % half, sizeof word);
            lost[i] = upper_half(i < half ? word : word << 16);
        }
        k->absorb_row(dst->s + f * dv + e, dst->lost + at, src->s + f * dv + e, width);
        k->absorb_row(dst->s + f * dv + e, dst->lost + at, lost, width);
    }
}

int based_taylor_merge(based_taylor_state *dst, const based_taylor_state *src, based_error *e) {
    const struct taylor_state *from = &src->sums;
    const based_taylor_kind *c = &dst->t->c;
    if (dst->t != src->t) return fail(e, BASED_EINVAL, "the two states belong to different attentions");
    if (dst == src) return fail(e, BASED_EINVAL, "a state cannot be merged with itself; copy it first");
    if (c->forget > 0.0f) return fail(e, BASED_EINVAL, "states that forget cannot be merged: nobody knows which is older");
    for (size_t f = 0; f < dst->t->features; f++) merge_row(&dst->sums, from, f, c->value_width, dst->t->k);
    dst->sums.count += from->count - from->pending;
    count_sums(&dst->sums, dst->t);
    for (size_t j = 0; j < from->pending; j++) {
        float *key = dst->scratch + (size_t)scratch_floats(c, dst->t->features) - c->key_width;
        for (size_t i = 0; i < c->key_width; i++) key[i] = from->k[i * slots(c) + j];
        absorb(&dst->sums, dst->t, key, from->v + j * c->value_width, dst->scratch);
    }
    return BASED_OK;
}

/* ==== Sampling =======================================================================================================
 * Memory: one candidate per token of the vocabulary, then the ring of recent tokens.
 */
struct candidate { float p; int32_t id; };

size_t based_sampler_bytes(const based_sampler *s) {
    return s->vocab * sizeof(struct candidate) + s->repeat_last_n * sizeof(int32_t);
}

int based_sampler_init(based_sampler *s, void *memory, size_t bytes, based_error *e) {
    if (s->vocab == 0 || s->vocab > BASED_MAX_VOCAB || s->repeat_last_n > BASED_MAX_VOCAB)
        return fail(e, BASED_EINVAL, "a sampler needs 1 to %u logits and at most as many recent tokens", U64(BASED_MAX_VOCAB));
    if (!(s->temperature >= 0.0f && is_finite(s->temperature)))
        return fail(e, BASED_EINVAL, "temperature must be a number from 0 up");
    if (!(s->top_p >= 0.0f && s->top_p <= 1.0f) || !(s->min_p >= 0.0f && s->min_p <= 1.0f))
        return fail(e, BASED_EINVAL, "top_p and min_p must be numbers from 0 to 1");
    if (!(s->repeat_penalty > 0.0f && is_finite(s->repeat_penalty)))
        return fail(e, BASED_EINVAL, "repeat_penalty must be a number above 0 (1: off)");
    if (!memory || (uintptr_t)memory % 8 || bytes < based_sampler_bytes(s))
        return fail(e, BASED_ENOMEM, "a sampler needs %u bytes, aligned to 8", U64(based_sampler_bytes(s)));
    s->memory = memory;
    s->state = s->seed;
    s->seen = 0;
    return BASED_OK;
}

static int32_t *recent_tokens(const based_sampler *s) {
    return (int32_t *)(void *)((struct candidate *)s->memory + s->vocab);
}

void based_sampler_accept(based_sampler *s, int32_t token) {
    if (s->repeat_last_n) recent_tokens(s)[s->seen % s->repeat_last_n] = token;
    s->seen++;
}

size_t based_sampler_recent(const based_sampler *s, int32_t *tokens) {
    size_t n = s->seen < s->repeat_last_n ? (size_t)s->seen : s->repeat_last_n;
    for (size_t i = 0; i < n; i++) tokens[i] = recent_tokens(s)[(s->seen - n + i) % s->repeat_last_n];
    return n;
}

/* A uniform number in [0, 1): splitmix64 (Steele, Lea, Flood 2014), the top 53 bits. */
static double uniform(based_sampler *s) {
    uint64_t z = s->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (double)(z >> 11) * (1.0 / 9007199254740992.0);
}

/* Candidates with penalised logits; a token that occurred twice is penalised once. NaN becomes the lowest number. */
static void gather(based_sampler *s, const float *logits) {
    struct candidate *c = s->memory;
    const int32_t *recent = recent_tokens(s);
    uint64_t n = s->seen < s->repeat_last_n ? s->seen : s->repeat_last_n;
    for (uint32_t i = 0; i < s->vocab; i++) {
        c[i].p = logits[i] == logits[i] ? logits[i] : -FLT_MAX;
        c[i].id = (int32_t)i;
    }
    for (uint64_t i = 0; i < n && s->repeat_penalty != 1.0f; i++) {
        uint32_t id = (uint32_t)recent[i];
        if (id >= s->vocab || logits[id] != logits[id]) continue;
        c[id].p = logits[id] > 0.0f ? logits[id] / s->repeat_penalty : logits[id] * s->repeat_penalty;
    }
}

static uint32_t highest(const struct candidate *c, uint32_t n) {
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) if (c[i].p > c[best].p) best = i;
    return best;
}

/* The order of candidates: more probable first, then the lower id, so that no two are equal. */
static int before(const struct candidate *a, const struct candidate *b) {
    return a->p > b->p || (a->p == b->p && a->id < b->id);
}

static void sift_down(struct candidate *c, uint32_t at, uint32_t n) {
    struct candidate moved = c[at];
    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && before(&c[child + 1], &c[child])) child++;
        if (!before(&c[child], &moved)) break;
        c[at] = c[child];
    }
    c[at] = moved;
}

/* Leaves out what cannot be admitted, because looking at all tokens in order is what would take time: those that min-p
 * excludes (the best has p = 1), and those so improbable that top-p is reached without them: n of them together would not
 * fill the rest. Returns how many candidates remain, at least 1, and their total probability. */
static uint32_t sieve(const based_sampler *s, struct candidate *c, double *total) {
    double rest = s->top_k ? 0.0 : (1.0 - s->top_p) * *total / s->vocab, kept = 0.0;
    float least = s->min_p > (float)rest ? s->min_p : (float)rest;
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->vocab; i++) {
        if (c[i].p < least || c[i].p == 0.0f) continue;
        kept += c[i].p;
        c[n++] = c[i];
    }
    if (s->min_p > 0.0f) *total = kept;
    return n;
}

/* Takes the best of n candidates off a heap one by one, as many as top-k and then top-p admit; they end up at the end of
 * the array, the best last. Returns how many, at least 1; *total becomes their probability. */
static uint32_t keep_best(const based_sampler *s, struct candidate *c, uint32_t n, double *total) {
    uint32_t limit = s->top_k && s->top_k < n ? s->top_k : n, kept = 0;
    double mass = 0.0;
    for (uint32_t i = n / 2; i-- > 0;) sift_down(c, i, n);
    while (kept < limit && (kept == 0 || s->top_k || mass < s->top_p * *total)) {
        struct candidate best = c[0];
        mass += best.p;
        c[0] = c[n - ++kept];
        c[n - kept] = best;
        sift_down(c, 0, n - kept);
    }
    if (s->top_k) {                                     /* top-p of what top-k has left                                      */
        double all = mass;
        mass = 0.0;
        for (limit = kept, kept = 0; kept < limit && (kept == 0 || mass < s->top_p * all);) mass += c[n - ++kept].p;
    }
    *total = mass;
    return kept;
}

int32_t based_sample(based_sampler *s, const float *logits) {
    struct candidate *c = s->memory;
    uint32_t n = s->vocab, i, last;
    double total = 0.0, target;
    gather(s, logits);
    i = highest(c, n);
    if (s->temperature == 0.0f || c[i].p == -FLT_MAX) return c[i].id;
    for (float top = c[i].p; n-- > 0; total += c[n].p) c[n].p = exponential((c[n].p - top) / s->temperature);
    n = sieve(s, c, &total);
    last = s->top_k || s->top_p < 1.0f ? n - keep_best(s, c, n, &total) : 0;
    target = uniform(s) * total;
    for (i = n - 1; i > last && (target -= c[i].p) >= 0.0; i--) {}
    return c[i].id;
}

double based_log_probability(const float *logits, size_t n, int32_t token) {
    float top = -FLT_MAX;
    double total = 0.0;
    for (size_t i = 0; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (size_t i = 0; i < n; i++) total += exponential(logits[i] - top);
    return (double)(logits[token] - top) - log(total);
}

/* ==== With an operating system =======================================================================================
 * The convenience calls: memory from malloc, checkpoints mapped from files. Leave this part out with
 * -DBASED_FREESTANDING where there is neither.
 */
#ifndef BASED_FREESTANDING
#include <errno.h>
#include <stdlib.h>
#ifdef BASED_POSIX
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#else
#include <stdio.h>
#endif

/* malloc aligned to 64 bytes; *owned is what free wants back. */
static void *aligned(size_t n, void **owned) {
    unsigned char *p = n <= SIZE_MAX - 64 ? malloc(n + 64) : NULL;
    *owned = p;
    return p ? p + (64 - (uintptr_t)p % 64) : NULL;
}

struct file { void *bytes, *owned, *mapped; size_t size; };

static void close_file(struct file *f) {
#ifdef BASED_POSIX
    if (f->mapped) munmap(f->mapped, f->size);
#endif
    free(f->owned);
}

static int no_memory(const char *what, size_t n, based_error *e) {
    return fail(e, BASED_ENOMEM, "out of memory: %u bytes for %s", U64(n), what);
}

#ifdef BASED_POSIX
static int read_all(int fd, unsigned char *to, size_t n) {
    for (size_t at = 0; at < n;) {
        ssize_t got = read(fd, to + at, n - at);
        if (got == 0) errno = EIO;
        if (got > 0) at += (size_t)got;
        else if (got == 0 || errno != EINTR) return -1;
    }
    return 0;
}

/* The bytes of an open file: mapped and shared where they can be used as they are, else read into memory. */
static int load_fd(struct file *f, int fd, const char *path, based_error *e) {
    struct stat st;
    if (fstat(fd, &st)) return fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode)) return fail(e, BASED_EIO, "%s: is a directory, not a checkpoint", path);
    if (st.st_size <= 0) return fail(e, BASED_EFORMAT, "%s: the file is empty", path);
    if (U64(st.st_size) > SIZE_MAX - 64) return no_memory(path, SIZE_MAX, e);
    f->size = (size_t)st.st_size;
    if (!machine_is_big_endian()) {
        f->mapped = mmap(NULL, f->size, PROT_READ, MAP_SHARED, fd, 0);
        if (f->mapped != MAP_FAILED) {
#ifdef MADV_HUGEPAGE
            madvise(f->mapped, f->size, MADV_HUGEPAGE);         /* larger pages are read some 5 % faster; only a wish       */
#endif
            return f->bytes = f->mapped, BASED_OK;
        }
        f->mapped = NULL;
    }
    f->bytes = aligned(f->size, &f->owned);
    if (!f->bytes) return no_memory(path, f->size, e);
    if (read_all(fd, f->bytes, f->size)) return fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    return BASED_OK;
}

static int load_file(struct file *f, const char *path, based_error *e) {
    int status, fd;
    do fd = open(path, O_RDONLY); while (fd < 0 && errno == EINTR);
    if (fd < 0) return fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    status = load_fd(f, fd, path, e);
    close(fd);
    return status;
}
#else
static int load_file(struct file *f, const char *path, based_error *e) {
    FILE *in = fopen(path, "rb");
    long size = -1;
    int status = BASED_OK;
    if (!in) return fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    if (fseek(in, 0, SEEK_END) == 0) size = ftell(in);
    if (size <= 0 || fseek(in, 0, SEEK_SET)) status = fail(e, BASED_EFORMAT, "%s: the file is empty or cannot be read", path);
    f->size = size > 0 ? (size_t)size : 0;
    if (!status && !(f->bytes = aligned(f->size, &f->owned))) status = no_memory(path, f->size, e);
    if (!status && fread(f->bytes, 1, f->size, in) != f->size) status = fail(e, BASED_EIO, "%s: %s", path, strerror(errno));
    fclose(in);
    return status;
}
#endif

/* "path: text", for errors that came up while reading what was in a file. */
static void name_file(const char *path, based_error *e) {
    based_error inner;
    if (!e) return;
    inner = *e;
    fail(e, inner.status, "%s: %s", path, inner.text);
}

/* BASED_KERNELS=plain, avx2 or avx512vnni in the environment holds back newer instructions, for tests and comparisons. */
static int kernel_flags(void) {
    const char *wish = getenv("BASED_KERNELS");
    if (!wish) return 0;
    if (strcmp(wish, "plain") == 0) return BASED_PLAIN;
    return strcmp(wish, "avx2") == 0 ? BASED_AVX2 : strcmp(wish, "avx512vnni") == 0 ? BASED_AVX512 : 0;
}

based_model *based_open(const char *path, int flags, based_error *e) {
    struct file f = { NULL, NULL, NULL, 0 };
    based_model *m = NULL;
    void *owned = NULL, *memory = NULL;
    size_t need;
    int status = load_file(&f, path, e);
    if (!status) {
        status = based_to_native(f.bytes, f.size, flags, e);
        need = status ? 0 : based_model_bytes(f.bytes, f.size, e);
        if (need && !(memory = aligned(need, &owned))) no_memory("the model", need, e);
        if (memory) based_model_init(&m, memory, need, f.bytes, f.size, flags | kernel_flags(), e);
        if (!m) name_file(path, e);
    }
    if (!m) {
        free(owned);
        close_file(&f);
        return NULL;
    }
    m->owned = f.owned;
    m->mapped = f.mapped;
    m->mapped_size = f.size;
    m->self = owned;
    return m;
}

void based_close(based_model *m) {
    if (!m) return;
    struct file f = { NULL, m->owned, m->mapped, m->mapped_size };
    void *self = m->self;
    close_file(&f);
    free(self);
}

based_session *based_session_new(const based_model *m, uint32_t block, based_error *e) {
    based_session *s = NULL;
    void *owned = NULL;
    size_t need = based_session_bytes(m, block);
    void *memory = need ? aligned(need, &owned) : NULL;
    if (need && !owned) return no_memory("a session", need, e), NULL;
    if (based_session_init(&s, m, memory, need, block, e)) return free(owned), NULL;
    s->owned = owned;
    return s;
}

void based_session_free(based_session *s) {
    if (s) free(s->owned);
}
#endif
