// Reads of a model's tensors fail with EIO while the file exists that FAIL_READS names.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int of_a_tensor(int descriptor) {
    char link[64], path[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, "/tensor0") != NULL;
}

ssize_t pread64(int descriptor, void *buffer, size_t count, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    const char *while_there_is = getenv("FAIL_READS");
    if (!real) real = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
    if (while_there_is && access(while_there_is, F_OK) == 0 && of_a_tensor(descriptor)) {
        errno = EIO;
        return -1;
    }
    return real(descriptor, buffer, count, offset);
}

ssize_t pread(int descriptor, void *buffer, size_t count, off_t offset) { return pread64(descriptor, buffer, count, offset); }
