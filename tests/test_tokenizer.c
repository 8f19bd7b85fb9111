/* test_tokenizer.c - the tokenizer on small sections made by hand, and on hostile ones.
 *
 * Every section and every result lies in a block of exactly the promised size, so that a build with
 * -fsanitize=address,undefined sees each byte read or written beyond it. Comparison with the
 * reference library on real vocabularies is in test_tokenizer.py.
 */
#include "../tokenizer.c"

#include "sections.h"
#include "test.h"

/* ==== Using a tokenizer, with everything in blocks of exactly the right size ================== */

static int64_t encode(const based_tokenizer *t, const char *text, size_t n, int flags, int32_t *out,
                      size_t room) {
    based_error e;
    int32_t *ids = malloc(4 * based_encode_bound(t, n));
    void *scratch = malloc(based_encode_scratch(t, n));
    char *copy = malloc(n + (n == 0));
    memcpy(copy, text, n);
    int64_t count = based_encode(t, copy, n, flags, ids, scratch, &e);
    CHECK_EACH(count >= 0 && (size_t)count <= based_encode_bound(t, n));
    for (int64_t i = 0; i < count; i++) CHECK_EACH(ids[i] >= 0 && (uint32_t)ids[i] < t->size);
    memcpy(out, ids, 4 * ((size_t)count < room ? (size_t)count : room));
    free(copy);
    free(scratch);
    free(ids);
    return count;
}

/* Decodes ids into out, zero-terminated, each through a block of just based_decode_bound bytes. */
static size_t decode(const based_tokenizer *t, const int32_t *ids, int64_t count, char *out) {
    based_decoder d;
    size_t n = 0, bound = based_decode_bound(t);
    char *block = malloc(bound);
    memset(&d, 0, sizeof d);
    for (int64_t i = 0; i < count; i++) {
        size_t k = based_decode(t, &d, ids[i], block);
        CHECK_EACH(k <= bound && d.n <= 3);
        memcpy(out + n, block, k);
        n += k;
    }
    n += based_decode_flush(&d, out + n);
    CHECK_EACH(based_decode_flush(&d, out + n) == 0);
    out[n] = '\0';
    free(block);
    return n;
}

static int init(based_tokenizer *t, const unsigned char *section, size_t size, uint32_t vocab) {
    based_error e;
    memset(&e, 'x', sizeof e);
    int status = based_tokenizer_init(t, section, size, vocab, &e);
    CHECK_EACH(based_tokenizer_init(t, section, size, vocab, NULL) == status);
    if (status != BASED_OK) {
        CHECK_EACH(e.status == status && memchr(e.text, 0, sizeof e.text) != NULL
                   && strlen(e.text) > 20);
        CHECK_EACH(strchr(e.text, '\n') == NULL && strchr(e.text, '#') == NULL);
    }
    return status;
}

/* Encodes and checks the ids, given as a list that ends with -1. */
static void expect(const based_tokenizer *t, const char *text, int flags, const int32_t *ids,
                   int line) {
    int32_t got[64];
    int64_t n = encode(t, text, strlen(text), flags, got, 64), i = 0;
    while (i < n && ids[i] == got[i]) i++;
    test_count(i == n && ids[i] == -1, __FILE__, line, text);
}
#define EXPECT(t, text, flags, ...) \
    expect(t, text, flags, (const int32_t[]){__VA_ARGS__, -1}, __LINE__)

/* ==== The tests ============================================================================== */

