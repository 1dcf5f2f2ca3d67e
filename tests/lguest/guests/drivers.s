/* Devices: what the descriptor page says of them, and a driver for each. */

        .include "runtime.s"
        .include "devices.s"
        .include "scenes.s"

        .set NET_HEADER, 10
        .set FRAME, 1514

        .section .rodata
ready_text:
        .ascii  "ready\r\n"
        .set READY_LENGTH, . - ready_text
        .text

/* Every descriptor, as it is. */
scene bus
        mov     esi, memory_end
1:      movzx   eax, byte ptr [esi + D_TYPE]
        test    eax, eax
        jz      4f
        say_number "type ", eax
        xor     edi, edi
2:      movzx   eax, byte ptr [esi + D_QUEUES]
        cmp     edi, eax
        jae     3f
        movzx   eax, word ptr [esi + edi*8 + D_QUEUE + DQ_SIZE]
        say_number " queue ", eax
        movzx   eax, word ptr [esi + edi*8 + D_QUEUE + DQ_IRQ]
        say_number " irq ", eax
        mov     eax, [esi + edi*8 + D_QUEUE + DQ_PAGE]
        shl     eax, 12
        sub     eax, memory_end
        shr     eax, 12
        say_number " page ", eax
        inc     edi
        jmp     2b
3:      movzx   eax, byte ptr [esi + D_STATUS]
        say_number " status ", eax
        say     " features "
        mov     eax, esi
        call    offered_features
        movzx   edx, byte ptr [esi + D_FEATURES]
        call    tell_bytes
        say     " accepted "
        mov     eax, esi
        call    offered_features
        movzx   edx, byte ptr [esi + D_FEATURES]
        add     eax, edx
        call    tell_bytes
        say     " configuration "
        mov     eax, esi
        call    configuration
        movzx   edx, byte ptr [esi + D_CONFIG]
        call    tell_bytes
        say     "\n"
        mov     eax, esi
        call    next_device
        mov     esi, eax
        jmp     1b
4:      ret

/* Prints edx bytes at eax, in hexadecimal. */
tell_bytes:
        push    esi
        push    edi
        mov     esi, eax
        lea     edi, [eax + edx]
1:      cmp     esi, edi
        jae     2f
        movzx   eax, byte ptr [esi]
        shr     eax, 4
        call    print_hex
        movzx   eax, byte ptr [esi]
        and     eax, 15
        call    print_hex
        inc     esi
        jmp     1b
2:      pop     edi
        pop     esi
        ret

/* Starts the first device of type eax without any features; see below. */
start_simply:
        xor     edx, edx
/* Starts the first device of type eax with the features edx, and opens its queues at first_queue and second_queue. In
   esi is its descriptor then. */
start_driver:
        push    edx
        call    find_device
        pop     edx
        test    eax, eax
        jz      1f
        mov     esi, eax
        call    start_device
        mov     eax, esi
        xor     edx, edx
        mov     ecx, offset first_queue
        call    open_queue
        mov     eax, esi
        mov     edx, 1
        mov     ecx, offset second_queue
        call    open_queue
        jmp     interrupts_on
1:      mov     eax, offset no_device_text
        jmp     crash

/* The console gives back what it gets, in capitals, until there is a full stop. */
scene console
        mov     eax, CONSOLE
        call    start_simply
        mov     eax, offset second_queue
        mov     ecx, offset ready_text
        mov     edx, READY_LENGTH
        call    send
1:      mov     eax, offset first_queue
        mov     ecx, offset buffer
        mov     edx, 64
        call    receive
        xor     ecx, ecx
        xor     ebx, ebx
2:      mov     al, buffer[ecx]
        cmp     al, '.'
        sete    ah
        or      bh, ah
        cmp     al, 'a'
        jb      3f
        sub     al, 32
3:      mov     buffer[ecx], al
        inc     ecx
        cmp     ecx, edx
        jb      2b
        mov     edi, ebx
        mov     eax, offset second_queue
        mov     ecx, offset buffer
        call    send
        test    edi, edi
        jz      1b
        ret

/* Three pieces of output in one chain, and three chains with one notification. */
scene console_chains
        mov     eax, CONSOLE
        call    start_simply
        mov     edi, second_queue + Q_RING
        describe edi, 0, "offset ready_text", 1, MORE
        describe edi, 1, "offset ready_text + 1", 2, MORE
        describe edi, 2, "offset ready_text + 3", "READY_LENGTH - 3", 0
        describe edi, 3, "offset ready_text", READY_LENGTH, 0
        describe edi, 4, "offset ready_text", READY_LENGTH, 0
        xor     edx, edx
        mov     eax, offset second_queue
        call    submit
        mov     edx, 3
        mov     eax, offset second_queue
        call    submit
        mov     edx, 4
        mov     eax, offset second_queue
        call    submit
        mov     eax, offset second_queue
        call    kick
        mov     esi, 3                  /* say nothing before all is out: that would take another way */
