/* Interrupts: the timer's, which every guest has, and everything that may hold one up. */

        .include "runtime.s"
        .include "devices.s"
        .include "scenes.s"

        .set TIMER, 0
        .set MILLISECOND, 1000000

/* Counts, notes whether interrupts are on, and what the time is. */
on_tick:
        inc     dword ptr ticks
        mov     eax, irq_enabled
        or      interrupts_in_handler, eax
        cmp     dword ptr ticks, 3
        jae     1f
        cmp     dword ptr ticking, 0
        je      1f
        hypercall SET_CLOCKEVENT, MILLISECOND
1:      ret

handle_ticks:
        mov     eax, FIRST_IRQ + TIMER
        mov     edx, offset on_tick
        jmp     set_handler

/* Lets some milliseconds pass, in which a tick that may come does. */
pass_time:
        rdtsc
        mov     esi, eax
        mov     edi, edx
1:      rdtsc
        sub     eax, esi
        sbb     edx, edi
        jnz     2f
        cmp     eax, 20000000
        jb      1b
2:      ret

tell_ticks:
        say_number "ticks ", "dword ptr ticks"
        say     "\n"
        ret

/* One tick after another, the guest asleep in between. */
scene halting
        call    handle_ticks
        mov     dword ptr ticking, 1
        mov     eax, time_seconds
        mov     edi, time_nanoseconds
        push    eax
        hypercall SET_CLOCKEVENT, MILLISECOND
1:      call    interrupts_off
        cmp     dword ptr ticks, 3
        jae     2f
        call    halt
        cmp     dword ptr irq_enabled, INTERRUPTS_ON
        je      1b
        say     "a halt left interrupts off\n"
        jmp     1b
2:      call    interrupts_on
        call    tell_ticks
        say_number "interrupts in the handler ", "dword ptr interrupts_in_handler"
        pop     eax
        mov     ecx, time_seconds
        sub     ecx, eax
        imul    ecx, ecx, 1000000000
        add     ecx, time_nanoseconds
        sub     ecx, edi
        say_number "\nnanoseconds ", ecx
        say     "\n"
        ret

/* The same without sleep. */
scene spinning
        call    handle_ticks
        mov     dword ptr ticking, 1
        call    interrupts_on
        hypercall SET_CLOCKEVENT, MILLISECOND
1:      cmp     dword ptr ticks, 3
        jb      1b
        jmp     tell_ticks

/* An event that is cancelled does not come. */
scene cancelled
        call    handle_ticks
        call    interrupts_on
        hypercall SET_CLOCKEVENT, "5 * MILLISECOND"
        hypercall SET_CLOCKEVENT, 0
        call    pass_time
        jmp     tell_ticks

/* One that is set anew comes once. */
scene set_twice
        call    handle_ticks
        call    interrupts_on
        hypercall SET_CLOCKEVENT, "2 * MILLISECOND"
        hypercall SET_CLOCKEVENT, MILLISECOND
1:      cmp     dword ptr ticks, 0
        je      1b
        call    pass_time
        jmp     tell_ticks

/* What comes while interrupts are off waits, and says so. */
scene waiting
        call    handle_ticks
        hypercall SET_CLOCKEVENT, MILLISECOND
1:      cmp     dword ptr irq_pending, 0
        je      1b
        say_number "waits ", "dword ptr irq_pending"
        say     "\n"
        call    tell_ticks
        mov     dword ptr irq_enabled, INTERRUPTS_ON
        hypercall SEND_INTERRUPTS
        call    tell_ticks
        say_number "waits ", "dword ptr irq_pending"
        say     "\n"
        ret

/* A guest need not ask for what waits. */
scene unasked
        call    handle_ticks
        hypercall SET_CLOCKEVENT, MILLISECOND
1:      cmp     dword ptr irq_pending, 0
        je      1b
        mov     dword ptr irq_enabled, INTERRUPTS_ON
2:      cmp     dword ptr ticks, 0
        je      2b
        jmp     tell_ticks

/* An interrupt that is blocked waits until it is not, in silence. */
scene blocked
        call    handle_ticks
        mov     dword ptr blocked_interrupts, 1 << TIMER
        call    interrupts_on
        hypercall SET_CLOCKEVENT, MILLISECOND
        call    pass_time
        call    tell_ticks
        say_number "waits ", "dword ptr irq_pending"
        say     "\n"
        mov     dword ptr blocked_interrupts, 0
        hypercall SEND_INTERRUPTS
1:      cmp     dword ptr ticks, 0      /* at once, if it was not late */
        je      1b
        jmp     tell_ticks

/* No interrupt comes between two instructions that are not to be interrupted. */
scene uninterrupted
        call    handle_ticks
        call    interrupts_on
        hypercall SET_CLOCKEVENT, MILLISECOND
        call    pass_uninterrupted
1:      cmp     dword ptr ticks, 0
        je      1b
        say_number "ticks meanwhile ", ebx
        say     "\n"
        jmp     tell_ticks

        .section .uninterrupted, "ax"
/* Lets time pass; in ebx the ticks until its end. */
pass_uninterrupted:
        rdtsc
        mov     esi, eax
        mov     edi, edx
1:      rdtsc
        sub     eax, esi
        sbb     edx, edi
        jnz     2f
        cmp     eax, 20000000
        jb      1b
2:      mov     ebx, ticks
        ret
        .text

/* An interrupt gate turns interrupts off, a trap gate does not; what returns turns them on again. */
scene gates
        mov     eax, 3
        mov     edx, offset tell_interrupts
        call    set_handler
        call    interrupts_on
        int3
        mov     eax, 3
        mov     edx, offset stubs + 3*STUB_SIZE
        mov     ecx, INTERRUPT_GATE | FOR_USERS
        call    set_gate
        int3
        say     "afterwards: "
        call    tell_interrupts
        call    interrupts_off
        int3
        say     "afterwards: "
        call    tell_interrupts
        ret

tell_interrupts:
        say_number "interrupts ", "dword ptr irq_enabled"
        say     "\n"
        ret

/* Two that wait are delivered lowest first: the timer's, and the console's, whose output is done. */
scene order
        mov     eax, CONSOLE
        call    find_device
        push    eax
        xor     edx, edx
        call    start_device
        pop     eax
        mov     edx, 1
        mov     ecx, offset queue
        call    open_queue
        mov     eax, FIRST_IRQ + TIMER
        mov     edx, offset tell_irq
        call    set_handler
        mov     eax, queue + Q_IRQ
        add     eax, FIRST_IRQ
        mov     edx, offset tell_irq
        call    set_handler
        hypercall SET_CLOCKEVENT, 1
1:      cmp     dword ptr irq_pending, 0
        je      1b
        mov     eax, queue + Q_RING
        describe eax, 0, "offset dots", 4, 0
        mov     eax, offset queue
        xor     edx, edx
        call    submit
        mov     eax, offset queue
        call    kick
        mov     eax, offset queue
2:      call    is_used
        je      2b
        call    pass_time               /* in which its interrupt arrives */
        call    interrupts_on
3:      cmp     dword ptr ticks, 2
        jb      3b
        ret

tell_irq:
        inc     dword ptr ticks
        mov     eax, [ebp + F_VECTOR]
        sub     eax, FIRST_IRQ
        cmp     eax, TIMER
        je      1f
        say     "console\n"
        ret
1:      say     "timer\n"
        ret

        .section .rodata
dots:
        .ascii  "..\r\n"

        .bss
        .balign 4
ticks:
        .skip   4
ticking:                                /* each tick starts the next */
        .skip   4
interrupts_in_handler:
        .skip   4
queue:
        .skip   Q_BYTES
