/* tokenizer.c - text to token ids and back, exactly.
 *
 * A model reads token ids and works only with the ids that it was trained on. A tokenizer that is
 * right for almost every text makes the model worse without any sign of it. This file therefore
 * reproduces two tokenizers exactly:
 *
 *     BASED_BPE      byte-level byte-pair encoding as in GPT-2, Llama 3 and Qwen. The text is cut
 *                    into pieces (a word with its leading space, a number, a run of punctuation,
 *                    a run of spaces), every byte of a piece becomes a symbol, and neighboring
 *                    symbols are merged in the order of their rank, lowest rank first.
 *     BASED_SCORES   the tokenizer of llama2.c, which is SentencePiece's BPE. The whole text is one
 *                    piece, its characters become symbols (a character without a token becomes its
 *                    bytes), and neighbors are merged in the order of the score of the result,
 *                    highest score first.
 *
 * Among equals the leftmost pair is merged first. One merge loop serves both: a linked list of
 * symbols, and a binary heap of the pairs that can merge.
 *
 * The tables lie in the checkpoint and are used in place. based_tokenizer_init checks every entry
 * once, and all later code relies on that. Text may be any bytes, and encoding followed by decoding
 * returns them. Of libc this file needs only string.h, and of based.c only the two functions that
 * based_tokenizer_open calls. It does not allocate, print, or keep anything between two calls.
 *
 * Order: errors, the section and its checks, characters, pieces, merging, encoding, decoding, and
 * last the Unicode table of letters, numbers and spaces, written by tests/unicode_tables.py.
 */
#include "based.h"

#include <string.h>

/* ==== 1. Errors ==================================================================================
 * A status and one line of text, without printf: this file also runs where there is no stdio.
 */

/* Writes `number` in decimal at p, but not beyond end. Returns where the digits stop. */
static char *put_number(char *p, const char *end, uint64_t number) {
    char digits[20];
    int n = 0;
    do {
        digits[n++] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    while (n > 0 && p < end) *p++ = digits[--n];
    return p;
}

/* Fills *e with one line, in which the first # stands for a and the second for b. Returns status,
 * so that a check can end with `return reject(...)`. */
static int reject(based_error *e, int status, const char *line, uint64_t a, uint64_t b) {
    if (e == NULL) return status;
    char *p = e->text;
    const char *end = e->text + sizeof e->text - 1;
    for (; *line != '\0' && p < end; line++) {
        if (*line == '#') {
            p = put_number(p, end, a);
            a = b;
        } else {
            *p++ = *line;
        }
    }
    *p = '\0';
    e->status = status;
    return status;
}

/* A section that is not a valid tokenizer. */
static int invalid(based_error *e, const char *line, uint64_t a, uint64_t b) {
    return reject(e, BASED_EFORMAT, line, a, b);
}

/* ==== 2. The section =============================================================================
 * The format is in based.h, part 7. The bytes may come from anywhere, so every count, id and order
 * is checked here, once. Each check may rely on those that run before it: the header gives the
 * sizes of the tables, then the tables are known to fit, then tokens can be looked up. Later code
 * relies on all of it: every id is below t->size, tables are sorted, no score is NaN.
 */

typedef struct span {                   /* a range of bytes, not owned */
    const unsigned char *p;
    size_t n;
} span;

/* What remains of s after its first n bytes. */
static span rest_of(span s, size_t n) {
    return (span){ s.p + n, s.n - n };
}

/* The bytes of a token; of a special token, its name. id must be below t->size. */
static span token_span(const based_tokenizer *t, uint32_t id) {
    return (span){ t->bytes + t->start[id], t->start[id + 1] - t->start[id] };
}

/* <0, 0, >0 as a comes before, equals, or comes after b, bytewise; a prefix comes first. */
static int compare(span a, span b) {
    size_t n = a.n < b.n ? a.n : b.n;
    int order = n > 0 && a.p && b.p ? memcmp(a.p, b.p, n) : 0;
    return order != 0 ? order : (a.n > b.n) - (a.n < b.n);
}

/* The same for x against a followed by b, without copying them into one buffer. */
static int compare_joined(span x, span a, span b) {
    int order = compare((span){ x.p, x.n < a.n ? x.n : a.n }, a);
    return order != 0 ? order : compare(rest_of(x, a.n), b);
}

static int is_id_or_none(const based_tokenizer *t, uint32_t id) {
    return id < t->size || id == BASED_NONE;
}

/* Reads the header of twelve words and points the tables into the section. */
static int read_header(based_tokenizer *t, const uint32_t *word, size_t size, uint32_t vocab,
                       based_error *e) {
    if (size < 48)
        return invalid(e, "tokenizer: the section has # bytes, its header alone is 48", size, 0);
    t->kind = word[1];
    t->flags = word[2];
    t->size = word[3];
    t->bos = word[4];
    t->eos = word[5];
    t->unknown = word[6];
    t->merges = word[7];
    t->specials = word[8];
    t->cut = word[9];
    t->stops = word[10] & 0xFFFF;
    t->shown = word[10] >> 16;
    int is_bpe = t->kind == BASED_BPE;
    if (!is_bpe && t->kind != BASED_SCORES)
        return invalid(e, "tokenizer: kind # is unknown, expected 1 (BPE) or 2 (scores)",
                       t->kind, 0);
    if (t->flags > 15)
        return invalid(e, "tokenizer: flags # are unknown, expected 0 to 15", t->flags, 0);
    if (is_bpe && (t->flags & BASED_TOK_PREFIX_SPACE) != 0)
        return invalid(e, "tokenizer: a prefix space is defined for kind 2 (scores) only", 0, 0);
    if (!is_bpe && (t->flags & BASED_TOK_WHOLE_PIECES) != 0)
        return invalid(e, "tokenizer: whole pieces are defined for kind 1 (BPE) only", 0, 0);
    if (t->cut > (is_bpe ? BASED_CUT_DIGITS : 0))
        return invalid(e, "tokenizer: kind # with cut # is unknown", t->kind, t->cut);
    if (t->size == 0 || t->size > BASED_MAX_VOCAB || t->size > vocab)
        return invalid(e, "tokenizer: it has # tokens, the model knows #: it belongs to another "
                       "model", t->size, vocab);
    if (!is_id_or_none(t, t->bos) || !is_id_or_none(t, t->eos) || !is_id_or_none(t, t->unknown))
        return invalid(e, "tokenizer: bos, eos or unknown is not one of its # tokens", t->size, 0);

    /* The words of all tables: a sum of a few 32-bit counts cannot overflow 64 bits. It must be
     * what the section says and fit into it, so no table reaches beyond the section. With whole
     * pieces the last table has the words that the others leave. */
    uint64_t words = 12 + 256 + (uint64_t)t->specials + t->stops + t->shown + t->size + 1;
    words += is_bpe ? 4 * (uint64_t)t->merges : (uint64_t)t->merges + t->size;
    t->sorted_size = is_bpe ? 0 : t->merges;
    if ((t->flags & BASED_TOK_WHOLE_PIECES) != 0 && word[0] > words) {
        t->sorted_size = (uint32_t)(word[0] - words);
        words = word[0];
    }
    if (word[0] != words)
        return invalid(e, "tokenizer: it says its tables have # words, their counts add up to #",
                       word[0], words);
    if (words > size / 4)
        return invalid(e, "tokenizer: its tables need # words, the section has # bytes",
                       words, size);
    t->byte_id = word + 12;
    t->special_id = t->byte_id + 256;
    t->stop_id = t->special_id + t->specials;
    t->shown_id = t->stop_id + t->stops;
    t->start = t->shown_id + t->shown;
    const uint32_t *rest = t->start + t->size + 1;
    if (is_bpe) {
        t->merge = rest;
        t->sorted = rest + 4 * (size_t)t->merges;
    } else {
        t->sorted = rest;
        t->score = (const float *)(const void *)(rest + t->merges);
    }
    t->bytes = (const unsigned char *)(word + words);
    return BASED_OK;
}

/* The bytes of the tokens follow one another without a gap and fill the rest of the section. Their
 * length is bounded, so that the time to compare two tokens is bounded. */
static int check_token_bytes(const based_tokenizer *t, size_t bytes, based_error *e) {
    if (t->start[0] != 0)
        return invalid(e, "tokenizer: token 0 starts at byte #, not 0", t->start[0], 0);
    for (uint32_t i = 0; i < t->size; i++) {
        if (t->start[i + 1] < t->start[i])
            return invalid(e, "tokenizer: token # ends before it starts", i, 0);
        if (t->start[i + 1] - t->start[i] > BASED_MAX_TOKEN)
            return invalid(e, "tokenizer: token # is longer than # bytes", i, BASED_MAX_TOKEN);
    }
    if (t->start[t->size] != bytes)
        return invalid(e, "tokenizer: its tokens have # bytes, # are there",
                       t->start[t->size], bytes);
    return BASED_OK;
}

/* The token of a byte consists of that byte; otherwise decoding would not undo encoding. */
static int check_byte_ids(const based_tokenizer *t, based_error *e) {
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t id = t->byte_id[b];
        if (id == BASED_NONE) continue;
        if (id >= t->size)
            return invalid(e, "tokenizer: byte # has token #, which does not exist", b, id);
        span s = token_span(t, id);
        if (s.n != 1 || s.p[0] != b)
            return invalid(e, "tokenizer: byte # has token #, which has other bytes", b, id);
    }
    return BASED_OK;
}

