/* A disk that fails on demand, for chaos.py: loaded before libc (LD_PRELOAD), it counts the calls
 * that change files below one directory, and makes one of them, or all from one on, fail, or be the
 * last thing that the process does. Calls that do not concern the directory pass untouched.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FAIL_ONCE, FAIL_ON, KILL };

static char place[4096];
static size_t place_length;
static long calls, target;
static int mode, error_number;
static char ours[65536]; /* descriptors of files and directories below `place` */
static char last_call[64];

/* Also called by chaos.py. Counting begins anew. */
void chaos_arm(const char *directory, long at, int how, int number) {
    snprintf(place, sizeof place, "%s", directory);
    place_length = strlen(place);
    target = at;
    mode = how;
    error_number = number;
    calls = 0;
    last_call[0] = 0;
}

long chaos_calls(void) { return calls; }
const char *chaos_last_call(void) { return last_call; }

static int below(const char *path) {
    return place_length && path && !strncmp(path, place, place_length);
}

static int below_at(int directory, const char *path) {
    if (path && path[0] == '/') return below(path);
    return directory >= 0 && directory < (int)sizeof ours && ours[directory];
}

static int is_ours(int descriptor) {
    return place_length && descriptor >= 0 && descriptor < (int)sizeof ours && ours[descriptor];
}

/* Whether this call has to fail; errno then says how. */
static int strikes(const char *name) {
    long number = __sync_add_and_fetch(&calls, 1);
    int hit = mode == FAIL_ON ? number >= target : number == target;
    if (mode == COUNT || !hit) return 0;
    if (number == target) snprintf(last_call, sizeof last_call, "%s", name);
    if (mode == KILL) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define GUARD(name, condition) REAL(name); if ((condition) && strikes(#name)) return -1

static int opened(int descriptor, int mine) {
    if (descriptor >= 0 && descriptor < (int)sizeof ours) ours[descriptor] = mine;
    return descriptor;
}

#define OPEN(name, directory_parameter, mine, ...)                                    \
    int name(directory_parameter const char *path, int flags, ...) {                  \
        mode_t permissions = 0;                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) {                                          \
            va_list rest;                                                             \
            va_start(rest, flags);                                                    \
            permissions = va_arg(rest, mode_t);                                       \
            va_end(rest);                                                             \
        }                                                                             \
        int concerned = mine;                                                         \
        GUARD(name, concerned && (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)));  \
        return opened(real(__VA_ARGS__, flags, permissions), concerned);              \
    }
#define NONE
#define DIRECTORY int directory,
OPEN(open, NONE, below(path), path)
OPEN(open64, NONE, below(path), path)
OPEN(openat, DIRECTORY, below_at(directory, path), directory, path)
OPEN(openat64, DIRECTORY, below_at(directory, path), directory, path)

int close(int descriptor) {
    REAL(close);
    opened(descriptor, 0);
    return real(descriptor);
}
ssize_t write(int d, const void *data, size_t n) { GUARD(write, is_ours(d)); return real(d, data, n); }
ssize_t writev(int d, const struct iovec *v, int n) { GUARD(writev, is_ours(d)); return real(d, v, n); }
ssize_t pwrite(int d, const void *data, size_t n, off_t at) { GUARD(pwrite, is_ours(d)); return real(d, data, n, at); }
ssize_t pwrite64(int d, const void *data, size_t n, off64_t at) { GUARD(pwrite64, is_ours(d)); return real(d, data, n, at); }
int fsync(int d) { GUARD(fsync, is_ours(d)); return real(d); }
int fdatasync(int d) { GUARD(fdatasync, is_ours(d)); return real(d); }
int ftruncate(int d, off_t n) { GUARD(ftruncate, is_ours(d)); return real(d, n); }
int ftruncate64(int d, off64_t n) { GUARD(ftruncate64, is_ours(d)); return real(d, n); }
int mkdir(const char *p, mode_t m) { GUARD(mkdir, below(p)); return real(p, m); }
int mkdirat(int d, const char *p, mode_t m) { GUARD(mkdirat, below_at(d, p)); return real(d, p, m); }
int rename(const char *a, const char *b) { GUARD(rename, below(b)); return real(a, b); }
int renameat(int d, const char *a, int e, const char *b) { GUARD(renameat, below_at(e, b)); return real(d, a, e, b); }
int unlink(const char *p) { GUARD(unlink, below(p)); return real(p); }
int unlinkat(int d, const char *p, int f) { GUARD(unlinkat, below_at(d, p)); return real(d, p, f); }
int rmdir(const char *p) { GUARD(rmdir, below(p)); return real(p); }