static void test_bpe(void) {
    static maker m;
    size_t size;
    based_tokenizer t;
    make_bpe(&m);
    unsigned char *s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, BPE_SIZE), BASED_OK);
    CHECK_EQUAL(t.size, BPE_SIZE);
    EXPECT(&t, "", 0, -1);
    EXPECT(&t, "", BASED_ADD_BOS, END);
    EXPECT(&t, "a", 0, 'a');
    EXPECT(&t, "ab", 0, AB);
    EXPECT(&t, "abc", 0, ABC);                      /* bc first, although ab is further left */
    EXPECT(&t, "ccc", 0, CC, 'c');                  /* the leftmost of equals */
    EXPECT(&t, "cccc", 0, CC, CC);
    EXPECT(&t, "aaaaa", 0, AAAA, 'a');
    EXPECT(&t, "aaaaaaaa", 0, AAAA, AAAA);
    EXPECT(&t, "abcabcab", 0, ABC, ABC, AB);
    EXPECT(&t, "a b", 0, 'a', ' ', 'b');            /* no merge over the border of a piece */
    EXPECT(&t, "h  hh", 0, 'h', ' ', HE, 'h');      /* the last of the spaces belongs to the word */
    EXPECT(&t, "\xFF\x80", 0, 0xFF, 0x80);
    EXPECT(&t, "a<end>b", 0, 'a', '<', 'e', 'n', 'd', '>', 'b');
    EXPECT(&t, "a<end>b", BASED_PARSE_SPECIALS, 'a', END, 'b');
    EXPECT(&t, "a<end>", BASED_PARSE_SPECIALS, 'a', END);
    EXPECT(&t, "<end>x<end><end", BASED_PARSE_SPECIALS | BASED_ADD_BOS, END, ENDX, END, '<', 'e',
           'n', 'd');
    CHECK_EQUAL(based_special(&t, "<end>"), END);
    CHECK_EQUAL(based_special(&t, "<end>x"), ENDX);
    CHECK_EQUAL(based_special(&t, "<end>xy"), -1);
    CHECK_EQUAL(based_special(&t, ""), -1);
    CHECK_EQUAL(based_special(&t, "ab"), -1);
    free(s);
}

/* What newer models add: pieces that are tokens, stop tokens, special tokens that are shown, a chat
 * template. */
static void test_whole(void) {
    static maker m;
    size_t size;
    char out[64];
    based_tokenizer t;
    make_whole(&m);
    unsigned char *s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, WHOLE_SIZE), BASED_OK);
    EXPECT(&t, "abcc", 0, ABCC);
    EXPECT(&t, "abcca", 0, ABC, 'c', 'a');
    EXPECT(&t, "a hello", 0, 'a', HELLO);
    EXPECT(&t, " hello abc", 0, HELLO, ' ', ABC);
    EXPECT(&t, "x<end>x", BASED_PARSE_SPECIALS, 'x', ENDX);
    CHECK(based_is_stop(&t, 'z') && based_is_stop(&t, AB) && based_is_stop(&t, END));
    CHECK(!based_is_stop(&t, ENDX) && !based_is_stop(&t, -1) && !based_is_stop(&t, 'a'));
    decode(&t, (const int32_t[]){ 'a', ENDX, END, HELLO }, 4, out);
    CHECK_TEXT(out, "a<end>x hello");
    CHECK_TEXT(t.chat[BASED_CHAT_SYSTEM], "[{}]");
    CHECK_TEXT(t.chat[BASED_CHAT_USER], "<end>u{}");
    CHECK_TEXT(t.chat[BASED_CHAT_REPLY], "a{}<end>x");
    CHECK_TEXT(t.chat[BASED_CHAT_BEGIN], "b");
    free(s);
    m.chat[0] = 0;                      /* no system message */
    memmove(m.chat + 1, m.chat + 5, m.chat_bytes -= 4);
    m.flags = 0;                        /* no whole pieces */
    m.sorted_size = 0;
    s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, WHOLE_SIZE), BASED_OK);
    EXPECT(&t, "abcc", 0, ABC, 'c');
    CHECK_TEXT(t.chat[BASED_CHAT_SYSTEM], "");
    CHECK_TEXT(t.chat[BASED_CHAT_BEGIN], "b");
    free(s);
}

