/* test_refusals.c - what cannot be is refused with a line that says what was found and what was expected: headers, sampler
 * values, kinds of attention, files. And what only a machine of the other byte order does, done here to see it undone.
 */
#define _POSIX_C_SOURCE 200809L         /* as based.c, which is not the first to include something here */
#define _DEFAULT_SOURCE 1
#include <stdlib.h>

#include "based.c"

#include "tests/model.h"

static based_error e;

#define REFUSED(call, expected, words)                                                                                   \
    do {                                                                                                                 \
        e.status = 0, e.text[0] = 0;                                                                                     \
        CHECK((call) == (expected) && e.status == (expected));                                                           \
        if (!strstr(e.text, words)) printf("\"%s\" does not say \"%s\"\n", e.text, words);                               \
        CHECK(strstr(e.text, words) != NULL && !strchr(e.text, '\n'));                                                   \
    } while (0)

/* ---- headers ---- */

static int opens(const void *bytes, size_t n) {
    static based_model *m;
    static void *memory;
    if (!memory) memory = block_of(MODEL_ROOM);
    return based_model_init(&m, memory, MODEL_ROOM, bytes, n, BASED_NO_CHECKSUM, &e);
}

/* A field of the header or of a layer (counted from 1) gets a value; the rest stays right. */
static void test_headers(void) {
    const based_model *tokens = make_model((struct wish){ .seed = 1, .constant = 1 });
    const based_model *vectors = make_model((struct wish){ .seed = 2, .constant = 1, .input = 6 });
    const struct { const based_model *m; uint32_t layer; size_t at; uint32_t value; const char *says; } table[] = {
        { tokens, 0, offsetof(based_config, flags), 16, "flags is 16, expected 0 to 15" },
        { tokens, 0, offsetof(based_config, flags), BASED_TIED | BASED_INPUT_PROJECTION, "projection without input vectors" },
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
        { tokens, 1, offsetof(based_layer, taps), 0, "taps is 0, expected 1 to 64" },
        { tokens, 1, offsetof(based_layer, value_width), BASED_MAX_HIDDEN, "more than" },
        { tokens, 2, offsetof(based_layer, flags), BASED_NO_OUT, "no out projection, but its width is 20 and dim is 12" },
        { tokens, 2, offsetof(based_layer, kv_heads), 3, "4 heads cannot share 3" },
        { tokens, 2, offsetof(based_layer, key_width), 6000, "more than 16777216 features" },
        { tokens, 2, offsetof(based_layer, degree), BASED_MAX_DEGREE + 1, "degree is 13, expected 1 to 12" },
        { tokens, 3, offsetof(based_layer, window), BASED_MAX_WINDOW + 1, "window is 1048577" },
        { tokens, 4, offsetof(based_layer, hidden), 0, "hidden is 0" }
    };
    unsigned char *bytes = block_of(MODEL_ROOM);
    for (size_t i = 0; i < COUNT(table); i++) {
        size_t n = table[i].m->c->file_size[0];
        size_t at = table[i].at + (table[i].layer ? sizeof(based_config) + (table[i].layer - 1) * sizeof(based_layer) : 0);
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
    bad[0].temperature = -1, bad[1].temperature = INFINITY, bad[2].top_p = 1.5f, bad[3].top_p = -1, bad[4].min_p = NAN;
    bad[5].min_p = 2, bad[6].repeat_penalty = 0, bad[7].repeat_penalty = INFINITY;
    bad[8].vocab = 0, bad[9].vocab = BASED_MAX_VOCAB + 1, bad[10].repeat_last_n = BASED_MAX_VOCAB + 1;
    for (size_t i = 0; i < COUNT(bad); i++) {
        const char *says = i < 2 ? "temperature" : i < 6 ? "top_p and min_p" : i < 8 ? "repeat_penalty" : "needs 1 to";
        REFUSED(based_sampler_init(&bad[i], memory, sizeof memory, &e), BASED_EINVAL, says);
    }
    based_sampler s = good;
    REFUSED(based_sampler_init(&s, NULL, sizeof memory, &e), BASED_ENOMEM, "aligned to 8");
    REFUSED(based_sampler_init(&s, (char *)memory + 4, 700, &e), BASED_ENOMEM, "aligned to 8");
    REFUSED(based_sampler_init(&s, memory, based_sampler_bytes(&s) - 1, &e), BASED_ENOMEM, "needs 160 bytes");
    CHECK(based_sampler_init(&s, memory, sizeof memory, NULL) == 0);
    based_sampler_accept(&s, 3);                        /* a sampler that remembers nothing */
    CHECK(based_sampler_recent(&s, NULL) == 0 && s.seen == 1);
}

/* Tokens that are none, numbers that are none: nothing is read outside, and NaN is never chosen. */
static void test_odd_logits(void) {
    static uint64_t memory[100];
    based_sampler s = { .temperature = 1, .top_p = 1, .repeat_penalty = 2, .repeat_last_n = 3, .vocab = 4 };
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
    const based_taylor_kind good = { .key_width = 4, .value_width = 4, .group = 1, .degree = 2, .chunk = 4, .scale = 0.5f };
    based_taylor_kind k = good;
    based_taylor_sizes sizes;
    based_taylor *t = NULL;
    k.key_width = 0;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "key_width is 0, expected 1 to");
    k.key_width = BASED_MAX_HIDDEN + 1;
    REFUSED(based_taylor_init(&t, &k, NULL, 0, &e), BASED_EINVAL, "key_width is 1048577");
    k = good, k.scale = NAN;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "not a number");
    k = good, k.normaliser_eps = INFINITY;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_EINVAL, "not a number");
    k = good, k.key_width = 10000;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_ENOMEM, "a state needs");
    k.key_width = BASED_MAX_HIDDEN, k.degree = 12;
    REFUSED(based_taylor_measure(&sizes, &k, &e), BASED_ENOMEM, "more than");
    CHECK(based_taylor_measure(&sizes, &k, NULL) == BASED_ENOMEM);
    CHECK(based_taylor_measure(&sizes, &good, &e) == 0);
    void *memory = block_of(sizes.attention + 64);
    REFUSED(based_taylor_init(&t, &good, memory, sizes.attention - 1, &e), BASED_ENOMEM, "are needed");
    REFUSED(based_taylor_init(&t, &good, (char *)memory + 8, sizes.attention, &e), BASED_EINVAL, "aligned to 64");
    REFUSED(based_taylor_init(&t, &good, NULL, sizes.attention, &e), BASED_EINVAL, "aligned to 64");
}

