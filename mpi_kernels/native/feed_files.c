/* Files, opened when they are needed and closed when many others were needed since. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "feed.h"

/* Descriptors that nobody holds and that stay open; an acquisition may have more files than a process may open. */
enum { IDLE_FILES = 32 };

struct opened {
    int fd, holders;
};

struct feed_files {
    pthread_mutex_t lock;
    int n, refused;
    char **paths;
    bool *refuses;         /* O_DIRECT */
    struct opened *opened; /* two for each file: buffered, direct */
    int idle;
    int waiting[IDLE_FILES + 1]; /* entries of `opened` that nobody holds, the one given back first first */
};

struct feed_files *feed_files_new(int n, const char *const *paths)
{
    struct feed_files *files = calloc(1, sizeof *files);
    if (!files)
        return NULL;
    pthread_mutex_init(&files->lock, NULL);
    files->paths = calloc((size_t)n, sizeof *files->paths);
    files->refuses = calloc((size_t)n, sizeof *files->refuses);
    files->opened = calloc(2 * (size_t)n, sizeof *files->opened);
    bool made = files->paths && files->refuses && files->opened;
    for (int i = 0; made && i < n; i++) {
        files->opened[2 * i].fd = files->opened[2 * i + 1].fd = -1;
        files->n = i + 1;
        made = (files->paths[i] = strdup(paths[i])) != NULL;
    }
    if (made)
        return files;
    feed_files_free(files);
    return NULL;
}

void feed_files_free(struct feed_files *files)
{
    for (int i = 0; i < files->n; i++) {
        for (int k = 0; k < 2; k++)
            if (files->opened[2 * i + k].fd >= 0)
                close(files->opened[2 * i + k].fd);
        free(files->paths[i]);
    }
    pthread_mutex_destroy(&files->lock);
    free(files->paths);
    free(files->refuses);
    free(files->opened);
    free(files);
}

/* O_NONBLOCK: a pipe that was put in a file's place must not stop us; a device would give endless zeros. */
static int open_regular(const char *path, bool direct)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (direct ? O_DIRECT : 0));
    if (fd < 0)
        return -errno;
    struct stat facts;
    int error = fstat(fd, &facts) ? errno : S_ISREG(facts.st_mode) ? 0 : S_ISDIR(facts.st_mode) ? EISDIR : EINVAL;
    if (error) {
        close(fd);
        return -error;
    }
    return fd;
}

static void forget(struct feed_files *files, int place)
{
    files->idle--;
    memmove(files->waiting + place, files->waiting + place + 1, (size_t)(files->idle - place) * sizeof *files->waiting);
}

int feed_files_take(struct feed_files *files, int index, bool direct)
{
    pthread_mutex_lock(&files->lock);
    struct opened *o = &files->opened[2 * index + direct];
    if (o->fd < 0) {
        int fd = open_regular(files->paths[index], direct);
        if (fd < 0) {
            pthread_mutex_unlock(&files->lock);
            return fd;
        }
        o->fd = fd;
    } else if (o->holders == 0) {
        int place = 0;
        while (files->waiting[place] != 2 * index + direct)
            place++;
        forget(files, place);
    }
    o->holders++;
    int fd = o->fd;
    pthread_mutex_unlock(&files->lock);
    return fd;
}

void feed_files_give(struct feed_files *files, int index, bool direct)
{
    pthread_mutex_lock(&files->lock);
    struct opened *o = &files->opened[2 * index + direct];
    if (--o->holders == 0) {
        files->waiting[files->idle++] = 2 * index + direct;
        if (files->idle > IDLE_FILES) {
            struct opened *oldest = &files->opened[files->waiting[0]];
            close(oldest->fd);
            oldest->fd = -1;
            forget(files, 0);
        }
    }
    pthread_mutex_unlock(&files->lock);
}

void feed_files_refuse(struct feed_files *files, int index)
{
    pthread_mutex_lock(&files->lock);
    files->refused += !files->refuses[index];
    files->refuses[index] = true;
    pthread_mutex_unlock(&files->lock);
}

bool feed_files_direct(struct feed_files *files, int index)
{
    pthread_mutex_lock(&files->lock);
    bool direct = !files->refuses[index];
    pthread_mutex_unlock(&files->lock);
    return direct;
}

int feed_files_refused(struct feed_files *files)
{
    pthread_mutex_lock(&files->lock);
    int refused = files->refused;
    pthread_mutex_unlock(&files->lock);
    return refused;
}
