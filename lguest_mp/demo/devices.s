/* The devices of an lguest guest: descriptors in the page behind its memory, and the rings of their virtqueues.

   Descriptors lie one behind another, a type of 0 ends them. After the five bytes below come the virtqueues, eight bytes
   each, then the features that are offered, as many bytes for those that are accepted, then the configuration. The
   device is told of a new status by a NOTIFY of its descriptor's address, and of new buffers by one of the ring's. */

        .set D_TYPE, 0
        .set D_QUEUES, 1
        .set D_FEATURES, 2              /* how many bytes */
        .set D_CONFIG, 3                /* how many bytes */
        .set D_STATUS, 4
        .set D_QUEUE, 5                 /* the first virtqueue: */
        .set DQ_SIZE, 0                 /* 2 bytes */
        .set DQ_IRQ, 2                  /* 2 bytes */
        .set DQ_PAGE, 4                 /* 4 bytes: the number of the ring's first page */

        .set NET, 1
        .set BLOCK, 2
        .set CONSOLE, 3
        .set RNG, 4

        /* Their features, of which there are more. */
        .set NET_MAC, 1 << 5
        .set BLOCK_SEG_MAX, 1 << 2
        .set BLOCK_CAN_FLUSH, 1 << 9

        .set ACKNOWLEDGE, 1
        .set DRIVER, 2
        .set DRIVER_OK, 4
        .set FAILED, 0x80

        /* The parts of a ring of 256. */
        .set RING_SIZE, 256
        .set AVAILABLE, 4096
        .set USED, 8192
        .set INDEX, 2                   /* in both of these; */
        .set ENTRIES, 4                 /* then the entries */
        /* A descriptor in the ring: 8 bytes of address, 4 of length, 2 of flags, 2 of the next one's number. */
        .set MORE, 1
        .set FOR_DEVICE_TO_WRITE, 2

        /* What we keep of a virtqueue. */
        .set Q_RING, 0                  /* its address */
        .set Q_AVAILABLE, 4             /* the index that comes next */
        .set Q_USED, 8                  /* likewise */
        .set Q_IRQ, 12
        .set Q_BYTES, 16

        .set BLOCK_READ, 0
        .set BLOCK_WRITE, 1
        .set BLOCK_FLUSH, 4
        .set BLOCK_OK, 0
        .set SECTOR, 512

/* The descriptor behind that at eax. */
next_device:
        movzx   ecx, byte ptr [eax + D_QUEUES]
        movzx   edx, byte ptr [eax + D_FEATURES]
        lea     ecx, [ecx*8 + D_QUEUE]
        lea     ecx, [ecx + edx*2]
        movzx   edx, byte ptr [eax + D_CONFIG]
        add     eax, ecx
        add     eax, edx
        ret

/* The descriptor of the first device of type eax, or 0. */
find_device:
        push    esi
        mov     esi, eax
        mov     eax, memory_end
1:      movzx   ecx, byte ptr [eax + D_TYPE]
        cmp     ecx, esi
        je      3f
        test    ecx, ecx
        jz      2f
        call    next_device
        jmp     1b
2:      xor     eax, eax
3:      pop     esi
        ret

/* The address of the features of the device at eax. */
offered_features:
        movzx   ecx, byte ptr [eax + D_QUEUES]
        lea     eax, [eax + ecx*8 + D_QUEUE]
        ret

/* The address of the configuration of the device at eax. */
configuration:
        movzx   edx, byte ptr [eax + D_FEATURES]
        call    offered_features
        lea     eax, [eax + edx*2]
        ret

/* Tells the device at eax that its status is edx. */
set_status:
        mov     [eax + D_STATUS], dl
        hypercall NOTIFY, eax
        ret

/* Starts the device at eax, with those of its features accepted whose bits are in edx. */
start_device:
        push    esi
        push    edi
        mov     esi, eax
        mov     edi, edx
        xor     edx, edx
        call    set_status
        mov     byte ptr [esi + D_STATUS], ACKNOWLEDGE | DRIVER
        mov     eax, esi
        call    offered_features
        movzx   edx, byte ptr [esi + D_FEATURES]
        lea     ecx, [eax + edx]        /* where they are accepted */
1:      dec     edx
        js      2f
        mov     ebx, edi
        and     bl, [eax]
        mov     [ecx], bl
        shr     edi, 8
        inc     eax
        inc     ecx
        jmp     1b
2:      mov     eax, esi
        mov     edx, ACKNOWLEDGE | DRIVER
        call    set_status
        or      byte ptr [esi + D_STATUS], DRIVER_OK    /* which nobody is told */
        pop     edi
        pop     esi
        ret

