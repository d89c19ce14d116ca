/* Sealed copies of what will run, and the exec of exactly these copies. */
#include "sandbox/image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "runtime/base/sealed.h"

#ifndef MFD_EXEC /* Linux 6.3; older kernels refuse it, and make every memfd executable */
#define MFD_EXEC 0x0010U
#endif

#define FILE_BYTES_MAX (256u << 20)

static const char *const folders[] = {
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
};

static int memfd_make(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC);
    return fd >= 0 || errno != EINVAL ? fd : memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
}

/* A sealed copy of an open file. */
static enum cm_status copy_seal(int source, const char *name, int *ret_fd, struct cm_error *err)
{
    struct stat facts;
    off_t offset = 0;
    ssize_t moved = 1;
    int fd = memfd_make(name);
    if (fd < 0 || fstat(source, &facts) != 0) {
        goto failed;
    }
    if (!S_ISREG(facts.st_mode) || facts.st_size <= 0 || facts.st_size > FILE_BYTES_MAX) {
        close(fd);
        return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-FILE", "%s is no program or library", name);
    }
    while (offset < facts.st_size && moved > 0) {
        moved = sendfile(fd, source, &offset, (size_t)(facts.st_size - offset));
    }
    /* A file that shrank meanwhile is sealed as it was read: its digest is then unknown. */
    if (moved < 0 || fcntl(fd, F_ADD_SEALS, CM_SEALS_ALL) != 0) {
        goto failed;
    }
    *ret_fd = fd;
    return CM_OK;
failed:
    moved = errno;
    if (fd >= 0) {
        close(fd);
    }
    return cm_error_errno(err, (int)moved, "CM-IMAGE-COPY", "cannot copy %s", name);
}

static enum cm_status elf_load(int fd, const char *name, struct cm_elf *ret_elf,
                               struct cm_error *err)
{
    struct stat facts;
    void *bytes = fstat(fd, &facts) == 0
                      ? mmap(NULL, (size_t)facts.st_size, PROT_READ, MAP_PRIVATE, fd, 0)
                      : MAP_FAILED;
    if (bytes == MAP_FAILED) {
        return cm_error_errno(err, errno, "CM-IMAGE-COPY", "cannot look into %s", name);
    }
    enum cm_status status = cm_elf_read(bytes, (size_t)facts.st_size, name, ret_elf, err);
    munmap(bytes, (size_t)facts.st_size);
    return status;
}

/* Take an open file into the store; closes source. */
static enum cm_status store_add(struct cm_image_store *store, int source, const char *name,
                                uint8_t *ret_index, struct cm_error *err)
{
    enum cm_status status = CM_OK;
    struct cm_image_file *file = &store->files[store->count];
    if (store->count == CM_STORE_FILES_MAX || strlen(name) >= sizeof(file->name)) {
        status =
            cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-FILE", "too many files, or name: %s", name);
    } else {
        status = copy_seal(source, name, &file->fd, err);
    }
    close(source);
    if (status != CM_OK) {
        return status;
    }
    status = elf_load(file->fd, name, &file->elf, err);
    if (status != CM_OK) {
        close(file->fd);
        return status;
    }
    snprintf(file->name, sizeof(file->name), "%s", name);
    *ret_index = (uint8_t)store->count++;
    return CM_OK;
}

static enum cm_status library_find(struct cm_image_store *store, const char *name,
                                   uint8_t *ret_index, struct cm_error *err)
{
    char path[CM_ELF_NAME_BYTES + 64];
    for (uint32_t i = 0; i < store->count; i++) {
        if (strcmp(store->files[i].name, name) == 0) {
            *ret_index = (uint8_t)i;
            return CM_OK;
        }
    }
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        snprintf(path, sizeof(path), "%s/%s", folders[i], name);
        int source = open(path, O_RDONLY | O_CLOEXEC);
        if (source >= 0) {
            return store_add(store, source, name, ret_index, err);
        }
    }
    return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-LIBRARY",
                        "library %s is in none of the system's folders: install it there", name);
}

