/* test_contracts.c - who may write where, and what a failed call may change. Every block that a
 * caller owns lies between two pages that nobody may touch, against the one and then against the
 * other; what is promised to be read only is read-only memory. A step outside is a crash of this
 * test.
 */
#define _POSIX_C_SOURCE 200809L  /* as based.c, which is not the first to include something here */
#define _DEFAULT_SOURCE 1
#include <sys/mman.h>

#include "based.c"

#include "tests/model.h"

enum { TOKENS = 50, INPUT = 6, PAGE = 4096 };

static based_error e;
static int32_t text[TOKENS];
static float vectors[TOKENS * INPUT];

/* ---- blocks between two pages that nobody may touch ---- */

static int against_the_end;  /* where blocks lie: at the beginning of their pages, or at the end */

static size_t pages(size_t n) { return (n + PAGE - 1) / PAGE * PAGE; }

/* n bytes, aligned as far as n is. All 0xa5, since nothing promises zeros. */
static void *guarded(size_t n) {
    unsigned char *p = mmap(NULL, pages(n) + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                            0);
    if (p == MAP_FAILED || mprotect(p + PAGE, pages(n), PROT_READ | PROT_WRITE))
        exit(puts("no memory"));
    memset(p + PAGE, 0xa5, pages(n));
    return p + PAGE + (against_the_end ? pages(n) - n : 0);
}

static unsigned char *page_of(const void *p) {
    return (unsigned char *)((uintptr_t)p / PAGE * PAGE);
}

static void read_only(const void *p, size_t n) {
    CHECK(mprotect(page_of(p), pages(n), PROT_READ) == 0);
}

static void let_go(const void *p, size_t n) {
    munmap(page_of(p) - PAGE, pages(n) + 2 * PAGE);
}

static void *copy_of(const void *p, size_t n) {
    void *copy = guarded(n);
    memcpy(copy, p, n);
    read_only(copy, n);
    return copy;
}

/* Sizes of blocks that are aligned to 64 bytes are rounded up, so that both ends can be guarded. */
static size_t round64(size_t n) { return (n + 63) / 64 * 64; }

/* A checkpoint, a model and two sessions of it, all guarded, the first two read-only. */
struct house {
    void *file, *memory, *room[2];
    size_t file_bytes, model_bytes, session_bytes;
    based_model *m;
    based_session *s[2];
};

static struct house build(const based_model *m, uint32_t block, int flags) {
    struct house h = { 0 };
    h.file_bytes = m->c->file_size[0];
    h.file = guarded(round64(h.file_bytes));
    memcpy(h.file, m->c, h.file_bytes);
    read_only(h.file, h.file_bytes);
    h.model_bytes = based_model_bytes(h.file, h.file_bytes, &e);
    h.memory = guarded(round64(h.model_bytes));
    CHECK(based_model_init(&h.m, h.memory, h.model_bytes, h.file, h.file_bytes, flags, &e) == 0);
    read_only(h.memory, h.model_bytes);
    h.session_bytes = based_session_bytes(h.m, block);
    CHECK(h.session_bytes % 64 == 0);
    for (int i = 0; i < 2; i++) {
        h.room[i] = guarded(h.session_bytes);
        CHECK(based_session_init(&h.s[i], h.m, h.room[i], h.session_bytes, block, &e) == 0);
    }
    return h;
}

static void tear_down(const struct house *h) {
    let_go(h->room[0], h->session_bytes), let_go(h->room[1], h->session_bytes);
    let_go(h->memory, round64(h->model_bytes));
    let_go(h->file, round64(h->file_bytes));
}

/* ---- tokens and vectors ---- */

