/* How fast bytes that are in the page cache can be read by a map and added up: the limit that kernels are held against.
 *
 * One request a line on stdin, one answer a line on stdout:
 *   sum THREADS PATH       seconds, CPU seconds, and the sum of the file's whole 64-bit words modulo 2^64
 *   resident PATH          pages that are in the cache, and all pages
 * An answer that begins with "error" says why there is none.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static const size_t PIECE = 2 << 20;
enum { MOST_THREADS = 256 };

/* Threads take the next piece when they are done with one: a thread that gets no core holds nobody up. */
struct work {
    const unsigned char *map;
    size_t size;
    atomic_size_t next;
};

struct share {
    struct work *work;
    uint64_t sum;
};

static uint64_t added(const unsigned char *from, const unsigned char *to)
{
    const uint64_t *word = (const uint64_t *)from;
    size_t n = (size_t)(to - from) / 8;
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += word[i];
    return sum;
}

/* Whole pieces are mapped by one call each: a fault for every 16 pages costs more than the addition. */
static void *add_share(void *given)
{
    struct share *share = given;
    const struct work *work = share->work;
    for (;;) {
        size_t at = PIECE * atomic_fetch_add(&share->work->next, 1);
        if (at >= work->size)
            return NULL;
        size_t bytes = work->size - at < PIECE ? work->size - at : PIECE;
        madvise((void *)(work->map + at), bytes, MADV_POPULATE_READ);
        share->sum += added(work->map + at, work->map + at + bytes);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double cpu(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static const unsigned char *mapped(const char *path, size_t *size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (fd < 0)
        return NULL;
    void *map = MAP_FAILED;
    if (fstat(fd, &about) == 0 && about.st_size > 0) {
        *size = (size_t)about.st_size;
        map = mmap(NULL, *size, PROT_READ, MAP_SHARED, fd, 0);
    }
    close(fd);
    return map == MAP_FAILED ? NULL : map;
}

static void sum(const char *path, int threads)
{
    struct share shares[MOST_THREADS] = {{0}};
    pthread_t ids[MOST_THREADS];
    size_t size = 0;
    double begin = now(), used = cpu();
    const unsigned char *map = mapped(path, &size);
    if (map == NULL) {
        printf("error %s\n", strerror(errno));
        return;
    }
    struct work work = {.map = map, .size = size};
    for (int i = 0; i < threads; i++) {
        shares[i].work = &work;
        if (i > 0 && pthread_create(&ids[i], NULL, add_share, &shares[i]) != 0) {
            printf("error no thread\n");
            exit(1);
        }
    }
    add_share(&shares[0]);
    uint64_t total = shares[0].sum;
    for (int i = 1; i < threads; i++) {
        pthread_join(ids[i], NULL);
        total += shares[i].sum;
    }
    munmap((void *)map, size);
    printf("%.9f %.6f %llu\n", now() - begin, cpu() - used, (unsigned long long)total);
}

static void resident(const char *path)
{
    size_t size = 0, page = (size_t)sysconf(_SC_PAGESIZE), found = 0;
    const unsigned char *map = mapped(path, &size);
    size_t pages = (size + page - 1) / page;
    unsigned char *in = map == NULL ? NULL : malloc(pages);
    if (in == NULL || mincore((void *)map, size, in) != 0) {
        printf("error %s\n", strerror(errno));
        return;
    }
    for (size_t i = 0; i < pages; i++)
        found += in[i] & 1;
    free(in);
    munmap((void *)map, size);
    printf("%zu %zu\n", found, pages);
}

int main(void)
{
    char line[8192], path[8192];
    int threads;
    while (fgets(line, sizeof line, stdin) != NULL) {
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "sum %d %8191[^\n]", &threads, path) == 2 && threads > 0 && threads <= MOST_THREADS)
            sum(path, threads);
        else if (sscanf(line, "resident %8191[^\n]", path) == 1)
            resident(path);
        else
            printf("error no such request\n");
        fflush(stdout);
    }
    return 0;
}
