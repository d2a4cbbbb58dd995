"""Kills a process at its k-th write below a folder: a shim before the C library, built with the machine's compiler.

Counted are the calls that change files, of Python and of SQLite alike: creating opens, writes, syncs, truncations,
renames, links, removals, new folders. The k-th one does not happen; of a write the first half does (a torn write).
What the kernel has taken survives a kill, so a power cut is not tried here: that is what the syncs are for.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["build_shim"]

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long armed, kill_at, count;

void crash_arm(const char *below, long at) {
    strncpy(folder, below, sizeof folder - 1);
    kill_at = at;
    count = 0;
    armed = 1;
}
long crash_disarm(void) { armed = 0; return count; }

static int inside(const char *path) { return strncmp(path, folder, strlen(folder)) == 0; }
static int fd_inside(int fd) {
    char link[64], target[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    return inside(target);
}
static int at_inside(int fd, const char *path) {
    if (path[0] == '/') return inside(path);
    return fd == AT_FDCWD ? 0 : fd_inside(fd);
}
static int is_last(int counts) { return armed && counts && ++count == kill_at; }
static void point(int counts) { if (is_last(counts)) kill(getpid(), SIGKILL); }

#define NEXT(type, name, ...) type (*next)(__VA_ARGS__) = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define WRITES(name, offset_type)                                                            \
    ssize_t name(int fd, const void *data, size_t size, offset_type at) {                    \
        NEXT(ssize_t, name, int, const void *, size_t, offset_type);                         \
        if (armed && is_last(fd_inside(fd))) { next(fd, data, size / 2, at); kill(getpid(), SIGKILL); } \
        return next(fd, data, size, at);                                                     \
    }
WRITES(pwrite, off_t)
WRITES(pwrite64, off64_t)
ssize_t write(int fd, const void *data, size_t size) {
    NEXT(ssize_t, write, int, const void *, size_t);
    if (armed && is_last(fd_inside(fd))) { next(fd, data, size / 2); kill(getpid(), SIGKILL); }
    return next(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    NEXT(ssize_t, writev, int, const struct iovec *, int);
    if (armed) point(fd_inside(fd));
    return next(fd, parts, n);
}
#define ON_FD(name) int name(int fd) { NEXT(int, name, int); if (armed) point(fd_inside(fd)); return next(fd); }
ON_FD(fsync)
ON_FD(fdatasync)
#define TRUNCATES(name, type)                     \
    int name(int fd, type size) {                 \
        NEXT(int, name, int, type);               \
        if (armed) point(fd_inside(fd));          \
        return next(fd, size);                    \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)
#define ON_PATH(name)                            \
    int name(const char *path) {                 \
        NEXT(int, name, const char *);           \
        if (armed) point(inside(path));          \
        return next(path);                       \
    }
ON_PATH(unlink)
ON_PATH(rmdir)
int mkdir(const char *path, mode_t mode) {
    NEXT(int, mkdir, const char *, mode_t);
    if (armed) point(inside(path));
    return next(path, mode);
}
int unlinkat(int fd, const char *path, int flags) {
    NEXT(int, unlinkat, int, const char *, int);
    if (armed) point(at_inside(fd, path));
    return next(fd, path, flags);
}
#define ON_PAIR(name)                             \
    int name(const char *from, const char *to) {  \
        NEXT(int, name, const char *, const char *); \
        if (armed) point(inside(to));             \
        return next(from, to);                    \
    }
ON_PAIR(rename)
ON_PAIR(link)
#define OPENS(name)                                                       \
    int name(const char *path, int flags, ...) {                          \
        NEXT(int, name, const char *, int, ...);                          \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if (armed) point((flags & (O_CREAT | O_TRUNC)) != 0 && inside(path)); \
        return next(path, flags, mode);                                   \
    }
OPENS(open)
OPENS(open64)
"""


def build_shim(directory: Path) -> Path:
    """Return the shim, to be loaded by LD_PRELOAD; skips the test where there is no Linux or no compiler."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("killing at every write needs Linux and a C compiler")
    source, shim = directory / "crash.c", directory / "crash.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    return shim