static void test_feeding(const based_model *m, uint32_t block, int flags) {
    struct house h = build(m, block, flags);
    size_t row = based_width(m) * sizeof(float), input = m->c->input,
        saved_bytes = based_saved_bytes(m, 3);
    size_t in_bytes = TOKENS * (input ? input * sizeof(float) : sizeof *text);
    void *in = copy_of(input ? (const void *)vectors : text, in_bytes),
        *saved = guarded(saved_bytes);
    float *out = guarded(TOKENS * row);
    based_session *plain = based_session_new(m, 1, &e), *s = h.s[0];
    for (size_t i = 0; i < TOKENS; i++) {
        if (input) CHECK_EACH(based_feed_vectors(plain, vectors + i * input, 1, NULL, &e) == 0);
        else CHECK_EACH(based_step(plain, text[i], &e) == 0);
    }
    CHECK((input ? based_feed_vectors(s, in, TOKENS, out, &e)
                 : based_feed(s, in, TOKENS, out, &e)) == 0);
    CHECK(memcmp(out + (TOKENS - 1) * based_width(m), based_logits(plain), row) == 0);
    CHECK(memcmp(based_logits(s), based_logits(plain), row) == 0);
    CHECK(based_save(s, "abc", 3, saved, saved_bytes, &e) == 0);
    read_only(saved, saved_bytes);
    CHECK(based_load(h.s[1], saved, saved_bytes, NULL, NULL, &e) == 0
          && based_copy(s, h.s[1], &e) == 0);
    if (!input && block > 1) CHECK(based_step_many(h.s, text, 2, &e) == 0);
    based_reset(s);
    CHECK((input ? based_feed_vectors(s, in, TOKENS, NULL, &e)
                 : based_feed(s, in, TOKENS, NULL, &e)) == 0);
    CHECK(memcmp(based_logits(s), based_logits(plain), row) == 0);
    if (!input) {
        /* the second taylor layer has room for 6 tokens; all but two of them are taken back */
        uint32_t most = block < 6 ? block : 6, kept = most < 2 ? most : 2;
        size_t old_bytes = most * based_draft_width(m) * sizeof(float);
        float *rows = guarded(most * row), *old = guarded(old_bytes);
        based_reset(s), based_reset(plain);
        CHECK(based_feed(plain, text, kept, NULL, &e) == 0);
        CHECK(based_feed_draft(s, in, most, rows, old, &e) == most);
        read_only(rows, most * row), read_only(old, old_bytes);
        CHECK(memcmp(rows, out, most * row) == 0 && based_keep(s, kept, &e) == 0);
        CHECK(based_history(s) == based_history(plain) && based_count(s) == kept);
        CHECK(memcmp(s->state, plain->state, based_state_bytes(m)) == 0);
        CHECK(memcmp(based_logits(s), based_logits(plain), row) == 0);
        let_go(rows, most * row), let_go(old, old_bytes);
    }
    based_session_free(plain);
    let_go(in, in_bytes), let_go(saved, saved_bytes), let_go(out, TOKENS * row);
    tear_down(&h);
}

/* ---- sampling ---- */

static void test_sampling(void) {
    based_sampler s = { .temperature = 1, .top_p = 0.9f, .top_k = 20, .min_p = 0.01f,
                        .repeat_penalty = 1.2f, .repeat_last_n = 5, .seed = 3, .vocab = VOCAB };
    float logits[VOCAB];
    for (size_t i = 0; i < VOCAB; i++) logits[i] = vectors[i];
    float *guarded_logits = copy_of(logits, sizeof logits);
    size_t bytes = (based_sampler_bytes(&s) + 7) / 8 * 8;
    void *memory = guarded(bytes);
    int32_t *recent = guarded(5 * sizeof *recent);
    CHECK(based_sampler_init(&s, memory, based_sampler_bytes(&s), &e) == 0);
    for (int i = 0; i < 100; i++) based_sampler_accept(&s, based_sample(&s, guarded_logits));
    CHECK(based_sampler_recent(&s, recent) == 5);
    CHECK(based_log_probability(guarded_logits, VOCAB, VOCAB - 1) < 0);
    let_go(memory, bytes), let_go(recent, 5 * sizeof *recent),
        let_go(guarded_logits, sizeof logits);
}

/* ---- Taylor attention by itself ---- */

