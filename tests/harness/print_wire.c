/* docs/wire.md, from the tables that both sides of each channel are held to. */
#include <stdio.h>

#include "runtime/base/frame.h"
#include "runtime/base/wire.h"

static const struct {
    uint32_t bit;
    const char *name;
} roles[] = {{CM_ROLE_SUPERVISOR, "supervisor"},
             {CM_ROLE_GATEWAY, "gateway"},
             {CM_ROLE_KEEPER, "keeper"},
             {CM_ROLE_WORKER, "worker"},
             {CM_ROLE_DEVTPM, "devtpm"}},
  phases[] = {{CM_PHASE_START, "start"}, {CM_PHASE_SERVE, "serve"}, {CM_PHASE_DRAIN, "drain"}};

static void roles_print(uint32_t bits)
{
    const char *before = "";
    if (bits == CM_ROLE_ANY_CHILD) {
        printf("every child");
        return;
    }
    for (size_t i = 0; i < sizeof(roles) / sizeof(roles[0]); i++) {
        if ((bits & roles[i].bit) != 0) {
            printf("%s%s", before, roles[i].name);
            before = ", ";
        }
    }
}

static void size_print(uint32_t least, uint32_t most)
{
    if (least == most) {
        printf("%u", least);
    } else if (most == UINT32_MAX) {
        printf("%u and more", least);
    } else {
        printf("%u to %u", least, most);
    }
}

static void descriptors_print(void)
{
    puts("## Descriptors\n\nEvery role is started with these and no others; 0 to 2 are "
         "`/dev/null`.\n\n| number | name | roles | what it is |\n|---|---|---|---|");
    for (int fd = 0; fd < CM_FD_COUNT; fd++) {
        if (cm_fd_rows[fd].name != NULL) {
            printf("| %d | `%s` | ", fd, cm_fd_rows[fd].name);
            roles_print(cm_fd_rows[fd].roles);
            printf(" | %s |\n", cm_fd_rows[fd].meaning);
        }
    }
}

static void frames_print(void)
{
    puts("\n## Control frames\n\nOn descriptor 3, a SOCK_SEQPACKET pair: one packet is one frame, "
         "header u16 type, u16 descriptors, u32 bytes. What is not in this table, comes from the "
         "wrong side, in the wrong phase, with the wrong size or a second time ends the "
         "role.\n\n| type | frame | from | to | phases | once | bytes | descriptors | why "
         "|\n|---|---|---|---|---|---|---|---|---|");
    for (int type = 1; type < CM_FRAME_TYPE_COUNT; type++) {
        const struct cm_frame_row *row = &cm_frames[type];
        const char *before = "";
        printf("| %d | `%s` | ", type, row->name);
        roles_print(row->senders);
        printf(" | ");
        roles_print(row->receivers);
        printf(" | ");
        for (size_t i = 0; i < sizeof(phases) / sizeof(phases[0]); i++) {
            if ((row->phases & phases[i].bit) != 0) {
                printf("%s%s", before, phases[i].name);
                before = ", ";
            }
        }
        printf(" | %s | ", row->once ? "yes" : "no");
        size_print(row->bytes_min, row->bytes_max);
        printf(" | %u | %s |\n", row->fds, row->reason);
    }
}

static void records_print(void)
{
    puts("\n## Ring records\n\nBetween gateway and worker, one ring each way. Payloads are the "
         "structs of `runtime/base/wire.h`, followed by bytes where the size is open; each side "
         "checks every field as if the other were hostile.\n\n| type | record | way | bytes | why "
         "|\n|---|---|---|---|---|");
    for (int type = 1; type < CM_WIRE_TYPE_COUNT; type++) {
        const struct cm_wire_row *row = &cm_wire_rows[type];
        printf("| %d | `%s` | %s | ", type, row->name, row->way);
        size_print(row->bytes_min, row->bytes_max);
        printf(" | %s |\n", row->meaning);
    }
}

int main(void)
{
    puts("# What the processes say to each other\n\nMade by `./run docs` from the tables in "
         "`runtime/base/frame.c` and `runtime/base/wire.c`; a test compares.\n");
    descriptors_print();
    frames_print();
    records_print();
    return 0;
}
