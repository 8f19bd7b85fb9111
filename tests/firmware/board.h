/* board.h - all that the firmware asks of a board. */
void put(const char *text);             /* writes text */
void leave(unsigned status);            /* ends the program: 0 done, 1 failed; does not return */