static void test_attention(uint32_t kernel, uint32_t chunk, uint32_t window) {
    enum { DK = 5, DV = 3, GROUP = 2, N = 20 };
    based_taylor_config kind = { .head_dim_k = DK, .head_dim_v = DV, .group = GROUP, .degree = 3,
                                 .kernel = kernel, .chunk = chunk, .window = window,
                                 .scale = 0.4f };
    based_taylor_sizes sizes;
    CHECK(based_taylor_measure(&sizes, &kind, &e) == 0);
    size_t attention = round64(sizes.attention), state = round64(sizes.state),
        scratch = round64(sizes.scratch);
    void *memory = guarded(attention), *states[2] = { guarded(state), guarded(state) },
        *work = guarded(scratch);
    float *q = copy_of(vectors, N * GROUP * DK * sizeof *q),
        *k = copy_of(vectors + 3, N * DK * sizeof *k);
    float *v = copy_of(vectors + 7, N * DV * sizeof *v), *y = guarded(N * GROUP * DV * sizeof *y);
    based_taylor *t;
    based_taylor_state *a, *b;
    CHECK(based_taylor_init(&t, &kind, memory, sizes.attention, &e) == 0);
    read_only(memory, attention);
    CHECK(based_taylor_state_init(&a, t, states[0], sizes.state, work, sizes.scratch, &e) == 0);
    CHECK(based_taylor_state_init(&b, t, states[1], sizes.state, work, sizes.scratch, &e) == 0);
    based_taylor_add(a, k, v, N);
    based_taylor_read(a, q, N, y);
    based_taylor_feed(a, q, k, v, N, y);
    CHECK(based_taylor_subtract(a, k, v, &e) == (window ? BASED_EINVAL : 0)
          && based_taylor_copy(b, a, &e) == 0);
    CHECK(based_taylor_merge(b, a, &e) == 0);
    based_taylor_reset(a);
    let_go(memory, attention), let_go(states[0], state), let_go(states[1], state),
        let_go(work, scratch);
    let_go(q, N * GROUP * DK * sizeof *q), let_go(k, N * DK * sizeof *k),
        let_go(v, N * DV * sizeof *v);
    let_go(y, N * GROUP * DV * sizeof *y);
}

/* ---- failed calls leave everything as it was ---- */

enum { WITNESSES = 4, SAVED_ROOM = 1 << 16 };

static based_session *witness[WITNESSES];
static unsigned char was[WITNESSES][SAVED_ROOM];
static size_t was_bytes[WITNESSES];

static void remember_all(void) {
    for (size_t i = 0; i < WITNESSES; i++) {
        was_bytes[i] = based_saved_bytes(witness[i]->m, 0);
        CHECK(was_bytes[i] <= SAVED_ROOM
              && based_save(witness[i], NULL, 0, was[i], SAVED_ROOM, &e) == 0);
    }
}

/* The call must have failed, said why, and left the past and the logits of all sessions. */
static void unchanged(int status, int expected, int line) {
    static unsigned char now[SAVED_ROOM];
    int good = status == expected && e.status == expected && strlen(e.text) > 15
        && !strchr(e.text, '\n');
    for (size_t i = 0; i < WITNESSES; i++) {
        based_error error;
        good = good && based_save(witness[i], NULL, 0, now, SAVED_ROOM, &error) == 0;
        good = good && memcmp(now, was[i], was_bytes[i]) == 0;
    }
    test_count(good, __FILE__, line, e.text);
    e.status = 0, e.text[0] = 0;
}

#define REFUSED(call, status) unchanged((call), (status), __LINE__)

