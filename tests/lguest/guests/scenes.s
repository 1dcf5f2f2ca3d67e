/* A guest that plays one of several scenes: the one that its command line names.

   A scene is a function. What it has to say goes to the console, line by line; when it returns, the guest powers off. */

        .macro scene name
        .pushsection .scenes, "a"
        .long   \name, 992f
        .popsection
        .pushsection .rodata
992:    .asciz  "\name"
        .popsection
\name:
        .endm

        .text
main:
        mov     edi, offset scenes_start
1:      cmp     edi, offset scenes_end
        jae     4f
        mov     esi, [edi + 4]
        mov     edx, [COMMAND_LINE]
2:      mov     al, [esi]
        cmp     al, [edx]
        jne     3f
        test    al, al
        jz      5f
        inc     esi
        inc     edx
        jmp     2b
3:      add     edi, 8
        jmp     1b
4:      mov     eax, offset no_scene_text
        jmp     crash
5:      call    [edi]
        jmp     power_off

/* Has all traps told by tell_trap. */
tell_all_traps:
        push    esi
        xor     esi, esi
1:      mov     eax, esi
        mov     edx, offset tell_trap
        call    set_handler
        inc     esi
        cmp     esi, FIRST_IRQ
        jb      1b
        pop     esi
        ret

/* The handler that tells of a trap, and goes on where resume_at says (if it does: once). */
tell_trap:
        say_number "trap ", "dword ptr [ebp + F_VECTOR]"
        say_hex " error ", "dword ptr [ebp + F_ERROR]"
        mov     eax, trap_expected_at
        test    eax, eax
        jz      1f
        cmp     eax, [ebp + F_EIP]
        je      1f
        say_hex " at ", "dword ptr [ebp + F_EIP]"
        say_hex " instead of ", "dword ptr trap_expected_at"
1:      cmp     dword ptr [ebp + F_VECTOR], 14
        jne     2f
        say_hex " address ", "dword ptr fault_address"
2:      say     "\n"
        xor     eax, eax
        mov     trap_expected_at, eax
        xchg    eax, resume_at
        test    eax, eax
        jz      3f
        mov     [ebp + F_EIP], eax
3:      ret

        /* Executes an instruction that faults, and goes on behind it. */
        .macro faults instruction:vararg
        mov     dword ptr trap_expected_at, offset 993f
        mov     dword ptr resume_at, offset 994f
993:    \instruction
994:
        .endm

        /* Executes an instruction that traps when it is done. */
        .macro traps instruction:vararg
        mov     dword ptr trap_expected_at, offset 993f
        \instruction
993:
        .endm

        .section .rodata
no_scene_text:
        .asciz  "there is no such scene"

        .ifndef USERS                   /* else they are where users can write */
        .bss
        .balign 4
resume_at:
        .skip   4
trap_expected_at:
        .skip   4
        .endif

        .text
