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

static uint64_t dice_state;

static inline uint32_t dice(uint32_t sides) {
    dice_state = dice_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(dice_state >> 33) % sides;
}

#endif
