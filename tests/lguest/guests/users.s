/* Users: code in ring 3, its system calls, faults and interruptions.

   Memory is mapped where it is, as the kernel's; the pages between user_start and user_end are the user's, too. A user
   enters at user_esp's top and leaves by its system call 0, or when a handler has it leave. */

        .include "runtime.s"
        .include "devices.s"
        .set USERS, 1
        .include "scenes.s"

        .set PRESENT, 1
        .set WRITABLE, 2
        .set USER, 4
        .set NOWHERE, 0x40000000

        .set LEAVE, 0                   /* system calls: the end, */
        .set TELL, 1                    /* printing ebx, */
        .set SUM, 2                     /* eax = ebx + ecx + edx + esi + edi + ebp */

        .set MILLISECOND, 1000000

        /* Flat segments for ring 3. */
        .set USER_CODE_SEGMENT, 0x00cffa00
        .set USER_DATA_SEGMENT, 0x00cff200

use_tables:
        xor     ecx, ecx
        mov     eax, PRESENT | WRITABLE
1:      mov     edx, eax
        cmp     edx, offset user_start
        jb      2f
        cmp     edx, offset user_end
        jae     2f
        or      edx, USER
2:      mov     low_table[ecx*4], edx
        add     eax, PAGE
        inc     ecx
        cmp     ecx, 1024
        jb      1b
        mov     dword ptr directory, offset low_table + PRESENT + WRITABLE + USER
        hypercall NEW_PGTABLE, "offset directory"
        hypercall LOAD_GDT_ENTRY, "USER_CS >> 3", 0x0000ffff, USER_CODE_SEGMENT
        hypercall LOAD_GDT_ENTRY, "USER_DS >> 3", 0x0000ffff, USER_DATA_SEGMENT
        mov     eax, SYSCALL
        mov     edx, offset on_system_call
        call    set_handler
        hypercall SET_STACK, KERNEL_DS, "offset trap_stack", 2
        ret

/* Has a user execute the code at eax, until it leaves. */
enter_user:
        push    ebp
        push    edi
        push    esi
        mov     kernel_esp, esp
        push    USER_DS
        push    offset user_stack
        push    INTERRUPTS_ON | 2
        push    USER_CS
        push    eax
        mov     eax, USER_DS
        mov     ds, eax
        mov     es, eax
        mov     dword ptr irq_enabled, INTERRUPTS_ON
        iretd

/* The end of a user: back to who had it entered. */
leave_user:
        mov     eax, KERNEL_DS
        mov     ds, eax
        mov     es, eax
        mov     esp, kernel_esp
        pop     esi
        pop     edi
        pop     ebp
        ret

on_system_call:
        mov     eax, [ebp + F_EAX]
        cmp     eax, TELL
        jb      leave_user
        ja      1f
        say_hex "user says ", "dword ptr [ebp + F_EBX]"
        say     "\n"
        ret
1:      mov     eax, [ebp + F_EBX]
        add     eax, [ebp + F_ECX]
        add     eax, [ebp + F_EDX]
        add     eax, [ebp + F_ESI]
        add     eax, [ebp + F_EDI]
        add     eax, [ebp + F_EBP]
        mov     [ebp + F_EAX], eax
        ret

/* System calls: what the kernel sees of the user, and what the user sees of the kernel. */
scene system_calls
        call    use_tables
        mov     eax, offset user_calling
        call    enter_user
        say     "back\n"
        ret

/* The kernel's view of the interrupted user: where its stack begins, what is on it. */
scene frames
        call    use_tables
        mov     eax, SYSCALL
        mov     edx, offset tell_frame
        call    set_handler
        mov     eax, offset user_framing
        call    enter_user
        ret

tell_frame:
        mov     eax, offset trap_stack
        sub     eax, ebp
        say_number "frame of ", eax
        mov     eax, ss
        say_hex "\nss ", eax
        mov     eax, cs
        say_hex "\ncs ", eax
        say_hex "\nuser ss ", "dword ptr [ebp + F_SS]"
        say_hex "\nuser cs ", "dword ptr [ebp + F_CS]"
        mov     eax, offset user_stack
        sub     eax, [ebp + F_ESP]
        say_number "\nuser stack ", eax
        say_hex "\neflags ", "dword ptr [ebp + F_EFLAGS]"
        say_number "\ninterrupts ", "dword ptr irq_enabled"
        say     "\n"
        jmp     leave_user

/* What a user must not do. */
scene user_faults
        call    use_tables
        call    tell_all_traps
        mov     eax, offset user_failing
        call    enter_user
        say     "back\n"
        ret

