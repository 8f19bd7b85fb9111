/* usb.c - the Pico's text on its USB socket, as a serial port (class CDC ACM) that Linux, macOS and
 * Windows know without a driver.
 *
 * The story does not wait for a host. The newest KEPT bytes of the text stay in RAM, and a terminal
 * that opens the port, early or late, reads them from the first on. All work is done in the
 * interrupt of the USB controller, which comes when the host has done something; usb_put causes it,
 * too, as there is something to send.
 *
 * The registers are those of the two data sheets ("RP2040", 4.1; "RP2350", 12.7), the requests and
 * descriptors those of "USB 2.0", chapter 9, and of "CDC" 1.2 with its part "PSTN". What erratum E5
 * of the RP2040 asks of programs is not done: revisions B0 and B1 may stay unseen on a busy hub.
 */
#include "pico.h"

enum { MEMORY = 0x50100000, USB = 0x50110000, ADDRESS = USB, MAIN_CONTROL = USB + 0x40,
       SIE_CONTROL = USB + 0x4c, SIE_STATUS = USB + 0x50, BUFFER_STATUS = USB + 0x58,
       STALL_ARM = USB + 0x68, MUXING = USB + 0x74, POWER = USB + 0x78, INTERRUPTS = USB + 0x90 };
#define BUS_RESET BIT(19)               /* in SIE_STATUS */
#define SETUP BIT(17)
#define NVIC_ENABLE 0xe000e100
#define NVIC_PEND 0xe000e200
#define VECTORS 0xe000ed08
#ifdef PICO2
enum { IRQ = 14 };
#else
enum { IRQ = 5 };
#endif

/* ---- What the host reads about the board ----------------------------------------------------- */

enum { DEVICE = 1, CONFIGURATION, STRING, INTERFACE, ENDPOINT, ASSOCIATION = 11, CLASS = 0x24 };
enum { PACKET = 64 };
#define TWO(n) (n) & 255, (n) >> 8

/* Vendor and product are the numbers that pid.codes lends to everybody for tests; a device that is
 * sold or given away needs its own. */
static const uint8_t device[] = {
    18, DEVICE, TWO(0x200), 0xef, 2, 1, PACKET,     /* USB 2.0; interfaces are grouped */
    TWO(0x1209), TWO(0x0001), TWO(0x0100),          /* vendor, product, version */
    0, 1, 0, 1                                      /* string 1 is the name; 1 configuration */
};

static const uint8_t configuration[] = {
    9, CONFIGURATION, TWO(75), 2, 1, 0, 0x80, 50,   /* 75 bytes, 2 interfaces, 100 mA */
    8, ASSOCIATION, 0, 2, 2, 2, 0, 0,               /* both are one serial port */
    9, INTERFACE, 0, 0, 1, 2, 2, 0, 0,              /* control: class 2.2 (ACM), 1 endpoint */
    5, CLASS, 0, TWO(0x110),                        /* CDC 1.1 */
    5, CLASS, 1, 0, 1,                              /* no calls; data are in interface 1 */
    4, CLASS, 2, 2,                                 /* knows line coding and line state */
    5, CLASS, 6, 0, 1,                              /* interface 0 controls interface 1 */
    7, ENDPOINT, 0x81, 3, TWO(8), 255,              /* notices, of which there are none */
    9, INTERFACE, 1, 0, 2, 10, 0, 0, 0,             /* data: 2 endpoints */
    7, ENDPOINT, 0x82, 2, TWO(PACKET), 0,
    7, ENDPOINT, 0x02, 2, TWO(PACKET), 0
};

static const uint8_t languages[] = { 4, STRING, TWO(0x0409) };
static const uint8_t name[] = { 16, STRING,
                                'b', 0, 'a', 0, 's', 0, 'e', 0, 'd', 0, '.', 0, 'c', 0 };

static uint8_t line_coding[7] = { TWO(115200 & 0xffff), 115200 >> 16, 0, 0, 0, 8 };
static const uint8_t zeros[2] = { 0, 0 }, one[1] = { 1 };

/* ---- Endpoints ------------------------------------------------------------------------------- */

/* Both directions of endpoint n are numbers 2 n (to the host) and 2 n + 1 (from it), as everywhere
 * in the controller. */
