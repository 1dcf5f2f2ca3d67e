/* Traps of the kernel's own code: what the host hands on, and what the launcher does instead. */

        .include "runtime.s"
        .include "devices.s"
        .include "scenes.s"

        .set ENTRY, 20                  /* a free segment descriptor */
        .set ABSENT_DATA, 0x00001200    /* one that is not present */
        .set KEYBOARD_STATUS, 0x64

/* Each trap that an instruction can cause, and its error code. */
scene instructions
        call    tell_all_traps
        xor     ecx, ecx
        faults  div ecx
        traps   int3
        mov     al, 0x7f
        add     al, 1
        traps   into
        mov     eax, 3
        faults  bound eax, bounds
        faults  ud2
        hypercall LOAD_GDT_ENTRY, ENTRY, 0, ABSENT_DATA
        mov     eax, ENTRY*8 + 1
        faults  mov fs, eax
        faults  mov ss, eax
        mov     eax, 40*8 + 1           /* there are 32 */
        faults  mov fs, eax
        xor     eax, eax
        faults  mov ss, eax
        ret

/* An exception of the floating point unit. */
scene division
        call    tell_all_traps
        fninit
        fldcw   unmasked
        fldz
        fld1
        fdiv    st, st(1)
        faults  fwait
        ret

/* A trap after each instruction: of those that execute here, five. */
scene steps
        mov     eax, 1
        mov     edx, offset count_step
        call    set_handler
        xor     ebx, ebx
        pushfd
        or      dword ptr [esp], 0x100
        popfd                           /* from the next one on: */
        inc     ebx
        inc     ebx
        pushfd
        and     dword ptr [esp], ~0x100
        popfd                           /* to this one */
        inc     ebx
        say_number "steps ", "dword ptr step_count"
        say     "\n"
        ret

count_step:
        inc     dword ptr step_count
        ret

/* What a kernel must not do at ring 1 is its own problem. */
scene forbidden
        call    tell_all_traps
        faults  hlt
        faults  sti
        faults  rdmsr
        faults  wrmsr
        faults  mov eax, cr0
        faults  mov cr3, eax
        faults  clts
        faults  lgdt bounds
        faults  lidt bounds
        faults  invd
        mov     edx, KEYBOARD_STATUS
        mov     edi, offset result
        faults  insb
        mov     esi, offset result
        faults  outsb
        /* A prefix too many */
        faults  .byte 0x66, 0x66, 0xed
        ret

        /* Prints what \instruction leaves of a recognizable eax. */
        .macro  input instruction:vararg
        mov     eax, 0x12345678
        mov     edx, 0x5678abcd         /* of which the lower half is the port */
        \instruction
        say_hex "\instruction: ", eax
        say     "\n"
        .endm

/* No port has anything, but for the keyboard controller's status; and cli does nothing. */
scene ports
        call    tell_all_traps
        input   in al, 0x70
        input   in ax, 0x70
        input   in eax, 0x70
        input   in al, KEYBOARD_STATUS
        input   in ax, KEYBOARD_STATUS
        input   in eax, KEYBOARD_STATUS
        input   in al, dx
        input   in ax, dx
        input   in eax, dx
        input   out 0x70, al
        input   out 0x70, ax
        input   out 0x70, eax
        input   out dx, al
        input   out dx, ax
        input   out dx, eax
        call    interrupts_on
        cli
        say_hex "after cli: ", "dword ptr irq_enabled"
        say     "\n"
        ret

/* Behind the devices' pages there are registers of none. */
scene registers
        call    tell_all_traps
        mov     ebx, memory_end
        add     ebx, 255 * PAGE
        say_hex "at ", ebx
        say     "\n"
        mov     ebx, memory_end
        add     ebx, 255 * PAGE
        faults  mov eax, [ebx]
        mov     ebx, memory_end
        add     ebx, 255 * PAGE
        faults  mov byte ptr [ebx + 3], 7
        say     "alive\n"
        ret

        .section .rodata
        .balign 8
bounds:
        .long   1, 2
unmasked:
        .word   0x37b                   /* all masked but the division by zero */

        .bss
        .balign 4
result:
        .skip   4
step_count:
        .skip   4
