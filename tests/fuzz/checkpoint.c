/* checkpoint.c - fuzzes the checkpoint reader: any bytes are refused with one line, or are a model
 * that computes without a wrong step, gives the same bits fed at once or one by one by either set
 * of kernels, and reads and writes text. The mutator knows the format by the structs of based.h: it
 * changes fields to values at and just beyond their maxima, adds and drops layers, and then puts
 * sizes and checksum right, so that mutants get past the first checks.
 */
#define _POSIX_C_SOURCE 200809L
#include "based.c"

#include "tests/fuzz/fuzz.h"
#include "tests/model.h"

enum { MODEL_MOST = 1 << 20, SESSION_MOST = 1 << 19, TOKENS = 7, WORK = 1 << 16 };

static int one_line(const based_error *e) {
    return e->status < 0 && strlen(e->text) > 10 && !strchr(e->text, '\n');
}

/* ---- using whatever opens ---- */

static void use_tokenizer(const based_model *m, const char *text, size_t n) {
    based_tokenizer t;
    based_error e;
    based_decoder d = { { 0 }, 0, 0 };
    if (based_tokenizer_open(&t, m, &e)) {
        REQUIRE(one_line(&e));
        return;
    }
    int32_t *ids = tight(NULL, sizeof *ids * based_encode_bound(&t, n));
    void *work = tight(NULL, based_encode_scratch(&t, n));
    char *out = tight(NULL, based_decode_bound(&t) + 12);
    int64_t many = based_encode(&t, text, n, BASED_ADD_BOS | BASED_PARSE_SPECIALS, ids, work, &e);
    REQUIRE(many >= 0 && (uint64_t)many <= based_encode_bound(&t, n));
    for (int64_t i = 0; i < many; i++) {
        REQUIRE(ids[i] >= 0 && (uint32_t)ids[i] < m->c->vocab);
        REQUIRE(based_decode(&t, &d, ids[i], out) <= based_decode_bound(&t));
    }
    based_decode_flush(&d, out);
    free(ids), free(work), free(out);
}

static int feed_any(based_session *s, const uint8_t *from, size_t n, size_t at_once, float *out) {
    const based_config *c = s->m->c;
    static float x[TOKENS * WORK];
    int32_t ids[TOKENS];
    based_error e;
    if (c->input)
        for (size_t i = 0; i < n * c->input; i++) x[i] = (float)from[i % 64] / 128.0f - 1.0f;
    else for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(from[i] % (c->vocab ? c->vocab : 1));
    if (c->flags & BASED_BIDIRECTIONAL) return based_feed_bidirectional(s, x, n, out, &e);
    for (size_t i = 0; i < n; i += at_once) {
        size_t some = n - i < at_once ? n - i : at_once;
        int status = c->input ? based_feed_vectors(s, x + i * c->input, some,
                                                   out + i * based_width(s->m), &e)
                              : based_feed(s, ids + i, some, out + i * based_width(s->m), &e);
        if (status) {
            REQUIRE(one_line(&e));
            return status;
        }
    }
    return BASED_OK;
}

/* The same number, or both none. */
static int agree(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) && !(a[i] != a[i] && b[i] != b[i])) return 0;
    return 1;
}

static based_session *session(const based_model *m, uint32_t block, void **memory) {
    size_t n = based_session_bytes(m, block);
    based_session *s = NULL;
    based_error e;
    *memory = tight(NULL, n);
    REQUIRE(based_session_init(&s, m, *memory, n, block, &e) == BASED_OK);
    return s;
}