/* ---- files ---- */

static void test_files(void) {
    char path[] = "/tmp/based-XXXXXX", deep[600];
    FILE *out = fdopen(mkstemp(path), "wb");
    CHECK(out && fclose(out) == 0);
    CHECK(based_open(path, 0, &e) == NULL && e.status == BASED_EFORMAT && strstr(e.text, "the file is empty"));
    remove(path);
    CHECK(based_open(path, 0, &e) == NULL && e.status == BASED_EIO && based_open(path, 0, NULL) == NULL);
    CHECK(based_open("/tmp", 0, &e) == NULL && e.status == BASED_EIO && strstr(e.text, "is a directory"));
    CHECK(based_open("tests/test.h", 0, &e) == NULL && e.status == BASED_EFORMAT && strncmp(e.text, "tests/test.h: ", 14) == 0);
    CHECK(based_open("tests/test.h", 0, NULL) == NULL);
    memset(deep, 'a', sizeof deep);
    deep[sizeof deep - 1] = 0;                          /* a name longer than an error line */
    CHECK(based_open(deep, 0, &e) == NULL && e.status == BASED_EIO && strlen(e.text) == sizeof e.text - 1);
    based_close(NULL);
    based_session_free(NULL);
}

/* ---- what does nothing, and says so ---- */