/* The tokens that end a text, and the special ones that decoding shows. */
static int check_ids(const based_tokenizer *t, based_error *e) {
    for (uint32_t i = 0; i < t->stops + t->shown; i++)
        if (t->stop_id[i] >= t->size)
            return invalid(e, "tokenizer: stop or shown token # is #, which does not exist", i,
                           t->stop_id[i]);
    return BASED_OK;
}

/* Longest name first, so that the first name that matches is the longest match. No name is empty:
 * an empty one would match everywhere. */
static int check_specials(const based_tokenizer *t, based_error *e) {
    size_t longest = BASED_MAX_TOKEN;
    for (uint32_t i = 0; i < t->specials; i++) {
        uint32_t id = t->special_id[i];
        if (id >= t->size)
            return invalid(e, "tokenizer: special # is token #, which does not exist", i, id);
        size_t n = token_span(t, id).n;
        if (n == 0 || n > longest)
            return invalid(e, "tokenizer: the name of special #, token #, is empty or out of order",
                           i, id);
        longest = n;
    }
    return BASED_OK;
}

static uint64_t pair_key(const uint32_t *merge) {
    return (uint64_t)merge[0] << 32 | merge[1];
}

/* BASED_BPE: strictly ascending, because a binary search reads it. The bytes of a result are those
 * of its two parts. */
static int check_merges(const based_tokenizer *t, based_error *e) {
    for (uint32_t i = 0; i < t->merges; i++) {
        const uint32_t *m = t->merge + 4 * (size_t)i;
        if (m[0] >= t->size || m[1] >= t->size || m[3] >= t->size)
            return invalid(e, "tokenizer: merge # names a token beyond the last, #",
                           i, t->size - 1);
        if (i > 0 && pair_key(m) <= pair_key(m - 4))
            return invalid(e, "tokenizer: merge # is out of order", i, 0);
        span left = token_span(t, m[0]), right = token_span(t, m[1]);
        if (left.n == 0 || right.n == 0 || compare_joined(token_span(t, m[3]), left, right) != 0)
            return invalid(e, "tokenizer: merge # makes token #, which has other bytes", i, m[3]);
    }
    return BASED_OK;
}

/* Strictly ascending for the same reason. */
static int check_sorted(const based_tokenizer *t, based_error *e) {
    for (uint32_t i = 0; i < t->sorted_size; i++) {
        uint32_t id = t->sorted[i];
        if (id >= t->size)
            return invalid(e, "tokenizer: sorted entry # is token #, which does not exist", i, id);
        if (i > 0 && compare(token_span(t, t->sorted[i - 1]), token_span(t, id)) >= 0)
            return invalid(e, "tokenizer: sorted entry #, token #, is out of order", i, id);
    }
    return BASED_OK;
}

/* BASED_SCORES: no score is NaN, which has no place in the order of the heap. */
static int check_scores(const based_tokenizer *t, based_error *e) {
    for (uint32_t id = 0; id < t->size; id++)
        if (t->score[id] != t->score[id])
            return invalid(e, "tokenizer: the score of token # is not a number", id, 0);
    return BASED_OK;
}

/* Four zero-terminated texts behind the tokens, or none: what a system message, one of the user and
 * a reply look like, with one {} each ("" for no system message), and how a text begins. */
static int check_chat(based_tokenizer *t, const char *p, size_t bytes, based_error *e) {
    size_t at = 0;
    for (uint32_t i = 0; i < 4 && bytes > 0; i++) {
        size_t holes = 0;
        t->chat[i] = p + at;
        for (; at < bytes && p[at] != '\0'; at++)
            holes += p[at] == '{' && at + 1 < bytes && p[at + 1] == '}';
        if (at++ == bytes)
            return invalid(e, "tokenizer: text # of the chat template has no end", i, 0);
        int needs = i == BASED_CHAT_SYSTEM ? *t->chat[i] != '\0' : i != BASED_CHAT_BEGIN;
        if (needs && holes != 1)
            return invalid(e, "tokenizer: text # of the chat template has not one {}", i, 0);
        if ((at == bytes) != (i == BASED_CHAT_BEGIN))
            return invalid(e, "tokenizer: the chat template has not four texts", 0, 0);
    }
    return BASED_OK;
}

