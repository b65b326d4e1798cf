// Preloaded into a server, to hurt it as a disk or a crash would. Each is switched on by a file that an environment
// variable names: KDS_FAIL_FSYNC: nothing reaches the disk. KDS_FAIL_READ: no database can be read. KDS_DIE_AT: the process
// dies before the call that stands in that file, such as "unlink storage-key-"; with "slowly" behind it takes its time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_on(const char *variable) {
    const char *switch_file = getenv(variable);
    return switch_file && access(switch_file, F_OK) == 0;
}

static int fsync_fails(void) {
    if (!is_on("KDS_FAIL_FSYNC")) return 0;
    errno = EIO;
    return 1;
}

int fsync(int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return fsync_fails() ? -1 : real(file);
}

int fdatasync(int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return fsync_fails() ? -1 : real(file);
}

static int read_fails(int file) {
    if (!is_on("KDS_FAIL_READ")) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "/kds.db")) return 0;
    errno = EIO;
    return 1;
}

ssize_t read(int file, void *to, size_t count) {
    return read_fails(file) ? -1 : syscall(SYS_read, file, to, count);
}
ssize_t pread(int file, void *to, size_t count, off_t at) {
    return read_fails(file) ? -1 : syscall(SYS_pread64, file, to, count, at);
}
ssize_t pread64(int file, void *to, size_t count, off64_t at) {
    return read_fails(file) ? -1 : syscall(SYS_pread64, file, to, count, at);
}

static void perhaps_die(const char *call, const char *path) {
    const char *switch_file = getenv("KDS_DIE_AT");
    FILE *moment = switch_file ? fopen(switch_file, "r") : NULL;
    char at[32], part[64], how[16] = "";
    if (!moment) return;
    int read = fscanf(moment, "%31s %63s %15s", at, part, how);
    fclose(moment);
    if (read < 2 || strcmp(at, call) || !strstr(path, part)) return;
    if (!strcmp(how, "slowly"))
        usleep(1500000);
    else
        kill(getpid(), SIGKILL);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    perhaps_die("rename", from);
    return real(from, to);
}

int unlink(const char *path) {
    int (*real)(const char *) = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
    perhaps_die("unlink", path);
    return real(path);
}