/* Fills in what we keep at ecx of virtqueue edx of the device at eax. */
open_queue:
        lea     eax, [eax + edx*8 + D_QUEUE]
        movzx   edx, word ptr [eax + DQ_IRQ]
        mov     [ecx + Q_IRQ], edx
        mov     edx, [eax + DQ_PAGE]
        shl     edx, 12
        mov     [ecx + Q_RING], edx
        mov     dword ptr [ecx + Q_AVAILABLE], 0
        mov     dword ptr [ecx + Q_USED], 0
        ret

        /* Makes descriptor \number of the ring at \ring. Its next one, if there is MORE, is the following. */
        .macro describe ring, number, address, length, flags
        mov     dword ptr [\ring + 16*\number], \address
        mov     dword ptr [\ring + 16*\number + 4], 0
        mov     dword ptr [\ring + 16*\number + 8], \length
        mov     dword ptr [\ring + 16*\number + 12], (\flags) | (\number + 1) << 16
        .endm

/* Makes the chain that begins with descriptor edx available in the queue that is kept at eax. */
submit:
        push    esi
        mov     esi, [eax + Q_RING]
        mov     ecx, [eax + Q_AVAILABLE]
        and     ecx, RING_SIZE - 1
        mov     [esi + AVAILABLE + ENTRIES + ecx*2], dx
        inc     dword ptr [eax + Q_AVAILABLE]
        mov     ecx, [eax + Q_AVAILABLE]
        mov     [esi + AVAILABLE + INDEX], cx
        pop     esi
        ret

/* Tells the device of what is new in the queue at eax. */
kick:
        hypercall NOTIFY, "[eax + Q_RING]"
        ret

/* Whether a chain is used in the queue at eax: the zero flag is clear then. */
is_used:
        mov     ecx, [eax + Q_RING]
        mov     dx, [ecx + USED + INDEX]
        cmp     dx, [eax + Q_USED]
        ret

/* Takes a used chain of the queue at eax: its first descriptor, and in edx how many bytes the device wrote. */
take_used:
        push    esi
        mov     esi, [eax + Q_RING]
        movzx   ecx, byte ptr [eax + Q_USED]    /* modulo RING_SIZE */
        inc     word ptr [eax + Q_USED]
        mov     eax, [esi + USED + ENTRIES + ecx*8]
        mov     edx, [esi + USED + ENTRIES + ecx*8 + 4]
        pop     esi
        ret

/* Waits for a used chain of the queue at eax, and takes it. */
wait_used:
        push    esi
        mov     esi, eax
1:      call    interrupts_off
        mov     eax, esi
        call    is_used
        jne     2f
        call    halt
        jmp     1b
2:      call    interrupts_on
        mov     eax, esi
        call    take_used
        pop     esi
        ret

/* Has the device of the queue at eax read edx bytes at ecx, and waits until it has. */
send:
        push    esi
        push    edi
        mov     esi, eax
        mov     edi, [esi + Q_RING]
        describe edi, 0, ecx, edx, 0
        xor     edx, edx
        call    submit
        mov     eax, esi
        call    kick
        mov     eax, esi
        call    wait_used
        pop     edi
        pop     esi
        ret

/* Has the device of the queue at eax write up to edx bytes at ecx, and waits: in edx how many they were. */
receive:
        push    esi
        push    edi
        mov     esi, eax
        mov     edi, [esi + Q_RING]
        describe edi, 0, ecx, edx, FOR_DEVICE_TO_WRITE
        xor     edx, edx
        call    submit
        mov     eax, esi
        call    kick
        mov     eax, esi
        call    wait_used
        pop     edi
        pop     esi
        ret

/* A request of type eax for edx bytes from sector ecx of the disk whose queue is kept at block_queue; its status. */
disk_request:
        push    esi
        push    edi
        mov     block_header, eax
        mov     block_header + 8, ecx
        mov     esi, block_queue + Q_RING
        mov     edi, 1                  /* the descriptor that comes next */
        describe esi, 0, "offset block_header", 16, MORE
        test    edx, edx
        jz      1f
        mov     ecx, MORE | 2 << 16
        test    eax, eax
        jnz     2f
        or      ecx, FOR_DEVICE_TO_WRITE
2:      describe esi, 1, "offset block_data", edx, 0
        mov     [esi + 16 + 12], ecx
        mov     edi, 2
1:      shl     edi, 4
        mov     dword ptr [esi + edi], offset block_status
        mov     dword ptr [esi + edi + 4], 0
        mov     dword ptr [esi + edi + 8], 1
        mov     dword ptr [esi + edi + 12], FOR_DEVICE_TO_WRITE
        mov     byte ptr block_status, 0xff
        xor     edx, edx
        mov     eax, offset block_queue
        call    submit
        mov     eax, offset block_queue
        call    kick
        mov     eax, offset block_queue
        call    wait_used
        movzx   eax, byte ptr block_status
        pop     edi
        pop     esi
        ret

        .bss
        .balign 16
block_header:                           /* type, 0, sector (8 bytes) */
        .skip   16
block_queue:
        .skip   Q_BYTES
block_status:
        .skip   4
        .balign 16
block_data:
        .skip   8 * SECTOR

        .text
