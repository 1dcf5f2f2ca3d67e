/* How a guest ends: as it wants, or as its host does with one that asks for nonsense. */

        .include "runtime.s"
        .include "devices.s"
        .include "scenes.s"

        .set PRESENT, 1
        .set WRITABLE, 2
        .set LARGE, 0x80
        .set WINDOW, 0x40000000
        .set NOWHERE, 0x30000000        /* more memory than our guests have */

scene off
        ret

scene crashes
        mov     eax, offset reason
        jmp     crash

/* A reason longer than what the host has room for. */
scene long_reason
        mov     edi, offset buffer
        mov     ecx, 400
        mov     al, 'x'
        rep stosb
        mov     byte ptr [edi], 0
        mov     eax, offset buffer
        jmp     crash

scene reason_nowhere
        mov     eax, NOWHERE
        jmp     crash

scene bad_hypercall
        hypercall 3
        ret

scene large_hypercall
        hypercall 0x7fffffff
        ret

scene bad_hypercall_in_ring
        mov     dword ptr hcalls, 12
        mov     byte ptr hcall_status, 0
        hypercall FLUSH_ASYNC
        ret

scene second_init
        hypercall LGUEST_INIT, "offset lguest_data"
        ret

scene tables_nowhere
        hypercall NEW_PGTABLE, NOWHERE
        mov     eax, [0]
        ret

scene idt_entry_far_away
        hypercall LOAD_IDT_ENTRY, 4000, 0x00600000, INTERRUPT_GATE
        ret

scene task_gate
        hypercall LOAD_IDT_ENTRY, 3, 0x00600000, 0x8500
        ret

scene gdt_entry_far_away
        hypercall LOAD_GDT_ENTRY, 32, 0, 0
        ret

scene stack_of_ring_0
        hypercall SET_STACK, "KERNEL_DS & ~3", "offset stack_top", 1
        ret

scene stack_of_three_pages
        hypercall SET_STACK, KERNEL_DS, "offset stack_top", 3
        ret

scene tls_nowhere
        hypercall LOAD_TLS, NOWHERE, 0
        ret

/* A trap that the guest has no gate for. */
scene no_gate
        mov     eax, 6
        xor     edx, edx
        xor     ecx, ecx
        call    set_gate
        ud2
        ret

/* An access far behind all memory. */
scene wild_load
        mov     eax, [0x90000000]
        ret

scene wild_jump
        mov     eax, 0x90000000
        jmp     eax

/* A trap with no stack to take it on. */
scene no_stack
        mov     esp, 0x90000000
        ud2

        /* Page tables of the guest's own, the first 4 MiB where they are. */
use_tables:
        xor     ecx, ecx
        mov     eax, PRESENT | WRITABLE
1:      mov     low_table[ecx*4], eax
        add     eax, PAGE
        inc     ecx
        cmp     ecx, 1024
        jb      1b
        mov     dword ptr directory, offset low_table + PRESENT + WRITABLE
        mov     dword ptr directory[(WINDOW >> 22)*4], offset window_table + PRESENT + WRITABLE
        hypercall NEW_PGTABLE, "offset directory"
        ret

/* A page table entry for memory that is not there. */
scene bad_entry
        call    use_tables
        mov     dword ptr window_table, NOWHERE | PRESENT | WRITABLE
        hypercall SET_PTE, "offset directory", WINDOW, "NOWHERE | PRESENT | WRITABLE"
        mov     eax, [WINDOW]
        say     "alive\n"
        ret

scene bad_directory_entry
        call    use_tables
        mov     dword ptr directory[(WINDOW >> 22)*4], NOWHERE | PRESENT | WRITABLE
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        mov     eax, [WINDOW]
        say     "alive\n"
        ret

/* Pages of 4 MiB, which a guest was told not to use. */
scene large_page
        call    use_tables
        mov     dword ptr directory[(WINDOW >> 22)*4], PRESENT | WRITABLE | LARGE
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        mov     eax, [WINDOW]
        say     "alive\n"
        ret

/* A page fault whose handler's stack is not there, either. */
scene stack_faults
        call    use_tables
        mov     esp, WINDOW + PAGE
        push    eax
        say     "alive\n"
        ret

/* The code that is running is not there any more. */
scene code_vanishes
        call    use_tables
        mov     dword ptr directory, 0
        hypercall SET_PGD, "offset directory", 0
        say     "alive\n"
        ret

/* Asleep for good: the person in front of it has to end it. */
scene sleeps
        mov     dword ptr blocked_interrupts, 0xffffffff
        say     "asleep\n"
        call    halt
        say     "alive\n"
        ret

/* Awake for good, with interrupts off. */
scene loops
        say     "looping\n"
1:      jmp     1b

        .section .rodata
reason:
        .asciz  "the sky is falling"

        .bss
        .balign PAGE
directory:
        .skip   PAGE
low_table:
        .skip   PAGE
window_table:
        .skip   PAGE
buffer:
        .skip   512
