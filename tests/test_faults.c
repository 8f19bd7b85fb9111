/* test_faults.c - every call of the library to the operating system fails once: the first, the second, ... until none is
 * left. Each time the caller gets an error line, and nothing is left allocated, open or mapped. Reads come in pieces, are
 * interrupted, or end early. And once a session exists, nothing is asked of the system any more.
 */
#define _POSIX_C_SOURCE 200809L         /* as based.c, which is not the first to include something here */
#define _DEFAULT_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static unsigned long calls, fail_at;                    /* calls made; which of them fails, counted from 1 */
static int fail_errno, no_maps;                         /* why; every mmap fails, so that files are read */
static int reading;                                     /* how */
enum { WHOLE, PIECES, INTERRUPTED, SHRUNK };
static long owned_blocks, open_files, live_maps;         /* what the library holds */

static int fails(void) {
    errno = fail_errno;
    return ++calls == fail_at;
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

static int faulty_open(const char *path, int flags) {
    int fd = fails() ? -1 : open(path, flags);
    open_files += fd >= 0;
    return fd;
}

static int faulty_close(int fd) {
    open_files--;
    return close(fd);
}

static int faulty_fstat(int fd, struct stat *st) {
    return fails() ? -1 : fstat(fd, st);
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

static ssize_t faulty_read(int fd, void *to, size_t n) {
    if (fails()) return -1;
    if (reading == INTERRUPTED && calls % 2) return errno = EINTR, -1;
    if (reading == SHRUNK && n < 1000) return 0;
    return read(fd, to, reading != WHOLE && n > 777 ? 777 : n);
}

#define malloc(n) faulty_malloc(n)
#define free(p) faulty_free(p)
#define open(path, flags) faulty_open(path, flags)
#define close(fd) faulty_close(fd)
#define fstat(fd, st) faulty_fstat(fd, st)
#define mmap(at, n, protection, flags, fd, from) faulty_mmap(at, n, protection, flags, fd, from)
#define munmap(p, n) faulty_munmap(p, n)
#define read(fd, to, n) faulty_read(fd, to, n)
#include "based.c"
#undef malloc
#undef free
#undef open
#undef close
#undef fstat
#undef mmap
#undef munmap
#undef read

#include "tests/model.h"

enum { TOKENS = 40, SAVED_ROOM = 1 << 17 };

static char path[] = "/tmp/based-XXXXXX";
static int32_t text[TOKENS];
static uint32_t expected;                               /* the hash of the logits after text */

/* Opens, feeds and closes. Returns how many errors there were; each must be a line of its own, with nothing left behind. */
static int use(void) {
    based_error e = { 0, "" };
    long before = owned_blocks;
    based_model *m = based_open(path, 0, &e);
    based_session *s = m ? based_session_new(m, 8, &e) : NULL;
    if (s) {
        unsigned long made = calls;
        CHECK_EACH(based_feed(s, text, TOKENS, NULL, &e) == 0 && calls == made);
        CHECK_EACH(based_hash(0, based_logits(s), VOCAB) == expected);
    } else {
        CHECK_EACH((e.status == BASED_ENOMEM || e.status == BASED_EIO) && strlen(e.text) > 20 && !strchr(e.text, '\n'));
        CHECK_EACH(m || strncmp(e.text, path, strlen(path)) == 0 || strstr(e.text, "memory"));
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
        calls = 0;
        fail_at = ++n;
        errors += use();
    } while (calls >= n);
    fail_at = 0;
    CHECK(n > 3 && errors > 0);
    return errors;
}

static void test_every_call_fails_once(void) {
    CHECK_EQUAL(use(), 0);
    CHECK_EQUAL(walk(ENOMEM), 4);               /* open, fstat, the model, the session; a file that cannot be mapped is read */
    CHECK_EQUAL(walk(EIO), 4);
    CHECK_EQUAL(walk(EINTR), 3);                /* an interrupted open is tried again */
    no_maps = 1;
    CHECK_EQUAL(walk(ENOMEM), 6);               /* also the file's memory, and one read */
    for (int how = WHOLE; how <= INTERRUPTED; how++) {
        reading = how;
        CHECK_EQUAL(use(), 0);
    }
    CHECK(walk(EIO) > 20);                      /* each of many reads */
    CHECK_EQUAL(walk(EINTR), 4);                /* but interrupted ones are tried again */
    reading = SHRUNK;
    CHECK_EQUAL(use(), 1);
    reading = WHOLE;
    no_maps = 0;
}

/* All that a session is for, without one call. (Nothing else of what the library calls could allocate: .ci/run looks at
 * the names.) */
static void test_nothing_is_asked_of_the_system(void) {
    static unsigned char saved[SAVED_ROOM];
    static uint64_t memory[VOCAB + 64];
    static float rows[TOKENS * VOCAB];
    based_error e;
    based_model *m = based_open(path, 0, &e);
    based_session *s = based_session_new(m, 8, &e), *other = based_session_new(m, 8, &e), *both[2] = { s, other };
    based_sampler sampler = { .temperature = 1, .top_p = 0.9f, .repeat_penalty = 1.1f, .repeat_last_n = 8, .vocab = VOCAB };
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
    CHECK(out && fwrite(m->c, 1, m->c->file_size[0], out) == m->c->file_size[0] && fclose(out) == 0);
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
