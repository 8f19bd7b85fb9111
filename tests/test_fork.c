/* test_fork.c - threads that cannot be made, and processes that were forked after threads were
 * used. OpenMP would end such a process or wait for ever; the library computes with fewer threads
 * and gives the same bits. Each case runs in a process of its own, with an alarm.
 */
#define _POSIX_C_SOURCE 200809L     /* as based.c, which is not the first to include something */
#define _DEFAULT_SOURCE 1
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "based.c"

#include "tests/model.h"

#if !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define LITTLE_MEMORY 1                 /* what the program needs can be foreseen */
#endif

enum { TOKENS = 24 };

static based_model *model;
static int32_t text[TOKENS];
static uint32_t expected;               /* fingerprint of all logits, from one thread */

static based_session *new_session(int threads) {
    based_session *s = based_session_new(model, 8, NULL);
    if (s) based_set_threads(s, threads);
    return s;
}

/* The fingerprint of the text in an empty session; 0 if a call fails. */
static uint32_t compute(based_session *s) {
    size_t n = TOKENS * based_width(model);
    float *rows = malloc(n * sizeof *rows);
    based_reset(s);
    uint32_t h = based_feed(s, text, TOKENS, rows, NULL) ? 0 : based_hash(0, rows, n);
    free(rows);
    return h;
}

#ifdef _OPENMP
/* Runs one case in a new process: 1 if it ends by itself and says that all is well. */
static int runs(int (*good)(void *), void *argument) {
    int status = -1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(good(argument) ? 0 : 1);
    }
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

static int has_one_thread(void *s) {
    return compute(s) == expected && based_threads(s) == 1;
}

static int has_many_threads(void *nothing) {
    based_session *s = new_session(4);
    (void)nothing;
    return s && compute(s) == expected && based_threads(s) == 4;
}

/* A session of the parent, a new one, and a grandchild. */
static int after_a_fork(void *nothing) {
    based_session *s = new_session(4), *other;
    (void)nothing;
    if (!s || compute(s) != expected || based_threads(s) != 4) return 0;
    if (!runs(has_one_thread, s) || compute(s) != expected || based_threads(s) != 4) return 0;
    other = new_session(3);
    return other && runs(has_one_thread, other) && has_many_threads(NULL);
}

/* The child of a process in which another thread used OpenMP. */
static void *use_threads(void *good) {
    *(int *)good = has_many_threads(NULL);
    return NULL;
}

static int after_a_fork_beside_threads(void *nothing) {
    pthread_t thread;
    int good = 0;
    (void)nothing;
    return pthread_create(&thread, NULL, use_threads, &good) == 0
        && pthread_join(thread, NULL) == 0 && good && runs(has_many_threads, NULL);
}

/* No room for many stacks. What there can be is used. based.h tells why not with LLVM's OpenMP. */
#ifdef LITTLE_MEMORY
static int with_little_memory(void *more) {
    struct rlimit little = { (rlim_t)*(int *)more << 20, (rlim_t)*(int *)more << 20 };
    based_session *s = new_session(1000), *t = new_session(2);
    if (!s || !t || setrlimit(RLIMIT_AS, &little)) return 0;
    int good = compute(s) == expected && based_threads(s) < 1000;
    /* and again, where OpenMP has threads already */
    based_set_threads(s, 500);
    return good && compute(t) == expected && compute(s) == expected && compute(t) == expected;
}

#endif

/* Not as root, who has no such limit. */
static int with_few_processes(void *nothing) {
    struct rlimit none = { 1, 1 };
    based_session *s = new_session(4);
    (void)nothing;
    if (getuid() == 0 && (setgid(65534) || setuid(65534))) return 1;
    if (!s || setrlimit(RLIMIT_NPROC, &none)) return 0;
    return compute(s) == expected && based_threads(s) == 1;
}

static void test_forks(void) {
    CHECK(runs(after_a_fork, NULL));
    CHECK(runs(after_a_fork_beside_threads, NULL));
    CHECK(runs(has_many_threads, NULL));        /* where nobody used threads before */
}

static void test_limits(void) {
#ifdef LITTLE_MEMORY
    for (int megabytes = 64; megabytes <= 1024; megabytes *= 2) {
        CHECK(runs(with_little_memory, &megabytes));
    }
#endif
    CHECK(runs(with_few_processes, NULL));
}
#endif

static void test_any_number(void) {
    static const int numbers[] = { -2147483647 - 1, -1, 0, 1, 2, 1024, 1025, 2147483647 };
    based_session *s = new_session(1);
    for (size_t i = 0; i < COUNT(numbers); i++) {
        based_set_threads(s, numbers[i]);
        CHECK(based_threads(s) >= 1 && based_threads(s) <= 1024);
    }
    based_session_free(s);
}

int main(void) {
    model = make_model((struct wish){ .seed = 1, .constant = 1 });
    for (int i = 0; i < TOKENS; i++) text[i] = (int32_t)(random_u32() % VOCAB);
    based_session *s = new_session(1);
    expected = compute(s);
    CHECK(expected != 0);
    test_any_number();
#ifdef _OPENMP
    test_forks();
    test_limits();
#endif
    based_session_free(s);
    return test_end();
}
