/* The checkpoint's bytes, as they are in the file MODEL, in read-only memory. */
    .section .rodata.model, "a"
    .balign 64
    .global checkpoint, checkpoint_end
checkpoint:
    .incbin MODEL
checkpoint_end:
    .byte 0                             /* so that the symbol stays with the section                             */
