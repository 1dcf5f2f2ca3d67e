/* What hypercalls cost, by the time stamp counter: for tools/bench. */

        .include "runtime.s"
        .include "scenes.s"

        .set ROUNDS, 100000

        /* Prints the name of a hypercall and how many counts of the time stamp counter one takes. */
        .macro cost name, number, first, second, third
        rdtsc
        mov     edi, eax
        mov     esi, edx
        mov     ebp, ROUNDS
1:      hypercall \number, "\first", "\second", "\third"
        dec     ebp
        jnz     1b
        rdtsc
        sub     eax, edi
        sbb     edx, esi
        mov     ecx, ROUNDS
        div     ecx
        mov     edi, eax
        say_number "\name ", edi
        say     "\n"
        .endm

scene costs
        say_number "tsc_khz ", "dword ptr tsc_khz"
        say     "\n"
        cost    FLUSH_ASYNC, FLUSH_ASYNC
        cost    TS, SET_TS, 0
        cost    SET_STACK, SET_STACK, KERNEL_DS, "offset stack_top", 1
        cost    LOAD_GDT_ENTRY, LOAD_GDT_ENTRY, 20, 0, 0
        ret
