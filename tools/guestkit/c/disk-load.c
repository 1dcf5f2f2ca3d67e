/* disk-load DEVICE read|write random|sequential SIZE DEPTH COUNT
 *
 * Reads or writes a disk COUNT times, SIZE bytes each past the page cache, with DEPTH of them under way at any time
 * (Linux's asynchronous I/O, io_submit(2)): at random places, or one after the other, from the beginning again at the
 * end. What it writes is what it found at the disk's beginning.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096

static void fail(const char *what, int error)
{
	fprintf(stderr, "disk-load: %s: %s\n", what, strerror(error));
	exit(1);
}

static uint64_t next_random(void)
{
	static uint64_t state = 88172645463325252ULL;

	/* xorshift64 */
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

int main(int argc, char *argv[])
{
	if (argc != 7) {
		fprintf(stderr, "usage: disk-load DEVICE read|write random|sequential SIZE DEPTH COUNT\n");
		return 2;
	}
	const int is_write = !strcmp(argv[2], "write"), is_random = !strcmp(argv[3], "random");
	const uint64_t size = strtoull(argv[4], NULL, 10), depth = strtoull(argv[5], NULL, 10);
	const uint64_t count = strtoull(argv[6], NULL, 10);

	const int disk = open(argv[1], O_RDWR | O_DIRECT);
	if (disk < 0)
		fail(argv[1], errno);
	const off_t end = lseek(disk, 0, SEEK_END);
	if (!size || !depth || end < 0 || (uint64_t)end < size)
		fail("the disk's size", EINVAL);
	const uint64_t places = (uint64_t)end / size;

	aio_context_t context = 0;
	if (syscall(SYS_io_setup, depth, &context) < 0)
		fail("io_setup", errno);
	struct iocb *requests = calloc(depth, sizeof(*requests)), **ready = calloc(depth, sizeof(*ready));
	struct io_event *events = calloc(depth, sizeof(*events));
	char *buffers;
	if (!requests || !ready || !events || posix_memalign((void **)&buffers, PAGE, size * depth))
		fail("memory", ENOMEM);
	for (uint64_t slot = 0; slot < depth; slot++) {
		if (pread(disk, buffers + slot * size, size, 0) != (ssize_t)size)
			fail("the first read", errno);
		requests[slot].aio_lio_opcode = is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		requests[slot].aio_fildes = disk;
		requests[slot].aio_buf = (uintptr_t)(buffers + slot * size);
		requests[slot].aio_nbytes = size;
		ready[slot] = &requests[slot];
	}

	uint64_t begun = 0, done = 0;
	long idle = depth;
	while (done < count) {
		long batch = 0;
		while (batch < idle && begun < count) {
			ready[batch]->aio_offset = (is_random ? next_random() % places : begun % places) * size;
			batch++;
			begun++;
		}
		for (long submitted = 0; submitted < batch;) {
			const long taken = syscall(SYS_io_submit, context, batch - submitted, ready + submitted);
			if (taken <= 0)
				fail("io_submit", taken ? errno : EIO);
			submitted += taken;
		}
		idle = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (idle < 0)
			fail("io_getevents", errno);
		for (long index = 0; index < idle; index++) {
			if ((uint64_t)events[index].res != size)
				fail("a request", (int64_t)events[index].res < 0 ? -(int)events[index].res : EIO);
			ready[index] = (struct iocb *)(uintptr_t)events[index].obj;
		}
		done += idle;
	}
	return 0;
}