static void use_model(const based_model *m, const based_model *plain, const uint8_t *data) {
    size_t n = based_session_bytes(m, TOKENS), width = based_width(m);
    REQUIRE(n == based_session_bytes(plain, TOKENS) && based_state_bytes(m) < n);
    if (m->tokenizer) use_tokenizer(m, (const char *)data, 200);
    if (n > SESSION_MOST || m->c->input > WORK || (m->c->input == 0 && m->c->vocab == 0)) return;
    void *memory[2];
    based_session *one = session(m, TOKENS, &memory[0]), *two = session(plain, TOKENS, &memory[1]);
    float *a = tight(NULL, TOKENS * width * sizeof *a),
        *b = tight(NULL, TOKENS * width * sizeof *b);
    int status = feed_any(one, data, TOKENS, 4, a);
    REQUIRE(feed_any(two, data, TOKENS, 1, b) == status);
    if (!status) REQUIRE(agree(a, b, TOKENS * width) && based_count(one) == TOKENS);
    free(memory[0]), free(memory[1]), free(a), free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint8_t nothing[256];
    unsigned char *bytes = tight(data, size);
    based_error e = { 0, "" };
    size_t need = based_model_bytes(bytes, size, &e);
    REQUIRE(need || one_line(&e));
    if (need && need <= MODEL_MOST) {
        void *memory = tight(NULL, need), *plain_memory = tight(NULL, need);
        based_model *m, *plain;
        if (based_model_init(&m, memory, need, bytes, size, 0, &e)) {
            REQUIRE(one_line(&e));
        } else {
            REQUIRE(based_model_init(&plain, plain_memory, need, bytes, size, BASED_PLAIN,
                                     &e) == BASED_OK);
            use_model(m, plain, size >= 512 ? data + size - 256 : nothing);
        }
        free(memory), free(plain_memory);
    }
    free(bytes);
    return 0;
}

/* ---- mutants that still look like a checkpoint ---- */

static uint32_t interesting(uint32_t now) {
    static const uint32_t edges[] = {
        BASED_MAX_DIM, BASED_MAX_LAYERS, BASED_MAX_VOCAB, BASED_MAX_HIDDEN, BASED_MAX_HEADS,
        BASED_MAX_CONV_WIDTH, BASED_MAX_WINDOW, BASED_MAX_CHUNK, BASED_MAX_DEGREE,
        BASED_MAX_FEATURES, BASED_MAX_BLOCK, BASED_MAX_TOKEN, BASED_NONE, 0x80000000u
    };
    switch (dice(6)) {
    case 0:  return edges[dice(COUNT(edges))] + dice(3) - 1;
    case 1:  return now + dice(9) - 4;
    case 2:  return now ^ 1u << dice(10);
    case 3:  return now * 2;
    default: return dice(12);
    }
}

/* Changes one word of a struct of the header to a value at the edge of something, or to that of a
 * neighbor. */
static void change_word(unsigned char *p, size_t words) {
    uint32_t at = dice((uint32_t)words), value;
    memcpy(&value, p + 4 * at, 4);
    value = interesting(value);
    memcpy(p + 4 * at, &value, 4);
}

/* Adds a copy of a layer, or drops one; `size` bytes of `most`. */
static size_t change_layers(unsigned char *p, size_t size, size_t most) {
    based_config *c = (based_config *)(void *)p;
    if (c->layers == 0 || c->layers > 64 || size < sizeof *c + c->layers * sizeof(based_layer))
        return size;
    unsigned char *layer = p + sizeof *c + dice(c->layers) * sizeof(based_layer);
    size_t behind = size - (size_t)(layer - p);
    if (dice(2) && size + sizeof(based_layer) <= most) {
        memmove(layer + sizeof(based_layer), layer, behind);
        c->layers++;
        return size + sizeof(based_layer);
    }
    memmove(layer, layer + sizeof(based_layer), behind - sizeof(based_layer));
    c->layers--;
    return size - sizeof(based_layer);
}

/* The bytes that the header asks for, or 0 if it is refused or asks for too much. */
static size_t n_logits(const unsigned char *p, size_t most) {
    static uint64_t memory[MODEL_MOST / 8];
    based_model *m = (void *)memory;
    struct reader reader = { .bytes = p, .size = most };
    size_t need = based_model_bytes(p, most, NULL);
    if (need == 0 || need > MODEL_MOST) return 0;
    memset(memory, 0, need);
    m->c = (const based_config *)(const void *)p;
    m->k = choose_kernels(0);
    bind_weights(&reader, m, m->layer);
    return reader.short_of_bytes ? 0 : (size_t)reader.at;
}

/* Gives the file the size that its header asks for, now and then one byte too much or too little,
 * and a checksum. */