/* Cuts each text and compares. A bar marks where a piece must end. */
static void check_pieces(uint32_t cut_by, const char *const *cases, size_t n_cases) {
    const based_tokenizer t = {.cut = cut_by};
    for (size_t i = 0; i < n_cases; i++) {
        unsigned char text[200];
        char cut[400];
        size_t n = 0, out = 0;
        for (const char *p = cases[i]; *p; p++)
            if (*p != '|') text[n++] = (unsigned char)*p;
        for (span s = {text, n}; s.n > 0;) {
            size_t k = first_piece(&t, s);
            if (out > 0) cut[out++] = '|';
            memcpy(cut + out, s.p, k);
            out += k;
            s = rest_of(s, k);
        }
        cut[out] = '\0';
        CHECK_TEXT(cut, cases[i]);
    }
}

/* The alternatives of the patterns one by one. */
static void test_pieces(void) {
    static const char *const cases[] = {
        "we|'re| I|'m| you|'ve| he|'ll| it|'s| don|'t| she|'d", "'|S|'s|s|'|R", "'|l|'|ra|'",
        " '|s", "!'|s",
        "Hello| world|!!| 123|abc|456", "a|  | b", "a| ", "a|   ", "  |\t|x", "\t|x", "a|\n| b",
        "a|\n|\n|b",
        "a|\r\n", "a|\r|\n|b",
        "\xC3\xA9t\xC3\xA9| \xC3\xBC", "\xE6\x97\xA5\xE6\x9C\xAC|\xE3\x80\x82",
        "x|\xC2\xB2\xE2\x85\xA8|x",                     /* superscript two, Roman numeral nine */
        "a|\xC2\xA0|b", "a|\xE3\x80\x80|\xE3\x80\x80|b", "a|\xE2\x80\x8B|b", "a|\xC2\x85",
        "a| \xF0\x9F\xA6\x99|b",
        "a|\xFF\xC3|b", " \xFF\x80!|b", "a|\xED\xA0\x80|b", "a|\xC0\xA0|b",
        "a|\xF4\x90\x80\x80| \xE2\x82",
        "e|\xCC\x81|f",
    };
    static const char *const llama3[] = {
        "it|'S| it|'ll|'RE|'Ve|'d|'M", "it|'\xC5\xBF|ab", "'\xC5", "'x|'r|'|1",
        "(word|\tword|\xC2\xA0word|'word| word|  | word", "('|ll", "123|456|7|x", "a| |123|4",
        "\xC2\xB2\xE2\x85\xA8|x", ";\n\n\n| | y", "  \n  \n|  ", "  \n", " !!\r\n\r| a",
        "a|\n|b", "a|\r\n\n| b", "a|   ", "a|  | b", "a|\t|\tb",
        "a|\xE3\x80\x80|\xE3\x80\x80z", "\xFF\x80!|1|\xFFz",
    };
    static const char *const qwen2[] = { "1|2|3| |4|x|'S| |\xC2\xB2" };
    static const char *const digits[] = {
        "a| |1|2", "x|  |7", " |1| a", "a|  | b", "we|'re|'|1|!|\xC2\xB2| ", "a|'|S",
    };
    check_pieces(BASED_CUT_GPT2, cases, sizeof cases / sizeof *cases);
    check_pieces(BASED_CUT_LLAMA3, llama3, sizeof llama3 / sizeof *llama3);
    check_pieces(BASED_CUT_QWEN2, qwen2, sizeof qwen2 / sizeof *qwen2);
    check_pieces(BASED_CUT_DIGITS, digits, sizeof digits / sizeof *digits);
}

