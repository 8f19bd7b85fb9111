/* test_faults.c - every call of the library to the operating system fails once: the first, the
 * second, ... until none is left. Each time the caller gets an error line, and nothing is left
 * allocated, open or mapped. Reads are interrupted, or end early. And once a session exists,
 * nothing is asked of the system any more.
 */
#define _POSIX_C_SOURCE 200809L  /* as in based.c, which is not the first to include something */
#define _DEFAULT_SOURCE 1
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static unsigned long calls, fail_at;    /* calls made; which of them fails, counted from 1 */
static int fail_errno, no_maps;         /* why; every mmap fails, so that files are read */
static int reading;                     /* how */
enum { WHOLE, INTERRUPTED, SHRUNK };
static int stream_failed;               /* the error flag of the stream, as ferror tells it */
static long owned_blocks, open_files, live_maps;        /* what the library holds */

/* errno stays what it was if the call does not fail. */
static int fails(void) {
    if (++calls != fail_at) return 0;
    errno = fail_errno;
    return 1;
}

static void *faulty_malloc(size_t n) {
    void *p = fails() ? NULL : malloc(n);
    owned_blocks += p != NULL;
    return p;
}

static void faulty_free(void *p) {
    owned_blocks -= p != NULL;
    free(p);
}

static FILE *faulty_fopen(const char *path, const char *mode) {
    FILE *f = fails() ? NULL : fopen(path, mode);
    open_files += f != NULL;
    stream_failed = 0;
    return f;
}

/* The stream is closed even if fclose fails, and nothing that was read is worse for it. */
static int faulty_fclose(FILE *f) {
    open_files--;
    return fails() | fclose(f) ? EOF : 0;
}

static int faulty_fseek(FILE *f, long at, int from) { return fails() ? -1 : fseek(f, at, from); }

static long faulty_ftell(FILE *f) { return fails() ? -1 : ftell(f); }

static int faulty_madvise(void *p, size_t n, int advice) {
    return fails() ? -1 : madvise(p, n, advice);
}

static void *faulty_mmap(void *at, size_t n, int protection, int flags, int fd, off_t from) {
    void *p = fails() || no_maps ? MAP_FAILED : mmap(at, n, protection, flags, fd, from);
    live_maps += p != MAP_FAILED;
    return p;
}

static int faulty_munmap(void *p, size_t n) {
    live_maps--;
    return munmap(p, n);
}

/* INTERRUPTED: a signal comes after 777 bytes, and at every second call at once. SHRUNK: the last
 * bytes of the file are no longer there. */
static size_t faulty_fread(void *to, size_t size, size_t n, FILE *f) {
    if (fails()) {
        stream_failed = 1;
        return 0;
    }
    if (reading == INTERRUPTED && (n > 777 || calls % 2)) {
        n = fread(to, size, n > 777 ? 777 : 0, f);
        stream_failed = 1;
        errno = EINTR;
        return n;
    }
    return fread(to, size, reading == SHRUNK && n > 5 ? n - 5 : n, f);
}

#define malloc(n) faulty_malloc(n)
#define free(p) faulty_free(p)
#define fopen(path, mode) faulty_fopen(path, mode)
#define fclose(f) faulty_fclose(f)
#define fseek(f, at, from) faulty_fseek(f, at, from)
#define ftell(f) faulty_ftell(f)
#define fread(to, size, n, f) faulty_fread(to, size, n, f)
#undef ferror
#undef clearerr
#define ferror(f) (stream_failed)
#define clearerr(f) ((void)(stream_failed = 0))
#define mmap(at, n, protection, flags, fd, from) faulty_mmap(at, n, protection, flags, fd, from)
#define munmap(p, n) faulty_munmap(p, n)
#define madvise(p, n, advice) faulty_madvise(p, n, advice)
#include "based.c"
#undef malloc
#undef free
#undef fopen
#undef fclose
#undef fseek
#undef ftell
#undef fread
#undef ferror
#undef clearerr
#undef mmap
#undef munmap
#undef madvise

#include "tests/model.h"

enum { TOKENS = 40, SAVED_ROOM = 1 << 17 };

static char path[] = "/tmp/based-XXXXXX";
static int32_t text[TOKENS];
static uint32_t expected;                               /* the hash of the logits after text */

static based_error last;                                /* what use() was told */

/* Opens, feeds and closes. Returns how many errors there were; each must be a line of its own, with
 * nothing left behind. */
static int use(void) {
    long before = owned_blocks;
    calls = 0;
    last = (based_error){ 0, "" };
    based_model *m = based_open(path, 0, &last);
    based_session *s = m ? based_session_new(m, 8, &last) : NULL;
    if (s) {
        unsigned long made = calls;
        CHECK_EACH(based_feed(s, text, TOKENS, NULL, &last) == 0 && calls == made);
        CHECK_EACH(based_hash(0, based_logits(s), VOCAB) == expected);
    } else {
        CHECK_EACH(last.status == BASED_ENOMEM || last.status == BASED_EIO);
        CHECK_EACH(strlen(last.text) > 20 && !strchr(last.text, '\n'));
        CHECK_EACH(!strstr(last.text, strerror(0)));
        CHECK_EACH(m || strncmp(last.text, path, strlen(path)) == 0
                   || strstr(last.text, "memory"));
    }
    based_session_free(s);
    based_close(m);
    CHECK_EACH(owned_blocks == before && open_files == 0 && live_maps == 0);
    return s == NULL;
}