enum { CONTROL_IN, CONTROL_OUT, NOTICE_IN, TEXT_IN = 4, TEXT_OUT, ENDPOINTS };
#define ENDPOINT_CONTROL(e) REG(MEMORY + 4 * (e))
#define BUFFER_CONTROL(e) REG(MEMORY + 0x80 + 4 * (e))
#define FULL BIT(15)                    /* in BUFFER_CONTROL */
#define DATA1 BIT(13)
#define STALL BIT(11)
#define AVAILABLE BIT(10)

static uint32_t next_data[ENDPOINTS];   /* DATA1 or 0: the packets of an endpoint alternate */

static uint32_t buffer_offset(int e) { return e < NOTICE_IN ? 0x100 : 0x100 + 64 * (uint32_t)e; }

/* Lets the controller send n bytes, or receive n at most. */
static void transfer(int e, const uint8_t *data, unsigned n) {
    volatile uint8_t *buffer = (volatile uint8_t *)(MEMORY + buffer_offset(e));
    for (unsigned i = 0; data && i < n; i++) buffer[i] = data[i];
    const uint32_t control = n | next_data[e] | (e & 1 ? 0 : FULL);
    next_data[e] ^= DATA1;
    BUFFER_CONTROL(e) = control;
    /* The controller's clock is slower and must see the rest before this bit. */
    for (int i = 0; i < 4; i++) __asm__ volatile("nop\n nop\n nop");
    BUFFER_CONTROL(e) = control | AVAILABLE;
}

/* Endpoint e from the beginning: nothing to send, the next packet is DATA0. */
static void restart(int e) {
    const uint32_t kind = e < TEXT_IN ? 3 : 2;      /* by interrupt, or in bulk */
    ENDPOINT_CONTROL(e) = BIT(31) | BIT(29) | kind << 26 | buffer_offset(e);
    BUFFER_CONTROL(e) = 0;
    next_data[e] = 0;
    if (e == TEXT_OUT) transfer(e, 0, PACKET);
}

/* ---- The text -------------------------------------------------------------------------------- */

enum { KEPT = 4096 };                   /* a power of two */
static volatile char text[KEPT];
static volatile uint32_t written;       /* bytes, from the beginning of the story */
static uint32_t sent;
static int open, sending;               /* a terminal has the port; a packet is on its way */

/* The next packet. It is never full, because a full one says that more follows at once. */
static void send_text(void) {
    uint8_t packet[PACKET - 1];
    unsigned n = 0;
    if (!open || sending) return;
    if (written - sent > KEPT) sent = written - KEPT;
    while (n < sizeof packet && sent != written) packet[n++] = (uint8_t)text[sent++ % KEPT];
    if (n == 0) return;
    sending = 1;
    transfer(TEXT_IN, packet, n);
}

void usb_put(char c) {
    text[written % KEPT] = c;
    written++;
    REG(NVIC_PEND) = BIT(IRQ);
}

/* ---- Requests -------------------------------------------------------------------------------- */

static int to_host;                     /* the request asks for data */
static const uint8_t *answer;           /* and this is left to send of them */
static unsigned answer_bytes;
static uint32_t address;                /* which the board takes when the request is done */

/* The next packet of the answer. No answer has a multiple of 64 bytes, so the last one is short. */
static void send_answer(void) {
    const unsigned n = answer_bytes < PACKET ? answer_bytes : PACKET;
    transfer(CONTROL_IN, answer, n);
    answer += n;
    answer_bytes -= n;
}

#define ANSWER(array) (answer = (array), answer_bytes = sizeof (array))

static void configure(void) {
    for (int e = NOTICE_IN; e < ENDPOINTS; e++) restart(e);
    open = sending = 0;
}

static void clear_halt(unsigned endpoint) {
    const int e = (int)(endpoint & 15) * 2 + !(endpoint & 0x80);
    if (e == TEXT_IN) sending = 0;
    if (e >= NOTICE_IN && e < ENDPOINTS) restart(e);
}

static void set_line_state(unsigned state) {
    if (!open) sent = 0;
    open = state & 1;                   /* the line DTR: a terminal is ready */
}

