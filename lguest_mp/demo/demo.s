/* The guest of `lguest --demo`: greets, shows what it finds on its descriptor page, draws random numbers, reads its disk,
   and then sits at the console with a clock until it is told to go.

   All it knows of devices is in devices.s, and of being an lguest guest in runtime.s. */

        .include "runtime.s"
        .include "devices.s"

        .set LINE, 512                  /* how long a line of output may be, */
        .set TYPED, 256                 /* or of input */
        .set SECOND, 1000000000         /* nanoseconds */
        .set END_OF_INPUT, 4            /* ^D */
        .set BACKSPACE, 8
        .set RUBOUT, 127
        .set ESCAPE, 27

main:
        call    open_console
        mov     eax, FIRST_IRQ          /* the timer's */
        mov     edx, offset on_tick
        call    set_handler
        call    interrupts_on
        call    greet
        call    show_devices
        call    show_random
        call    show_disk
        say     "\nType something, and end it with Enter. On an empty line: r for random numbers, d for the disk,\n"
        say     "b to boot again, c to crash, q to power off.\n\n"
        hypercall SET_CLOCKEVENT, SECOND
        call    draw
        /* The rest of its life: something typed, or a second gone. */
        mov     eax, offset input_queue
        call    receive_some
1:      call    interrupts_off
        mov     eax, offset input_queue
        call    is_used
        jne     2f
        cmp     dword ptr ticked, 0
        jne     3f
        call    halt
        jmp     1b
2:      call    interrupts_on
        mov     eax, offset input_queue
        call    take_used
        call    typed
        mov     eax, offset input_queue
        call    receive_some
        jmp     1b
3:      mov     dword ptr ticked, 0
        call    interrupts_on
        call    draw
        jmp     1b

on_tick:
        mov     dword ptr ticked, 1
        hypercall SET_CLOCKEVENT, SECOND
        ret

/* The console */

open_console:
        mov     eax, CONSOLE
        call    find_device
        test    eax, eax
        jz      1f
        push    eax
        xor     edx, edx
        call    start_device
        mov     eax, [esp]
        xor     edx, edx
        mov     ecx, offset input_queue
        call    open_queue
        pop     eax
        mov     edx, 1
        mov     ecx, offset output_queue
        call    open_queue
        mov     dword ptr print_function, offset print_console
        ret
1:      mov     eax, offset no_console_text
        jmp     crash

/* Gives the queue at eax its one buffer for what is typed. */
receive_some:
        mov     edx, [eax + Q_RING]
        describe edx, 0, "offset input", TYPED, FOR_DEVICE_TO_WRITE
        xor     edx, edx
        push    eax
        call    submit
        pop     eax
        jmp     kick

/* Prints the string at eax, as soon as its line is complete. */
print_console:
        push    esi
        mov     esi, eax
1:      lodsb
        test    al, al
        jz      3f
        cmp     al, '\n'
        jne     2f
        mov     al, '\r'
        call    put
        mov     al, '\n'
        call    put
        call    flush
        jmp     1b
2:      call    put
        jmp     1b
3:      pop     esi
        ret

put:
        mov     ecx, line_length
        mov     line[ecx], al
        inc     ecx
        mov     line_length, ecx
        cmp     ecx, LINE
        je      flush
        ret

flush:
        xor     edx, edx
        xchg    edx, line_length
        test    edx, edx
        jz      1f
        mov     ecx, offset line
        mov     eax, offset output_queue
        call    send
1:      ret

/* What was typed: edx bytes at input. */
typed:
        push    esi
        push    edi
        mov     esi, offset input
        lea     edi, [esi + edx]
1:      cmp     esi, edi
        jae     2f
        lodsb
        call    typed_one
        jmp     1b
2:      call    draw
        pop     edi
        pop     esi
        ret

/* The key al. */
typed_one:
        mov     ecx, text_length
        cmp     al, '\r'
        je      typed_line
        cmp     al, '\n'
        je      typed_line
        cmp     al, BACKSPACE
        je      rub_out
        cmp     al, RUBOUT
        je      rub_out
        test    ecx, ecx
        jz      command