int based_tokenizer_init(based_tokenizer *t, const void *section, size_t size, uint32_t vocab,
                         based_error *e) {
    const uint32_t *word = section;
    based_tokenizer made;
    if (t == NULL || section == NULL || ((uintptr_t)section & 3) != 0)
        return reject(e, BASED_EINVAL, "tokenizer: the section is missing or not 4-byte aligned",
                    0, 0);
    memset(&made, 0, sizeof made);
    int status = read_header(&made, word, size, vocab, e);
    if (status) return status;
    size_t bytes = size - 4 * (size_t)word[0], chat = word[11];
    if (chat > bytes)
        return invalid(e, "tokenizer: the chat template has # bytes, # are there", chat, bytes);
    status = check_token_bytes(&made, bytes - chat, e);
    if (!status) status = check_byte_ids(&made, e);
    if (!status) status = check_specials(&made, e);
    if (!status) status = check_ids(&made, e);
    if (!status) status = (made.kind == BASED_BPE ? check_merges : check_scores)(&made, e);
    if (!status) status = check_sorted(&made, e);
    if (!status) status = check_chat(&made, (const char *)made.bytes + bytes - chat, chat, e);
    if (!status) *t = made;             /* a failed call leaves *t as it was */
    return status;
}

int based_tokenizer_open(based_tokenizer *t, const based_model *m, based_error *e) {
    size_t bytes;
    const void *section = based_model_tokenizer(m, &bytes);
    if (section == NULL)
        return reject(e, BASED_EINVAL, "the checkpoint carries no tokenizer", 0, 0);
    return based_tokenizer_init(t, section, bytes, based_model_config(m)->vocab, e);
}

/* ==== 3. Characters ==============================================================================
 * UTF-8 as defined by Unicode 15.0, table 3-7. Bytes that are not UTF-8 are not an error: when text
 * is cut into pieces, such a byte counts as one character of class OTHER; when tokens are decoded,
 * it becomes U+FFFD. The decoder in section 7 relies on the first two functions as well.
 */

enum { OTHER, LETTER, NUMBER, SPACE };  /* \p{L}, \p{N}, \s; OTHER: the rest, and invalid bytes */

static unsigned unicode_class(uint32_t c);

/* The number of bytes of a character whose first byte is b; 0 if no character begins with b. */
static size_t character_bytes(unsigned char b) {
    if (b < 0x80) return 1;
    if (b < 0xC2) return 0;             /* a continuation byte, or an overlong form of ASCII */
    if (b < 0xE0) return 2;
    if (b < 0xF0) return 3;
    return b < 0xF5 ? 4 : 0;            /* code points end at U+10FFFF */
}

/* Whether b may follow the n >= 1 bytes at p, which begin a character. Overlong forms, surrogates
 * and values beyond U+10FFFF are rejected at the second byte, the first where they can be known. */
static int continues(const unsigned char *p, size_t n, unsigned char b) {
    unsigned char low = 0x80, high = 0xBF;
    if (n == 1) {
        if (p[0] == 0xE0) low = 0xA0;
        if (p[0] == 0xED) high = 0x9F;
        if (p[0] == 0xF0) low = 0x90;
        if (p[0] == 0xF4) high = 0x8F;
    }
    return low <= b && b <= high;
}

/* The class of the first character of s, and its length in *bytes. s.n > 0. A byte that begins no
 * whole character is a character by itself, of class OTHER like U+FFFD; it keeps its own value, so
 * that decoding returns it. */
static unsigned character_class(span s, size_t *bytes) {
    unsigned char b = s.p[0];
    size_t n = character_bytes(b);
    *bytes = 1;
    if (n == 1) {
        if ((b | 32) >= 'a' && (b | 32) <= 'z') return LETTER;
        if (b >= '0' && b <= '9') return NUMBER;
        return b == ' ' || (b >= '\t' && b <= '\r') ? SPACE : OTHER;
    }
    if (n == 0 || n > s.n) return OTHER;
    uint32_t c = b & (0x7Fu >> n);
    for (size_t i = 1; i < n; i++) {
        if (!continues(s.p, i, s.p[i])) return OTHER;
        c = c << 6 | (s.p[i] & 0x3Fu);
    }
    *bytes = n;
    return unicode_class(c);
}

/* ==== 4. Pieces ==================================================================================
 * The originals cut text by a regular expression. GPT-2's alternatives are tried in this order at
 * each place:
 *
 *     's|'t|'re|'ve|'m|'ll|'d       a contraction
 *      ?\p{L}+| ?\p{N}+             an optional space, then a run of letters, or of numbers,
 *      ?[^\s\p{L}\p{N}]+            or of anything else that is not a space
 *     \s+(?!\S)|\s+                 spaces, without the last one if a non-space follows
 *
 * BASED_CUT_DIGITS first makes each number a piece of its own and ends the text before it, so that
 * a space never joins a number. Llama 3 has
 *
 *     (?i:'s|'t|'re|'ve|'m|'ll|'d)  a contraction in any case
 *     [^\r\n\p{L}\p{N}]?\p{L}+      letters, behind one character that is neither a letter nor a
 *                                   number nor the end of a line
 *     \p{N}{1,3}                    up to three numbers; Qwen 2: one
 *      ?[^\s\p{L}\p{N}]+[\r\n]*     anything else that is not a space, and the ends of its line
 *     \s*[\r\n]+                    spaces up to the last end of a line
 *     \s+(?!\S)|\s+                 other spaces, as above
 *
 * No alternative looks back, so pieces are found from left to right and nothing is remembered
 * between two of them.
 */

/* The bytes of the contraction that s begins with, 0 if none. In any case the long s, U+017F, is an
 * s too. */
