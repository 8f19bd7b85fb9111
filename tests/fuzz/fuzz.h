/* fuzz.h - what the fuzz targets share. A target is one C file that includes the source it tests,
 * defines LLVMFuzzerTestOneInput, and offers a few good inputs to begin with (write_seeds). Built
 * by clang it is driven by libFuzzer, by afl-clang-fast by AFL++; any other compiler links main.c,
 * which replays files and makes random mutants without coverage.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int    LLVMFuzzerInitialize(int *argc, char ***argv);
int    LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
/* the driver's own: bytes, no structure */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

/* What must hold for every input. */
#define REQUIRE(condition) do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

static const char *seed_directory;

static inline void save_seed(const char *name, const void *bytes, size_t n) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", seed_directory, name);
    FILE *f = fopen(path, "wb");
    REQUIRE(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

static void write_seeds(void);

/* TARGET --seeds DIRECTORY writes the seeds and ends. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc != 3 || strcmp((*argv)[1], "--seeds")) return 0;
    seed_directory = (*argv)[2];
    write_seeds();
    _Exit(0);                           /* what the seeds were made from is not freed */
}

/* A copy of n bytes in a block of exactly that size, aligned to 64, so that a sanitizer sees every
 * access beyond it. */
static inline void *tight(const void *bytes, size_t n) {
    void *p = NULL;
    REQUIRE(posix_memalign(&p, 64, n ? n : 1) == 0);
    if (bytes && n) memcpy(p, bytes, n);
    if (!bytes) memset(p, 0xA5, n);                     /* no code may rely on zeroed memory */
    return p;
}

/* Written from the table of Unicode 15.0 section 3.9, not from the code under test. */
static inline int valid_utf8(const unsigned char *p, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t more = p[i] < 0x80 ? 0 : p[i] < 0xE0 ? 1 : p[i] < 0xF0 ? 2 : 3;
        if ((p[i] >= 0x80 && p[i] < 0xC2) || p[i] > 0xF4 || more >= n - i) return 0;
        for (size_t k = 1; k <= more; k++) if ((p[i + k] & 0xC0) != 0x80) return 0;
        if (more > 1) {
            unsigned first = p[i], second = p[i + 1];
            if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F)) return 0;
            if ((first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F)) return 0;
        }
        i += more + 1;
    }
    return 1;
}

static uint64_t dice_state;

static inline uint32_t dice(uint32_t sides) {
    dice_state = dice_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(dice_state >> 33) % sides;
}

#endif