add_typed:
        cmp     al, ' '
        jb      1f
        cmp     ecx, TYPED
        je      1f
        mov     text[ecx], al
        inc     dword ptr text_length
1:      ret

rub_out:
        jecxz   1f
        dec     dword ptr text_length
1:      ret

typed_line:
        jecxz   1f
        mov     byte ptr text[ecx], 0
        call    draw
        say     "\nYou typed: "
        mov     eax, offset text
        call    print
        mov     dword ptr text_length, 0
        say     "\n"
1:      ret

/* The first key of a line. */
command:
        mov     edx, offset commands
1:      cmp     byte ptr [edx], 0
        je      add_typed
        cmp     al, [edx]
        je      2f
        add     edx, 5
        jmp     1b
2:      push    edx
        say     "\n"
        pop     edx
        jmp     [edx + 1]

/* Draws the line with the clock and what is typed. */
draw:
        say     "\r["
        mov     eax, time_seconds
        xor     edx, edx
        mov     ecx, 24 * 60 * 60
        div     ecx
        mov     eax, edx
        xor     edx, edx
        mov     ecx, 60 * 60
        div     ecx
        push    edx
        call    print_two_digits
        say     ":"
        pop     eax
        xor     edx, edx
        mov     ecx, 60
        div     ecx
        push    edx
        call    print_two_digits
        say     ":"
        pop     eax
        call    print_two_digits
        say     "] "
        mov     ecx, text_length
        mov     byte ptr text[ecx], 0
        mov     eax, offset text
        call    print
        say     "\033[K"                /* and nothing to the right of it */
        jmp     flush

print_two_digits:
        cmp     eax, 10
        jae     print_decimal
        push    eax
        say     "0"
        pop     eax
        jmp     print_decimal

/* Its ends */

leave:
        say     "Good bye.\n"
        jmp     power_off

boot_again:
        say     "Booting again.\n"
        jmp     restart

crash_now:
        mov     eax, offset crash_text
        jmp     crash

/* What it finds */

greet:
        say     "\nHello. I am lguest's demo: a guest of a few kilobytes that knows what it is, in ring 1 of a machine with\n"
        mov     eax, memory_end
        shr     eax, 20
        call    print_decimal
        say     " MiB of memory"
        mov     eax, tsc_khz
        test    eax, eax
        jz      1f
        xor     edx, edx
        mov     ecx, 1000
        div     ecx
        push    eax
        say     " and a time stamp counter of "
        pop     eax
        call    print_decimal
        say     " MHz"
1:      say     ".\n"
        mov     eax, [COMMAND_LINE]
        cmp     byte ptr [eax], 0
        je      2f
        push    eax
        say     "I was told: "
        pop     eax
        call    print
        say     "\n"
2:      ret

/* Lists the descriptors. */
show_devices:
        push    esi
        push    edi
        say_hex "\nMy devices, by the descriptors at 0x", "dword ptr memory_end"
        say     ":\n"
        mov     esi, memory_end
1:      movzx   eax, byte ptr [esi + D_TYPE]
        test    eax, eax
        jz      6f
        cmp     eax, RNG
        jbe     2f
        xor     eax, eax
2:      mov     eax, type_names[eax*4]
        call    print
        xor     edi, edi                /* its virtqueues */
3:      movzx   eax, byte ptr [esi + D_QUEUES]
        cmp     edi, eax
        jae     4f
        say     "  queue of "
        movzx   eax, word ptr [esi + edi*8 + D_QUEUE + DQ_SIZE]
        call    print_decimal
        say     " (irq "
        movzx   eax, word ptr [esi + edi*8 + D_QUEUE + DQ_IRQ]
        call    print_decimal
        say     ")"
        inc     edi
        jmp     3b
4:      call    show_features
        say     "\n"
        mov     eax, esi
        call    next_device
        mov     esi, eax
        jmp     1b