static size_t repair(unsigned char *p, size_t size, size_t most) {
    based_config *c = (based_config *)(void *)p;
    memcpy(c->magic, BASED_MAGIC, 8);
    c->format = BASED_FORMAT;
    c->byte_order = BASED_BYTE_ORDER;
    c->file_size[0] = (uint32_t)most;
    c->file_size[1] = 0;
    /* small numbers */
    for (size_t at = size; at < most; at++) p[at] = at % 4 == 3 ? 0x3d : (unsigned char)at;
    size_t want = n_logits(p, most);
    size = want ? want : size;
    if (dice(32) == 0) size += dice(2) && size < most ? 1 : (size_t)-1;
    c->file_size[0] = (uint32_t)size;
    uint64_t sum = based_checksum(p + 32, size - 32);
    c->checksum[0] = (uint32_t)sum, c->checksum[1] = (uint32_t)(sum >> 32);
    return size;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static _Alignas(64) unsigned char p[WORK];
    based_config *c = (based_config *)(void *)p;
    most = most < WORK ? most : WORK;
    dice_state = seed;
    if (size <= sizeof *c + 64 || size > most || dice(16) == 0)
        return LLVMFuzzerMutate(data, size, most);
    memcpy(p, data, size);
    for (uint32_t n = 1 + dice(3); n > 0; n--) {
        size_t header = sizeof *c + (c->layers < 64 ? c->layers : 64) * sizeof(based_layer), some;
        switch (dice(6)) {
        case 0: change_word(p + 32, (sizeof *c - 32) / 4); break;
        case 1: size = change_layers(p, size, most); break;
        case 2: some = size - 32 < 64 ? size - 32 : 64;                 /* anywhere */
                LLVMFuzzerMutate(p + 32 + dice((uint32_t)(size - 31 - some)), some, some); break;
        default: if (header > size || header <= sizeof *c) break;
                 change_word(p + sizeof *c, (header - sizeof *c) / 4);
        }
    }
    size = repair(p, size, most);
    memcpy(data, p, size);
    return size;
}

/* A BPE of nothing but bytes, as many as the vocabulary of model.h has. */
static size_t put_tokenizer(unsigned char *to) {
    uint32_t words[12 + 256 + 1 + VOCAB + 1] = { COUNT(words), BASED_BPE, 0, VOCAB, 0, 0,
                                                 BASED_NONE, 0, 1 }, *start;
    for (uint32_t b = 0; b < 256; b++)
        words[12 + b] = b >= 'a' && b < 'a' + VOCAB - 1 ? b - 'a' + 1 : BASED_NONE;
    start = words + 12 + 256 + 1;
    for (uint32_t i = 1; i <= VOCAB; i++) start[i] = i + 2;  /* token 0 is "<s>", special */
    memcpy(to, words, sizeof words);
    memcpy(to + sizeof words, "<s>", 3);
    for (uint32_t i = 1; i < VOCAB; i++) to[sizeof words + i + 2] = (unsigned char)('a' + i - 1);
    return sizeof words + VOCAB + 2;
}

static void write_seeds(void) {
    static _Alignas(64) unsigned char p[WORK];
    static const struct { const char *name; struct wish wish; } seeds[] = {
        { "f32", { 7, 1.0f, 0, BASED_F32, 0, 0 } }, { "q8", { 7, 1.0f, 0, BASED_Q8, 0, 0 } },
        { "q4", { 8, 0.0f, 0, BASED_Q4, 0, 0 } }, { "vectors", { 9, 1.0f, 6, BASED_F32, 0, 0 } },
        { "window", { 7, 1.0f, 0, BASED_F32, 5, 0 } },
        { "hedgehog", { 7, 1.0f, 0, BASED_F32, 5, BASED_HEDGEHOG } }
    };
    for (size_t i = 0; i < COUNT(seeds); i++) {
        const unsigned char *bytes
            = (const unsigned char *)based_model_config(make_model(seeds[i].wish));
        const based_config *c = (const based_config *)(const void *)bytes;
        size_t size = c->file_size[0], header = sizeof *c + c->layers * sizeof(based_layer);
        save_seed(seeds[i].name, bytes, size);
        memcpy(p, bytes, header);                       /* and with a tokenizer */
        ((based_config *)(void *)p)->tokenizer_bytes = (uint32_t)put_tokenizer(p + header);
        size_t at = (size_t)align64(header + ((based_config *)(void *)p)->tokenizer_bytes);
        memcpy(p + at, bytes + header, size - header);
        char name[32];
        snprintf(name, sizeof name, "%s-tokenizer", seeds[i].name);
        dice_state = 2;
        save_seed(name, p, repair(p, at + size - header, WORK));
        memset(p, 0, sizeof p);
    }
}
