/* Page tables of the guest's own.

   The first 4 MiB of memory are mapped where they are, and once more at 3 GiB, where a kernel wants to be. What else is
   mapped is up to the scene. Linear addresses below are in pages of their own 4 MiB. */

        .include "runtime.s"
        .include "devices.s"
        .include "scenes.s"

        .set PRESENT, 1
        .set WRITABLE, 2
        .set USER, 4
        .set ACCESSED, 0x20
        .set DIRTY, 0x40

        .set KERNEL, 0xc0000000
        .set WINDOW, 0x40000000         /* linear addresses without a meaning so far, below the kernel's */
        .set KERNEL_WINDOW, 0xd0000000  /* and above */

        /* Has linear address \linear in page directory \tables mean physical address \physical. */
        .macro map tables, linear, physical, flags
        mov     dword ptr \tables[(\linear >> 22)*4], offset window_table + PRESENT + WRITABLE + USER
        mov     eax, \physical
        or      eax, \flags
        mov     window_table[((\linear >> 12) & 1023)*4], eax
        .endm

/* Fills the tables and uses them. */
use_tables:
        xor     ecx, ecx
        mov     eax, PRESENT | WRITABLE
1:      mov     low_table[ecx*4], eax
        add     eax, PAGE
        inc     ecx
        cmp     ecx, 1024
        jb      1b
        /* Behind 4 MiB of memory come the devices' pages, which we need as well. */
        mov     eax, memory_end
        or      eax, PRESENT | WRITABLE
        xor     ecx, ecx
2:      mov     device_table[ecx*4], eax
        add     eax, PAGE
        inc     ecx
        cmp     ecx, 32
        jb      2b
        mov     edi, offset directory
        call    fill_directory
        mov     edi, offset other_directory
        call    fill_directory
        hypercall NEW_PGTABLE, "offset directory"
        ret

fill_directory:
        mov     dword ptr [edi], offset low_table + PRESENT + WRITABLE
        mov     dword ptr [edi + 4], offset device_table + PRESENT + WRITABLE
        mov     dword ptr [edi + (KERNEL >> 22)*4], offset low_table + PRESENT + WRITABLE
        ret

/* From linear to paged memory: everything is in two places. */
scene first_tables
        mov     dword ptr shown, 0x1111
        call    use_tables
        say_hex "low ", "dword ptr shown"
        say_hex "\nhigh ", "dword ptr [shown + KERNEL]"
        mov     dword ptr [shown + KERNEL], 0x2222
        say_hex "\nlow ", "dword ptr shown"
        mov     eax, offset 1f + KERNEL
        call    eax
        say_hex "\nran at ", eax
        say     "\n"
        ret
1:      mov     eax, [esp]
        call    2f
2:      pop     eax
        sub     eax, offset 2b
        ret

/* Page faults: the address, the error code, and the instruction again when the handler has made it possible. */
scene faults_and_repairs
        call    use_tables
        mov     eax, 14
        mov     edx, offset repair
        call    set_handler
        /* A load from nowhere: the handler maps the page, read-only. */
        mov     dword ptr page_a + 0x18, 0xabcdef
        mov     eax, [WINDOW + 0x18]
        say_hex "loaded ", eax
        say     "\n"
        /* A store to it: the handler makes it writable. */
        mov     dword ptr [WINDOW + 0x1c], 0x123456
        say_hex "stored ", "dword ptr page_a + 0x1c"
        say     "\n"
        /* A store to nowhere: for that it takes two faults. */
        mov     dword ptr [WINDOW + PAGE + 8], 0x777
        say_hex "stored ", "dword ptr page_b + 8"
        say     "\n"
        ret

repair:
        say_hex "fault at ", "dword ptr fault_address"
        say_hex " error ", "dword ptr [ebp + F_ERROR]"
        say_hex " interrupts ", "dword ptr irq_enabled"
        say     "\n"
        mov     ecx, fault_address
        shr     ecx, 12
        and     ecx, 1023
        mov     eax, ecx
        shl     eax, 12
        add     eax, offset page_a + PRESENT
        test    dword ptr [ebp + F_ERROR], PRESENT      /* present already, that is: then it was not writable */
        jz      1f
        or      eax, WRITABLE
1:      mov     dword ptr directory[(WINDOW >> 22)*4], offset window_table + PRESENT + WRITABLE
        cmp     dword ptr told_directory, 0
        jne     2f
        mov     dword ptr told_directory, 1
        push    eax
        push    ecx
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        pop     ecx
        pop     eax
2:      mov     window_table[ecx*4], eax
        mov     edx, eax
        mov     ecx, fault_address
        hypercall SET_PTE, "offset directory"
        ret

/* The processor notes in an entry that its page was read or written. */
scene accessed_and_dirty
        call    use_tables
        map     directory, WINDOW, "offset page_a", PRESENT | WRITABLE
        call    told
        mov     eax, [WINDOW]
        call    tell_bits
        mov     [WINDOW], eax
        call    tell_bits
        ret

told:
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        hypercall SET_PTE, "offset directory", WINDOW, "dword ptr window_table"
        ret

tell_bits:
        mov     eax, window_table
        and     eax, ACCESSED | DIRTY
        say_hex "bits ", eax
        say     "\n"
        ret

