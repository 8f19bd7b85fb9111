/* text.h - what holds for every tokenizer, text and token, checked for the fuzz targets.
 */
#ifndef FUZZ_TEXT_H
#define FUZZ_TEXT_H

#include "tests/fuzz/fuzz.h"
#include "tests/sections.h"

/* The text of n ids is valid UTF-8, whatever they are; each token stays within the bound. The
 * caller frees what is returned. */
static inline char *check_decoding(const based_tokenizer *t, const int32_t *ids, size_t n) {
    size_t bound = based_decode_bound(t), at = 0;
    char *text = tight(NULL, n * bound + 12), *out = tight(NULL, bound);
    based_decoder d = { { 0 }, 0, 0 };
    for (size_t i = 0; i < n; i++) {
        size_t many = based_decode(t, &d, ids[i], out);
        REQUIRE(many <= bound && d.n < 4);
        memcpy(text + at, out, many);
        at += many;
    }
    at += based_decode_flush(&d, text + at);
    REQUIRE(valid_utf8((const unsigned char *)text, at));
    text[at] = '\0';
    free(out);
    return text;
}

/* Encoding stays within its bounds; where every byte has a token, the tokens' bytes are those of
 * the text. */
static inline void check_encoding(const based_tokenizer *t, const uint8_t *text, size_t n,
                                  int flags) {
    int32_t *ids = tight(NULL, sizeof *ids * based_encode_bound(t, n));
    void *scratch = tight(NULL, based_encode_scratch(t, n));
    char *copy = tight(text, n);
    int whole = 1;
    size_t at = 0;
    based_error e;
    int64_t many = based_encode(t, copy, n, flags, ids, scratch, &e), i = 0;
    REQUIRE(many >= 0 && (uint64_t)many <= based_encode_bound(t, n));
    for (uint32_t b = 0; b < 256; b++) whole = whole && t->byte_id[b] != BASED_NONE;
    if ((flags & BASED_ADD_BOS) && t->bos != BASED_NONE)
        REQUIRE(many > 0 && (uint32_t)ids[i++] == t->bos);
    int prefix = (t->flags & BASED_TOK_PREFIX_SPACE) != 0;
    for (; i < many; i++) {
        REQUIRE(ids[i] >= 0 && (uint32_t)ids[i] < t->size);
        span s = token_span(t, (uint32_t)ids[i]);
        if (!whole) continue;
        /* the space put before the text */
        if (prefix && s.n > 0 && !is_hidden(t, (uint32_t)ids[i])) {
            REQUIRE(s.p[0] == ' ');
            s = rest_of(s, 1);
            prefix = 0;
        }
        REQUIRE(s.n <= n - at && memcmp(s.p, copy + at, s.n) == 0);
        at += s.n;
    }
    REQUIRE(!whole || at == n);
    free(check_decoding(t, ids, (size_t)many));
    free(ids), free(scratch), free(copy);
}

/* Tokenizers of each kind and cut, those of sections.h. */
enum { TOKENIZERS = 5 };
static inline void open_all(based_tokenizer t[TOKENIZERS]) {
    static maker m[TOKENIZERS];
    make_bpe(&m[0]), make_scores(&m[1]);
    for (uint32_t i = 2; i < TOKENIZERS; i++) {
        make_whole(&m[i]);
        m[i].cut = i - 1;
    }
    for (size_t i = 0, n; i < TOKENIZERS; i++) {
        unsigned char *section = make_section(&m[i], &n);
        REQUIRE(based_tokenizer_init(&t[i], section, n, m[i].size, NULL) == BASED_OK);
    }
}

#endif