/* A user that does not let go is interrupted. */
scene preempted
        call    use_tables
        mov     eax, FIRST_IRQ
        mov     edx, offset on_tick
        call    set_handler
        hypercall SET_CLOCKEVENT, MILLISECOND
        mov     eax, offset user_looping
        call    enter_user
        say_number "ticks ", "dword ptr ticks"
        say     "\n"
        ret

on_tick:
        inc     dword ptr ticks
        test    dword ptr [ebp + F_CS], 2
        jz      1f                      /* not in the user, which has not begun */
        cmp     dword ptr ticks, 3
        jae     leave_user
1:      hypercall SET_CLOCKEVENT, MILLISECOND
        ret

/* A page of the user's that comes when it is touched. */
scene user_page_fault
        call    use_tables
        mov     ecx, offset user_lazy
        shr     ecx, 12
        mov     dword ptr low_table[ecx*4], 0
        hypercall SET_PTE, "offset directory", "offset user_lazy", 0
        mov     eax, 14
        mov     edx, offset map_lazy
        call    set_handler
        mov     eax, offset user_touching
        call    enter_user
        ret

map_lazy:
        mov     eax, fault_address
        sub     eax, offset user_lazy
        say_hex "touched ", eax
        say_hex " error ", "dword ptr [ebp + F_ERROR]"
        say     "\n"
        mov     ecx, offset user_lazy
        mov     edx, ecx
        shr     ecx, 12
        or      edx, PRESENT | WRITABLE | USER
        mov     low_table[ecx*4], edx
        mov     ecx, fault_address
        hypercall SET_PTE, "offset directory"
        ret

/* A thread's segment is the user's to load. */
scene user_segment
        call    use_tables
        mov     eax, offset user_data
        mov     thread_entry + 2, ax
        shr     eax, 16
        mov     thread_entry + 4, al
        mov     thread_entry + 7, ah
        hypercall LOAD_TLS, "offset thread_entry", 0
        mov     eax, offset user_with_segment
        call    enter_user
        ret

        .section .user, "ax"
        .balign PAGE, 0xcc
user_start:

user_calling:
        mov     eax, TELL
        mov     ebx, 0x1234
        int     SYSCALL
        mov     eax, SUM
        mov     ebx, 0x10
        mov     ecx, 0x200
        mov     edx, 0x3000
        mov     esi, 0x40000
        mov     edi, 0x500000
        mov     ebp, 0x6000000
        int     SYSCALL
        push    ebp                     /* all is as before, and eax is the sum */
        push    edi
        push    esi
        push    edx
        push    ecx
        push    ebx
        push    eax
        mov     edi, 7
1:      pop     ebx
        mov     eax, TELL
        int     SYSCALL
        dec     edi
        jnz     1b
        mov     eax, LEAVE
        int     SYSCALL

user_framing:
        push    0
        push    0
        int     SYSCALL

user_failing:
        faults  mov eax, [directory]
        faults  mov dword ptr [directory], eax
        faults  mov eax, [NOWHERE]
        faults  mov dword ptr [NOWHERE], eax
        faults  hlt
        faults  cli
        faults  in al, dx
        faults  out 0x70, al
        faults  ud2
        traps   int3
        faults  int 0x1f
        faults  int 0x20
        xor     ecx, ecx
        faults  div ecx
        mov     eax, LEAVE
        int     SYSCALL

user_looping:
        inc     eax
        jmp     user_looping

user_touching:
        mov     eax, [user_lazy + 0x20]
        mov     dword ptr [user_lazy + 0x24], 0x5678
        mov     ebx, [user_lazy + 0x24]
        mov     eax, TELL
        int     SYSCALL
        mov     eax, LEAVE
        int     SYSCALL

user_with_segment:
        mov     eax, 6*8 + 3
        mov     gs, eax
        mov     ebx, gs:[4]
        mov     eax, TELL
        int     SYSCALL
        mov     eax, gs                 /* a system call leaves it alone */
        mov     ebx, eax
        mov     eax, TELL
        int     SYSCALL
        mov     eax, LEAVE
        int     SYSCALL

/* What scenes.s would have elsewhere. */
resume_at:
        .long   0
trap_expected_at:
        .long   0
user_data:
        .long   0xaaaa0000, 0xbbbb1111
        .balign PAGE, 0
user_lazy:
        .skip   PAGE
        .skip   PAGE
user_stack:
user_end:

        .data
        .balign 8
thread_entry:
        .quad   0x0040f2000000ffff, 0x0040f2000000ffff, 0x0040f2000000ffff

        .bss
        .balign PAGE
directory:
        .skip   PAGE
low_table:
        .skip   PAGE
        .skip   2 * PAGE
trap_stack:
kernel_esp:
        .skip   4
ticks:
        .skip   4
