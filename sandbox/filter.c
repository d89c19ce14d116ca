/* Installing filters, naming calls. */
#include "sandbox/filter.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

const char *cm_call_name(uint32_t number)
{
    static char text[24];
    if (number < CM_CALL_NAMES && cm_call_names[number] != NULL) {
        return cm_call_names[number];
    }
    snprintf(text, sizeof(text), "call %u", number);
    return text;
}

enum cm_status cm_filter_install(enum cm_filter_id id, struct cm_error *err)
{
    const struct cm_filter *filter = &cm_filters[id];
    struct sock_fprog program = {.len = (unsigned short)filter->program.count,
                                 .filter = (struct sock_filter *)filter->program.code};
    long failed =
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
    if (failed == 0) {
        return CM_OK;
    }
    int error_number = failed > 0 ? EBUSY : errno; /* > 0: a thread that has another filter */
    struct cm_error unread;
    err = err != NULL ? err : &unread;
    (void)cm_error_errno(err, error_number, "CM-SANDBOX-FILTER", "cannot install the filter %s",
                         filter->name);
    err->status = CM_E_SANDBOX;
    return CM_E_SANDBOX;
}

size_t cm_filters_encode(uint8_t *ret_bytes, size_t size)
{
    size_t used = 0;
    for (size_t i = 0; i < CM_FILTER_COUNT; i++) {
        const struct cm_filter *filter = &cm_filters[i];
        size_t name = strlen(filter->name) + 1;
        size_t lines = filter->program.count * sizeof(filter->program.code[0]);
        if (size - used < name + sizeof(uint32_t) + lines) {
            return 0;
        }
        memcpy(ret_bytes + used, filter->name, name);
        memcpy(ret_bytes + used + name, &filter->program.count, sizeof(uint32_t));
        memcpy(ret_bytes + used + name + sizeof(uint32_t), filter->program.code, lines);
        used += name + sizeof(uint32_t) + lines;
    }
    return used;
}