static void test_scores(void) {
    static maker m;
    size_t size;
    char out[200];
    int32_t ids[64];
    based_tokenizer t;
    make_scores(&m);
    unsigned char *s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, SCORES_SIZE), BASED_OK);
    EXPECT(&t, "", BASED_ADD_BOS, 1);
    EXPECT(&t, "b", BASED_ADD_BOS, 1, SPACE_TOKEN, B);
    EXPECT(&t, "a", 0, SPACE_A);
    EXPECT(&t, "abc", 0, SPACE_A, X_BC);        /* the higher score first, although further right */
    EXPECT(&t, "cac", 0, SPACE_TOKEN, X_ZERO, C);   /* 0 and -0 are equal: the leftmost first */
    EXPECT(&t, "aca", 0, SPACE_TOKEN, X_MINUS, A);
    EXPECT(&t, "bac", 0, SPACE_TOKEN, B, X_MINUS);
    EXPECT(&t, "babcc", 0, SPACE_TOKEN, B, A, X_BC, C);
    EXPECT(&t, "\xE6\x97\xA5", 0, SPACE_TOKEN, JA);
    EXPECT(&t, "\xE6\x97", 0, SPACE_TOKEN, 3 + 0xE6, 3 + 0x97);
    EXPECT(&t, "a\x80", 0, SPACE_TOKEN, 3 + 'a', 3 + 0x80);   /* llama2.c: one character, unknown */
    EXPECT(&t, "\x80\x80\x80\x80\x80", 0, SPACE_TOKEN, 131, 131, 131, 131, 131);
    EXPECT(&t, "\xF0\x9F\xA6\x99\x80", 0, SPACE_TOKEN, LLAMA, 3 + 0x80);    /* four bytes at most */
    EXPECT(&t, "<s>", 0, SPACE_TOKEN, 3 + '<', 3 + 's', 3 + '>');
    EXPECT(&t, "<s>b</s>b", BASED_PARSE_SPECIALS, 1, SPACE_TOKEN, B, 2, B);

    /* Decoding drops the one space that encoding put in front, and only that one. */
    static const char *const texts[] =
        {"b", " b", "  b", "", " ", "a", "\xE6\x97\xA5 z\x01", "<s>"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        decode(&t, ids, encode(&t, texts[i], strlen(texts[i]), BASED_ADD_BOS, ids, 64), out);
        CHECK_TEXT(out, texts[i]);
    }
    size_t n;
    CHECK(based_token_bytes(&t, A, &n) != NULL && n == 1);
    CHECK(based_token_bytes(&t, 1, &n) != NULL && n == 0);  /* a special token stands for no text */
    CHECK(based_token_bytes(&t, -1, &n) == NULL && n == 0);
    CHECK(based_token_bytes(&t, SCORES_SIZE, &n) == NULL && n == 0);
    free(s);
}

/* A byte without a token becomes the unknown token, or nothing if there is none: then its
 * neighbors may merge. */
static void test_missing_bytes(void) {
    static maker m;
    size_t size;
    based_tokenizer t;
    make_bpe(&m);
    m.byte_id['!'] = m.byte_id['?'] = BASED_NONE;
    unsigned char *s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, BPE_SIZE), BASED_OK);
    EXPECT(&t, "a!?b", 0, 'a', 'b');
    EXPECT(&t, "!", 0, -1);
    free(s);
    m.unknown = 'u';
    s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, BPE_SIZE), BASED_OK);
    EXPECT(&t, "a!?b", 0, 'a', 'u', 'u', 'b');
    free(s);
}

/* The same from a model: its section, the number of ids that it knows. */
static void test_open(const unsigned char *section, uint32_t size,
                      const based_tokenizer *expected) {
    static based_model m;
    based_tokenizer t = *expected;
    based_error e;
    CHECK_EQUAL(based_tokenizer_open(&t, &m, &e), BASED_EINVAL);
    CHECK_TEXT(e.text, "the checkpoint carries no tokenizer");
    m.tokenizer = section;
    m.config.tokenizer_bytes = size;
    m.config.vocab = BPE_SIZE - 1;
    CHECK_EQUAL(based_tokenizer_open(&t, &m, NULL), BASED_EFORMAT);
    CHECK(memcmp(&t, expected, sizeof t) == 0);
    memset(&t, 0, sizeof t);
    m.config.vocab = BPE_SIZE;
    CHECK_EQUAL(based_tokenizer_open(&t, &m, &e), BASED_OK);
    CHECK(memcmp(&t, expected, sizeof t) == 0);
}

