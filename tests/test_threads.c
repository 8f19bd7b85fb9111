/* test_threads.c - sessions on threads of their own share a model and compute what each computes
 * alone; so do the threads of one session. These threads are made here and run the same code as
 * those of OpenMP: a race detector cannot see how OpenMP's own threads begin and end, but it sees
 * these (see .ci/run).
 */
#define _POSIX_C_SOURCE 200809L  /* as based.c, which is not the first to include something here */
#define _DEFAULT_SOURCE 1
#include <pthread.h>

#include "based.c"

#include "tests/model.h"

enum { TOKENS = 60, THREADS = 4, KINDS = 4, INPUT = 6 };

static based_model *models[KINDS];  /* f32, q8, q4, and one that takes vectors */
static int32_t text[TOKENS * 2];
static float vectors[TOKENS * 2 * INPUT];

/* ---- a session for each thread ---- */

struct job {
    const based_model *m;
    size_t from;                        /* what is read */
    uint32_t hash;                      /* of all logits, saved bytes, samples and tokens of text */
};

static uint32_t hash_bytes(uint32_t h, const unsigned char *p, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x01000193u;
    return h;
}

/* All that can be done with a session of one's own. */
static void *work(void *argument) {
    struct job *job = argument;
    const based_model *m = job->m;
    based_error e;
    based_session *s = based_session_new(m, 8, &e), *copy = based_session_new(m, 3, &e);
    based_sampler sampler = { .temperature = 1, .top_p = 0.9f, .repeat_penalty = 1,
                              .seed = job->from, .vocab = VOCAB };
    size_t bytes = based_saved_bytes(m, 0), width = based_width(m);
    float *rows = malloc(TOKENS * width * sizeof *rows);
    unsigned char *saved = malloc(bytes);
    void *memory = malloc(based_sampler_bytes(&sampler));
    int bad = !s || !copy || !rows || !saved
        || based_sampler_init(&sampler, memory, based_sampler_bytes(&sampler), &e);
    if (m->c->input) bad |= based_feed_vectors(s, vectors + job->from * INPUT, TOKENS, rows, &e);
    else bad |= based_feed(s, text + job->from, TOKENS, rows, &e);
    bad |= based_copy(copy, s, &e) || based_save(copy, NULL, 0, saved, bytes, &e)
        || based_load(s, saved, bytes, NULL, NULL, &e);
    job->hash = based_hash(0, rows, TOKENS * width);
    job->hash = hash_bytes(job->hash, saved, bytes);
    for (int i = 0; i < 10 && !m->c->input; i++) {
        int32_t id = based_sample(&sampler, based_logits(s));
        bad |= based_step(s, id, &e) || based_step(copy, id, &e)
            || based_step(copy, VOCAB, &e) == 0;
        job->hash = based_hash(job->hash, based_logits(s), width) ^ (uint32_t)id;
    }
    free(rows), free(saved), free(memory);
    based_session_free(s), based_session_free(copy);
    if (bad) job->hash = 0;
    return NULL;
}

static void test_sessions_on_threads(void) {
    struct job alone[KINDS * THREADS], together[KINDS * THREADS];
    pthread_t thread[KINDS * THREADS];
    for (size_t i = 0; i < COUNT(alone); i++) {
        alone[i].m = models[i % KINDS];
        alone[i].from = i;
        together[i] = alone[i];
        work(&alone[i]);
        CHECK(alone[i].hash != 0 && (i == 0 || alone[i].hash != alone[i - 1].hash));
    }
    for (size_t i = 0; i < COUNT(alone); i++)
        CHECK(pthread_create(&thread[i], NULL, work, &together[i]) == 0);
    for (size_t i = 0; i < COUNT(alone); i++) {
        CHECK(pthread_join(thread[i], NULL) == 0);
        CHECK_EQUAL(together[i].hash, alone[i].hash);
    }
}

/* ---- many threads for one session ---- */
#ifdef _OPENMP

struct walk { struct thread thread; size_t n; };

static void *walk(void *argument) {
    const struct walk *w = argument;
    forward(&w->thread, w->n);
    head(&w->thread, 0, w->n);
    return NULL;
}

/* The parallel region of run_threads, with these threads. */
static void test_many_threads(const based_model *m, size_t of) {
    enum { BLOCK = 7 };
    based_error e;
    based_session *alone = based_session_new(m, BLOCK, &e), *s = based_session_new(m, BLOCK, &e);
    size_t width = based_width(m);
    float *expected = malloc(BLOCK * width * sizeof *expected),
        *rows = malloc(BLOCK * width * sizeof *rows);
    for (size_t turn = 0; turn < 4; turn++) {
        struct walk w[THREADS];
        pthread_t thread[THREADS];
        size_t n = turn % 2 ? 1 : BLOCK;        /* a single token is computed with fewer barriers */
        CHECK(based_feed(alone, text + turn * BLOCK, n, expected, &e) == 0);
        s->barrier_count = 0;
        for (size_t r = 0; r < n; r++) {
            struct row row = { s, s->count + r, rows + r * width, NULL };
            s->row[r] = row;
            embed(s->x + r * m->c->dim, m, text[turn * BLOCK + r]);
        }
        for (size_t i = 0; i < of; i++) {
            struct walk one = { { s, i, of }, n };
            w[i] = one;
            CHECK(pthread_create(&thread[i], NULL, walk, &w[i]) == 0);
        }
        for (size_t i = 0; i < of; i++) CHECK(pthread_join(thread[i], NULL) == 0);
        s->count += n;
        CHECK(memcmp(rows, expected, n * width * sizeof *rows) == 0);
    }
    CHECK(memcmp(s->state, alone->state, based_state_bytes(m)) == 0);
    free(expected), free(rows);
    based_session_free(alone), based_session_free(s);
}

static void test_all_thread_counts(void) {
    for (size_t of = 1; of <= THREADS; of++)
        for (size_t kind = 0; kind < 3; kind++) test_many_threads(models[kind], of);
}
#else
static void test_all_thread_counts(void) {}
#endif

int main(void) {
    for (uint32_t dtype = 0; dtype < 3; dtype++)
        models[dtype] = make_model((struct wish){ dtype + 1, 1, 0, dtype, 5, 0 });
    models[3] = make_model((struct wish){ .seed = 4, .constant = 1, .input = INPUT });
    for (size_t i = 0; i < COUNT(text); i++) text[i] = (int32_t)(random_u32() % VOCAB);
    for (size_t i = 0; i < COUNT(vectors); i++)
        vectors[i] = (float)random_u32() / 2147483648.0f - 0.5f;
    test_sessions_on_threads();
    test_all_thread_counts();
    return test_end();
}