static void test_failed_calls(const based_model *m, const based_model *stranger,
                              const based_model *sighted) {
    static unsigned char out[SAVED_ROOM], copy[SAVED_ROOM];
    static float rows[TOKENS * VOCAB];
    based_session *s = witness[0] = based_session_new(m, 4, &e),
        *t = witness[1] = based_session_new(m, 4, &e);
    based_session *foreign = witness[2] = based_session_new(stranger, 4, &e);
    based_session *v = witness[3] = based_session_new(sighted, 4, &e);
    based_session *same[2] = { s, s }, *two[2] = { s, foreign }, *twins[2] = { s, t },
        *many[5] = { s, t, s, t, s };
    based_session *first = NULL;
    int32_t bad[9] = { 1, 2, 3, 4, 5, 6, 7, 8, VOCAB }, negative[2] = { 1, INT32_MIN };
    CHECK(based_feed(s, text, 20, NULL, &e) == 0 && based_feed(t, text, 9, NULL, &e) == 0);
    CHECK(based_feed(foreign, text, 3, NULL, &e) == 0
          && based_feed_vectors(v, vectors, 20, NULL, &e) == 0);
    remember_all();
    REFUSED(based_step(s, VOCAB, &e), BASED_EINVAL);
    REFUSED(based_step(s, -1, &e), BASED_EINVAL);
    REFUSED(based_feed(s, bad, 9, NULL, &e), BASED_EINVAL);  /* the bad one is in the third block */
    REFUSED(based_feed(s, bad, 9, rows, &e), BASED_EINVAL);
    CHECK(rows[0] == 0.0f);
    REFUSED(based_feed(s, negative, 2, NULL, &e), BASED_EINVAL);
    REFUSED((int)based_feed_draft(s, bad, 9, rows, rows, &e), BASED_EINVAL);
    REFUSED((int)based_feed_draft(v, bad, 1, rows, rows, &e), BASED_EINVAL);
    CHECK(rows[0] == 0.0f);
    REFUSED(based_keep(s, 1, &e), BASED_EINVAL);
    REFUSED(based_feed_vectors(s, vectors, 2, NULL, &e), BASED_EINVAL);
    REFUSED(based_feed_bidirectional(s, vectors, 2, NULL, &e), BASED_EINVAL);
    REFUSED(based_feed(v, text, 2, NULL, &e), BASED_EINVAL);
    REFUSED(based_feed_bidirectional(v, vectors, 0, NULL, &e), BASED_EINVAL);
    REFUSED(based_feed_bidirectional(v, vectors, 5, NULL, &e), BASED_EINVAL);
    /* its first layer only looks back */
    REFUSED(based_feed_bidirectional(v, vectors, 2, NULL, &e), BASED_EINVAL);
    REFUSED(based_step_many(same, text, 2, &e), BASED_EINVAL);
    REFUSED(based_step_many(two, text, 2, &e), BASED_EINVAL);
    REFUSED(based_step_many(many, text, 5, &e), BASED_EINVAL);
    REFUSED(based_step_many(twins, negative, 2, &e), BASED_EINVAL);
    REFUSED(based_step_many(&v, text, 1, &e), BASED_EINVAL);
    REFUSED(based_copy(s, foreign, &e), BASED_EINVAL);
    REFUSED(based_save(s, NULL, 0, out, was_bytes[0] - 1, &e), BASED_ENOMEM);
    CHECK(out[0] == 0);
    REFUSED(based_load(s, was[2], was_bytes[2], NULL, NULL, &e), BASED_EINVAL);
    REFUSED(based_load(s, was[1], was_bytes[1] - 1, NULL, NULL, &e), BASED_EFORMAT);
    memcpy(copy, was[1], was_bytes[1]);
    copy[was_bytes[1] - 1] ^= 1;
    REFUSED(based_load(s, copy, was_bytes[1], NULL, NULL, &e), BASED_ECHECKSUM);
    REFUSED(based_session_init(&first, m, out, sizeof out, 0, &e), BASED_EINVAL);
    REFUSED(based_session_init(&first, m, out, sizeof out, BASED_MAX_BLOCK + 1, &e), BASED_EINVAL);
    REFUSED(based_session_init(&first, m, (void *)(page_of(out) + PAGE), 64, 1, &e), BASED_ENOMEM);
    CHECK(first == NULL && based_session_new(m, 0, &e) == NULL);
    for (size_t i = 0; i < WITNESSES; i++) based_session_free(witness[i]);
}

