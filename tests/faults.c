/* faults.c - makes one call of a program to the C library fail. test_torture.py links it into run
 * with the linker's --wrap and makes the first call fail, then the second, and so on for all calls.
 *
 *     FAULT_AT=N           the Nth call fails with a suitable errno; fwrite then writes half
 *     FAULT_KILL=1         instead of failing, the Nth call kills the process, as kill -9 does
 *     FAULT_REPORT=FD      at the end, the number of calls is written to this file descriptor
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static unsigned long calls;

static unsigned long number(const char *name) {
    const char *value = getenv(name);
    return value ? strtoul(value, NULL, 10) : 0;
}

/* Whether the next call is the one that fails. */
static int next_fails(void) { return calls + 1 == number("FAULT_AT"); }

/* Counts a call. Returns 1, with errno set to `why`, if it is the one that fails. */
static int fails(int why) {
    int turn = next_fails();
    calls++;
    if (turn && number("FAULT_KILL")) raise(SIGKILL);
    if (turn) errno = why;
    return turn;
}

__attribute__((destructor)) static void report(void) {
    if (number("FAULT_REPORT")) dprintf((int)number("FAULT_REPORT"), "%lu\n", calls);
}

#define WRAP(type, name, parameters, arguments, why, failed) \
    type __real_##name parameters; \
    type __wrap_##name parameters; \
    type __wrap_##name parameters { return fails(why) ? (failed) : __real_##name arguments; }

WRAP(void *, malloc, (size_t n), (n), ENOMEM, NULL)
WRAP(void *, calloc, (size_t n, size_t size), (n, size), ENOMEM, NULL)
WRAP(void *, realloc, (void *p, size_t n), (p, n), ENOMEM, NULL)
WRAP(int, open, (const char *path, int flags, mode_t mode), (path, flags, mode), EMFILE, -1)
WRAP(int, fstat, (int fd, struct stat *st), (fd, st), EIO, -1)
WRAP(void *, mmap, (void *at, size_t n, int how, int flags, int fd, off_t from),
     (at, n, how, flags, fd, from), ENODEV, MAP_FAILED)
WRAP(ssize_t, read, (int fd, void *to, size_t n), (fd, to, n), EIO, -1)
WRAP(FILE *, fopen, (const char *path, const char *mode), (path, mode), EMFILE, NULL)
WRAP(FILE *, fdopen, (int fd, const char *mode), (fd, mode), ENOMEM, NULL)
WRAP(char *, realpath, (const char *path, char *to), (path, to), ENOMEM, NULL)
WRAP(int, fsync, (int fd), (fd), EIO, -1)
WRAP(int, rename, (const char *from, const char *to), (from, to), EACCES, -1)

/* Streams also remember that they failed, which only the C library can set: by a call in the
 * direction that a stream was not opened for. */
static int failed_writing(FILE *f, int why) {
    getc(f);
    errno = why;
    return EOF;
}

int __real_fflush(FILE *f);
int __wrap_fflush(FILE *f);
int __wrap_fflush(FILE *f) {
    if (f == stderr) return __real_fflush(f);
    return fails(ENOSPC) ? failed_writing(f, ENOSPC) : __real_fflush(f);
}

size_t __real_fwrite(const void *from, size_t size, size_t n, FILE *f);
size_t __wrap_fwrite(const void *from, size_t size, size_t n, FILE *f);
size_t __wrap_fwrite(const void *from, size_t size, size_t n, FILE *f) {
    if (f == stderr) return __real_fwrite(from, size, n, f);
    if (next_fails()) n /= 2, __real_fwrite(from, size, n, f), __real_fflush(f);
    else return calls++, __real_fwrite(from, size, n, f);
    fails(ENOSPC);
    failed_writing(f, ENOSPC);
    return n;
}

size_t __real_fread(void *to, size_t size, size_t n, FILE *f);
size_t __wrap_fread(void *to, size_t size, size_t n, FILE *f);
size_t __wrap_fread(void *to, size_t size, size_t n, FILE *f) {
    if (!fails(EIO)) return __real_fread(to, size, n, f);
    fputc(0, f);
    errno = EIO;
    return 0;
}

/* The file is closed all the same, as close does. */
int __real_fclose(FILE *f);
int __wrap_fclose(FILE *f);
int __wrap_fclose(FILE *f) {
    int turn = fails(EIO), status = __real_fclose(f);
    if (turn) errno = EIO;
    return turn ? EOF : status;
}
