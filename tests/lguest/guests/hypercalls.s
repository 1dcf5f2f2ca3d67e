/* How a guest is started, and hypercalls: one by one and from the ring. */

        .include "runtime.s"
        .include "scenes.s"

        .set HCALL_BYTES, 20
        .set HCALLS, 64
        /* Segment descriptors: present, data or code, for ring 0; 32 bits. */
        .set DATA_SEGMENT, 0x00409200
        .set CODE_SEGMENT, 0x00cf9a00
        .set USER_DATA, 0x0040f200
        .set ENTRY, 20                  /* a free one */

/* The registers as the host set them, which `start` has put on the stack before anything else. */
scene entry
        mov     esi, offset stack_top - 4
        say_hex "eflags ", "dword ptr [esi]"
        say     "\nregisters"
        mov     edi, 8
1:      sub     esi, 4
        cmp     edi, 4                  /* pushad's esp is ours */
        je      2f
        say_hex " ", "dword ptr [esi]"
2:      dec     edi
        jnz     1b
        mov     eax, cs
        say_hex "\ncs ", eax
        mov     eax, ds
        say_hex "\nds ", eax
        mov     eax, es
        say_hex "\nes ", eax
        mov     eax, ss
        say_hex "\nss ", eax
        movzx   eax, byte ptr [E820_ENTRIES]
        say_number "\nregions ", eax
        say_number "\nmemory ", "dword ptr [E820 + 8]"
        say_number "\nsubarchitecture ", "dword ptr [HARDWARE_SUBARCH]"
        say     "\n"
        ret

/* What LGUEST_INIT has filled in. */
scene init
        say_hex "reserve_mem ", "dword ptr reserve_mem"
        say_number "\ntsc_khz ", "dword ptr tsc_khz"
        say_number "\nseconds ", "dword ptr time_seconds"
        say_number "\nnanoseconds ", "dword ptr time_nanoseconds"
        say_number "\nirq_enabled ", "dword ptr irq_enabled"
        say_number "\nirq_pending ", "dword ptr irq_pending"
        say     "\n"
        ret

/* All registers but eax are as before, and so are the flags. */
scene preserved
        mov     ebx, 0
        mov     ecx, 0x22222222
        mov     edx, 0x33333333
        mov     esi, 0x44444444
        mov     edi, 0x55555555
        mov     ebp, 0x66666666
        mov     stack_before, esp
        mov     eax, FLUSH_ASYNC
        std
        stc
        int     0x1f
        pushfd
        cld
        push    ebp
        push    edi
        push    esi
        push    edx
        push    ecx
        push    ebx
        say     "registers"
        mov     edi, 6
1:      pop     eax
        say_hex " ", eax
        dec     edi
        jnz     1b
        pop     eax
        and     eax, 0x401
        say_hex "\nflags ", eax
        xor     eax, eax
        cmp     esp, stack_before
        sete    al
        say_number "\nsame stack ", eax
        say     "\n"
        ret

        /* Puts a call into entry \number of the ring. */
        .macro ring number, call, first, second, third
        mov     dword ptr hcalls[\number * HCALL_BYTES], \call
        mov     dword ptr hcalls[\number * HCALL_BYTES + 4], \first
        mov     dword ptr hcalls[\number * HCALL_BYTES + 8], \second
        mov     dword ptr hcalls[\number * HCALL_BYTES + 12], \third
        mov     byte ptr hcall_status[\number], 0
        .endm

/* How many calls in the ring wait; in eax. */
waiting:
        xor     eax, eax
        xor     ecx, ecx
1:      cmp     byte ptr hcall_status[ecx], 0xff
        je      2f
        inc     eax
2:      inc     ecx
        cmp     ecx, HCALLS
        jb      1b
        ret

/* Calls in the ring are made before the next direct one, in order. */
scene ring
        ring    0, NOTIFY, "offset one_text", 0, 0
        ring    1, LOAD_GDT_ENTRY, ENTRY, 0x0000ffff, 0x004f9200
        ring    2, NOTIFY, "offset two_text", 0, 0
        ring    3, NOTIFY, "offset three_text", 0, 0
        ring    5, NOTIFY, "offset five_text", 0, 0
        hypercall FLUSH_ASYNC
        call    waiting
        say_number "\nbehind the gap ", eax
        lar     eax, word ptr entry_selector
        jz      1f
        xor     eax, eax
1:      say_hex "\nsegment ", eax
        say     "\n"
        ring    4, NOTIFY, "offset four_text", 0, 0
        hypercall NOTIFY, "offset six_text"
        call    waiting
        say_number "\nleft ", eax
        say     "\n"
        ret

/* A ring full of calls, from where the host is now: all are made, around its end. */
scene full_ring
        ring    0, LOAD_GDT_ENTRY, ENTRY, 0, 0
        ring    1, LOAD_GDT_ENTRY, ENTRY, 0, 0
        hypercall FLUSH_ASYNC
        mov     edi, 2
        mov     esi, offset letters
1:      imul    ecx, edi, HCALL_BYTES
        mov     dword ptr hcalls[ecx], NOTIFY
        mov     dword ptr hcalls[ecx + 4], esi
        mov     byte ptr hcall_status[edi], 0
        add     esi, 2
        inc     edi
        and     edi, HCALLS - 1
        cmp     edi, 2
        jne     1b
        hypercall FLUSH_ASYNC
        call    waiting
        say_number "\nleft ", eax
        say     "\n"
        ret