static void test_arguments(void) {
    static maker m;
    size_t size;
    based_tokenizer t, before;
    based_error e;
    uint64_t scratch[64];
    int32_t ids[8];
    make_bpe(&m);
    unsigned char *s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, BPE_SIZE + 5), BASED_OK);  /* a padded vocabulary may be larger */
    before = t;
    CHECK_EQUAL(init(&t, s, size, BPE_SIZE - 1), BASED_EFORMAT);
    CHECK_EQUAL(init(&t, s, size, 0), BASED_EFORMAT);
    CHECK_EQUAL(init(&t, s + 1, size - 1, BPE_SIZE), BASED_EINVAL);
    CHECK_EQUAL(init(&t, NULL, size, BPE_SIZE), BASED_EINVAL);
    test_open(s, (uint32_t)size, &t);
    s[0]++;
    CHECK_EQUAL(based_tokenizer_init(&t, s, size, BPE_SIZE, &e), BASED_EFORMAT);
    CHECK(strstr(e.text, "their counts add up to") != NULL);
    s[0]--;
    CHECK(memcmp(&t, &before, sizeof t) == 0);                   /* a failed call changes nothing */
    CHECK_EQUAL(based_encode(&t, "a", 1, 4, ids, scratch, &e), BASED_EINVAL);
    CHECK_EQUAL(based_encode(&t, "a", 1, -1, ids, scratch, &e), BASED_EINVAL);
    CHECK_EQUAL(based_encode(&t, "a", (size_t)-1, 0, ids, scratch, &e), BASED_EINVAL);
    CHECK_EQUAL(based_encode(&t, "a", 0x7FFFFFF1, 0, ids, scratch, &e), BASED_EINVAL);
    CHECK_TEXT(e.text,
               "encode: 2147483633 bytes of text are too many at once, 2147483632 at most: cut the "
               "text");
    CHECK_EQUAL(based_encode(&t, NULL, 1, 0, ids, scratch, &e), BASED_EINVAL);
    CHECK_EQUAL(based_encode(&t, "a", 1, 0, ids, (char *)scratch + 4, &e), BASED_EINVAL);
    CHECK_EQUAL(based_encode(&t, "a", 1, 0, ids, (char *)scratch + 4, NULL), BASED_EINVAL);
    CHECK_EQUAL(based_encode(&t, NULL, 0, 0, ids, scratch, &e), 0);
    CHECK(based_encode_scratch(&t, (size_t)-1) == (size_t)-1);
    CHECK(based_encode_bound(&t, (size_t)-1) == (size_t)-1);
    CHECK(based_encode_bound(&t, (size_t)-2) == (size_t)-1);
    free(s);
}

/* The decoder fed byte by byte. R is U+FFFD. The first cases are those of the Unicode standard,
 * tables 3-8 to 3-11. */
