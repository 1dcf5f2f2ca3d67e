/* What every guest of ours begins with: the way in, hypercalls, traps, words on the console.

   An lguest guest is a 32-bit kernel that knows what it is. It starts at `start` with flat segments, in ring 1, with all
   registers zero and every address as it is (no page tables until it asks for some). At address 0 are Linux's boot
   parameters, and in the page behind the only memory region in them are the devices' descriptors. It talks to its host
   by `int 0x1f`, and shares one structure with it, `lguest_data`. Interrupts are a word in that structure, not the CPU's
   flag, and they arrive, like traps, through gates that the host was told of, on the guest's own stack.

   A guest includes this file first and has its beginning at `main`, which gets a good stack and interrupts off. What is
   printed before a console device is driven goes to the host as a string, by hypercall.

   Functions take their arguments in eax, edx, ecx and give their result in eax; they keep esi, edi and ebp.
   GNU as, Intel syntax; built by tools/build-guests. */

        .intel_syntax noprefix

        /* Hypercalls: the number in eax, arguments in ebx, ecx, edx, esi, the result in eax. */
        .set FLUSH_ASYNC, 0
        .set LGUEST_INIT, 1
        .set SHUTDOWN, 2
        .set NEW_PGTABLE, 4
        .set FLUSH_TLB, 5
        .set LOAD_IDT_ENTRY, 6
        .set SET_STACK, 7
        .set SET_TS, 8
        .set SET_CLOCKEVENT, 9
        .set HALT, 10
        .set SET_PTE, 14
        .set SET_PGD, 15
        .set LOAD_TLS, 16
        .set NOTIFY, 17
        .set LOAD_GDT_ENTRY, 18
        .set SEND_INTERRUPTS, 19

        .set POWER_OFF, 1
        .set RESTART, 2

        /* Linux's boot parameters, at address 0. */
        .set E820_ENTRIES, 0x1e8
        .set COMMAND_LINE, 0x228
        .set HARDWARE_SUBARCH, 0x23c
        .set E820, 0x2d0

        .set PAGE, 4096
        .set INTERRUPTS_ON, 0x200       /* in lguest_data's irq_enabled, as in EFLAGS */
        .set FIRST_IRQ, 32              /* interrupt n arrives at vector 32 + n */
        .set IRQS, 32
        .set SYSCALL, 0x80

        .set KERNEL_CS, 0x61
        .set KERNEL_DS, 0x69
        .set USER_CS, 0x73
        .set USER_DS, 0x7b
        .set STUB_SIZE, 16              /* bytes of code that a vector has for itself */
        /* A gate's type, in its high word: an interrupt gate turns interrupts off, a trap gate does not. */
        .set INTERRUPT_GATE, 0x8e00
        .set TRAP_GATE, 0x8f00
        .set FOR_USERS, 0x6000

        /* What a handler finds at [ebp]: the registers as they were. The last two only if a user was interrupted. */
        .set F_EDI, 0
        .set F_ESI, 4
        .set F_EBP, 8
        .set F_EBX, 16
        .set F_EDX, 20
        .set F_ECX, 24
        .set F_EAX, 28
        .set F_VECTOR, 32
        .set F_ERROR, 36
        .set F_EIP, 40
        .set F_CS, 44
        .set F_EFLAGS, 48
        .set F_ESP, 52
        .set F_SS, 56

        /* Arguments may be registers (but ebx as the second or third, ecx as the third) or constants. */
        .macro hypercall number, first, second, third
        .ifnb \third
        mov     edx, \third
        .endif
        .ifnb \second
        mov     ecx, \second
        .endif
        .ifnb \first
        mov     ebx, \first
        .endif
        mov     eax, \number
        int     0x1f
        .endm

        /* Prints a text. */
        .macro say text
        .pushsection .rodata