static size_t contraction(span s, int any_case) {
    if (s.n < 2 || s.p[0] != '\'') return 0;
    unsigned char fold = any_case ? 32 : 0, a = s.p[1] | fold, b = s.n > 2 ? s.p[2] | fold : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if (any_case && s.n > 2 && s.p[1] == 0xC5 && s.p[2] == 0xBF) return 3;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* The bytes of the run of characters of one class at the start of s. *last: where the last of these
 * characters begins. */
static size_t run_of(span s, unsigned kind, size_t *last) {
    size_t n = 0, bytes = 0;
    *last = 0;
    while (n < s.n && character_class(rest_of(s, n), &bytes) == kind) {
        *last = n;
        n += bytes;
    }
    return n;
}

static int is_line_end(unsigned char b) {
    return b == '\r' || b == '\n';
}

/* GPT-2: the bytes of the first piece of s, at least one. s.n > 0. */
static size_t gpt2_piece(span s, int digits) {
    size_t n = contraction(s, 0), blank = s.p[0] == ' ', bytes, last;
    if (n > 0) return n;
    /* an optional space and a run of one class other than SPACE */
    if (blank < s.n) {
        unsigned kind = character_class(rest_of(s, blank), &bytes);
        int alone = digits && kind == NUMBER;
        if (alone && !blank) return bytes;
        if (kind != SPACE && !alone) return blank + run_of(rest_of(s, blank), kind, &last);
    }
    /* only spaces are left: the last one stays for the piece that follows, if there is one */
    n = run_of(s, SPACE, &last);
    if (n == s.n || (digits && character_class(rest_of(s, n), &bytes) == NUMBER)) return n;
    return last > 0 ? last : n;
}

/* Llama 3 and Qwen 2: the same. `digits`: how many numbers make a piece. */
static size_t llama_piece(span s, int digits) {
    size_t n = contraction(s, 1), blank = s.p[0] == ' ', bytes, last, before = 0;
    if (n > 0) return n;
    unsigned kind = character_class(s, &bytes);
    if ((kind == OTHER || kind == SPACE) && !is_line_end(s.p[0])) before = bytes;
    n = run_of(rest_of(s, before), LETTER, &last);
    if (n > 0) return before + n;
    for (; kind == NUMBER && digits > 0; digits--) {
        n += bytes;
        if (n == s.n) break;
        kind = character_class(rest_of(s, n), &bytes);
    }
    if (n > 0) return n;
    n = run_of(rest_of(s, blank), OTHER, &last);
    if (n > 0) {
        for (n += blank; n < s.n && is_line_end(s.p[n]); n++);
        return n;
    }
    /* only spaces are left */
    n = run_of(s, SPACE, &last);
    for (size_t i = n; i > 0; i--)
        if (is_line_end(s.p[i - 1])) return i;
    return n < s.n && last > 0 ? last : n;
}

static size_t first_piece(const based_tokenizer *t, span s) {
    if (t->cut == BASED_CUT_LLAMA3 || t->cut == BASED_CUT_QWEN2)
        return llama_piece(s, t->cut == BASED_CUT_LLAMA3 ? 3 : 1);
    return gpt2_piece(s, t->cut == BASED_CUT_DIGITS);
}

/* ==== 5. Merging =================================================================================
 * A piece is a linked list of symbols, of which neighbors merge until no pair can. The pairs that
 * can merge are candidates in a binary heap, best first. A merge does not search the heap for the
 * candidates that it has made impossible: they are recognized when they are popped, because the
 * lengths of their symbols have changed. Each merge pops one candidate and pushes at most two, so n
 * symbols have at most 2n candidates in all, and the time is O(n log n) for any text.
 */

typedef struct symbol {
    uint32_t id;
    uint32_t prev, next;                /* neighbors in the list, or BASED_NONE */
    uint32_t length;                    /* first symbols it was merged from; 0: part of another */
} symbol;

typedef struct merge_candidate {
    uint64_t order;                     /* rank << 32 | index of the left symbol; smallest first */
    uint32_t length;                    /* of both symbols together, when the pair was pushed */
    uint32_t result;                    /* the id that they merge into */
} merge_candidate;

typedef struct encoder {
    const based_tokenizer *t;
    symbol *symbols;                    /* (n + 1) the symbols of one piece */
    uint32_t count;                     /* of symbols in this piece */
    merge_candidate *heap;              /* (2n + 2) */
    size_t heap_size;
    int32_t *ids;                       /* the result */
    size_t n_ids;
    int started;                        /* some text was encoded: no prefix space any more */
} encoder;

static void heap_push(encoder *c, merge_candidate pair) {
    size_t i = c->heap_size++;
    while (i > 0 && pair.order < c->heap[(i - 1) / 2].order) {
        c->heap[i] = c->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    c->heap[i] = pair;
}

static merge_candidate heap_pop(encoder *c) {
    merge_candidate best = c->heap[0], last = c->heap[--c->heap_size];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < c->heap_size) {
        if (child + 1 < c->heap_size && c->heap[child + 1].order < c->heap[child].order) child++;
        if (last.order <= c->heap[child].order) break;
        c->heap[i] = c->heap[child];
        i = child;
    }
    c->heap[i] = last;
    return best;
}

/* BASED_BPE: the entry (left, right, rank, result) of the merge table, NULL if there is none. */
static const uint32_t *find_merge(const based_tokenizer *t, uint32_t left, uint32_t right) {
    uint64_t key = pair_key((const uint32_t[]){ left, right });
    size_t low = 0, high = t->merges;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const uint32_t *m = t->merge + 4 * middle;
        uint64_t here = pair_key(m);
        if (here == key) return m;
        if (here < key) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* The token whose bytes are a followed by b, among those that text can become; BASED_NONE if there
 * is none. */
static uint32_t find_token(const based_tokenizer *t, span a, span b) {
    size_t low = 0, high = t->sorted_size;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_joined(token_span(t, t->sorted[middle]), a, b);
        if (order == 0) return t->sorted[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return BASED_NONE;
}

/* A rank for a score: lower for a higher score, equal for equal scores. Read as integers, the bits
 * of positive floats are in the order of their values; those of negative floats are in the opposite
 * order and have the sign bit set, so they already are what a rank must be. */
static uint32_t rank_of_score(float score) {
    uint32_t bits;
    score += 0.0f;                      /* -0 becomes 0: they are equal, their bits are not */
    memcpy(&bits, &score, sizeof bits);
    return (bits & 0x80000000u) != 0 ? bits : 0x7FFFFFFFu - bits;
}

/* BASED_SCORES: whether a symbol stands for text without a token. Such a symbol never merges. */
static int is_fallback(const based_tokenizer *t, uint32_t id) {
    span s = token_span(t, id);
    return id == t->unknown || (s.n == 1 && t->byte_id[s.p[0]] == id);
}

/* Pushes the symbol at index `left` and its right neighbor as a candidate, if they can merge. */
static void push_pair(encoder *c, uint32_t left) {
    const based_tokenizer *t = c->t;
    const symbol *a = &c->symbols[left];
    if (a->next == BASED_NONE) return;
    const symbol *b = &c->symbols[a->next];
    uint32_t rank, result;
    if (t->kind == BASED_BPE) {
        const uint32_t *m = find_merge(t, a->id, b->id);
        if (m == NULL) return;
        rank = m[2];
        result = m[3];
    } else {
        if (is_fallback(t, a->id) || is_fallback(t, b->id)) return;
        result = find_token(t, token_span(t, a->id), token_span(t, b->id));
        if (result == BASED_NONE) return;
        rank = rank_of_score(t->score[result]);
    }
    heap_push(c, (merge_candidate){ (uint64_t)rank << 32 | left, a->length + b->length, result });
}

/* Merges the two symbols of a candidate into the left one, unless one of them has changed since. */
static void merge_pair(encoder *c, merge_candidate pair) {
    uint32_t left = (uint32_t)(pair.order & 0xFFFFFFFFu);
    symbol *a = &c->symbols[left];
    if (a->length == 0 || a->next == BASED_NONE) return;
    symbol *b = &c->symbols[a->next];
    if (a->length + b->length != pair.length) return;
    /* b leaves the list */
    a->id = pair.result;
    a->length = pair.length;
    a->next = b->next;
    b->length = 0;
    if (a->next != BASED_NONE) c->symbols[a->next].prev = left;
    /* the new symbol has two new pairs */
    if (a->prev != BASED_NONE) push_pair(c, a->prev);
    push_pair(c, left);
}

/* Appends a symbol to the list. All symbols of a piece are appended before the first merge, so
 * their indices are consecutive. */
static void add_symbol(encoder *c, uint32_t id) {
    uint32_t i = c->count++;
    c->symbols[i] = (symbol){ id, i == 0 ? BASED_NONE : i - 1, BASED_NONE, 1 };
    if (i > 0) c->symbols[i - 1].next = i;
}

/* A byte as a symbol: its token, else the unknown token, else nothing, as the original does. */
static void add_byte(encoder *c, unsigned char b) {
    uint32_t id = c->t->byte_id[b];
    if (id == BASED_NONE) id = c->t->unknown;
    if (id != BASED_NONE) add_symbol(c, id);
}

static void add_id(encoder *c, uint32_t id) {
    c->ids[c->n_ids++] = (int32_t)id;
}

/* Merges the symbols of the piece until no pair can, appends them to the ids, clears the piece. */
static void finish_piece(encoder *c) {
    c->heap_size = 0;
    for (uint32_t i = 0; i < c->count; i++) push_pair(c, i);
    while (c->heap_size > 0) merge_pair(c, heap_pop(c));
    for (uint32_t i = c->count > 0 ? 0 : BASED_NONE; i != BASED_NONE; i = c->symbols[i].next)
        add_id(c, c->symbols[i].id);
    c->count = 0;
}

/* ==== 6. Encoding ================================================================================
 * Cuts the text at special tokens if the caller asks for it, turns the text between them into
 * pieces of symbols, and merges each piece. The bounds that based_encode_bound and
 * based_encode_scratch promise follow from this: a symbol comes from at least one byte or is the
 * prefix space, and an id is at least one symbol, a special token's name, or bos.
 */

enum { MAX_TEXT = 0x7FFFFFF0 };         /* bytes: indices in the list of symbols have 32 bits */

/* One character of a BASED_SCORES text: its token if it has one, else its bytes one by one. */
static void add_character(encoder *c, span s) {
    uint32_t id = find_token(c->t, s, (span){ NULL, 0 });
    if (id != BASED_NONE) add_symbol(c, id);
    else for (size_t i = 0; i < s.n; i++) add_byte(c, s.p[i]);
}

/* Encodes text without special tokens. */
static void encode_text(encoder *c, span s) {
    if (s.n == 0) return;
    if ((c->t->flags & BASED_TOK_PREFIX_SPACE) != 0 && !c->started)
        add_character(c, (span){ (const unsigned char *)" ", 1 });
    c->started = 1;
    for (size_t n; s.n > 0; s = rest_of(s, n)) {
        if (c->t->kind == BASED_BPE) {
            n = first_piece(c->t, s);
            /* with whole pieces, a piece that is a token needs no merges */
            uint32_t whole = find_token(c->t, (span){ s.p, n }, (span){ NULL, 0 });
            for (size_t i = 0; i < n && whole == BASED_NONE; i++) add_byte(c, s.p[i]);
            finish_piece(c);
            if (whole != BASED_NONE) add_id(c, whole);
        } else {
            /* As in llama2.c a character is any byte and up to three continuation bytes after it.
             * In UTF-8 this is a character; for other bytes it is what the model was trained on. */
            for (n = 1; n < s.n && n < 4 && (s.p[n] & 0xC0) == 0x80;) n++;
            add_character(c, (span){ s.p, n });
        }
    }
    finish_piece(c);                    /* BASED_SCORES: the whole text is one piece */
}

/* The special token whose name s begins with, the longest if there are several; BASED_NONE if there
 * is none. */
static uint32_t special_at(const based_tokenizer *t, span s) {
    for (uint32_t i = 0; i < t->specials; i++) {
        span name = token_span(t, t->special_id[i]);
        if (name.n <= s.n && memcmp(name.p, s.p, name.n) == 0) return t->special_id[i];
    }
    return BASED_NONE;
}

/* Encodes text in which the names of special tokens stand for these tokens. */
static void encode_with_specials(encoder *c, span s) {
    /* Most bytes begin no name: a table of first bytes skips them without a comparison. */
    unsigned char begins[256] = { 0 };
    for (uint32_t i = 0; i < c->t->specials; i++)
        begins[token_span(c->t, c->t->special_id[i]).p[0]] = 1;
    span text = { s.p, 0 };             /* what lies between the last special token and s */
    while (s.n > 0) {
        uint32_t id = begins[s.p[0]] ? special_at(c->t, s) : BASED_NONE;
        s = rest_of(s, id == BASED_NONE ? 1 : token_span(c->t, id).n);
        if (id == BASED_NONE) {
            text.n++;
        } else {
            encode_text(c, text);
            add_id(c, id);
            text = (span){ s.p, 0 };
        }
    }
    encode_text(c, text);
}

/* Every id stands for at least one byte, or is bos, or the token of the prefix space. */
size_t based_encode_bound(const based_tokenizer *t, size_t n) {
    (void)t;
    return n <= (size_t)-1 - 2 ? n + 2 : (size_t)-1;
}

/* One symbol per byte and one for the prefix space, and two candidates for each of them. */
size_t based_encode_scratch(const based_tokenizer *t, size_t n) {
    size_t each = sizeof(symbol) + 2 * sizeof(merge_candidate);
    (void)t;
    return n <= MAX_TEXT && n < (size_t)-1 / each ? (n + 1) * each : (size_t)-1;
}

int64_t based_encode(const based_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids,
                     void *scratch, based_error *e) {
    if (t == NULL || ids == NULL || scratch == NULL || (text == NULL && n > 0)
        || ((uintptr_t)scratch & 7) != 0)
        return reject(e, BASED_EINVAL, "encode: an argument is NULL, or the scratch memory is not "
                      "8-byte aligned", 0, 0);
    if ((flags & ~(BASED_ADD_BOS | BASED_PARSE_SPECIALS)) != 0)
        return reject(e, BASED_EINVAL, "encode: unknown flags, expected BASED_ADD_BOS, "
                      "BASED_PARSE_SPECIALS or 0", 0, 0);
    if (based_encode_scratch(t, n) == (size_t)-1)
        return reject(e, BASED_EINVAL, "encode: # bytes of text are too many at once, # at most: "
                      "cut the text", n, MAX_TEXT);
    /* scratch: the heap (2n + 2), then the symbols (n + 1) */
    merge_candidate *heap = scratch;
    symbol *symbols = (symbol *)(void *)(heap + 2 * (n + 1));
    encoder c = { .t = t, .symbols = symbols, .heap = heap, .ids = ids };
    span s = { (const unsigned char *)text, n };
    if ((flags & BASED_ADD_BOS) != 0 && t->bos != BASED_NONE) add_id(&c, t->bos);
    if ((flags & BASED_PARSE_SPECIALS) != 0) encode_with_specials(&c, s);
    else encode_text(&c, s);
    return (int64_t)c.n_ids;
}

/* ==== 7. Decoding ================================================================================
 * A token may end within a character, so the decoder holds the beginning of a character (at most
 * three bytes) until the next token completes it. The output is valid UTF-8 for any ids: bytes that
 * cannot become a character are replaced by U+FFFD, one for each maximal subpart (Unicode 15.0,
 * section 3.9).
 */

static int contains(const uint32_t *ids, uint32_t n, uint32_t id) {
    for (uint32_t i = 0; i < n; i++)
        if (ids[i] == id) return 1;
    return 0;
}

/* A special token that stands for no text. */
static int is_hidden(const based_tokenizer *t, uint32_t id) {
    return contains(t->special_id, t->specials, id) && !contains(t->shown_id, t->shown, id);
}

int based_is_stop(const based_tokenizer *t, int32_t id) {
    uint32_t i = (uint32_t)id;
    return id >= 0 && (i == t->eos || i == t->bos || contains(t->stop_id, t->stops, i));
}

const char *based_token_bytes(const based_tokenizer *t, int32_t id, size_t *n) {
    *n = 0;
    if (id < 0 || (uint32_t)id >= t->size) return NULL;
    span s = token_span(t, (uint32_t)id);
    if (!is_hidden(t, (uint32_t)id)) *n = s.n;
    return (const char *)s.p;
}

int32_t based_special(const based_tokenizer *t, const char *text) {
    span name = { (const unsigned char *)text, strlen(text) };
    for (uint32_t i = 0; i < t->specials; i++)
        if (compare(token_span(t, t->special_id[i]), name) == 0) return (int32_t)t->special_id[i];
    return -1;
}

/* Writes U+FFFD, the replacement character. */
static size_t put_replacement(char *out) {
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

/* Reads one more byte and writes what it decides: nothing, one character, U+FFFD for held bytes
 * that turned out not to begin a character, and one more U+FFFD if the byte itself begins none. */
static size_t decode_byte(based_decoder *d, unsigned char b, char *out) {
    size_t n = 0;
    if (d->n > 0 && !continues(d->held, d->n, b)) n = based_decode_flush(d, out);
    if (d->n == 0 && character_bytes(b) == 0) return n + put_replacement(out + n);
    d->held[d->n++] = b;
    if (d->n < character_bytes(d->held[0])) return n;
    memcpy(out + n, d->held, d->n);
    n += d->n;
    d->n = 0;
    return n;
}

size_t based_decode(const based_tokenizer *t, based_decoder *d, int32_t id, char *out) {
    size_t bytes, n = 0;
    const unsigned char *p = (const unsigned char *)based_token_bytes(t, id, &bytes);
    if (bytes == 0) return 0;
    /* the space that encoding put before the text is dropped from the first token */
    size_t i = (t->flags & BASED_TOK_PREFIX_SPACE) != 0 && !d->started && p[0] == ' ';
    d->started = 1;
    for (; i < bytes; i++) n += decode_byte(d, p[i], out + n);
    return n;
}

size_t based_decode_flush(based_decoder *d, char *out) {
    if (d->n == 0) return 0;
    d->n = 0;
    return put_replacement(out);
}

/* Each byte may become U+FFFD, and so may what was held before. */
size_t based_decode_bound(const based_tokenizer *t) {
    size_t longest = 0;
    for (uint32_t id = 0; id < t->size; id++) {
        size_t n = token_span(t, id).n;
        if (n > longest) longest = n;
    }
    return 3 * longest + 3;
}

/* ==== 8. Unicode =================================================================================
 * Which code points are letters, numbers and spaces: what the reference library takes for them,
 * because it decided the ids that models were trained on. tests/test_tokenizer.py compares all.
 */

/* BEGIN TABLE, written by tests/unicode_tables.py */
/* Unicode 16.0. Each entry is 4 * code point + class: from there on, up to the next entry, all
 * code points have that class. */
static const uint32_t class_table[1610] = {
    0, 39, 56, 131, 132, 194, 232, 261, 364, 389, 492, 535, 536, 643, 644, 681, 684, 714, 720, 725,
    728, 742, 745, 748, 754, 764, 769, 860, 865, 988, 993, 2824, 2841, 2888, 2945, 2964, 2993, 2996,
    3001, 3004, 3521, 3540, 3545, 3552, 3561, 3576, 3581, 3584, 3609, 3612, 3617, 3628, 3633, 3636,
    3641, 3720, 3725, 4056, 4061, 4616, 4649, 5312, 5317, 5468, 5477, 5480, 5505, 5668, 5953, 6060,
    6077, 6092, 6273, 6444, 6530, 6568, 6585, 6592, 6597, 6992, 6997, 7000, 7061, 7068, 7097, 7106,
    7145, 7156, 7165, 7168, 7233, 7236, 7241, 7360, 7477, 7832, 7877, 7880, 7938, 7977, 8108, 8145,
    8152, 8169, 8172, 8193, 8280, 8297, 8300, 8337, 8340, 8353, 8356, 8449, 8548, 8577, 8620, 8641,
    8736, 8741, 8764, 8833, 9000, 9233, 9448, 9461, 9464, 9537, 9540, 9569, 9608, 9626, 9664, 9669,
    9732, 9749, 9780, 9789, 9796, 9805, 9892, 9897, 9924, 9929, 9932, 9945, 9960, 9973, 9976, 10041,
    10044, 10097, 10104, 10109, 10120, 10138, 10177, 10184, 10194, 10216, 10225, 10228, 10261,
    10284, 10301, 10308, 10317, 10404, 10409, 10436, 10441, 10448, 10453, 10460, 10465, 10472,
    10597, 10612, 10617, 10620, 10650, 10688, 10697, 10708, 10773, 10808, 10813, 10824, 10829,
    10916, 10921, 10948, 10953, 10960, 10965, 10984, 10997, 11000, 11073, 11076, 11137, 11144,
    11162, 11200, 11237, 11240, 11285, 11316, 11325, 11332, 11341, 11428, 11433, 11460, 11465,
    11472, 11477, 11496, 11509, 11512, 11633, 11640, 11645, 11656, 11674, 11712, 11717, 11722,
    11744, 11789, 11792, 11797, 11820, 11833, 11844, 11849, 11864, 11877, 11884, 11889, 11892,
    11897, 11904, 11917, 11924, 11937, 11948, 11961, 12008, 12097, 12100, 12186, 12236, 12309,
    12340, 12345, 12356, 12361, 12452, 12457, 12520, 12533, 12536, 12641, 12652, 12661, 12664,
    12673, 12680, 12698, 12736, 12770, 12796, 12801, 12804, 12821, 12852, 12857, 12868, 12873,
    12964, 12969, 13008, 13013, 13032, 13045, 13048, 13173, 13180, 13185, 13192, 13210, 13248,
    13253, 13260, 13329, 13364, 13369, 13380, 13385, 13548, 13557, 13560, 13625, 13628, 13649,
    13660, 13666, 13693, 13704, 13722, 13796, 13801, 13824, 13845, 13916, 13929, 14024, 14029,
    14064, 14069, 14072, 14081, 14108, 14234, 14272, 14341, 14532, 14537, 14544, 14593, 14620,
    14658, 14696, 14853, 14860, 14865, 14868, 14873, 14892, 14897, 14992, 14997, 15000, 15005,
    15044, 15049, 15056, 15093, 15096, 15105, 15124, 15129, 15132, 15170, 15208, 15217, 15232,
    15361, 15364, 15490, 15568, 15617, 15648, 15653, 15796, 15905, 15924, 16385, 16556, 16637,
    16642, 16680, 16705, 16728, 16745, 16760, 16773, 16776, 16789, 16796, 16825, 16836, 16853,
    16904, 16953, 16956, 16962, 17000, 17025, 17176, 17181, 17184, 17205, 17208, 17217, 17388,
    17393, 18724, 18729, 18744, 18753, 18780, 18785, 18788, 18793, 18808, 18817, 18980, 18985,
    19000, 19009, 19140, 19145, 19160, 19169, 19196, 19201, 19204, 19209, 19224, 19233, 19292,
    19297, 19524, 19529, 19544, 19553, 19820, 19878, 19956, 19969, 20032, 20097, 20440, 20449,
    20472, 20485, 22964, 22973, 23043, 23045, 23148, 23169, 23468, 23482, 23493, 23524, 23553,
    23624, 23677, 23752, 23809, 23880, 23937, 23988, 23993, 24004, 24065, 24272, 24413, 24416,
    24433, 24436, 24450, 24488, 24514, 24552, 24642, 24680, 24705, 25060, 25089, 25108, 25117,
    25252, 25257, 25260, 25281, 25560, 25601, 25724, 25882, 25921, 26040, 26049, 26068, 26113,
    26288, 26305, 26408, 26434, 26476, 26625, 26716, 26753, 26964, 27138, 27176, 27202, 27240,
    27293, 27296, 27669, 27856, 27925, 27956, 27970, 28008, 28173, 28292, 28345, 28354, 28393,
    28568, 28673, 28816, 28930, 28968, 28981, 28994, 29033, 29176, 29185, 29228, 29249, 29420,
    29429, 29440, 29605, 29620, 29625, 29648, 29653, 29660, 29673, 29676, 29697, 30464, 30721,
    31832, 31841, 31864, 31873, 32024, 32033, 32056, 32065, 32096, 32101, 32104, 32109, 32112,
    32117, 32120, 32125, 32248, 32257, 32468, 32473, 32500, 32505, 32508, 32521, 32532, 32537,
    32564, 32577, 32592, 32601, 32624, 32641, 32692, 32713, 32724, 32729, 32756, 32771, 32812,
    32931, 32936, 32959, 32960, 33151, 33152, 33218, 33221, 33224, 33234, 33256, 33277, 33282,
    33320, 33345, 33396, 33801, 33804, 33821, 33824, 33833, 33872, 33877, 33880, 33893, 33912,
    33937, 33940, 33945, 33948, 33953, 33956, 33961, 33976, 33981, 34024, 34033, 34048, 34069,
    34088, 34105, 34108, 34114, 34317, 34326, 34344, 37250, 37488, 37802, 37888, 40410, 40528,
    45057, 45972, 45997, 46012, 46025, 46032, 46070, 46072, 46081, 46232, 46237, 46240, 46261,
    46264, 46273, 46496, 46525, 46528, 46593, 46684, 46721, 46748, 46753, 46780, 46785, 46812,
    46817, 46844, 46849, 46876, 46881, 46908, 46913, 46940, 46945, 46972, 47293, 47296, 49155,
    49156, 49173, 49182, 49184, 49286, 49320, 49349, 49368, 49378, 49389, 49396, 49413, 49756,
    49781, 49792, 49797, 50156, 50161, 50176, 50197, 50368, 50373, 50748, 50762, 50776, 50817,
    50944, 51137, 51200, 51330, 51368, 51490, 51520, 51526, 51584, 51714, 51752, 51910, 51968,
    53249, 79616, 79873, 168500, 168769, 168952, 168961, 170036, 170049, 170114, 170153, 170160,
    170241, 170428, 170493, 170616, 170625, 170906, 170944, 171101, 171136, 171145, 171556, 171565,
    171832, 171841, 171848, 171853, 171856, 171861, 171892, 171977, 172040, 172045, 172056, 172061,
    172076, 172081, 172172, 172226, 172248, 172289, 172496, 172553, 172752, 172866, 172904, 173001,
    173024, 173037, 173040, 173045, 173052, 173058, 173097, 173208, 173249, 173340, 173441, 173556,
    173585, 173772, 173885, 173890, 173928, 173953, 173972, 173977, 174018, 174057, 174076, 174081,
    174244, 174337, 174348, 174353, 174384, 174402, 174440, 174465, 174556, 174569, 174572, 174585,
    174784, 174789, 174792, 174805, 174812, 174821, 174840, 174849, 174852, 174857, 174860, 174957,
    174968, 174977, 175020, 175049, 175060, 175109, 175132, 175141, 175164, 175173, 175196, 175233,
    175260, 175265, 175292, 175297, 175468, 175473, 175528, 175553, 176012, 176066, 176104, 176129,
    220816, 220865, 220956, 220973, 221168, 254977, 256440, 256449, 256872, 257025, 257052, 257101,
    257120, 257141, 257144, 257149, 257188, 257193, 257244, 257249, 257268, 257273, 257276, 257281,
    257288, 257293, 257300, 257305, 257736, 257869, 259320, 259393, 259648, 259657, 259872, 260033,
    260080, 260545, 260564, 260569, 261108, 261186, 261224, 261253, 261356, 261381, 261484, 261529,
    261884, 261897, 261920, 261929, 261952, 261961, 261984, 261993, 262004, 262145, 262192, 262197,
    262300, 262305, 262380, 262385, 262392, 262397, 262456, 262465, 262520, 262657, 263148, 263198,
    263376, 263426, 263652, 263722, 263728, 264705, 264820, 264833, 265028, 265094, 265200, 265217,
    265346, 265360, 265397, 265478, 265481, 265514, 265516, 265537, 265688, 265729, 265848, 265857,
    266000, 266017, 266048, 266054, 266072, 266241, 266872, 266882, 266920, 266945, 267088, 267105,
    267248, 267265, 267424, 267457, 267664, 267713, 267756, 267761, 267820, 267825, 267852, 267857,
    267864, 267869, 267912, 267917, 267976, 267981, 268008, 268013, 268020, 268033, 268240, 268289,
    269532, 269569, 269656, 269697, 269728, 269825, 269848, 269853, 270020, 270025, 270060, 270337,
    270360, 270369, 270372, 270377, 270552, 270557, 270564, 270577, 270580, 270589, 270680, 270690,
    270721, 270812, 270822, 270849, 270972, 271006, 271040, 271233, 271308, 271313, 271320, 271342,
    271361, 271450, 271472, 271489, 271592, 271873, 272096, 272114, 272121, 272130, 272192, 272202,
    272385, 272388, 272449, 272464, 272469, 272480, 272485, 272600, 272642, 272676, 272769, 272886,
    272892, 272897, 273014, 273024, 273153, 273184, 273189, 273300, 273326, 273344, 273409, 273624,
    273665, 273752, 273762, 273793, 273868, 273890, 273921, 273992, 274086, 274112, 274433, 274724,
    274945, 275148, 275201, 275404, 275434, 275457, 275600, 275650, 275688, 275714, 275753, 275864,
    275901, 275992, 276866, 276988, 276993, 277160, 277185, 277192, 277257, 277268, 277505, 277622,
    277661, 277664, 277697, 277784, 277830, 277844, 277953, 278024, 278209, 278294, 278320, 278401,
    278492, 278541, 278752, 278858, 278976, 278981, 278988, 278997, 279000, 279053, 279232, 279361,
    279460, 279490, 279528, 279565, 279708, 279770, 279808, 279825, 279828, 279837, 279840, 279873,
    280012, 280025, 280028, 280077, 280268, 280325, 280340, 280386, 280425, 280428, 280433, 280436,
    280454, 280532, 280577, 280648, 280653, 280752, 280829, 280836, 281089, 281116, 281121, 281124,
    281129, 281144, 281149, 281208, 281213, 281252, 281281, 281468, 281538, 281576, 281621, 281652,
    281661, 281668, 281677, 281764, 281769, 281796, 281801, 281808, 281813, 281832, 281845, 281848,
    281921, 281924, 281973, 281992, 282113, 282152, 282157, 282160, 282169, 282172, 282177, 282328,
    282333, 282336, 282437, 282440, 282445, 282448, 282625, 282836, 282909, 282924, 282946, 282984,
    283005, 283016, 283137, 283328, 283409, 283416, 283421, 283424, 283458, 283496, 284161, 284348,
    284513, 284528, 284673, 284864, 284945, 284948, 284994, 285032, 285185, 285356, 285409, 285412,
    285442, 285480, 285506, 285584, 285697, 285804, 285890, 285936, 285953, 285980, 286721, 286896,
    287361, 287618, 287692, 287741, 287772, 287781, 287784, 287793, 287824, 287829, 287836, 287841,
    287936, 287997, 288000, 288005, 288008, 288066, 288104, 288385, 288416, 288425, 288580, 288645,
    288648, 288653, 288656, 288769, 288772, 288813, 288972, 289001, 289004, 289089, 289092, 289137,
    289320, 289397, 289400, 289473, 289764, 290561, 290692, 290754, 290792, 290817, 290852, 290857,
    291004, 291073, 291076, 291138, 291252, 291273, 291392, 291841, 291868, 291873, 291880, 291885,
    292036, 292121, 292124, 292162, 292200, 292225, 292248, 292253, 292260, 292265, 292392, 292449,
    292452, 292482, 292520, 293761, 293836, 293897, 293900, 293905, 293956, 293961, 294096, 294210,
    294248, 294593, 294596, 294658, 294740, 294913, 298600, 299010, 299452, 299521, 300304, 310849,
    311236, 311297, 315584, 315653, 315676, 315777, 331756, 331777, 334108, 361473, 361592, 361666,
    361704, 368641, 370916, 370945, 371068, 371074, 371112, 371137, 371452, 371458, 371496, 371521,
    371640, 371713, 371904, 371969, 371984, 372034, 372072, 372078, 372104, 372109, 372192, 372213,
    372288, 374017, 374196, 374210, 374248, 375041, 375298, 375388, 375809, 376108, 376129, 376132,
    376397, 376448, 376705, 376712, 376717, 376720, 376833, 401376, 401409, 406360, 406525, 406564,
    442305, 442320, 442325, 442352, 442357, 442364, 442369, 443532, 443593, 443596, 443713, 443724,
    443733, 443736, 443793, 443808, 443841, 445424, 454657, 455084, 455105, 455156, 455169, 455204,
    455233, 455272, 472002, 472040, 477954, 478032, 478082, 478160, 478594, 478692, 479233, 479572,
    479577, 479860, 479865, 479872, 479881, 479884, 479893, 479900, 479909, 479924, 479929, 479976,
    479981, 479984, 479989, 480016, 480021, 480280, 480285, 480300, 480309, 480340, 480345, 480372,
    480377, 480488, 480493, 480508, 480513, 480532, 480537, 480540, 480553, 480580, 480585, 481944,
    481953, 482052, 482057, 482156, 482161, 482284, 482289, 482388, 482393, 482516, 482521, 482620,
    482625, 482748, 482753, 482852, 482857, 482980, 482985, 483084, 483089, 483120, 483130, 483328,
    490497, 490620, 490645, 490668, 491713, 491960, 492545, 492724, 492765, 492792, 492802, 492840,
    492857, 492860, 494145, 494264, 494337, 494512, 494530, 494568, 496449, 496560, 496578, 496616,
    497473, 497592, 497601, 497606, 497644, 499585, 499612, 499617, 499632, 499637, 499644, 499649,
    499708, 499713, 500500, 500510, 500544, 500737, 501008, 501037, 501040, 501058, 501096, 504262,
    504496, 504502, 504512, 504518, 504532, 504838, 505016, 505022, 505080, 505857, 505872, 505877,
    505984, 505989, 505996, 506001, 506004, 506013, 506016, 506021, 506060, 506065, 506080, 506085,
    506088, 506093, 506096, 506121, 506124, 506141, 506144, 506149, 506152, 506157, 506160, 506165,
    506176, 506181, 506188, 506193, 506196, 506205, 506208, 506213, 506216, 506221, 506224, 506229,
    506232, 506237, 506240, 506245, 506252, 506257, 506260, 506269, 506284, 506289, 506316, 506321,
    506336, 506341, 506356, 506361, 506364, 506369, 506408, 506413, 506480, 506501, 506512, 506517,
    506536, 506541, 506608, 508930, 508980, 520130, 520168, 524289, 695168, 695297, 711912, 711937,
    712824, 712833, 735880, 735937, 765828, 765889, 768376, 778241, 780408, 786433, 806188, 806209,
    822976,
};
/* END TABLE */

/* The class of a code point above ASCII: that of the last entry at or before it. */
static unsigned unicode_class(uint32_t c) {
    size_t low = 0, high = sizeof class_table / sizeof *class_table;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (class_table[middle] >> 2 <= c) low = middle;
        else high = middle;
    }
    return class_table[low] & 3;
}