6:      pop     edi
        pop     esi
        ret

/* Lists the features that the device at esi offers, by their bits. */
show_features:
        push    edi
        push    ebp
        mov     eax, esi
        call    offered_features
        mov     ebp, eax
        xor     edi, edi
1:      movzx   eax, byte ptr [esi + D_FEATURES]
        shl     eax, 3
        cmp     edi, eax
        jae     3f
        bt      [ebp], edi
        jnc     2f
        say_number "  feature ", edi
2:      inc     edi
        jmp     1b
3:      pop     ebp
        pop     edi
        ret

/* Starts the device of type eax, and opens its first queue at ecx. In eax its descriptor, 0: there is none. */
open_device:
        push    esi
        push    ecx
        call    find_device
        mov     esi, eax
        test    eax, eax
        jz      1f
        test    byte ptr [esi + D_STATUS], DRIVER_OK
        jnz     1f
        xor     edx, edx
        call    start_device
        mov     eax, esi
        xor     edx, edx
        mov     ecx, [esp]
        call    open_queue
        mov     eax, esi
1:      pop     ecx
        pop     esi
        ret

show_random:
        mov     eax, RNG
        mov     ecx, offset rng_queue
        call    open_device
        test    eax, eax
        jnz     1f
        say     "I have no source of random numbers (--rng gives me one).\n"
        ret
1:      push    esi
        say     "Random numbers:"
        mov     eax, offset rng_queue
        mov     ecx, offset random
        mov     edx, 6 * 4
        call    receive
        mov     esi, offset random
2:      say_number " ", "dword ptr [esi]"
        add     esi, 4
        cmp     esi, offset random + 6 * 4
        jb      2b
        say     "\n"
        pop     esi
        ret

show_disk:
        mov     eax, BLOCK
        mov     ecx, offset block_queue
        call    open_device
        test    eax, eax
        jnz     1f
        say     "I have no disk (--block=<file> gives me one).\n"
        ret
1:      push    esi
        call    configuration
        mov     ecx, [eax]
        mov     edx, [eax + 4]
        shrd    ecx, edx, 11            /* capacity: sectors to MiB */
        say_number "My disk has ", ecx
        say     " MiB. Its first bytes:"
        mov     eax, BLOCK_READ
        xor     ecx, ecx
        mov     edx, SECTOR
        call    disk_request
        test    eax, eax
        jnz     3f
        mov     esi, offset block_data
2:      say     " "
        movzx   eax, byte ptr [esi]
        cmp     eax, 16
        jae     4f
        push    eax
        say     "0"
        pop     eax
4:      call    print_hex
        inc     esi
        cmp     esi, offset block_data + 16
        jb      2b
        say     "\n"
        pop     esi
        ret
3:      say_number " none, its status is ", eax
        say     "\n"
        pop     esi
        ret

        .section .rodata
        .balign 4
type_names:
        .long   unknown_name, net_name, block_name, console_name, rng_name
commands:                               /* a key, what it does */
        .byte   'r'
        .long   show_random
        .byte   'd'
        .long   show_disk
        .byte   'b'
        .long   boot_again
        .byte   'c'
        .long   crash_now
        .byte   'q'
        .long   leave
        .byte   END_OF_INPUT
        .long   leave
        .byte   0
unknown_name:
        .asciz  "  something"
net_name:
        .asciz  "  net    "
block_name:
        .asciz  "  block  "
console_name:
        .asciz  "  console"
rng_name:
        .asciz  "  rng    "
no_console_text:
        .asciz  "no console"
crash_text:
        .asciz  "you wanted it"

        .bss
        .balign 16
input_queue:
        .skip   Q_BYTES
output_queue:
        .skip   Q_BYTES
rng_queue:
        .skip   Q_BYTES
ticked:                                 /* a second is gone */
        .skip   4
line_length:
        .skip   4
text_length:
        .skip   4
random:
        .skip   6 * 4
line:
        .skip   LINE
input:
        .skip   TYPED
text:
        .skip   TYPED + 1
