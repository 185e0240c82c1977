/* Preloaded into a process, kills it at its CRASH_AT-th open for writing, write or rename below the folder CRASH_IN, in
 * the middle of a write. gcc -shared -fPIC -o crash.so crash.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long done;
long crash_operations(void) { return done; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_the_one(const char *path) {
    const char *in = getenv("CRASH_IN"), *at = getenv("CRASH_AT");
    return in && at && !strncmp(path, in, strlen(in)) && ++done == atol(at);
}

static void before(const char *path) {
    if (is_the_one(path)) raise(SIGKILL);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR)) before(path); \
        return REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        if (strpbrk(mode, "wa+")) before(path); \
        return REAL(name)(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

int rename(const char *from, const char *to) {
    before(to);
    return REAL(rename)(from, to);
}

ssize_t write(int file, const void *bytes, size_t count) {
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) > 0 && is_the_one(path)) {
        REAL(write)(file, bytes, count / 2);
        raise(SIGKILL);
    }
    return REAL(write)(file, bytes, count);
}