1:      mov     eax, offset second_queue
        call    wait_used
        push    eax
        dec     esi
        jnz     1b
        pop     eax
        say_number "used ", eax
        pop     eax
        say_number " ", eax
        pop     eax
        say_number " ", eax
        say     "\n"
        ret

/* The ring's indices wrap: more chains than it has entries, and than an index can count. */
scene console_wrap
        mov     eax, CONSOLE
        call    start_simply
        mov     edi, 66000
1:      mov     eax, offset second_queue
        mov     ecx, offset ready_text
        xor     edx, edx                /* nothing at all */
        call    send
        dec     edi
        jnz     1b
        say_number "sent ", "dword ptr second_queue + Q_AVAILABLE"
        say     "\n"
        ret

/* The disk: its size, a sector written, read, flushed; requests that fail. */
scene disk
        call    open_disk
        mov     eax, esi
        call    configuration
        say_number "sectors ", "dword ptr [eax]"
        say     "\n"
        mov     edi, offset block_data
        mov     ecx, SECTOR
1:      mov     [edi], cl
        inc     edi
        dec     ecx
        jnz     1b
        mov     eax, BLOCK_WRITE
        mov     ecx, 3
        mov     edx, SECTOR
        call    disk_request
        say_number "write ", eax
        mov     eax, BLOCK_FLUSH
        xor     ecx, ecx
        xor     edx, edx
        call    disk_request
        say_number "\nflush ", eax
        mov     eax, BLOCK_READ
        mov     ecx, 2
        mov     edx, 3 * SECTOR
        call    disk_request
        say_number "\nread ", eax
        say     "\nbefore "
        mov     eax, offset block_data
        mov     edx, 4
        call    tell_bytes
        say     "\nwritten "
        mov     eax, offset block_data + SECTOR
        mov     edx, 4
        call    tell_bytes
        say     "\nbehind "
        mov     eax, offset block_data + 2 * SECTOR
        mov     edx, 4
        call    tell_bytes
        mov     eax, BLOCK_READ
        mov     ecx, 0x7fffffff
        mov     edx, SECTOR
        call    disk_request
        say_number "\nread past the end ", eax
        mov     eax, 0x77
        xor     ecx, ecx
        xor     edx, edx
        call    disk_request
        say_number "\nno request ", eax
        say     "\n"
        ret

open_disk:
        mov     eax, BLOCK
        mov     edx, BLOCK_SEG_MAX | BLOCK_CAN_FLUSH
        call    start_driver
        mov     eax, esi
        xor     edx, edx
        mov     ecx, offset block_queue
        jmp     open_queue

/* A device that is reset forgets everything, and may be started again. */
scene disk_again
        call    open_disk
        call    tell_first
        mov     eax, esi
        xor     edx, edx
        call    set_status
        mov     eax, first_queue + Q_RING
        movzx   eax, word ptr [eax + USED + INDEX]
        say_number "used index ", eax
        say     " accepted "
        mov     eax, esi
        call    offered_features
        movzx   edx, byte ptr [esi + D_FEATURES]
        add     eax, edx
        call    tell_bytes
        say     "\n"
        call    open_disk
        call    tell_first
        ret

tell_first:
        mov     eax, BLOCK_READ
        xor     ecx, ecx
        mov     edx, SECTOR
        call    disk_request
        say_number "status ", eax
        say     " first bytes "
        mov     eax, offset block_data
        mov     edx, 4
        call    tell_bytes
        say     "\n"
        ret

/* Boots again if the disk's first byte says so, which then says otherwise. */
scene boot_twice
        call    open_disk
        call    tell_first
        cmp     byte ptr block_data, 0
        jne     1f
        mov     byte ptr block_data, 1
        mov     eax, BLOCK_WRITE
        xor     ecx, ecx
        mov     edx, SECTOR
        call    disk_request
        say_number "restart ", eax
        say     "\n"
        jmp     restart
1:      say     "second life\n"
        ret

/* Random numbers: two draws, the first longer than what is asked for. */
scene rng
        mov     eax, RNG
        call    start_simply
        mov     edi, 2
1:      mov     eax, offset first_queue
        mov     ecx, offset buffer
        mov     edx, 16
        call    receive
        say_number "bytes ", edx
        say     " are "
        mov     eax, offset buffer
        mov     edx, 17
        call    tell_bytes
        say     "\n"
        dec     edi
        jnz     1b
        ret