#define R "\xEF\xBF\xBD"
static void test_decoder(void) {
    static const char *const cases[][2] = {
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82" "A", R R R R R R R R "A"},
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF" "A", R R R R R R R R "A"},
        {"\xF4\x91\x92\x93\xFF" "A\x80\xBF" "B", R R R R R "A" R R "B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF" "A", R R R R "A"},
        {"", ""}, {"abc", "abc"}, {"\x7F", "\x7F"}, {"\x80", R}, {"\xBF", R}, {"\xC1\x80", R R},
        {"\xC2", R},
        {"\xC2\x80", "\xC2\x80"},
        {"\xDF\xBF", "\xDF\xBF"}, {"\xE0\x9F\xBF", R R R}, {"\xE0\xA0\x80", "\xE0\xA0\x80"},
        {"\xE0\xA0", R},
        {"\xED\x9F\xBF", "\xED\x9F\xBF"}, {"\xEE\x80\x80", "\xEE\x80\x80"},
        {"\xF0\x8F\xBF\xBF", R R R R},
        {"\xF0\x90\x80\x80", "\xF0\x90\x80\x80"}, {"\xF4\x8F\xBF\xBF", "\xF4\x8F\xBF\xBF"},
        {"\xF4\x8F\xBF", R},
        {"\xF4\x90\x80\x80", R R R R}, {"\xF5\x80", R R}, {"\xFF", R},
        {"\xE6\xE6\x97\xA5", R "\xE6\x97\xA5"},
        {"\xF0\x9F\xA6\xF0\x9F\xA6\x99", R "\xF0\x9F\xA6\x99"}, {"\xE6\x97" "a", R "a"},
        {"\xEF\xBB\xBF" "a", "\xEF\xBB\xBF" "a"},
    };
    static maker m;
    size_t size;
    based_tokenizer t;
    make_bpe(&m);
    unsigned char *s = make_section(&m, &size);
    CHECK_EQUAL(init(&t, s, size, BPE_SIZE), BASED_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t ids[16];
        char out[64];
        int64_t n = (int64_t)strlen(cases[i][0]);
        for (int64_t k = 0; k < n; k++) ids[k] = (unsigned char)cases[i][0][k];
        decode(&t, ids, n, out);
        CHECK_TEXT(out, cases[i][1]);
    }
    /* What a special token or a wrong id decodes to is nothing; a character may go on behind it. */
    int32_t odd[] = {0xE6, END, -1, BPE_SIZE, 0x7FFFFFFF, 0x97, 0xA5};
    char out[16];
    decode(&t, odd, 7, out);
    CHECK_TEXT(out, "\xE6\x97\xA5");
    free(s);

    /* The most that one token can give out: what was held, and each of its own bytes, turn into
     * U+FFFD. */
    static maker bad;
    bad.kind = BASED_BPE;
    bad.bos = bad.eos = bad.unknown = BASED_NONE;
    add_bytes(&bad);
    int32_t worst[] = {0xE6, 0x97, (int32_t)add_token(&bad, "\xFF\xFF\xFF", 3)};
    s = make_section(&bad, &size);
    CHECK_EQUAL(init(&t, s, size, 257), BASED_OK);
    CHECK_EQUAL(based_decode_bound(&t), 12);
    CHECK_EQUAL(decode(&t, worst, 3, out), 12);
    free(s);
}

/* A million bytes of one thing: each shape stresses another part. They come back as they were. */
static void test_long(const based_tokenizer *t) {
    enum { N = 1000000 };
    static char text[N], back[N + 4];
    static int32_t ids[N + 2];
    static const char *const parts[] = {"a", " ", "ab", "abc", "c", "\xE6\x97\xA5", "\xF0", "'s",
                                        "\n", "<end>",
                                        "a\x80", " h"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        size_t k = strlen(parts[i]);
        for (size_t j = 0; j < N; j++) text[j] = parts[i][j % k];
        int32_t *room = malloc(4 * based_encode_bound(t, N));
        void *scratch = malloc(based_encode_scratch(t, N));
        int64_t n = based_encode(t, text, N, 0, room, scratch, NULL);
        CHECK(n > 0 && n <= N + 1);
        if (n < 0 || n > N + 1) n = 0;
        memcpy(ids, room, 4 * (size_t)n);
        size_t bytes, at = 0;
        for (int64_t j = 0; j < n; j++) {
            const char *p = based_token_bytes(t, ids[j], &bytes);
            if (at + bytes <= sizeof back) memcpy(back + at, p, bytes);
            at += bytes;
        }
        size_t prefix = (t->flags & BASED_TOK_PREFIX_SPACE) != 0;
        CHECK(at == N + prefix && memcmp(back + prefix, text, N) == 0);
        free(room);
        free(scratch);
    }
}

/* ==== Hostile sections ======================================================================= */

/* A section must be refused with a reason, or be usable whatever it says. Returns its status. */
static int survive(const unsigned char *section, size_t size, uint32_t vocab) {
    static const char text[] =
        "abcabc  aaaa hh'll <end>x<s>\xE6\x97\xA5\xF0\x9F\xA6\x99\xFF ca ac 12\n";
    based_tokenizer t;
    unsigned char *copy = malloc(size + (size == 0));
    memcpy(copy, section, size);
    int status = init(&t, copy, size, vocab);
    if (status == BASED_OK) {
        int32_t ids[128];
        char out[4096 * 3 * 4];
        int64_t n = encode(&t, text, sizeof text, BASED_ADD_BOS | BASED_PARSE_SPECIALS, ids, 128);
        decode(&t, ids, n < 100 ? n : 100, out);
        encode(&t, text, sizeof text, 0, ids, 128);
        CHECK_EACH(based_special(&t, "<end>") < (int32_t)t.size);
    }
    free(copy);
    return status;
}

