/* Both sides of a split virtqueue (virtio 1.2, 2.7) in C, for tools/bench: a driver that keeps a disk's requestq busy,
 * and, to compare with, a device that serves it as lguest's launcher did.
 *
 * Called from Python through ctypes (queuerig.py), each side in a process of its own. Both sides are ours, so neither
 * checks more of what the other says than lguest's launcher did. x86-64 only.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEXT 1
#define WRITE 2
#define INDIRECT 4
#define NO_INTERRUPT 1
#define NO_NOTIFY 1
#define SECTOR 512
#define MAX_DEPTH 64
#define MAX_SEGMENTS 16

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

/* Where the queue is: host addresses, and the eventfds. Offsets into guest memory are guest-physical addresses. */
struct queue {
    uint8_t *memory;
    uint32_t size;
    uint64_t table, available, used;
    int32_t kick, call;
};

/* What the driver is to do. `buffers` is where its buffers begin. */
struct load {
    uint64_t buffers;
    uint32_t is_write, length, segments, is_indirect, depth, uses_event_idx;
    uint64_t requests, sectors;
};

#define FAIL(...) (fprintf(stderr, "rig: " __VA_ARGS__), fputc('\n', stderr), exit(1))

static volatile uint16_t *u16(const struct queue *queue, uint64_t offset)
{
    return (volatile uint16_t *)(queue->memory + offset);
}

static void wait_for(int file)
{
    uint64_t count;
    if (read(file, &count, sizeof count) != sizeof count)
        FAIL("an eventfd cannot be read");
}

static void tell(int file)
{
    uint64_t one = 1;
    if (write(file, &one, sizeof one) != sizeof one)
        FAIL("an eventfd cannot be written");
}

/* ---- The driver ---- */

struct slot {
    uint64_t header, data, status;
    uint16_t head;
    uint64_t sector;
};

static uint64_t put(uint64_t *free, uint64_t length)
{
    uint64_t place = *free;
    *free += (length + 63) & ~63ull;
    return place;
}

/* A request's chain is made once and used again and again. */
static void make_slot(const struct queue *queue, const struct load *load, struct slot *slot, int number, uint64_t *free)
{
    uint32_t parts = load->segments + 2, part = load->length / load->segments;
    uint16_t how = load->is_write ? 0 : WRITE, first = 0;
    struct descriptor *table = (struct descriptor *)(queue->memory + queue->table);

    slot->header = put(free, 16);
    slot->status = put(free, 1);
    *free = (*free + 4095) & ~4095ull;
    slot->data = put(free, load->length);
    if (load->is_indirect) {
        uint64_t place = put(free, 16 * parts);
        slot->head = number;
        table[number] = (struct descriptor){place, 16 * parts, INDIRECT, 0};
        table = (struct descriptor *)(queue->memory + place);
    } else {
        first = slot->head = number * parts;
    }
    table[first] = (struct descriptor){slot->header, 16, NEXT, first + 1};
    for (uint32_t i = 0; i < load->segments; i++)
        table[first + 1 + i] = (struct descriptor){slot->data + i * part, part, how | NEXT, first + 2 + i};
    table[first + parts - 1] = (struct descriptor){slot->status, 1, WRITE, 0};
}

/* What is read is the number of each sector, and so is what is written. */
static void fill(const struct queue *queue, const struct load *load, struct slot *slot, uint64_t *random)
{
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    slot->sector = *random % (load->sectors * SECTOR / load->length) * (load->length / SECTOR);
    uint32_t *header = (uint32_t *)(queue->memory + slot->header);
    header[0] = load->is_write;
    header[1] = 0;
    *(uint64_t *)&header[2] = slot->sector;
    *(queue->memory + slot->status) = 0xFF;
    for (uint32_t i = 0; i < load->length; i += 4096)
        *(uint64_t *)(queue->memory + slot->data + i) = load->is_write ? slot->sector + i / SECTOR : ~0ull;
}

static void check(const struct queue *queue, const struct load *load, const struct slot *slot, uint32_t written)
{
    if (*(queue->memory + slot->status) != 0)
        FAIL("a request failed with status %d", *(queue->memory + slot->status));
    if (written != (load->is_write ? 1 : load->length + 1))
        FAIL("a request has written %u bytes", written);
    for (uint32_t i = 0; i < load->length; i += 4096)
        if (*(uint64_t *)(queue->memory + slot->data + i) != slot->sector + i / SECTOR)
            FAIL("sector %llu is not itself", (unsigned long long)(slot->sector + i / SECTOR));
}