/* Does what a request asks; returns 0 if that is unknown. */
static int request(unsigned type, unsigned code, unsigned value, unsigned index) {
    switch ((type & 0xe0) << 8 | code) {            /* direction and kind, code */
    case 0x8000: ANSWER(zeros); break;              /* GET_STATUS */
    case 0x0001: clear_halt(index); break;          /* CLEAR_FEATURE */
    case 0x0005: address = value & 127; break;      /* SET_ADDRESS */
    case 0x8006:                                    /* GET_DESCRIPTOR */
        if (value == DEVICE << 8) ANSWER(device);
        else if (value == CONFIGURATION << 8) ANSWER(configuration);
        else if (value == STRING << 8) ANSWER(languages);
        else if (value == (STRING << 8 | 1)) ANSWER(name);
        else return 0;
        break;
    case 0x8008: ANSWER(one); break;                /* GET_CONFIGURATION */
    case 0x0009: configure(); break;                /* SET_CONFIGURATION */
    case 0x800a: ANSWER(zeros); break;              /* GET_INTERFACE */
    case 0x000b: configure(); break;                /* SET_INTERFACE */
    case 0x2020: break;                             /* SET_LINE_CODING: finish reads it */
    case 0xa021: ANSWER(line_coding); break;        /* GET_LINE_CODING */
    case 0x2022: set_line_state(value); break;      /* SET_CONTROL_LINE_STATE */
    default: return 0;
    }
    return 1;
}

static void setup(void) {
    const volatile uint8_t *p = (const volatile uint8_t *)MEMORY;
    const unsigned length = p[6] | (unsigned)p[7] << 8;
    next_data[CONTROL_IN] = next_data[CONTROL_OUT] = DATA1;
    to_host = p[0] >> 7;
    if (!request(p[0], p[1], p[2] | (unsigned)p[3] << 8, p[4] | (unsigned)p[5] << 8)) {
        REG(STALL_ARM) = BIT(CONTROL_IN) | BIT(CONTROL_OUT);
        BUFFER_CONTROL(CONTROL_IN) = STALL;
        BUFFER_CONTROL(CONTROL_OUT) = STALL;
    } else if (to_host) {
        if (answer_bytes > length) answer_bytes = length;
        send_answer();
    } else if (length) {
        transfer(CONTROL_OUT, 0, PACKET);
    } else {
        transfer(CONTROL_IN, 0, 0);
    }
}

/* What follows when a packet of a request has reached the other side. */
static void finish(int e) {
    if (to_host && e == CONTROL_IN) {
        if (answer_bytes) send_answer();
        else transfer(CONTROL_OUT, 0, 0);               /* the host says that it has all */
    } else if (!to_host && e == CONTROL_IN) {
        REG(ADDRESS) = address;
    } else if (!to_host) {
        const volatile uint8_t *data = (const volatile uint8_t *)(MEMORY + buffer_offset(e));
        for (unsigned i = 0; i < sizeof line_coding; i++) line_coding[i] = data[i];
        transfer(CONTROL_IN, 0, 0);
    }
}

/* ---- The interrupt --------------------------------------------------------------------------- */

static void interrupt(void) {
    const uint32_t done = REG(BUFFER_STATUS), status = REG(SIE_STATUS);
    REG(BUFFER_STATUS) = done;
    if (done & BIT(CONTROL_IN)) finish(CONTROL_IN);
    if (done & BIT(CONTROL_OUT)) finish(CONTROL_OUT);
    if (done & BIT(TEXT_IN)) sending = 0;
    if (done & BIT(TEXT_OUT)) transfer(TEXT_OUT, 0, PACKET);    /* what is typed is not read */
    if (status & BUS_RESET) {
        REG(SIE_STATUS) = BUS_RESET;
        REG(ADDRESS) = 0;
        address = 0;
        open = 0;
    }
    if (status & SETUP) {
        REG(SIE_STATUS) = SETUP;
        setup();
    }
    send_text();
}

/* No other exception is expected: one would stop the board. */
static void (*const vectors[16 + IRQ + 1])(void) __attribute__((aligned(256))) = {
    [16 + IRQ] = interrupt
};

void usb_start(void) {
    for (uint32_t at = 0; at < 0x100; at += 4) REG(MEMORY + at) = 0;    /* all of the control */
    REG(VECTORS) = (uint32_t)vectors;
    REG(NVIC_ENABLE) = BIT(IRQ);
    REG(MUXING) = BIT(3) | BIT(0);      /* the pins of the socket */
    REG(POWER) = BIT(3) | BIT(2);       /* there is a bus, as the board has power */
    REG(MAIN_CONTROL) = 1;              /* on, as a device */
    REG(INTERRUPTS) = BIT(16) | BIT(12) | BIT(4);       /* setup, reset, a buffer is done */
    REG(SIE_CONTROL) = BIT(29) | BIT(16);   /* interrupt for each packet of requests; visible */
}
