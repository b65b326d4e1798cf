// Preloaded into a server: while the file that KDS_FAIL_FSYNC names exists, nothing reaches the disk.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int fails(void) {
    const char *switch_file = getenv("KDS_FAIL_FSYNC");
    if (switch_file && access(switch_file, F_OK) == 0) {
        errno = EIO;
        return 1;
    }
    return 0;
}

int fsync(int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return fails() ? -1 : real(file);
}

int fdatasync(int file) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return fails() ? -1 : real(file);
}
