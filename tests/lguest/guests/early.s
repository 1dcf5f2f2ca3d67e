/* A guest that speaks before it has said who it is. */

        .globl  start
        .intel_syntax noprefix
        .text
start:
        mov     eax, 17                 /* NOTIFY, */
        mov     ebx, offset text        /* of a text */
        int     0x1f
        jmp     start

        .section .rodata
text:
        .asciz  "hello\n"