static void test_failed_attentions(void) {
    based_taylor_config kind = { .head_dim_k = 4, .head_dim_v = 4, .group = 1, .degree = 2,
                                 .chunk = 4, .scale = 0.5f };
    based_taylor_sizes sizes, before;
    based_taylor *t[2];
    based_taylor_state *s[2];
    CHECK(based_taylor_measure(&sizes, &kind, &e) == 0);
    before = sizes;
    void *memory[2], *state[2] = { block_of(sizes.state), block_of(sizes.state) },
        *scratch = block_of(sizes.scratch);
    unsigned char *kept = block_of(sizes.state);
    memset(state[0], 0, sizes.state);                   /* also what nobody uses, to be compared */
    for (int i = 0; i < 2; i++) {
        memory[i] = block_of(sizes.attention);
        CHECK(based_taylor_init(&t[i], &kind, memory[i], sizes.attention, &e) == 0);
        CHECK(based_taylor_state_init(&s[i], t[i], state[i], sizes.state, scratch, sizes.scratch,
                                      &e) == 0);
    }
    based_taylor_add(s[0], vectors, vectors + 9, 7);
    memcpy(kept, state[0], sizes.state);
    CHECK(based_taylor_copy(s[0], s[1], &e) == BASED_EINVAL
          && based_taylor_merge(s[0], s[1], &e) == BASED_EINVAL);
    CHECK(based_taylor_merge(s[0], s[0], &e) == BASED_EINVAL);
    CHECK(based_taylor_subtract(s[1], vectors, vectors, &e) == BASED_EINVAL
          && based_taylor_count(s[1]) == 0);
    CHECK(based_taylor_state_init(&s[0], t[0], state[0], sizes.state - 1, scratch, sizes.scratch,
                                  &e) == BASED_ENOMEM);
    CHECK(based_taylor_state_init(&s[0], t[0], state[0], sizes.state, scratch, sizes.scratch - 1,
                                  &e) == BASED_ENOMEM);
    kind.degree = 0;
    CHECK(based_taylor_measure(&sizes, &kind, &e) == BASED_EINVAL
          && memcmp(&sizes, &before, sizeof sizes) == 0);
    CHECK(based_taylor_init(&t[0], &kind, memory[0], sizes.attention, &e) == BASED_EINVAL);
    CHECK(memcmp(kept, state[0], sizes.state) == 0);
}

static void test_failed_sampler(void) {
    static uint64_t memory[64];
    based_sampler s = { .temperature = 1, .top_p = 1, .repeat_penalty = 1, .repeat_last_n = 4,
                        .seed = 7, .vocab = 20 }, before;
    float logits[20] = { 0 };
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == 0);
    based_sample(&s, logits), based_sampler_accept(&s, 3);
    s.temperature = NAN;
    before = s;
    CHECK(based_sampler_init(&s, memory, sizeof memory, &e) == BASED_EINVAL
          && memcmp(&s, &before, sizeof s) == 0);
    s.temperature = before.temperature = 1;
    CHECK(based_sampler_init(&s, memory, 8, &e) == BASED_ENOMEM
          && memcmp(&s, &before, sizeof s) == 0);
}

int main(void) {
    static const uint32_t blocks[] = { 1, 2, 3, 5, 8, 9, 33, 128 };
    static const int kernels[] = { 0, BASED_AVX512, BASED_AVX2, BASED_PLAIN };
    based_model *m[3],
        *sighted = make_model((struct wish){ .seed = 4, .constant = 1, .input = INPUT });
    for (uint32_t dtype = 0; dtype < 3; dtype++)
        m[dtype] = make_model((struct wish){ dtype + 1, 1, 0, dtype, 5, 0 });
    for (size_t i = 0; i < TOKENS; i++) text[i] = (int32_t)(random_u32() % VOCAB);
    for (size_t i = 0; i < COUNT(vectors); i++)
        vectors[i] = (float)random_u32() / 2147483648.0f - 0.5f;
    for (against_the_end = 0; against_the_end < 2; against_the_end++) {
        for (size_t b = 0; b < COUNT(blocks); b++)
            for (size_t k = 0; k < COUNT(kernels); k++) {
                for (uint32_t dtype = 0; dtype < 3; dtype++)
                    test_feeding(m[dtype], blocks[b], kernels[k]);
                test_feeding(sighted, blocks[b], kernels[k]);
            }
        test_sampling();
        test_attention(BASED_DOT, 4, 0), test_attention(BASED_DOT, 1, 0),
            test_attention(BASED_DIAGONAL, 16, 0);
        test_attention(BASED_DOT, 4, 3);
    }
    test_failed_calls(m[0], m[1], sighted);
    test_failed_attentions();
    test_failed_sampler();
    return test_end();
}
