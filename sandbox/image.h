/* Images: a program with its loader and libraries in sealed memfds. What is measured is what runs.
 *
 * One store holds each file once; images name files of the store. Descriptors are close-on-exec and
 * owned by the store until cm_image_store_close. */
#ifndef CASEMATE_SANDBOX_IMAGE_H
#define CASEMATE_SANDBOX_IMAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "runtime/base/error.h"
#include "sandbox/elf.h"

#define CM_IMAGE_FILES_MAX     24u /* of one program */
#define CM_STORE_FILES_MAX     64u
#define CM_IMAGE_FD_FIRST      32 /* where a role finds its image; it closes them first of all */
#define CM_IMAGE_FD_FOLDER     31 /* the supervisor's: the folder of the programs */
#define CM_IMAGE_ARGUMENTS_MAX 130u

struct cm_image_file {
    char name[CM_ELF_NAME_BYTES]; /* base name, as measured */
    int fd;                       /* sealed */
    struct cm_elf elf;
};

struct cm_image_store {
    uint32_t count;
    struct cm_image_file files[CM_STORE_FILES_MAX];
};

struct cm_image {
    uint32_t count;                    /* 0: none */
    bool dynamic;                      /* files[1] is the loader */
    uint8_t files[CM_IMAGE_FILES_MAX]; /* indices of the store: program, loader, libraries */
};

/* Copy `program` of the folder and all that it needs. Fails: SYSTEM (cannot open or copy), CONFIG
 * (no ELF, or a library that is in no known folder). */
CM_MUST_USE enum cm_status cm_image_load(struct cm_image_store *store, int folder_fd,
                                         const char *program, struct cm_image *ret_image,
                                         struct cm_error *err);
void cm_image_store_close(struct cm_image_store *store);

/* In a child: the image's descriptors, in order, to ret_fds. */
uint32_t cm_image_fds(const struct cm_image_store *store, const struct cm_image *image,
                      int ret_fds[static CM_IMAGE_FILES_MAX]);
/* Execute the image, whose descriptors lie at CM_IMAGE_FD_FIRST and up. arguments[0] is the
 * program's name; both lists end with NULL. The loader obeys LD_* of the environment: pass none of
 * these. Returns only on failure. */
void cm_image_exec(const struct cm_image *image, char *const *arguments, char *const *environment);
/* In a process that was executed so: take its own image back into an empty store, close-on-exec.
 * What it measures of itself is then what it runs. Fails: POLICY CM-IMAGE-OWN where a descriptor is
 * not sealed, or where code is mapped that is not the image's. */
CM_MUST_USE enum cm_status cm_image_adopt(struct cm_image_store *store, struct cm_image *ret_image,
                                          struct cm_error *err);

#endif