/* Lets the first call fail, the second, ... until all have; returns how many errors came of it. */
static int walk(int why) {
    int errors = 0;
    unsigned long n = 0;
    fail_errno = why;
    do {
        fail_at = ++n;
        errors += use();
    } while (calls >= n);
    fail_at = 0;
    CHECK(n > 3 && errors > 0);
    return errors;
}

static void test_every_call_fails_once(void) {
    /* mapped: fopen, fread (one byte), fseek, ftell, fseek, mmap, madvise, fclose, and malloc for
     * the model and for the session. A file that cannot be mapped is read; the advice and what
     * fclose says do not matter. */
    CHECK_EQUAL(use(), 0);
#ifdef MADV_HUGEPAGE
    CHECK_EQUAL(calls, 10);
#endif
    CHECK_EQUAL(walk(ENOMEM), 7);
    CHECK_EQUAL(walk(EIO), 7);
    CHECK_EQUAL(walk(EINTR), 5);                /* an interrupted fopen or fread is tried again */
    /* read: also malloc for the file, and one more fread; but no madvise */
    no_maps = 1;
    CHECK_EQUAL(use(), 0);
    CHECK_EQUAL(calls, 11);
    CHECK_EQUAL(walk(ENOMEM), 9);
    CHECK_EQUAL(walk(EINTR), 6);
    /* read in many pieces: all calls matter but mmap and fclose */
    reading = INTERRUPTED;
    CHECK_EQUAL(use(), 0);
    unsigned long made = calls;
    CHECK(made > 20);
    CHECK_EQUAL(walk(EIO), made - 2);
    CHECK_EQUAL(walk(EINTR), 6);
    reading = SHRUNK;
    CHECK_EQUAL(use(), 1);
    CHECK(last.status == BASED_EIO && strstr(last.text, "became shorter while it was read"));
    reading = WHOLE;
    no_maps = 0;
}

/* All that a session is for, without one call. (Nothing else of what the library calls could
 * allocate: .ci/run looks at the names.) */
static void test_nothing_is_asked_of_the_system(void) {
    static unsigned char saved[SAVED_ROOM];
    static uint64_t memory[VOCAB + 64];
    static float rows[TOKENS * VOCAB];
    based_error e;
    based_model *m = based_open(path, 0, &e);
    based_session *s = based_session_new(m, 8, &e), *other = based_session_new(m, 8, &e),
        *both[2] = { s, other };
    based_sampler sampler = { .temperature = 1, .top_p = 0.9f, .repeat_penalty = 1.1f,
                              .repeat_last_n = 8, .vocab = VOCAB };
    int32_t two[2] = { 1, 2 };
    unsigned long made = calls;
    CHECK(made > 0 && based_sampler_init(&sampler, memory, sizeof memory, &e) == 0);
    based_set_threads(s, 2);
    CHECK(based_feed(s, text, TOKENS, rows, &e) == 0 && based_step(s, 3, &e) == 0);
    CHECK(based_step_many(both, two, 2, &e) == 0 && based_copy(other, s, &e) == 0);
    CHECK(based_save(s, "note", 4, saved, sizeof saved, &e) == 0);
    CHECK(based_load(other, saved, based_saved_bytes(m, 4), NULL, NULL, &e) == 0);
    for (int i = 0; i < 20; i++) {
        int32_t id = based_sample(&sampler, based_logits(s));
        based_sampler_accept(&sampler, id);
        CHECK(based_step(s, id, &e) == 0 && based_step(s, -1, &e) != 0);
    }
    CHECK(based_log_probability(rows, VOCAB, 5) < 0);
    based_reset(s);
    CHECK_EQUAL(calls, made);
    based_session_free(s), based_session_free(other);
    based_close(m);
}

int main(void) {
    based_model *m = make_model((struct wish){ .seed = 1, .constant = 1 });
    FILE *out = fdopen(mkstemp(path), "wb");
    based_error e;
    CHECK(out && fwrite(m->c, 1, m->c->file_size[0], out) == m->c->file_size[0]
          && fclose(out) == 0);
    for (size_t i = 0; i < TOKENS; i++) text[i] = (int32_t)(random_u32() % VOCAB);
    based_session *s = based_session_new(m, 8, &e);
    CHECK(s && based_feed(s, text, TOKENS, NULL, &e) == 0);
    expected = based_hash(0, based_logits(s), VOCAB);
    based_session_free(s);
    test_every_call_fails_once();
    test_nothing_is_asked_of_the_system();
    remove(path);
    return test_end();
}