/* Two directories in which one address means different things. */
scene two_directories
        call    use_tables
        mov     dword ptr page_a, 0xaaaa
        mov     dword ptr page_b, 0xbbbb
        mov     dword ptr directory[(WINDOW >> 22)*4], offset window_table + PRESENT + WRITABLE
        mov     dword ptr window_table, offset page_a + PRESENT + WRITABLE
        mov     dword ptr other_directory[(WINDOW >> 22)*4], offset other_table + PRESENT + WRITABLE
        mov     dword ptr other_table, offset page_b + PRESENT + WRITABLE
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        mov     edi, 3
1:      say_hex "here ", "dword ptr [WINDOW]"
        hypercall NEW_PGTABLE, "offset other_directory"
        say_hex " there ", "dword ptr [WINDOW]"
        say     "\n"
        inc     dword ptr [WINDOW]
        hypercall NEW_PGTABLE, "offset directory"
        dec     edi
        jnz     1b
        /* A change in a directory that is not in use. */
        mov     dword ptr other_table, offset page_c + PRESENT + WRITABLE
        mov     dword ptr page_c, 0xcccc
        hypercall SET_PTE, "offset other_directory", WINDOW, "offset page_c + PRESENT + WRITABLE"
        hypercall NEW_PGTABLE, "offset other_directory"
        say_hex "there ", "dword ptr [WINDOW]"
        say     "\n"
        ret

/* Tables come and go with their directory's entry. */
scene directory_entries
        call    use_tables
        call    tell_all_traps
        faults  mov eax, [WINDOW]
        map     directory, WINDOW, "offset page_a", PRESENT | WRITABLE
        mov     dword ptr page_a, 0xaaaa
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        say_hex "mapped ", "dword ptr [WINDOW]"
        say     "\n"
        mov     dword ptr directory[(WINDOW >> 22)*4], 0
        hypercall SET_PGD, "offset directory", "WINDOW >> 22"
        faults  mov eax, [WINDOW]
        ret

/* What is changed without a word counts when the translations are flushed. */
scene flushes
        call    use_tables
        call    tell_all_traps
        mov     dword ptr page_a, 0xaaaa
        mov     dword ptr page_b, 0xbbbb
        map     directory, WINDOW, "offset page_a", PRESENT | WRITABLE
        mov     dword ptr directory[(KERNEL_WINDOW >> 22)*4], offset window_table + PRESENT + WRITABLE
        hypercall FLUSH_TLB, 1
        say_hex "mapped ", "dword ptr [WINDOW]"
        say_hex " and ", "dword ptr [KERNEL_WINDOW]"
        mov     dword ptr window_table, offset page_b + PRESENT + WRITABLE
        hypercall FLUSH_TLB, 0
        say_hex "\nusers' part ", "dword ptr [WINDOW]"
        hypercall FLUSH_TLB, 1
        say_hex "\nall ", "dword ptr [KERNEL_WINDOW]"
        say     "\n"
        /* One page, as Linux does it: by an entry of zero. */
        mov     dword ptr window_table, offset page_a + PRESENT + WRITABLE
        hypercall SET_PTE, "offset directory", WINDOW, 0
        say_hex "one page ", "dword ptr [WINDOW]"
        say     "\n"
        mov     dword ptr window_table, 0
        hypercall SET_PTE, "offset directory", WINDOW, 0
        faults  mov eax, [WINDOW]
        ret

/* The kernel's part is one for all directories. */
scene kernel_part
        call    use_tables
        mov     dword ptr page_a, 0xaaaa
        mov     dword ptr directory[(KERNEL_WINDOW >> 22)*4], offset window_table + PRESENT + WRITABLE
        mov     dword ptr other_directory[(KERNEL_WINDOW >> 22)*4], offset window_table + PRESENT + WRITABLE
        hypercall SET_PGD, "offset directory", "KERNEL_WINDOW >> 22"
        hypercall SET_PGD, "offset other_directory", "KERNEL_WINDOW >> 22"
        mov     dword ptr window_table, offset page_a + PRESENT + WRITABLE
        hypercall SET_PTE, "offset directory", KERNEL_WINDOW, "offset page_a + PRESENT + WRITABLE"
        say_hex "here ", "dword ptr [KERNEL_WINDOW]"
        hypercall NEW_PGTABLE, "offset other_directory"
        say_hex " there ", "dword ptr [KERNEL_WINDOW]"
        say     "\n"
        ret

/* Code that was changed through another address, and code in a page that now is another one. */
scene changed_code
        call    use_tables
        mov     dword ptr page_a, 0x0001b866    /* mov ax, 1 */
        mov     byte ptr page_a + 4, 0xc3       /* ret */
        mov     dword ptr page_b, 0x0003b866    /* mov ax, 3 */
        mov     byte ptr page_b + 4, 0xc3
        map     directory, WINDOW, "offset page_a", PRESENT | WRITABLE
        call    told
        call    run_window
        mov     byte ptr page_a + 2, 2          /* mov ax, 2 */
        call    run_window
        mov     dword ptr window_table, offset page_b + PRESENT + WRITABLE
        hypercall SET_PTE, "offset directory", WINDOW, "dword ptr window_table"
        call    run_window
        ret

run_window:
        xor     eax, eax
        mov     ecx, WINDOW
        call    ecx
        say_number "code ", eax
        say     "\n"
        ret

/* The registers of devices in paged memory: a page that is mapped behind the devices'. */
scene registers
        call    use_tables
        call    tell_all_traps
        mov     eax, memory_end
        add     eax, 255 * PAGE
        map     directory, WINDOW, eax, PRESENT | WRITABLE
        call    told
        faults  mov eax, [WINDOW + 0x10]
        say     "alive\n"
        ret

        .bss
        .balign PAGE
directory:
        .skip   PAGE
other_directory:
        .skip   PAGE
low_table:
        .skip   PAGE
device_table:
        .skip   PAGE
window_table:
        .skip   PAGE
other_table:
        .skip   PAGE
page_a:
        .skip   PAGE
page_b:
        .skip   PAGE
page_c:
        .skip   PAGE
shown:
        .skip   4
told_directory:
        .skip   4
