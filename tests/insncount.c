/* insncount.c - a QEMU plugin that counts executed instructions, exactly.
 *
 * An emulator's clock says nothing about a microcontroller, and QEMU does not model cycles; but the
 * instructions that a program executes are the same in every run and on every host. Measured with
 *
 *     qemu-system-arm ... -plugin file=insncount.so,out=counts.txt,mark=0x1234,profile=profile.txt
 *
 * out gets one line each time the instruction at `mark` is reached, with the number of instructions
 * executed before it, and a last line with the total. profile gets "address count" for every
 * instruction that ran, to be added up by function. It is written against the plugin interface of
 * QEMU 4.2 to 8, declared here so that no header is needed.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

struct qemu_plugin_tb;
struct qemu_plugin_insn;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t i);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *insn, int add,
                                                void *counter, uint64_t one);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn,
                                            void (*called)(unsigned, void *), int registers,
                                            void *data);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id,
                                           void (*called)(uint64_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(uint64_t id, void (*called)(uint64_t, void *), void *data);

EXPORT int qemu_plugin_version = 1;
EXPORT int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv);

struct place { uint64_t address, count; struct place *next; };

static uint64_t executed, mark = UINT64_MAX;
static const char *profile;
static FILE *out;
static struct place *places;

static void reached(unsigned cpu, void *data) {
    (void)cpu;
    (void)data;
    fprintf(out, "%llu\n", (unsigned long long)executed);
}

/* QEMU shows each block of instructions once, when it translates it; the counters are then part of
 * what it made. */
static void translated(uint64_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint64_t address = qemu_plugin_insn_vaddr(insn);
        struct place *p = profile ? malloc(sizeof *p) : NULL;
        if (address == mark) qemu_plugin_register_vcpu_insn_exec_cb(insn, reached, 0, NULL);
        qemu_plugin_register_vcpu_insn_exec_inline(insn, 0, &executed, 1);
        if (!p) continue;
        *p = (struct place){ address, 0, places };
        places = p;
        qemu_plugin_register_vcpu_insn_exec_inline(insn, 0, &p->count, 1);
    }
}

static void ended(uint64_t id, void *data) {
    FILE *f = profile ? fopen(profile, "w") : NULL;
    (void)id;
    (void)data;
    fprintf(out, "%llu\n", (unsigned long long)executed);
    fclose(out);
    for (struct place *p = places; f && p; p = p->next)
        if (p->count)
            fprintf(f, "%llx %llu\n", (unsigned long long)p->address, (unsigned long long)p->count);
    if (f) fclose(f);
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "out=", 4) == 0) out = fopen(argv[i] + 4, "w");
        else if (strncmp(argv[i], "mark=", 5) == 0) mark = strtoull(argv[i] + 5, NULL, 0);
        else if (strncmp(argv[i], "profile=", 8) == 0) profile = argv[i] + 8;
    }
    if (!out) return fprintf(stderr, "insncount: out=FILE is missing or cannot be written\n"), -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
