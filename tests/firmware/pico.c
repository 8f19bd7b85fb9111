/* pico.c - the Raspberry Pi Pico (RP2040) and, with -DPICO2, the Pico 2 (RP2350, its ARM cores):
 * text goes to UART0 on pin GP0, 115,200 baud, 8N1, and to a serial port on USB (usb.c); the LED is
 * on while the story is told. Numbers of registers and bits are those of the two data sheets.
 */
#include "board.h"
#include "pico.h"

#define WAIT_FOR(condition) while (!(condition)) { }

enum { LED = 25 };

#ifdef PICO2
enum { CLOCKS = 0x40010000, RESETS = 0x40020000, IO_BANK0 = 0x40028000, PADS_BANK0 = 0x40038000,
       XOSC = 0x40048000, PLL_SYS = 0x40050000, PLL_USB = 0x40058000, UART0 = 0x40070000,
       USB_CLOCK = CLOCKS + 0x60, OUT_SET = 0x18, OUT_CLEAR = 0x20, OE_SET = 0x38, DIVISOR = 5,
       MHZ = 150 };
#define BASICS (BIT(6) | BIT(9) | BIT(14) | BIT(15))    /* IO, pads, the two PLLs */
#define SERIAL (BIT(26) | BIT(28))                      /* UART0, USB */

/* What the ROM looks for in the first 4 KB: a program for ARM whose vectors stand behind it. */
__attribute__((section(".boot"))) const uint32_t boot_block[] = {
    0xffffded3, 0x10210142, 0x00000203, 0x10000100, 0x000003ff, 0, 0xab123579
};
#else
enum { CLOCKS = 0x40008000, RESETS = 0x4000c000, IO_BANK0 = 0x40014000, PADS_QSPI = 0x40020000,
       XOSC = 0x40024000, PLL_SYS = 0x40028000, PLL_USB = 0x4002c000, UART0 = 0x40034000,
       USB_CLOCK = CLOCKS + 0x54, OUT_SET = 0x14, OUT_CLEAR = 0x18, OE_SET = 0x24, DIVISOR = 6,
       MHZ = 125 };
#define BASICS (BIT(5) | BIT(8) | BIT(12) | BIT(13))
#define SERIAL (BIT(22) | BIT(24))

/* ---- The second stage of the boot ---------------------------------------------------------------
 * The ROM copies the first 256 bytes of the flash to RAM, compares the CRC in the last four (which
 * pico.py writes) and calls them, with the flash in its slowest mode. From here on it is read by
 * four wires at half the clock: command EBh, then for good only address, mode A0h (the next access
 * has no command either), four cycles of pause, data. No call and no constant may lie outside.
 */
struct ssi {
    volatile uint32_t ctrlr0, ctrlr1, enable, unused1[2], baudr, unused2[4], status, unused3[13],
                      data, unused4[35], sample_delay, spi_ctrlr0;
};
enum { READ_STATUS1 = 0x05, READ_STATUS2 = 0x35, WRITE_ENABLE = 0x06, WRITE_STATUS = 0x01,
       QUAD_ENABLE = 2, READ_QUAD = 0xeb, NO_COMMAND = 0xa0 };

#define INLINE static inline __attribute__((always_inline))

/* Sends n bytes, the first one lowest in `bytes`; returns the last byte that came back. */
INLINE uint32_t flash(struct ssi *ssi, uint32_t bytes, int n) {
    uint32_t got = 0;
    for (int i = 0; i < n; i++) ssi->data = bytes >> 8 * i & 255;
    WAIT_FOR((ssi->status & (BIT(2) | BIT(0))) == BIT(2));     /* all sent, not busy */
    for (int i = 0; i < n; i++) got = ssi->data;
    return got;
}

void boot_block(void);
__attribute__((section(".boot"), noreturn, optimize("Os"))) void boot_block(void) {
    const uint32_t *vectors = (const uint32_t *)0x10000100;
    struct ssi *ssi = (struct ssi *)0x18000000;
    const uint32_t quad = 8 << 2 | 4 << 11;     /* 32 bits of address and mode, 4 cycles of pause */
    __asm__("" : "+r"(ssi));                    /* keeps it in a register: a shorter program */
    REG(PADS_QSPI + 4) = 0x21;                  /* clock pin: 8 mA, fast */
    ssi->enable = 0;
    ssi->baudr = 2;
    ssi->sample_delay = 1;
    ssi->ctrlr0 = 7 << 16;                      /* bytes by one wire, to set the quad-enable bit */
    ssi->enable = 1;
    if (!(flash(ssi, READ_STATUS2, 2) & QUAD_ENABLE)) {
        flash(ssi, WRITE_ENABLE, 1);
        flash(ssi, WRITE_STATUS | QUAD_ENABLE << 16, 3);
        while (flash(ssi, READ_STATUS1, 2) & 1) { }  /* busy */
    }
    ssi->enable = 0;
    ssi->ctrlr0 = 2 << 21 | 31 << 16 | 3 << 8;  /* words by four wires; first send, then receive */
    ssi->ctrlr1 = 0;
    ssi->spi_ctrlr0 = quad | 2 << 8 | 1;        /* command by one wire, address by four */
    ssi->enable = 1;
    ssi->data = READ_QUAD;
    ssi->data = NO_COMMAND;
    WAIT_FOR((ssi->status & (BIT(2) | BIT(0))) == BIT(2));
    ssi->enable = 0;
    ssi->spi_ctrlr0 = (uint32_t)NO_COMMAND << 24 | quad | 2;
    ssi->enable = 1;
    REG(0xe000ed08) = (uint32_t)vectors;
    __asm__ volatile("msr msp, %0\n bx %1" :: "r"(vectors[0]), "r"(vectors[1]));
    __builtin_unreachable();
}
#endif

