/* main.c - drives a fuzz target where there is no libFuzzer: any compiler builds it.
 *
 *     TARGET FILE...                runs the files, as a regression test; AFL++ calls it so
 *     TARGET --random N FILE...     and then N random mutants of each, which no coverage guides
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int    LLVMFuzzerInitialize(int *argc, char ***argv);
int    LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

enum { MOST = 1 << 16 };

static uint64_t state = 1;

static size_t any(size_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(state >> 33) % n;
}

/* A few bytes more or less, a few bits or a byte changed. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most) {
    if (size > 0 && any(4) == 0) size -= any(size < 8 ? size : 8);
    if (size < most && any(4) == 0) {
        size_t room = most - size, more = 1 + any(room < 8 ? room : 8);
        memset(data + size, (int)any(256), more);
        size += more;
    }
    for (size_t n = any(4); size > 0 && n > 0; n--) data[any(size)] ^= (uint8_t)(1u << any(8));
    if (size > 0 && any(2)) data[any(size)] = (uint8_t)any(256);
    return size;
}

/* Runs a file and its mutants, each in a block of exactly its size. A mutant is made from the one
 * before it; every eighth is made from the file again. */
static void run(const char *path, unsigned long mutants) {
    static uint8_t original[MOST], input[MOST];
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(original, 1, MOST, f) : 0, size = n;
    if (!f || ferror(f)) perror(path), exit(1);
    fclose(f);
    memcpy(input, original, n);
    for (unsigned long i = 0; i <= mutants; i++) {
        uint8_t *copy = malloc(size ? size : 1);
        memcpy(copy, input, size);
        LLVMFuzzerTestOneInput(copy, size);
        free(copy);
        if (i % 8 == 0) memcpy(input, original, size = n);
        size = LLVMFuzzerCustomMutator(input, size, MOST, (unsigned)any(1u << 30));
    }
}

int main(int argc, char **argv) {
    unsigned long mutants = 0;
    int first = 1;
    LLVMFuzzerInitialize(&argc, &argv);
    if (argc > 2 && strcmp(argv[1], "--random") == 0)
        mutants = strtoul(argv[2], NULL, 10), first = 3;
    for (int i = first; i < argc; i++) run(argv[i], mutants);
    printf("%d files, %lu mutants of each\n", argc - first, mutants);
    return 0;
}