static void test_nothing_to_do(void) {
    const based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    based_session *s = based_session_new(m, 4, &e), *small_block = based_session_new(m, 1, &e), *two[2] = { s, small_block };
    based_tokenizer t;
    int32_t ids[2] = { 1, 2 };
    CHECK(based_feed(s, NULL, 0, NULL, &e) == 0 && based_count(s) == 0 && based_logits(s) == NULL);
    CHECK(based_step_many(NULL, NULL, 0, &e) == 0 && based_copy(s, s, &e) == 0);
    REFUSED(based_step_many(two, ids, 2, &e), BASED_EINVAL, "session 1 was made for blocks of 1");
    REFUSED(based_tokenizer_open(&t, m, &e), BASED_EINVAL, "no tokenizer");
    CHECK(based_step(s, 99, NULL) == BASED_EINVAL);
    CHECK(based_model_config(m) == m->c && based_model_layer(m, 3)->degree == 3 && based_model_layer(m, 4) == NULL);
    CHECK(based_model_weight_bytes(m) > 1000 && based_model_parameters(m) > 300 && based_model_kernels(m)[0]);
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

/* Turning twice is the identity; the text of a tokenizer is not turned. */
static void test_swapping(void) {
    enum { N = 64 + 64 + 32 };
    unsigned char bytes[N], copy[N];
    uint32_t words = machine_is_big_endian() ? 0x03000000u : 3;
    for (size_t i = 0; i < N; i++) bytes[i] = (unsigned char)(i * 7);
    memcpy(copy, bytes, N);
    swap_words(copy, 7);
    CHECK(copy[0] == bytes[3] && copy[1] == bytes[2] && copy[3] == bytes[0] && copy[4] == bytes[4]);
    swap_words(copy, 7);
    CHECK(memcmp(copy, bytes, N) == 0);
    words = words << 24;                                /* 3, as the other byte order has it */
    memcpy(bytes + 64, &words, 4);
    memcpy(copy, bytes, N);
    CHECK(swap_sections(copy, N, 64, 20, &e) == 0);
    CHECK(copy[64] == 3 && copy[68] == bytes[71] && memcmp(copy + 76, bytes + 76, 52) == 0 && copy[128] == bytes[131]);
    memcpy(copy, bytes, N);
    CHECK(swap_sections(copy, N, 64, 0, &e) == 0 && copy[68] == bytes[71] && copy[80] == bytes[83]);
    REFUSED(swap_sections(copy, N, 64, 3, &e), BASED_EFORMAT, "tokenizer section");
    memcpy(copy, bytes, N);
    REFUSED(swap_sections(copy, N, 64, 11, &e), BASED_EFORMAT, "tokenizer section");
    memset(copy, 0, N);
    REFUSED(swap_sections(copy, N, 64, 20, &e), BASED_EFORMAT, "tokenizer section");
    CHECK(based_to_native(copy, N, 0, &e) == 0);        /* nothing to do here, or too short to be ours */
}

/* ---- kernels by wish ---- */

static void test_wishes(void) {
    CHECK(setenv("BASED_KERNELS", "plain", 1) == 0 && kernel_flags() == BASED_PLAIN);
    CHECK(setenv("BASED_KERNELS", "avx2", 1) == 0 && kernel_flags() == BASED_AVX2);
    CHECK(setenv("BASED_KERNELS", "avx512vnni", 1) == 0 && kernel_flags() == BASED_AVX512);
    CHECK(setenv("BASED_KERNELS", "anything else", 1) == 0 && kernel_flags() == 0);
    CHECK(unsetenv("BASED_KERNELS") == 0 && kernel_flags() == 0);
    CHECK(choose_kernels(BASED_PLAIN) == &plain_kernels);
}

int main(void) {
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
