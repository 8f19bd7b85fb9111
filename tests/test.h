/* test.h - the macros that the C tests are written with.
 *
 * A check that fails prints file, line and condition, and the test goes on, so one run shows all
 * failures. main ends with `return test_end();`, which prints `N passed, N failed` and turns
 * failures into a non-zero exit status.
 */
#ifndef TEST_H
#define TEST_H

#include <stdio.h>
#include <string.h>

static unsigned long test_passed, test_failed;

static inline void test_count(int ok, const char *file, int line, const char *what) {
    if (ok) test_passed++;
    else if (++test_failed <= 50) printf("%s:%d: failed: %s\n", file, line, what);
}

static inline void test_equal(long long a, long long b, const char *file, int line,
                              const char *what) {
    if (a != b && test_failed < 50) printf("%s:%d: %lld is not %lld\n", file, line, a, b);
    test_count(a == b, file, line, what);
}

static inline void test_text(const char *a, const char *b, const char *file, int line,
                             const char *what) {
    int same = a != NULL && b != NULL && strcmp(a, b) == 0;
    if (!same && test_failed < 50)
        printf("%s:%d: \"%s\" is not \"%s\"\n", file, line, a ? a : "", b ? b : "");
    test_count(same, file, line, what);
}

#define CHECK(condition)   test_count((condition) != 0, __FILE__, __LINE__, #condition)
#define CHECK_EQUAL(a, b) \
    test_equal((long long)(a), (long long)(b), __FILE__, __LINE__, #a " == " #b)
/* For loops of thousands: counted only if it fails. */
#define CHECK_EACH(condition) \
    do { if (!(condition)) test_count(0, __FILE__, __LINE__, #condition); } while (0)
#define CHECK_TEXT(a, b)   test_text((a), (b), __FILE__, __LINE__, #a " is " #b)

static inline int test_end(void) {
    printf("%lu passed, %lu failed\n", test_passed, test_failed);
    return test_failed != 0;
}

#endif