/* Keeps `depth` requests under way until all are answered, each checked: how long it took, in nanoseconds. */
uint64_t drive(const struct queue *queue, const struct load *load)
{
    static struct slot slots[MAX_DEPTH];
    static int by_head[32768], idle[MAX_DEPTH];
    uint32_t idle_count = 0;
    uint64_t asked = 0, answered = 0, random = 88172645463325252ull, free = load->buffers;
    volatile uint16_t *available = u16(queue, queue->available), *used = u16(queue, queue->used);
    volatile uint16_t *used_event = &available[2 + queue->size], *avail_event = used + 2 + 4 * queue->size;
    volatile uint32_t *used_ring = (volatile uint32_t *)(used + 2);
    uint16_t seen = used[1], index = available[1];
    struct timespec begin, end;

    for (uint32_t i = 0; i < load->depth; i++) {
        make_slot(queue, load, &slots[i], i, &free);
        by_head[slots[i].head] = i;
        idle[idle_count++] = i;
    }
    clock_gettime(CLOCK_MONOTONIC, &begin);
    while (answered < load->requests) {
        uint16_t before = index;
        while (idle_count && asked < load->requests) {
            struct slot *slot = &slots[idle[--idle_count]];
            fill(queue, load, slot, &random);
            available[2 + (index++ & (queue->size - 1))] = slot->head;
            asked++;
        }
        if (index != before) {
            available[1] = index;
            __sync_synchronize();
            if (load->uses_event_idx ? (uint16_t)(index - *avail_event - 1) < (uint16_t)(index - before)
                                     : !(used[0] & NO_NOTIFY))
                tell(queue->kick);
        }
        while (seen == used[1]) {
            if (load->uses_event_idx)
                *used_event = seen;
            else
                available[0] = 0;
            __sync_synchronize();
            if (seen == used[1])
                wait_for(queue->call);
            available[0] = NO_INTERRUPT; /* with EVENT_IDX it means nothing */
        }
        while (seen != used[1]) {
            uint32_t slot = 2 * (seen++ & (queue->size - 1));
            int number = by_head[used_ring[slot]];
            check(queue, load, &slots[number], used_ring[slot + 1]);
            idle[idle_count++] = number;
            answered++;
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (end.tv_sec - begin.tv_sec) * 1000000000ull + end.tv_nsec - begin.tv_nsec;
}

/* ---- The device, as lguest's launcher had it ---- */

/* One request after the other: found by its flags, its data moved by lseek and readv or writev, entered into the used
 * ring, and shown. The driver is interrupted when there is nothing more to do, unless its flag says no, and is not to
 * notify us until then. */
void serve(const struct queue *queue, int disk, uint64_t disk_size)
{
    volatile uint16_t *available = u16(queue, queue->available), *used = u16(queue, queue->used);
    volatile uint32_t *used_ring = (volatile uint32_t *)(used + 2);
    uint16_t last = used[1];
    int pending = 0;

    used[0] = NO_NOTIFY;
    for (;;) {
        while (last == available[1]) {
            if (pending) {
                /* The original has none here. Then the flag is read while the used index is still in the store buffer:
                   once in some million requests the driver goes to sleep in between, and both wait for ever. */
                __sync_synchronize();
                if (!(available[0] & NO_INTERRUPT))
                    tell(queue->call);
            }
            pending = 0;
            used[0] = 0;
            __sync_synchronize();
            if (last == available[1])
                wait_for(queue->kick);
            used[0] = NO_NOTIFY;
        }
        uint16_t head = available[2 + (last++ & (queue->size - 1))];
        if (head >= queue->size)
            FAIL("the available ring names descriptor %u", head);

        struct iovec parts[256];
        struct descriptor *table = (struct descriptor *)(queue->memory + queue->table);
        uint32_t index = head, most = queue->size, out = 0, in = 0;
        if (table[index].flags & INDIRECT) {
            most = table[index].length / 16;
            table = (struct descriptor *)(queue->memory + table[index].address);
            index = 0;
        }
        for (;;) {
            if (index >= most || out + in >= most || out + in >= 256)
                FAIL("a chain leads nowhere");
            parts[out + in] = (struct iovec){queue->memory + table[index].address, table[index].length};
            if (table[index].flags & WRITE)
                in++;
            else
                out++;
            if (!(table[index].flags & NEXT))
                break;
            index = table[index].next;
        }
        uint32_t *header = parts[0].iov_base;
        uint64_t position = *(uint64_t *)&header[2] * SECTOR;
        uint8_t *status = parts[out + in - 1].iov_base;
        ssize_t moved;
        if (lseek(disk, position, SEEK_SET) != (off_t)position)
            FAIL("a request for sector %llu", (unsigned long long)position / SECTOR);
        if (header[0])
            moved = writev(disk, &parts[1], out - 1);
        else
            moved = readv(disk, &parts[out], in - 1);
        if (header[0] && moved > 0 && position + moved > disk_size)
            FAIL("a write past the end");
        *status = moved < 0;
        uint32_t slot = 2 * (used[1] & (queue->size - 1));
        used_ring[slot] = head;
        used_ring[slot + 1] = header[0] ? 1 : moved + 1;
        __asm__ __volatile__("" ::: "memory");
        used[1]++;
        pending++;
    }
}