/* While TS is set, the first instruction for the floating point unit is a trap. */
scene floating_point
        mov     eax, 7
        mov     edx, offset lend_unit
        call    set_handler
        fninit
        fild    dword ptr nine
        fsqrt
        fistp   dword ptr result
        say_number "without ", "dword ptr result"
        say     "\n"
        hypercall SET_TS, 1
        fild    dword ptr sixteen
        fsqrt
        fistp   dword ptr result
        say_number "with ", "dword ptr result"
        say     "\n"
        /* Its registers survive all that may come between two instructions. */
        fild    dword ptr nine
        fild    dword ptr sixteen
        hypercall SET_TS, 0
        call    tell_all_traps
        traps   int3
        hypercall SEND_INTERRUPTS
        fistp   dword ptr result
        say_number "kept ", "dword ptr result"
        fistp   dword ptr result
        say_number " ", "dword ptr result"
        say     "\n"
        ret

lend_unit:
        say     "trap 7\n"
        hypercall SET_TS, 0
        ret

/* A segment of our own: its privilege level and its accessed bit are the host's doing. */
scene segments
        mov     eax, offset window
        mov     ecx, eax
        shl     ecx, 16
        or      ecx, 0xffff
        mov     edx, eax
        shr     edx, 16
        and     eax, 0xff000000
        and     edx, 0xff
        or      edx, eax
        or      edx, DATA_SEGMENT
        hypercall LOAD_GDT_ENTRY, ENTRY
        mov     eax, ENTRY*8 + 1
        mov     fs, eax
        mov     eax, fs:[4]
        say_hex "window ", eax
        lar     eax, word ptr entry_selector
        and     eax, 0xff00
        say_hex "\naccess ", eax
        hypercall LOAD_GDT_ENTRY, ENTRY + 1, 0x0000ffff, CODE_SEGMENT
        call    fword ptr far_away
        say_hex "\nback in ", cs
        say     "\n"
        /* These four are the host's own. */
        hypercall LOAD_GDT_ENTRY, 10, 0, 0
        hypercall LOAD_GDT_ENTRY, 11, 0, 0
        hypercall LOAD_GDT_ENTRY, 16, 0, 0
        hypercall LOAD_GDT_ENTRY, 31, 0, 0
        say     "alive\n"
        ret

in_other_segment:
        say_hex "\ncode in ", cs
        retf

/* A thread's three segments. */
scene thread_segments
        mov     eax, offset window
        mov     edx, offset thread_entries
        call    set_base
        add     eax, 4
        add     edx, 8
        call    set_base
        add     eax, 4
        add     edx, 8
        call    set_base
        hypercall LOAD_TLS, "offset thread_entries", 0
        mov     esi, 6
1:      lea     eax, [esi*8 + 3]
        mov     gs, eax
        mov     eax, gs:[0]
        say_hex "window ", eax
        say     "\n"
        inc     esi
        cmp     esi, 9
        jb      1b
        ret

/* The segment at edx begins at eax. */
set_base:
        mov     [edx + 2], ax
        mov     ecx, eax
        shr     ecx, 16
        mov     [edx + 4], cl
        mov     [edx + 7], ch
        ret

/* A gate may be changed at any time. Those of four vectors are not the guest's. */
scene gates
        call    tell_all_traps
        traps   int3
        mov     eax, 3
        mov     edx, offset other_breakpoint
        mov     ecx, TRAP_GATE | FOR_USERS
        call    set_gate
        int3
        mov     eax, 2
        mov     edx, offset other_breakpoint
        mov     ecx, TRAP_GATE
        call    set_gate
        mov     eax, 8
        mov     edx, offset other_breakpoint
        mov     ecx, TRAP_GATE
        call    set_gate
        mov     eax, 15
        mov     edx, offset other_breakpoint
        mov     ecx, TRAP_GATE
        call    set_gate
        mov     eax, 31
        mov     edx, offset other_breakpoint
        mov     ecx, TRAP_GATE
        call    set_gate
        say     "alive\n"
        ret

other_breakpoint:
        pushad
        say     "another gate\n"
        popad
        iretd

        .section .rodata
one_text:
        .asciz  "one "
two_text:
        .asciz  "two "
three_text:
        .asciz  "three "
four_text:
        .asciz  "four "
five_text:
        .asciz  "five "
six_text:
        .asciz  "six "
letters:
        .irpc   letter, abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-
        .asciz  "\letter"
        .endr
        .balign 4
entry_selector:
        .long   ENTRY*8 + 1
nine:
        .long   9
sixteen:
        .long   16
far_away:
        .long   in_other_segment
        .word   (ENTRY + 1)*8 + 1
        .balign 4
window:
        .long   0xaaaa0000, 0xbbbb1111, 0xcccc2222

        .data
        .balign 8
thread_entries:
        .quad   USER_DATA << 32 | 0xffff
        .quad   USER_DATA << 32 | 0xffff
        .quad   USER_DATA << 32 | 0xffff

        .bss
        .balign 4
stack_before:
        .skip   4
result:
        .skip   4
