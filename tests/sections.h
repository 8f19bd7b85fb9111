/* sections.h - tokenizer sections made by hand, and a model that has nothing but one. For programs
 * that include tokenizer.c without based.c: its test and the fuzz targets.
 */
#ifndef SECTIONS_H
#define SECTIONS_H

#include <stdlib.h>

/* All that tokenizer.c asks of a model. */
struct based_model {
    based_config config;
    const void *tokenizer;
};

const based_config *based_model_config(const based_model *m) { return &m->config; }

const void *based_model_tokenizer(const based_model *m, size_t *bytes) {
    *bytes = m->config.tokenizer_bytes;
    return m->tokenizer;
}

typedef struct maker {
    uint32_t kind, flags, bos, eos, unknown;
    uint32_t byte_id[256];
    uint32_t special[8], specials;
    uint32_t stop[8], stops, shown;     /* the shown ones follow the stops */
    uint32_t cut;
    char     chat[256];                 /* texts, each with its zero */
    uint32_t chat_bytes;
    uint32_t merge[32][4], merges;      /* BASED_BPE */
    uint32_t sorted[64], sorted_size;   /* BASED_SCORES; BASED_BPE: with whole pieces */
    float    score[512];
    uint32_t start[512], size;
    unsigned char bytes[8192];
} maker;

static inline uint32_t add_token(maker *m, const char *bytes, size_t n) {
    uint32_t at = m->start[m->size];
    memcpy(m->bytes + at, bytes, n);
    m->start[++m->size] = at + (uint32_t)n;
    return m->size - 1;
}

static inline void add_special(maker *m, const char *name) {
    m->special[m->specials++] = add_token(m, name, strlen(name));
}

static inline void add_bytes(maker *m) {
    for (int b = 0; b < 256; b++) {
        char c = (char)b;
        m->byte_id[b] = add_token(m, &c, 1);
    }
}

/* Adds a merge (its rank is its place) and keeps the table in order. */
static inline void add_merge(maker *m, uint32_t left, uint32_t right, uint32_t result) {
    uint32_t i = m->merges;
    while (i > 0 && (m->merge[i - 1][0] > left
                     || (m->merge[i - 1][0] == left && m->merge[i - 1][1] > right))) {
        memcpy(m->merge[i], m->merge[i - 1], sizeof m->merge[i]);
        i--;
    }
    m->merge[i][0] = left;
    m->merge[i][1] = right;
    m->merge[i][2] = m->merges++;
    m->merge[i][3] = result;
}

/* Adds a token with a score, and its id to the sorted ones. */
static inline uint32_t add_scored(maker *m, const char *text, float score) {
    uint32_t id = add_token(m, text, strlen(text)), i = m->sorted_size++;
    span new = {m->bytes + m->start[id], strlen(text)};
    for (; i > 0; i--) {
        uint32_t other = m->sorted[i - 1];
        span old = {m->bytes + m->start[other], m->start[other + 1] - m->start[other]};
        if (compare(old, new) < 0) break;
        m->sorted[i] = other;
    }
    m->sorted[i] = id;
    m->score[id] = score;
    if (m->kind == BASED_SCORES) m->merges = m->sorted_size;
    return id;
}

/* The section in a block of its own of exactly *size bytes. */
static inline unsigned char *make_section(const maker *m, size_t *size) {
    uint32_t ids = m->specials + m->stops + m->shown;
    uint32_t table = m->sorted_size + (m->kind == BASED_BPE ? 4 * m->merges : m->size);
    uint32_t words = 12 + 256 + ids + m->size + 1 + table;
    uint32_t head[12] =
        {words, m->kind, m->flags, m->size, m->bos, m->eos, m->unknown, m->merges, m->specials,
         m->cut, m->stops | m->shown << 16, m->chat_bytes};
    *size = 4 * (size_t)words + m->start[m->size] + m->chat_bytes;
    unsigned char *section = malloc(*size), *p = section;
#define PUT(what, n) (memcpy(p, (what), 4 * (size_t)(n)), p += 4 * (size_t)(n))
    PUT(head, 12);
    PUT(m->byte_id, 256);
    PUT(m->special, m->specials);
    PUT(m->stop, m->stops + m->shown);
    PUT(m->start, m->size + 1);
    if (m->kind == BASED_BPE) PUT(m->merge, 4 * m->merges);
    PUT(m->sorted, m->sorted_size);
    if (m->kind == BASED_SCORES) PUT(m->score, m->size);
#undef PUT
    memcpy(p, m->bytes, m->start[m->size]);
    memcpy(p + m->start[m->size], m->chat, m->chat_bytes);
    return section;
}