/* ---- Clocks and pins ------------------------------------------------------------------------- */

static void release(uint32_t blocks) {          /* from reset; their clocks must run */
    REG(RESETS + CLEAR) = blocks;
    WAIT_FOR((REG(RESETS + 8) & blocks) == blocks);
}

/* Makes 12 MHz * factor / divisor1 / divisor2. */
static void start_pll(uint32_t pll, uint32_t factor, uint32_t divisor1, uint32_t divisor2) {
    REG(pll) = 1;
    REG(pll + 8) = factor;
    REG(pll + 4 + CLEAR) = BIT(0) | BIT(5);
    WAIT_FOR(REG(pll) >> 31);
    REG(pll + 12) = divisor1 << 16 | divisor2 << 12;
    REG(pll + 4 + CLEAR) = BIT(3);
}

static void start(void) {
    REG(XOSC + 0xc) = 47;                       /* 1 ms until the crystal of 12 MHz is stable */
    REG(XOSC) = 0xfabaa0;
    WAIT_FOR(REG(XOSC + 4) >> 31);
    REG(CLOCKS + 0x30) = 2;                     /* the reference clock is the crystal */
    WAIT_FOR(REG(CLOCKS + 0x38) & BIT(2));
    REG(CLOCKS + 0x3c + CLEAR) = 1;             /* the system's clock is that, until the PLL runs */
    WAIT_FOR(REG(CLOCKS + 0x44) & BIT(0));
    release(BASICS);
    start_pll(PLL_SYS, 125, DIVISOR, 2);
    start_pll(PLL_USB, 100, 5, 5);              /* 48 MHz */
    REG(CLOCKS + 0x3c) = 0;                     /* auxiliary source 0: the PLL */
    REG(CLOCKS + 0x3c + SET) = 1;
    WAIT_FOR(REG(CLOCKS + 0x44) & BIT(1));
    REG(CLOCKS + 0x48) = BIT(11);               /* peripherals have the system's clock */
    REG(USB_CLOCK) = BIT(11);                   /* and USB has that of its PLL */
    release(SERIAL);

    const uint32_t divisor = (MHZ * 1000000u * 4 + 57600) / 115200;     /* in 64ths of 16 cycles */
    REG(UART0 + 0x24) = divisor >> 6;
    REG(UART0 + 0x28) = divisor & 63;
    REG(UART0 + 0x2c) = 3 << 5 | BIT(4);        /* 8 bits, with queue */
    REG(UART0 + 0x30) = BIT(8) | BIT(0);        /* on, sending */
    REG(IO_BANK0 + 4) = 2;                      /* GP0: UART0 */
    REG(IO_BANK0 + 8 * LED + 4) = 5;            /* a pin that the program sets */
#ifdef PICO2
    REG(PADS_BANK0 + 4 + CLEAR) = BIT(8);       /* pads are isolated after reset */
    REG(PADS_BANK0 + 4 * LED + 4 + CLEAR) = BIT(8);
#endif
    REG(0xd0000000 + OE_SET) = BIT(LED);
    REG(0xd0000000 + OUT_SET) = BIT(LED);
    usb_start();
}

static void put_byte(char c) {
    usb_put(c);
    WAIT_FOR(!(REG(UART0 + 0x18) & BIT(5)));
    REG(UART0) = (uint8_t)c;
}

void put(const char *text) {
    static int started;
    if (!started) {
        started = 1;
        start();
    }
    for (; *text; text++) {
        if (*text == '\n') put_byte('\r');
        put_byte(*text);
    }
}

void leave(unsigned status) {
    put(status ? "failed\n" : "done\n");
    REG(0xd0000000 + OUT_CLEAR) = BIT(LED);
    for (;;) __asm__ volatile("wfi");         /* USB goes on in its interrupt */
}
