/* pico.h - what the two files of the Raspberry Pi Pico share: registers, and the text on USB. */
#include <stdint.h>

#define REG(address) (*(volatile uint32_t *)(address))
#define SET 0x2000              /* an alias of a register in which ones set bits */
#define CLEAR 0x3000            /* and one in which they clear bits */
#define BIT(n) (1u << (n))

void usb_start(void);           /* the board becomes visible; the clock of 48 MHz must run */
void usb_put(char c);           /* adds to the text; returns at once, with or without a host */