991:    .asciz  "\text"
        .popsection
        mov     eax, offset 991b
        call    print
        .endm

        /* Prints a text and the number in a register, or a word of memory. */
        .macro say_number text, value
        push    \value
        say     "\text"
        pop     eax
        call    print_decimal
        .endm

        .macro say_hex text, value
        push    \value
        say     "\text"
        pop     eax
        call    print_hex
        .endm

        .text

        .globl  start
start:
        mov     esp, offset stack_top
        /* Nothing but the stack pointer has changed yet: this is how we were started. */
        pushfd
        pushad
        cld
        mov     eax, [E820 + 8]
        mov     memory_end, eax
        hypercall LGUEST_INIT, "offset lguest_data"
        mov     eax, FIRST_IRQ
1:      mov     dword ptr handlers[eax*4], offset nothing_to_do
        inc     eax
        cmp     eax, FIRST_IRQ + IRQS
        jb      1b
        call    load_gates
        hypercall SET_STACK, KERNEL_DS, "offset stack_top", 1
        jmp     main

/* Gates for all traps, all interrupts and a user's system calls. */
load_gates:
        push    esi
        push    edi
        xor     esi, esi
        mov     edi, offset stubs
1:      mov     ecx, INTERRUPT_GATE
        cmp     esi, FIRST_IRQ
        jae     2f
        mov     ecx, TRAP_GATE
        cmp     esi, 14                 /* the address of a page fault is lost at the next one */
        jne     2f
        mov     ecx, INTERRUPT_GATE
2:      mov     edx, edi
        mov     eax, esi
        call    set_gate
        add     edi, STUB_SIZE
        inc     esi
        cmp     esi, FIRST_IRQ + IRQS
        jb      1b
        mov     eax, 3                  /* int3, */
        mov     edx, offset stubs + 3*STUB_SIZE
        mov     ecx, TRAP_GATE | FOR_USERS
        call    set_gate
        mov     eax, 4                  /* into */
        mov     edx, offset stubs + 4*STUB_SIZE
        mov     ecx, TRAP_GATE | FOR_USERS
        call    set_gate
        mov     eax, SYSCALL
        mov     edx, offset system_call
        mov     ecx, TRAP_GATE | FOR_USERS
        call    set_gate
        pop     edi
        pop     esi
        ret

/* Has vector eax arrive at edx through a gate of type ecx. */
set_gate:
        mov     ebx, eax
        mov     eax, edx
        and     edx, 0xffff0000
        or      edx, ecx
        movzx   ecx, ax
        or      ecx, (KERNEL_CS & ~1) << 16
        hypercall LOAD_IDT_ENTRY
        ret

/* Has the traps or interrupts of vector eax handled by edx, a function that finds them at [ebp]. */
set_handler:
        mov     handlers[eax*4], edx
        ret

        .balign STUB_SIZE, 0xcc
stubs:
        .set vector, 0
        .rept   FIRST_IRQ + IRQS
        .balign STUB_SIZE, 0xcc
        /* Some come with an error code. */
        .if     !((vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17))
        push    0
        .endif
        push    vector
        jmp     trapped
        .set vector, vector + 1
        .endr

        .balign STUB_SIZE, 0xcc
system_call:
        push    0
        push    SYSCALL
trapped:
        pushad
        cld
        mov     ebp, esp
        mov     eax, [ebp + F_VECTOR]
        mov     eax, handlers[eax*4]
        test    eax, eax
        jz      unexpected
        call    eax
        /* Where a handler may jump to, with esp at what was pushed above. */
leave_trap:
        popad
        add     esp, 8
        push    eax
        mov     eax, [esp + 12]         /* EFLAGS, whose interrupt flag is as irq_enabled was */
        and     eax, INTERRUPTS_ON
        mov     irq_enabled, eax
        jz      not_interrupted
        cmp     dword ptr irq_pending, 0
        je      not_interrupted
        push    ebx                     /* one waits for just this, and comes now, on top of what we leave */
        push    ecx
        push    edx
        hypercall SEND_INTERRUPTS
        pop     edx
        pop     ecx
        pop     ebx
        jmp     not_interrupted

        /* What is here is not interrupted, though interrupts are on: else the stack might grow for ever. */
        .section .uninterrupted, "ax"