enum { AB = 256, BC, ABC, CC, AA, AAAA, HE, END, ENDX, BPE_SIZE };

/* The id of a byte is the byte. "bc" merges before "ab". */
static inline void make_bpe(maker *m) {
    memset(m, 0, sizeof *m);
    m->kind = BASED_BPE;
    m->bos = m->eos = END;
    m->unknown = BASED_NONE;
    add_bytes(m);
    add_token(m, "ab", 2);
    add_token(m, "bc", 2);
    add_token(m, "abc", 3);
    add_token(m, "cc", 2);
    add_token(m, "aa", 2);
    add_token(m, "aaaa", 4);
    add_token(m, " h", 2);
    add_token(m, "<end>", 5);
    add_special(m, "<end>x");
    m->special[m->specials++] = END;
    add_merge(m, 'b', 'c', BC);
    add_merge(m, 'a', 'b', AB);
    add_merge(m, 'a', BC, ABC);
    add_merge(m, 'c', 'c', CC);
    add_merge(m, 'a', 'a', AA);
    add_merge(m, AA, AA, AAAA);
    add_merge(m, ' ', 'h', HE);
}

/* The same in a shape of newer models: tokens that no merges make, stop tokens, <end>x shown, and a
 * chat template. */
enum { HELLO = BPE_SIZE, ABCC, WHOLE_SIZE };

static inline void make_whole(maker *m) {
    static const char chat[] = "[{}]\0<end>u{}\0a{}<end>x\0b";
    make_bpe(m);
    m->flags = BASED_TOK_WHOLE_PIECES;
    m->cut = BASED_CUT_LLAMA3;
    add_scored(m, " hello", 0);
    add_scored(m, "abcc", 0);
    m->stop[0] = 'z';
    m->stop[1] = AB;
    m->stop[2] = ENDX;
    m->stops = 2;
    m->shown = 1;
    memcpy(m->chat, chat, m->chat_bytes = sizeof chat);
}

/* As llama2.c: 0 <unk>, 1 <s>, 2 </s>, 3 to 258 the bytes, then what text becomes. */
enum { SPACE_TOKEN = 259, A, B, C, X_AB, X_BC, X_HI, JA, X_ZERO, X_MINUS, SPACE_A, LLAMA,
       SCORES_SIZE };

static inline void make_scores(maker *m) {
    memset(m, 0, sizeof *m);
    m->kind = BASED_SCORES;
    m->flags = BASED_TOK_PREFIX_SPACE | BASED_TOK_ADD_BOS;
    m->bos = 1;
    m->eos = 2;
    add_token(m, "<unk>", 5);
    add_token(m, "<s>", 3);
    add_token(m, "</s>", 4);
    m->special[0] = 0;
    m->special[1] = 2;
    m->special[2] = 1;
    m->specials = 3;
    add_bytes(m);
    add_scored(m, " ", -1);
    add_scored(m, "a", -2);
    add_scored(m, "b", -3);
    add_scored(m, "c", -4);
    add_scored(m, "ab", 2.0f);
    add_scored(m, "bc", 2.5f);
    add_scored(m, "abcc", -9);
    add_scored(m, "\xE6\x97\xA5", -9);
    add_scored(m, "ca", 0.0f);
    add_scored(m, "ac", -0.0f);
    add_scored(m, " a", -20);
    add_scored(m, "\xF0\x9F\xA6\x99", -9);
}

#endif