static void test_hostile(const maker *m) {
    size_t size;
    unsigned char *s = make_section(m, &size);
    uint32_t words, vocab = m->size, accepted = 0;
    memcpy(&words, s, 4);
    CHECK_EQUAL(survive(s, size, vocab), BASED_OK);

    /* Cut at every byte, or with bytes left over: the sizes no longer add up. */
    for (size_t n = 0; n < size; n++) accepted += survive(s, n, vocab) == BASED_OK;
    unsigned char *longer = calloc(1, size + 8);
    memcpy(longer, s, size);
    for (size_t n = size + 1; n <= size + 8; n++) accepted += survive(longer, n, vocab) == BASED_OK;
    free(longer);
    CHECK_EQUAL(accepted, 0);

    /* Every word with every value that is likely to be at the edge of something. */
    for (uint32_t w = 0; w < words; w++) {
        uint32_t old;
        memcpy(&old, s + 4 * w, 4);
        const uint32_t values[] = {0, 1, 2, 3, old - 1, old + 1, m->size - 1, m->size, m->size + 1,
                                   words, 4 * words,
                                   (uint32_t)size, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000,
                                       0xFFFFFFFE,
                                   0xFFFFFFFF, 0x7FC00000, 0x7F800000, old ^ 0x80000000};
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            memcpy(s + 4 * w, &values[i], 4);
            accepted += survive(s, size, vocab) == BASED_OK;
        }
        memcpy(s + 4 * w, &old, 4);
    }
    CHECK(accepted > 0);

    /* Every bit. */
    for (size_t i = 0; i < size; i++)
        for (int bit = 0; bit < 8; bit++) {
            s[i] ^= (unsigned char)(1 << bit);
            survive(s, size, vocab);
            s[i] ^= (unsigned char)(1 << bit);
        }
    free(s);
}

/* One change each, and what the message must say: the checks are there, each for its own reason. */
static void refuse(const maker *m, uint32_t vocab, const char *expected, int line) {
    size_t size;
    based_error e;
    based_tokenizer t;
    unsigned char *s = make_section(m, &size);
    e.text[0] = '\0';
    int status = based_tokenizer_init(&t, s, size, vocab, &e);
    int ok = status == BASED_EFORMAT && strstr(e.text, expected) != NULL;
    if (!ok) printf("got %d: %s\n", status, e.text);
    test_count(ok, __FILE__, line, expected);
    free(s);
}
#define REFUSE(make, change, expected) \
    do { \
        make(&m); \
        change; \
        refuse(&m, m.size, expected, __LINE__); \
    } while (0)