not_interrupted:
        pop     eax
        iretd
        .text

/* The handler of interrupts that do no more than end a halt. */
nothing_to_do:
        ret

/* A trap that nobody expects is the end. */
unexpected:
        say_number "\nUnexpected trap ", "dword ptr [ebp + F_VECTOR]"
        say_hex ", error ", "dword ptr [ebp + F_ERROR]"
        say_hex ", at ", "dword ptr [ebp + F_EIP]"
        say_hex ", CR2 ", "dword ptr fault_address"
        say     "\n"
        mov     eax, offset unexpected_text
        jmp     crash

/* Interrupts on, which delivers those that wait. */
interrupts_on:
        mov     dword ptr irq_enabled, INTERRUPTS_ON
        cmp     dword ptr irq_pending, 0
        je      1f
        hypercall SEND_INTERRUPTS
1:      ret

interrupts_off:
        mov     dword ptr irq_enabled, 0
        ret

/* Waits for an interrupt, also with interrupts off; they are on afterwards. */
halt:
        hypercall HALT
        ret

/* The guest's own end: switched off, */
power_off:
        mov     eax, offset power_off_text
/* or for a reason that its host tells. */
crash:
        hypercall SHUTDOWN, eax, POWER_OFF
        ud2

restart:
        hypercall SHUTDOWN, "offset restart_text", RESTART
        ud2

/* Prints the string at eax (its end is a zero byte), on the console that there is. */
print:
        jmp     [print_function]

/* Prints by hypercall: all of the string at once, whatever devices there are. */
print_early:
        hypercall NOTIFY, eax
        ret

/* Prints eax in decimal. */
print_decimal:
        push    edi
        mov     edi, offset number_end
        mov     ecx, 10
1:      xor     edx, edx
        div     ecx
        add     dl, '0'
        dec     edi
        mov     [edi], dl
        test    eax, eax
        jnz     1b
        mov     eax, edi
        pop     edi
        jmp     print

/* Prints eax in hexadecimal, without leading zeros. */
print_hex:
        push    edi
        mov     edi, offset number_end
1:      mov     edx, eax
        and     edx, 15
        mov     dl, hex_digits[edx]
        dec     edi
        mov     [edi], dl
        shr     eax, 4
        jnz     1b
        mov     eax, edi
        pop     edi
        jmp     print

        .section .rodata
power_off_text:
        .asciz  "Power down"
restart_text:
        .asciz  "Restart"
unexpected_text:
        .asciz  "unexpected trap"
hex_digits:
        .ascii  "0123456789abcdef"

        .data
        .balign 8
/* struct lguest_data. What the host writes: fault_address, time_*, irq_pending, hcall_status, reserve_mem, tsc_khz. */
lguest_data:
irq_enabled:
        .long   0
blocked_interrupts:
        .long   0                       /* one bit each */
fault_address:
        .long   0
time_seconds:
        .long   0
time_nanoseconds:
        .long   0
irq_pending:
        .long   0
hcall_status:
        .fill   64, 1, 0xff             /* 0: to be done */
hcalls:
        .fill   64 * 5, 4, 0
reserve_mem:
        .long   0
tsc_khz:
        .long   0
        /* The instructions in between are not interrupted. */
        .long   uninterrupted_start
        .long   uninterrupted_end
kernel_address:
        .long   0xc0000000
        .long   SYSCALL

print_function:
        .long   print_early
number:
        .fill   11
number_end:
        .byte   0

        .bss
        .balign 4
memory_end:                             /* where the page with the devices' descriptors is */
        .skip   4
handlers:                               /* by vector */
        .skip   (SYSCALL + 1) * 4
        .balign 16
        .skip   8192
stack_top:

        .text