/* The network: sends a frame, and gives back the first that comes, its addresses changed over. */
scene net
        mov     eax, NET
        mov     edx, NET_MAC
        call    start_driver
        say     "mac "
        mov     eax, esi
        call    configuration
        push    eax
        mov     edx, 6
        call    tell_bytes
        say     "\n"
        pop     eax
        mov     ecx, [eax]
        mov     dx, [eax + 4]
        mov     dword ptr buffer + NET_HEADER + 6, ecx
        mov     word ptr buffer + NET_HEADER + 10, dx
        mov     dword ptr buffer + NET_HEADER, 0xffffffff
        mov     word ptr buffer + NET_HEADER + 4, 0xffff
        mov     dword ptr buffer + NET_HEADER + 12, 0x4c47b588  /* an EtherType for experiments, and LG */
        mov     eax, offset second_queue
        mov     ecx, offset buffer
        mov     edx, NET_HEADER + 60
        call    send
        mov     eax, offset first_queue
        mov     ecx, offset buffer
        mov     edx, NET_HEADER + FRAME
        call    receive
        mov     edi, edx
        say_number "received ", edx
        say     " "
        mov     eax, offset buffer + NET_HEADER + 14
        mov     edx, 8
        call    tell_bytes
        say     "\n"
        mov     eax, dword ptr buffer + NET_HEADER
        xchg    eax, dword ptr buffer + NET_HEADER + 6
        mov     dword ptr buffer + NET_HEADER, eax
        mov     ax, word ptr buffer + NET_HEADER + 4
        xchg    ax, word ptr buffer + NET_HEADER + 10
        mov     word ptr buffer + NET_HEADER + 4, ax
        mov     edx, edi
        mov     ecx, offset buffer
        mov     eax, offset second_queue
        call    send
        say     "sent\n"
        ret

/* Misunderstandings with the launcher */

/* A queue of a device that is not started. */
scene kick_too_early
        mov     eax, CONSOLE
        call    find_device
        mov     edx, 1
        mov     ecx, offset second_queue
        call    open_queue
        mov     eax, offset second_queue
        call    kick
        say     "alive\n"
        ret

/* A device that is ready twice. */
scene ready_twice
        mov     eax, CONSOLE
        call    start_simply
        mov     eax, esi
        mov     edx, ACKNOWLEDGE | DRIVER | DRIVER_OK
        call    set_status
        say     "alive\n"
        ret

/* A driver that gives up, before and after it began; then another one tries. */
scene failed
        mov     eax, RNG
        call    find_device
        mov     esi, eax
        mov     edx, ACKNOWLEDGE | FAILED
        call    set_status
        mov     eax, RNG
        call    start_simply
        mov     eax, esi
        mov     edx, ACKNOWLEDGE | DRIVER | FAILED
        call    set_status
        mov     eax, RNG
        call    start_simply
        mov     eax, offset first_queue
        mov     ecx, offset buffer
        mov     edx, 16
        call    receive
        say_number "bytes ", edx
        say     "\n"
        ret

/* A notification of what is no memory. */
scene bad_notify
        mov     eax, memory_end
        add     eax, 0x10000000
        hypercall NOTIFY, eax
        say     "alive\n"
        ret

/* A text that is longer than Linux ever makes them. */
scene long_text
        mov     edi, offset buffer
        mov     ecx, 2048
        mov     eax, 'x'
        rep stosb
        mov     word ptr [edi - 2], '\n'
        hypercall NOTIFY, "offset buffer"
        say     "alive\n"
        ret

/* A chain that has no end. */
scene endless_chain
        mov     eax, CONSOLE
        call    start_simply
        mov     edi, second_queue + Q_RING
        describe edi, 0, "offset ready_text", READY_LENGTH, MORE
        mov     word ptr [edi + 14], 0
        xor     edx, edx
        mov     eax, offset second_queue
        call    submit
        mov     eax, offset second_queue
        call    kick
        mov     eax, offset second_queue
        call    wait_used
        say     "alive\n"
        ret

/* A buffer where no memory is. */
scene wild_buffer
        mov     eax, RNG
        call    start_simply
        mov     eax, offset first_queue
        mov     ecx, 0x90000000
        mov     edx, 16
        call    receive
        say     "alive\n"
        ret

        .section .rodata
no_device_text:
        .asciz  "no such device"

        .bss
        .balign 16
first_queue:
        .skip   Q_BYTES
second_queue:
        .skip   Q_BYTES
buffer:
        .skip   2048