static void test_refusals(void) {
    static maker m;
    REFUSE(make_bpe, m.kind = 3, "kind 3 is unknown");
    REFUSE(make_bpe, m.flags = 16, "flags 16 are unknown");
    REFUSE(make_scores, m.flags = BASED_TOK_WHOLE_PIECES, "whole pieces");
    REFUSE(make_bpe, m.cut = 4, "kind 1 with cut 4 is unknown");
    REFUSE(make_scores, m.cut = 1, "kind 2 with cut 1 is unknown");
    REFUSE(make_bpe, m.sorted_size = 1, "tables have 565 words, their counts add up to 564");
    REFUSE(make_whole, m.stop[1] = WHOLE_SIZE, "shown token 1 is 267, which does not exist");
    REFUSE(make_whole, m.stop[2] = WHOLE_SIZE, "shown token 2 is 267, which does not exist");
    REFUSE(make_whole, m.sorted[1] = m.sorted[0], "sorted entry 1, token");
    REFUSE(make_whole, m.chat_bytes--, "text 3 of the chat template has no end");
    REFUSE(make_whole, m.chat_bytes++, "the chat template has not four texts");
    REFUSE(make_whole, m.chat_bytes = 7, "text 1 of the chat template has no end");
    REFUSE(make_whole, m.chat_bytes = 5, "the chat template has not four texts");
    REFUSE(make_whole, m.chat[1] = 'x', "text 0 of the chat template has not one {}");
    REFUSE(make_whole, memcpy(m.chat, "{}{}", 4), "text 0 of the chat template has not one {}");
    REFUSE(make_whole, m.chat[11] = 'x', "text 1 of the chat template has not one {}");
    REFUSE(make_whole, m.chat[15] = 'x', "text 2 of the chat template has not one {}");
    REFUSE(make_bpe, m.flags = BASED_TOK_PREFIX_SPACE, "prefix space");
    REFUSE(make_bpe, m.bos = BPE_SIZE, "bos, eos or unknown");
    REFUSE(make_bpe, m.eos = BPE_SIZE, "bos, eos or unknown");
    REFUSE(make_bpe, m.unknown = BPE_SIZE, "bos, eos or unknown");
    REFUSE(make_bpe, m.start[0] = 1, "token 0 starts at byte 1");
    REFUSE(make_bpe, m.start[7] = 9, "token 7 ends before it starts");
    REFUSE(make_bpe, m.byte_id[65] = BPE_SIZE, "byte 65 has token 265, which does not exist");
    REFUSE(make_bpe, m.byte_id[65] = 66, "byte 65 has token 66, which has other bytes");
    REFUSE(make_bpe, m.byte_id[65] = AB, "byte 65 has token 256, which has other bytes");
    REFUSE(make_bpe, m.special[0] = BPE_SIZE, "special 0 is token 265");
    REFUSE(make_bpe, (m.special[0] = END, m.special[1] = ENDX),
           "special 1, token 264, is empty or out of order");
    REFUSE(make_bpe, m.special[1] = add_token(&m, "", 0), "special 1, token 265, is empty");
    REFUSE(make_bpe, m.merge[3][0] = BPE_SIZE, "merge 3 names a token beyond the last, 264");
    REFUSE(make_bpe, m.merge[3][1] = BPE_SIZE, "merge 3 names");
    REFUSE(make_bpe, m.merge[3][3] = BPE_SIZE, "merge 3 names");
    REFUSE(make_bpe, memcpy(m.merge[3], m.merge[2], sizeof m.merge[2]), "merge 3 is out of order");
    REFUSE(make_bpe, memcpy(m.merge[3], m.merge[1], sizeof m.merge[1]), "merge 3 is out of order");
    REFUSE(make_bpe, m.merge[3][3] = 'a', "which has other bytes");
    REFUSE(make_scores, m.sorted[1] = SCORES_SIZE, "sorted entry 1 is token 271");
    REFUSE(make_scores, m.sorted[1] = m.sorted[0], "sorted entry 1, token");
    REFUSE(make_scores, m.score[5] = (float)strtod("nan", NULL),
           "score of token 5 is not a number");

    REFUSE(make_bpe, (m.start[BPE_SIZE] = m.start[BPE_SIZE - 1] + 4097),
           "token 264 is longer than 4096 bytes");

    /* The whole line, once: what was found and what was expected. */
    make_bpe(&m);
    refuse(&m, 100,
           "tokenizer: it has 265 tokens, the model knows 100: it belongs to another model",
           __LINE__);
}

int main(void) {
    static maker m;
    static void (*const makers[])(maker *) = { make_bpe, make_scores, make_whole };
    size_t size;
    based_tokenizer t;
    test_bpe();
    test_pieces();
    test_whole();
    test_scores();
    test_missing_bytes();
    test_arguments();
    test_decoder();
    test_refusals();
    for (size_t i = 0; i < sizeof makers / sizeof *makers; i++) {
        makers[i](&m);
        unsigned char *s = make_section(&m, &size);
        CHECK_EQUAL(init(&t, s, size, m.size), BASED_OK);
        test_long(&t);
        free(s);
        test_hostile(&m);
    }
    return test_end();
}