static bool image_has(const struct cm_image *image, uint8_t index)
{
    return memchr(image->files, index, image->count) != NULL;
}

static enum cm_status image_add(struct cm_image *image, uint8_t index, struct cm_error *err)
{
    if (image_has(image, index)) {
        return CM_OK;
    }
    if (image->count == CM_IMAGE_FILES_MAX) {
        return cm_error_set(err, CM_E_CONFIG, "CM-IMAGE-LIBRARY", "a program needs too many files");
    }
    image->files[image->count++] = index;
    return CM_OK;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

/* Breadth first: the list grows while it is walked. */
static enum cm_status needed_add(struct cm_image_store *store, struct cm_image *image,
                                 struct cm_error *err)
{
    enum cm_status status = CM_OK;
    for (uint32_t at = 0; status == CM_OK && at < image->count; at++) {
        const struct cm_elf *elf = &store->files[image->files[at]].elf;
        for (uint32_t i = 0; status == CM_OK && i < elf->needed_count; i++) {
            uint8_t index;
            status = library_find(store, elf->needed[i], &index, err);
            if (status == CM_OK) {
                status = image_add(image, index, err);
            }
        }
    }
    return status;
}

enum cm_status cm_image_load(struct cm_image_store *store, int folder_fd, const char *program,
                             struct cm_image *ret_image, struct cm_error *err)
{
    struct cm_image image = {.count = 0};
    uint8_t index;
    int source = openat(folder_fd, program, O_RDONLY | O_CLOEXEC);
    if (source < 0 || faccessat(folder_fd, program, X_OK, 0) != 0) {
        int error_number = errno;
        if (source >= 0) {
            close(source);
        }
        return cm_error_errno(err, error_number, "CM-SUP-PROGRAM",
                              "cannot run %s beside the supervisor", program);
    }
    enum cm_status status = store_add(store, source, base_name(program), &index, err);
    if (status == CM_OK) {
        status = image_add(&image, index, err);
    }
    if (status == CM_OK && store->files[index].elf.interpreter[0] != '\0') {
        image.dynamic = true;
        status = library_find(store, base_name(store->files[index].elf.interpreter), &index, err);
        if (status == CM_OK) {
            status = image_add(&image, index, err);
        }
    }
    if (status == CM_OK) {
        status = needed_add(store, &image, err);
    }
    if (status == CM_OK) {
        *ret_image = image;
    }
    return status;
}

void cm_image_store_close(struct cm_image_store *store)
{
    for (uint32_t i = 0; i < store->count; i++) {
        close(store->files[i].fd);
    }
    store->count = 0;
}

uint32_t cm_image_fds(const struct cm_image_store *store, const struct cm_image *image,
                      int ret_fds[static CM_IMAGE_FILES_MAX])
{
    for (uint32_t i = 0; i < image->count; i++) {
        ret_fds[i] = store->files[image->files[i]].fd;
    }
    return image->count;
}

void cm_image_exec(const struct cm_image *image, const char *program)
{
    char preload[CM_IMAGE_FILES_MAX * 20] = "", path[32];
    size_t used = 0;
    char *const environment[] = {NULL};
    char *const plain[] = {(char *)program, NULL};
    char *const loaded[] = {(char *)program, "--inhibit-cache", "--preload", preload,
                            "--argv0",       (char *)program,   path,        NULL};
    for (uint32_t i = 2; i < image->count; i++) {
        used += (size_t)snprintf(preload + used, sizeof(preload) - used, "%s/proc/self/fd/%u",
                                 i == 2 ? "" : ":", CM_IMAGE_FD_FIRST + i);
    }
    snprintf(path, sizeof(path), "/proc/self/fd/%d", CM_IMAGE_FD_FIRST);
    syscall(SYS_execveat, CM_IMAGE_FD_FIRST + (image->dynamic ? 1 : 0), "",
            image->dynamic ? loaded : plain, environment, AT_EMPTY_PATH);
}
