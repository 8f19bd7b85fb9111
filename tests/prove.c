/* prove.c - for tests/prove.sh: all files of up to two layers, as far as based_model_bytes reads
 * them. Eva knows only an interval for each number, not a relation between two numbers. Therefore
 * the cases are separated here; together they are all cases. Each array is as long as the shortest
 * file of its case, so a read that needs a longer file is an alarm as well.
 */
#include "based.c"
#include "__fc_builtin.h"

#define ANY(low, high) Frama_C_unsigned_int_interval(low, high)
#define ALIGNED __attribute__((aligned(64)))
enum { HEADER = sizeof(based_config), LAYER = sizeof(based_layer) };

static unsigned char nothing[1] ALIGNED, header[HEADER] ALIGNED;
static unsigned char one[HEADER + LAYER] ALIGNED, two[HEADER + 2 * LAYER] ALIGNED;

/* Any bytes with room for exactly `room` layers. */
static void parse(unsigned char *file, uint32_t room) {
    based_config *c = (based_config *)file;
    based_layer *l = (based_layer *)(c + 1);
    based_error e;
    size_t least = HEADER + room * LAYER;
    Frama_C_make_unknown((char *)file, least);
    c->layers = ANY(0, room);
    if (Frama_C_nondet(0, 1)) c->layers = ANY(room + 1, UINT32_MAX);
    for (uint32_t i = 0; i < room; i++) {
        l[i].kv_heads = 0;
        if (Frama_C_nondet(0, 1)) l[i].kv_heads = ANY(1, UINT32_MAX);
    }
    based_model_bytes(file, ANY(least, least + LAYER - 1), &e);
}

int main(void) {
    based_error e;
    switch (Frama_C_interval(0, 3)) {
    case 0:  based_model_bytes(nothing, ANY(0, HEADER - 1), &e); break;
    case 1:  parse(header, 0); break;
    case 2:  parse(one, 1); break;
    default: parse(two, 2);
    }
    return 0;
}
